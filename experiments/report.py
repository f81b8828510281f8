"""experiments/report.py: tables, figures and summary of what experiments/compare.py has run."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np

import budget_force
from common import accuracy_at, episode_spans, regret_at
from plumbing.flags import numbers
from plumbing.models import THINK_END
from plumbing.report import (
    cell,
    draw_curve,
    group_by_problem,
    markdown,
    pyplot,
    save_figure,
    tokens_to_reach,
)
from plumbing.runs import config_of, fail, load_records, read_jsonl, write_json, write_text

DRAWS = 2000


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("½", "half").replace("λ", "lambda")).strip("-")


def folder(args, method: str, seed: int) -> Path:
    return args.out / f"{slug(method)}-seed{seed}"


def trains_longer(config, method: str) -> bool:
    """Does the method have a number of sampled tokens of its own?"""
    return method in config["methods"] and "--max-sampled-tokens" in config["methods"][method]["flags"]


def in_core(config, method: str) -> bool:
    return method in ("base", *config["core"])


# What may be equal, the folder of the evaluation, and how often a token of the update counts: a forward pass and a
# backward pass, which costs two; or not at all.
COMPUTED = {
    "compute with the update": ("test-equal-computed", 3),
    "compute without the update": ("test-equal-computed-before", 0),
}


def computed_tokens(run: Path) -> dict[str, np.ndarray]:
    """{what of COMPUTED: [steps]}: tokens run through the model by the end of each step: prompts, samples, scores, and
    the sequences of the update, their prompts (with the prefix variant: and prefixes) included."""
    before = np.array([line["computed_tokens"] for line in metrics(run)])
    update = np.zeros(len(before))
    for record in read_jsonl(run / "records.jsonl"):
        update[record["step"]] += record["prompt_tokens"] + record["tokens"]
    return {what: before + passes * np.cumsum(update) for what, (_, passes) in COMPUTED.items()}


def metrics(run: Path) -> list[dict]:
    return read_jsonl(run / "metrics.jsonl")


def search_table(args, config) -> str:
    """pass@1 on validation problems for every method and learning rate; the best in bold, as the config should have."""
    rows = []
    for method, of in config["methods"].items():
        found = {}
        for lr in config["search"]["lr"]:
            summary = args.out / "search" / f"{slug(method)}-lr{lr:g}" / "validation" / "summary.json"
            if summary.exists():
                found[lr] = json.loads(summary.read_text())["metrics"]["pass@1"]["mean"]
        if not found:
            continue
        best = max(found, key=lambda lr: found[lr])
        cells = [f"**{found[lr]:.3f}**" if lr == best else f"{found[lr]:.3f}" if lr in found else "–"
                 for lr in config["search"]["lr"]]  # fmt: skip
        note = "" if best == of["lr"] else f"the config has {of['lr']:g}"
        rows.append([method, *cells, note])
    return markdown(["pass@1, validation", *(f"lr {lr:g}" for lr in config["search"]["lr"]), ""], rows)


# ---------------------------------------------------------------------------------------------- numbers


def read_values(args, config, name: str, test: str = "test") -> dict[str, np.ndarray]:
    """{metric: [seeds, problems] or, of the anytime accuracy, [seeds, problems, GRID]} of the evaluations that are
    there, each problem's mean over its samples."""
    seeds: dict[str, list] = {}
    for seed in config["seeds"]["core"]:
        run = folder(args, name, seed) / test
        if not (run / "summary.json").exists():
            continue
        records = sorted(load_records(run / "records.jsonl"), key=lambda r: (r["id"], r["sample"]))
        groups = group_by_problem(records).values()
        values = {
            m: [np.mean([of(r) for r in group], 0) for group in groups] for m, of in trace_metrics(config).items()
        }
        hardest = max(r["level"] for r in records)
        values["hard"] = [v if group[0]["level"] == hardest else np.nan for v, group in zip(values["right"], groups)]
        for metric, of_problems in values.items():
            seeds.setdefault(metric, []).append(of_problems)
        forced = run.parent / "force"
        if test == "test" and (forced / "summary.json").exists():
            settings = (config_of(forced) or {})["settings"]
            records = sorted(load_records(forced / "records.jsonl"), key=lambda r: (r["id"], r["sample"]))
            for metric, of_problems in budget_force.problem_values(settings, records).items():
                seeds.setdefault(f"forced: {metric}", []).append(of_problems)
    return {metric: np.array(of) for metric, of in seeds.items()}


def trace_metrics(config) -> dict:
    """{metric: function of one recorded trace}."""
    budgets = numbers("budgets", config["evaluate"]["budgets"])
    grid = grid_of(config)
    return {
        "right": lambda s: s["reward"],
        "tokens": lambda s: s["tokens"],
        "truncated": lambda s: s["finish"] == "length",
        **{f"regret@{b}": lambda s, b=b: regret_at(s, b) for b in budgets},
        "anytime": lambda s: [accuracy_at(s, x) for x in grid],
        "episodes": lambda s: len(s["J"]) - 1,
        "useless before the find": lambda s: waste(s)[0],
        "episodes after it": lambda s: waste(s)[1],
        "progress": lambda s: (s["J"][-1] - s["J"][0]) / max(1, len(s["J"]) - 1),
    }


def grid_of(config) -> np.ndarray:
    return np.linspace(0, config["evaluate"]["max-tokens"], 49)[1:]


def waste(sample: dict) -> tuple[float, int]:
    """(share of the episodes up to the one that finds the solution which try no candidate for the first time: talk and
    re-checks; number of episodes after that one)."""
    thought = sample["text"].split(THINK_END)[0]
    episodes = [thought[start:end] for start, end in episode_spans(thought)]
    find = next((j for j, episode in enumerate(episodes) if "yes, x = " in episode), len(episodes) - 1)
    tried: set[str] = set()
    useless = 0
    for episode in episodes[: find + 1]:
        new = set(re.findall(r"try x = (\d+)", episode)) - tried
        useless += not new
        tried |= new
    return useless / (find + 1), len(episodes) - 1 - find


def resampled(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{method: [seeds, problems, …]} → {method: [1 + DRAWS, …]}: the mean over both, then the means of bootstrap draws.
    Problems are drawn for all methods together (comparisons are paired on them), seeds for each. NaN is not counted."""
    rng, out = np.random.default_rng(0), {}
    count = len(next(iter(arrays.values()))[0])
    problems = np.vstack([np.ones(count), rng.multinomial(count, np.ones(count) / count, DRAWS)])
    for name, array in arrays.items():
        number = len(array)
        seeds = np.vstack([np.ones(number), rng.multinomial(number, np.ones(number) / number, DRAWS)])
        valid = np.isfinite(array).astype(float)
        out[name] = np.einsum("ds,sp...,dp->d...", seeds, np.nan_to_num(array), problems, optimize=True)
        with np.errstate(invalid="ignore"):
            out[name] /= np.einsum("ds,sp...,dp->d...", seeds, valid, problems, optimize=True)
    return out


def cell_of(draws: np.ndarray) -> dict[str, float]:
    """The mean and its 95 % interval; infinite draws (never reached) stay so."""
    some = draws[1:][~np.isnan(draws[1:])]  # toy sizes: a draw without a problem of the kind asked for
    low, high = np.quantile(some, [0.025, 0.975], method="nearest") if len(some) else (math.nan, math.nan)
    return {"mean": float(draws[0]), "low": float(low), "high": float(high)}


def write_report(args, config) -> None:
    """summary.json with every number, findings.md with the tables, the figures, and two traces of one problem."""
    values = {name: read_values(args, config, name) for name in ("base", *config["methods"])}
    values = {name: of for name, of in values.items() if of}
    seed = config["seeds"]["core"][0]
    if not all((folder(args, name, seed) / "test" / "summary.json").exists() for name in ("base", "GRPO")):
        fail(f"--out {args.out}: no evaluation of base and GRPO with seed {seed} there yet")
    summary: dict = {"seeds": {name: len(of["right"]) for name, of in values.items()}, "tables": {}}
    tables = summary["tables"]
    longer = {name: of for name, of in values.items() if trains_longer(config, name)}
    equal = {name: of for name, of in values.items() if name not in longer}
    tables |= comparison(config, "Equal sampled tokens", equal, "GRPO")
    columns, _ = columns_of(config, equal["base"])
    added: Table = {}
    for name in values:
        if name.startswith("MRT online + length penalty") and name.replace("MRT online", "GRPO") in values:
            added |= differences(values, [name], name.replace("MRT online", "GRPO"), columns)
    tables["What MRT adds to the length penalty"] = added
    if longer:
        tables |= comparison(config, "Longer training", {"base": values["base"], **longer}, next(iter(longer)))
    tables["Normalised regret"] = regret_table(config, values, "regret@")
    beyond = regret_table(config, values, "forced: regret@")
    tables["Normalised regret of thoughts that are cut and extended"] = beyond
    tables["Accuracy after extensions"] = extensions = extension_table(values)
    tables["Behaviour and cost"] = behaviour_table(args, config, values)
    tables["During training (validation problems; mean and range over seeds)"] = training_table(args, config, values)
    same_cost = {"equal sampled tokens": equal}
    for what, (test, _) in COMPUTED.items():
        cut = {name: read_values(args, config, name, test) for name in equal}
        cut = {name: of for name, of in cut.items() if of}
        if cut:
            some = {"base": values["base"], "GRPO": values["GRPO"], **cut}
            tables |= comparison(config, f"Equal {what}", some, "GRPO")
        same_cost[f"equal {what}"] = cut
    tables["MRT online: difference to MRT prefix"] = {
        title: differences(of, ["MRT online"], "MRT prefix", columns)["MRT online"]
        for title, of in same_cost.items()
        if {"MRT online", "MRT prefix"} <= set(of)
    }
    star = {"STaR": "test-outcome", "MRT-STaR": "test-mrt"}
    star = {name: read_values(args, config, "STaR", test) for name, test in star.items()}
    star = {name: of for name, of in star.items() if of}
    if star:
        tables |= comparison(config, "Self-training", {"base": values["base"], **star}, "STaR")
    estimators = args.out / "estimators" / "summary.json"
    if estimators.exists():
        found = json.loads(estimators.read_text())["estimators"]
        tables["Estimators of J against 256 sampled answers"] = {
            name: {c: f"{v:,}" if isinstance(v, int) else f"{v:.4f}" for c, v in of.items() if c != "seconds"}
            for name, of in found.items()
        }
    text = "".join(f"## {title}\n\n{markdown_of(rows)}\n" for title, rows in tables.items() if rows)
    args.pages.mkdir(parents=True, exist_ok=True)
    write_json(args.pages / "summary.json", summary)
    text += f"## Learning-rate search\n\n{search_table(args, config)}\n" if (args.out / "search").exists() else ""
    write_text(args.pages / "findings.md", text + two_traces(args, config))
    draw_method(args, config)
    draw_anytime(args, config, {name: values[name] for name in ("base", *config["core"]) if name in values}, "anytime")
    if longer:
        draw_anytime(args, config, {"base": values["base"], **longer}, "anytime-longer")
    if star:
        draw_anytime(args, config, {"base": values["base"], **star}, "star")
    draw_training(args, config, values)
    draw_extensions(args, {name: row for name, row in extensions.items() if name not in longer})
    for run, figure in (("analysis", "scaling"), ("analysis", "progress"), ("evaluation", "efficiency"),
                        ("budgets", "regret")):  # fmt: skip
        if (args.out / run / f"{figure}.png").exists():
            shutil.copy(args.out / run / f"{figure}.png", args.pages / f"{run}-{figure}.png")
    print(text)
    print(f"tables: {args.pages / 'findings.md'}   numbers: {args.pages / 'summary.json'}   figures beside them")


Table = dict[str, dict[str, dict | str]]  # row → column → interval or text


def markdown_of(rows: Table) -> str:
    columns = list(next(iter(rows.values())))

    def shown(column: str, value) -> str:
        if not isinstance(value, dict):
            return value
        sign = "+" if column.startswith(("Δ", "gain")) else ""
        digits = 1 if "tokens" in column else 2 if "ratio" in column or column.startswith("episodes") else 3
        if not math.isfinite(value["mean"]):
            return "–"
        return cell(value, digits, sign).replace("inf", "∞")

    return markdown(["", *columns], [[row, *(shown(c, of[c]) for c in columns)] for row, of in rows.items()])


def boot(values: dict, metric: str) -> dict[str, np.ndarray]:
    return resampled({name: of[metric] for name, of in values.items() if metric in of})


def outcome_table(config, values: dict, reference: str) -> Table:
    """Accuracy within the training budget, what it gained over the base, and tokens."""
    right, tokens, hard = boot(values, "right"), boot(values, "tokens"), boot(values, "hard")
    gain = {name: right[name] - right["base"] for name in right}
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = {name: gain[name] / gain[reference] for name in gain}
    return {
        name: {
            "seeds": str(len(values[name]["right"])),
            "lr": f"{config['methods'][name]['lr']:g}" if name in config["methods"] else "",
            f"right@{config['evaluate']['max-tokens']}": cell_of(right[name]),
            "gain": cell_of(gain[name]) if name != "base" else "",
            f"ratio of gains to {reference}": "" if name in ("base", reference)
            else cell_of(ratio[name]),
            "30 candidates": cell_of(hard[name]),
            "tokens": cell_of(tokens[name]),
        }
        for name in right
    }  # fmt: skip


def comparison(config, title: str, values: dict, reference: str) -> dict[str, Table]:
    """Tables of methods with as many tokens as their reference, and their differences to it."""
    names = [name for name in values if name not in ("base", reference)]
    plain, forced = columns_of(config, values[reference])
    tables = {
        title: outcome_table(config, values, reference),
        f"{title}: difference to {reference}": differences(values, names, reference, plain),
        f"{title}: tokens for a forced answer to be right so often": reach_table(config, values, reference),
    }
    some = [name for name in names if all(column in values[name] for column in forced)]
    if forced and some:
        heading = f"{title}: difference to {reference} where thoughts are cut and extended"
        tables[heading] = differences(values, some, reference, forced)
    return tables


def columns_of(config, values: dict) -> tuple[list[str], list[str]]:
    """The metrics in which methods are compared: (of whole traces, of thoughts cut and extended beyond the budget)."""
    top = config["evaluate"]["max-tokens"]
    budgets = numbers("budgets", config["evaluate"]["budgets"])
    beyond = [m for m in values if m.startswith("forced: regret@") and int(m.rsplit("@", 1)[1]) >= top]
    forced = list(dict.fromkeys([*beyond[:1], *beyond[-1:]]))
    return ["right", "tokens", *(f"regret@{b}" for b in budgets)], forced + extensions_of(values)


def extensions_of(values: dict) -> list[str]:
    return [m for m in values if re.fullmatch(r"forced: \d+ extensions", m)]


def differences(values: dict, names: list[str], reference: str, columns: list[str]) -> Table:
    draws = {metric: boot({name: values[name] for name in (reference, *names)}, metric) for metric in columns}
    return {
        name: {f"Δ {m.removeprefix('forced: ')}": cell_of(draws[m][name] - draws[m][reference]) for m in columns}
        for name in names
    }


def regret_table(config, values: dict, metric: str) -> dict[str, dict[str, dict]]:
    """From the episodes of the test traces (regret@), or from thoughts cut at budgets and extended beyond their end
    (forced: regret@), for the seeds that have these; after the last extension a curve is held."""
    top, rows = config["evaluate"]["max-tokens"], {}
    inside = numbers("budgets", config["evaluate"]["budgets"])
    of_column = {column: int(column.rsplit("@", 1)[1]) for column in values["base"] if column.startswith(metric)}
    draws = {f"regret@{b}": boot(values, column) for column, b in of_column.items() if b in inside or b > top}
    for name in values:
        if all(name in of for of in draws.values()):
            rows[name] = {column: cell_of(of[name]) for column, of in draws.items()}
    return rows


def reach_table(config, values: dict, reference: str) -> Table:
    """Tokens at which answers forced by then are so often right, and how many times as many the reference needs (draws
    in which neither gets there do not count)."""
    curves = {name: np.pad(of, ((0, 0), (1, 0))) for name, of in boot(values, "anytime").items()}  # 0 within 0 tokens
    grid, rows = np.append(0.0, grid_of(config)), {name: {} for name in curves}
    for target in config["targets"]:
        need = {n: np.array([tokens_to_reach(target, grid, curve) for curve in of]) for n, of in curves.items()}
        for name in curves:
            rows[name][f"tokens for {target}"] = cell_of(need[name])
            compared = name != reference and np.isfinite([need[name][0], need[reference][0]]).all()
            with np.errstate(invalid="ignore"):
                rows[name][f"ratio {target}"] = cell_of(need[reference] / need[name]) if compared else "–"
    return rows


def extension_table(values: dict) -> dict[str, dict[str, dict]]:
    metrics = extensions_of(values["base"])
    draws = {m: boot(values, m) for m in metrics}
    return {name: {m.removeprefix("forced: "): cell_of(draws[m][name]) for m in metrics}
            for name in values if metrics and name in draws[metrics[0]]}  # fmt: skip


def behaviour_table(args, config, values: dict) -> Table:
    draws = {
        m: boot(values, m)
        for m in ("episodes", "useless before the find", "episodes after it", "progress", "truncated")
    }
    rows: Table = {}
    for name in values:
        rows[name] = {m: cell_of(draws[m][name]) for m in draws}
        runs = training_runs(args, config, name)
        lines = [metrics(run) for run in runs]
        sampled = [of[-1]["sampled_tokens"] for of in lines]
        trained = sum(line["trained_tokens"] for of in lines for line in of)
        per_token = {"sampled": sum(sampled)}
        computed = [computed_tokens(run) for run in runs]
        per_token |= {what: sum(of[what][-1] for of in computed) for what in COMPUTED}
        rows[name]["sampled tokens"] = f"{np.mean(sampled) / 1e3:.0f}k" if runs else ""
        rows[name]["steps"] = f"{np.mean([len(of) for of in lines]):.1f}" if runs else ""
        for what, tokens in per_token.items():
            rows[name][f"{what} per trained token"] = f"{tokens / trained:.2f}" if runs else ""
    return rows


def validation_curves(args, config, name: str, at) -> dict[str, np.ndarray]:
    """{what: [seeds, at]} on validation problems after `at` sampled tokens of training, linear between validations."""
    lines = [read_jsonl(run / "validation.jsonl") for run in training_runs(args, config, name)]
    top = config["train"]["max-tokens"]
    curves = {
        f"forced@{top // 4}": lambda c: c["forced"][str(top // 4)],
        f"right@{top}": lambda c: c["accuracy"],
        "tokens": lambda c: c["tokens"],
    }
    return {what: np.array([np.interp(at, [c["sampled_tokens"] for c in v], [of(c) for c in v]) for v in lines])
            for what, of in curves.items()}  # fmt: skip


def training_table(args, config, values: dict) -> Table:
    """Mean over seeds on validation problems, and the range over seeds, at thirds of the training."""
    thirds, rows = [config["train"]["max-sampled-tokens"] * i // 3 for i in (1, 2, 3)], {}
    for name in (n for n in config["methods"] if n in values):
        rows[name] = {}
        for what, of in validation_curves(args, config, name, thirds).items():
            for tokens, column in zip(thirds, of.T):
                rows[name][f"{what} after {tokens / 1e3:.0f}k"] = {
                    "mean": float(column.mean()), "low": float(column.min()), "high": float(column.max())}  # fmt: skip
    return rows


def training_runs(args, config, name: str) -> list[Path]:
    runs = [folder(args, name, seed) for seed in config["seeds"]["core"]]
    return [run for run in runs if (run / "summary.json").exists()]


def two_traces(args, config) -> str:
    """First samples of one problem, before and after training with the first seed: of the problems that all models
    solve and the base in more than three episodes, the first with the most candidates."""
    runs = {name: folder(args, name, config["seeds"]["core"][0]) / "test" for name in ("base", "GRPO", "MRT online")}
    samples = {
        name: {r["problem"]: r for r in load_records(run / "records.jsonl") if r["sample"] == 0}
        for name, run in runs.items()
        if (run / "summary.json").exists()
    }

    def fit(problem: str) -> tuple:
        base = samples["base"][problem]
        return all(of[problem]["reward"] for of in samples.values()), len(base["J"]) > 4, base["level"]

    problem = max(samples["base"], key=fit)  # the first of equals
    text = "## One problem before and after\n"
    for name, of in samples.items():
        sample = of[problem]
        text += f"\n**{name}**, {sample['tokens']} tokens, {'right' if sample['reward'] else 'wrong'}. "
        text += f"J at the ends of its episodes: {', '.join(f'{j:.2f}' for j in sample['J'])}\n\n"
        text += "".join(f"    {line}\n" if line else "\n" for line in [problem, *sample["text"].split("\n")])
    return text


# ---------------------------------------------------------------------------------------------- pictures


def draw_method(args, config) -> None:
    """MRT on one trace of the base: J(μ) after each episode, an episode's progress, the regret above the curve."""
    records = load_records(folder(args, "base", config["seeds"]["core"][0]) / "test" / "records.jsonl")
    samples = [r for r in records if r["finish"] == "stop"]
    clear = [s for s in samples if 5 <= len(s["J"]) - 1 <= 7 and s["J"][0] == 0 and s["J"][-2:] == [1, 1]]
    clear.sort(key=lambda s: not any(0 < j < 1 for j in s["J"]))
    sample = (clear or samples)[0]
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 3.4), constrained_layout=True)
    ends, values = sample["boundaries"], sample["J"]
    thought = sample["text"].split(THINK_END)[0]
    texts = [thought[start:end] for start, end in episode_spans(thought)]
    axis.fill_between(ends, values, 1, step="post", color="grey", alpha=0.15, linewidth=0)
    axis.step(ends, values, "k-", where="post", linewidth=1.2)
    for j, (start, end, text) in enumerate(zip(ends, ends[1:], texts)):
        progress = values[j + 1] - values[j]
        axis.axvspan(start, end, color=f"C{j}", alpha=0.08, linewidth=0)
        axis.annotate("", (end, values[j + 1]), (end, values[j]), arrowprops={"arrowstyle": "->", "color": f"C{j}"})
        found = ": yes" in thought[: thought.index(text)]
        kind = "re-checks" if found or "try x" not in text else "tries candidates"
        kind = "talks" if " x = " not in text else "finds x" if ": yes" in text and not found else kind
        axis.text((start + end) / 2, 1.05, f"$z_{j}$ {kind}", ha="center", fontsize=8, color=f"C{j}")
        axis.text((start + end) / 2, 1.12, f"$r_{{prg}}$ = {progress:+.2f}", ha="center", fontsize=8, color=f"C{j}")
    axis.set(xlabel="tokens of the thought", ylabel="J(μ): success rate if stopped here", xlim=(0, ends[-1]))
    axis.set(ylim=(0, 1.2), yticks=[0, 0.25, 0.5, 0.75, 1])
    axis.text(ends[-1] * 0.02, 0.75, "regret: the area above", fontsize=8, color="grey")
    save_figure(figure, args.pages / "method.png")


def draw_anytime(args, config, values: dict, stem: str) -> None:
    """Accuracy of an answer forced within a budget, and the normalised regret, dashed beyond the training budget."""
    plt = pyplot()
    grid, top, curves = grid_of(config), config["evaluate"]["max-tokens"], boot(values, "anytime")
    regrets = [regret_table(config, values, metric) for metric in ("regret@", "forced: regret@")]
    regrets = regrets if len(regrets[1]) > 1 else regrets[:1]  # the base alone
    figure, axes = plt.subplots(1, 1 + len(regrets), figsize=(4 + 4 * len(regrets), 3.6), constrained_layout=True)
    colors = {name: f"C{number}" for number, name in enumerate(("base", *config["core"]))}
    for number, name in enumerate(values):
        color = colors.get(name.split(",")[0], f"C{number}")  # that of the method which was trained less long
        draw_curve(axes[0], grid, [cell_of(column) for column in curves[name].T], color, name, "-")
        for axis, rows in zip(axes[1:], regrets):
            points = {int(column.split("@")[1]): mean for column, mean in rows.get(name, {}).items()}
            for budgets, style in (([b for b in points if b <= top], "o-"), ([b for b in points if b >= top], "o--")):
                draw_curve(axis, budgets, [points[b] for b in budgets], color, None, style)
    axes[0].set(xlabel="token budget", ylabel="accuracy of an answer forced by then", ylim=(0, 1), xlim=(0, top))
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].set(xlabel="token budget C0", ylabel="normalised regret", title="episodes of test traces")
    if len(regrets) > 1:
        axes[2].set(xlabel="token budget C0", title="thoughts cut, and extended beyond the line")
        axes[2].axvline(top, color="grey", linewidth=0.8)
    for axis in axes:
        axis.grid(alpha=0.3)
    save_figure(figure, args.pages / f"{stem}.png")


def draw_training(args, config, values: dict) -> None:
    """Validation during training against sampled tokens: mean and range over seeds."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
    top = config["evaluate"]["max-tokens"]
    for number, name in enumerate((n for n in config["core"] if n in values), 1):
        x = np.linspace(0, config["train"]["max-sampled-tokens"], 40)
        for axis, rows in zip(axes, validation_curves(args, config, name, x).values()):
            axis.plot(x / 1e3, rows.mean(0), color=f"C{number}", label=name)
            axis.fill_between(x / 1e3, rows.min(0), rows.max(0), color=f"C{number}", alpha=0.12, linewidth=0)
    axes[0].set(ylabel=f"accuracy of answers forced at {top // 4} tokens")
    axes[1].set(ylabel=f"accuracy within {top} tokens")
    axes[2].set(ylabel="tokens of a completion", ylim=(0, None))
    axes[2].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.set_xlabel("sampled tokens of training (thousands)")
        axis.grid(alpha=0.3)
    save_figure(figure, args.pages / "training.png")


def draw_extensions(args, rows: dict[str, dict[str, dict]]) -> None:
    """Accuracy after a thought is made to go on, 0 to 8 times (Figure 12)."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5, 3.6), constrained_layout=True)
    for number, (name, row) in enumerate(rows.items()):
        extensions = [int(column.split()[0]) for column in row]
        draw_curve(axis, extensions, list(row.values()), f"C{number}", name, "o-")
    axis.set(xlabel="extensions of the thought", ylabel="accuracy", ylim=(0, 1))
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.3)
    save_figure(figure, args.pages / "extensions.png")
