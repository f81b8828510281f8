"""experiments/variants.py: rl_mrt.py with a control of the comparison, which is not part of the product.

    python experiments/variants.py shuffled --bonus 1           # then any flags of rl_mrt.py

A variant is a function like `rl_mrt.rollouts_grpo`, used whatever --bonus and --variant say; those choose what the run
is called and, with a bonus, that J is recorded: `--bonus 1 --variant online` where a variant sets J, else `--bonus 0`.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rl_mrt
from common import episode_progress, in_nats, set_likelihood_J
from plumbing.runs import fail


def rollouts_shuffled(args, sampler, problems, prompts, seed):
    """MRT online in nats with each trace's progress on random episodes of it: a bonus as large that knows nothing."""
    groups, advantages = rl_mrt.rollouts_grpo(args, sampler, problems, prompts, seed)
    set_likelihood_J(sampler, [trace for group in groups for trace in group])
    rng = np.random.default_rng(seed)
    for group, row in zip(groups, advantages):
        rl_mrt.add_progress(row, group, args.bonus, lambda J: shuffled(in_nats(J), rng))
    return groups, advantages


def shuffled(J, rng) -> np.ndarray:
    """A J, [k + 1], with the same progress on random episodes."""
    return np.cumsum([J[0], *rng.permutation(episode_progress(J))])


VARIANTS = {"shuffled": rollouts_shuffled}


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in VARIANTS:
        fail(f"{name or 'no variant'}: expected one of {', '.join(VARIANTS)}, then flags of rl_mrt.py")
    rl_mrt.ROLLOUTS = dict.fromkeys(rl_mrt.ROLLOUTS, VARIANTS[name])
    rl_mrt.main()


if __name__ == "__main__":
    main()
