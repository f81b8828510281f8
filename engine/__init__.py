"""Tokens in, tokens and their log-probs out. Plain values only: nothing here knows of flags, folders or runs.

sampler.py               what the scripts call, over one of the engines:
transformers_engine.py     transformers, in batches that share prefixes
vllm_engine.py             vLLM in this process
served_engine.py           a model behind a server
prefixes.py              rows that share prefixes, and the likelihoods read off them
logprobs.py              log-probs of an update
checks.py                the plain forward, which every other way is measured against
tokens.py                prompts, the text of tokens
thoughts.py              the marks of a thought, where it ends, chat templates
models.py                tokenizers, configurations, weights
processes.py             several processes
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache


class Refused(Exception):
    """What is asked for cannot be had, in one line; a script prints it and ends with exit code 2."""


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def plural(count: int, what: str) -> str:
    """1 step, 4,000 steps."""
    return f"{count:,} {what}{'s' * (count != 1)}"


@lru_cache
def say_once(text: str) -> None:
    print(text, flush=True)


FIRST, QUIET = 8, 25  # seconds of work without a line of progress: before the first one, before any other
last_told = 0.0


def tell(text: str) -> None:
    """Prints a line of progress."""
    global last_told
    last_told = time.monotonic()
    print(text, flush=True)


def is_quiet() -> bool:
    """Is it so long since a line of progress that there should be another?"""
    return time.monotonic() >= last_told + QUIET


@contextlib.contextmanager
def telling(progress: Callable[[], str]) -> Iterator[None]:
    """Tells `progress()` whenever it gets quiet during the work inside, from a thread: it may be a single call."""
    global last_told
    last_told = last_told or time.monotonic() - QUIET + FIRST
    done = threading.Event()

    def watch() -> None:
        while not done.wait(max(0.1, last_told + QUIET - time.monotonic())):
            if is_quiet():
                with contextlib.suppress(OSError):  # nobody reads: the main thread is told so when it prints
                    tell(progress())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
