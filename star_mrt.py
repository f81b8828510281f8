"""star_mrt.py: MRT by filtered self-training (Section 6, Figure 6 left); with --filter outcome it is plain STaR.

    python star_mrt.py                                    # the embedded model: both filters from the same samples
    python star_mrt.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --config configs/star_r1_distill.yaml

One iteration: sample traces → episodes → J(μ) at every prefix → keep what the filter keeps → supervised fine-tuning →
the next iteration samples from the new model.

Filters. Each keeps at most --per-problem traces of a problem.
  outcome  the traces whose answer is right, as they are: plain STaR.
  mrt      "traces that maximize progress and are also followed by correct solutions". The paper leaves threshold and
           ties open, and summed over a whole trace progress telescopes to J(end) - J(empty), which says nothing of the
           path. So a trace is cut at the *first* prefix that attains its highest J: all the progress it makes, in the
           fewest tokens; what follows made none. It is kept if
             it made progress:   J there > J(empty), else there is nothing to imitate (all prefixes equal);
             it is no luck:      J there ≥ --min-success, so the answer trained on is not one lucky guess of many;
             it is right:        the answer that follows the cut, and is trained on, is correct.
           Among the traces of a problem those with the highest J come first, then the shortest.
A cut thought ends as the model's own thoughts do, with the end-of-thinking marker, and an answer sampled after it, so
that stopping there is what is learnt. --stop-phrase masked or trained keeps μ's forced answer after the stop phrase.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import common
from common import THINK_END, ForcedAnswers, Sampler, Trace, fail

# flag: (default with the embedded model, with any other model, where the latter comes from)
DEFAULTS = {
    "dataset": ("tiny", "AI-MO/NuminaMath-1.5", "the paper: NuminaMath, release not named"),
    "split": ("train", "train", "Section 6"),
    "limit": (192, 10000, "Section 6"),
    "filter": ("both", "mrt", "mrt, outcome or both"),
    "num_samples": (4, 4, "not published"),
    "max_tokens": (256, 16384, "Table 2"),
    "temperature": (1.0, 0.7, "the authors' script of Section 5"),
    "forced_answers": (8, 20, "the authors' code"),
    "answer_tokens": (8, 4096, "the authors' script of Section 5"),
    "max_episodes": (32, 16, "ours; longer thoughts: neighbours are joined"),
    "lr": (3e-4, 1e-6, "Table 2"),
    "batch_size": (32, 256, "Table 2"),
    "epochs": (2, 3, "Table 2"),
    "warmup": (0.1, 0.1, "Table 2"),
    "weight_decay": (0.0, 0.0, "not published"),
    "max_tokens_per_batch": (16384, 32768, "ours"),
    "batch_problems": (96, 32, "ours"),
    "budgets": ("64,128,192,256", "4096,8192,12288,16384", "Section 7"),
}


def flags(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_common_flags(parser)
    mrt = parser.add_argument_group("MRT")
    mrt.add_argument("--filter", choices=("mrt", "outcome", "both"))
    mrt.add_argument("--iterations", type=common.positive_int, default=2)
    mrt.add_argument("--min-success", type=float, default=0.5, help="J that the prefix kept must have")
    mrt.add_argument("--per-problem", type=common.positive_int, default=2, help="traces kept of a problem")
    mrt.add_argument("--stop-phrase", choices=("none", "masked", "trained"), default="none")
    mrt.add_argument("--max-episodes", type=common.positive_int)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--num-samples", type=common.positive_int, help="traces a problem")
    sampling.add_argument("--max-tokens", type=common.positive_int, help="budget of a completion, thought and answer")
    sampling.add_argument("--temperature", type=common.non_negative)
    sampling.add_argument("--top-p", type=float, default=1.0)
    sampling.add_argument("--forced-answers", type=common.positive_int, help="sampled answers for each J")
    sampling.add_argument("--answer-tokens", type=common.positive_int, help="limit of a forced answer")
    sampling.add_argument("--batch-problems", type=common.positive_int, help="problems sampled and recorded together")
    tune = parser.add_argument_group("fine-tuning")
    tune.add_argument("--lr", type=common.non_negative)
    tune.add_argument("--schedule", choices=("constant", "cosine"), default="cosine")
    tune.add_argument("--batch-size", type=common.positive_int, help="examples of an optimiser step")
    tune.add_argument("--epochs", type=common.positive_int)
    tune.add_argument("--warmup", type=common.non_negative, help="share of the steps with rising learning rate")
    tune.add_argument("--weight-decay", type=common.non_negative)
    tune.add_argument("--max-grad-norm", type=common.non_negative, default=1.0)
    tune.add_argument("--max-tokens-per-batch", type=common.positive_int, help="tokens of a micro-batch, with padding")
    tune.add_argument("--checkpoint-every", type=common.positive_int, default=50, help="steps")
    held = parser.add_argument_group("held-out problems")
    held.add_argument("--eval-dataset", help="problems to evaluate on; default: tiny's own, none for other data")
    held.add_argument("--eval-split", default="test")
    held.add_argument("--eval-problems", type=common.positive_int, default=96)
    held.add_argument("--budgets", help="token budgets C0 of the regret")
    args = common.parse_flags(parser, DEFAULTS, argv)
    args.out = args.out or Path("runs") / f"star-{common.short_name(args.model)}-{args.filter}-seed{args.seed}"
    args.budgets = common.numbers("--budgets", args.budgets)
    if not 0 <= args.min_success <= 1:
        fail(f"--min-success {args.min_success}: must be between 0 and 1")
    if not args.temperature > 0:
        fail(f"--temperature {args.temperature}: must be above 0, greedy samples of a problem are all the same")
    return args


def main() -> None:
    args = flags()
    rank, _ = common.start_processes()
    args.engine = common.pick_engine(args.engine)
    settings = {k: v for k, v in vars(args).items() if k not in ("config", "checkpoint_every", "batch_problems")}
    common.check_out(args.out, settings, args.resume, args.overwrite)
    tokenizer = common.load_tokenizer(args.model)
    if not common.thinks(tokenizer):
        fail(f"--model {args.model}: has no {THINK_END} in its vocabulary, so no thought to cut")
    problems = common.load_problems(args.dataset, args.split, args.limit)
    held_out = []
    if args.eval_dataset or common.is_tiny_dataset(args.dataset):
        held_out = common.load_problems(args.eval_dataset or args.dataset, args.eval_split, args.eval_problems)
    prompts = [common.prompt_ids(tokenizer, p["problem"], args.chat_template_kwargs) for p in problems]
    held_prompts = [common.prompt_ids(tokenizer, p["problem"], args.chat_template_kwargs) for p in held_out]
    longest = common.check_lengths(args, tokenizer, problems, prompts)
    longest = max(longest, common.check_lengths(args, tokenizer, held_out, held_prompts))
    model = common.load_model(args.model, common.pick_device())
    run = common.open_run_once(args.out, settings, args.resume, args.overwrite)
    if common.ranks()[0] == 0:
        common.same_inputs(run, problems, args.model)
    sampler = common.open_sampler(args, tokenizer, longest, trained=model)
    dtype, recompute = common.pick_dtype(args.dtype), not common.is_tiny(args.model)
    common.prepare(model, dtype, common.token_logprobs, recompute)
    if held_out:
        evaluate(args, run / "base.jsonl", sampler, held_out, held_prompts)
    ran_dry = False
    for number, name in enumerate(("outcome", "mrt") if args.filter == "both" else (args.filter,)):
        if number:  # every filter starts from the base
            common.load_weights(model, common.resolve_model(args.model))
            sampler.sync()
        (run / name).mkdir(exist_ok=True)
        for iteration in range(1, args.iterations + 1):
            if not iterate(args, run, name, iteration, model, sampler, problems, prompts):
                ran_dry = True
                break
            if held_out:
                evaluate(args, run / name / f"evaluation_{iteration}.jsonl", sampler, held_out, held_prompts)
    if rank == 0:
        report(args, run)
    if ran_dry:
        raise SystemExit(3)


def iterate(args, run: Path, name: str, iteration: int, model, sampler: Sampler, problems, prompts) -> bool:
    """One iteration of one filter; False if it left nothing to train on. What is done already is not repeated."""
    folder, tokenizer, rank = run / name, sampler.tokenizer, common.ranks()[0]
    final = folder / f"model_{iteration}"
    if final.exists():
        common.load_weights(model, final)
        sampler.sync()
        return True
    print(f"== {name}, iteration {iteration} of {args.iterations}")
    # The first iteration samples from the base: the same traces for every filter.
    file = run / "samples_1.jsonl" if iteration == 1 else folder / f"samples_{iteration}.jsonl"
    traces = sample(args, file, sampler, problems, prompts, iteration)
    # One process decides for all: on GPUs two of them may draw different answers from one seed.
    chosen = [select(args, name, sampler, traces, iteration)] if rank == 0 else []
    ((examples, kept),) = common.gather_over_ranks(chosen)
    line = {"iteration": iteration, **describe(traces, kept)}
    print(
        f"kept {line['traces']} of {len(traces)} traces, {line['problems']} problems, "
        f"{line['mean_tokens']:.0f} tokens on average, progress per episode {line['progress_per_episode']:.3f}"
    )
    if rank == 0:
        common.write_text(folder / f"selected_{iteration}.jsonl", "".join(common.json_line(row) for row in kept))
        common.write_json(folder / f"iteration_{iteration}.json", line)
    if not examples:
        print(f"the filter {name} kept no trace in iteration {iteration}: nothing to train on; samples: {file}")
        return False
    sampler.pause()
    line |= fine_tune(args, folder / f"tuning_{iteration}", model, tokenizer, examples)
    if rank == 0:
        common.write_json(folder / f"iteration_{iteration}.json", line)
    common.save_model(final, model, tokenizer)
    sampler.sync()
    return True


# ---------------------------------------------------------------------------------------------- samples


def traced(args, sampler: Sampler, problems, prompts, answers: int, seed: int) -> list[dict]:
    """[{id, samples}]: traces of problems with J at every boundary. Each process does its share."""
    (rank, world), settings = common.ranks(), copy.copy(args)
    settings.seed = seed
    groups = common.sample_traces(settings, sampler, problems[rank::world], prompts[rank::world],
                                  max_episodes=args.max_episodes)  # fmt: skip
    how = ForcedAnswers("sampled", answers, args.answer_tokens, args.temperature, args.top_p)
    if groups:
        common.success_rates(sampler, [t for group in groups for t in group], how, (seed, 1))
    mine = [(group[0].problem["id"], [common.trace_record(t) for t in group]) for group in groups]
    rows = dict(common.gather_over_ranks(mine))
    return [{"id": p["id"], "samples": rows[p["id"]]} for p in problems]


def sample(args, file: Path, sampler: Sampler, problems, prompts, iteration: int) -> list[Trace]:
    """The iteration's traces; recorded as each batch of problems is done, and read back where they are."""
    recorded = {row["id"]: row for row in common.read_jsonl(file)} if file.exists() and file.stat().st_size else {}
    common.wait_for_ranks()  # all have read it
    todo = [i for i, p in enumerate(problems) if p["id"] not in recorded]
    clock = common.Clock(len(todo), "problems", sampler)
    for start in range(0, len(todo), args.batch_problems):
        some = todo[start : start + args.batch_problems]
        rows = traced(args, sampler, [problems[i] for i in some], [prompts[i] for i in some], args.forced_answers,
                      (args.seed + 1) * 1000 + iteration)  # fmt: skip
        if common.ranks()[0] == 0:
            common.append_jsonl(file, rows)
        recorded |= {row["id"]: row for row in rows}
        clock.tell(start + len(some))
    return [
        common.trace_from_record(sampler.tokenizer, problem, prompt, record)
        for problem, prompt in zip(problems, prompts)
        for record in recorded[problem["id"]]["samples"]
    ]


# ---------------------------------------------------------------------------------------------- the filter


def select(args, name: str, sampler: Sampler, traces: list[Trace], iteration: int) -> tuple[list[tuple], list[dict]]:
    """What the filter keeps: (examples for `fine_tune`, a record of each)."""
    chosen = keep_right(args, traces) if name == "outcome" else keep_progress(args, traces)
    tokenizer, examples, kept = sampler.tokenizer, [], []
    answers = answers_after(args, sampler, traces, chosen, iteration)
    for t, cut in limit_per_problem(args, traces, [(t, cut) for t, cut in chosen if answers[t] is not None]):
        trace = traces[t]
        ending, answer = answers[t] or ([], [])
        thought = trace.completion.token_ids[:cut] if ending else []
        ids = trace.prompt + thought + ending + answer
        told = args.stop_phrase != "none" and not (trace.finished and cut == trace.boundaries[-1])
        weight = 0.0 if told and args.stop_phrase == "masked" else 1.0
        weights = [1.0] * len(thought) + [weight] * len(ending) + [1.0] * len(answer)
        examples.append((ids, len(trace.prompt), weights))
        at = trace.boundaries.index(cut)
        kept.append({"id": trace.problem["id"], "trace": t, "cut": cut, "episodes": at, "J": trace.values[at],
                     "J_empty": trace.values[0], "tokens": len(weights),
                     "text": tokenizer.decode(ids[len(trace.prompt) :])})  # fmt: skip
    return examples, kept


def keep_right(args, traces: list[Trace]) -> list[tuple[int, int]]:
    """Plain STaR: (number, end of the thought) of every trace whose own answer is right."""
    return [(t, trace.boundaries[-1]) for t, trace in enumerate(traces) if trace.reward == 1]


def keep_progress(args, traces: list[Trace]) -> list[tuple[int, int]]:
    """MRT: (number, cut) of every trace with progress, best first. The cut is the first prefix with the highest J."""
    chosen = []
    for t, trace in enumerate(traces):
        best = int(np.argmax(trace.values))  # MRT: the first of equals, so the fewest tokens for all of the progress
        if trace.values[best] > trace.values[0] and trace.values[best] >= args.min_success:
            chosen.append((t, trace.boundaries[best]))
    return sorted(chosen, key=lambda c: (-max(traces[c[0]].values), c[1], c[0]))


def limit_per_problem(args, traces: list[Trace], chosen: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first --per-problem of each problem."""
    taken: dict[str, int] = {}
    kept = []
    for t, cut in chosen:
        name = traces[t].problem["id"]
        taken[name] = taken.get(name, 0) + 1
        if taken[name] <= args.per_problem:
            kept.append((t, cut))
    return kept


def answers_after(args, sampler: Sampler, traces, chosen, iteration: int) -> dict[int, tuple | None]:
    """Trace number → (tokens that end the thought, tokens of a right answer), or None if no answer is right.

    A complete thought with a right answer stays as it was sampled: ([], completion). For a cut one --forced-answers are
    sampled after the ending, and the first right one is taken.
    """
    tokenizer = sampler.tokenizer
    found: dict[int, tuple[list[int], list[int]] | None] = {}
    asked = []
    for t, cut in chosen:
        trace = traces[t]
        if trace.finished and cut == trace.boundaries[-1] and trace.reward == 1:
            found[t] = [], trace.completion.token_ids
        else:
            asked.append((t, cut, ending_of(args, tokenizer, trace, cut)))
    prompts = [traces[t].prompt + traces[t].completion.token_ids[:cut] + ending for t, cut, ending in asked]
    seeds = [(args.seed, 4, iteration, common.key(traces[t].problem["id"]), t) for t, _, _ in asked]
    rows = sampler.generate(prompts, args.answer_tokens, seeds, args.forced_answers, args.temperature, args.top_p)
    golds = [traces[t].problem["answer"] for t, *_ in asked]
    pairs = [(common.extract_answer(c.text), gold) for gold, row in zip(golds, rows) for c in row]
    right = np.array([verdict == "right" for verdict in common.grade_all(pairs)]).reshape(
        len(rows), args.forced_answers
    )
    for (t, _, ending), row, of_row in zip(asked, rows, right):
        good = [c for c, ok in zip(row, of_row) if ok and c.finish_reason == "stop"]
        found[t] = (ending, good[0].token_ids) if good else None
    return found


def ending_of(args, tokenizer, trace: Trace, cut: int) -> list[int]:
    """What stands between a cut thought and its answer: the end-of-thinking marker, or μ's stop phrase."""
    if args.stop_phrase != "none":
        return common.forced_prompt(tokenizer, trace, cut)[len(trace.prompt) + cut :]
    return common.end_of_thought(tokenizer, trace.prefix(cut))


def describe(traces: list[Trace], kept: list[dict]) -> dict:
    """What a filter keeps, for the table."""
    gains = [k["J"] - k["J_empty"] for k in kept if k["episodes"]]
    return {
        "sampled_traces": len(traces),
        "traces": len(kept),
        "tokens": int(sum(k["tokens"] for k in kept)),
        "mean_tokens": float(np.mean([k["tokens"] for k in kept] or [0])),
        "mean_episodes": float(np.mean([k["episodes"] for k in kept] or [0])),
        "progress_per_episode": float(sum(gains) / max(1, sum(k["episodes"] for k in kept))),
        "problems": len({k["id"] for k in kept}),
    }


# ---------------------------------------------------------------------------------------------- fine-tuning


def fine_tune(args, folder: Path, model, tokenizer, examples: list[tuple]) -> dict:
    """--epochs of supervised fine-tuning in place; goes on from the last checkpoint in `folder`."""
    rank, dtype, asked_to_stop = common.ranks()[0], common.pick_dtype(args.dtype), common.on_stop()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    state = {"step": 0, "loss": 0.0}
    if found := common.load_newest(folder, model, optimizer):
        checkpoint, state = found
        print(f"resumed from {checkpoint}")
    if rank == 0:
        folder.mkdir(exist_ok=True)
        common.rewind(folder, state["step"])
    a_pass = math.ceil(len(examples) / args.batch_size)
    steps, began, first = a_pass * args.epochs, time.time(), state["step"]
    while state["step"] < steps:
        step = state["step"]
        order = np.random.default_rng([args.seed, step // a_pass]).permutation(len(examples))
        batch = [examples[i] for i in order[step % a_pass :: a_pass]]  # all batches of a pass are of like size
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(args, step / steps)
        state = {"step": step + 1, "loss": train_step(args, model, optimizer, batch, dtype)}
        if not math.isfinite(state["loss"]):
            fail(f"step {step} of the fine-tuning in {folder}: the loss is {state['loss']}")
        if rank == 0:
            common.append_jsonl(folder / "metrics.jsonl", [{**state, "examples": len(batch)}])
        stopping = common.sum_over_ranks([float(bool(asked_to_stop))])[0] > 0
        if state["step"] % args.checkpoint_every == 0 or stopping:
            common.save_checkpoint(folder, model, tokenizer, optimizer, state, keep=1)
        if stopping:
            print(f"stopped after step {state['step']}, with a checkpoint; --resume goes on", flush=True)
            raise SystemExit(128 + (asked_to_stop or [15])[0])
        if state["step"] % max(1, steps // 5) == 0:
            left = (time.time() - began) / (state["step"] - first) * (steps - state["step"])
            print(
                f"step {state['step']} of {steps}  loss {state['loss']:.4f}  {common.duration(left)} left", flush=True
            )
    common.end_on_stop()
    model.eval()
    return {"steps": steps, "loss": state["loss"]}


def train_step(args, model, optimizer, batch: list[tuple], dtype) -> float:
    """One optimiser step on -Σ w log p / Σ w over the trained tokens of the whole batch: however it is split into
    micro-batches and over processes, a token counts the same. Prompts are not trained, a masked stop phrase has
    weight 0."""
    rank, world = common.ranks()
    score = common.scorer(model, common.token_logprobs)
    denominator = sum(sum(weights) for _, _, weights in batch)
    batches = list(common.micro_batches(batch[rank::world], args.max_tokens_per_batch, model.device))
    optimizer.zero_grad()
    total = 0.0
    for _, ids, where, weights in common.same_number(batches, batch[0], model.device):
        with common.autocast(dtype):
            logprobs, _ = score(ids, where)
        loss = -(weights * logprobs).sum() / denominator
        (loss * world).backward()  # FSDP takes the mean of the processes' gradients
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
    optimizer.step()
    return common.sum_over_ranks([total])[0]


# ---------------------------------------------------------------------------------------------- held-out problems


def evaluate(args, file: Path, sampler: Sampler, problems, prompts) -> None:
    """Traces with J at every boundary on held-out problems, once a model: the same seeds for every model."""
    if file.exists():
        return
    sampler.model.eval()
    rows = traced(args, sampler, problems, prompts, 4, 77)
    if common.ranks()[0] == 0:
        common.write_text(file, "".join(map(common.json_line, rows)))


def metrics_of(args, file: Path) -> dict[str, np.ndarray]:
    """Each metric for each held-out problem."""
    rows = common.read_jsonl(file)

    def mean(of_sample, *at):
        return np.array([np.mean([of_sample(s, *at) for s in row["samples"]]) for row in rows])

    values = {"right": mean(lambda s: s["right"]), "tokens": mean(lambda s: len(s["token_ids"]))}
    return values | {f"regret@{b}": mean(common.regret_at, b) for b in args.budgets}


def report(args, run: Path) -> None:
    """Table, summary.json and figure of base and filters, from the records."""
    names = [name for name in ("outcome", "mrt") if (run / name).is_dir()]
    lines = {name: [json.loads(file.read_text()) for file in sorted((run / name).glob("iteration_*.json"))]
             for name in names}  # fmt: skip
    columns = ("traces", "tokens", "mean_tokens", "mean_episodes", "progress_per_episode", "problems")
    rows = [
        [name, str(line["iteration"]), *(f"{line[c]:.4g}" for c in columns)] for name in names for line in lines[name]
    ]
    text = "What the filters kept:\n\n"
    text += common.markdown(["filter", "iteration", *(c.replace("_", " ") for c in columns)], rows)
    summary: dict[str, Any] = {"kept": lines}
    if (run / "base.jsonl").exists():
        base = metrics_of(args, run / "base.jsonl")
        models = {"base": base}
        for name in names:
            for line in lines[name]:
                file = run / name / f"evaluation_{line['iteration']}.jsonl"
                if file.exists():
                    models[f"{TITLES[name]} {line['iteration']}"] = metrics_of(args, file)
        summary["models"] = {name: {m: common.interval(v) for m, v in of.items()} for name, of in models.items()}
        summary["difference_to_base"] = {
            name: {m: common.interval(v - base[m]) for m, v in of.items()}
            for name, of in models.items()
            if name != "base"
        }
        header = ["model", *base]
        digits = {m: 1 if m == "tokens" else 3 for m in base}
        rows = [[name, *(common.cell(of[m], digits[m]) for m in base)] for name, of in summary["models"].items()]
        text += f"\nOn {len(base['right'])} held-out problems × {args.num_samples}:\n\n" + common.markdown(header, rows)
        rows = [[name, *(common.cell(of[m], digits[m], "+") for m in base)]
                for name, of in summary["difference_to_base"].items()]  # fmt: skip
        text += "\nDifference to the base on the same problems:\n\n" + common.markdown(header, rows)
        last = [models.get(f"{TITLES[name]} {args.iterations}") for name in names]
        if len(last) == 2 and last[0] and last[1]:
            gaps = {m: common.interval(last[1][m] - last[0][m]) for m in base}
            summary["mrt_minus_star"] = gaps
            row = ["MRT-STaR - STaR", *(common.cell(gaps[m], digits[m], "+") for m in base)]
            text += f"\nAfter {args.iterations} iterations:\n\n" + common.markdown(header, [row])
        draw(args, summary, names, run)
    common.write_json(run / "summary.json", summary)
    common.write_text(run / "summary.md", text)
    print("\n" + text)
    print(f"models: {run}/FILTER/model_N   table: {run / 'summary.md'}   figure: {run / 'star.png'}")


TITLES = {"outcome": "STaR", "mrt": "MRT-STaR"}


def draw(args, summary: dict, names: list[str], run: Path) -> None:
    """Accuracy, tokens and regret on held-out problems by iteration."""
    plt = common.pyplot()
    shown = {"right": "share right", "tokens": "tokens", f"regret@{args.budgets[-1]}": "normalised regret"}
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.1), constrained_layout=True)
    for axis, (metric, label) in zip(axes, shown.items()):
        for number, name in enumerate(names):
            mine = [summary["models"]["base"], *(of for model, of in summary["models"].items()
                                                 if model.rsplit(" ", 1)[0] == TITLES[name])]  # fmt: skip
            common.line(axis, range(len(mine)), [of[metric] for of in mine], f"C{number}", TITLES[name], "o-")
        axis.set(xlabel="iteration", ylabel=label, xticks=range(args.iterations + 1))
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    common.save_figure(figure, run / "star.png")


if __name__ == "__main__":
    main()
