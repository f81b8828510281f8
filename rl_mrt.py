"""rl_mrt.py: MRT by reinforcement learning (Section 6, Figure 6 right, Eq. 2); with --bonus 0 it is GRPO.

    l_MRT = l_FT + α · E[ Σ_j r_prg(z_j; c_{j-1}) ],    r_prg(z_j; c) = J(μ | z_j, c) - J(μ | c)          (Eq. 2)

One update: sample traces → split the thoughts into episodes → J(μ) at their boundaries → an advantage for each token
→ clipped policy-gradient loss → AdamW. MRT differs from GRPO in the advantages, marked `# MRT`, and in the prefix
variant in where rollouts start. l_FT is the outcome reward's loss, c_{j-1} the prefix before episode z_j.

    --bonus 0                      outcome-reward GRPO: G traces a problem, 0/1 reward, group-normalised
    --bonus α --variant prefix     the paper's: a partial rollout is cut after a random number of episodes; from there m
                                   rollouts stop and answer (they estimate J(μ|c)) and G go on thinking
    --bonus α --variant online     the authors' later variant: forced answers at every boundary of on-policy traces,
                                   each episode's tokens are credited with that episode's progress
    --length-penalty w             the paper's third baseline (Arora & Zanette, arXiv 2502.04463)

On a laptop, with the embedded model (seconds a step):
    python rl_mrt.py --bonus 0
    python rl_mrt.py --bonus 1 --variant online --progress likelihood
On a GPU, with the paper's data and settings (Table 3):
    python rl_mrt.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --bonus 1.0
"""

import argparse
import importlib
import importlib.util
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import common
from common import ForcedAnswers, Sampler, Trace, fail

# flag: (default with the embedded model, with any other model, where the latter comes from)
DEFAULTS = {
    "dataset": ("tiny", "AI-MO/NuminaMath-1.5", "the paper: NuminaMath, release not named"),
    "split": ("train", "train", "Section 6"),
    "limit": (None, 4000, "Section 6: 4,000 NuminaMath problems"),
    "problems_per_step": (32, 64, "Table 3: a batch of 256 samples"),
    "group_size": (8, 4, "Table 3"),
    "max_tokens": (256, 16384, "the authors' runs of 1.5B models; Table 3 allows 24576"),
    "answer_tokens": (8, 1024, "ours"),
    "temperature": (1.0, 0.9, "Table 3"),
    "lr": (5e-4, 1e-6, "Table 3"),
    "schedule": ("constant", "cosine", "Table 3"),
    "warmup": (0.0, 0.1, "Table 3"),
    "weight_decay": (0.0, 0.01, "Table 3"),
    "kl": (0.0, 0.04, "not published; the default of the trainer the authors built on"),
    "max_episodes": (32, 6, "the authors' online variant"),
    "max_tokens_per_batch": (16384, 32768, "ours"),
}


def flags(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_common_flags(parser)
    mrt = parser.add_argument_group("MRT")
    mrt.add_argument("--bonus", type=common.non_negative, default=1.0, help="α of Eq. 2; 0 is GRPO (the authors swept "
                     "0 to 1.6; default 1, their v0.1)")  # fmt: skip
    mrt.add_argument("--variant", choices=("prefix", "online"), default="prefix", help="default: the paper's")
    mrt.add_argument("--progress", choices=("sampled", "likelihood"), default="sampled",
                     help="J by sampled forced answers, or by the gold answer's likelihood")  # fmt: skip
    mrt.add_argument("--forced-answers", type=common.positive_int, default=4,
                     help="sampled answers for each J; prefix: m of Figure 6 (4: the authors' v0.1)")  # fmt: skip
    mrt.add_argument("--answer-tokens", type=common.positive_int, help="limit of a forced answer")
    mrt.add_argument("--credit-lambda", type=float, default=0.0, help="online: 0 credits an episode with its own "
                     "progress (the paper), 1 with all that follows")  # fmt: skip
    mrt.add_argument("--max-episodes", type=common.positive_int, help="longer thoughts: neighbours are joined")
    grpo = parser.add_argument_group("GRPO")
    grpo.add_argument("--problems-per-step", type=common.positive_int)
    grpo.add_argument("--group-size", type=common.positive_int, help="G rollouts a problem")
    grpo.add_argument("--max-tokens", type=common.positive_int, help="budget of a completion, thought and answer")
    grpo.add_argument("--temperature", type=common.non_negative, help="of rollouts and forced answers; the loss divides by it, too")
    grpo.add_argument("--no-std", action="store_true", help="advantages without the division by the group's std")
    grpo.add_argument("--length-penalty", type=common.non_negative, default=0.0, help="weight w in [0, 1), 0: none")
    grpo.add_argument("--clip", type=common.non_negative, default=0.2, help="ε of the ratio's clipping (PPO's)")
    grpo.add_argument(
        "--kl", type=common.non_negative, help="β of the k3 penalty to the initial model; 0: no copy kept"
    )
    grpo.add_argument("--is-cap", type=common.non_negative, default=2.0, help="cap of the importance weights between "
                      "sampler and trainer")  # fmt: skip
    grpo.add_argument("--updates-per-batch", type=common.positive_int, default=1, help="optimiser steps a batch")
    train = parser.add_argument_group("optimisation")
    train.add_argument("--steps", type=common.positive_int, help="default: one pass over the problems")
    train.add_argument("--max-sampled-tokens", type=common.positive_int, help="stop after so many sampled tokens, "
                       "forced answers included; with --steps: at whichever comes first")  # fmt: skip
    train.add_argument("--lr", type=common.non_negative)
    train.add_argument("--schedule", choices=("constant", "cosine"))
    train.add_argument("--warmup", type=common.non_negative, help="share of the run with rising learning rate")
    train.add_argument("--weight-decay", type=common.non_negative)
    train.add_argument("--max-grad-norm", type=common.non_negative, default=1.0)
    train.add_argument("--max-tokens-per-batch", type=common.positive_int, help="tokens of a micro-batch, with padding")
    train.add_argument("--checkpoint-every", type=common.positive_int, default=10, help="steps")
    train.add_argument("--keep", type=common.positive_int, default=1, help="checkpoints kept")
    train.add_argument("--eval-every", type=common.whole_number, default=10, help="steps between validations; 0: none")
    train.add_argument("--eval-dataset", help="problems to validate on; default: tiny's own, none for other data")
    train.add_argument("--eval-split", default="validation", help="split of --eval-dataset")
    train.add_argument("--eval-problems", type=common.positive_int, default=96)
    train.add_argument("--report-to", choices=("wandb", "trackio", "tensorboard"), help="metrics also go there")
    train.add_argument("--dry-run", action="store_true", help="print the plan and a memory estimate, load no weights")
    args = common.parse_flags(parser, DEFAULTS, argv)
    kind = "grpo" if args.bonus == 0 else "prefix" if args.variant == "prefix" else f"online-{args.progress}"
    args.out = args.out or Path("runs") / f"rl-{common.short_name(args.model)}-{kind}-seed{args.seed}"
    if args.group_size == 1 and not args.no_std:
        fail("--group-size 1: a group of one has no spread to normalise by; use a larger group or --no-std")
    if args.bonus > 0 and args.variant == "prefix" and args.progress == "likelihood":
        fail("--progress likelihood needs --variant online: the prefix variant's m rollouts that stop are samples")
    if args.length_penalty >= 1:
        fail(f"--length-penalty {args.length_penalty}: must be below 1, or right answers could lose to wrong ones")
    if not 0 <= args.credit_lambda <= 1:
        fail(f"--credit-lambda {args.credit_lambda}: must be between 0 and 1")
    if args.max_tokens < 2:
        fail(f"--max-tokens {args.max_tokens}: leaves no room for a thought and an answer")
    if not args.temperature > 0:
        fail(f"--temperature {args.temperature}: must be above 0, a group of greedy rollouts has no spread")
    if args.report_to and importlib.util.find_spec(args.report_to) is None:
        fail(f"--report-to {args.report_to}: pip install {args.report_to}")
    return args


def main() -> None:
    args = flags()
    _, world = common.start_processes()
    if args.problems_per_step < world:
        fail(f"--problems-per-step {args.problems_per_step}: fewer than the {world} processes")
    args.engine = common.pick_engine(args.engine)
    if world > 1 and args.engine == "vllm" and args.bonus and args.progress == "likelihood":
        fail("--progress likelihood: several processes score with --engine transformers, which has the whole model")
    settings = {
        k: v for k, v in vars(args).items() if k not in ("config", "checkpoint_every", "keep", "report_to", "dry_run")
    }
    common.check_out(args.out, settings, args.resume, args.overwrite)
    tokenizer = common.load_tokenizer(args.model)  # small: a wrong --model is told before a data set is fetched
    problems = common.load_problems(args.dataset, args.split, args.limit)
    validation = []
    if args.eval_every and (args.eval_dataset or common.is_tiny_dataset(args.dataset)):
        validation = common.load_problems(args.eval_dataset or args.dataset, args.eval_split, args.eval_problems)
    prompts = {p["id"]: common.prompt_ids(tokenizer, p["problem"], args.chat_template_kwargs) for p in problems}
    if not common.thinks(tokenizer):
        print(f"{args.model} has no {common.THINK_END}: its whole completion is the thought, and it is asked for a box")
    longest = common.check_lengths(args, tokenizer, problems, list(prompts.values()))
    to_validate = [common.prompt_ids(tokenizer, p["problem"], args.chat_template_kwargs) for p in validation]
    longest = max(longest, common.check_lengths(args, tokenizer, validation, to_validate))
    if args.dry_run:
        print(plan(args, len(problems), longest))
        return
    model = common.load_model(args.model, common.pick_device())
    run = common.open_run_once(args.out, settings, args.resume, args.overwrite)
    if args.resume and (run / "summary.json").exists():
        print(f"{run} is complete")
        return
    if common.ranks()[0] == 0:
        common.same_inputs(run, problems, args.model)
    sampler = common.open_sampler(args, tokenizer, longest, trained=model)
    train(args, run, model, sampler, problems, prompts, validation)


def plan(args, problems: int, longest: int) -> str:
    """--dry-run: what the run will do, and an estimate of the memory that a process needs. Counted: float32 weights,
    gradients and AdamW's two moments, shared among the processes; a copy for sampling and one for the KL penalty; a
    micro-batch's layer inputs, kept for the backward pass, and one layer's inside; a chunk of logits."""
    config, world = common.load_config(args.model), common.ranks()[1]
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    tokens, size = max(args.max_tokens_per_batch, longest), 4 if common.pick_dtype(args.dtype) == torch.float32 else 2
    inside = 4 * config.intermediate_size + 8 * config.hidden_size
    parts = {
        "weights, gradients, moments": 16 * count / world,
        "copy that samples": 0 if world == 1 and args.engine == "transformers" else size * count,
        "reference of the KL penalty": 4 * count if args.kl else 0,
        "activations of a micro-batch": size * tokens * (config.num_hidden_layers * config.hidden_size + inside),
        "logits": 3 * 4 * min(tokens * config.vocab_size, common.CHUNK_LOGITS),
    }
    steps = args.steps or math.ceil(problems / args.problems_per_step)
    rollouts = args.problems_per_step * args.group_size
    until = f"at most {args.max_sampled_tokens:,} sampled tokens" if args.max_sampled_tokens else f"{steps} steps"
    lines = [
        f"{count / 1e6:,.1f}M parameters, {world} process{'es' * (world > 1)}, engine {args.engine}",
        f"{problems} problems; {until} of {args.problems_per_step} × {args.group_size} = {rollouts} rollouts",
        f"at most {args.max_tokens:,} tokens a rollout, {rollouts * args.max_tokens:,} a step; "
        f"longest sequence {longest:,}",
        "memory of a process (estimate, without the sampler's cache): "
        f"{sum(parts.values()) / 2**30:.1f} GiB",
        *(f"  {name:30s} {value / 2**30:8.2f} GiB" for name, value in parts.items()),
    ]  # fmt: skip
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- rollouts and credit


def sample_groups(args, sampler: Sampler, problems, prompts, limits, seed: tuple, prefixes=None) -> list[list[Trace]]:
    """G graded traces for each (problem, prompt): a list of groups. A prompt may end with a prefix of the thought."""
    seeds = [(*seed, p["place"], common.key(p["id"])) for p in problems]
    rows = sampler.generate(prompts, limits, seeds, n=args.group_size, temperature=args.temperature)
    how = {"prefixes": prefixes, "max_episodes": args.max_episodes}
    return common.read_traces(sampler.tokenizer, problems, prompts, rows, **how)


def outcome_advantages(args, groups: list[list[Trace]]) -> torch.Tensor:
    """GRPO's advantage of each trace, [groups, G]."""
    rewards = torch.tensor([[t.reward for t in group] for group in groups], dtype=torch.float64)
    if args.length_penalty:
        lengths = torch.tensor([[len(t.completion.token_ids) for t in g] for g in groups], dtype=torch.float64)
        rewards = penalise_length(rewards, lengths, args.length_penalty)
    return common.group_advantages(rewards, not args.no_std)


def penalise_length(rewards: torch.Tensor, lengths: torch.Tensor, weight: float) -> torch.Tensor:
    """r · (1 - w · sigmoid((length - mean) / std)), mean and std over the right answers of the same problem
    (Arora & Zanette, arXiv 2502.04463); wrong answers keep reward 0. Shapes [groups, G]."""
    right = rewards > 0
    count = right.sum(-1, keepdim=True).clamp(min=1)
    mean = (lengths * right).sum(-1, keepdim=True) / count
    std = (((lengths - mean) ** 2 * right).sum(-1, keepdim=True) / count).sqrt()
    z = (lengths - mean) / (std + 1e-6)
    return rewards * (1 - weight * torch.sigmoid(z))


def rollouts_grpo(args, sampler, problems, prompts, seed):
    """GRPO: every token of a trace has the trace's advantage."""
    groups = sample_groups(args, sampler, problems, prompts, args.max_tokens, (*seed, 0))
    outcome = outcome_advantages(args, groups).tolist()
    return groups, [[[a] * len(t.completion.token_ids) for t, a in zip(g, row)] for g, row in zip(groups, outcome)]


def rollouts_online(args, sampler, problems, prompts, seed):
    """MRT online: GRPO's traces, plus J(μ) at every boundary, plus credit for progress where it was made."""
    groups, advantages = rollouts_grpo(args, sampler, problems, prompts, seed)
    traces = [trace for group in groups for trace in group]
    how = ForcedAnswers(args.progress, args.forced_answers, args.answer_tokens, args.temperature)
    common.success_rates(sampler, traces, how, (*seed, 1))
    for group, rows in zip(groups, advantages):
        add_progress(rows, group, args.bonus, args.credit_lambda)
    return groups, advantages


def add_progress(rows: list[list[float]], group: list[Trace], bonus: float, credit_lambda: float) -> None:
    """Adds α · (credit of a token's episode - mean credit of the group's episodes) to the advantages, in place.

    Credited to whole traces the bonus would vanish: Σ_j r_prg telescopes to J(end) - J(empty), so it says nothing about
    the path. Credited to its own episode, progress is an advantage with J(μ | prefix) as baseline. The mean is a second
    baseline, and to be one it must be taken from every token: what follows the thought makes no progress and gets
    0 - mean. (Taken from the thought alone it would be a fee for each episode, so a length penalty in disguise, since
    ending the thought would be free of it.) Nothing is divided by a std: where no episode makes progress, J's noise
    would be blown up to a signal.
    """
    credits = [common.episode_credits(trace.values, credit_lambda) for trace in group]
    mean = float(np.mean([c for row in credits for c in row] or [0.0]))
    for row, trace, credit in zip(rows, group, credits):
        for token in range(len(row)):
            row[token] -= bonus * mean
        for j, c in enumerate(credit):
            for token in range(trace.boundaries[j], trace.boundaries[j + 1]):
                row[token] += bonus * c  # MRT: α · r_prg(z_j; c_{j-1}), Eq. 2


def rollouts_prefix(args, sampler, problems, prompts, seed):
    """MRT as in Figure 6: cut a partial rollout, m rollouts stop there, G go on.

    If all G rollouts share the prefix and are normalised among themselves, J(μ|c) is a constant that the mean takes
    away again: r = f + α(f - c) is affine in f, and the update exactly GRPO's. So the bonus is added after the
    normalisation and keeps the termination baseline: A = A_GRPO(f) + α (f - J(μ|c)). Where going on does better than
    stopping, going on is reinforced as a whole; where the prefix has the answer and thinking on loses it, it is pushed
    down. In expectation J(μ|c) is only a baseline (it does not depend on what follows c): what the bonus adds to GRPO
    is weight on the outcome, from prefixes that end at random episodes, free of the group's std.
    """
    seeds = [(*seed, 2, p["place"], common.key(p["id"])) for p in problems]
    cut = cut_rollouts(args, sampler, problems, prompts, seeds)
    stops = [common.forced_prompt(sampler.tokenizer, trace, end) for trace, end in cut]
    how = dict(n=args.forced_answers, temperature=args.temperature)
    answers = sampler.generate(stops, args.answer_tokens, [(*s, 3) for s in seeds], **how)
    baseline = common.mean_accuracy(problems, answers)  # MRT: J(μ|c) from the m rollouts that stop
    contexts = [prompt + trace.completion.token_ids[:end] for prompt, (trace, end) in zip(prompts, cut)]
    limits, prefixes = [args.max_tokens - end for _, end in cut], [trace.prefix(end) for trace, end in cut]
    groups = sample_groups(args, sampler, problems, contexts, limits, (*seed, 4), prefixes)
    outcome = outcome_advantages(args, groups).tolist()
    advantages = [
        [
            [a + args.bonus * (trace.reward - j)] * len(trace.completion.token_ids)  # MRT: α · r_prg(z; c), Eq. 2
            for trace, a in zip(group, row)
        ]
        for group, row, j in zip(groups, outcome, baseline)
    ]
    for group, j in zip(groups, baseline):
        for trace in group:
            trace.values = [float(j), trace.reward]  # J(μ|c) and the outcome of going on
    return groups, advantages


def cut_rollouts(args, sampler, problems, prompts, seeds) -> list[tuple[Trace, int]]:
    """One partial rollout a problem and where it is cut: after a random number of its episodes, 0 included, all equally
    likely. It is sampled by the model as it is before the update (the old policy), and never trained on."""
    rows = sampler.generate(prompts, args.max_tokens, seeds, temperature=args.temperature)
    cut = []
    for problem, prompt, (completion,), seed in zip(problems, prompts, rows, seeds):
        trace = common.read_trace(sampler.tokenizer, problem, prompt, completion, args.max_episodes)
        # Not where an episode was cut off, nor after an answer, nor where no room is left to answer.
        complete = trace.finished and common.thinks(sampler.tokenizer)
        ends = trace.boundaries if complete else trace.boundaries[:-1] or [0]
        ends = [end for end in ends if end + args.answer_tokens <= args.max_tokens] or [0]
        cut.append((trace, ends[int(np.random.default_rng(seed).integers(len(ends)))]))
    return cut


def progress_stats(args, groups: list[list[Trace]], prompts: dict[str, list[int]]) -> dict[str, float]:
    """What a step's J's say, for metrics.jsonl."""
    values = [trace.values for group in groups for trace in group]
    if args.bonus == 0:
        return {}
    if args.variant == "prefix":
        return {
            "J_prefix": float(np.mean([row[0] for row in values])),
            "progress_of_going_on": float(np.mean([row[1] - row[0] for row in values])),
            "prefix_tokens": float(np.mean([len(g[0].prompt) - len(prompts[g[0].problem["id"]]) for g in groups])),
        }
    progress = np.concatenate([np.diff(row) for row in values])
    stats = {
        "J_empty": float(np.mean([row[0] for row in values])),
        "J_end": float(np.mean([row[-1] for row in values])),
        "progress_per_episode": float(progress.mean()) if len(progress) else 0.0,
    }
    if args.progress == "likelihood":  # with a few sampled answers most differences of J are noise
        stats["episodes_without_progress"] = float((progress < 0.05).mean()) if len(progress) else 0.0
    return stats


# ---------------------------------------------------------------------------------------------- the update


def update(args, model, reference, optimizer, groups, advantages, dtype) -> dict[str, float]:
    """One or more optimiser steps on the sampled tokens; returns the update's metrics. With several processes each has
    its own groups; counts, denominators and metrics are over all of them, and so is the gradient."""
    world, device = common.ranks()[1], model.device
    score = common.scorer(model, common.token_logprobs)
    traces = [trace for group in groups for trace in group]
    rows = [row for of_group in advantages for row in of_group]
    examples = [(t.prompt + t.completion.token_ids, len(t.prompt), row) for t, row in zip(traces, rows)]
    drawn = [torch.tensor(t.completion.logprobs, device=device) for t in traces]
    number = np.concatenate([np.arange(len(g)) + g[0].problem["place"] * args.group_size for g in groups])
    parts = min(args.updates_per_batch, args.problems_per_step * args.group_size)
    old = old_logprobs(args, score, examples, device, dtype) if parts > 1 else {}
    sums = {"loss": 0.0, "entropy": 0.0, "clipped": 0.0, "kl": 0.0, "padded": 0.0, "weight": 0.0}
    gaps, norms = [torch.zeros(0)], []
    for part in (np.flatnonzero(number % parts == i) for i in range(parts)):  # each has rollouts of every group
        denominator = common.sum_over_ranks([float(sum(len(rows[i]) for i in part))])[0]  # before the loop
        optimizer.zero_grad()
        for batch, ids, where, advantage in batches_of(args, examples, part, device):
            with common.autocast(dtype):
                logprobs, entropies = score(ids, where, args.temperature)
            if not batch:  # a copy, so that all processes compute as often: its loss is 0
                (logprobs.sum() * 0.0).backward()
                continue
            ref = None
            if reference is not None:
                with torch.no_grad(), common.autocast(dtype):
                    ref, _ = common.token_logprobs(reference, ids, where, args.temperature)
            before = torch.cat([old[i] for i in batch]) if old else logprobs.detach()
            # Sampler and trainer round differently: truncated importance weights, 1 where they are the same.
            sampled = torch.cat([drawn[i] for i in batch])
            weight = (before - sampled).exp().clamp(max=args.is_cap)
            loss, of = common.grpo_loss(logprobs, before, advantage * weight, denominator, args.clip, ref, args.kl)
            if not torch.isfinite(loss):
                names = ", ".join(sorted({traces[i].problem["id"] for i in batch}))
                raise FloatingPointError(f"the loss is {loss.item()} on samples of {names}")
            (loss * world).backward()  # FSDP takes the mean of the processes' gradients
            of |= {"loss": loss.item() * denominator, "entropy": float(entropies.sum()), "padded": ids.numel(),
                   "weight": float(weight.sum())}  # fmt: skip
            for name, value in of.items():
                sums[name] += value
            if not norms:  # before the first step: sampler and trainer are the same policy
                gaps.append((logprobs.detach() - sampled).abs().cpu())
        if not norms:
            check_gap(gaps, dtype)
        norms.append(optimise(args, model, optimizer))
    gap = torch.cat(common.gather_over_ranks(gaps))
    lengths = [float(sum(map(len, rows))), float(sum(len(ids) for ids, _, _ in examples))]
    tokens, length, *totals = common.sum_over_ranks([*lengths, *sums.values()])
    total = dict(zip(sums, totals))
    return {
        "loss": total["loss"] / tokens,
        "grad_norm": float(np.mean(norms)),
        "entropy": total["entropy"] / tokens,
        "clip_share": total["clipped"] / tokens,
        "kl": total["kl"] / tokens,
        "importance_weight": total["weight"] / tokens,
        "sampler_gap_mean": float(gap.mean()),
        "sampler_gap_max": float(gap.max()),
        "trained_tokens": int(tokens),
        "padding_share": 1 - length / total["padded"],
    }


def old_logprobs(args, score, examples, device, dtype) -> dict[int, torch.Tensor]:
    """Log-probs of each example's tokens before the first of several steps: the denominator of the ratio."""
    old: dict[int, torch.Tensor] = {}
    with torch.no_grad(), common.autocast(dtype):
        for batch, ids, where, _ in batches_of(args, examples, range(len(examples)), device):
            logprobs, _ = score(ids, where, args.temperature)
            if batch:
                old.update(zip(batch, logprobs.split([len(examples[i][2]) for i in batch])))
    return old


def optimise(args, model, optimizer) -> float:
    """An optimiser step on the clipped gradient; returns its norm before clipping."""
    norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2: sharded
    if not torch.isfinite(norm):
        raise FloatingPointError(f"gradient norm is {float(norm)}")
    optimizer.step()
    return float(norm)


def batches_of(args, examples, part, device) -> list:
    """Micro-batches of some examples, as many in every process; the order holds places in `examples`."""
    mine = [examples[i] for i in part]
    batches = [
        ([int(part[i]) for i in order], *rest)
        for order, *rest in common.micro_batches(mine, args.max_tokens_per_batch, device)
    ]
    return common.same_number(batches, examples[0], device)


def check_gap(gaps: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Stops where sampler and trainer are not the same policy before the first step on a batch."""
    total, count = common.sum_over_ranks([float(torch.cat(gaps).sum()), float(sum(map(len, gaps)))])
    gap = total / count
    if not gap <= (0.05 if dtype == torch.bfloat16 else 1e-3):
        raise FloatingPointError(
            f"sampler and trainer differ by {gap:.3g} nats on average in the log-probs of the same tokens: look at "
            "temperature, dtype and the end-of-turn tokens; after the first step with vLLM, at whether its weights "
            "and its prefix cache are those of the updated model"
        )


# ---------------------------------------------------------------------------------------------- the run


def train(args, run: Path, model, sampler: Sampler, problems: list[dict], prompts: dict[str, list[int]], validation):
    """The loop. Under torchrun every process samples its share of a step's problems; rank 0 writes."""
    (rank, world), tokenizer, dtype = common.ranks(), sampler.tokenizer, common.pick_dtype(args.dtype)
    common.prepare(model, dtype, common.token_logprobs, recompute=not common.is_tiny(args.model))
    reference = common.load_model(args.model, sampler.model.device) if args.kl > 0 else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    state = begin_or_resume(args, run, model, optimizer, sampler)
    tell, asked_to_stop = reporter(args, run), common.on_stop()
    steps = args.steps or (math.inf if args.max_sampled_tokens else math.ceil(len(problems) / args.problems_per_step))
    rollouts = {"prefix": rollouts_prefix, "online": rollouts_online}[args.variant] if args.bonus else rollouts_grpo
    goal = f"{args.max_sampled_tokens:,} sampled tokens" if args.max_sampled_tokens else f"{steps} steps"
    method = "GRPO (bonus 0)" if args.bonus == 0 else f"MRT {args.variant}, bonus {args.bonus:g}"
    print(f"{method}: {len(problems)} problems, {args.problems_per_step} × {args.group_size} rollouts a step, {goal}")
    if validation and state["step"] == 0:
        validate(args, run, sampler, validation, state)
    first, began = dict(state), time.time()
    while state["step"] < steps and state["sampled_tokens"] < (args.max_sampled_tokens or math.inf):
        step, clock = state["step"], time.time()
        rate = common.learning_rate(args, share_done(args, state, steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = problems_of_step(problems, args.problems_per_step, step, args.seed)[rank::world]
        model.eval()
        counted = sampler.sampled_tokens, sampler.computed_tokens
        groups, advantages = rollouts(args, sampler, batch, [prompts[p["id"]] for p in batch], (args.seed, step))
        if step == 0 and common.thinks(tokenizer) and never_closes(groups):
            print(f"warning: {args.model} ends its turns without {common.THINK_END}: every answer counts as missing")
        sampled, computed = common.sum_over_ranks([sampler.sampled_tokens - counted[0],
                                                   sampler.computed_tokens - counted[1]])  # fmt: skip
        sampling_seconds = time.time() - clock
        sampler.pause()
        try:
            metrics = update(args, model, reference, optimizer, groups, advantages, dtype)
        except FloatingPointError as error:
            name = run / ("failed.jsonl" if rank == 0 else f"failed_{rank}.jsonl")
            common.append_jsonl(name, [{"step": step, "error": str(error)}, *records(step, groups)])
            fail(f"step {step}: {error}; stopped before the update, the samples are in {name}")
        sampler.sync()
        groups = sorted(common.gather_over_ranks(groups), key=lambda g: g[0].problem["place"])
        state = {"step": step + 1, "sampled_tokens": state["sampled_tokens"] + int(sampled),
                 "computed_tokens": state["computed_tokens"] + int(computed),
                 "seconds": first["seconds"] + time.time() - began}  # fmt: skip
        seconds = {"sampling_seconds": sampling_seconds, "update_seconds": time.time() - clock - sampling_seconds}
        stats = {**rollout_stats(groups), **progress_stats(args, groups, prompts)}
        line = {**state, **stats, **metrics, "lr": rate, **seconds}
        if rank == 0:
            common.append_jsonl(run / "records.jsonl", records(step, groups))
            common.append_jsonl(run / "metrics.jsonl", [line])
            tell(line)
        share, share_before = (share_done(args, of, steps) for of in (state, first))
        left = (time.time() - began) / max(share - share_before, 1e-9) * max(0.0, 1 - share)
        print(step_line(line, left), flush=True)
        if validation and state["step"] % args.eval_every == 0:
            validate(args, run, sampler, validation, state)
        stopping = common.sum_over_ranks([float(bool(asked_to_stop))])[0] > 0
        if state["step"] % args.checkpoint_every == 0 or stopping:
            common.save_checkpoint(run, model, tokenizer, optimizer, state, args.keep)
            if rank == 0:
                draw_run(run)
        if stopping:
            print(f"stopped after step {state['step']}, with a checkpoint; --resume goes on", flush=True)
            raise SystemExit(128 + (asked_to_stop or [15])[0])
    if validation and state["step"] > first["step"] and state["step"] % args.eval_every:
        validate(args, run, sampler, validation, state)
    common.save_checkpoint(run, model, tokenizer, optimizer, state, args.keep)
    common.save_model(run / "model", model, tokenizer)
    if rank == 0:
        draw_run(run)
        last = common.read_jsonl(run / "metrics.jsonl")[-1]
        common.write_json(run / "summary.json", {"method": method, **last})
    print(f"model: {run / 'model'}   metrics: {run / 'metrics.jsonl'}   picture: {run / 'progress.png'}")


def begin_or_resume(args, run: Path, model, optimizer, sampler: Sampler) -> dict:
    """Where the run begins: at nothing, or with --resume at its last checkpoint; records beyond that are removed."""
    state = {"step": 0, "sampled_tokens": 0, "computed_tokens": 0, "seconds": 0.0}
    found = common.load_newest(run, model, optimizer) if args.resume else None
    if found:
        checkpoint, state = found
        sampler.sync()
        print(f"resumed from {checkpoint} at step {state['step']}")
    if common.ranks()[0] == 0:
        common.rewind(run, state["step"])
    return state


def step_line(line: dict, left: float) -> str:
    """A step as it is printed."""
    return (
        f"step {line['step']:4d}  right {line['reward']:.3f}  tokens {line['tokens']:6.1f}  "
        f"truncated {line['truncated']:.2f}  loss {line['loss']:+.4f}  "
        f"sampled {line['sampled_tokens'] / 1e3:,.0f}k tokens  "
        f"{line['sampling_seconds']:.1f} + {line['update_seconds']:.1f} s  {common.duration(left)} left"
    )


def share_done(args, state: dict, steps: float) -> float:
    """Of the run, by steps or by sampled tokens, whichever is further."""
    return max(state["step"] / steps, state["sampled_tokens"] / (args.max_sampled_tokens or math.inf))


def rollout_stats(groups: list[list[Trace]]) -> dict[str, float]:
    traces = [trace for group in groups for trace in group]
    rewards = np.array([[trace.reward for trace in group] for group in groups])
    return {
        "reward": float(rewards.mean()),
        "flat_groups": float((rewards.std(-1) == 0).mean()),
        "truncated": float(np.mean([t.completion.finish_reason == "length" for t in traces])),
        "tokens": float(np.mean([len(t.completion.token_ids) for t in traces])),
        "episodes": float(np.mean([len(t.boundaries) - 1 for t in traces])),
    }


def reporter(args, run: Path):
    """What sends a step's metrics to --report-to; `metrics.jsonl` and `progress.png` are written in any case."""
    if args.report_to is None or common.ranks()[0] > 0:
        return lambda line: None
    if args.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run / "tensorboard")
        return lambda line: [writer.add_scalar(name, value, line["step"]) for name, value in line.items()]
    service = importlib.import_module(args.report_to)  # wandb and trackio have the same two calls
    service.init(project="mrt", name=run.name, config={k: str(v) for k, v in vars(args).items()})
    return lambda line: service.log(line, step=line["step"])


def never_closes(groups: list[list[Trace]]) -> bool:
    """Almost all completions that ended by themselves did so without the end-of-thinking marker."""
    ended = [t.finished for group in groups for t in group if t.completion.finish_reason == "stop"]
    return bool(ended) and float(np.mean(ended)) < 0.05


def problems_of_step(problems: list[dict], count: int, step: int, seed: int) -> list[dict]:
    """Problems `step * count …` of the endless sequence of shuffled passes: a function of the step, so a resumed run
    sees the same data."""
    places = range(step * count, (step + 1) * count)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(len(problems)) for epoch in
              {place // len(problems) for place in places}}  # fmt: skip
    picked = [problems[orders[place // len(problems)][place % len(problems)]] for place in places]
    return [{**problem, "place": place} for place, problem in enumerate(picked)]


def records(step: int, groups: list[list[Trace]]) -> list[dict]:
    return [
        {
            "step": step,
            "id": trace.problem["id"],
            "sample": s,
            "reward": trace.reward,
            "answer": common.extract_answer(trace.answer or ""),
            "tokens": len(trace.completion.token_ids),
            "finish": trace.completion.finish_reason,
            "prompt_tokens": len(trace.prompt),  # prefix variant: with the prefix
            "boundaries": trace.boundaries,
            "J": [round(v, 5) for v in trace.values],  # at the boundaries; prefix variant: J(μ|c) and the outcome
            "text": trace.completion.text,
        }
        for group in groups
        for s, trace in enumerate(group)
    ]


def validate(args, run: Path, sampler: Sampler, problems: list[dict], state: dict) -> None:
    """Accuracy and tokens on validation problems, and the accuracy of answers forced at a few budgets. Its tokens are
    not counted as the run's."""
    counted, (rank, world) = (sampler.sampled_tokens, sampler.computed_tokens), common.ranks()
    sampler.model.eval()
    budgets = [args.max_tokens // 4, args.max_tokens // 2, args.max_tokens]
    mine = problems[rank::world]
    of = {"accuracy": 0.0, "tokens": 0.0, "forced": dict.fromkeys(budgets, 0.0)}
    if mine:  # fewer problems than processes
        of = common.anytime_accuracy(sampler, mine, budgets, args.max_tokens, args.answer_tokens, args.temperature,
                                     (args.seed, 99))  # fmt: skip
    means = [len(mine) * value for value in (of["accuracy"], of["tokens"], *of["forced"].values())]
    accuracy, tokens, *forced = (total / len(problems) for total in common.sum_over_ranks(means))
    sampler.sampled_tokens, sampler.computed_tokens = counted
    line = {"step": state["step"], "sampled_tokens": state["sampled_tokens"], "accuracy": accuracy, "tokens": tokens,
            "forced": dict(zip(budgets, forced))}  # fmt: skip
    if rank == 0:
        common.append_jsonl(run / "validation.jsonl", [line])
    told = "  ".join(f"forced at {b}: {a:.3f}" for b, a in line["forced"].items())
    print(f"  validation after {line['step']} steps: right {accuracy:.3f}  tokens {tokens:.1f}  {told}", flush=True)


def draw_run(run: Path) -> None:
    """`progress.png`: the run so far."""
    plt = common.pyplot()
    lines = common.read_jsonl(run / "metrics.jsonl")
    x = np.array([line["sampled_tokens"] for line in lines]) / 1e3
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), constrained_layout=True)
    axes[0].plot(x, [line["reward"] for line in lines], color="C0", alpha=0.5, label="rollouts")
    if (run / "validation.jsonl").exists():
        checks = common.read_jsonl(run / "validation.jsonl")
        axes[0].plot([c["sampled_tokens"] / 1e3 for c in checks], [c["accuracy"] for c in checks], "o-", color="C0",
                     label="validation")  # fmt: skip
        for i, budget in enumerate(checks[0]["forced"]):
            axes[0].plot([c["sampled_tokens"] / 1e3 for c in checks], [c["forced"][budget] for c in checks], ".--",
                         color=f"C{i + 1}", label=f"forced at {budget}")  # fmt: skip
    axes[0].set(ylabel="share of right answers", ylim=(0, 1))
    axes[0].legend(fontsize=7)
    axes[1].plot(x, [line["tokens"] for line in lines], label="tokens of a rollout")
    axes[1].set(ylabel="tokens of a rollout", ylim=(0, None))
    axes[2].plot(x, [line["entropy"] for line in lines], label="entropy (nats)")
    axes[2].plot(x, [line["truncated"] for line in lines], label="truncated share")
    axes[2].plot(x, [line["flat_groups"] for line in lines], label="flat groups")
    axes[2].legend(fontsize=7)
    for axis in axes:
        axis.set_xlabel("sampled tokens (thousands)")
        axis.grid(alpha=0.3)
    common.save_figure(figure, run / "progress.png")


if __name__ == "__main__":
    main()
