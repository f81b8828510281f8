"""The loss and the log-probs: each rule that a well-known GRPO implementation gets wrong somewhere is a test here."""

import argparse
import copy
import math

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import common
import engine.logprobs
import engine.tokens
from common import Segmentation, group_advantages, grpo_loss
from engine.logprobs import token_logprobs
from run import training


def double(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_tokens(count=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(count, generator=g, dtype=torch.float64) * 3
    return logp, torch.randn(count, generator=g, dtype=torch.float64)


def loss_of(logp, old, advantage, denominator, **more):
    """(the loss, its gradient)"""
    logp = logp.detach().clone().requires_grad_()
    loss, _ = grpo_loss(logp, old.detach(), advantage, denominator, **more)
    loss.backward()
    return loss.item(), logp.grad


@pytest.mark.parametrize("split", [[1] * 40, [2, 38], [39, 1], [40]])
def test_rules_1_and_2_the_gradient_is_minus_advantage_over_tokens_whatever_the_micro_batches(split):
    logp, advantage = random_tokens()
    for shift in (0.0, 0.1):
        parts = zip(logp.split(split), (logp - shift).split(split), advantage.split(split))
        got = torch.cat([loss_of(*part, 40)[1] for part in parts])
        torch.testing.assert_close(got, -advantage * math.exp(shift) / 40)


@pytest.mark.parametrize("filler", [0, 77, 400])
def test_rule_3_padding_changes_neither_loss_nor_gradient_whatever_it_holds(model, filler):
    """Rows of different lengths in one padded batch, against each row alone."""
    net, rng = copy.deepcopy(model), np.random.default_rng(0)
    lengths = (5, 9, 14, 23)
    examples = [(rng.integers(0, 600, n).tolist(), 3, rng.normal(size=(1, n - 3)).astype("f")) for n in lengths]
    tokens = sum(row.size for *_, row in examples)

    def loss_and_gradient(limit):
        net.zero_grad()
        total = 0.0
        for order, ids, where, (advantage,) in training.micro_batches(examples, range(4), limit, "cpu"):
            for row, i in enumerate(order):
                ids[row, len(examples[i][0]) :] = filler
            logp, _ = token_logprobs(net, ids, where)
            loss, _ = grpo_loss(logp, logp.detach() - 0.1, advantage, tokens, 0.2, logp.detach() - 0.3, 0.1)
            loss.backward()
            total += loss.item()
        return total, [p.grad.clone() for p in net.parameters()]

    alone, padded = loss_and_gradient(1), loss_and_gradient(10_000)
    assert padded[0] == pytest.approx(alone[0], abs=1e-6)
    torch.testing.assert_close(padded[1], alone[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_rule_4_clipping_stops_only_the_gradient_that_leads_further_away(advantage):
    for shift in (0.3, 0.1, -0.1, -0.3):
        stopped = abs(shift) > 0.2 and advantage * shift > 0
        _, got = loss_of(double(-1 + shift), double(-1), double(advantage), 1)
        assert got.item() == pytest.approx(0.0 if stopped else -advantage * math.exp(shift))


def test_rule_5_k3_is_zero_at_equality_and_bounded_far_away():
    logp, zero = double(-1, -2), double(0, 0)
    loss, got = loss_of(logp, logp, zero, 2, ref_logprobs=logp, kl=1.0)
    assert loss == 0 and (got == 0).all() and grpo_loss(logp, logp, zero, 2, ref_logprobs=logp, kl=1.0)[1]["kl"] == 0
    far, _ = loss_of(logp - 800, logp - 800, zero, 2, ref_logprobs=logp, kl=1.0)
    assert far == pytest.approx(math.exp(10) - 11)


def test_rule_6_k3_estimates_kl_policy_to_reference_and_its_gradient_is_the_other_kl():
    logits, ref = double(0.3, -0.5, 1.0, 0.1).requires_grad_(), double(0.9, 0.2, -0.4, 0.0).log_softmax(-1)
    logp = logits.log_softmax(-1)
    rows = zip(logp.split(1), ref.split(1))
    values = torch.stack([grpo_loss(a, a.detach(), double(0), 1, ref_logprobs=b, kl=1.0)[0] for a, b in rows])
    expected = (logp.exp().detach() * values).sum()  # over samples of the policy, exactly
    assert expected.item() == pytest.approx((logp.exp() * (logp - ref)).sum().item())  # KL(π‖ref)
    (grad,) = torch.autograd.grad(expected, logits, retain_graph=True)
    (reverse,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits)  # KL(ref‖π)
    torch.testing.assert_close(grad, reverse)


def test_rule_7_flat_groups_and_groups_of_one_have_exactly_no_advantage():
    flat = torch.tensor([[0.01] * 4, [0.3, 0.3, 0.1 + 0.2, 0.3], [1.0] * 4], dtype=torch.float64)
    for rewards in (flat, flat.float(), torch.tensor([[1.0], [0.0]])):
        assert (group_advantages(rewards) == 0).all()


def test_rule_8_difficulty_weighting_of_the_std_is_what_the_docstring_says():
    found = group_advantages(double(*[0] * 15, 1)[None])
    assert found[0, 15].item() == pytest.approx(0.9375 / (math.sqrt(15) / 16 + 1e-4))
    assert found.sum().item() == pytest.approx(0, abs=1e-9)


def test_rule_9_inputs_are_left_as_they_are(model):
    logp, advantage = random_tokens()
    inputs = [
        logp,
        logp - 0.1,
        advantage,
        logp - 0.2,
        torch.randint(0, 600, (2, 7)),
        torch.arange(14).view(2, 7) % 7 > 2,
    ]
    before = copy.deepcopy(inputs)
    grpo_loss(*inputs[:3], 10, ref_logprobs=inputs[3], kl=0.1)
    with torch.no_grad():
        token_logprobs(model, *inputs[4:], 0.7)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("padded", [False, True])
def test_rule_10_log_probs_equal_a_plain_forward(model, tokenizer, padded, temperature):
    eos = tokenizer.eos_token_id
    rows, first = [[5, 9, eos, 300, 301, 302, eos], [400, eos, eos, 17, 18]], 3  # end-of-turn ids inside the prompt
    for keep in [rows] if padded else [[row] for row in rows]:
        width = 10 if padded else len(keep[0])
        ids = torch.tensor([row + [eos] * (width - len(row)) for row in keep])
        where = torch.tensor([[first <= i < len(row) for i in range(width)] for row in keep])
        with torch.no_grad():
            got, entropy = token_logprobs(model, ids, where, temperature)
            plain = [(model(torch.tensor([row])).logits[0].float() / temperature).log_softmax(-1) for row in keep]
        expected = [float(of[i - 1, row[i]]) for of, row in zip(plain, keep) for i in range(first, len(row))]
        torch.testing.assert_close(got, torch.tensor(expected), atol=1e-5, rtol=0)
        entropies = [-(of.exp() * of).sum(-1)[first - 1 : -1] for of in plain]
        torch.testing.assert_close(entropy, torch.cat(entropies), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 1000, None])  # None: one row at a time
@pytest.mark.parametrize("also", [None, 0, 49])
def test_rule_10_chunks_change_neither_values_nor_gradients(tied, chunk, also, monkeypatch):
    monkeypatch.setattr(engine.logprobs, "CHUNK_LOGITS", 50 * (chunk or 1))
    torch.manual_seed(1)
    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    net = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=1, tie_word_embeddings=tied, **shape))
    ids, where = torch.randint(0, 50, (3, 8)), torch.rand(3, 8) > 0.4
    where[:, 0] = False
    logp, _ = token_logprobs(net, ids, where, 0.8, "chunks" if chunk else "rows", also)
    weights = torch.randn(logp.shape)
    (logp * weights).sum().backward()
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    full = (net(ids).logits[:, :-1] / 0.8).log_softmax(-1)
    columns = [full.gather(-1, ids[:, 1:, None]).squeeze(-1), *([] if also is None else [full[..., also]])]
    expected = torch.stack([column[where[:, 1:]] for column in columns], -1).view_as(logp)
    (expected * weights).sum().backward()
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(got, [p.grad for p in net.parameters()], atol=1e-5, rtol=1e-5)


def test_rules_11_and_12_the_sampled_ids_are_the_trained_ids_and_a_chosen_end_of_turn_is_among_them(
    sampler, tokenizer, problems, prompts, monkeypatch
):
    def forbidden(*args, **kwargs):
        raise AssertionError("text was tokenized between sampling and loss")

    rows, how = sampler.generate(prompts[:6], 60, [(1, i) for i in range(6)], n=4), Segmentation(max_episodes=8)
    asked = zip(problems, prompts, rows)
    traces = [common.read_trace(tokenizer, p, q, c, how) for p, q, row in asked for c in row]
    assert {t.completion.finish_reason for t in traces} == {"stop", "length"}, "the test needs both kinds"
    monkeypatch.setattr(engine.tokens, "_encode", forbidden)  # under every name it is imported by
    sampled = [(t.prompt, t.completion.token_ids) for t in traces]
    examples = [(prompt + ids, len(prompt), np.zeros((1, len(ids)))) for prompt, ids in sampled]
    seen = []
    for order, ids, where, (advantages,) in training.micro_batches(examples, range(len(examples)), 600, "cpu"):
        assert ids.numel() <= 600 or len(order) == 1
        assert [row[there].tolist() for row, there in zip(ids, where)] == [sampled[i][1] for i in order]
        assert len(advantages) == where.sum()
        seen += order
    assert sorted(seen) == list(range(len(traces)))


def test_the_worked_example_of_a_micro_batch():
    examples = [([7, 8, 9, 4, 2], 2, np.full((1, 3), 0.5)), ([7, 8, 3], 2, np.full((1, 1), -0.1))]
    ((numbers, ids, where, columns),) = training.micro_batches(examples, range(2), 99, "cpu")
    assert numbers == [0, 1] and ids.tolist() == [[7, 8, 9, 4, 2], [7, 8, 3, 0, 0]]
    assert where.int().tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]]
    torch.testing.assert_close(columns, torch.tensor([[0.5, 0.5, 0.5, -0.1]]))
    ((numbers, *_),) = training.micro_batches(examples, range(1, 2), 2, "cpu")  # the chosen one, though too long
    assert numbers == [1]


@pytest.mark.parametrize(
    "lengths, advantages, mean, loss, gradients",
    [
        ((1, 3), (2, -1), "token", 0.25, (-1 / 2, 1 / 4)),
        ((1, 3), (2, -1), "sequence", -0.5, (-1, 1 / 6)),
        ((1, 2, 4), (1, 1, -1), "token", 1 / 7, (-1 / 7, -1 / 7, 1 / 7)),
        ((1, 2, 4), (1, 1, -1), "sequence", -1 / 3, (-1 / 3, -1 / 6, 1 / 12)),
    ],
)
def test_the_mean_over_tokens_and_over_sequences(lengths, advantages, mean, loss, gradients):
    def for_tokens(values):
        return torch.tensor(np.repeat(values, lengths), dtype=torch.float32)

    weights = for_tokens([1 / n if mean == "sequence" else 1.0 for n in lengths])
    logp = torch.zeros(sum(lengths))
    found, got = loss_of(logp, logp, for_tokens(advantages), float(weights.sum()), weights=weights)
    assert found == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(got, for_tokens(gradients), atol=1e-6, rtol=0)


def test_the_mean_over_sequences_weighs_the_kl_penalty_too():
    logp, weights = torch.zeros(4), torch.tensor([1, 1 / 3, 1 / 3, 1 / 3])
    ref, advantage = torch.tensor([math.log(2), 0.0, 0.0, 0.0]), torch.tensor([2.0, -1, -1, -1])
    found, got = loss_of(logp, logp, advantage, 2.0, ref_logprobs=ref, kl=0.1, weights=weights)
    assert found == pytest.approx(-0.484657, abs=1e-6)
    torch.testing.assert_close(got, torch.tensor([-1.05, 1 / 6, 1 / 6, 1 / 6]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("beta2, second", [(0.95, 0.067865), (0.999, 0.067006)])
def test_beta2_of_adamw_is_the_flag(beta2, second):
    weight, steps = torch.nn.Parameter(torch.zeros(1)), []
    flags = argparse.Namespace(lr=0.1, weight_decay=0.0, adam_beta2=beta2)
    optimizer = training.adamw(flags, torch.nn.ParameterList([weight]))
    for gradient in (1.0, 0.0):
        before = weight.item()
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        steps.append(before - weight.item())
    assert steps == pytest.approx([0.1, second], abs=1e-5)
