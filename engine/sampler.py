"""Token ids in, token ids and their log-probs out, whichever engine answers.

A token that was drawn is never decoded and encoded again; its log-probability is that of the distribution it was drawn
from (temperature and top-p included).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from engine import Refused, first_line, plural, telling
from engine.checks import Ways
from engine.models import load_model, pick_device, resolve_model
from engine.processes import ranks
from engine.served_engine import ServedEngine, is_served
from engine.tokens import Completion, stop_token_ids, text_and_offsets
from engine.transformers_engine import TransformersEngine, ways_of
from engine.vllm_engine import VllmEngine, vllm_or_why_not


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
        self, prompts: list[list[int]], max_tokens, seeds, n=1, temperature=1.0, top_p=1.0, first=0, stop=()
    ) -> list[list[Completion]]:
        """Samples `first … first + n - 1` of each prompt. `max_tokens`: one limit, or one for each prompt; `seeds`: a
        key of integers for each prompt; `stop`: tokens that end a completion besides the end-of-turn tokens.
        Temperature 0 is greedy; its log-probs are those of temperature 1."""
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        if not len(prompts) == len(limits) == len(seeds) or min(limits, default=1) < 1 or not all(prompts):
            raise ValueError("generate() needs a limit of at least 1 and a seed for each non-empty prompt")
        samples, stop_ids = range(first, first + n), sorted({*self.stop_ids, *stop})
        with telling(lambda: f"  sampling {plural(n * len(prompts), 'completion')}: {self.engine.progress()}"):
            done, computed = self.engine.generate(prompts, limits, seeds, stop_ids, samples, temperature, top_p)
        drawn = sum(len(c.token_ids) for row in done for c in row)
        self.sampled_tokens += drawn
        self.computed_tokens += drawn + computed
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

    def counts(self) -> np.ndarray:
        """[sampled tokens, computed tokens, seconds] so far: a difference is what was spent in between."""
        return np.array([self.sampled_tokens, self.computed_tokens, time.time()])

    @property
    def ways(self) -> Ways:
        """What the start check found of the model that is trained or sampled in this process."""
        return (self.successor or self.engine).ways

    def pause(self) -> None:
        """Before an update: the engine gives back the memory that training needs."""
        self.engine.pause()

    def sync(self) -> None:
        """After an update: what is sampled next is sampled from the trained model's weights. With transformers that
        model samples itself (sharded: a copy is refilled); vLLM reloads the weights in place and empties its prefix
        cache. Should that go wrong, `training.check_gap` ends the next update."""
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


def open_sampler(engine: str, model: str, tokenizer, dtype, longest: int, trained=None, served=None, scores=True):
    """The sampler over the model of that name, or over the transformers model that is `trained`. `longest`: most tokens
    of a prompt and what is sampled after it; `served`: a `Served`, where `engine` is the address of a server;
    `scores`: False where `Sampler.score` is never called: vLLM then needs no whole copy of a model that is sharded."""

    def transformers_engine(weights: str, samples: bool = True) -> TransformersEngine:
        if trained is not None and (ranks()[1] == 1 or not (samples or scores)):
            return TransformersEngine(trained, dtype, ways=ways_of(trained, dtype, samples=samples))
        copy = load_model(weights, pick_device(), dtype)
        return TransformersEngine(copy, dtype, trained, ways_of(copy, dtype, trained, samples))

    if served:
        successor = transformers_engine(served.weights) if trained is not None else None
        return Sampler(ServedEngine(engine, served, tokenizer), tokenizer, successor)
    if engine != "vllm":
        return Sampler(transformers_engine(model), tokenizer)
    scorer = transformers_engine(model, samples=False) if trained is not None else None
    try:
        return Sampler(VllmEngine(resolve_model(model), dtype, longest, scorer), tokenizer)
    except Exception as error:
        raise Refused(f"--engine vllm: cannot start with {model}: {first_line(error)}") from error
