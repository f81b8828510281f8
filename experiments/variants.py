"""experiments/variants.py: rl_mrt.py with a control of the comparison, which is not part of the product.

    python experiments/variants.py shuffled --bonus 1           # then any flags of rl_mrt.py

A variant is one or more functions that stand in for those of rl_mrt.py with the same names.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rl_mrt
from common import Trace, episode_progress
from run.files import end_in_one_line, fail


def shuffled_credit(group: list[Trace], scale) -> list[np.ndarray]:
    """MRT online with each trace's progress on random episodes of it: a bonus as large that knows nothing."""
    rng = np.random.default_rng([len(trace.completion.token_ids) for trace in group])

    def shuffled(J) -> np.ndarray:
        """A J, [k + 1], with the same progress on random episodes."""
        J = scale(J)
        return np.cumsum([J[0], *rng.permutation(episode_progress(J))])

    return EPISODE_CREDIT(group, shuffled)


EPISODE_CREDIT = rl_mrt.episode_credit
VARIANTS: dict[str, dict[str, Callable]] = {"shuffled": {"episode_credit": shuffled_credit}}


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in VARIANTS:
        fail(f"{name or 'no variant'}: expected one of {', '.join(VARIANTS)}, then flags of rl_mrt.py")
    for replaced, function in VARIANTS[name].items():
        setattr(rl_mrt, replaced, function)
    rl_mrt.main()


if __name__ == "__main__":
    end_in_one_line(main)
