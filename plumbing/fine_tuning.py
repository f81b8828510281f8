"""Supervised fine-tuning on weighted tokens, in place and over all processes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from plumbing import models, training
from plumbing.runs import fail

Example = tuple[list[int], int, list[float]]  # token ids, the first trained position, the weight of each trained token


def fine_tune(args, folder: Path, model, tokenizer, examples: list[Example]) -> dict:
    """--epochs passes over the examples, resumed from any checkpoint in `folder`. Returns steps and the last loss."""
    if training.ranks()[0] == 0:
        folder.mkdir(exist_ok=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    state = training.begin_or_resume(folder, model, optimizer, {"step": 0, "loss": 0.0})
    steps_per_epoch = math.ceil(len(examples) / args.batch_size)
    steps = steps_per_epoch * args.epochs

    def share_done(state: dict) -> float:
        return state["step"] / steps

    def step(state: dict) -> tuple[dict, dict, str]:
        epoch, number = divmod(state["step"], steps_per_epoch)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(examples))
        batch = [examples[i] for i in order[number::steps_per_epoch]]  # an epoch's batches are about equal in size
        loss = train_step(args, model, optimizer, batch)
        if not math.isfinite(loss):
            fail(f"step {state['step']} of the fine-tuning in {folder}: the loss is {loss}")
        state = {"step": state["step"] + 1, "loss": loss}
        shown = state["step"] % max(1, steps // 5) == 0
        text = f"step {state['step']} of {steps}  loss {loss:.4f}" if shown else ""
        return state, {**state, "examples": len(batch)}, text

    state = training.train_loop(args, folder, model, tokenizer, optimizer, state, share_done, step)
    model.eval()
    return {"steps": steps, "loss": state["loss"]}


def train_step(args, model, optimizer, batch: list[Example]) -> float:
    """One optimiser step on -Σ w log p / Σ w over the trained tokens of the whole batch: a token counts the same
    however the batch is split into micro-batches and over processes."""
    rank, world = training.ranks()
    score = training.scorer(model, models.token_logprobs)
    total_weight = sum(sum(weights) for _, _, weights in batch)
    batches = list(training.micro_batches(batch[rank::world], args.max_tokens_per_batch, model.device))
    optimizer.zero_grad()
    total = 0.0
    for _, ids, where, weights in training.same_number(batches, batch[0], model.device):
        with models.autocast(models.pick_dtype(args.dtype)):
            logprobs, _ = score(ids, where)
        loss = -(weights * logprobs).sum() / total_weight
        (loss * world).backward()  # FSDP takes the mean of the processes' gradients
        total += loss.item()
    training.optimizer_step(model, optimizer, args.max_grad_norm)
    return training.sum_over_ranks([total])[0]
