"""The paper's second parameterization (Figure 5): an attempt, a backtrack, another attempt.

    problem → attempt of numbered nodes and a box → "Wait, …" and a marker line → another attempt → …

An episode is an attempt, which a box ends, or a decision, which a marker line ends. μ is not told that time is up: an
attempt has answered, and what a decision is worth shows in the attempts that follow it.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise

from common import Trace
from engine.tokens import Completion, encode, text_and_offsets
from grading.box import extract_answer

# The phrase that opens a second attempt in the authors' first code (grpo.py, bash/r1.sh); their "Step" is left to the
# model. The marker lines of eval_history_conditioned.py. The labels of the prompt "backtrack" in template.py.
RETRY = "\nWait, this seems off. Let's try something else.\n"
# Ours, in the published format: what follows the problem, and how the assistant's turn is begun.
ASKED = (
    '\n\nSolve it step by step and label each step "Node #". If it seems better to return to a previous state, write '
    '"Backtrack to Line N" or "Backtrack to beginning" and go on from there.'
)
BEGUN = "Let's solve this step by step.\n"
MARKER = re.compile(r"^Backtrack to (?:beginning|Line (\d+))\b.*\n?", re.M)
NODE = re.compile(r"^Node (\d+):", re.M)
EPISODE_END = re.compile(rf"^.*\\boxed{{.*|{MARKER.pattern}", re.M)


def asked_to_backtrack(tokenizer, chat: str | list[dict]) -> tuple[str | list[dict], list[int]]:
    """(the problem or the chat that ends with it, with what asks for backtracks; tokens that begin the answer), unless
    the chat template says all this itself."""
    if json.dumps(ASKED)[1:-1] in str(tokenizer.chat_template):
        return chat, []
    if isinstance(chat, str):
        return chat + ASKED, encode(tokenizer, BEGUN)
    return [*chat[:-1], {**chat[-1], "content": chat[-1]["content"] + ASKED}], encode(tokenizer, BEGUN)


def backtracking_spans(text: str) -> list[tuple[int, int]]:
    """Episodes of a text as [start, end) character spans without gaps. Each ends with a line that holds a box, or with
    a marker line and its newline; what follows the last of them is an episode if it is more than white space."""
    ends = [match.end() for match in EPISODE_END.finditer(text)]
    if not ends or text[ends[-1] :].strip():
        ends.append(len(text))
    ends[-1] = len(text)
    return list(zip([0, *ends], ends))


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
        nodes = list(NODE.finditer(text, start, end))
        if marker := MARKER.search(text, start, end):
            shared = shared[: int(marker[1] or 1) - 1]
        elif extract_answer(text[start:end]):
            starts = [node.start() for node in nodes] or [start]
            shared = [*shared[: int(nodes[0][1]) - 1 if nodes else None], *zip(starts, [*starts[1:], end])]
            attempts.append(shared)
    return attempts


def window(tokenizer, history: list[int], attempts: int = 1 << 30) -> tuple[int, list[int]]:
    """(number, tokens) of the last so many attempts of a search, as it wrote them; the oldest in full, with the lines
    that it shares with earlier ones. What follows the last attempt is left out."""
    text, offsets = text_and_offsets(tokenizer, history)
    found = attempts_in_full(text)
    if not found or not attempts:
        return 0, []
    oldest = found[-attempts] if attempts < len(found) else [(0, found[0][-1][1])]
    spans = [*oldest, (oldest[-1][1], found[-1][-1][1])]
    places = [[bisect_left(offsets, place) for place in span] for span in spans]
    return min(attempts, len(found)), [token for start, end in places for token in history[start:end]]


def first_attempt(completion: Completion) -> Completion:
    """A completion cut where its first attempt ends; whole if it has none."""
    end = len(first_episode(completion.text))
    count = bisect_left(completion.offsets, end) if end < len(completion.text) else len(completion.token_ids)
    ids, logprobs, offsets = completion.token_ids[:count], completion.logprobs[:count], completion.offsets[: count + 1]
    return Completion(ids, logprobs, completion.finish_reason, completion.text[: offsets[-1]], offsets)


def prompt_or_attempt(_tokenizer, trace: Trace, j: int) -> list[int] | str:
    """As `common.prompt_or_answer`. J after an attempt is its own reward. At the empty prefix, after a marker line and
    within an attempt it is the share of right ones among n completions of one attempt."""
    episode = episodes_of(trace)[j - 1] if j else ""
    if extract_answer(episode):
        return episode
    if trace.finished and j == len(trace.boundaries) - 1:
        return trace.answer or ""
    return trace.prompt + trace.completion.token_ids[: trace.boundaries[j]]


def episodes_of(trace: Trace) -> list[str]:
    """The text of each episode z_j."""
    return [trace.prefix(end)[len(trace.prefix(start)) :] for start, end in pairwise(trace.boundaries)]


def whole_text(trace: Trace) -> str:
    """The text of a trace, after that of the attempt that its prompt ends with, if there is one."""
    return trace.problem.get("prefix", {}).get("text", "") + trace.completion.text


def marker_counts(texts: Iterable[str]) -> dict[str, float]:
    """What is lacking, for summaries: the share of texts without a marker line, and of markers to no line there is."""
    found = [backtracks(text) for text in texts]
    there = [known for markers in found for _, known in markers]
    return {
        "without_marker": found.count([]) / max(1, len(found)),
        "markers_to_no_line": there.count(False) / max(1, len(there)),
    }


def tell_markers(traces: list[Trace]) -> None:
    """The same in a line, where it is not as it should be."""
    counts = marker_counts(map(whole_text, traces))
    if traces and counts["without_marker"] == 1:
        print(f"none of the first {len(traces)} traces has a line like 'Backtrack to Line 2': none of them backtracks")
    if counts["markers_to_no_line"]:
        print(
            f"of the first markers {counts['markers_to_no_line']:.1%} name a line that the attempt before does not have"
        )
