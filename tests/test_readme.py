"""The README's commands run as they stand, at toy size, and its functions and figures are where it says."""

import contextlib
import importlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND = re.compile(r"^ {4}(?:python|torchrun --nproc-per-node \d+) (\S+\.py)(.*?)(?: {2,}#.*| +#.*)?$", re.M)
COMMANDS = [(script, flags.strip()) for script, flags in COMMAND.findall(TEXT)]
MAIN = ("analyze_r1.py", "star_mrt.py", "rl_mrt.py", "evaluate.py", "budget_force.py")
# What makes a command small, after its own flags; models and data that are not here become the embedded ones.
SMALL = {"--limit": 2, "--max-tokens": 48, "--answer-tokens": 8, "--forced-answers": 1, "--num-samples": 2,
         "--eval-problems": 2, "--problems-per-step": 2, "--group-size": 2, "--steps": 1, "--iterations": 1,
         "--epochs": 1, "--batch-size": 4, "--extensions": 2, "--extension-tokens": 8, "--budgets": "24,48",
         "--dtype": "float32", "--engine": "transformers", "--kl": 0, "--max-tokens-per-batch": 2048}  # fmt: skip
SMALL_OF = {
    "tiny.py": {"--problems": 3, "--steps": 2, "--batch": 2},
    "star_mrt.py": {"--limit": 9, "--max-tokens": 192, "--forced-answers": 4},
}  # the filter keeps something


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the commands name: files of problems and of traces, another model, earlier runs."""
    folder = tmp_path_factory.mktemp("readme")
    problems = common.load_problems("tiny", "validation", 4)
    for name in ("aime2024.jsonl", "amc2023.jsonl"):
        (folder / name).write_text("".join(common.json_line(p) for p in problems))
    response = "Okay, I try.\n\nAnd again.\n\nAnd more.\n\nWait, no.\n\n</think>\n\n**Final Answer:** \\boxed{3}"
    traces = [{**p, "response": response} for p in problems]
    (folder / "FILE.jsonl").write_text("".join(common.json_line(t) for t in traces))
    for name in ("B", "runs/NAME/model"):
        shutil.copytree(ROOT / "tiny", folder / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    return folder


def run(monkeypatch, folder, script: str, flags: list[str]) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), *flags])
    importlib.import_module(script.removesuffix(".py")).main()


def here(flag: str, value: str) -> str:
    """A value of the README, or what stands for it here."""
    if flag in ("--model", "--direct-model"):
        known = {"A": "tiny", "B": "B", "runs/NAME/model": "runs/NAME/model"}
        return ",".join(dict.fromkeys(known.get(name, "tiny") for name in value.split(",")))
    if flag == "--dataset" and "/" in value:
        return ",".join(("tiny:10", "tiny:20", "tiny:30", "amc2023.jsonl", "aime2024.jsonl")[: value.count(",") + 1])
    return value


def at_toy_size(script: str, text: str, out: Path) -> list[str]:
    """The flags of a command as the README has them, then those that make it small."""
    words, flags = shlex.split(text), []
    for i, word in enumerate(words):
        flags.append(word if word.startswith("-") else here(words[i - 1], word))
    takes = (ROOT / script).read_text() + (ROOT / "runs.py").read_text()
    for flag, value in {**SMALL, **SMALL_OF.get(script, {})}.items():
        if f'"{flag}"' in takes and not (script == "tiny.py" and flag not in SMALL_OF[script]):
            flags += [flag, str(value)]
    if script in MAIN and "--config" in words:  # its model and data are on the Hub
        flags += ["--model", "tiny", "--dataset", "tiny", "--split", "train"]
    if "--k" in words:
        flags += ["--num-samples", "8"]
    if "--out" not in words or script == "tiny.py":
        flags += ["--out", str(out)]
    return flags


def test_every_script_has_a_command():
    assert len(COMMANDS) > 20 and {script for script, _ in COMMANDS} >= {*MAIN, "tiny.py", "results.py"}


@pytest.mark.parametrize("script, flags", COMMANDS, ids=[f"{script} {flags}" for script, flags in COMMANDS])
def test_a_command_runs(monkeypatch, workplace, tmp_path, script, flags):
    if script == "results.py":  # tests/test_results.py runs it
        importlib.import_module("results").flags(shlex.split(flags))
        return
    if "--compare" in flags:
        for name in ("runs/EVAL_A", "runs/EVAL_B"):
            run(
                monkeypatch, workplace, "evaluate.py", at_toy_size("evaluate.py", f"--out {name} --overwrite", tmp_path)
            )
    if "--thoughts" in flags:
        made = at_toy_size("analyze_r1.py", "--out runs/ANALYSIS", tmp_path)
        run(monkeypatch, workplace, "analyze_r1.py", made)
    command = at_toy_size(script, flags, tmp_path / "run")
    if script == "tiny.py" and "--check" in flags:  # three problems are too few for its figures
        with contextlib.suppress(SystemExit):
            run(monkeypatch, workplace, script, command)
    else:
        run(monkeypatch, workplace, script, command)


def test_functions_files_and_figures_that_are_named_exist():
    named = re.findall(r"`(common|metrics|rl_mrt|star_mrt)\.(?!py|jsonl)(\w+)`", TEXT)
    assert len(named) > 12
    for module, name in named:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    for file in re.findall(r"`?((?:tests|configs|results)/[\w-]+\.(?:py|yaml|png|md|json))", TEXT):
        assert (ROOT / file).exists(), file


def test_the_tables_of_findings_are_those_of_the_results():
    """No number of the comparison is typed by hand: each row stands in the page that `results.py` wrote."""
    findings = TEXT[TEXT.index("## Findings") : TEXT.index("## From nothing")]
    page = (ROOT / "results" / "findings.md").read_text(encoding="utf-8")
    rows = [line for line in findings.splitlines() if re.match(r"\| .*\[[+-]?\d", line)]
    assert len(rows) > 8 and all(row in page for row in rows), [row for row in rows if row not in page]
    assert json.loads((ROOT / "results" / "summary.json").read_text())["tables"]


def test_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^)make ([a-z-]+)", TEXT, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target
