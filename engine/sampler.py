"""Token ids in, token ids and their log-probs out, whichever engine answers.

A token that was drawn is never decoded and encoded again; its log-probability is that of the distribution it was drawn
from (temperature and top-p included).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine import Refused, first_line, plural, telling
from engine.checks import Ways
from engine.models import load_model, pick_device, resolve_model
from engine.processes import ranks
from engine.served_engine import Served, ServedEngine, is_served
from engine.tokens import Completion, stop_token_ids, text_and_offsets
from engine.transformers_engine import TransformersEngine
from engine.vllm_engine import VllmEngine, vllm_or_why_not


@dataclass
class Spent:
    """What was drawn, what was run through the model (prompts, shared parts once, and drawn tokens), and the time."""

    sampled_tokens: int = 0
    computed_tokens: int = 0
    seconds: float = 0.0


class Sampler:
    """What the scripts call: `generate`, whichever engine answers; and for a model in training `pause` before an
    update and `sync` after it.

    A draw depends on (seed, sample number, position) alone, so with the transformers engine a result does not depend on
    what else is in the batch, up to rounding of the logits (1e-6 in float32), which flips about one draw in a million.
    In bf16 vLLM's rounding varies with the batch by more than that. One seed gives each engine different draws.
    """

    def __init__(self, engine: TransformersEngine | VllmEngine | ServedEngine, tokenizer, successor=None):
        """`successor`: the engine that samples once a model is trained, since a server keeps its weights."""
        self.engine: Any = engine
        self.tokenizer, self.successor = tokenizer, successor
        self.stop_ids = stop_token_ids(tokenizer, engine.generation_config)
        self.sampled_tokens = 0  # drawn
        self.computed_tokens = 0  # run through the model: prompts (shared parts once) and drawn tokens

    def generate(
        self,
        prompts: list[list[int]],
        max_tokens: int | list[int],
        seeds: list[tuple[int, ...]],
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        first: int = 0,
        stop: Sequence[int] = (),
    ) -> list[list[Completion]]:
        """Samples `first … first + n - 1` of each prompt. `max_tokens`: one limit, or one for each prompt; `seeds`: a
        key of integers for each prompt; `stop`: tokens that end a completion besides the end-of-turn tokens.
        Temperature 0 is greedy; its log-probs are those of temperature 1."""
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        if not len(prompts) == len(limits) == len(seeds) or min(limits, default=1) < 1 or not all(prompts):
            raise ValueError("generate() needs a limit of at least 1 and a seed for each non-empty prompt")
        before = self.engine.prompt_tokens
        samples = range(first, first + n)
        stop_ids = sorted({*self.stop_ids, *stop})
        with telling(lambda: f"  sampling {plural(n * len(prompts), 'completion')}: {self.engine.progress()}"):
            done = self.engine.generate(prompts, limits, seeds, stop_ids, samples, temperature, top_p)
        drawn = sum(len(c.token_ids) for row in done for c in row)
        self.sampled_tokens += drawn
        self.computed_tokens += drawn + self.engine.prompt_tokens - before
        for row in done:
            for c in row:
                c.text, c.offsets = text_and_offsets(self.tokenizer, c.token_ids)
        return done

    def score(self, heads: list[list[int]], tails: list[list[int]]) -> np.ndarray:
        """log P(tail | head) of each pair, [pairs]; where the engine can, shared prefixes are computed once."""
        with telling(lambda: f"  scoring {plural(len(heads), 'answer')}"):
            scores, computed = self.engine.score(heads, tails)
        self.computed_tokens += computed
        return scores

    @contextmanager
    def counting(self) -> Iterator[Spent]:
        """`with sampler.counting() as spent:` afterwards `spent` holds what was done inside."""
        spent, began = Spent(-self.sampled_tokens, -self.computed_tokens), time.time()
        yield spent
        spent.sampled_tokens += self.sampled_tokens
        spent.computed_tokens += self.computed_tokens
        spent.seconds = time.time() - began

    @property
    def ways(self) -> Ways:
        """What the start check found of the model that is trained or sampled in this process."""
        return (self.successor or self.engine).ways

    def pause(self) -> None:
        """Before an update: the engine gives back the memory that training needs."""
        self.engine.pause()

    def sync(self) -> None:
        """After an update: what is sampled next is sampled from the trained model's weights."""
        self.engine, self.successor = self.successor or self.engine, None
        self.engine.sync()

    def close(self) -> None:
        """Gives all memory back."""
        self.engine.close()


def pick_engine(engine: str) -> str:
    """--engine auto: vLLM where it imports and has a device, else transformers; says which and why."""
    if engine == "transformers" or is_served(engine):
        return engine
    works, why = vllm_or_why_not()
    if engine == "vllm" and not works:
        raise Refused(f"--engine vllm: {why}; --engine transformers needs nothing else")
    if engine == "auto":
        print(f"engine: {works}" if works else f"engine: transformers, as {why}")
    return "vllm" if works else "transformers"


def open_sampler(
    engine: str, model: str, tokenizer, dtype: torch.dtype, longest: int, trained=None, served: Served | None = None
) -> Sampler:
    """The sampler over the model of that name, or over the transformers model that is `trained`. `longest`: most tokens
    of a prompt and what is sampled after it; `served`: what `find_served` says of a model at the address `engine`."""

    def transformers_engine(weights: str) -> TransformersEngine:
        if trained is not None and ranks()[1] == 1:
            return TransformersEngine(trained, dtype)
        return TransformersEngine(load_model(weights, pick_device(), dtype), dtype, trained)

    if served:
        successor = transformers_engine(served.weights) if trained is not None else None
        return Sampler(ServedEngine(engine, served, tokenizer), tokenizer, successor)
    if engine != "vllm":
        return Sampler(transformers_engine(model), tokenizer)
    memory = 0.85 if trained is None else 0.5  # in training the model, its gradients and AdamW's moments need room
    try:
        return Sampler(VllmEngine(resolve_model(model), dtype, longest, trained, memory), tokenizer)
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"--engine vllm: cannot start with {model}: {first_line(error)}") from error
