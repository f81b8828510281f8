"""experiments/gradient.py: what does each estimator's gradient look like, before anything is trained with it?

    python -m experiments.gradient                                # the embedded model, half an hour on one core
    python -m experiments.gradient --model tiny,runs/NAME/model   # and a model that is half trained

On the same rollouts (--batches of 8 problems × 4) every estimator gives a gradient a batch; its mean over all batches
is the estimator's reference. From the batches: the cosine of one batch's gradient with the mean of the others, of its
own estimator and of the plain outcome's (leave-one-out, RLOO's, is the plain outcome times 4/3); the signal to noise
ratio |mean|² / trace of the covariance; and the mean advantage of the token that opens an episode with new candidates,
one without, and what follows the thought. The prefix variant has rollouts of its own.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch

import rl_mrt
from common import in_nats
from experiments import variants
from plumbing import data, models, report, runs, training
from plumbing.flags import changed, positive_int, whole_number
from plumbing.hf_engine import TransformersEngine
from plumbing.sampler import Sampler

SETTING = "--problems-per-step 8 --group-size 4 --max-tokens 384 --progress likelihood --variant online"


def flags(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="several with commas")
    parser.add_argument("--dataset", default="tiny:30")
    parser.add_argument("--batches", type=positive_int, default=128, help="128: 4,096 rollouts")
    parser.add_argument("--seed", type=whole_number, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/gradient"))
    return parser.parse_args(argv)


def main() -> None:
    args = flags()
    args.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for model in args.model.split(","):
        short = runs.short_name(model)
        measured = args.out / f"{short}-{args.batches}-{args.seed}.json"
        if not measured.exists():
            runs.write_json(measured, measure(args, model))
        found[short] = json.loads(measured.read_text())
        columns = list(found[short]["GRPO"])
        rows = [[name, *(f"{row[c]:.3g}" for c in columns)] for name, row in found[short].items()]
        print(f"{model}\n\n{report.markdown(['', *columns], rows)}")
    runs.write_json(args.out / "gradient.json", {"batches": args.batches, "models": found})
    print(f"figure: {draw(found, args.out)}")


def measure(args, name: str) -> dict[str, dict[str, float]]:
    """{estimator: what is said of its gradients}, for one model."""
    tokenizer, model = models.load_tokenizer(name), models.load_model(name, "cpu")
    sampler = Sampler(TransformersEngine(model), tokenizer)
    problems = data.load_problems(args.dataset, "train")
    setting = rl_mrt.flags([*SETTING.split(), "--dataset", args.dataset, "--seed", str(args.seed)])
    gradients: dict[str, list[torch.Tensor]] = {}
    openings: dict[str, dict[str, list[float]]] = {}
    clock = runs.Clock(args.batches, "batches", sampler)
    for number in range(args.batches):
        batch = training.problems_of_step(problems, setting.problems_per_step, number, args.seed)
        prompts = [models.prompt_ids(tokenizer, problem["problem"]) for problem in batch]
        for groups, estimated in estimates(setting, sampler, batch, prompts, (args.seed, number)):
            for estimator, gradient in gradients_of(model, groups, estimated).items():
                gradients.setdefault(estimator, []).append(gradient)
            for estimator, advantages in estimated.items():
                for kind, values in opening_advantages(groups, advantages).items():
                    openings.setdefault(estimator, {}).setdefault(kind, []).extend(values)
        clock.tell(number + 1)
    outcome = torch.stack(gradients["outcome"])
    rows = {estimator: describe(torch.stack(batches), outcome) for estimator, batches in gradients.items()}
    for estimator, kinds in openings.items():
        rows[estimator] |= {f"opens {kind}": float(np.mean(values)) for kind, values in kinds.items()}
    return rows


def estimates(args, sampler, problems, prompts, seed: tuple):
    """Yields (groups, {estimator: advantages}): for the shared rollouts, then for those of the prefix variant."""
    groups, _ = variants.scored(args, sampler, problems, prompts, seed)
    rng = np.random.default_rng(seed)

    def outcome(**settings):
        return rl_mrt.outcome_advantages(changed(args, **settings), groups)

    def with_progress(scale=np.asarray, alone: bool = False):
        advantages = outcome()
        for group, row in zip(groups, advantages):
            if alone:
                row[:] = [0 * advantage for advantage in row]
            rl_mrt.add_progress(row, group, 1.0, scale)
        return advantages

    def with_credit(credit_lambda: float):
        return with_progress(lambda J: np.cumsum([0.0, *variants.discounted(J, credit_lambda)]))

    def critic(credit_lambda: float):
        return [variants.critic_advantages(group, credit_lambda) for group in groups]

    shared = {
        "outcome": outcome(no_std=True),
        "GRPO": outcome(),
        "GRPO + progress": with_progress(),
        "GRPO + progress, λ = ½": with_credit(0.5),
        "GRPO + progress, λ = 1": with_credit(1.0),
        "GRPO + progress, J of 4 answers": with_progress(lambda J: rng.binomial(4, np.clip(J, 0, 1)) / 4),
        "GRPO + log progress": with_progress(in_nats),
        "GRPO + shuffled log progress": with_progress(lambda J: variants.shuffled(in_nats(J), rng)),
        "log progress alone": with_progress(in_nats, alone=True),
        "outcome - J (critic, λ = 1)": critic(1.0),
        "critic, λ = 0": critic(0.0),
    }
    yield groups, shared
    groups, advantages = rl_mrt.rollouts_prefix(args, sampler, problems, prompts, seed)
    yield groups, {"prefix": advantages}


def gradients_of(model, groups: rl_mrt.Groups, estimated: dict[str, rl_mrt.Advantages]) -> dict[str, torch.Tensor]:
    """{estimator: gradient of its loss on the batch}; the log-probs are computed once."""
    traces = [trace for group in groups for trace in group]
    examples = [(t.prompt + t.completion.token_ids, len(t.prompt), [0.0] * len(t.completion.token_ids)) for t in traces]
    tokens = sum(len(trace.completion.token_ids) for trace in traces)
    flat = {name: [a for row in advantages for a in row] for name, advantages in estimated.items()}
    sums: dict[str, torch.Tensor] = {}
    for order, ids, where, _ in training.micro_batches(examples, 16_384, "cpu"):
        logprobs, _ = models.token_logprobs(model, ids, where)
        for name, rows in flat.items():
            weights = torch.tensor(np.concatenate([rows[i] for i in order]), dtype=torch.float32)
            loss = -(weights * logprobs).sum() / tokens
            parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            gradient = torch.cat([part.flatten() for part in parts])
            sums[name] = sums[name] + gradient if name in sums else gradient
    return sums


def opening_advantages(groups: rl_mrt.Groups, advantages: rl_mrt.Advantages) -> dict[str, list[float]]:
    """The advantage of the first token of episodes with and without a new candidate, and after the thought."""
    found: dict[str, list[float]] = {"a useful episode": [], "an idle one": [], "the answer": []}
    pairs = [pair for group, row in zip(groups, advantages) for pair in zip(group, row)]
    for trace, advantage in pairs:
        tried: set[str] = set()
        for start, end in zip(trace.boundaries, trace.boundaries[1:]):
            new = set(re.findall(r"try x = (\d+)", trace.prefix(end)[len(trace.prefix(start)) :])) - tried
            found["a useful episode" if new else "an idle one"].append(float(advantage[start]))
            tried |= new
        if trace.finished:
            found["the answer"].append(float(advantage[trace.boundaries[-1]]))
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


def draw(found: dict[str, dict[str, dict[str, float]]], out: Path) -> Path:
    """Bars: signal to noise and cosine with the outcome's gradient, for each model; opening tokens' advantages."""
    figure, axes = report.subplots(3, 3.6, 4.6, sharey=True)
    names = list(next(iter(found.values())))
    places, height = np.arange(len(names))[::-1], 0.8 / len(found)
    for axis, column in zip(axes, ("signal / noise", "cosine with the outcome's")):
        for i, (model, rows) in enumerate(found.items()):
            bars = places + 0.4 - height * (i + 0.5)
            label = "embedded model" if model == "tiny" else "half trained"
            axis.barh(bars, [rows[name][column] for name in names], height * 0.95, label=label)
        axis.set(xlabel=f"{column} (32 rollouts)")
    first = next(iter(found.values()))
    for i, kind in enumerate(("a useful episode", "an idle one", "the answer")):
        advantages = [first[name][f"opens {kind}"] for name in names]
        axes[2].barh(places + 0.27 - 0.27 * i, advantages, 0.25, label=kind, color=f"C{i + 2}")
    axes[2].set(xlabel="mean advantage of opening …")
    axes[0].set(yticks=places, yticklabels=names)
    for axis in (axes[0], axes[2]):
        axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return report.save_figure(figure, out / "gradient.png")


if __name__ == "__main__":
    main()
