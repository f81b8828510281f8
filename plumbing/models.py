"""Models and their tokens: loading, prompts, text of tokens, log-probs."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import platform
import re
from dataclasses import dataclass, field
from functools import lru_cache, partial, wraps
from itertools import accumulate, groupby, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from plumbing.runs import fail, first_line, resolve_model

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; failures are reported in one line here
# Its advice to pass a mask: rows padded on the right need none.
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "attention_mask" not in record.getMessage())
if platform.system() == "Linux" and not torch.cuda.is_available():
    with contextlib.suppress(Exception):  # glibc: keep freed tensors mapped; page faults cost a third of a CPU step
        ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 26)  # M_MMAP_THRESHOLD; larger ones would fragment the heap
        ctypes.CDLL("libc.so.6").mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


THINK_END = "</think>"
BOX_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."  # Qwen's for mathematics


@dataclass
class Completion:
    """What the model wrote after a prompt. `logprobs[i]` is the log-probability of `token_ids[i]` under the
    distribution it was drawn from. Token `i` writes `text[offsets[i]:offsets[i + 1]]`."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop": the model itself ended it, by its last token; "length": cut at the limit
    text: str = ""
    offsets: list[int] = field(default_factory=list)


def text_and_offsets(tokenizer, token_ids: list[int]) -> tuple[str, list[int]]:
    """The text of the tokens and where each starts in it (len + 1 offsets); special tokens write nothing.

    Decoded as a stream, so a character of several tokens starts at the token that completes it; nothing is ever encoded
    again. Any ids that a model may draw are fine: the text is that of `decode` up to replacement characters.
    """
    whole = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    with contextlib.suppress(Exception):  # byte-fallback tokenizers: characters that later tokens take back
        stream, lost, pieces = DecodeStream(skip_special_tokens=True), lost_bytes(tokenizer, token_ids), []
        for place, token in enumerate(token_ids):
            pieces.append("\ufffd" if place in lost else stream.step(tokenizer.backend_tokenizer, token) or "")
        text = "".join(pieces)
        if text.replace("\ufffd", "") == whole.replace("\ufffd", ""):
            return text, [0, *accumulate(map(len, pieces))]
    starts = (
        tokenizer.decode(token_ids[:i], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for i in range(len(token_ids))
    )
    shared = (sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(start, whole))) for start in starts)
    return whole, [*accumulate(shared, max), len(whole)]


def lost_bytes(tokenizer, token_ids: list[int]) -> set[int]:
    """The positions of the single bytes of byte-fallback tokenizers that do not form characters. The decoder gives up
    all bytes of such a run, even those of complete characters."""
    silent = set(tokenizer.all_special_ids)
    tokens = [(i, t) for i, t in enumerate(tokenizer.convert_ids_to_tokens(token_ids)) if token_ids[i] not in silent]
    lost: set[int] = set()
    for is_byte, run in groupby(tokens, key=lambda pair: bool(re.fullmatch("<0x[0-9A-F]{2}>", pair[1] or ""))):
        if is_byte:
            places, names = zip(*run)
            try:
                bytes(int(name[3:5], 16) for name in names).decode()
            except UnicodeDecodeError:
                lost |= set(places)
    return lost


def stop_token_ids(tokenizer, generation_config) -> list[int]:
    """Every id that ends a turn; some models have several."""
    ids = generation_config.eos_token_id if generation_config else None
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def load_tokenizer(model: str):
    """The tokenizer of a Hub id, a folder or `tiny`."""
    transformers_logging.disable_progress_bar()
    path = resolve_model(model)
    if Path(path).is_dir():
        for name in ("config.json", "tokenizer_config.json"):
            if not (Path(path) / name).exists():
                adapter = (Path(path) / "adapter_config.json").exists()
                hint = "; it is an adapter: merge it into its base model and save that" if adapter else ""
                fail(f"--model {model}: the folder has no {name}{hint}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        fail(f"--model {model}: neither a model folder nor a model that the Hub provides: {first_line(error)}")
    if not tokenizer.is_fast:
        fail(f"--model {model}: its {type(tokenizer).__name__} is Python only; a tokenizer.json is needed")
    if tokenizer.chat_template is None:
        say_once(f"{model} has no chat template: its prompt is the bare problem")
    return tokenizer


@lru_cache
def say_once(text: str) -> None:
    if text:
        print(text, flush=True)


def load_model(model: str, device: str | torch.device, dtype: torch.dtype = torch.float32):
    """The model. Training keeps its weights in float32 and does bf16 arithmetic over them by `autocast`."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(resolve_model(model), dtype=dtype)
    except Exception as error:
        fail(f"--model {model}: cannot be loaded: {first_line(error)}")
    return loaded.to(device).eval()


def pick_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(dtype: str) -> torch.dtype:
    """--dtype auto: bfloat16 on a GPU, float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a text that continues another: no special token, and none of the spaces that SentencePiece
    tokenizers put before what they take for a beginning."""
    return list(_encode(tokenizer, text))


@lru_cache(maxsize=4096)
def _encode(tokenizer, text: str) -> tuple[int, ...]:
    for before in ("", "\n", "x", ".", "0", "{"):
        anchor = tokenizer.encode(before or "x", add_special_tokens=False)
        ids = tokenizer.encode(before + text, add_special_tokens=False)
        if before and ids[: len(anchor)] != anchor:  # merged with the anchor
            continue
        ids = ids[len(anchor) :] if before else ids
        if tokenizer.decode([*anchor, *ids]) == tokenizer.decode(anchor) + text:
            return tuple(ids)
    return tuple(tokenizer.encode(text, add_special_tokens=False))  # it normalises: no tokens spell exactly this


def prompt_ids(tokenizer, problem: str, template: dict | None = None) -> list[int]:
    """The problem through the chat template, up to where the model starts to think; `template`: its arguments, such
    as {"enable_thinking": False}. The user message is the bare problem, as in the authors' code; a model that does
    not think is asked for a boxed answer, or it seldom gives one.
    """
    if not thinks(tokenizer):
        problem += "\n\n" + BOX_INSTRUCTION
    if tokenizer.chat_template is None:  # a base model: the bare text, with the tokenizer's own beginning but no end
        ids = tokenizer.encode(problem + "\n\n")
        text = tokenizer.encode(problem + "\n\n", add_special_tokens=False)
        ends = (end for end in range(len(ids), len(text) - 1, -1) if ids[end - len(text) : end] == text)
        return ids[: next(ends, len(ids))]
    messages = [{"role": "user", "content": problem}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **(template or {}))
    except Exception as error:
        fail(f"--model {tokenizer.name_or_path}: its chat template fails: {first_line(error)}")
    return tokenizer.encode(text, add_special_tokens=False)


def thought_is_open(tokenizer, prompt: list[int]) -> bool | None:
    """Does a prompt end within a thought? None where it has no marker, so that the model may think or answer."""
    text = tokenizer.decode(prompt)
    opened, closed = text.rfind(THINK_END.replace("/", "")), text.rfind(THINK_END)
    return None if opened == closed else opened > closed


def thinks(tokenizer) -> bool:
    """Does the vocabulary have the end-of-thinking marker as one token? If not, the whole completion is the thought."""
    return len(encode(tokenizer, THINK_END)) == 1


def load_config(model: str) -> Any:
    try:
        return AutoConfig.from_pretrained(resolve_model(model)).get_text_config()
    except Exception as error:
        fail(f"--model {model}: its config.json cannot be used: {first_line(error)}")


def context_length(model: str) -> int:
    """Tokens that a model can attend to."""
    return getattr(load_config(model), "max_position_embeddings", None) or 1 << 30


def autocast(dtype: torch.dtype):
    """bf16 arithmetic over float32 weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, dtype) if dtype != torch.float32 else contextlib.nullcontext()


CHUNK_LOGITS = 1 << 25  # 128 MiB in float32


def token_logprobs(
    model,
    input_ids: torch.Tensor,
    where: torch.Tensor,
    temperature: float = 1.0,
    attention_mask=None,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the tokens at `where` given all before them, under softmax(logits / temperature).

    input_ids [B, T]; where [B, T] bool, never the first column. Returns (log-probs [N], entropies [N], no gradient),
    N = where.sum(), in row-major order. The logits are the model's own, its scaling and capping included; they exist
    for `chunk` tokens at a time (by default as many as have CHUNK_LOGITS logits) and are computed again in the
    backward pass: no [tokens, vocabulary] tensor is ever kept. Dropout and other noise are off.
    Rows padded on the right need no attention mask; rows padded on the left do.
    """
    if not hasattr(model, "scores_chunks"):
        say_once(check_update(model))
    without_noise(model)
    if not model.scores_chunks or input_ids.shape[1] > same_positions(model):
        return whole_rows_logprobs(model, input_ids, where, temperature, attention_mask)
    positions = None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp(min=0)
    padding = {} if attention_mask is None else {"attention_mask": attention_mask, "position_ids": positions}
    output = body_of(model)(input_ids=input_ids, use_cache=False, **padding)
    hidden = output.last_hidden_state
    before, target = hidden[:, :-1][where[:, 1:]], input_ids[:, 1:][where[:, 1:]]
    chunk = chunk or max(1, CHUNK_LOGITS // model.get_output_embeddings().weight.shape[0])

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


def score_tokens(logits: torch.Tensor, tokens: torch.Tensor, temperature: float):
    """(log-probs of the tokens [N] under logits [N, vocabulary], entropies [N]). A few rows at a time (4 MiB), since
    memory of that size is reused: the fresh pages of larger tensors cost more than their arithmetic. The entropies come
    last: the recomputation in the backward pass stops before them."""
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    few = max(1, (1 << 20) // logits.shape[-1])
    logprobs = [rows.log_softmax(-1) for rows in logits.split(few)]
    chosen = [rows.gather(-1, ids[:, None]).squeeze(-1) for rows, ids in zip(logprobs, tokens.split(few))]
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


def whole_rows_logprobs(model, input_ids, where, temperature, attention_mask=None):
    """As `token_logprobs`, for models whose results differ in a batch: one forward per row, without padding."""
    parts = []
    for row, (ids, wanted) in enumerate(zip(input_ids, where)):
        if wanted.any():
            first = 0 if attention_mask is None else int(attention_mask[row].argmax())
            end = int(wanted.nonzero().max()) + 1
            ids, wanted = ids[first:end], wanted[first + 1 : end]
            parts.append(score_tokens(plain_logits(model, ids)[:-1][wanted], ids[1:][wanted], temperature))
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


# ============================================================================================ truth, and how far off


def plain_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """What every other way is measured against: logits [T, vocabulary] of one unpadded sequence [T]."""
    return model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], use_cache=False).logits[0]


def with_short_windows(check):
    """The check, with every attention window (or chunk) cut to 8 tokens while it runs: the probes are longer than
    that, and what is right for one window size is right for all."""

    @wraps(check)
    def checked(model, *args):
        windows = [
            (owner, name, size)
            for owner in (model.config.get_text_config(), *model.modules())
            for name in ("sliding_window", "attention_chunk_size")
            if isinstance(size := vars(owner).get(name), int) and size > 8
        ]
        try:
            for owner, name, _ in windows:
                setattr(owner, name, 8)
            return check(model, *args)
        finally:
            for owner, name, size in windows:
                setattr(owner, name, size)

    return checked


def probes(model) -> list[list[int]]:
    """Token sequences to try a model with: of several lengths, sharing prefixes."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or 1 << 30
    longest = int(min(32, context - 8, same_positions(model) - 8))
    settings = {**model.config.to_dict(), **config.to_dict()}
    special = {v for k, v in settings.items() if k.endswith(("_token_id", "_token_index")) and isinstance(v, int)}
    rng = np.random.default_rng(0)
    free = np.array([i for i in range(config.vocab_size) if i not in special])
    trunk = rng.choice(free, longest).tolist()
    cuts = (2, 7, longest // 2, longest - 3)
    return [trunk, *(trunk[:k] + rng.choice(free, 3).tolist() for k in cuts), rng.choice(free, 4).tolist()]


@torch.no_grad()
def tolerance(model, sequence: list[int]) -> float:
    """How far apart (root mean square, in nats) two ways of computing log-probs may be: 1e-4 in float32; in lower
    precision half a unit in the last place of the largest logit, as logits are rounded, plus four times the plain
    forward's difference between one row and eight equal ones, but at most that half unit again: a defect in batches
    looks like noise, too. NaN logits end the run."""
    ids = torch.tensor(sequence, device=model.device)
    try:
        logits = plain_logits(model, ids)
    except Exception as error:
        fail(f"{name_of(model)}: its own forward fails: {first_line(error)}")
    one = logits.float().log_softmax(-1)
    if not one.isfinite().any(-1).all() or one.isnan().any():
        fail(f"the model's logits are not finite ({model.config.name_or_path or type(model).__name__})")
    if model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type):
        return 1e-4
    many = model(input_ids=ids.repeat(8, 1), attention_mask=torch.ones_like(ids).repeat(8, 1)).logits
    noise = (many[3].float().log_softmax(-1) - one)[:-1].gather(-1, ids[1:, None])
    rounding = torch.finfo(logits.dtype).eps * float(logits.abs().max()) / 2
    return rounding + min(rounding, 4 * rms(noise))


def rms(gaps: torch.Tensor) -> float:
    return float(gaps.double().square().mean().sqrt())


@torch.no_grad()
def truth(model, sequence: list[int]) -> torch.Tensor:
    """Log-probs [T - 1, vocabulary] of what follows each token but the last."""
    return plain_logits(model, torch.tensor(sequence, device=model.device))[:-1].float().log_softmax(-1)


@torch.no_grad()
@with_short_windows
def check_update(model) -> str:
    """Sets `model.scores_chunks`: may log-probs be computed in padded batches, the head in chunks? Says if not."""
    without_noise(model)
    rows, device, versions = probes(model), model.device, [weights._version for weights in model.parameters()]
    limit = tolerance(model, rows[0])
    model.keeps_weights = versions == [weights._version for weights in model.parameters()]
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *row[:1] * (width - len(row))] for row in rows], device=device)
    where = torch.tensor([[0 < i < len(row) for i in range(width)] for row in rows], device=device)
    expected = torch.cat([truth(model, r).gather(-1, torch.tensor(r[1:], device=device)[:, None])[:, 0] for r in rows])
    gaps = {}
    for model.scores_chunks in (True, False):
        gaps[model.scores_chunks] = math.inf
        with contextlib.suppress(Exception):
            gaps[model.scores_chunks] = rms(token_logprobs(model, ids, where)[0] - expected)
        if gaps[model.scores_chunks] <= limit:
            break
    else:
        fail(f"{name_of(model)}: its log-probs depend on how often they are asked for ({off(gaps[False])})")
    if same_positions(model) < float("inf"):
        say_once(
            f"warning: {name_of(model)}: beyond {same_positions(model)} tokens its positions depend on the length of "
            "the whole sequence, so sampler and trainer differ there; keep prompt and completion below it"
        )
    return "" if model.scores_chunks else f"an update takes one row at a time (batches: {off(gaps[True])})"


def check_training(model, score) -> None:
    """Ends the run if `score`, this model's `token_logprobs`, has no backward pass, or if a forward pass changes the
    weights that would be saved: rwkv scales its weights down when it evaluates."""
    ids = torch.tensor([probes(model)[0]], device=model.device)
    where = torch.ones_like(ids, dtype=torch.bool)
    where[:, 0] = False
    try:
        score(ids, where)[0].sum().backward()
    except Exception as error:
        fail(f"{name_of(model)} cannot be trained: its backward pass fails: {first_line(error)}")
    model.zero_grad()
    if not model.keeps_weights:
        fail(f"{name_of(model)} cannot be trained: its forward pass changes its weights, so others would be saved")


def same_positions(model) -> float:
    """Up to how many tokens is a position the same for every length? Some rotary embeddings change beyond a length, for
    every row of a batch with one longer row and for a sequence that grows past it: there, only plain paths hold."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in [rope, *rope.values()] if isinstance(kind, dict)]
    if not any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds):
        return float("inf")
    lengths = [kind.get("original_max_position_embeddings") for kind in [*kinds, config.to_dict()]]
    return min(length for length in [*lengths, config.max_position_embeddings] if length)


def off(gap: float) -> str:
    return f"off by {gap:.3g} nats" if math.isfinite(gap) else "not possible with its code"


def name_of(model) -> str:
    return f"{model.config.model_type} ({model.config.name_or_path or type(model).__name__})"
