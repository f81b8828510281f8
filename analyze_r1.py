"""analyze_r1.py: how well does a reasoning model use its thinking tokens? (Section 5, Appendices D and E)

    python analyze_r1.py                                  # the embedded model, a minute on a laptop
    python analyze_r1.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-32B --direct-model Qwen/Qwen2.5-32B-Instruct
    python analyze_r1.py --traces r1.jsonl --model MU     # responses somebody has; the local model MU is μ
    python analyze_r1.py --from runs/NAME                 # table, figures and page again, from the records alone

Thoughts are sampled (or given), cut into episodes, and at every boundary the model is forced to answer: J(μ|prefix).
From that come [maj@p]_j, the accuracy of p votes after j episodes (Figure 3), the regret over token budgets, the
progress of each episode, and trace.html, a page to read traces in. Intervals are 95 %, from a bootstrap over problems.
"""

import argparse
import copy
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np

import common
from common import THINK_END, Completion, ForcedAnswers, Sampler, Trace, fail

# flag: (default with the embedded model, with any other model, where the latter comes from)
DEFAULTS = {
    "dataset": ("tiny", "HuggingFaceH4/aime_2024", "Section 5; its other set is 40 problems of Omni-MATH"),
    "split": ("test", "train", "the only one of that set"),
    "limit": (96, None, "all"),
    "num_samples": (4, 4, "Appendix D: thoughts a problem"),
    "max_tokens": (256, 8192, "Appendix D"),
    "temperature": (1.0, 0.7, "Appendix D"),
    "answer_tokens": (8, 4096, "Appendix D"),
    "max_steps": (49, 45, "the authors on AIME 2024; 49 on Omni-MATH, 99 in their regret study"),
    "episodes_per_point": (1, 3, "the authors on AIME 2024; 5 on Omni-MATH, 10 in their regret study"),
    "panel_episodes": (3, 3, "the authors' panels are one point wide"),
    "budgets": ("64,128,192,256", "2048,4096,6144,8192", "up to the limit of a thought"),
    "batch_problems": (48, 8, "ours"),
}
VOTES = (1, 2, 4, 8)  # p of [maj@p]_j


def flags(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_common_flags(parser)
    what = parser.add_argument_group("thoughts")
    what.add_argument("--traces", type=Path, metavar="FILE.jsonl", help="given responses instead of sampled ones: "
                      "problem, answer, response; any number a problem")  # fmt: skip
    what.add_argument("--num-samples", type=common.positive_int, help="thoughts a problem")
    what.add_argument("--max-tokens", type=common.positive_int, help="limit of a thought with its answer")
    what.add_argument("--temperature", type=common.non_negative, help="of thoughts and forced answers")
    what.add_argument("--top-p", type=float, default=1.0)
    what.add_argument("--max-steps", type=common.whole_number, help="episodes opened at most")
    what.add_argument("--episodes-per-point", type=common.positive_int, help="neighbours joined; answers are forced at "
                      "the ends of the groups")  # fmt: skip
    mu = parser.add_argument_group("forced answers (μ)")
    mu.add_argument("--forced-answers", type=common.positive_int, default=8, help="at every boundary (Appendix D: 8)")
    mu.add_argument("--answer-tokens", type=common.positive_int, help="limit of one")
    mu.add_argument("--batch-problems", type=common.positive_int, help="problems sampled and recorded together")
    direct = parser.add_argument_group("direct baseline")
    direct.add_argument("--direct-model", help="model that answers without episodes (Appendix D: Qwen2.5-32B-Instruct)")
    direct.add_argument("--direct-samples", type=common.positive_int, default=32, help="its answers (Appendix D: 32)")
    show = parser.add_argument_group("what is shown")
    show.add_argument("--panel-episodes", type=common.positive_int, help="width of a panel, in episodes of a trace")
    show.add_argument("--budgets", help="token budgets C0 of the regret")
    show.add_argument(
        "--from", dest="from_run", type=Path, metavar="RUN", help="redraw an earlier run, without a model"
    )
    args = common.parse_flags(parser, DEFAULTS, argv)
    if args.from_run:  # the settings that its records were made with
        made = (common.config_of(args.from_run) or {}).get("settings", {})
        if "episodes_per_point" not in made:
            fail(f"--from {args.from_run}: no config.json of an analysis there")
        made = [f"--{flag}={made[flag.replace('-', '_')]}" for flag in ("model", "max-steps", "episodes-per-point")]
        args = common.parse_flags(parser, DEFAULTS, (sys.argv[1:] if argv is None else argv) + made)
    name = common.short_name(str(args.traces or args.dataset))
    args.out = args.from_run or args.out or Path("runs") / f"analyze-{common.short_name(args.model)}-{name}"
    args.budgets = common.numbers("--budgets", args.budgets)
    return args


def main() -> None:
    args = flags()
    if args.from_run:
        report(args, args.from_run)
        return
    args.engine = common.pick_engine(args.engine)
    common.check_out(args.out, lasting_settings(args), args.resume, args.overwrite)
    tokenizer = common.load_tokenizer(args.model)
    given = None
    if args.traces:
        problems, given = load_traces(args.traces, args.limit)
    else:
        problems = common.load_problems(args.dataset, args.split, args.limit)
    prompts = [common.prompt_ids(tokenizer, p["problem"], args.chat_template_kwargs) for p in problems]
    if given:
        context = common.context_length(args.model)
        traces, longest = read_given(args, tokenizer, problems, prompts, given, context)
    else:
        traces, longest = None, common.check_lengths(args, tokenizer, problems, prompts)
    if args.direct_model:
        common.load_tokenizer(args.direct_model)  # a wrong name is told now, not after the thoughts
    run = common.open_run(args.out, lasting_settings(args), args.resume, args.overwrite)
    common.same_inputs(run, problems, args.model)
    sampler = common.open_sampler(args, tokenizer, longest)
    analyse(args, run, sampler, problems, prompts, traces)
    sampler.close()
    if args.direct_model:
        answer_directly(args, run, problems)
    report(args, run)


def lasting_settings(args) -> dict:
    """Without those that may differ when a run is continued."""
    volatile = ("config", "batch_problems", "budgets", "panel_episodes", "from_run", "direct_model", "direct_samples")
    return {k: v for k, v in vars(args).items() if k not in volatile}


# ---------------------------------------------------------------------------------------------- given responses


def load_traces(file: Path, limit: int | None) -> tuple[list[dict], list[list[str]]]:
    """(problems, the responses to each) of a file with a row a response; rows of one problem need not be neighbours."""
    rows = common.load_problems(str(file), "", None)
    responses: dict[tuple, list[str]] = {}
    problems: dict[tuple, dict] = {}
    for number, (problem, row) in enumerate(zip(rows, common.read_jsonl(file)), 1):
        if not isinstance(row.get("response"), str):
            fail(f"{file}, row {number}: column response holds no text; found {', '.join(row)}")
        same = (problem["problem"], problem["answer"])
        problems.setdefault(same, {**problem, "id": str(len(problems))})
        responses.setdefault(same, []).append(row["response"].replace("\r\n", "\n"))
    return list(problems.values())[:limit], list(responses.values())[:limit]


def read_given(args, tokenizer, problems, prompts, given, context: int) -> tuple[list[list[Trace]], int]:
    """Traces of given responses and the tokens of the longest prompt with an answer; what cannot be used is told.

    A response is `[<think>] thought </think> answer`. Without a `</think>` it is a thought that was cut off and has no
    answer; unless no response of the file has one: then they are solutions without a separate thought.
    """
    phrase = len(common.encode(tokenizer, "\n\n" + common.STOP_PHRASE + common.ANSWER_CUE)) + args.answer_tokens
    marked = any(THINK_END in response for row in given for response in row)
    if not marked:
        print(f"{args.traces}: no response has {THINK_END}; each is read as a thought that holds its answer")
    groups, longest, unused = [], 0, Counter()
    for problem, prompt, row in zip(problems, prompts, given):
        groups.append([])
        for response in row:
            trace = given_trace(args, tokenizer, problem, prompt, response, marked)
            need = len(prompt) + trace.boundaries[-1] + phrase
            if not response.strip():
                unused["are empty"] += 1
            elif need > context:
                unused[f"exceed μ's context of {context} tokens"] += 1
            else:
                groups[-1].append(trace)
                longest = max(longest, need)
        if not groups[-1]:
            print(f"problem {problem['id']}: no usable response")
    for why, count in unused.items():
        print(f"{args.traces}: {count} responses {why}; left out")
    if not longest:
        fail(f"--traces {args.traces}: no usable response")
    common.grade_traces([trace for group in groups for trace in group])
    return groups, longest


def given_trace(args, tokenizer, problem: dict, prompt: list[int], response: str, marked: bool) -> Trace:
    """A trace of text that another model may have written, in the tokens of μ."""
    if "<think>" in tokenizer.decode(prompt[-8:]):  # the template has opened the thought already
        response = response.removeprefix("<think>").removeprefix("\n")
    thought, marker, answer = response.partition(THINK_END)
    ids = common.encode(tokenizer, thought)
    written = ids + common.encode(tokenizer, marker + answer)
    completion = Completion(written, [], "stop" if marker or not marked else "length")
    completion.text, completion.offsets = common.text_and_offsets(tokenizer, written)
    spans = common.episode_spans(
        completion.text[: completion.offsets[len(ids)]], args.max_steps, args.episodes_per_point
    )
    ends = {common.first_at(completion.offsets, start) for start, _ in spans}
    finished = bool(marker) and common.thinks(tokenizer)
    trace = Trace(problem, prompt, completion, sorted(ends | {0, len(ids)}), finished, answer if marker else None)
    if not marked:
        trace.answer = response
    return trace


# ---------------------------------------------------------------------------------------------- sampling


def analyse(args, run: Path, sampler: Sampler, problems, prompts, given: list[list[Trace]] | None) -> None:
    """Writes one record a problem, as each batch of problems is done; those recorded already are not made again.

    A batch is two calls of the sampler: all its thoughts, then all forced answers at all boundaries of all of them."""
    how = ForcedAnswers("sampled", args.forced_answers, args.answer_tokens, args.temperature, args.top_p)
    for some in common.unrecorded(run, problems, args.batch_problems, sampler):
        if given is None:
            groups = common.sample_traces(args, sampler, [problems[i] for i in some], [prompts[i] for i in some],
                                          max_steps=args.max_steps, group_size=args.episodes_per_point)  # fmt: skip
        else:
            groups = [given[i] for i in some]
        common.success_rates(sampler, [trace for group in groups for trace in group], how, (args.seed, 1))
        rows = [record(args, problems[i], group) for i, group in zip(some, groups)]
        common.append_jsonl(run / "records.jsonl", rows)


def record(args, problem: dict, traces: list[Trace]) -> dict:
    """A problem with its traces: what every number, figure and the page are made from."""
    return {
        **problem,
        "samples": [
            {
                **common.trace_record(t),
                "tokens": len(t.completion.token_ids),
                "episodes": len(common.episode_spans(t.prefix(t.boundaries[-1]), args.max_steps)),
                "characters": [t.completion.offsets[b] for b in t.boundaries],
                "forced": [forced_answers(problem, row) for row in t.forced],
            }
            for t in traces
        ],
    }


def forced_answers(problem: dict, row: list[Completion]) -> dict:
    """The answers at one boundary. `classes`: equal answers have one number, right ones 0."""
    answers = [common.extract_answer(c.text) for c in row]
    return {
        "answers": answers,
        "classes": common.group_answers(answers, problem["answer"]),
        "mean_logprob": [float(np.mean(c.logprobs)) for c in row],
        "tokens": [len(c.token_ids) for c in row],
        "texts": [c.text for c in row],
    }


def answer_directly(args, run: Path, problems: list[dict]) -> None:
    """The baseline of Figure 3: many whole answers of a model, in `direct.jsonl`."""
    done = run / "direct.jsonl"
    if done.exists():
        made = common.read_jsonl(done)[0].get("model")
        if made != args.direct_model:
            fail(f"--direct-model {args.direct_model}: {done} is of {made}; remove it or name another --out")
        return
    one = copy.copy(args)
    one.model = args.direct_model
    tokenizer = common.load_tokenizer(one.model)
    prompts = [common.prompt_ids(tokenizer, p["problem"], args.chat_template_kwargs) for p in problems]
    sampler = common.open_sampler(one, tokenizer, common.check_lengths(one, tokenizer, problems, prompts))
    seeds = [(args.seed, 2, common.key(p["id"])) for p in problems]
    rows = sampler.generate(prompts, args.max_tokens, seeds, args.direct_samples, args.temperature, args.top_p)
    lines = []
    for problem, prompt, row in zip(problems, prompts, rows):
        read = [common.read_trace(tokenizer, problem, prompt, completion) for completion in row]
        answers = [common.extract_answer(t.answer or "") for t in read]
        classes = common.group_answers(answers, problem["answer"])
        lines.append(
            {"id": problem["id"], "model": one.model, "classes": classes, "tokens": [len(c.token_ids) for c in row]}
        )
    common.write_text(done, "".join(map(common.json_line, lines)))
    sampler.close()


# ---------------------------------------------------------------------------------------------- numbers


def report(args, run: Path) -> None:
    """summary.json, summary.md, the figures and the page, from the records alone."""
    records = common.load_records(run)
    for problem in records:
        for sample in problem["samples"]:
            sample["maj"] = {kind: votes(sample, kind) for kind in ("weighted", "plain")}
    summary = summarise(args, records)
    if (run / "direct.jsonl").exists():
        summary["direct"] = direct_summary(run)
    text = markdown(summary)
    common.write_text(run / "summary.md", text)
    print("\n" + text)
    figures = [draw_scaling(summary, run), draw_budgets(summary, run), draw_progress(summary, run)]
    print(f"figures: {', '.join(map(str, figures))}   page: {write_page(run, records)}")
    common.write_json(run / "summary.json", summary)


def votes(sample: dict, kind: str) -> list[list[float]]:
    """[maj@p]_j of one trace, [points, VOTES]; p larger than the forced answers: all of them."""
    table = []
    for value, forced in zip(sample["J"], sample["forced"]):
        n = len(forced["classes"])
        weights = [2**x for x in forced["mean_logprob"]] if kind == "weighted" else None
        row = [common.vote_at_k(forced["classes"], min(p, n), weights) if n else value for p in VOTES]
        table.append(row)
    return table


def by_problem(pairs: list[tuple[str, float]]) -> list[list[float]]:
    """The values of each problem from (problem id, value of one of its traces or episodes)."""
    rows: dict[str, list[float]] = {}
    for name, value in pairs:
        rows.setdefault(name, []).append(value)
    return list(rows.values())


def over_problems(pairs: list[tuple[str, float]]) -> dict:
    """Mean and interval, problems weighing the same."""
    return common.interval(by_problem(pairs))


def summarise(args, records: list[dict]) -> dict:
    traces = [(r["id"], s) for r in records for s in r["samples"]]
    if not traces:
        fail("the records hold no trace")
    top = max(args.budgets)
    grid = [top * (i + 1) / 40 for i in range(40)]
    appendix_e = [common.additional_regret(s["maj"]["weighted"]) for _, s in traces]
    ended = [(name, ratio) for (name, _), ratio in zip(traces, appendix_e) if not math.isnan(ratio)]
    normalised = {b: over_problems([(i, common.regret_at(s, b)) for i, s in traces]) for b in args.budgets}
    return {
        "problems": len(records),
        "problems_without_trace": [r["id"] for r in records if not r["samples"]],
        "traces": len(traces),
        "truncated": float(np.mean([s["finish"] == "length" for _, s in traces])),
        "no_answer": float(np.mean([s["verdict"] == "none" for _, s in traces])),
        "episodes": over_problems([(i, s["episodes"]) for i, s in traces]),
        "tokens": over_problems([(i, s["tokens"]) for i, s in traces]),
        "right": over_problems([(i, s["right"]) for i, s in traces]),
        "forced_answers_without_box": share_without_box(traces),
        "panels": panels(args, traces),
        "regret": {
            budget: {"normalised": of, "cumulative": {end: budget * value for end, value in of.items()}}
            for budget, of in normalised.items()
        },
        "accuracy_at": {
            "budget": grid,
            "forced": [over_problems([(i, common.accuracy_at(s, b)) for i, s in traces]) for b in grid],
        },
        "regret_over_episodes": regret_over_episodes(traces),
        "additional_regret": over_problems(ended) if ended else None,
        "progress": progress(traces),
    }


def share_without_box(traces) -> float | None:
    answers = [a for _, s in traces for forced in s["forced"] for a in forced["answers"]]
    return float(np.mean([a is None for a in answers])) if answers else None


def panels(args, traces) -> list[dict]:
    """[maj@p]_j by the number of episodes of a trace (Figure 3). Within a panel a trace that has ended keeps its last
    value, so every point is over the same traces."""
    group, width = args.episodes_per_point, args.panel_episodes
    by_panel: dict[int, list] = {}
    for name, sample in traces:
        by_panel.setdefault((sample["episodes"] - 1) // width, []).append((name, sample))
    out = []
    for number, mine in sorted(by_panel.items()):
        points = max(len(s["J"]) for _, s in mine)
        at = [[min(j, len(s["J"]) - 1) for _, s in mine] for j in range(points)]
        panel = {
            "episodes": [number * width + 1, (number + 1) * width],
            "traces": len(mine),
            "problems": len({name for name, _ in mine}),
            "after_episodes": [j * group for j in range(points)],
        }
        for kind in ("weighted", "plain"):
            panel[kind] = {
                p: [over_problems([(i, s["maj"][kind][k][v]) for (i, s), k in zip(mine, row)]) for row in at]
                for v, p in enumerate(VOTES)
            }
        panel["tokens"] = {}
        for p in VOTES:
            spent = [
                [(i, s["boundaries"][k] + p * s["answer_tokens"][k]) for (i, s), k in zip(mine, row)] for row in at
            ]
            panel["tokens"][p] = [float(np.mean([np.mean(of) for of in by_problem(pairs)])) for pairs in spent]
        out.append(panel)
    return out


def direct_summary(run: Path) -> dict:
    """pass@k, as the paper plots it: an oracle picks the right one of k; and maj@k, the like-for-like vote."""
    rows = common.read_jsonl(run / "direct.jsonl")
    n = len(rows[0]["classes"])
    ks = [2**i for i in range(n.bit_length())]
    tokens = float(np.mean([np.mean(row["tokens"]) for row in rows]))
    return {
        "k": ks,
        "tokens": [k * tokens for k in ks],
        "pass@k": [common.interval([common.pass_at_k(n, r["classes"].count(0), k) for r in rows]) for k in ks],
        "maj@k": [common.interval([common.vote_at_k(r["classes"], k) for r in rows]) for k in ks],
    }


def regret_over_episodes(traces) -> list[dict]:
    """Definition 4.1 with the comparator at 1: Σ_{j<k} (1 - J(μ|z_0:j)), for k = 1, 2, …; a trace that has ended keeps
    its last J. k counts the points at which answers were forced."""
    most = int(np.quantile([len(s["J"]) for _, s in traces], 0.95))
    held = {id(s): [s["J"][min(j, len(s["J"]) - 1)] for j in range(most)] for _, s in traces}
    return [over_problems([(i, float(np.sum(1 - np.array(held[id(s)][:k])))) for i, s in traces])
            for k in range(1, most + 1)]  # fmt: skip


def progress(traces) -> dict | None:
    """Progress of an episode (Definition 6.1), r_prg = J after it - J before it: its spread, and where it is made.

    With n forced answers a J is off by √(J(1-J)/n), so part of the spread is noise; `noise` is that part's standard
    deviation, to be compared with `deviation`."""
    steps = [(i, j, len(s["J"]) - 1, s["J"][j], s["J"][j + 1]) for i, s in traces for j in range(len(s["J"]) - 1)]
    if not steps:
        return None
    n = max((len(f["classes"]) for _, s in traces for f in s["forced"]), default=1)
    gains = np.array([after - before for *_, before, after in steps])
    noise = np.mean([(a * (1 - a) + b * (1 - b)) / max(1, n - 1) for *_, a, b in steps])
    kinds = {"positive": gains > 1e-9, "none": np.abs(gains) <= 1e-9, "negative": gains < -1e-9}

    def of(chosen: np.ndarray) -> dict:
        at = np.flatnonzero(chosen)
        shares = {name: over_problems([(steps[a][0], float(of[a])) for a in at]) for name, of in kinds.items()}
        return {"episodes": len(at), "mean": over_problems([(steps[a][0], gains[a]) for a in at]), **shares}

    fifth = np.array([min(4, 5 * j // count) for _, j, count, _, _ in steps])
    number = np.array([j for _, j, *_ in steps])
    shown = [j for j in range(number.max() + 1) if (number == j).sum() >= 10]
    edges = np.linspace(-1, 1, 2 * n + 2)
    return {
        **of(np.ones(len(steps), dtype=bool)),
        "deviation": float(gains.std()),
        "noise": float(math.sqrt(noise)),
        "histogram": {"edges": edges.tolist(), "episodes": np.histogram(gains, edges)[0].tolist()},
        "by_fifth_of_the_trace": [of(fifth == f) for f in range(5) if (fifth == f).any()],
        "by_number": [{"number": j + 1, **of(number == j)} for j in shown],
    }


def markdown(summary: dict) -> str:
    def cell(m: dict | None, digits: int = 3) -> str:
        if m is None:
            return "–"
        ends = "" if math.isnan(m["low"]) else f" [{m['low']:.{digits}f}, {m['high']:.{digits}f}]"
        return f"{m['mean']:.{digits}f}{ends}"

    moved = summary["progress"] or {}
    rows = [
        ("traces, problems", f"{summary['traces']}, {summary['problems']}"),
        ("right", cell(summary["right"])),
        ("tokens a trace", cell(summary["tokens"], 0)),
        ("episodes a trace", cell(summary["episodes"], 1)),
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
    rows += [(f"normalised regret at {b}", cell(r["normalised"])) for b, r in summary["regret"].items()]
    rows.append(("regret against voting early (Appendix E)", cell(summary["additional_regret"])))
    by_panel = []
    for panel in summary["panels"]:
        few, many = panel["weighted"][VOTES[0]], panel["weighted"][VOTES[-1]]
        first, last = panel["episodes"]
        counts = f"{panel['traces']} ({panel['problems']})"
        by_panel.append([f"{first} to {last}", counts, cell(few[0]), cell(few[-1]), cell(many[-1])])
    header = ["episodes", "traces (problems)", "maj@1 at the start", "maj@1 at the end", "maj@8 at the end"]
    return common.markdown(["", ""], rows) + "\n" + common.markdown(header, by_panel)


# ---------------------------------------------------------------------------------------------- pictures


def draw_scaling(summary: dict, run: Path) -> Path:
    """Figure 3: a column a panel; above over episodes, below over tokens with the votes branching off."""
    plt = common.pyplot()
    panels = summary["panels"]
    shown = [p for p in panels if p["traces"] >= 3][:8] or panels[:8]
    figure, axes = plt.subplots(2, len(shown), figsize=(max(5, 2.1 * len(shown)), 5), squeeze=False, sharey=True,
                                constrained_layout=True)  # fmt: skip
    colors = plt.get_cmap("viridis")(np.linspace(0.75, 0.1, len(VOTES)))
    for (above, below), panel in zip(axes.T, shown):
        first, last = panel["episodes"]
        title = f"{first}–{last} episodes" if last > first else f"{first} episode{'s' * (first > 1)}"
        above.set_title(f"{title}\n{panel['traces']} traces, {panel['problems']} problems", fontsize=8)
        for p, color in zip(VOTES, colors):
            common.line(
                above, panel["after_episodes"], panel["weighted"][p], color, f"maj@{p}", ".-", band=p == VOTES[0]
            )
        above.set(xlabel="episodes", ylim=(0, 1))
        above.locator_params(axis="x", nbins=5, integer=True)
        common.line(below, panel["tokens"][1], panel["weighted"][1], "C0", "after each episode, maj@1", ".-")
        for j in range(len(panel["after_episodes"])):
            x = [panel["tokens"][p][j] for p in VOTES]
            y = [panel["weighted"][p][j]["mean"] for p in VOTES]
            below.plot(x, y, ".--", color="C2", linewidth=0.8, markersize=3, label=None if j else "votes of 1, 2, 4, 8")
        if "direct" in summary:
            direct = summary["direct"]
            common.line(below, direct["tokens"], direct["pass@k"], "C1", "direct, pass@k (oracle)", ".-", band=False)
            common.line(below, direct["tokens"], direct["maj@k"], "C3", "direct, maj@k", ".-", band=False)
        below.set(xlabel="tokens", ylim=(0, 1))
        common.token_axis(below)
        for axis in (above, below):
            axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("accuracy")
        row[0].legend(fontsize=6, frameon=False, loc="upper left")
    return common.save_figure(figure, run / "scaling.png")


def draw_budgets(summary: dict, run: Path) -> Path:
    """Accuracy of the answer forced by a budget, the area above it (the regret), and the regret over episodes."""
    plt = common.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), constrained_layout=True)
    curve, budgets = summary["accuracy_at"], [int(b) for b in summary["regret"]]
    common.line(axes[0], curve["budget"], curve["forced"], "C0")
    axes[0].set(xlabel="token budget", ylabel="accuracy of the answer forced by then", ylim=(0, 1))
    common.line(axes[1], budgets, [r["normalised"] for r in summary["regret"].values()], "C3", style="o-")
    axes[1].set(xlabel="token budget C0", ylabel="normalised regret", xticks=budgets, ylim=(0, 1))
    regret = summary["regret_over_episodes"]
    common.line(axes[2], range(1, len(regret) + 1), regret, "C4", "the model", "o-")
    axes[2].plot(range(1, len(regret) + 1), range(1, len(regret) + 1), ":", color="grey", label="never right")
    axes[2].set(xlabel="points k at which it is forced to answer", ylabel="cumulative regret, Σ (1 - J)")
    axes[2].legend(frameon=False, fontsize=7)
    for axis in axes:
        axis.grid(alpha=0.3)
    return common.save_figure(figure, run / "budgets.png")


def draw_progress(summary: dict, run: Path) -> Path:
    """Progress of episodes: how it is spread, by the number of the episode, by the place in the trace."""
    plt = common.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), constrained_layout=True)
    moved = summary["progress"]
    if moved:
        edges = np.array(moved["histogram"]["edges"])
        middle = (edges[:-1] + edges[1:]) / 2
        colors = np.where(middle > 1e-9, "C2", np.where(middle < -1e-9, "C3", "0.6"))
        axes[0].bar(middle, moved["histogram"]["episodes"], width=np.diff(edges) * 0.9, color=colors)
        axes[0].set(xlabel="progress of an episode, J after - J before", ylabel="episodes", yscale="log")
        axes[0].set_title(f"{moved['episodes']} episodes; deviation {moved['deviation']:.2f}, noise of the estimate "
                          f"{moved['noise']:.2f}", fontsize=8)  # fmt: skip
        numbers = [row["number"] for row in moved["by_number"]]
        if numbers:
            common.line(axes[1], numbers, [row["mean"] for row in moved["by_number"]], "C0", style="o-")
        axes[1].axhline(0, color="grey", linewidth=0.8)
        axes[1].set(xlabel="number of the episode", ylabel="mean progress")
        fifths = moved["by_fifth_of_the_trace"]
        below = np.zeros(len(fifths))
        for name, color in (("positive", "C2"), ("none", "0.75"), ("negative", "C3")):
            shares = np.array([f[name]["mean"] for f in fifths])
            axes[2].bar(range(1, len(fifths) + 1), shares, bottom=below, color=color, label=name)
            below += shares
        axes[2].set(xlabel="fifth of the trace", ylabel="share of episodes", ylim=(0, 1))
        axes[2].legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return common.save_figure(figure, run / "progress.png")


# ---------------------------------------------------------------------------------------------- the page

PAGE_BYTES = 16 << 20  # more than this is slow on a phone


def write_page(run: Path, records: list[dict]) -> Path:
    """trace.html: the template beside this file with the traces as JSON in it. Text from a model gets into the
    document as text nodes only; `<` is written as \\u003c, so nothing in it can end the JSON's element."""
    shown, size, left_out = [], 0, 0
    for problem in records:
        one = {key: problem[key] for key in ("id", "problem", "answer")}
        one["samples"] = [
            {key: s[key] for key in ("text", "right", "answer", "verdict", "tokens", "boundaries", "characters", "J")}
            | {"forced": [{k: f[k] for k in ("answers", "classes", "texts")} for f in s["forced"]]}
            for s in problem["samples"]
        ]
        text = json.dumps(one, ensure_ascii=False)
        size += len(text)
        if size > PAGE_BYTES and shown:
            left_out += 1
        else:
            shown.append(text)
    note = f"{left_out} of {len(records)} problems are left out to keep the page small" if left_out else ""
    data = f'{{"note": {json.dumps(note)}, "problems": [{", ".join(shown)}]}}'.replace("<", "\\u003c")
    template = (Path(__file__).parent / "trace_page.html").read_text(encoding="utf-8")
    common.write_text(run / "trace.html", template.replace("@@DATA@@", data, 1))
    return run / "trace.html"


if __name__ == "__main__":
    main()
