"""experiments/variants.py: rl_mrt.py with a control or a relative of MRT, not part of the product.

    python experiments/variants.py shuffled --bonus 1           # then any flags of rl_mrt.py

A variant is a function that stands in for that of the script with the same name.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rl_mrt
from common import (
    Forcing,
    Trace,
    cut_at_budget,
    episode_progress,
    force_answers,
    forced_prompt,
    success_rate,
)
from run.files import end_in_one_line, fail
from run.flags import quarters
from run.traces import FORCED, ROLLOUT, prompts_of

ONLINE_CREDIT = rl_mrt.episode_credit
BUDGETS = 4  # where a thought may be stopped: the quarters of --max-tokens


def shuffled_credit(group: list[Trace], scale) -> list[np.ndarray]:
    """MRT online with each trace's progress on random episodes of it: a bonus as large that knows nothing."""
    rng = np.random.default_rng([len(trace.completion.token_ids) for trace in group])

    def shuffled(J) -> np.ndarray:
        """A J, [k + 1], with the same progress on random episodes."""
        J = scale(J)
        return np.cumsum([J[0], *rng.permutation(episode_progress(J))])

    return ONLINE_CREDIT(group, shuffled)


def rollouts_of_budgets(args, sampler, problems, seed) -> rl_mrt.Groups:
    """GRPO on random budgets: each group may think up to one of them, drawn, and has to answer there."""
    tokenizer = sampler.tokenizer
    drawn = [np.random.default_rng((*seed, p["place"])).integers(BUDGETS) for p in problems]
    limits = [quarters(args.max_tokens)[number] for number in drawn]
    groups = rl_mrt.sample_groups(
        args, sampler, problems, prompts_of(args, tokenizer, problems), limits, (*seed, ROLLOUT)
    )
    cut = [(trace, b) for group, b in zip(groups, limits) for trace in group if not trace.ended]
    prompts = [forced_prompt(tokenizer, trace, cut_at_budget(trace, budget)) for trace, budget in cut]
    seeds = [(*seed, FORCED, trace.problem["place"], trace.sample) for trace, _ in cut]
    forcing = Forcing(1, args.answer_tokens, args.temperature)
    answers = force_answers(sampler, [trace.problem for trace, _ in cut], prompts, forcing, seeds)
    for (trace, _), answer in zip(cut, answers):
        trace.reward = success_rate(trace.problem, answer)
    return groups


def budget_advantages(args, groups: rl_mrt.Groups) -> rl_mrt.Advantages:
    """BRPO (AnytimeReasoner, arXiv 2505.13438), not GRPO's: r_t is J at the last boundary within budget t of S.
    Tokens between budgets s and s + 1 get the Σ r_t / S that is left, minus (s V1 + (S - s) V2) / S: V1 is what the
    earlier budgets of the same trace, V2 what the group's mean lets expect."""
    later = 1 - np.arange(BUDGETS) / BUDGETS  # the share of the budgets from s on
    limits, advantages = quarters(args.max_tokens), []
    for group in groups:
        r = np.array([[t.J[np.searchsorted(t.boundaries, b, "right") - 1] for b in limits] for t in group])
        returns = np.cumsum(r[:, ::-1], 1)[:, ::-1] / BUDGETS
        earlier = np.stack([r[:, :s].mean(1) if s else 0 * r[:, 0] for s in range(BUDGETS)], 1) * later
        advantage = returns - (1 - later) * earlier - later * returns.mean(0)
        places = [np.arange(len(trace.completion.token_ids)) * BUDGETS // args.max_tokens for trace in group]
        advantages.append([row[place] for row, place in zip(advantage, places)])
    return advantages


VARIANTS: dict[str, dict[str, object]] = {
    "shuffled": {"episode_credit": shuffled_credit},
    "budgets": {"ROLLOUTS": {**rl_mrt.ROLLOUTS, "grpo": rollouts_of_budgets}},
    "brpo": {"advantages_of": budget_advantages},
}


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in VARIANTS:
        fail(f"{name or 'no variant'}: expected one of {', '.join(VARIANTS)}, then flags of rl_mrt.py")
    for replaced, stand_in in VARIANTS[name].items():
        setattr(rl_mrt, replaced, stand_in)
    rl_mrt.main()


if __name__ == "__main__":
    end_in_one_line(main)
