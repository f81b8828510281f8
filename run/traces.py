"""Traces as every script has them: prompts, samples, records and what is read off them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from common import (
    ANSWER_CUE,
    EPISODE_MARKERS,
    ForcedAnswer,
    Forcing,
    Segmentation,
    Trace,
    flat,
    maj_at_k,
    normalized_regret,
    pass_at_k,
    read_traces,
    set_sampled_J,
    stop_phrase,
)
from engine import Refused
from engine.models import check_ids, context_length, load_config, load_tokenizer, pick_dtype
from engine.processes import ranks
from engine.sampler import Sampler, open_sampler
from engine.served_engine import Served, is_served
from engine.thoughts import marks_of
from engine.tokens import Completion, encode, prompt_ids, text_and_offsets
from grading.verdict import group_answers
from run.backtracking import asked_to_backtrack, backtracking_spans, first_attempt, prompt_or_attempt, tell_markers
from run.files import digest, fail
from run.folder import unrecorded, weights_digest

# A draw depends on its seed alone, a tuple of whole numbers: --seed, in a training the step, what is drawn (one of
# these), the problem (`problem_key`), and what else tells draws apart; the sampler adds the number of the sample. No
# generator has a state that --resume would have to restore: a step that is repeated draws what it drew before. No seed
# may be another's beginning: numpy pads them with zeros, so (1, 2) draws what (1, 2, 0) draws.
ROLLOUT, FORCED, PARTIAL, STOPPED, GOING_ON, CUT = range(6)  # rl_mrt.py; FORCED everywhere
DIRECT, FORCED_BUDGET, CHOSEN = 2, 3, 4  # analyze_r1.py, budget_force.py, star_mrt.py
VALIDATION = 99


def problem_key(problem: dict) -> int:
    return zlib.crc32(problem["id"].encode())


def segmentation(args, max_steps: int = 49, group_size: int = 1) -> Any:
    """A Segmentation with the published markers, those of --markers, and --max-episodes where a script has it; of the
    backtracking parameterization the function that cuts its texts, which joins nothing."""
    if args.parameterization == "backtracking":
        return backtracking_spans
    most = getattr(args, "max_episodes", Segmentation.max_episodes)
    return Segmentation(max_steps, group_size, most, (*EPISODE_MARKERS, *args.markers))


def checked_prompts(args, tokenizer, problems: list[dict], more: int = 0, forced=True) -> tuple[list[list[int]], int]:
    """The prompts of the problems, and the tokens of the longest with a completion and `more`, and an answer `forced`
    after it, if any is; ends the run if they exceed the model's context."""
    prompts = prompts_of(args, tokenizer, problems)
    if not is_served(args.engine):
        asked = [*prompts, encode(tokenizer, stop_phrase(tokenizer))]
        check_ids(f"--model {args.model}", load_config(args.model), asked)
    after = more + (room_for_answer(tokenizer, args.answer_tokens) if forced else 0)
    return prompts, check_lengths(args, problems, prompts, after)


def prompts_of(args, tokenizer, problems: list[dict]) -> list[list[int]]:
    return [prompt_of(args, tokenizer, problem) for problem in problems]


def prompt_of(args, tokenizer, problem: dict) -> list[int]:
    """The prompt of a problem, with the messages before it if its data set has such; ends the run if the model's chat
    template does not take them."""
    chat, begun = problem.get("messages", problem["problem"]), []
    if args.parameterization == "backtracking":
        chat, begun = asked_to_backtrack(tokenizer, chat)
    try:
        return prompt_ids(tokenizer, chat, args.chat_template_kwargs) + begun
    except Refused as why:
        fail(f"problem {problem['id']}: {why}")


def inputs_of(args, problems: list[dict], prompts: list[list[int]], held_out: Sequence[dict] = ()) -> dict[str, dict]:
    """What a run reads, for `open_run`: a digest of its weights, and of each problem its place and a digest of it, its
    gold answer and its prompt. The prompts of `held_out` are the last."""
    return {
        "weights": {weights_of(args): weights_digest(weights_of(args))},
        "problems or prompts": problem_digests(problems, prompts),
        "held-out problems or prompts": problem_digests(held_out, prompts[len(problems) :]),
    }


def problem_digests(problems: Sequence[dict], prompts: list[list[int]]) -> dict[str, str]:
    """{id: its place, and a digest of text, gold answer, recorded prefix and prompt}."""
    read = ((p["id"], digest(p["problem"], p["answer"], p.get("prefix"), ids)) for p, ids in zip(problems, prompts))
    return {name: f"{place} {digested}" for place, (name, digested) in enumerate(read)}


def room_for_answer(tokenizer, answer_tokens: int) -> int:
    """Tokens that a forced answer may add to a thought: the stop phrase and the answer."""
    return len(encode(tokenizer, "\n\n" + stop_phrase(tokenizer) + ANSWER_CUE)) + answer_tokens


def weights_of(args) -> str:
    """The Hub id or folder of a run's tokenizer and weights: of a served model the name says nothing."""
    return args.tokenizer or args.model


def tokenizer_of(args):
    tokenizer = load_tokenizer(weights_of(args), args.think_marks)
    marks = marks_of(tokenizer)
    if args.parameterization == "backtracking" and marks:
        why = f"its thoughts end with {marks.closing}, and a backtracking model writes its attempts outside of one"
        fail(f"--parameterization backtracking: not for {weights_of(args)}: {why}")
    return tokenizer


def sampler_of(args, tokenizer, longest: int, trained=None) -> Sampler:
    """`open_sampler` with the run's settings."""
    served = Served(args.model, weights_of(args), args.context, args.concurrency) if is_served(args.engine) else None
    how = args.engine, args.model, tokenizer, pick_dtype(args.dtype), longest, trained, served
    return open_sampler(*how, scores=by_likelihood(args))


def by_likelihood(args) -> bool:
    """Is J read off the gold answer's likelihood?"""
    return getattr(args, "bonus", 0) > 0 and args.progress != "sampled"


def context_of(args) -> int:
    """Tokens that the model of a run can attend to."""
    return args.context or context_length(load_config(weights_of(args)))


def check_lengths(args, problems: list[dict], prompts: list[list[int]], after: int) -> int:
    """Ends the run if a prompt, --max-tokens and what may come `after` them do not fit the model's context; returns the
    tokens of the longest."""
    context, room = context_of(args), args.max_tokens + after
    too_long = [(len(prompt), p["id"]) for p, prompt in zip(problems, prompts) if len(prompt) + room > context]
    if too_long:
        longest, name = max(too_long)
        others = f" (so do {len(too_long) - 1} others)" if len(too_long) > 1 else ""
        forced = f" + {after} that are forced after it" if after else ""
        left = context - longest - after
        flags = "--answer-tokens" + " or --extension-tokens" * ("extension_tokens" in args)
        fail(
            f"problem {name}: prompt of {longest} tokens + {args.max_tokens} of --max-tokens{forced} exceed the "
            f"model's context of {context}{others}; " + (f"--max-tokens {left} fits" if left > 0 else f"lower {flags}")
        )
    return max(map(len, prompts), default=0) + room


def forcing_of(args) -> Forcing:
    """How a run's flags say that answers are forced; backtracking, that one attempt is completed or made."""
    other: Any = (prompt_or_attempt, first_attempt) if args.parameterization == "backtracking" else ()
    return Forcing(args.forced_answers, args.answer_tokens, args.temperature, getattr(args, "top_p", 1.0), *other)


def sample_traces(args, sampler: Sampler, problems, prompts, rule=Segmentation(), first: int = 0, drawn=()):
    """Graded traces number `first` to --num-samples of each problem: [problems][samples]."""
    seeds, count = [(args.seed, *drawn, problem_key(problem)) for problem in problems], args.num_samples - first
    rows = sampler.generate(prompts, args.max_tokens, seeds, count, args.temperature, args.top_p, first)
    return read_traces(sampler.tokenizer, problems, prompts, rows, rule, first)


def new_traces(
    args, file: Path, sampler: Sampler, problems, prompts, rule=Segmentation(), given=None, forced=True, drawn=()
) -> Iterator[list[Trace]]:
    """The traces that a records.jsonl lacks, a batch of problems at a time, of which each process has a share:
    --num-samples a problem or those `given`, with J(μ) at every boundary if `forced`. `drawn`: what their seeds have
    between --seed and the problem."""
    counts = [args.num_samples] * len(problems) if given is None else [len(traces) for traces in given]
    rank, world = ranks()
    for number, (batch, first) in enumerate(unrecorded(file, problems, counts, args.batch_problems, sampler)):
        share = batch[rank::world]
        if given is None:
            inputs = [problems[i] for i in share], [prompts[i] for i in share]
            groups = sample_traces(args, sampler, *inputs, rule, first, drawn)
        else:
            groups = [given[i][first:] for i in share]
        traces = flat(groups)
        if forced:
            if number == 0:
                tell_single_episodes(args, traces)
            set_sampled_J(sampler, traces, forcing_of(args), (args.seed, FORCED))
        yield traces


def tell_single_episodes(args, traces: list[Trace]) -> None:
    """Says, before it is looked for, that no thought has progress within it, where none has two episodes; of the
    backtracking parameterization, what its markers lack."""
    if args.parameterization == "backtracking":
        tell_markers(traces)
    elif traces and all(len(trace.boundaries) <= 2 for trace in traces):
        print(
            f"all of the first {len(traces)} thoughts are one episode, with no progress within them to credit; "
            "--markers FILE names the phrases that open an episode of this model, three paragraphs or more apart",
            flush=True,
        )


def problem_of(record: dict) -> dict:
    """The problem of a record."""
    return {name: record[name] for name in ("problem", "messages", "id") if name in record} | {"answer": record["gold"]}


def trace_of(record: dict, tokenizer, problem: dict, prompt: list[int]) -> Trace:
    """The trace of a record, with the very tokens that were sampled; their log-probs are not kept."""
    ids = record["token_ids"]
    completion = Completion(ids, [], record["finish"], *text_and_offsets(tokenizer, ids))
    kept = {name: record[name] for name in ("boundaries", "finished", "answer", "sample", "verdict", "reward")}
    forced = [[ForcedAnswer(**answer) for answer in answers] for answers in record["forced"]]
    estimates = {name: record[name] for name in ("J", "answer_tokens", "asked") if name in record}
    return Trace(problem, prompt, completion, **kept, **estimates, forced=forced)


AXES = {"answer": "boundaries", "prompt": "asked"}  # --regret-axis: the field with the tokens before an answer


def trace_curve(record: dict, axis: str = "answer") -> tuple[list[float], list[float]]:
    """(tokens, J) at the boundaries of a recorded trace: prefix tokens + mean tokens of the answers forced there; with
    axis "prompt", the authors', μ's whole prompt in place of the prefix: template, problem and stop phrase, too."""
    return [before + answer for before, answer in zip(record[AXES[axis]], record["answer_tokens"])], record["J"]


def regret_at(record: dict, budget: float, axis: str = "answer") -> float:
    """`normalized_regret` of a recorded trace."""
    return normalized_regret(*trace_curve(record, axis), budget)


def accuracy_at(record: dict, budget: float, axis: str = "answer") -> float:
    """J at the last boundary of a recorded trace whose forced answer fits the budget; 0 before the first."""
    tokens, J = trace_curve(record, axis)
    return next((value for spent, value in zip(tokens[::-1], J[::-1]) if spent <= budget), 0.0)


def pass_rate(records: list[dict], k: int) -> float:
    """`pass_at_k` of one problem's recorded traces."""
    return pass_at_k(len(records), sum(r["verdict"] == "right" for r in records), k)


def vote_rate(answers: list[dict], gold: str | list[str], k: int, weighted: bool = False) -> float:
    """`maj_at_k` of recorded answers, of traces or forced ones. Boxes that are equal mathematically vote together; a
    vote counts 1 or, if weighted, 2^(mean token log-prob), as in the paper's analysis (Appendix D)."""
    classes = classes_of(tuple(a["boxed"] for a in answers), gold if isinstance(gold, str) else tuple(gold))
    return maj_at_k(classes, 0, k, [2 ** a["mean_logprob"] for a in answers] if weighted else None)


def vote_of(group: list[dict], k: int) -> float:
    """`vote_rate` of one problem's records."""
    return vote_rate(group, group[0]["gold"], k)


classes_of = lru_cache(maxsize=100_000)(group_answers)  # every k needs them; 0 are the right ones
