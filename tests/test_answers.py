"""The answer grader: the policy, exactness, extraction, voting, hostile input, the worker's life and death."""

import ast
import gc
import gzip
import inspect
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from common import grade
from grading import box, families, forms, policy, units, values
from grading import verdict as grading
from grading.box import extract_answer
from grading.verdict import check_golds, grade_all, group_answers

CASES = [
    line
    for line in (ROOT / "tests" / "answers.txt").read_text(encoding="utf-8").split("\n")
    if line[:2] in ("+ ", "- ")
]
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not here")


def rows(name):
    return [json.loads(line) for line in (SHARED / name).read_text(encoding="utf-8").splitlines()]


def answers_equal(answer, gold):
    return grade_all([(answer, gold)]) == ["right"]


def boxed(answer):
    return f"so $\\boxed{{{answer}}}$"


# ---------------------------------------------------------------------------------------------- verdicts


def test_policy():
    """answers.txt: + or -, a gold, and answers that are right or wrong."""
    rows = [
        (answer, line[2:].split(" | ")[0], line[0] == "+")
        for line in CASES
        for answer in line[2:].split(" | ", 1)[1].split(" ; ")
    ]
    verdicts = grade_all([(answer, gold) for answer, gold, _ in rows])
    assert len(rows) > 1400 and not [row for row, verdict in zip(rows, verdicts) if (verdict == "right") is not row[2]]


def test_rows_of_authors_who_had_not_seen_the_grader():
    with gzip.open(ROOT / "tests" / "answers_blind.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    verdicts = grade_all([(extract_answer(row["output"]), row["gold"]) for row in rows])
    wrong = [row for row, verdict in zip(rows, verdicts) if (verdict == "right") is not row["expected"]]
    assert len(wrong) < 0.007 * len(rows) and not [row for row in wrong if not row["expected"]], wrong


def test_each_rule_has_its_line_in_the_manual():
    manual = (ROOT / "docs" / "answers.md").read_text(encoding="utf-8")
    assert not [f.__name__ for f in (*policy.RULES, *policy.READINGS) if f"`{f.__name__}` |" not in manual]


def test_any_of_several_golds_is_right():
    assert grade(boxed("-7"), ["7", "-7"]) and grade(boxed("7.0"), ["7", "-7"])
    assert not grade(boxed("8"), ["7", "-7"]) and not grade(boxed("7, -7"), ["7", "-7"])
    assert grade_all([("-7", ["7", "-7"]), ("0", ("7", "-7")), (None, ["7"])]) == ["right", "wrong", "none"]
    assert group_answers(["7", "3", "-7", "3.0"], ["7", "-7"]) == [0, 1, 0, 1]
    errors = check_golds(["7", [], ["7", r"\frac{1}{"], r"\sqrt{2}", "1/0"])
    assert [bool(error) for error in errors] == [False, True, True, False, True]


@pytest.mark.parametrize(
    "gold",
    ["", "  ", r"\boxed{}", r"\frac{1}{", "(1,2", r"\frac{1}{0}", "1/0", "NaN", "None", "2+", "x^^2", "???", "3 5"],
)
def test_a_gold_that_nothing_can_equal_is_an_error_that_names_it(gold):
    for response in (r"\boxed{1}", "no box"):
        with pytest.raises(ValueError, match="gold answer cannot be parsed") as error:
            grade(response, gold)
        assert repr(gold) in str(error.value)


@pytest.mark.parametrize(
    "gold", [r"\foo{3}", "1, 2, \\ldots, n", "All primes p with p = 4k+1", "y'' + y = f(t)", "f^{-1}"]
)
def test_a_gold_that_nothing_reads_is_compared_as_text(gold):
    assert grade(boxed(gold), gold) and grade(boxed(f" {gold}."), gold)
    assert not grade(boxed(gold.replace("3", "4").replace("1", "2").replace("''", "'")), gold) or gold == "f^{-1}"
    assert not grade(boxed("7"), gold)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{41} no, \boxed{42}.", "42"),
        (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}"),
        (r"\boxed 42.", "42"),
        (r"\fbox{ 7 }", "7"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{1", None),
        (r"\boxed{}", None),
        ("42", None),
        ("", None),
        (r"<think>\boxed{7}</think> I give up.", None),
        (r"<think>\boxed{7}", None),
        (r"\boxed{1}</think>\boxed{2}", "2"),
        (r"<think>1</think>\boxed{7}" + "\n</think>\n", "7"),
        (r"<thinking>\boxed{1}</thinking>\boxed{2}", "2"),
        (r"[THINK]\boxed{1}[/THINK]\boxed{2}", "2"),
        (r"[THINK]\boxed{1}", None),
        (r"<|channel|>analysis<|message|>\boxed{1}<|end|><|start|>assistant<|channel|>final<|message|>\boxed{2}", "2"),
        (r"<|channel|>analysis<|message|>\boxed{1}", None),
        (r"\boxed{1} \boxed{2", "1"),
        (r"$\boxed{1}$, $\boxed{2}$ and \boxed{3}", "1, 2, 3"),
        (r"\boxed{1}, so \boxed{2}$ \boxed{2}", "2"),
        (r"\boxed{1} \boxed{}", None),
        (r"\boxed{x=\boxed{5}}", "5"),
        (r"} \boxed{3} {", "3"),
    ],
)
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


def test_extraction_is_linear():
    start = time.perf_counter()
    assert extract_answer("\\boxed{" * 20_000) is None
    assert extract_answer("{\\boxed{" * 20_000 + "7}") == "7"
    assert time.perf_counter() - start < 2


# ---------------------------------------------------------------------------------------------- properties

numbers = st.one_of(
    st.integers(-(10**6), 10**6).map(str),
    st.decimals(-1000, 1000, places=3, allow_nan=False, allow_infinity=False).map(lambda d: f"{d:f}"),
    st.builds(lambda p, q: rf"\frac{{{p}}}{{{q}}}", st.integers(-99, 99), st.integers(2, 99)),
    st.builds(lambda a, b: rf"{a}\sqrt{{{b}}}", st.integers(2, 9), st.sampled_from([2, 3, 5, 6, 7])),
    st.builds(lambda a, b: rf"{a}x^{{{b}}}", st.integers(2, 9), st.integers(2, 9)),
)
answers = st.one_of(
    numbers,
    st.lists(numbers, min_size=2, max_size=3).map(", ".join),
    st.builds("({}, {})".format, numbers, numbers),
    st.builds(lambda a, b: f"[{a},{a + b})", st.integers(-9, 9), st.integers(1, 9)),
    st.builds("x={}".format, numbers),
    st.builds("x<{}".format, st.integers(-9, 9)),
    st.sampled_from([line[2:].split(" | ")[0] for line in CASES]),
)
noise = st.sampled_from(
    ["${}$", " {} ", r"\text{{}}{}", r"{}\,", r"\,{}", r"\({}\)", r"\displaystyle {}", "\n{}\n", "{}."]
)
bounded = settings(max_examples=100, derandomize=True, deadline=None, database=None)


@bounded
@given(answers)
def test_every_answer_equals_itself(text):
    assert check_golds([text])[0] or grade(boxed(text), text)


@bounded
@given(numbers, st.one_of(numbers, numbers.map("x={}".format)))
def test_equality_has_no_direction(a, b):
    assert answers_equal(a, b) == answers_equal(b, a)


@bounded
@given(answers, noise)
def test_layout_does_not_change_a_verdict(text, layout):
    if not check_golds([text])[0] and not text.endswith((".", ")", "3")) and r"\text" not in text:
        assert answers_equal(layout.replace("{}", text, 1) if "text" not in layout else r"\text{}" + text, text)


@bounded
@given(numbers, st.data())
def test_a_changed_digit_sign_or_exponent_is_never_right(text, data):
    places = [i for i, character in enumerate(text) if character.isdigit()]
    at = data.draw(st.sampled_from(places))
    digit = data.draw(st.sampled_from([d for d in "123456789" if d != text[at]]))
    changed = text[:at] + digit + text[at + 1 :]
    assert not answers_equal(changed, text) or forms.number(changed) == forms.number(text)  # 2/4 and 3/6
    negative = text[1:] if text.startswith("-") else f"-{text}"
    assert not answers_equal(negative, text) or forms.number(text) == 0


# ---------------------------------------------------------------------------------------------- voting

VOTES = [  # a gold, and answers in their classes
    ("3,4", ["1,2", "2,1", r"\{1,2\}"], ["1,3"], ["2"]),
    ("(3,4)", ["1,2", "(1,2)"], ["2,1", "(2,1)"], [r"\{1,2\}"]),
    (r"\{3,4\}", ["1,2", r"\{2,1\}", "2 or 1"], ["(1,2)"]),
    ("9", ["5 million", "5000000", r"5\text{ million}"], ["5"], ["5 thousand"]),
    ("9", ["1/8", "0.125", r"12.5\%", "2⁻³"], ["12.5"], ["8"]),
    ("x=9", ["x=4", "4"], ["y=4"]),
    ("9", ["x=4", "4", r"4\text{ cm}", "4.0"], ["y=5"]),
    ("A", ["C", r"(C)\ 7", "C) 7"], ["7"]),
    ("9", ["C"], ["7", r"(C)\ 7"]),
    ("9", ["x>1 and x<3", "(1,3)", "1<x<3", "]1,3["], ["[1,3]"], ["x<1 or x>3"]),
    ("9", [r"\sqrt{12}", "2√3", r"\frac{6}{\sqrt3}"], [r"2\sqrt{2}"], [r"\frac{"], ["1/0"]),
    ("7", ["7", "7.0"], ["±2", "2,-2", r"\{-2,2\}"], ["2"]),
    (r"\frac{1}{2}", ["0.5"], [r"\cos 30^\circ", r"\frac{\sqrt3}{2}"], [r"\cos 30"]),
]


@pytest.mark.parametrize("gold, classes", [(gold, classes) for gold, *classes in VOTES])
def test_classes_do_not_depend_on_the_order_of_the_answers(gold, classes):
    answers = [answer for members in classes for answer in members]
    for seed in range(10):
        random.Random(seed).shuffle(answers)
        found = group_answers(answers, gold)
        assert sorted(map(sorted, classes)) == sorted(
            sorted(a for a, c in zip(answers, found) if c == number) for number in set(found)
        )


def test_right_answers_are_class_0_and_no_answer_is_none():
    answers = ["0.5", None, r"\frac12", r"\sqrt8", "3", r"2\sqrt2", "50\\%", "", "3.0", "1/0"]
    assert group_answers(answers, "1/2") == [0, None, 0, 1, 2, 1, 0, None, 2, 3]
    assert group_answers([], "1") == [] and group_answers(["2", None], "1") == [1, None]


# ---------------------------------------------------------------------------------------------- hostile input, workers


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^{9^9}}}",
        r"\binom{1000000000}{500000000}",
        "((20!)!)!",
        "(" * 140 + "2" + ")" * 140,
        r"\frac{1}{1+" * 15 + "1" + "}" * 15,
        "1" * 100_000,
        "{" * 100_000,
        "1," * 140 + "2",
        "\ud800",
        "\x00",
        "__import__('os').mkdir('pwned')",
        r"\sum_{k=1}^{10^{12}} k^{k}",
        r"(x+1)^{99999999}",
        "1e999999999",
    ],
)
def test_hostile_answers_are_wrong_soon(answer):
    answers_equal(r"2\sqrt{2}", r"\sqrt{8}")
    start = time.perf_counter()
    assert grade(rf"\boxed{{{answer}}}", "1") is False
    assert time.perf_counter() - start < 10  # 0.75 s of CPU; a busy machine may take longer
    assert not Path("pwned").exists()
    assert answers_equal(r"2\sqrt{2}", r"\sqrt{8}")  # the next one is graded as ever


PIECES = r"7|1, |x |\text{a}|\ldots|sqrt |or |\pm |[1,|0.1|\mid |<|{|for all |\frac|\begin{cases}|a|,|=|(|\text{|is |and |^|_{a}|-"  # noqa: E501
MODULES = (box, families, forms, policy, units, values)


@cache
def patterns():
    """(pattern, how it is used) of all regular expressions of the grader, inline ones too."""
    found = {(row[0], "search") for row in (*box._TABLE, *policy.NOTATIONS, *values.MISREAD)}
    found |= {(re.compile(names), "fullmatch") for names in policy._SAID.values()}
    for module in MODULES:
        for call in ast.walk(ast.parse(inspect.getsource(module))):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            of = getattr(getattr(call.func, "value", None), "id", "")
            whole = name if name in ("fullmatch", "match") else "search"
            if of != "re" and isinstance(pattern := vars(module).get(of), re.Pattern):
                found.add((pattern, whole))
            elif (of == "re" and name not in ("compile", "escape")) or (
                name == "split" and isinstance(call.func, ast.Name)
            ):  # the second is forms.split
                written = ast.Expression(call.args[0 if of == "re" else 1])
                if not {node.id for node in ast.walk(written) if isinstance(node, ast.Name)} - set(vars(module)):
                    pattern = eval(compile(written, "", "eval"), vars(module))
                    found |= {(re.compile(pattern), whole)} if isinstance(pattern, str) else set()
    assert len(found) > 120
    return sorted(found, key=str)


@pytest.mark.parametrize("piece", PIECES.split("|"))
def test_no_pattern_takes_more_than_linear_time(piece):
    text = "x" + piece * (100_000 // len(piece)) + "\n"
    for pattern, used in patterns():
        start = time.process_time()
        getattr(pattern, used)(text)
        assert time.process_time() - start < 1.5, pattern.pattern


letters = st.lists(st.text("abcdefgh \\{}()$^_,.=-+123", min_size=1, max_size=9), min_size=1, max_size=25).map(" ".join)
prose = st.lists(
    st.sampled_from("the is smallest possible value of 3 at origin and or for if x=2 \\frac12 (so) half".split()),
    max_size=40,
)


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.one_of(letters, prose.map(" ".join)), st.sampled_from(["3", "x+1", "(1,2)", r"\text{no}"]))
def test_prose_is_graded_soon(text, gold):
    """Within 50 ms, but for the parser's tables: it fills them when it first meets a form, so that is not counted."""
    policy.right(gold, text[:300])
    for known in (policy.cleaned, policy.solution_set, values.value):
        known.cache_clear()
    gc.disable()  # a full collection of a process with torch in it takes longer than the answer
    start = time.process_time()
    policy.right(gold, text[:300])
    seconds = time.process_time() - start
    gc.enable()
    assert seconds < 0.05


def test_hang_is_a_timeout_and_remembered():
    pairs = [(r"\binom{1000000007}{500000000}", "1"), ("2", "2"), (None, "2"), ("3", "2")]
    assert grade_all(pairs) == ["timeout", "right", "none", "wrong"]
    start = time.process_time()
    assert grade_all(pairs[:1] * 3) == ["timeout"] * 3
    assert time.process_time() - start < 0.1  # not tried again


def test_dead_worker_is_replaced():
    assert answers_equal(r"\sqrt{12}", r"2\sqrt{3}")
    grading._idle[-1].kill()
    grading._idle[-1].wait()
    assert answers_equal(r"\sqrt{20}", r"2\sqrt{5}")


def test_a_worker_that_dies_at_work_is_a_timeout_and_replaced():
    assert answers_equal(r"\sqrt{12}", r"2\sqrt{3}")
    pid = grading._idle[-1].pid
    threading.Timer(0.3, lambda: os.killpg(pid, signal.SIGKILL)).start()
    assert grade_all([(r"\binom{1000000009}{500000000}", "1")]) == ["timeout"]
    assert answers_equal(r"\sqrt{28}", r"2\sqrt{7}")


def test_a_forked_process_has_a_worker_of_its_own():
    assert answers_equal(r"\sqrt{44}", r"2\sqrt{11}")
    child = os.fork()
    if not child:
        right = answers_equal(r"\sqrt{52}", r"2\sqrt{13}")
        grading._stop_workers()
        os._exit(not right)
    assert os.waitpid(child, 0)[1] == 0
    assert answers_equal(r"\sqrt{68}", r"2\sqrt{17}")


def test_works_from_threads():
    wrong = []

    def work(n):
        for k in range(2, 12):
            if not answers_equal(rf"\sqrt{{{k * n * n}}}", rf"{n}\sqrt{{{k}}}"):
                wrong.append((n, k))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_many_answers_are_graded_by_several_workers(monkeypatch):
    monkeypatch.setattr(grading.os, "cpu_count", lambda: 3)
    pairs = [(rf"\sqrt{{{4 * k}}}", rf"{n}\sqrt{{{k}}}") for k in range(2, 90) for n in (2, 3)]
    assert grade_all(pairs) == ["right", "wrong"] * 88
    assert 1 < len(grading._idle) <= 6


def test_works_from_a_script_and_leaves_no_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('once')\nfrom grading import verdict as grading\n"
        "assert grading.grade_all([(r'\\sqrt{8}', r'2\\sqrt{2}')]) == ['right']\n"
        "print(grading._idle[-1].pid)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    once, pid = done.stdout.split()
    assert once == "once" and not done.stderr
    with pytest.raises(ProcessLookupError):
        os.killpg(int(pid), 0)


def test_many_typical_answers_a_second():
    forms = ("{}", "{}.0", "x={}", "-{}", "{}\\text{{ cm}}")
    pairs = [(form.format(k), str(k)) for k in range(400) for form in forms]
    start = time.perf_counter()
    grade_all(pairs)
    assert len(pairs) / (time.perf_counter() - start) > 200


# ---------------------------------------------------------------------------------------------- real data


@needs_data
@pytest.mark.parametrize(
    "name", ["aime2024", "aime2025", "amc2023", "math500", "minerva_math", "olympiadbench", "gsm8k"]
)
def test_gold_equals_itself(name):
    golds = [row["answer"] for row in rows(f"{name}.jsonl")]
    verdicts = grade_all([(extract_answer(boxed(gold)), gold) for gold in golds])
    assert not [gold for gold, verdict in zip(golds, verdicts) if verdict != "right"]


@needs_data
def test_rows_that_were_chosen_to_be_hard():
    hard = rows("grading_hard.jsonl")
    verdicts = grade_all([(extract_answer(row["output"]), row["gold"]) for row in hard])
    assert not [row for row, verdict in zip(hard, verdicts) if (verdict == "right") is not row["expected"]]


@needs_data
def test_votes_that_were_chosen_to_be_hard():
    for row in rows("voting_classes.jsonl"):
        order = list(range(len(row["answers"])))
        for seed in range(5):
            random.Random(seed).shuffle(order)
            found = dict(zip(order, group_answers([row["answers"][i] for i in order], row["gold"])))
            classes = [[i for i in sorted(order) if found[i] == number] for number in set(found.values())]
            assert sorted(classes) == sorted(map(sorted, row["same"])), row


@needs_data
def test_visible_examples():
    for row in rows("grading_examples.jsonl"):
        decided = {
            None: row["expected"],
            "T": True,
            "T?": row["category"] != "unit",
            "F": False,
            "?": row["category"] != "unit",
        }
        assert grade(row["output"], row["gold"]) is decided[row["policy"]], row


@needs_data
def test_labelled_outputs():
    """800 sampled outputs with published labels; one label is wrong (10{,}000 for 10000)."""
    sampled = rows("traces_qwen_math_cot_100x8.jsonl")
    verdicts = grade_all([(extract_answer(row["response"]), row["answer"]) for row in sampled])
    differ = [row["answer"] for row, verdict in zip(sampled, verdicts) if (verdict == "right") is not row["correct"]]
    assert differ == ["10{,}000"]
