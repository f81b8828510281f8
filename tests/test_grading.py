"""The answer grader: policy, exactness, extraction, hostile input, the worker's life and death."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from plumbing import answers as grading

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is not here")


def rows(name):
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


RIGHT = r"""
1/2 | \frac12 ; 0.5 ; \dfrac{1}{2} ; 2/4 ; .50 ; \frac{-1}{-2} ; ½
-\frac{1}{2} | \frac{-1}{2} ; -0.5 ; -\frac12 ; −1/2
7/2 | 3\frac12 ; 3 1/2 ; 3.5
10 | 010 ; 10.0 ; +10 ; 10. ; 1e1 ; 1.0\times10^{1}
0 | -0 ; 0.0 ; \sin(\pi)
12345 | 12,345 ; 12{,}345 ; 12\,345 ; 12 345 ; 12,\!345
(1,2) | (1, 2) ; 1,2 ; \left(1,2\right) ; x=1, y=2 ; (x,y)=(1,2)
1,2 | 2,1 ; \{2,1\} ; x=1 \text{ or } x=2 ; 2 \text{ and } 1
\{1\pm\sqrt{5},-2\} | -2, 1-\sqrt5, 1+\sqrt5
[-2,7] | x\in[-2,7] ; -2\le x\le 7 ; 7 \geq x \geq -2
k \geqslant 2 | k>=2 ; 2\le k ; [2,\infty)
(-\infty,2)\cup(3,\infty) | (3,\infty) \cup (-\infty, 2) ; x<2 \text{ or } x>3
50\% | 0.5 ; 50 ; \frac12 ; 50 percent
20 | 20\% ; 20\text{ percent}
18 | \$18 ; 18 dollars ; 18^\circ ; 18\text{ cm}^2 ; 18\,\mathrm{km/h} ; x=18
5\text{ cm} | 5\text{ m} ; 5
\text{Yes} | yes ; \text{YES.}
\text{ellipse} | an ellipse
B | \textbf{(B)}\ 12 ; (B) ; \text{B} ; b ; B. 12
12 | \textbf{(B)}\ 12 ; 5+7=12 ; 3\cdot 4
y=2x+3 | 2x-y+3=0 ; 2x+3 ; y = 3 + 2x
x=5 | 5 ; x=5
1010_2 | 1010 ; 1010_{2}
\frac{1}{\sqrt{2}} | \frac{\sqrt2}{2} ; 2^{-1/2}
x^2+2x+1 | (x+1)^2
1024 | 2^{10}
\binom{2n}{n} | \frac{(2n)!}{n!\,n!}
2 | (1+i)(1-i) ; \log_2 4
\begin{pmatrix} 1/5 \\ -2 \end{pmatrix} | \begin{bmatrix} 0.2 \\ -2 \end{bmatrix}
\frac{x}{2} | 0.5x
\emptyset | \varnothing ; \{\}
"""
WRONG = r"""
1/3 | 0.33 ; 0.333333 ; 0.333333333333333333333333
\pi | 3.14159 ; \frac{22}{7} ; 3.141592653589793238462643
\sqrt2 | 1.4142135623730951
3/2 | 3\frac12
12 | 1,2 ; B ; 12_3
32349 | 32, 349
357 | 12\,345
12345678 | 12345679
2^{100} | 2^{100}+1
\frac{1}{2006!} | \frac{1}{2004!} ; 0
(1,2) | (2,1) ; [1,2] ; (1,2,3) ; 2,1
[2,5) | [2,5] ; (2,5)
1,2 | 1 ; 1,2,3
4 | 4 \text{ or } 5 ; x = 4 or x = 5 ; \pm 4 ; 4, 5 ; 4 = 5 ; 4\text{ (or 5)} ; 4 5
81 | (x+y)^2=81
x=5 | y=5 ; x=6
500 | 5
0.5 | 0.5\%
1010_2 | 10 ; 1010_3 ; 12_8
1010 | 1010_2
52_8 | 52_9 ; 42
R^2 | r^2
\frac{1}{3} E_{1}+\frac{2}{3} E_{2} | \frac{2}{3}
\text{Friday} | \text{Monday} ; Friday or Monday
B | C ; A, B ; \text{A or B}
2 | 2x ; 2\pi ; 2\text{ i} ; 1/0 ; NaN ; \infty ; ? ; \frac{ ; {2 ; 2}
0 | None
"""


def cases(table, expected):
    for line in table.strip().splitlines():
        gold, answers = line.split(" | ")
        for answer in answers.split(" ; "):
            yield pytest.param(gold, answer, expected, id=f"{gold} {'=' if expected else '!='} {answer}")


@pytest.mark.parametrize(("gold", "answer", "expected"), [*cases(RIGHT, True), *cases(WRONG, False)])
def test_policy(gold, answer, expected):
    assert grading.answers_equal(answer, gold) is expected


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
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed{x=\boxed{5}}", "5"),
        (r"} \boxed{3} {", "3"),
    ],
)
def test_extract_answer(response, answer):
    assert grading.extract_answer(response) == answer


def test_extraction_is_linear():
    start = time.perf_counter()
    assert grading.extract_answer("\\boxed{" * 20_000) is None
    assert grading.extract_answer("{\\boxed{" * 20_000 + "7}") == "7"
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "gold",
    [
        "",
        "  ",
        r"\boxed{}",
        r"\frac{1}{",
        "(1,2",
        r"\frac{1}{0}",
        "1/0",
        "NaN",
        "None",
        "2+",
        "x^^2",
        r"\foo{3}",
        "???",
        "3 5",
    ],
)
def test_unparsable_gold_is_an_error_that_names_it(gold):
    with pytest.raises(ValueError, match="gold answer cannot be parsed") as error:
        grading.grade(r"\boxed{1}", gold)
    assert repr(gold) in str(error.value)
    with pytest.raises(ValueError, match="gold"):
        grading.grade("no box", gold)


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^{9^9}}}",
        r"\binom{1000000000}{500000000}",
        "((20!)!)!",
        "(" * 140 + "2" + ")" * 140,
        "1" * 100_000,
        "{" * 100_000,
        "\ud800",
        "\x00",
        "__import__('os').mkdir('pwned')",
        r"\sum_{k=1}^{10^{12}} k^{k}",
    ],
)
def test_hostile_answers_are_wrong_soon(answer):
    start = time.perf_counter()
    assert grading.grade(rf"\boxed{{{answer}}}", "1") is False
    assert time.perf_counter() - start < 30
    assert not Path("pwned").exists()
    assert grading.answers_equal(r"2\sqrt{2}", r"\sqrt{8}")  # the next one is graded as ever


def test_hang_is_a_timeout_and_counted():
    before = grading.grader_timeouts
    pairs = [(r"\binom{1000000007}{500000000}", "1"), ("2", "2"), (None, "2"), ("3", "2")]
    assert grading.grade_all(pairs) == ["timeout", "right", "none", "wrong"]
    assert grading.grader_timeouts == before + 1
    assert grading.grade_all(pairs[:1] * 3) == ["timeout"] * 3  # remembered, not tried again
    assert grading.grader_timeouts == before + 1


def test_dead_worker_is_replaced():
    assert grading.answers_equal(r"\sqrt{12}", r"2\sqrt{3}")
    grading._idle[-1].process.kill()
    grading._idle[-1].process.wait()
    assert grading.answers_equal(r"\sqrt{20}", r"2\sqrt{5}")


def test_works_from_threads():
    wrong = []

    def work(n):
        for k in range(2, 12):
            if not grading.answers_equal(rf"\sqrt{{{k * n * n}}}", rf"{n}\sqrt{{{k}}}"):
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
    assert grading.grade_all(pairs) == ["right", "wrong"] * 88
    assert 1 < len(grading._idle) <= 4


def test_works_from_a_script_and_leaves_no_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('once')\nfrom plumbing import answers as grading\n"
        "assert grading.grade(r'\\boxed{\\sqrt{8}}', r'2\\sqrt{2}')\n"
        "print(grading._idle[-1].process.pid)\n"
    )
    home = str(Path(grading.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "PYTHONPATH": home},
    )
    once, pid = done.stdout.split()
    assert once == "once"
    assert not Path(f"/proc/{pid}").exists()


def test_group_answers():
    answers = ["0.5", None, r"\frac12", r"\sqrt8", "3", r"2\sqrt2", "50\\%", "", "3.0", "1/0"]
    assert grading.group_answers(answers, "1/2") == [0, None, 0, 1, 2, 1, 0, None, 2, 3]


def test_many_typical_answers_a_second():
    forms = ("{}", "{}.0", "x={}", "-{}", "{}\\text{{ cm}}")
    pairs = [(form.format(k), str(k)) for k in range(1000) for form in forms]
    start = time.perf_counter()
    grading.grade_all(pairs)
    assert len(pairs) / (time.perf_counter() - start) > 1000


@needs_data
@pytest.mark.parametrize(
    "name", ["aime2024", "aime2025", "amc2023", "math500", "minerva_math", "olympiadbench", "gsm8k"]
)
def test_gold_equals_itself(name):
    for row in rows(f"{name}.jsonl"):
        assert grading.grade(rf"so $\boxed{{{row['answer']}}}$", row["answer"]), row["answer"]


@needs_data
def test_visible_examples():
    for row in rows("grading_examples.jsonl"):
        decided = {None: row["expected"], "T": True, "T?": True, "F": False, "?": True}
        expected = decided[row["policy"]]
        assert grading.grade(row["output"], row["gold"]) is expected, row


@needs_data
def test_labelled_outputs():
    """800 sampled outputs with published labels; one label is wrong (10{,}000 for 10000)."""
    disagreements = [
        row["answer"]
        for row in rows("traces_qwen_math_cot_100x8.jsonl")
        if grading.grade(row["response"], row["answer"]) is not row["correct"]
    ]
    assert disagreements == ["10{,}000"]
