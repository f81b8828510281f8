"""common.py: what the scripts share, top to bottom in the order data flows.

    problem → prompt → sampler → completion → thought | answer → episodes → forced answers (μ) → J → progress
            → reward, advantage per token → log-probs → loss

Sections: 1 problems · 2 models and prompts · 3 the sampler · 4 thoughts and episodes · 5 forced answers (μ) and
progress · 6 the GRPO loss.
What is not about MRT has files of its own, and its names are here, too: sampling.py (two engines), grading.py (is an
answer the gold answer?), metrics.py (pass@k, maj@k, regret, intervals), training.py (micro-batches, checkpoints),
runs.py (flags, files, the folder of a run, pictures).

"Section", "Eq.", "Fig.", "Table" and "Appendix" refer to arXiv 2503.07572.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import platform
import zlib
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from grading import check_gold, extract_answer, grade, grade_all, group_answers  # noqa: F401  also for scripts
from metrics import (  # noqa: F401
    EXACT_SUBSETS,
    SUBSET_DRAWS,
    accuracy_at,
    additional_regret,
    bootstrap_interval,
    interval,
    maj_at_k,
    normalized_regret,
    pass_at_k,
    regret_at,
    tokens_to_reach,
    trace_curve,
    vote_at_k,
)
from runs import (  # noqa: F401
    Clock,
    add_common_flags,
    append_jsonl,
    cell,
    check_out,
    check_out_of_many,
    config_of,
    device_name,
    duration,
    fail,
    first_line,
    is_tiny,
    json_line,
    key,
    lasting,
    line,
    load_records,
    markdown,
    non_negative,
    numbers,
    open_run,
    parse_flags,
    positive_int,
    pyplot,
    read_config,
    read_jsonl,
    resolve_model,
    run_names,
    save_figure,
    script_name,
    short_name,
    token_axis,
    unrecorded,
    versions,
    whole_lines,
    whole_number,
    write_json,
    write_text,
)
from sampling import (
    Completion,
    Sampler,
    TransformersEngine,
    VllmEngine,
    autocast,
    pack_prefixes,
    pack_tensors,
    text_and_offsets,
    vllm_or_why_not,
)
from training import (  # noqa: F401
    end_on_sigterm,
    full_weights,
    gather_over_ranks,
    latest_checkpoint,
    learning_rate,
    load_checkpoint,
    load_weights,
    micro_batches,
    on_sigterm,
    open_run_once,
    prepare,
    ranks,
    rewind,
    same_number,
    save_checkpoint,
    save_model,
    scorer,
    shard,
    start_processes,
    sum_over_ranks,
    wait_for_ranks,
)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what failed is said in one line by us
if platform.system() == "Linux" and not torch.cuda.is_available():
    with contextlib.suppress(Exception):  # glibc: keep freed tensors mapped; page faults cost a third of a CPU step
        ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 26)  # M_MMAP_THRESHOLD; larger ones would fragment the heap
        ctypes.CDLL("libc.so.6").mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD

THINK_END = "</think>"
# The forced-termination phrase of the authors' public code: what turns the model into the meta-prover μ.
STOP_PHRASE = (
    "Time is up.\n\nGiven the time I've spent and the approaches I've tried, I should stop thinking and formulate a "
    f"final answer based on what I already have.\n{THINK_END}\n\n**Step-by-Step Explanation and Answer:**\n\n1. **"
)
BOX_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."  # Qwen's for mathematics
ANSWER_CUE = "Final Answer:** \\boxed{"  # ours: where the gold answer's likelihood is read off, see `sequence_logprobs`


# ============================================================================================ 1 problems

PROBLEM_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "solution")
NOT_ANSWERS = ("proof", "notfound", "not found", "see solution", "n/a", "none", "unknown")  # NuminaMath has them


def load_problems(dataset: str, split: str, limit: int | None = None) -> list[dict]:
    """`[{problem, answer, id}]` from `tiny`, `tiny:30` (only that difficulty), a .jsonl file or the Hub.

    `answer` is the bare gold answer: what follows GSM8K's `####`, or a solution's last box. A row of a file whose
    answer cannot be graded ends the run and is named; rows of a Hub set (NuminaMath has proofs) are left out, counted.
    """
    if is_tiny_dataset(dataset):
        import tiny

        try:
            numbers = [n for n in dataset[5:].split(",") if n]
            levels = (
                tuple(dict.fromkeys(int(n) if n.isdecimal() else 0 for n in numbers)) or tiny.LEVELS
            )  # 0 is refused there
            rows = tiny.problems(split, levels)
        except ValueError as error:
            fail(str(error))
        return rows[:limit]
    from_file = dataset.endswith((".jsonl", ".json")) or Path(dataset).exists()
    rows: Any = read_jsonl(Path(dataset)) if from_file else load_from_hub(dataset, split)
    columns = {c.lower(): c for c in (rows[0] if from_file else rows.column_names)}
    problem_column = next((columns[c] for c in PROBLEM_COLUMNS if c in columns), None)
    answer_column = next((columns[c] for c in ANSWER_COLUMNS if c in columns), None)
    if problem_column is None or answer_column is None:
        fail(
            f"--dataset {dataset}: needs one column of {'|'.join(PROBLEM_COLUMNS)} and one of "
            f"{'|'.join(ANSWER_COLUMNS)}; found {', '.join(columns.values())}"
        )
    problems, skipped = [], 0
    for number, row in enumerate(rows, 1):
        if limit is not None and len(problems) == limit:
            break
        try:
            if not isinstance(row.get(problem_column), str) or not row[problem_column].strip():
                raise ValueError(f"column {problem_column} holds no text")
            gold = gold_answer(str(row.get(answer_column, "")), is_solution=answer_column.lower() == "solution")
        except ValueError as error:
            if from_file:
                fail(f"{dataset}, row {number}: {error}")
            skipped += 1
            continue
        problems.append({"problem": row[problem_column], "answer": gold, "id": str(row.get("id", number - 1))})
    if skipped:
        print(f"{dataset}: left out {skipped} rows without an answer that can be graded")
    if not problems:
        fail(f"--dataset {dataset}: no usable problem")
    if len({p["id"] for p in problems}) < len(problems):
        for number, problem in enumerate(problems):
            problem["id"] = f"{problem['id']}-{number}"
    return problems


def load_from_hub(dataset: str, split: str):
    """The rows of `owner/name` or `owner/name:subset`; a data set with one split is taken whatever that is called."""
    import datasets

    name, _, subset = dataset.partition(":")
    try:
        splits: Any = datasets.load_dataset(name, subset or None)
    except Exception as error:
        fail(f"--dataset {dataset}: neither a file nor a data set that the Hub gives: {first_line(error)}")
    if split not in splits and len(splits) > 1:
        fail(f"--dataset {dataset}: has no split {split}; it has {', '.join(splits)}")
    return splits[split] if split in splits else next(iter(splits.values()))


def is_tiny_dataset(dataset: str) -> bool:
    return dataset == "tiny" or dataset.startswith("tiny:")


def gold_answer(text: str, is_solution: bool) -> str:
    """The bare answer of an answer column's text; ValueError where there is none that can be graded."""
    if "####" in text:
        text = text.rsplit("####", 1)[1]
    elif is_solution or "\\boxed" in text:
        boxed = extract_answer(text)
        if boxed is None:
            raise ValueError("the solution holds no \\boxed{} answer")
        text = boxed
    text = text.strip()
    if text.lower() in NOT_ANSWERS:
        raise ValueError(f"{text!r} is not an answer")
    check_gold(text)
    return text


# ============================================================================================ 2 models and prompts


def load_tokenizer(model: str):
    """The tokenizer of a Hub id, a folder or `tiny`."""
    transformers_logging.disable_progress_bar()
    path = resolve_model(model)
    if Path(path).is_dir():
        for name in ("config.json", "tokenizer_config.json"):
            if not (Path(path) / name).exists():
                fail(f"--model {model}: the folder has no {name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        fail(f"--model {model}: neither a model folder nor a model that the Hub gives: {first_line(error)}")
    if tokenizer.chat_template is None:
        say_once(f"{model} has no chat template: its prompt is the bare problem")
    return tokenizer


@lru_cache
def say_once(text: str) -> None:
    print(text)


def load_model(model: str, device: str | torch.device, dtype: torch.dtype = torch.float32):
    """The model. Training keeps its weights in float32 and does bf16 arithmetic over them by `autocast`."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(resolve_model(model), dtype=dtype)
    except Exception as error:
        fail(f"--model {model}: cannot be loaded: {first_line(error)}")
    return loaded.to(device).eval()


def pick_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(dtype: str) -> torch.dtype:
    """--dtype auto: bfloat16 on a GPU, float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a piece of a prompt: no special token is added, a template has them already."""
    return list(_encode(tokenizer, text))


@lru_cache(maxsize=4096)
def _encode(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def prompt_ids(tokenizer, problem: str) -> list[int]:
    """The problem through the chat template, up to where the model starts to think. The user message is the bare
    problem, as in the authors' code; a model that does not think is asked for a boxed answer, or it seldom gives one.
    """
    if not thinks(tokenizer):
        problem += "\n\n" + BOX_INSTRUCTION
    if tokenizer.chat_template is None:  # a base model: the bare text, with the tokenizer's own beginning
        return tokenizer.encode(problem + "\n\n")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem}], tokenize=False, add_generation_prompt=True
    )
    return encode(tokenizer, text)


def thinks(tokenizer) -> bool:
    """Does the vocabulary have the end-of-thinking marker as one token? If not, the whole completion is the thought."""
    return len(encode(tokenizer, THINK_END)) == 1


def load_config(model: str) -> Any:
    try:
        return AutoConfig.from_pretrained(resolve_model(model)).get_text_config()
    except Exception as error:
        fail(f"--model {model}: its config.json cannot be used: {first_line(error)}")


def context_length(model: str) -> int:
    """Tokens that a model can attend to."""
    return getattr(load_config(model), "max_position_embeddings", None) or 1 << 30


def check_lengths(args, tokenizer, problems: list[dict], prompts: list[list[int]], more: int = 0) -> int:
    """Ends the run if a prompt and what may follow it (a thought, the stop phrase, a forced answer) do not fit the
    model's context; returns the tokens of the longest."""
    context = context_length(args.model)
    phrase = len(encode(tokenizer, "\n\n" + STOP_PHRASE + ANSWER_CUE))
    room = args.max_tokens + more + phrase + args.answer_tokens
    too_long = [(len(q), p["id"]) for p, q in zip(problems, prompts) if len(q) + room > context]
    if too_long:
        longest, name = max(too_long)
        others = f"; so do {len(too_long) - 1} others" if len(too_long) > 1 else ""
        fail(
            f"problem {name}: prompt of {longest} tokens + {room} to generate (thought, stop phrase, answer) exceed "
            f"the model's context of {context}{others}"
        )
    return max(map(len, prompts), default=0) + room


# ============================================================================================ 3 the sampler
# Its two engines are sampling.py.


def pick_engine(engine: str) -> str:
    """--engine auto: vLLM where it imports and has a device, else transformers; says which and why."""
    if engine == "transformers":
        return engine
    works, why = vllm_or_why_not()
    if engine == "vllm" and not works:
        fail(f"--engine vllm: {why}; --engine transformers needs nothing else")
    if engine == "auto":
        print(f"engine: {works}" if works else f"engine: transformers, as {why}")
    return "vllm" if works else "transformers"


def open_sampler(args, tokenizer, longest: int, trained=None) -> Sampler:
    """The sampler that --engine names, over --model or over the transformers model that is `trained`. `longest`: most
    tokens of a prompt and what is sampled after it."""
    dtype = pick_dtype(args.dtype)
    if args.engine == "vllm":
        memory = 0.85 if trained is None else 0.5  # in training the model, its gradients and AdamW's moments need room
        try:
            return Sampler(VllmEngine(resolve_model(args.model), dtype, longest, trained, memory), tokenizer)
        except Exception as error:
            fail(f"--engine vllm: cannot start with {args.model}: {first_line(error)}")
    if trained is not None and ranks()[1] == 1:
        return Sampler(TransformersEngine(trained, dtype), tokenizer)
    return Sampler(TransformersEngine(load_model(args.model, pick_device(), dtype), dtype, trained=trained), tokenizer)


# ============================================================================================ 4 thoughts and episodes

EPISODE_MARKERS = (
    "Wait",
    "But wait",
    "Alternatively",
    "Is there another way to think about this?",
    "But let me double-check",
    "But hold on",
)


def episode_spans(thought: str, max_steps: int = 49, group_size: int = 1) -> list[tuple[int, int]]:
    """Episodes of a thought as [start, end) character spans: the paper's segmentation (Section 5).

    Paragraphs end at a blank line ("\\n\\n"). One that starts with one of `EPISODE_MARKERS` (prefix and
    case count: "Waiting" does, " Wait" does not) opens an episode if it stands more than 2 paragraphs
    after the last opening. After `max_steps` openings the rest is the last episode, so there are at most
    max_steps + 1; every `group_size` neighbours then become one. Published max_steps/group_size: 49/5
    Omni-MATH, 45/3 AIME 2024, 99/10 regret study. Spans start at 0, end at len(thought) and leave no
    gap: a separator belongs to the episode before it. An empty thought is one empty episode.
    Pass the thought only: "</think>" has no special meaning, and markers in an answer would count.
    Raises ValueError for max_steps < 0 or group_size < 1.
    """
    if max_steps < 0 or group_size < 1:
        raise ValueError(f"need max_steps >= 0 and group_size >= 1, got {max_steps} and {group_size}")
    starts, opened, position = [0], 0, 0  # opened: the paragraph at which the current episode began
    for index, paragraph in enumerate(thought.split("\n\n")):
        if len(starts) > max_steps:
            break
        if index - opened > 2 and paragraph.startswith(EPISODE_MARKERS):
            starts.append(position)
            opened = index
        position += len(paragraph) + len("\n\n")
    starts = starts[::group_size]
    return list(zip(starts, [*starts[1:], len(thought)]))


@dataclass
class Trace:
    """A completion read as thought and answer. Episode z_j (from 0) is `token_ids[boundaries[j] : boundaries[j + 1]]`:
    the spans are contiguous and cover the thought, nothing is tokenized twice. `boundaries[0]` is 0, the empty prefix.
    """

    problem: dict
    prompt: list[int]
    completion: Completion
    boundaries: list[int]
    finished: bool  # the model itself ended the thought
    answer: str | None  # what is graded: the text after the thought
    reward: float = 0.0  # outcome: 1 if the answer is right
    verdict: str = "none"  # right, wrong, none (no answer) or timeout
    values: list[float] = field(default_factory=list)  # J(μ) at the boundaries, where estimated
    answer_tokens: list[float] = field(default_factory=list)  # mean tokens of the forced answers there
    forced: list[list[Completion]] = field(default_factory=list)  # those answers, where sampled

    def prefix(self, boundary: int) -> str:
        return self.completion.text[: self.completion.offsets[boundary]]


def read_trace(tokenizer, problem: dict, prompt: list[int], completion: Completion, max_episodes: int = 1 << 30,
               max_steps: int = 49, group_size: int = 1) -> Trace:  # fmt: skip
    """Splits a completion at the end-of-thinking marker and its thought into episodes as `episode_spans` does, or into
    at most `max_episodes` (longer thoughts: equal numbers of neighbouring episodes are joined).

    Without a marker in the vocabulary the whole completion is thought and answer at once. With one, a thought that
    was cut before the marker has no answer, whatever boxes it holds.
    """
    ids, offsets = completion.token_ids, completion.offsets
    if thinks(tokenizer):
        marker = encode(tokenizer, THINK_END)[0]
        finished = marker in ids
        end = ids.index(marker) if finished else len(ids) - (completion.finish_reason == "stop")
        answer = completion.text[offsets[end + 1] :] if finished else None
    else:
        finished = completion.finish_reason == "stop"
        end, answer = len(ids) - finished, completion.text
    starts = [start for start, _ in episode_spans(completion.text[: offsets[end]], max_steps, group_size)]
    starts = starts[:: math.ceil(len(starts) / max_episodes)]
    # A token belongs to the episode it starts in.
    cuts = {min(first_at(offsets, start), end) for start in starts}
    boundaries = sorted(cuts | {0, end})
    return Trace(problem, prompt, completion, boundaries, finished, answer)


def first_at(offsets: list[int], character: int) -> int:
    """The first token that starts at a character or after it."""
    return bisect_left(offsets, character)


def grade_traces(traces: list[Trace]) -> None:
    """Sets `verdict` and `reward`, the 0/1 outcome, of every trace."""
    verdicts = grade_all([(extract_answer(t.answer or ""), t.problem["answer"]) for t in traces])
    for trace, verdict in zip(traces, verdicts):
        trace.verdict, trace.reward = verdict, float(verdict == "right")


def read_traces(tokenizer, problems: list[dict], prompts: list[list[int]], rows: list[list[Completion]],
                prefixes: list[str] | None = None, **how) -> list[list[Trace]]:  # fmt: skip
    """The completions of each (problem, prompt) as graded traces; `how`: see `read_trace`. A prompt may hold a prefix
    of the thought; its text is graded with what follows where a model without a marker answers in its thought."""
    groups = [
        [read_trace(tokenizer, problem, prompt, completion, **how) for completion in row]
        for problem, prompt, row in zip(problems, prompts, rows)
    ]
    if prefixes and not thinks(tokenizer):
        for group, prefix in zip(groups, prefixes):
            for trace in group:
                trace.answer = prefix + trace.completion.text
    grade_traces([trace for group in groups for trace in group])
    return groups


def sample_traces(args, sampler: Sampler, problems, prompts, missing: int | None = None, first: int = 0,
                  **how) -> list[list[Trace]]:  # fmt: skip
    """--num-samples graded traces a problem (or `missing` of them, from number `first`); `how`: see `read_trace`."""
    seeds = [(args.seed, key(p["id"])) for p in problems]
    count = args.num_samples if missing is None else missing
    rows = sampler.generate(prompts, args.max_tokens, seeds, count, args.temperature, args.top_p, first)
    return read_traces(sampler.tokenizer, problems, prompts, rows, **how)


def trace_record(trace: Trace) -> dict:
    """A trace as JSON holds it, with the very tokens that were sampled; without its forced answers' texts."""
    return {
        "text": trace.completion.text,
        "token_ids": trace.completion.token_ids,
        "finish": trace.completion.finish_reason,
        "finished": trace.finished,
        "answer": extract_answer(trace.answer or ""),
        "right": trace.reward,
        "verdict": trace.verdict,
        "boundaries": trace.boundaries,
        "J": trace.values,
        "answer_tokens": trace.answer_tokens,
    }


def trace_from_record(tokenizer, problem: dict, prompt: list[int], record: dict) -> Trace:
    """The trace again; `answer` is what its box held."""
    ids = record["token_ids"]
    completion = Completion(ids, [], record["finish"], *text_and_offsets(tokenizer, ids))
    trace = Trace(problem, prompt, completion, record["boundaries"], record["finished"], record["answer"])
    trace.reward, trace.verdict = record["right"], record["verdict"]
    trace.values, trace.answer_tokens = record["J"], record["answer_tokens"]
    return trace


# ============================================================================================ 5 forced answers (μ)


def forced_prompt(tokenizer, trace: Trace, boundary: int) -> list[int]:
    """The prompt of the meta-prover μ: the prefix of the thought up to a boundary, told that time is up (Section 4).

    As in the authors' code the complete thought gets only the end-of-thinking marker. The stop phrase is appended as
    tokens to the very tokens that were sampled.
    """
    text = trace.prefix(boundary)
    opening = (
        "<think>\n" if boundary == 0 and trace.completion.text.startswith("<think>") else ""
    )  # not in the template
    if thinks(tokenizer) and trace.finished and boundary == trace.boundaries[-1]:
        tail = end_of_thought(tokenizer, text)
    else:
        gap = "\n\n"[min(2, len(text) - len(text.rstrip("\n"))) :]
        phrase = STOP_PHRASE if thinks(tokenizer) else STOP_PHRASE.replace(THINK_END + "\n", "")
        tail = encode(tokenizer, opening + gap + phrase)
    return trace.prompt + trace.completion.token_ids[:boundary] + tail


def end_of_thought(tokenizer, text: str) -> list[int]:
    """The tokens that end a thought with this text as the model ends its own: the marker, on a line of its own."""
    return encode(tokenizer, ("" if text.endswith("\n") else "\n") + THINK_END)


@dataclass
class ForcedAnswers:
    """How J(μ|prefix) is estimated: `n` sampled answers a prefix, or the gold answer's likelihood."""

    method: str  # "sampled" or "likelihood"
    n: int
    max_tokens: int
    temperature: float
    top_p: float = 1.0


def success_rates(sampler: Sampler, traces: list[Trace], how: ForcedAnswers, seed: tuple) -> None:
    """Sets `values`, J(μ|z_0:j) at every boundary of every trace: the success rate of the model forced to answer there;
    `answer_tokens`, the mean tokens of those answers; and `forced`, the answers themselves where they are sampled.

    Equal prefixes (the empty one of a problem's traces) are asked once. A model without an end-of-thinking marker has
    answered when it stops by itself: J of its complete text is the outcome.
    """
    tokenizer, values, lengths, forced = sampler.tokenizer, {}, {}, {}
    places = [(t, b) for t, trace in enumerate(traces) for b in trace.boundaries]
    prompts = {place: tuple(forced_prompt(tokenizer, traces[place[0]], place[1])) for place in places}
    answered = {} if thinks(tokenizer) else {(t, trace.boundaries[-1]): trace.reward for t, trace in enumerate(traces)
                                             if trace.finished}  # fmt: skip
    prompts = {place: prompt for place, prompt in prompts.items() if place not in answered}
    golds = {prompt: traces[t].problem["answer"] for (t, _), prompt in prompts.items()}
    asked = list(golds)
    if how.method == "likelihood":
        complete = {p for (t, b), p in prompts.items() if traces[t].finished and b == traces[t].boundaries[-1]}
        cues = [encode(tokenizer, ("\n\n**" if prompt in complete else "") + ANSWER_CUE) for prompt in asked]
        heads = [[*prompt, *cue] for prompt, cue in zip(asked, cues)]
        tails = [encode(tokenizer, golds[prompt] + "}") for prompt in asked]
        values.update(zip(asked, np.exp(sequence_logprobs(sampler, heads, tails)).tolist()))
        lengths.update(zip(asked, [float(len(cue) + len(tail)) for cue, tail in zip(cues, tails)]))
    else:
        keys = [(*seed, zlib.crc32(np.array(prompt).tobytes())) for prompt in asked]
        asked_ids = [[*prompt] for prompt in asked]
        answers = sampler.generate(asked_ids, how.max_tokens, keys, how.n, how.temperature, how.top_p)
        values.update(zip(asked, mean_accuracy([{"answer": golds[prompt]} for prompt in asked], answers).tolist()))
        lengths.update(zip(asked, [float(np.mean([len(a.token_ids) for a in row])) for row in answers]))
        forced.update(zip(asked, answers))
    for t, trace in enumerate(traces):
        places = [(t, b) for b in trace.boundaries]
        trace.values = [answered[p] if p in answered else values[prompts[p]] for p in places]
        trace.answer_tokens = [0.0 if p in answered else lengths[prompts[p]] for p in places]
        trace.forced = [[] if p in answered else forced.get(prompts[p], []) for p in places]


@torch.inference_mode()
def sequence_logprobs(sampler: Sampler, heads: list[list[int]], tails: list[list[int]]) -> np.ndarray:
    """log P(tail | head) for each pair, shared prefixes computed once.

    With head = prefix + stop phrase + cue and tail = gold answer + "}" its exponential is J(μ|prefix) for answers
    that follow the cue at once: exact, without a sampled token, "the change in the likelihood of eventual success" of
    the paper's abstract. It is μ's success rate itself only where μ answers in this form (the embedded model does).
    """
    model, out = sampler.model, np.zeros(len(heads))
    packs = sorted(pack_prefixes([h + t for h, t in zip(heads, tails)]), key=lambda p: len(p.token_ids))
    while packs:
        batch = [packs.pop()]
        width = len(batch[0].token_ids)
        while packs and (len(batch) + 1) * width <= 16_384:
            batch.append(packs.pop())
        ids, mask, positions = pack_tensors(batch, model.device)
        with autocast(sampler.engine.dtype):
            hidden = model.base_model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
        sampler.computed_tokens += sum(len(pack.token_ids) for pack in batch)
        items = [(b, s, path) for b, pack in enumerate(batch) for s, path in pack.paths.items()]
        row = torch.tensor([b for b, s, _ in items for _ in tails[s]], device=model.device)
        column = torch.tensor([c for _, s, path in items for c in path[-len(tails[s]) - 1 : -1]], device=model.device)
        target = torch.tensor([t for _, s, _ in items for t in tails[s]], device=model.device)
        owner = np.array([s for _, s, _ in items for _ in tails[s]])
        with autocast(sampler.engine.dtype):
            logits = model.get_output_embeddings()(hidden[row, column]).float()
        logprobs = logits.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
        np.add.at(out, owner, logprobs.double().cpu().numpy())
    return out


def mean_accuracy(problems: list[dict], answers: list[list[Completion]]) -> np.ndarray:
    """Share of right answers among each problem's completions, [problems]."""
    pairs = [(extract_answer(a.text), p["answer"]) for p, row in zip(problems, answers) for a in row]
    return np.array([v == "right" for v in grade_all(pairs)], dtype=float).reshape(len(problems), -1).mean(1)


def cut_at_budget(trace: Trace, budget: int, exact: bool = False) -> int:
    """The last paragraph end of the thought within `budget` tokens, or the budget itself where there is none, or if
    `exact`."""
    end = min(budget, trace.boundaries[-1])
    if exact:
        return end
    return next((b for b in range(end, 0, -1) if trace.prefix(b).endswith("\n\n")), end)


def anytime_accuracy(sampler, problems, budgets, max_tokens: int, answer_tokens: int, temperature, seed: tuple) -> dict:
    """One trace a problem: accuracy, mean tokens, and the accuracy had the thought been stopped at each budget (traces
    that end within the budget count as they are)."""
    tokenizer = sampler.tokenizer
    prompts = [prompt_ids(tokenizer, p["problem"]) for p in problems]
    seeds = [(*seed, key(p["id"])) for p in problems]
    rows = sampler.generate(prompts, max_tokens, seeds, temperature=temperature)
    traces = [trace for (trace,) in read_traces(tokenizer, problems, prompts, rows, max_episodes=1)]
    cut = [t.completion.finish_reason == "length" for t in traces]
    longer = [(b, i) for b in budgets for i, t in enumerate(traces) if len(t.completion.token_ids) + cut[i] > b]
    forced = [forced_prompt(tokenizer, traces[i], cut_at_budget(traces[i], b)) for b, i in longer]
    answers = sampler.generate(forced, answer_tokens, [(*seeds[i], b) for b, i in longer], temperature=temperature)
    right = dict(zip(longer, mean_accuracy([problems[i] for _, i in longer], answers))) if longer else {}
    return {
        "accuracy": float(np.mean([t.reward for t in traces])),
        "tokens": float(np.mean([len(t.completion.token_ids) for t in traces])),
        "forced": {b: float(np.mean([right.get((b, i), t.reward) for i, t in enumerate(traces)])) for b in budgets},
    }


def episode_credits(values: list[float], credit_lambda: float) -> list[float]:
    """Credit of each episode from J at the k + 1 boundaries: Σ_{l ≥ j} λ^{l-j} r_prg(z_l), r_prg(z_j) = J_{j+1} - J_j
    (Def. 6.1). λ = 0 is the paper's greedy progress; λ = 1 is J at the end of the thought minus J at the episode's
    start, a return with μ as its baseline; between them it is generalised advantage estimation over episodes."""
    credits, running = [], 0.0
    for after, before in zip(values[:0:-1], values[-2::-1]):
        running = (after - before) + credit_lambda * running
        credits.append(running)
    return credits[::-1]


# ============================================================================================ 6 the GRPO loss


def group_advantages(rewards: torch.Tensor, normalize_std: bool = True) -> torch.Tensor:
    """A = (r - mean) / (std + 1e-4) within each group; [groups, rollouts] → the same shape.

    The std is the population's (a group of 1 gives 0, not NaN). A group whose rewards are equal up to rounding gets
    exactly 0: dividing rounding errors by a small std would make a signal of them. With the std, a rare success among
    16 counts 3.87, without it 0.94: normalising weights hard and easy problems up.
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    std = rewards.std(-1, keepdim=True, unbiased=False)
    scaled = centred / (std + 1e-4) if normalize_std else centred
    return torch.where(std > 1e-6, scaled, torch.zeros_like(scaled))


CHUNK_LOGITS = 1 << 26  # 256 MiB in float32


def token_logprobs(model, input_ids: torch.Tensor, where: torch.Tensor, temperature: float = 1.0, attention_mask=None,
                   chunk: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Log-probs of the tokens at `where` given all before them, under softmax(logits / temperature).

    input_ids [B, T]; where [B, T] bool, never the first column. Returns (log-probs [N], entropies [N], no gradient),
    N = where.sum(), in row-major order. The logits exist for `chunk` tokens at a time (if not told, so many as have
    CHUNK_LOGITS logits) and are computed again in the backward pass: no [tokens, vocabulary] tensor is ever kept.
    Rows padded on the right need no attention mask; rows padded on the left do.
    """
    positions = None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp(min=0)
    hidden = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    before, target = hidden[:, :-1][where[:, 1:]], input_ids[:, 1:][where[:, 1:]]
    head = model.get_output_embeddings()
    chunk = chunk or max(1, CHUNK_LOGITS // head.weight.shape[0])

    def of_chunk(states, tokens):
        logprobs = (head(states).float() / temperature).log_softmax(-1)
        entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
        return logprobs.gather(-1, tokens[:, None]).squeeze(-1), entropy

    parts = [
        checkpoint(of_chunk, states, tokens, use_reentrant=False)
        for states, tokens in zip(before.split(chunk), target.split(chunk))
    ]
    logprobs, entropies = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropies)


def grpo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    denominator: float,
    clip: float = 0.2,
    ref_logprobs: torch.Tensor | None = None,
    kl: float = 0.0,
) -> tuple[torch.Tensor, dict[str, float]]:
    """-1/denominator · Σ_tokens min(ρ A, clip(ρ, 1-ε, 1+ε) A) + kl · k3, ρ = exp(logprob - old logprob).

    All tensors have one shape and hold trained tokens alone: no prompt, no padding (`token_logprobs` leaves them out).
    The denominator is given: the trained tokens of the *whole* batch, fixed before the loop over micro-batches, so any
    split gives the same gradient. MRT does not change this function, only `advantages`.

    k3 = e^d - d - 1, d = ref - logprob, is never below 0 and estimates KL(π‖ref) on samples of π; its gradient is
    that of KL(ref‖π). d is clamped to ±10 before exp. Returns (loss, sums over tokens: clipped, kl).
    """
    ratio = (logprobs - old_logprobs).clamp(-10, 10).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    sums = {"clipped": float((clipped * advantages < ratio * advantages).sum())}
    if ref_logprobs is not None:
        d = (ref_logprobs - logprobs).clamp(-10, 10)
        k3 = d.exp() - d - 1
        per_token = per_token + kl * k3
        sums["kl"] = float(k3.detach().sum())
    return per_token.sum() / denominator, sums
