"""The comparison: its intervals, its measures, and the whole of it at toy size."""

import functools
import importlib
import itertools
import json
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import main_with, refusal, run_here
from test_mrt import a_trace

import rl_mrt
from engine.models import ROOT
from experiments import compare, report, variants
from run.files import read_jsonl

TOY = yaml.safe_load("""
train: {dataset: tiny, max-tokens: 64, max-sampled-tokens: 2500, eval-every: 1, eval-problems: 3,
        problems-per-step: 4, group-size: 4, lr: 2.0e-4}
methods: {GRPO: rl_mrt.py --bonus 0, MRT online: rl_mrt.py --bonus 1 --variant online --progress likelihood,
          broken: nowhere.py --bonus 0}
self-training: {STaR: star_mrt.py --filter outcome, MRT-STaR: star_mrt.py --filter mrt}
confirm:
  seeds: {base: 1, GRPO: 1, MRT online: 1, STaR: 1, MRT-STaR: 1, broken: 1}
  evaluate: {metric: all, split: test, limit: 6, max-tokens: 64, num-samples: 2, budgets: "32,64"}
star: {max-tokens: 96, limit: 16, iterations: 1, num-samples: 2, forced-answers: 2, eval-split: validation,
       eval-problems: 2}
example: MRT online
""")


def test_the_comparison_goes_on_from_the_runs_that_are_there(tmp_path, monkeypatch, capsys):
    """All runs are made here, but for an evaluation, which it runs itself, and a method that cannot run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY, sort_keys=False))
    jobs = compare.jobs_of(types.SimpleNamespace(out=Path("run")), TOY)
    for done, words in itertools.chain(*jobs):
        if "mrt-star-seed0/test" not in str(done) and "broken" not in str(done):
            run_here(tmp_path, words[0], *words[1:])
            assert done.exists()
    with pytest.raises(SystemExit) as ended:
        main_with(monkeypatch, compare, *"--config toy.yaml --out run --jobs 1".split())()
    printed, told = capsys.readouterr()
    commands = [line.split()[1] for line in printed.splitlines() if line.startswith("python ")]
    assert commands == ["evaluate.py", "nowhere.py"]  # nothing is run twice, nor what follows a command that failed
    log = tmp_path / "run/confirm/broken-seed0.log"
    assert ended.value.code == 2 and "ended with 2: see run/confirm/broken-seed0.log" in told
    assert "1 commands failed" in told and "nowhere.py" in log.read_text()
    pages = tmp_path / "run" / "pages"
    tables = json.loads((pages / "summary.json").read_text())["tables"]
    rows = tables["Levels"]
    assert {*rows} == {"base", "GRPO", "MRT online", "STaR", "MRT-STaR"}
    for metric, label in (("regret@64", "cut of regret@64"), ("right", "gain")):
        base, grpo, mrt = (rows[name][metric]["mean"] for name in ("base", "GRPO", "MRT online"))
        cut = tables["In GRPO's"]["MRT online"][label]["mean"]
        assert cut == pytest.approx((mrt - base) / (grpo - base)) if grpo != base else cut is None
    folder = tmp_path / "run" / "confirm" / "grpo-seed0"
    evaluated = json.loads((folder / "test" / "summary.json").read_text())["metrics"]
    assert rows["GRPO"]["right"]["mean"] == pytest.approx(evaluated["pass@1"]["mean"])
    mrt = json.loads((folder.parent / "mrt-online-seed0" / "test" / "summary.json").read_text())["metrics"]
    difference = tables["Difference to GRPO"]["MRT online"]["Δ regret@64"]
    assert difference["mean"] == pytest.approx(mrt["regret@64"]["mean"] - evaluated["regret@64"]["mean"])
    assert {p.stem for p in pages.glob("*.png")} == {"method", "results"}
    for sentence in ("MRT-STaR has ", "MRT online has "):  # what was seen, in words
        assert sentence in printed
    steps, sequences = read_jsonl(folder / "metrics.jsonl"), read_jsonl(folder / "records.jsonl")
    trained = sum(r["prompt_tokens"] + r["tokens"] for r in sequences)
    assert sum(step["update_tokens"] for step in steps) == trained
    (curve,) = report.learning_curves(types.SimpleNamespace(out=tmp_path / "run"), TOY, "GRPO")
    assert curve[1][-1] == steps[-1]["computed_tokens"] + 3 * trained


def test_runs_of_other_settings_are_refused_before_anything_runs(tmp_path, capsys):
    args = types.SimpleNamespace(out=tmp_path, jobs=1)
    config = {**TOY, "confirm": {**TOY["confirm"], "seeds": {"GRPO": 1}}}
    ((_, words), *_), *_ = compare.jobs_of(args, config)
    run = report.folder(args, "GRPO", 0)
    (run / "test").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"settings": {}, "command": ["rl_mrt.py", *words[1:], "--resume"]}))
    for done in (run / "summary.json", run / "test" / "summary.json"):
        done.write_text("{}")
    assert compare.run_all(args, compare.jobs_of(args, config)) == 0  # it is all there
    faster = {**config, "train": {**config["train"], "lr": 1}}
    assert f"{run}: was made with other settings" in refusal(
        capsys, compare.run_all, args, compare.jobs_of(args, faster)
    )


@pytest.mark.parametrize("name", ["compare.yaml", "demo.yaml", "backtracking.yaml"])
def test_every_command_of_the_comparison_is_one_that_its_script_takes(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "experiments" / name).read_text())
    config["confirm"]["seeds"] |= dict.fromkeys([*config.get("methods", {}), *config.get("self-training", {})], 1)
    jobs = compare.jobs_of(types.SimpleNamespace(out=Path("runs/none")), config)
    for words in (words for job in jobs for _, words in job):
        variant = words[0] == "experiments/variants.py"
        assert not variant or words[1] in variants.VARIANTS
        script = rl_mrt if variant else importlib.import_module(words[0].removesuffix(".py"))
        flags = words[2:] if variant else words[1:]
        flags = ["tiny" if "runs/none" in flag and flags[i - 1] == "--model" else flag for i, flag in enumerate(flags)]
        script.flags(flags)


def test_resampling_draws_problems_together_and_seeds_apart():
    rng = np.random.default_rng(1)
    hard = rng.random(200)  # what the problems share
    a, b = (hard + 0.01 * rng.standard_normal((5, 200)) for _ in range(2))
    means = report.resampled({"a": a, "b": b})
    assert means["a"].shape == (report.DRAWS + 1,) and means["a"][0] == pytest.approx(a.mean())
    assert (report.resampled({"a": a, "b": b})["b"] == means["b"]).all()  # the same draws each time
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
        found = {
            "Δ right": (low, high),
            "Δ tokens": (-9, -3),
            "Δ idle share": (-0.2, -0.1),
            "Δ regret@96": (regret - 0.1, regret + 0.1),
        }
        cells = {name: {"mean": sum(of) / 2, "low": of[0], "high": of[1]} for name, of in found.items()}
        return report.in_words("MRT", "GRPO", cells)

    assert "it is more often right (+0.20 [+0.10, +0.30]), from shorter traces" in told(0.1, 0.3, 0)
    assert "Until x is found, fewer of its episodes try nothing new (-0.15 [-0.20, -0.10])" in told(0, 0, 0)
    assert "less often right" in told(-0.3, -0.1, 0) and "as often right, within the noise" in told(-0.1, 0.1, 0)
    assert "less regret than GRPO at budgets of 96 tokens (-0.20" in told(0, 0, -0.2)
    assert "more at 96" in told(0, 0, 0.2) and "as much regret as GRPO, within the noise" in told(0, 0, 0)


# ---------------------------------------------------------------------------------------------- variants


def test_shuffled_progress_is_as_much_on_random_episodes():
    group = [a_trace([0.1, 0.1, 0.6, 0.4, 1.0]), a_trace([0.2, 0.9, 0.9, 0.3])]
    for own, shuffled in zip(rl_mrt.episode_credit(group), variants.shuffled_credit(group, np.asarray)):
        np.testing.assert_allclose(sorted(shuffled), sorted(own))
    both = zip(rl_mrt.episode_credit(group), variants.shuffled_credit(group, np.asarray))
    assert not all(np.allclose(own, shuffled) for own, shuffled in both)


def test_the_advantages_of_budgets_by_hand():
    """J at the last boundary within 4, 8, 12 and 16 tokens is .2 .6 1 1 in the first trace, 0 0 .4 .4 in the second."""
    group = [a_trace([0.2, 0.6, 1.0], tokens_an_episode=5, answer_tokens=4), a_trace([0.0, 0.4], tokens_an_episode=12)]
    ((first, second),) = variants.budget_advantages(types.SimpleNamespace(max_tokens=16), [group])
    # left: .7 .65 .5 .25 and .2 .2 .2 .1, the mean .45 .425 .35 .175; the mean of the earlier × the share that is left:
    # 0, .2 × ¾, .4 × ½, .6 × ¼, which weigh 0, ¼, ½, ¾
    expected = [
        0.25,
        0.65 - 0.25 * 0.15 - 0.75 * 0.425,
        0.5 - 0.5 * 0.2 - 0.5 * 0.35,
        0.25 - 0.75 * 0.15 - 0.25 * 0.175,
    ]
    np.testing.assert_allclose(first[[0, 4, 8, 12]], expected)
    np.testing.assert_allclose(first[:4], 0.25)
    np.testing.assert_allclose(second[[0, 4]], [-0.25, 0.2 - 0.75 * 0.425])


TRAINED = "--max-tokens 64 --steps 1 --problems-per-step 3 --group-size 4 --eval-every 0 --out run"


@functools.cache
def plain_loss(folder: Path, bonus: int) -> float:
    run_here(folder, f"rl_mrt.py --bonus {bonus} {TRAINED}-{bonus}")
    return read_jsonl(folder / f"run-{bonus}" / "metrics.jsonl")[0]["loss"]


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_a_variant_trains_with_its_own_rollouts(tmp_path, tmp_path_factory, monkeypatch, variant):
    for name in variants.VARIANTS[variant]:  # which the variant replaces
        monkeypatch.setattr(rl_mrt, name, getattr(rl_mrt, name))
    bonus = 0 if variant == "budgets" else 1
    plain = plain_loss(tmp_path_factory.getbasetemp(), bonus)
    run_here(tmp_path, f"experiments/variants.py {variant} --bonus {bonus} {TRAINED}")
    (line,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert line["loss"] != pytest.approx(plain)


@pytest.mark.parametrize("words", [[], ["none"], ["--bonus", "1"]])
def test_a_variant_that_is_not_there_is_one_line(monkeypatch, capsys, words):
    assert "expected one of shuffled" in refusal(capsys, main_with(monkeypatch, variants, *words))
