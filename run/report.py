"""What records are turned into: means with intervals, comparisons of runs, tables, figures, the page of traces."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine import plural
from run.files import fail, read_jsonl, write_bytes, write_json, write_text
from run.folder import RecordedRun, duration, recorded_run

# ============================================================================================ numbers


def group_by(records: Iterable[dict], key: Callable[[dict], Any]) -> dict[Any, list[dict]]:
    """{value of `key`: the records that have it}, in order of first appearance."""
    groups: dict[Any, list[dict]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def group_by_problem(records: Iterable[dict]) -> dict[str, list[dict]]:
    """Rows that repeat a problem and its answer (an AIME file × 64) are one problem with more samples."""
    names: dict[str, str] = {}

    def text_and_gold(r: dict) -> str:
        return json.dumps([r.get("messages"), r.get("problem", r["id"]), r.get("gold")])

    return group_by(records, lambda r: names.setdefault(text_and_gold(r), r["id"]))


def problem_means(records: Iterable[dict], value: Callable[..., float], *more) -> np.ndarray:
    """The mean of `value(record, *more)` over each problem's traces, [problems]."""
    return np.array([np.mean([value(r, *more) for r in group]) for group in group_by_problem(records).values()])


def bootstrap_picks(count: int, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Indices drawn with replacement, [draws, count]: the one bootstrap behind every interval."""
    return np.random.default_rng(seed).integers(count, size=(draws, count))


def interval(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """{mean, low, high} of the problems' values [problems], each a mean over its samples: 95 %, studentised bootstrap.

    Problems are resampled, not samples: samples of one problem are correlated and the claim is about unseen problems;
    the noise within a problem is included, since its mean carries it. To compare two methods pass the differences of
    their values: the spread between problems they share then cancels. The order of the problems does not matter.

    Why studentised: in 1,000 simulations each of 8 kinds of 15 and of 30 problems (mixed, hard, easy, pass@4, paired
    differences) a percentile interval covers in .83 to .94, this one in .947 to .99. A resample's deviation counts as
    a third of the sample's at least, since one without a solved problem has none, and as all of it at most; the ends
    are widened as Student's t is, and stay within the problems' range.

    One problem says nothing about the spread between problems: low and high are NaN. ValueError for no problems, NaN or
    infinity.
    """
    values = np.sort(np.asarray(values, dtype=float))
    if len(values) == 0 or not np.all(np.isfinite(values)):
        raise ValueError("need at least one problem and finite numbers")
    mean, spread = float(values.mean()), values.std()
    if len(values) == 1:
        return {"mean": mean, "low": math.nan, "high": math.nan}
    if values[0] == values[-1]:
        return {"mean": mean, "low": mean, "high": mean}
    resampled = values[bootstrap_picks(len(values))]
    errors = (resampled.mean(axis=1) - mean) / resampled.std(axis=1).clip(spread / 3, spread)
    student = 1 + 1.21 / (len(values) - 1)  # the 97.5 % quantile of t over that of the normal distribution
    ends = mean - student * values.std(ddof=1) * np.quantile(errors, [0.975, 0.025])
    low, high = map(float, ends.clip(values[0], values[-1]))
    return {"mean": mean, "low": low, "high": high}


def mean_interval(records: Iterable[dict], value: Callable[..., float], *more) -> dict[str, float]:
    """The mean of `problem_means` with its interval."""
    return interval(problem_means(records, value, *more))


COUNTS: dict[str, Callable[[dict], float]] = {
    "truncated": lambda r: r["finish"] == "length",
    "wrong": lambda r: r["verdict"] == "wrong",
    "no_answer": lambda r: r["verdict"] == "none",
    "timed_out": lambda r: r["verdict"] == "timeout",
    "no_thought": lambda r: r["finished"] and r["boundaries"][-1] == 0,
    "one_episode": lambda r: len(r["boundaries"]) <= 2,
    "thought_tokens": lambda r: r["boundaries"][-1],
    "answer_tokens": lambda r: r["tokens"] - r["boundaries"][-1],
}


def counts_of(records: list[dict]) -> dict[str, float]:
    """How many problems and samples, and the means of `COUNTS` over the samples."""
    means = {name: float(np.mean([count(r) for r in records])) for name, count in COUNTS.items()}
    return {"problems": len(group_by_problem(records)), "samples": len(records), **means}


REMEDIES = {
    "cut by the token limit": "raise --max-tokens",
    "ended without an end of the thought": "does the chat template open the thought? --chat-template-kwargs",
    "without a box": "only the last \\boxed{} after the thought counts; read trace.html",
    "forced without a box": "raise --answer-tokens if they are cut",
    "of one episode": "--markers FILE names phrases that open episodes, three paragraphs or more apart",
}


def fate_of(record: dict) -> str:
    """What became of a trace's or a forced answer: right, wrong, timeout or why there is none."""
    if record["verdict"] != "none":
        return record["verdict"]
    if "finish" not in record:
        return "forced without a box"
    if record["finish"] == "length":
        return "cut by the token limit"
    return "without a box" if record["finished"] else "ended without an end of the thought"


def counted(fates: Iterable[str]) -> str:
    """How many there are of each, with the remedy."""
    counts = Counter(fates)
    parts = [f"{n} {fate}" + (f" ({REMEDIES[fate]})" if fate in REMEDIES else "") for fate, n in counts.most_common()]
    return f"of {counts.total()}, " + ", ".join(parts)


def why_zero(records: list[dict]) -> str:
    """Why nothing is right, no forced answer is, or no episode makes progress, a line each; empty where none holds."""
    lines, estimated = [], [r for r in records if r["J"]]
    forced = [answer for r in estimated for answers in r["forced"] for answer in answers]
    if records and not any(r["reward"] for r in records):
        lines.append(f"No trace is right: {counted(map(fate_of, records))}.\n")
    if forced and not any(any(r["J"]) for r in estimated):
        lines.append(f"No forced answer is right: {counted(map(fate_of, forced))}.\n")
    if estimated and not any(np.any(np.diff(r["J"]) > 0) for r in estimated):
        episodes = ("of one episode" if len(r["boundaries"]) <= 2 else "of several" for r in estimated)
        lines.append(f"No episode makes progress: thoughts, {counted(episodes)}.\n")
    return "".join(["\n", *lines] if lines else [])


def tokens_to_reach(target: float, tokens, scores) -> float:
    """Tokens at which a curve first reaches a score, linear between its points; its first point if it starts above,
    infinite if it never gets there."""
    i = next((i for i, score in enumerate(scores) if score >= target - 1e-12), None)
    if i is None:
        return math.inf
    if i == 0:
        return float(tokens[0])
    share = (target - scores[i - 1]) / (scores[i] - scores[i - 1])
    return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))


# ============================================================================================ comparisons and tables

Values = dict[str, np.ndarray]  # {metric: [problems]} of one run


def differences_to_first(runs: dict[str, Values]) -> dict[str, dict[str, dict]]:
    """{run: {metric: interval of the paired difference to the first run}}, problems in one order."""
    first, *others = runs
    return {
        name: {m: interval(values - runs[first][m]) for m, values in runs[name].items() if m in runs[first]}
        for name in others
    }


def difference_table(differences: dict[str, dict[str, dict]], first: str) -> str:
    """The table of `differences_to_first`, below a line that names the first run; empty for a single run."""
    return f"\nDifference to {first}:\n\n" + metric_table(differences, "+") if differences else ""


def metric_table(runs: dict[str, dict[str, dict]], sign: str = "") -> str:
    """A row per metric, a column per run."""
    metrics = dict.fromkeys(metric for means in runs.values() for metric in means)
    rows = [
        [metric, *(cell(means.get(metric), 1 if "tokens" in metric else 3, sign) for means in runs.values())]
        for metric in metrics
    ]
    return markdown(["", *runs], rows)


def cell(metric: dict | None, digits: int = 3, sign: str = "") -> str:
    """A mean with its interval, for a table."""
    if metric is None:
        return "–"
    mean = f"{metric['mean']:{sign}.{digits}f}"
    if math.isnan(metric["low"]):
        return mean
    return f"{mean} [{metric['low']:{sign}.{digits}f}, {metric['high']:{sign}.{digits}f}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "".join(table_row(*row) for row in [header, ["---"] * len(header), *rows])


def table_row(*row: str) -> str:
    return f"| {' | '.join(row)} |\n"


def read_runs(folders: list[Path], *fields: str) -> list[RecordedRun]:
    """Runs of any script whose records have these fields, to be compared, with short names."""
    runs = [recorded_run(folder, "--compare", *fields) for folder in folders]
    return [replace(run, name=name) for name, run in zip(run_names(folders), runs)]


def differing_flags(runs: list[RecordedRun], settings: Iterable[str]) -> list[str]:
    """Those of the given settings, as flags, in which the runs differ."""
    differing = [name for name in settings if len({str(run.settings.get(name)) for run in runs}) > 1]
    return [f"--{name.replace('_', '-')}" for name in differing]


def run_names(folders: list[Path]) -> list[str]:
    """A short name for each of several runs: its folder's, else the parent folder's, else the whole path."""
    for name in (lambda folder: folder.name.removesuffix(".jsonl"), lambda folder: folder.parent.name, str):
        names = [name(folder) for folder in folders]
        if len(set(names)) == len(set(folders)):
            break
    return names


def keep_shared_problems(runs: list[RecordedRun]) -> int:
    """Keeps the problems that all runs have, in one order; returns their number."""
    shared = set.intersection(*({(r["id"], r["problem"]) for r in run.records} for run in runs))
    if not shared:
        fail("--compare: the runs have no problem in common")
    for run in runs:
        run.records = [r for r in run.records if (r["id"], r["problem"]) in shared]
        run.records.sort(key=lambda r: (r["id"], r["sample"]))
    return len(shared)


def tell_plan(rate: int | bool, problems: int, *work: tuple[str, int, int]) -> None:
    """--dry-run: what a run costs at most. `work`: what is sampled, how many completions, their token limit; `rate`:
    tokens a second, where a number was given."""
    requests, tokens = sum(n for _, n, _ in work), sum(n * limit for _, n, limit in work)
    parts = ", ".join(f"{plural(n, what)} of at most {plural(limit, 'token')}" for what, n, limit in work if n)
    time = "--dry-run RATE tells the time" if rate is True else f"{duration(tokens / rate)} at {rate:,} tokens a second"
    print(f"{plural(problems, 'problem')}: {parts}")
    print(f"{plural(requests, 'request')}, {plural(tokens, 'sampled token')} at most; {time}")


def write_summary(folder: Path, summary: dict, table: str, *others: Path) -> None:
    """summary.json and summary.md; prints the table and which files, of the `others` too, are there."""
    write_json(folder / "summary.json", summary)
    write_text(folder / "summary.md", table)
    files = [folder / "summary.md", *(file for file in others if file.exists())]
    print(f"\n{table}\nfiles: {'  '.join(map(str, files))}")


# ============================================================================================ figures

# Okabe and Ito: told apart by colour-blind readers, and in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


SHARE = (-0.03, 1.03)  # so that curves at 0 and at 1 are seen


def pyplot():
    """matplotlib without a screen, in one style, imported when a figure is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from cycler import cycler

    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.titlesize": 8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.prop_cycle": cycler(color=COLORS),
            "legend.frameon": False,
            "legend.fontsize": 8,
        }
    )
    return plt


@dataclass
class Curve:
    """A line through means of `interval`, with the band of their intervals."""

    x: Sequence[float] | np.ndarray
    means: list[dict]
    label: str | None = None
    style: str = "o-"
    color: str | None = None
    band: bool = True


@dataclass
class Panel:
    """Axes with curves. `settings`: arguments of matplotlib's `Axes.set`; `tokens`: x is tokens, on a log axis."""

    settings: dict
    curves: list[Curve]
    tokens: bool = False


def draw_panels(file: Path, *panels: Panel, rows=1, **layout) -> Path:
    """Panels on `subplots`, their legend above them, where it covers no curve."""
    figure, axes = subplots(len(panels), rows=rows, **layout)
    for axis, panel in zip(axes, panels):
        for curve in panel.curves:
            draw_curve(axis, curve)
        if panel.tokens:
            token_axis(axis)
        elif all(x == int(x) for curve in panel.curves for x in curve.x):
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(**panel.settings)
    labels = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    if labels:
        columns = int(12 * figure.get_figwidth() / (8 + max(map(len, labels)))) or 1
        figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=columns)
    return save_figure(figure, file)


def anytime_panels(accuracy: list[Curve], regret: list[Curve]) -> tuple[Panel, Panel]:
    """Accuracy of the answer forced within each token budget, and the normalised regret, roughly the area above it."""
    left = {"xlabel": "token budget", "ylabel": "accuracy of the answer forced by then", "ylim": SHARE}
    right = {"xlabel": "token budget C0", "ylabel": "normalised regret", "xticks": regret[0].x}
    return Panel({**left, "xlim": (0, max(accuracy[0].x))}, accuracy), Panel(right, regret)


def subplots(count: int, width: float = 3.3, height: float = 2.9, rows: int = 1, **more):
    """(figure, axes [count]) side by side, in one row or several; width and height, in inches, are those of one, `more`
    is of `plt.subplots`."""
    columns = count // rows
    size = (width * columns, height * rows)
    figure, axes = pyplot().subplots(rows, columns, figsize=size, constrained_layout=True, squeeze=False, **more)
    return figure, axes.flatten()


def draw_curve(axis, curve: Curve) -> None:
    mean, low, high = ([m.get(part) for m in curve.means] for part in ("mean", "low", "high"))
    look = {"color": curve.color, "label": curve.label, "markersize": 3, "linewidth": 1.2}
    (drawn,) = axis.plot(curve.x, mean, curve.style, **look)
    if curve.band:
        axis.fill_between(curve.x, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)


def token_axis(axis) -> None:
    """A logarithmic axis of tokens, with plain numbers at powers of two where it is wide."""
    from matplotlib import ticker

    axis.set_xscale("log")
    low, high = axis.get_xlim()
    wide = high > 4 * low
    axis.xaxis.set_major_locator(ticker.LogLocator(base=2, numticks=5) if wide else ticker.MaxNLocator(4, integer=True))
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())


def save_figure(figure, path: Path) -> Path:
    """Writes the PNG all or nothing."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=160)
    pyplot().close(figure)
    write_bytes(path, picture.getvalue())
    return path


def draw_training(run: Path) -> Path:
    """`progress.png`: the training so far, from its metrics.jsonl and validation.jsonl."""
    steps = read_jsonl(run / "metrics.jsonl")
    thousands = [step["sampled_tokens"] / 1e3 for step in steps]
    figure, (accuracy, length, shares, J, progress, entropy) = subplots(6, rows=2)
    accuracy.plot(thousands, [step["reward"] for step in steps], ".-", alpha=0.5, label="rollouts")
    if (run / "validation.jsonl").exists():
        checks = read_jsonl(run / "validation.jsonl")
        x = [check["sampled_tokens"] / 1e3 for check in checks]
        accuracy.plot(x, [check["accuracy"] for check in checks], "o-", markersize=3, label="validation")
        for budget in checks[0]["forced"]:
            forced = [check["forced"][budget] for check in checks]
            accuracy.plot(x, forced, ".--", label=f"validation, stopped at {budget} tokens")
    accuracy.set(ylabel="share of right answers", ylim=SHARE)
    length.plot(thousands, [step["tokens"] for step in steps])
    length.set(ylabel="tokens of a rollout", ylim=(0, None))
    for axis, label, limits, names in (
        (shares, "share", SHARE, ("truncated", "flat_groups")),
        (J, "J", SHARE, ("J_empty", "J_end", "J_prefix")),
        (progress, "progress of J", None, ("progress_per_episode", "progress_of_going_on")),
        (entropy, "entropy (nats)", (0, None), ("entropy",)),
    ):
        for name in names:
            if name in steps[0]:
                axis.plot(thousands, [step[name] for step in steps], label=name.replace("_", " "))
        axis.set(ylabel=label, ylim=limits)
        axis.set_visible(bool(axis.lines))  # GRPO estimates no J
    for axis in (accuracy, length, shares, J, progress, entropy):
        axis.set_xlabel("sampled tokens (thousands)")
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=6, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    return save_figure(figure, run / "progress.png")


# ============================================================================================ the page of traces

PAGE_BYTES = 16 << 20  # more than this is slow on a phone
SHOWN = ("text", "reward", "boxed", "verdict", "tokens", "boundaries", "characters", "J", "forced")


def write_page(records: list[dict], file: Path) -> Path:
    """The template in this folder, filled with the traces as JSON. Text from a model enters the document as text
    nodes only; `<` is written as \\u003c, so nothing in it can end the JSON's element."""
    problems, size, left_out = [], 0, 0
    for group in group_by_problem(records).values():
        problem = {name: group[0][name] for name in ("id", "problem", "gold")}
        text = json.dumps({**problem, "traces": [{name: r[name] for name in SHOWN} for r in group]}, ensure_ascii=False)
        size += len(text)
        if size > PAGE_BYTES and problems:
            left_out += 1
        else:
            problems.append(text)
    note = f"Left out to keep the page small: {plural(left_out, 'problem')}." if left_out else ""
    data = f'{{"note": {json.dumps(note)}, "problems": [{", ".join(problems)}]}}'.replace("<", "\\u003c")
    template = (Path(__file__).parent / "trace_page.html").read_text(encoding="utf-8")
    write_text(file, template.replace("@@DATA@@", data, 1))
    return file
