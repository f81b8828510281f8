"""Benchmark: this grader, math-verify alone and, if it is given, the authors' grader.py on the same rows.

python tests/bench_grading.py [ROWS.jsonl ...] [--authors analysis/code/grader.py]

A row is {gold, output, expected}; without files, tests/answers.txt. "accepts" and "rejects" count what is wrong.
"""

import argparse
import importlib.util
import json
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from math_verify import parse, verify

from common import grade


def own_rows() -> list[dict]:
    text = Path(__file__).with_name("answers.txt").read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if line[:2] in ("+ ", "- ")]
    return [
        {"gold": line[2:].split(" | ", 1)[0], "output": rf"\boxed{{{answer}}}", "expected": line[0] == "+"}
        for line in lines
        for answer in line.split(" | ", 1)[1].split(" ; ")
    ]


def math_verify_alone(output: str, gold: str) -> bool:
    """With its own defaults; the gold delimited, as it asks for."""
    return verify(parse(rf"\boxed{{{gold}}}"), parse(output))


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
    print("| rows | n | grader | right | wrongly accepts | wrongly rejects | golds refused | s |")
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    for file in args.files or [None]:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file else own_rows()
        for name, grader in graders.items():
            counts, start = {"right": 0, "accepts": 0, "rejects": 0, "refused": 0}, time.perf_counter()
            for row in rows:
                try:
                    verdict = bool(grader(row["output"], row["gold"]))
                    kind = "right" if verdict is row["expected"] else "accepts" if verdict else "rejects"
                except ValueError:
                    kind = "refused"
                counts[kind] += 1
            cells = [
                file.stem if file else "answers",
                len(rows),
                name,
                *counts.values(),
                f"{time.perf_counter() - start:.0f}",
            ]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
