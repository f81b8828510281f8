"""Problems and given responses: files, the Hub, and the embedded reasoner's own."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from plumbing.answers import check_gold, extract_answer
from plumbing.runs import ROOT, fail, first_line, read_jsonl

PROBLEM_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "solution")
NOT_ANSWERS = ("proof", "notfound", "not found", "see solution", "n/a", "none", "unknown")  # NuminaMath has them


def load_problems(dataset: str, split: str, limit: int | None = None) -> list[dict]:
    """`[{problem, answer, id}]` from `tiny`, `tiny:30` (only that difficulty), a .jsonl file or the Hub.

    `answer` is the bare gold answer: what follows GSM8K's `####`, or a solution's last box. A row of a file whose
    answer cannot be graded ends the run and is named; rows of a Hub set (NuminaMath has proofs) are left out, counted.
    """
    if is_tiny_dataset(dataset):
        return tiny_problems(dataset, split)[:limit]
    from_file = dataset.endswith((".jsonl", ".json")) or Path(dataset).exists()
    rows: Any = read_jsonl(Path(dataset)) if from_file else load_from_hub(dataset, split)
    columns = {c.lower(): c for c in (rows[0] if from_file else rows.column_names)}
    problem_column = next((columns[c] for c in PROBLEM_COLUMNS if c in columns), None)
    answer_column = next((columns[c] for c in ANSWER_COLUMNS if c in columns), None)
    if problem_column is None or answer_column is None:
        fail(
            f"--dataset {dataset}: needs one column of {'|'.join(PROBLEM_COLUMNS)} and one of "
            f"{'|'.join(ANSWER_COLUMNS)}; found {', '.join(columns.values())}"
        )
    problems, skipped = [], 0
    for number, row in enumerate(rows, 1):
        if limit is not None and len(problems) == limit:
            break
        try:
            if not isinstance(row.get(problem_column), str) or not row[problem_column].strip():
                raise ValueError(f"column {problem_column} holds no text")
            gold = gold_answer(str(row.get(answer_column, "")), is_solution=answer_column.lower() == "solution")
        except ValueError as error:
            if from_file:
                fail(f"{dataset}, row {number}: {error}")
            skipped += 1
            continue
        problems.append({"problem": row[problem_column], "answer": gold, "id": str(row.get("id", number - 1))})
    if skipped:
        print(f"{dataset}: left out {skipped} rows without an answer that can be graded")
    if not problems:
        fail(f"--dataset {dataset}: no usable problem")
    if len({p["id"] for p in problems}) < len(problems):
        for number, problem in enumerate(problems):
            problem["id"] = f"{problem['id']}-{number}"
    return problems


def load_from_hub(dataset: str, split: str):
    """The rows of `owner/name` or `owner/name:subset`; a data set with one split is taken whatever that is called."""
    import datasets

    name, _, subset = dataset.partition(":")
    try:
        splits: Any = datasets.load_dataset(name, subset or None)
    except Exception as error:
        fail(f"--dataset {dataset}: neither a file nor a data set that the Hub gives: {first_line(error)}")
    if split not in splits and len(splits) > 1:
        fail(f"--dataset {dataset}: has no split {split}; it has {', '.join(splits)}")
    return splits[split] if split in splits else next(iter(splits.values()))


def tiny_problems(dataset: str, split: str) -> list[dict]:
    """The embedded reasoner's problems: `tiny`, all levels in turn, or `tiny:30`, one number of candidates."""
    with gzip.open(ROOT / "tiny" / "problems.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    subset = dataset.partition(":")[2] or "mixed"
    for what, asked, there in (
        (f"--dataset {dataset}", subset, sorted({name for row in rows for name in row["place"]})),
        (f"--split {split}", split, list(dict.fromkeys(row["split"] for row in rows))),
    ):
        if asked not in there:
            fail(f"{what}: the tiny problems have {', '.join(there)}")
    rows = [row for row in rows if row["split"] == split and subset in row["place"]]
    rows.sort(key=lambda row: row["place"][subset])
    return [{name: row[name] for name in ("problem", "answer", "id", "level")} for row in rows]


def is_tiny_dataset(dataset: str) -> bool:
    return dataset == "tiny" or dataset.startswith("tiny:")


def gold_answer(text: str, is_solution: bool) -> str:
    """The bare answer of an answer column's text; ValueError where there is none that can be graded."""
    if "####" in text:
        text = text.rsplit("####", 1)[1]
    elif is_solution or "\\boxed" in text:
        boxed = extract_answer(text)
        if boxed is None:
            raise ValueError("the solution holds no \\boxed{} answer")
        text = boxed
    text = text.strip()
    if text.lower() in NOT_ANSWERS:
        raise ValueError(f"{text!r} is not an answer")
    check_gold(text)
    return text


def load_responses(file: Path, limit: int | None) -> tuple[list[dict], list[list[str]]]:
    """(problems, the responses to each) of a file with a row a response; rows of one problem need not be neighbours."""
    rows = load_problems(str(file), "", None)
    responses: dict[tuple, list[str]] = {}
    problems: dict[tuple, dict] = {}
    for number, (problem, row) in enumerate(zip(rows, read_jsonl(file)), 1):
        if not isinstance(row.get("response"), str):
            fail(f"{file}, row {number}: column response holds no text; found {', '.join(row)}")
        same = (problem["problem"], problem["answer"])
        problems.setdefault(same, {**problem, "id": str(len(problems))})
        responses.setdefault(same, []).append(row["response"].replace("\r\n", "\n"))
    return list(problems.values())[:limit], list(responses.values())[:limit]
