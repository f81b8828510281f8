"""vLLM as a sampler, in this process, on a GPU or on a CPU; its weights follow a trained model."""

from __future__ import annotations

import gc
import importlib.util
import os
import warnings
import zlib
from typing import Any

import numpy as np
import torch

from engine import first_line
from engine.models import load_generation_config
from engine.processes import full_weights, ranks
from engine.tokens import Completion
from engine.transformers_engine import TransformersEngine


def vllm_or_why_not() -> tuple[str | None, str]:
    """(the vLLM that works here or None, why none does)."""
    if importlib.util.find_spec("vllm") is None:
        return None, "vLLM is not installed"
    # Engine and worker share this process: only then can weights go over as tensors.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op.*", category=FutureWarning)
    try:
        import vllm
        from vllm.platforms import current_platform

        assert vllm.LLM  # `import vllm` alone imports nothing that could fail
    except Exception as error:
        return None, f"vLLM does not import: {type(error).__name__}: {first_line(error)}"
    platform = current_platform.device_type
    if platform not in ("cpu", "cuda"):
        return None, f"vLLM {vllm.__version__} finds no device here (platform {platform or 'unspecified'})"
    return f"vLLM {vllm.__version__} on {platform}", ""


class VllmEngine:
    """vLLM as a sampler. `scorer`, in training: a transformers engine whose weights it follows. Likelihoods are the
    scorer's, since vLLM has no log-probs of given tokens without sampling.

    Weights go over in place: `reload_weights` with an iterator over the state dict, names as transformers has them, the
    tied head included (without it a CPU build silently keeps the old one); then the prefix cache is emptied, or answers
    would continue prefixes computed with the old weights. On CUDA the engine sleeps through the update. Level 2 drops
    weights and cache, so the order on waking is: memory for the weights, the weights, an empty prefix cache, memory for
    it (vLLM issues 29341, 21336).
    """

    def __init__(self, path: str, dtype: torch.dtype, longest: int, scorer: TransformersEngine | None = None):
        """path: folder or Hub id; longest: most tokens of a prompt and its completion."""
        from vllm import LLM
        from vllm.platforms import current_platform

        self.dtype, self.longest = dtype, longest
        self.scorer: Any = scorer
        self.ways = scorer.ways if scorer else None
        self.generation_config = load_generation_config(path)
        on_cuda = current_platform.device_type == "cuda"
        self.sleeps, self.asleep = on_cuda and scorer is not None, False
        if on_cuda:  # in training the model, its gradients and AdamW's moments need room
            options = {"gpu_memory_utilization": 0.5 if scorer else 0.85}
        else:
            options: dict[str, Any] = {
                "kv_cache_memory_bytes": 2 << 30,
                "enforce_eager": True,  # compiling costs 20 s and gains a tenth
                "block_size": 32,  # tokens; prefixes are shared in whole blocks; default: 128
                "enable_chunked_prefill": False,  # half a prompt and a seed: "CPU Generator does not use offset"
                "max_num_batched_tokens": max(8192, longest),
            }
        if ranks()[1] > 1:  # under torchrun every process has an engine of its own
            options["distributed_executor_backend"] = "external_launcher"
        self.llm = LLM(
            model=path,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=longest,
            logprobs_mode="processed_logprobs",  # of the distribution sampled from, not of temperature 1
            enable_prefix_caching=True,
            enable_sleep_mode=self.sleeps,
            generation_config="vllm",  # none of the model's defaults: the flags say how to sample
            skip_tokenizer_init=True,
            use_tqdm_on_load=False,
            **options,
        )

    def progress(self) -> str:
        return f"{self.llm.llm_engine.get_num_unfinished_requests():,} to go"

    def generate(self, prompts, limits, seeds, stop_ids, samples: range, temperature: float, top_p: float):
        """One call for all; one request a sample, with its own seed, so that more samples can follow later."""
        from vllm import SamplingParams

        for prompt, limit in zip(prompts, limits):
            if len(prompt) + limit > self.longest:  # vLLM would refuse the whole batch, or shorten the limit silently
                raise ValueError(f"a prompt of {len(prompt)} tokens + {limit} exceed the engine's {self.longest}")
        common = dict(temperature=temperature, top_p=top_p, stop_token_ids=stop_ids, detokenize=False)
        common["logprobs"] = 0  # only the drawn token's
        requests, params = [], []
        for prompt, limit, seed in zip(prompts, limits, seeds):
            for sample in samples:
                requests.append({"prompt_token_ids": prompt})
                number = zlib.crc32(np.array([*seed, sample]).tobytes())
                params.append(SamplingParams(max_tokens=limit, seed=number, **common))
        rows, computed = [[] for _ in prompts], 0
        for number, output in enumerate(self.llm.generate(requests, params, use_tqdm=False)):
            computed += len(output.prompt_token_ids) - (output.num_cached_tokens or 0)
            drawn = output.outputs[0]
            ids = list(drawn.token_ids)
            logprobs = [candidates[token].logprob for token, candidates in zip(ids, drawn.logprobs)]
            reason = "stop" if ids[-1] in stop_ids else "length"
            rows[number // len(samples)].append(Completion(ids, logprobs, reason))
        return rows, computed

    def score(self, heads: list[list[int]], tails: list[list[int]]) -> tuple[np.ndarray, int]:
        return self.scorer.score(heads, tails)

    def pause(self) -> None:
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def sync(self) -> None:
        self.scorer.sync()
        if self.asleep:
            torch.cuda.empty_cache()  # vLLM asks the driver for memory, which PyTorch would not give back by itself
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": full_weights(self.scorer.model)})
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache: answers would be sampled from old weights' states")
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False

    def close(self) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()
