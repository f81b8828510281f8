"""budget_force.py: exploit a smaller budget, extrapolate to a larger one (Section 8, Figure 9, Appendix F)

    python budget_force.py                             # the embedded model
    python budget_force.py --model A,B,C               # several models, one table and one figure
    python budget_force.py --thoughts runs/ANALYSIS    # thoughts, and J where it has them, of an earlier run
    python budget_force.py --compare runs/A runs/B     # table and figures again, from records alone

Exploit: every thought is cut at each of --budgets and told that time is up; thoughts that ended by themselves within
the budget are left alone. Extrapolate: at the end of the thought a continue string ("Wait", …) is appended instead of
the end-of-thinking marker, --extensions times, and answers are sampled after 0, 2, 4, … of them. Both give points
(tokens, accuracy) of one curve; the normalised regret is the area above it, inside and beyond the training budget.

Linearised search (--style window, for --parameterization backtracking; Figure 8): where a trace has ended, the phrase
that opens another attempt is appended to the problem and the last --window attempts, --extensions times, so that a
search goes on at a bounded context. All its attempts vote, against maj@K of K whole traces at equal tokens.
"""

from run.files import append_jsonl, digest, end_in_one_line, fail  # isort: split

import argparse
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from common import (
    ForcedAnswer,
    Trace,
    cut_at_budget,
    force_answers,
    forced_prompt,
    last_paragraph_end,
    normalized_regret,
    success_rate,
)
from engine.sampler import Sampler, pick_engine
from engine.thoughts import opening_after, thinks, thought_tokens, what_was_seen
from engine.tokens import encode, end_of_thought, stop_ids_of_thought, text_and_offsets
from grading.box import extract_answer
from grading.verdict import grade_all
from run import data, folder, report
from run.backtracking import RETRY, episodes_of, first_attempt, marker_counts, window
from run.flags import add_group, default_out, each_in_its_folder, new_parser, parse_flags, positive_int, whole_number
from run.folder import short_name
from run.report import Curve, Panel, Values, group_by_problem, interval, problem_means
from run.traces import (
    AXES,
    FORCED_BUDGET,
    checked_prompts,
    context_of,
    forcing_of,
    inputs_of,
    new_traces,
    problem_key,
    problem_of,
    sampler_of,
    segmentation,
    tokenizer_of,
    trace_curve,
    trace_of,
    vote_of,
    vote_rate,
)

STRINGS = "Wait,But wait,Alternatively,But hold on"


def flags(argv=None) -> argparse.Namespace:
    # Each flag: name, default with the embedded model, with any other, where the latter comes from.
    parser = new_parser(
        __doc__,
        dataset=("tiny", "yentinglin/aime_2025", "the authors' script"),
        split=("test", "train", "the only one of that set"),
        limit=(40, 15, "the authors' script: 15 problems"),
    )
    flag = add_group(parser, "thoughts")
    flag("num-samples", 4, 16, "the authors' script")
    flag("max-tokens", 256, 16384, "the authors' script")
    flag("temperature", 1.0, 0.6, "the authors' script")
    flag("top-p", 1.0, 0.95, "the authors' script")
    flag("batch-problems", 64, 4, "ours")
    given = "thoughts of an earlier run of the same model, such as one of analyze_r1.py; its --max-tokens holds"
    flag("thoughts", type=Path, metavar="RUN", help=given)
    flag = add_group(parser, "answers")
    flag("forced-answers", 8, 8, "the authors' script: 8 a point")
    flag("answer-tokens", 8, 4096, "the authors' script")
    flag = add_group(parser, "exploit")
    flag("budgets")
    flag = add_group(parser, "extrapolate")
    flag("extensions", 8, 8, "the authors' script", type=whole_number, help="continuations of a thought")
    flag("answer-every", 2, 2, "the authors' script", type=positive_int, help="extensions between answers")
    flag("strings", STRINGS, STRINGS, "the authors' script", help="continue strings, in turn")
    flag("extension-tokens", 32, 2048, "the authors' script", type=positive_int, help="limit of one extension")
    style = "paper: a new line and a string, a limit for each extension, an unfinished last paragraph is dropped; "
    style += "window: linearised search, the one for backtracking"
    flag("style", choices=("paper", "window"), help=style)
    flag("window", 3, 3, "ours", type=positive_int, help="attempts that the context of a linearised search holds")
    flag("regret-axis", "answer", "answer", "the authors: prompt", choices=tuple(AXES))
    flag("compare", type=Path, nargs="+", metavar="RUN", help="earlier runs; the first is the base")
    args = parse_flags(parser, argv)
    if args.thoughts:  # the limits follow theirs
        run = folder.recorded_run(args.thoughts, "--thoughts", "token_ids")
        longest = max(record["boundaries"][-1] for record in run.records) if run.settings.get("traces") else 0
        given = [f"--max-tokens={longest or run.settings['max_tokens']}"]
        args = parse_flags(parser, (sys.argv[1:] if argv is None else argv) + given)
    args.style = args.style or ("window" if args.parameterization == "backtracking" else "paper")
    if (args.style == "window") != (args.parameterization == "backtracking"):
        fail("--style window and --parameterization backtracking go together")
    runs = "compare-" + "-".join(map(short_name, map(str, args.compare or [])))
    args.out = args.out or default_out(args, f"budget-{runs if args.compare else short_name(args.model)}", "compare")
    args.strings = args.strings.split(",")
    if not all(args.strings):
        fail("--strings: one of them is empty")
    return args


def main() -> None:
    args = flags()
    if args.compare:
        compare(args, args.compare)
        return
    thoughts = read_thoughts(args) if args.thoughts else None
    if args.dry_run:
        tell_plan(args, thoughts)
        return
    args.engine = pick_engine(args.engine)
    names = args.model.split(",")
    forcings = each_in_its_folder(args, [short_name(name) for name in names], [{"model": name} for name in names])
    for one in forcings:  # what can be refused at once is
        folder.check_out(one, "compare")
        if not thinks(tokenizer := tokenizer_of(one)) and args.style != "window":
            fail(f"--model {one.model}: no thought to cut or to extend: {what_was_seen(tokenizer)}")
    if thoughts is not None:
        problems = [problem_of(record) for record, *_ in thoughts]
    else:
        problems = data.problems_of(args)
    for one in forcings:
        force(one, problems, thoughts)
    compare(args, [one.out for one in forcings])


def tell_plan(args, thoughts: list[list[dict]] | None) -> None:
    """--dry-run: what all models cost at most."""
    problems = len(thoughts if thoughts is not None else data.problems_of(args))
    count = (
        sum(map(len, thoughts)) if thoughts is not None else problems * args.num_samples * len(args.model.split(","))
    )
    points = len(args.budgets) + len(extensions(vars(args))) if args.style != "window" else 0
    report.tell_plan(
        args.dry_run,
        problems,
        ("thought", 0 if thoughts is not None else count, args.max_tokens),
        ("extension", count * args.extensions, args.extension_tokens),
        ("forced answer", count * points * args.forced_answers, args.answer_tokens),
    )


def read_thoughts(args) -> list[list[dict]]:
    """The records of --thoughts, a row a problem."""
    run = folder.recorded_run(args.thoughts, "--thoughts", "token_ids")
    if run.settings["model"] != args.model:
        fail(f"--thoughts {args.thoughts}: holds thoughts of --model {run.settings['model']}, not of {args.model}")
    print(f"training budget: {args.max_tokens} tokens, as long as the thoughts of {args.thoughts} may be")
    rows = list(report.group_by(run.records, lambda r: r["id"]).values())
    data.tell_limit(args.thoughts, len(rows), args.limit, "problems")
    return rows[: args.limit]


def check_thoughts(args, inputs: dict[str, dict]) -> None:
    """Ends the run if the thoughts go on from other prompts, or are of other weights, than the model here has."""
    analysis = folder.recorded_run(args.thoughts, "--thoughts").inputs
    for kind in ("weights", "problems or prompts"):
        of_thoughts = analysis.get(kind, {})
        for name, read in inputs[kind].items():
            if read.split()[-1] != of_thoughts.get(name, read).split()[-1]:  # whatever their places
                fail(f"--thoughts {args.thoughts}: made with other {kind} ({name})")


# ---------------------------------------------------------------------------------------------- sampling


def force(args, problems: list[dict], thoughts: list[list[dict]] | None) -> None:
    """One model: writes a record a trace, as each batch of problems is done; those recorded are not made again."""
    tokenizer = tokenizer_of(args)
    strings = max(len(encode(tokenizer, "\n" + string)) for string in args.strings)
    more = args.extension_tokens if args.style == "window" else args.extensions * (args.extension_tokens + strings)
    prompts, longest = checked_prompts(args, tokenizer, problems, more)
    given = thoughts and [
        [trace_of(record, tokenizer, problem, prompt) for record in row]
        for problem, prompt, row in zip(problems, prompts, thoughts)
    ]
    inputs = inputs_of(args, problems, prompts)
    if thoughts:
        check_thoughts(args, inputs)
        inputs["thoughts"] = {f"{r['id']} {r['sample']}": digest(r) for row in thoughts for r in row}
    sampler = sampler_of(args, tokenizer, longest)
    run = folder.open_run(args, inputs, "compare")
    file = run / "records.jsonl"
    for traces in new_traces(args, file, sampler, problems, prompts, segmentation(args), given=given, forced=False):
        if args.style == "window":
            found = [{"search": attempts} for attempts in search(args, sampler, traces)]
        else:
            points = zip(exploit(args, sampler, traces), extrapolate(args, sampler, traces))
            found = [{"exploit": e, "extrapolate": x} for e, x in points]
        append_jsonl(file, [{**trace.record(), **more} for trace, more in zip(traces, found)])
    sampler.close()
    report.write_page(folder.load_records(file), run / "trace.html")


def seed_of(args, trace: Trace) -> tuple[int, ...]:
    """What seeds what is sampled for a trace: the same whichever other problems are in the batch."""
    return args.seed, FORCED_BUDGET, problem_key(trace.problem), trace.sample


def point(problem: dict, thought_tokens: int, asked: int, answers: list[ForcedAnswer], **more) -> dict:
    """A point of a trace's curve: its thought has so many tokens, the prompt that asks for an answer then has `asked`,
    and these are the answers."""
    tokens = float(np.mean([answer.tokens for answer in answers]))
    curve_point = {"thought_tokens": thought_tokens, "asked": asked, "J": success_rate(problem, answers)}
    return {**curve_point, "answer_tokens": tokens, "forced": [asdict(answer) for answer in answers], **more}


def answers_to(args, sampler: Sampler, traces: list[Trace], prompts, seeds) -> list[list[ForcedAnswer]]:
    """--forced-answers of a model that goes on from each trace's prompt."""
    return force_answers(sampler, [trace.problem for trace in traces], prompts, forcing_of(args), seeds)


def exploit(args, sampler: Sampler, traces: list[Trace]) -> list[dict[int, dict]]:
    """For each trace {budget: point}: what it is worth if it may use no more than the budget."""
    points: list[dict] = [{budget: uncut(trace, budget) for budget in args.budgets} for trace in traces]
    too_long = [(t, budget) for t, by_budget in enumerate(points) for budget, p in by_budget.items() if not p]
    cuts = [cut_at_budget(traces[t], budget) for t, budget in too_long]
    prompts = [forced_prompt(sampler.tokenizer, traces[t], cut) for (t, _), cut in zip(too_long, cuts)]
    seeds = [(*seed_of(args, traces[t]), 0, budget) for t, budget in too_long]
    answers = answers_to(args, sampler, [traces[t] for t, _ in too_long], prompts, seeds)
    for (t, budget), cut, prompt, forced in zip(too_long, cuts, prompts, answers):
        points[t][budget] = point(traces[t].problem, cut, len(prompt), forced, cut=True)
    return points


def uncut(trace: Trace, budget: int) -> dict | None:
    """The point of a trace whose thought ended by itself within the budget; None if it did not."""
    end, total = trace.boundaries[-1], len(trace.completion.token_ids)
    if not trace.finished or end > budget:
        return None
    spent = {"thought_tokens": end, "asked": len(trace.prompt) + end, "answer_tokens": float(total - end)}
    return {**spent, "J": trace.reward, "forced": [], "cut": False}


def extrapolate(args, sampler: Sampler, traces: list[Trace]) -> list[dict[int, dict]]:
    """For each trace {extensions: point}. `generated` are the tokens sampled for the thought so far, also those dropped
    again; the continue strings are in `thought_tokens`, as the model reads them."""
    tokenizer = sampler.tokenizer
    thoughts = [trace.completion.token_ids[: trace.boundaries[-1]] for trace in traces]
    generated = [len(thought) for thought in thoughts]
    thoughts = [
        thought if trace.finished else drop_unfinished(tokenizer, thought, keep=len(thought))
        for trace, thought in zip(traces, thoughts)
    ]
    points: list[dict[int, dict]] = [{} for _ in traces]
    for w in range(args.extensions + 1):
        if w in extensions(vars(args)):
            prompts = [ended(tokenizer, trace.prompt, thought) for trace, thought in zip(traces, thoughts)]
            seeds = [(*seed_of(args, trace), 1, w) for trace in traces]
            for t, answers in enumerate(answers_to(args, sampler, traces, prompts, seeds)):
                asked = len(prompts[t])
                points[t][w] = point(traces[t].problem, len(thoughts[t]), asked, answers, generated=generated[t])
        if w < args.extensions:
            thoughts, new = extend(args, sampler, traces, thoughts, w)
            generated = [before + more for before, more in zip(generated, new)]
    return points


def extend(args, sampler: Sampler, traces: list[Trace], thoughts: list[list[int]], w: int):
    """Every thought with continue string number w and what the model thinks then, without an unfinished last paragraph;
    and how many tokens it sampled."""
    tokenizer = sampler.tokenizer
    string = encode(tokenizer, "\n" + args.strings[w % len(args.strings)])
    openings = [encode(tokenizer, opening_after(tokenizer, trace.prompt)) for trace in traces]  # of a thought yet empty
    starts = [(thought or opening) + string for thought, opening in zip(thoughts, openings)]
    rows = sampler.generate(
        [trace.prompt + start for trace, start in zip(traces, starts)],
        args.extension_tokens,
        [(*seed_of(args, trace), 2, w) for trace in traces],
        temperature=args.temperature,
        top_p=args.top_p,
        stop=stop_ids_of_thought(tokenizer),
    )
    extended, new = [], [len(completion.token_ids) for (completion,) in rows]
    for thought, start, (completion,) in zip(thoughts, starts, rows):
        end = thought_tokens(tokenizer, completion)
        longer = start + completion.token_ids[:end]
        if end == len(completion.token_ids):
            longer = drop_unfinished(tokenizer, longer, keep=len(thought), first=len(start))
        extended.append(longer)
    return extended, new


def ended(tokenizer, prompt: list[int], thought: list[int]) -> list[int]:
    """The prompt, the thought and the end-of-thinking marker, without a word about time. Ours: the authors sample from
    the thought as it stands (Appendix F)."""
    return prompt + thought + end_of_thought(tokenizer, prompt, text_and_offsets(tokenizer, thought)[0])


def drop_unfinished(tokenizer, thought: list[int], keep: int, first: int = 0) -> list[int]:
    """Without the unfinished last paragraph. Paragraph ends are looked for after place `first`; where there is none,
    the first `keep` tokens are what stays."""
    end = last_paragraph_end(*text_and_offsets(tokenizer, thought), first, len(thought))
    return thought[: keep if end is None else end]


# ---------------------------------------------------------------------------------------------- linearised search


def search(args, sampler: Sampler, traces: list[Trace]) -> list[list[dict]]:
    """For each trace its own attempts and --extensions more: {boxed, verdict, stands, spent, shown}. `stands`: the
    model itself would not go on after it; `spent`: tokens sampled by its end; `shown`: how many attempts it could see.
    One without a box has no vote, and no later one sees it."""
    phrase = encode(sampler.tokenizer, RETRY)
    histories = [window(sampler.tokenizer, trace.completion.token_ids)[1] for trace in traces]
    found = [own_attempts(trace) for trace in traces]
    spent = [len(trace.completion.token_ids) for trace in traces]
    for number in range(args.extensions):
        shown = [shown_of(args, sampler.tokenizer, *pair) for pair in zip(traces, histories)]
        rows = sampler.generate(
            [trace.prompt + (ids + phrase if ids else []) for trace, (_, ids) in zip(traces, shown)],
            args.extension_tokens,
            [(*seed_of(args, trace), 3, number) for trace in traces],
            temperature=args.temperature,
            top_p=args.top_p,
        )
        for t, (completion,) in enumerate(rows):
            attempt = first_attempt(completion)
            box, whole = extract_answer(attempt.text), attempt.text == completion.text
            stands = whole and completion.finish_reason == "stop"
            spent[t] += len(attempt.token_ids)
            found[t].append({"boxed": box, "stands": stands, "spent": spent[t], "shown": shown[t][0]})
            if box is not None:
                between = phrase if histories[t] else []
                histories[t] += between + attempt.token_ids[: len(attempt.token_ids) - stands]
    asked = [(attempt["boxed"], trace.problem["answer"]) for trace, row in zip(traces, found) for attempt in row]
    verdicts = iter(grade_all(asked))
    return [[{**attempt, "verdict": next(verdicts)} for attempt in row] for row in found]


def own_attempts(trace: Trace) -> list[dict]:
    """The attempts of a trace itself, which has seen them all."""
    last = len(trace.boundaries) - 1
    boxes = [(extract_answer(text), j) for j, text in enumerate(episodes_of(trace), 1)]
    ended = [(box, j) for box, j in boxes if box is not None]
    return [
        {"boxed": box, "stands": trace.ended and j == last, "spent": trace.boundaries[j], "shown": number}
        for number, (box, j) in enumerate(ended)
    ]


def shown_of(args, tokenizer, trace: Trace, history: list[int]) -> tuple[int, list[int]]:
    """(attempts shown, their tokens): the last --window, fewer where the model's context has no room for so many."""
    room = context_of(args) - len(trace.prompt) - args.extension_tokens - len(encode(tokenizer, RETRY))
    windows = (window(tokenizer, history, count) for count in range(args.window, 0, -1))
    return next(((count, ids) for count, ids in windows if len(ids) <= room), (0, []))


def search_values(records: list[dict]) -> Values:
    """Each metric's value for each problem: maj@K of K whole traces, and of a search within as many tokens the vote of
    all its attempts (search@K) and of those that the model let stand (standing@K)."""
    groups = list(group_by_problem(records).values())
    mean = partial(problem_means, records)
    values = {"right": mean(lambda r: r["reward"]), "tokens": mean(lambda r: r["tokens"])}
    for K in range(1, min(10, *map(len, groups)) + 1):
        budget = K * values["tokens"].mean()
        values[f"maj@{K}"] = np.array([vote_of(group, K) for group in groups])
        values[f"search@{K}"] = mean(vote_within, budget)
        values[f"standing@{K}"] = mean(vote_within, budget, True)
    values["attempts"] = mean(lambda r: len(r["search"]))
    values["tokens of a search"] = mean(lambda r: max((a["spent"] for a in r["search"]), default=0))
    values["attempts without a box"] = mean(lambda r: float(np.mean([a["boxed"] is None for a in r["search"]] or [1])))
    return values


def vote_within(record: dict, budget: float, standing: bool = False) -> float:
    """The vote of the attempts of a search that ended within a budget; of those that stand, if any does."""
    votes = [attempt for attempt in record["search"] if attempt["spent"] <= budget]
    votes = [attempt for attempt in votes if attempt["stands"]] or votes if standing else votes
    return vote_rate(votes, record["gold"], len(votes)) if votes else 0.0


WINDOW_COUNTS = ("without_marker", "markers_to_no_line", "without_room")


def counts_of(run: folder.RecordedRun, searches: bool) -> dict[str, float]:
    """Those of every run; of searches also `marker_counts`, and the share of attempts for which the model's context had
    no room to show an earlier one."""
    counts = report.counts_of(run.records)
    if searches:
        later = [attempt["shown"] == 0 for r in run.records for attempt in r["search"][1:]]
        counts |= {**marker_counts(r["text"] for r in run.records), "without_room": float(np.mean(later or [0]))}
    if counts.get("without_room"):
        print(f"{run.name}: {counts['without_room']:.0%} of the later attempts saw no earlier one, for lack of room")
    return counts


# ---------------------------------------------------------------------------------------------- numbers


def curve(record: dict, axis: str) -> tuple[list[float], list[float]]:
    """(tokens, J) of one trace where it was cut and after its extensions. Inside the thought the points are the
    episodes' ends where an analysis gave them, else the budgets that cut it."""
    tokens, J = trace_curve(record, axis) if record["J"] and record[AXES[axis]] else ([], [])
    points = [] if J else [p for p in record["exploit"].values() if p["cut"]]
    points = [*points, *record["extrapolate"].values()]
    return [*tokens, *(spent(p, axis) for p in points)], [*J, *(p["J"] for p in points)]


def spent(point: dict, axis: str) -> float:
    return point["asked" if axis == "prompt" else "thought_tokens"] + point["answer_tokens"]


def problem_values(settings: dict, records: list[dict], axis: str) -> Values:
    """Each metric's value for each problem; `settings`: those of the run."""
    if settings["style"] == "window":
        return search_values(records)
    mean = partial(problem_means, records)
    values = {"right": mean(lambda r: r["reward"]), "thought tokens": mean(lambda r: r["boundaries"][-1])}
    for budget in map(str, settings["budgets"]):
        values[f"within {budget}"] = mean(lambda r, budget: r["exploit"][budget]["J"], budget)
    for w in map(str, extensions(settings)):
        values[f"{w} extensions"] = mean(lambda r, w: r["extrapolate"][w]["J"], w)
        values[f"tokens, {w} extensions"] = mean(lambda r, w: spent(r["extrapolate"][w], axis), w)
    for budget in regret_budgets(settings):
        values[f"regret@{budget}"] = mean(lambda r, budget: normalized_regret(*curve(r, axis), budget), budget)
    return values


def extensions(settings: dict) -> list[int]:
    """After how many of them answers are sampled: every so many, and after the last."""
    return sorted({*range(0, settings["extensions"], settings["answer_every"]), settings["extensions"]})


def regret_budgets(settings: dict) -> list[int]:
    """Inside: --budgets; beyond: the training budget + what the extensions may add (Figure 9)."""
    more = settings["extension_tokens"] if settings["style"] == "paper" else 0
    return sorted({*settings["budgets"], *(settings["max_tokens"] + more * w for w in extensions(settings)[1:])})


SAME = (  # settings in which runs that are compared may not differ
    "budgets max_tokens extension_tokens extensions answer_every style strings forced_answers answer_tokens "
    "temperature top_p"
).split()


def compare(args, folders: list[Path]) -> None:
    """Table and figures of runs on the problems they share, from their records; differences are to the first."""
    searches = (folder.config_of(folders[0]) or {"settings": {}})["settings"].get("style") == "window"
    fields = ["search"] if searches else ["exploit", "extrapolate"]
    recorded = report.read_runs(folders, *fields)
    if differing := report.differing_flags(recorded, SAME + ["window"] * searches):
        fail(f"--compare: the runs differ in {', '.join(differing)}")
    problems, settings = report.keep_shared_problems(recorded), recorded[0].settings
    values = {run.name: problem_values(settings, run.records, args.regret_axis) for run in recorded}
    metrics = {run: {name: interval(v) for name, v in by_name.items()} for run, by_name in values.items()}
    summary = {
        "training_budget": settings["max_tokens"],
        "budgets": settings["budgets"],
        "regret_budgets": regret_budgets(settings),
        "extensions": extensions(settings),
        "runs": {run.name: {**counts_of(run, searches), "metrics": metrics[run.name]} for run in recorded},
        "difference_to_first": report.differences_to_first(values),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    text = told(settings, args.regret_axis) + report.metric_table(metrics)
    for count in ("truncated", *WINDOW_COUNTS * searches, "samples", "problems"):
        text += report.table_row(count, *(f"{run[count]:.3g}" for run in summary["runs"].values()))
    first = f"{recorded[0].name} on the same {problems} problems"
    text += report.difference_table(summary["difference_to_first"], first)
    text += "".join(f"\n{run.name}: {why}" for run in recorded if (why := report.why_zero(run.records)))
    figures = [
        draw(settings, metrics, args.out) for draw in ((draw_search,) if searches else (draw_regret, draw_accuracy))
    ]
    report.write_summary(args.out, summary, text, *figures, *(folder / "trace.html" for folder in folders))


def told(settings: dict, axis: str) -> str:
    """What stands above the table."""
    if settings["style"] == "window":
        then = f"then {settings['extensions']} more attempts that see the last {settings['window']}"
        return f"A search: a trace of at most {settings['max_tokens']} tokens, {then}.\n\n"
    counted = "prompt and thought" if axis == "prompt" else "the thought"
    text = f"A budget counts {counted}; regret@{settings['max_tokens']} and less is inside the "
    limit = f"at most {settings['extension_tokens']} tokens each"
    return text + f"training budget, more is beyond. Extensions in the style of the paper, {limit}.\n\n"


# ---------------------------------------------------------------------------------------------- pictures


def draw_regret(settings: dict, metrics: dict[str, dict], out: Path) -> Path:
    """Figure 9: normalised regret over budgets, dashed beyond the training budget."""
    budgets, top, curves = regret_budgets(settings), settings["max_tokens"], []
    inside = [b for b in budgets if b <= top]
    beyond = inside[-1:] + budgets[len(inside) :]
    for number, (name, means) in enumerate(metrics.items()):
        for shown, style, label in ((inside, "o-", name), (beyond, "o--", None)):
            curves.append(Curve(shown, [means[f"regret@{b}"] for b in shown], label, style, f"C{number}"))
    labels = {"xlabel": f"token budget C0 (trained with {top})", "ylabel": "normalised regret"}
    return report.draw_panels(out / "regret.png", Panel(labels, curves), width=4.6, height=3.2)


def draw_accuracy(settings: dict, metrics: dict[str, dict], out: Path) -> Path:
    """Appendix F: accuracy against tokens; solid where thoughts are cut, dashed where they are extended."""
    budgets, points, cut, extended = settings["budgets"], extensions(settings), [], []
    for name, means in metrics.items():
        cut.append(Curve(budgets, [means[f"within {b}"] for b in budgets], name))
        tokens = [means[f"tokens, {w} extensions"]["mean"] for w in points]
        extended.append(Curve(tokens, [means[f"{w} extensions"] for w in points], style="o--"))
    left = {"xlabel": "budget (tokens of the thought)", "ylabel": "accuracy", "title": "thoughts cut"}
    times = ", ".join(map(str, points))
    right = {"xlabel": "mean tokens of thought and answer", "title": f"thoughts extended {times} times"}
    panels = Panel(left, cut, tokens=True), Panel(right, extended, tokens=True)
    return report.draw_panels(out / "accuracy.png", *panels, width=4.4, height=3.2, sharey=True)


def draw_search(settings: dict, metrics: dict[str, dict], out: Path) -> Path:
    """Figure 8: accuracy over tokens, of K traces and of searches, up to the tokens that these have."""
    curves = []
    for number, (name, means) in enumerate(metrics.items()):
        ks = [int(metric[4:]) for metric in means if metric.startswith("maj@")]
        tokens = {K: K * means["tokens"]["mean"] for K in ks}
        reached = [K for K in ks if K == 1 or tokens[K] <= means["tokens of a search"]["mean"]]
        curves.append(Curve([tokens[K] for K in ks], [means[f"maj@{K}"] for K in ks], name, "o-", f"C{number}"))
        for kind, style in (("search", "o--"), ("standing", ".:")):
            votes = [means[f"{kind}@{K}"] for K in reached]
            curves.append(Curve([tokens[K] for K in reached], votes, None, style, f"C{number}", band=False))
    labels = {
        "xlabel": f"tokens (a trace in training: at most {settings['max_tokens']})",
        "ylabel": "accuracy of the vote",
    }
    title = "solid: maj@K of whole traces; dashed: linearised search;\ndotted: only its standing attempts vote"
    return report.draw_panels(out / "search.png", Panel({**labels, "title": title}, curves, tokens=True), width=4.6)


if __name__ == "__main__":
    end_in_one_line(main)
