"""budget_force.py: exploit a smaller budget, extrapolate to a larger one (Section 8, Figures 9 and 12, Appendix F)

    python budget_force.py                             # the embedded model, and the checkpoints of `make demo`
    python budget_force.py --model A,B,C               # several models, one table and one figure
    python budget_force.py --thoughts runs/ANALYSIS    # thoughts and forced answers of an analyze_r1.py run
    python budget_force.py --compare runs/A runs/B     # table and figures again, from records alone

Exploit: every thought is cut at each of --budgets and told that time is up; thoughts that ended by themselves within
the budget are left alone. Extrapolate: at the end of the thought a continue string ("Wait", …) is appended instead of
the end-of-thinking marker, --extensions times, and answers are sampled after 0, 2, 4, … of them. Both give points
(tokens, accuracy) of one curve; the normalised regret is the area above it, inside and beyond the training budget.
"""

import argparse
import copy
from collections import Counter
from pathlib import Path

import numpy as np

import common
from common import THINK_END, Sampler, Trace, fail

# flag: (default with the embedded model, with any other model, where the latter comes from)
DEFAULTS = {
    "dataset": ("tiny", "yentinglin/aime_2025", "Appendix F"),
    "split": ("test", "train", "the only one of that set"),
    "limit": (40, 15, "Appendix F: 15 problems"),
    "num_samples": (4, 16, "Appendix F"),
    "max_tokens": (256, 16384, "Appendix F"),
    "temperature": (1.0, 0.6, "Appendix F"),
    "top_p": (1.0, 0.95, "Appendix F"),
    "answer_tokens": (8, 4096, "Appendix F"),
    "extension_tokens": (32, 2048, "Appendix F"),
    "budgets": ("32,64,96,128,192,256", "2048,4096,8192,12288,16384", "Section 7 has the last four"),
    "batch_problems": (64, 4, "ours"),
}
STRINGS = "Wait,But wait,Alternatively,But hold on"  # in turn (Appendix F)
DEMO = ("runs/demo/grpo/model", "runs/demo/mrt/model")


def flags(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_common_flags(parser)
    parser.set_defaults(model=",".join(["tiny", *(path for path in DEMO if Path(path).is_dir())]))
    thoughts = parser.add_argument_group("thoughts")
    thoughts.add_argument("--thoughts", type=Path, metavar="RUN", help="not new thoughts but those of an analyze_r1.py "
                          "run of the same model, with J at their episodes; its --max-tokens holds")  # fmt: skip
    thoughts.add_argument("--num-samples", type=common.positive_int, help="thoughts a problem")
    thoughts.add_argument("--max-tokens", type=common.positive_int, help="training budget: limit of a thought with its "
                          "answer; beyond it is extrapolation")  # fmt: skip
    thoughts.add_argument("--temperature", type=common.non_negative)
    thoughts.add_argument("--top-p", type=float)
    answers = parser.add_argument_group("answers")
    answers.add_argument("--forced-answers", type=common.positive_int, default=8, help="a point (Appendix F: 8)")
    answers.add_argument("--answer-tokens", type=common.positive_int, help="limit of one")
    exploit = parser.add_argument_group("exploit")
    exploit.add_argument("--budgets", help="tokens at which thoughts are cut, as 512,1024")
    exploit.add_argument("--cut", choices=("paragraph", "exact"), default="paragraph",
                         help="at the last paragraph end within the budget, or at the very token")  # fmt: skip
    exploit.add_argument("--count", choices=("thought", "total"), default="thought",
                         help="what a budget counts: the thought, or the thought and its answer")  # fmt: skip
    beyond = parser.add_argument_group("extrapolate")
    beyond.add_argument("--extensions", type=common.whole_number, default=8, help="continuations of a thought")
    beyond.add_argument("--answer-every", type=common.positive_int, default=2, help="extensions between answers")
    beyond.add_argument("--strings", default=STRINGS, help="continue strings, in turn")
    beyond.add_argument("--extension-tokens", type=common.positive_int, help="limit of one extension")
    beyond.add_argument("--style", choices=("paper", "s1"), default="paper", help="paper: a new line and a string, "
                        "each extension has its own limit, an unfinished last paragraph is dropped; s1: 'Wait' at the "
                        "very end, all within --max-tokens")  # fmt: skip
    run = parser.add_argument_group("run")
    run.add_argument("--batch-problems", type=common.positive_int, help="problems worked on and recorded together")
    run.add_argument("--compare", type=Path, nargs="+", metavar="RUN", help="earlier runs; the first is the base")
    args = common.parse_flags(parser, DEFAULTS, argv)
    models = args.model.split(",")
    name = common.short_name(models[0]) if len(models) == 1 else "models"
    args.out = args.out or Path("runs") / ("budget-compare" if args.compare else f"budget-{name}")
    args.budgets = common.numbers("--budgets", args.budgets)
    args.strings = ["Wait"] if args.style == "s1" else args.strings.split(",")
    if not all(args.strings):
        fail("--strings: one of them is empty")
    if args.thoughts and not args.compare:
        if len(models) > 1 and args.model != parser.get_default("model"):
            fail("--thoughts: one run holds the thoughts of one model")
        args.model = models[0]
        made = (common.config_of(args.thoughts) or {}).get("settings", {})
        if "episodes_per_point" not in made:
            fail(f"--thoughts {args.thoughts}: no config.json of an analyze_r1.py run there")
        if made["model"] != args.model:
            fail(f"--thoughts {args.thoughts}: holds thoughts of --model {made['model']}, not of {args.model}")
        if not made.get("traces") and args.max_tokens != made["max_tokens"]:
            args.max_tokens = made["max_tokens"]
            print(f"training budget: {args.max_tokens} tokens, the --max-tokens of {args.thoughts}")
    return args


def main() -> None:
    args = flags()
    if args.compare:
        compare(args, args.compare)
        return
    args.engine = common.pick_engine(args.engine)
    todo = []
    if "," in args.model:
        common.check_out_of_many(args.out)
    for model in args.model.split(","):
        one = copy.copy(args)
        one.model, one.out = model, args.out / common.short_name(model) if "," in args.model else args.out
        common.check_out(one.out, lasting_settings(one), one.resume, one.overwrite)
        if not common.thinks(common.load_tokenizer(model)):
            fail(f"--model {model}: has no {THINK_END} in its vocabulary, so no thought to cut or to extend")
        todo.append(one)
    given = load_thoughts(args) if args.thoughts else None
    problems = [r["problem"] for r in given] if given else common.load_problems(args.dataset, args.split, args.limit)
    runs = []
    for one in todo:
        tokenizer = common.load_tokenizer(one.model)
        prompts = [common.prompt_ids(tokenizer, p["problem"], args.chat_template_kwargs) for p in problems]
        strings = max(len(common.encode(tokenizer, "\n" + string)) for string in one.strings)
        more = one.extensions * (one.extension_tokens + strings) if one.style == "paper" else 0
        longest = common.check_lengths(one, tokenizer, problems, prompts, more)
        run = common.open_run(one.out, lasting_settings(one), one.resume, one.overwrite)
        common.same_inputs(run, problems, one.model)
        sampler = common.open_sampler(one, tokenizer, longest)
        force(one, run, sampler, problems, prompts, given)
        sampler.close()
        runs.append(run)
    compare(args, runs)


def lasting_settings(args) -> dict:
    """Without those that may differ when a run is continued."""
    volatile = ("config", "batch_problems", "compare")
    return {k: v for k, v in vars(args).items() if k not in volatile}


def load_thoughts(args) -> list[dict]:
    """[{problem, samples}] of an analysis."""
    records = [r for r in common.load_records(args.thoughts) if r["samples"]][: args.limit]
    return [{"problem": {k: r[k] for k in ("problem", "answer", "id")}, "samples": r["samples"]} for r in records]


# ---------------------------------------------------------------------------------------------- sampling


def force(args, run: Path, sampler: Sampler, problems, prompts, given: list[dict] | None) -> None:
    """Writes one record a problem, as each batch of problems is done; those recorded already are not made again."""
    for some in common.unrecorded(run, problems, args.batch_problems, sampler):
        if given is None:
            groups = common.sample_traces(args, sampler, [problems[i] for i in some], [prompts[i] for i in some])
        else:
            again = common.trace_from_record
            groups = [[again(sampler.tokenizer, problems[i], prompts[i], s) for s in given[i]["samples"]] for i in some]
        traces = [trace for group in groups for trace in group]
        records = [
            {
                "right": t.reward,
                "finish": t.completion.finish_reason,
                "thought_tokens": t.boundaries[-1],
                "tokens": len(t.completion.token_ids),
                "boundaries": t.boundaries,
                "J": t.values,
                "answer_tokens": t.answer_tokens,
                "exploit": cut,
                "extrapolate": extended,
            }
            for t, cut, extended in zip(traces, exploit(args, sampler, traces), extrapolate(args, sampler, traces))
        ]
        lines = []
        for group in groups:
            lines.append({**group[0].problem, "samples": records[: len(group)]})
            records = records[len(group) :]
        common.append_jsonl(run / "records.jsonl", lines)


def seeds_of(args, traces: list[Trace]) -> list[tuple[int, ...]]:
    """What seeds what is sampled for each trace: the same whichever other problems are in the batch."""
    before: Counter = Counter()  # traces of the same problem
    seeds = []
    for trace in traces:
        name = trace.problem["id"]
        seeds.append((args.seed, 3, common.key(name), before[name]))
        before[name] += 1
    return seeds


def answers_at(args, sampler: Sampler, traces: list[Trace], asked: list[tuple[int, list[int]]], seeds) -> list[dict]:
    """Samples --forced-answers for each (trace number, prompt); only what follows the prompt is graded."""
    rows = sampler.generate([prompt for _, prompt in asked], args.answer_tokens, seeds, args.forced_answers,
                            args.temperature, args.top_p)  # fmt: skip
    accuracy = common.mean_accuracy([traces[t].problem for t, _ in asked], rows) if rows else []
    return [
        {
            "J": float(a),
            "answer_tokens": float(np.mean([len(c.token_ids) for c in row])),
            "answers": [common.extract_answer(c.text) for c in row],
        }
        for a, row in zip(accuracy, rows)
    ]


def exploit(args, sampler: Sampler, traces: list[Trace]) -> list[dict]:
    """For each trace {budget: J, thought and answer tokens}: what it is worth if it may use no more than the budget."""
    results: list[dict] = [{} for _ in traces]
    asked, places, seeds, own_seeds = [], [], [], seeds_of(args, traces)
    for t, trace in enumerate(traces):
        end, total = trace.boundaries[-1], len(trace.completion.token_ids)
        for budget in args.budgets:
            if trace.finished and (end if args.count == "thought" else total) <= budget:
                own = {"J": trace.reward, "answer_tokens": float(total - end), "answers": [trace.answer]}
                results[t][budget] = {"thought_tokens": end, "cut": False, **own}
                continue
            room = budget if args.count == "thought" else max(0, budget - args.answer_tokens)
            cut = common.cut_at_budget(trace, room, args.cut == "exact")
            asked.append((t, common.forced_prompt(sampler.tokenizer, trace, cut)))
            places.append((t, budget, cut))
            seeds.append((*own_seeds[t], 0, budget))
    for (t, budget, cut), answered in zip(places, answers_at(args, sampler, traces, asked, seeds)):
        results[t][budget] = {"thought_tokens": cut, "cut": True, **answered}
    return results


def extrapolate(args, sampler: Sampler, traces: list[Trace]) -> list[dict]:
    """For each trace {extensions: J, thought and answer tokens}. `generated` are the tokens sampled for the thought so
    far, also those dropped again; the continue strings are in `thought_tokens`, as the model reads them."""
    tokenizer = sampler.tokenizer
    marker = common.encode(tokenizer, THINK_END)[0]
    thoughts = [t.completion.token_ids[: t.boundaries[-1]] for t in traces]
    generated, own_seeds = [len(thought) for thought in thoughts], seeds_of(args, traces)
    if args.style == "paper":
        thoughts = [ids if t.finished else drop_unfinished(tokenizer, ids, len(ids), 0)
                    for t, ids in zip(traces, thoughts)]  # fmt: skip
    results: list[dict] = [{} for _ in traces]
    for w in range(args.extensions + 1):
        if w % args.answer_every == 0:
            asked = [(t, traces[t].prompt + end_thought(tokenizer, ids)) for t, ids in enumerate(thoughts)]
            seeds = [(*seed, 1, w) for seed in own_seeds]
            for t, answered in enumerate(answers_at(args, sampler, traces, asked, seeds)):
                results[t][w] = {"thought_tokens": len(thoughts[t]), "generated": generated[t], **answered}
        if w == args.extensions:
            break
        string = common.encode(tokenizer, ("" if args.style == "s1" else "\n") + args.strings[w % len(args.strings)])
        starts = {t: [*ids, *string] for t, ids in enumerate(thoughts)}
        limits = {t: args.extension_tokens for t in starts}
        if args.style == "s1":  # one budget for the whole thought, which "Wait" does not renew
            limits = {t: args.max_tokens - len(ids) for t, ids in starts.items()}
        going = [t for t in starts if limits[t] > 0]
        rows = sampler.generate([traces[t].prompt + starts[t] for t in going], [limits[t] for t in going],
                                [(*own_seeds[t], 2, w) for t in going], 1, args.temperature, args.top_p,
                                stop=[marker])  # fmt: skip
        for t, (completion,) in zip(going, rows):
            generated[t] += len(completion.token_ids)
            ended = completion.finish_reason == "stop"  # by the marker, or by the end of the turn
            extended = starts[t] + completion.token_ids[: len(completion.token_ids) - ended]
            if not ended and args.style == "paper":
                extended = drop_unfinished(tokenizer, extended, len(thoughts[t]), len(starts[t]))
            thoughts[t] = extended
    return results


def end_thought(tokenizer, thought: list[int]) -> list[int]:
    """The thought and the end-of-thinking marker, without a word about time (Appendix F)."""
    text, _ = common.text_and_offsets(tokenizer, thought)
    return thought + common.end_of_thought(tokenizer, text)


def drop_unfinished(tokenizer, thought: list[int], keep: int, first: int) -> list[int]:
    """Without the unfinished last paragraph. Paragraph ends are looked for after place `first`; where there is none,
    the first `keep` tokens are what stays."""
    text, offsets = common.text_and_offsets(tokenizer, thought)
    ends = (b for b in range(len(thought), first, -1) if text[: offsets[b]].endswith("\n\n"))
    return thought[: next(ends, keep)]


# ---------------------------------------------------------------------------------------------- numbers


def points(sample: dict) -> tuple[list[float], list[float]]:
    """The curve of one trace: (thought + mean answer tokens, J) where it was cut and after its extensions. Inside the
    thought the points are the episodes' ends where an analysis gave them, else the budgets that cut it."""
    tokens, values = common.trace_curve(sample)
    forced = list(sample["extrapolate"].values())
    if not values:
        forced = [of for of in sample["exploit"].values() if of["cut"]] + forced
    return [*tokens, *map(sum_tokens, forced)], [*values, *(of["J"] for of in forced)]


def per_problem(made: dict, records: list[dict]) -> dict[str, list[float]]:
    """Each metric's value for each problem; `made`: the settings of the run."""

    def mean(of_sample, *at) -> list[float]:
        return [float(np.mean([of_sample(s, *at) for s in r["samples"]])) for r in records]

    values = {"right": mean(lambda s: s["right"]), "thought tokens": mean(lambda s: s["thought_tokens"])}
    for budget in map(str, made["budgets"]):
        values[f"within {budget}"] = mean(lambda s, b: s["exploit"][b]["J"], budget)
    for w in records[0]["samples"][0]["extrapolate"]:
        values[f"{w} extensions"] = mean(lambda s, w: s["extrapolate"][w]["J"], w)
        values[f"tokens, {w} extensions"] = mean(lambda s, w: sum_tokens(s["extrapolate"][w]), w)
    for budget in regret_budgets(made):
        values[f"regret@{budget}"] = mean(lambda s, b: common.normalized_regret(*points(s), b), budget)
    return values


def sum_tokens(of: dict) -> float:
    return of["thought_tokens"] + of["answer_tokens"]


def regret_budgets(made: dict) -> list[int]:
    """Inside: --budgets; beyond: the training budget + what the extensions may add (Section 7)."""
    more = made["extension_tokens"] if made["style"] == "paper" else 0
    extensions = range(made["answer_every"], made["extensions"] + 1, made["answer_every"])
    return sorted({*made["budgets"], *(made["max_tokens"] + more * w for w in extensions)})


def compare(args, runs: list[Path]) -> None:
    """Table and figures of runs on the problems they share, from their records; differences are to the first."""
    made, records, names = {}, {}, common.run_names(runs)
    for run in runs:
        settings = (common.config_of(run) or {}).get("settings", {})
        if "extension_tokens" not in settings or not (run / "records.jsonl").exists():
            fail(f"--compare {run}: no config.json and records.jsonl of a budget_force.py run there")
        made[names[run]], records[names[run]] = settings, common.load_records(run)
    for setting in ("budgets", "max_tokens", "extension_tokens", "extensions", "answer_every", "style", "strings",
                    "count", "cut", "forced_answers", "answer_tokens", "temperature", "top_p"):  # fmt: skip
        if len({str(of[setting]) for of in made.values()}) > 1:
            fail(f"--compare: the runs differ in --{setting.replace('_', '-')}")
    shared = set.intersection(*({(r["id"], r["problem"]) for r in rows} for rows in records.values()))
    if not shared:
        fail("--compare: the runs have no problem in common")
    records = {name: [r for r in rows if (r["id"], r["problem"]) in shared] for name, rows in records.items()}
    records = {name: sorted(rows, key=lambda r: r["id"]) for name, rows in records.items()}
    settings = next(iter(made.values()))
    values = {name: per_problem(settings, rows) for name, rows in records.items()}
    summary = summarise(settings, records, values)
    args.out.mkdir(parents=True, exist_ok=True)
    text = table(summary, settings)
    common.write_text(args.out / "summary.md", text)
    print("\n" + text)
    figures = [draw_regret(summary, args.out), draw_accuracy(summary, args.out)]
    common.write_json(args.out / "summary.json", summary)
    print(f"table: {args.out / 'summary.md'}   figures: {', '.join(map(str, figures))}")


def summarise(made: dict, records: dict[str, list[dict]], values: dict[str, dict[str, list[float]]]) -> dict:
    """Every number that is printed or drawn."""
    base, *others = values
    summary = {
        "counts": f"the {made['count']}" if made["count"] == "thought" else "the thought and its answer",
        "training_budget": made["max_tokens"],
        "budgets": made["budgets"],
        "regret_budgets": regret_budgets(made),
        "extensions": [int(w) for w in next(iter(records.values()))[0]["samples"][0]["extrapolate"]],
        "runs": {},
        "difference_to_first": {},
    }
    for name, rows in records.items():
        samples = [s for r in rows for s in r["samples"]]
        summary["runs"][name] = {
            "problems": len(rows),
            "samples": len(samples),
            "truncated": float(np.mean([s["finish"] == "length" for s in samples])),
            "metrics": {metric: common.interval(of) for metric, of in values[name].items()},
        }
    for name in others:
        gaps = {m: np.array(values[name][m]) - np.array(values[base][m]) for m in values[base]}
        summary["difference_to_first"][name] = {m: common.interval(gap) for m, gap in gaps.items()}
    return summary


def table(summary: dict, made: dict) -> str:
    runs, text = summary["runs"], ""
    names = list(runs)
    rows = [[m, *(common.cell(runs[n]["metrics"][m], 1 if "tokens" in m else 3) for n in names)]
            for m in runs[names[0]]["metrics"]]  # fmt: skip
    rows += [[count, *(f"{runs[n][count]:.3g}" for n in names)] for count in ("truncated", "samples", "problems")]
    text += f"A budget counts {summary['counts']}; regret@{summary['training_budget']} and less is inside the training "
    text += f"budget, more is beyond. Extensions in the style of {made['style']}, "
    text += f"at most {made['extension_tokens']} tokens each.\n\n"
    text += common.markdown(["", *names], rows)
    if len(names) > 1:
        gaps = summary["difference_to_first"]
        rows = [[m, *(common.cell(gaps[n][m], 1 if "tokens" in m else 3, "+") for n in names[1:])]
                for m in gaps[names[1]]]  # fmt: skip
        text += f"\nDifference to {names[0]} on the same {runs[names[0]]['problems']} problems:\n\n"
        text += common.markdown(["", *names[1:]], rows)
    return text


# ---------------------------------------------------------------------------------------------- pictures


def draw_regret(summary: dict, out: Path) -> Path:
    """Figure 9: normalised regret over budgets, dashed beyond the training budget."""
    plt = common.pyplot()
    figure, axis = plt.subplots(figsize=(5.2, 3.6), constrained_layout=True)
    inside = [b for b in summary["regret_budgets"] if b <= summary["training_budget"]]
    beyond = inside[-1:] + [b for b in summary["regret_budgets"] if b > summary["training_budget"]]
    for number, (name, run) in enumerate(summary["runs"].items()):
        for budgets, style in ((inside, "o-"), (beyond, "o--")):
            cells = [run["metrics"][f"regret@{b}"] for b in budgets]
            common.line(axis, budgets, cells, f"C{number}", name if style == "o-" else None, style)
    axis.axvline(summary["training_budget"], color="grey", linewidth=0.8)
    axis.text(summary["training_budget"], axis.get_ylim()[1], " training budget", fontsize=7, va="top", color="grey")
    axis.set(xlabel="token budget C0", ylabel="normalised regret")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    return common.save_figure(figure, out / "regret.png")


def draw_accuracy(summary: dict, out: Path) -> Path:
    """Figure 12: accuracy against tokens; solid where thoughts are cut, dashed where they are extended."""
    plt = common.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), constrained_layout=True, sharey=True)
    for number, (name, run) in enumerate(summary["runs"].items()):
        metrics, color = run["metrics"], f"C{number}"
        cells = [metrics[f"within {b}"] for b in summary["budgets"]]
        common.line(axes[0], summary["budgets"], cells, color, name, "o-")
        cells = [metrics[f"{w} extensions"] for w in summary["extensions"]]
        tokens = [metrics[f"tokens, {w} extensions"]["mean"] for w in summary["extensions"]]
        common.line(axes[1], tokens, cells, color, name, "o--")
    axes[0].set(xlabel=f"budget (tokens of {summary['counts']})", ylabel="accuracy", title="thoughts cut")
    axes[1].set(xlabel="mean tokens of thought and answer")
    axes[1].set_title(f"thoughts extended {', '.join(map(str, summary['extensions']))} times")
    for axis in axes:
        common.token_axis(axis)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    return common.save_figure(figure, out / "accuracy.png")


if __name__ == "__main__":
    main()
