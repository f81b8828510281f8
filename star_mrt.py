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
           For backtracking (Table 4) it keeps, in each trace, the backtrack from a failed attempt to a right one that
           makes most progress; the loss covers that backtrack and the right attempt, nothing before.
A cut thought ends as the model's own thoughts do, with the end-of-thinking marker, and an answer sampled after it, so
that stopping there is what is learnt.
"""

from run.files import append_jsonl, end_in_one_line, fail, json_line, write_json, write_text  # isort: split

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import Trace, read_answers
from engine import models, plural
from engine.processes import gather_over_ranks, ranks, start_processes, wait_for_ranks
from engine.sampler import Sampler, pick_engine
from engine.thoughts import end_of_turn, thinks, what_was_seen
from engine.tokens import end_of_thought
from grading.box import extract_answer
from run import data, folder, report, training
from run.backtracking import episodes_of, marker_counts, whole_text
from run.flags import add_group, changed, default_out, new_parser, parse_flags, positive_int
from run.report import Curve, Panel, Values, interval, problem_means
from run.traces import (
    CHOSEN,
    checked_prompts,
    inputs_of,
    new_traces,
    problem_key,
    regret_at,
    sampler_of,
    segmentation,
    tokenizer_of,
    trace_of,
    weights_of,
)

TITLES = {"outcome": "STaR", "mrt": "MRT-STaR"}


def flags(argv=None) -> argparse.Namespace:
    # Each flag: name, default with the embedded model, with any other, where the latter comes from.
    parser = new_parser(
        __doc__,
        dataset=("tiny", "AI-MO/NuminaMath-1.5", "the paper: NuminaMath, release not named"),
        split=("train", "train", "the paper"),
        limit=(192, 10000, "the paper"),
    )
    flag = add_group(parser, "MRT")
    flag("filter", "both", "mrt", "mrt, outcome or both", choices=("mrt", "outcome", "both"))
    flag("iterations", 2, 2, "not published", type=positive_int)
    flag("min-success", 0.5, 0.5, "ours", type=float, help="J that the prefix kept must have")
    flag("per-problem", 2, 2, "ours", type=positive_int, help="traces kept of a problem")
    flag("forced-answers", 8, 20, "the paper")
    flag("answer-tokens", 8, 4096, "the authors' script of Section 5")
    flag("max-episodes", 32, 16, "ours; longer thoughts: neighbours are joined")
    flag = add_group(parser, "sampling")
    flag("num-samples", 4, 4, "not published")
    flag("max-tokens", 256, 16384, "Table 2")
    flag("temperature", 1.0, 0.7, "the authors' script of Section 5")
    flag("top-p", 1.0, 1.0, "the authors' script of Section 5")
    flag("batch-problems", 96, 32, "ours")
    flag = add_group(parser, "fine-tuning")
    flag("lr", 3e-4, 1e-6, "Table 2")
    flag("batch-size", 32, 256, "Table 2", type=positive_int, help="examples of an optimiser step")
    flag("epochs", 2, 3, "Table 2", type=positive_int)
    flag("warmup", 0.1, 0.1, "Table 2")
    flag("schedule", "cosine", "cosine", "ours: Table 2 names none", choices=("constant", "cosine"))
    flag("weight-decay", 0.0, 0.0, "not published")
    flag("max-grad-norm", 1.0, 1.0, "usual")
    flag("max-tokens-per-batch", 4096, 32768, "ours")
    flag("checkpoint-every", 50, 50, "ours")
    flag = add_group(parser, "held-out problems")
    flag("eval-dataset")
    flag("eval-split", "test", "test", "ours")
    flag("eval-problems", 96, 96, "ours")
    flag("budgets")
    args = parse_flags(parser, argv)
    name = f"star-{folder.short_name(args.model)}-{args.filter}-seed{args.seed}"
    args.out = args.out or default_out(args, name, "filter", "seed")
    if not 0 <= args.min_success <= 1:
        fail(f"--min-success {args.min_success}: must be between 0 and 1")
    if args.temperature == 0:
        fail("--temperature 0: must be above 0, greedy samples of a problem are all the same")
    return args


def main() -> None:
    start_processes()
    args = flags()
    if args.dry_run:
        tell_plan(args)
        return
    args.engine = pick_engine(args.engine)
    folder.check_out(args)
    tokenizer = tokenizer_of(args)  # small: a wrong --model is reported before a data set is fetched
    if not thinks(tokenizer) and "mrt" in filters(args) and args.parameterization == "open-ended":
        why = f"no thought to cut: {what_was_seen(tokenizer)}; --filter outcome (plain STaR) cuts none"
        fail(f"--model {args.model}: {why}")
    problems, held_out = data.problems_of(args), data.held_out_of(args)
    prompts, longest = checked_prompts(args, tokenizer, problems + held_out)
    model = models.load_model(weights_of(args), models.pick_device())
    run = folder.open_run_once(args, inputs_of(args, problems, prompts, held_out))
    sampler = sampler_of(args, tokenizer, longest, trained=model)
    score = training.prepare(args, model, sampler.ways)
    test_held_out(args, run / "base.jsonl", sampler, held_out)
    ran_out = [not self_train(args, run, name, model, score, sampler, problems, held_out) for name in filters(args)]
    if ranks()[0] == 0:
        write_report(args, run)
    sampler.close()
    if any(ran_out):
        raise SystemExit(3)


def tell_plan(args) -> None:
    """--dry-run: what the samples and the held-out evaluations cost at most, without the fine-tuning."""
    problems, held_out = len(data.problems_of(args)), len(data.held_out_of(args))
    models_made = len(filters(args)) * args.iterations
    samplings = models_made - len(filters(args)) + 1  # the first iteration's serve every filter
    traces = args.num_samples * samplings * problems
    tested = args.num_samples * (models_made + 1) * held_out
    forced = (args.max_episodes + 1) * (traces * args.forced_answers + tested * 4)
    work = ("trace", traces, args.max_tokens), ("held-out trace", tested, args.max_tokens)
    report.tell_plan(args.dry_run, problems, *work, ("forced answer", forced, args.answer_tokens))


def filters(args) -> list[str]:
    return ["outcome", "mrt"] if args.filter == "both" else [args.filter]


# ---------------------------------------------------------------------------------------------- the loop


def self_train(args, run: Path, name: str, model, score, sampler: Sampler, problems, held_out) -> bool:
    """The iterations of one filter; False if it left nothing to train on. What is done already is not repeated."""
    place, tokenizer = run / name, sampler.tokenizer
    place.mkdir(exist_ok=True)
    if name != filters(args)[0]:  # every filter starts from the base
        training.load_weights(model, models.resolve_model(weights_of(args)))
        sampler.sync()

    for iteration in range(1, args.iterations + 1):
        final = place / f"model_{iteration}"
        if final.exists():
            training.load_weights(model, final)
        else:
            print(f"== {name}, iteration {iteration} of {args.iterations}")
            traces = sample(args, run, name, iteration, sampler, problems)  # with J at every boundary
            examples = select(args, name, sampler, traces, iteration)
            tuning = None
            if examples:
                sampler.pause()
                rows = [example.fine_tuned() for example in examples]
                tuning = training.fine_tune(args, place / f"tuning_{iteration}", model, score, tokenizer, rows)
            write_iteration(args, place, iteration, tokenizer, traces, examples, tuning)
            if not examples:
                return False
            training.save_model(final, model, tokenizer)
        sampler.sync()  # the next traces are those of the new model
        test_held_out(args, place / f"evaluation_{iteration}.jsonl", sampler, held_out)
    return True


def write_iteration(
    args, place: Path, iteration: int, tokenizer, traces: list[Trace], examples: list["Example"], tuning
) -> None:
    """What an iteration kept and how it was trained: selected_N.jsonl, iteration_N.json, a line on the screen."""
    if not examples:
        why = why_dropped(args, place.name, traces)
        print(f"the filter {place.name} kept no trace in iteration {iteration}: nothing to train on: {why}")
    about = {"iteration": iteration, **count_kept(traces, examples), **(tuning or {})}
    if args.parameterization == "backtracking":
        about |= marker_counts(map(whole_text, traces))
    if ranks()[0] == 0:
        lines = [json_line(example.record(tokenizer)) for example in examples]
        write_text(place / f"selected_{iteration}.jsonl", "".join(lines))
        write_json(place / f"iteration_{iteration}.json", about)


# ---------------------------------------------------------------------------------------------- samples


def sample(args, run: Path, name: str, iteration: int, sampler: Sampler, problems: list[dict]) -> list[Trace]:
    """The traces of an iteration. The first samples from the base: the same traces for every filter."""
    file = run / "samples_1.jsonl" if iteration == 1 else run / name / f"samples_{iteration}.jsonl"
    return traces_with_J(changed(args, seed=(args.seed + 1) * 1000 + iteration), file, sampler, problems)


def test_held_out(args, file: Path, sampler: Sampler, problems: list[dict]) -> None:
    """Traces on held-out problems, once a model; seeds, and four forced answers, are the same for every run."""
    traces_with_J(changed(args, seed=77, forced_answers=4), file, sampler, problems)


def traces_with_J(args, file: Path, sampler: Sampler, problems: list[dict]) -> list[Trace]:
    """--num-samples traces a problem with J at every boundary: sampled, each process its share, and read back."""
    tokenizer, rule = sampler.tokenizer, segmentation(args)
    prompts, _ = checked_prompts(args, tokenizer, problems)
    order = {problem["id"]: i for i, problem in enumerate(problems)}
    for traces in new_traces(args, file, sampler, problems, prompts, rule):
        records = gather_over_ranks([trace.record() for trace in traces])
        if ranks()[0] == 0:
            append_jsonl(file, sorted(records, key=lambda r: order[r["id"]]))  # the order of a single process
    wait_for_ranks()
    records = sorted(folder.load_records(file), key=lambda r: (order[r["id"]], r["sample"])) if problems else []
    return [trace_of(r, tokenizer, problems[order[r["id"]]], prompts[order[r["id"]]]) for r in records]


# ---------------------------------------------------------------------------------------------- the filter


@dataclass
class Example:
    """A trace that the filter keeps: its thought up to a cut, what ends the thought, an answer that is right."""

    number: int  # index of the trace among those of the iteration
    trace: Trace
    cut: int  # tokens of the thought that stay
    ending: list[int]
    answer: list[int]
    start: int = 0  # tokens of the trace that are not trained

    def fine_tuned(self) -> training.Example:
        """All from `start` on is trained, with weight 1."""
        written = self.trace.completion.token_ids[: self.cut] + self.ending + self.answer
        return self.trace.prompt + written, len(self.trace.prompt) + self.start, np.ones((1, len(written) - self.start))

    @property
    def episodes(self) -> int:
        return self.trace.boundaries.index(self.cut)

    @property
    def before(self) -> int:
        return self.trace.boundaries.index(self.start)

    def record(self, tokenizer) -> dict:
        ids, first, _ = self.fine_tuned()
        return {
            "id": self.trace.problem["id"],
            "trace": self.number,
            "cut": self.cut,
            "episodes": self.episodes,
            "J": self.trace.J[self.episodes],
            "J_empty": self.trace.J[0],
            "tokens": len(ids) - first,
            "text": tokenizer.decode(ids[first:]),
        }


def select(args, name: str, sampler: Sampler, traces: list[Trace], iteration: int) -> list[Example]:
    """What the filter keeps. One process decides for all: on GPUs two of them may draw different answers."""
    examples = []
    if ranks()[0] == 0:
        if name == "mrt" and args.parameterization == "backtracking":
            examples = keep_backtracks(sampler.tokenizer, traces, args.min_success)
        else:
            cuts = keep_right(traces) if name == "outcome" else keep_progress(traces, args.min_success)
            examples = add_answers(args, sampler, traces, cuts, iteration)
        examples = first_of_problem(examples, args.per_problem)
    return gather_over_ranks(examples)


def keep_right(traces: list[Trace]) -> dict[int, int]:
    """Plain STaR: {number: end of the thought} of every trace whose own answer is right and complete."""
    return {t: trace.boundaries[-1] for t, trace in enumerate(traces) if ends_right(trace)}


def why_dropped(args, name: str, traces: list[Trace]) -> str:
    """What became of the traces where a filter kept none, in counts."""
    if name == "outcome":
        return report.counted(report.fate_of(trace.record()) for trace in traces)
    if args.parameterization == "backtracking":
        counts = marker_counts(map(whole_text, traces))
        told = (
            f"{counts['without_marker']:.0%} have no marker, {counts['markers_to_no_line']:.0%} of the markers name no "
        )
        return (
            f"no backtrack of {len(traces)} traces has J of --min-success and then a right attempt: {told}line there is"
        )
    episodes = report.counted("of one episode" if len(trace.boundaries) <= 2 else "of several" for trace in traces)
    rising = [trace for trace in traces if max(trace.J) > trace.J[0]]
    low = sum(max(trace.J) < args.min_success for trace in rising)
    return (
        f"{episodes}; {len(traces) - len(rising)} where J never rises, {low} where it stays below --min-success, "
        f"{len(rising) - low} without a right and complete answer after the cut"
    )


def ends_right(trace: Trace) -> bool:
    """Its own answer is right and complete: a trace cut off after its box would teach the model not to end its turn."""
    return trace.reward == 1 and trace.ended


def keep_progress(traces: list[Trace], min_success: float) -> dict[int, int]:
    """MRT: {number: cut} of every trace with progress, best first. The cut is the first prefix with the highest J."""
    cuts = {}
    for t, trace in enumerate(traces):
        best = int(np.argmax(trace.J))  # MRT 7: the first of equals: all of the progress in the fewest tokens
        if trace.J[best] > trace.J[0] and trace.J[best] >= min_success:
            cuts[t] = trace.boundaries[best]
    return dict(sorted(cuts.items(), key=lambda c: (-max(traces[c[0]].J), c[1], c[0])))


def keep_backtracks(tokenizer, traces: list[Trace], min_success: float) -> list[Example]:
    """MRT for backtracking: of each trace the backtrack z_j with most progress of those that a right attempt follows;
    most progress first. The loss covers z_j, that attempt and the end of the turn."""
    kept, end = [], end_of_turn(tokenizer)
    for number, trace in enumerate(traces):
        J, ends = trace.J, trace.boundaries
        attempts = [extract_answer(text) is not None for text in episodes_of(trace)]
        good = [
            (J[j + 1] - J[j], -j)
            for j in range(1, len(attempts) - 1)
            if not attempts[j] and attempts[j + 1] and J[j + 2] == 1 and J[j + 1] > J[j] and J[j + 1] >= min_success
        ]
        if good:
            j = -max(good)[1]
            answer = trace.completion.token_ids[ends[j + 1] : ends[j + 2]] + ([] if end is None else [end])
            kept.append((max(good), Example(number, trace, ends[j + 1], [], answer, start=ends[j])))
    return [example for _, example in sorted(kept, key=lambda k: -k[0][0])]


def add_answers(args, sampler: Sampler, traces: list[Trace], cuts: dict[int, int], iteration: int) -> list[Example]:
    """Each cut trace with an ending and a right answer, the first of --forced-answers sampled after the ending; without
    those for which none is right."""
    examples = [begin_example(sampler.tokenizer, number, traces[number], cut) for number, cut in cuts.items()]
    asked = [example for example in examples if not example.answer]
    problems = [example.trace.problem for example in asked]
    prompts = [example.fine_tuned()[0] for example in asked]
    seeds = [(args.seed, CHOSEN, iteration, problem_key(example.trace.problem), example.number) for example in asked]
    rows = sampler.generate(prompts, args.answer_tokens, seeds, args.forced_answers, args.temperature, args.top_p)
    for example, completions, answers in zip(asked, rows, read_answers(sampler.tokenizer, problems, rows)):
        ended = [(c, answer) for c, answer in zip(completions, answers) if c.finish_reason == "stop"]
        example.answer = next((c.token_ids for c, answer in ended if answer.verdict == "right"), [])
    return [example for example in examples if example.answer]


def begin_example(tokenizer, number: int, trace: Trace, cut: int) -> Example:
    """Between a cut thought and its answer, still to be sampled, stands the end-of-thinking marker. A complete thought
    with a right answer stays as it is."""
    if trace.finished and cut == trace.boundaries[-1] and ends_right(trace):
        return Example(number, trace, cut, [], trace.completion.token_ids[cut:])
    return Example(number, trace, cut, end_of_thought(tokenizer, trace.prompt, trace.prefix(cut)), [])


def first_of_problem(examples: list[Example], count: int) -> list[Example]:
    """The first `count` of each problem."""
    taken, kept = Counter(), []
    for example in examples:
        taken[example.trace.problem["id"]] += 1
        if taken[example.trace.problem["id"]] <= count:
            kept.append(example)
    return kept


def count_kept(traces: list[Trace], examples: list[Example]) -> dict:
    """What a filter kept, in numbers, which it also prints."""
    tokens, episodes = [e.fine_tuned()[2].size for e in examples], [e.episodes - e.before for e in examples]
    progress = sum(e.trace.J[e.episodes] - e.trace.J[e.before] for e in examples) / max(1, sum(episodes))
    problems, mean = len({e.trace.problem["id"] for e in examples}), float(np.mean(tokens or [0]))
    print(
        f"kept {len(examples)} of {plural(len(traces), 'trace')}, {plural(problems, 'problem')}, "
        f"{mean:.0f} tokens on average, "
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
    kept = {name: [about for file in files[name] if (about := folder.parsed(file))] for name in names}
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
        text += f"\nOn {plural(problems, 'held-out problem')} × {args.num_samples}:\n\n" + report.metric_table(
            summary["models"]
        )
        text += report.difference_table(summary["difference_to_base"], "the base on the same problems")
        last = [f"{title} {args.iterations}" for title in TITLES.values()]
        if all(model in values for model in last):
            (difference,) = report.differences_to_first({model: values[model] for model in last}).values()
            summary["mrt_minus_star"] = difference
            text += f"\nAfter {plural(args.iterations, 'iteration')}:\n\n"
            text += report.metric_table({"MRT-STaR - STaR": difference}, "+")
        draw(args, summary, run)
        records = folder.load_records([file for file in evaluations.values() if file.exists()][-1])
        report.write_page(records, run / "trace.html")
        text += report.why_zero(records)
    models_made = sorted(run.glob("*/model_*"))
    report.write_summary(run, summary, text, *models_made, run / "star.png", run / "trace.html")


def values_of(args, file: Path) -> Values:
    """Each metric for each held-out problem."""
    records = folder.load_records(file)
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
    end_in_one_line(main)
