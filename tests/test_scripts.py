"""What the scripts write, at toy size, each in this process. That a killed run goes on as if nothing had happened is in
test_runs.py; test_processes.py and test_experiments.py have scripts that start as a user starts them."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    assert_same_bits,
    assert_same_content,
    jsonl,
    main_with,
    refusal,
    run_here,
    same_content,
    write_rows,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
from run import report, training
from run.files import append_jsonl, read_jsonl
from run.folder import load_records

PNG = b"\x89PNG\r\n\x1a\n"


def is_picture(file: Path) -> bool:
    return file.read_bytes().startswith(PNG) and file.stat().st_size > 5000 and not list(file.parent.glob("*.tmp*"))


# ------------------------------------------------------------------------------------------------ training

TOY = "--problems-per-step 2 --group-size 4 --max-tokens 80 --steps 2 --eval-problems 2 --out run"
METHODS = {
    "grpo": "--bonus 0",
    "prefix": "--bonus 1 --variant prefix",
    "sampled": "--bonus 1 --variant online --progress sampled",
    "likelihood": "--bonus 1 --variant online --progress likelihood",
    "nats": "--bonus 1 --variant online --progress nats",
    "length": "--bonus 0 --length-penalty 0.3",
    "kl": "--bonus 0 --kl 0.05 --updates-per-batch 2",
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_a_complete_run(tmp_path, method):
    printed, run = run_here(tmp_path, f"rl_mrt.py {METHODS[method]} {TOY}"), tmp_path / "run"
    assert "step    1" in printed and "step    2" in printed and "validation after 2 steps" in printed
    settings, bonus = json.loads((run / "config.json").read_text())["settings"], int(METHODS[method].split()[1])
    assert (settings["max_tokens"], settings["bonus"], settings["model"]) == (80, bonus, "tiny")

    records = jsonl(run / "records.jsonl")
    assert len(records) == 16
    assert {(r["step"], r["sample"]) for r in records} == set(itertools.product((1, 2), range(4)))
    for row in records:
        assert {"step", "id", "sample", "reward", "tokens", "text", "boundaries", "J", "prefix_J"} <= row.keys()
        assert row["id"].startswith("tiny-train-") and row["reward"] in (0, 1) and 1 <= row["tokens"] <= 80
        assert row["boundaries"] == sorted(row["boundaries"]) and row["boundaries"][-1] <= row["tokens"]
        points = len(row["boundaries"]) if method in ("sampled", "likelihood", "nats") else 0
        assert len(row["J"]) == points and all(0 <= j <= 1 for j in row["J"])
        assert 0 <= row["prefix_J"] <= 1 if method == "prefix" else row["prefix_J"] is None

    metrics = jsonl(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2]
    for line in metrics:
        mine = [r for r in records if r["step"] == line["step"]]
        assert line["reward"] == pytest.approx(np.mean([r["reward"] for r in mine]))
        assert line["tokens"] == pytest.approx(np.mean([r["tokens"] for r in mine]))
        assert all(math.isfinite(v) for v in line.values())
        extra = {"prefix": "J_prefix", "sampled": "progress_per_episode", "likelihood": "progress_per_episode"}
        assert extra.get(method, "reward") in line
    assert (metrics[1]["kl"] > 0) == (method == "kl")
    assert json.loads((run / "summary.json").read_text())["step"] == 2
    assert [line["step"] for line in jsonl(run / "validation.jsonl")] == [0, 2]
    assert is_picture(run / "progress.png")

    folders = (run / "model", ROOT / "tiny")
    trained, base = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in folders)
    assert trained.config.embedded_reasoner
    changes = [(a - b).abs().max().item() for a, b in zip(trained.parameters(), base.parameters())]
    assert max(changes) > 1e-4 and all(map(math.isfinite, changes))
    text = "Find x between 1 and 10 such that x² + 3 ≡ 7 (mod 61).</think>"
    ours, theirs = (AutoTokenizer.from_pretrained(folder).encode(text) for folder in folders)
    assert ours == theirs


# ------------------------------------------------------------------------------------------------ evaluation

EVALUATION = "--limit 6 --metric all --max-tokens 96 --forced-answers 2 --batch-problems 2 --budgets 48,96 --out run"


@pytest.fixture(scope="module")
def straight_evaluation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    run_here(folder, f"evaluate.py {EVALUATION} --num-samples 4")
    return folder / "run"


def test_an_evaluation_writes_records_and_a_summary_of_them(straight_evaluation):
    records = jsonl(straight_evaluation / "records.jsonl")
    groups = report.group_by_problem(records)
    assert len(groups) == 6 and all([r["sample"] for r in group] == [0, 1, 2, 3] for group in groups.values())
    for record in records:
        assert len(record["J"]) == len(record["boundaries"]) == len(record["answer_tokens"])
        assert record["reward"] in (0, 1) and record["tokens"] <= 96 and record["boundaries"][-1] <= record["tokens"]
        assert not record["reward"] or record["boxed"]
    right = [[r["reward"] for r in group] for group in groups.values()]
    assert 0 < np.mean(right) < 1
    summary = json.loads((straight_evaluation / "summary.json").read_text())
    assert summary["problems"] == 6 and summary["samples"] == 24
    metrics = summary["metrics"]
    assert metrics["pass@1"]["mean"] == pytest.approx(np.mean(right))
    assert metrics["pass@4"]["mean"] == pytest.approx(np.mean([max(row) for row in right]))
    assert {"pass@2", "maj@2", "maj@4", "tokens", "regret@48", "regret@96", "forced@48", "forced@96"} <= metrics.keys()
    for numbers in metrics.values():
        assert numbers["low"] <= numbers["mean"] <= numbers["high"]
    table = (straight_evaluation / "summary.md").read_text()
    assert f"| pass@1 | {np.mean(right):.3f} [" in table and "regret@96" in table and "run" in table.splitlines()[0]


def same_traces(run: Path, other: Path) -> None:
    """The same traces in whatever order, made in other batches: equal content, not equal bits."""
    ours, theirs = ({(r["id"], r["sample"]): r for r in jsonl(f / "records.jsonl")} for f in (run, other))
    assert len(ours) == len(theirs) == len(jsonl(run / "records.jsonl"))
    for name in theirs:
        same_content(ours[name], theirs[name], where=str(name))


def test_text_with_rare_line_ends_stays_on_one_line(tmp_path):
    """Models write U+2028, U+0085 and form feeds; only a newline ends a record."""
    text = "a\u2028b\u2029c\x85d\x0ce\x1cf\r\ng\n\nh"
    rows = [{"step": step, "id": str(step), "sample": 0, "text": text} for step in range(3)]
    append_jsonl(tmp_path / "records.jsonl", rows)
    assert load_records(tmp_path / "records.jsonl") == rows
    assert read_jsonl(tmp_path / "records.jsonl") == rows
    training.rewind(tmp_path, 1)
    assert read_jsonl(tmp_path / "records.jsonl") == rows[:2]


def test_more_samples_are_added_to_those_there(tmp_path, straight_evaluation):
    command, file = f"evaluate.py {EVALUATION}", tmp_path / "run" / "records.jsonl"
    run_here(tmp_path, f"{command} --num-samples 2")
    first = file.read_bytes()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["samples"] == 12
    run_here(tmp_path, f"{command} --num-samples 4 --resume")
    assert file.read_bytes().startswith(first)  # what was there stays as it is
    same_traces(tmp_path / "run", straight_evaluation)
    assert_same_content(tmp_path / "run", straight_evaluation, files=("summary.json",))


def test_a_comparison_needs_records_alone(tmp_path, capsys, monkeypatch, straight_evaluation):
    """Against a copy that has one problem less, every answer right and each trace 10 tokens shorter."""
    shutil.copytree(straight_evaluation, tmp_path / "base")
    shutil.copytree(straight_evaluation, tmp_path / "better")
    records = jsonl(straight_evaluation / "records.jsonl")
    shared = [r for r in records if r["id"] != records[0]["id"]]
    pass_1 = np.mean([r["reward"] for r in shared])
    for record in shared:
        record.update(reward=1.0, verdict="right", tokens=record["tokens"] - 10)
    write_rows(tmp_path / "better" / "records.jsonl", *shared[::-1])
    flags = "--k 1,4 --budgets 48,96 --model /nowhere/at/all --out both"
    printed = run_here(tmp_path, f"evaluate.py --compare base better {flags}")
    table = (tmp_path / "both" / "summary.md").read_text()
    assert table in printed
    assert table.splitlines()[0] == "|  | base | better |"
    assert f"| pass@1 | {pass_1:.3f} [" in table and "| 1.000 [1.000, 1.000] |" in table
    assert f"| pass@1 | {1 - pass_1:+.3f} [" in table and "| tokens | -10.0 [-10.0, -10.0] |" in table
    assert "| problems | 5 | 5 |" in table and "| regret@96 | +0.000 [+0.000, +0.000] |" in table
    assert is_picture(tmp_path / "both" / "anytime.png") and is_picture(tmp_path / "both" / "efficiency.png")
    assert json.loads((tmp_path / "both" / "summary.json").read_text())

    monkeypatch.chdir(tmp_path)
    compare = main_with(monkeypatch, evaluate, "--compare", "base", "nowhere", "--out", "other")
    assert "nowhere" in refusal(capsys, compare) and not (tmp_path / "other").exists()


# ------------------------------------------------------------------------------------------------ analysis

ANALYSIS = "--limit 6 --num-samples 2 --max-tokens 96 --forced-answers 4 --batch-problems 2 --budgets 48,96"
FIGURES = ("scaling.png", "budgets.png", "progress.png")


@pytest.fixture(scope="module")
def straight_analysis(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis")
    run_here(folder, f"analyze_r1.py {ANALYSIS} --direct-model tiny --direct-samples 4 --out run")
    return folder / "run"


def test_an_analysis_writes_records_and_numbers_and_pictures_of_them(straight_analysis):
    records = jsonl(straight_analysis / "records.jsonl")
    assert [r["sample"] for r in records] == [0, 1] * 6 and len({r["id"] for r in records}) == 6
    for r in records:
        points = len(r["boundaries"])
        assert points == len(r["J"]) == len(r["forced"]) == len(r["characters"]) == len(r["answer_tokens"])
        for value, forced in zip(r["J"], r["forced"]):
            assert value == np.mean([a["verdict"] == "right" for a in forced])
            assert len(forced) == 4 and all(a["text"] for a in forced)
    summary = json.loads((straight_analysis / "summary.json").read_text())
    assert summary["traces"] == 12 == sum(p["traces"] for p in summary["panels"])
    assert summary["direct"]["k"] == [1, 2, 4]
    assert summary["direct"]["pass@k"][0]["mean"] == pytest.approx(summary["direct"]["maj@k"][0]["mean"])
    assert all(is_picture(straight_analysis / name) for name in FIGURES)
    assert "normalised regret at 96" in (straight_analysis / "summary.md").read_text()


def test_an_analysis_can_be_redrawn_and_given_more_samples(tmp_path, straight_analysis):
    shutil.copytree(straight_analysis, tmp_path / "again")
    run_here(tmp_path, f"analyze_r1.py {ANALYSIS} --direct-model tiny --direct-samples 5 --out again --resume")
    assert len(jsonl(tmp_path / "again" / "direct.jsonl")) == 5 * 6  # one more of each
    assert_same_bits(tmp_path / "again", straight_analysis)
    shutil.copy(straight_analysis / "direct.jsonl", tmp_path / "again" / "direct.jsonl")
    for name in ("summary.json", "trace.html", *FIGURES):
        (tmp_path / "again" / name).unlink()
    run_here(tmp_path, "analyze_r1.py --from again --model /nowhere")
    assert_same_bits(tmp_path / "again", straight_analysis, ("summary.json", "trace.html"))
    assert all(is_picture(tmp_path / "again" / name) for name in FIGURES)


def test_given_responses_are_analysed(tmp_path):
    thought = "Okay, a.\n\nb.\n\nc.\n\nWait, d.\r\n\r\ne.\n\n<script>alert(1)</script>"
    rows = [
        {"problem": "What is 3 + 4?", "answer": "7", "response": f"<think>\n{thought}</think>\n\\boxed{{7}}"},
        {"problem": "What is 3 + 5?", "answer": "8", "response": "  "},
        {"problem": "What is 3 + 4?", "answer": "7", "response": thought},
    ]
    write_rows(tmp_path / "r.jsonl", *rows)
    printed = run_here(tmp_path, "analyze_r1.py --traces r.jsonl --out run")
    assert "problem 1: no usable response" in printed
    records = jsonl(tmp_path / "run/records.jsonl")
    assert [(r["id"], r["sample"], r["verdict"]) for r in records] == [("0", 0, "right"), ("0", 1, "none")]
    assert json.loads((tmp_path / "run/summary.json").read_text())["problems"] == 1
    assert "<script>alert" not in (tmp_path / "run/trace.html").read_text()


# ------------------------------------------------------------------------------------------------ budget forcing

BUDGET = "--limit 6 --num-samples 2 --max-tokens 96 --forced-answers 2 --batch-problems 2 --budgets 32,96"
BUDGET += " --extensions 2 --extension-tokens 8 --out run"


@pytest.fixture(scope="module")
def straight_budget(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    run_here(folder, f"budget_force.py --model tiny {BUDGET}")
    return folder / "run"


def test_budget_forcing_writes_records_numbers_and_pictures(straight_budget):
    records = jsonl(straight_budget / "records.jsonl")
    assert [r["sample"] for r in records] == [0, 1] * 6 and len({r["id"] for r in records}) == 6
    metrics = json.loads((straight_budget / "summary.json").read_text())["runs"]["run"]["metrics"]
    for name in ("32", "96"):
        expected = np.mean([r["exploit"][name]["J"] for r in records])
        assert metrics[f"within {name}"]["mean"] == pytest.approx(expected)
    for w in ("0", "2"):
        expected = np.mean([r["extrapolate"][w]["J"] for r in records])
        assert metrics[f"{w} extensions"]["mean"] == pytest.approx(expected)
    assert {"regret@32", "regret@96", "regret@112"} <= metrics.keys()
    assert all(is_picture(straight_budget / name) for name in ("regret.png", "accuracy.png"))
    assert "A budget counts the thought;" in (straight_budget / "summary.md").read_text()


def test_budget_forcing_is_compared_from_records(tmp_path, straight_budget):
    for name in ("run", "other"):
        shutil.copytree(straight_budget, tmp_path / name)
    printed = run_here(tmp_path, "budget_force.py --compare run other --out both")
    assert "Difference to run on the same 6 problems" in printed
    assert "| within 96 | +0.000 [+0.000, +0.000] |" in printed


def test_budget_forcing_goes_on_from_the_thoughts_of_an_analysis(tmp_path, straight_analysis):
    shutil.copytree(straight_analysis, tmp_path / "analysis")
    run_here(tmp_path, f"budget_force.py --thoughts analysis {BUDGET} --max-tokens 31")
    configs = (json.loads((tmp_path / run / "config.json").read_text()) for run in ("run", "analysis"))
    ours, theirs = (config["settings"]["max_tokens"] for config in configs)
    assert ours == theirs > 31  # the training budget is the limit that the thoughts had
    ours, theirs = jsonl(tmp_path / "run/records.jsonl"), jsonl(tmp_path / "analysis/records.jsonl")
    for name in ("id", "sample", "J", "forced", "token_ids", "answer", "boxed"):
        assert [r[name] for r in ours] == [r[name] for r in theirs], name
