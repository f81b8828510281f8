"""The paper's second parameterization (Figure 5): an attempt, a backtrack, another attempt.

    problem → attempt of numbered nodes and a box → "Wait, …" and a marker line → another attempt → …

An episode is an attempt, which a box ends, or a decision, which a marker line ends. μ is not told that time is up: an
attempt has answered, and what a decision is worth shows in the attempts that follow it.
"""

from __future__ import annotations

import re
import zlib
from bisect import bisect_left

import numpy as np
import torch

from common import ForcedAnswer, Trace, read_answers, success_rate
from engine.sampler import Sampler
from engine.tokens import Completion
from grading.box import extract_answer
from grading.verdict import grade_all

# The phrase that opens a second attempt in the authors' first code (grpo.py, bash/r1.sh); their "Step" is left to the
# model. The marker lines of eval_history_conditioned.py. The labels of the prompt "backtrack" in template.py.
RETRY = "\nWait, this seems off. Let's try something else.\n"
MARKER = re.compile(r"^Backtrack to (?:beginning|Line (\d+))\b.*\n?", re.M)
NODE = re.compile(r"^Node (\d+):", re.M)
EPISODE_END = re.compile(rf"^.*\\boxed{{.*|{MARKER.pattern}", re.M)


def backtracking_spans(text: str) -> list[tuple[int, int]]:
    """Episodes of a text as [start, end) character spans without gaps. Each ends with a line that holds a box, or with
    a marker line and its newline; what follows the last of them is an episode if it is more than white space."""
    ends = [match.end() for match in EPISODE_END.finditer(text)]
    if not ends or text[ends[-1] :].strip():
        ends.append(len(text))
    ends[-1] = len(text)
    return list(zip([0, *ends], ends))


def own_answers(text: str) -> list[str | None]:
    """Of each of the text's k episodes, what the box of an attempt holds; None for any other episode."""
    return [extract_answer(text[start:end]) for start, end in backtracking_spans(text)]


def first_episode(text: str) -> str:
    """A continuation cut where its first attempt ends: what J counts of it. Before that decisions may stand."""
    spans = backtracking_spans(text)
    return text[: next((end for start, end in spans if extract_answer(text[start:end])), len(text))]


def backtracks(text: str) -> list[tuple[int, bool]]:
    """(line that is written again, does the attempt before it have that line?) of each marker; the beginning is 1."""
    found, lines = [], 0
    for start, end in backtracking_spans(text):
        marker = MARKER.search(text, start, end)
        lines = max([lines, *(int(node) for node in NODE.findall(text[start:end]))])
        if marker:
            line = int(marker[1] or 1)
            found.append((line, 1 <= line <= lines))
            lines = min(lines, line - 1)
    return found


def attempts_in_full(text: str) -> list[list[tuple[int, int]]]:
    """Each complete attempt as the character spans of its nodes, those that it shares with earlier attempts included:
    what a window shows of its oldest. A marker to a line that does not exist shares all there is."""
    attempts: list[list[tuple[int, int]]] = []
    shared: list[tuple[int, int]] = []
    for start, end in backtracking_spans(text):
        nodes = [start + match.start() for match in NODE.finditer(text[start:end])] or [start]
        if marker := MARKER.search(text, start, end):
            shared = shared[: int(marker[1] or 1) - 1]
        elif extract_answer(text[start:end]):
            shared = [*shared, *zip(nodes, [*nodes[1:], end])]
            attempts.append(shared)
    return attempts


def first_attempt(completion: Completion) -> Completion:
    """A completion cut where its first attempt ends; whole if it has none."""
    end = len(first_episode(completion.text))
    count = bisect_left(completion.offsets, end) if end < len(completion.text) else len(completion.token_ids)
    ids, logprobs, offsets = completion.token_ids[:count], completion.logprobs[:count], completion.offsets[: count + 1]
    return Completion(ids, logprobs, completion.finish_reason, completion.text[: offsets[-1]], offsets)


def set_attempt_J(
    sampler: Sampler, traces: list[Trace], n: int, max_tokens: int, temperature, top_p, seed: tuple
) -> None:
    """As `common.set_sampled_J`, for backtracking traces. J after an attempt is 1 if its own box is right, else 0, and
    nothing is sampled. At the empty prefix, after a marker line and within an attempt it is the share of right ones
    among n completions of one attempt."""
    asked: dict[tuple, list[tuple[Trace, int]]] = {}
    settled: list[tuple[Trace, int, str]] = []
    for trace in traces:
        starts = [0, *trace.boundaries]
        trace.J, trace.answer_tokens = [trace.reward] * len(trace.boundaries), [0.0] * len(trace.boundaries)
        trace.forced = [[] for _ in trace.boundaries]
        for j, boundary in enumerate(trace.boundaries):
            episode = trace.completion.text[trace.completion.offsets[starts[j]] : trace.completion.offsets[boundary]]
            if box := extract_answer(episode):
                settled.append((trace, j, box))
            elif not (trace.finished and j == len(trace.boundaries) - 1):
                prompt = (*trace.prompt, *trace.completion.token_ids[:boundary])
                asked.setdefault((trace.problem["id"], prompt), []).append((trace, j))
    verdicts = grade_all([(box, trace.problem["answer"]) for trace, _, box in settled])
    for (trace, j, _), verdict in zip(settled, verdicts):
        trace.J[j] = float(verdict == "right")
    seeds = [(*seed, zlib.crc32(np.array(prompt, dtype="<i8").tobytes())) for _, prompt in asked]
    rows = sampler.generate([list(p) for _, p in asked], max_tokens, seeds, n, temperature, top_p)
    problems = [owners[0][0].problem for owners in asked.values()]
    answers_of: list[list[ForcedAnswer]] = read_answers(
        sampler.tokenizer, problems, [[first_attempt(c) for c in row] for row in rows]
    )
    for owners, answers in zip(asked.values(), answers_of):
        for trace, j in owners:
            trace.J[j] = success_rate(trace.problem, answers)
            trace.answer_tokens[j] = float(np.mean([answer.tokens for answer in answers]))
            trace.forced[j] = answers


def answer_within(trace: Trace, budget: int) -> str | None:
    """The box of the last attempt that ended within a budget of tokens."""
    return extract_answer(trace.prefix(max([b for b in trace.boundaries if b <= budget], default=0)))


def backtracking_advantages(outcomes: torch.Tensor, c: torch.Tensor, grpo: torch.Tensor, bonus: float) -> torch.Tensor:
    """A = A_GRPO + α (f - c), [groups, G]; c [groups], the success rate of the attempt that the context ends with.

    c is outside the normalisation: in the reward f + α (f - c) it is a constant of the group, which normalising takes
    away, and the update is GRPO's.
    """
    return grpo + bonus * (outcomes - c[:, None])
