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

from plumbing.answers import *  # noqa
from plumbing.data import *  # noqa
from plumbing.metrics import *  # noqa
from plumbing.runs import *  # noqa
from plumbing.runs import line, cell, key  # noqa
from plumbing.models import *  # noqa
from plumbing.models import THINK_END, CHUNK_LOGITS, context_length  # noqa
from plumbing.hf_engine import *  # noqa
from plumbing.sampler import *  # noqa
from plumbing.vllm_engine import *  # noqa
from plumbing.training import *  # noqa

# The forced-termination phrase of the authors' public code: what turns the model into the meta-prover μ.
STOP_PHRASE = (
    "Time is up.\n\nGiven the time I've spent and the approaches I've tried, I should stop thinking and formulate a "
    f"final answer based on what I already have.\n{THINK_END}\n\n**Step-by-Step Explanation and Answer:**\n\n1. **"
)
ANSWER_CUE = "Final Answer:** \\boxed{"  # ours: where the gold answer's likelihood is read off, see `sequence_logprobs`


# ============================================================================================ 1 problems

# ============================================================================================ 2 models and prompts


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
        marker, opened = encode(tokenizer, THINK_END)[0], thought_is_open(tokenizer, prompt)
        finished = marker in ids
        end = ids.index(marker) if finished else len(ids) - (completion.finish_reason == "stop")
        answer = completion.text[offsets[end + 1] :] if finished else None
        if not finished and (opened is False or opened is None and completion.finish_reason == "stop"):
            finished, end, answer = True, 0, completion.text  # it answers without a thought
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
