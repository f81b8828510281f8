"""Sequences that share prefixes, as one row without repetition; the likelihoods read off such rows."""

from __future__ import annotations

from bisect import bisect_left
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask

from engine.checks import not_finite, probes, same_positions, truth
from engine.logprobs import body_of, head
from engine.models import autocast


@dataclass
class Pack:
    """Token sequences that share prefixes, as one row without repetition. `paths[s]` are the columns of the row that
    hold sequence s, in order; a token sees the earlier tokens of its own path and nothing else."""

    token_ids: list[int]
    positions: list[int]
    paths: dict[int, list[int]]

    @property
    def longest(self) -> int:
        return max(self.positions) + 1


def pack_prefixes(sequences: list[list[int]], most: int | None = None) -> list[Pack]:
    """Packs sequences that share at least half of their tokens with a neighbour in sorted order, `most` to a pack.

    Sorting makes the sequences a depth-first walk of their prefix tree, so what a sequence shares with any earlier one
    it shares with the one before it: the tokens to compute grow linearly in traces and boundaries.
    """
    packs: list[Pack] = []
    before: list[int] = []
    previous = 0
    for s in sorted(range(len(sequences)), key=sequences.__getitem__):
        ids = sequences[s]
        shared = next((i for i, (a, b) in enumerate(zip(before, ids)) if a != b), min(len(before), len(ids)))
        if not packs or 2 * shared < len(ids) or len(packs[-1].paths) == most:
            packs.append(Pack([], [], {}))
            shared, path = 0, []
        else:
            path = packs[-1].paths[previous][:shared]
        path = path + list(range(len(packs[-1].token_ids), len(packs[-1].token_ids) + len(ids) - shared))
        packs[-1].token_ids += ids[shared:]
        packs[-1].positions += range(shared, len(ids))
        packs[-1].paths[s] = path
        before, previous = ids, s
    return packs


def pack_tensors(packs: list[Pack], device):
    """(ids [B, L], mask [B, 1, L, L] or None where no path branches, positions [B, L])."""
    width = max(len(pack.token_ids) for pack in packs)
    ids = torch.zeros(len(packs), width, dtype=torch.long)
    positions = torch.zeros(len(packs), width, dtype=torch.long)
    for b, pack in enumerate(packs):
        ids[b, : len(pack.token_ids)] = torch.tensor(pack.token_ids)
        positions[b, : len(pack.positions)] = torch.tensor(pack.positions)
    if all(path == list(range(len(path))) for pack in packs for path in pack.paths.values()):
        return ids.to(device), None, torch.arange(width, device=device)[None].expand(len(packs), -1)
    mask = torch.eye(width, dtype=torch.bool).repeat(len(packs), 1, 1)
    for b, pack in enumerate(packs):
        seen = 0
        for path in pack.paths.values():  # in the order of packing: the tokens from `seen` on are new
            shared, columns = bisect_left(path, seen), torch.tensor(path)
            new = torch.ones(len(path) - shared, len(path), dtype=torch.bool)
            mask[b, columns[shared:, None], columns] = new.tril(shared)
            seen = max(seen, path[-1] + 1)
    return ids.to(device), mask[:, None].to(device), positions.to(device)


def packed_states(model, packs: list[Pack], cache=None):
    """The output of the model's body for ids [packs, columns], its own masks taken over positions and within paths."""
    ids, paths, positions = pack_tensors(packs, model.device)
    body = partial(body_of(model), ids, position_ids=positions, use_cache=cache is not None, **kept_in(model, cache))
    if paths is None:
        return body()

    def along_paths(stock, *, mask_function, **options):
        if stock is sdpa_mask and mask_function is causal_mask_function:
            return paths

        def inside(b, h, q, kv):
            path: Any = paths
            path = path if q.ndim == 4 else path[b, 0, q, kv]  # flex attention asks for one pair at a time
            return mask_function(b, h, positions[b, q], positions[b, kv]) & path

        return stock(mask_function=inside, **{**options, "attention_mask": None, "allow_is_causal_skip": False})

    with own_masks(model, along_paths):  # without a mask, positions that restart would pass for new sequences
        return body(attention_mask=torch.ones_like(ids))


def kept_in(model, cache) -> dict:
    """The argument of a forward pass that takes a cache; transformers before 5.24 has another name for it."""
    return {"cache" if "cache" in signature(model.forward).parameters else "past_key_values": cache}


@contextmanager
def own_masks(model, make):
    """Inside, `make(stock, mask_function=…, …)` makes the masks that the model asks transformers for: the model says
    which one each layer needs (causal, with a window, in chunks: `mask_function`), and `stock`, transformers' own
    function, in which form its attention takes it."""
    name = model.config.get_text_config()._attn_implementation
    stock = ALL_MASK_ATTENTION_FUNCTIONS[name]
    ALL_MASK_ATTENTION_FUNCTIONS[name] = partial(make, stock)
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS[name] = stock


@torch.inference_mode()
def score_sequences(model, dtype: torch.dtype, way: str, heads: list[list[int]], tails: list[list[int]]):
    """(log P(tail | head) of each pair [pairs], tokens computed); by the way "shared", shared prefixes once."""
    model.eval()
    longest = max((len(h) + len(t) for h, t in zip(heads, tails)), default=0)
    shared = way == "shared" and longest <= same_positions(model)
    with autocast(dtype):
        sums, computed = (packed_logprobs if shared else plain_logprobs)(model, heads, tails)
    if np.isnan(sums).any():
        raise not_finite()
    return sums, computed


def packed_logprobs(model, heads, tails) -> tuple[np.ndarray, int]:
    """As `score_sequences`: batches of packs, the widest first."""
    out, computed = np.zeros(len(heads)), 0
    packs = sorted(pack_prefixes([h + t for h, t in zip(heads, tails)]), key=lambda p: len(p.token_ids))
    while packs:
        batch = [packs.pop()]
        width = len(batch[0].token_ids)
        while packs and (len(batch) + 1) * width <= 16_384:
            batch.append(packs.pop())
        output = packed_states(model, batch)
        computed += sum(len(pack.token_ids) for pack in batch)
        items = [  # of each token of a tail: its sequence, itself, where the token before it stands
            (s, token, b, column)
            for b, pack in enumerate(batch)
            for s, path in pack.paths.items()
            for token, column in zip(tails[s], path[-len(tails[s]) - 1 : -1])
        ]
        owners, target, row, column = torch.tensor(items, device=model.device).T
        logits = head(model, output.last_hidden_state[row, column], type(output)).float()
        logprobs = logits.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
        np.add.at(out, owners.cpu().numpy(), logprobs.double().cpu().numpy())
    return out, computed


def plain_logprobs(model, heads, tails) -> tuple[np.ndarray, int]:
    """As `score_sequences`, one plain forward a pair."""
    out = np.zeros(len(heads))
    for i, (first, tail) in enumerate(zip(heads, tails)):
        logprobs = truth(model, first + tail)[-len(tail) :]
        out[i] = float(logprobs.gather(-1, torch.tensor(tail, device=model.device)[:, None]).double().sum())
    return out, sum(map(len, [*heads, *tails]))


def score_gaps(model, dtype: torch.dtype, way: str) -> torch.Tensor:
    """How far likelihoods are off on the probes, [N] in nats a token; for `fastest`."""
    heads = probes(model)
    tails = [heads[-1][: 1 + i % 3] for i in range(len(heads))]
    found, expected = (score_sequences(model, dtype, of, heads, tails)[0] for of in (way, "rows"))
    return torch.from_numpy((found - expected) / [len(tail) for tail in tails])
