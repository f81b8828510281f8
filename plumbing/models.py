"""Models and their tokens: loading, prompts, text of tokens, log-probs."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from plumbing.runs import fail, first_line, resolve_model

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what failed is said in one line by us
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
    finish_reason: str  # "stop": the last token is one that ends it, the model's own choice; "length": cut
    text: str = ""
    offsets: list[int] = field(default_factory=list)


def text_and_offsets(tokenizer, token_ids: list[int]) -> tuple[str, list[int]]:
    """The text of the tokens and where each starts in it (len + 1 offsets), special tokens silent.

    Decoded as a stream, so a character of several tokens starts at the token that completes it, and the pieces join
    to the text by construction; nothing is ever encoded again.
    """
    stream, pieces, offsets = DecodeStream(skip_special_tokens=True), [], [0]
    for token in token_ids:
        pieces.append(stream.step(tokenizer.backend_tokenizer, token) or "")
        offsets.append(offsets[-1] + len(pieces[-1]))
    return "".join(pieces), offsets


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
                fail(f"--model {model}: the folder has no {name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        fail(f"--model {model}: neither a model folder nor a model that the Hub gives: {first_line(error)}")
    if tokenizer.chat_template is None:
        say_once(f"{model} has no chat template: its prompt is the bare problem")
    return tokenizer


@lru_cache
def say_once(text: str) -> None:
    print(text)


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
    """Token ids of a piece of a prompt: no special token is added, a template has them already."""
    return list(_encode(tokenizer, text))


@lru_cache(maxsize=4096)
def _encode(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def prompt_ids(tokenizer, problem: str) -> list[int]:
    """The problem through the chat template, up to where the model starts to think. The user message is the bare
    problem, as in the authors' code; a model that does not think is asked for a boxed answer, or it seldom gives one.
    """
    if not thinks(tokenizer):
        problem += "\n\n" + BOX_INSTRUCTION
    if tokenizer.chat_template is None:  # a base model: the bare text, with the tokenizer's own beginning
        return tokenizer.encode(problem + "\n\n")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem}], tokenize=False, add_generation_prompt=True
    )
    return encode(tokenizer, text)


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


CHUNK_LOGITS = 1 << 26  # 256 MiB in float32


def token_logprobs(model, input_ids: torch.Tensor, where: torch.Tensor, temperature: float = 1.0, attention_mask=None,
                   chunk: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Log-probs of the tokens at `where` given all before them, under softmax(logits / temperature).

    input_ids [B, T]; where [B, T] bool, never the first column. Returns (log-probs [N], entropies [N], no gradient),
    N = where.sum(), in row-major order. The logits exist for `chunk` tokens at a time (if not told, so many as have
    CHUNK_LOGITS logits) and are computed again in the backward pass: no [tokens, vocabulary] tensor is ever kept.
    Rows padded on the right need no attention mask; rows padded on the left do.
    """
    positions = None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp(min=0)
    hidden = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    before, target = hidden[:, :-1][where[:, 1:]], input_ids[:, 1:][where[:, 1:]]
    head = model.get_output_embeddings()
    chunk = chunk or max(1, CHUNK_LOGITS // head.weight.shape[0])

    def of_chunk(states, tokens):
        logprobs = (head(states).float() / temperature).log_softmax(-1)
        entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
        return logprobs.gather(-1, tokens[:, None]).squeeze(-1), entropy

    parts = [
        checkpoint(of_chunk, states, tokens, use_reentrant=False)
        for states, tokens in zip(before.split(chunk), target.split(chunk))
    ]
    logprobs, entropies = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropies)
