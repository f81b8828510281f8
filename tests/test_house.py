"""The house: what the top level holds, which way imports run, where each name is defined, the marks of the method."""

import ast
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS
from importlinter.cli import lint_imports

import common

# What is imported in a function, so that who does without it need not have it or wait for it.
OPTIONAL = "vllm matplotlib cycler datasets pyarrow torch.utils.tensorboard math_verify sympy latex2sympy2_extended"
PARTS = (".", "engine", "grading", "run", "tiny", "experiments", "tests")
OURS = sorted(file for part in PARTS for file in (ROOT / part).glob("*.py"))


def path_of(module: str) -> Path | None:
    """The file of one of our modules; None for a library's."""
    place = ROOT.joinpath(*module.split("."))
    return next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()), None)


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def defined_in(file: Path) -> set[str]:
    """The names that a file defines itself: functions, classes, values."""
    nodes = list(ast.walk(tree_of(file)))
    names = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return names | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def imports(file: Path) -> list[tuple[str, str | None, bool]]:
    """(module, name taken from it, hidden in a function?) of every import of a file."""
    tree, found = tree_of(file), []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {inner for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(a.name, None, node in inside) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}, line {node.lineno}: a relative import"
            found += [(node.module, a.name, node in inside) for a in node.names]
    return found


def test_the_top_level_is_the_paper_and_its_five_components():
    assert {file.stem for file in ROOT.glob("*.py")} == {"common", *SCRIPTS}


def test_imports_run_one_way():
    """Scripts → run → common → engine, grading: .importlinter has it of the folders, this of the single files."""
    assert lint_imports(config_filename=str(ROOT / ".importlinter"), no_cache=True) == 0
    for name in ("common", *SCRIPTS):
        taken = {module.split(".")[0] for module, *_ in imports(ROOT / f"{name}.py")}
        assert not taken & {"tiny", "experiments", *SCRIPTS, *(["run"] if name == "common" else [])}, name


@pytest.mark.parametrize("folder", ["engine", "grading"])
def test_the_two_doors_take_plain_values(folder):
    for file in (ROOT / folder).glob("*.py"):
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.arguments):
                assert "args" not in [argument.arg for argument in (*node.args, *node.kwonlyargs)], file.name


def test_nothing_is_imported_in_a_function_but_what_one_can_do_without():
    for file in OURS:
        if file.parent.name != "tests":
            for module, name, hidden in imports(file):
                full = f"{module}.{name}"
                allowed = not hidden or f"{full}.".startswith(tuple(f"{m}." for m in OPTIONAL.split()))
                assert allowed, f"{file.name} imports {full} in a function"


@pytest.mark.parametrize("file", OURS, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_name_is_imported_from_where_it_is_defined(file):
    """Nothing is re-exported."""
    for module, name, _ in imports(file):
        source = path_of(module)
        if name and source and not path_of(f"{module}.{name}"):
            assert name in defined_in(source), f"{file.name} imports {name} from {module}"


def test_nothing_is_excused_for_being_imported_and_not_used():
    excuse = "noqa: " + "F401"
    assert not [file.name for file in OURS if excuse in file.read_text(encoding="utf-8")]


def test_the_names_that_others_rely_on_are_defined_in_common():
    for name in ("split_episodes", "grade", "pass_at_k", "maj_at_k", "normalized_regret"):
        assert getattr(common, name).__module__ == "common", name


def marks(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"# MRT (\d+):", text)]


def test_the_marks_of_the_method_count_from_one():
    """Each number once; J has two: from sampled answers and from the likelihood."""
    found = {file.stem: marks(file.read_text(encoding="utf-8")) for file in OURS if file.parent.name != "tests"}
    assert {name for name, numbers in found.items() if numbers} <= {"common", *SCRIPTS}
    assert all(a <= b for numbers in found.values() for a, b in pairwise(numbers))  # in the order of reading
    every = sorted(number for numbers in found.values() for number in numbers)
    assert sorted(set(every)) == list(range(1, max(every) + 1))
    assert [number for number in set(every) if every.count(number) > 1] == [3] and every.count(3) == 2
    likelihood, sampled = (
        marks(ast.get_source_segment((ROOT / "common.py").read_text(encoding="utf-8"), node) or "")
        for node in sorted(tree_of(ROOT / "common.py").body, key=lambda node: getattr(node, "name", ""))
        if getattr(node, "name", "") in ("set_likelihood_J", "set_sampled_J")
    )
    assert likelihood == sampled == [3]
