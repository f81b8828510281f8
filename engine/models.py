"""Models by name: their tokenizer, configuration and weights."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from engine import Refused, first_line

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; failures are reported in one line here
# Its advice to pass a mask: rows padded on the right need none.
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "attention_mask" not in record.getMessage())
if platform.system() == "Linux" and not torch.cuda.is_available():
    with contextlib.suppress(Exception):  # glibc: keep freed tensors mapped; page faults cost a third of a CPU step
        ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 26)  # M_MMAP_THRESHOLD; larger ones would fragment the heap
        ctypes.CDLL("libc.so.6").mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
ROOT = Path(__file__).resolve().parents[1]
TINY = ("tiny", "tiny/backtrack")  # the embedded reasoners, and the names of their problems


def resolve_model(model: str) -> str:
    """The folder of an embedded reasoner; anything else is left as it is."""
    return str(ROOT / model) if model in TINY else model


def is_tiny(model: str) -> bool:
    """The embedded model, or one trained from it: `build_model` of tiny/build.py marks its configuration."""
    config = Path(resolve_model(model)) / "config.json"
    try:
        return config.is_file() and "embedded_reasoner" in json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        raise Refused(f"--model {model}: its config.json is not JSON") from None


def load_tokenizer(model: str):
    """The tokenizer of a Hub id, a folder or `tiny`."""
    transformers_logging.disable_progress_bar()
    path = resolve_model(model)
    if Path(path).is_dir():
        for name in ("config.json", "tokenizer_config.json"):
            if not (Path(path) / name).exists():
                adapter = (Path(path) / "adapter_config.json").exists()
                hint = "; it is an adapter: merge it into its base model and save that" if adapter else ""
                raise Refused(f"--model {model}: the folder has no {name}{hint}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise Refused(
            f"--model {model}: neither a model folder nor a model that the Hub provides: {first_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise Refused(f"--model {model}: its {type(tokenizer).__name__} is Python only; a tokenizer.json is needed")
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
        raise Refused(f"--model {model}: cannot be loaded: {first_line(error)}") from error
    return loaded.to(device).eval()


def pick_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(dtype: str) -> torch.dtype:
    """--dtype auto: bfloat16 on a GPU, float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]


def load_config(model: str) -> Any:
    try:
        return AutoConfig.from_pretrained(resolve_model(model)).get_text_config()
    except Exception as error:
        raise Refused(f"--model {model}: its config.json cannot be used: {first_line(error)}") from error


def context_length(model: str) -> int:
    """Tokens that a model can attend to."""
    return getattr(load_config(model), "max_position_embeddings", None) or 1 << 30


def autocast(dtype: torch.dtype):
    """bf16 arithmetic over float32 weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, dtype) if dtype != torch.float32 else contextlib.nullcontext()
