"""What a user meets first: defaults that follow, zeros that say why, records of any script, data as tools write it."""

import json

import numpy as np
import pytest
from conftest import main_with, refusal, write_rows
from test_evaluate import record, write_run

import analyze_r1
import budget_force
import evaluate
import rl_mrt
import star_mrt
from run import data, report
from run.folder import recorded_run
from run.report import group_by_problem, interval, why_zero
from run.traces import checked_prompts

# ------------------------------------------------------------------------------------------------ defaults


@pytest.mark.parametrize("max_tokens, budgets", [(64, [16, 32, 48, 64]), (1000, [250, 500, 750, 1000])])
def test_limits_that_nobody_named_follow_max_tokens(max_tokens, budgets):
    for script, least in ((analyze_r1, 4096 / 8192), (budget_force, 4096 / 16384), (evaluate, 1024 / 16384)):
        args = script.flags(["--model", "some/model", "--max-tokens", str(max_tokens)])
        assert args.budgets == budgets and args.answer_tokens == max(64, int(max_tokens * least))
    assert budget_force.flags(["--model", "a/b", "--max-tokens", "1024"]).extension_tokens == 128
    assert budget_force.flags(["--model", "a/b"]).answer_tokens == 4096
    assert budget_force.flags(["--model", "a/b", "--max-tokens", "64", "--answer-tokens", "99"]).answer_tokens == 99
    assert rl_mrt.flags(["--max-tokens", "4000"]).answer_tokens == 8  # never more than the default


def test_no_room_is_kept_for_answers_that_are_not_forced(tokenizer, problems, capsys):
    args = evaluate.flags(["--max-tokens", "4040", "--answer-tokens", "64"])
    assert args.metric == "pass@k" and not evaluate.forces(args)
    _, longest = checked_prompts(args, tokenizer, problems, forced=False)
    assert 4040 < longest < 4096
    message = refusal(capsys, checked_prompts, args, tokenizer, problems)
    fits = int(message.split("--max-tokens ")[-1].split()[0])
    args.max_tokens = fits
    assert checked_prompts(args, tokenizer, problems)[1] == 4096


@pytest.mark.parametrize("script", [analyze_r1, budget_force, evaluate, rl_mrt, star_mrt])
def test_every_script_tells_its_plan_where_a_run_is_there(script, monkeypatch, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"settings": {}}')
    flags = ("--limit", "5", "--dry-run", "1000", "--out", tmp_path / "run", "--engine", "transformers")
    main_with(monkeypatch, script, *flags)()
    said = capsys.readouterr().out.splitlines()[-2:]
    assert said[0].startswith("5 problems: ") and " at 1,000 tokens a second" in said[1]
    assert len(list((tmp_path / "run").iterdir())) == 1


# ------------------------------------------------------------------------------------------------ zeros


def test_a_zero_says_why_in_counts():
    def row(**more):
        base = {"verdict": "none", "finish": "stop", "finished": True, "reward": 0.0, "J": [], "forced": []}
        return {**base, "boundaries": [0, 9], **more}

    rows = [row(finish="length", finished=False)] * 3 + [row(finished=False)] * 2 + [row()] + [row(verdict="wrong")]
    said = why_zero(rows)
    for part in ("of 7, 3 cut", "--max-tokens", "2 ended without an end", "1 without a box", "1 wrong"):
        assert part in said
    assert why_zero([*rows, row(verdict="right", reward=1.0)]) == ""
    forced = [[{"verdict": "none"}, {"verdict": "wrong"}]] * 2
    flat = why_zero([row(reward=1.0, verdict="right", J=[0.0, 0.0], forced=forced)])
    assert "No forced answer is right: of 4, 2 forced without a box" in flat and "1 of one episode (--markers" in flat


# ------------------------------------------------------------------------------------------------ records


def test_records_of_any_script_are_read_and_what_lacks_is_named(tmp_path, capsys):
    rows = [record(i, ["7", "3"]) for i in range(4)]
    for name, script in (("a", "analyze_r1.py"), ("b", "budget_force.py")):
        run = write_run(tmp_path / name, "x", name, rows)
        config = json.loads((run / "config.json").read_text())
        del config["settings"]["max_episodes"]
        (run / "config.json").write_text(json.dumps({**config, "script": script}))
    args = evaluate.flags(["--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")])
    evaluate.compare(args, args.compare)
    said = capsys.readouterr().out
    files = said.split("files: ")[1].split()
    assert "| pass@1 | 0.500" in said and all((tmp_path / "out" / file).exists() for file in files) and len(files) == 2
    message = refusal(capsys, recorded_run, tmp_path / "a", "--from", "J")
    assert "8 of 8 records of this run of analyze_r1.py have no J" in message
    (tmp_path / "a" / "records.jsonl").write_text('{"id": "0", "traces": []}\n')  # one line a problem, as once
    assert "is not the record of a trace" in refusal(capsys, recorded_run, tmp_path / "a", "--from")


def test_a_training_by_filters_names_its_files(tmp_path, capsys):
    run = write_run(tmp_path / "star", "x", "m", [record(0, ["7"])], eval_dataset="y", eval_split="test")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "script": "star_mrt.py"}))
    (run / "records.jsonl").rename(run / "base.jsonl")
    assert "name one of" in (message := refusal(capsys, recorded_run, run, "--compare")) and "base.jsonl" in message
    read = recorded_run(run / "base.jsonl", "--compare", "reward")
    told = read.script, read.settings["dataset"], read.settings["model"], len(read.records)
    assert told == ("star_mrt.py", "y", "m", 1)


# ------------------------------------------------------------------------------------------------ intervals


def covered(draw, truth: float, trials: int = 150) -> float:
    found = [interval(draw()) for _ in range(trials)]
    return float(np.mean([i["low"] <= truth <= i["high"] for i in found]))


@pytest.mark.parametrize("problems", [15, 30])
def test_intervals_cover_on_hard_sets_and_of_differences(problems):
    """Seeded and coarse: three standard errors below .95 are .90; percentile intervals are at .87 on the first."""
    rng = np.random.default_rng(1)
    hard = covered(lambda: rng.binomial(4, rng.beta(0.3, 2.5, problems)) / 4, 0.3 / 2.8)

    def difference():
        p = rng.beta(0.7, 0.7, problems)
        better = p + (1 - p) * (rng.random(problems) < 0.3) * 0.4 * rng.random(problems)
        return (rng.binomial(4, better) - rng.binomial(4, p)) / 4

    assert hard > 0.9 and covered(difference, 0.03) > 0.9


def test_an_interval_does_not_depend_on_the_order_and_stays_in_range():
    values = np.random.default_rng(0).random(20) ** 4
    assert interval(values) == interval(values[::-1])
    ends = interval([0.0] * 9 + [1.0])
    assert 0 <= ends["low"] < ends["high"] <= 1


def test_rows_that_repeat_a_problem_are_one_problem_told_once(tmp_path, capsys):
    file = write_rows(tmp_path / "d.jsonl", *[{"problem": f"p{i % 3}", "answer": "7"} for i in range(12)])
    assert len(data.load_problems(file, "test")) == 12
    assert capsys.readouterr().out.count("12 rows are 3 problems") == 1
    rows = [{**r, "problem": f"p{i % 3}"} for i in range(12) for r in record(i, ["7", "3"])]
    assert [len(group) for group in group_by_problem(rows).values()] == [8, 8, 8]
    assert report.counts_of(rows)["problems"] == 3


# ------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize(
    "response, thought, answer",
    [
        ([{"role": "assistant", "content": "A", "reasoning_content": "T"}], "T", "A"),
        ({"role": "assistant", "content": "A", "reasoning": "T"}, "T", "A"),
        ({"content": [{"type": "thinking", "thinking": "T"}, {"type": "text", "text": "A"}]}, "T", "A"),
        ([{"role": "assistant", "content": None, "reasoning_content": "T"}], "T", None),
        ("<thought>T</thought>A", "T", "A"),
        ("<|begin_of_thought|>T<|end_of_thought|>A", "T", "A"),
        ("◁think▷T◁/think▷A", "T", "A"),
    ],
)
def test_thoughts_as_today_s_tools_write_them(response, thought, answer):
    (text,) = data.responses_of({"response": response})
    _, found, said = data.split_response(text)
    assert found.strip() == thought and (said if said is None else said.strip()) == answer


def test_a_thought_may_stand_in_a_column_of_its_own():
    (text,) = data.responses_of({"response": "A", "reasoning_content": "T"})
    assert data.split_response(text)[1:] == ("T", "\nA")
    assert "2 by </think>, 1 by ◁/think▷" == data.marks_told(["a</think>b", "◁think▷a◁/think▷b", "</think>", "none"])


@pytest.mark.parametrize(
    "gold, read",
    [
        (b"7", "7"),
        ('{"value": 7}', "7"),
        ({"value": 7}, "7"),
        ('"7"', "7"),
        ('["7", "8"]', ["7", "8"]),
        ("[1, 2]", "[1, 2]"),
        (r"\{1, 2\}", r"\{1, 2\}"),
    ],
)
def test_golds_out_of_their_wrappings(gold, read):
    assert data.gold_of({"answer": gold}, ["answer"]) == read


@pytest.mark.parametrize(
    "row, says",
    [
        ({"problem": "?", "answer": {"a": 1, "b": 2}}, "an object with a, b"),
        ({"problem": "?", "answer": "7", "image": "x.png"}, "column image holds an image"),
        ({"turns": ["a", "b"], "answer": "7"}, "holds 2 turns"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}], "answer": "7"}, "not only text"),
        ({"messages": [{"role": "user", "content": None}], "answer": "7"}, "no text"),
    ],
)
def test_what_is_no_text_is_refused_by_row(row, says, tmp_path, capsys):
    file = write_rows(tmp_path / "d.jsonl", row)
    message = refusal(capsys, data.load_problems, file, "test")
    assert "row 1" in message and says in message


def test_a_single_turn_is_the_problem(tmp_path):
    file = write_rows(tmp_path / "d.jsonl", {"turns": ["What is 3 + 4?"], "ground_truth": "7"})
    assert data.load_problems(file, "test")[0]["problem"] == "What is 3 + 4?"


def test_answers_are_sampled_after_the_last_extension_too():
    assert budget_force.extensions({"extensions": 1, "answer_every": 2}) == [0, 1]
    assert budget_force.extensions({"extensions": 8, "answer_every": 2}) == [0, 2, 4, 6, 8]
