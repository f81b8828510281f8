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

from functools import lru_cache


class Refused(Exception):
    """What is asked for cannot be had, in one line; a script prints it and ends with exit code 2."""


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@lru_cache
def say_once(text: str) -> None:
    print(text, flush=True)
