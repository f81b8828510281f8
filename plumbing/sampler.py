"""Token ids in, token ids and their log-probs out, whichever engine answers.

A token that was drawn is never decoded and encoded again; its log-probability is that of the distribution it was drawn
from (temperature and top-p included).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plumbing.hf_engine import TransformersEngine, self_check
from plumbing.models import (
    Completion,
    context_length,
    load_model,
    pick_device,
    pick_dtype,
    stop_token_ids,
    text_and_offsets,
)
from plumbing.runs import fail, first_line, is_served, resolve_model
from plumbing.served_engine import ServedEngine
from plumbing.training import ranks
from plumbing.vllm_engine import VllmEngine, vllm_or_why_not


class Sampler:
    """What the scripts call: `generate`, whichever engine answers; and for a model in training `pause` before an
    update and `sync` after it.

    A draw depends on (seed, sample number, position) alone, so with the transformers engine a result does not depend on
    what else is in the batch, up to rounding of the logits (1e-6 in float32), which flips about one draw in a million.
    In bf16 vLLM's rounding varies with the batch by more than that. One seed gives each engine different draws.
    """

    def __init__(self, engine: TransformersEngine | VllmEngine | ServedEngine, tokenizer):
        self.engine, self.tokenizer = engine, tokenizer
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
        done = self.engine.generate(prompts, limits, seeds, stop_ids, samples, temperature, top_p)
        drawn = sum(len(c.token_ids) for row in done for c in row)
        self.sampled_tokens += drawn
        self.computed_tokens += drawn + self.engine.prompt_tokens - before
        for row in done:
            for c in row:
                c.text, c.offsets = text_and_offsets(self.tokenizer, c.token_ids)
        return done

    @property
    def model(self) -> Any:
        """The transformers model, for scores that are not sampled."""
        return self.engine.model

    def pause(self) -> None:
        """Before an update: the engine gives back the memory that training needs."""
        self.engine.pause()

    def sync(self) -> None:
        """After an update: what is sampled next is sampled from the trained model's weights."""
        if isinstance(self.engine, ServedEngine) and self.engine.heir:
            self.engine = self.engine.heir
        self.engine.sync()

    def close(self) -> None:
        """Gives all memory back."""
        self.engine.close()


def context_of(args) -> int:
    """Tokens that the model of a run can attend to."""
    return args.context or context_length(args.tokenizer or args.model)


def check_lengths(args, problems: list[dict], prompts: list[list[int]], room: int) -> int:
    """Ends the run if a prompt and the `room` tokens that may follow it do not fit the model's context; returns the
    tokens of the longest."""
    context = context_of(args)
    too_long = [(len(prompt), p["id"]) for p, prompt in zip(problems, prompts) if len(prompt) + room > context]
    if too_long:
        longest, name = max(too_long)
        others = f"; so do {len(too_long) - 1} others" if len(too_long) > 1 else ""
        fail(
            f"problem {name}: prompt of {longest} tokens + {room} to generate (thought, stop phrase, answer) exceed "
            f"the model's context of {context}{others}"
        )
    return max(map(len, prompts), default=0) + room


def pick_engine(engine: str) -> str:
    """--engine auto: vLLM where it imports and has a device, else transformers; says which and why."""
    if engine == "transformers" or is_served(engine):
        return engine
    works, why = vllm_or_why_not()
    if engine == "vllm" and not works:
        fail(f"--engine vllm: {why}; --engine transformers needs nothing else")
    if engine == "auto":
        print(f"engine: {works}" if works else f"engine: transformers, as {why}")
    return "vllm" if works else "transformers"


def open_sampler(args, tokenizer, longest: int, trained=None) -> Sampler:
    """The sampler that --engine names, over --model or over the transformers model that is `trained`. `longest`: most
    tokens of a prompt and what is sampled after it."""
    dtype = pick_dtype(args.dtype)
    if is_served(args.engine):
        heir = None
        if trained is not None:
            copy = trained if ranks()[1] == 1 else load_model(args.tokenizer, pick_device(), dtype)
            heir = TransformersEngine(copy, dtype, trained=None if copy is trained else trained)
        return Sampler(
            ServedEngine(args.engine, args.model, tokenizer, args.context, args.concurrency, heir), tokenizer
        )
    if args.engine == "vllm":
        memory = 0.85 if trained is None else 0.5  # in training the model, its gradients and AdamW's moments need room
        try:
            engine = VllmEngine(resolve_model(args.model), dtype, longest, trained, memory)
        except Exception as error:
            fail(f"--engine vllm: cannot start with {args.model}: {first_line(error)}")
        if trained is not None:
            self_check(engine, trained)
        return Sampler(engine, tokenizer)
    if trained is not None and ranks()[1] == 1:
        engine = TransformersEngine(trained, dtype)
    else:
        engine = TransformersEngine(load_model(args.model, pick_device(), dtype), dtype, trained=trained)
    self_check(engine, trained or engine.model)
    return Sampler(engine, tokenizer)
