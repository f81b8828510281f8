"""analyze_r1.py: how well does a reasoning model use its thinking tokens? (Section 5, Appendices D and E)

    python analyze_r1.py                                  # the embedded model, a minute on a laptop
    python analyze_r1.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-32B --direct-model Qwen/Qwen2.5-32B-Instruct
    python analyze_r1.py --traces r1.jsonl --model MU     # responses somebody has; the local model MU is μ
    python analyze_r1.py --from runs/NAME                 # table, figures and page again, from the records alone

Thoughts are sampled (or given), cut into episodes, and at every boundary the model is forced to answer: J(μ|prefix).
From that come [maj@p]_j, the accuracy of p votes after j episodes (Figure 3), the regret over token budgets, the
progress of each episode, and trace.html, a page to read traces in. Intervals are 95 %, from a bootstrap over problems.
"""

from run.files import append_jsonl, digest, end_in_one_line, fail  # isort: split

import argparse
import math
import sys
from collections import Counter
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

import numpy as np

from common import (
    Segmentation,
    Trace,
    additional_regret,
    episode_spans,
    flat,
    grade_traces,
    token_boundaries,
)
from engine import plural
from engine.sampler import pick_engine
from engine.thoughts import marks_of, opening_after
from engine.tokens import Completion, encode, text_and_offsets
from run import data, folder, report
from run.backtracking import marker_counts
from run.flags import (
    add_group,
    changed,
    default_out,
    new_parser,
    parse_flags,
    positive_int,
    quarters,
    whole_number,
    with_model,
)
from run.folder import short_name
from run.report import Curve, Panel, cell, group_by, group_by_problem, interval, mean_interval, problem_means
from run.traces import (
    DIRECT,
    accuracy_at,
    checked_prompts,
    context_of,
    inputs_of,
    new_traces,
    pass_rate,
    prompts_of,
    regret_at,
    room_for_answer,
    sampler_of,
    segmentation,
    tokenizer_of,
    vote_of,
    vote_rate,
)

VOTES = (1, 2, 4, 8)  # p of [maj@p]_j
PANEL = 3  # episodes of a trace that share a panel
# Between a run and its --resume these may change.
MAY_CHANGE = ("budgets", "from_run", "direct_model", "direct_samples")


def flags(argv=None) -> argparse.Namespace:
    # Each flag: name, default with the embedded model, with any other, where the latter comes from.
    parser = new_parser(
        __doc__,
        dataset=("tiny", "HuggingFaceH4/aime_2024", "Section 5; its other set is 40 problems of Omni-MATH"),
        split=("test", "train", "the only one of that set"),
        limit=(96, None, "all"),
    )
    flag = add_group(parser, "thoughts")
    flag("num-samples", 4, 4, "Appendix D: thoughts a problem")
    flag("max-tokens", 256, 8192, "Appendix D")
    flag("temperature", 1.0, 0.7, "Appendix D")
    flag("top-p", 1.0, 1.0, "Appendix D")
    flag("batch-problems", 48, 8, "ours")
    given = "given responses instead of sampled ones: problem, answer, response; any number a problem"
    flag("traces", type=Path, metavar="FILE.jsonl", help=given)
    on_aime = "the authors on AIME 2024; 49 on Omni-MATH, 99 in their regret study"
    flag("max-steps", 49, 45, on_aime, type=whole_number, help="episodes opened at most")
    on_aime = "the authors on AIME 2024; 5 on Omni-MATH, 10 in their regret study"
    joined = "neighbours joined; answers are forced at the ends of the groups"
    flag("episodes-per-point", 1, 3, on_aime, type=positive_int, help=joined)
    flag = add_group(parser, "forced answers (μ)")
    flag("forced-answers", 8, 8, "Appendix D: 8 a boundary")
    flag("answer-tokens", 8, 4096, "Appendix D")
    flag = add_group(parser, "direct baseline")
    flag("direct-model", help="model that answers without episodes (Appendix D: Qwen2.5-32B-Instruct)")
    flag("direct-samples", 32, 32, "Appendix D", type=positive_int, help="its answers")
    flag = add_group(parser, "what is shown")
    flag("budgets")
    redrawn = "redraw an earlier run, or the records of any other script's with J, without a model"
    flag("from", dest="from_run", type=Path, metavar="RUN", help=redrawn)
    args = parse_flags(parser, argv)
    if args.from_run:  # the settings that its records were made with
        if other := {"max_steps", "episodes_per_point"} & args.unusual.keys():
            fail(f"--from {args.from_run}: --{min(other).replace('_', '-')} is the run's own")
        run = folder.recorded_run(args.from_run, "--from", "J")
        made_with = {"max_steps": 49, "episodes_per_point": 1, **run.settings}  # those of the other scripts
        of_run = [f"--{n.replace('_', '-')}={made_with[n]}" for n in ("model", "max_steps", "episodes_per_point")]
        of_run += [f"--parameterization={made_with.get('parameterization', 'open-ended')}"]
        shown = [f"--budgets={','.join(map(str, run.settings['budgets']))}"] if run.settings.get("budgets") else []
        args = parse_flags(parser, shown + (sys.argv[1:] if argv is None else argv) + of_run)
        args.markers = made_with.get("markers", args.markers)
        if args.from_run.name == "records.jsonl":
            args.from_run = args.from_run.parent
        args.out = args.out or (args.from_run if run.script == "analyze_r1.py" else None)
    name = short_name(str(args.from_run or args.traces or args.dataset))
    args.out = args.out or default_out(args, f"analyze-{short_name(args.model)}-{name}", "traces", *MAY_CHANGE)
    return args


def main() -> None:
    args = flags()
    if args.dry_run:
        tell_plan(args)
        return
    if not args.from_run:
        analyse(args)
    elif args.out != args.from_run and folder.config_of(args.out):
        fail(f"--out {args.out}: holds a run; name another folder for what is redrawn")
    write_report(args, args.from_run or args.out, args.out)


def tell_plan(args) -> None:
    """--dry-run: what the analysis costs at most, without a model. The empty prefix is answered once a problem."""
    if args.traces:
        problems, responses = data.load_responses(args.traces, args.limit, data.columns_of(args))
        thoughts, sampled = sum(map(len, responses)), 0
    else:
        problems = data.problems_of(args)
        thoughts = sampled = len(problems) * args.num_samples
    episodes = math.ceil((args.max_steps + 1) / args.episodes_per_point)
    forced = args.forced_answers * (len(problems) + thoughts * episodes)
    direct = len(problems) * args.direct_samples if args.direct_model else 0
    work = ("thought", sampled, args.max_tokens), ("forced answer", forced, args.answer_tokens)
    report.tell_plan(args.dry_run, len(problems), *work, ("direct answer", direct, args.max_tokens))


def analyse(args) -> None:
    """Thoughts, sampled or given, with J(μ) at their boundaries, in records.jsonl; the direct baseline's answers."""
    args.engine = pick_engine(args.engine)
    folder.check_out(args, *MAY_CHANGE)
    tokenizer = tokenizer_of(args)
    if args.traces:
        problems, responses = data.load_responses(args.traces, args.limit, data.columns_of(args))
        prompts = prompts_of(args, tokenizer, problems)
        given, longest = read_given(args, tokenizer, problems, prompts, responses)
    else:
        problems, responses, given = data.problems_of(args), [], None
        prompts, longest = checked_prompts(args, tokenizer, problems)
    inputs, direct = inputs_of(args, problems, prompts), None
    for problem, row in zip(problems, responses):
        inputs.setdefault("responses", {}).update({f"{problem['id']} {n}": digest(text) for n, text in enumerate(row)})
    if args.direct_model:  # a wrong name is told now
        direct = with_model(changed(args, num_samples=args.direct_samples), args.direct_model)
        questions, longest_of_direct = checked_prompts(direct, tokenizer_of(direct), problems, forced=False)
        of_direct = inputs_of(direct, problems, questions)
        inputs |= {f"{kind} of {direct.model}": read for kind, read in of_direct.items()}
    sampler = sampler_of(args, tokenizer, longest)
    run = folder.open_run(args, inputs, *MAY_CHANGE)
    file = run / "records.jsonl"
    for traces in new_traces(args, file, sampler, problems, prompts, episodes_by(args, args.episodes_per_point), given):
        append_jsonl(file, [trace.record() for trace in traces])
    sampler.close()
    if direct:
        answer_directly(direct, run / "direct.jsonl", problems, questions, longest_of_direct)


def episodes_by(args, group_size: int) -> Segmentation:
    """The published rule, with so many neighbours joined."""
    return segmentation(args, args.max_steps, group_size)


# ---------------------------------------------------------------------------------------------- given responses


def read_given(args, tokenizer, problems, prompts, responses: list[list[str]]) -> tuple[list[list[Trace]], int]:
    """Traces of given responses and the tokens of the longest prompt with an answer; tells what cannot be used.

    A response is `[<think>] thought </think> answer`, or has μ's or other marks (`data.split_response`). One
    whose thought does not end was cut off and has no answer; unless no response of the file has a mark: then they are
    solutions without a separate thought.
    """
    context, room = context_of(args), room_for_answer(tokenizer, args.answer_tokens)
    split = [data.split_response(response, marks_of(tokenizer)) for row in responses for response in row]
    marked = any(opened or answer is not None for opened, _, answer in split)
    if not marked:
        seen = f"the first begins {responses[0][0][:40]!r}; --think-marks OPEN CLOSE names others"
        print(f"{args.traces}: no response has marks of a thought, so each is a thought that holds its answer ({seen})")
    if kinds := data.marks_told([response for row in responses for response in row], marks_of(tokenizer)):
        print(f"{args.traces}: thoughts end {kinds}")
    groups, unused = [], Counter()
    for problem, prompt, row in zip(problems, prompts, responses):
        traces = [given_trace(args, tokenizer, problem, prompt, text, marked) for text in row if text.strip()]
        usable = [trace for trace in traces if len(prompt) + trace.boundaries[-1] + room <= context]
        unused["empty"] += len(row) - len(traces)
        unused[f"beyond μ's context of {context} tokens"] += len(traces) - len(usable)
        if not usable:
            print(f"problem {problem['id']}: no usable response")
        for number, trace in enumerate(usable):
            trace.sample = number
        groups.append(usable)
    for why, count in (+unused).items():
        print(f"{args.traces}: left out {plural(count, 'response')}, {why}")
    traces = flat(groups)
    if not traces:
        fail(f"--traces {args.traces}: no usable response")
    grade_traces(traces)
    return groups, max(len(trace.prompt) + trace.boundaries[-1] for trace in traces) + room


def given_trace(args, tokenizer, problem: dict, prompt: list[int], response: str, marked: bool) -> Trace:
    """A trace of text that another model may have written, in the tokens of μ."""
    marks = marks_of(tokenizer)
    _, thought, answer = data.split_response(response, marks)
    ids = encode(tokenizer, opening_after(tokenizer, prompt) + thought)
    written = ids + (encode(tokenizer, (marks.closing if marks else "\n\n") + answer) if answer is not None else [])
    completion = Completion(written, [], "length" if marked and answer is None else "stop")
    completion.text, completion.offsets = text_and_offsets(tokenizer, written)
    finished = answer is not None and marks is not None
    boundaries = token_boundaries(completion, len(ids), episodes_by(args, args.episodes_per_point))
    return Trace(problem, prompt, completion, boundaries, finished, answer if marked else response)


def answer_directly(args, file: Path, problems: list[dict], prompts: list[list[int]], longest: int) -> None:
    """The baseline of Figure 3: many whole answers of a model to every problem, in direct.jsonl."""
    models = {record["model"] for record in folder.load_records(file)} if file.exists() else set()
    if models - {args.model}:
        fail(f"--direct-model {args.model}: {file} has answers of {', '.join(models)}; remove it or name another --out")
    sampler = sampler_of(args, tokenizer_of(args), longest)
    for traces in new_traces(args, file, sampler, problems, prompts, forced=False, drawn=(DIRECT,)):
        append_jsonl(file, [{**trace.record(), "model": args.model} for trace in traces])
    sampler.close()


# ---------------------------------------------------------------------------------------------- numbers


def write_report(args, source: Path, run: Path) -> None:
    """summary.json, summary.md, the figures and the page in the folder `run`, from the records of `source` alone."""
    records, single = folder.recorded_run(source, "--from", "J").records, episodes_by(args, 1)
    args.budgets = args.budgets or quarters(max(record["tokens"] for record in records))
    run.mkdir(parents=True, exist_ok=True)
    for record in records:
        record["episodes"] = len(episode_spans(record["text"][: record["characters"][-1]], single))
        record["maj"] = {kind: votes(record, kind) for kind in ("weighted", "plain")}
    summary = summarise(args, records)
    if (source / "direct.jsonl").exists():
        ids, direct = {r["id"] for r in records}, folder.load_records(source / "direct.jsonl")
        if missing := ids - {r["id"] for r in direct}:
            print(f"{run / 'direct.jsonl'}, left out: lacks {len(missing)} problems, which --direct-model would add")
        else:
            summary["direct"] = direct_summary([r for r in direct if r["id"] in ids])
    figures = [draw_scaling(summary, run), draw_budgets(summary, run), draw_progress(summary, run)]
    page = report.write_page(records, run / "trace.html")
    report.write_summary(run, summary, table(summary) + report.why_zero(records), *figures, page)


def votes(record: dict, kind: str) -> list[list[float]]:
    """[maj@p]_j of one trace, [points, VOTES], votes of weight 2^(mean token log-prob) (Appendix D) or "plain"; for p
    above the number of forced answers all of them vote."""

    def vote(answers: list[dict], p: int) -> float:
        return vote_rate(answers, record["gold"], min(p, len(answers)), kind == "weighted")

    return [[vote(a, p) if a else J for p in VOTES] for J, a in zip(record["J"], record["forced"])]


def summarise(args, records: list[dict]) -> dict:
    """Every number that is printed or drawn, with its interval over problems, which weigh the same."""
    grid = [max(args.budgets) * (i + 1) / 40 for i in range(40)]
    for record in records:
        record["additional_regret"] = additional_regret(record["maj"]["weighted"])
    comparable = [r for r in records if not math.isnan(r["additional_regret"])]
    regrets = {budget: mean_interval(records, regret_at, budget) for budget in args.budgets}
    forced = [answer for r in records for answers in r["forced"] for answer in answers]
    return {
        **report.counts_of(records),
        **(marker_counts(r["text"] for r in records) if args.parameterization == "backtracking" else {}),
        "traces": len(records),
        "one_episode": float(np.mean([r["episodes"] == 1 for r in records])),  # before neighbours are joined
        "episodes": mean_interval(records, lambda r: r["episodes"]),
        "tokens": mean_interval(records, lambda r: r["tokens"]),
        "right": mean_interval(records, lambda r: r["reward"]),
        "forced_answers": max((len(answers) for r in records for answers in r["forced"]), default=0),  # of a boundary
        "forced_answers_without_box": float(np.mean([a["boxed"] is None for a in forced])) if forced else None,
        "panels": panels(args, records),
        "regret": {
            budget: {"normalised": regret, "cumulative": {end: budget * value for end, value in regret.items()}}
            for budget, regret in regrets.items()
        },
        "accuracy_at": {"budget": grid, "forced": [mean_interval(records, accuracy_at, budget) for budget in grid]},
        "regret_over_episodes": regret_over_episodes(records),
        "additional_regret": mean_interval(comparable, lambda r: r["additional_regret"]) if comparable else None,
        "progress": progress(records),
    }


def panels(args, records: list[dict]) -> list[dict]:
    """[maj@p]_j by the number of episodes of a trace (Figure 3). Within a panel a trace that has ended keeps its last
    value, so every point is over the same traces."""
    shown = []
    for number, traces in sorted(group_by(records, lambda r: (r["episodes"] - 1) // PANEL).items()):
        points = range(max(len(r["J"]) for r in traces))
        panel = {
            "episodes": [number * PANEL + 1, (number + 1) * PANEL],
            "traces": len(traces),
            "problems": len(group_by_problem(traces)),
            "after_episodes": [j * args.episodes_per_point for j in points],
            "tokens": {p: [problem_means(traces, spent, j, p).mean() for j in points] for p in VOTES},
            **{kind: votes_after_each(kind, traces, points) for kind in ("weighted", "plain")},
        }
        shown.append(panel)
    return shown


def votes_after_each(kind: str, traces: list[dict], points: range) -> dict[int, list[dict]]:
    """{p: [maj@p]_j at every point j}."""

    def vote(record: dict, j: int, v: int) -> float:
        return held(record["maj"][kind], j)[v]

    return {p: [mean_interval(traces, vote, j, v) for j in points] for v, p in enumerate(VOTES)}


def held(values: list, j: int):
    """The value at point j; the last one of a trace that has ended before."""
    return values[min(j, len(values) - 1)]


def spent(record: dict, j: int, p: int) -> float:
    """Tokens of the prefix at point j and of p answers forced there."""
    return held(record["boundaries"], j) + p * held(record["answer_tokens"], j)


def direct_summary(records: list[dict]) -> dict:
    """pass@k, as the paper plots it: an oracle picks the right one of k; and maj@k, the like-for-like vote."""
    groups = list(group_by_problem(records).values())
    ks = [2**i for i in range(min(map(len, groups)).bit_length())]
    tokens = float(problem_means(records, lambda r: r["tokens"]).mean())
    passes = [[pass_rate(group, k) for group in groups] for k in ks]
    votes = [[vote_of(group, k) for group in groups] for k in ks]
    tokens_of_k = [k * tokens for k in ks]
    return {"k": ks, "tokens": tokens_of_k, "pass@k": [*map(interval, passes)], "maj@k": [*map(interval, votes)]}


def regret_over_episodes(records: list[dict]) -> list[dict]:
    """Definition 4.1 with the comparator at 1: Σ_{j<k} (1 - J(μ|z_0:j)), for k = 1, 2, …; a trace that has ended keeps
    its last J. k counts the points at which answers were forced."""
    lengths = sorted(len(r["J"]) for r in records)
    most = lengths[95 * (len(lengths) - 1) // 100]  # all but the longest twentieth

    def regret_after(record: dict, k: int) -> float:
        return sum(1 - held(record["J"], j) for j in range(k))

    return [mean_interval(records, regret_after, k) for k in range(1, most + 1)]


def progress(records: list[dict]) -> dict | None:
    """Progress of an episode (Definition 6.1), r_prg = J after it - J before it: its spread, and where it is made.

    With n forced answers a J is off by √(J(1-J)/n), so part of the spread is noise; `noise` is that part's standard
    deviation, to be compared with `deviation`."""
    episodes = [
        {"id": r["id"], "number": j + 1, "fifth": 5 * j // (len(r["J"]) - 1), "ends": ends, "gain": gain}
        for r in records
        for j, (ends, gain) in enumerate(zip(pairwise(r["J"]), np.diff(r["J"])))
    ]
    if not episodes:
        return None
    n = max((len(answers) for r in records for answers in r["forced"]), default=1)
    gains, J = (np.array([episode[name] for episode in episodes]) for name in ("gain", "ends"))  # [episodes], [., 2]
    edges = np.linspace(-1, 1, 2 * n + 2)
    by_number, by_fifth = (sorted(group_by(episodes, itemgetter(field)).items()) for field in ("number", "fifth"))
    return {
        **describe(episodes),
        "deviation": float(gains.std()),
        "noise": float(np.sqrt(np.mean(J * (1 - J)) * 2 / max(1, n - 1))),
        "histogram": {"edges": edges.tolist(), "episodes": np.histogram(gains, edges)[0].tolist()},
        "by_fifth_of_the_trace": [describe(group) for _, group in by_fifth],
        "by_number": [{"number": number, **describe(group)} for number, group in by_number if len(group) >= 10],
    }


def describe(episodes: list[dict]) -> dict:
    """Their mean progress, and the shares of those that gain, change nothing, lose."""
    return {
        "episodes": len(episodes),
        "mean": mean_interval(episodes, lambda e: e["gain"]),
        "positive": mean_interval(episodes, lambda e: e["gain"] > 1e-9),
        "none": mean_interval(episodes, lambda e: abs(e["gain"]) <= 1e-9),
        "negative": mean_interval(episodes, lambda e: e["gain"] < -1e-9),
    }


def table(summary: dict) -> str:
    """The numbers of `summarise` as Markdown."""
    moved = summary["progress"]
    rows = [
        ("traces, problems", f"{summary['traces']}, {summary['problems']}"),
        ("right", cell(summary["right"])),
        ("tokens a trace", cell(summary["tokens"], 0)),
        ("episodes a trace", cell(summary["episodes"], 1)),
        ("without a thought, of a single episode", f"{summary['no_thought']:.3f}, {summary['one_episode']:.3f}"),
        ("truncated, without an answer", f"{summary['truncated']:.3f}, {summary['no_answer']:.3f}"),
    ]
    if moved:
        rows += [
            ("progress of an episode, mean", cell(moved["mean"])),
            ("its deviation, of which noise of the estimate", f"{moved['deviation']:.3f}, {moved['noise']:.3f}"),
            ("episodes with progress", cell(moved["positive"])),
            ("episodes without", cell(moved["none"])),
            ("episodes that lose", cell(moved["negative"])),
        ]
    rows += [(f"normalised regret at {b}", cell(regret["normalised"])) for b, regret in summary["regret"].items()]
    rows.append(("regret against voting early (Appendix E)", cell(summary["additional_regret"])))
    by_panel, most = [], max(p for p in VOTES if p <= max(1, summary["forced_answers"]))
    for shown in summary["panels"]:
        few, many = shown["weighted"][VOTES[0]], shown["weighted"][most]
        counts = f"{shown['traces']} ({shown['problems']})"
        by_panel.append(["{} to {}".format(*shown["episodes"]), counts, *map(cell, (few[0], few[-1], many[-1]))])
    header = ["episodes", "traces (problems)", "maj@1 at the start", "maj@1 at the end", f"maj@{most} at the end"]
    return report.markdown(["", ""], rows) + "\n" + report.markdown(header, by_panel)


# ---------------------------------------------------------------------------------------------- pictures


def draw_scaling(summary: dict, run: Path) -> Path:
    """Figure 3: a column a panel; above over episodes, below over tokens with the votes branching off."""
    shown = [p for p in summary["panels"] if p["traces"] >= 3][:8] or summary["panels"][:8]
    colors = report.pyplot().get_cmap("viridis")(np.linspace(0.75, 0.1, len(VOTES)))
    ps = [p for p in VOTES if p <= summary["forced_answers"]] or [1]
    direct, above, below = [], [], []
    if "direct" in summary:
        for metric, label, color in (("pass@k", "direct, pass@k (oracle)", "C1"), ("maj@k", "direct, maj@k", "C3")):
            direct.append(Curve(summary["direct"]["tokens"], summary["direct"][metric], label, ".-", color, band=False))
    for column in shown:
        episodes, tokens, votes = column["after_episodes"], column["tokens"], column["weighted"]
        first, last = column["episodes"]
        title = f"{first}–{last} episodes" if last > first else f"{first} episode{'s' * (first > 1)}"
        title += f"\n{plural(column['traces'], 'trace')}, {plural(column['problems'], 'problem')}"
        labels = {
            "title": title,
            "xlabel": "episodes",
            "ylim": report.SHARE,
            "xticks": episodes[:: len(episodes) // 5 + 1],
        }
        curves = [Curve(episodes, votes[p], f"maj@{p}", ".-", c, band=p == 1) for p, c in zip(ps, colors)]
        above.append(Panel(labels, curves))
        curves = [Curve(tokens[1], votes[1], "after each episode, maj@1", ".-", "C0")]
        for j in range(len(episodes)):
            x, means = [tokens[p][j] for p in ps], [votes[p][j] for p in ps]
            curves.append(
                Curve(x, means, None if j else f"votes of {', '.join(map(str, ps))}", ".--", "C2", band=False)
            )
        below.append(Panel({"xlabel": "tokens", "ylim": report.SHARE}, [*curves, *direct], tokens=True))
    for row in (above, below):
        row[0].settings["ylabel"] = "accuracy"
    width = max(5 / len(shown), 2.1)
    return report.draw_panels(run / "scaling.png", *above, *below, rows=2, width=width, height=2.5, sharey=True)


def draw_budgets(summary: dict, run: Path) -> Path:
    """Accuracy of the answer forced by a budget, the area above it (the regret), and the regret over episodes."""
    within, regret, over_episodes = summary["accuracy_at"], summary["regret"], summary["regret_over_episodes"]
    accuracy = Curve(within["budget"], within["forced"], style="-")
    normalised = Curve(list(regret), [at_budget["normalised"] for at_budget in regret.values()])
    points = range(1, len(over_episodes) + 1)
    never = Curve(points, [{"mean": k} for k in points], "never right", ":", "grey", band=False)
    labels = {"xlabel": "points k where it is forced to answer", "ylabel": "cumulative regret, Σ (1 - J)"}
    cumulative = Panel(labels, [Curve(points, over_episodes, "the model"), never])
    return report.draw_panels(run / "budgets.png", *report.anytime_panels([accuracy], [normalised]), cumulative)


def draw_progress(summary: dict, run: Path) -> Path:
    """Progress of episodes: how it is spread, by the number of the episode, by the place in the trace."""
    figure, (spread, by_number, by_fifth) = report.subplots(3)
    moved = summary["progress"]
    if moved:
        edges = np.array(moved["histogram"]["edges"])
        middle = (edges[:-1] + edges[1:]) / 2
        colors = np.where(middle > 1e-9, "C0", np.where(middle < -1e-9, "C1", "0.6"))
        spread.bar(middle, moved["histogram"]["episodes"], width=np.diff(edges) * 0.9, color=colors)
        title = f"{moved['episodes']} episodes; deviation {moved['deviation']:.2f}, "
        title += f"noise of the estimate {moved['noise']:.2f}"
        spread.set(xlabel="progress of an episode, J after - J before", ylabel="episodes", yscale="log", title=title)
        if rows := moved["by_number"]:
            means = [row["mean"] for row in rows]
            report.draw_curve(by_number, Curve([row["number"] for row in rows], means, color="C0"))
        by_number.xaxis.get_major_locator().set_params(integer=True)
        by_number.axhline(0, color="grey", linewidth=0.8)
        by_number.set(xlabel="number of the episode", ylabel="mean progress")
        fifths, below = moved["by_fifth_of_the_trace"], 0.0
        for name, color in (("positive", "C0"), ("none", "0.75"), ("negative", "C1")):
            shares = np.array([fifth[name]["mean"] for fifth in fifths])
            by_fifth.bar(range(1, len(fifths) + 1), shares, bottom=below, color=color, label=name)
            below += shares
        by_fifth.set(xlabel="fifth of the trace", ylabel="share of episodes", ylim=(0, 1))
        by_fifth.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    return report.save_figure(figure, run / "progress.png")


if __name__ == "__main__":
    end_in_one_line(main)
