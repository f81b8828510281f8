"""experiments/report.py: tables, figures and summary of what experiments/compare.py has run.

Intervals are 95 %, over seeds and problems at once: both are drawn again, seeds for each method, problems for all
methods together. They are not corrected for the number of comparisons.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

import budget_force
import evaluate
from common import Trace, episode_spans, flat, normalized_regret, set_likelihood_J
from engine import models
from engine.sampler import Sampler
from engine.transformers_engine import TransformersEngine
from run import data
from run.files import read_jsonl, write_json, write_text
from run.flags import numbers
from run.folder import load_records
from run.report import (
    Curve,
    cell,
    draw_curve,
    group_by_problem,
    markdown,
    pyplot,
    save_figure,
    subplots,
    tokens_to_reach,
)
from run.traces import accuracy_at, checked_prompts, regret_at, sample_traces, trace_curve

DRAWS = 2000
Values = dict[str, np.ndarray]  # {metric: [seeds, problems, …]} of one method
Table = dict[str, dict[str, Any]]  # row → column → interval or text
Curves = tuple[np.ndarray, np.ndarray, np.ndarray]  # at each validation: sampled tokens, computed tokens, accuracy


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def folder(args, method: str, seed: int) -> Path:
    return args.out / "confirm" / f"{slug(method)}-seed{seed}"


def write_report(args, config) -> None:
    """summary.json with every number, tables.md with the tables, and the figures, of what is there. On the screen: how
    every method did, and in words the differences to its reference."""
    args.pages.mkdir(parents=True, exist_ok=True)
    if config["confirm"].get("script") == "budget_force.py":
        return write_searches(args, config)
    tables: dict[str, Table] = {}
    values = {method: read_values(args, config, method) for method in config["confirm"]["seeds"]}
    values = {method: measured for method, measured in values.items() if measured}
    if not values:
        print("nothing is finished yet, so there is nothing to report")
        return
    tables["Levels"] = levels(config, values)
    pair = {
        reference: [name for name in config.get(kind, {}) if name in values and name != reference]
        for kind, reference in (("self-training", "STaR"), ("methods", "GRPO"))
    }
    for reference, others in pair.items():
        if others and {"base", reference} <= set(values):
            measured = {name: values[name] for name in ("base", reference, *others)}
            tables |= comparison(config, measured, reference)
    if "GRPO" in values and config["train"].get("eval-every"):
        curves = {method: learning_curves(args, config, method) for method in ("GRPO", *pair["GRPO"])}
        tables["Training"] = training_table(curves)
        draw_results(args, config, values, curves)
    else:
        figure, axes = subplots(2, 4.4, 3.4)
        draw_curves(axes, config, values, {})
        save_figure(figure, args.pages / "results.png")
    write_json(args.pages / "summary.json", {"seeds": per_seed(values), "tables": tables})
    text = "".join(f"## {title}\n\n{markdown_of(rows)}\n" for title, rows in tables.items() if rows)
    write_text(args.pages / "tables.md", text)
    print(markdown_of(tables["Levels"]))
    for reference, others in pair.items():
        for name in others:
            if differences := tables.get(f"Difference to {reference}", {}).get(name):
                print(in_words(name, reference, differences))
    print(f"\ntables: {args.pages / 'tables.md'}   numbers: {args.pages / 'summary.json'}   figures beside them")


def write_searches(args, config) -> None:
    """The same of a comparison by linearised search, `budget_force.py --style window`."""
    values: dict[str, Values] = {}
    for name in config["confirm"]["seeds"]:
        found = [budget_force.search_values(records) for records in evaluations(args, config, name)]
        values |= {name: {metric: np.array([of[metric] for of in found]) for metric in found[0]}} if found else {}
    draws = {metric: boot(values, metric) for metric in values["base"]}
    levels = {name: {metric: cell_of(draws[metric][name]) for metric in draws} for name in values}
    pairs = [(a, b) for a, b in (("MRT-STaR", "STaR"), ("MRT", "GRPO")) if {a, b} <= set(values)]
    differences = {f"{a} - {b}": {f"Δ {m}": cell_of(of[a] - of[b]) for m, of in draws.items()} for a, b in pairs}
    parallel = {m: f"maj@{m.split('@')[1]}" for m in draws if m.startswith(("search@", "standing@"))}
    gains = {
        name: {f"Δ {m}": cell_of(draws[m][name] - draws[maj][name]) for m, maj in parallel.items()} for name in values
    }
    tables = {"Linearised search": levels, "Differences": differences, "Search - maj at equal tokens": gains}
    write_json(args.pages / "summary.json", {"seeds": per_seed(values), "tables": tables})
    shown = ("right", "tokens", *(f"{kind}@{K}" for K in (1, 2, 4) for kind in ("maj", "search", "standing")))
    for title, table in tables.items():
        short = {name: {c: v for c, v in row.items() if c.removeprefix("Δ ") in shown} for name, row in table.items()}
        print(f"## {title}\n\n{markdown_of(short)}" if short else "")
    print(
        budget_force.draw_search({"max_tokens": config["confirm"]["evaluate"]["max-tokens"]}, levels, args.pages),
        args.pages / "summary.json",
    )


def per_seed(values: dict[str, Values]) -> dict[str, dict[str, list[float]]]:
    """{method: {metric: each seed's mean over the problems}}."""
    return {
        name: {metric: [float(seed.mean()) for seed in seeds] for metric, seeds in measured.items() if seeds.ndim == 2}
        for name, measured in values.items()
    }


# ---------------------------------------------------------------------------------------------- the confirmation


def evaluations(args, config, method: str) -> list[list[dict]]:
    """The records of each seed's evaluation that is there, in the order of problems and samples."""
    runs = [folder(args, method, seed) / "test" for seed in range(config["confirm"]["seeds"].get(method, 0))]
    files = [run / "records.jsonl" for run in runs if (run / "summary.json").exists()]
    return [sorted(load_records(file), key=lambda r: (r["id"], r["sample"])) for file in files]


def read_values(args, config, method: str) -> Values:
    """What the evaluations that are there measured, each problem's mean over its samples."""
    seeds: dict[str, list] = {}
    for records in evaluations(args, config, method):
        groups = group_by_problem(records)
        measured = [[measure(config, record) for record in group] for group in groups.values()]
        for metric in measured[0][0]:
            means = [np.mean([trace[metric] for trace in group], 0) for group in measured]
            seeds.setdefault(metric, []).append(means)
    return {metric: np.array(means) for metric, means in seeds.items()}


def measure(config, record: dict) -> dict[str, Any]:
    """{metric: its value for one recorded trace}."""
    idle, after = waste(record)
    return {
        "right": record["reward"],
        "tokens": record["tokens"],
        **{f"regret@{budget}": regret_at(record, budget) for budget in budgets_of(config)},
        **{f"forced@{budget}": accuracy_at(record, budget) for budget in budgets_of(config)},
        "anytime": [accuracy_at(record, budget) for budget in grid_of(config)],
        "truncated": record["finish"] == "length",
        "idle share": idle,
        "episodes after the find": after,
    }


def budgets_of(config) -> list[int]:
    return numbers("budgets", config["confirm"]["evaluate"]["budgets"])


def grid_of(config) -> np.ndarray:
    return np.linspace(0, config["confirm"]["evaluate"]["max-tokens"], 49)[1:]


def waste(record: dict) -> tuple[float, int]:
    """(share of the episodes up to the find that try no candidate for the first time, number of episodes after it)."""
    thought = record["text"].split("</think>")[0]
    episodes = [thought[start:end] for start, end in episode_spans(thought)]
    find = next((j for j, episode in enumerate(episodes) if "yes, x = " in episode), len(episodes) - 1)
    tried: set[str] = set()
    idle = 0
    for episode in episodes[: find + 1]:
        new = set(re.findall(r"try x = (\d+)", episode)) - tried
        idle += not new
        tried |= new
    return idle / (find + 1), len(episodes) - 1 - find


def resampled(arrays: Values) -> Values:
    """{method: [seeds, problems, …]} → {method: [1 + DRAWS, …]}: the mean over both, then that of bootstrap draws."""
    rng, out = np.random.default_rng(0), {}
    count = len(next(iter(arrays.values()))[0])
    problems = np.vstack([np.ones(count), rng.multinomial(count, np.ones(count) / count, DRAWS)]) / count
    for name, array in arrays.items():
        number = len(array)
        seeds = np.vstack([np.ones(number), rng.multinomial(number, np.ones(number) / number, DRAWS)]) / number
        out[name] = np.einsum("ds,sp...,dp->d...", seeds, array, problems, optimize=True)
    return out


def boot(values: dict[str, Values], metric: str) -> Values:
    return resampled({name: measured[metric] for name, measured in values.items()})


def cell_of(draws: np.ndarray) -> dict[str, float]:
    """The mean and its 95 % interval; infinite draws (never reached) stay so."""
    valid = draws[1:][~np.isnan(draws[1:])]
    low, high = np.quantile(valid, [0.025, 0.975], method="nearest") if len(valid) else (math.nan, math.nan)
    return {"mean": float(draws[0]), "low": float(low), "high": float(high)}


def levels(config, values: dict[str, Values]) -> Table:
    """How each method did, on its own."""
    budgets = budgets_of(config)
    middle = budgets[(len(budgets) - 1) // 2]
    shown = (f"regret@{middle}", f"regret@{budgets[-1]}", "right", f"forced@{middle}", "tokens", "idle share")
    draws = {metric: boot(values, metric) for metric in shown}
    return {
        name: {"seeds": f"{len(values[name]['right'])}", **{metric: cell_of(draws[metric][name]) for metric in shown}}
        for name in values
    }


def comparison(config, values: dict[str, Values], reference: str) -> dict[str, Table]:
    """What regret falls and accuracy rises from the base, in the reference's; differences to it; behaviour."""
    regrets, forced = ([f"{name}@{budget}" for budget in budgets_of(config)] for name in ("regret", "forced"))
    compared, wasted = (*regrets, "right", *forced, "tokens", "idle share"), ("truncated", "episodes after the find")
    draws = {metric: boot(values, metric) for metric in (*compared, *wasted)}
    others = [name for name in values if name not in ("base", reference)]

    def change(name: str, metric: str) -> np.ndarray:
        return draws[metric][name] - draws[metric]["base"]

    with np.errstate(divide="ignore", invalid="ignore"):
        in_its = {
            name: {
                label: cell_of(change(name, metric) / change(reference, metric))
                for label, metric in {**{f"cut of {metric}": metric for metric in regrets}, "gain": "right"}.items()
            }
            for name in others
        }
    return {
        f"In {reference}'s": in_its,
        f"Difference to {reference}": {
            name: {f"Δ {metric}": cell_of(draws[metric][name] - draws[metric][reference]) for metric in compared}
            for name in others
        },
        f"Behaviour beside {reference}": {
            name: {metric: cell_of(draws[metric][name]) for metric in wasted} for name in values
        },
    }


def training_table(curves: dict[str, list[Curves]]) -> Table:
    """Validation problems: accuracy at the end, and where each method's mean curve had GRPO's; tokens computed, the
    update's three passes and the scoring of J included, and the accuracy when as many were computed as GRPO did."""
    rows: Table = {}
    goal = float(np.mean([accuracies[-1] for _, _, accuracies in curves["GRPO"]]))
    compute = np.mean([computed[-1] for _, computed, _ in curves["GRPO"]])
    at = np.linspace(0, max(sampled[-1] for runs in curves.values() for sampled, _, _ in runs), 61)
    for name, runs in curves.items():
        mean = np.mean([np.interp(at, sampled, accuracies) for sampled, _, accuracies in runs], 0)
        reached = tokens_to_reach(goal, at, mean)
        rows[name] = {
            "accuracy at the end": f"{np.mean([a[-1] for *_, a in runs]):.2f}",
            "sampled tokens to GRPO's": f"{reached / 1e3:.0f}k" if math.isfinite(reached) else "–",
            "computed tokens, in GRPO's": f"{np.mean([c[-1] for _, c, _ in runs]) / compute:.2f}",
            "accuracy at GRPO's computed tokens": f"{np.mean([np.interp(compute, c, a) for _, c, a in runs]):.2f}",
        }
    return rows


def learning_curves(args, config, method: str) -> list[Curves]:
    """Of each seed; the update's tokens are among those computed."""
    curves = []
    for seed in range(config["confirm"]["seeds"][method]):
        run = folder(args, method, seed)
        if (run / "summary.json").exists():
            steps = read_jsonl(run / "metrics.jsonl")
            passes = np.cumsum([3 * step["update_tokens"] for step in steps])
            computed = np.append(0.0, [step["computed_tokens"] for step in steps] + passes)
            validations = read_jsonl(run / "validation.jsonl")
            at = [v["step"] for v in validations]
            sampled, accuracy = ([v[name] for v in validations] for name in ("sampled_tokens", "accuracy"))
            curves.append((np.array(sampled), computed[at], np.array(accuracy)))
    return curves


def markdown_of(rows: Table) -> str:
    columns = list(next(iter(rows.values())))

    def shown(column: str, value) -> str:
        if not isinstance(value, dict):
            return value
        if not math.isfinite(value["mean"]):
            return "–"
        digits = 0 if "tokens" in column else 2
        return cell(value, digits, "+" if column.startswith("Δ") else "").replace("inf", "∞")

    return markdown(["", *columns], [[name, *(shown(c, row[c]) for c in columns)] for name, row in rows.items()])


def in_words(name: str, reference: str, differences: dict[str, dict[str, float]]) -> str:
    """One sentence on what the intervals say, whichever way it came out."""

    def side(metric: str) -> int:
        """1: the interval is above 0, -1: below, 0: it holds 0."""
        return (differences[metric]["low"] > 0) - (differences[metric]["high"] < 0)

    often = {1: "more often right", 0: "as often right, within the noise,", -1: "less often right"}
    idle = {1: "more", 0: "as many, within the noise,", -1: "fewer"}
    longer = {1: "from longer traces", 0: "from traces as long", -1: "from shorter traces"}
    budgets = [metric for metric in differences if metric.startswith("Δ regret@")]
    less, more = ([b.split("@")[1] for b in budgets if side(b) == sign] for sign in (-1, 1))
    regret = f"less regret than {reference} at budgets of {', '.join(less)} tokens" if less else ""
    regret += (" and " if less and more else "") + (f"more at {', '.join(more)}" if more else "")
    right, tokens = cell(differences["Δ right"], 2, "+"), cell(differences["Δ tokens"], 0, "+")
    return (
        f"{name} has {regret or f'as much regret as {reference}, within the noise'} "
        f"({cell(differences[budgets[-1]], 2, '+')} at {budgets[-1].split('@')[1]}); left alone it is "
        f"{often[side('Δ right')]} ({right}), {longer[side('Δ tokens')]} ({tokens} tokens). Until x is found, "
        f"{idle[side('Δ idle share')]} of its episodes try nothing new ({cell(differences['Δ idle share'], 2, '+')})."
    )


# ---------------------------------------------------------------------------------------------- pictures


def draw_results(args, config, values: dict[str, Values], curves: dict[str, list[Curves]]) -> None:
    """results.png: regret and accuracy by budget, learning curves, and J along a trace before and after training.
    method.png: the traces alone."""
    traces = example_traces(args, config)
    figure = pyplot().figure(figsize=(11, 3.4 + 2.3 * len(traces)), constrained_layout=True)
    grid = figure.add_gridspec(1 + len(traces), 3, height_ratios=[3.4] + [2.3] * len(traces))
    draw_curves([figure.add_subplot(grid[0, i]) for i in range(3)], config, values, curves)
    draw_traces([figure.add_subplot(grid[1 + i, :]) for i in range(len(traces))], traces)
    save_figure(figure, args.pages / "results.png")
    figure, axes = subplots(len(traces), 9, 2.9, rows=len(traces))
    draw_traces(axes, traces)
    save_figure(figure, args.pages / "method.png")


def draw_curves(axes, config, values: dict[str, Values], curves: dict[str, list[Curves]]) -> None:
    """The normalised regret by budget; the accuracy of an answer forced within a budget; learning curves. A few methods
    have bands, and a thin line for each seed."""
    regret, forced, *learning = axes
    grid, anytime = grid_of(config), boot(values, "anytime")
    regrets = {b: boot(values, f"regret@{b}") for b in budgets_of(config)}
    few, others = len(values) < 6, [name for name in values if name != "base"]  # bands of many cannot be told apart
    for name in values:
        number = others.index(name) if name in others else 0
        color, style = f"C{number}" if name in others else "grey", "-" if number < 5 else ":"
        at_budgets = [cell_of(draws[name]) for draws in regrets.values()]
        draw_curve(regret, Curve(list(regrets), at_budgets, name, f"o{style}", color, few))
        draw_curve(forced, Curve(grid, [cell_of(column) for column in anytime[name].T], None, style, color, few))
        for axis in learning if name in curves else []:
            at = np.linspace(0, config["train"]["max-sampled-tokens"], 61)
            runs = [np.interp(at, sampled, accuracy) for sampled, _, accuracy in curves[name]]
            for curve in runs if few else []:
                axis.plot(at / 1e3, curve, color=color, linewidth=0.5, alpha=0.4)
            axis.plot(at / 1e3, np.mean(runs, 0), style, color=color, linewidth=1.5)
            axis.set(xlabel="sampled tokens of training (thousands)", ylabel="accuracy, validation problems")
    regret.set(xlabel="token budget C0", ylabel="normalised regret", ylim=(None, 1), xticks=list(regrets))
    regret.legend(fontsize=6, loc="upper right", ncols=2)
    forced.set(xlabel="token budget", ylabel="accuracy of an answer forced by then", ylim=(0, None))


def example_traces(args, config) -> dict[str, Trace]:
    """A trace of the base and one of the trained model (`example` in the configuration) on the first test problem with
    ten candidates where, of eight traces each, one of the base is right after 5 to 7 episodes, with a J that has risen
    by the second, and the trained model's right one of middle length has such a J, too."""
    trained = folder(args, config["example"], 0) / "model"
    before, after = traces_of("tiny"), traces_of(str(trained)) if trained.exists() else []
    for untrained, finished in zip(before, after):
        clear = [trace for trace in untrained if 5 <= len(trace.J) - 1 <= 7 and is_telling(trace)]
        right = sorted((trace for trace in finished if trace.reward), key=lambda t: len(t.completion.token_ids))
        if clear and right and is_telling(middle := right[len(right) // 2]):
            return {"before training": clear[0], f"after {config['example']}": middle}
    return {"before training": before[0][0]}


def traces_of(model: str) -> list[list[Trace]]:
    """Eight traces of each of some test problems with ten candidates, with J by likelihood."""
    settings = evaluate.flags("--dataset tiny:10 --limit 24 --num-samples 8".split())
    tokenizer, problems = models.load_tokenizer(model), data.problems_of(settings)
    sampler = Sampler(TransformersEngine(models.load_model(model, "cpu")), tokenizer)
    groups = sample_traces(settings, sampler, problems, checked_prompts(settings, tokenizer, problems)[0])
    set_likelihood_J(sampler, flat(groups))
    return groups


def is_telling(trace: Trace) -> bool:
    """It is right, not by a lucky first try, and J has risen by the second episode."""
    J = trace.J
    return trace.finished and trace.reward == 1 and len(J) > 3 and J[0] < 0.2 and 1.2 * J[0] < max(J[1:3]) < 0.9


def draw_traces(axes, traces: dict[str, Trace]) -> None:
    """J(μ) along each trace as regret sees it: linear from (0, 0) to each boundary + the tokens of the answers forced
    there, held up to C0, the end of the longest. An episode's progress stands above it."""
    budget = max(trace_curve(trace.record())[0][-1] for trace in traces.values())
    for axis, (title, trace) in zip(axes, traces.items()):
        tokens, J = trace_curve(trace.record())
        at, value = [0.0, *tokens, budget], [0.0, *J, J[-1]]
        axis.fill_between(at, value, 1, color="grey", alpha=0.15, linewidth=0)
        axis.plot(at, value, "k.-", linewidth=1.2)
        thought, ends = trace.prefix(trace.boundaries[-1]), trace.boundaries
        for j, ((first, last), start, end) in enumerate(zip(episode_spans(thought), ends, ends[1:])):
            text, found, color = thought[first:last], ": yes" in thought[:first], f"C{j % 10}"
            axis.axvspan(start, end, color=color, alpha=0.08, linewidth=0)
            kind = "re-checks" if found or "try x" not in text else "tries candidates"
            kind = "talks" if " x = " not in text else "finds x" if ": yes" in text and not found else kind
            label = f"$z_{{{j}}}$ {kind}\n$r_{{prg}}$ = {J[j + 1] - J[j]:+.2f}"
            axis.text((start + end) / 2, 1.04, label, ha="center", fontsize=7, color=color)
        axis.set(xlim=(0, budget), ylim=(0, 1.25), yticks=[0, 0.25, 0.5, 0.75, 1], ylabel="J(μ)")
        regret = normalized_regret(tokens, J, budget)
        axis.set_title(f"{title}: regret {regret:.2f}, the grey share of the area below 1", loc="left", fontsize=9)
    axes[-1].set(xlabel="tokens of the thought, and of the answer forced there")
