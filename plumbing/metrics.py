"""metrics.py: pass@k, maj@k, regret and their intervals, in plain numpy.

Apart from common.py because nothing in it touches a model. "Section" and "Appendix" refer to arXiv 2503.07572.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

SUBSET_DRAWS = 100_000
EXACT_SUBSETS = 200_000  # weighted maj_at_k goes through all subsets up to this many, then samples them


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, c of them correct, drawn without replacement, hold a correct one:
    1 - C(n-c, k) / C(n, k), unbiased (Chen et al. 2021, arXiv 2107.03374, Eq. 1).

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n. The published estimators return 1 for k > n,
    which makes a run with missing samples look perfect.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"need 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def maj_at_k(
    answers: Sequence[str | None],
    gold: str,
    k: int,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    draws: int = SUBSET_DRAWS,
) -> float:
    """Probability that `gold` wins the vote of k of the n answers, drawn without replacement.

    answers: n canonical strings, None where there is none. weights: n positive vote weights (the paper:
    2 ** mean token log-prob); None or all equal is plain voting. As in the published code (Section 5,
    Appendix D) a tie for first place that gold shares counts 1/2, however many share it; None never
    competes; without a vote for gold the score is 0. At k = 1 this is the mean accuracy.

    Plain votes are counted exactly. Unequal ones go through all C(n, k) subsets up to `EXACT_SUBSETS`;
    beyond, `draws` subsets are drawn with `seed`: standard error <= 0.5 / sqrt(draws), .0016 by default.
    Totals within 1e-9 of each other tie, since a float sum depends on the order of its terms.
    Raises ValueError for k outside 1..n, gold None, draws < 1, or weights not n positive finite numbers.
    """
    n = len(answers)
    if gold is None or not 1 <= k <= n or draws < 1:
        raise ValueError(f"need a gold, 1 <= k <= n, draws >= 1; got {gold!r}, k={k}, n={n}, draws={draws}")
    if weights is not None and (len(weights) != n or not all(0 < w < math.inf for w in weights)):
        raise ValueError(f"weights must be {n} positive finite numbers, got {weights!r}")
    rivals = Counter(answers)
    missing, right = rivals.pop(None, 0), rivals.pop(gold, 0)
    counted = {w for answer, w in zip(answers, () if weights is None else weights) if answer is not None}
    if weights is not None and len(counted) > 1 and right and rivals:  # otherwise weights decide nothing
        return _weighted_maj_at_k(answers, gold, k, weights, seed, draws)
    # ways[v][j]: how many sets of j answers other than gold give no rival more than v votes. Each class
    # multiplies in its binomial row, cut after v; Python ints (dtype object) keep the counts exact.
    ways = []
    for v in range(min(right, k) + 1):
        count = np.array([1] + [0] * k, dtype=object)
        for size, most in [(missing, missing), *((size, v) for size in rivals.values())]:
            row = [math.comb(size, votes) for votes in range(min(size, most) + 1)]
            count = np.convolve(count, np.array(row, dtype=object))[: k + 1]
        ways.append(count)
    # With v votes gold is alone in front if rivals have <= v - 1, in front or tied if they have <= v.
    twice = sum(math.comb(right, v) * (ways[v - 1][k - v] + ways[v][k - v]) for v in range(1, len(ways)))
    return twice / (2 * math.comb(n, k))


def vote_at_k(classes: Sequence[int | None], k: int, weights: Sequence[float] | None = None) -> float:
    """maj@k of answers sorted into classes by `grading.group_answers`: 0 is right, None no answer."""
    if weights is not None:
        return maj_at_k([None if c is None else str(c) for c in classes], "0", k, weights)
    sizes = Counter(classes)
    missing, right = sizes.pop(None, 0), sizes.pop(0, 0)
    return _plain_vote(right, missing, tuple(sorted(sizes.values())), k)


@cache
def _plain_vote(right: int, missing: int, rivals: tuple[int, ...], k: int) -> float:
    """Plain votes depend on the sizes of the classes alone, and many problems have the same."""
    answers = ["right"] * right + [None] * missing + [str(i) for i, size in enumerate(rivals) for _ in range(size)]
    return maj_at_k(answers, "right", k)


def _weighted_maj_at_k(
    answers: Sequence[str | None], gold: str, k: int, weights: Sequence[float], seed: int, draws: int
) -> float:
    """`maj_at_k` for unequal weights: the mean over all, or over sampled, k-subsets."""
    classes = [gold, *sorted({a for a in answers if a is not None} - {gold})]
    votes = np.array([[w * (answer == c) for c in classes] for answer, w in zip(answers, weights)])
    score, subsets = 0.0, 0
    for chosen in _subsets(len(answers), k, seed, draws):
        mask = np.zeros((len(chosen), len(answers)))
        np.put_along_axis(mask, chosen, 1.0, axis=1)
        totals = mask @ votes  # [subsets, classes], gold first; 0 where a class has no vote
        mine, best_rival = totals[:, 0], totals[:, 1:].max(axis=1)
        tied = np.abs(mine - best_rival) <= 1e-9 * mine
        score += np.sum(np.where(tied, 0.5, mine > best_rival) * (mine > 0))
        subsets += len(chosen)
    return float(score / subsets)


def _subsets(n: int, k: int, seed: int, draws: int, block: int = 10_000) -> Iterator[np.ndarray]:
    """k-subsets of range(n) as [<= block, k] index arrays: each once if there are few, else random ones."""
    if math.comb(n, k) <= EXACT_SUBSETS:
        every = itertools.combinations(range(n), k)
        while some := list(itertools.islice(every, block)):
            yield np.array(some)
    else:
        rng = np.random.default_rng(seed)
        for done in range(0, draws, block):
            yield rng.random((min(block, draws - done), n)).argpartition(k - 1, axis=1)[:, :k]


def normalized_regret(tokens: Sequence[float], accuracies: Sequence[float], budget: float) -> float:
    """Normalised regret of one trace at a budget of C0 tokens (Section 7): 1 - area / C0, in [0, 1].

    tokens: at each prefix j, its tokens + the mean tokens of its forced answers. accuracies: J there.
    The curve starts at (0, 0), is linear in between, and is cut at C0 or held at its last value up to
    C0. For budgets beyond training append the budget-forced points. Average over traces, then problems.

    Points are sorted by position (stably) first: a longer prefix with shorter answers can stand before
    its predecessor, and the area needs accuracy as a function of tokens. The published notebook keeps
    the running order, so there a step back counts as negative area or, at the cut, positions are paired
    with other prefixes' accuracies. Where positions never decrease the two agree.
    Raises ValueError for no points, unequal lengths, accuracies outside [0, 1], and tokens or a budget
    that are negative or not finite.
    """
    x, y = np.asarray(tokens, dtype=float), np.asarray(accuracies, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or x.size == 0 or not 0 < budget < math.inf:
        raise ValueError(f"need as many tokens as accuracies and budget > 0: {x.shape}, {y.shape}, {budget}")
    if not np.all((x >= 0) & (x < np.inf) & (y > -1e-6) & (y < 1 + 1e-6)):  # NaN fails too
        raise ValueError("tokens must be finite and >= 0, accuracies in [0, 1]")
    order = np.argsort(x, kind="stable")
    x, y = np.append(0.0, x[order]), np.append(0.0, y[order])
    inside = int(np.searchsorted(x, budget))  # points before the budget, at least (0, 0)
    last = np.interp(budget, x[inside - 1 : inside + 1], y[inside - 1 : inside + 1])  # one point: its value
    return float(1 - np.trapezoid(np.append(y[:inside], last), np.append(x[:inside], budget)) / budget)


def additional_regret(maj: Sequence[tuple[float, float, float, float]], episodes: int | None = None) -> float:
    """Regret against voting early, for one trace (Appendix E), in [0, 1].

    maj: [prefixes, 4] with maj@1, 2, 4, 8. From prefix i one can vote: maj@1, maj@2, maj@4, mean(maj@4,
    maj@8) at costs 1, 2, 4, 6; or think: a line from maj@1 at cost 1 to the next prefix's maj@1 at cost
    6. The optimum is the larger one at each cost. Returns sum_i (area optimum - area thinking) / sum_i
    area optimum over the first `episodes` prefixes that have a next one (None: all). NaN where nothing
    is left to divide by (one prefix, or never right); the published average over traces skips those:
    np.nanmean. Raises ValueError for another shape, values outside [0, 1], or episodes < 1.
    """
    m = np.asarray(maj, dtype=float)
    if m.ndim != 2 or m.shape[1] != 4 or not np.all((m >= 0) & (m <= 1)):
        raise ValueError(f"need [prefixes, 4] values in [0, 1], got shape {m.shape}")
    if episodes is not None and episodes < 1:
        raise ValueError(f"need episodes >= 1 or None, got {episodes}")
    cost = np.array([1.0, 2.0, 4.0, 6.0])
    here, there = m[:-1][:episodes], m[1:, :1][:episodes]
    vote = np.column_stack([here[:, :3], here[:, 2:].mean(axis=1)])
    think = here[:, :1] + (cost - 1) / 5 * (there - here[:, :1])
    best = np.trapezoid(np.maximum(vote, think), cost, axis=1).sum()
    return float(1 - np.trapezoid(think, cost, axis=1).sum() / best) if best > 0 else math.nan


def trace_curve(sample: dict) -> tuple[list[float], list[float]]:
    """(tokens, J) at the boundaries of a recorded trace: prefix tokens + mean tokens of the answers forced there."""
    return [b + a for b, a in zip(sample["boundaries"], sample["answer_tokens"])], sample["J"]


def regret_at(sample: dict, budget: float) -> float:
    """`normalized_regret` of a recorded trace."""
    return normalized_regret(*trace_curve(sample), budget)


def accuracy_at(sample: dict, budget: float) -> float:
    """J at the last boundary of a recorded trace whose forced answer fits the budget; 0 before the first."""
    tokens, values = trace_curve(sample)
    return next((v for t, v in zip(tokens[::-1], values[::-1]) if t <= budget), 0.0)


def tokens_to_reach(target: float, tokens: Sequence[float] | np.ndarray, scores: Sequence[float] | np.ndarray) -> float:
    """Tokens at which a curve first reaches a score, linear between its points; its first point if it starts above,
    infinite if it never gets there."""
    i = next((i for i, score in enumerate(scores) if score >= target - 1e-12), None)
    if i is None:
        return math.inf
    if i == 0:
        return float(tokens[0])
    share = (target - scores[i - 1]) / (scores[i] - scores[i - 1])
    return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))


def bootstrap_interval(
    per_problem: Sequence[Sequence[float]] | np.ndarray, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high): mean over problems of each one's mean over its samples; percentile bootstrap.

    per_problem: a row of any length >= 1, or a number, per problem. Problems are resampled, not samples:
    samples of one problem are correlated and the claim is about unseen problems; the noise within a
    problem is included, since its mean carries it. To compare two methods pass the differences of their
    per-problem means: the spread between problems they share then cancels. One problem says nothing
    about that spread: low and high are NaN. With fewer than about 10 the interval is too narrow.
    Raises ValueError for no problems, an empty row, NaN or infinity, level outside (0, 1), or draws < 1.
    """
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"need 0 < level < 1 and draws >= 1, got {level} and {draws}")
    means = np.array([np.mean(row) if np.size(row) else math.nan for row in per_problem], dtype=float)
    if len(means) == 0 or not np.all(np.isfinite(means)):
        raise ValueError("need at least one problem, at least one sample of each, and finite numbers")
    if len(means) == 1:
        return float(means[0]), math.nan, math.nan
    picks = np.random.default_rng(seed).integers(len(means), size=(draws, len(means)))
    low, high = np.quantile(means[picks].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(means.mean()), float(low), float(high)


def interval(values) -> dict[str, float]:
    """A mean over problems with its 95 % bootstrap interval."""
    mean, low, high = bootstrap_interval(values)
    return {"mean": mean, "low": low, "high": high}
