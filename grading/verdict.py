"""Second stage: verdicts from a process that can be killed. The public functions of this folder, but for the box.

A line of JSON with a batch of questions goes into a child, a line for each reply comes out. sympy can take for ever or
all memory on a hostile answer, so a fork of the child answers; one that has used up the CPU time of a question is ended
and replaced in milliseconds. A busy machine changes no verdict.
"""

import atexit
import itertools
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

CPU_SECONDS, WALL_SECONDS = 0.75, 60  # of a question, and of one that sleeps
MEMORY_BYTES, BATCH = 4 << 30, 32
Gold = str | Sequence[str]


def work(questions: dict[str, Callable]) -> None:
    """In the child: replies to batches on stdin until it is closed."""
    logging.disable(logging.CRITICAL)
    replies, sys.stdout = sys.stdout, sys.stderr
    with suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    if not questions["right"](r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"):  # does its parser fit the antlr runtime?
        raise SystemExit("math-verify does not work here: pip install 'math-verify[antlr4_13_2]'")
    for gold, answer in (("(1,2)", "(xy)"), ("(0,1]", "x>1"), ("x+1", "1+2x=y")):
        questions["right"](gold, answer)  # sympy and the parser are slow until they have met the commonest forms
    print("ready", file=replies, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody reads its messages from here on
    while os.fork():
        if not os.WIFSIGNALED(os.wait()[1]):
            return  # no more questions
        print('"timeout"', file=replies, flush=True)
    for line in sys.stdin:
        for kind, *texts in json.loads(line):
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF ends this process, even inside C code
            signal.alarm(WALL_SECONDS)
            try:
                reply = questions[kind](*texts)
            except Exception:  # whatever sympy raises
                reply = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            print(json.dumps(reply), file=replies, flush=True)
            signal.alarm(0)
    os._exit(0)


_idle: list[subprocess.Popen] = []  # at most one worker for each thread that grades
_known: dict[tuple, Any] = {}  # replies of this process, by question
os.register_at_fork(after_in_child=_idle.clear)  # a forked process must not share its parent's pipes


def _start() -> Any:
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-P", "-c", "from grading import policy, verdict; verdict.work(policy.QUESTIONS)"]
    pipes: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    env = {**os.environ, "PYTHONPATH": path}
    worker: Any = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
    if worker.stdout.readline() != b"ready\n":
        _stop(worker)
        raise RuntimeError("the grading worker did not start; the reason stands above")
    return worker


def _stop(worker: Any) -> None:
    with worker:
        worker.stdin.close()  # an idle worker exits by itself, a hung fork when its CPU time is used up
        try:
            worker.wait(4 * CPU_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(worker.pid, signal.SIGKILL)


@atexit.register
def _stop_workers() -> None:
    while _idle:
        _stop(_idle.pop())


def _ask_batch(batch: list[tuple]) -> None:
    while batch:
        worker: Any = None
        with suppress(IndexError):
            worker = _idle.pop()
        if worker is None or worker.poll() is not None:
            worker = _start()
        replies: list = []
        try:
            worker.stdin.write(json.dumps(batch).encode() + b"\n")
            while len(replies) < len(batch) and "timeout" not in replies:
                replies.append(json.loads(worker.stdout.readline()))
            _idle.append(worker)  # never one that still owes a reply: it must not be taken for the next question's
        except BrokenPipeError:  # it had died before: the next one is asked
            _stop(worker)
        except json.JSONDecodeError:  # no line came: it died at this question
            _stop(worker)
            replies.append("timeout")
        _known.update(zip(batch, replies))
        batch = batch[len(replies) :]


def _ask(questions: Iterable[tuple]) -> dict[tuple, Any]:
    """Replies to questions ("right", gold, answer), ("readable", gold), ("vote", gold, a, b); each is asked once."""
    new = [question for question in dict.fromkeys(questions) if question not in _known]
    if not new:
        return _known
    threads = min(os.cpu_count() or 1, max(1, len(new) // 50))  # a worker takes 2 s to start: one does for few answers
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_ask_batch, (new[start : start + BATCH] for start in range(0, len(new), BATCH))))
    return _known


def _several(gold: Gold) -> list[str]:
    return [gold] if isinstance(gold, str) else list(gold)


def check_golds(golds: Sequence[Gold]) -> list[str | None]:
    """For each gold an error that names it, if nothing can be compared with it, or None."""
    known = _ask(("readable", text) for gold in golds for text in _several(gold))
    bad = [[text for text in _several(gold) or [""] if known.get(("readable", text)) is not True] for gold in golds]
    return [f"gold answer cannot be parsed: {text[0][:200]!r}" if text else None for text in bad]


def grade_all(pairs: Sequence[tuple[str | None, Gold]]) -> list[str]:
    """Verdict on each (extracted answer, gold): right, wrong, none (no answer) or timeout. Uses all cores.

    A gold is a text, or several of which any is right; ValueError where one cannot be read.
    """
    if error := next(filter(None, check_golds([gold for _, gold in pairs])), None):
        raise ValueError(error)
    asked = [[("right", g, answer) for g in _several(gold) if answer and answer.strip()] for answer, gold in pairs]
    known = _ask(itertools.chain(*asked))
    replies = [{known[question] for question in each} for each in asked]
    names = {True: "right", "timeout": "timeout", False: "wrong"}
    return [next((name for reply, name in names.items() if reply in each), "none") for each in replies]


def group_answers(answers: Sequence[str | None], gold: Gold) -> list[int | None]:
    """Class of each answer under mathematical equality, for voting: None for no answer, 0 for right answers.

    Wrong answers are 1, 2, ... in order of appearance. Which answers share a class does not depend on their order: two
    that equal a third count as equal.
    """
    distinct = sorted({answer for answer in answers if answer and answer.strip()})
    verdicts = dict(zip(distinct, grade_all([(answer, gold) for answer in distinct])))
    class_of: dict[Any, Any] = {answer: 0 if verdict == "right" else answer for answer, verdict in verdicts.items()}
    wrong = [answer for answer, verdict in verdicts.items() if verdict == "wrong"]
    votes = [("vote", _several(gold)[0], a, b) for a, b in itertools.combinations(wrong, 2)]
    known = _ask(votes)
    for _, _, a, b in (vote for vote in votes if known[vote] is True):
        class_of = {key: class_of[a] if c == class_of[b] else c for key, c in class_of.items()}
    numbers: dict[Any, int] = {0: 0}
    return [numbers.setdefault(class_of[a], len(numbers)) if a in class_of else None for a in answers]
