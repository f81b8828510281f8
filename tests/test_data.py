"""Problems from files: the columns seen in the wild, and the real benchmarks where they are at hand."""

import json

import pytest
from conftest import SHARED

import common


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "row, gold",
    [
        ({"problem": "p", "answer": "7"}, "7"),
        ({"question": "p", "answer": "6 + 1 = <<6+1=7>>7\n#### 7"}, "7"),
        ({"prompt": "p", "solution": "First $\\boxed{3}$, no: $\\boxed{\\frac{1}{2}}$."}, "\\frac{1}{2}"),
        ({"question": "p", "answer": "\\boxed{7}", "solution": "other"}, "7"),
        ({"problem": "p", "answer": 73}, "73"),
        ({"problem": "p", "answer": "1,000"}, "1,000"),
    ],
)
def test_columns_and_answers_seen_in_the_wild(tmp_path, row, gold):
    (problem,) = common.load_problems(write(tmp_path / "d.jsonl", [row]), "train")
    assert problem == {"problem": "p", "answer": gold, "id": "0"}


def test_ids_are_kept_or_made_and_are_unique(tmp_path):
    rows = [{"problem": "p", "answer": "1", "id": 5}, {"problem": "q", "answer": "2", "id": 5}]
    ids = [p["id"] for p in common.load_problems(write(tmp_path / "d.jsonl", rows), "train")]
    assert len(set(ids)) == 2 and all(i.startswith("5") for i in ids)
    assert len(common.load_problems(write(tmp_path / "e.jsonl", rows), "train", limit=1)) == 1


SIZES = {
    "aime2024": 30,
    "aime2025": 30,
    "amc2023": 40,
    "math500": 500,
    "gsm8k": 1319,
    "minerva_math": 272,
    "olympiadbench": 675,
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real benchmarks are not here")
@pytest.mark.parametrize("name", SIZES)
def test_real_benchmarks_load_and_their_golds_grade_as_right(name):
    problems = common.load_problems(str(SHARED / f"{name}.jsonl"), "test")
    assert len(problems) == SIZES[name]
    for problem in problems:
        assert common.grade(f"so \\boxed{{{problem['answer']}}}", problem["answer"]), problem
