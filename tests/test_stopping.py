"""The decision to stop: its credit against the exact return of a small policy, and against a plain forward."""

import copy
from functools import partial

import numpy as np
import pytest
import torch

import common
import rl_mrt
from common import Trace
from engine.logprobs import token_logprobs
from engine.sampler import Sampler
from engine.tokens import Completion, encode
from engine.transformers_engine import TransformersEngine
from run import data


def a_trace(J, answer_tokens, reward) -> Trace:
    """A thought whose episodes are one token each."""
    ids = list(range(len(J) - 1 + answer_tokens))
    completion = Completion(ids, [0.0] * len(ids), "stop", "", [0] * (len(ids) + 1))
    return Trace({"id": "p", "answer": "1"}, [7], completion, list(range(len(J))), True, "", reward=reward, J=J)


def stopping_traces(J, end, stops):
    """(probability, trace) of all that a policy does that goes on or stops at boundaries j = 1, 2, … with probability
    `stops`. Stopping there is right with probability J[j], a thought that is cut off after the last with `end`."""
    reached, last = torch.ones((), dtype=stops.dtype), len(stops) + 1
    for k in range(1, last + 1):
        here, value = (reached * stops[k - 1], J[k]) if k < last else (reached, end)
        for f, chance in ((1.0, value), (0.0, 1 - value)):
            yield here * chance, a_trace([*J[:k], value], int(k < last), f)
        reached = reached * (1 - stops[min(k, last - 1) - 1])


@pytest.mark.parametrize("J", [[0.0, 0.05, 0.9, 0.4], [0.3, 0.3, 0.3, 0.3], [0.0, 0.1, 0.2, 1.0]])
@pytest.mark.parametrize("logits", [[-0.5, 0.3, 1.2], [-6.0, -6.0, 3.0]])
def test_the_credit_for_stopping_is_the_gradient_of_the_exact_return(J, logits):
    policy = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    every = list(stopping_traces(J, 0.2, policy.sigmoid()))
    assert sum(p.item() for p, _ in every) == pytest.approx(1)
    (exact,) = torch.autograd.grad(sum(p * trace.reward for p, trace in every), policy)
    loss = 0
    for p, trace in every:
        # The token after each boundary; the one before the first boundary, and what follows the thought, count nothing.
        before = torch.cat([torch.full((1,), -0.1, dtype=torch.float64), torch.nn.functional.logsigmoid(policy)])
        gains = torch.tensor(rl_mrt.stop_gains(trace))
        loss = loss + p.detach() * common.stop_loss(before[: len(gains)], gains, 2.0)
    (found,) = torch.autograd.grad(loss, policy)
    torch.testing.assert_close(-2 * found, exact * (1 - policy.sigmoid()))  # seen as often as it goes on
    assert exact.abs().max() > 0 or len(set(J)) == 1


@pytest.fixture(scope="module", params=["online likelihood", "online nats", "online sampled", "prefix sampled"])
def rolled_out(request, model, tokenizer):
    """(flags, groups, advantages): a step's rollouts with every J that there is."""
    variant, progress = request.param.split()
    flags = f"--problems-per-step 4 --group-size 4 --max-tokens 120 --variant {variant} --progress {progress}".split()
    args = rl_mrt.flags([*flags, "--bonus", "1", "--max-grad-norm", "0"])
    problems = [{**p, "place": i} for i, p in enumerate(data.load_problems("tiny", "train", 4))]
    groups = rl_mrt.ROLLOUTS[variant](args, Sampler(TransformersEngine(model), tokenizer), problems, (0, 0))
    return args, groups, rl_mrt.advantages_of(args, groups)


def gradient(model, rolled_out, credit: float, stop: int | None, **settings) -> list[torch.Tensor]:
    """Of the update: its step by plain descent."""
    net, (args, groups, advantages) = copy.deepcopy(model), rolled_out
    args = copy.copy(args)
    vars(args).update(stop_credit=credit, **settings)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before = [weights.detach().clone() for weights in net.parameters()]
    rl_mrt.update(args, net, partial(token_logprobs, net), None, optimizer, groups, advantages, stop)
    return [old - new.detach() for old, new in zip(before, net.parameters())]


def test_a_token_weighs_as_much_in_the_credit_as_in_the_loss():
    """--loss-mean sequence: 1 / tokens of the sequence, here of 2 and of 4, and the sequences as denominator."""
    chances, gains = torch.tensor([0.5, 0.25, 0.5, 0.125]), torch.tensor([1.0, 0.0, -0.5, 0.5])
    weights = torch.tensor([1 / 2, 1 / 2, 1 / 4, 1 / 4])
    found = common.stop_loss(chances.log(), gains, 2.0, weights)
    assert float(found) == pytest.approx(-(0.5 / 2 - 0.25 / 4 + 0.0625 / 4) / 2)


def test_a_credit_of_zero_is_no_credit_to_the_last_bit(model, rolled_out):
    pairs = zip(gradient(model, rolled_out, 0.0, None), gradient(model, rolled_out, 0.0, 261), strict=True)
    assert rl_mrt.flags([]).stop_credit == 0 and all(torch.equal(a, b) for a, b in pairs)


def test_the_update_adds_the_credit_for_stopping_however_it_is_split(model, tokenizer, rolled_out):
    """Against a plain forward of each trace; J itself counts, whatever unit progress has."""
    stop, traces = encode(tokenizer, "</think>")[0], [trace for group in rolled_out[1] for trace in group]
    tokens, net = sum(len(trace.completion.token_ids) for trace in traces), copy.deepcopy(model)
    for trace in traces:
        ids = torch.tensor([trace.prompt + trace.completion.token_ids])
        chances = net(ids).logits[0].softmax(-1)[:, stop]
        places = [(0, trace.prefix_J)] if trace.prefix_J is not None else list(zip(trace.boundaries, trace.J))[1:]
        for boundary, J in places:
            if boundary < len(trace.completion.token_ids):
                loss = -30 / tokens * chances[len(trace.prompt) + boundary - 1] * (J - trace.reward)
                loss.backward(retain_graph=True)
    assert any(weights.grad.abs().max() > 1e-4 for weights in net.parameters())
    without = gradient(model, rolled_out, 0.0, None)
    for parts in (300, 100_000):
        for a, b, weights in zip(
            gradient(model, rolled_out, 30.0, stop, max_tokens_per_batch=parts), without, net.parameters()
        ):
            torch.testing.assert_close(a - b, weights.grad, atol=5e-6, rtol=1e-3)


def test_stopping_is_credited_after_each_boundary_but_the_empty_one_and_the_limit():
    trace = a_trace([0.1, 0.3, 0.9], 2, 1.0)
    np.testing.assert_allclose(rl_mrt.stop_gains(trace), [0, 0.3 - 1, 0.9 - 1, 0])
    cut = a_trace([0.1, 0.3, 0.9], 0, 0.0)
    np.testing.assert_allclose(rl_mrt.stop_gains(cut), [0, 0.3])
    prefix = a_trace([0.0, 0.0, 0.0], 1, 1.0)
    prefix.J, prefix.prefix_J = [], 0.25  # J is known at the cut alone
    np.testing.assert_allclose(rl_mrt.stop_gains(prefix), [-0.75, 0, 0])
