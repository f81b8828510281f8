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
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from engine import Refused, first_line, say_once
from engine.thoughts import marks_of, what_was_seen

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
    return "embedded_reasoner" in described(model)


def described(model: str) -> dict:
    """The config.json in a model's folder; empty for a model that is not here. `flags`: defaults of flags with it."""
    config = Path(resolve_model(model)) / "config.json"
    try:
        return json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except ValueError:
        raise Refused(f"--model {model}: its config.json is not JSON") from None


@lru_cache
def reach_hub() -> None:
    """Where the Hub is out of reach, what is asked of it is looked for in its cache alone, not for minutes."""
    try:
        if not constants.HF_HUB_OFFLINE:
            get_session().head(constants.ENDPOINT, timeout=8)
    except Exception as error:
        print(f"{constants.ENDPOINT} is out of reach ({first_line(error)}): only what is cached is used", flush=True)
        constants.HF_HUB_OFFLINE = True


def load_tokenizer(model: str, think_marks: list[str] | None = None):
    """The tokenizer of a Hub id, a folder or `tiny`; `think_marks`, what opens and what closes a thought, is saved with
    it. What the model's prompts and thoughts lack is said once."""
    transformers_logging.disable_progress_bar()
    path = resolve_model(model)
    if not Path(path).is_dir():
        reach_hub()
    else:
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
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise Refused(f"--model {model}: its {type(tokenizer).__name__} is Python only; a tokenizer.json is needed")
    if think_marks:
        tokenizer.init_kwargs["think_marks"] = think_marks
    if tokenizer.chat_template is None:
        say_once(f"{model} has no chat template: its prompt is the bare problem")
    if marks_of(tokenizer) is None:
        say_once(f"{model}: {what_was_seen(tokenizer)}; its whole completion is the thought, and should end with a box")
    return tokenizer


def load_model(model: str, device: str | torch.device, dtype: torch.dtype = torch.float32):
    """The model. Training keeps its weights in float32 and does bf16 arithmetic over them by `autocast`."""
    try:
        both: Any = AutoModelForCausalLM.from_pretrained(resolve_model(model), dtype=dtype, output_loading_info=True)
        loaded, about = both
    except Exception as error:
        raise Refused(f"--model {model}: cannot be loaded: {first_line(error)}") from error
    if lacking := sorted(about["missing_keys"]):
        raise Refused(f"--model {model}: its weights lack {lacking[0]}{' and others' * (len(lacking) > 1)}")
    loaded = loaded.to(device).eval()
    if broken := [name for name, weights in loaded.named_parameters() if not weights.isfinite().all()]:
        raise Refused(f"--model {model}: its weights {broken[0]} are not finite")
    return loaded


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


def load_generation_config(model: str) -> GenerationConfig | None:
    """Its generation_config.json; else what its config.json has of it, as transformers does; None without both."""
    path = resolve_model(model)
    with contextlib.suppress(OSError):
        return GenerationConfig.from_pretrained(path)
    with contextlib.suppress(OSError):
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(path))


def check_ids(name: str, config, sequences: list[list[int]]) -> None:
    """Refuses token ids that a model has no embedding for."""
    rows, most = getattr(config.get_text_config(), "vocab_size", None) or 1 << 30, max(map(max, sequences), default=0)
    if most >= rows:
        raise Refused(f"{name}: token {most} is beyond its {rows} embeddings; the tokenizer is another model's")


def context_length(config) -> int:
    """Tokens that a model of this configuration can attend to."""
    return getattr(config, "max_position_embeddings", None) or 1 << 30


def autocast(dtype: torch.dtype):
    """bf16 arithmetic over float32 weights."""
    return torch.autocast(pick_device(), dtype) if dtype != torch.float32 else contextlib.nullcontext()
