"""A transformers model as a sampler and as a scorer, in batches that share prefixes; needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from plumbing.models import Completion, autocast
from plumbing.served_engine import ServedEngine
from plumbing.training import full_weights


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


@torch.inference_mode()
def sequence_logprobs(sampler: Sampler, heads: list[list[int]], tails: list[list[int]]) -> np.ndarray:
    """log P(tail | head) for each pair, shared prefixes computed once.

    With head = prefix + stop phrase + cue and tail = gold answer + "}" its exponential is J(μ|prefix) for answers
    that follow the cue at once: exact, without a sampled token, "the change in the likelihood of eventual success" of
    the paper's abstract. It is μ's success rate itself only where μ answers in this form (the embedded model does).
    """
    if isinstance(sampler.engine, ServedEngine):
        sampler.computed_tokens += sum(map(len, [*heads, *tails]))
        return np.array(sampler.engine.at_once(sampler.engine.score, list(zip(heads, tails))))
    model, out = sampler.model, np.zeros(len(heads))
    packs = sorted(pack_prefixes([h + t for h, t in zip(heads, tails)]), key=lambda p: len(p.token_ids))
    while packs:
        batch = [packs.pop()]
        width = len(batch[0].token_ids)
        while packs and (len(batch) + 1) * width <= 16_384:
            batch.append(packs.pop())
        ids, mask, positions = pack_tensors(batch, model.device)
        with autocast(sampler.engine.dtype):
            hidden = model.base_model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
        sampler.computed_tokens += sum(len(pack.token_ids) for pack in batch)
        items = [(b, s, path) for b, pack in enumerate(batch) for s, path in pack.paths.items()]
        row = torch.tensor([b for b, s, _ in items for _ in tails[s]], device=model.device)
        column = torch.tensor([c for _, s, path in items for c in path[-len(tails[s]) - 1 : -1]], device=model.device)
        target = torch.tensor([t for _, s, _ in items for t in tails[s]], device=model.device)
        owner = np.array([s for _, s, _ in items for _ in tails[s]])
        with autocast(sampler.engine.dtype):
            logits = model.get_output_embeddings()(hidden[row, column]).float()
        logprobs = logits.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
        np.add.at(out, owner, logprobs.double().cpu().numpy())
    return out
