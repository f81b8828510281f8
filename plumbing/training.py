"""training.py: what a training step needs besides its loss: micro-batches, schedule, several processes, checkpoints.

Apart from common.py because nothing in it is about MRT.
"""

from __future__ import annotations

import atexit
import gc
import json
import math
import os
import shutil
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from plumbing.models import CHUNK_LOGITS, autocast, check_training, load_config, pick_dtype
from plumbing.runs import (
    append_jsonl,
    duration,
    fail,
    first_line,
    metrics_reporter,
    open_run,
    whole_lines,
    write_text,
)


def micro_batches(examples: list[tuple[list[int], int, list[float]]], max_tokens: int, device):
    """Sorted by length and cut where rows × width would exceed `max_tokens`. An example is (ids, first trained
    position, advantage of each trained token); yields (order, ids [B, T], where [B, T], advantages [N])."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    while order:
        width, batch = len(examples[order[-1]][0]), []
        while order and (not batch or (len(batch) + 1) * width <= max_tokens):
            batch.append(order.pop())
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        where = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, i in enumerate(batch):
            tokens, first, _ = examples[i]
            ids[row, : len(tokens)] = torch.tensor(tokens)  # padded on the right: causal attention needs no mask
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


# ============================================================================================ several processes


def start_processes() -> tuple[int, int]:
    """(rank, number of processes) as torchrun set them; (0, 1) without it. Only rank 0 prints."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(end_processes)
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return ranks()


def end_processes() -> None:
    """Before the interpreter exits: a thread of the process group that asks for its lock after that aborts the process.
    The threads run as long as something refers to the group: here device meshes, which caches of torch keep."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for mesh in [thing for thing in gc.get_objects() if type(thing) is DeviceMesh]:
        vars(mesh).get("_pg_registry", {}).clear()
    gc.collect()


def ranks() -> tuple[int, int]:
    """(rank, number of processes) of a training under torchrun. (vLLM initialises torch.distributed in any process,
    so that alone says nothing.)"""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def shard(model, dtype: torch.dtype, scores: Callable) -> None:
    """PyTorch's FSDP2: every process keeps a share of each weight, its gradient and its moments, and gathers a layer
    when it computes it. `scores(model, …)` becomes `model.scores(…)`, which may use weights outside of `forward`."""
    low = dtype != torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if low else MixedPrecisionPolicy()
    lists = [module for module in model.base_model.modules() if isinstance(module, torch.nn.ModuleList)]
    for layer in max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=[]):  # the blocks
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.scores = types.MethodType(scores, model)
    register_fsdp_forward_method(model, "scores")


def prepare(model, dtype: torch.dtype, scores: Callable, recompute: bool) -> None:
    """Before the optimiser is made: gradient checkpointing if `recompute`, and sharding where there are processes. A
    model that cannot be trained ends the run."""
    if recompute and model.supports_gradient_checkpointing:  # the name in newer and in older transformers
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if ranks()[1] > 1:
        shard(model, dtype, scores)
    with autocast(dtype):
        check_training(model, scorer(model, scores))


def scorer(model, scores: Callable) -> Callable:
    """`scores` of a model that `prepare` has, or has not, sharded."""
    return model.scores if ranks()[1] > 1 else partial(scores, model)


def full_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of a model that may be sharded; a collective, so every process goes through all of it."""
    for name, tensor in model.state_dict().items():
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_over_ranks(values: list[float]) -> list[float]:
    """Each value summed over the processes."""
    if ranks()[1] == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    total = total.cuda() if torch.cuda.is_available() else total
    dist.all_reduce(total)
    return total.tolist()


def gather_over_ranks(items: list) -> list:
    """The lists of all processes, joined."""
    if ranks()[1] == 1:
        return items
    parts: list = [None] * ranks()[1]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def wait_for_ranks() -> None:
    if ranks()[1] > 1:
        dist.barrier()


def same_number(batches: list, example: tuple, device) -> list:
    """As many micro-batches in every process, or their collectives would wait for each other for ever: processes with
    fewer get copies of one example that count for nothing, with an empty order and advantages of 0."""
    if ranks()[1] == 1:
        return batches
    most = max(gather_over_ranks([len(batches)]))
    _, ids, where, advantages = next(micro_batches([example], 0, device))
    return batches + [([], ids, where, advantages * 0)] * (most - len(batches))


def open_run_once(args, problems: list[dict]) -> Path:
    """`open_run` by one process, once all have looked at the folder."""
    wait_for_ranks()
    if ranks()[0] == 0:
        open_run(args, problems)
    wait_for_ranks()
    return args.out


# ============================================================================================ checkpoints


def on_stop() -> list[int]:
    """Signals that ask the process to end (Ctrl-C; SIGTERM, as schedulers send before they kill) are noted here, to be
    looked at between steps. After the first a second one ends the process at once."""
    received: list[int] = []

    def note(number, _frame):
        received.append(number)
        end_on_stop()
        print(f"{signal.Signals(number).name}: finishing the step; a second one ends at once", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return received


def end_on_stop() -> None:
    """These signals end the process at once again, for work whose records are complete line by line."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def save_checkpoint(run: Path, model, tokenizer, optimizer, state: dict, keep: int) -> None:
    """`checkpoints/step_N`: the model in Hugging Face format and what training needs to go on, the same however
    many processes wrote it. It is written under another name and renamed when complete; then older ones go."""
    final = run / "checkpoints" / f"step_{state['step']:06d}"
    weights = dict(full_weights(model))
    options = StateDictOptions(full_state_dict=True, cpu_offload=ranks()[1] > 1)
    moments = get_optimizer_state_dict(model, optimizer, options=options)
    if ranks()[0] == 0 and not final.exists():
        temporary = final.with_suffix(".tmp")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            model.save_pretrained(temporary, state_dict=weights)
            tokenizer.save_pretrained(temporary)
            torch.save({"optimizer": moments, "state": state}, temporary / "training.pt")
            temporary.rename(final)
        except Exception as error:  # a full disk, most likely; each library has its own exception for it
            shutil.rmtree(temporary, ignore_errors=True)
            newest = latest_checkpoint(run)
            fail(f"{final} cannot be written: {first_line(error)}; the last good checkpoint is {newest or 'none'}")
        for old in sorted((run / "checkpoints").glob("step_??????"))[:-keep]:
            shutil.rmtree(old)
    wait_for_ranks()


def latest_checkpoint(run: Path) -> Path | None:
    return max((run / "checkpoints").glob("step_??????"), default=None)


def load_weights(model, folder: Path | str) -> None:
    """Loads weights in Hugging Face format, in place, into a model that may be sharded."""
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=ranks()[1] > 1))


def load_checkpoint(folder: Path, model, optimizer) -> dict:
    """Restores weights and optimiser in place; returns the run's state. Raises what the libraries raise for files that
    are cut, missing or another model's."""
    saved = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
    load_weights(model, folder)
    options = StateDictOptions(full_state_dict=ranks()[1] > 1)
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)
    return saved["state"]


def load_newest(run: Path, model, optimizer) -> tuple[Path, dict] | None:
    """The newest checkpoint that can be read, loaded, and the run's state there; None where there is no checkpoint.
    Ends the program where there are some and none can be read."""
    unread = ""
    for folder in sorted((run / "checkpoints").glob("step_??????"), reverse=True):
        try:
            state = load_checkpoint(folder, model, optimizer)
        except Exception as error:
            unread = f"{folder} cannot be read ({first_line(error)})"
            print(f"warning: {unread}", flush=True)
            continue
        if unread:
            print(f"going on from {folder}", flush=True)
            for newer in (run / "checkpoints").glob("step_??????"):
                if newer > folder and ranks()[0] == 0:  # its steps are repeated
                    shutil.rmtree(newer)
        return folder, state
    if unread:
        fail(f"{unread}; no other checkpoint can: --overwrite starts again")
    return None


def rewind(run: Path, step: int) -> None:
    """Drops the lines of steps after the checkpoint that a run resumes from; those steps are repeated."""
    for name in ("metrics.jsonl", "records.jsonl", "validation.jsonl"):
        if (run / name).exists():
            kept = [line for line in whole_lines(run / name) if step and json.loads(line)["step"] <= step]
            write_text(run / name, "".join(kept))


def save_model(folder: Path, model, tokenizer) -> None:
    """The model in Hugging Face format; complete or not there."""
    weights = dict(full_weights(model))
    if ranks()[0] == 0:
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    wait_for_ranks()


# ============================================================================================ the loop


def optimizer_step(model, optimizer, max_grad_norm: float) -> float:
    """A step on the clipped gradient; returns its norm before clipping. FloatingPointError if that is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if not torch.isfinite(norm):
        raise FloatingPointError(f"gradient norm is {float(norm)}")
    optimizer.step()
    return float(norm)


def batches_of(examples: list[tuple], indices, max_tokens: int, device) -> list[tuple]:
    """Micro-batches of the examples at `indices`, as many in every process; the order holds indices of `examples`."""
    chosen = [examples[i] for i in indices]
    batches = [([int(indices[i]) for i in order], *rest) for order, *rest in micro_batches(chosen, max_tokens, device)]
    return same_number(batches, examples[0], device)


def old_logprobs(args, score, examples, device) -> dict[int, torch.Tensor]:
    """Log-probs of each example's tokens before the first of several steps: the denominator of the ratio."""
    old: dict[int, torch.Tensor] = {}
    with torch.no_grad(), autocast(pick_dtype(args.dtype)):
        for order, ids, where, _ in batches_of(examples, range(len(examples)), args.max_tokens_per_batch, device):
            logprobs, _ = score(ids, where, args.temperature)
            if order:
                old.update(zip(order, logprobs.split([len(examples[i][2]) for i in order])))
    return old


def check_gap(gaps: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """|log-prob of the trainer - of the sampler| of every token; stops the run if they are not the same policy."""
    gap = torch.cat(gather_over_ranks(gaps))
    if not gap.mean() <= (0.05 if dtype == torch.bfloat16 else 1e-3):
        raise FloatingPointError(
            f"sampler and trainer differ by {gap.mean():.3g} nats on average in the log-probs of the same tokens: look "
            "at temperature, dtype and the end-of-turn tokens; after the first step with vLLM, at whether its weights "
            "and its prefix cache are those of the updated model"
        )
    return gap


def problems_of_step(problems: list[dict], count: int, step: int, seed: int) -> list[dict]:
    """Problems `step * count …` of the endless sequence of shuffled passes, each with its place in the step: a function
    of the step, so a resumed run sees the same data."""
    places = range(step * count, (step + 1) * count)
    passes = {place // len(problems) for place in places}
    orders = {number: np.random.default_rng([seed, number]).permutation(len(problems)) for number in passes}
    drawn = [problems[orders[place // len(problems)][place % len(problems)]] for place in places]
    return [{**problem, "place": place} for place, problem in enumerate(drawn)]


def begin_or_resume(folder: Path, model, optimizer, fresh: dict) -> dict:
    """The state of a training: `fresh`, or that of the last checkpoint in `folder`; lines beyond it are removed."""
    state = fresh
    if newest := load_newest(folder, model, optimizer):
        checkpoint, state = newest
        print(f"resumed from {checkpoint} at step {state['step']}")
    if ranks()[0] == 0:
        rewind(folder, state["step"])
    return state


def train_loop(args, run: Path, model, tokenizer, optimizer, state: dict, share_done, step, after=None) -> dict:
    """Steps until `share_done(state)` is 1; returns the last state. `step(state)` gives (new state, its
    metrics, text to print or ""). Sets the learning rate, prints the time left, calls `after(state)`, writes a
    checkpoint every --checkpoint-every steps, and one before it ends on Ctrl-C or SIGTERM."""
    tell, asked_to_stop = metrics_reporter(args, run), on_stop()
    first, began = share_done(state), time.time()
    while (done := share_done(state)) < 1:
        rate = learning_rate(args, done)
        for group in optimizer.param_groups:
            group["lr"] = rate
        state, metrics, text = step(state)
        done = share_done(state)
        if ranks()[0] == 0:
            append_jsonl(run / "metrics.jsonl", [{**metrics, "lr": rate}])
            tell(metrics)
        if text:
            left = duration((time.time() - began) / max(done - first, 1e-9) * max(0.0, 1 - done))
            print(f"{text}  {left} left", flush=True)
        if after:
            after(state)
        stopping = sum_over_ranks([float(bool(asked_to_stop))])[0] > 0
        if state["step"] % args.checkpoint_every == 0 or stopping:
            save_checkpoint(run, model, tokenizer, optimizer, state, getattr(args, "keep", 1))
        if stopping:
            print(f"stopped after step {state['step']}, with a checkpoint; --resume goes on", flush=True)
            raise SystemExit(128 + (asked_to_stop or [signal.SIGTERM])[0])
    end_on_stop()
    return state


def update_memory(config, tokens: int, dtype: torch.dtype, reference: bool, world: int) -> tuple[int, dict[str, float]]:
    """(number of parameters, estimated bytes of an update in each process, part by part). Weights, gradients and
    AdamW's moments are float32 and shared among the processes; the reference is whole in each.

    A micro-batch keeps each layer's input for the backward pass: float32 under autocast, `dtype` under FSDP2. On top
    comes the largest of: a layer's inside in its backward pass (7 numbers a token for each unit of its MLP and 18
    for each of its width, counted on a CPU); the copy of all weights that autocast keeps through a forward pass, whose
    inside is a third of that; the head's gradient and a chunk of logits. AdamW's step needs one more number a weight
    when all these are freed. FSDP2 keeps the embeddings and the head gathered, and their gradients."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in model.parameters())
    vocabulary = config.vocab_size * config.hidden_size
    outer = vocabulary * (1 if getattr(config, "tie_word_embeddings", True) else 2)
    size, many, low = dtype.itemsize, world > 1, dtype != torch.float32
    inputs = (size if many else 4) * tokens * config.num_hidden_layers * config.hidden_size
    inside = size * tokens * (7 * config.intermediate_size + 18 * config.hidden_size)
    cast = size * count if low and not many else 0
    head = (2 * size + 4) * vocabulary + 5 * 4 * min(tokens * config.vocab_size, CHUNK_LOGITS)
    return count, {
        "weights, gradients, moments": 16 * count / world,
        "reference of the KL penalty": 4 * count if reference else 0,
        "gathered by FSDP2": 2 * size * outer if many else 0,
        "a micro-batch, or AdamW's step": max(inputs + max(inside, cast + inside / 3, head), 4 * count / world),
    }


def memory_plan(args, problems: int, longest: int) -> str:
    """--dry-run: what the run will do, and an estimate of the memory that a process needs (`update_memory`). vLLM's
    weights and cache are in its share of the card, and gone while it sleeps through an update."""
    world, dtype = ranks()[1], pick_dtype(args.dtype)
    tokens = max(args.max_tokens_per_batch, longest)
    count, parts = update_memory(load_config(args.model), tokens, dtype, args.kl > 0, world)
    if args.engine == "transformers" and world > 1:
        parts["copy that samples"] = dtype.itemsize * count
    steps = args.steps or math.ceil(problems / args.problems_per_step)
    rollouts = args.problems_per_step * args.group_size
    until = f"at most {args.max_sampled_tokens:,} sampled tokens" if args.max_sampled_tokens else f"{steps} steps"
    update = sum(parts.values()) / 2**30
    kept = ("weights, gradients, moments", "reference of the KL penalty", "copy that samples")
    resting = sum(parts.get(name, 0) for name in kept) / 2**30
    beside = "vLLM's half of the card" if args.engine == "vllm" else "the sampler's cache"
    return "\n".join(
        [
            f"{count / 1e6:,.1f}M parameters, {world} process{'es' * (world > 1)}, engine {args.engine}",
            f"{problems} problems; {until} of {args.problems_per_step} × {args.group_size} = {rollouts} rollouts",
            f"at most {args.max_tokens:,} tokens a rollout, {rollouts * args.max_tokens:,} a step; "
            f"longest sequence {longest:,}",
            f"memory of a process while it samples (estimate): {resting:.1f} GiB beside {beside}",
            f"memory of a process in an update (estimate): {update:.1f} GiB",
            *(f"  {name:30s} {value / 2**30:8.2f} GiB" for name, value in parts.items()),
        ]
    )
