"""evaluate.py: how often is a model right, after how many tokens, and how well does it use them? (Section 8)

    python evaluate.py --metric pass@k                            # the embedded model on its test problems
    python evaluate.py --model runs/NAME/model --metric all       # pass@k, maj@k and normalised regret
    python evaluate.py --model A,B --dataset aime.jsonl,amc.jsonl # every model on every data set, one table (Table 1)
    python evaluate.py --compare runs/A runs/B                    # table and figures from earlier evaluations' records

Metrics: pass@1 (mean over samples), pass@k (unbiased), maj@k (exact, ties count ½), and with `--metric regret` or `all`
the normalised regret (Figure 9) from answers forced at every episode boundary of every trace. Every number has a 95 %
interval from a bootstrap over problems, which holds the noise of a problem's samples too; differences between models
are paired on the same problems.
"""

from run.files import append_jsonl, end_in_one_line, fail  # isort: split

import argparse
from pathlib import Path

import numpy as np

from engine.sampler import Sampler, pick_engine
from run import data, folder, report
from run.flags import add_group, changed, default_out, each_in_its_folder, new_parser, numbers, parse_flags, quarters
from run.folder import RecordedRun, short_name
from run.report import Curve, Panel, Values, group_by_problem, interval, mean_interval, problem_means
from run.traces import (
    AXES,
    accuracy_at,
    checked_prompts,
    inputs_of,
    new_traces,
    pass_rate,
    regret_at,
    sampler_of,
    segmentation,
    tokenizer_of,
    vote_of,
)

SAME = ("split", "max_tokens", "temperature", "top_p", "forced_answers", "max_episodes")  # of runs to be compared
SCORES = ("pass@k", "maj@k")
# Settings that may change between a run and its --resume.
MAY_CHANGE = ("metric", "k", "budgets", "regret_axis", "num_samples", "compare", "limit")


def flags(argv=None) -> argparse.Namespace:
    # Each flag: name, default with the embedded model, with any other, where the latter comes from.
    parser = new_parser(
        __doc__,
        dataset=("tiny", "HuggingFaceH4/aime_2024", "the first of Table 1"),
        split=("test", "test", "a set with one split is taken whatever it is called"),
        limit=(),
    )
    flag = add_group(parser, "sampling")
    flag("num-samples", 8, 20, "the paper")
    flag("max-tokens", 256, 16384, "the paper")
    flag("temperature", 1.0, 0.6, "the authors' scripts of the regret")
    flag("top-p", 1.0, 0.95, "the authors' scripts of the regret")
    flag("batch-problems", 64, 4, "ours")
    flag = add_group(parser, "forced answers, for the regret")
    flag("forced-answers", 4, 4, "ours")
    flag("answer-tokens", 8, 1024, "ours")
    flag("max-episodes", 32, 16, "ours; the authors' regret study joins episodes by tens")
    flag("budgets")
    flag = add_group(parser, "evaluation")
    dear = "metrics to report (default: pass@k); regret and all force answers at every episode, at many times the cost"
    flag("metric", choices=("pass@1", "pass@k", "maj@k", "regret", "all"), help=dear)
    flag("regret-axis", "answer", "answer", "the authors: prompt", choices=tuple(AXES))
    flag("k", help="k of pass@k and maj@k, as 1,2,4 (default: powers of 2 up to the samples)")
    flag("compare", type=Path, nargs="+", metavar="RUN", help="earlier evaluations; the first is the base")
    args = parse_flags(parser, argv)
    names = map(short_name, map(str, args.compare or []))
    name = f"compare-{'-'.join(names)}" if args.compare else f"eval-{label(args.model, args.dataset)}"
    args.out = args.out or default_out(args, name, *MAY_CHANGE)
    args.metric = args.metric or ("all" if args.compare else "pass@k")
    args.k = numbers("--k", args.k) if args.k else []
    if not args.compare and max(args.k, default=1) > args.num_samples:
        fail(f"--k {max(args.k)}: more than the {args.num_samples} samples of a problem")
    return args


def label(model: str, dataset: str) -> str:
    """A short name of a model on a data set: `tiny-tiny`, `NAME-aime2024` for runs/NAME/model."""
    return f"{short_name(model)}-{short_name(dataset)}"


def main() -> None:
    args = flags()
    if args.compare:
        compare(args, args.compare)
        return
    if args.dry_run:
        tell_plan(args)
        return
    args.engine = pick_engine(args.engine)
    pairs = [(model, dataset) for model in args.model.split(",") for dataset in args.dataset.split(",")]
    settings = [{"model": model, "dataset": dataset} for model, dataset in pairs]
    evaluations = each_in_its_folder(args, [label(*pair) for pair in pairs], settings)
    for one in evaluations:  # what can be refused at once is, before anything large is fetched
        folder.check_out(one, *MAY_CHANGE)
        tokenizer_of(one)
    datasets = dict.fromkeys(one.dataset for one in evaluations)
    problems = {dataset: data.problems_of(changed(args, dataset=dataset)) for dataset in datasets}
    for model in dict.fromkeys(one.model for one in evaluations):
        evaluate_model([one for one in evaluations if one.model == model], problems)
    if len(evaluations) > 1:
        compare(args, [one.out for one in evaluations])


def tell_plan(args) -> None:
    """--dry-run: what all models on all data sets cost at most."""
    problems = sum(len(data.problems_of(changed(args, dataset=dataset))) for dataset in args.dataset.split(","))
    traces = problems * args.num_samples * len(args.model.split(","))
    forced = traces * (args.max_episodes + 1) * args.forced_answers * forces(args)
    work = ("trace", traces, args.max_tokens), ("forced answer", forced, args.answer_tokens)
    report.tell_plan(args.dry_run, problems, *work)


def evaluate_model(evaluations: list[argparse.Namespace], problems: dict[str, list[dict]]) -> None:
    """One model, loaded once, on every data set: samples, then summary.json and summary.md."""
    first = evaluations[0]
    tokenizer = tokenizer_of(first)
    forced = forces(first)
    prompts = {
        one.dataset: checked_prompts(one, tokenizer, problems[one.dataset], forced=forced) for one in evaluations
    }
    sampler = sampler_of(first, tokenizer, max(longest for _, longest in prompts.values()))
    for one in evaluations:
        inputs = inputs_of(one, problems[one.dataset], prompts[one.dataset][0])
        run = folder.open_run(one, inputs, *MAY_CHANGE)
        records = sample(one, run / "records.jsonl", sampler, problems[one.dataset], prompts[one.dataset][0])
        summary = summarise(records, problem_values(one, records))
        drawn = draw(one, run, [RecordedRun(run.name, vars(one), records)])
        page = report.write_page(records, run / "trace.html")
        text = table_of({run.name: summary}, {}) + report.why_zero(records)
        report.write_summary(run, summary, text, run / "records.jsonl", *drawn, page)
    sampler.close()


def forces(args) -> bool:
    """Does the metric need forced answers?"""
    return args.metric in ("regret", "all")


def sample(args, file: Path, sampler: Sampler, problems: list[dict], prompts: list[list[int]]) -> list[dict]:
    """The records, one a trace, in the order of the problems. What is recorded already is not made again: a run goes on
    where it stopped, and more samples are added to those there."""
    forced = forces(args)
    if forced and file.exists() and not all(r["J"] for r in folder.load_records(file)):
        fail(f"--metric {args.metric}: the records in {file} were made without forced answers; use another --out")
    for traces in new_traces(args, file, sampler, problems, prompts, segmentation(args), forced=forced):
        append_jsonl(file, [trace.record() for trace in traces])
    order = {problem["id"]: number for number, problem in enumerate(problems)}
    records = [record for record in folder.load_records(file) if record["id"] in order]
    return sorted(records, key=lambda r: (order[r["id"]], r["sample"]))


# ---------------------------------------------------------------------------------------------- numbers


def problem_values(args, records: list[dict]) -> Values:
    """Each metric's value for each problem, in the order of the records."""
    groups = group_by_problem(records).values()
    n = min(map(len, groups))
    if max(args.k, default=1) > n:
        fail(f"--k {max(args.k)}: more than the {n} samples of a problem")
    ks = [k for k in args.k or [2**i for i in range(n.bit_length())] if 1 < k <= n]
    values = {"pass@1": problem_means(records, lambda r: r["reward"])}
    if args.metric in ("pass@k", "all"):
        values |= {f"pass@{k}": np.array([pass_rate(group, k) for group in groups]) for k in ks}
    if args.metric in ("maj@k", "all"):
        values |= {f"maj@{k}": np.array([vote_of(group, k) for group in groups]) for k in ks}
    values["tokens"] = problem_means(records, lambda r: r["tokens"])
    if forces(args) and all(r["J"] for r in records):
        values |= {f"regret@{b}": problem_means(records, regret_at, b, args.regret_axis) for b in args.budgets}
        values |= {f"forced@{b}": problem_means(records, accuracy_at, b, args.regret_axis) for b in args.budgets}
    return values


def summarise(records: list[dict], values: Values) -> dict:
    """Every metric with its 95 % interval, from `problem_values`; counts; what went wrong."""
    metrics, counts = {name: interval(of_problems) for name, of_problems in values.items()}, report.counts_of(records)
    progress = [change for r in records for change in np.diff(r["J"])]
    return {
        **counts,
        "progress_per_episode": float(np.mean(progress)) if progress else None,
        "metrics": metrics,
    }


def table_of(summaries: dict[str, dict], differences: dict[str, dict]) -> str:
    """One column a run: each metric with its interval, the counts; then the differences to the first run."""
    text = report.metric_table({name: summary["metrics"] for name, summary in summaries.items()})
    for name in report.COUNTS:
        digits = 1 if name.endswith("tokens") else 3
        text += report.table_row(name.replace("_", " "), *(f"{s[name]:.{digits}f}" for s in summaries.values()))
    for name in ("problems", "samples"):
        text += report.table_row(name, *(str(summary[name]) for summary in summaries.values()))
    first = next(iter(summaries))
    return text + report.difference_table(differences, f"{first} on the same {summaries[first]['problems']} problems")


# ---------------------------------------------------------------------------------------------- comparison


def compare(args, folders: list[Path]) -> None:
    """Tables, paired differences and figures from records alone; one section a data set, and a table of all."""
    recorded = report.read_runs(folders, "reward", "verdict", "boundaries", AXES[args.regret_axis])
    for flag in report.differing_flags(recorded, SAME):
        print(f"warning: the runs differ in {flag}")
    args.budgets = args.budgets or quarters(max(run.settings["max_tokens"] for run in recorded))
    datasets = list(dict.fromkeys(run.settings["dataset"] for run in recorded))
    text, summary, figures = "", {}, []
    args.out.mkdir(parents=True, exist_ok=True)
    by_dataset = {dataset: [run for run in recorded if run.settings["dataset"] == dataset] for dataset in datasets}
    for alike in by_dataset.values():
        report.keep_shared_problems(alike)
    if len(datasets) > 1:
        text = table_of_datasets(recorded, datasets) + "\n"
    for dataset, alike in by_dataset.items():
        stem = "" if len(datasets) == 1 else short_name(dataset) + "-"
        part, summary[dataset], drawn = compare_on_one(args, alike, stem)
        text += ("" if len(datasets) == 1 else f"## {dataset}\n\n") + part + "\n"
        figures += drawn
    report.write_summary(args.out, summary, text, *figures)


def compare_on_one(args, recorded: list[RecordedRun], stem: str) -> tuple[str, dict, list[Path]]:
    """(Markdown, summary, figures) of runs on the same problems; differences are to the first run."""
    values = {run.name: problem_values(args, run.records) for run in recorded}
    summaries = {run.name: summarise(run.records, values[run.name]) for run in recorded}
    differences = report.differences_to_first(values)
    text = table_of(summaries, differences)
    curves = {run.name: efficiency(run.records) for run in recorded}
    figures = draw(args, args.out, recorded, stem)
    base, *others = curves
    ratios = {name: {metric: token_ratio(curves[base], curves[name], metric) for metric in SCORES} for name in others}
    for name, ratios_of_run in ratios.items():
        for metric, r in ratios_of_run.items():
            text += f"\nFor {metric} = {r['at']:.3f} {base} needs {r['ratio']:.2f} times the tokens of {name} "
            text += f"[{r['low']:.2f}, {r['high']:.2f}].\n"
    text += "".join(f"\n{run.name}: {why}" for run in recorded if (why := report.why_zero(run.records)))
    return text, {"runs": summaries, "difference_to_first": differences, "token_ratio_to_first": ratios}, figures


def efficiency(records: list[dict]) -> dict[str, np.ndarray]:
    """Tokens and scores of k = 1 … n samples, for each problem: {"tokens", "pass@k", "maj@k"}: [problems, ks]."""
    groups = group_by_problem(records).values()
    n = min(map(len, groups))
    ks = sorted({k for i in range(n.bit_length()) for k in (2**i, 3 * 2**i) if k <= n} | {n})
    return {
        "tokens": np.outer(problem_means(records, lambda r: r["tokens"]), ks),
        "pass@k": np.array([[pass_rate(group, k) for k in ks] for group in groups]),
        "maj@k": np.array([[vote_of(group, k) for k in ks] for group in groups]),
    }


def token_ratio(base: dict[str, np.ndarray], other: dict[str, np.ndarray], metric: str) -> dict:
    """Tokens the base needs over tokens the other needs for the highest score that both reach (Section 8, "token
    efficiency"), with a bootstrap over the problems they share; above 1 the other is more efficient."""

    def ratio(chosen) -> tuple[float, float]:
        curves = [(curve["tokens"][chosen].mean(0), curve[metric][chosen].mean(0)) for curve in (base, other)]
        target = min(scores.max() for _, scores in curves)
        return report.tokens_to_reach(target, *curves[0]) / report.tokens_to_reach(target, *curves[1]), target

    count = len(base["tokens"])
    low, high = np.quantile([ratio(pick)[0] for pick in report.bootstrap_picks(count, draws=1000)], [0.025, 0.975])
    value, target = ratio(np.arange(count))
    return {"at": float(target), "ratio": value, "low": float(low), "high": float(high)}


def table_of_datasets(recorded: list[RecordedRun], datasets: list[str]) -> str:
    """pass@1 of every model on every data set and the average over data sets, as in Table 1. The average's interval
    comes from independent bootstraps of the data sets."""
    right: dict[str, dict[str, np.ndarray]] = {}
    for run in recorded:
        of_model, dataset = right.setdefault(run.settings["model"], {}), run.settings["dataset"]
        if dataset in of_model:
            fail(f"--compare: two runs of {run.settings['model']} on {dataset}; a table of several data sets has one")
        of_model[dataset] = problem_means(run.records, lambda r: r["reward"])
    names = {model: short_name(model) for model in right}
    rows = []
    for model, values in right.items():
        average = None
        if len(values) == len(datasets):
            draws = [v[report.bootstrap_picks(len(v), seed=i)].mean(1) for i, v in enumerate(values.values())]
            low, high = np.quantile(np.mean(draws, 0), [0.025, 0.975])
            average = {"mean": np.mean([v.mean() for v in values.values()]), "low": low, "high": high}
        means = [interval(values[dataset]) if dataset in values else None for dataset in datasets]
        name = names[model] if len(set(names.values())) == len(names) else model
        rows.append([name, *map(report.cell, [*means, average])])
    return report.markdown(["pass@1", *datasets, "average"], rows)


# ---------------------------------------------------------------------------------------------- pictures


def draw(args, out: Path, recorded: list[RecordedRun], stem: str = "") -> list[Path]:
    """The figures of runs; the first needs forced answers."""
    figures = [draw_efficiency(out / f"{stem}efficiency.png", recorded)]
    if all(r["J"] for run in recorded for r in run.records):
        figures.insert(0, draw_anytime(args, out / f"{stem}anytime.png", recorded))
    return figures


def draw_anytime(args, file: Path, recorded: list[RecordedRun]) -> Path:
    """Accuracy of an answer forced within each budget, and the normalised regret, roughly the area above it."""
    top = max(run.settings["max_tokens"] for run in recorded)
    accuracy, regret, grid = [], [], [top * (i + 1) / 32 for i in range(32)]
    for run in recorded:
        forced = [mean_interval(run.records, accuracy_at, budget, args.regret_axis) for budget in grid]
        accuracy.append(Curve(grid, forced, run.name, "-"))
        missed = [mean_interval(run.records, regret_at, budget, args.regret_axis) for budget in args.budgets]
        regret.append(Curve(args.budgets, missed))
    panels = report.anytime_panels(accuracy, regret)
    return report.draw_panels(file, *panels, width=4.2)


def draw_efficiency(file: Path, recorded: list[RecordedRun]) -> Path:
    """pass@k and maj@k against the tokens of k samples (Figure 7)."""
    panels, curves_of = [], {run.name: efficiency(run.records) for run in recorded}
    for metric in SCORES:
        curves = [
            Curve(curve["tokens"].mean(0), [interval(column) for column in curve[metric].T], name, ".-")
            for name, curve in curves_of.items()
        ]
        panels.append(Panel({"xlabel": "tokens of k samples", "ylabel": metric}, curves, tokens=True))
    return report.draw_panels(file, *panels, width=4.2, sharey=True)


if __name__ == "__main__":
    end_in_one_line(main)
