"""evaluate.py: how often is a model right, after how many tokens, and how well does it use them? (Section 7)

    python evaluate.py --metric pass@k                            # the embedded model on its test problems
    python evaluate.py --model runs/NAME/model --metric all       # pass@k, maj@k and normalised regret
    python evaluate.py --model A,B --dataset aime.jsonl,amc.jsonl # every model on every data set, one table (Table 1)
    python evaluate.py --compare runs/A runs/B                    # table and figures from earlier evaluations' records

Metrics: pass@1 (mean over samples), pass@k (unbiased), maj@k (exact, ties count ½), and with `--metric regret` or `all`
the normalised regret (Section 7) from answers forced at every episode boundary of every trace. Every number has a 95 %
interval from a bootstrap over problems, which holds the noise of a problem's samples too; differences between models
are paired on the same problems.
"""

import argparse
import contextlib
import copy
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean

import numpy as np

import common
from common import ForcedAnswers, Sampler, Trace, fail

# flag: (default with the embedded model, with any other model, where the latter comes from)
DEFAULTS = {
    "dataset": ("tiny", "HuggingFaceH4/aime_2024", "Table 1"),
    "split": ("test", "test", "a set with one split is taken whatever it is called"),
    "num_samples": (8, 20, "Table 1"),
    "max_tokens": (256, 16384, "Table 1"),
    "temperature": (1.0, 0.6, "Appendix F"),
    "top_p": (1.0, 0.95, "Appendix F"),
    "answer_tokens": (8, 1024, "ours"),
    "budgets": ("64,128,192,256", "4096,8192,12288,16384", "Section 7"),
    "max_episodes": (32, 16, "ours; the authors' regret study joins episodes by tens"),
    "batch_problems": (64, 4, "ours"),
}


def flags(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_common_flags(parser)
    what = parser.add_argument_group("evaluation")
    what.add_argument("--metric", choices=("pass@1", "pass@k", "maj@k", "regret", "all"), default="all")
    what.add_argument("--k", help="k of pass@k and maj@k, as 1,2,4 (default: powers of 2 up to --num-samples)")
    what.add_argument(
        "--vote",
        choices=("plain", "likelihood"),
        default="plain",
        help="maj@k: votes count 1, or 2^(mean token log-prob) as in the paper's analysis",
    )
    what.add_argument("--num-samples", type=common.positive_int)
    what.add_argument("--max-tokens", type=common.positive_int, help="budget of a completion, thought and answer")
    what.add_argument("--temperature", type=common.non_negative)
    what.add_argument("--top-p", type=float)
    what.add_argument(
        "--forced-answers", type=common.positive_int, default=4, help="answers a boundary, for the regret"
    )
    what.add_argument("--answer-tokens", type=common.positive_int, help="limit of a forced answer")
    what.add_argument("--max-episodes", type=common.positive_int, help="longer thoughts: neighbours are joined")
    what.add_argument("--budgets", help="token budgets C0 of the normalised regret")
    what.add_argument("--batch-problems", type=common.positive_int, help="problems sampled and recorded together")
    what.add_argument(
        "--compare", type=Path, nargs="+", metavar="RUN", help="earlier evaluations; the first is the base"
    )
    args = common.parse_flags(parser, DEFAULTS, argv)
    args.out = args.out or Path("runs") / ("compare" if args.compare else f"eval-{label(args.model, args.dataset)}")
    args.k = args.k or ",".join(str(2**i) for i in range(args.num_samples.bit_length()))
    args.k, args.budgets = common.numbers("--k", args.k), common.numbers("--budgets", args.budgets)
    if not args.compare and max(args.k) > args.num_samples:
        fail(f"--k {max(args.k)}: more than the {args.num_samples} samples of a problem")
    return args


def label(model: str, dataset: str) -> str:
    """A short name of a model on a data set: `tiny-tiny`, `NAME-aime2024` for runs/NAME/model."""
    return f"{common.short_name(model)}-{common.short_name(dataset)}"


def main() -> None:
    args = flags()
    if args.compare:
        compare(args, args.compare)
        return
    args.engine = common.pick_engine(args.engine)
    models, datasets = args.model.split(","), args.dataset.split(",")
    todo: dict[str, list[argparse.Namespace]] = {model: [] for model in models}
    if len(models) * len(datasets) > 1:
        common.check_out_of_many(args.out)
    for model in todo:  # what can be refused at once is, before anything large is fetched
        for dataset in datasets:
            one = copy.copy(args)
            one.model, one.dataset = model, dataset
            one.out = args.out if len(models) == len(datasets) == 1 else args.out / label(model, dataset)
            common.check_out(one.out, lasting_settings(one), one.resume, one.overwrite)
            todo[model].append(one)
        common.load_tokenizer(model)
    folders = [one.out for evaluations in todo.values() for one in evaluations]
    if len(set(folders)) < len(folders):
        fail(f"--model {args.model}: two of them would have the same folder {max(folders, key=folders.count)}")
    problems = {name: common.load_problems(name, args.split, args.limit) for name in datasets}
    runs = []
    for name, evaluations in todo.items():
        tokenizer, longest = common.load_tokenizer(name), 0
        prompts = {d: [common.prompt_ids(tokenizer, p["problem"], args.chat_template_kwargs) for p in problems[d]] for d in datasets}
        for one in evaluations:
            longest = max(longest, common.check_lengths(one, tokenizer, problems[one.dataset], prompts[one.dataset]))
        sampler = common.open_sampler(evaluations[0], tokenizer, longest)
        runs += [evaluate(one, sampler, problems[one.dataset], prompts[one.dataset]) for one in evaluations]
        sampler.close()
    if len(runs) > 1:
        compare(args, runs)


def lasting_settings(args) -> dict:
    """Without those that may differ when a run is continued."""
    volatile = ("config", "batch_problems", "metric", "k", "budgets", "num_samples", "compare", "limit", "vote")
    return {k: v for k, v in vars(args).items() if k not in volatile}


def evaluate(args, sampler: Sampler, problems: list[dict], prompts: list[list[int]]) -> Path:
    """One model on one data set; returns the folder of the run."""
    run = common.open_run(args.out, lasting_settings(args), args.resume, args.overwrite)
    common.same_inputs(run, problems, args.model)
    sample(args, run, sampler, problems, prompts)
    by_id = {r["id"]: r for r in common.load_records(run)}
    records = [by_id[p["id"]] for p in problems]
    summary = summarise(args, records, per_problem(args, records))
    common.write_json(run / "summary.json", summary)
    table = markdown_table({args.out.name: summary})
    common.write_text(run / "summary.md", table)
    print(table)
    print(f"records: {run / 'records.jsonl'}   summary: {run / 'summary.json'}")
    return run


# ---------------------------------------------------------------------------------------------- sampling


def sample(args, run: Path, sampler: Sampler, problems: list[dict], prompts: list[list[int]]) -> None:
    """Writes one record a problem, as each batch of problems is done. Samples that are recorded already are not made
    again: a run goes on where it stopped, and more samples are added to those there."""
    file = run / "records.jsonl"
    recorded = common.load_records(run) if file.exists() else []
    if args.metric in ("regret", "all") and any(not s["J"] for r in recorded for s in r["samples"]):
        fail(f"--metric {args.metric}: the records in {run} were made without forced answers; use another --out")
    have = {r["id"]: len(r["samples"]) for r in recorded}
    counts = [have.get(p["id"], 0) for p in problems]
    todo = [i for i, c in enumerate(counts) if c < args.num_samples]
    total, clock = len(todo), common.Clock(len(todo), "problems", sampler)
    while todo:
        some = [i for i in todo if counts[i] == counts[todo[0]]][: args.batch_problems]
        todo = [i for i in todo if i not in some]
        missing = args.num_samples - counts[some[0]]
        groups = common.sample_traces(args, sampler, [problems[i] for i in some], [prompts[i] for i in some], missing,
                                      counts[some[0]], max_episodes=args.max_episodes)  # fmt: skip
        traces = [trace for group in groups for trace in group]
        if args.metric in ("regret", "all"):
            how = ForcedAnswers("sampled", args.forced_answers, args.answer_tokens, args.temperature, args.top_p)
            common.success_rates(sampler, traces, how, (args.seed, 1))
        common.append_jsonl(file, [record(group) for group in groups])
        clock.tell(total - len(todo))


def record(group: list[Trace]) -> dict:
    problem = group[0].problem
    return {
        **problem,
        "samples": [
            {
                "answer": common.extract_answer(t.answer or ""),
                "right": t.reward,
                "verdict": t.verdict,
                "finish": t.completion.finish_reason,
                "thought_tokens": t.boundaries[-1],
                "tokens": len(t.completion.token_ids),
                "mean_logprob": float(np.mean(t.completion.logprobs)),
                "boundaries": t.boundaries,
                "J": t.values,
                "answer_tokens": t.answer_tokens,
                "text": t.completion.text,
            }
            for t in group
        ],
    }


# ---------------------------------------------------------------------------------------------- numbers


def per_problem(args, records: list[dict]) -> dict[str, list[float]]:
    """Each metric's value for each problem, in the order of the records."""
    values: dict[str, list[float]] = {"pass@1": [mean(s["right"] for s in r["samples"]) for r in records]}
    ks = [k for k in args.k if 1 < k <= min(len(r["samples"]) for r in records)]
    if args.metric in ("pass@k", "all"):
        for k in ks:
            values[f"pass@{k}"] = [pass_at_k(r, k) for r in records]
    if args.metric in ("maj@k", "all"):
        for k in ks:
            values[f"maj@{k}"] = [maj_at_k(r, k, args.vote) for r in records]
    values["tokens"] = [mean(s["tokens"] for s in r["samples"]) for r in records]
    if args.metric in ("regret", "all") and all(s["J"] for r in records for s in r["samples"]):
        for budget in args.budgets:
            values[f"regret@{budget}"] = [mean(common.regret_at(s, budget) for s in r["samples"]) for r in records]
        for budget in args.budgets:
            values[f"forced@{budget}"] = [mean(common.accuracy_at(s, budget) for s in r["samples"]) for r in records]
    return values


def pass_at_k(record: dict, k: int) -> float:
    return common.pass_at_k(len(record["samples"]), int(sum(s["right"] for s in record["samples"])), k)


def maj_at_k(record: dict, k: int, vote: str) -> float:
    """maj@k of one problem; answers vote together if they are equal mathematically."""
    samples = record["samples"]
    if "classes" not in record:
        record["classes"] = common.group_answers([s["answer"] for s in samples], record["answer"])
    weights = [2 ** s["mean_logprob"] for s in samples] if vote == "likelihood" else None
    return common.vote_at_k(record["classes"], k, weights)


def summarise(args, records: list[dict], values: dict[str, list[float]]) -> dict:
    """Every metric with its 95 % interval, from `per_problem`'s values; counts; what went wrong."""
    samples = [s for r in records for s in r["samples"]]
    metrics = {name: common.interval(of_problems) for name, of_problems in values.items()}
    n = max(len(r["samples"]) for r in records)
    for name, metric in metrics.items():
        if name.startswith("maj@") and args.vote == "likelihood" and math.comb(n, int(name[4:])) > common.EXACT_SUBSETS:
            metric["draw_error"] = 0.5 / math.sqrt(common.SUBSET_DRAWS * len(records))  # of drawing subsets, at most
    progress = [np.diff(s["J"]) for s in samples if len(s["J"]) > 1]
    return {
        "problems": len(records),
        "samples": len(samples),
        "truncated": float(np.mean([s["finish"] == "length" for s in samples])),
        "no_answer": float(np.mean([s["verdict"] == "none" for s in samples])),
        "timed_out": float(np.mean([s["verdict"] == "timeout" for s in samples])),
        "thought_tokens": float(np.mean([s["thought_tokens"] for s in samples])),
        "answer_tokens": float(np.mean([s["tokens"] - s["thought_tokens"] for s in samples])),
        "progress_per_episode": float(np.concatenate(progress).mean()) if progress else None,
        "vote": args.vote,
        "metrics": metrics,
    }


COUNTS = ("truncated", "no_answer", "timed_out", "thought_tokens", "answer_tokens", "problems", "samples")


def markdown_table(summaries: dict[str, dict]) -> str:
    """One column a run; each metric with its interval, then the counts."""
    rows = []
    for name in next(iter(summaries.values()))["metrics"]:
        if all(name in s["metrics"] for s in summaries.values()):
            digits = 1 if name == "tokens" else 3
            rows.append([name, *(common.cell(s["metrics"][name], digits) for s in summaries.values())])
    for name in COUNTS:
        digits = 1 if name.endswith("tokens") else 3
        cells = [s[name] for s in summaries.values()]
        rows.append([name.replace("_", " "), *(str(c) if isinstance(c, int) else f"{c:.{digits}f}" for c in cells)])
    return common.markdown(["", *summaries], rows)


# ---------------------------------------------------------------------------------------------- comparison


def compare(args, runs: list[Path]) -> None:
    """Tables, paired differences and figures from records alone; one section a data set, and a table of all."""
    of_dataset: dict[str, dict[str, list[dict]]] = {}
    settings, loaded, names = {}, {}, common.run_names(runs)
    for run in runs:
        settings[run], rows = (common.config_of(run) or {}).get("settings", {}), []
        with contextlib.suppress(OSError, ValueError, KeyError):
            rows = common.load_records(run)
        if not rows or "top_p" not in settings[run]:
            fail(f"--compare {run}: no records.jsonl and config.json of an evaluation there")
        of_dataset.setdefault(settings[run]["dataset"], {})[names[run]] = loaded[run] = rows
    for setting in ("split", "max_tokens", "temperature", "top_p", "forced_answers", "max_episodes"):
        if len({str(of[setting]) for of in settings.values()}) > 1:
            print(f"warning: the runs differ in --{setting.replace('_', '-')}")
    top = max(of["max_tokens"] for of in settings.values())
    text, summary, figures = "", {}, []
    for dataset, records in of_dataset.items():
        shared = set.intersection(*({(r["id"], r["problem"]) for r in rows} for rows in records.values()))
        if not shared:
            fail(f"--compare: the runs on {dataset} have no problem in common")
        records = {
            name: sorted((r for r in rows if (r["id"], r["problem"]) in shared), key=lambda r: r["id"])
            for name, rows in records.items()
        }
        heading = "" if len(of_dataset) == 1 else f"## {dataset}\n\n"
        curves = {name: efficiency(args, rows) for name, rows in records.items()}
        part, summary[dataset] = compare_on_one(args, records, curves)
        text += heading + part + "\n"
        stem = "" if len(of_dataset) == 1 else common.short_name(dataset) + "-"
        args.out.mkdir(parents=True, exist_ok=True)
        figures += [draw_anytime(args, records, top, stem), draw_efficiency(args, curves, stem)]
    if len(of_dataset) > 1:
        by_model: dict[str, dict[str, list[dict]]] = {}
        for run, of in settings.items():
            by_model.setdefault(of["model"], {})[of["dataset"]] = loaded[run]
        if len({common.short_name(model) for model in by_model}) == len(by_model):
            by_model = {common.short_name(model): of for model, of in by_model.items()}
        text = table_of_datasets(by_model, list(of_dataset)) + "\n" + text
    common.write_json(args.out / "summary.json", summary)
    common.write_text(args.out / "summary.md", text)
    print(text)
    print(f"table: {args.out / 'summary.md'}   figures: {', '.join(str(path) for path in figures if path)}")


@dataclass
class Efficiency:
    """One model's tokens and accuracy with k = 1 … n samples, for each problem: arrays [problems, n]."""

    tokens: np.ndarray
    scores: dict[str, np.ndarray]  # "pass@k", "maj@k"


def efficiency(args, rows: list[dict]) -> Efficiency:
    n = min(len(r["samples"]) for r in rows)
    ks = sorted({k for i in range(n.bit_length()) for k in (2**i, 3 * 2**i) if k <= n} | {n})
    passed = np.array([[pass_at_k(r, k) for k in ks] for r in rows])
    voted = np.array([[maj_at_k(r, k, args.vote) for k in ks] for r in rows])
    tokens = np.outer([np.mean([s["tokens"] for s in r["samples"]]) for r in rows], ks)
    return Efficiency(tokens, {"pass@k": passed, "maj@k": voted})


def compare_on_one(args, records: dict[str, list[dict]], curves: dict[str, Efficiency]) -> tuple[str, dict]:
    """(Markdown, summary) of runs on the same problems; differences are to the first run."""
    values = {name: per_problem(args, rows) for name, rows in records.items()}
    summaries = {name: summarise(args, rows, values[name]) for name, rows in records.items()}
    text = markdown_table(summaries)
    base, *others = records
    differences: dict[str, dict] = {name: {} for name in others}
    for name in others:
        for metric in values[base]:
            if metric in values[name]:
                gap = np.array(values[name][metric]) - np.array(values[base][metric])
                differences[name][metric] = common.interval(gap)
    if others:
        text += f"\nDifference to {base} on the same {len(records[base])} problems:\n\n"
        rows = []
        for metric in values[base]:
            digits = 1 if metric == "tokens" else 3
            cells = [common.cell(differences[n][metric], digits, "+") if metric in differences[n] else "–"
                     for n in others]  # fmt: skip
            rows.append([metric, *cells])
        text += common.markdown(["", *others], rows)
    ratios = {name: {m: token_ratio(curves[base], curves[name], m) for m in curves[base].scores} for name in others}
    for name, of in ratios.items():
        for metric, r in of.items():
            text += (
                f"\nFor {metric} = {r['at']:.3f} {base} needs {r['ratio']:.2f} times the tokens of {name} "
                f"[{r['low']:.2f}, {r['high']:.2f}].\n"
            )
    return text, {"runs": summaries, "difference_to_first": differences, "token_ratio_to_first": ratios}


def table_of_datasets(by_model: dict[str, dict[str, list[dict]]], datasets: list[str]) -> str:
    """pass@1 of every model on every data set and the average over data sets, as in Table 1. The average's interval
    comes from independent bootstraps of the data sets."""
    table = []
    for model, mine in by_model.items():
        values = {d: [np.mean([s["right"] for s in r["samples"]]) for r in rows] for d, rows in mine.items()}
        cells = [common.cell(common.interval(values[d])) if d in values else "–" for d in datasets]
        if len(values) == len(datasets):
            rng = np.random.default_rng(0)
            draws = [np.array(v)[rng.integers(len(v), size=(2000, len(v)))].mean(1) for v in values.values()]
            low, high = np.quantile(np.mean(draws, 0), [0.025, 0.975])
            cells.append(
                common.cell({"mean": np.mean([np.mean(v) for v in values.values()]), "low": low, "high": high})
            )
        else:
            cells.append("–")
        table.append([model, *cells])
    return common.markdown(["pass@1", *datasets, "average"], table)


def intervals(rows) -> list[dict]:
    """Of the columns of [problems, points]."""
    return [common.interval(column) for column in np.transpose(rows)]


def draw_anytime(args, records: dict[str, list[dict]], top: int, stem: str) -> Path | None:
    """Accuracy of an answer forced within each budget (the area above it is the regret), and the normalised regret.
    None where the records hold no forced answers."""
    if not all(s["J"] for rows in records.values() for r in rows for s in r["samples"]):
        return None
    plt = common.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    grid = np.linspace(top / 32, top, 32)
    for name, rows in records.items():
        forced = [[np.mean([common.accuracy_at(s, x) for s in r["samples"]]) for x in grid] for r in rows]
        common.line(axes[0], grid, intervals(forced), label=name)
        regrets = [[np.mean([common.regret_at(s, b) for s in r["samples"]]) for b in args.budgets] for r in rows]
        common.line(axes[1], args.budgets, intervals(regrets), label=name, style="o-")
    axes[0].set(xlabel="token budget", ylabel="accuracy of the answer forced by then", ylim=(0, 1), xlim=(0, top))
    axes[1].set(xlabel="token budget C0", ylabel="normalised regret", xticks=args.budgets)
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    return common.save_figure(figure, args.out / f"{stem}anytime.png")


def token_ratio(base: Efficiency, other: Efficiency, metric: str, draws: int = 1000) -> dict:
    """Tokens the base needs over tokens the other needs for the highest score that both reach (Section 7, "token
    efficiency"), with a bootstrap over the problems they share; above 1 the other is more efficient."""

    def ratio(chosen) -> tuple[float, float]:
        curves = [(e.tokens[chosen].mean(0), e.scores[metric][chosen].mean(0)) for e in (base, other)]
        target = min(scores.max() for _, scores in curves)
        return common.tokens_to_reach(target, *curves[0]) / common.tokens_to_reach(target, *curves[1]), target

    count = len(base.tokens)
    picks = np.random.default_rng(0).integers(count, size=(draws, count))
    low, high = np.quantile([ratio(chosen)[0] for chosen in picks], [0.025, 0.975])
    value, target = ratio(np.arange(count))
    return {"at": float(target), "ratio": value, "low": float(low), "high": float(high)}


def draw_efficiency(args, curves: dict[str, Efficiency], stem: str) -> Path:
    """pass@k and maj@k against the tokens of k samples (Figures 7 and 8)."""
    plt = common.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True, sharey=True)
    for name, curve in curves.items():
        for axis, scores in zip(axes, curve.scores.values()):
            common.line(axis, curve.tokens.mean(0), intervals(scores), label=name, style=".-")
    for axis, title in zip(axes, ("pass@k", "maj@k")):
        axis.set(xlabel="tokens of k samples", ylabel=title)
        common.token_axis(axis)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    return common.save_figure(figure, args.out / f"{stem}efficiency.png")


if __name__ == "__main__":
    main()
