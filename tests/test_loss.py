"""The loss and the log-probs: each rule that a well-known GRPO implementation gets wrong somewhere is a test here."""

import argparse
import copy
import itertools
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


def random_tokens(count=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(count, generator=g, dtype=torch.float64) * 3
    return logp, torch.randn(count, generator=g, dtype=torch.float64)


def gradient(logp, old, advantage, denominator, **more):
    logp = logp.clone().requires_grad_()
    loss, _ = grpo_loss(logp, old, advantage, denominator, **more)
    loss.backward()
    return logp.grad


def test_rule_1_on_policy_gradient_is_minus_advantage_over_tokens():
    logp, advantage = random_tokens()
    torch.testing.assert_close(gradient(logp, logp.clone(), advantage, 40), -advantage / 40)


@pytest.mark.parametrize("split", [[1] * 40, [2, 38], [39, 1], [40]])
def test_rule_2_any_split_into_micro_batches_gives_the_same_gradient(split):
    logp, advantage = random_tokens()
    whole = gradient(logp, logp - 0.1, advantage, 40)
    rows = zip(logp.split(split), (logp - 0.1).split(split), advantage.split(split))
    torch.testing.assert_close(torch.cat([gradient(*row, 40) for row in rows]), whole)


@pytest.mark.parametrize("filler", [0, 77, 400])
def test_rule_3_padding_changes_neither_loss_nor_gradient_whatever_it_holds(model, filler):
    """Rows of different lengths in one padded batch, against each row alone."""
    net = copy.deepcopy(model)
    g = torch.Generator().manual_seed(0)
    examples = []
    for length in (5, 9, 14, 23):
        advantage = torch.randn(1, length - 3, generator=g).numpy()
        examples.append((torch.randint(0, 600, (length,), generator=g).tolist(), 3, advantage))
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
    for a, b in zip(padded[1], alone[1]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("advantage, shift", [*itertools.product((1.0, -1.0), (0.3, 0.1, -0.1, -0.3))])
def test_rule_4_clipping_stops_only_the_gradient_that_leads_further_away(advantage, shift):
    old, a = (torch.tensor([value], dtype=torch.float64) for value in (-1.0, advantage))
    stopped = abs(shift) > 0.2 and advantage * shift > 0
    expected = 0.0 if stopped else -advantage * math.exp(shift)
    assert gradient(old + shift, old, a, 1).item() == pytest.approx(expected)


def test_rule_5_k3_is_zero_at_equality_and_bounded_far_away():
    logp = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    zero = torch.zeros_like(logp)
    loss, sums = grpo_loss(logp, logp, zero, 2, ref_logprobs=logp.clone(), kl=1.0)
    assert float(loss) == 0 and sums["kl"] == 0
    assert (gradient(logp, logp, zero, 2, ref_logprobs=logp.clone(), kl=1.0) == 0).all()
    far, _ = grpo_loss(logp - 800, logp - 800, zero, 2, ref_logprobs=logp, kl=1.0)
    assert math.isfinite(float(far)) and float(far) == pytest.approx(math.exp(10) - 11)


def test_rule_6_k3_estimates_kl_policy_to_reference_and_its_gradient_is_the_other_kl():
    logits = torch.tensor([0.3, -0.5, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.9, 0.2, -0.4, 0.0], dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    weights = logp.exp().detach()  # the expectation over samples of the policy, exactly
    zero = torch.zeros(1, dtype=torch.float64)
    of = [grpo_loss(a, a.detach(), zero, 1, ref_logprobs=b, kl=1.0)[0] for a, b in zip(logp.split(1), ref.split(1))]
    values = torch.stack(of)
    expected = (weights * values).sum()
    assert expected.item() == pytest.approx(float((weights * (logp - ref).detach()).sum()))  # KL(π‖ref)
    (grad,) = torch.autograd.grad(expected, logits, retain_graph=True)
    (reverse,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits)  # KL(ref‖π)
    torch.testing.assert_close(grad, reverse)


def test_rule_7_flat_groups_and_groups_of_one_have_exactly_no_advantage():
    rewards = torch.tensor([[0.01] * 4, [0.3, 0.3, 0.1 + 0.2, 0.3], [1.0] * 4], dtype=torch.float64)
    assert (group_advantages(rewards) == 0).all()
    assert (group_advantages(rewards.float()) == 0).all()
    assert (group_advantages(torch.tensor([[1.0], [0.0]])) == 0).all()


def test_rule_8_difficulty_weighting_of_the_std_is_what_the_docstring_says():
    rewards = torch.zeros(1, 16, dtype=torch.float64)
    rewards[0, 3] = 1
    assert group_advantages(rewards)[0, 3].item() == pytest.approx(0.9375 / (math.sqrt(15) / 16 + 1e-4))
    assert group_advantages(rewards).sum().item() == pytest.approx(0, abs=1e-9)


def test_rule_9_inputs_are_left_as_they_are(model):
    logp, advantage = random_tokens()
    inputs = [logp, logp - 0.1, advantage, logp - 0.2]
    before = copy.deepcopy(inputs)
    grpo_loss(*inputs[:3], 10, ref_logprobs=inputs[3], kl=0.1)
    ids = torch.randint(0, 600, (2, 7))
    where = torch.tensor([[False] * 3 + [True] * 4] * 2)
    kept = ids.clone(), where.clone()
    with torch.no_grad():
        token_logprobs(model, ids, where, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))
    assert torch.equal(ids, kept[0]) and torch.equal(where, kept[1])


def plain_logprobs(model, ids, temperature):
    logits = model(torch.tensor([ids])).logits[0].float() / temperature
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


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
            expected = torch.cat([plain_logprobs(model, row, temperature)[first - 1 :] for row in keep])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        assert (entropy > 0).all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 1000, None])  # None: one row at a time
@pytest.mark.parametrize("also", [None, 0, 49])
def test_rule_10_chunks_change_neither_values_nor_gradients(tied, chunk, also, monkeypatch):
    monkeypatch.setattr(engine.logprobs, "CHUNK_LOGITS", 50 * (chunk or 1))
    torch.manual_seed(1)
    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = Qwen2Config(vocab_size=50, num_key_value_heads=1, tie_word_embeddings=tied, **shape)
    net = Qwen2ForCausalLM(config)
    ids = torch.randint(0, 50, (3, 8))
    where = torch.rand(3, 8) > 0.4
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
    for a, p in zip(got, net.parameters()):
        torch.testing.assert_close(a, p.grad, atol=1e-5, rtol=1e-5)


def test_rules_11_and_12_the_sampled_ids_are_the_trained_ids_and_a_chosen_end_of_turn_is_among_them(
    sampler, tokenizer, problems, prompts, monkeypatch
):
    rows = sampler.generate(prompts[:6], 60, [(1, i) for i in range(6)], n=4)
    done = [c for row in rows for c in row]
    assert {c.finish_reason for c in done} == {"stop", "length"}, "the test needs both kinds"

    def forbidden(*args, **kwargs):
        raise AssertionError("text was tokenized between sampling and loss")

    how, asked = Segmentation(max_episodes=8), zip(problems, prompts, rows)
    traces = [common.read_trace(tokenizer, p, q, c, how) for p, q, row in asked for c in row]
    monkeypatch.setattr(engine.tokens, "_encode", forbidden)  # under every name it is imported by
    columns = [np.zeros((1, len(t.completion.token_ids))) for t in traces]
    examples = [(t.prompt + t.completion.token_ids, len(t.prompt), c) for t, c in zip(traces, columns)]
    seen = 0
    for order, ids, where, (advantages,) in training.micro_batches(examples, range(len(examples)), 600, "cpu"):
        for row, i in enumerate(order):
            assert ids[row][where[row]].tolist() == traces[i].completion.token_ids
            seen += 1
        assert len(advantages) == where.sum()
    assert seen == len(traces)


def test_micro_batches_keep_every_example_once_under_the_limit():
    examples = [([1] * n, 1, np.zeros((1, n - 1))) for n in (3, 50, 7, 7, 20, 90, 4)]
    batches = list(training.micro_batches(examples, range(1, 7), 60, "cpu"))
    assert all(ids.numel() <= 60 or len(order) == 1 for order, ids, _, _ in batches)
    assert sorted(i for order, *_ in batches for i in order) == list(range(1, 7))


def test_the_worked_example_of_a_micro_batch():
    examples = [([7, 8, 9, 4, 2], 2, np.full((1, 3), 0.5)), ([7, 8, 3], 2, np.full((1, 1), -0.1))]
    ((numbers, ids, where, columns),) = training.micro_batches(examples, range(2), 99, "cpu")
    assert numbers == [0, 1] and ids.tolist() == [[7, 8, 9, 4, 2], [7, 8, 3, 0, 0]]
    assert where.int().tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]]
    torch.testing.assert_close(columns, torch.tensor([[0.5, 0.5, 0.5, -0.1]]))


# ------------------------------------------------------------------------------------------------ the mean of the loss


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
    weights = torch.cat([torch.full((n,), 1 / n if mean == "sequence" else 1.0) for n in lengths])
    advantage = torch.cat([torch.full((n,), float(a)) for n, a in zip(lengths, advantages)])
    logp = torch.zeros(sum(lengths), requires_grad=True)
    got, _ = grpo_loss(logp, logp.detach(), advantage, float(weights.sum()), weights=weights)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-6)
    expected = torch.cat([torch.full((n,), g) for n, g in zip(lengths, gradients)])
    torch.testing.assert_close(logp.grad, expected, atol=1e-6, rtol=0)


def test_the_mean_over_sequences_weighs_the_kl_penalty_too():
    logp, weights = torch.zeros(4, requires_grad=True), torch.tensor([1, 1 / 3, 1 / 3, 1 / 3])
    ref, advantage = torch.tensor([math.log(2), 0.0, 0.0, 0.0]), torch.tensor([2.0, -1, -1, -1])
    got, _ = grpo_loss(logp, logp.detach(), advantage, 2.0, ref_logprobs=ref, kl=0.1, weights=weights)
    got.backward()
    assert got.item() == pytest.approx(-0.484657, abs=1e-6)
    torch.testing.assert_close(logp.grad, torch.tensor([-1.05, 1 / 6, 1 / 6, 1 / 6]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("beta2, second", [(0.95, 0.067865), (0.999, 0.067006)])
def test_beta2_of_adamw_is_the_flag(beta2, second):
    weight = torch.nn.Parameter(torch.zeros(1))
    flags = argparse.Namespace(lr=0.1, weight_decay=0.0, adam_beta2=beta2)
    optimizer = training.adamw(flags, torch.nn.ParameterList([weight]))
    steps = []
    for gradient in (1.0, 0.0):
        before = weight.item()
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        steps.append(before - weight.item())
    assert steps == pytest.approx([0.1, second], abs=1e-5)
