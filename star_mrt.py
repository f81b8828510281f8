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
             it made progress:   J there > J(empty), else there is nothing to imitate;
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
    "max_tokens_per_batch": (4096, 32768, "ours"),
    "checkpoint_every": (50, 50, "ours"),
    "eval_split": ("test", "test", "ours"),
    "eval_problems": (96, 96, "ours"),
    "batch_problems": (96, 32, "ours"),
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
    run, model, sampler, problems, held_out = prepare(args)
    evaluate(args, run / "base.jsonl", sampler, held_out)
    ran_out = [not self_train(args, run, name, model, sampler, problems, held_out) for name in filters(args)]
    if ranks()[0] == 0:
        write_report(args, run)
    sampler.close()
    if any(ran_out):
        raise SystemExit(3)


def prepare(args):
    """(folder of the run, model, its sampler, problems, held-out problems), what is cheap to refuse first."""
    args.engine = pick_engine(args.engine)
    runs.check_out(args)
    weights = args.tokenizer or args.model  # of a served model the name says nothing
    tokenizer = models.load_tokenizer(weights)
    if not models.thinks(tokenizer):
        fail(f"--model {args.model}: has no {models.THINK_END} in its vocabulary, so no thought to cut")
    problems, held_out = data.problems_of(args), data.held_out_of(args)
    _, longest = prompts_of(args, tokenizer, problems + held_out)
    model = models.load_model(weights, models.pick_device())
    run = training.open_run_once(args, problems + held_out)
    sampler = open_sampler(args, tokenizer, longest, trained=model)
    recompute = not runs.is_tiny(weights)
    training.prepare(model, models.pick_dtype(args.dtype), models.token_logprobs, recompute)
    return run, model, sampler, problems, held_out


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
    about = {"iteration": iteration, **describe(traces, examples)}
    if ranks()[0] == 0:
        selected = [runs.json_line(example.record(tokenizer)) for example in examples]
        runs.write_text(folder / f"selected_{iteration}.jsonl", "".join(selected))
    if examples:
        sampler.pause()
        rows = [example.fine_tuned() for example in examples]
        about |= fine_tune(args, folder / f"tuning_{iteration}", model, tokenizer, rows)
    else:
        print(f"the filter {name} kept no trace in iteration {iteration}: nothing to train on; see {file}")
    if ranks()[0] == 0:
        runs.write_json(folder / f"iteration_{iteration}.json", about)
    return bool(examples)


# ---------------------------------------------------------------------------------------------- samples


def evaluate(args, file: Path, sampler: Sampler, problems: list[dict]) -> None:
    """Traces on held-out problems, once a model; seeds, and four forced answers, are the same for every run."""
    sampler.model.eval()
    recorded_traces(changed(args, seed=77, forced_answers=4), file, sampler, problems)


def recorded_traces(args, file: Path, sampler: Sampler, problems: list[dict]) -> list[Trace]:
    """--num-samples traces a problem with J at every boundary: sampled, each process its share, and read back."""
    tokenizer, rule = sampler.tokenizer, segmentation(args)
    prompts, _ = prompts_of(args, tokenizer, problems)
    order = {problem["id"]: i for i, problem in enumerate(problems)}
    for traces in new_traces(args, file, sampler, problems, prompts, rule, process=ranks()):
        records = training.gather_over_ranks([trace.record() for trace in traces])
        if ranks()[0] == 0:
            runs.append_jsonl(file, sorted(records, key=lambda r: order[r["id"]]))  # the order of a single process
    training.wait_for_ranks()
    records = sorted(runs.load_records(file), key=lambda r: (order[r["id"]], r["sample"])) if problems else []
    return [trace_of(r, tokenizer, problems[order[r["id"]]], prompts[order[r["id"]]]) for r in records]


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
    """Plain STaR: {number: end of the thought} of every trace whose own answer is right and complete."""
    return {t: trace.boundaries[-1] for t, trace in enumerate(traces) if ends_right(trace)}


def ends_right(trace: Trace) -> bool:
    """Its own answer is right and complete: one that the limit cut after its box would teach not to end."""
    return trace.reward == 1 and trace.stopped


def keep_progress(traces: list[Trace], min_success: float) -> dict[int, int]:
    """MRT: {number: cut} of every trace with progress, best first. The cut is the first prefix with the highest J."""
    cuts = {}
    for t, trace in enumerate(traces):
        best = int(np.argmax(trace.values))  # MRT 7: the first of equals: all of the progress in the fewest tokens
        if trace.values[best] > trace.values[0] and trace.values[best] >= min_success:
            cuts[t] = trace.boundaries[best]
    return dict(sorted(cuts.items(), key=lambda c: (-max(traces[c[0]].values), c[1], c[0])))


def add_answers(args, sampler: Sampler, traces: list[Trace], cuts: dict[int, int], iteration: int) -> list[Example]:
    """Each cut trace with an ending and a right answer, the first of --forced-answers sampled after the ending; without
    those for which none is right."""
    examples = [begin_example(args, sampler.tokenizer, number, traces[number], cut) for number, cut in cuts.items()]
    asked = [example for example in examples if not example.answer]
    problems = [example.trace.problem for example in asked]
    prompts = [example.fine_tuned()[0] for example in asked]
    seeds = [(args.seed, 4, iteration, problem_key(example.trace.problem), example.number) for example in asked]
    rows = sampler.generate(prompts, args.answer_tokens, seeds, args.forced_answers, args.temperature, args.top_p)
    for example, completions, answers in zip(asked, rows, read_answers(problems, rows)):
        ended = [(c, answer) for c, answer in zip(completions, answers) if c.finish_reason == "stop"]
        example.answer = next((c.token_ids for c, answer in ended if answer.verdict == "right"), [])
    return [example for example in examples if example.answer]


def begin_example(args, tokenizer, number: int, trace: Trace, cut: int) -> Example:
    """Between a cut thought and its answer, still to be sampled, stands the end-of-thinking marker or μ's stop phrase.
    A complete thought with a right answer stays as it is."""
    complete = trace.finished and cut == trace.boundaries[-1]
    if complete and ends_right(trace):
        return Example(number, trace, cut, [], trace.completion.token_ids[cut:])
    if args.stop_phrase == "none":
        return Example(number, trace, cut, end_of_thought(tokenizer, trace.prefix(cut)), [])
    ending = forced_prompt(tokenizer, trace, cut)[len(trace.prompt) + cut :]  # the marker alone if complete
    return Example(number, trace, cut, ending, [], 0.0 if args.stop_phrase == "masked" and not complete else 1.0)


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
    tokens, episodes = [len(e.fine_tuned()[2]) for e in examples], [e.episodes for e in examples]
    progress = sum(e.trace.values[e.episodes] - e.trace.values[0] for e in examples) / max(1, sum(episodes))
    problems, mean = len({e.trace.problem["id"] for e in examples}), float(np.mean(tokens or [0]))
    print(
        f"kept {len(examples)} of {len(traces)} traces, {problems} problems, {mean:.0f} tokens on average, "
        f"progress per episode {progress:.3f}"
    )
    return {
        "sampled_traces": len(traces),
        "traces": len(examples),
        "tokens": sum(tokens),
        "mean_tokens": mean,
        "mean_episodes": float(np.mean(episodes or [0])),
        "progress_per_episode": float(progress),
        "problems": problems,
    }


# ---------------------------------------------------------------------------------------------- the report


def write_report(args, run: Path) -> None:
    """Table, summary.json and figure of base and filters, from the records."""
    names, iterations = filters(args), range(1, args.iterations + 1)
    files = {name: [run / name / f"iteration_{i}.json" for i in iterations] for name in names}
    kept = {name: [json.loads(file.read_text()) for file in files[name] if file.exists()] for name in names}
    columns = "iteration traces tokens mean_tokens mean_episodes progress_per_episode problems".split()
    rows = [[name, *(f"{about[column]:.4g}" for column in columns)] for name in names for about in kept[name]]
    text = "What the filters kept:\n\n"
    text += report.markdown(["filter", *(column.replace("_", " ") for column in columns)], rows)
    evaluations = {"base": run / "base.jsonl"}
    evaluations |= {f"{TITLES[name]} {i}": run / name / f"evaluation_{i}.jsonl" for name in names for i in iterations}
    values = {model: values_of(args, file) for model, file in evaluations.items() if file.exists()}
    summary: dict = {"kept": kept}
    if values:
        summary["models"] = {model: {m: interval(v) for m, v in metrics.items()} for model, metrics in values.items()}
        summary["difference_to_base"] = report.differences_to_first(values)
        problems = len(values["base"]["right"])
        text += f"\nOn {problems} held-out problems × {args.num_samples}:\n\n" + report.metric_table(summary["models"])
        text += report.difference_table(summary["difference_to_base"], "the base on the same problems")
        last = [f"{title} {args.iterations}" for title in TITLES.values()]
        if all(model in values for model in last):
            (difference,) = report.differences_to_first({model: values[model] for model in last}).values()
            summary["mrt_minus_star"] = difference
            text += f"\nAfter {args.iterations} iterations:\n\n"
            text += report.metric_table({"MRT-STaR - STaR": difference}, "+")
        draw(args, summary, run)
    report.write_summary(run, summary, text, f"models: {run}/FILTER/model_N   figure: {run / 'star.png'}")


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
        panel = Panel({"xlabel": "iteration", "ylabel": label, "xticks": range(args.iterations + 1)}, [])
        for title in (TITLES[name] for name in filters(args)):
            means = [m[metric] for model, m in summary["models"].items() if model.rsplit(" ", 1)[0] in ("base", title)]
            panel.curves.append(Curve(range(len(means)), means, title))
        panels.append(panel)
    return report.draw_panels(run / "star.png", *panels)


if __name__ == "__main__":
    main()
