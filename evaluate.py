"""evaluate.py: how often is a model right, after how many tokens, and how well does it use them? (Section 7)

    python evaluate.py --metric pass@k                            # the embedded model on its test problems
    python evaluate.py --model runs/NAME/model --metric all       # pass@k, maj@k and normalised regret
    python evaluate.py --compare runs/A runs/B                    # table and figures from earlier evaluations' records

Metrics: pass@1 (mean over samples), pass@k (unbiased), maj@k (exact, ties count ½), and with `--metric regret` or `all`
the normalised regret (Section 7) from answers forced at every episode boundary of every trace. Every number has a 95 %
interval from a bootstrap over problems; comparisons are paired on the same problems.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common
from common import ForcedAnswers, Sampler, Trace, fail

# flag: (default with the embedded model, with any other model, where the latter comes from)
DEFAULTS = {
    "dataset": ("tiny", "HuggingFaceH4/aime_2024", "Table 1"),
    "split": ("test", "train", "the only one of that set"),
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_common_flags(parser)
    what = parser.add_argument_group("evaluation")
    what.add_argument("--metric", choices=("pass@1", "pass@k", "maj@k", "regret", "all"), default="all")
    what.add_argument("--k", default="1,2,4,8", help="for pass@k and maj@k; larger than --num-samples is left out")
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
    args.out = args.out or Path("runs") / (
        "compare" if args.compare else f"eval-{args.model.strip('/').replace('/', '-')}"
    )
    for name in ("k", "budgets"):
        try:
            setattr(args, name, sorted({common.positive_int(part) for part in getattr(args, name).split(",")}))
        except argparse.ArgumentTypeError as error:
            fail(f"--{name}: {error}")
    if not 0 < args.top_p <= 1:
        fail(f"--top-p {args.top_p}: must be above 0 and at most 1")
    if args.engine == "vllm":
        fail("--engine vllm: this version samples with transformers only")
    return args


def main() -> None:
    args = flags()
    if args.compare:
        compare(args)
        return
    problems = common.load_problems(args.dataset, args.split, args.limit)
    tokenizer = common.load_tokenizer(args.model)
    prompts = [common.prompt_ids(tokenizer, p["problem"]) for p in problems]
    dtype = common.pick_dtype(args.dtype)
    model = common.load_model(args.model, common.pick_device(), dtype)
    phrase = len(common.encode(tokenizer, "\n\n" + common.STOP_PHRASE))
    room = args.max_tokens + phrase + args.answer_tokens
    common.check_lengths(problems, prompts, room, common.context_length(model))
    volatile = ("config", "batch_problems", "metric", "k", "budgets", "num_samples", "compare", "limit")
    settings = {k: v for k, v in vars(args).items() if k not in volatile}
    run = common.open_run(args.out, settings, args.resume, args.overwrite)
    sampler = Sampler(model, tokenizer, dtype)
    sample(args, run, sampler, problems, prompts)
    by_id = {r["id"]: r for r in load_records(run)}
    records = [by_id[p["id"]] for p in problems]
    summary = summarise(records, args.k, args.budgets, args.max_tokens)
    common.write_json(run / "summary.json", summary)
    table = markdown_table({args.out.name: summary})
    common.write_text(run / "summary.md", table)
    print(table)
    print(f"records: {run / 'records.jsonl'}   summary: {run / 'summary.json'}")


# ---------------------------------------------------------------------------------------------- sampling


def sample(args, run: Path, sampler: Sampler, problems: list[dict], prompts: list[list[int]]) -> None:
    """Writes one record a problem, as each batch of problems is done. Samples that are recorded already are not made
    again: a run goes on where it stopped, and more samples are added to those there."""
    file = run / "records.jsonl"
    recorded = load_records(run) if file.exists() else []
    if args.metric in ("regret", "all") and any(not s["J"] for r in recorded for s in r["samples"]):
        fail(f"--metric {args.metric}: the records in {run} were made without forced answers; use another --out")
    have = {r["id"]: len(r["samples"]) for r in recorded}
    counts = [have.get(p["id"], 0) for p in problems]
    todo = [i for i, c in enumerate(counts) if c < args.num_samples]
    began, total = time.time(), len(todo)
    while todo:
        some = [i for i in todo if counts[i] == counts[todo[0]]][: args.batch_problems]
        todo = [i for i in todo if i not in some]
        seeds = [(args.seed, common.key(problems[i]["id"])) for i in some]
        missing = args.num_samples - counts[some[0]]
        rows = sampler.generate([prompts[i] for i in some], args.max_tokens, seeds, missing, args.temperature,
                                args.top_p, first=counts[some[0]])  # fmt: skip
        groups = [
            [common.read_trace(sampler.tokenizer, problems[i], prompts[i], c, args.max_episodes) for c in row]
            for i, row in zip(some, rows)
        ]
        traces = [trace for group in groups for trace in group]
        common.grade_traces(traces)
        if args.metric in ("regret", "all"):
            how = ForcedAnswers("sampled", args.forced_answers, args.answer_tokens, args.temperature, args.top_p)
            common.success_rates(sampler, traces, how, (args.seed, 1))
        common.append_jsonl(file, [record(group) for group in groups])
        share, seconds = 1 - len(todo) / total, time.time() - began
        print(
            f"{total - len(todo)} of {total} problems  {sampler.sampled_tokens / seconds:,.0f} tokens/s  "
            f"{common.duration(seconds * (1 - share) / share)} left",
            flush=True,
        )


def record(group: list[Trace]) -> dict:
    problem = group[0].problem
    return {
        **problem,
        "samples": [
            {
                "answer": common.extract_answer(t.answer or ""),
                "right": t.reward,
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


def load_records(run: Path) -> list[dict]:
    """The records of a run; lines of one problem (samples added later) are joined, a line cut by a crash is dropped."""
    records: dict[str, dict] = {}
    for line in common.whole_lines(run / "records.jsonl"):
        row = json.loads(line)
        records.setdefault(row["id"], {**row, "samples": []})["samples"] += row["samples"]
    return list(records.values())


# ---------------------------------------------------------------------------------------------- numbers


def per_problem(records: list[dict], ks: list[int], budgets: list[int]) -> dict[str, list[float]]:
    """Each metric's value for each problem, in the order of the records."""
    values: dict[str, list[float]] = {"pass@1": [np.mean([s["right"] for s in r["samples"]]) for r in records]}
    for k in ks:
        if k > 1 and k <= min(len(r["samples"]) for r in records):
            values[f"pass@{k}"] = [
                common.pass_at_k(len(r["samples"]), int(sum(s["right"] for s in r["samples"])), k) for r in records
            ]
            values[f"maj@{k}"] = [majority(r, k) for r in records]
    values["tokens"] = [np.mean([s["tokens"] for s in r["samples"]]) for r in records]
    if all(s["J"] for r in records for s in r["samples"]):
        for budget in budgets:
            values[f"regret@{budget}"] = [np.mean([regret(sample, budget) for sample in r["samples"]]) for r in records]
            values[f"forced@{budget}"] = [
                np.mean([accuracy_at(sample, budget) for sample in r["samples"]]) for r in records
            ]
    return values


def majority(record: dict, k: int) -> float:
    """maj@k of one problem; answers vote together if they are equal mathematically."""
    classes = common.group_answers([s["answer"] for s in record["samples"]], record["answer"])
    return common.maj_at_k([None if c is None else str(c) for c in classes], "0", k)


def curve(sample: dict) -> tuple[list[float], list[float]]:
    """(tokens, J) at the boundaries of one trace: prefix tokens + mean tokens of the answers forced there."""
    return [b + a for b, a in zip(sample["boundaries"], sample["answer_tokens"])], sample["J"]


def regret(sample: dict, budget: int) -> float:
    return common.normalized_regret(*curve(sample), budget)


def accuracy_at(sample: dict, budget: int) -> float:
    """J at the last boundary whose forced answer fits the budget; 0 before the first."""
    tokens, values = curve(sample)
    return next((v for t, v in zip(tokens[::-1], values[::-1]) if t <= budget), 0.0)


def summarise(records: list[dict], ks: list[int], budgets: list[int], max_tokens: int) -> dict:
    """Every metric with its 95 % interval; counts; what went wrong."""
    samples = [s for r in records for s in r["samples"]]
    metrics = {}
    for name, values in per_problem(records, ks, budgets).items():
        mean, low, high = common.bootstrap_interval(values)
        metrics[name] = {"mean": mean, "low": low, "high": high}
    progress = [np.diff(s["J"]) for s in samples if s["J"]]
    flat = np.concatenate(progress) if progress else np.zeros(0)
    return {
        "problems": len(records),
        "samples": len(samples),
        "max_tokens": max_tokens,
        "truncated": float(np.mean([s["finish"] == "length" for s in samples])),
        "no_answer": float(np.mean([s["answer"] is None for s in samples])),
        "thought_tokens": float(np.mean([s["thought_tokens"] for s in samples])),
        "progress_per_episode": float(flat.mean()) if len(flat) else None,
        "metrics": metrics,
    }


def markdown_table(summaries: dict[str, dict]) -> str:
    names = list(next(iter(summaries.values()))["metrics"])
    names = [n for n in names if all(n in s["metrics"] for s in summaries.values())]
    lines = ["| | " + " | ".join(summaries) + " |", "|---|" + "---|" * len(summaries)]
    for name in names:
        cells = []
        for summary in summaries.values():
            m, digits = summary["metrics"][name], 1 if name == "tokens" else 3
            cells.append(f"{m['mean']:.{digits}f} [{m['low']:.{digits}f}, {m['high']:.{digits}f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name in ("truncated", "no_answer", "problems", "samples"):
        cells = [s[name] for s in summaries.values()]
        cells = ["–" if c is None else str(c) if isinstance(c, int) else f"{c:.3f}" for c in cells]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------- comparison


def compare(args) -> None:
    """Table, differences to the first run and figures, from records alone."""
    records, settings = {}, {}
    for run in args.compare:
        if not (run / "records.jsonl").exists():
            fail(f"--compare {run}: no records.jsonl there; it must be the folder of an evaluation")
        records[run.name] = load_records(run)
        settings[run.name] = json.loads((run / "config.json").read_text())["settings"]
    if len(records) < len(args.compare):
        fail("--compare: two runs have the same folder name")
    for setting in ("dataset", "split", "max_tokens", "temperature", "top_p", "forced_answers", "max_episodes"):
        if len({str(of[setting]) for of in settings.values()}) > 1:
            print(f"warning: the runs differ in --{setting.replace('_', '-')}")
    shared = set.intersection(*({(r["id"], r["problem"]) for r in rows} for rows in records.values()))
    if not shared:
        fail("--compare: the runs have no problem in common")
    records = {
        name: sorted((r for r in rows if (r["id"], r["problem"]) in shared), key=lambda r: r["id"])
        for name, rows in records.items()
    }
    args.out.mkdir(parents=True, exist_ok=True)
    summaries = {
        name: summarise(rows, args.k, args.budgets, settings[name]["max_tokens"]) for name, rows in records.items()
    }
    table = markdown_table(summaries)
    base, *others = records
    if others:
        table += f"\nDifference to {base} on the same {len(shared)} problems:\n\n"
        values = {name: per_problem(rows, args.k, args.budgets) for name, rows in records.items()}
        lines = ["| | " + " | ".join(others) + " |", "|---|" + "---|" * len(others)]
        for metric in values[base]:
            cells = []
            for name in others:
                if metric not in values[name]:
                    cells.append("–")
                    continue
                mean, low, high = common.bootstrap_interval(
                    np.array(values[name][metric]) - np.array(values[base][metric])
                )
                cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
            lines.append(f"| {metric} | " + " | ".join(cells) + " |")
        table += "\n".join(lines) + "\n"
    curves = {name: efficiency(rows) for name, rows in records.items()}
    ratios = {name: {m: token_ratio(curves[base], curves[name], m) for m in curves[base].scores} for name in others}
    for name, of in ratios.items():
        for metric, r in of.items():
            table += (
                f"\nFor {metric} = {r['at']:.3f} {base} needs {r['ratio']:.2f} times the tokens of {name} "
                f"[{r['low']:.2f}, {r['high']:.2f}].\n"
            )
    common.write_json(args.out / "summary.json", {"runs": summaries, "token_ratio_to_first": ratios})
    common.write_text(args.out / "summary.md", table)
    print(table)
    drawn = [draw_anytime(args, records, settings), draw_efficiency(args, curves)]
    print(f"table: {args.out / 'summary.md'}   figures: {', '.join(str(path) for path in drawn if path)}")


def band(axis, x, rows: np.ndarray, label: str, style: str = "-", color=None) -> None:
    """A line with its 95 % band; rows [problems, points]."""
    cells = [common.bootstrap_interval(column, draws=500) for column in rows.T]
    mean, low, high = np.array(cells).T
    line = axis.plot(x, mean, style, label=label, color=color)[0]
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def draw_anytime(args, records: dict[str, list[dict]], settings: dict[str, dict]) -> Path | None:
    """Accuracy of an answer forced within each budget (the area above it is the regret), and the normalised regret.
    None where the records hold no forced answers."""
    if not all(s["J"] for rows in records.values() for r in rows for s in r["samples"]):
        return None
    plt = common.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    top = max(s["max_tokens"] for s in settings.values())
    grid = np.linspace(top / 32, top, 32)
    for name, rows in records.items():
        forced = [[np.mean([accuracy_at(s, x) for s in r["samples"]]) for x in grid] for r in rows]
        band(axes[0], grid, np.array(forced), name)
        regrets = [[np.mean([regret(s, b) for s in r["samples"]]) for b in args.budgets] for r in rows]
        band(axes[1], args.budgets, np.array(regrets), name, "o-")
    axes[0].set(xlabel="token budget", ylabel="accuracy of the answer forced by then", ylim=(0, 1), xlim=(0, top))
    axes[1].set(xlabel="token budget C0", ylabel="normalised regret", xticks=args.budgets)
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    return common.save_figure(figure, args.out / "anytime.png")


@dataclass
class Efficiency:
    """One model's tokens and accuracy with k = 1 … n samples, for each problem: arrays [problems, n]."""

    tokens: np.ndarray
    scores: dict[str, np.ndarray]  # "pass@k", "maj@k"


def efficiency(rows: list[dict]) -> Efficiency:
    ks = range(1, min(len(r["samples"]) for r in rows) + 1)
    right = [(len(r["samples"]), int(sum(s["right"] for s in r["samples"]))) for r in rows]
    passed = np.array([[common.pass_at_k(n, c, k) for k in ks] for n, c in right])
    voted = np.array([[majority(r, k) for k in ks] for r in rows])
    tokens = np.outer([np.mean([s["tokens"] for s in r["samples"]]) for r in rows], ks)
    return Efficiency(tokens, {"pass@k": passed, "maj@k": voted})


def tokens_for(target: float, tokens: np.ndarray, scores: np.ndarray) -> float:
    """Tokens at which a curve first reaches a score, linear between its points; its first point if it starts above."""
    above = np.flatnonzero(scores >= target - 1e-12)
    if not len(above):
        return float("nan")
    i = above[0]
    if i == 0:
        return float(tokens[0])
    share = (target - scores[i - 1]) / (scores[i] - scores[i - 1])
    return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))


def token_ratio(base: Efficiency, other: Efficiency, metric: str, draws: int = 1000) -> dict:
    """Tokens the base needs over tokens the other needs for the highest score that both reach (Section 7, "token
    efficiency"), with a bootstrap over the problems they share; above 1 the other is more efficient."""

    def ratio(chosen) -> tuple[float, float]:
        curves = [(e.tokens[chosen].mean(0), e.scores[metric][chosen].mean(0)) for e in (base, other)]
        target = min(scores.max() for _, scores in curves)
        return tokens_for(target, *curves[0]) / tokens_for(target, *curves[1]), target

    count = len(base.tokens)
    picks = np.random.default_rng(0).integers(count, size=(draws, count))
    low, high = np.quantile([ratio(chosen)[0] for chosen in picks], [0.025, 0.975])
    value, target = ratio(np.arange(count))
    return {"at": float(target), "ratio": value, "low": float(low), "high": float(high)}


def draw_efficiency(args, curves: dict[str, Efficiency]) -> Path:
    """pass@k and maj@k against the tokens of k samples (Figures 7 and 8)."""
    plt = common.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True, sharey=True)
    for name, curve in curves.items():
        for axis, scores in zip(axes, curve.scores.values()):
            band(axis, curve.tokens.mean(0), scores, name, ".-")
    for axis, title in zip(axes, ("pass@k", "maj@k")):
        axis.set(xlabel="tokens of k samples", ylabel=title, xscale="log")
        axis.xaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(plt.matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axis.xaxis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    return common.save_figure(figure, args.out / "efficiency.png")


if __name__ == "__main__":
    main()
