"""Second stage: verdicts from a process that can be killed. The public functions of this folder, but for the box.

What a model wrote and the golds are read in a child process (worker.py), which is sent a line of JSON with a batch of
questions and answers each by a line.
"""

import atexit
import json
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CPU_SECONDS, WALL_SECONDS, START_SECONDS = 0.75, 60, 120  # of a question; of one that sleeps; of the import of sympy
BATCH = 32
timeouts = 0  # questions of this process that were killed
Gold = str | Sequence[str]


class _Worker:
    def __init__(self):
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self.process: Any = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys; from grading.worker import work; work(*map(float, sys.argv[1:]))",
                str(CPU_SECONDS),
            ],
            env={**os.environ, "PYTHONPATH": path},
            bufsize=0,
            start_new_session=True,
            **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
        )
        if self.receive(START_SECONDS) != "ready":
            raise RuntimeError(f"the grading worker did not start: {(self.stop().strip().splitlines() or [''])[-1]}")

    def receive(self, seconds: float) -> str:
        """One line, or "" if the process ended or wrote nothing within `seconds`."""
        ready = multiprocessing.connection.wait([self.process.stdout.fileno()], seconds)
        return self.process.stdout.readline().decode().strip() if ready else ""

    def ask(self, batch: list) -> list:
        """The replies up to the first that is "timeout"; the worker is gone if the last one is None."""
        replies: list = []
        try:
            self.process.stdin.write(json.dumps(batch).encode() + b"\n")
            while len(replies) < len(batch) and "timeout" not in replies:
                line = self.receive(WALL_SECONDS)
                replies.append(json.loads(line) if line else "timeout")
                if not line:
                    self.stop()
        except BrokenPipeError:
            self.stop()
        except BaseException:  # Ctrl-C: a late reply must not be taken for the next question's
            self.stop()
            raise
        return replies

    def stop(self) -> str:
        """Ends the process and its fork, and returns what it wrote on stderr."""
        self.process.stdin.close()  # an idle worker exits by itself, a hung fork when its CPU time is used up
        try:
            self.process.wait(4 * CPU_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(self.process.pid, signal.SIGKILL)
        with self.process:
            return self.process.stderr.read().decode()


_idle: list[_Worker] = []  # at most one worker for each thread that grades
_known: dict[tuple, Any] = {}  # replies of this process, by question
_owner = os.getpid()  # a forked process must not share its parent's pipes
_lock = threading.Lock()


@atexit.register
def _stop_workers() -> None:
    while _owner == os.getpid() and _idle:
        _idle.pop().stop()


def _ask_batch(batch: list[tuple]) -> None:
    global timeouts, _owner
    while batch:
        with _lock:
            if _owner != os.getpid():
                _idle.clear()
                _owner = os.getpid()
            worker = _idle.pop() if _idle else None
        if worker is None or worker.process.poll() is not None:
            worker = _Worker()
        replies = worker.ask(batch)
        with _lock:
            if worker.process.returncode is None:
                _idle.append(worker)
            timeouts += replies.count("timeout")
            _known.update(zip(batch, replies))
        batch = batch[len(replies) :]


def _ask(questions: Sequence[tuple]) -> list:
    """Replies to questions ("right", gold, answer), ("check", gold), ("vote", gold, a, b); each is asked once."""
    new = [question for question in dict.fromkeys(questions) if question not in _known]
    batches = [new[start : start + BATCH] for start in range(0, len(new), BATCH)]
    threads = min(os.cpu_count() or 1, len(new) // 50)  # a worker takes 2 s to start: one does for few answers
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(_ask_batch, batches))
    else:
        for batch in batches:
            _ask_batch(batch)
    return [_known[question] for question in questions]


# ================================================================================================== verdicts


def _several(gold: Gold) -> list[str]:
    return [gold] if isinstance(gold, str) else list(gold)


def check_golds(golds: Sequence[Gold]) -> list[str | None]:
    """For each gold an error that names it, if nothing can be compared with it, or None."""
    errors = iter(_ask([("check", text) for gold in golds for text in _several(gold)]))
    found = [
        [next(errors) for _ in _several(gold)] or ["gold answer cannot be parsed: there is none"] for gold in golds
    ]
    return [next((error for error in each if error), None) for each in found]


def grade_all(pairs: Sequence[tuple[str | None, Gold]]) -> list[str]:
    """Verdict on each (extracted answer, gold): right, wrong, none (no answer) or timeout. Uses all cores.

    A gold is a text, or several of which any is right; ValueError where one cannot be read.
    """
    if error := next(filter(None, check_golds([gold for _, gold in pairs])), None):
        raise ValueError(error)
    asked = [(answer, _several(gold)) for answer, gold in pairs]
    replies = iter(_ask([("right", g, a) for a, golds in asked if a and a.strip() for g in golds]))
    verdicts = []
    for answer, golds in asked:
        each = [next(replies) for _ in golds] if answer and answer.strip() else ["none"]
        verdicts.append(
            "right" if True in each else "timeout" if "timeout" in each else "wrong" if False in each else "none"
        )
    return verdicts


def answers_equal(answer: str | None, gold: Gold) -> bool:
    """Whether an extracted answer equals the gold; ValueError for an unreadable gold."""
    return grade_all([(answer, gold)]) == ["right"]


def group_answers(answers: Sequence[str | None], gold: Gold) -> list[int | None]:
    """Class of each answer under mathematical equality, for voting: None for no answer, 0 for right answers.

    Wrong answers are 1, 2, ... in order of appearance. Which answers share a class does not depend on their order: two
    that equal a third count as equal.
    """
    distinct = sorted({answer for answer in answers if answer and answer.strip()})
    verdicts = dict(zip(distinct, grade_all([(answer, gold) for answer in distinct])))
    class_of = {answer: 0 if verdict == "right" else answer for answer, verdict in verdicts.items()}
    wrong = [answer for answer, verdict in verdicts.items() if verdict == "wrong"]
    pairs = [(a, b) for n, a in enumerate(wrong) for b in wrong[:n]]
    for (a, b), same in zip(pairs, _ask([("vote", _several(gold)[0], a, b) for a, b in pairs])):
        if same is True:
            merged = {class_of[a], class_of[b]}
            class_of = {key: min(merged, key=str) if c in merged else c for key, c in class_of.items()}
    numbers: dict[Any, int] = {0: 0}
    classes = [class_of.get(answer) if answer else None for answer in answers]
    return [None if c is None else numbers.setdefault(c, len(numbers)) for c in classes]
