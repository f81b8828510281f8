"""rl_mrt.py: MRT by reinforcement learning (Section 6, Figure 6 right, Eq. 2); with --bonus 0 it is GRPO.

    l_MRT = l_FT + α · E[ Σ_j r_prg(z_j; c_{j-1}) ],    r_prg(z_j; c) = J(μ | z_j, c) - J(μ | c)          (Eq. 2)

One update: sample traces → split the thoughts into episodes → J(μ) at their boundaries → an advantage for each token
→ clipped policy-gradient loss → AdamW. MRT differs from GRPO in the advantages, and in the prefix variant in where
rollouts start. l_FT is the outcome reward's objective, c_{j-1} the prefix before episode z_j, α the bonus.

    --bonus 0                      outcome-reward GRPO: G traces a problem, 0/1 reward, group-normalised
    --bonus α --variant prefix     the paper's: a partial rollout is cut after a random number of episodes; from there m
                                   rollouts stop and answer (they estimate J(μ|c)) and G go on thinking
    --bonus α --variant online     their later one (release v0.1): forced answers at every boundary of on-policy
                                   traces, each episode's tokens are credited with that episode's progress
    --length-penalty w             the paper's third baseline (Arora & Zanette, arXiv 2502.04463)

On a laptop, with the embedded model (a minute or two on one core):
    python rl_mrt.py --bonus 0
    python rl_mrt.py --bonus 1                         # --variant online --progress log-likelihood
On GPUs, with the paper's data and settings (Table 3):
    python rl_mrt.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --bonus 1.0           # --variant prefix
    torchrun --nproc-per-node 8 rl_mrt.py --config configs/rl_r1_distill_1.5b.yaml
"""

import argparse
import importlib.util
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common import (
    Trace,
    cut_at_budget,
    episode_progress,
    forced_prompt,
    group_advantages,
    grpo_loss,
    in_nats,
    prompts_of,
    read_answers,
    read_trace,
    read_traces,
    segmentation,
    set_likelihood_J,
    set_sampled_J,
    success_rate,
)
from plumbing import data, models, report, runs, training
from plumbing.flags import add_common_flags, non_negative, parse_flags, positive_int, shared_flags, whole_number
from plumbing.runs import fail, problem_key
from plumbing.sampler import Sampler, open_sampler, pick_engine
from plumbing.training import ranks, sum_over_ranks

# flag: (default with the embedded model: the setting of experiments/findings.md; with any other; where that comes from)
DEFAULTS = {
    "variant": ("online", "prefix", "the paper's"),
    "dataset": ("tiny:30", "AI-MO/NuminaMath-1.5", "the paper: NuminaMath, release not named"),
    "split": ("train", "train", "Section 6"),
    "limit": (128, 4000, "Section 6: 4,000 NuminaMath problems"),
    "problems_per_step": (4, 64, "Table 3: a batch of 256 samples"),
    "group_size": (8, 4, "Table 3"),
    "max_tokens": (384, 16384, "the authors' runs of 1.5B models; Table 3 allows 24576"),
    "forced_answers": (4, 4, "v0.1; the prefix variant's m of Figure 6"),
    "answer_tokens": (8, 1024, "ours"),
    "temperature": (1.0, 0.9, "Table 3"),
    "lr": (2.5e-4, 1e-6, "Table 3"),
    "schedule": ("constant", "cosine", "Table 3"),
    "warmup": (0.0, 0.1, "Table 3"),
    "weight_decay": (0.0, 0.01, "Table 3"),
    "kl": (0.0, 0.04, "not published; the default of the trainer the authors built on"),
    "max_episodes": (32, 6, "the authors' online variant"),
    "max_grad_norm": (1.0, 1.0, "usual"),
    "max_tokens_per_batch": (4096, 32768, "ours"),
    "checkpoint_every": (10, 10, "ours"),
    "eval_split": ("validation", "validation", "ours"),
    "eval_problems": (96, 96, "ours"),
}


def flags(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser)
    flag = shared_flags(parser, "MRT", "forced-answers answer-tokens max-episodes")
    flag("--bonus", type=non_negative, default=1.0, help="α of Eq. 2; 0 is GRPO (default 1: the authors' v0.1)")
    flag("--variant", choices=("prefix", "online"))
    estimate = "J by sampled forced answers, by the gold answer's likelihood, or that in nats (default: log-likelihood "
    estimate += "for tiny online, else sampled, as the authors)"
    flag("--progress", choices=("sampled", "likelihood", "log-likelihood"), help=estimate)
    flag = shared_flags(parser, "GRPO", "max-tokens temperature")
    flag("--problems-per-step", type=positive_int)
    flag("--group-size", type=positive_int, help="G rollouts a problem")
    flag("--no-std", action="store_true", help="advantages without the division by the group's std")
    flag("--length-penalty", type=non_negative, default=0.0, help="weight w in [0, 1), 0: none")
    flag("--clip", type=non_negative, default=0.2, help="ε of the ratio's clipping (PPO's)")
    flag("--kl", type=non_negative, help="β of the k3 penalty to the initial model; 0: no copy kept")
    flag("--is-cap", type=non_negative, default=2.0, help="cap of importance weights between sampler and trainer")
    flag("--updates-per-batch", type=positive_int, default=1, help="optimiser steps a batch")
    shared = "lr warmup weight-decay max-grad-norm max-tokens-per-batch checkpoint-every"
    flag = shared_flags(parser, "optimisation", shared)
    flag("--steps", type=positive_int, help="default: one pass over the problems")
    flag("--max-sampled-tokens", type=positive_int, help="stop after so many, forced answers included")
    flag("--schedule", choices=("constant", "cosine"))
    flag("--keep", type=positive_int, default=1, help="checkpoints kept")
    flag("--report-to", choices=("wandb", "trackio", "tensorboard"), help="metrics also go there")
    flag("--dry-run", action="store_true", help="print the plan and a memory estimate, load no weights")
    flag = shared_flags(parser, "held-out problems", "eval-dataset eval-split eval-problems")
    flag("--eval-every", type=whole_number, default=10, help="steps between validations; 0: none")
    args = parse_flags(parser, DEFAULTS, argv)
    in_nats_by_default = args.variant == "online" and runs.is_tiny(args.model)
    args.progress = args.progress or ("log-likelihood" if in_nats_by_default else "sampled")
    kind = "grpo" if args.bonus == 0 else "prefix" if args.variant == "prefix" else f"online-{args.progress}"
    args.out = args.out or Path("runs") / f"rl-{runs.short_name(args.model)}-{kind}-seed{args.seed}"
    check_flags(args)
    return args


def check_flags(args) -> None:
    if args.group_size == 1 and not args.no_std:
        fail("--group-size 1: a group of one has no spread to normalise by; use a larger group or --no-std")
    if args.bonus > 0 and args.variant == "prefix" and args.progress != "sampled":
        fail(f"--progress {args.progress} needs --variant online: prefix samples its answers")
    if args.length_penalty >= 1:
        fail(f"--length-penalty {args.length_penalty}: must be below 1, or right answers could lose to wrong ones")
    if args.max_tokens < 2:
        fail(f"--max-tokens {args.max_tokens}: leaves no room for a thought and an answer")
    if args.temperature == 0:
        fail("--temperature 0: must be above 0, a group of greedy rollouts has no spread")
    if args.report_to and importlib.util.find_spec(args.report_to) is None:
        fail(f"--report-to {args.report_to}: pip install {args.report_to}")


def main() -> None:
    args = flags()
    _, world = training.start_processes()
    check_engine(args, world)
    runs.check_out(args)
    tokenizer = models.load_tokenizer(args.model)  # small: a wrong --model is reported before a data set is fetched
    problems = data.problems_of(args)
    validation = data.held_out_of(args) if args.eval_every else []
    if not models.thinks(tokenizer):
        print(f"{args.model} has no {models.THINK_END}: its whole completion is the thought, and should end with a box")
    _, longest = prompts_of(args, tokenizer, problems + validation)
    if args.dry_run:
        print(training.memory_plan(args, len(problems), longest))
        return
    model = models.load_model(args.model, models.pick_device())
    run = training.open_run_once(args, problems)
    if args.resume and (run / "summary.json").exists():
        print(f"{run} is complete")
        return
    sampler = open_sampler(args, tokenizer, longest, trained=model)
    train(args, run, model, sampler, problems, validation)
    sampler.close()


def check_engine(args, world: int) -> None:
    """Picks the engine; ends the run if it, or the number of processes, does not suit."""
    if args.problems_per_step < world:
        fail(f"--problems-per-step {args.problems_per_step}: fewer than the {world} processes")
    if runs.is_served(args.engine):
        fail("--engine: a server keeps the weights it has loaded, so it cannot sample from a model in training")
    args.engine = pick_engine(args.engine)
    if world > 1 and args.engine == "vllm" and args.bonus and args.progress != "sampled":
        fail(f"--progress {args.progress}: vllm scores in a single process only; several need --engine transformers")


# ---------------------------------------------------------------------------------------------- rollouts and credit

Groups = list[list[Trace]]  # [problems][G]
Advantages = list[list[np.ndarray]]  # [problems][G], each [tokens of the completion], those of the answer included
# A seed is (--seed, step, purpose, …). Purposes: 0 rollouts, 1 forced answers; in the prefix variant 2 partial
# rollouts, (2, …, 3) those that stop there, 4 those that go on. Validation has 99 instead of a step.


def rollouts_grpo(args, sampler: Sampler, problems, prompts, seed: tuple) -> tuple[Groups, Advantages]:
    """GRPO: every token of a trace has the trace's advantage."""
    groups = sample_groups(args, sampler, problems, prompts, args.max_tokens, (*seed, 0))
    return groups, outcome_advantages(args, groups)


def rollouts_online(args, sampler: Sampler, problems, prompts, seed: tuple) -> tuple[Groups, Advantages]:
    """MRT online: GRPO's traces, plus J(μ) at every boundary, plus credit for progress where it was made."""
    groups, advantages = rollouts_grpo(args, sampler, problems, prompts, seed)
    traces = [trace for group in groups for trace in group]
    if args.progress == "sampled":
        limits = {"n": args.forced_answers, "max_tokens": args.answer_tokens}
        set_sampled_J(sampler, traces, **limits, temperature=args.temperature, top_p=1.0, seed=(*seed, 1))
    else:
        set_likelihood_J(sampler, traces)
    for group, row in zip(groups, advantages):
        add_progress(row, group, args.bonus, scale_of(args))
    return groups, advantages


def scale_of(args) -> Callable:
    """What turns J into the unit that progress is measured in."""
    return in_nats if args.progress == "log-likelihood" else np.asarray


def add_progress(advantages: list[np.ndarray], group: list[Trace], bonus: float, scale=np.asarray) -> None:
    """Adds α · (progress of a token's episode - mean progress of the group's episodes) to a group's advantages, in
    place. `scale` turns J, [k + 1], into what progress, [k], is measured in.

    Why each episode: over a whole trace Σ_j r_prg telescopes to J(end) - J(empty), which says nothing about the path.
    Credited to its own episode, progress is an advantage with J(μ | prefix) as its baseline.
    Why the answer's tokens, too: the mean is a second baseline, and what follows the thought makes no progress, so it
    gets 0 - mean. Taken from the thought alone, the mean would be a fee for each episode that ending the thought
    avoids: a length penalty in disguise.
    Why no std: where no episode makes progress, it would blow the noise of J up to a signal.
    """
    progress = [episode_progress(scale(trace.values)) for trace in group]
    mean = np.concatenate(progress).mean() if any(map(len, progress)) else 0.0
    for advantage, trace, gains in zip(advantages, group, progress):
        thought = advantage[: trace.boundaries[-1]]  # a view: its tokens are those of `advantage`
        thought += bonus * np.repeat(gains, np.diff(trace.boundaries))  # MRT 5: + α · r_prg(z_j; c_{j-1})
        advantage -= bonus * mean


def rollouts_prefix(args, sampler: Sampler, problems, prompts, seed: tuple) -> tuple[Groups, Advantages]:
    """MRT as in Figure 6: cut a partial rollout, m rollouts stop there, G go on: A = A_GRPO(f) + α (f - J(μ|c)).

    Here z is all that follows the cut, and the outcome f stands for J(μ | z, c): the model has answered. Where going on
    does better than stopping, going on is reinforced as a whole; where the prefix has the answer and thinking on loses
    it, it is pushed down.
    Why after the normalisation: all G rollouts share the prefix, so J(μ|c) is a constant of the group. In the reward,
    r = f + α (f - J(μ|c)) is affine in f, and normalising takes the bonus away again: the update would be GRPO's (or,
    with --no-std, 1 + α times it).
    What it does in expectation: J(μ|c) is only a baseline (it does not depend on what follows c), so the bonus adds
    weight on the outcome, from prefixes that end at random episodes, free of the group's std.
    """
    seeds = [(*seed, 2, problem["place"], problem_key(problem)) for problem in problems]
    cut = cut_rollouts(args, sampler, problems, prompts, seeds)
    stops = [forced_prompt(sampler.tokenizer, trace, end) for trace, end in cut]
    rows = sampler.generate(stops, args.answer_tokens, [(*s, 3) for s in seeds], args.forced_answers, args.temperature)
    contexts = [prompt + trace.completion.token_ids[:end] for prompt, (trace, end) in zip(prompts, cut)]
    prefixes = [trace.prefix(end) for trace, end in cut]
    limits = [args.max_tokens - end for _, end in cut]
    groups = sample_groups(args, sampler, problems, contexts, limits, (*seed, 4), prefixes)
    advantages = outcome_advantages(args, groups)
    for group, row, answers in zip(groups, advantages, read_answers(problems, rows)):
        J = success_rate(answers)  # of the m rollouts that stop: J(μ|c)
        for trace, advantage in zip(group, row):
            trace.prefix_J = J
            advantage += args.bonus * (trace.reward - J)  # MRT 6: + α · r_prg(z; c) = α (f - J(μ|c))
    return groups, advantages


ROLLOUTS = {"grpo": rollouts_grpo, "online": rollouts_online, "prefix": rollouts_prefix}


def cut_rollouts(args, sampler: Sampler, problems, prompts, seeds) -> list[tuple[Trace, int]]:
    """One partial rollout a problem and where it is cut: after a random number of its episodes, 0 included, all equally
    likely. It is sampled by the model as it is before the update (the old policy), and never trained on."""
    rows = sampler.generate(prompts, args.max_tokens, seeds, temperature=args.temperature)
    rule, cut = segmentation(args), []
    for problem, prompt, (completion,), seed in zip(problems, prompts, rows, seeds):
        trace = read_trace(sampler.tokenizer, problem, prompt, completion, rule)
        ends = trace.boundaries
        if not (trace.finished and models.thinks(sampler.tokenizer)):
            ends = ends[:-1]  # the thought was cut off there, or holds the answer
        ends = [end for end in ends if end + args.answer_tokens <= args.max_tokens] or [0]  # with room to answer
        cut.append((trace, ends[int(np.random.default_rng(seed).integers(len(ends)))]))
    return cut


def sample_groups(args, sampler: Sampler, problems, prompts, limits, seed: tuple, prefixes=None) -> Groups:
    """G graded traces for each (problem, prompt). A prompt may end with a prefix of the thought; a model without an
    end-of-thinking marker answers in its thought, so there the prefix's text is graded with what follows."""
    seeds = [(*seed, problem["place"], problem_key(problem)) for problem in problems]
    rows = sampler.generate(prompts, limits, seeds, n=args.group_size, temperature=args.temperature)
    return read_traces(sampler.tokenizer, problems, prompts, rows, segmentation(args), prefixes=prefixes)


def outcome_advantages(args, groups: Groups) -> Advantages:
    """GRPO's advantage of each trace, given to each of its tokens; --length-penalty weighs its outcome."""
    rewards = torch.tensor([[trace.reward for trace in group] for group in groups], dtype=torch.float64)
    lengths = [[len(trace.completion.token_ids) for trace in group] for group in groups]
    if args.length_penalty:
        rewards = penalise_length(rewards, torch.tensor(lengths, dtype=torch.float64), args.length_penalty)
    outcome = group_advantages(rewards, not args.no_std).tolist()
    return [[np.full(tokens, a) for tokens, a in zip(*row)] for row in zip(lengths, outcome)]


def penalise_length(rewards: torch.Tensor, lengths: torch.Tensor, weight: float) -> torch.Tensor:
    """r · (1 - w · sigmoid((length - mean) / std)), mean and std over the right answers of the same problem
    (Arora & Zanette, arXiv 2502.04463); wrong answers keep reward 0. Shapes [groups, G]."""
    right = rewards > 0
    count = right.sum(-1, keepdim=True).clamp(min=1)
    mean = (lengths * right).sum(-1, keepdim=True) / count
    std = (((lengths - mean) ** 2 * right).sum(-1, keepdim=True) / count).sqrt()
    z = (lengths - mean) / (std + 1e-6)
    return rewards * (1 - weight * torch.sigmoid(z))


# ---------------------------------------------------------------------------------------------- the update


def update(args, model, reference, optimizer, groups: Groups, advantages: Advantages) -> dict[str, float]:
    """One or more optimiser steps on the sampled tokens; returns the update's metrics. With several processes each has
    its own groups; counts, denominators and metrics are over all of them, and so is the gradient."""
    score, device = training.scorer(model, models.token_logprobs), model.device
    traces = [trace for group in groups for trace in group]
    flat = [advantage for row in advantages for advantage in row]
    examples = [(t.prompt + t.completion.token_ids, len(t.prompt), a) for t, a in zip(traces, flat)]
    sampled = [torch.tensor(trace.completion.logprobs, device=device) for trace in traces]
    # Of several updates a batch, update s trains the rollouts whose number, over all processes, is s modulo `steps`.
    numbers = np.array([trace.problem["place"] * args.group_size + trace.sample for trace in traces])
    steps = min(args.updates_per_batch, args.problems_per_step * args.group_size)
    old = training.old_logprobs(args, score, examples, device) if steps > 1 else None
    sums, gaps, norms = dict.fromkeys(("loss", "entropy", "clipped", "kl", "padded", "weight"), 0.0), [], []
    for step in range(steps):
        part = np.flatnonzero(numbers % steps == step)
        denominator = sum_over_ranks([float(sum(len(sampled[i]) for i in part))])[0]  # before the loop
        optimizer.zero_grad()
        # `order`: numbers of the batch's rollouts; `where` [B, T] marks the N trained tokens of `ids` [B, T]; what the
        # loss takes is [N], in the order of `where`.
        for order, ids, where, advantage in training.batches_of(examples, part, args.max_tokens_per_batch, device):
            with models.autocast(models.pick_dtype(args.dtype)):
                logprobs, entropies = score(ids, where, args.temperature)
            if not order:  # padding: under FSDP every process must go through as many backward passes
                (logprobs.sum() * 0.0).backward()
                continue
            sampler_logprobs = torch.cat([sampled[i] for i in order])
            old_logprobs = torch.cat([old[i] for i in order]) if old else logprobs.detach()
            # Truncated importance weights: 1 where sampler and trainer agree, which round differently.
            weight = (old_logprobs - sampler_logprobs).exp().clamp(max=args.is_cap)
            ref = reference_logprobs(args, reference, ids, where)
            loss, found = grpo_loss(logprobs, old_logprobs, advantage * weight, denominator, args.clip, ref, args.kl)
            if not torch.isfinite(loss):
                names = ", ".join(sorted({traces[i].problem["id"] for i in order}))
                raise FloatingPointError(f"the loss is {loss.item()} on samples of {names}")
            (loss * ranks()[1]).backward()  # FSDP takes the mean of the processes' gradients
            found |= {"loss": loss.item() * denominator, "entropy": float(entropies.sum())}
            found |= {"padded": ids.numel(), "weight": float(weight.sum())}
            sums = {name: total + found.get(name, 0.0) for name, total in sums.items()}
            if step == 0:  # sampler and trainer are still the same policy
                gaps.append((logprobs.detach() - sampler_logprobs).abs().cpu())
        if step == 0:
            gap = training.check_gap(gaps, models.pick_dtype(args.dtype))
        norms.append(training.optimizer_step(model, optimizer, args.max_grad_norm))
    counts = [float(sum(map(len, sampled))), float(sum(len(ids) for ids, _, _ in examples))]
    tokens, with_prompts, *totals = sum_over_ranks([*counts, *sums.values()])
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
        "update_tokens": int(with_prompts),
        "padding_share": 1 - with_prompts / total["padded"],
    }


def reference_logprobs(args, reference, ids, where) -> torch.Tensor | None:
    """Log-probs [N] under the initial model; None without the KL penalty."""
    if reference is None:
        return None
    with torch.no_grad(), models.autocast(models.pick_dtype(args.dtype)):
        return models.token_logprobs(reference, ids, where, args.temperature)[0]


# ---------------------------------------------------------------------------------------------- the run


def train(args, run: Path, model, sampler: Sampler, problems: list[dict], validation: list[dict]) -> None:
    """All steps. Under torchrun every process samples its share of a step's problems; rank 0 writes."""
    tokenizer, recompute = sampler.tokenizer, not runs.is_tiny(args.model)
    training.prepare(model, models.pick_dtype(args.dtype), models.token_logprobs, recompute)
    reference = models.load_model(args.model, model.device) if args.kl > 0 else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    fresh = {"step": 0, "sampled_tokens": 0, "computed_tokens": 0, "seconds": 0.0}
    state = training.begin_or_resume(run, model, optimizer, fresh)
    if state["step"]:
        sampler.sync()
    steps = args.steps or (math.inf if args.max_sampled_tokens else math.ceil(len(problems) / args.problems_per_step))
    method = "GRPO (bonus 0)" if args.bonus == 0 else f"MRT {args.variant}, bonus {args.bonus:g}"
    goal = f"{args.max_sampled_tokens:,} sampled tokens" if args.max_sampled_tokens else f"{steps} steps"
    print(f"{method}: {len(problems)} problems, {args.problems_per_step} × {args.group_size} rollouts a step, {goal}")

    def share_done(state: dict) -> float:
        return max(state["step"] / steps, state["sampled_tokens"] / (args.max_sampled_tokens or math.inf))

    def step(state: dict) -> tuple[dict, dict, str]:
        return one_step(args, run, model, reference, optimizer, sampler, problems, state)

    def after_step(state: dict) -> None:
        if validation and (state["step"] % args.eval_every == 0 or share_done(state) >= 1):
            validate(args, run, sampler, validation, state)
        if ranks()[0] == 0 and (state["step"] % args.checkpoint_every == 0 or share_done(state) >= 1):
            report.draw_training(run)

    if state["step"] == 0 and validation:
        validate(args, run, sampler, validation, state)
    state = training.train_loop(args, run, model, tokenizer, optimizer, state, share_done, step, after_step)
    training.save_checkpoint(run, model, tokenizer, optimizer, state, args.keep)
    training.save_model(run / "model", model, tokenizer)
    if ranks()[0] == 0:
        runs.write_json(run / "summary.json", {"method": method, **runs.read_jsonl(run / "metrics.jsonl")[-1]})
    print(f"model: {run / 'model'}   metrics: {run / 'metrics.jsonl'}   picture: {run / 'progress.png'}")


def one_step(args, run: Path, model, reference, optimizer, sampler: Sampler, problems, state) -> tuple[dict, dict, str]:
    """Rollouts and their update; returns (the run's new state, the step's metrics, what is printed)."""
    (rank, world), step, began = ranks(), state["step"], time.time()
    batch = training.problems_of_step(problems, args.problems_per_step, step, args.seed)[rank::world]
    prompts = [models.prompt_ids(sampler.tokenizer, problem["problem"], args.chat_template_kwargs) for problem in batch]
    rollouts = ROLLOUTS[args.variant if args.bonus else "grpo"]
    counted = sampler.sampled_tokens, sampler.computed_tokens
    model.eval()
    groups, advantages = rollouts(args, sampler, batch, prompts, (args.seed, step))
    spent = [sampler.sampled_tokens - counted[0], sampler.computed_tokens - counted[1]]
    sampled_after = time.time()
    sampler.pause()
    try:
        metrics = update(args, model, reference, optimizer, groups, advantages)
    except FloatingPointError as error:
        name = run / ("failed.jsonl" if rank == 0 else f"failed_{rank}.jsonl")
        runs.append_jsonl(name, [{"step": step + 1, "error": str(error)}, *records(step + 1, groups)])
        fail(f"step {step + 1}: {error}; stopped in the update, its samples are in {name}")
    sampler.sync()
    groups = sorted(training.gather_over_ranks(groups), key=lambda group: group[0].problem["place"])
    if rank == 0:
        runs.append_jsonl(run / "records.jsonl", records(step + 1, groups))
    sampled, computed = map(int, sum_over_ranks(spent))
    state = {
        "step": step + 1,
        "sampled_tokens": state["sampled_tokens"] + sampled,
        "computed_tokens": state["computed_tokens"] + computed,
        "seconds": state["seconds"] + time.time() - began,
    }
    seconds = {"sampling_seconds": sampled_after - began, "update_seconds": time.time() - sampled_after}
    metrics = {**state, **rollout_stats(args, groups), **metrics, **seconds}
    text = (
        f"step {metrics['step']:4d}  right {metrics['reward']:.3f}  tokens {metrics['tokens']:6.1f}  truncated "
        f"{metrics['truncated']:.2f}  loss {metrics['loss']:+.4f}  sampled {metrics['sampled_tokens'] / 1e3:,.0f}k "
        f"tokens  {metrics['sampling_seconds']:.1f} + {metrics['update_seconds']:.1f} s"
    )
    return state, metrics, text


def records(step: int, groups: Groups) -> list[dict]:
    return [{"step": step, **trace.record()} for group in groups for trace in group]


def rollout_stats(args, groups: Groups) -> dict[str, float]:
    """Averages over a step's traces and their J, for metrics.jsonl."""

    def mean(values) -> float:
        return float(np.mean(list(values)))

    def progress_in(scale: Callable) -> list[float]:
        return [progress for trace in traces for progress in episode_progress(scale(trace.values))] or [0.0]

    traces = [trace for group in groups for trace in group]
    stats = {
        "reward": mean(t.reward for t in traces),
        "flat_groups": mean(len({t.reward for t in group}) == 1 for group in groups),
        "truncated": mean(t.completion.finish_reason == "length" for t in traces),
        "tokens": mean(len(t.completion.token_ids) for t in traces),
        "episodes": mean(len(t.boundaries) - 1 for t in traces),
    }
    if args.bonus and args.variant == "prefix":
        stats["J_prefix"] = mean(t.prefix_J for t in traces)
        stats["progress_of_going_on"] = stats["reward"] - stats["J_prefix"]
    elif args.bonus:
        stats["J_empty"], stats["J_end"] = mean(t.values[0] for t in traces), mean(t.values[-1] for t in traces)
        stats["progress_per_episode"] = mean(progress_in(np.asarray))
        if args.progress != "sampled":  # with a few sampled answers most differences of J are noise
            # Less than 5 points of J or, in nats, 5 % of it; losses count, too.
            stats["episodes_without_progress"] = mean(p < 0.05 for p in progress_in(scale_of(args)))
    return stats


def validate(args, run: Path, sampler: Sampler, problems: list[dict], state: dict) -> None:
    """Accuracy and tokens on validation problems, one trace each, and the accuracy had the thoughts been stopped at a
    few budgets (traces that end within a budget count as they are). Its tokens are not counted as the run's."""
    (rank, world), tokenizer = ranks(), sampler.tokenizer
    counted = sampler.sampled_tokens, sampler.computed_tokens
    sampler.model.eval()
    share = problems[rank::world]  # none where there are fewer problems than processes
    seeds = [(args.seed, 99, problem_key(problem)) for problem in share]
    prompts = [models.prompt_ids(tokenizer, problem["problem"], args.chat_template_kwargs) for problem in share]
    rows = sampler.generate(prompts, args.max_tokens, seeds, temperature=args.temperature)
    traces = [trace for (trace,) in read_traces(tokenizer, share, prompts, rows)]
    sums = [sum(trace.reward for trace in traces), sum(len(trace.completion.token_ids) for trace in traces)]
    budgets = [args.max_tokens // 4, args.max_tokens // 2, args.max_tokens]
    lengths = [len(trace.completion.token_ids) if trace.stopped else math.inf for trace in traces]
    cut = [(i, budget) for i, length in enumerate(lengths) for budget in budgets if length > budget]
    asked = [forced_prompt(tokenizer, traces[i], cut_at_budget(traces[i], budget)) for i, budget in cut]
    forced_seeds = [(*seeds[i], budget) for i, budget in cut]
    rows = sampler.generate(asked, args.answer_tokens, forced_seeds, temperature=args.temperature)
    right = dict(zip(cut, map(success_rate, read_answers([share[i] for i, _ in cut], rows))))
    sums += [sum(right.get((i, budget), t.reward) for i, t in enumerate(traces)) for budget in budgets]
    accuracy, tokens, *forced = (total / len(problems) for total in sum_over_ranks(sums))
    sampler.sampled_tokens, sampler.computed_tokens = counted
    metrics = {"step": state["step"], "sampled_tokens": state["sampled_tokens"], "accuracy": accuracy, "tokens": tokens}
    if rank == 0:
        runs.append_jsonl(run / "validation.jsonl", [{**metrics, "forced": dict(zip(budgets, forced))}])
    text = "  ".join(f"forced at {budget}: {right:.3f}" for budget, right in zip(budgets, forced))
    print(f"  validation after {state['step']} steps: right {accuracy:.3f}  tokens {tokens:.1f}  {text}", flush=True)


if __name__ == "__main__":
    main()
