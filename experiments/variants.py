"""experiments/variants.py: rl_mrt.py with an estimator or a control that was tried and is not part of the product.

    python experiments/variants.py critic           # then any flags of rl_mrt.py

Each replaces a function of rl_mrt.ROLLOUTS.

    critic     J as the baseline of the outcome instead of a bonus: f - J(μ | c_j) (VinePPO's, arXiv 2410.01679)
    critic-0   each episode credited with its own δ alone: its progress and, at the end, f - J
    shuffled   MRT online with each trace's progress on random episodes of it: a bonus as large that knows nothing
    dynamic    GRPO without groups of equal rewards: problems are sampled until there are enough (DAPO's, 2503.14476)
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rl_mrt
from common import Trace, episode_progress, in_nats, set_likelihood_J
from plumbing import data, models, training


def scored(args, sampler, problems, prompts, seed):
    """GRPO's rollouts and advantages, with J at every boundary."""
    groups, advantages = rl_mrt.rollouts_grpo(args, sampler, problems, prompts, seed)
    set_likelihood_J(sampler, [trace for group in groups for trace in group])
    return groups, advantages


def shuffled(J, rng) -> np.ndarray:
    """With the same progress, on random episodes."""
    return np.cumsum([J[0], *rng.permutation(episode_progress(J))])


def discounted(J, credit_lambda: float) -> np.ndarray:
    """Σ_{l ≥ j} λ^{l-j} r_prg(z_l), [k]: 0 is an episode's own progress, 1 the end of the thought minus J before z_j, a
    return with μ as its baseline; between them generalised advantage estimation over episodes."""
    credits = episode_progress(J)
    for j in range(len(credits) - 2, -1, -1):
        credits[j] += credit_lambda * credits[j + 1]
    return credits


def rollouts_shuffled(args, sampler, problems, prompts, seed):
    groups, advantages = scored(args, sampler, problems, prompts, seed)
    rng = np.random.default_rng(seed)
    for group, row in zip(groups, advantages):
        rl_mrt.add_progress(row, group, args.bonus, lambda J: shuffled(in_nats(J), rng))
    return groups, advantages


def rollouts_critic(args, sampler, problems, prompts, seed, credit_lambda: float = 1.0):
    groups, _ = scored(args, sampler, problems, prompts, seed)
    return groups, [critic_advantages(group, credit_lambda) for group in groups]


def critic_advantages(group: list[Trace], credit_lambda: float) -> list[np.ndarray]:
    """Σ_l λ^{l-j} δ_l, minus the mean over the group's tokens. A thought that was cut off has no answer: its last
    episode ends in the outcome."""
    advantages = []
    for trace in group:
        ends, J = trace.boundaries, trace.values
        steps, J = (ends, [*J, trace.reward]) if trace.finished else (ends[:-1], [*J[:-1], trace.reward])
        lengths = np.diff([*steps, len(trace.completion.token_ids)])
        advantages.append(np.repeat(discounted(J, credit_lambda), lengths))
    mean = np.concatenate(advantages).mean()
    return [advantage - mean for advantage in advantages]


def rollouts_dynamic(args, sampler, problems, prompts, seed):
    """As many groups whose rewards differ as a step has problems; sampled in rounds of as many problems."""
    every = data.problems_of(args)
    groups: list = []
    for attempt in range(8):
        found, _ = rl_mrt.rollouts_grpo(args, sampler, problems, prompts, (*seed, attempt))
        groups += [group for group in found if len({trace.reward for trace in group}) > 1]
        if len(groups) >= args.problems_per_step:
            break
        problems = training.problems_of_step(every, args.problems_per_step, attempt, args.seed + 7919 * (1 + seed[1]))
        prompts = [models.prompt_ids(sampler.tokenizer, problem["problem"]) for problem in problems]
    groups = groups[: args.problems_per_step] or found
    for place, group in enumerate(groups):
        for trace in group:
            trace.problem = {**trace.problem, "place": place}
    return groups, rl_mrt.outcome_advantages(args, groups)


VARIANTS = {
    "shuffled": ("online", rollouts_shuffled),
    "critic": ("online", rollouts_critic),
    "critic-0": ("online", partial(rollouts_critic, credit_lambda=0.0)),
    "dynamic": ("grpo", rollouts_dynamic),
}

if __name__ == "__main__":
    replaced, rollouts = VARIANTS[sys.argv.pop(1)]
    rl_mrt.ROLLOUTS[replaced] = rollouts
    rl_mrt.main()
