"""The commands of README and docs run as they stand, at toy size; functions, figures and numbers are where they say."""

import importlib
import json
import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import pytest

from experiments import compare
from plumbing.data import load_problems
from plumbing.flags import read_config
from plumbing.runs import json_line

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "configs/README.md", "experiments/findings.md"]
PAGES += [str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
TEXT = "\n".join(TEXTS.values())
COMMAND = re.compile(
    r"^ {4}(?:python|torchrun --nproc-per-node \d+) (-m [\w.]+|\S+\.py)(.*?)(?: {2,}#.*| +#.*)?$", re.M
)
COMMANDS = list(dict.fromkeys((script, flags.strip()) for script, flags in COMMAND.findall(TEXT)))
COMMANDS = [(script, flags) for script, flags in COMMANDS if not script.startswith("tests/")]
MAIN = ("analyze_r1.py", "star_mrt.py", "rl_mrt.py", "evaluate.py", "budget_force.py")
# What makes a command small, after its own flags; models and data that are not here become the embedded ones.
SMALL = {
    "--limit": 2,
    "--max-tokens": 48,
    "--answer-tokens": 8,
    "--forced-answers": 1,
    "--num-samples": 2,
    "--eval-problems": 2,
    "--problems-per-step": 2,
    "--group-size": 2,
    "--steps": 1,
    "--iterations": 1,
    "--epochs": 1,
    "--batch-size": 4,
    "--extensions": 2,
    "--extension-tokens": 8,
    "--budgets": "24,48",
    "--dtype": "float32",
    "--engine": "transformers",
    "--kl": 0,
    "--max-tokens-per-batch": 2048,
}
SMALL_OF = {
    "-m tiny.build": {"--steps": 2, "--batch": 2},
    "-m tiny.backtrack": {"--steps": 2, "--batch": 2},
    "star_mrt.py": {"--limit": 9, "--max-tokens": 192, "--forced-answers": 4},  # the filter keeps something
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the commands name: files of problems and of traces, another model, earlier runs."""
    folder = tmp_path_factory.mktemp("readme")
    problems = load_problems("tiny", "validation", 4)
    for name in ("aime2024.jsonl", "amc2023.jsonl", "HELD_OUT.jsonl"):
        (folder / name).write_text("".join(json_line(p) for p in problems))
    response = "Okay, I try.\n\nAnd again.\n\nAnd more.\n\nWait, no.\n\n</think>\n\n**Final Answer:** \\boxed{3}"
    traces = [{**p, "response": response} for p in problems]
    (folder / "FILE.jsonl").write_text("".join(json_line(t) for t in traces))
    for name in ("B", "runs/NAME/model"):
        shutil.copytree(ROOT / "tiny", folder / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    return folder


def module_of(script: str):
    return importlib.import_module(script.removeprefix("-m ").removesuffix(".py"))


def run(monkeypatch, folder, script: str, flags: list[str]) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(ROOT / script.removeprefix("-m ")), *flags])
    module_of(script).main()


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
    source = Path(module_of(script).__file__ or "").read_text(encoding="utf-8")
    shared = " ".join(re.findall(r'(?:shared_flags\(parser, "[^"]*", |shared = )"([^"]*)"', source)).split()
    for flag, value in (SMALL_OF[script] if script not in MAIN else {**SMALL, **SMALL_OF.get(script, {})}).items():
        known = script not in MAIN or flag in ("--limit", "--dtype", "--engine")
        if known or f'"{flag}"' in source or flag[2:] in shared:
            flags += [flag, str(value)]
    if script in MAIN and "--config" in words:  # its model and data are on the Hub
        flags += ["--model", "tiny", "--dataset", "tiny", "--split", "train"]
    if "--k" in words:
        flags += ["--num-samples", "8"]
    if "--out" not in words or script == "-m tiny.build":
        flags += ["--out", str(out)]
    return flags


def test_every_script_has_a_command():
    assert len(COMMANDS) > 20 and {script for script, _ in COMMANDS} >= {*MAIN, "-m tiny.build", "-m tiny.backtrack"}


@pytest.mark.parametrize("script, flags", COMMANDS, ids=[f"{script} {flags}" for script, flags in COMMANDS])
def test_a_command_runs(monkeypatch, workplace, tmp_path, script, flags):
    if "--compare" in flags:
        for name in ("runs/EVAL_A", "runs/EVAL_B"):
            earlier = at_toy_size("evaluate.py", f"--out {name} --overwrite", tmp_path)
            run(monkeypatch, workplace, "evaluate.py", earlier)
    if "--thoughts" in flags:
        earlier = at_toy_size("analyze_r1.py", "--out runs/ANALYSIS --overwrite", tmp_path)
        run(monkeypatch, workplace, "analyze_r1.py", earlier)
    command = at_toy_size(script, flags, tmp_path / "run")
    run(monkeypatch, workplace, script, command)


def test_the_models_of_the_demo_are_where_the_readme_says():
    config = read_config(ROOT / "experiments" / "demo.yaml")
    jobs = compare.jobs_of(types.SimpleNamespace(out=Path("runs/demo")), config)
    models = {str(done.with_name("model")) for job in jobs for done, words in job if words[0] == "rl_mrt.py"}
    named = set(re.findall(r"runs/demo/confirm/[\w-]+/model", TEXT))
    assert named and named <= models


def test_functions_files_and_figures_that_are_named_exist():
    named = re.findall(r"`(common|plumbing\.\w+|rl_mrt|star_mrt)\.(?!py|jsonl)(\w+)(?:\.\w+)?`", TEXT)
    assert len(named) > 12
    for module, name in named:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    for page, text in TEXTS.items():
        for file in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / page).parent.joinpath(file).exists(), f"{page}: {file}"
    for file in re.findall(r"`((?:tests|configs|experiments|docs|plumbing)/[\w-]+\.(?:py|yaml|png|md|json))", TEXT):
        assert (ROOT / file).exists(), file


def test_the_marks_of_the_readme_are_those_of_the_code():
    """`# MRT n` stands where the README's table says: in the function that the row names."""
    rows = re.findall(r"^\| .*`# MRT (\d)` \| (.*?) \|", TEXTS["README.md"], re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 8))
    for number, functions in rows:
        for module, name in re.findall(r"`(\w+)\.(\w+)`", functions):
            source = (ROOT / f"{module}.py").read_text(encoding="utf-8")
            body = re.search(rf"^def {name}\(.*?(?=^(?:def|class|# =|# -))", source, re.M | re.S)
            assert body and f"# MRT {number}" in body[0], (number, name)


def test_every_number_with_an_interval_is_one_of_the_comparison():
    """No result is typed by hand: each stands in the summary that the comparison wrote, rounded."""
    summary = json.loads((ROOT / "experiments" / "summary.json").read_text())
    known = set()
    for table in summary["tables"].values():
        for row in table.values():
            for column, cell in row.items():
                if isinstance(cell, dict) and cell["mean"] is not None:
                    digits = 0 if "tokens" in column else 2
                    for sign in ("", "+"):
                        low, high = (
                            "∞" if cell[end] is None else f"{cell[end]:{sign}.{digits}f}" for end in ("low", "high")
                        )
                        known.add(f"{cell['mean']:{sign}.{digits}f} [{low}, {high}]")
    for page in ("README.md", "experiments/findings.md"):
        cells = re.findall(r"[+-]?\d+(?:\.\d+)? \[[+-]?\d[^]]*\]", TEXTS[page])
        assert len(cells) > 8 and not [cell for cell in cells if cell not in known], [
            c for c in cells if c not in known
        ]


def test_the_gradients_of_the_findings_are_those_that_were_measured():
    estimators = json.loads((ROOT / "experiments" / "gradient.json").read_text())["models"]["tiny"]
    lines = TEXTS["experiments/findings.md"].splitlines()
    start = next(i for i, line in enumerate(lines) if "cosine with its own mean" in line)
    columns = [cell.strip() for cell in lines[start].strip("| ").split(" | ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : lines.index("", start)]]
    rows = [row for row in rows if row[0] in estimators]
    assert len(rows) > 5
    for name, *cells in rows:
        digits = [3 if column == "signal / noise" else 2 for column in columns]
        assert cells == [f"{estimators[name][column]:.{d}f}" for column, d in zip(columns, digits)], name


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 200 and len(TEXTS["CONTRIBUTING.md"].splitlines()) <= 40


def test_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", TEXT, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target
