"""The house: what the top level holds, which way imports run, where each name is defined, the marks of the method."""

import ast
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

from conftest import ROOT, SCRIPTS
from importlinter.cli import lint_imports

import common

# What is imported in a function, so that who does without it need not have it or wait for it.
OPTIONAL = "vllm matplotlib cycler datasets pyarrow torch.utils.tensorboard math_verify sympy latex2sympy2_extended"
PARTS = (".", "engine", "grading", "run", "tiny", "experiments", "tests")
OURS = sorted(file for part in PARTS for file in (ROOT / part).glob("*.py"))
PRODUCT = [file for file in OURS if file.parent.name != "tests"]


def path_of(module: str) -> Path | None:
    """The file of one of our modules; None for a library's."""
    place = ROOT.joinpath(*module.split("."))
    return next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()), None)


@cache
def nodes_of(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


@cache
def defined_in(file: Path) -> set[str]:
    """The names that a file defines itself: functions, classes, values."""
    names = {node.name for node in nodes_of(file) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return names | {
        node.id for node in nodes_of(file) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def imports(nodes: list[ast.AST]) -> list[tuple[str, str | None]]:
    """(module, name taken from it) of every import, none of them relative."""
    found: list[tuple[str, str | None]] = [(a.name, None) for n in nodes if isinstance(n, ast.Import) for a in n.names]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    assert all(node.level == 0 for node in froms)
    return found + [(node.module or "", alias.name) for node in froms for alias in node.names]


def test_the_top_level_is_the_paper_and_its_five_components():
    assert {file.stem for file in ROOT.glob("*.py")} == {"common", *SCRIPTS}
    for name in ("split_episodes", "grade", "pass_at_k", "maj_at_k", "normalized_regret"):  # which others rely on
        assert getattr(common, name).__module__ == "common", name


def test_imports_run_one_way():
    """Scripts → run → common → engine, grading: .importlinter has it of the folders, this of the single files."""
    assert lint_imports(config_filename=str(ROOT / ".importlinter"), no_cache=True) == 0
    for name in ("common", *SCRIPTS):
        taken = {module.split(".")[0] for module, _ in imports(nodes_of(ROOT / f"{name}.py"))}
        assert not taken & {"tiny", "experiments", *SCRIPTS, *(["run"] if name == "common" else [])}, name


def test_the_two_doors_take_plain_values():
    for file in PRODUCT:
        if file.parent.name in ("engine", "grading"):
            every = [arguments for arguments in nodes_of(file) if isinstance(arguments, ast.arguments)]
            names = [argument.arg for of in every for argument in (*of.args, *of.kwonlyargs)]
            assert "args" not in names, file


def test_nothing_is_imported_in_a_function_but_what_one_can_do_without():
    for file in PRODUCT:
        functions = [node for node in nodes_of(file) if isinstance(node, ast.FunctionDef)]
        for module, name in imports([inner for function in functions for inner in ast.walk(function)]):
            allowed = f"{module}.{name}.".startswith(tuple(f"{optional}." for optional in OPTIONAL.split()))
            assert allowed, f"{file.name} imports {module}.{name} in a function"


def test_a_name_is_imported_from_where_it_is_defined():
    """Nothing is re-exported, and nothing is excused for being imported and not used."""
    excuse = "noqa: " + "F401"
    for file in OURS:
        assert excuse not in file.read_text(encoding="utf-8"), file
        for module, name in imports(nodes_of(file)):
            source = path_of(module)
            if name and source and not path_of(f"{module}.{name}"):
                assert name in defined_in(source), f"{file} imports {name} from {module}"


def marks(text: str | None) -> list[int]:
    return [int(number) for number in re.findall(r"# MRT (\d+):", text or "")]


def test_the_marks_of_the_method_count_from_one():
    """Each number once; J has two: from sampled answers and from the likelihood."""
    found = {file.stem: marks(file.read_text(encoding="utf-8")) for file in PRODUCT}
    assert {name for name, numbers in found.items() if numbers} <= {"common", *SCRIPTS}
    assert all(a <= b for numbers in found.values() for a, b in pairwise(numbers))  # in the order of reading
    every = sorted(number for numbers in found.values() for number in numbers)
    assert every == sorted([*range(1, max(every) + 1), 3])
    paper = ROOT / "common.py"
    for node in nodes_of(paper):
        if getattr(node, "name", "") in ("set_likelihood_J", "set_sampled_J"):
            assert marks(ast.get_source_segment(paper.read_text(encoding="utf-8"), node)) == [3]
