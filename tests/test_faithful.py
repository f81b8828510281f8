"""What docs/faithful.md and configs/ say of the published runs: commands, references, sums and the scale of α."""

import re
import shlex
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml

import analyze_r1
import budget_force
import common
import evaluate
import rl_mrt
import star_mrt
from common import Forcing, group_advantages, normalized_regret
from engine.sampler import Sampler
from engine.tokens import prompt_ids
from engine.transformers_engine import TransformersEngine
from run.data import load_problems
from run.traces import accuracy_at, regret_at

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {f"{script.__name__}.py": script for script in (analyze_r1, budget_force, evaluate, rl_mrt, star_mrt)}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PUBLISHED = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "configs" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *CONFIGS,
    *sorted(ROOT.glob("*.py")),
]
# Commands stand in indented blocks, in the code of tables and, in a configuration, in comments.
COMMAND = re.compile(r"(?:python|torchrun --nproc-per-node \d+) (\w+\.py)((?: +[^\s`|(]+)*)")
COMMANDS = sorted({*COMMAND.findall("\n".join([PUBLISHED, *(config.read_text() for config in CONFIGS)]))})


def test_the_pages_have_commands():
    assert len(COMMANDS) > 30 and {script for script, _ in COMMANDS} == {*SCRIPTS}


@pytest.mark.parametrize("script, flags", COMMANDS, ids=[f"{script}{flags}" for script, flags in COMMANDS])
def test_a_published_command_is_one_that_its_script_takes(monkeypatch, capsys, script, flags):
    """And its plan can be printed, where the script has one: here for the embedded model."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(flags)
    try:
        SCRIPTS[script].flags(words)
    except SystemExit:
        message = capsys.readouterr().err.splitlines()[-1]
        waits = "--thoughts" in words and "of a run there" in message  # it reads the run that it names
        assert waits, message
        pytest.skip(message)
    if script in ("rl_mrt.py", "analyze_r1.py") and "--prefixes" not in words:  # which needs the run that it names
        small = "--model tiny --dataset tiny:10 --split train --max-tokens 64 --answer-tokens 8 --engine transformers"
        if "backtracking" in flags:
            small = small.replace("tiny:10", "tiny").replace("tiny", "tiny/backtrack")
        monkeypatch.setattr("sys.argv", [script, *words, *small.split(), "--dry-run"])
        SCRIPTS[script].main()
        assert re.search(r"\d+ problems", capsys.readouterr().out)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda file: file.name)
def test_a_config_is_taken_as_it_is(config):
    (script,) = [s for s in SCRIPTS.values() if s.__name__.split("_")[0] == config.name.split("_")[0]]
    settings = yaml.safe_load(config.read_text())
    args = vars(script.flags(["--config", str(config)]))
    assert {name: args[name.replace("-", "_")] for name in settings} == settings


@pytest.mark.parametrize("kind, count", [("Table", 5), ("Figure", 16)])
def test_every_table_and_figure_of_the_paper_has_a_row(kind, count):
    rows = re.findall(rf"^\| {kind}s? ([^|]*)\|", PUBLISHED, re.M)
    assert {number for row in rows for number in re.findall(r"(?<![\w.-])\d+(?![\w.-])", row)} >= {*names(1, count)}


def names(first: int, last: int) -> list[str]:
    return [*map(str, range(first, last + 1))]


# The places of arXiv 2503.07572 that its captions and its authors' pages vouch for. Section 8.5.1: the regret; Appendix
# B: Tables 2 to 5; D: the R1 study; E: regret against voting early; F: extrapolation.
PLACES = {
    "Section": ["4", "5", "6", "8", "8.5.1"],
    "Table": names(1, 5),
    "Figure": names(1, 16),
    "Appendix": [*"BDEF"],
    "Eq.": ["2"],
    "Def.": ["4.1", "6.1"],
}
NUMBER = r"(?:\d[\d.]*|[A-F]\b)"
PLACE = re.compile(rf"\b(Section|Table|Figure|Appendix|Eq\.|Def\.)(?:s|ices)? ({NUMBER}(?:(?:,| and| to) {NUMBER})*)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_references_to_the_paper_are_to_places_that_it_has(page):
    for kind, numbers in PLACE.findall(page.read_text(encoding="utf-8")):
        for number in re.split(r", | and | to ", numbers):
            assert number.rstrip(".") in PLACES[kind], f"{kind} {number}"


def test_published_averages_are_those_of_their_rows():
    rows = re.findall(r"^\| [^|]+((?:\| [\d.]+ ){6})\|$", PUBLISHED, re.M)
    assert len(rows) == 11
    for row in rows:
        cells = row.strip("| ").split(" | ")
        *values, average = map(float, cells)
        one_digit = len(cells[-1].split(".")[1]) == 1
        assert np.mean(values) == pytest.approx(average, abs=0.06 if one_digit else 0.007)


def test_problems_of_a_test_year_cannot_get_into_the_training(monkeypatch, tmp_path):
    """The command in the header, run on a collection that is unsorted and has years as numbers and as text."""
    header = (ROOT / "configs" / "rl_deepscaler_1.5b.yaml").read_text()
    (code,) = re.findall(r'python -c "(.*)"', header)
    for years in ([2024, 1983, 2025, 2023], ["2024", "1983", "2025", "2023"]):
        rows = [{"ID": f"{y}-1", "Year": y, "Question": f"What was {y}?", "Answer": str(y)} for y in years]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split, rows=rows: datasets.Dataset.from_list(rows))
        exec(code, {})
        file = yaml.safe_load(header)["dataset"]
        assert [p["answer"] for p in load_problems(file, "train")] == ["1983", "2023"]


# ---------------------------------------------------------------------------------------------- docs/faithful.md


def test_the_alpha_that_equals_theirs():
    """(f + α_t p - mean) / std of it, and A_GRPO(f) + α_t / σ (p - mean p), point the same way."""
    g = torch.Generator().manual_seed(0)
    for right, shown in ((4, 2.0), (2, 2.3), (6, 2.3), (1, 3.0)):
        outcome = (torch.arange(8) < right).double()[None]
        progress, theirs_alpha = torch.rand(1, 8, generator=g, dtype=torch.float64), 1.0
        sigma = outcome.std(unbiased=False)
        assert float(theirs_alpha / sigma) == pytest.approx(shown, abs=0.05)
        theirs = group_advantages(outcome + theirs_alpha * progress)
        ours = group_advantages(outcome) + theirs_alpha / sigma * (progress - progress.mean())
        assert float(torch.cosine_similarity(theirs, ours)) == pytest.approx(1, abs=1e-6)
        alone = group_advantages(outcome)  # one prefix for all: its J cancels
        torch.testing.assert_close(group_advantages(outcome + 1.6 * (outcome - 0.3)), alone, atol=1e-3, rtol=0)


@pytest.mark.parametrize("G, shown", [(4, 1.15), (8, 1.07)])
def test_the_std_of_a_group(G, shown):
    rewards = (torch.arange(G) < G // 2).double()
    theirs = (rewards - rewards.mean()) / (rewards.std() + 1e-4)  # torch's default: unbiased
    assert float(group_advantages(rewards[None])[0, 0] / theirs[0]) == pytest.approx(shown, abs=0.005)


def test_stopping_and_going_on_in_one_group():
    """Figure 6: G rollouts that go on, m that stop, normalised together, and our prefix variant with α = m / (G σ)."""
    G, m, q, J = 8, 4, 0.25, 0.5
    on, stop = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]).double(), torch.tensor([1.0, 1, 0, 0]).double()
    theirs = group_advantages(torch.cat([on, stop])[None])[0, :G]
    sigma = on.std(unbiased=False)
    ours = group_advantages(on[None])[0] + m / (G * sigma) * (on - J)
    assert float(on.mean()) == q and float(stop.mean()) == J
    assert float(torch.cosine_similarity(theirs[None], ours[None])) == pytest.approx(1, abs=1e-6)


def test_the_regret_on_both_axes_by_hand():
    record = {"boundaries": [0, 40], "asked": [50, 95], "answer_tokens": [10.0, 5.0], "J": [0.2, 0.8]}
    # (0, 0) → (10, .2) → (45, .8) → (100, .8): 1 + 17.5 + 44; (0, 0) → (60, .2) → (100, .8): 6 + 20
    assert regret_at(record, 100) == pytest.approx(1 - 0.625)
    assert regret_at(record, 100, "prompt") == pytest.approx(1 - 0.26)
    assert [accuracy_at(record, 70, axis) for axis in ("answer", "prompt")] == [0.8, 0.2]
    point = {"thought_tokens": 40, "asked": 95, "answer_tokens": 5.0}
    assert [budget_force.spent(point, axis) for axis in ("answer", "prompt")] == [45, 100]
    bare = {
        "J": [],
        "asked": [],
        "exploit": {"40": {**point, "J": 0.8, "cut": True}},
        "extrapolate": {},
    }  # no J of its own
    assert [budget_force.curve(bare, axis) for axis in ("answer", "prompt")] == [([45], [0.8]), ([100], [0.8])]


@pytest.mark.parametrize(
    "estimate", [common.set_likelihood_J, partial(common.set_sampled_J, forcing=Forcing(2, 8), seed=(0,))]
)
def test_what_mu_was_asked_with_is_counted(model, tokenizer, estimate):
    sampler = Sampler(TransformersEngine(model), tokenizer)
    prompt = prompt_ids(tokenizer, "Find x between 1 and 10 such that x² + 17 ≡ 5 (mod 61).")
    ((completion,),) = sampler.generate([prompt], 200, [(1,)])
    trace = common.read_trace(tokenizer, {"problem": "?", "answer": "7", "id": "p"}, prompt, completion)
    estimate(sampler, [trace])
    assert trace.record()["asked"] == [len(common.forced_prompt(tokenizer, trace, b)) for b in trace.boundaries]


def test_what_the_axis_of_the_regret_changes():
    """Counting P tokens of the prompt at every point: P / C0 · (J_end - J_0 / 2)."""
    J, tokens = [0.1, 0.2, 0.25, 0.3], [50.0, 1000, 2000, 3000]
    moved = [t + 200 for t in tokens]
    for budget, shown in ((4096, 0.012), (16384, 0.003)):
        change = normalized_regret(moved, J, budget) - normalized_regret(tokens, J, budget)
        assert change == pytest.approx(200 / budget * (0.3 - 0.1 / 2), abs=1e-9) == pytest.approx(shown, abs=5e-4)
