"""Problems and responses from files: formats, columns and golds seen in the wild, and the real benchmarks."""

import gzip
import json

import pytest
from conftest import SHARED, refusal

from common import grade
from grading.box import extract_answer
from run import data
from run.data import Columns, load_problems, load_responses, split_response
from run.flags import load_markers
from run.report import group_by_problem

ROWS = [{"problem": "1+1?", "answer": "2"}, {"problem": "half, as a fraction?", "answer": r"\frac{1}{2}"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path, rows):
    text = rows if isinstance(rows, str) else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def chat(*texts):
    return [{"role": role, "content": text} for role, text in zip(("system", "user", "assistant"), texts)]


@pytest.mark.parametrize(
    "row, gold",
    [
        ({"problem": "p", "answer": "7"}, "7"),
        ({"Problem": "p", "Answer": "7"}, "7"),
        ({"question": "p", "answer": "6 + 1 = <<6+1=7>>7\n#### 7"}, "7"),
        ({"question": "p", "answer": "6 + 1 = 7\n#### 7\nSo it is 7."}, "7"),
        ({"prompt": "p", "solution": "First $\\boxed{3}$, no: $\\boxed{\\frac{1}{2}}$."}, "\\frac{1}{2}"),
        ({"question": "p", "answer": "\\boxed{7}", "solution": "other"}, "7"),
        ({"problem": "p", "solution": "so \\boxed{7}", "answer": ""}, "7"),
        ({"problem": "p", "answer": 73}, "73"),
        ({"problem": "p", "answer": 0.5}, "0.5"),
        ({"problem": "p", "answer": "1,000"}, "1,000"),
        ({"problem": "p", "answer": ["7"]}, "7"),
        ({"problem": "p", "answer": ["7", "-7"]}, ["7", "-7"]),
        ({"problem": "p", "final_answer": ["7"], "solution": "long"}, "7"),
        ({"question": "p", "expected_answer": "7"}, "7"),
        ({"prompt": chat("be kind", "p"), "ground_truth": "7"}, "7"),
        ({"messages": chat("be kind", "p", "7"), "answer": "7"}, "7"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "p"}]}], "answer": "7"}, "7"),
        ({"prompt": chat("", "p"), "reward_model": {"style": "rule", "ground_truth": "7"}}, "7"),
        ({"problem": "p", "answer": "sqrt(7)"}, "sqrt(7)"),
        ({"problem": "p\u2028q\x85r", "answer": "7"}, "7"),  # only "\n" ends a line
    ],
)
def test_columns_and_answers_seen_in_the_wild(tmp_path, row, gold):
    (problem,) = load_problems(write(tmp_path / "d.jsonl", [row]), "train")
    text = row.get("problem") or "p"
    assert {**problem, "messages": None} == {"problem": text, "answer": gold, "id": "0", "messages": None}


def test_messages_before_the_problem_are_kept_and_those_after_it_are_not(tmp_path):
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "1"}, {"type": "text", "text": "0"}]
    said = {"role": "assistant", "content": parts}
    turns = [*chat("in base 2", "1+1?"), said, {"role": "user", "content": "and 2+2?"}, said]
    rows = [{"messages": turns, "answer": "100"}, {"messages": chat("", "and 2+2?"), "answer": "100"}]
    first, second = load_problems(write(tmp_path / "d.jsonl", rows), "train")
    assert [m["content"] for m in first["messages"]] == ["in base 2", "1+1?", "10", "and 2+2?"]
    assert first["problem"] == second["problem"] == "and 2+2?" and "messages" not in second
    records = [{**problem, "gold": problem["answer"]} for problem in (first, second)]
    assert len(group_by_problem(records)) == 2  # what was said before makes them two
    row = {"system_prompt": "in base 2", "question": "and 2+2?", "answer": "100"}
    (third,) = load_problems(write(tmp_path / "d.jsonl", [row]), "train")
    assert third["messages"] == chat("in base 2", "and 2+2?")


def test_columns_of_other_names(tmp_path, capsys):
    file = write(tmp_path / "d.jsonl", [{"text": "p", "extra": {"label": "7"}}])
    assert "--problem-column" in refusal(capsys, load_problems, file, "train")
    (problem,) = load_problems(file, "train", columns=Columns("text", "extra.label"))
    assert problem["problem"] == "p" and problem["answer"] == "7"
    assert "nope" in refusal(capsys, load_problems, file, "train", columns=Columns("nope", "extra.label"))


@pytest.mark.parametrize(
    "name, content",
    [
        ("d.jsonl", LINES),
        ("d.json", LINES),
        ("d.json", json.dumps(ROWS, indent=2)),
        ("d.json", json.dumps({"version": 1, "data": ROWS}, indent=2)),
        ("d.jsonl", "\ufeff" + LINES),
        ("d.jsonl", LINES.replace("\n", "\r\n")),
        ("d.jsonl", LINES.replace("\n", "\n\n \n")),
        ("d.csv", 'problem,answer\r\n1+1?,2\r\n"half, as a fraction?",\\frac{1}{2}\r\n'),
        ("d.csv", '\ufeffproblem,answer\n1+1?,2\n"half, as a fraction?",\\frac{1}{2}'),
    ],
)
def test_formats(tmp_path, name, content):
    plain = load_problems(write(tmp_path / name, content), "train")
    assert [{"problem": p["problem"], "answer": p["answer"]} for p in plain] == ROWS
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    assert load_problems(str(tmp_path / f"{name}.gz"), "train") == plain


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": chat("", r["problem"]), "reward_model": {"ground_truth": r["answer"]}} for r in ROWS]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert [p["answer"] for p in load_problems(str(tmp_path / "d.parquet"), "train")] == ["2", r"\frac{1}{2}"]


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("d.jsonl", b"", "empty"),
        ("d.csv", b"", "empty"),
        ("d.json", b"[]", "empty"),
        ("d.jsonl", b'{"problem": "a", "answer": "1"}\n{"prob', "line 2: not JSON"),
        ("d.jsonl", b'{"problem": "a\x00b", "answer": "1"}\n', "line 1: not JSON"),
        ("d.jsonl", b'{"problem": "\xff\xfe", "answer": "1"}\n', "line 1: not UTF-8"),
        ("d.jsonl", LINES.encode("utf-16"), "UTF-16"),
        ("d.jsonl", b"3\n", "line 1: expected an object"),
        ("d.csv", b"problem,answer\n1,2,3\n", "row 1"),
        ("d.csv", b"problem,answer\n1\n", "row 1"),
        ("d.csv", b"problem,answer\n\xff,2\n", "utf-8"),
        ("d.parquet", b"PAR", "cannot be read"),
        ("d.jsonl.gz", b"PAR", "cannot be read"),
        ("d.json", b'[{"problem": "a", "answer": "1"}, 3]', "row 2"),
        ("d.jsonl", b"x" * 10_000_000, "line 1: not JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value[:12]),
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, capsys, name, content, says):
    (tmp_path / name).write_bytes(content)
    message = refusal(capsys, load_problems, str(tmp_path / name), "train")
    assert name in message and says in message and len(message) < 400


def test_all_unusable_rows_are_named_at_once(tmp_path, capsys):
    bad = [{"problem": "?", "answer": answer} for answer in (r"\frac{1}{", "1/0", None, "", "proof")]
    bad.append({"problem": "", "answer": 1})
    file = write(tmp_path / "d.jsonl", [row for one in bad for row in (ROWS[0], one)] + [{"answer": "1/0"}] * 9)
    message, skip = refusal(capsys, load_problems, file, "train"), Columns(skip_unusable=True)
    assert "15 rows" in message and message.count("row ") == 10 and "row 2: " in message and "row 12: " in message
    kept = load_problems(file, "train", columns=skip)
    assert [p["answer"] for p in kept] == ["2"] * 6 and "15 rows" in capsys.readouterr().out
    assert len(load_problems(file, "train", limit=1)) == 1  # what is not used is not looked at
    assert "no usable" in refusal(capsys, load_problems, write(tmp_path / "e.jsonl", bad), "train", columns=skip)


def test_ids_are_kept_or_made_and_are_unique_and_several_golds_are_said_once(tmp_path, capsys):
    rows = [{"problem": problem, "answer": ["1", "2"], "id": 5} for problem in "pqr"]
    ids = [p["id"] for p in load_problems(write(tmp_path / "d.jsonl", rows), "train")]
    assert len(set(ids)) == 3 and all(i.startswith("5") for i in ids)
    told = capsys.readouterr().out
    assert told.count("\n") == 2 and told.count("any of them is right") == 1


def test_responses_of_one_problem_are_gathered(tmp_path, capsys):
    problem = {"problem": "p", "answer": "7"}
    rows = [
        {**problem, "response": "a\r\nb"},
        {"problem": "q", "answer": ["1", "2"], "responses": ["c", chat("", "q", "d")]},
        {**problem, "response": chat("", "p", "e")},
    ]
    problems, responses = load_responses(tmp_path / write(tmp_path / "r.jsonl", rows).rsplit("/")[-1])
    assert [(p["id"], p["answer"]) for p in problems] == [("0", "7"), ("1", ["1", "2"])]
    assert responses == [["a\nb", "e"], ["c", "d"]]
    assert load_responses(tmp_path / "r.jsonl", limit=1) == (problems[:1], responses[:1])
    for bad in ({}, {"response": None}, {"response": 3}, {"responses": ["a", 3]}):
        write(tmp_path / "r.jsonl", [rows[0], {**problem, **bad}])
        assert "r.jsonl, row 2: column response" in refusal(capsys, load_responses, tmp_path / "r.jsonl")


THOUGHT, ANSWER = "I add.\n\nWait, again.\n", "\nIt is \\boxed{7}."
FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    "text, opened, thought, answer",
    [
        (f"<think>\n{THOUGHT}</think>{ANSWER}", True, THOUGHT, ANSWER),
        (f"<｜begin▁of▁sentence｜>\n<think>\n{THOUGHT}</think>{ANSWER}<｜end▁of▁sentence｜>", True, THOUGHT, ANSWER),
        (f"\n<think>\n{THOUGHT}</think>{ANSWER}", True, THOUGHT, ANSWER),
        (f"<s> <think>\n{THOUGHT}</think>{ANSWER}\n</think>", True, THOUGHT, ANSWER),
        (f"<|im_start|>assistant\n<think>\n{THOUGHT}</think>{ANSWER}<|im_end|>", True, THOUGHT, ANSWER),
        (f"<thinking>\n{THOUGHT}</thinking>{ANSWER}", True, THOUGHT, ANSWER),
        (f"[THINK]\n{THOUGHT}[/THINK]{ANSWER}", True, THOUGHT, ANSWER),
        (f"<|channel|>analysis<|message|>{THOUGHT}{FINAL}{ANSWER}<|return|>", True, THOUGHT, ANSWER),
        (f"{THOUGHT}</think>{ANSWER}", False, THOUGHT, ANSWER),  # the template has opened the thought
        (f"<think>\n{THOUGHT}", True, THOUGHT, None),
        (THOUGHT + ANSWER, False, THOUGHT + ANSWER, None),
        ("\n2 + 2", False, "\n2 + 2", None),
        ("<think></think>7", True, "", "7"),
        ("<think>a</think>\\boxed{7}\n</think>", True, "a", "\\boxed{7}"),
        ("", False, "", None),
    ],
)
def test_thought_and_answer_in_all_marks(text, opened, thought, answer):
    assert split_response(text) == (opened, thought, answer)
    assert extract_answer(text) == ("7" if "boxed" in text else None)


def test_markers(tmp_path, capsys):
    file = tmp_path / "m.txt"
    file.write_text("\ufeffWait\nHmm\n\n等等\nWait\n", encoding="utf-8")
    assert load_markers(file) == ["Wait", "Hmm", "等等"]
    for content in (b"", b"\n \n", b"\xff\xfe"):
        file.write_bytes(content)
        assert "m.txt" in refusal(capsys, load_markers, file)
    assert "nowhere.txt" in refusal(capsys, load_markers, tmp_path / "nowhere.txt")


SIZES = dict(aime2024=30, aime2025=30, amc2023=40, math500=500, gsm8k=1319, minerva_math=272, olympiadbench=675)
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not here")


@needs_data
@pytest.mark.parametrize("name", SIZES)
def test_real_benchmarks_load_and_their_golds_grade_as_right(name):
    problems = load_problems(str(SHARED / f"{name}.jsonl"), "test")
    assert len(problems) == SIZES[name]
    for problem in problems:
        assert grade(f"so \\boxed{{{problem['answer']}}}", problem["answer"]), problem


@needs_data
def test_files_that_were_chosen_to_be_hard(capsys):
    refused = set()
    for file in sorted((SHARED / "files_hard").iterdir()):
        load = load_responses if file.name.startswith("traces") else lambda path: load_problems(str(path), "train")
        try:
            assert load(file)
        except SystemExit:
            refused.add(file.stem)
    assert capsys.readouterr().err.count("\n") == len(refused)
    rows = "bad_gold_rows_2_and_4 bad_json_line_2 missing_answer_row_2 null_answer_row_2"
    assert refused == {*rows.split(), "empty", "utf16"}


def test_a_hub_set_leaves_out_what_cannot_be_used(monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    rows = [{"problem": "p", "solution": solution} for solution in ("\\boxed{2}", "a proof", "\\boxed{3}")]
    monkeypatch.setattr(data, "load_from_hub", lambda *_: datasets.Dataset.from_list(rows))
    assert [p["answer"] for p in load_problems("owner/name", "train")] == ["2", "3"]
    assert "left out" in capsys.readouterr().out


def test_a_part_of_a_split_is_read_as_the_library_datasets_does(tmp_path, monkeypatch, capsys):
    whole = load_problems("tiny:30", "test")
    assert load_problems("tiny:30", "test[150:300]") == whole[150:300]
    assert load_problems("tiny:30", "test[450:]", 3) == whole[450:453]
    rows = [{"problem": f"What is {i}?", "answer": str(i)} for i in range(6)]
    file = write(tmp_path / "train.jsonl", rows)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for text in ("train", "train[2:4]", "train[:1]", "train[4:]"):
        name, part = data.part_of_split(text)
        assert list(data.load_from_hub(str(tmp_path), name, part)) == rows[part]
    capsys.readouterr()  # the library's own words
    assert len(load_problems(file, "train")) == 6
    assert "--split train[2:4]" in refusal(capsys, load_problems, file, "train[2:4]")
    for split in ("test[", "test[3]", "test[a:b]", "test[1:2", "test[-5:]", "test[9000:]", "tset[:3]"):
        assert "--split" in refusal(capsys, load_problems, "tiny:30", split), split
