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
    --parameterization backtracking    Table 5: c is a first attempt, and J(μ|c) whether it is right
    --stop-credit β                ours, on top: credit for the decision to stop or go on at each boundary
    --length-penalty w             the paper's third baseline (Arora & Zanette, arXiv 2502.04463)

On a laptop, with the embedded model (a minute or two on one core):
    python rl_mrt.py --bonus 0
    python rl_mrt.py --bonus 1                         # --variant online --progress nats
On GPUs, with the paper's data and settings (Table 3):
    python rl_mrt.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --bonus 1.0           # --variant prefix
    torchrun --nproc-per-node 8 rl_mrt.py --config configs/rl_r1_distill_1.5b.yaml
"""

from run.files import append_jsonl, end_in_one_line, fail, read_jsonl, write_json  # isort: split

import argparse
import importlib.util
import math
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from common import (
    Forcing,
    Trace,
    cut_at_budget,
    episode_progress,
    flat,
    force_answers,
    forced_prompt,
    group_advantages,
    grpo_loss,
    in_nats,
    read_trace,
    read_traces,
    reward,
    set_likelihood_J,
    set_sampled_J,
    stop_loss,
    success_rate,
)
from engine import models, plural, tell
from engine.logprobs import token_logprobs
from engine.processes import gather_over_ranks, ranks, start_processes, sum_over_ranks
from engine.sampler import Sampler, pick_engine
from engine.served_engine import is_served
from engine.thoughts import thinks
from engine.tokens import encode, stop_ids_of_thought, text_and_offsets
from grading.box import extract_answer
from run import data, folder, report, training
from run.backtracking import RETRY, episodes_of, first_attempt, marker_counts, whole_text
from run.flags import add_group, default_out, new_parser, non_negative, parse_flags, positive_int, share, whole_number
from run.traces import (
    CUT,
    FORCED,
    GOING_ON,
    PARTIAL,
    ROLLOUT,
    STOPPED,
    VALIDATION,
    checked_prompts,
    forcing_of,
    inputs_of,
    problem_key,
    problem_of,
    prompt_of,
    prompts_of,
    sampler_of,
    segmentation,
    tell_single_episodes,
    tokenizer_of,
    trace_of,
)

MAX_IMPORTANCE = 2.0  # importance weights between sampler and trainer are capped there


def flags(argv=None) -> argparse.Namespace:
    # Each flag: name, default with the embedded model (step and rate of experiments/findings.md), any other, source.
    parser = new_parser(
        __doc__,
        dataset=("tiny:30", "AI-MO/NuminaMath-1.5", "the paper: NuminaMath, release not named"),
        split=("train", "train", "the paper"),
        limit=(128, 4000, "the paper: 4,000 NuminaMath problems"),
    )
    flag = add_group(parser, "MRT")
    flag("bonus", 1.0, 1.0, "the authors' v0.1", type=non_negative, help="α of Eq. 2; 0 is GRPO")
    flag("variant", "online", "prefix", "the paper's", choices=("prefix", "online"))
    estimate = "J by sampled forced answers, by the gold answer's likelihood, or its log (default: nats for "
    estimate += "tiny online, else sampled, as the authors)"
    flag("progress", choices=("sampled", "likelihood", "nats"), help=estimate)
    stop = "β of the decision to stop; ours, not the paper's (50 in experiments/findings.md)"
    flag("stop-credit", type=non_negative, default=0.0, help=stop)
    stale = (
        "prefixes and their J from the records of a run of analyze_r1.py, evaluate.py or star_mrt.py, one a problem, "
    )
    flag("prefixes", type=Path, metavar="RUN", help=stale + "in place of fresh ones: the authors' stale prefixes")
    flag("forced-answers", 4, 4, "v0.1; the prefix variant's m of Figure 6")
    flag("answer-tokens", 8, 1024, "ours")
    flag("max-episodes", 32, 6, "the authors' online variant")
    room = "token limit of problem, first attempt and the phrase after it (backtracking, --variant prefix)"
    flag("prompt-tokens", 32, 1500, "Table 5", type=positive_int, help=room)
    flag = add_group(parser, "GRPO")
    flag("max-tokens", 384, 16384, "the authors' runs of 1.5B models; Table 3 allows 24576")
    flag("temperature", 1.0, 0.9, "Table 3")
    flag("problems-per-step", 4, 64, "Table 3: a batch of 256 samples", type=positive_int)
    flag("group-size", 8, 4, "Table 3", type=positive_int, help="G rollouts a problem")
    flag("length-penalty", type=non_negative, default=0.0, help="weight w in [0, 1), 0: none")
    flag("clip", 0.2, 0.2, "PPO's", type=non_negative, help="ε of the ratio's clipping")
    beta = "not published; the default of the trainer the authors built on"
    flag("kl", 0.0, 0.04, beta, type=non_negative, help="β of the k3 penalty to the initial model; 0: no copy kept")
    mean = "the loss is a mean over all tokens, or over each sequence's and then over sequences (the authors' trainer)"
    flag("loss-mean", choices=("token", "sequence"), default="token", help=mean)
    flag("updates-per-batch", type=positive_int, default=1, help="optimiser steps a batch")
    flag = add_group(parser, "optimisation")
    flag("steps", type=positive_int, help="default: one pass over the problems")
    flag("max-sampled-tokens", type=positive_int, help="stop after so many, forced answers included")
    flag("lr", 2.5e-4, 1e-6, "Table 3")
    flag("schedule", "constant", "cosine", "Table 3", choices=("constant", "cosine"))
    flag("warmup", 0.0, 0.1, "Table 3")
    flag("weight-decay", 0.0, 0.01, "Table 3")
    flag("adam-beta2", 0.95, 0.95, "ours; the authors' trainer: 0.999", type=share, help="β2 of AdamW")
    flag("max-grad-norm", 1.0, 1.0, "usual")
    flag("max-tokens-per-batch", 4096, 32768, "ours")
    flag("checkpoint-every", 10, 10, "ours")
    flag("report-to", choices=("wandb", "trackio", "tensorboard"), help="also send metrics to this service")
    flag = add_group(parser, "held-out problems")
    flag("eval-dataset")
    flag("eval-split", "validation", "validation", "ours")
    flag("eval-problems", 96, 96, "ours")
    flag("eval-every", 10, 10, "ours", type=whole_number, help="steps between validations; 0: none")
    args = parse_flags(parser, argv)
    backtracking = args.parameterization == "backtracking"
    in_nats_by_default = args.variant == "online" and models.is_tiny(args.model) and not backtracking
    args.progress = args.progress or ("nats" if in_nats_by_default else "sampled")
    kind = "grpo" if args.bonus == 0 else "prefix" if args.variant == "prefix" else f"online-{args.progress}"
    name, told = f"rl-{folder.short_name(args.model)}-{kind}-seed{args.seed}", ["variant", "progress", "seed"]
    args.out = args.out or default_out(args, name, *told, *["bonus"] * (args.bonus == 0))
    check_flags(args)
    return args


def check_flags(args) -> None:
    if args.group_size == 1:
        fail("--group-size 1: a group of one has no spread to normalise by")
    if args.bonus > 0 and args.variant == "prefix" and args.progress != "sampled":
        fail(f"--progress {args.progress} needs --variant online: prefix samples its answers")
    if args.parameterization == "backtracking" and args.progress != "sampled":
        fail(f"--progress {args.progress}: backtracking has no forced answer to take a likelihood of, only sampled")
    if args.stop_credit and args.bonus == 0:
        fail(f"--stop-credit {args.stop_credit:g} needs a --bonus above 0: GRPO does not estimate J")
    if args.prefixes and not (args.bonus and args.variant == "prefix"):
        fail(f"--prefixes {args.prefixes}: needs --variant prefix and a bonus above 0")
    if args.length_penalty >= 1:
        fail(f"--length-penalty {args.length_penalty}: must be below 1, or right answers could lose to wrong ones")
    if args.max_tokens < 2:
        fail(f"--max-tokens {args.max_tokens}: leaves no room for a thought and an answer")
    if args.temperature == 0:
        fail("--temperature 0: must be above 0, a group of greedy rollouts has no spread")
    if args.report_to and importlib.util.find_spec(args.report_to) is None:
        fail(f"--report-to {args.report_to}: pip install {args.report_to}")


def main() -> None:
    _, world = start_processes()
    args = flags()
    if args.problems_per_step < world:
        fail(f"--problems-per-step {args.problems_per_step}: fewer than the {world} processes")
    if is_served(args.engine):
        fail("--engine: a server keeps the weights it has loaded, so it cannot sample from a model in training")
    args.engine = pick_engine(args.engine)
    if not args.dry_run:
        folder.check_out(args)
    tokenizer = tokenizer_of(args)  # small: a wrong --model is reported before a data set is fetched
    if args.stop_credit and not stop_ids_of_thought(tokenizer):
        fail(f"--stop-credit {args.stop_credit:g}: needs a model whose thoughts end with a token of their own")
    problems = recorded_prefixes(args, tokenizer) if args.prefixes else data.problems_of(args)
    validation = data.held_out_of(args) if args.eval_every else []
    first = args.prompt_tokens * begins_with_attempt(args)
    prompts, longest = checked_prompts(args, tokenizer, problems + validation, first, bool(args.bonus or validation))
    if args.dry_run:
        print(training.memory_plan(args, len(problems), longest))
        tell_plan(args, len(problems), len(validation))
        return
    model = models.load_model(args.model, models.pick_device())
    run = folder.open_run_once(args, inputs_of(args, problems, prompts, validation))
    if args.resume and (run / "summary.json").exists():
        print(f"{run} is complete")
        return
    sampler = sampler_of(args, tokenizer, longest, trained=model)
    train(args, run, model, sampler, problems, validation)
    sampler.close()


def tell_plan(args, problems: int, validated: int) -> None:
    """--dry-run: what --steps, or one pass over the problems, sample at most; --max-sampled-tokens is ignored."""
    steps = args.steps or math.ceil(problems / args.problems_per_step)
    started = steps * args.problems_per_step
    fresh = 0 if args.prefixes else started  # what prefixes are cut from
    rollouts, forced, partial_rollouts, first = started * args.group_size, 0, 0, 0
    if begins_with_attempt(args):
        first = fresh
    elif args.bonus and args.variant == "prefix":
        partial_rollouts, forced = fresh, fresh * args.forced_answers
    elif args.bonus and args.progress == "sampled":
        forced = rollouts * (args.max_episodes + 1) * args.forced_answers
    tested = validated * (steps // args.eval_every + 2) if args.eval_every else 0
    sampled = rollouts + partial_rollouts + tested
    work = (
        ("rollout or validation trace", sampled, args.max_tokens),
        ("forced answer", forced + 3 * tested * (args.parameterization == "open-ended"), args.answer_tokens),
        ("first attempt", first, args.prompt_tokens),
    )
    report.tell_plan(args.dry_run, problems, *work)


# ---------------------------------------------------------------------------------------------- the loop


def train(args, run: Path, model, sampler: Sampler, problems: list[dict], validation: list[dict]) -> None:
    """All steps. Under torchrun every process samples and trains its share of a step's problems; rank 0 writes."""
    rank, world = ranks()
    score = training.prepare(args, model, sampler.ways)
    initial = models.load_model(args.model, model.device) if args.kl > 0 else None
    reference = torch.no_grad()(partial(token_logprobs, initial, way=sampler.ways.update)) if initial else None
    optimizer = training.adamw(args, model)
    counts = {"sampled_tokens": 0, "computed_tokens": 0, "seconds": 0.0}
    length = args.steps or (math.inf if args.max_sampled_tokens else math.ceil(len(problems) / args.problems_per_step))
    most = args.max_sampled_tokens or math.inf
    steps = training.Steps(args, run, model, sampler.tokenizer, optimizer, counts, length, most)
    goal = f"{args.max_sampled_tokens:,} sampled tokens" if args.max_sampled_tokens else plural(int(length), "step")
    rollouts_a_step = f"{args.problems_per_step} × {args.group_size} rollouts a step"
    print(f"{method(args)}: {plural(len(problems), 'problem')}, {rollouts_a_step}, {goal}")
    if steps.state["step"]:  # resumed: the sampler gets the checkpoint's weights
        sampler.sync()
    if validation and steps.due(args.eval_every) and not validated(run, steps.state["step"]):
        validate(args, steps, sampler, validation)
    rollouts = ROLLOUTS[args.variant if args.bonus else "grpo"]
    stop = stop_ids_of_thought(sampler.tokenizer)[0] if args.stop_credit else None

    for number, step in enumerate(steps):
        drawn = training.draw_problems(problems, args.problems_per_step, step, args.seed)[rank::world]
        before = sampler.counts()
        with steps.can_be_left():
            groups = rollouts(args, sampler, drawn, (args.seed, step))
        spent = sampler.counts() - before
        if args.bonus and number == 0:
            tell_single_episodes(args, flat(groups))
        advantages = advantages_of(args, groups)
        sampler.pause()
        try:
            metrics = update(args, model, score, reference, optimizer, groups, advantages, stop)
        except FloatingPointError as error:
            give_up(run, step, groups, error)
        sampler.sync()  # what is sampled next is sampled from the new weights
        write_step(args, steps, groups, metrics, spent)  # from here on this step counts as done
        if validation and steps.due(args.eval_every):
            validate(args, steps, sampler, validation)
        if rank == 0 and steps.due(args.checkpoint_every):
            report.draw_training(run)
        steps.checkpoint()

    training.save_checkpoint(run, model, sampler.tokenizer, optimizer, steps.state)
    training.save_model(run / "model", model, sampler.tokenizer)
    if rank == 0:
        metrics = read_jsonl(run / "metrics.jsonl")
        if not any(line["grad_norm"] for line in metrics):
            print("warning: no step had a gradient: every group was all right or all wrong, so nothing was trained")
        write_json(run / "summary.json", {"method": method(args), **metrics[-1]})
    print(
        f"model: {run / 'model'}   metrics: {run / 'metrics.jsonl'}   picture: {run / 'progress.png'}   traces: "
        f"{run / 'trace.html'}"
    )


def method(args) -> str:
    return "GRPO (bonus 0)" if args.bonus == 0 else f"MRT {args.variant}, bonus {args.bonus:g}"


# ---------------------------------------------------------------------------------------------- rollouts

Groups = list[list[Trace]]  # [problems][G]
Advantages = list[list[np.ndarray]]  # [problems][G], each [tokens of the completion], those of the answer included


def rollouts_grpo(args, sampler: Sampler, problems, seed: tuple) -> Groups:
    """GRPO: G traces a problem."""
    return sample_groups(
        args, sampler, problems, prompts_of(args, sampler.tokenizer, problems), args.max_tokens, (*seed, ROLLOUT)
    )


def rollouts_online(args, sampler: Sampler, problems, seed: tuple) -> Groups:
    """MRT online: GRPO's traces, with J(μ) at every boundary."""
    groups = rollouts_grpo(args, sampler, problems, seed)
    traces = flat(groups)
    if args.progress == "sampled":
        set_sampled_J(sampler, traces, forcing_of(args), (*seed, FORCED))
    else:
        set_likelihood_J(sampler, traces)
    return groups


def rollouts_prefix(args, sampler: Sampler, problems, seed: tuple) -> Groups:
    """MRT as in Figure 6: G rollouts go on from a prefix c whose J(μ|c) is known. Each group shares its prefix; a trace
    is what follows it. c is a partial rollout cut after some of its episodes.

    For backtracking (Table 5, the authors' first code) c is a whole first attempt and the phrase that opens the second,
    and J(μ|c) whether that attempt is right. Only what follows is graded, and it has its own --max-tokens."""
    open_ended = args.parameterization == "open-ended"
    if not args.prefixes:
        problems = (cut_rollouts if open_ended else first_attempts)(args, sampler, problems, seed)
    prefixes = [problem["prefix"]["token_ids"] for problem in problems]
    prompts = [prompt + prefix for prompt, prefix in zip(prompts_of(args, sampler.tokenizer, problems), prefixes)]
    limits, texts = args.max_tokens, None
    if open_ended:
        limits = [args.max_tokens - len(prefix) for prefix in prefixes]
        texts = [text_and_offsets(sampler.tokenizer, prefix)[0] for prefix in prefixes]
    groups = sample_groups(args, sampler, problems, prompts, limits, (*seed, GOING_ON), texts)
    for trace in flat(groups):
        trace.prefix_J = trace.problem["prefix"]["J"]
    return groups


ROLLOUTS = {"grpo": rollouts_grpo, "online": rollouts_online, "prefix": rollouts_prefix}


def begins_with_attempt(args) -> bool:
    """Are rollouts sampled after a first attempt?"""
    return args.parameterization == "backtracking" and args.variant == "prefix" and args.bonus > 0


def first_attempts(args, sampler: Sampler, problems, seed: tuple) -> list[dict]:
    """The problems, each with a sampled first attempt and the phrase that opens the second: {token_ids, J}."""
    seeds = seeds_of(problems, *seed, PARTIAL)
    prompts, tokenizer = prompts_of(args, sampler.tokenizer, problems), sampler.tokenizer
    limits = [max(1, args.prompt_tokens - len(prompt) - len(encode(tokenizer, RETRY))) for prompt in prompts]
    rows = sampler.generate(prompts, limits, seeds, temperature=args.temperature)
    rows = [[first_attempt(completion)] for (completion,) in rows]
    groups = read_traces(tokenizer, problems, prompts, rows, segmentation(args))
    return [{**trace.problem, "prefix": first_part(tokenizer, trace)} for (trace,) in groups]


def first_part(tokenizer, trace: Trace) -> dict:
    """The first attempt of a trace, all of it if that has no box, with the phrase that opens the second, and its J."""
    end = len(trace.boundaries) - 1
    j = next((j for j, text in enumerate(episodes_of(trace), 1) if extract_answer(text)), end)
    ids = trace.completion.token_ids[: trace.boundaries[j]] + encode(tokenizer, RETRY)
    text = trace.prefix(trace.boundaries[j]) + RETRY
    return {"token_ids": ids, "text": text, "J": trace.J[j] if trace.J else trace.reward}


def cut_rollouts(args, sampler: Sampler, problems, seed: tuple) -> list[dict]:
    """The problems, each with the prefix of a partial rollout: {token_ids, J}, J(μ|c) from m rollouts that stop there.
    It is sampled by the model as it is before the update (the old policy), and never trained on."""
    seeds = seeds_of(problems, *seed, PARTIAL)
    prompts, rule = prompts_of(args, sampler.tokenizer, problems), segmentation(args)
    rows = sampler.generate(prompts, args.max_tokens, seeds, temperature=args.temperature)
    partial_rollouts = [read_trace(sampler.tokenizer, p, q, c, rule) for p, q, (c,) in zip(problems, prompts, rows)]
    ends = [t.boundaries[draw_cut(args, sampler.tokenizer, t, (*s, CUT))] for t, s in zip(partial_rollouts, seeds)]
    stops = [forced_prompt(sampler.tokenizer, trace, end) for trace, end in zip(partial_rollouts, ends)]
    answers = force_answers(sampler, problems, stops, forcing_of(args), [(*s, STOPPED) for s in seeds])
    J = map(success_rate, problems, answers)
    cut = [trace.completion.token_ids[:end] for trace, end in zip(partial_rollouts, ends)]
    return [{**p, "prefix": {"token_ids": ids, "J": value}} for p, ids, value in zip(problems, cut, J)]


def draw_cut(args, tokenizer, trace: Trace, seed: tuple) -> int:
    """The number of the boundary where a trace is cut, drawn uniformly from those (0 included) that leave room for an
    answer; the last is none of them if the thought was cut off or already holds the answer."""
    whole = trace.finished and thinks(tokenizer)
    inside = trace.boundaries if whole else trace.boundaries[:-1]
    count = sum(end + args.answer_tokens <= args.max_tokens for end in inside)
    return int(np.random.default_rng(seed).integers(max(1, count)))


def recorded_prefixes(args, tokenizer) -> list[dict]:
    """--prefixes: the problems of a run, each with one prefix of its traces and the J recorded there, drawn once for
    the whole training; --limit takes the first."""
    samples = args.prefixes / "samples_1.jsonl"  # of star_mrt.py
    run = folder.recorded_run(samples if samples.exists() else args.prefixes, "--prefixes", "J", "token_ids")
    if (was := run.settings.get("parameterization", "open-ended")) != args.parameterization:
        fail(f"--prefixes {args.prefixes}: its traces are {was}, this training is {args.parameterization}")
    problems, too_long = [], 0
    groups = list(report.group_by_problem(run.records).items())
    data.tell_limit(args.prefixes, len(groups), args.limit, "problems")
    for name, records in groups[: args.limit]:
        problem = problem_of(records[0])
        rng = np.random.default_rng((args.seed, PARTIAL, problem_key(problem)))
        record = records[int(rng.integers(len(records)))]
        prompt = prompt_of(args, tokenizer, problem)
        trace = trace_of(record, tokenizer, problem, prompt)
        if len(prompt) != record["prompt_tokens"] or trace.completion.text != record["text"]:
            fail(f"--prefixes {args.prefixes}: problem {name} was recorded with another tokenizer or chat template")
        if args.parameterization == "backtracking":
            prefix = first_part(tokenizer, trace)
            too_long += len(prompt) + len(prefix["token_ids"]) > args.prompt_tokens
        else:
            j = draw_cut(args, tokenizer, trace, (args.seed, PARTIAL, problem_key(problem), trace.sample, CUT))
            prefix = {"token_ids": record["token_ids"][: trace.boundaries[j]], "J": trace.J[j]}
        problems.append({**problem, "prefix": prefix})
    if too_long:
        fail(f"--prefixes {args.prefixes}: {too_long} problems with their first attempts exceed --prompt-tokens")
    J, prefixes = ([p["prefix"][name] for p in problems] for name in ("J", "token_ids"))
    shares = f"mean J {np.mean(J):.3f}, {prefixes.count([])} of them empty"
    print(f"{len(problems)} prefixes of {run.settings.get('model')}, recorded before this training: {shares}")
    return problems


def sample_groups(args, sampler: Sampler, problems, prompts, limits, seed: tuple, prefixes=None) -> Groups:
    """G graded traces for each (problem, prompt). A prompt may end with a prefix of the thought; a model without an
    end-of-thinking marker answers in its thought, so there the prefix's text is graded with what follows."""
    rows = sampler.generate(prompts, limits, seeds_of(problems, *seed), args.group_size, args.temperature)
    return read_traces(sampler.tokenizer, problems, prompts, rows, segmentation(args), prefixes=prefixes)


def seeds_of(problems: list[dict], *seed: int) -> list[tuple[int, ...]]:
    """A seed for each problem of a step; one that is drawn twice has two places."""
    return [(*seed, problem["place"], problem_key(problem)) for problem in problems]


# ---------------------------------------------------------------------------------------------- advantages


def advantages_of(args, groups: Groups) -> Advantages:
    """A = A_GRPO + α · credit of every token; with --bonus 0 it is GRPO's."""
    advantages = outcome_advantages(args, groups)
    if args.bonus:
        credits = [prefix_credit(g) if args.variant == "prefix" else episode_credit(g, scale_of(args)) for g in groups]
        advantages = [[a + args.bonus * c for a, c in zip(*rows)] for rows in zip(advantages, credits)]
    return advantages


def outcome_advantages(args, groups: Groups) -> Advantages:
    """GRPO's advantage of each trace, given to each of its tokens; --length-penalty weighs its outcome."""
    rewards = torch.tensor([[trace.reward for trace in group] for group in groups], dtype=torch.float64)
    lengths = [[len(trace.completion.token_ids) for trace in group] for group in groups]
    if args.length_penalty:
        rewards = penalise_length(rewards, torch.tensor(lengths, dtype=torch.float64), args.length_penalty)
    outcome = group_advantages(rewards).tolist()
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


def scale_of(args) -> Callable:
    """What turns J into the unit that progress is measured in."""
    return in_nats if args.progress == "nats" else np.asarray


def episode_credit(group: list[Trace], scale=np.asarray) -> list[np.ndarray]:
    """MRT online: progress of a token's episode - mean progress of the group's episodes, [tokens] for each trace.
    `scale` turns J, [k + 1], into what progress, [k], is measured in.

    Why each episode: over a whole trace Σ_j r_prg telescopes to J(end) - J(empty), which says nothing about the path.
    Credited to its own episode, progress is an advantage with J(μ | prefix) as its baseline.
    Why the answer's tokens, too: the mean is a second baseline, and what follows the thought makes no progress, so it
    gets 0 - mean. Taken from the thought alone, the mean would be a fee for each episode that ending the thought
    avoids: a length penalty in disguise.
    Why no std: where no episode makes progress, it would blow the noise of J up to a signal.
    α's unit: A_GRPO has unit variance in a group, progress is in units of J (or nats), so α = 1 weighs at most half of
    what it weighs inside a reward that is normalised afterwards (docs/faithful.md).
    """
    progress = [episode_progress(scale(trace.J)) for trace in group]
    mean = np.concatenate(progress).mean() if any(map(len, progress)) else 0.0
    credits = []
    for trace, gains in zip(group, progress):
        thought = np.repeat(gains, np.diff(trace.boundaries))  # MRT 5: r_prg(z_j; c_{j-1}), to the tokens of z_j
        answer = np.zeros(len(trace.completion.token_ids) - len(thought))
        credits.append(np.concatenate([thought, answer]) - mean)
    return credits


def prefix_credit(group: list[Trace]) -> list[np.ndarray]:
    """MRT as in Figure 6: f - J(μ|c), the same for every token that follows the prefix c.

    Here z is all that follows the cut, and the outcome f stands for J(μ | z, c): the model has answered. Where going on
    does better than stopping, going on is reinforced as a whole; where the prefix has the answer and thinking on loses
    it, it is pushed down.
    Why after the normalisation: all G rollouts share the prefix, so J(μ|c) is a constant of the group. In the reward,
    r = f + α (f - J(μ|c)) is affine in f, and normalising takes the bonus away again: the update would be GRPO's.
    What it does in expectation: J(μ|c) is only a baseline (it does not depend on what follows c), so the bonus adds
    weight on the outcome, from prefixes that end at random episodes, free of the group's std.
    """
    J = group[0].prefix_J
    assert J is not None
    return [np.full(len(trace.completion.token_ids), trace.reward - J) for trace in group]  # MRT 6: r_prg(z; c)


def stop_gains(trace: Trace) -> np.ndarray:
    """What stopping instead would have gained: J_j - f at the token that follows a boundary j ≥ 1, 0 at the others,
    [tokens]. In the prefix variant J is known at the cut alone, before the first token."""
    gains = np.zeros(len(trace.completion.token_ids))
    if trace.prefix_J is not None:
        gains[0] = trace.prefix_J - trace.reward
    for boundary, J in list(zip(trace.boundaries, trace.J))[1:]:
        if boundary < len(gains):  # not where a thought was cut off: nothing was decided there
            gains[boundary] = J - trace.reward
    return gains


# ---------------------------------------------------------------------------------------------- the update


def update(
    args, model, score, reference, optimizer, groups: Groups, advantages: Advantages, stop: int | None = None
) -> dict[str, float]:
    """One or more optimiser steps on the sampled tokens; returns the update's metrics. With several processes each has
    its own groups; denominators and metrics are over all of them, and so is the gradient. `stop`: the token that ends a
    thought, with --stop-credit."""
    traces, dtype = flat(groups), models.pick_dtype(args.dtype)
    examples = list(map(example_of, repeat(args), traces, chain.from_iterable(advantages)))
    parts = parts_of(args, traces)
    if len(parts) > 1:
        examples = training.with_old_logprobs(args, score, examples, model.device)
    sums, gaps, norms = Counter(), [], []
    for part in parts:
        denominator = sum_over_ranks([sum(float(examples[i][2][0].sum()) for i in part)])[0]  # before the loop
        optimizer.zero_grad()
        for numbers, ids, where, columns in training.micro_batches(
            examples, part, args.max_tokens_per_batch, model.device
        ):
            with models.autocast(dtype):
                loss, found, gap = batch_loss(args, score, reference, ids, where, columns, denominator, stop)
            (loss * ranks()[1] * bool(numbers)).backward()  # FSDP takes the mean of the processes' gradients
            if not numbers:  # other processes have more micro-batches
                continue
            if not torch.isfinite(loss):
                names = ", ".join(sorted({traces[i].problem["id"] for i in numbers}))
                raise FloatingPointError(f"the loss is {loss.item()} on samples of {names}")
            sums.update(found)
            if part is parts[0]:  # sampler and trainer are still the same policy
                gaps.append(gap)
        if part is parts[0]:
            all_gaps = training.check_gap(gaps, dtype)
        signal = sum_over_ranks([sum(float(np.abs(examples[i][2][1]).sum()) for i in part)])[0] > 0
        expected = signal and part is parts[0]  # later all ratios may be clipped
        norms.append(training.optimizer_step(model, optimizer, args.max_grad_norm, expected))
    counts = {"tokens": sum(c.shape[1] for *_, c in examples), "weights": sum(float(c[0].sum()) for *_, c in examples)}
    return update_metrics({**sums, **counts, "with_prompts": sum(len(ids) for ids, *_ in examples)}, all_gaps, norms)


def example_of(args, trace: Trace, advantage: np.ndarray) -> training.Example:
    """Prompt and completion; for each token of the completion its weight in the loss, its advantage, the sampler's
    log-prob, and what stopping there would have gained: [4, tokens]."""
    tokens = len(trace.completion.token_ids)
    weight = np.full(tokens, 1 / tokens if args.loss_mean == "sequence" else 1.0)
    columns = np.stack([weight, advantage, trace.completion.logprobs, stop_gains(trace)])
    return trace.prompt + trace.completion.token_ids, len(trace.prompt), columns


def batch_loss(args, score, reference, ids, where, columns, denominator: float, stop: int | None):
    """The loss of a micro-batch: ids [B, T], `where` [B, T] marks its N trained tokens, columns [4 or 5, N] are those
    of `example_of` (and the old log-probs, if there are several steps). Returns (loss, the sums of the metrics, the
    distance between the log-probs of trainer and sampler [N])."""
    weights, advantage, sampled, gains, *old = columns
    scores, entropies = score(ids, where, args.temperature, also=stop)
    logprobs = scores if stop is None else scores[:, 0]
    before = old[0] if old else logprobs.detach()
    # Truncated importance weights: close to 1, as sampler and trainer differ only by rounding.
    importance = (before - sampled).exp().clamp(max=MAX_IMPORTANCE)
    ref = reference(ids, where, args.temperature)[0] if reference else None
    loss, found = grpo_loss(
        logprobs, before, advantage * importance, denominator, args.clip, ref, args.kl, weights=weights
    )
    if stop is not None:
        loss = loss + args.stop_credit * stop_loss(scores[:, 1], gains, denominator, weights)
    found |= {"loss": loss.item() * denominator, "entropy": float(entropies.sum())}
    found |= {"padded": ids.numel(), "importance": float(importance.sum())}
    return loss, found, (logprobs.detach() - sampled).abs().cpu()


def update_metrics(sums: dict, gaps: torch.Tensor, norms: list[float]) -> dict[str, float]:
    """What metrics.jsonl has of an update, over all processes."""
    names = ("tokens", "weights", "with_prompts", "loss", "entropy", "clipped", "kl", "padded", "importance")
    total = dict(zip(names, sum_over_ranks([float(sums.get(name, 0.0)) for name in names])))
    return {
        "loss": total["loss"] / total["weights"],
        "grad_norm": float(np.mean(norms)),
        "entropy": total["entropy"] / total["tokens"],
        "clip_share": total["clipped"] / total["tokens"],
        "kl": total["kl"] / total["tokens"],
        "importance_weight": total["importance"] / total["tokens"],
        "sampler_gap_mean": float(gaps.mean()),
        "sampler_gap_max": float(gaps.max()),
        "trained_tokens": int(total["tokens"]),
        "update_tokens": int(total["with_prompts"]),
        "padding_share": 1 - total["with_prompts"] / total["padded"],
    }


def parts_of(args, traces: list[Trace]) -> list[list[int]]:
    """The traces of each of --updates-per-batch optimiser steps: rollout i of the whole batch, over all processes,
    belongs to step i % steps."""
    steps = min(args.updates_per_batch, args.problems_per_step * args.group_size)
    numbers = [trace.problem["place"] * args.group_size + trace.sample for trace in traces]
    return [[i for i, number in enumerate(numbers) if number % steps == step] for step in range(steps)]


# ---------------------------------------------------------------------------------------------- what is recorded


def write_step(args, steps: training.Steps, groups: Groups, metrics: dict, spent: np.ndarray) -> None:
    """The step's traces in records.jsonl, its metrics in metrics.jsonl, a line on the screen."""
    *tokens, sampling_seconds = spent.tolist()
    update_seconds = time.time() - steps.step_began - sampling_seconds
    groups = sorted(gather_over_ranks(groups), key=lambda group: group[0].problem["place"])
    step = steps.state["step"]
    rows = rows_of(step, groups)
    if ranks()[0] == 0:
        append_jsonl(steps.run / "records.jsonl", rows)
    sampled, computed = map(int, sum_over_ranks(tokens))
    stats = {**rollout_stats(args, groups), **metrics}
    seconds = {"sampling_seconds": sampling_seconds, "update_seconds": update_seconds}
    so_far = steps.state["sampled_tokens"] + sampled
    text = (
        f"step {step + 1:4d}  right {stats['reward']:.3f}  {progress_told(stats)}tokens {stats['tokens']:6.1f}  "
        f"truncated {stats['truncated']:.2f}  episodes {stats['episodes']:.1f}  flat groups {stats['flat_groups']:.2f} "
        f" loss {stats['loss']:+.4f}  sampled {so_far:,} tokens  {sampling_seconds:.1f} + {update_seconds:.1f} s"
    )
    counts = {"sampled_tokens": sampled, "computed_tokens": computed, "seconds": time.time() - steps.step_began}
    steps.count({**stats, **seconds}, text, **counts)
    if ranks()[0] == 0 and stats["flat_groups"] == 1:
        print(
            "  every group is flat: no signal from the outcome. " + " ".join(report.why_zero(rows).split()), flush=True
        )
    if ranks()[0] == 0 and steps.due(args.checkpoint_every):
        report.write_page(rows, steps.run / "trace.html")


def progress_told(stats: dict[str, float]) -> str:
    """J or progress, as far as the method estimates them."""
    if "J_prefix" in stats:
        return f"J of the prefix {stats['J_prefix']:.3f}  "
    if "J_end" in stats:
        return f"J {stats['J_empty']:.3f} to {stats['J_end']:.3f}, {stats['progress_per_episode']:+.3f} an episode  "
    return ""


def rows_of(step: int, groups: Groups) -> list[dict]:
    return [{"step": step + 1, **trace.record()} for trace in flat(groups)]


def give_up(run: Path, step: int, groups: Groups, error: FloatingPointError) -> NoReturn:
    """Keeps the samples of an update that failed, and ends the run."""
    name = run / ("failed.jsonl" if ranks()[0] == 0 else f"failed_{ranks()[0]}.jsonl")
    append_jsonl(name, [{"step": step + 1, "error": str(error)}, *rows_of(step, groups)])
    fail(f"step {step + 1}: {error}; stopped in the update, its samples are in {name}")


def rollout_stats(args, groups: Groups) -> dict[str, float]:
    """Averages over a step's traces and their J, for metrics.jsonl."""

    def mean(values) -> float:
        return float(np.mean(list(values)))

    def progress_in(scale: Callable) -> list[float]:
        return [progress for trace in traces for progress in episode_progress(scale(trace.J))] or [0.0]

    traces = flat(groups)
    stats = {
        "reward": mean(t.reward for t in traces),
        "flat_groups": mean(len({t.reward for t in group}) == 1 for group in groups),
        "truncated": mean(t.completion.finish_reason == "length" for t in traces),
        "tokens": mean(len(t.completion.token_ids) for t in traces),
        "episodes": mean(len(t.boundaries) - 1 for t in traces),
    }
    if args.parameterization == "backtracking":
        stats |= marker_counts(map(whole_text, traces))
        firsts = [trace.problem["prefix"]["text"] for trace in traces if "prefix" in trace.problem]
        stats["first_attempts_without_box"] = mean([extract_answer(text) is None for text in firsts] or [0])
    if args.bonus and args.variant == "prefix":
        stats["J_prefix"] = mean(t.prefix_J for t in traces)
        stats["progress_of_going_on"] = stats["reward"] - stats["J_prefix"]
    elif args.bonus:
        stats["J_empty"], stats["J_end"] = mean(t.J[0] for t in traces), mean(t.J[-1] for t in traces)
        stats["progress_per_episode"] = mean(progress_in(np.asarray))
        if args.progress != "sampled":  # with a few sampled answers most differences of J are noise
            # Less than 5 points of J or, in nats, 5 % of it; losses count, too.
            stats["episodes_without_progress"] = mean(p < 0.05 for p in progress_in(scale_of(args)))
    return stats


def validated(run: Path, step: int) -> bool:
    """Has the model been validated after this step, before the run was stopped?"""
    file = run / "validation.jsonl"
    return file.exists() and step in [line["step"] for line in read_jsonl(file)]


def validate(args, steps: training.Steps, sampler: Sampler, problems: list[dict]) -> None:
    """Accuracy and tokens on validation problems, one trace each, and the accuracy had the thoughts been stopped at a
    few budgets (traces that end within a budget count as they are). Its tokens are not counted as the run's."""
    (rank, world), state = ranks(), steps.state
    share = problems[rank::world]  # none where there are fewer problems than processes
    seeds = [(args.seed, VALIDATION, problem_key(p)) for p in share]
    prompts = prompts_of(args, sampler.tokenizer, share)
    budgets = [args.max_tokens // 4, args.max_tokens // 2, args.max_tokens]
    forcing = Forcing(1, args.answer_tokens, args.temperature)
    with steps.can_be_left():
        rows = sampler.generate(prompts, args.max_tokens, seeds, temperature=args.temperature)
        traces = [trace for (trace,) in read_traces(sampler.tokenizer, share, prompts, rows, segmentation(args))]
        spent = [len(trace.completion.token_ids) if trace.ended else math.inf for trace in traces]
        cut = [(i, budget) for i, tokens in enumerate(spent) for budget in budgets if tokens > budget]
        if args.parameterization == "backtracking":  # the last attempt by then has answered
            J = [reward(share[i], traces[i].prefix(budget)) for i, budget in cut]
        else:
            asked = [forced_prompt(sampler.tokenizer, traces[i], cut_at_budget(traces[i], budget)) for i, budget in cut]
            seeds_of_cuts = [(*seeds[i], budget) for i, budget in cut]
            answers = force_answers(sampler, [share[i] for i, _ in cut], asked, forcing, seeds_of_cuts)
            J = [success_rate(share[i], a) for (i, _), a in zip(cut, answers)]
    forced = dict(zip(cut, J))
    sums = [sum(trace.reward for trace in traces), sum(len(trace.completion.token_ids) for trace in traces)]
    sums += [sum(forced.get((i, budget), t.reward) for i, t in enumerate(traces)) for budget in budgets]
    accuracy, tokens, *by_budget = (total / len(problems) for total in sum_over_ranks(sums))
    metrics = {"step": state["step"], "sampled_tokens": state["sampled_tokens"], "accuracy": accuracy, "tokens": tokens}
    if rank == 0:
        append_jsonl(steps.run / "validation.jsonl", [{**metrics, "forced": dict(zip(budgets, by_budget))}])
    text = "  ".join(f"forced at {budget}: {right:.3f}" for budget, right in zip(budgets, by_budget))
    tell(f"  validation after {plural(state['step'], 'step')}: right {accuracy:.3f}  tokens {tokens:.1f}  {text}")


if __name__ == "__main__":
    end_in_one_line(main)
