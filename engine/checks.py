"""The truth of a log-prob, a model's own plain forward, and which other ways of computing it are equal to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch

from engine import Refused, first_line
from engine.models import autocast, context_length


@dataclass(frozen=True)
class Ways:
    """How a model may be used: the fastest ways that the start check found equal to its plain forward.

    sample: "shared", rows share prefixes; "cached", transformers' own `generate`; "uncached", that without a cache.
    update: "chunks", padded batches, the head in chunks; "rows", one plain forward a row.
    score: "shared", sequences that share prefixes are one row; "rows", one plain forward each.
    trainable: a forward pass leaves the weights as they are (rwkv scales its own down when it evaluates).
    """

    sample: str
    update: str
    score: str
    trainable: bool = True


def plain_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """What every other way is measured against: logits [T, vocabulary] of one unpadded sequence [T]."""
    return model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], use_cache=False).logits[0]


@torch.no_grad()
def truth(model, sequence: list[int]) -> torch.Tensor:
    """Log-probs [T - 1, vocabulary] of what follows each token but the last."""
    return plain_logits(model, torch.tensor(sequence, device=model.device))[:-1].float().log_softmax(-1)


@torch.no_grad()
def fastest(model, dtype: torch.dtype, ways: Iterable[str], gaps_of: Callable) -> tuple[str | None, dict[str, str]]:
    """The first of the ways whose gaps, [N] in nats to the truth of the `probes`, have a root mean square within the
    `tolerance`, None if none has; and how far off each was that was tried."""
    off = {}
    model.eval()
    with short_windows(model), autocast(dtype):
        limit = tolerance(model, probes(model)[0])
        for way in ways:
            off[way] = "not possible with its code"
            with suppress(Exception):
                gap = rms(gaps_of(way))
                if gap <= limit:
                    return way, off
                off[way] = f"off by {gap:.3g} nats" if math.isfinite(gap) else off[way]
    return None, off


def probes(model) -> list[list[int]]:
    """Token sequences to try a model with: of several lengths, sharing prefixes."""
    config = model.config.get_text_config()
    longest = int(min(32, context_length(config) - 8, same_positions(model) - 8))
    settings = {**model.config.to_dict(), **config.to_dict()}
    special = {v for k, v in settings.items() if k.endswith(("_token_id", "_token_index")) and isinstance(v, int)}
    rng = np.random.default_rng(0)
    free = np.array([i for i in range(config.vocab_size) if i not in special])
    trunk = rng.choice(free, longest).tolist()
    cuts = (2, 7, longest // 2, longest - 3)
    return [trunk, *(trunk[:k] + rng.choice(free, 3).tolist() for k in cuts), rng.choice(free, 4).tolist()]


@contextmanager
def short_windows(model) -> Iterator[None]:
    """Inside, every attention window (or chunk) is cut to 8 tokens: the probes are longer than that, and what is right
    for one window size is right for all."""
    windows = [
        (owner, name, size)
        for owner in (model.config.get_text_config(), *model.modules())
        for name in ("sliding_window", "attention_chunk_size")
        if isinstance(size := vars(owner).get(name), int) and size > 8
    ]
    try:
        for owner, name, _ in windows:
            setattr(owner, name, 8)
        yield
    finally:
        for owner, name, size in windows:
            setattr(owner, name, size)


def tolerance(model, sequence: list[int]) -> float:
    """How far apart (root mean square, in nats) two ways of computing log-probs may be: 1e-4 in float32; in lower
    precision half a unit in the last place of the largest logit, as logits are rounded, plus four times the plain
    forward's difference between one row and eight equal ones, but at most that half unit again: a defect in batches
    looks like noise, too. NaN logits end the run."""
    ids = torch.tensor(sequence, device=model.device)
    try:
        logits = plain_logits(model, ids)
    except Exception as error:
        raise Refused(f"{name_of(model)}: its own forward fails: {first_line(error)}") from error
    one = logits.float().log_softmax(-1)
    if not one.isfinite().any(-1).all() or one.isnan().any():
        raise not_finite()
    if model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type):
        return 1e-4
    many = model(input_ids=ids.repeat(8, 1), attention_mask=torch.ones_like(ids).repeat(8, 1)).logits
    noise = (many[3].float().log_softmax(-1) - one)[:-1].gather(-1, ids[1:, None])
    rounding = torch.finfo(logits.dtype).eps * float(logits.abs().max()) / 2
    return rounding + min(rounding, 4 * rms(noise))


def not_finite() -> Refused:
    return Refused("the model's logits are not finite (a weight is NaN or infinite, or the arithmetic overflows)")


def rms(gaps: torch.Tensor) -> float:
    return float(gaps.double().square().mean().sqrt())


def same_positions(model) -> float:
    """Up to how many tokens is a position the same for every length? Some rotary embeddings change beyond a length, for
    every row of a batch with one longer row and for a sequence that grows past it: there, only plain paths hold."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in [rope, *rope.values()] if isinstance(kind, dict)]
    if not any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds):
        return math.inf
    lengths = [kind.get("original_max_position_embeddings") for kind in [*kinds, config.to_dict()]]
    return min(length for length in [*lengths, config.max_position_embeddings] if length)


def name_of(model) -> str:
    return f"{model.config.model_type} ({model.config.name_or_path or type(model).__name__})"
