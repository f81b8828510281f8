"""training.py: what a training step needs beside its loss: micro-batches, schedule, checkpoints.

Apart from common.py because nothing in it is about MRT.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from runs import whole_lines, write_text


def micro_batches(examples: list[tuple[list[int], int, list[float]]], max_tokens: int, device):
    """Sorted by length and cut where rows × width would exceed `max_tokens`. An example is (ids, first trained
    place, advantage of each trained token); yields (order, ids [B, T], where [B, T], advantages [N])."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    while order:
        width, batch = len(examples[order[-1]][0]), []
        while order and (not batch or (len(batch) + 1) * width <= max_tokens):
            batch.append(order.pop())
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        where = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, i in enumerate(batch):
            tokens, first, _ = examples[i]
            ids[row, : len(tokens)] = torch.tensor(tokens)  # padded on the right: causal, needs no mask
            where[row, first : len(tokens)] = True
        advantages = torch.tensor([a for i in batch for a in examples[i][2]], dtype=torch.float32)
        yield batch, ids.to(device), where.to(device), advantages.to(device)


def learning_rate(args, done: float) -> float:
    """At a share `done` of the run: linear warm-up, then constant or a cosine to 0."""
    if done < args.warmup:
        return args.lr * max(done / args.warmup, 0.02)
    if args.schedule == "constant":
        return args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (done - args.warmup) / max(1e-9, 1 - args.warmup)))


def save_checkpoint(run: Path, model, tokenizer, optimizer, state: dict, keep: int) -> None:
    """`checkpoints/step_N`: the model in Hugging Face format and what training needs to go on. It is written under
    another name and renamed when complete; older ones go afterwards."""
    final = run / "checkpoints" / f"step_{state['step']:06d}"
    if final.exists():
        return
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    torch.save({"optimizer": optimizer.state_dict(), "state": state}, temporary / "training.pt")
    temporary.rename(final)
    for old in sorted((run / "checkpoints").glob("step_??????"))[:-keep]:
        shutil.rmtree(old)


def latest_checkpoint(run: Path) -> Path | None:
    return max((run / "checkpoints").glob("step_??????"), default=None)


def load_checkpoint(folder: Path, model, optimizer) -> dict:
    """Restores weights and optimiser in place; returns the run's state."""
    saved = torch.load(folder / "training.pt", map_location=model.device, weights_only=True)
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())
    optimizer.load_state_dict(saved["optimizer"])
    return saved["state"]


def rewind(run: Path, step: int) -> None:
    """Drops the lines of steps after the checkpoint that a run goes on from; they are made again."""
    for name, first_lost in (("metrics.jsonl", step + 1), ("records.jsonl", step), ("validation.jsonl", step + 1)):
        if (run / name).exists():
            kept = [line for line in whole_lines(run / name) if step and json.loads(line)["step"] < first_lost]
            write_text(run / name, "".join(kept))


def save_model(folder: Path, model, tokenizer) -> None:
    """The model in Hugging Face format; complete or not there."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
