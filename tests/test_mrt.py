"""What MRT adds to GRPO: credit for progress. Hand-computed examples, the traps of the method, and bonus 0 = GRPO.
Credit for stopping, against the exact return of a small policy and against a plain forward."""

import copy
import json
import math
import shutil
import types
from functools import partial

import numpy as np
import pytest
import torch
from conftest import jsonl, refusal, write, write_rows

import common
import rl_mrt
from common import Forcing, Segmentation, Trace, flat, set_likelihood_J, set_sampled_J
from engine.logprobs import token_logprobs
from engine.sampler import Sampler
from engine.tokens import Completion, encode, prompt_ids, text_and_offsets
from engine.transformers_engine import TransformersEngine
from run import data


def options(flags: str):
    return rl_mrt.flags(f"--problems-per-step 4 --group-size 4 --max-tokens 120 {flags}".split())


def a_trace(values, tokens_an_episode=2, answer_tokens=1, reward=1.0, prefix_J=None):
    k = max(0, len(values) - 1)
    ids = list(range(k * tokens_an_episode + answer_tokens))
    completion = Completion(ids, [0.0] * len(ids), "stop", "", [0] * (len(ids) + 1))
    boundaries = [j * tokens_an_episode for j in range(k + 1)]
    known = {"reward": reward, "J": list(values), "prefix_J": prefix_J}
    return Trace({"id": "p", "answer": "1"}, [7], completion, boundaries, True, "", **known)


def placed(split: str, count: int = 4) -> list[dict]:
    """The first problems of a split, each with its place in a step."""
    return [{**problem, "place": i} for i, problem in enumerate(data.load_problems("tiny", split, count))]


@pytest.mark.parametrize(
    "group, scale, credits",
    [
        # Both right, so GRPO sees a flat group and learns nothing; MRT tells their episodes apart. Mean progress over
        # the 4 episodes: 0.4. Two tokens an episode; the answer's token makes no progress.
        (([0.1, 0.1, 0.9], [0.1, 0.9, 0.9]), np.asarray, ([-0.4, -0.4, 0.4, 0.4, -0.4], [0.4, 0.4, -0.4, -0.4, -0.4])),
        # Ending the thought and episodes that gain nothing are treated alike: no hidden length penalty. Mean: 0.2.
        (([0.1, 0.9], [0.1, 0.1, 0.1, 0.1]), np.asarray, ([0.6, 0.6, -0.2], [-0.2] * 7)),
        # In nats, where 0 counts as 1 in 1000: ln 100 and ln 10, on average 1.5 · ln 10.
        (([0.0, 0.1, 1.0],), common.in_nats, (np.log(10) * np.array([0.5, 0.5, -0.5, -0.5, -1.5]),)),
    ],
)
def test_online_bonus_is_progress_above_the_groups_mean(group, scale, credits):
    traces = [a_trace(values) for values in group]
    for row, expected in zip(rl_mrt.episode_credit(traces, scale), credits, strict=True):
        np.testing.assert_allclose(row, expected, atol=1e-12)
    assert [trace.J for trace in traces] == list(group)  # what is recorded is J itself


def test_online_bonus_scales_with_alpha_and_punishes_lost_ground():
    group = [a_trace([0.5, 0.9, 0.2, 0.9]), a_trace([0.5], reward=0.0)]
    ((row, _),) = rl_mrt.advantages_of(options("--bonus 2 --progress likelihood"), [group])
    mean, grpo = 0.4 / 3, 0.5 / (0.5 + 1e-4)
    episodes = [grpo + 2 * (progress - mean) for progress in (0.4, -0.7, 0.7)]
    np.testing.assert_allclose(row, [*np.repeat(episodes, 2), grpo - 2 * mean])


@pytest.mark.parametrize(
    "f, expected",
    [((1, 0, 0, 1), (1.7498, -1.2498, -1.2498, 1.7498)), ((1, 1, 1, 1), (0.75,) * 4), ((0, 0, 0, 0), (-0.25,) * 4)],
)
def test_the_advantage_with_a_recorded_J(f, expected):
    group = [a_trace([0.0], reward=float(outcome), prefix_J=0.25) for outcome in f]
    (rows,) = rl_mrt.advantages_of(options("--variant prefix --bonus 1"), [group])
    np.testing.assert_allclose([row[0] for row in rows], expected, atol=5e-5)


@pytest.mark.parametrize("J", [0, 1])
def test_prefix_variant_reinforces_what_beats_stopping_and_trains_only_what_follows_the_prefix(tokenizer, J):
    """Half of the rollouts that go on are right: with J(μ|c) = 0 going on is on balance reinforced, with 1 stopping.
    The sampler's outcomes are given: a partial rollout, then 4 that stop at its cut, then 4 that go on."""
    args, problems, asked = options("--bonus 1 --variant prefix --forced-answers 4"), placed("validation", 1), []

    def completion(text: str, right: bool) -> Completion:
        text += f"</think>\n\n**Final Answer:** \\boxed{{{problems[0]['answer'] if right else 'wrong'}}}"
        ids = encode(tokenizer, text) + [tokenizer.eos_token_id]
        return Completion(ids, [0.0] * len(ids), "stop", *text_and_offsets(tokenizer, ids))

    def generate(prompts, limits, seeds, n=1, temperature=1.0, top_p=1.0):
        asked.append(prompts[0])
        if len(asked) == 1:
            return [[completion("Okay, maybe there is no such x at all.\n\n", False)]]
        return [[completion("", i < (4 * J if len(asked) == 2 else 2)) for i in range(n)]]

    groups = rl_mrt.rollouts_prefix(
        args, types.SimpleNamespace(tokenizer=tokenizer, generate=generate), problems, (0, 0)
    )
    found, grpo = [row[0] for row in rl_mrt.advantages_of(args, groups)[0]], 0.5 / (0.5 + 1e-4)
    np.testing.assert_allclose(found, np.array([grpo, grpo, -grpo, -grpo]) + np.array([1, 1, 0, 0]) - J)
    stats = rl_mrt.rollout_stats(args, groups)
    assert (stats["J_prefix"], stats["progress_of_going_on"]) == (J, 0.5 - J)
    problem, stop, context = asked
    assert context == groups[0][0].prompt and context[: len(problem)] == problem and stop[: len(context)] == context
    # The latter where the prefix is the complete thought.
    assert tokenizer.decode(stop[len(context) :]).lstrip("\n") in (common.STOP_PHRASE, "</think>")


def test_prefixes_leave_room_to_answer_and_end_where_an_episode_does(sampler, tokenizer):
    problems = placed("train", 24)
    args = options("--bonus 1 --variant prefix --group-size 2 --max-tokens 60")
    groups = rl_mrt.rollouts_prefix(args, sampler, problems, (0, 0))
    cuts = [len(g[0].prompt) - len(prompt_ids(tokenizer, p["problem"])) for g, p in zip(groups, problems)]
    assert max(cuts) > 0 and max(cuts) + args.answer_tokens <= args.max_tokens
    for group, cut in zip(groups, cuts):
        prefix = tokenizer.decode(group[0].prompt[len(group[0].prompt) - cut :])
        assert cut == 0 or (prefix.endswith("\n\n") and "</think>" not in prefix)


def test_without_a_thinking_marker_the_prefix_is_graded_with_what_follows(sampler, tokenizer, monkeypatch):
    """An answer that stands in the prefix is not lost, and no prefix ends after a complete answer."""
    monkeypatch.setattr(common, "thinks", lambda _: False)
    (problem,) = placed("validation", 1)
    prompts, prefixes = [prompt_ids(tokenizer, problem["problem"])], [f"so \\boxed{{{problem['answer']}}}"]
    groups = rl_mrt.sample_groups(options("--bonus 1"), sampler, [problem], prompts, 1, (0,), prefixes)
    assert all(trace.reward == 1 for trace in groups[0])


@pytest.fixture(scope="module")
def groups(model, tokenizer):
    """The rollouts of a step, with J at every boundary."""
    sampler = Sampler(TransformersEngine(model), tokenizer)
    return rl_mrt.rollouts_online(options("--bonus 1 --progress likelihood"), sampler, placed("train"), (0, 0))


def step_of(model, args, groups, stop=None) -> tuple[list[torch.Tensor], dict]:
    """(the step of an update by plain descent, which is its gradient; its metrics)"""
    net, advantages = copy.deepcopy(model).train(), rl_mrt.advantages_of(args, groups)
    score, optimizer = partial(token_logprobs, net), torch.optim.SGD(net.parameters(), lr=1.0)
    metrics = rl_mrt.update(args, net, score, None, optimizer, groups, advantages, stop)
    return [old.detach() - new.detach() for old, new in zip(model.parameters(), net.parameters())], metrics


def test_bonus_zero_is_grpo_token_for_token(model, tokenizer, groups):
    """The tokens of GRPO are those of MRT; the gradient of --bonus 0 is that of the published formula, written out."""
    args, reference = options("--bonus 0 --max-grad-norm 0"), copy.deepcopy(model)
    drawn = rl_mrt.rollouts_grpo(args, Sampler(TransformersEngine(model), tokenizer), placed("train"), (0, 0))
    tokens = [[t.completion.token_ids for t in flat(of)] for of in (drawn, groups)]
    assert tokens[0] == tokens[1]
    got, metrics = step_of(model, args, groups)
    rewards, total = np.array([[t.reward for t in g] for g in groups]), sum(map(len, tokens[0]))
    assert 0 < rewards.mean() < 1
    for group, row in zip(groups, rewards):
        for trace, r in zip(group, row):
            advantage = (r - row.mean()) / (row.std() + 1e-4)
            ids = torch.tensor([trace.prompt + trace.completion.token_ids])
            logp = reference(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
            (-advantage * logp[len(trace.prompt) - 1 :].sum() / total).backward()
    for grad, p in zip(got, reference.parameters()):
        torch.testing.assert_close(grad, p.grad, atol=2e-6, rtol=1e-3)
    assert metrics["sampler_gap_max"] < 1e-4 and metrics["trained_tokens"] == total


def test_micro_batch_size_does_not_change_the_step(model, groups):
    flags = "--bonus 1 --progress likelihood --max-grad-norm 0 --max-tokens-per-batch"
    (whole, _), (split, _) = (step_of(model, options(f"{flags} {size}"), groups) for size in (100_000, 300))
    torch.testing.assert_close(whole, split, atol=1e-6, rtol=1e-4)


def test_several_updates_a_batch_use_the_policy_before_the_first(model, groups):
    _, metrics = step_of(model, options("--bonus 0 --updates-per-batch 2"), groups)
    assert metrics["sampler_gap_max"] < 1e-4


def test_length_penalty_is_arora_and_zanettes():
    """Right answers of 10, 20 and 30 tokens lie z, 0 and -z below their mean; a wrong one does not count."""
    z = 10 / math.sqrt(200 / 3)
    shares = [1 / (1 + math.exp(z)), 0.5, 0, 1 / (1 + math.exp(-z))]
    for outcomes, lengths, expected in (
        ((1, 1, 0, 1), (10, 20, 500, 30), [r * (1 - 0.4 * share) for r, share in zip((1, 1, 0, 1), shares)]),
        ((1, 0), (9, 4), [0.8, 0]),
    ):
        of = (torch.tensor([row], dtype=torch.float64) for row in (outcomes, lengths))
        np.testing.assert_allclose(rl_mrt.penalise_length(*of, 0.4)[0], expected, rtol=1e-6)


def test_likelihood_agrees_with_many_sampled_answers(sampler, tokenizer, problems, prompts):
    """Two independent routes to J(μ|prefix): exact likelihood, and 64 sampled and graded answers."""
    rows = sampler.generate(prompts[:4], 150, [(3, i) for i in range(4)])
    traces = flat(common.read_traces(tokenizer, problems, prompts, rows, Segmentation(max_episodes=32)))
    set_sampled_J(sampler, traces, Forcing(64, 8), (5,))
    sampled = np.concatenate([t.J for t in traces])
    set_likelihood_J(sampler, traces)
    exact = np.concatenate([t.J for t in traces])
    assert len(exact) > 12 and np.ptp(exact) > 0.5
    error = np.sqrt(np.maximum(exact * (1 - exact), 0.01) / 64)
    assert (np.abs(sampled - exact) < 5 * error + 0.02).all()


@pytest.fixture(scope="module")
def recorded(model, tokenizer, problems, prompts, tmp_path_factory):
    """A run of analyze_r1.py on four problems, two traces each, as its folder."""
    sampler, folder = Sampler(TransformersEngine(model), tokenizer), tmp_path_factory.mktemp("recorded")
    rows = sampler.generate(prompts[:4], 100, [(9, i) for i in range(4)], n=2)
    traces = flat(common.read_traces(tokenizer, problems[:4], prompts, rows))
    set_sampled_J(sampler, traces, Forcing(4, 8), (3,))
    write(folder / "config.json", json.dumps({"script": "analyze_r1.py", "settings": {"model": "tiny"}}))
    write_rows(folder / "records.jsonl", *(trace.record() for trace in traces))
    return folder


def test_recorded_prefixes_are_those_of_the_records_and_only_what_follows_is_sampled(sampler, tokenizer, recorded):
    args = options(f"--variant prefix --prefixes {recorded} --group-size 3")
    problems = rl_mrt.recorded_prefixes(args, tokenizer)
    assert problems == rl_mrt.recorded_prefixes(args, tokenizer)
    before, asked = sampler.sampled_tokens, [{**problem, "place": i} for i, problem in enumerate(problems)]
    groups = rl_mrt.rollouts_prefix(args, sampler, asked, (0, 0))
    drawn = sum(len(trace.completion.token_ids) for trace in flat(groups))
    assert sampler.sampled_tokens - before == drawn and any(p["prefix"]["token_ids"] for p in problems)
    for problem, group in zip(problems, groups):
        ids, J = problem["prefix"]["token_ids"], problem["prefix"]["J"]
        rows = [r for r in jsonl(recorded / "records.jsonl") if r["id"] == problem["id"]]
        assert any(r["token_ids"][: len(ids)] == ids and (len(ids), J) in zip(r["boundaries"], r["J"]) for r in rows)
        for trace in group:
            assert trace.prefix_J == J and "prefix" not in trace.record()
            assert trace.prompt[len(trace.prompt) - len(ids) :] == ids


def test_no_two_draws_share_a_stream(sampler, tokenizer, recorded, monkeypatch):
    """numpy pads a seed with zeros: were (1, 2) and (1, 2, 0) both seeds, a cut would follow from a first token."""
    seeds, stock = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: seeds.append(seed) or stock(seed))
    rl_mrt.rollouts_prefix(options("--variant prefix"), sampler, placed("validation", 3), (0, 1))
    rl_mrt.recorded_prefixes(options(f"--variant prefix --prefixes {recorded}"), tokenizer)
    streams = {tuple(np.trim_zeros(seed, "b")) for seed in seeds}
    assert len(streams) == len(seeds) > 30


def test_records_that_are_no_prefixes_are_refused(tokenizer, recorded, tmp_path, capsys):
    run = shutil.copytree(recorded, tmp_path / "run")
    args, records = options(f"--variant prefix --prefixes {run}"), jsonl(run / "records.jsonl")
    for change, message in (
        ({"J": []}, "have no J"),
        ({"prompt_tokens": 3}, "another tokenizer or chat template"),
        ({"text": "?"}, "another tokenizer or chat template"),
    ):
        write_rows(run / "records.jsonl", *({**record, **change} for record in records))
        assert message in refusal(capsys, rl_mrt.recorded_prefixes, args, tokenizer)
    (run / "config.json").unlink()
    assert "no config.json and records.jsonl" in refusal(capsys, rl_mrt.recorded_prefixes, args, tokenizer)
    for flags in ("--bonus 0 --variant prefix", "--variant online"):
        assert "needs --variant prefix" in refusal(capsys, options, f"{flags} --prefixes {run}")


def stopping_traces(J, end, stops):
    """(probability, trace) of all that a policy does that goes on or stops at boundaries j = 1, 2, … with probability
    `stops`. Stopping there is right with probability J[j], a thought that is cut off after the last with `end`."""
    reached, last = torch.ones((), dtype=stops.dtype), len(stops) + 1
    for k in range(1, last + 1):
        here, value = (reached * stops[k - 1], J[k]) if k < last else (reached, end)
        for f, chance in ((1.0, value), (0.0, 1 - value)):
            yield here * chance, a_trace([*J[:k], value], 1, int(k < last), f)
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


def test_a_token_weighs_as_much_in_the_credit_as_in_the_loss():
    """--loss-mean sequence: 1 / tokens of the sequence, here of 2 and of 4, and the sequences as denominator."""
    chances, gains = torch.tensor([0.5, 0.25, 0.5, 0.125]), torch.tensor([1.0, 0.0, -0.5, 0.5])
    weights = torch.tensor([1 / 2, 1 / 2, 1 / 4, 1 / 4])
    found = common.stop_loss(chances.log(), gains, 2.0, weights)
    assert float(found) == pytest.approx(-(0.5 / 2 - 0.25 / 4 + 0.0625 / 4) / 2)


@pytest.mark.parametrize("variant", ["online --progress nats", "prefix --progress sampled"])
def test_the_update_adds_the_credit_for_stopping_however_it_is_split(model, tokenizer, variant):
    """Against a plain forward of each trace; J itself counts, whatever unit progress has. No credit, no bit changed."""
    flags, stop = f"--bonus 1 --variant {variant} --max-grad-norm 0", encode(tokenizer, "</think>")[0]
    sampler, rollouts = Sampler(TransformersEngine(model), tokenizer), rl_mrt.ROLLOUTS[variant.split()[0]]
    groups = rollouts(options(flags), sampler, placed("train"), (0, 0))
    tokens, net = sum(len(trace.completion.token_ids) for trace in flat(groups)), copy.deepcopy(model)
    for trace in flat(groups):
        ids = torch.tensor([trace.prompt + trace.completion.token_ids])
        chances = net(ids).logits[0].softmax(-1)[:, stop]
        places = [(0, trace.prefix_J)] if trace.prefix_J is not None else list(zip(trace.boundaries, trace.J))[1:]
        for boundary, J in places:
            if boundary < len(trace.completion.token_ids):
                loss = -30 / tokens * chances[len(trace.prompt) + boundary - 1] * (J - trace.reward)
                loss.backward(retain_graph=True)
    assert any(weights.grad.abs().max() > 1e-4 for weights in net.parameters())
    without, _ = step_of(model, options(flags), groups)
    for parts in (300, 100_000):
        found, _ = step_of(model, options(f"{flags} --stop-credit 30 --max-tokens-per-batch {parts}"), groups, stop)
        for a, b, weights in zip(found, without, net.parameters()):
            torch.testing.assert_close(a - b, weights.grad, atol=5e-6, rtol=1e-3)
    assert options("").stop_credit == 0
    with_nothing, _ = step_of(model, options(flags), groups, stop)
    assert all(torch.equal(a, b) for a, b in zip(with_nothing, without, strict=True))


def test_stopping_is_credited_after_each_boundary_but_the_empty_one_and_the_limit():
    for trace, expected in (
        (a_trace([0.1, 0.3, 0.9], 1, 2), [0, 0.3 - 1, 0.9 - 1, 0]),
        (a_trace([0.1, 0.3, 0.9], 1, 0, reward=0.0), [0, 0.3]),  # cut off
        (a_trace([], 1, 3, prefix_J=0.25), [-0.75, 0, 0]),  # J is known at the cut alone
    ):
        np.testing.assert_allclose(rl_mrt.stop_gains(trace), expected)
