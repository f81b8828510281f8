"""Traces as every script has them: prompts, samples, records and what is read off them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from transformers.utils import chat_template_utils

from common import (
    ANSWER_CUE,
    EPISODE_MARKERS,
    STOP_PHRASE,
    ForcedAnswer,
    Forcing,
    Segmentation,
    Trace,
    maj_at_k,
    normalized_regret,
    pass_at_k,
    read_traces,
    set_sampled_J,
)
from engine.models import context_length, load_tokenizer, pick_dtype, say_once
from engine.sampler import Sampler, open_sampler
from engine.served_engine import Served, is_served
from engine.tokens import Completion, encode, prompt_ids, text_and_offsets
from plumbing.answers import group_answers
from run.files import digest, fail
from run.folder import unrecorded, weights_digest

# A draw depends on its seed alone, a tuple of whole numbers: --seed, in a training the step, what is drawn (one of
# these), the problem (`problem_key`), and what else tells draws apart; the sampler adds the number of the sample. No
# generator has a state that --resume would have to restore: a step that is repeated draws what it drew before.
ROLLOUT, FORCED, PARTIAL, STOPPED, GOING_ON = range(5)  # rl_mrt.py; FORCED everywhere
DIRECT, FORCED_BUDGET, CHOSEN = 2, 3, 4  # analyze_r1.py, budget_force.py, star_mrt.py
VALIDATION = 99


def problem_key(problem: dict) -> int:
    return zlib.crc32(problem["id"].encode())


def segmentation(args, max_steps: int = 49, group_size: int = 1) -> Segmentation:
    """A Segmentation with the published markers, those of --markers, and --max-episodes where a script has it."""
    most = getattr(args, "max_episodes", Segmentation.max_episodes)
    return Segmentation(max_steps, group_size, most, (*EPISODE_MARKERS, *args.markers))


def prompts_of(args, tokenizer, problems: list[dict], more: int = 0) -> tuple[list[list[int]], int]:
    """The prompts of the problems, and the tokens of the longest with a thought (and `more`) and a forced answer after
    it; ends the run if they exceed the model's context."""
    prompts = prompts_to(args, tokenizer, problems)
    room = args.max_tokens + more + room_for_answer(tokenizer, args.answer_tokens)
    return prompts, check_lengths(args, problems, prompts, room)


def prompts_to(args, tokenizer, problems: list[dict]) -> list[list[int]]:
    """The prompts of the problems. A chat template that asks for today's date is told the day the run began."""
    if "strftime_now" in str(tokenizer.chat_template):
        say_once(f"{weights_of(args)}: its chat template asks for today's date; for all of this run it is {args.date}")
        day = datetime.fromisoformat(args.date)
        # transformers takes no function for a template, but asks this name for the time.
        chat_template_utils.datetime = type("Pinned", (datetime,), {"now": classmethod(lambda *_: day)})
    return [prompt_ids(tokenizer, problem["problem"], args.chat_template_kwargs) for problem in problems]


def inputs_of(args, problems: list[dict], prompts: list[list[int]], held_out: Sequence[dict] = ()) -> dict[str, dict]:
    """What a run reads, for `open_run`: a digest of its weights, and of each problem its place and a digest of it, its
    gold answer and its prompt. The prompts of `held_out` are the last."""
    return {
        "weights": {weights_of(args): weights_digest(weights_of(args))},
        "problems or prompts": problem_digests(problems, prompts),
        "held-out problems or prompts": problem_digests(held_out, prompts[len(problems) :]),
    }


def problem_digests(problems: Sequence[dict], prompts: list[list[int]]) -> dict[str, str]:
    numbered = enumerate(zip(problems, prompts))
    return {p["id"]: f"{number} {digest(p['problem'], p['answer'], prompt)}" for number, (p, prompt) in numbered}


def room_for_answer(tokenizer, answer_tokens: int) -> int:
    """Tokens that a forced answer may add to a thought: the stop phrase and the answer."""
    return len(encode(tokenizer, "\n\n" + STOP_PHRASE + ANSWER_CUE)) + answer_tokens


def weights_of(args) -> str:
    """The Hub id or folder of a run's tokenizer and weights: of a served model the name says nothing."""
    return args.tokenizer or args.model


def tokenizer_of(args):
    return load_tokenizer(weights_of(args))


def sampler_of(args, tokenizer, longest: int, trained=None) -> Sampler:
    """`open_sampler` with the run's settings."""
    served = Served(args.model, weights_of(args), args.context, args.concurrency) if is_served(args.engine) else None
    return open_sampler(args.engine, args.model, tokenizer, pick_dtype(args.dtype), longest, trained, served)


def context_of(args) -> int:
    """Tokens that the model of a run can attend to."""
    return args.context or context_length(weights_of(args))


def check_lengths(args, problems: list[dict], prompts: list[list[int]], room: int) -> int:
    """Ends the run if a prompt and the `room` tokens that may follow it do not fit the model's context; returns the
    tokens of the longest."""
    context = context_of(args)
    too_long = [(len(prompt), p["id"]) for p, prompt in zip(problems, prompts) if len(prompt) + room > context]
    if too_long:
        longest, name = max(too_long)
        others = f"; so do {len(too_long) - 1} others" if len(too_long) > 1 else ""
        fail(
            f"problem {name}: prompt of {longest} tokens + {room} to generate (thought, stop phrase, answer) exceed "
            f"the model's context of {context}{others}"
        )
    return max(map(len, prompts), default=0) + room


def forcing_of(args) -> Forcing:
    """How a run's flags say that answers are forced."""
    return Forcing(args.forced_answers, args.answer_tokens, args.temperature, getattr(args, "top_p", 1.0))


def sample_traces(args, sampler: Sampler, problems, prompts, rule=Segmentation(), first: int = 0, drawn=()):
    """Graded traces number `first` to --num-samples of each problem: [problems][samples]."""
    seeds, count = [(args.seed, *drawn, problem_key(problem)) for problem in problems], args.num_samples - first
    rows = sampler.generate(prompts, args.max_tokens, seeds, count, args.temperature, args.top_p, first)
    return read_traces(sampler.tokenizer, problems, prompts, rows, rule, first)


def new_traces(
    args,
    file: Path,
    sampler: Sampler,
    problems,
    prompts,
    rule=Segmentation(),
    given=None,
    forced=True,
    process=(0, 1),
    drawn=(),
) -> Iterator[list[Trace]]:
    """The traces that a records.jsonl lacks, a batch of problems at a time: --num-samples a problem or those `given`,
    with J(μ) at every boundary if `forced`. `process`: this one's number and how many share the work; `drawn`: what
    their seeds have between --seed and the problem."""
    counts = [args.num_samples] * len(problems) if given is None else [len(traces) for traces in given]
    rank, world = process
    for batch, first in unrecorded(file, problems, counts, args.batch_problems, sampler):
        share = batch[rank::world]
        if given is None:
            inputs = [problems[i] for i in share], [prompts[i] for i in share]
            groups = sample_traces(args, sampler, *inputs, rule, first, drawn)
        else:
            groups = [given[i][first:] for i in share]
        traces = [trace for group in groups for trace in group]
        if forced:
            set_sampled_J(sampler, traces, forcing_of(args), (args.seed, FORCED))
        yield traces


def trace_of(record: dict, tokenizer, problem: dict, prompt: list[int]) -> Trace:
    """The trace of a record, with the very tokens that were sampled; their log-probs are not kept."""
    ids = record["token_ids"]
    completion = Completion(ids, [], record["finish"], *text_and_offsets(tokenizer, ids))
    kept = {name: record[name] for name in ("boundaries", "finished", "answer", "sample", "verdict", "reward")}
    forced = [[ForcedAnswer(**answer) for answer in answers] for answers in record["forced"]]
    estimates = {"J": record["J"], "answer_tokens": record["answer_tokens"], "forced": forced}
    return Trace(problem, prompt, completion, **kept, **estimates)


def trace_curve(record: dict) -> tuple[list[float], list[float]]:
    """(tokens, J) at the boundaries of a recorded trace: prefix tokens + mean tokens of the answers forced there."""
    return [b + a for b, a in zip(record["boundaries"], record["answer_tokens"])], record["J"]


def regret_at(record: dict, budget: float) -> float:
    """`normalized_regret` of a recorded trace."""
    return normalized_regret(*trace_curve(record), budget)


def accuracy_at(record: dict, budget: float) -> float:
    """J at the last boundary of a recorded trace whose forced answer fits the budget; 0 before the first."""
    tokens, J = trace_curve(record)
    return next((value for spent, value in zip(tokens[::-1], J[::-1]) if spent <= budget), 0.0)


def pass_rate(records: list[dict], k: int) -> float:
    """`pass_at_k` of one problem's recorded traces."""
    return pass_at_k(len(records), sum(r["verdict"] == "right" for r in records), k)


def vote_rate(answers: list[dict], gold: str | list[str], k: int, weighted: bool = False) -> float:
    """`maj_at_k` of recorded answers, of traces or forced ones. Boxes that are equal mathematically vote together; a
    vote counts 1 or, if weighted, 2^(mean token log-prob), as in the paper's analysis (Appendix D)."""
    classes = classes_of(tuple(a["boxed"] for a in answers), gold if isinstance(gold, str) else tuple(gold))
    return maj_at_k(classes, 0, k, [2 ** a["mean_logprob"] for a in answers] if weighted else None)


classes_of = lru_cache(maxsize=100_000)(group_answers)  # every k needs them; 0 are the right ones
