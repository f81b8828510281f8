"""The commands of README and docs run as they stand, at toy size; functions, figures and numbers are where they say."""

import contextlib
import functools
import importlib
import io
import json
import operator
import re
import shlex
import shutil
import types
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, run_here, succeeded

import common
from engine.tokens import Completion, encode, text_and_offsets
from experiments import compare
from run.data import load_problems
from run.files import json_line
from run.flags import read_config

PAGES = ["README.md", "CONTRIBUTING.md", "configs/README.md", "experiments/findings.md"]
PAGES += [str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
TEXT = "\n".join(TEXTS.values())
COMMAND = re.compile(r"^ {4}(?:python|torchrun --nproc-per-node \d+) (-m [\w.]+|\S+\.py)(.*?)(?: +#.*)?$", re.M)
COMMANDS = list(dict.fromkeys((script, flags.strip()) for script, flags in COMMAND.findall(TEXT)))
COMMANDS = [(script, flags) for script, flags in COMMANDS if not script.startswith("tests/")]
MAIN = [f"{name}.py" for name in SCRIPTS]
# What makes a command small, after its own flags; models and data that are not here become the embedded ones.
SMALL = """--limit 2 --max-tokens 48 --answer-tokens 8 --forced-answers 1 --num-samples 2 --eval-problems 2 --steps 1
--problems-per-step 2 --group-size 2 --iterations 1 --epochs 1 --batch-size 4 --extensions 2 --extension-tokens 8
--budgets 24,48 --dtype float32 --engine transformers --kl 0 --max-tokens-per-batch 2048"""
SMALL_OF = {
    "-m tiny.build": "--steps 2 --batch 2",
    "-m tiny.backtrack": "--steps 2 --batch 2",
    "star_mrt.py": f"{SMALL} --limit 9 --max-tokens 192 --forced-answers 4",  # the filter keeps something
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


def here(flag: str, value: str) -> str:
    """A value of the README, or what stands for it here."""
    if flag in ("--model", "--direct-model"):
        known = {"A": "tiny", "B": "B", "runs/NAME/model": "runs/NAME/model"}
        return ",".join(dict.fromkeys(known.get(name, "tiny") for name in value.split(",")))
    if flag == "--dataset" and "/" in value:
        return ",".join(("tiny:10", "tiny:20", "tiny:30", "amc2023.jsonl", "aime2024.jsonl")[: value.count(",") + 1])
    return value


@functools.cache
def flags_of(script: str) -> set[str]:
    """Those that its --help lists."""
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        module_of(script).flags(["--help"])
    return set(re.findall(r"^  (--[\w-]+)", text.getvalue(), re.M))


def at_toy_size(script: str, text: str, out: Path) -> list[str]:
    """The flags of a command as the README has them, then those that make it small."""
    words, flags = shlex.split(text), []
    for i, word in enumerate(words):
        flags.append(word if word.startswith("-") else here(words[i - 1], word))
    small = SMALL_OF.get(script, SMALL).split()
    for flag, value in zip(small[::2], small[1::2]):
        if script not in MAIN or flag in flags_of(script):
            flags += [flag, value]
    if script in MAIN and "--config" in words:  # its model and data are on the Hub
        flags += ["--model", "tiny", "--dataset", "tiny", "--split", "train"]
    if "--k" in words:
        flags += ["--num-samples", "8"]
    if "--out" not in words or script == "-m tiny.build":
        flags += ["--out", str(out)]
    if script in MAIN:  # another command may have made a run there
        flags.append("--overwrite")
    return flags


def test_every_script_has_a_command():
    assert len(COMMANDS) > 20 and {script for script, _ in COMMANDS} >= {*MAIN, "-m tiny.build", "-m tiny.backtrack"}


@pytest.mark.parametrize("script, flags", COMMANDS, ids=[f"{script} {flags}" for script, flags in COMMANDS])
def test_a_command_runs(workplace, tmp_path, execute, script, flags):
    for flag, maker in (("--compare", script), ("--thoughts", "analyze_r1.py")):
        for name in re.findall(r"runs/\S+", flags.partition(flag)[2].partition(" --")[0]):  # the runs it names
            if not (workplace / name).exists():
                run_here(workplace, maker, *at_toy_size(maker, f"--out {name}", tmp_path))
    command = at_toy_size(script, flags, tmp_path / "run")
    if script.startswith("-m "):
        succeeded(execute(workplace, script.removeprefix("-m "), *command))
    else:
        run_here(workplace, script, *command)


def test_the_models_of_the_demo_are_where_the_readme_says():
    config = read_config(ROOT / "experiments" / "demo.yaml")
    jobs = compare.jobs_of(types.SimpleNamespace(out=Path("runs/demo")), config)
    models = {str(done.with_name("model")) for job in jobs for done, words in job if words[0] == "rl_mrt.py"}
    named = set(re.findall(r"runs/demo/confirm/[\w-]+/model", TEXT))
    assert named and named <= models


def test_functions_files_and_figures_that_are_named_exist():
    named = re.findall(r"`(common|(?:engine|run|grading)\.\w+|rl_mrt|star_mrt)\.(?!py|jsonl)(\w+)(?:\.\w+)?`", TEXT)
    assert len(named) > 12
    for module, name in named:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    for page, text in TEXTS.items():
        for file in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / page).parent.joinpath(file).exists(), f"{page}: {file}"
    folders = "tests|configs|experiments|docs|engine|run|grading"
    for file in re.findall(rf"`((?:{folders})/[\w-]+\.(?:py|yaml|png|md|jsonl\.gz|json))", TEXT):
        assert (ROOT / file).exists(), file


def test_the_marks_of_the_readme_are_those_of_the_code():
    """`# MRT n` stands where the README's table says: in the function that the row names."""
    rows = re.findall(r"^\| .*`# MRT (\d)` \| (.*?) \|", TEXTS["README.md"], re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 9))
    for number, functions in rows:
        for module, name in re.findall(r"`(\w+)\.(\w+)`", functions):
            source = (ROOT / f"{module}.py").read_text(encoding="utf-8")
            body = re.search(rf"^def {name}\(.*?(?=^(?:def|class|# =|# -)|\Z)", source, re.M | re.S)
            assert body and f"# MRT {number}" in body[0], (number, name)


def test_every_number_with_an_interval_is_one_of_the_comparison():
    """No result is typed by hand: each stands in a summary that the experiments wrote, rounded."""
    known = set()

    def collect(value, column: str = "") -> None:
        if isinstance(value, dict) and {"mean", "low", "high"} <= value.keys():
            digits = 0 if "tokens" in column else 2
            for sign in ("", "+") if value["mean"] is not None else ():
                numbers = (value[name] for name in ("mean", "low", "high"))
                mean, low, high = ("∞" if n is None else f"{n:{sign}.{digits}f}" for n in numbers)
                known.add(f"{mean} [{low}, {high}]")
        elif isinstance(value, dict):
            for name, inner in value.items():
                collect(inner, name)

    for file in (ROOT / "experiments").glob("**/summary.json"):
        collect(json.loads(file.read_text(encoding="utf-8")))
    for page in ("README.md", "experiments/findings.md"):
        cells = set(re.findall(r"[+-]?\d+(?:\.\d+)? \[[+-]?\d[^]]*\]", TEXTS[page]))
        assert len(cells) > 8 and not cells - known, cells - known


# A paragraph between marks, and where its numbers stand in a file, one a line, in their order. A place is a path like
# `tables › Levels › STaR › tokens` (of an interval: its mean), `… minus …` or `… over …` of two; `cells › GRPO ›
# {right, tokens}` are two places; `= 384` is a setting.
MARKED = re.compile(r"<!-- (experiments/\S+\.json)\n(.*?)\n-->\n(.*?)<!-- end -->", re.S)
SHOWN = re.compile(r"(?<![\w.@-])[+-]?\d+(?:\.\d+)?k?(?![\w-])")


def value_at(data, place: str):
    for word, operation in ((" minus ", operator.sub), (" over ", operator.truediv)):
        if word in place:
            return operation(*(value_at(data, part) for part in place.split(word)))
    for name in place.strip().split(" › "):
        data = data[int(name)] if isinstance(data, list) else data[name]
    return data["mean"] if isinstance(data, dict) else data


def wrong_numbers(data, places: str, paragraph: str) -> list[tuple[str, str]]:
    """(number, place) of those that are not what stands there, rounded; ValueError unless each has a place."""
    each = []
    for line in places.splitlines():
        head, _, names = line.partition("{")
        each += [head + name for name in names.rstrip("}").split(", ")] if names else [line]
    wrong = []
    for number, place in zip(SHOWN.findall(paragraph), each, strict=True):
        value = place[2:] if place.startswith("= ") else value_at(data, place)
        digits = len(number.partition(".")[2])
        texts = SHOWN.findall(value) if isinstance(value, str) else [f"{value:.{digits}f}"]
        wrong += [] if number.removeprefix("+") in texts or number in texts else [(number, place)]
    return wrong


def test_numbers_between_marks_are_those_of_the_file():
    marked = [found for text in TEXTS.values() for found in MARKED.findall(text)]
    assert marked and sum(text.count("<!-- end -->") for text in TEXTS.values()) == len(marked)
    for file, places, paragraph in marked:
        assert not wrong_numbers(json.loads((ROOT / file).read_text(encoding="utf-8")), places, paragraph)


@pytest.mark.parametrize(
    "paragraph, wrong",
    [
        ("right: 0.64, seeds 0.60 to 0.72, 181k tokens", 0),
        ("right: +0.64, seeds 0.60 to 0.72, 181k tokens", 0),
        ("right: 0.63, seeds 0.60 to 0.72, 181k tokens", 1),
        ("right: -0.64, seeds 0.60 to 0.71, 180k tokens", 3),
    ],
)
def test_a_wrong_number_between_marks_is_found(paragraph, wrong):
    data = {"GRPO": {"right": {"mean": 0.6351, "low": 0.6, "high": 0.7}, "seeds": [0.6, 0.7151], "tokens": "181k (3)"}}
    places = "GRPO › right\nGRPO › seeds › 0\nGRPO › seeds › 1\nGRPO › tokens"
    assert len(wrong_numbers(data, places, paragraph)) == wrong
    assert not wrong_numbers(data, "GRPO › seeds › 1 minus GRPO › seeds › 0\n= 4", "0.12 with 4 seeds")
    with pytest.raises(ValueError):
        wrong_numbers(data, places, paragraph + ", 5 more")


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
    assert len(TEXTS["README.md"].splitlines()) <= 200 and len(TEXTS["CONTRIBUTING.md"].splitlines()) <= 60


def test_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", TEXT, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target


# ------------------------------------------------------------------------------------------------ the recipes


@pytest.fixture()
def follow(monkeypatch):
    """follow(name): puts what CONTRIBUTING.md gives for `common.name` there."""

    def put(name: str) -> None:
        blocks = re.findall(r"```python\n(.*?)```", TEXTS["CONTRIBUTING.md"], re.S)
        (block,) = [b for b in blocks if name in b.split("\n")[0]]
        there = {**vars(common)}
        exec(block, there)
        monkeypatch.setattr(common, name, there[name])

    return put


@pytest.fixture()
def trace(tokenizer, problems, prompts):
    text = "Okay, I look.\n\nIt is because of this.\n\nDone.\n</think>\n\nSo it is, because I say so, \\boxed{%s}"
    text %= problems[0]["answer"]
    ids = encode(tokenizer, text)
    completion = Completion(ids, [0.0] * len(ids), "stop", *text_and_offsets(tokenizer, ids))
    return common.read_trace(tokenizer, problems[0], prompts[0], completion)


def test_another_reward_is_that_of_outcomes_and_of_sampled_answers(follow, sampler, trace):
    def J() -> list[float]:
        common.set_sampled_J(sampler, [trace], common.Forcing(4, 8), (1,))
        return trace.J

    before = J()
    follow("reward")
    common.grade_traces([trace])
    assert trace.reward == 1.0 and trace.verdict == "right"
    trace.answer = trace.answer.replace("because", "as")
    common.grade_traces([trace])
    assert trace.reward == 0.5 and trace.verdict == "right"
    assert max(before) > 0 and J() == [value / 2 for value in before]


def test_another_rule_for_episodes_cuts_the_thought(follow, tokenizer, trace):
    assert len(trace.boundaries) == 2
    follow("episode_spans")
    again = common.read_trace(tokenizer, trace.problem, trace.prompt, trace.completion)
    assert len(again.boundaries) == 4 and again.prefix(again.boundaries[1]) == "Okay, I look.\n\n"


def test_another_stop_phrase_is_what_forces_an_answer(follow, tokenizer, trace):
    follow("STOP_PHRASE")
    assert tokenizer.decode(common.forced_prompt(tokenizer, trace, 0)).endswith("I have to answer now.\n</think>\n\n")
