"""A training, whatever its loss: steps, micro-batches, checkpoints, fine-tuning on weighted tokens."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from engine import Refused, first_line, is_quiet, plural, tell
from engine.checks import Ways, name_of
from engine.logprobs import CHUNK_LOGITS, check_training, token_logprobs
from engine.models import autocast, is_tiny, load_config, load_model, pick_dtype
from engine.processes import full_weights, gather_over_ranks, ranks, shard, sum_over_ranks, wait_for_ranks
from run.files import (
    append_jsonl,
    digest,
    fail,
    json_line,
    on_stop,
    parse_lines,
    remove,
    stop_now,
    whole_lines,
    write_text,
    writing,
)
from run.folder import duration, metrics_reporter
from run.traces import by_likelihood, weights_of

# ============================================================================================ steps


class Steps:
    """The steps of a training, to be gone through with `for`: each sets the learning rate and gives its number, from 0.

    It begins at the checkpoint in `run`, if there is one, and ends after `steps` steps or `sampled_tokens` tokens.
    `state` is what a checkpoint keeps beside weights and moments; a step is done once `count` has counted it. After
    kill -9 `--resume` loads the last checkpoint, `rewind` drops the lines of later steps (`files.repair` one that was
    cut), and those steps draw the same again.

    A signal that asks the process to end is looked at after the step (`checkpoint`), or sooner where no weight changes:
    what stands in `with steps.can_be_left()` is left at once, and a step that was left is made again by --resume.
    """

    def __init__(
        self, args, run: Path, model, tokenizer, optimizer, fresh: dict, steps: float, sampled_tokens=math.inf
    ):
        self.args, self.run, self.model, self.tokenizer, self.optimizer = args, run, model, tokenizer, optimizer
        self.steps, self.sampled_tokens = steps, sampled_tokens
        self.state = {"step": 0, **fresh}
        self.signals: list[int] = []
        self.first_signal, self.leaving = 0.0, False
        if checkpoint := latest_checkpoint(run):
            self.state = load_checkpoint(checkpoint, model, optimizer)
            print(f"resumed from {checkpoint} at step {self.state['step']}")
        if ranks()[0] == 0:
            rewind(run, self.state["step"])
        wait_for_ranks()

    def done(self) -> float:
        """The share of the training that is done."""
        return max(self.state["step"] / self.steps, self.state.get("sampled_tokens", 0) / self.sampled_tokens)

    def due(self, every: int) -> bool:
        """Is it after every so many steps, or at the end?"""
        return self.state["step"] % every == 0 or self.done() >= 1

    def __iter__(self) -> Iterator[int]:
        self.tell = metrics_reporter(self.args, self.run)
        on_stop(self.note)
        self.first, self.began = self.done(), time.time()
        while self.done() < 1:
            self.step_began, self.rate = time.time(), learning_rate(self.args, self.done())
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate
            yield self.state["step"]
        on_stop(stop_now)

    def note(self, number: int, _frame) -> None:
        if not self.signals:
            self.signals, self.first_signal = [number], time.time()
            if self.leaving:
                raise KeyboardInterrupt(number)
            print(f"{signal.Signals(number).name}: finishing the step; a second one ends at once", flush=True)
        elif time.time() - self.first_signal > 3:  # torchrun passes Ctrl-C on to processes that have it already
            stop_now(number, _frame)

    @contextlib.contextmanager
    def can_be_left(self) -> Iterator[None]:
        """Around sampling, in all processes: after a signal in any of them all end here, with a checkpoint."""
        try:
            self.leaving = True
            if self.signals:
                raise KeyboardInterrupt
            yield
            self.leaving = False
        except KeyboardInterrupt:
            self.leaving = False
            if not self.signals:  # before the first step
                raise
        self.end_if_asked()

    def count(self, metrics: dict, text: str, **counts: float) -> None:
        """Counts a step: adds `counts` to the state, writes the metrics, tells the text (if any) and the time left."""
        self.state |= {name: self.state[name] + more for name, more in counts.items()}
        self.state["step"] += 1
        metrics = {**self.state, **metrics, "lr": self.rate}
        if ranks()[0] == 0:
            append_jsonl(self.run / "metrics.jsonl", [metrics])
            self.tell(metrics)
        if text:
            speed = (time.time() - self.began) / max(self.done() - self.first, 1e-9)
            tell(f"{text}  {duration(speed * max(0.0, 1 - self.done()))} left")

    def checkpoint(self) -> None:
        """Writes a checkpoint every --checkpoint-every steps; after a signal writes one and ends the run."""
        if self.state["step"] % self.args.checkpoint_every == 0:
            save_checkpoint(self.run, self.model, self.tokenizer, self.optimizer, self.state)
        self.end_if_asked()

    def end_if_asked(self) -> None:
        if sum_over_ranks([float(bool(self.signals))])[0] > 0:
            save_checkpoint(self.run, self.model, self.tokenizer, self.optimizer, self.state)
            print(f"stopped after step {self.state['step']}, with a checkpoint; --resume goes on", flush=True)
            raise SystemExit(128 + (self.signals or [signal.SIGTERM])[0])


def draw_problems(problems: list[dict], count: int, step: int, seed: int) -> list[dict]:
    """Problems `step * count …` of the endless sequence of shuffled passes, each with its place in the step: a function
    of the step, so a resumed run sees the same data."""
    places = range(step * count, (step + 1) * count)
    passes = {place // len(problems) for place in places}
    orders = {number: np.random.default_rng([seed, number]).permutation(len(problems)) for number in passes}
    drawn = [problems[orders[place // len(problems)][place % len(problems)]] for place in places]
    return [{**problem, "place": place} for place, problem in enumerate(drawn)]


def learning_rate(args, done: float) -> float:
    """At a share `done` of the run: linear warm-up, then constant or a cosine to 0."""
    if done < args.warmup:
        return args.lr * max(done / args.warmup, 0.02)
    if args.schedule == "constant":
        return args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (done - args.warmup) / max(1e-9, 1 - args.warmup)))


# ============================================================================================ an update


def prepare(args, model, ways: Ways) -> Callable:
    """Makes a model ready to be trained, before its optimiser: gradient checkpointing, unless it is the embedded one;
    sharding where there are processes; its configuration says as what it was trained, unless that is the default.
    Returns `token_logprobs` of the model; refuses one that cannot be trained."""
    if not ways.trainable:
        why = "its forward pass changes its weights, so others would be saved"
        raise Refused(f"{name_of(model)} cannot be trained: {why}")
    if args.parameterization == "backtracking":
        model.config.flags = {**getattr(model.config, "flags", {}), "parameterization": args.parameterization}
    dtype, recompute = pick_dtype(args.dtype), not is_tiny(weights_of(args))
    if recompute and model.supports_gradient_checkpointing:  # the name in newer and in older transformers
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    scores = partial(token_logprobs, way=ways.update)
    score = shard(model, dtype, scores) if ranks()[1] > 1 else partial(scores, model)
    with autocast(dtype):
        check_training(model, score)
    return score


def adamw(args, model) -> torch.optim.AdamW:
    betas = 0.9, getattr(args, "adam_beta2", 0.95)
    return torch.optim.AdamW(model.parameters(), lr=args.lr, betas=betas, weight_decay=args.weight_decay)


Example = tuple[list[int], int, np.ndarray]  # token ids; the first trained one; numbers of each trained token, [C, n]


def micro_batches(examples: list[Example], chosen: Iterable[int], max_tokens: int, device) -> Iterator[tuple]:
    """The chosen examples as (numbers, ids [B, T], where [B, T], columns [C, N]), the longest first, cut where rows ×
    width would exceed `max_tokens`. N counts the trained tokens, row by row: those that `where` marks. For example

        ([7, 8, 9, 4, 2], 2, [[.5, .5, .5]])      ids   7 8 9 4 2    where  . . x x x    columns .5 .5 .5 -.1
        ([7, 8, 3], 2, [[-.1]])                         7 8 3 0 0           . . x . .

    Every process gets as many, or their collectives would wait for each other for ever: one with fewer gets copies of
    an example without a number, for a backward pass that counts for nothing.
    """
    order, batches = sorted(chosen, key=lambda i: len(examples[i][0])), []
    while order:
        width, numbers = len(examples[order[-1]][0]), []
        while order and (not numbers or (len(numbers) + 1) * width <= max_tokens):
            numbers.append(order.pop())
        batches.append((numbers, *batch_tensors([examples[i] for i in numbers], device)))
    most = max(gather_over_ranks([len(batches)]))
    batches += [([], *batch_tensors(examples[:1], device))] * (most - len(batches))
    for number, batch in enumerate(batches):
        if is_quiet():
            tell(f"  update: {number} of {most} micro-batches")
        yield batch


def batch_tensors(examples: list[Example], device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids, _, _ in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    where = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, (tokens, first, _) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)  # padded on the right: causal attention needs no mask
        where[row, first : len(tokens)] = True
    columns = torch.from_numpy(np.concatenate([columns for *_, columns in examples], axis=1)).float()
    return ids.to(device), where.to(device), columns.to(device)


def with_old_logprobs(args, score, examples: list[Example], device) -> list[Example]:
    """The examples with one column more: their tokens' log-probs before the first of several steps."""
    old: dict[int, torch.Tensor] = {}
    with torch.no_grad(), autocast(pick_dtype(args.dtype)):
        for numbers, ids, where, _ in micro_batches(examples, range(len(examples)), args.max_tokens_per_batch, device):
            logprobs = score(ids, where, args.temperature)[0].cpu()
            if numbers:
                old |= dict(zip(numbers, logprobs.split([examples[i][2].shape[1] for i in numbers])))
    return [(ids, first, np.vstack([columns, old[i]])) for i, (ids, first, columns) in enumerate(examples)]


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


def total_of(norm: torch.Tensor) -> float:
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def share_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def optimizer_step(model, optimizer, max_grad_norm: float, expected: bool = True) -> float:
    """A step on the clipped gradient; returns its norm before clipping. FloatingPointError if that is not finite, or 0
    where a gradient is `expected`, and if the weights are not finite afterwards, or did not move."""
    norm = total_of(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf))
    if not math.isfinite(norm):
        raise FloatingPointError(f"gradient norm is {norm}")
    if expected and norm == 0:
        raise FloatingPointError("the gradient is 0: these settings train nothing")
    matrices = sorted((p for p in model.parameters() if p.ndim > 1), key=torch.Tensor.numel)
    matrix = next((p for p in matrices if p.grad is not None and share_of(p.grad).any()), None)
    before: Any = None if matrix is None else share_of(matrix.detach()).clone()
    optimizer.step()
    if not math.isfinite(total_of(torch.nn.utils.get_total_norm([p.detach() for p in model.parameters()]))):
        raise FloatingPointError("the weights are not finite after the step")
    rate, peak = optimizer.param_groups[0]["lr"], optimizer.defaults["lr"]  # at the end of a cosine nothing need move
    if matrix is not None and rate > peak / 100 and torch.equal(before, share_of(matrix.detach())):
        raise FloatingPointError(f"the weights did not move (gradient norm {norm:.3g}, learning rate {rate:.3g})")
    return norm


# ============================================================================================ fine-tuning


def fine_tune(args, folder: Path, model, score, tokenizer, examples: list[Example]) -> dict:
    """--epochs passes over examples with one column, the weight of each trained token, in place; resumed from any
    checkpoint in `folder`. Returns steps and the last loss."""
    if ranks()[0] == 0:
        folder.mkdir(exist_ok=True)
    steps_per_epoch = math.ceil(len(examples) / args.batch_size)
    count, optimizer = steps_per_epoch * args.epochs, adamw(args, model)
    steps = Steps(args, folder, model, tokenizer, optimizer, {"loss": 0.0}, count)
    for step in steps:
        epoch, number = divmod(step, steps_per_epoch)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(examples))
        batch = [examples[i] for i in order[number::steps_per_epoch]]  # an epoch's batches are about equal in size
        try:
            loss = steps.state["loss"] = fine_tuning_step(args, model, score, optimizer, batch)
        except FloatingPointError as error:
            fail(f"step {step + 1} of the fine-tuning in {folder}: {error}")
        shown = is_quiet() or (step + 1) % max(1, count // 5) == 0
        steps.count({"examples": len(batch)}, f"step {step + 1} of {count}  loss {loss:.4f}" if shown else "")
        steps.checkpoint()
    model.eval()
    return {"steps": count, "loss": steps.state["loss"]}


def fine_tuning_step(args, model, score, optimizer, batch: list[Example]) -> float:
    """One optimiser step on -Σ w log p / Σ w over the trained tokens of the whole batch: a token counts the same
    however the batch is split into micro-batches and over processes. Each process has the whole batch."""
    (rank, world), total = ranks(), 0.0
    total_weight = float(sum(columns.sum() for *_, columns in batch))
    optimizer.zero_grad()
    share = range(rank, len(batch), world)
    for numbers, ids, where, (weights,) in micro_batches(batch, share, args.max_tokens_per_batch, model.device):
        with autocast(pick_dtype(args.dtype)):
            logprobs, _ = score(ids, where)
        loss = -(weights * logprobs).sum() / total_weight * bool(numbers)
        (loss * world).backward()  # FSDP takes the mean of the processes' gradients
        total += loss.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss is {total}")
    optimizer_step(model, optimizer, args.max_grad_norm)
    return sum_over_ranks([total])[0]


# ============================================================================================ checkpoints


def save_checkpoint(run: Path, model, tokenizer, optimizer, state: dict) -> None:
    """`checkpoints/step_N`: the model and what training needs to go on, the same however many processes wrote it. When
    it is complete the one before goes."""
    final = run / "checkpoints" / f"step_{state['step']:06d}"
    options = StateDictOptions(full_state_dict=True, cpu_offload=ranks()[1] > 1)
    moments = get_optimizer_state_dict(model, optimizer, options=options)
    kept = f"the last good checkpoint is {latest_checkpoint(run) or 'none'}"
    save_model(final, model, tokenizer, kept, {"optimizer": moments, "state": state})
    if ranks()[0] == 0:
        for old in sorted((run / "checkpoints").glob("step_??????"))[:-1]:
            remove(old)
    wait_for_ranks()


def latest_checkpoint(run: Path) -> Path | None:
    return max((run / "checkpoints").glob("step_??????"), default=None)


def load_weights(model, folder: Path | str) -> None:
    """Loads weights in Hugging Face format, in place, into a model that may be sharded."""
    weights = load_model(str(folder), "cpu").state_dict()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=ranks()[1] > 1))


def load_checkpoint(folder: Path, model, optimizer) -> dict:
    """Restores weights and optimiser in place; returns the run's state. Files that are cut, missing or another model's
    end the program."""
    try:
        saved = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
        damaged = [name for name, value in saved.get("weights", {}).items() if digest(folder / name) != value]
        if damaged:
            raise ValueError(f"{damaged[0]} is not as it was written")
        load_weights(model, folder)
        options = StateDictOptions(full_state_dict=ranks()[1] > 1)
        set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)
        return saved["state"]
    except Exception as error:
        fail(f"{folder} cannot be read ({first_line(error)}): --overwrite starts again")


def rewind(run: Path, step: int) -> None:
    """Drops the lines of steps after the checkpoint that a run resumes from; those steps are repeated."""
    for name in ("metrics.jsonl", "records.jsonl", "validation.jsonl"):
        if (run / name).exists():
            rows = parse_lines(run / name, whole_lines(run / name)) if step else []
            if kept := "".join(json_line(row) for row in rows if row["step"] <= step):
                write_text(run / name, kept)
            else:
                remove(run / name)


def save_model(
    folder: Path, model, tokenizer, kept="the last checkpoint has its weights, --resume goes on", training=None
) -> None:
    """The model in Hugging Face format, with what `training` needs to go on; complete or not there. `kept`: what there
    is if it cannot be written."""
    weights = dict(full_weights(model))
    if ranks()[0] == 0 and not folder.exists():
        temporary = folder.with_name(folder.name + ".tmp")
        with writing(folder, kept):
            try:
                remove(temporary)
                temporary.mkdir(parents=True)
                model.save_pretrained(temporary, state_dict=weights)
                tokenizer.save_pretrained(temporary)
                if training:
                    files = {file.name: digest(file) for file in temporary.glob("*.safetensors")}
                    torch.save({**training, "weights": files}, temporary / "training.pt")
                temporary.rename(folder)
            except Exception:
                shutil.rmtree(temporary, ignore_errors=True)  # room for what else is to be written
                raise
    wait_for_ranks()


# ============================================================================================ memory


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
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    inside = size * tokens * (7 * (max(inner) if isinstance(inner, list) else inner) + 18 * config.hidden_size)
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
    if world > 1 and (args.engine == "transformers" or by_likelihood(args)):
        parts["copy that samples or scores"] = dtype.itemsize * count
    steps = args.steps or math.ceil(problems / args.problems_per_step)
    rollouts = args.problems_per_step * args.group_size
    until = f"at most {args.max_sampled_tokens:,} sampled tokens" if args.max_sampled_tokens else plural(steps, "step")
    update = sum(parts.values()) / 2**30
    kept = ("weights, gradients, moments", "reference of the KL penalty", "copy that samples or scores")
    resting = sum(parts.get(name, 0) for name in kept) / 2**30
    beside = "vLLM's half of the card" if args.engine == "vllm" else "the sampler's cache"
    return "\n".join(
        [
            f"{count / 1e6:,.1f}M parameters, {world} process{'es' * (world > 1)}, engine {args.engine}",
            f"{plural(problems, 'problem')}; {until} of {args.problems_per_step} × {args.group_size} = "
            f"{plural(rollouts, 'rollout')}",
            f"at most {args.max_tokens:,} tokens a rollout, {rollouts * args.max_tokens:,} a step; "
            f"longest sequence {longest:,}",
            f"memory of a process while it samples (estimate): {resting:.1f} GiB beside {beside}",
            f"memory of a process in an update (estimate): {update:.1f} GiB",
            *(f"  {name:30s} {value / 2**30:8.2f} GiB" for name, value in parts.items()),
        ]
    )
