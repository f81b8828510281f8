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
import torch
import yaml
from plumbing.models import Completion
from plumbing.runs import ROOT, read_jsonl

import rl_mrt
from common import Trace
from experiments import compare, gradient, report, variants

TOY = {
    "train": {"dataset": "tiny", "max-tokens": 64, "max-sampled-tokens": 2500, "eval-every": 1, "eval-problems": 3},
    "map": {
        "seeds": [100],
        "grids": [
            {"methods": ["GRPO", "MRT online"], "shapes": ["4x4", "2x4"], "lrs": [2e-4], "max-tokens": [64]},
            {"methods": ["GRPO"], "shapes": ["4x4"], "lrs": [2e-4], "max-tokens": [72]},
        ],
    },
    "methods": {
        "GRPO": {"command": "rl_mrt.py --bonus 0", "shape": "4x4", "lr": 2e-4},
        "MRT online": {
            "command": "rl_mrt.py --bonus 1 --variant online --progress likelihood",
            "shape": "4x4",
            "lr": 2e-4,
        },
    },
    "confirm": {
        "seeds": {"base": 1, "GRPO": 1, "MRT online": 1, "STaR": 1},
        "evaluate": {"split": "test", "limit": 6, "max-tokens": 64, "num-samples": 2, "budgets": "32,64"},
    },
    "star": {
        "max-tokens": 96,
        "limit": 16,
        "iterations": 1,
        "num-samples": 2,
        "forced-answers": 2,
        "eval-split": "validation",
        "eval-problems": 2,
    },
}


def execute(folder: Path, *command):
    command = [sys.executable, "-m", "experiments.compare", *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, env=environment)


def test_the_comparison_from_nothing_and_again_from_its_runs(tmp_path):
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY))
    command = ("--config", "toy.yaml", "--out", "run", "--jobs", 1)
    cells = execute(tmp_path, *command, "--map")
    assert cells.returncode == 0 and cells.stdout.count("python rl_mrt.py") == 5, cells.stderr
    done = execute(tmp_path, *command)
    assert done.returncode == 0 and done.stdout.count("python rl_mrt.py") == 2, done.stderr
    pages = tmp_path / "run" / "pages"
    tables = json.loads((pages / "summary.json").read_text())["tables"]
    rows = tables["Reinforcement learning"]
    assert rows["MRT online"]["gain"]["mean"] == pytest.approx(
        rows["MRT online"]["right"]["mean"] - rows["base"]["right"]["mean"]
    )
    folder = tmp_path / "run" / "confirm" / "grpo-seed0"
    evaluated = json.loads((folder / "test" / "summary.json").read_text())["metrics"]
    assert rows["GRPO"]["right"]["mean"] == pytest.approx(evaluated["pass@1"]["mean"])
    mrt = json.loads((folder.parent / "mrt-online-seed0" / "test" / "summary.json").read_text())["metrics"]
    difference = tables["Reinforcement learning: difference to GRPO"]["MRT online"]["Δ regret@64"]
    assert difference["mean"] == pytest.approx(mrt["regret@64"]["mean"] - evaluated["regret@64"]["mean"])
    assert {p.stem for p in pages.glob("*.png")} == {"method", "map", "confirmation"}
    for sentence in ("MRT-STaR is ", "MRT online is "):  # what was seen, in words
        assert sentence in done.stdout.rsplit("figures beside them", 1)[1]
    steps, sequences = read_jsonl(folder / "metrics.jsonl"), read_jsonl(folder / "records.jsonl")
    trained = sum(r["prompt_tokens"] + r["tokens"] for r in sequences)
    assert sum(step["update_tokens"] for step in steps) == trained
    (curve,) = report.learning_curves(types.SimpleNamespace(out=tmp_path / "run"), TOY, "GRPO")
    assert curve[1][-1] == steps[-1]["computed_tokens"] + 3 * trained
    before = {p.name: p.read_bytes() for p in pages.iterdir() if p.suffix != ".png"}
    again = execute(tmp_path, *command)
    assert again.returncode == 0 and "python " not in again.stdout  # nothing is run twice
    assert {p.name: p.read_bytes() for p in pages.iterdir() if p.suffix != ".png"} == before


def test_runs_of_other_settings_are_refused_before_anything_runs(tmp_path, capsys):
    args = types.SimpleNamespace(out=tmp_path, jobs=1)
    config = {**TOY, "confirm": {**TOY["confirm"], "seeds": {"GRPO": 1}}}
    ((_, words), *_), *_ = compare.confirmation_jobs(args, config)
    run = report.folder(args, "GRPO", 0)
    (run / "test").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"settings": {}, "command": ["rl_mrt.py", *words[1:], "--resume"]}))
    for done in (run / "summary.json", run / "test" / "summary.json"):
        done.write_text("{}")
    assert compare.run_all(args, compare.confirmation_jobs(args, config)) == 0  # it is all there
    faster = {**config, "methods": {"GRPO": {**config["methods"]["GRPO"], "lr": 1}}}
    with pytest.raises(SystemExit) as ended:
        compare.run_all(args, compare.confirmation_jobs(args, faster))
    message = capsys.readouterr().err
    assert ended.value.code == 2 and f"{run}: was made with other settings" in message and message.count("\n") == 1


def test_a_command_that_fails_is_named_with_its_log(tmp_path):
    grid = {**TOY["map"]["grids"][0], "max-tokens": [1]}
    toy = {**TOY, "map": {"seeds": [100], "grids": [grid]}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toy))
    done = execute(tmp_path, "--config", "toy.yaml", "--out", "run", "--map", "--jobs", 1)
    assert done.returncode == 2 and "ended with 2: see run/map/grpo-4x4-lr0.0002-1-seed100.log" in done.stderr
    log = tmp_path / "run" / "map" / "grpo-4x4-lr0.0002-1-seed100.log"
    assert "--max-tokens 1" in log.read_text()


@pytest.mark.parametrize("name", ["compare.yaml", "demo.yaml"])
def test_every_command_of_the_comparison_is_one_that_its_script_takes(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "experiments" / name).read_text())
    args = types.SimpleNamespace(out=Path("runs/none"))
    jobs = compare.confirmation_jobs(args, config) + (compare.map_jobs(args, config) if "map" in config else [])
    for words in (words for job in jobs for _, words in job):
        variant = words[0] == "experiments/variants.py"
        assert not variant or words[1] in variants.VARIANTS
        script, flags = ("rl_mrt.py", words[2:]) if variant else (words[0], words[1:])
        flags = ["tiny" if "runs/none" in flag and flags[i - 1] == "--model" else flag for i, flag in enumerate(flags)]
        importlib.import_module(script.removesuffix(".py")).flags(flags)


def test_an_accuracy_is_reached_on_the_way_from_nothing():
    grid = report.grid_of(TOY)
    late = np.where(grid >= grid[3], 1.0, 0.0)  # right from the fourth budget on
    values = {"GRPO": {"anytime": np.tile(late, (2, 5, 1))}, "at once": {"anytime": np.ones((2, 5, len(grid)))}}
    rows = report.reach_table(TOY, values, "GRPO")
    assert rows["GRPO"]["tokens"]["mean"] == pytest.approx(grid[3])
    assert rows["at once"]["tokens"]["mean"] == pytest.approx(grid[0])
    assert rows["at once"]["ratio"]["mean"] == pytest.approx(4)


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
    text = report.markdown_of({"base": {"tokens": never}, "GRPO": {"tokens": sometimes}})
    assert "| base | – |" in text and "| GRPO | 100 [90, ∞] |" in text


def test_words_follow_the_intervals():
    def told(low: float, high: float, regret: float) -> str:
        found = {"Δ right": (low, high), "Δ tokens": (-9, -3), "Δ regret@96": (regret - 0.1, regret + 0.1)}
        cells = {name: {"mean": sum(of) / 2, "low": of[0], "high": of[1]} for name, of in found.items()}
        return report.in_words("MRT", "GRPO", cells)

    assert "MRT is more often right than GRPO (+0.20 [+0.10, +0.30]), with shorter traces" in told(0.1, 0.3, 0)
    assert "less often right" in told(-0.3, -0.1, 0) and "within the noise, as GRPO" in told(-0.1, 0.1, 0)
    assert "less regret at budgets of 96 tokens" in told(0, 0, -0.2) and "more at 96" in told(0, 0, 0.2)


# ---------------------------------------------------------------------------------------------- variants and gradients


def test_lambda_is_between_own_progress_and_all_that_follows():
    J = [0.1, 0.1, 0.6, 0.4, 1.0]
    np.testing.assert_allclose(variants.discounted(J, 0.0), np.diff(J))
    np.testing.assert_allclose(variants.discounted(J, 1.0), [1.0 - v for v in J[:-1]])
    np.testing.assert_allclose(  # Σ_{l≥j} λ^{l-j} r_l, written out
        variants.discounted(J, 0.5), [0 + 0.25 - 0.05 + 0.075, 0.5 - 0.1 + 0.15, -0.2 + 0.3, 0.6]
    )


def a_trace(boundaries: list[int], J: list[float], tokens: int, reward: float, finished: bool = True) -> Trace:
    completion = Completion([0] * tokens, [0.0] * tokens, "stop" if finished else "length", "", [])
    trace = Trace({"id": "p", "answer": "1"}, [0], completion, boundaries, finished, None, reward=reward)
    trace.values = J
    return trace


def test_the_critic_telescopes():
    """λ = 1: outcome minus J at the episode's start; λ = 0: an episode's own progress, and the outcome minus the last J
    for the answer. Both minus the mean over tokens; the last episode of a thought that was cut ends in the outcome."""
    done = a_trace([0, 2, 4], [0.1, 0.3, 0.9], 5, 1.0)
    cut = a_trace([0, 3, 5], [0.1, 0.2, 0.6], 5, 0.0, finished=False)
    full = [np.array([0.9, 0.9, 0.7, 0.7, 0.1]), np.array([-0.1, -0.1, -0.1, -0.2, -0.2])]
    own = [np.array([0.2, 0.2, 0.6, 0.6, 0.1]), np.array([0.1, 0.1, 0.1, -0.2, -0.2])]
    for credit_lambda, expected in ((1.0, full), (0.0, own)):
        mean = np.concatenate(expected).mean()
        for got, want in zip(variants.critic_advantages([done, cut], credit_lambda), expected):
            np.testing.assert_allclose(got, want - mean, atol=1e-12)


def test_gradients_are_measured_against_a_closed_form():
    """Noise of known size around a known mean: signal to noise and cosines are those of theory."""
    rng = np.random.default_rng(0)
    mean = np.zeros(400)
    mean[0] = 3.0
    batches = torch.tensor(mean + rng.standard_normal((300, 400)))
    told = gradient.describe(batches, batches)
    assert told["signal / noise"] == pytest.approx(9 / 400, rel=0.15)
    expected = 3 / np.sqrt(9 + 400) * 3 / np.sqrt(9 + 400 / 299)
    assert told["cosine with its own mean"] == pytest.approx(expected, rel=0.1)


def test_the_gradient_of_an_estimator_is_that_of_its_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gradient", "--batches", "2", "--dataset", "tiny:10", "--out", str(tmp_path)])
    gradient.main()
    rows = json.loads((tmp_path / "gradient.json").read_text())["models"]["tiny"]
    assert {"GRPO", "GRPO + progress", "prefix", "outcome"} <= set(rows) and (tmp_path / "gradient.png").exists()
    assert rows["outcome"]["cosine with its own mean"] == rows["outcome"]["cosine with the outcome's"]


@pytest.mark.parametrize("variant", list(variants.VARIANTS))
def test_a_variant_trains(tmp_path, variant):
    command = [sys.executable, str(ROOT / "experiments" / "variants.py"), variant, "--max-tokens", "64", "--steps", "2"]
    command += ["--problems-per-step", "3", "--group-size", "4", "--eval-every", "0", "--out", str(tmp_path / "run")]
    command += ["--bonus", "0" if variant == "dynamic" else "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 2
    if variant == "dynamic":
        assert lines[0]["flat_groups"] == 0 and lines[0]["sampled_tokens"] > lines[0]["trained_tokens"]


def test_the_table_of_rollouts_is_what_the_flags_name():
    assert rl_mrt.ROLLOUTS.keys() == {"grpo", "online", "prefix"}
