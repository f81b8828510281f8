"""The sampler against transformers' own generate and forward, and what its callers rely on."""

import collections
import math

import numpy as np
import pytest
import torch

from engine import transformers_engine
from engine.prefixes import pack_prefixes, pack_tensors
from engine.tokens import encode, text_and_offsets
from engine.transformers_engine import draw


def keys(prompts, seed=0):
    return [(seed, i) for i in range(len(prompts))]


@pytest.fixture(scope="module")
def uneven(tokenizer, prompts):
    """Prompts of different lengths."""
    more = encode(tokenizer, "Okay, try x = 8: 8² ≡ 3, + 17 ≡ 20 vs 5: no.\n\n")
    return [p + more[: i % 7] for i, p in enumerate(prompts)]


def test_greedy_tokens_equal_transformers_generate(model, sampler, uneven):
    for prompt, (completion,) in zip(uneven, sampler.generate(uneven, 40, keys(uneven), temperature=0)):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        assert completion.token_ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.0, 0.8)])
def test_log_probs_are_those_of_the_distribution_sampled_from(model, sampler, uneven, temperature, top_p):
    rows = sampler.generate(uneven, 30, keys(uneven), n=2, temperature=temperature, top_p=top_p)
    for prompt, row in zip(uneven, rows):
        for c in row:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + c.token_ids])).logits[0, len(prompt) - 1 : -1]
            logits = logits.double() / temperature
            probs = logits.softmax(-1)
            if top_p < 1:  # written the long way: keep tokens, most likely first, until their mass reaches top_p
                for p in probs:
                    mass = 0.0
                    for token in p.argsort(descending=True).tolist():
                        keep = mass < top_p
                        mass += float(p[token])
                        p[token] = p[token] if keep else 0
                probs /= probs.sum(-1, keepdim=True)
            expected = probs.log()[torch.arange(len(c.token_ids)), torch.tensor(c.token_ids)]
            np.testing.assert_allclose(c.logprobs, expected.tolist(), atol=1e-4)


def test_draws_follow_the_distribution():
    """A chi-square test of 20,000 draws, and no token without probability is ever drawn."""
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -1.0, 2.0, -math.inf]])
    uniform = torch.from_numpy(np.random.default_rng(0).random(20_000))
    token, _ = draw(logits.expand(20_000, -1), uniform, 1.0, 1.0)
    counts = torch.bincount(token, minlength=6).double()
    expected = logits[0].double().softmax(-1) * 20_000
    assert counts[0] == counts[5] == 0
    assert float(((counts - expected) ** 2 / expected)[1:5].sum()) < 16.3  # 99.9 % of χ² with 3 degrees of freedom
    for u in (0.0, 1 - 2**-53):
        token, logprob = draw(logits, torch.tensor([u], dtype=torch.float64), 1.0, 1.0)
        assert torch.isfinite(logprob).all() and token.item() in (1, 4)


def test_a_sample_depends_on_its_seed_and_number_and_not_on_the_batch(sampler, uneven, monkeypatch):
    together = sampler.generate(uneven, 50, keys(uneven), n=3)
    alone = sampler.generate(uneven[4:5], 50, [(0, 4)], n=3)[0]
    later = sampler.generate(uneven[4:5], 50, [(0, 4)], n=1, first=2)[0]
    monkeypatch.setattr(transformers_engine, "MAX_ROWS", 2)
    tight = sampler.generate(uneven[3:6], 50, keys(uneven)[3:6], n=3)[1]
    expected = [c.token_ids for c in together[4]]
    assert [c.token_ids for c in alone] == expected and [c.token_ids for c in tight] == expected
    assert later[0].token_ids == expected[2]
    assert len({tuple(ids) for ids in expected}) > 1
    other = sampler.generate(uneven[4:5], 50, [(1, 4)], n=3)[0]
    assert [c.token_ids for c in other] != expected


def test_each_prompt_keeps_its_own_limit(sampler, uneven):
    limits = [1 + 3 * i for i in range(len(uneven))]
    for limit, (c,) in zip(limits, sampler.generate(uneven, limits, keys(uneven))):
        assert len(c.token_ids) == len(c.logprobs) <= limit
        assert c.finish_reason == ("length" if len(c.token_ids) == limit and c.token_ids[-1] != 257 else "stop")


def test_counts_what_it_samples_and_computes_shared_prefixes_once(sampler, prompts):
    prefix = prompts[0] + list(range(300, 360))
    asked = [prefix[: len(prompts[0]) + 10 * k] + [260, 261] for k in range(2, 7)]
    before = sampler.computed_tokens, sampler.sampled_tokens
    done = sampler.generate(asked, 3, keys(asked), n=4)
    sampled = sum(len(c.token_ids) for row in done for c in row)
    assert sampler.sampled_tokens - before[1] == sampled
    assert sampler.computed_tokens - before[0] == sampled + len(prefix) + 5 * 2  # not Σ of the five prompts
    assert len(pack_prefixes(asked)) == 1


def test_packed_rows_give_the_hidden_states_of_separate_rows(model):
    rng = np.random.default_rng(0)
    trunk = rng.integers(0, 600, 30).tolist()
    sequences = [trunk[:k] + rng.integers(0, 600, 4).tolist() for k in (5, 10, 11, 20, 30)] + [
        trunk,
        trunk[:20],
        [7, 8],
    ]
    packs = pack_prefixes(sequences)
    assert collections.Counter(s for pack in packs for s in pack.paths) == collections.Counter(range(len(sequences)))
    ids, mask, positions = pack_tensors(packs, "cpu")
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
        for b, pack in enumerate(packs):
            for s, path in pack.paths.items():
                assert [pack.token_ids[i] for i in path] == sequences[s]
                alone = model.base_model(input_ids=torch.tensor([sequences[s]])).last_hidden_state[0]
                torch.testing.assert_close(hidden[b, path], alone, atol=2e-4, rtol=1e-4)


def test_sequence_log_probs_equal_a_plain_forward(model, sampler, uneven):
    heads = [p[:k] for p in uneven for k in (3, 6, len(p))]
    tails = [[5, 6, 7, 8][: 1 + i % 4] for i in range(len(heads))]
    got = sampler.score(heads, tails)
    for head, tail, value in zip(heads, tails, got):
        with torch.no_grad():
            logp = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        assert value == pytest.approx(sum(float(logp[len(head) - 1 + i, t]) for i, t in enumerate(tail)), abs=1e-4)


@pytest.mark.parametrize("prompts, limit", [([[]], 5), ([[1]], 0)])
def test_refuses_empty_prompts_and_empty_budgets(sampler, prompts, limit):
    with pytest.raises(ValueError):
        sampler.generate(prompts, limit, [(0,)])


def test_text_and_offsets_cover_the_text_and_hold_characters_of_several_tokens(tokenizer):
    text = "Okay, try x = 8: 8² ≡ 3,é漢🙂 end\n\n"
    ids = [*encode(tokenizer, text), tokenizer.eos_token_id]
    got, offsets = text_and_offsets(tokenizer, ids)
    assert got == text and offsets[0] == 0 and offsets[-1] == len(text) and len(offsets) == len(ids) + 1
    assert offsets == sorted(offsets)
    cut, _ = text_and_offsets(tokenizer, encode(tokenizer, "🙂")[:2])
    assert "\ufffd" not in cut
