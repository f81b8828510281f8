"""Log-probs of an update: padded batches, the head in chunks, checked against the plain forward."""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from engine import Refused, first_line
from engine.checks import name_of, plain_logits, probes, same_positions, truth

CHUNK_LOGITS = 1 << 25  # 128 MiB in float32


def token_logprobs(model, input_ids, where, temperature: float = 1.0, way: str = "chunks", also: int | None = None):
    """Log-probs of the tokens at `where` given all before them, under softmax(logits / temperature).

    input_ids [B, T], padded on the right; where [B, T] bool, never the first column. Returns (log-probs [N], entropies
    [N], no gradient), N = where.sum(), in row-major order; with `also`, a token, log-probs [N, 2]: the second column is
    what that token would have had at the same places. The logits are the model's own, its scaling and capping
    included. By the way of "chunks" they exist for CHUNK_LOGITS / vocabulary tokens at a time and are computed again in
    the backward pass: no [tokens, vocabulary] tensor is ever kept. Dropout and other noise are off.
    """
    without_noise(model)
    where = where[:, 1:]
    targets = input_ids[:, 1:][where]
    if also is not None:
        targets = torch.stack([targets, torch.full_like(targets, also)], -1)
    if way == "rows" or input_ids.shape[1] > same_positions(model):
        rows = zip(input_ids, where, targets.split(where.sum(1).tolist()))
        parts = [score_tokens(row_logits(model, *row), tokens, temperature) for *row, tokens in rows if len(tokens)]
    else:
        output = body_of(model)(input_ids=input_ids, use_cache=False)
        chunk = max(1, CHUNK_LOGITS // model.get_output_embeddings().weight.shape[0])

        def score_chunk(states, tokens):
            return score_tokens(head(model, states, type(output)), tokens, temperature)

        chunks = zip(output.last_hidden_state[:, :-1][where].split(chunk), targets.split(chunk))
        parts = [checkpoint(score_chunk, *both, use_reentrant=False) for both in chunks]
    logprobs, entropies = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropies)


def row_logits(model, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Logits before the tokens ids[1:][wanted] of one row, without its padding: for models that differ in a batch."""
    end = int(wanted.nonzero().max()) + 1
    return plain_logits(model, ids[: end + 1])[:-1][wanted[:end]]


def body_of(model):
    """The part of a model that gives the last hidden states."""
    return model.get_decoder() if model.base_model is model else model.base_model


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


def update_gaps(model, way: str) -> torch.Tensor:
    """How far the log-probs of an update are off on the probes, [N] in nats; for `fastest`."""
    rows, device = probes(model), model.device
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *row[:1] * (width - len(row))] for row in rows], device=device)
    where = torch.tensor([[0 < i < len(row) for i in range(width)] for row in rows], device=device)
    expected = [truth(model, r).gather(-1, torch.tensor(r[1:], device=device)[:, None])[:, 0] for r in rows]
    return token_logprobs(model, ids, where, way=way)[0] - torch.cat(expected)


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
