"""A transformers model as a sampler and as a scorer, in batches that share prefixes; needs no other library."""

from __future__ import annotations

import math
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask

from plumbing.models import (
    Completion,
    autocast,
    body_of,
    check_update,
    head,
    name_of,
    off,
    probes,
    rms,
    same_positions,
    say_once,
    tolerance,
    truth,
    with_short_windows,
)
from plumbing.runs import fail
from plumbing.served_engine import ServedEngine
from plumbing.training import full_weights


class TransformersEngine:
    """A transformers model as a sampler. In training it is the trained model itself, so no weights are handed over; or,
    where that is sharded over processes, a whole copy that follows `trained`.

    `model.samples`: the fastest way to sample that `check_sampling` finds equal to the model's plain forward:
    "shared" (below), "cached" (transformers' own `generate`, prompts of one length at a time) or "uncached".

    All prompts of a call are sampled together: prompts that share a prefix (a problem's samples, the forced answers
    along a trace) compute it once, batches hold similar lengths and drop finished rows, and the cache grows without
    copying.
    """

    def __init__(self, model, dtype: torch.dtype = torch.float32, max_rows: int = 512, trained=None):
        self.model, self.dtype, self.max_rows, self.trained = model, dtype, max_rows, trained
        self.generation_config = model.generation_config
        self.prompt_tokens = 0

    @torch.inference_mode()
    def generate(self, prompts, limits, seeds, stop_ids, samples, temperature, top_p) -> list[list[Completion]]:
        if not hasattr(self.model, "samples"):
            say_once(check_sampling(self.model, self))
        self.model.eval()
        done: list[list[Completion]] = [[] for _ in prompts]
        longest = max(map(len, prompts), default=1) + max(limits, default=1)
        way = self.model.samples if longest <= same_positions(self.model) else "uncached"
        if way != "shared":
            self._generate_plainly(way, done, prompts, limits, seeds, stop_ids, samples, temperature, top_p)
            return done
        # The memory for the cache limits a batch's rows; a prompt's n samples are split only if they alone exceed it.
        memory = torch.cuda.mem_get_info()[1] // 4 if self.model.device.type == "cuda" else 3 << 30
        rows = max(1, min(self.max_rows, memory // (cache_bytes_of_a_token(self.model.config) * longest)))
        for start in range(samples.start, samples.stop, rows):
            numbers = range(start, min(samples.stop, start + rows))
            room = max(1, rows // len(numbers))
            packs = sorted(pack_prefixes(prompts, room), key=lambda pack: pack.longest)
            while packs:
                batch = [packs.pop()]
                while packs and sum(len(pack.paths) for pack in [*batch, packs[-1]]) <= room:
                    batch.append(packs.pop())
                for p, completion in self._decode(batch, seeds, limits, stop_ids, numbers, temperature, top_p):
                    done[p].append(completion)
        return done

    def _generate_plainly(self, way, done, prompts, limits, seeds, stop_ids, samples: range, temperature, top_p):
        """Rows of one prompt length at a time, so that nothing is padded."""
        rows = sorted(((p, s) for p in range(len(prompts)) for s in samples), key=lambda row: len(prompts[row[0]]))
        for _, of_one_length in groupby(rows, key=lambda row: len(prompts[row[0]])):
            while batch := list(islice(of_one_length, 64)):
                ids = torch.tensor([prompts[p] for p, _ in batch], device=self.model.device)
                room = max(limits[p] for p, _ in batch)
                uniform = np.stack([np.random.default_rng([*seeds[p], s]).random(room) for p, s in batch])
                drawn = self._draw_plainly(way, ids, room, torch.from_numpy(uniform), stop_ids, temperature, top_p)
                self.prompt_tokens += ids.numel()
                for row, (p, _) in enumerate(batch):
                    tokens, logprobs = ([step[k][row] for step in drawn[: limits[p]]] for k in (0, 1))
                    end = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), 0)
                    last = end or len(tokens)
                    done[p].append(finite(Completion(tokens[:last], logprobs[:last], "stop" if end else "length")))

    def _draw_plainly(self, way, ids, room: int, uniform, stop_ids, temperature, top_p) -> list[tuple[list, list]]:
        """(tokens, log-probs) of the rows at each position, by the model's own `generate`."""
        model, stock, drawn = self.model, self.model.generation_config, []
        uniform = uniform.to(model.device)

        def choose(_ids, scores):
            token, logprob = draw(scores.float(), uniform[:, len(drawn)], temperature, top_p)
            drawn.append((token.tolist(), logprob.tolist()))
            return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)

        ends = {"eos_token_id": stop_ids or None, "pad_token_id": (stop_ids or [0])[0]}
        settings = GenerationConfig(max_new_tokens=room, do_sample=False, use_cache=way == "cached", **ends)
        model.generation_config = GenerationConfig()  # without the model's own penalties and lengths
        try:
            with autocast(self.dtype):
                model.generate(ids, settings, [choose], attention_mask=torch.ones_like(ids))
        finally:
            model.generation_config = stock
        return drawn

    def pause(self) -> None:
        pass

    @torch.no_grad()
    def sync(self) -> None:
        if self.trained is not None:
            copies = self.model.state_dict()
            for name, weights in full_weights(self.trained):
                copies[name].copy_(weights)

    def close(self) -> None:
        pass

    def _decode(self, packs: list[Pack], seeds, limits, stop_ids, samples: range, temperature: float, top_p: float):
        """Runs the packed prompts once, then draws token by token; yields (prompt number, Completion)."""
        device = self.model.device
        cache: Any = DynamicCache()
        stop = torch.tensor(stop_ids, device=device)
        with autocast(self.dtype):
            output = packed_states(self.model, packs, cache)
        # One row a sample: its prefix gathered from the packed cache, padded on the left so that all rows grow in the
        # same column; `alive`: the numbers of the rows still in the batch.
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
            logits = head(self.model, output.last_hidden_state[source, columns[:, -1]], type(output))
        uniform = np.stack([np.random.default_rng([*seeds[p], s]).random(room) for _, p, _, s in rows])
        uniform = torch.from_numpy(uniform).to(device)
        tokens = torch.zeros(len(rows), room, dtype=torch.long, device=device)
        logprobs = torch.zeros(len(rows), room, device=device)
        lengths = torch.zeros(len(rows), dtype=torch.long, device=device)
        stopped = torch.zeros(len(rows), dtype=torch.bool, device=device)
        alive = torch.arange(len(rows), device=device)
        running = torch.ones_like(stopped)

        def without_padding(stock, *, mask_function, kv_length, **options):
            seen = mask[:, :kv_length]
            if stock is sdpa_mask and mask_function is causal_mask_function:
                return seen[:, None, None]
            return stock(mask_function=mask_function, kv_length=kv_length, **{**options, "attention_mask": seen})

        for step in range(room):
            token, logprob = draw(logits.float(), uniform[alive, step], temperature, top_p)
            writing = alive[running]
            tokens[writing, step], logprobs[writing, step] = token[running], logprob[running]
            lengths[writing], stopped[writing] = step + 1, torch.isin(token[running], stop)
            running = running & ~stopped[alive] & (step + 1 < limit[alive])
            if not running.any():
                break
            if running.sum() <= 0.9 * len(alive):  # finished rows leave; until then they ride along unrecorded
                for layer in layers:
                    layer.keep_rows(running)
                alive, token, mask, position = alive[running], token[running], mask[running], position[running]
                running = running[running]
            with autocast(self.dtype), own_masks(self.model, without_padding):
                logits = self.model(
                    input_ids=token[:, None],
                    position_ids=position[:, None] + step,
                    past_key_values=cache,
                    use_cache=True,
                ).logits[:, -1]
        self.prompt_tokens += sum(len(pack.token_ids) for pack in packs)
        rows_out = zip(rows, tokens.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist())
        for (_, p, _, _), ids, logps, length, ended in rows_out:
            yield p, finite(Completion(ids[:length], logps[:length], "stop" if ended else "length"))


def finite(completion: Completion) -> Completion:
    if not np.isfinite(completion.logprobs).all():
        fail("the model's logits are not finite (a weight is NaN or infinite, or the arithmetic overflows)")
    return completion


def cache_bytes_of_a_token(config) -> int:
    """Keys and values of all layers, in float32."""
    config = config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 8 * config.num_hidden_layers * head_dim * heads


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float):
    """One token a row by inverting the distribution function at `uniform` [rows]; returns (token, its log-prob)."""
    logprobs = F.log_softmax(logits / temperature if temperature > 0 else logits, dim=-1)
    if temperature == 0:
        token = logprobs.argmax(-1)
        return token, logprobs.gather(-1, token[:, None]).squeeze(-1)
    if top_p < 1:
        ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
        outside = ordered.exp().cumsum(-1) - ordered.exp() >= top_p
        logprobs = logprobs.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf).log_softmax(-1)
    mass = logprobs.double().exp().cumsum(-1)
    total = mass[:, -1:]
    threshold = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(mass, threshold, right=True)  # the first to exceed it: never one of probability 0
    token = token.clamp(max=logprobs.shape[-1] - 1)  # NaN is never found; `finite` reports it
    return token.squeeze(-1), logprobs.gather(-1, token).squeeze(-1)


@dataclass
class Pack:
    """Token sequences that share prefixes, as one row without repetition. `paths[s]` are the columns of the row that
    hold sequence s, in order; a token sees the earlier tokens of its own path and nothing else."""

    token_ids: list[int]
    positions: list[int]
    paths: dict[int, list[int]]

    @property
    def longest(self) -> int:
        return max(self.positions) + 1


def pack_prefixes(sequences: list[list[int]], most: int | None = None) -> list[Pack]:
    """Packs sequences that share at least half of their tokens with a neighbour in sorted order, `most` to a pack.

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
    """(ids [B, L], mask [B, 1, L, L] or None where no path branches, positions [B, L])."""
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


def packed_states(model, packs: list[Pack], cache=None):
    """The output of the model's body for ids [packs, columns], its own masks taken over positions and within paths."""
    ids, paths, positions = pack_tensors(packs, model.device)
    body = partial(body_of(model), ids, position_ids=positions, past_key_values=cache, use_cache=cache is not None)
    if paths is None:
        return body()

    def along_paths(stock, *, mask_function, **options):
        if stock is sdpa_mask and mask_function is causal_mask_function:
            return paths

        def inside(b, h, q, kv):
            path: Any = paths
            path = path if q.ndim == 4 else path[b, 0, q, kv]  # flex attention asks for one pair at a time
            return mask_function(b, h, positions[b, q], positions[b, kv]) & path

        return stock(mask_function=inside, **{**options, "attention_mask": None, "allow_is_causal_skip": False})

    with own_masks(model, along_paths):  # without a mask, positions that restart would pass for new sequences
        return body(attention_mask=torch.ones_like(ids))


@contextmanager
def own_masks(model, make):
    """Inside, `make(stock, mask_function=…, …)` makes the masks that the model asks transformers for: the model says
    which one each layer needs (causal, with a window, in chunks: `mask_function`), and `stock`, transformers' own
    function, in which form its attention takes it."""
    name = model.config.get_text_config()._attn_implementation
    stock = ALL_MASK_ATTENTION_FUNCTIONS[name]
    ALL_MASK_ATTENTION_FUNCTIONS[name] = partial(make, stock)
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS[name] = stock


class GrowingLayer(DynamicLayer):
    """A transformers cache layer with free room at its end, so that a token is written in place; the stock layer
    copies the whole cache at every token. Row r starts as the columns `columns[r]` of row `source[r]` of `layer`."""

    def __init__(self, layer, source: torch.Tensor, columns: torch.Tensor, room: int):
        super().__init__()
        self.length, self.buffers = columns.shape[1], []
        for states in (layer.keys, layer.values):  # [packs, heads, width, head size]
            rows = states.transpose(1, 2)[source[:, None], columns].transpose(1, 2)
            self.buffers.append(torch.cat([rows, rows.new_empty(*rows.shape[:2], room, rows.shape[3])], dim=2))
        self.is_initialized = True
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)

    def update(self, key_states, value_states, *args, **kwargs):
        start, self.length = self.length, self.length + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, start : self.length] = states
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values

    def keep_rows(self, rows: torch.Tensor) -> None:
        self.buffers = [buffer[rows] for buffer in self.buffers]


@torch.inference_mode()
def sequence_logprobs(sampler, heads: list[list[int]], tails: list[list[int]]) -> np.ndarray:
    """log P(tail | head) for each pair, [pairs]; shared prefixes are computed once."""
    if isinstance(sampler.engine, ServedEngine):
        sampler.computed_tokens += sum(map(len, [*heads, *tails]))
        return np.array(sampler.engine.at_once(sampler.engine.score, list(zip(heads, tails))))
    model, dtype = sampler.model, sampler.engine.dtype
    if not hasattr(model, "packs"):
        say_once(check_likelihood(model, dtype))
    longest = max((len(h) + len(t) for h, t in zip(heads, tails)), default=0)
    shared = model.packs and longest <= same_positions(model)
    sums, computed = (packed_logprobs if shared else row_logprobs)(model, dtype, heads, tails)
    sampler.computed_tokens += computed
    if np.isnan(sums).any():
        fail("the model's logits are not finite (a weight is NaN or infinite, or the arithmetic overflows)")
    return sums


def packed_logprobs(model, dtype: torch.dtype, heads, tails) -> tuple[np.ndarray, int]:
    """(log P(tail | head) of each pair, tokens computed), shared prefixes once."""
    model.eval()
    out, computed = np.zeros(len(heads)), 0
    packs = sorted(pack_prefixes([h + t for h, t in zip(heads, tails)]), key=lambda p: len(p.token_ids))
    while packs:
        batch = [packs.pop()]
        width = len(batch[0].token_ids)
        while packs and (len(batch) + 1) * width <= 16_384:
            batch.append(packs.pop())
        with autocast(dtype):
            output = packed_states(model, batch)
        computed += sum(len(pack.token_ids) for pack in batch)
        items = [(b, s, path) for b, pack in enumerate(batch) for s, path in pack.paths.items()]
        row = torch.tensor([b for b, s, _ in items for _ in tails[s]], device=model.device)
        column = torch.tensor([c for _, s, path in items for c in path[-len(tails[s]) - 1 : -1]], device=model.device)
        target = torch.tensor([t for _, s, _ in items for t in tails[s]], device=model.device)
        owner = np.array([s for _, s, _ in items for _ in tails[s]])
        with autocast(dtype):
            logits = head(model, output.last_hidden_state[row, column], type(output)).float()
        logprobs = logits.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
        np.add.at(out, owner, logprobs.double().cpu().numpy())
    return out, computed


def row_logprobs(model, dtype: torch.dtype, heads, tails) -> tuple[np.ndarray, int]:
    """As `packed_logprobs`, one plain forward a pair."""
    model.eval()
    out = np.zeros(len(heads))
    for i, (first, tail) in enumerate(zip(heads, tails)):
        with autocast(dtype):
            logprobs = truth(model, first + tail)[-len(tail) :]
        out[i] = float(logprobs.gather(-1, torch.tensor(tail, device=model.device)[:, None]).double().sum())
    return out, sum(map(len, heads)) + sum(map(len, tails))


# ============================================================================================ is it the model's own?


def self_check(engine, model) -> None:
    """Before anything is sampled, compares engine, update and likelihood with the plain forward of the same sequences;
    what differs takes the plain path and says so, and the run ends where that differs, too."""
    with autocast(engine.dtype):
        notes = [check_update(model)]
    notes.append(check_likelihood(engine.model, engine.dtype))
    if isinstance(engine, TransformersEngine):
        notes.append(check_sampling(engine.model, engine))
    if any(notes):
        say_once(f"{name_of(model)} takes plain paths: {'; '.join(filter(None, notes))}")


@torch.inference_mode()
@with_short_windows
def check_sampling(model, engine: TransformersEngine) -> str:
    """Sets `model.samples` to the fastest way whose greedy tokens and log-probs are those of plain forwards; returns a
    note if it is a slow one."""
    prompt_tokens, gaps = engine.prompt_tokens, {}
    model.eval()
    prompts = probes(model)
    with autocast(engine.dtype):
        limit = tolerance(model, prompts[0])
    for model.samples in ("shared", "cached", "uncached"):
        gaps[model.samples] = math.inf
        with suppress(Exception):
            rows = engine.generate(prompts, [5, 4, 5, 3, 5, 4], [(i,) for i in range(6)], [], range(1), 0.0, 1.0)
            off_by = []
            for prompt, (c,) in zip(prompts, rows):
                with autocast(engine.dtype):
                    expected = truth(model, prompt + c.token_ids)[len(prompt) - 1 :]
                chosen = expected.gather(-1, torch.tensor(c.token_ids, device=model.device)[:, None])[:, 0]
                reported = torch.tensor(c.logprobs, device=model.device)
                off_by.append((chosen - reported).abs() + (expected.amax(-1) - chosen))
            gaps[model.samples] = rms(torch.cat(off_by))
        if gaps[model.samples] <= limit:
            break
    else:
        ways = "; ".join(f"{way}: {off(gap)}" for way, gap in gaps.items())
        fail(f"{name_of(model)}: no way to sample from it equals its plain forward ({ways}); try --engine vllm")
    engine.prompt_tokens = prompt_tokens
    if model.samples == "shared":
        return ""
    cache = "" if model.samples == "cached" else " without a cache"
    return f"transformers' generate samples{cache} (shared prefixes: {off(gaps['shared'])})"


@torch.inference_mode()
@with_short_windows
def check_likelihood(model, dtype: torch.dtype) -> str:
    """Sets `model.packs`: may sequences that share prefixes be scored as one row? Returns a note if not."""
    model.eval()
    heads = probes(model)
    tails = [heads[-1][: 1 + i % 3] for i in range(len(heads))]
    with autocast(dtype):
        limit = tolerance(model, heads[0])
    expected, _ = row_logprobs(model, dtype, heads, tails)
    gap = math.inf
    with suppress(Exception):
        sums, _ = packed_logprobs(model, dtype, heads, tails)
        gap = rms(torch.from_numpy((sums - expected) / [len(tail) for tail in tails]))
    model.packs = gap <= limit
    return "" if model.packs else f"likelihoods take one forward a boundary (shared prefixes: {off(gap)})"
