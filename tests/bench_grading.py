"""Benchmark: this grader, math-verify alone and, if it is given, the authors' grader.py, by kind of answer.

python tests/bench_grading.py [ROWS.jsonl ...] [--authors analysis/code/grader.py]

A row is {gold, output, expected, kind}; without files, tests/answers.txt. Cells: right, wrongly accepted.
"""

import argparse
import importlib.util
import json
import logging
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from math_verify import parse, verify

from common import grade


def own_rows() -> list[dict]:
    """The rows of answers.txt; its comments are their kinds."""
    rows, kind = [], ""
    for line in Path(__file__).with_name("answers.txt").read_text(encoding="utf-8").split("\n"):
        kind = line[2:] if line[:2] == "# " else kind
        if line[:2] in ("+ ", "- "):
            gold, answers = line[2:].split(" | ", 1)
            for answer in answers.split(" ; "):
                row = {"gold": gold, "output": rf"\boxed{{{answer}}}", "expected": line[0] == "+", "kind": kind}
                rows.append(row)
    return rows


def math_verify_alone(output: str, gold: str) -> bool:
    """With its own defaults; the gold delimited, as it asks for."""
    return verify(parse(rf"\boxed{{{gold}}}"), parse(output))


def table_by_kind(rows: list[dict], graders: dict) -> str:
    """A Markdown table: for each kind and grader the number of right verdicts and of wrong acceptances."""
    counts: dict = defaultdict(lambda: {name: [0, 0] for name in graders})
    sizes: dict = defaultdict(int)
    for row in rows:
        sizes[row["kind"]] += 1
        sizes["all"] += 1
        for name, grader in graders.items():
            try:
                verdict = bool(grader(row["output"], row["gold"]))
            except ValueError:  # a gold that it refuses
                verdict = False
            for kind in (row["kind"], "all"):
                counts[kind][name][0] += verdict is row["expected"]
                counts[kind][name][1] += verdict and not row["expected"]
    head = "".join(f" {name}: right | accepts wrongly |" for name in graders)
    lines = [f"| kind | rows |{head}", "|---|---:|" + "---:|---:|" * len(graders)]
    for kind in [*(kind for kind in counts if kind != "all"), "all"]:
        cells = "".join(f" {right} | {accepted} |" for right, accepted in counts[kind].values())
        lines.append(f"| {kind} | {sizes[kind]} |{cells}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--authors", type=Path, help="grader.py of the paper's code")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    graders = {"ours": grade, "math-verify": math_verify_alone}
    if args.authors:
        spec = importlib.util.spec_from_file_location("authors_grader", args.authors)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        graders["authors"] = module.solution_eq_ans
    rows = [json.loads(line) for file in args.files for line in file.read_text(encoding="utf-8").splitlines()]
    print(table_by_kind(rows or own_rows(), graders))


if __name__ == "__main__":
    main()
