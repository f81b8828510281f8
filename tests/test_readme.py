"""The README's commands name scripts that exist and flags that they have, and its functions are where it says."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND = re.compile(r"^ {4}(?:python|torchrun --nproc-per-node \d+) (\S+\.py)(.*?)(?: {2,}#.*| +#.*)?$", re.M)
COMMANDS = [(script, flags.replace("$M", "--bonus 0").strip()) for script, flags in COMMAND.findall(TEXT)]
MAIN = ("analyze_r1.py", "star_mrt.py", "rl_mrt.py", "evaluate.py", "budget_force.py")


def test_every_script_has_a_command():
    assert len(COMMANDS) > 20 and {script for script, _ in COMMANDS} >= {*MAIN, "tiny.py"}


@pytest.mark.parametrize("script, flags", COMMANDS, ids=" ".join)
def test_a_command_is_one_that_the_script_takes(monkeypatch, script, flags):
    assert (ROOT / script).exists()
    monkeypatch.chdir(ROOT)
    if script in MAIN:
        importlib.import_module(script.removesuffix(".py")).flags(shlex.split(flags))


def test_functions_and_files_that_are_named_exist():
    named = re.findall(r"`(common|metrics|rl_mrt|star_mrt)\.(?!py|jsonl)(\w+)`", TEXT)
    assert len(named) > 8
    for module, name in named:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    for file in re.findall(r"`?((?:tests|configs)/\w+\.(?:py|yaml))", TEXT):
        assert (ROOT / file).exists(), file


def test_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^)make ([a-z-]+)", TEXT, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target
