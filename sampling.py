"""sampling.py: token ids in, token ids and their log-probs out, from either of two engines.

    Sampler ── TransformersEngine   a transformers model, in batches that share prefixes; needs nothing else
            └─ VllmEngine           vLLM in this process, on a GPU or on a CPU; its weights follow a trained model

Apart from common.py because nothing in it is about MRT. A token that was drawn is never decoded and encoded again; its
log-probability is that of the distribution it was drawn from (temperature and top-p included).
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from training import full_weights, ranks


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


class Sampler:
    """What the scripts call: `generate`, whichever engine answers; and for a model in training `pause` before an
    update and `sync` after it.

    A draw depends on (seed, sample number, position) alone, so with the transformers engine a result does not depend on
    what else is in the batch, up to rounding of the logits (1e-6 in float32), which flips about one draw in a million.
    vLLM's rounding varies with the batch in bf16, more than that. The engines turn a seed into different draws.
    """

    def __init__(self, engine: TransformersEngine | VllmEngine, tokenizer):
        self.engine, self.tokenizer = engine, tokenizer
        self.stop_ids = stop_token_ids(tokenizer, engine.generation_config)
        self.sampled_tokens = 0  # drawn
        self.computed_tokens = 0  # run through the model: prompts (shared parts once) and drawn tokens

    def generate(
        self,
        prompts: list[list[int]],
        max_tokens: int | list[int],
        seeds: list[tuple[int, ...]],
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        first: int = 0,
        stop: Sequence[int] = (),
    ) -> list[list[Completion]]:
        """Samples `first … first + n - 1` of each prompt. `max_tokens`: one limit, or one for each prompt; `seeds`: a
        key of integers for each prompt; `stop`: tokens that end a completion beside the end-of-turn tokens.
        Temperature 0 is greedy; its log-probs are those of temperature 1."""
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        if not len(prompts) == len(limits) == len(seeds) or min(limits, default=1) < 1 or not all(prompts):
            raise ValueError("generate() needs a limit of at least 1 and a seed for each non-empty prompt")
        before = self.engine.prompt_tokens
        samples = range(first, first + n)
        stop_ids = sorted({*self.stop_ids, *stop})
        done = self.engine.generate(prompts, limits, seeds, stop_ids, samples, temperature, top_p)
        drawn = sum(len(c.token_ids) for row in done for c in row)
        self.sampled_tokens += drawn
        self.computed_tokens += drawn + self.engine.prompt_tokens - before
        for row in done:
            for c in row:
                c.text, c.offsets = text_and_offsets(self.tokenizer, c.token_ids)
        return done

    @property
    def model(self):
        """The transformers model, for scores that are not sampled."""
        return self.engine.model

    def pause(self) -> None:
        """Before an update: the engine gives back the memory that training needs."""
        self.engine.pause()

    def sync(self) -> None:
        """After an update: what is sampled next is sampled from the trained model's weights."""
        self.engine.sync()

    def close(self) -> None:
        """Gives all memory back."""
        self.engine.close()


# ============================================================================================ vLLM


def vllm_or_why_not() -> tuple[str | None, str]:
    """(what of vLLM works here, why nothing does)."""
    if importlib.util.find_spec("vllm") is None:
        return None, "vLLM is not installed"
    set_vllm_environment()
    try:
        import vllm
        from vllm import LLM  # noqa: F401  `import vllm` alone imports nothing that could fail
        from vllm.platforms import current_platform
    except Exception as error:
        return None, f"vLLM does not import: {type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"
    platform = current_platform.device_type
    if platform not in ("cpu", "cuda"):
        return None, f"vLLM {vllm.__version__} finds no device here (platform {platform or 'unspecified'})"
    return f"vLLM {vllm.__version__} on {platform}", ""


def set_vllm_environment() -> None:
    """Before vllm is imported. Engine and worker in this process: only so can weights be handed over as tensors."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op.*", category=FutureWarning)


class VllmEngine:
    """vLLM as a sampler. `trained`: the transformers model whose weights it follows, or None.

    Weights go over in place: `reload_weights` with an iterator over the state dict, names as transformers has them, the
    tied head included (without it a CPU build silently keeps the old one); then the prefix cache is emptied, or answers
    would continue prefixes computed with the old weights. On CUDA the engine sleeps through the update. Level 2 drops
    weights and cache, so the order on waking is: memory for the weights, the weights, an empty prefix cache, memory for
    it (vLLM issues 29341, 21336).
    """

    def __init__(self, path: str, dtype: torch.dtype, longest: int, trained=None, memory: float = 0.85):
        """path: folder or Hub id; longest: most tokens of a prompt and its completion; memory: share of a GPU's."""
        set_vllm_environment()
        from vllm import LLM
        from vllm.platforms import current_platform

        self.path, self.dtype, self.longest, self.trained = path, dtype, longest, trained
        self.prompt_tokens = 0
        try:
            self.generation_config = GenerationConfig.from_pretrained(path)
        except OSError:
            self.generation_config = None
        on_cuda = current_platform.device_type == "cuda"
        self.sleeps, self.asleep = on_cuda and trained is not None, False
        if on_cuda:
            here = {"gpu_memory_utilization": memory}
        else:
            here: dict[str, Any] = {
                "kv_cache_memory_bytes": 2 << 30,
                "enforce_eager": True,  # compiling costs 20 s and gains a tenth
                "block_size": 32,  # tokens; prefixes are shared in whole blocks; 128 if not told
                "enable_chunked_prefill": False,  # half a prompt and a seed: "CPU Generator does not use offset"
                "max_num_batched_tokens": max(8192, longest),
            }
        if ranks()[1] > 1:  # under torchrun every process has an engine of its own
            here["distributed_executor_backend"] = "external_launcher"
        self.llm = LLM(
            model=path,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=longest,
            logprobs_mode="processed_logprobs",  # of the distribution sampled from, not of temperature 1
            enable_prefix_caching=True,
            enable_sleep_mode=self.sleeps,
            generation_config="vllm",  # no defaults of the model's: the flags say how to sample
            skip_tokenizer_init=True,
            use_tqdm_on_load=False,
            **here,
        )

    def generate(self, prompts, limits, seeds, stop_ids, samples, temperature, top_p) -> list[list[Completion]]:
        """One call for all; one request a sample, with its own seed, so that more samples can follow later."""
        from vllm import SamplingParams

        for prompt, limit in zip(prompts, limits):
            if len(prompt) + limit > self.longest:  # vLLM would refuse the whole batch, or shorten the limit silently
                raise ValueError(f"a prompt of {len(prompt)} tokens + {limit} exceed the engine's {self.longest}")
        requests, params = [], []
        for prompt, limit, seed in zip(prompts, limits, seeds):
            for sample in samples:
                requests.append({"prompt_token_ids": prompt})
                params.append(
                    SamplingParams(
                        temperature=temperature,
                        top_p=top_p,
                        max_tokens=limit,
                        seed=zlib.crc32(np.array([*seed, sample]).tobytes()),
                        stop_token_ids=stop_ids,
                        logprobs=0,  # the drawn token's alone
                        detokenize=False,
                    )
                )
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        rows: list[list[Completion]] = [[] for _ in prompts]
        for number, output in enumerate(outputs):
            self.prompt_tokens += len(output.prompt_token_ids) - (output.num_cached_tokens or 0)
            drawn = output.outputs[0]
            ids = list(drawn.token_ids)
            logprobs = [of_place[token].logprob for token, of_place in zip(ids, drawn.logprobs)]
            reason = "stop" if ids[-1] in stop_ids else "length"
            rows[number // len(samples)].append(Completion(ids, logprobs, reason))
        return rows

    @cached_property
    def model(self) -> Any:
        if self.trained is not None:
            return self.trained
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = AutoModelForCausalLM.from_pretrained(self.path, dtype=self.dtype)
        return model.to(device).eval()

    def pause(self) -> None:
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def sync(self) -> None:
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": full_weights(self.trained)})
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


# ============================================================================================ transformers


class TransformersEngine:
    """A transformers model as a sampler. In training it is the trained model itself, so there is nothing to hand over;
    or, where that is sharded over processes, a whole copy of it, which follows `trained`.

    All prompts of a call are sampled together: prompts that share a prefix (a problem's samples, the forced answers
    along a trace) compute it once, batches are of similar length, finished rows leave them, the cache never grows by
    copying.
    """

    def __init__(self, model, dtype: torch.dtype = torch.float32, max_rows: int = 512, trained=None):
        self.model, self.dtype, self.max_rows, self.trained = model, dtype, max_rows, trained
        self.generation_config = model.generation_config
        self.prompt_tokens = 0

    @torch.inference_mode()
    def generate(self, prompts, limits, seeds, stop_ids, samples, temperature, top_p) -> list[list[Completion]]:
        done: list[list[Completion]] = [[] for _ in prompts]
        # A batch has as many rows as its cache may have; fewer samples than n at a time only if n alone are too many.
        longest = max(map(len, prompts), default=1) + max(limits, default=1)
        memory = torch.cuda.mem_get_info()[0] // 3 if self.model.device.type == "cuda" else 3 << 30
        rows = max(1, min(self.max_rows, memory // (cache_bytes_of_a_token(self.model.config) * longest)))
        for start in range(samples.start, samples.stop, rows):
            some = range(start, min(samples.stop, start + rows))
            room = max(1, rows // len(some))
            packs = sorted(pack_prefixes(prompts, room), key=lambda pack: pack.longest)
            while packs:
                batch = [packs.pop()]
                while packs and sum(len(pack.paths) for pack in [*batch, packs[-1]]) <= room:
                    batch.append(packs.pop())
                for p, completion in self._decode(batch, seeds, limits, stop_ids, some, temperature, top_p):
                    done[p].append(completion)
        return done

    def pause(self) -> None:
        pass

    @torch.no_grad()
    def sync(self) -> None:
        if self.trained is not None:
            mine = self.model.state_dict()
            for name, weights in full_weights(self.trained):
                mine[name].copy_(weights)

    def close(self) -> None:
        pass

    def _decode(self, packs: list[Pack], seeds, limits, stop_ids, samples: range, temperature: float, top_p: float):
        """Runs the packed prompts once, then draws token by token; yields (prompt number, Completion)."""
        device = self.model.device
        cache: Any = DynamicCache()
        stop = torch.tensor(stop_ids, device=device)
        ids, mask, positions = pack_tensors(packs, device)
        with autocast(self.dtype):
            hidden = self.model.base_model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state
        # One row a sample: its prefix gathered from the packed cache, padded on the left so that all rows grow at one
        # place; from here on `alive` are the numbers of the rows still in the batch.
        rows = [(b, p, path, s) for b, pack in enumerate(packs) for p, path in pack.paths.items() for s in samples]
        width = max(len(path) for _, _, path, _ in rows)
        source = torch.tensor([b for b, _, _, _ in rows], device=device)
        columns = torch.tensor([[0] * (width - len(path)) + path for _, _, path, _ in rows], device=device)
        position = torch.tensor([len(path) for _, _, path, _ in rows], device=device)
        limit = torch.tensor([limits[p] for _, p, _, _ in rows], device=device)
        room = int(limit.max())
        mask = torch.arange(width + room, device=device) >= (width - position)[:, None]
        layers = [GrowingLayer(layer, source, columns, room) for layer in cache.layers]
        cache.layers = layers
        with autocast(self.dtype):
            logits = self.model.get_output_embeddings()(hidden[source, columns[:, -1]])
        uniform = np.stack([np.random.default_rng([*seeds[p], s]).random(room) for _, p, _, s in rows])
        uniform = torch.from_numpy(uniform).to(device)
        tokens = torch.zeros(len(rows), room, dtype=torch.long, device=device)
        logprobs = torch.zeros(len(rows), room, device=device)
        lengths = torch.zeros(len(rows), dtype=torch.long, device=device)
        stopped = torch.zeros(len(rows), dtype=torch.bool, device=device)
        alive = torch.arange(len(rows), device=device)
        left = torch.ones_like(stopped)
        for step in range(room):
            token, logprob = draw(logits.float(), uniform[alive, step], temperature, top_p)
            writing = alive[left]
            tokens[writing, step], logprobs[writing, step] = token[left], logprob[left]
            lengths[writing], stopped[writing] = step + 1, torch.isin(token[left], stop)
            left = left & ~stopped[alive] & (step + 1 < limit[alive])
            if not left.any():
                break
            if left.sum() <= 0.9 * len(alive):  # finished rows leave; until then they ride along unrecorded
                for layer in layers:
                    layer.keep_rows(left)
                alive, token, mask, position = alive[left], token[left], mask[left], position[left]
                left = left[left]
            with autocast(self.dtype):
                logits = self.model(
                    input_ids=token[:, None],
                    attention_mask=mask[:, None, None, : width + step + 1],
                    position_ids=position[:, None] + step,
                    past_key_values=cache,
                    use_cache=True,
                ).logits[:, -1]
        self.prompt_tokens += sum(len(pack.token_ids) for pack in packs)
        rows_out = zip(rows, tokens.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist())
        for (_, p, _, _), ids, logps, length, ended in rows_out:
            yield p, Completion(ids[:length], logps[:length], "stop" if ended else "length")


def autocast(dtype: torch.dtype):
    """bf16 arithmetic over float32 weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def cache_bytes_of_a_token(config) -> int:
    """Keys and values of all layers, in float32."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 8 * config.num_hidden_layers * head_dim * getattr(config, "num_key_value_heads", config.num_attention_heads)


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float):
    """One token a row by inverting the distribution function at `uniform` [rows]; returns (token, its log-prob)."""
    logprobs = F.log_softmax(logits / temperature if temperature > 0 else logits, dim=-1)
    if temperature == 0:
        token = logprobs.argmax(-1)
        return token, logprobs.gather(-1, token[:, None]).squeeze(-1)
    if top_p < 1:
        ordered, order = logprobs.sort(dim=-1, descending=True)
        outside = ordered.exp().cumsum(-1) - ordered.exp() >= top_p
        logprobs = logprobs.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf).log_softmax(-1)
    mass = logprobs.double().exp().cumsum(-1)
    total = mass[:, -1:]
    at = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(mass, at, right=True)  # the first place whose mass exceeds `at`: never one without mass
    return token.squeeze(-1), logprobs.gather(-1, token).squeeze(-1)


@dataclass
class Pack:
    """Token sequences that share prefixes, as one row without repetition. `paths[s]` are the places in the row of the
    tokens of sequence s, in order; a token sees the earlier tokens of its own path and nothing else."""

    token_ids: list[int]
    positions: list[int]
    paths: dict[int, list[int]]

    @property
    def longest(self) -> int:
        return max(self.positions) + 1


def pack_prefixes(sequences: list[list[int]], most: int | None = None) -> list[Pack]:
    """Packs sequences that share at least half of their tokens with a neighbour in sorted order, at most `most` in one.

    Sorting makes the sequences a depth-first walk of their prefix tree, so what a sequence shares with any earlier one
    it shares with the one before it: the tokens to compute grow linearly in traces and boundaries.
    """
    packs: list[Pack] = []
    before: list[int] = []
    previous = 0
    for s in sorted(range(len(sequences)), key=sequences.__getitem__):
        ids = sequences[s]
        shared = next((i for i, (a, b) in enumerate(zip(before, ids)) if a != b), min(len(before), len(ids)))
        if not packs or 2 * shared < len(ids) or len(packs[-1].paths) == most:
            packs.append(Pack([], [], {}))
            shared, path = 0, []
        else:
            path = packs[-1].paths[previous][:shared]
        path = path + list(range(len(packs[-1].token_ids), len(packs[-1].token_ids) + len(ids) - shared))
        packs[-1].token_ids += ids[shared:]
        packs[-1].positions += range(shared, len(ids))
        packs[-1].paths[s] = path
        before, previous = ids, s
    return packs


def pack_tensors(packs: list[Pack], device):
    """(ids [B, L], mask [B, 1, L, L] or None where plain causal attention is right, positions [B, L])."""
    width = max(len(pack.token_ids) for pack in packs)
    ids = torch.zeros(len(packs), width, dtype=torch.long)
    positions = torch.zeros(len(packs), width, dtype=torch.long)
    for b, pack in enumerate(packs):
        ids[b, : len(pack.token_ids)] = torch.tensor(pack.token_ids)
        positions[b, : len(pack.positions)] = torch.tensor(pack.positions)
    if all(path == list(range(len(path))) for pack in packs for path in pack.paths.values()):
        return ids.to(device), None, torch.arange(width, device=device)[None].expand(len(packs), -1)
    mask = torch.eye(width, dtype=torch.bool).repeat(len(packs), 1, 1)
    for b, pack in enumerate(packs):
        seen = 0
        for path in pack.paths.values():  # in the order of packing: the tokens from `seen` on are new
            new = [i for i, place in enumerate(path) if place >= seen]
            if new:
                rows = torch.tensor(path[new[0] :])
                mask[b, rows[:, None], torch.tensor(path[: new[0]], dtype=torch.long)[None]] = True
                mask[b, rows[:, None], rows[None]] = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
                seen = path[-1] + 1
    return ids.to(device), mask[:, None].to(device), positions.to(device)


class GrowingLayer(DynamicLayer):
    """A transformers cache layer with free room at its end, so that a token is written in place; the stock layer
    copies the whole cache at every token. Row r starts as the places `columns[r]` of row `source[r]` of `layer`."""

    def __init__(self, layer, source: torch.Tensor, columns: torch.Tensor, room: int):
        super().__init__()
        self.length, self.buffers = columns.shape[1], []
        for states in (layer.keys, layer.values):  # [packs, heads, width, head size]
            rows = states.transpose(1, 2)[source[:, None], columns].transpose(1, 2)
            self.buffers.append(torch.cat([rows, rows.new_empty(*rows.shape[:2], room, rows.shape[3])], dim=2))
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        start, self.length = self.length, self.length + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, start : self.length] = states
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values

    def keep_rows(self, rows: torch.Tensor) -> None:
        self.buffers = [buffer[rows] for buffer in self.buffers]
