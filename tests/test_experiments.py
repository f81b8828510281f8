"""The comparison: its intervals, its measures, and the whole of it at toy size."""

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments import compare, report
from plumbing.runs import ROOT, read_jsonl

TOY = {
    "train": {"max-tokens": 64, "max-sampled-tokens": 2500, "problems-per-step": 4, "group-size": 4, "eval-every": 1,
              "eval-problems": 3, "checkpoint-every": 1, "keep": 1000},
    "evaluate": {"split": "final", "limit": 6, "max-tokens": 64, "num-samples": 2, "budgets": "32,64"},
    "force": {"split": "final", "limit": 6, "max-tokens": 64, "num-samples": 1, "forced-answers": 2,
              "budgets": "32,64", "extensions": 2},
    "analyze": {"limit": 3, "num-samples": 2, "max-tokens": 64, "forced-answers": 2},
    "estimators": {"traces": 4, "max-tokens": 32},
    "star": {"max-tokens": 96, "limit": 16, "iterations": 2, "num-samples": 2, "forced-answers": 2,
             "eval-split": "validation", "eval-problems": 2},
    "seeds": {"core": [0], "star": [0], "others": [0]},
    "targets": [0.1, 1.0],
    "search": {"lr": [1e-4], "seed": 100},
    "core": ["GRPO", "MRT online"],
    "methods": {
        "GRPO": {"flags": "--bonus 0", "lr": 2e-4},
        "MRT online": {"flags": "--bonus 1 --variant online --progress likelihood", "lr": 2e-4},
    },
}  # fmt: skip


def execute(folder: Path, *command):
    command = [sys.executable, "-m", "experiments.compare", *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, env=environment)


def test_the_comparison_from_nothing_and_again_from_its_runs(tmp_path, monkeypatch):
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY))
    command = ("--config", "toy.yaml", "--out", "run", "--jobs", 1)
    done = execute(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("python rl_mrt.py") == 2
    pages = tmp_path / "run" / "pages"
    summary = json.loads((pages / "summary.json").read_text())
    of = summary["tables"]["Equal sampled tokens"]
    gain, right = of["MRT online"]["gain"], "right@64"
    assert gain["mean"] == pytest.approx(of["MRT online"][right]["mean"] - of["base"][right]["mean"])
    evaluated = json.loads((tmp_path / "run" / "grpo-seed0" / "test" / "summary.json").read_text())["metrics"]
    assert of["GRPO"][right]["mean"] == pytest.approx(evaluated["pass@1"]["mean"])
    regret = summary["tables"]["Normalised regret"]["GRPO"]
    assert regret["regret@64"]["mean"] == pytest.approx(evaluated["regret@64"]["mean"])
    extended = summary["tables"]["Normalised regret of thoughts that are cut and extended"]["GRPO"]
    assert list(regret) == ["regret@32", "regret@64"]
    assert list(extended) == ["regret@32", "regret@64", "regret@128"]  # the last is beyond the training budget
    assert {p.stem for p in pages.glob("*.png")} == {"method", "anytime", "training", "extensions"}
    before = {p.name: p.read_bytes() for p in pages.iterdir() if p.suffix != ".png"}
    again = execute(tmp_path, *command)
    assert again.returncode == 0 and "python " not in again.stdout  # nothing is run twice
    assert {p.name: p.read_bytes() for p in pages.iterdir() if p.suffix != ".png"} == before
    # Equal computed tokens: the last checkpoint that had computed no more than GRPO had at its end.
    args = types.SimpleNamespace(out=tmp_path / "run")
    jobs = compare.equal_compute_jobs(args, TOY)
    for passes, ((_, line),) in zip((3, 0), jobs, strict=True):
        step = int(line[line.index("--model") + 1].rsplit("_", 1)[1])
        spent = []
        for name in ("mrt-online-seed0", "grpo-seed0"):
            run = tmp_path / "run" / name
            records = read_jsonl(run / "records.jsonl")
            spent.append([])
            for i, of in enumerate(report.metrics(run)):
                update = sum(r["prompt_tokens"] + r["tokens"] for r in records if r["step"] <= i)
                spent[-1].append(of["computed_tokens"] + passes * update)
        assert step == 1 or spent[0][step - 1] <= spent[1][-1]
        assert step == len(spent[0]) or spent[0][step] > spent[1][-1]


def test_runs_of_other_settings_are_refused_before_anything_runs(tmp_path, capsys):
    args = types.SimpleNamespace(out=tmp_path, jobs=1, all=False)
    ((_, line), *_), *_ = compare.method_jobs(args, TOY, ["GRPO"])
    run = report.folder(args, "GRPO", 0)
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"settings": {}, "command": ["rl_mrt.py", *line[1:], "--resume"]}))
    for done in (run / "summary.json", run / "test" / "summary.json", run / "force" / "summary.json"):
        done.parent.mkdir(exist_ok=True)
        done.write_text("{}")
    assert compare.run_all(args, compare.method_jobs(args, TOY, ["GRPO"])) == 0  # it is all there
    faster = {**TOY, "methods": {**TOY["methods"], "GRPO": {"flags": "--bonus 0", "lr": 1}}}
    with pytest.raises(SystemExit) as ended:
        compare.run_all(args, compare.method_jobs(args, faster, ["GRPO"]))
    message = capsys.readouterr().err
    assert ended.value.code == 2 and f"{run}: was made with other settings" in message and message.count("\n") == 1


def test_seeds_and_extensions_of_each_method():
    seeds = {"seeds": {"core": [0, 1, 2], "star": [0], "others": [1]}}
    methods = {**TOY["methods"], "λ": {"flags": "", "lr": 1}, "long": {"flags": "", "lr": 1, "seeds": [0, 2]}}
    config = {**TOY, **seeds, "methods": methods}
    for everything, forced in ((False, ["base-seed0", "grpo-seed0"]), (True, [f"{m}-seed{s}" for s in range(3)
                                                                             for m in ("base", "grpo")])):  # fmt: skip
        args = types.SimpleNamespace(out=Path("runs"), all=everything)
        jobs = compare.method_jobs(args, config, ["base", "GRPO", "λ", "long"])
        tests = [done.parent.parent.name for job in jobs for done, _ in job if done.parent.name == "test"]
        assert sorted(tests) == sorted(
            [*(f"{m}-seed{s}" for s in range(3) for m in ("base", "grpo")), "lambda-seed1", "long-seed0", "long-seed2"]
        )
        assert [d.parent.parent.name for job in jobs for d, _ in job if d.parent.name == "force"] == forced


def test_an_accuracy_is_reached_on_the_way_from_nothing():
    grid = report.grid_of(TOY)
    curve = np.where(grid >= grid[3], 1.0, 0.0)  # right from the fourth budget on
    rows = report.reach_table(TOY, {"GRPO": {"anytime": np.tile(curve, (2, 5, 1))}}, "GRPO")
    assert rows["GRPO"]["tokens for 1.0"]["mean"] == pytest.approx(grid[3])
    assert rows["GRPO"]["tokens for 0.1"]["mean"] == pytest.approx(grid[2] + 0.1 * (grid[3] - grid[2]))
    at_once = {"GRPO": {"anytime": np.ones((2, 5, len(grid)))}}
    assert report.reach_table(TOY, at_once, "GRPO")["GRPO"]["tokens for 0.1"]["mean"] == pytest.approx(0.1 * grid[0])


def test_every_command_of_the_comparison_is_one_that_its_script_takes(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "experiments" / "compare.yaml").read_text())
    args = types.SimpleNamespace(out=Path("runs/none"), all=True)
    jobs = [*compare.method_jobs(args, config, ["base", *config["methods"]]), *compare.star_jobs(args, config),
            *compare.other_jobs(args, config), *compare.search_jobs(args, config)]  # fmt: skip
    commands = [line for job in jobs for _, line in job if not line[0].startswith("tests/")]
    assert len(commands) > 50
    for script, *flags in commands:
        flags = ["tiny" if "runs/none" in flag and flags[i - 1] == "--model" else flag for i, flag in enumerate(flags)]
        importlib.import_module(script.removesuffix(".py")).flags(flags)


def test_a_command_that_fails_is_named_with_its_log(tmp_path):
    toy = {**TOY, "train": {**TOY["train"], "max-tokens": 1}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toy))
    done = execute(tmp_path, "--config", "toy.yaml", "--out", "run", "--search", "--jobs", 1)
    assert done.returncode == 2 and "ended with 2: see run/search/" in done.stderr
    log = tmp_path / "run" / "search" / "grpo-lr0.0001.log"
    assert "--max-tokens 1" in log.read_text()


def test_resampling_draws_problems_together_and_seeds_apart():
    rng = np.random.default_rng(1)
    hard = rng.random(200)  # what the problems share
    a, b = (hard + 0.01 * rng.standard_normal((5, 200)) for _ in range(2))
    means = report.resampled({"a": a, "b": b})
    assert means["a"].shape == (report.DRAWS + 1,) and means["a"][0] == pytest.approx(a.mean())
    assert means["a"][1:].std() == pytest.approx(hard.std() / np.sqrt(200), rel=0.1)
    assert (means["a"] - means["b"])[1:].std() < 0.1 * means["a"][1:].std()  # paired on the problems
    seeds = np.arange(4.0)[:, None] + np.zeros((4, 50))  # all the spread is between seeds
    assert report.resampled({"a": seeds})["a"][1:].std() == pytest.approx(seeds[:, 0].std() / 2, rel=0.1)


def test_resampling_leaves_out_what_is_not_there():
    values = np.array([[0.2, np.nan, 0.6], [0.4, np.nan, 0.8]])
    assert report.resampled({"a": values})["a"][0] == pytest.approx(0.5)
    curves = np.stack([values, 2 * values], -1)
    np.testing.assert_allclose(report.resampled({"a": curves})["a"][0], [0.5, 1.0])


def test_waste_is_what_tries_nothing_new_and_what_follows_the_find():
    tries = "Okay, try x = 1: no.\n\ntry x = 2: no.\n\ntry x = 3: no.\n\n"
    again = "Wait, check x = 1: no.\n\ncheck x = 2: no.\n\ncheck x = 3: no.\n\n"
    repeated = "Wait, try x = 1: no.\n\ntry x = 2: no.\n\ntry x = 3: no.\n\n"
    talk = "But hold on, maybe there is none.\n\nmaybe.\n\nmaybe.\n\n"
    finds = "Alternatively, try x = 3: no.\n\ntry x = 4: yes, x = 4 works.\n\ntry x = 4: yes, x = 4 works.\n\n"
    assert report.waste({"text": tries + again + talk + finds + "</think>\n\n**"}) == (0.5, 0)
    assert report.waste({"text": tries + finds + again + talk}) == (0.0, 2)
    assert report.waste({"text": tries + repeated}) == (0.5, 0)
    assert report.waste({"text": ""}) == (1.0, 0)  # an empty thought is one episode


def test_tables_show_what_was_never_reached():
    never = {"mean": np.inf, "low": np.inf, "high": np.inf}
    sometimes = {"mean": 100.0, "low": 90.0, "high": np.inf}
    text = report.markdown_of({"base": {"tokens for 0.9": never}, "GRPO": {"tokens for 0.9": sometimes}})
    assert "| base | – |" in text and "| GRPO | 100.0 [90.0, ∞] |" in text


def test_slugs_name_folders():
    args = types.SimpleNamespace(out=Path("runs"))
    assert report.folder(args, "MRT online λ=½", 3).name == "mrt-online-lambda-half-seed3"
