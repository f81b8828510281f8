"""experiments/variants.py: rl_mrt.py or star_mrt.py with a control or a relative of MRT, not part of the product.

    python experiments/variants.py shuffled --bonus 1           # then any flags of rl_mrt.py
    python experiments/variants.py shortest --filter outcome    # or of star_mrt.py

A variant is one or two functions that stand in for those of the script with the same names.
"""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rl_mrt
import star_mrt
from common import (
    Forcing,
    Trace,
    cut_at_budget,
    episode_progress,
    flat,
    force_answers,
    forced_prompt,
    read_traces,
    success_rate,
)
from run.files import end_in_one_line, fail
from run.flags import quarters
from run.traces import FORCED, ROLLOUT, prompts_of

ONLINE_CREDIT = rl_mrt.episode_credit
KEEP_PROGRESS, KEEP_RIGHT, FIRST_OF_PROBLEM = star_mrt.keep_progress, star_mrt.keep_right, star_mrt.first_of_problem
EXAMPLES = 240  # of an iteration of self-training, where filters are compared at equal numbers
CONTINUATIONS = 2  # of VinePPO at each boundary; theirs are 9
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


def rollouts_of_vine(args, sampler, problems, seed) -> rl_mrt.Groups:
    """VinePPO (arXiv 2410.01679) at the boundaries of episodes: J is how often the model itself, going on from there
    with no stop phrase, is right. The empty prefix has the group's outcomes."""
    groups = rl_mrt.rollouts_grpo(args, sampler, problems, seed)
    for group in groups:
        outcome = float(np.mean([trace.reward for trace in group]))
        for trace in group:
            trace.J = [outcome, *[0.0] * (len(trace.boundaries) - 1)]  # 0 where no token is left
    asked = [(t, j, b) for t in flat(groups) for j, b in enumerate(t.boundaries) if 0 < b < args.max_tokens]
    prompts = [trace.prompt + trace.completion.token_ids[:b] for trace, _, b in asked]
    seeds = [(*seed, FORCED, trace.problem["place"], trace.sample, b) for trace, _, b in asked]
    limits = [args.max_tokens - b for *_, b in asked]
    rows = sampler.generate(prompts, limits, seeds, n=CONTINUATIONS, temperature=args.temperature)
    going_on = read_traces(sampler.tokenizer, [trace.problem for trace, *_ in asked], prompts, rows)
    for (trace, j, _), continued in zip(asked, going_on):
        trace.J[j] = float(np.mean([other.reward for other in continued]))
    return groups


def vine_advantages(args, groups: rl_mrt.Groups) -> rl_mrt.Advantages:
    """VinePPO's: what each episode changes of J, the answer f - J, whitened over the tokens of the step as theirs."""
    raw = []
    for trace in flat(groups):
        lengths = np.diff([*trace.boundaries, len(trace.completion.token_ids)])
        raw.append(np.repeat(episode_progress([*trace.J, trace.reward]), lengths))
    tokens = np.concatenate(raw)
    white = iter([(row - tokens.mean()) / (tokens.std() + 1e-8) for row in raw])
    return [[next(white) for _ in group] for group in groups]


def as_many(examples: list[star_mrt.Example], count: int) -> list[star_mrt.Example]:
    """EXAMPLES of those that the filter keeps, drawn: no filter trains on more than another."""
    kept = FIRST_OF_PROBLEM(examples, count)
    drawn = np.random.default_rng(len(kept)).permutation(len(kept))[:EXAMPLES]
    return [kept[i] for i in sorted(drawn)]


def shortest_right(traces: list[Trace]) -> dict[int, int]:
    """Plain STaR that prefers short traces, as the filter mrt does."""
    return dict(sorted(KEEP_RIGHT(traces).items(), key=lambda t: len(traces[t[0]].completion.token_ids)))


def own_right(traces: list[Trace], min_success: float) -> dict[int, int]:
    """MRT-STaR from traces that plain STaR keeps, too: none whose own answer was wrong."""
    right = KEEP_RIGHT(traces)
    return {t: cut for t, cut in KEEP_PROGRESS(traces, min_success).items() if t in right}


def own_right_unranked(traces: list[Trace], min_success: float) -> dict[int, int]:
    """The same in the order of the samples, as plain STaR: the cut is all that differs."""
    return dict(sorted(own_right(traces, min_success).items()))


EVEN: dict[str, object] = {"first_of_problem": as_many}
VARIANTS: dict[str, tuple[ModuleType, dict[str, object]]] = {
    "shuffled": (rl_mrt, {"episode_credit": shuffled_credit}),
    "budgets": (rl_mrt, {"ROLLOUTS": {**rl_mrt.ROLLOUTS, "grpo": rollouts_of_budgets}}),
    "vine": (rl_mrt, {"ROLLOUTS": {**rl_mrt.ROLLOUTS, "grpo": rollouts_of_vine}, "advantages_of": vine_advantages}),
    "brpo": (rl_mrt, {"advantages_of": budget_advantages}),
    "even": (star_mrt, EVEN),
    "shortest": (star_mrt, {**EVEN, "keep_right": shortest_right}),
    "own-right": (star_mrt, {**EVEN, "keep_progress": own_right}),
    "unranked": (star_mrt, {**EVEN, "keep_progress": own_right_unranked}),
}


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in VARIANTS:
        fail(f"{name or 'no variant'}: expected one of {', '.join(VARIANTS)}, then flags of its script")
    script, stand_ins = VARIANTS[name]
    for replaced, stand_in in stand_ins.items():
        setattr(script, replaced, stand_in)
    script.main()


if __name__ == "__main__":
    end_in_one_line(main)
