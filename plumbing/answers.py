r"""Answer grading: the last box of a response against the gold answer, exactly.

    text → tidy → parse → compare

tidy gives one spelling to each sign, macro and number. parse gives a form, a nested tuple: number, percent, words,
option, list, set, a named value, ..., or "latex" for the rest. compare reads an answer in the light of the gold (the
table) and then asks for plain equality. Numbers, words and lists are compared here, with exact fractions; LaTeX and
sets are compared by math-verify's parser and sympy (algebra.py), in a child process that can be killed.

Policy, decided once. The gold's form says how an answer is read.
  gold        | answer                        | verdict and rule
  1/2, 10     | 0.5, 2/4, 010, 10.0           | right: equal in value; no simplest form is asked for
  1/3, \pi    | 0.333333, 3.14159             | wrong: no tolerance; a decimal gold is its exact value too
  1/3         | 0.\overline{3}, 0.333...      | right: a repeating decimal; before "..." its period must be seen twice
  7/2         | 3\frac12, 3 1/2               | right: an integer before a proper fraction is a mixed number
  12345       | 12,345  12{,}345  12\,345     | right: groups of three; "12, 345" and "(12,345)" are two numbers
  0.5, 50\%   | 50\%, 0.5                     | right: p% is p/100 ...
  20, 20\%    | 20\%, 20                      | right: ... or p if p > 1 ("what percent?"); 5 is not 500
  5\text{cm}  | 5\text{m}, 5 km/h, \$5, 5°    | right: units, currencies and degree signs are ignored ...
  3, 1/2      | 3 million, \sin 30            | wrong: ... but words that scale a number and degrees in a sine are not
  (1,2)       | 1,2                           | right: brackets may be missing, order counts; not (2,1), not [1,2]
  1,2         | 2,1  \{2,1\}  2 or 1  ±       | right: a bare list or a set has no order; every item, nothing more
  4, C        | 4 or 5, \pm 4, C or D         | wrong: several candidates are no answer
  [-2,7]      | x\in[-2,7], -2\le x\le7       | right: inequalities in one unknown are sets; "and" and "or" count
  5           | x=5, 2+3=5                    | right: a name is dropped, otherwise every side must equal the gold
  x=5, f'(x)  | y=5, f(x)                     | wrong: another unknown; plain 5 is right, and f(t)=3t for f(x)=3x
  y=2x+3      | 2x-y+3=0, 2x+3                | right: an equation may be rearranged and scaled
  2x          | 2x \text{ for all } x         | right: remarks on the variables are dropped, "for odd n" is not
  R^2         | r^2                           | wrong: upper and lower case are different symbols
  B           | (B), Option B, B) 12          | right: an option letter, with or without its text
  12          | B) 12                         | right: an option's text, with its letter
  Yes         | yes, \text{YES.}              | right: case, a leading article and a full stop are ignored, nothing else
  1010_2      | 1010                          | right: a missing base is the gold's; 10 or 12_8 would be wrong
  1010        | 1010_2                        | wrong: a base other than ten for a decimal gold
  any         | 1/0, NaN; no closed, filled box after the thought| wrong
A gold that no rule reads is compared as text; one that is empty, incomplete or divides by zero is an error.
"""

import atexit
import json
import multiprocessing.connection
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from plumbing.forms import by_name, contains, latex_of, parse, set_of

MAX_ANSWER_CHARS = 300  # longer answers are wrong without being read, unless the gold itself is long
# Limits for one question to math-verify. CPU time decides, so a busy machine does not change a verdict.
GRADER_CPU_SECONDS, GRADER_WALL_SECONDS, GRADER_START_SECONDS = 0.75, 60, 120
grader_timeouts = 0  # questions of this process that were killed

# ================================================================================================== the last box

_THOUGHT_END = re.compile(r"</think(?:ing)?>|\[/THINK\]|<\|channel\|>\s*final\s*(?:<\|message\|>)?")
_THOUGHT_START = re.compile(r"<think(?:ing)?>|\[THINK\]|<\|channel\|>\s*analysis")
_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(?:\{|([^\s{}$\\]+))?|\\.|[{}]", re.DOTALL)
Gold = str | Sequence[str]


def extract_answer(response: str) -> str | None:
    r"""Content of the last balanced \boxed{...} or \fbox{...} (also "\boxed 42"), or None; linear time.

    Only what follows the thought counts; an open <think>, an unclosed box or an empty one is no answer.
    """
    pieces = _THOUGHT_END.split(response.rstrip())
    while len(pieces) > 2 and not pieces[-1].strip():
        pieces.pop()  # </think>\boxed{7}\n</think>
    if _THOUGHT_START.search(pieces[-1]):
        return None
    last_start, last = -1, None
    open_braces: list[tuple[bool, int]] = []  # (opened by a box?, where its content starts)
    for token in _BOX_TOKEN.finditer(pieces[-1]):
        text = token[0]
        if text == "}":
            is_box, start = open_braces.pop() if open_braces else (False, 0)
            if is_box and start > last_start:
                last_start, last = start, pieces[-1][start : token.start()]
        elif text.endswith("{") and text != r"\{":
            open_braces.append((text != "{", token.end()))
        elif token[1]:
            last_start, last = token.start(), token[1].rstrip(".,;:)")
    return (last or "").strip() or None


# ================================================================================================== compare


def _mapped(form: Any, pattern: str, new: str) -> Any:
    """The form with `pattern` replaced in all its LaTeX."""
    if isinstance(form, tuple):
        return tuple(_mapped(part, pattern, new) for part in form)
    return re.sub(pattern, new, form) if isinstance(form, str) else form


def _only(form: tuple) -> tuple:
    """5 for the set {5}."""
    single = form[:2] == ("list", r"\{\}") and len(form[2]) == 1 and form[2][0][0] in ("number", "percent", "latex")
    return form[2][0] if single and form[2][0] != ("latex", r"\emptyset") else form


def _in_light_of(gold: tuple, answer: tuple) -> tuple:
    """The answer's form, read as the gold's form asks; from here on only equality matters."""
    relations = ("named", "equation", "relation")
    if answer[0] == "quantity":
        return ("latex", answer[2]) if gold[0] in ("latex", "quantity", *relations) else answer[1]
    if answer[0] == "option":
        content = None if contains(gold, "option") else answer[2]
        return _in_light_of(gold, content) if content else ("option", answer[1], None)
    if answer[0] == "latex" and gold[0] == "option" and re.fullmatch("[a-j]", answer[1]):
        return ("option", answer[1].upper(), None)
    if answer[0] == "percent":
        return ("number", answer[1] / 100)
    if answer[0] == "named" and gold[0] == "named" and "(" in answer[1] and answer[1] != gold[1]:
        functions = [re.findall(r"^([^(]+)\(([a-z])\)$", form[1]) for form in (answer, gold)]
        if all(functions) and functions[0][0][0] == functions[1][0][0]:
            old, new = (rf"(?<![a-zA-Z\\]){matches[0][1]}(?![a-zA-Z])" for matches in functions)
            if _mapped(answer[2], new, "") == answer[2]:  # the new name is free
                answer = _mapped(answer, old, functions[1][0][1])
    answer = _only(by_name(answer))
    if answer[0] == "named" and gold[0] not in relations:
        return _in_light_of(gold, answer[2])
    if answer[0] == "named":
        return ("named", answer[1], _in_light_of(gold[2] if gold[0] == "named" else answer[2], answer[2]))
    if gold[0] == "named" and answer[0] not in relations:
        return by_name(("named", gold[1], _in_light_of(gold[2], answer)))
    if answer[0] == "equation" and gold[0] not in relations and all(_same(answer[2][0], side) for side in answer[2]):
        return _in_light_of(gold, answer[2][-1])
    if answer[0] == "list":
        inner = gold[2] if gold[0] == "named" else gold
        golds = inner[2] if inner[0] == "list" else (inner,)
        brackets = answer[1] or (inner[1] if inner[:2] == ("list", "()") else r"\{\}")
        if brackets == "or" and not contains(answer, "option"):
            brackets = r"\{\}"
        padded = [*golds, *golds[-1:] * len(answer[2])]
        return ("list", brackets, tuple(map(_in_light_of, padded, answer[2])))
    return answer


def _right(gold: tuple, answer: tuple) -> bool:
    """Whether an answer's form is right by the policy; TimeoutError if math-verify was killed."""
    gold, answer = _only(gold), _only(answer)
    pair = {gold[0]: gold[1], answer[0]: answer[1]}
    if set(pair) == {"number", "percent"}:
        return pair["number"] == pair["percent"] / 100 or pair["number"] == pair["percent"] > 1
    if gold[0] == "option" and gold[2] and answer[0] != "option" and _right(gold[2], answer):
        return True
    if gold[0] == "base" and answer == ("number", Fraction(gold[1] or 0) if gold[1].isdigit() else None):
        return True
    if answer[0] == "base":
        return gold[:2] == answer[:2] and gold == answer
    answer = _in_light_of(gold, answer)
    if gold[0] == "named" and answer[0] not in ("named", "equation", "relation"):
        return _right(gold[2], answer)
    if gold[:2] == ("list", "") and answer[:2] == ("list", "()"):
        gold = ("list", "()", gold[2])
    return _same(_in_light_of(gold, gold), answer)  # the gold, too, may hold percents and unsorted names


def _same(a: tuple, b: tuple) -> bool:
    """Whether two forms are equal, in either order."""
    if a == b:
        return True
    kinds = {a[0], b[0]}
    if kinds == {"named"} and a[1] == b[1]:
        return _same(a[2], b[2])
    if kinds == {"modulo"}:
        if (a[1] and b[1] and a[1] != b[1]) or not _same(a[3], b[3]):
            return False
        numbers = [form[1] for form in (a[2], b[2], a[3]) if form[0] == "number"]
        return (numbers[0] - numbers[1]) % numbers[2] == 0 if len(numbers) == 3 else _same(a[2], b[2])
    if "set" in kinds and kinds <= {"set", "list", "latex", "number"}:
        return _ask(set_of(a), set_of(b))
    if kinds == {"list"} and a[1] == b[1]:
        if a[1] == r"\{\}":
            return all(any(_same(x, y) for y in other) for one, other in ((a[2], b[2]), (b[2], a[2])) for x in one)
        return len(a[2]) == len(b[2]) and all(map(_same, a[2], b[2]))
    relations = {"named", "equation", "relation"}
    plain = {"number", "latex"}
    return (kinds <= plain or kinds <= relations) and kinds != {"number"} and _ask(latex_of(a), latex_of(b))


class _Worker:
    """algebra.py in a child process; `ask` gives its verdict, or "" if it died or hung and had to be killed."""

    def __init__(self):
        command = [sys.executable, str(Path(__file__).with_name("algebra.py")), str(GRADER_CPU_SECONDS)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process: Any = subprocess.Popen(command, bufsize=0, start_new_session=True, **pipes)
        if self.receive(GRADER_START_SECONDS) != "ready":
            raise RuntimeError(f"the grading worker did not start: {self.stop()[-500:]}")

    def receive(self, seconds: float) -> str:
        """One line, or "" if the process ended or wrote nothing within `seconds`."""
        ready = multiprocessing.connection.wait([self.process.stdout.fileno()], seconds)
        return self.process.stdout.readline().decode().strip() if ready else ""

    def ask(self, pair: list) -> str:
        verdict = ""
        try:
            self.process.stdin.write(json.dumps(pair).encode() + b"\n")
            verdict = self.receive(GRADER_WALL_SECONDS)
        except BrokenPipeError:
            pass
        finally:
            if not verdict:  # also on Ctrl-C: a late reply must not be taken for the next question's
                self.stop()
        return verdict

    def stop(self) -> str:
        """Ends the process and its fork, and returns what it wrote on stderr."""
        self.process.stdin.close()  # an idle worker exits by itself, a hung fork when its CPU time is used up
        try:
            self.process.wait(4 * GRADER_CPU_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(self.process.pid, signal.SIGKILL)
        with self.process:
            return self.process.stderr.read().decode()


_idle: list[_Worker] = []  # at most one worker for each thread that grades
_owner = os.getpid()  # a forked process must not share its parent's pipes
_lock = threading.Lock()


@atexit.register
def _stop_workers() -> None:
    while _owner == os.getpid() and _idle:
        _idle.pop().stop()


@lru_cache(maxsize=100_000)
def _math_verify(a: Any, b: Any) -> str:
    """The worker's verdict on two values of algebra.py: "right", "wrong" or "timeout"."""
    global grader_timeouts, _owner
    with _lock:
        if _owner != os.getpid():
            _idle.clear()
            _owner = os.getpid()
        worker = _idle.pop() if _idle else None
    if worker is None or worker.process.poll() is not None:
        worker = _Worker()
    verdict = worker.ask([a, b])
    with _lock:
        if verdict:
            _idle.append(worker)
        grader_timeouts += verdict in ("", "timeout")
    return verdict or "timeout"


def _ask(a: str | tuple | None, b: str | tuple | None) -> bool:
    if a is None or b is None:
        return False
    verdict = _math_verify(*sorted((a, b), key=str))
    if verdict == "timeout":
        raise TimeoutError
    return verdict == "right"


# ================================================================================================== verdicts


@lru_cache(maxsize=100_000)
def _gold_form(gold: str) -> tuple:
    text = extract_answer(gold) if r"\boxed" in gold else gold
    form = parse(text) if text else None
    if form is None:
        raise ValueError(f"gold answer cannot be parsed: {gold if len(gold) < 200 else gold[:200] + '...'!r}")
    return form


def _golds(gold: Gold) -> list[str]:
    golds = [gold] if isinstance(gold, str) else list(gold)
    if not golds:
        raise ValueError("gold answer cannot be parsed: there is none")
    return golds


def check_gold(gold: Gold) -> None:
    """ValueError, naming the gold, if nothing can be compared with it: that is an error in the data."""
    for text in _golds(gold):
        _gold_form(text)


@lru_cache(maxsize=100_000)
def _verdict(answer: str | None, gold: str) -> str:
    form = _gold_form(gold)
    if answer is None or not answer.strip():
        return "none"
    if len(answer) > max(MAX_ANSWER_CHARS, 2 * len(gold)):
        return "wrong"
    answer_form = parse(answer)
    try:
        return "right" if answer_form is not None and _right(form, answer_form) else "wrong"
    except TimeoutError:
        return "timeout"


def _verdict_on_any(answer: str | None, gold: Gold) -> str:
    verdicts = [_verdict(answer, text) for text in _golds(gold)]
    return next((verdict for verdict in ("right", "timeout") if verdict in verdicts), verdicts[0])


def grade_all(pairs: Sequence[tuple[str | None, Gold]]) -> list[str]:
    """Verdict on each (extracted answer, gold): right, wrong, none (no answer) or timeout. Uses all cores.

    A gold is a text, or several of which any is right; ValueError where one cannot be parsed.
    """
    questions = [(answer, gold if isinstance(gold, str) else tuple(gold)) for answer, gold in pairs]
    distinct = list(dict.fromkeys(questions))
    threads = min(os.cpu_count() or 1, len(distinct) // 50)  # a worker takes 2 s to start: one does for few answers
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:  # the slow part runs in the workers' processes
            verdicts = dict(zip(distinct, pool.map(lambda pair: _verdict_on_any(*pair), distinct)))
    else:
        verdicts = {pair: _verdict_on_any(*pair) for pair in distinct}
    return [verdicts[question] for question in questions]


def answers_equal(answer: str | None, gold: Gold) -> bool:
    """Whether an extracted answer equals the gold by the policy table; ValueError for an unparsable gold."""
    return _verdict_on_any(answer, gold) == "right"


def group_answers(answers: Sequence[str | None], gold: Gold) -> list[int | None]:
    """Class of each answer under mathematical equality, for voting: None for no answer, 0 for right answers.

    Wrong answers are 1, 2, ... in order of appearance. Which answers share a class does not depend on their order: two
    that equal a third count as equal.
    """
    gold_form = _gold_form(_golds(gold)[0])
    class_of: dict[str, str | int] = {}  # answer → the first (in sorted order) of its class, 0 if right
    for answer in sorted({answer for answer in answers if answer is not None and answer.strip()}):
        verdict = _verdict_on_any(answer, gold)
        class_of[answer] = 0 if verdict == "right" else answer
        form = parse(answer) if verdict == "wrong" and len(answer) <= MAX_ANSWER_CHARS else None
        for other in [other for other in class_of if form and other != answer and class_of[other] != 0]:
            if class_of[other] != class_of[answer] and _equal_for_voting(gold_form, answer, other):
                merged = (class_of[other], class_of[answer])
                class_of = {a: min(merged, key=str) if c in merged else c for a, c in class_of.items()}
    numbers: dict[Any, int] = {0: 0}
    classes = [None if answer is None else class_of.get(answer) for answer in answers]
    return [None if c is None else numbers.setdefault(c, len(numbers)) for c in classes]


def _equal_for_voting(gold: tuple, a: str, b: str) -> bool:
    forms = [parse(answer) if len(answer) <= MAX_ANSWER_CHARS else None for answer in (a, b)]
    try:
        return None not in forms and _same(*(_in_light_of(gold, form) for form in forms if form))
    except TimeoutError:
        return False
