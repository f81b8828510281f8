"""The child process of verdict.py: the only place where texts of models and golds are read.

sympy can take for ever or all memory on a hostile answer, so a fork answers the questions; one that has used up the CPU
time of a question is killed and replaced in milliseconds. CPU time decides: a busy machine changes no verdict.
"""

import json
import logging
import os
import resource
import signal
import sys

from grading.policy import check, right, same_vote
from grading.values import works

MEMORY_BYTES = 4 << 30
QUESTIONS = {"right": right, "vote": same_vote, "check": check}


def answer_questions(cpu_seconds: float, replies) -> None:
    for line in sys.stdin:
        for kind, *texts in json.loads(line):
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # SIGPROF ends this process, even inside C code
            try:
                reply = QUESTIONS[kind](*texts)
            except Exception as error:  # whatever sympy raises
                reply = str(error) if kind == "check" else False
            signal.setitimer(signal.ITIMER_PROF, 0)
            print(json.dumps(reply), file=replies, flush=True)


def work(cpu_seconds: float) -> None:
    logging.disable(logging.CRITICAL)
    replies, sys.stdout = sys.stdout, sys.stderr
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    if not works():
        raise SystemExit("math-verify does not work here: pip install 'math-verify[antlr4_13_2]'")
    print("ready", file=replies, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody reads its messages from here on
    while True:
        if not os.fork():
            answer_questions(cpu_seconds, replies)
            os._exit(0)
        if not os.WIFSIGNALED(os.wait()[1]):
            return  # no more questions
        print('"timeout"', file=replies, flush=True)
