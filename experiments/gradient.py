"""experiments/gradient.py: what does each estimator's gradient look like, before anything is trained with it?

    python -m experiments.gradient                                # the embedded model, half an hour on one core
    python -m experiments.gradient --model runs/NAME/model        # a model that is half trained

On the same rollouts (--batches of 8 problems × 4) every estimator gives a gradient a batch; its mean over all batches
is the estimator's reference. From the batches: the cosine of one batch's gradient with the mean of the others, of its
own estimator and of the plain outcome's; the signal to noise ratio |mean|² / trace of the covariance; and the mean
advantage of the token that opens an episode with new candidates, one without, and what follows the thought.
"""

import argparse
import re
from pathlib import Path

import numpy as np
import torch

from common import Segmentation, Trace, group_advantages, likelihood_success_rates, read_traces
from plumbing import data, models, report, runs, training
from plumbing.flags import positive_int, whole_number
from plumbing.hf_engine import TransformersEngine
from plumbing.sampler import Sampler
from rl_mrt import add_progress

PROBLEMS, GROUP, BUDGET = 8, 4, 384


def flags(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dataset", default="tiny:30")
    parser.add_argument("--batches", type=positive_int, default=128, help="128: 4,096 rollouts")
    parser.add_argument("--seed", type=whole_number, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/gradient"))
    return parser.parse_args(argv)


def main() -> None:
    args = flags()
    tokenizer, model = models.load_tokenizer(args.model), models.load_model(args.model, "cpu")
    sampler = Sampler(TransformersEngine(model), tokenizer)
    problems = data.load_problems(args.dataset, "train")
    gradients: dict[str, list[torch.Tensor]] = {}
    openings: dict[str, dict[str, list[float]]] = {}
    clock = runs.Clock(args.batches, "batches", sampler)
    for number in range(args.batches):
        batch = training.problems_of_step(problems, PROBLEMS, number, args.seed)
        groups = rollouts(sampler, batch, (args.seed, number))
        estimated = estimates(groups, np.random.default_rng([args.seed, number]))
        for name, gradient in gradients_of(model, groups, estimated).items():
            gradients.setdefault(name, []).append(gradient)
        for name, advantages in estimated.items():
            for kind, values in opening_advantages(groups, advantages).items():
                openings.setdefault(name, {}).setdefault(kind, []).extend(values)
        clock.tell(number + 1)
    outcome = torch.stack(gradients["outcome"])
    rows = {name: describe(torch.stack(of), outcome) for name, of in gradients.items()}
    for name, of in openings.items():
        rows[name] |= {f"opens {kind}": float(np.mean(values)) for kind, values in of.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    runs.write_json(args.out / "gradient.json", {"model": args.model, "batches": args.batches, "estimators": rows})
    columns = list(next(iter(rows.values())))
    print(report.markdown(["", *columns], [[name, *(f"{of[c]:.3g}" for c in columns)] for name, of in rows.items()]))
    print(f"figure: {draw(rows, args.out)}")


def rollouts(sampler: Sampler, problems: list[dict], seed: tuple) -> list[list[Trace]]:
    """G graded traces a problem with J at every boundary, from the gold answer's likelihood."""
    prompts = [models.prompt_ids(sampler.tokenizer, problem["problem"]) for problem in problems]
    seeds = [(*seed, problem["place"]) for problem in problems]
    rows = sampler.generate(prompts, BUDGET, seeds, GROUP)
    groups = read_traces(sampler.tokenizer, problems, prompts, rows, Segmentation(max_episodes=32))
    likelihood_success_rates(sampler, [trace for group in groups for trace in group])
    return groups


def estimates(groups: list[list[Trace]], rng) -> dict[str, list[np.ndarray]]:
    """{estimator: the advantage of every token of every trace}."""
    rewards = torch.tensor([[trace.reward for trace in group] for group in groups], dtype=torch.float64)
    lengths = [[len(trace.completion.token_ids) for trace in group] for group in groups]
    J = {id(trace): np.array(trace.values) for group in groups for trace in group}

    def spread(values) -> list[list[np.ndarray]]:
        return [[np.full(n, float(a)) for n, a in zip(*rows)] for rows in zip(lengths, values)]

    def with_progress(transform, start=None, credit_lambda: float = 0.0) -> list[np.ndarray]:
        advantages = spread(group_advantages(rewards)) if start is None else start
        for of_group, group in zip(advantages, groups):
            for trace in group:
                trace.values = list(transform(J[id(trace)], trace))
            add_progress(of_group, group, 1.0, credit_lambda)
        return flat(advantages)

    def log_j(values, trace):
        return np.log(np.maximum(values, 1e-4)) / np.log(trace.problem["level"])

    def shuffled(values, trace):
        return np.cumsum([values[0], *rng.permutation(np.diff(values))])

    def sampled(values, trace):
        return rng.binomial(4, np.clip(values, 0, 1)) / 4

    nothing = np.zeros_like(rewards)
    return {
        "outcome": flat(spread(group_advantages(rewards, normalize_std=False))),
        "GRPO": flat(spread(group_advantages(rewards))),
        "GRPO + progress": with_progress(lambda J, trace: J),
        "progress alone": with_progress(lambda J, trace: J, spread(nothing)),
        "GRPO + log progress": with_progress(log_j),
        "log progress alone": with_progress(log_j, spread(nothing)),
        "GRPO + progress, λ = ½": with_progress(lambda J, trace: J, credit_lambda=0.5),
        "GRPO + progress, λ = 1": with_progress(lambda J, trace: J, credit_lambda=1.0),
        "GRPO + shuffled progress": with_progress(shuffled),
        "GRPO + progress, J of 4 answers": with_progress(sampled),
        "outcome - J": outcome_minus_j(groups, J),
    }


def flat(advantages: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [of_tokens for group in advantages for of_tokens in group]


def outcome_minus_j(groups, J: dict) -> list[np.ndarray]:
    """f - J(μ|c_j) for the tokens of episode j, minus the group's mean: J as the baseline of the outcome."""
    advantages = []
    for group in groups:
        of_group = []
        for trace in group:
            of_tokens = np.full(len(trace.completion.token_ids), trace.reward - J[id(trace)][-1])
            of_tokens[: trace.boundaries[-1]] = trace.reward - np.repeat(J[id(trace)][:-1], np.diff(trace.boundaries))
            of_group.append(of_tokens)
        mean = np.concatenate(of_group).mean()
        advantages += [of_tokens - mean for of_tokens in of_group]
    return advantages


def gradients_of(model, groups, estimated: dict[str, list[np.ndarray]]) -> dict[str, torch.Tensor]:
    """{estimator: gradient of its loss on the batch}; the log-probs are computed once."""
    traces = [trace for group in groups for trace in group]
    examples = [(t.prompt + t.completion.token_ids, len(t.prompt), [0.0] * len(t.completion.token_ids)) for t in traces]
    tokens = sum(len(trace.completion.token_ids) for trace in traces)
    sums: dict[str, torch.Tensor] = {}
    for order, ids, where, _ in training.micro_batches(examples, 16_384, "cpu"):
        logprobs, _ = models.token_logprobs(model, ids, where)
        for name, advantages in estimated.items():
            weights = torch.tensor(np.concatenate([advantages[i] for i in order]), dtype=torch.float32)
            loss = -(weights * logprobs).sum() / tokens
            parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            gradient = torch.cat([part.flatten() for part in parts])
            sums[name] = sums[name] + gradient if name in sums else gradient
    return sums


def opening_advantages(groups, advantages: list[np.ndarray]) -> dict[str, list[float]]:
    """The advantage of the first token of episodes with and without a new candidate, and after the thought."""
    found: dict[str, list[float]] = {"a useful episode": [], "an idle one": [], "the answer": []}
    for trace, of_tokens in zip((t for group in groups for t in group), advantages):
        tried: set[str] = set()
        for start, end in zip(trace.boundaries, trace.boundaries[1:]):
            new = set(re.findall(r"try x = (\d+)", trace.prefix(end)[len(trace.prefix(start)) :])) - tried
            found["a useful episode" if new else "an idle one"].append(float(of_tokens[start]))
            tried |= new
        if trace.finished:
            found["the answer"].append(float(of_tokens[trace.boundaries[-1]]))
    return found


def describe(gradients: torch.Tensor, outcome: torch.Tensor) -> dict[str, float]:
    """Of [batches, parameters]: each batch against the mean of the other batches."""
    count = len(gradients)

    def cosine(target: torch.Tensor) -> float:
        others = (target.sum(0) - target) / (count - 1)
        return float(torch.nn.functional.cosine_similarity(gradients, others, dim=1).mean())

    # |mean|² without the noise of the mean: E|g|² = |mean|² + variance.
    variance = float(gradients.var(0).sum())
    signal = float(gradients.mean(0).square().sum()) - variance / count
    return {
        "cosine with its own mean": cosine(gradients),
        "cosine with the outcome's": cosine(outcome),
        "signal / noise": signal / variance,
    }


def draw(rows: dict[str, dict[str, float]], out: Path) -> Path:
    """Bars: cosines and signal to noise; advantages of opening tokens."""
    figure, (cosines, openings) = report.subplots(2, 4.6, 3.6, sharey=True)
    places = np.arange(len(rows))[::-1]
    for i, column in enumerate(("cosine with its own mean", "cosine with the outcome's")):
        cosines.barh(places + 0.2 - 0.4 * i, [of[column] for of in rows.values()], 0.38, label=column)
    for i, column in enumerate(name for name in next(iter(rows.values())) if name.startswith("opens")):
        openings.barh(places + 0.27 - 0.27 * i, [of[column] for of in rows.values()], 0.25, label=column)
    cosines.set(yticks=places, yticklabels=list(rows), xlabel="of the gradient of one batch (32 rollouts)")
    openings.set(xlabel="mean advantage of the token that …")
    for axis in (cosines, openings):
        axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1))
    return report.save_figure(figure, out / "gradient.png")


if __name__ == "__main__":
    main()
