"""A model behind a server (vLLM, SGLang, any completions endpoint like OpenAI's) as a sampler, when only sampling.
Token ids in, token ids and log-probs out: nothing is tokenized twice. A server that knows only text gets text."""

from __future__ import annotations

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import urllib3
from urllib3.exceptions import HTTPError

from engine import Refused, first_line, say_once
from engine.models import load_generation_config
from engine.tokens import Completion, stop_token_ids


class Retry(urllib3.Retry):
    """Says that a server is asked again."""

    def increment(self, method=None, url=None, response=None, error=None, _pool: Any = None, _stacktrace=None):
        why = f"status {response.status}" if response is not None else type(error).__name__
        say_once(f"warning: {_pool.host}:{_pool.port} is busy or away ({why}); it is asked again")
        return super().increment(method, url, response, error, _pool, _stacktrace)


RETRIES = Retry(backoff_factor=0.5, backoff_max=30, retry_after_max=60, raise_on_status=False)
RETRIES = RETRIES.new(allowed_methods=None, status_forcelist=(408, 429, 500, 502, 503, 504))
# Beyond OpenAI's fields: ids are returned, </think> is kept, a model's own defaults do not override the flags.
EXTRAS = {"return_token_ids": True, "skip_special_tokens": False, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
PROBE = "Wait, 7 · 8 = 56."


@dataclass(frozen=True)
class Served:
    """A served model: its name there, the Hub id or folder that it was loaded from, the most tokens of a prompt and its
    completion where known, and how many requests it is sent at a time."""

    name: str
    weights: str
    context: int | None = None
    concurrency: int = 64


def is_served(engine: str) -> bool:
    return engine.startswith("http")


def connect(connections: int = 1) -> urllib3.PoolManager:
    """A pool of connections, their certificates always verified, with the key in OPENAI_API_KEY."""
    key = "".join(os.environ.get("OPENAI_API_KEY", "").split())
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return urllib3.PoolManager(maxsize=connections, block=True, headers=headers)


def ask(pool: urllib3.PoolManager, url: str, body: dict | None = None, tries: int = 8) -> dict:
    """The reply to a GET, or to a POST of `body`; retried for a minute while the server is busy or away. Raises
    HTTPError(the reason in one line, the status or 0) if there is none."""
    wait = urllib3.Timeout(connect=8, read=300 + body["max_tokens"] / 2 if body else 8)  # half a second a token
    how = {"json": body, "timeout": wait, "retries": RETRIES.new(total=tries - 1)}
    try:
        reply = pool.request("POST" if body else "GET", url, **how)
        if reply.status == 200:
            return reply.json()
    except (HTTPError, ValueError) as error:
        raise HTTPError(f"{url}: {first_line(getattr(error, 'reason', None) or error)}", 0) from None
    reason = f"{reply.status} {' '.join(reply.data.decode(errors='replace').split())[:300]}"
    if reply.status in (401, 403):  # its message may quote the key
        reason = "refuses the key in OPENAI_API_KEY" if pool.headers else "wants a key: set OPENAI_API_KEY"
    raise HTTPError(f"{url}: {reason}", reply.status)


def find_served(url: str, model: str | None) -> Served:
    """The model of that name, or the only one there is. Refused: a server out of reach, a wrong key, another name."""
    try:
        served = {m["id"]: m for m in ask(connect(), f"{url}/models", tries=3).get("data") or []}
    except HTTPError as error:
        if error.args[1] != 404 or not model:
            raise Refused(f"--engine {error.args[0]}") from error
        return Served(model, model)  # a server that lists no models
    name = model or ", ".join(name for name, entry in served.items() if not entry.get("parent"))  # not its adapters
    if name not in served:
        raise Refused(f"--model {model or 'is not given'}: {url} serves {', '.join(list(served)[:8])}")
    return Served(name, served[name].get("root") or name, served[name].get("max_model_len"))


class ServedEngine:
    """A served model as a sampler; no script asks it for likelihoods."""

    def __init__(self, url: str, served: Served, tokenizer):
        self.url, self.served, self.tokenizer = url, served, tokenizer
        self.pool, name = connect(served.concurrency), served.name
        self.generation_config, self.ended = load_generation_config(tokenizer.name_or_path), 0
        for self.extras in (EXTRAS, {}):
            try:
                (probe, _, usage), cold = self.complete(PROBE, 1), self.complete(PROBE, 1, temperature=0.01)[1]
                break
            except HTTPError as error:
                if error.args[1] not in (400, 422) or not self.extras:
                    raise Refused(f"--engine {error.args[0]}") from error
        ours, theirs = tokenizer.encode(PROBE, add_special_tokens=False), probe.get("prompt_token_ids") or []
        self.ids = bool(theirs and probe.get("token_ids"))
        if self.ids and theirs[-len(ours) :] != ours:
            raise Refused(f"--tokenizer {tokenizer.name_or_path}: {name} at {url} has another one")
        notes = "" if usage.get("prompt_tokens_details") else "; cached tokens are not reported, so count as computed"
        notes += "; log-probs are of temperature 1" * (sum(cold) < -0.1)
        print(f"engine: {name} at {url}, {served.concurrency} requests at a time{notes}")
        if not self.ids:
            print(f"warning: {url} takes and gives only text; its tokens may not be those that were drawn")

    def progress(self) -> str:
        return f"{self.ended:,} done"

    def complete(self, prompt: list[int] | str, limit: int, **how) -> tuple[dict, list[float], dict]:
        """(choice, its log-probs, usage) of one request."""
        body = {"model": self.served.name, "prompt": prompt, "max_tokens": limit, "logprobs": 1, **self.extras, **how}
        reply = ask(self.pool, f"{self.url}/completions", body)
        choice = (reply.get("choices") or [{}])[0]
        if choice.get("finish_reason") not in ("stop", "length"):
            raise HTTPError(f"{self.url}: broke off a completion: {str(reply)[:200]}", 0)  # as when it shuts down
        return choice, (choice.get("logprobs") or {}).get("token_logprobs") or [], reply.get("usage") or {}

    def generate(self, prompts, limits, seeds, stop_ids, samples: range, temperature: float, top_p: float):
        """One request a sample. Of a trace's prefixes the longest goes first: the cache then holds the others."""
        most = max((len(prompt) + limit for prompt, limit in zip(prompts, limits)), default=0)
        if most > (self.served.context or most):  # the server might shorten the limit silently
            raise ValueError(f"{most} tokens of a prompt and its completion exceed the server's {self.served.context}")
        order, self.ended = sorted(range(len(prompts)), key=prompts.__getitem__, reverse=True), 0
        jobs = [(prompts[p], limits[p], (*seeds[p], s), stop_ids, temperature, top_p) for p in order for s in samples]
        drawn = self.at_once(self.draw, jobs)
        completions = iter(completion for completion, _ in drawn)
        rows = {p: [next(completions) for _ in samples] for p in order}
        return [rows[p] for p in range(len(prompts))], sum(computed for _, computed in drawn)

    def draw(self, prompt: list[int], limit: int, key: tuple[int, ...], stop_ids: list[int], temperature, top_p):
        """(a completion with the token that ended it, as other engines give it; the prompt tokens computed)"""
        how = {"temperature": temperature, "top_p": top_p, "seed": zlib.crc32(np.array(key).tobytes())}
        how |= {"stop_token_ids": stop_ids} if self.extras else {}
        how |= {} if self.ids else {"stop": [self.tokenizer.decode([i]) for i in stop_ids][:4]}  # OpenAI takes four
        sent = prompt if self.ids else self.tokenizer.decode(prompt).removeprefix(self.tokenizer.bos_token or "")
        choice, logprobs, usage = self.complete(sent, limit, **how)
        self.ended += 1
        ids = choice["token_ids"] if self.ids else self.tokenizer.encode(choice["text"], add_special_tokens=False)
        mean = float(np.mean(logprobs or 0.0))  # votes are weighted by it
        logprobs = logprobs if len(logprobs) == len(ids) else [mean] * len(ids)
        if choice["finish_reason"] == "stop" and (not ids or ids[-1] not in stop_ids):
            turn = stop_token_ids(self.tokenizer, self.generation_config)
            ids, logprobs = [*ids, *([i for i in stop_ids if i not in turn] or turn)[:1]], [*logprobs, mean]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Completion(ids, logprobs, choice["finish_reason"]), usage.get("prompt_tokens", len(prompt)) - cached

    def at_once(self, function, requests: list[tuple]) -> list:
        """The results in order; the first request that fails for good ends the run."""
        threads = ThreadPoolExecutor(self.served.concurrency)
        try:
            return list(threads.map(lambda request: function(*request), requests))
        except HTTPError as error:
            raise Refused(f"--engine {error.args[0]}; what is recorded stays, --resume goes on from there") from error
        finally:
            threads.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C no request is waited for

    def pause(self) -> None: ...

    def close(self) -> None:
        self.pool.clear()
