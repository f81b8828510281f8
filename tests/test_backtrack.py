"""The backtracking parameterization: episodes, markers, windows, and what the bonus does that a reward does not; the
embedded reasoner that backtracks: its problems, and what it does when it samples, as a rebuilt one has to."""

import re
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_mrt import a_trace

import common
import rl_mrt
import tiny.backtrack
from common import Trace, flat, grade_traces, group_advantages, read_trace, read_traces, reward, set_sampled_J
from engine.models import load_model, load_tokenizer
from engine.sampler import Sampler
from engine.tokens import Completion, encode, prompt_ids, text_and_offsets
from engine.transformers_engine import TransformersEngine
from run import backtracking as bt
from run.data import load_problems
from run.traces import problem_key
from tiny.backtrack import LEVELS, PLACES, SIZES, attempt, parts, problems

MODEL = "tiny/backtrack"
A1 = "Node 1: u = 12.\nNode 2: v = 5: no.\nNode 3: \\boxed{125}"
A2 = "Node 2: v = 8: yes.\nNode 3: \\boxed{128}"
TO_2, TO_0 = bt.RETRY + "Backtrack to Line 2\n", bt.RETRY + "Backtrack to beginning\n"


@pytest.mark.parametrize(
    "episodes",
    [
        # An episode ends at a box or after a marker line.
        *([A1, TO_2, A2], [A1, TO_0, A1, TO_2, A2], [A1, TO_2, A2, TO_0], [A1, TO_2]),
        # White space after the last box is no episode.
        *([A1], [A1 + "\n"], [A1 + "\n\n"]),
        # What is left over is one.
        *([A1, TO_2, "Node 2: v ="], [""], ["Node 1: u"], [A1, "\nI hope so."], ["\\boxed{"]),
        # A box may stand in a sentence, a marker only at the beginning of a line.
        ["So it is $\\boxed{\\frac{1}{2}}$.", "\nBacktrack to Line 1, then.\n", "Node 1:"],
        ["I could Backtrack to Line 2\nor not"],
    ],
)
def test_the_spans_of_episodes_cover_the_text(episodes):
    text = "".join(episodes)
    assert [text[start:end] for start, end in bt.backtracking_spans(text)] == episodes


def test_a_continuation_counts_up_to_its_first_attempt():
    assert bt.first_episode(A2 + TO_0 + A1) == A2
    assert bt.first_episode(TO_2 + A2 + TO_0 + A1) == TO_2 + A2
    assert bt.first_episode("Node 2: v") == "Node 2: v"


@pytest.mark.parametrize(
    "text, found",
    [
        (A1 + TO_2 + A2 + TO_0, [(2, True), (1, True)]),
        (A1 + bt.RETRY + "Backtrack to Line 7\n", [(7, False)]),
        (A1 + bt.RETRY + "Backtrack to Line 0\n", [(0, False)]),
        ("Backtrack to beginning\n" + A1, [(1, False)]),
        (A1 + TO_2 + bt.RETRY + "Backtrack to Line 3\n", [(2, True), (3, False)]),  # it was given up
        (A1, []),
    ],
)
def test_markers_and_whether_their_lines_exist(text, found):
    assert bt.backtracks(text) == found


def test_an_attempt_in_full_has_the_lines_it_shares():
    text = A1 + TO_2 + A2 + TO_2 + A2.replace("8", "9") + TO_0 + A1
    full = ["".join(text[start:end] for start, end in spans) for spans in bt.attempts_in_full(text)]
    head = A1.partition("Node 2")[0]
    assert full == [A1, head + A2, head + A2.replace("8", "9"), A1]


def test_normalising_c_in_the_reward_is_grpo_and_the_bonus_beside_it_is_not():
    f = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]], dtype=torch.float64)
    c, alpha = torch.tensor([0.25, 0.5, 0.0, 1.0], dtype=torch.float64), 1.6
    grpo, in_reward = group_advantages(f), group_advantages(f + alpha * (f - c[:, None]))
    # std + 1e-4 is all that keeps the two from being the same number
    std = f.std(-1, keepdim=True, unbiased=False)
    torch.testing.assert_close(in_reward * (std + 1e-4 / (1 + alpha)), grpo * (std + 1e-4), rtol=0, atol=1e-12)
    assert (in_reward - grpo).abs().max() < 1e-3
    rows = zip(f.tolist(), c.tolist())
    groups = [[a_trace([0.0], answer_tokens=2, reward=r, prefix_J=known) for r in row] for row, known in rows]
    for bonus in (alpha, 0):
        args = rl_mrt.flags(["--model", "tiny/backtrack", "--bonus", str(bonus)])
        found = torch.tensor(np.array(rl_mrt.advantages_of(args, groups)))  # [groups, G, tokens]
        torch.testing.assert_close(found, (grpo + bonus * (f - c[:, None]))[..., None].expand(-1, -1, 2))
    assert args.bonus == 0 and float(grpo[1].abs().max()) == 0  # a group without a signal has one: c


@pytest.fixture(scope="module")
def sampler():
    return Sampler(TransformersEngine(load_model(MODEL, "cpu")), load_tokenizer(MODEL))


def attempts(n: int) -> common.Forcing:
    return common.Forcing(n, 24, 1.0, 1.0, bt.prompt_or_attempt, bt.first_attempt)


def trace_of(tokenizer, problem: dict, text: str, ends: bool) -> Trace:
    """A trace of a given text, as `read_trace` will read it with this rule."""
    prompt, ids = prompt_ids(tokenizer, problem["problem"]), encode(tokenizer, text) + [tokenizer.eos_token_id] * ends
    completion = Completion(ids, [0.0] * len(ids), "stop" if ends else "length", *text_and_offsets(tokenizer, ids))
    trace = read_trace(tokenizer, problem, prompt, completion, bt.backtracking_spans)
    grade_traces([trace])
    return trace


def test_J_of_attempts_is_their_verdict_and_of_markers_what_one_attempt_achieves(sampler):
    problem = next(p for p in problems("train") if p["level"] == 3)
    us, vs, target, u, v = parts(problem)
    wrong_u, wrong_v = next(x for x in us if x != u), next(x for x in vs if x != v)
    start = attempt(wrong_u, v, target) + bt.RETRY + PLACES[2] + attempt(wrong_u, wrong_v, target, 2)
    text = start + bt.RETRY + PLACES[1] + attempt(u, wrong_v, target) + bt.RETRY + PLACES[2] + attempt(u, v, target, 2)
    trace = trace_of(sampler.tokenizer, problem, text, ends=True)
    before = sampler.sampled_tokens
    set_sampled_J(sampler, [trace, trace_of(sampler.tokenizer, problem, text, True)], attempts(200), (1,))
    assert [trace.J[j] for j in (1, 3, 5, 7)] == [0, 0, 0, 1] and not any(trace.forced[j] for j in (1, 3, 5, 7))
    assert all(len(trace.forced[j]) == 200 for j in (0, 2, 4, 6))
    assert trace.J[2] < 0.05  # no v mends a wrong u
    ((*first,),) = sampler.generate([trace.prompt], 24, [(9,)], n=600)
    rate = np.mean([re.findall(r"boxed{(\d+)}", c.text)[:1] == [problem["answer"]] for c in first])
    assert trace.J[0] == pytest.approx(rate, abs=0.12)  # at the start that of first attempts; three standard errors
    assert 0.15 < trace.J[6]  # one does mend a wrong v
    assert sampler.sampled_tokens - before < 5 * 200 * 24  # what both traces ask is asked once
    assert all(bt.first_episode(a.text) == a.text for answers in trace.forced for a in answers)


def test_an_unfinished_attempt_is_completed_and_one_that_ended_has_answered(sampler):
    problem = problems("train")[0]
    us, vs, target, u, v = parts(problem)
    text = attempt(u, v, target) + bt.RETRY + PLACES[1] + attempt(us[0], vs[0], target)[:24]
    trace = trace_of(sampler.tokenizer, problem, text, ends=False)
    set_sampled_J(sampler, [trace], attempts(50), (2,))
    assert trace.J[1] == 1 and len(trace.forced[3]) == 50
    end = trace.boundaries[1]
    assert reward(problem, trace.prefix(end - 1)) == 0
    assert reward(problem, trace.prefix(end)) == reward(problem, trace.completion.text) == 1


# Of 60 validation problems × 4 traces of at most 160 tokens: (what, from, to).
WANTED = [
    ("lines are valid", 0.95, 1),
    ("the answer is right after a right attempt", 0.95, 1),
    ("first attempts are right", 0.15, 0.4),
    ("later attempts are right", 0.15, 0.4),
    ("traces are right", 0.25, 0.65),
    ("traces are cut at the limit", 0, 0.1),
    ("backtracks go to the line at fault", 0.3, 0.7),
    ("attempts try again what has failed", 0.15, 0.6),
    ("it gives up after a failed attempt", 0.05, 0.4),
    ("it goes on after a right attempt", 0.05, 0.4),
]


def notes(trace: Trace) -> Iterator[tuple[str, float]]:
    """What a trace says of `WANTED`. A line is valid if it is what `attempt` writes there and of candidates."""
    us, vs, target, right_u, right_v = parts(trace.problem)
    pieces, u, v, tried, right = trace.completion.text.split(bt.RETRY), 0, 0, set(), False
    for number, piece in enumerate(pieces[: None if trace.ended else -1]):  # the last may be cut
        line = next((line for line, place in PLACES.items() if piece.startswith(place)), 1)
        if number and not right:
            yield "backtracks go to the line at fault", line == (2 if u == right_u else 1)
        for node, written in enumerate(piece.removeprefix(PLACES[line]).splitlines(), line):
            if found := re.match(r"Node (1: u|2: v) = (\d+)", written):
                u, v = (int(found[2]), v) if node == 1 else (u, int(found[2]))
            meant = attempt(u, v, target, min(node, 3)).splitlines()[0]
            yield "lines are valid", written == meant and u in us and (node == 1 or v in vs)
        right = (u, v) == (right_u, right_v)
        yield f"{'later' if number else 'first'} attempts are right", right
        if number:
            yield "attempts try again what has failed", (u, v) in tried and not right
        ends = number + 1 == len(pieces)
        yield ("it goes on after a right attempt", not ends) if right else ("it gives up after a failed attempt", ends)
        tried.add((u, v))
    if trace.ended and right:
        yield "the answer is right after a right attempt", trace.reward
    yield "traces are right", trace.reward
    yield "traces are cut at the limit", not trace.ended


@pytest.fixture(scope="module")
def figures(sampler) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name, _, _ in WANTED}
    rows = problems("validation")[:60]
    prompts = [prompt_ids(sampler.tokenizer, row["problem"]) for row in rows]
    sampled = sampler.generate(prompts, 160, [(0, problem_key(row)) for row in rows], n=4)
    for trace in flat(read_traces(sampler.tokenizer, rows, prompts, sampled)):
        for name, value in notes(trace):
            found[name].append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.mark.parametrize("name, low, high", WANTED)
def test_the_stored_model_behaves_as_wanted(figures, name, low, high):
    assert low <= figures[name] <= high


def test_the_stored_model_is_small():
    assert sum(f.stat().st_size for f in (ROOT / MODEL).iterdir()) <= 2_000_000


def test_the_problems_of_the_file_are_those_of_the_splits_each_with_exactly_one_solution():
    every = [problem for split in SIZES for problem in problems(split)]
    for split, size in SIZES.items():
        assert load_problems(MODEL, split) == problems(split) and len(problems(split)) == size * len(LEVELS)
        assert load_problems(f"{MODEL}:3", split) == problems(split, (3,))
    for problem in every:
        us, vs, target, right_u, right_v = parts(problem)
        assert len(set(us)) == len(set(vs)) == problem["level"] and problem["answer"] == str(10 * right_u + right_v)
        assert solutions(us, vs, target) == [(right_u, right_v)]
    assert len({tuple(map(frozenset, parts(p)[:2])) + parts(p)[2:3] for p in every}) == len(every)


def solutions(us, vs, target) -> list[tuple[int, int]]:
    return [(u, v) for u, v in product(us, vs) if (u**2 + v) % 31 == target]


def test_the_example_of_the_docstring_is_a_problem_and_its_trace():
    page = re.sub(r" +<-.*|^    ", "", tiny.backtrack.__doc__ or "", flags=re.M)
    problem, _, trace = page.partition("\n\n")[2].partition("\n\n")
    us, vs, target, *_ = parts({"problem": problem, "answer": "213"})
    assert solutions(us, vs, target) == [(21, 3)]
    texts = attempt(18, 5, target), PLACES[1] + attempt(21, 5, target), PLACES[2] + attempt(21, 3, target, 2)
    assert trace.startswith(bt.RETRY.join(texts) + "\n\n")
