"""A transformers model as a sampler, in batches that share prefixes; needs no other library."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import causal_mask_function, sdpa_mask

from engine import Refused, plural, say_once
from engine.checks import Ways, fastest, name_of, not_finite, probes, same_positions, truth
from engine.logprobs import head, update_gaps
from engine.models import autocast
from engine.prefixes import Pack, kept_in, own_masks, pack_prefixes, packed_states, score_gaps, score_sequences
from engine.processes import full_weights
from engine.tokens import Completion

MAX_ROWS = 512  # of a batch


class TransformersEngine:
    """A transformers model as a sampler. In training it is the trained model itself, so no weights are handed over; or,
    where that is sharded over processes, a whole copy that follows `trained`. `ways`: how it may be used, where that
    is known.

    By the way "shared", all prompts of a call are sampled together: prompts that share a prefix (a problem's samples,
    the forced answers along a trace) compute it once, batches hold similar lengths and drop finished rows, and the
    cache grows without copying.
    """

    def __init__(self, model, dtype: torch.dtype = torch.float32, trained=None, ways: Ways | None = None):
        self.model, self.dtype, self.trained = model, dtype, trained
        self.ways = ways or ways_of(model, dtype, trained)
        self.generation_config = model.generation_config
        self.drawn = 0

    def progress(self) -> str:
        return f"{plural(self.drawn, 'token')} so far"

    @torch.inference_mode()
    def generate(self, prompts, limits, seeds, stop_ids, samples: range, temperature: float, top_p: float):
        """([prompts][samples] completions, tokens of prompts that were run through the model), as all engines."""
        self.model.eval()
        self.drawn = 0
        done: list[list[Completion]] = [[] for _ in prompts]
        longest = max(map(len, prompts), default=1) + max(limits, default=1)
        way = self.ways.sample if longest <= same_positions(self.model) else "uncached"
        choose = partial(draw, temperature=temperature, top_p=top_p)
        if way != "shared":
            for p, completion in self._generate_plainly(way, prompts, limits, seeds, stop_ids, samples, choose):
                done[p].append(completion)
            return done, len(samples) * sum(map(len, prompts))
        # The memory for the cache limits a batch's rows; a prompt's n samples are split only if they alone exceed it.
        memory = torch.cuda.mem_get_info()[1] // 4 if self.model.device.type == "cuda" else 3 << 30
        rows = max(1, min(MAX_ROWS, memory // (cache_bytes_of_a_token(self.model.config) * longest)))
        computed = 0
        for start in range(samples.start, samples.stop, rows):
            numbers = range(start, min(samples.stop, start + rows))
            room = max(1, rows // len(numbers))
            packs = sorted(pack_prefixes(prompts, room), key=lambda pack: pack.longest)
            while packs:
                batch = [packs.pop()]
                while packs and sum(len(pack.paths) for pack in [*batch, packs[-1]]) <= room:
                    batch.append(packs.pop())
                computed += sum(len(pack.token_ids) for pack in batch)
                for p, completion in self._decode(batch, limits, seeds, stop_ids, numbers, choose):
                    done[p].append(completion)
        return done, computed

    def _generate_plainly(self, way, prompts, limits, seeds, stop_ids, samples: range, choose):
        """(prompt number, Completion) by the model's own `generate`: rows of one prompt length at a time, so that
        nothing is padded."""
        model, stock = self.model, self.model.generation_config
        rows = sorted(((p, s) for p in range(len(prompts)) for s in samples), key=lambda row: len(prompts[row[0]]))
        for _, of_one_length in groupby(rows, key=lambda row: len(prompts[row[0]])):
            while batch := list(islice(of_one_length, 64)):
                ids = torch.tensor([prompts[p] for p, _ in batch], device=model.device)
                room, drawn = max(limits[p] for p, _ in batch), []
                uniform = self._uniform([(*seeds[p], s) for p, s in batch], room)

                def draw_one(_ids, scores, drawn=drawn, uniform=uniform):
                    token, logprob = choose(scores.float(), uniform[:, len(drawn)])
                    drawn.append((token.tolist(), logprob.tolist()))
                    self.drawn += len(token)
                    return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)

                ends = {"eos_token_id": stop_ids or None, "pad_token_id": (stop_ids or [0])[0]}
                settings = GenerationConfig(max_new_tokens=room, do_sample=False, use_cache=way == "cached", **ends)
                model.generation_config = GenerationConfig()  # without the model's own penalties and lengths
                try:
                    with autocast(self.dtype):
                        model.generate(ids, settings, [draw_one], attention_mask=torch.ones_like(ids))
                finally:
                    model.generation_config = stock
                for row, (p, _) in enumerate(batch):
                    tokens, logprobs = ([step[k][row] for step in drawn[: limits[p]]] for k in (0, 1))
                    end = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), 0)
                    last = end or len(tokens)
                    yield p, finite(Completion(tokens[:last], logprobs[:last], "stop" if end else "length"))

    def _uniform(self, keys: list[tuple[int, ...]], room: int) -> torch.Tensor:
        """What each row is drawn with, [rows, room]: a function of its key alone."""
        rows = [np.random.default_rng(key).random(room) for key in keys]
        return torch.from_numpy(np.stack(rows)).to(self.model.device)

    def score(self, heads: list[list[int]], tails: list[list[int]]) -> tuple[np.ndarray, int]:
        """(log P(tail | head) of each pair [pairs], tokens computed), as all engines."""
        return score_sequences(self.model, self.dtype, self.ways.score, heads, tails)

    def pause(self) -> None: ...

    @torch.no_grad()
    def sync(self) -> None:
        if self.trained is not None:
            copies = self.model.state_dict()
            for name, weights in full_weights(self.trained):
                copies[name].copy_(weights)

    def close(self) -> None: ...

    def _decode(self, packs: list[Pack], limits, seeds, stop_ids, samples: range, choose) -> Iterator:
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
        kept = kept_in(self.model, cache)
        with autocast(self.dtype):
            logits = head(self.model, output.last_hidden_state[source, columns[:, -1]], type(output))
        uniform = self._uniform([(*seeds[p], s) for _, p, _, s in rows], room)
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
            token, logprob = choose(logits.float(), uniform[alive, step])
            writing = alive[running]
            self.drawn += len(writing)
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
                place = position[:, None] + step
                logits = self.model(token[:, None], position_ids=place, use_cache=True, **kept).logits[:, -1]
        rows_out = zip(rows, tokens.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist())
        for (_, p, _, _), ids, logps, length, ended in rows_out:
            yield p, finite(Completion(ids[:length], logps[:length], "stop" if ended else "length"))


def finite(completion: Completion) -> Completion:
    if not np.isfinite(completion.logprobs).all():
        raise not_finite()
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


# ============================================================================================ the start check


def ways_of(model, dtype: torch.dtype = torch.float32, trained=None, samples: bool = True) -> Ways:
    """Before anything is sampled, compares updates, likelihoods and samples with the plain forward of the same
    sequences. What differs takes the plain path and says so; a model whose plain path differs, too, is refused.
    `trained`: the model that is updated, where `model` is its copy; `samples`: False where another engine samples."""
    name, updated, notes = name_of(model), model if trained is None else trained, []
    versions = [weights._version for weights in model.parameters()]
    update, off = fastest(updated, dtype, ("chunks", "rows"), partial(update_gaps, updated))
    if update is None:
        raise Refused(f"{name}: two equal forward passes give different log-probs ({off['rows']})")
    if update == "rows":
        notes.append(f"an update takes one row at a time (batches: {off['chunks']})")
    score, off = fastest(model, dtype, ("shared", "rows"), partial(score_gaps, model, dtype))
    if score != "shared":
        notes.append(f"likelihoods take one forward a boundary (shared prefixes: {off['shared']})")
    tried = ("shared", "cached", "uncached") if samples else ()
    sample, off = fastest(model, dtype, tried, partial(sample_gaps, model, dtype))
    if samples and sample is None:
        gaps = "; ".join(f"{way}: {gap}" for way, gap in off.items())
        raise Refused(f"{name}: no way to sample from it equals its plain forward ({gaps}); try --engine vllm")
    if sample in ("cached", "uncached"):
        cache = "" if sample == "cached" else " without a cache"
        notes.append(f"transformers' generate samples{cache} (shared prefixes: {off['shared']})")
    if notes:
        say_once(f"{name} takes plain paths: {'; '.join(notes)}")
    if (same := same_positions(updated)) < float("inf"):
        warning = f"warning: {name}: beyond {same} tokens its positions depend on the length of the whole sequence, so "
        say_once(warning + "sampler and trainer differ there; keep prompt and completion below it")
    unchanged = versions == [weights._version for weights in model.parameters()]
    return Ways(sample or "", update, score or "rows", unchanged)


def sample_gaps(model, dtype: torch.dtype, way: str) -> torch.Tensor:
    """How far greedy samples of the probes are off, [N] in nats: their log-probs, and what a better token would have
    had more; for `fastest`."""
    prompts, limits = probes(model), [5, 4, 5, 3, 5, 4]
    engine, gaps = TransformersEngine(model, dtype, ways=Ways(way, "rows", "rows")), []
    rows, _ = engine.generate(prompts, limits, [(i,) for i in range(6)], [], range(1), 0.0, 1.0)
    for prompt, (c,) in zip(prompts, rows):
        expected = truth(model, prompt + c.token_ids)[len(prompt) - 1 :]
        chosen = expected.gather(-1, torch.tensor(c.token_ids, device=model.device)[:, None])[:, 0]
        gaps.append((chosen - torch.tensor(c.logprobs, device=model.device)).abs() + (expected.amax(-1) - chosen))
    return torch.cat(gaps)
