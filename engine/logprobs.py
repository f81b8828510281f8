"""Log-probs of an update: padded batches, the head in chunks, checked against the plain forward."""

from __future__ import annotations

import contextlib
import math
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from engine import Refused, first_line, say_once
from engine.checks import name_of, off, plain_logits, probes, rms, same_positions, tolerance, truth, with_short_windows

CHUNK_LOGITS = 1 << 25  # 128 MiB in float32


def token_logprobs(
    model,
    input_ids: torch.Tensor,
    where: torch.Tensor,
    temperature: float = 1.0,
    way: str = "chunks",
    also: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the tokens at `where` given all before them, under softmax(logits / temperature).

    input_ids [B, T], padded on the right; where [B, T] bool, never the first column. Returns (log-probs [N], entropies
    [N], no gradient), N = where.sum(), in row-major order; with `also`, a token, log-probs [N, 2]: the second column is
    what that token would have had at the same places. The logits are the model's own, its scaling and capping
    included. By the way of "chunks" they exist for CHUNK_LOGITS / vocabulary tokens at a time and are computed again in
    the backward pass: no [tokens, vocabulary] tensor is ever kept. Dropout and other noise are off.
    """
    without_noise(model)
    if way == "rows" or input_ids.shape[1] > same_positions(model):
        return row_logprobs(model, input_ids, where, temperature, also)
    output = body_of(model)(input_ids=input_ids, use_cache=False)
    before, target = output.last_hidden_state[:, :-1][where[:, 1:]], beside(input_ids[:, 1:][where[:, 1:]], also)
    chunk = max(1, CHUNK_LOGITS // model.get_output_embeddings().weight.shape[0])

    def score_chunk(states, tokens):
        return score_tokens(head(model, states, type(output)), tokens, temperature)

    parts = [
        checkpoint(score_chunk, states, tokens, use_reentrant=False)
        for states, tokens in zip(before.split(chunk), target.split(chunk))
    ]
    logprobs, entropies = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropies)


def body_of(model):
    """The part of a model that gives the last hidden states."""
    return model.get_decoder() if model.base_model is model else model.base_model


def beside(tokens: torch.Tensor, also: int | None) -> torch.Tensor:
    """Tokens [N], or [N, 2] with the token `also` beside each."""
    return tokens if also is None else torch.stack([tokens, torch.full_like(tokens, also)], -1)


def score_tokens(logits: torch.Tensor, tokens: torch.Tensor, temperature: float):
    """(log-probs of the tokens, [N] or [N, K], under logits [N, vocabulary], entropies [N]). A few rows at a time
    (4 MiB), since memory of that size is reused: the fresh pages of larger tensors cost more than their arithmetic. The
    entropies come last: the recomputation in the backward pass stops before them."""
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    few = max(1, (1 << 20) // logits.shape[-1])
    logprobs = [rows.log_softmax(-1) for rows in logits.split(few)]
    chosen = [rows.gather(-1, ids.view(len(ids), -1)).view_as(ids) for rows, ids in zip(logprobs, tokens.split(few))]
    with torch.no_grad():
        entropies = [-(rows.exp() * rows).sum(-1) for rows in logprobs]
    return torch.cat(chosen), torch.cat(entropies)


def head(model, states: torch.Tensor, kind: type) -> torch.Tensor:
    """Logits [N, vocabulary] of last hidden states [N, width]: the model's own forward around a body that returns them,
    in an output of type `kind`, so that whatever follows (the head, scaling, capping) is the model's own."""
    body = body_of(model)
    body.forward = lambda *_, **__: kind(last_hidden_state=states[None])
    try:
        return model.forward(input_ids=states.new_zeros(1, len(states), dtype=torch.long)).logits[0]
    finally:
        del body.forward


def row_logprobs(model, input_ids, where, temperature, also=None):
    """As `token_logprobs`, for models whose results differ in a batch: one forward per row, without padding."""
    parts = []
    for ids, wanted in zip(input_ids, where):
        if wanted.any():
            end = int(wanted.nonzero().max()) + 1
            ids, wanted = ids[:end], wanted[1:end]
            target = beside(ids[1:][wanted], also)
            parts.append(score_tokens(plain_logits(model, ids)[:-1][wanted], target, temperature))
    logprobs, entropies = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropies)


def without_noise(model) -> None:
    """Switches off what train mode switches on (dropout, noise of routers). Gradient checkpointing, which transformers
    does only in train mode, stays: a layer is in that mode only until its computation begins."""
    model.eval()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            layer.training = torch.is_grad_enabled()
            layer.__dict__["_gradient_checkpointing_func"] = partial(recompute_later, layer)


def recompute_later(layer, call, *args):
    def in_eval_mode(*args):
        layer.training = False
        try:
            return call(*args)
        finally:
            layer.training = True

    return checkpoint(in_eval_mode, *args, use_reentrant=False)


@torch.no_grad()
@with_short_windows
def way_to_update(model) -> tuple[str, str]:
    """(`Ways.update`, a note if it is the slow one)."""
    without_noise(model)
    rows, device = probes(model), model.device
    limit, width = tolerance(model, rows[0]), max(map(len, rows))
    ids = torch.tensor([[*row, *row[:1] * (width - len(row))] for row in rows], device=device)
    where = torch.tensor([[0 < i < len(row) for i in range(width)] for row in rows], device=device)
    expected = torch.cat([truth(model, r).gather(-1, torch.tensor(r[1:], device=device)[:, None])[:, 0] for r in rows])
    gaps = {}
    for way in ("chunks", "rows"):
        gaps[way] = math.inf
        with contextlib.suppress(Exception):
            gaps[way] = rms(token_logprobs(model, ids, where, way=way)[0] - expected)
        if gaps[way] <= limit:
            break
    else:
        raise Refused(f"{name_of(model)}: its log-probs depend on how often they are asked for ({off(gaps['rows'])})")
    if same_positions(model) < math.inf:
        say_once(
            f"warning: {name_of(model)}: beyond {same_positions(model)} tokens its positions depend on the length of "
            "the whole sequence, so sampler and trainer differ there; keep prompt and completion below it"
        )
    return way, "" if way == "chunks" else f"an update takes one row at a time (batches: {off(gaps['chunks'])})"


def check_training(model, score) -> None:
    """Refuses a model if `score`, its `token_logprobs`, has no backward pass."""
    ids = torch.tensor([probes(model)[0]], device=model.device)
    where = torch.ones_like(ids, dtype=torch.bool)
    where[:, 0] = False
    try:
        score(ids, where)[0].sum().backward()
    except Exception as error:
        raise Refused(f"{name_of(model)} cannot be trained: its backward pass fails: {first_line(error)}") from error
    model.zero_grad()
