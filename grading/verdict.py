"""Second stage: verdicts from a process that can be killed. The public functions of this folder, but for the box.

A line of JSON with a batch of questions goes into a child, a line for each reply comes out. sympy can take for ever or
all memory on a hostile answer, so a fork of the child answers; one that has used up the CPU time of a question is ended
and replaced in milliseconds. A busy machine changes no verdict.
"""

import atexit
import itertools
import json
import logging
import multiprocessing.connection
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CPU_SECONDS, WALL_SECONDS, START_SECONDS = 0.75, 60, 120  # of a question; of one that sleeps; of the import of sympy
MEMORY_BYTES, BATCH = 4 << 30, 32
timeouts = 0  # questions of this process that were killed
Gold = str | Sequence[str]


def work(questions: dict[str, Callable], cpu_seconds: float) -> None:
    """In the child: replies to batches on stdin until it is closed."""
    logging.disable(logging.CRITICAL)
    replies, sys.stdout = sys.stdout, sys.stderr
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
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # SIGPROF ends this process, even inside C code
            try:
                reply = questions[kind](*texts)
            except Exception:  # whatever sympy raises
                reply = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            print(json.dumps(reply), file=replies, flush=True)
    os._exit(0)


class _Worker:
    def __init__(self):
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        code = f"from grading import policy, verdict; verdict.work(policy.QUESTIONS, {CPU_SECONDS})"
        pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        env = {**os.environ, "PYTHONPATH": path}
        command = [sys.executable, "-c", code]
        self.process: Any = subprocess.Popen(command, env=env, bufsize=0, start_new_session=True, **pipes)
        if self.receive(START_SECONDS) != "ready":
            raise RuntimeError(f"the grading worker did not start: {(self.stop().strip().splitlines() or [''])[-1]}")

    def receive(self, seconds: float) -> str:
        """One line, or "" if the process ended or wrote nothing within `seconds`."""
        ready = multiprocessing.connection.wait([self.process.stdout.fileno()], seconds)
        return self.process.stdout.readline().decode().strip() if ready else ""

    def ask(self, batch: list) -> list:
        """The replies up to the first that is "timeout"; the process is stopped where no line came for that one."""
        replies: list = []
        try:
            self.process.stdin.write(json.dumps(batch).encode() + b"\n")
            while len(replies) < len(batch) and "timeout" not in replies:
                replies.append(json.loads(self.receive(WALL_SECONDS)))
        except BrokenPipeError:
            self.stop()
        except json.JSONDecodeError:  # no line came
            self.stop()
            replies.append("timeout")
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
    """Replies to questions ("right", gold, answer), ("readable", gold), ("vote", gold, a, b); each is asked once."""
    new = [question for question in dict.fromkeys(questions) if question not in _known]
    threads = min(os.cpu_count() or 1, len(new) // 50)  # a worker takes 2 s to start: one does for few answers
    batches = [new[start : start + BATCH] for start in range(0, len(new), BATCH)]
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(_ask_batch, batches))
    else:
        _ask_batch(new)
    return [_known[question] for question in questions]


# ================================================================================================== verdicts


def _several(gold: Gold) -> list[str]:
    return [gold] if isinstance(gold, str) else list(gold)


def check_golds(golds: Sequence[Gold]) -> list[str | None]:
    """For each gold an error that names it, if nothing can be compared with it, or None."""
    texts = {text: None for gold in golds for text in _several(gold)}
    readable = dict(zip(texts, _ask([("readable", text) for text in texts])))
    bad = [[text for text in _several(gold) or [""] if readable.get(text) is not True] for gold in golds]
    return [f"gold answer cannot be parsed: {text[0][:200]!r}" if text else None for text in bad]


def grade_all(pairs: Sequence[tuple[str | None, Gold]]) -> list[str]:
    """Verdict on each (extracted answer, gold): right, wrong, none (no answer) or timeout. Uses all cores.

    A gold is a text, or several of which any is right; ValueError where one cannot be read.
    """
    if error := next(filter(None, check_golds([gold for _, gold in pairs])), None):
        raise ValueError(error)
    asked = [[("right", g, answer) for g in _several(gold) if answer and answer.strip()] for answer, gold in pairs]
    known = dict(zip(flat := [question for each in asked for question in each], _ask(flat)))
    names = {True: "right", "timeout": "timeout", False: "wrong"}
    replies = [{known[question] for question in each} for each in asked]
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
    pairs = list(itertools.combinations(wrong, 2))
    for (a, b), same in zip(pairs, _ask([("vote", _several(gold)[0], a, b) for a, b in pairs])):
        if same is True:
            class_of = {key: class_of[a] if c == class_of[b] else c for key, c in class_of.items()}
    numbers: dict[Any, int] = {0: 0}
    classes = [class_of.get(answer) for answer in answers]
    return [None if c is None else numbers.setdefault(c, len(numbers)) for c in classes]
