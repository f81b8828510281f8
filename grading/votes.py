"""Votes of k of n answers: exact counts where votes are equal, subsets where they have weights."""

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import cache

import numpy as np

EXACT_SUBSETS, SUBSET_DRAWS = 200_000, 100_000  # weighted votes: all subsets up to so many, else so many random ones


def wins_vote(first: Hashable, answers: Sequence[Hashable], k: int, weights: Sequence[float] | None) -> float:
    """Probability that `first` wins the vote of k of the answers, a tie counting 1/2; None has no vote."""
    rivals = Counter(answers)
    missing, right = rivals.pop(None, 0), rivals.pop(first, 0)
    counted = {w for answer, w in zip(answers, weights or ()) if answer is not None}
    if weights is None or len(counted) <= 1 or not right or not rivals:  # weights decide nothing
        return plain_vote(right, missing, tuple(sorted(rivals.values())), k)
    classes = [first, *rivals]
    return weighted_vote(np.array([[w * (a == c) for c in classes] for a, w in zip(answers, weights)]), k)


@cache
def plain_vote(right: int, missing: int, rivals: tuple[int, ...], k: int) -> float:
    """Probability that the first class wins the vote of k answers, a tie counting 1/2, from the number of answers in
    each class; `missing` answers have no vote."""
    # ways[v][j]: how many sets of j answers other than gold give no rival more than v votes. Each class
    # multiplies in its binomial row, cut after v; Python ints (dtype object) keep the counts exact.
    ways = []
    for v in range(min(right, k) + 1):
        count = np.array([1] + [0] * k, dtype=object)
        for size, most in [(missing, missing), *((size, v) for size in rivals)]:
            row = [math.comb(size, votes) for votes in range(min(size, most) + 1)]
            count = np.convolve(count, np.array(row, dtype=object))[: k + 1]
        ways.append(count)
    # With v votes gold is alone in front if rivals have <= v - 1, in front or tied if they have <= v.
    twice = sum(math.comb(right, v) * (ways[v - 1][k - v] + ways[v][k - v]) for v in range(1, len(ways)))
    return twice / (2 * math.comb(right + missing + sum(rivals), k))


def weighted_vote(votes: np.ndarray, k: int) -> float:
    """The same for votes of unequal weight, [n answers, classes], the first class first; a row of zeros is no vote.

    Goes through all C(n, k) subsets up to `EXACT_SUBSETS`; beyond, `SUBSET_DRAWS` are drawn: standard error at most
    .0016. Totals within 1e-9 of each other tie, since a float sum depends on the order of its terms.
    """
    n, rng = len(votes), np.random.default_rng(0)
    exact = itertools.combinations(range(n), k) if math.comb(n, k) <= EXACT_SUBSETS else None
    score, subsets = 0.0, 0
    while subsets < (math.comb(n, k) if exact else SUBSET_DRAWS):
        if exact:
            chosen = np.array(list(itertools.islice(exact, 2_000)))
        else:
            chosen = rng.random((min(2_000, SUBSET_DRAWS - subsets), n)).argpartition(k - 1, axis=1)[:, :k]
        totals = votes[chosen].sum(axis=1)
        own, best_rival = totals[:, 0], totals[:, 1:].max(axis=1)
        tied = np.abs(own - best_rival) <= 1e-9 * own
        score += np.sum(np.where(tied, 0.5, own > best_rival) * (own > 0))
        subsets += len(chosen)
    return float(score / subsets)
