"""The embedded reasoner: its problems, and what it does when it samples, which a rebuilt model has to do, too."""

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from conftest import ROOT

from common import Forcing, Segmentation, flat, read_traces, set_likelihood_J, set_sampled_J
from engine.sampler import Sampler
from engine.tokens import prompt_ids
from engine.transformers_engine import TransformersEngine
from tiny.build import build_tokenizer, examples, line
from tiny.problems import LEVELS, PRIME, SPLITS, problems

BUDGET = 256  # tokens
LINE = re.compile(r"(?:\w+, |But hold on, )?(try|check) x = (\d+): ")
FORCED = re.compile(r"Final Answer:\*\* \\boxed\{\d+\}")
# Of 32 validation problems × 2 traces of at most 2 × BUDGET tokens: (what, from, to).
WANTED = [
    ("lines are valid", 0.95, 1),
    ("the answer is right after a find", 0.95, 1),
    ("J at prefixes that hold the solution", 0.95, 1),
    ("J before a find, in that of an even guess among the candidates left, half of them ruled out", 0.8, 1.2),
    ("forced answers are well-formed", 0.98, 1),
    ("traces are right within the budget", 0.3, 0.65),
    ("traces are longer than the budget", 0.02, 0.5),
    ("episodes try", 0.2, 0.6),
    ("episodes re-check", 0.15, 0.6),
    ("episodes talk", 0.15, 0.6),
    ("episodes do either", 0.5, 0.8),  # as the README says
]


@pytest.fixture(scope="module")
def figures(model, tokenizer) -> dict[str, float]:
    """What `WANTED` names, as it is: shares, and J."""
    sampler, rows = Sampler(TransformersEngine(model), tokenizer), problems("validation")[:32]
    prompts = [prompt_ids(tokenizer, row["problem"]) for row in rows]
    sampled = sampler.generate(prompts, 2 * BUDGET, [(0, i) for i in range(len(rows))], n=2)
    traces = flat(read_traces(tokenizer, rows, prompts, sampled, Segmentation(max_episodes=64)))
    found: dict[str, list[float]] = defaultdict(list)

    def note(name: str, value: float) -> None:
        found[name].append(float(value))

    set_sampled_J(sampler, traces[::2], Forcing(4, 8), (1,))
    for trace in traces:
        n, b, x = (int(part) for part in trace.problem["id"].split("-")[2:])
        ends, thought, shown = trace.boundaries, trace.prefix(trace.boundaries[-1]), f"x = {x} works"
        for paragraph in thought.split("\n\n")[:-1]:  # the last may be cut
            if "x = " in paragraph:
                m = LINE.match(paragraph)
                right = m and paragraph[m.start(1) :] + "\n\n" == line(int(m[2]), b, (x * x + b) % PRIME, m[1])
                note("lines are valid", bool(right))
        for start, end in pairwise(ends):
            episode = trace.prefix(end)[len(trace.prefix(start)) :]
            note("episodes try", "try x" in episode)
            note("episodes re-check", "check x" in episode and "try x" not in episode)
            note("episodes talk", "x = " not in episode)
            note("episodes do either", found["episodes re-check"][-1] + found["episodes talk"][-1])
        if trace.finished and shown in thought:
            note("the answer is right after a find", trace.reward)
        for end, J, answers in zip(ends, trace.J, trace.forced):
            if shown in trace.prefix(end):
                note("J at prefixes that hold the solution", J)
            for answer in answers if end < ends[-1] else []:
                note("forced answers are well-formed", bool(FORCED.fullmatch(answer.text)))
        short = len(trace.completion.token_ids) <= BUDGET
        note("traces are right within the budget", trace.reward and short)
        note("traces are longer than the budget", not short)
    set_likelihood_J(sampler, traces)
    late = []  # before a find, at least half ruled out: (J, 1 / number of candidates left)
    for trace in traces:
        n = trace.problem["level"]
        for end, J in zip(trace.boundaries, trace.J):
            tried = set(re.findall(r"try x = (\d+)", trace.prefix(end)))
            if trace.problem["answer"] not in tried and 2 * len(tried) >= n:
                late.append((J, 1 / (n - len(tried))))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return means | {WANTED[3][0]: float(np.divide(*np.sum(late, 0)))}


@pytest.mark.parametrize("name, low, high", WANTED)
def test_the_stored_model_behaves_as_wanted(figures, name, low, high):
    assert low <= figures[name] <= high


def test_the_stored_model_is_small(model):
    assert sum(p.numel() for p in model.parameters()) <= 1_000_000
    assert sum(f.stat().st_size for f in (ROOT / "tiny").glob("*")) <= 2_000_000


def test_every_problem_has_exactly_one_solution_in_range_and_splits_share_no_equation():
    equations = {}
    for split in SPLITS:
        rows = problems(split)
        equations[split] = {tuple(p["id"].split("-")[3:]) for p in rows}
        assert len({p["id"] for p in rows}) == len({p["problem"] for p in rows}) == len(rows)
        for problem in rows:
            n, b, r = map(
                int, re.findall(r"between 1 and (\d+) .*x² \+ (\d+) ≡ (\d+) \(mod 61\)", problem["problem"])[0]
            )
            assert n == problem["level"]
            assert [x for x in range(1, n + 1) if (x * x + b) % 61 == r] == [int(problem["answer"])]
    assert sum(map(len, equations.values())) == len(set.union(*equations.values()))
    assert all(len(of) > 100 for of in equations.values())
    assert Counter(p["level"] for p in problems("train")[:60]) == dict.fromkeys(LEVELS, 20) == {10: 20, 20: 20, 30: 20}


def test_a_rebuild_draws_the_traces_that_the_stored_model_was_trained_on():
    """The digest is that of commit cc7d2d5, which built it; so are the first 5,000, and tokenizer and weights."""
    draw, rng = examples(build_tokenizer()), random.Random(0)
    drawn = json.dumps([draw(rng) for _ in range(300)])
    assert hashlib.sha256(drawn.encode()).hexdigest()[:16] == "0137b336e18ccebb"
