"""The embedded reasoner that backtracks: its problems, and what it does when it samples, as a rebuilt one has to."""

import re
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from conftest import ROOT

import tiny.backtrack
from common import Trace, read_traces
from engine.models import load_model, load_tokenizer
from engine.sampler import Sampler
from engine.tokens import prompt_ids
from engine.transformers_engine import TransformersEngine
from run.backtracking import RETRY
from run.data import load_problems
from run.traces import problem_key
from tiny.backtrack import LEVELS, PLACES, SIZES, attempt, parts, problems

MODEL = "tiny/backtrack"
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
    pieces, u, v, tried, right = trace.completion.text.split(RETRY), 0, 0, set(), False
    for number, piece in enumerate(pieces[: None if trace.stopped else -1]):  # the last may be cut
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
    if trace.stopped and right:
        yield "the answer is right after a right attempt", trace.reward
    yield "traces are right", trace.reward
    yield "traces are cut at the limit", not trace.stopped


def sampled_traces(model: str, count: int, n: int = 4, seed: int = 0) -> list[list[Trace]]:
    tokenizer, rows = load_tokenizer(model), problems("validation")[:count]
    sampler = Sampler(TransformersEngine(load_model(model, "cpu")), tokenizer)
    prompts = [prompt_ids(tokenizer, row["problem"]) for row in rows]
    sampled = sampler.generate(prompts, 160, [(seed, problem_key(row)) for row in rows], n=n)
    return read_traces(tokenizer, rows, prompts, sampled)


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name, _, _ in WANTED}
    for group in sampled_traces(MODEL, 60):
        for trace in group:
            for name, value in notes(trace):
                found[name].append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.mark.parametrize("name, low, high", WANTED)
def test_the_stored_model_behaves_as_wanted(figures, name, low, high):
    assert low <= figures[name] <= high


def test_the_stored_model_is_small():
    assert sum(f.stat().st_size for f in (ROOT / MODEL).iterdir()) <= 2_000_000


def test_the_problems_of_the_file_are_those_of_the_splits():
    for split, size in SIZES.items():
        assert load_problems(MODEL, split) == problems(split) and len(problems(split)) == size * len(LEVELS)
        assert load_problems(f"{MODEL}:3", split) == problems(split, (3,))
    every = [problem for split in SIZES for problem in problems(split)]
    assert len({tuple(map(frozenset, parts(p)[:2])) + parts(p)[2:3] for p in every}) == len(every)


def test_every_problem_has_exactly_one_solution():
    for problem in problems("test"):
        us, vs, target, right_u, right_v = parts(problem)
        assert len(set(us)) == len(set(vs)) == problem["level"] and problem["answer"] == str(10 * right_u + right_v)
        assert [(u, v) for u, v in product(us, vs) if (u**2 + v) % 31 == target] == [(right_u, right_v)]


def test_the_example_of_the_docstring_is_a_problem_and_its_trace():
    problem, _, trace = (
        re.sub(r" +<-.*|^    ", "", tiny.backtrack.__doc__ or "", flags=re.M).partition("\n\n")[2].partition("\n\n")
    )
    us, vs, target, *_ = parts({"problem": problem, "answer": "213"})
    assert [(u, v) for u, v in product(us, vs) if (u**2 + v) % 31 == target] == [(21, 3)]
    texts = attempt(18, 5, target), PLACES[1] + attempt(21, 5, target), PLACES[2] + attempt(21, 3, target, 2)
    assert trace.startswith(RETRY.join(texts) + "\n\n")
