"""star_mrt.py: MRT by filtered self-training (Section 6, Figure 6 left); with --filter outcome it is plain STaR.

    python star_mrt.py                                    # the embedded model: both filters from the same samples
    python star_mrt.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --config configs/star_r1_distill.yaml
    torchrun --nproc-per-node 8 star_mrt.py --config configs/star_r1_distill.yaml

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
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import (
    Trace,
    end_of_thought,
    forced_prompt,
    new_traces,
    prompts_of,
    read_answers,
    regret_at,
    segmentation,
    trace_of,
)
from plumbing import data, models, report, runs, training
from plumbing.fine_tuning import fine_tune
from plumbing.flags import add_common_flags, changed, parse_flags, positive_int, shared_flags
from plumbing.report import Curve, Panel, Values, interval, problem_means
from plumbing.runs import fail, problem_key
from plumbing.sampler import Sampler, open_sampler, pick_engine
from plumbing.training import ranks

# flag: (default with the embedded model, with any other model, where the latter comes from)
DEFAULTS = {
    "dataset": ("tiny", "AI-MO/NuminaMath-1.5", "the paper: NuminaMath, release not named"),
    "split": ("train", "train", "Section 6"),
    "limit": (192, 10000, "Section 6"),
    "filter": ("both", "mrt", "mrt, outcome or both"),
    "num_samples": (4, 4, "not published"),
    "max_tokens": (256, 16384, "Table 2"),
    "temperature": (1.0, 0.7, "the authors' script of Section 5"),
    "top_p": (1.0, 1.0, "the authors' script of Section 5"),
    "forced_answers": (8, 20, "the authors' code"),
    "answer_tokens": (8, 4096, "the authors' script of Section 5"),
    "max_episodes": (32, 16, "ours; longer thoughts: neighbours are joined"),
    "lr": (3e-4, 1e-6, "Table 2"),
    "batch_size": (32, 256, "Table 2"),
    "epochs": (2, 3, "Table 2"),
    "warmup": (0.1, 0.1, "Table 2"),
    "weight_decay": (0.0, 0.0, "not published"),
    "max_grad_norm": (1.0, 1.0, "usual"),
    "max_tokens_per_batch": (16384, 32768, "ours"),
    "checkpoint_every": (50, 50, "ours"),
    "eval_split": ("test", "test", "ours"),
    "eval_problems": (96, 96, "ours"),
    "batch_problems": (96, 32, "ours"),
    "budgets": ("64,128,192,256", "4096,8192,12288,16384", "Section 7"),
}
TITLES = {"outcome": "STaR", "mrt": "MRT-STaR"}


def flags(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser)
    flag = shared_flags(parser, "MRT", "forced-answers answer-tokens max-episodes")
    flag("--filter", choices=("mrt", "outcome", "both"))
    flag("--iterations", type=positive_int, default=2)
    flag("--min-success", type=float, default=0.5, help="J that the prefix kept must have")
    flag("--per-problem", type=positive_int, default=2, help="traces kept of a problem")
    flag("--stop-phrase", choices=("none", "masked", "trained"), default="none")
    shared_flags(parser, "sampling", "num-samples max-tokens temperature top-p batch-problems")
    shared = "lr warmup weight-decay max-grad-norm max-tokens-per-batch checkpoint-every"
    flag = shared_flags(parser, "fine-tuning", shared)
    flag("--schedule", choices=("constant", "cosine"), default="cosine")
    flag("--batch-size", type=positive_int, help="examples of an optimiser step")
    flag("--epochs", type=positive_int)
    shared_flags(parser, "held-out problems", "eval-dataset eval-split eval-problems budgets")
    args = parse_flags(parser, DEFAULTS, argv)
    args.out = args.out or Path("runs") / f"star-{runs.short_name(args.model)}-{args.filter}-seed{args.seed}"
    if not 0 <= args.min_success <= 1:
        fail(f"--min-success {args.min_success}: must be between 0 and 1")
    if args.temperature == 0:
        fail("--temperature 0: must be above 0, greedy samples of a problem are all the same")
    return args


def main() -> None:
    args = flags()
    training.start_processes()
    args.engine = pick_engine(args.engine)
    runs.check_out(args.out, runs.identity(args), args.resume, args.overwrite)
    weights = args.tokenizer or args.model  # of a served model the name says nothing
    tokenizer = models.load_tokenizer(weights)
    if not models.thinks(tokenizer):
        fail(f"--model {args.model}: has no {models.THINK_END} in its vocabulary, so no thought to cut")
    problems, held_out = data.problems_of(args), data.held_out_of(args)
    _, longest = prompts_of(args, tokenizer, problems + held_out)
    model = models.load_model(weights, models.pick_device())
    run = training.open_run_once(args.out, runs.identity(args), args.resume, args.overwrite)
    if ranks()[0] == 0:
        runs.same_inputs(run, problems + held_out, weights)
    sampler = open_sampler(args, tokenizer, longest, trained=model)
    recompute = not runs.is_tiny(weights)
    training.prepare(model, models.pick_dtype(args.dtype), models.token_logprobs, recompute)
    evaluate(args, run / "base.jsonl", sampler, held_out)
    ran_out = [not self_train(args, run, name, model, sampler, problems, held_out) for name in filters(args)]
    if ranks()[0] == 0:
        write_report(args, run)
    if any(ran_out):
        raise SystemExit(3)


def filters(args) -> list[str]:
    return ["outcome", "mrt"] if args.filter == "both" else [args.filter]


def self_train(args, run: Path, name: str, model, sampler: Sampler, problems, held_out) -> bool:
    """The iterations of one filter; False if it left nothing to train on. What is done already is not repeated."""
    folder, tokenizer = run / name, sampler.tokenizer
    folder.mkdir(exist_ok=True)
    if name != filters(args)[0]:  # every filter starts from the base
        training.load_weights(model, runs.resolve_model(args.tokenizer or args.model))
        sampler.sync()
    for iteration in range(1, args.iterations + 1):
        final = folder / f"model_{iteration}"
        if final.exists():
            training.load_weights(model, final)
        elif not iterate(args, run, name, iteration, model, sampler, problems):
            return False
        else:
            training.save_model(final, model, tokenizer)
        sampler.sync()
        evaluate(args, folder / f"evaluation_{iteration}.jsonl", sampler, held_out)
    return True


def iterate(args, run: Path, name: str, iteration: int, model, sampler: Sampler, problems) -> bool:
    """Samples, filter, fine-tuning in place; False if the filter kept nothing."""
    folder, tokenizer = run / name, sampler.tokenizer
    print(f"== {name}, iteration {iteration} of {args.iterations}")
    # The first iteration samples from the base: the same traces for every filter.
    file = run / "samples_1.jsonl" if iteration == 1 else folder / f"samples_{iteration}.jsonl"
    seed = (args.seed + 1) * 1000 + iteration
    traces = recorded_traces(changed(args, seed=seed), file, sampler, problems)
    examples = select(args, name, sampler, traces, iteration)
    line = {"iteration": iteration, **describe(traces, examples)}
    if ranks()[0] == 0:
        kept = [runs.json_line(example.record(tokenizer)) for example in examples]
        runs.write_text(folder / f"selected_{iteration}.jsonl", "".join(kept))
        runs.write_json(folder / f"iteration_{iteration}.json", line)
    if not examples:
        print(f"the filter {name} kept no trace in iteration {iteration}: nothing to train on; see {file}")
        return False
    sampler.pause()
    rows = [example.fine_tuned() for example in examples]
    line |= fine_tune(args, folder / f"tuning_{iteration}", model, tokenizer, rows)
    if ranks()[0] == 0:
        runs.write_json(folder / f"iteration_{iteration}.json", line)
    return True


# ---------------------------------------------------------------------------------------------- samples


def evaluate(args, file: Path, sampler: Sampler, problems: list[dict]) -> None:
    """Traces on held-out problems, once a model: the same seeds for every model."""
    sampler.model.eval()
    recorded_traces(changed(args, seed=77, forced_answers=4), file, sampler, problems)


def recorded_traces(args, file: Path, sampler: Sampler, problems: list[dict]) -> list[Trace]:
    """--num-samples traces a problem with J at every boundary: sampled, each process its share, and read back."""
    tokenizer, how = sampler.tokenizer, segmentation(args, max_episodes=args.max_episodes)
    prompts, _ = prompts_of(args, tokenizer, problems)
    place = {problem["id"]: number for number, problem in enumerate(problems)}
    for traces in new_traces(args, file, sampler, problems, prompts, how, process=ranks()):
        records = training.gather_over_ranks([trace.record() for trace in traces])
        if ranks()[0] == 0:
            runs.append_jsonl(file, sorted(records, key=lambda r: place[r["id"]]))  # the order of a single process
    training.wait_for_ranks()
    records = sorted(runs.load_records(file), key=lambda r: (place[r["id"]], r["sample"])) if problems else []
    return [trace_of(r, tokenizer, problems[place[r["id"]]], prompts[place[r["id"]]]) for r in records]


# ---------------------------------------------------------------------------------------------- the filter


@dataclass
class Example:
    """A trace that the filter keeps: its thought up to a cut, what ends the thought, an answer that is right."""

    number: int  # of the trace in the iteration's
    trace: Trace
    cut: int  # tokens of the thought that stay
    ending: list[int]
    answer: list[int]
    ending_weight: float = 1.0

    def fine_tuned(self) -> tuple[list[int], int, list[float]]:
        """As `plumbing.fine_tuning` takes it. The prompt is not trained, and a masked stop phrase has weight 0."""
        thought = self.trace.completion.token_ids[: self.cut]
        weights = [1.0] * self.cut + [self.ending_weight] * len(self.ending) + [1.0] * len(self.answer)
        return self.trace.prompt + thought + self.ending + self.answer, len(self.trace.prompt), weights

    @property
    def episodes(self) -> int:
        return self.trace.boundaries.index(self.cut)

    def record(self, tokenizer) -> dict:
        ids, first, weights = self.fine_tuned()
        return {
            "id": self.trace.problem["id"],
            "trace": self.number,
            "cut": self.cut,
            "episodes": self.episodes,
            "J": self.trace.values[self.episodes],
            "J_empty": self.trace.values[0],
            "tokens": len(weights),
            "text": tokenizer.decode(ids[first:]),
        }


def select(args, name: str, sampler: Sampler, traces: list[Trace], iteration: int) -> list[Example]:
    """What the filter keeps. One process decides for all: on GPUs two of them may draw different answers."""
    examples = []
    if ranks()[0] == 0:
        cuts = keep_right(traces) if name == "outcome" else keep_progress(traces, args.min_success)
        examples = first_of_problem(add_answers(args, sampler, traces, cuts, iteration), args.per_problem)
    return training.gather_over_ranks(examples)


def keep_right(traces: list[Trace]) -> dict[int, int]:
    """Plain STaR: {number: end of the thought} of every trace whose own answer is right."""
    return {t: trace.boundaries[-1] for t, trace in enumerate(traces) if trace.reward == 1}


def keep_progress(traces: list[Trace], min_success: float) -> dict[int, int]:
    """MRT: {number: cut} of every trace with progress, best first. The cut is the first prefix with the highest J."""
    cuts = {}
    for t, trace in enumerate(traces):
        best = int(np.argmax(trace.values))  # MRT 7: the first of equals: all of the progress in the fewest tokens
        if trace.values[best] > trace.values[0] and trace.values[best] >= min_success:
            cuts[t] = trace.boundaries[best]
    return dict(sorted(cuts.items(), key=lambda c: (-max(traces[c[0]].values), c[1], c[0])))


def add_answers(args, sampler: Sampler, traces: list[Trace], cuts: dict[int, int], iteration: int) -> list[Example]:
    """Each cut trace with an ending and a right answer; without those for which none is found.

    A complete thought with a right answer stays as it was sampled. For a cut one --forced-answers are sampled after the
    ending, and the first right one is taken.
    """
    examples, asked = {}, []
    for t, cut in cuts.items():
        trace = traces[t]
        ids = trace.completion.token_ids
        if trace.finished and cut == trace.boundaries[-1] and trace.reward == 1:
            examples[t] = Example(t, trace, cut, [], ids[cut:])
        else:
            asked.append(example_without_answer(args, sampler.tokenizer, t, trace, cut))
    rows = sampler.generate(
        [example.fine_tuned()[0] for example in asked],
        args.answer_tokens,
        [(args.seed, 4, iteration, problem_key(e.trace.problem), e.number) for e in asked],
        args.forced_answers,
        args.temperature,
        args.top_p,
    )
    answers = read_answers([example.trace.problem for example in asked], rows)
    for example, row, graded in zip(asked, rows, answers):
        right = [c for c, a in zip(row, graded) if a.verdict == "right" and c.finish_reason == "stop"]
        if right:
            example.answer = right[0].token_ids
            examples[example.number] = example
    return [examples[t] for t in cuts if t in examples]


def example_without_answer(args, tokenizer, number: int, trace: Trace, cut: int) -> Example:
    """Between a cut thought and its answer stands the end-of-thinking marker, or μ's stop phrase."""
    if args.stop_phrase == "none":
        return Example(number, trace, cut, end_of_thought(tokenizer, trace.prefix(cut)), [])
    ending = forced_prompt(tokenizer, trace, cut)[len(trace.prompt) + cut :]
    whole = trace.finished and cut == trace.boundaries[-1]  # ended by the marker alone, not by the phrase
    return Example(number, trace, cut, ending, [], 0.0 if args.stop_phrase == "masked" and not whole else 1.0)


def first_of_problem(examples: list[Example], count: int) -> list[Example]:
    """The first `count` of each problem."""
    taken, kept = Counter(), []
    for example in examples:
        taken[example.trace.problem["id"]] += 1
        if taken[example.trace.problem["id"]] <= count:
            kept.append(example)
    return kept


def describe(traces: list[Trace], examples: list[Example]) -> dict:
    """What a filter keeps, for the table."""
    gained = [e.trace.values[e.episodes] - e.trace.values[0] for e in examples if e.episodes]
    tokens, episodes = [len(e.fine_tuned()[2]) for e in examples], [e.episodes for e in examples]
    line = {
        "sampled_traces": len(traces),
        "traces": len(examples),
        "tokens": sum(tokens),
        "mean_tokens": float(np.mean(tokens or [0])),
        "mean_episodes": float(np.mean(episodes or [0])),
        "progress_per_episode": float(sum(gained) / max(1, sum(episodes))),
        "problems": len({e.trace.problem["id"] for e in examples}),
    }
    print(
        f"kept {line['traces']} of {len(traces)} traces, {line['problems']} problems, "
        f"{line['mean_tokens']:.0f} tokens on average, progress per episode {line['progress_per_episode']:.3f}"
    )
    return line


# ---------------------------------------------------------------------------------------------- the report


def write_report(args, run: Path) -> None:
    """Table, summary.json and figure of base and filters, from the records."""
    lines = {name: [json.loads(file.read_text()) for file in iteration_files(run / name)] for name in filters(args)}
    columns = ("traces", "tokens", "mean_tokens", "mean_episodes", "progress_per_episode", "problems")
    rows = [
        [name, str(kept["iteration"]), *(f"{kept[c]:.4g}" for c in columns)] for name in lines for kept in lines[name]
    ]
    text = "What the filters kept:\n\n"
    text += report.markdown(["filter", "iteration", *(c.replace("_", " ") for c in columns)], rows)
    summary: dict = {"kept": lines}
    if (run / "base.jsonl").exists():
        values = {"base": values_of(args, run / "base.jsonl")}
        for name, of_filter in lines.items():
            for kept in of_filter:
                file = run / name / f"evaluation_{kept['iteration']}.jsonl"
                if file.exists():
                    values[f"{TITLES[name]} {kept['iteration']}"] = values_of(args, file)
        summary["models"] = {name: {m: interval(v) for m, v in metrics.items()} for name, metrics in values.items()}
        summary["difference_to_base"] = report.differences_to_first(values)
        problems = len(values["base"]["right"])
        text += f"\nOn {problems} held-out problems × {args.num_samples}:\n\n" + report.metric_table(summary["models"])
        text += report.difference_table(summary["difference_to_base"], "the base on the same problems")
        last = {name: values[key] for name in TITLES.values() if (key := f"{name} {args.iterations}") in values}
        if len(last) == 2:
            (minus,) = report.differences_to_first(last).values()
            summary["mrt_minus_star"] = minus
            text += f"\nAfter {args.iterations} iterations:\n\n"
            text += report.metric_table({"MRT-STaR - STaR": minus}, "+")
        draw(args, summary, run)
    report.write_summary(run, summary, text, f"models: {run}/FILTER/model_N   figure: {run / 'star.png'}")


def iteration_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("iteration_*.json"), key=lambda file: int(file.stem.split("_")[1]))


def values_of(args, file: Path) -> Values:
    """Each metric for each held-out problem."""
    records = runs.load_records(file)
    values = {"right": problem_means(records, lambda r: r["reward"])}
    values["tokens"] = problem_means(records, lambda r: r["tokens"])
    return values | {f"regret@{b}": problem_means(records, regret_at, b) for b in args.budgets}


def draw(args, summary: dict, run: Path) -> Path:
    """Accuracy, tokens and regret on held-out problems by iteration."""
    labels = {"right": "share right", "tokens": "tokens", f"regret@{args.budgets[-1]}": "normalised regret"}
    panels = []
    for metric, label in labels.items():
        curves = []
        for title in (TITLES[name] for name in filters(args)):
            names = ["base", *(name for name in summary["models"] if name.rsplit(" ", 1)[0] == title)]
            curves.append(Curve(range(len(names)), [summary["models"][name][metric] for name in names], title))
        panels.append(Panel({"xlabel": "iteration", "ylabel": label, "xticks": range(args.iterations + 1)}, curves))
    return report.draw_panels(run / "star.png", *panels)


if __name__ == "__main__":
    main()
