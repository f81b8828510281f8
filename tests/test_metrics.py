"""Segmentation and metrics against closed forms, brute force and the published outputs.

The numbers marked "published" are outputs of the authors' notebooks (CMU-AIRe/MRT) run unchanged. The tests at the end
compare the longest of such outputs and skip where they are absent.
"""

import hashlib
import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from conftest import SHARED

import grading.votes
from common import (
    EPISODE_MARKERS,
    Segmentation,
    additional_regret,
    episode_spans,
    maj_at_k,
    normalized_regret,
    pass_at_k,
    split_episodes,
)
from run.report import interval

A, B, C = "a\n\nb\n\nc", "a\n\nb\n\nc\n\n", "Wait, d\n\ne"
SIX = [
    "p1\n\np2\n\np3",
    "But wait, x\n\np4\n\np5",
    "Alternatively, x\n\np6\n\np7",
    "Is there another way to think about this? x\n\np8\n\np9",
    "But let me double-check x\n\np10\n\np11",
    "But hold on, x\n\np12\n\np13",
    "Wait x\n\np14",
]
ALL_SIX = "\n\n".join(SIX)
PUBLISHED_SPLITS = [  # text, max_steps, group_size, episodes
    ("", 49, 1, [""]),
    ("Wait, is that right?\n\nb\n\nc\n\nd", 49, 1, ["Wait, is that right?\n\nb\n\nc\n\nd"]),
    ("a\n\nWait, 1\n\nWait, 2\n\nWait, 3\n\nz", 49, 1, ["a\n\nWait, 1\n\nWait, 2", "Wait, 3\n\nz"]),
    (B + "Wait, d\n\ne\n\nAlternatively, f\n\ng", 49, 1, [A, "Wait, d\n\ne\n\nAlternatively, f\n\ng"]),
    (B + "\n" + C, 49, 1, [B + "\n" + C]),
    (B + "\n\n" + C, 49, 1, [A, C]),
    (B + "\n\n" + C, 49, 5, [B + C]),
    (B + "wait, d\n\ne", 49, 1, [B + "wait, d\n\ne"]),
    (B + " Wait, d\n\ne", 49, 1, [B + " Wait, d\n\ne"]),
    (B + "Waiting for the bus", 49, 1, [A, "Waiting for the bus"]),
    ("a\r\n\r\nb\r\n\r\nc\r\n\r\nWait, d", 49, 1, ["a\r\n\r\nb\r\n\r\nc\r\n\r\nWait, d"]),
    (B + "Wait, d\n\n\n\n", 49, 1, [A, "Wait, d"]),
    (A + " \n\nWait, d\t\n", 49, 1, [A + " ", "Wait, d\t"]),  # newlines only
    (ALL_SIX, 49, 1, SIX),
    (ALL_SIX, 3, 1, [*SIX[:3], ALL_SIX[ALL_SIX.index("Is there") :]]),
    (ALL_SIX, 49, 5, [ALL_SIX[: ALL_SIX.index("\n\nBut hold")], ALL_SIX[ALL_SIX.index("But hold") :]]),
    (ALL_SIX, 0, 1, [ALL_SIX]),
]


@pytest.mark.parametrize("text, max_steps, group_size, episodes", PUBLISHED_SPLITS)
def test_split_episodes_published(text, max_steps, group_size, episodes):
    assert split_episodes(text, max_steps, group_size) == episodes
    assert len(EPISODE_MARKERS) == 6  # `SIX` has an episode of each


def random_thoughts(count=300):
    rng = np.random.default_rng(1)
    parts = ["Wait, x", "Alternatively y", "But wait", "text", "Hmm", "", "\n", "a\nb", "x\n"]
    for _ in range(count):
        which, gaps = rng.integers(len(parts), size=25), rng.choice([1, 2, 2, 2, 3, 4], size=25)
        yield "".join(parts[i] + "\n" * gap for i, gap in zip(which, gaps))


@pytest.mark.parametrize("max_steps, group_size", [(49, 1), (49, 5), (3, 1), (3, 2), (1, 2), (0, 1)])
def test_spans_tile_the_thought_and_agree_with_texts(max_steps, group_size):
    most, counts = -(-(max_steps + 1) // group_size), set()
    for thought in [*random_thoughts(), "", "\n\n", "\n\n\n\n\n\n\n\nWait", ALL_SIX]:
        spans = episode_spans(thought, Segmentation(max_steps, group_size))
        cuts = [start for start, _ in spans[1:]]
        assert spans == list(itertools.pairwise([0, *cuts, len(thought)]))
        assert all(thought[:cut].endswith("\n\n") and thought[cut:].startswith(EPISODE_MARKERS) for cut in cuts)
        texts, pieces = split_episodes(thought, max_steps, group_size), [thought[start:end] for start, end in spans]
        assert [text.split() for text in texts] == [piece.split() for piece in pieces]
        if group_size == 1:  # inside a group the newlines before a separator are stripped, too
            assert texts == [piece.rstrip("\n") for piece in pieces]
        assert len(spans) <= most
        counts.add(len(spans))
    assert max(counts) == most if most < 3 else max(counts) > 1  # the thoughts do have episodes


def test_pass_at_k_brute_force():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            hits = [min(subset) < c for subset in itertools.combinations(range(n), k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(hits) / len(hits), abs=1e-12)
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, abs=1e-15)  # stable where n is large
    assert pass_at_k(1000, 3, 1000) == 1 and pass_at_k(1000, 0, 1000) == 0


def brute_force_maj(answers, gold, k, weights=None):
    weights = [Fraction(w) for w in (weights or [1] * len(answers))]  # exact: ties are ties
    total, subsets = Fraction(0), 0
    for subset in itertools.combinations(range(len(answers)), k):
        tally = {}
        for i in subset:
            if answers[i] is not None:
                tally[answers[i]] = tally.get(answers[i], 0) + weights[i]
        top = [answer for answer, weight in tally.items() if weight == max(tally.values())]
        total += Fraction(gold in top) / min(2, max(1, len(top)))
        subsets += 1
    return float(total / subsets)


VOTES = [  # gold is "1"
    *("11122345", "12223345", "123123", "1111", "2234"),
    *([None, None, None, "1"], [None, None, None, "2"], [None] * 4),
    *(["1", "1", "2", "2", None, None, None], [*"1112223", None, None]),
]


@pytest.mark.parametrize("answers", VOTES, ids=str)
def test_maj_at_k_brute_force(answers):
    answers, rng, n = list(answers), np.random.default_rng(2), len(answers)
    for weights in (None, (2 ** -rng.random(n)).tolist(), rng.integers(1, 4, n).tolist()):  # plain; no ties; many ties
        for k in range(1, n + 1):
            value = maj_at_k(answers, "1", k, weights)
            assert value == pytest.approx(brute_force_maj(answers, "1", k, weights), abs=1e-12)
        assert maj_at_k(answers, "1", 1, weights) == pytest.approx(answers.count("1") / n, abs=1e-12)


@pytest.mark.parametrize(
    "answers, value", [("11122345", 0.6285714285714286), ("12223345", 0.12142857142857143), ("123123", 1 / 3)]
)
def test_maj_at_4_published(answers, value):
    assert maj_at_k(list(answers), "1", 4) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("k", [1, 2, 7, 8, 31, 32, 63, 64])
def test_maj_at_k_exact_at_64_samples(k):
    """Closed form for gold, two rivals and missing answers: a sum over all vote counts."""
    gold, a, b, none = 25, 20, 12, 7
    score = Fraction(0)
    for g, x, y in itertools.product(range(gold + 1), range(a + 1), range(b + 1)):
        if 0 <= k - g - x - y <= none and g >= max(x, y, 1):
            ways = math.comb(gold, g) * math.comb(a, x) * math.comb(b, y) * math.comb(none, k - g - x - y)
            score += Fraction(ways, 2 if g == max(x, y) else 1)
    answers = ["g"] * gold + ["a"] * a + [None] * none + ["b"] * b
    value = maj_at_k(answers, "g", k)  # subsets one by one would take years
    assert value == float(score / math.comb(64, k))  # to the last bit
    assert maj_at_k(answers, "g", k, [0.1] * 64) == value  # 0.1 + 0.1 + ...: equal weights are plain votes
    assert maj_at_k(answers, "g", k, [0.1 if x else 3.0 for x in answers]) == value  # None has no vote


def test_weighted_ties_survive_float_sums():
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1  # the reason for the tolerance
    assert maj_at_k(list("111222"), "1", 6, [0.1, 0.2, 0.3, 0.3, 0.2, 0.1]) == 0.5
    assert maj_at_k(list("12"), "1", 2, [1.0, 1.0 + 1e-6]) == 0


def test_maj_at_k_monte_carlo(monkeypatch):
    answers, k = ["1"] * 9 + list("222222233334445"), 12  # C(24, 12) = 2.7 M subsets: sampled
    weights = [1.0] * 23 + [1.0 + 1e-12]  # not all equal, yet within tolerance: plain votes are the truth
    value, exact = maj_at_k(answers, "1", k, weights), maj_at_k(answers, "1", k)
    assert value != exact and abs(value - exact) < 5 * 0.5 / math.sqrt(100_000)
    assert maj_at_k(answers, "1", k, weights) == value  # seeded
    rng = np.random.default_rng(0)
    shuffled = [[answers[i] for i in rng.permutation(24)] for _ in range(41)]  # the same subsets of other answers
    assert maj_at_k(shuffled.pop(), "1", k, weights) != value
    monkeypatch.setattr(grading.votes, "SUBSET_DRAWS", 500)
    few = [maj_at_k(order, "1", k, weights) for order in shuffled]
    assert np.std(few) == pytest.approx(0.5 / math.sqrt(500), rel=0.5)  # the stated error


BUDGETS = [4096, 8192, 12288, 16384]
LONG = [1331, 3033, 3736, 5564, 5869, 8154, 12229, 12478, 13447, 13776, 14583, 15936, 16860]
UNEVEN = [1.0, 0.75, 0.6875, 0.9375, 0.0, 0.9375, 0.0625, 0.5625, 0.75, 0.3125, 0.3125, 1.0, 0.4375]
RISING, STEPS, QUARTERS = [500, 2000, 4500, 8000, 15000], [0.2, 0.4, 0.6, 0.8], [0.25, 0.5, 0.75, 1.0]
PUBLISHED_REGRET = [  # tokens, accuracies, normalised regret at BUDGETS
    (RISING, [0, *QUARTERS], [0.7726658203125001, 0.5779836077008929, 0.4419890718005952, 0.339508056640625]),
    ([20000], [1.0], [0.8976, 0.7952, 0.6928, 0.5904]),
    ([6000, 9000], [0.5, 1.0], [0.8293333333333334, 0.6342278645833332, 0.42724609375, 0.3204345703125]),
    (BUDGETS, QUARTERS, [0.875, 0.75, 0.625, 0.5]),
    ([1000, 5000, 5000, 9000], STEPS, [0.765910546875, 0.5764255859375, 0.4522786458333333, 0.389208984375]),
    ([1000, 4096, 4096, 9000], STEPS, [0.748828125, 0.5326522354200653, 0.4228515625, 0.367138671875]),
    (LONG, UNEVEN, [0.2879898939403974, 0.3414534034026915, 0.3974588029036721, 0.40110189264470886]),
]


@pytest.mark.parametrize("tokens, accuracies, regrets", PUBLISHED_REGRET)
def test_normalized_regret_published(tokens, accuracies, regrets):
    assert [normalized_regret(tokens, accuracies, b) for b in BUDGETS] == pytest.approx(regrets, abs=1e-9)


@pytest.mark.parametrize(
    "tokens, accuracies, budget, regret",
    [
        ([100], [1.0], 100, 0.5),  # triangle
        ([100], [1.0], 50, 0.75),  # half of the ramp
        ([100], [1.0], 400, 1 - 350 / 400),  # held at 1
        ([0, 10], [0.5, 0.5], 40, 0.5),  # a jump at 0
        ([10, 20], [0, 0], 5, 1),
    ],
)
def test_normalized_regret_closed_forms(tokens, accuracies, budget, regret):
    assert normalized_regret(tokens, accuracies, budget) == pytest.approx(regret, abs=1e-12)


def test_normalized_regret_where_positions_decrease():
    shuffled = normalized_regret([1000, 5000, 4500, 9000], [0.2, 0.4, 0.6, 0.8], 8192)
    assert shuffled == normalized_regret([1000, 4500, 5000, 9000], [0.2, 0.6, 0.4, 0.8], 8192)
    rng = np.random.default_rng(3)
    for _ in range(50):  # dense Riemann sum of the sorted curve; always within [0, 1]
        x, y = rng.integers(1, 9000, 8), rng.integers(0, 9, 8) / 8
        order = np.argsort(x, kind="stable")
        grid = (np.arange(200_000) + 0.5) * 8192 / 200_000
        dense = 1 - np.interp(grid, [0, *x[order]], [0, *y[order]]).mean()
        assert normalized_regret(x.tolist(), y.tolist(), 8192) == pytest.approx(dense, abs=1e-5)


VOTE = [(0, 0.5, 0.5, 0.5), (1, 1, 1, 1)]  # the votes 0 .5 .5 .5 against the line 0 .2 .6 1, the larger 0 .5 .6 1
VOTE_BEST, VOTE_LINE = 0.25 + 1.1 + 1.6, 0.1 + 0.8 + 1.6


@pytest.mark.parametrize(
    "trace, regret",
    [
        ([(0, 1, 1, 1), (0, 1, 1, 1)], 1),  # voting reaches 1 at once, thinking stays at 0: area thinking 0
        ([(0, 0, 0, 0), (1, 1, 1, 1)], 0),  # the other way round
        # From .5: votes .5 .6 .8 .9 (mean of .8 and 1), line .5 .5 .5 .5 up to cost 6.
        ([(0.5, 0.6, 0.8, 1.0), (0.5, 0, 0, 0)], 1 - 2.5 / (0.55 * 1 + 0.7 * 2 + 0.85 * 2)),
        (VOTE, 1 - VOTE_LINE / VOTE_BEST),
        # Areas are added before dividing; the second step alone has regret 0.
        ([*VOTE, (1, 1, 1, 1)], (VOTE_BEST - VOTE_LINE) / (VOTE_BEST + 5)),
        ([(1, 1, 1, 1)], math.nan),
        ([(0, 0, 0, 0)] * 3, math.nan),
    ],
)
def test_additional_regret_closed_forms(trace, regret):
    assert additional_regret(trace) == pytest.approx(regret, abs=1e-12, nan_ok=True)


def ends(values) -> tuple[float, float, float]:
    return tuple(interval(values).values())


def test_an_interval_matches_the_normal_approximation():
    rows = np.random.default_rng(4).random((200, 20)) < np.random.default_rng(5).random((200, 1))
    values = rows.mean(axis=1)
    mean, low, high = ends(values)
    error = values.std() / math.sqrt(200)  # of the mean over problems, not over 4,000 samples
    assert mean == pytest.approx(rows.mean(), abs=1e-12) and ends(values) == (mean, low, high)
    assert (mean - low, high - mean) == pytest.approx((1.96 * error, 1.96 * error), rel=0.1)


def test_the_interval_of_few_problems():
    assert ends([1.0, 0.0]) == (0.5, 0, 1)  # their range
    assert ends([0.75]) == pytest.approx((0.75, math.nan, math.nan), nan_ok=True)


VOTED = ["1", "2"]
REFUSED = [(lambda *of: episode_spans("a", Segmentation(*of)), of) for of in ((-1, 1), (49, 0), (49, -2))]
REFUSED += [(pass_at_k, of) for of in ((4, 0, 8), (4, 5, 1), (4, 1, 0), (4, -1, 1), (4, 1, -1), (0, 0, 1), (-1, 0, 1))]
REFUSED += [(maj_at_k, of) for of in ((VOTED, "1", 3), (["1"], "1", 0), ([], "1", 1), (VOTED, None, 1))]
REFUSED += [(maj_at_k, (VOTED, "1", 1, [1.0, *w])) for w in ([], [math.nan], [0.0], [math.inf], [-1.0])]
REFUSED += [(normalized_regret, ([1], [0.5], budget)) for budget in (0, -1, math.nan, math.inf)]
REFUSED += [(normalized_regret, ([tokens], [0.5], 10)) for tokens in (math.nan, -1, math.inf)]
REFUSED += [(normalized_regret, ([1], [accuracy], 10)) for accuracy in (math.nan, 50.0, -0.1)]
REFUSED += [(normalized_regret, (*of, 10)) for of in (([], []), ([1, 2], [0.5]), ([[1, 2]], [[0.1, 0.2]]))]
REFUSED += [(additional_regret, (of,)) for of in ([], [(1, 1, 1)], [(1, 1, 1, 2)], [(1, 1, 1, math.nan)])]
REFUSED += [(interval, (of,)) for of in ([], [1.0, math.nan], [1.0, math.inf])]


@pytest.mark.parametrize("function, arguments", REFUSED)
def test_what_has_no_value_is_refused(function, arguments):
    with pytest.raises(ValueError):
        function(*arguments)


def shared_rows(name):
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not here")
    return [json.loads(line) for line in (SHARED / name).read_text(encoding="utf-8").splitlines()]


def test_every_published_segmentation():
    traces = shared_rows("traces_nemo_gym.jsonl")
    for row in shared_rows("official_segmentation.jsonl"):
        # The real rows were made from the whole response, <think>, </think> and answer included.
        text = row["text"] if "text" in row else traces[row["line"]]["response"]
        single = split_episodes(text, row["max_steps"])
        episodes = split_episodes(text, row["max_steps"], row["group_size"])
        assert (len(single), len(episodes)) == (row["n_raw"], row["n_merged"])
        assert ("\n\n".join(single) == text) == row["roundtrip"]
        if "text" in row:
            assert (single, episodes) == (row["episodes_raw"], row["episodes"])
        else:
            assert [len(e) for e in episodes] == row["merged_lens"]
            assert [hashlib.sha1(e.encode()).hexdigest()[:12] for e in episodes] == row["merged_sha1"]


def test_every_published_regret():
    decreasing = 0
    for row in shared_rows("official_regret.jsonl"):
        if "cutoffs" not in row:
            continue
        if any(b < a for a, b in itertools.pairwise(row["tokens"])):
            decreasing += 1
            continue
        regrets = [normalized_regret(row["tokens"], row["pass_at_1"], b) for b in row["cutoffs"]]
        assert regrets == pytest.approx(row["normalized_regret"], abs=1e-9)
    assert decreasing == 2


def test_published_regret_run_with_extrapolation():
    """15 problems x 16 thoughts: averages at 4 budgets, then with the forced points of w = 2, 4, 6, 8 added
    one after the other, as the notebook adds them; a generated word counts as a token there."""
    [row] = [row for row in shared_rows("official_regret.jsonl") if "kind" in row]
    inputs = row["inputs"]
    tokens, accuracies = ([inputs[name][str(i)] for i in range(240)] for name in ("tokens", "pass_at_1"))

    def area(budget):
        return np.mean([1 - normalized_regret(*curve, budget) for curve in zip(tokens, accuracies)])

    areas = [area(budget) for budget in BUDGETS]
    for w in (2, 4, 6, 8):
        for n, t in itertools.product(range(15), range(16)):
            forced = inputs["extrapolate"][f"{n},{w}"][t]
            box = "\\boxed{" + inputs["answers"][n] + "}"
            accuracies[n * 16 + t].append(np.mean([box in output for output in forced["outputs"]]))
            words = sum(len(output.split()) for output in forced["outputs"])
            tokens[n * 16 + t].append(forced["prompt_tokens"] + words / 8)
        areas.append(area(16384 + 2048 * w))
    assert areas == pytest.approx(row["area"], abs=1e-9)


def test_published_additional_regret():
    [row] = [row for row in shared_rows("official_regret.jsonl") if "ratio" in row]
    for episodes, ratio in zip(row["budgets"], row["ratio"]):
        per_trace = [additional_regret(trace[: episodes + 1]) for trace in row["maj_at_1_2_4_8_per_episode"]]
        assert np.nanmean(per_trace) == pytest.approx(ratio, abs=1e-9)
