"""What MRT adds to GRPO: credit for progress. Hand-computed examples, the traps of the method, and bonus 0 = GRPO."""

import copy
import json
import types
from functools import partial

import numpy as np
import pytest
import torch
from conftest import jsonl, refusal

import common
import rl_mrt
from common import Forcing, Segmentation, Trace, episode_progress, set_likelihood_J, set_sampled_J
from engine.logprobs import token_logprobs
from engine.sampler import Sampler
from engine.tokens import Completion, encode, prompt_ids, text_and_offsets
from engine.transformers_engine import TransformersEngine
from run import data


def options(*flags):
    return rl_mrt.flags(["--problems-per-step", "4", "--group-size", "4", "--max-tokens", "120", *flags])


def a_trace(values, tokens_an_episode=2, answer_tokens=1, reward=1.0):
    k = len(values) - 1
    ids = list(range(k * tokens_an_episode + answer_tokens))
    completion = Completion(ids, [0.0] * len(ids), "stop", "", [0] * (len(ids) + 1))
    boundaries = [j * tokens_an_episode for j in range(k + 1)]
    problem = {"id": "p", "answer": "1"}
    return Trace(problem, [7], completion, boundaries, True, "", reward=reward, J=list(values))


# ------------------------------------------------------------------------------------------------ progress and credit


def test_progress_telescopes_so_a_whole_trace_bonus_would_say_nothing_about_the_path():
    for values in ([0.1, 0.1, 0.9, 0.9], [0.1, 0.8, 0.2, 0.9], [0.1, 0.3, 0.6, 0.9]):
        assert sum(episode_progress(values)) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "group, credits",
    [
        # Both right, so GRPO sees a flat group and learns nothing; MRT tells their episodes apart. Mean progress over
        # the 4 episodes: 0.4. Two tokens an episode; the answer's token makes no progress.
        (([0.1, 0.1, 0.9], [0.1, 0.9, 0.9]), ([-0.4, -0.4, 0.4, 0.4, -0.4], [0.4, 0.4, -0.4, -0.4, -0.4])),
        # Ending the thought and episodes that gain nothing are treated alike: no hidden length penalty. Mean: 0.2.
        (([0.1, 0.9], [0.1, 0.1, 0.1, 0.1]), ([0.6, 0.6, -0.2], [-0.2] * 7)),
    ],
)
def test_online_bonus_is_progress_above_the_groups_mean(group, credits):
    for row, expected in zip(rl_mrt.episode_credit([a_trace(values) for values in group]), credits, strict=True):
        np.testing.assert_allclose(row, expected, atol=1e-12)


def test_online_bonus_scales_with_alpha_and_punishes_lost_ground():
    group = [a_trace([0.5, 0.9, 0.2, 0.9]), a_trace([0.5], reward=0.0)]
    args = options("--bonus", "2", "--variant", "online", "--progress", "likelihood")
    ((row, _),) = rl_mrt.advantages_of(args, [group])
    mean, grpo = 0.4 / 3, 0.5 / (0.5 + 1e-4)
    episodes = [grpo + 2 * (progress - mean) for progress in (0.4, -0.7, 0.7)]
    np.testing.assert_allclose(row, [*np.repeat(episodes, 2), grpo - 2 * mean])


def test_progress_in_nats_is_what_an_episode_tells_of_the_answer():
    """From one of 30 to one of 10 to certain: ln 3 and ln 10."""
    J = [1 / 30, 1 / 10, 1.0]
    group = [a_trace(J)]
    rows = rl_mrt.episode_credit(group, common.in_nats)
    credit, mean = np.log([3, 10]), np.log(30) / 2
    np.testing.assert_allclose(rows[0], [*np.repeat(credit - mean, 2), -mean], atol=1e-12)
    assert group[0].J == J  # what is recorded is J itself
    np.testing.assert_allclose(common.in_nats([0.9, 0.0]), np.log([0.9, 1e-3]))  # bounded


def placed(problems):
    return [{**p, "place": i} for i, p in enumerate(problems)]


def scripted(tokenizer, prefix_right, going_on_right):
    """Runs the prefix variant with scripted outcomes: how many of the m stops and of the G rollouts are right."""
    args = options("--bonus", "1", "--variant", "prefix", "--forced-answers", "4")
    problems, calls = data.load_problems("tiny", "validation", 1), []

    def completion(text, right):
        text += f"</think>\n\n**Final Answer:** \\boxed{{{problems[0]['answer'] if right else 'wrong'}}}"
        ids = encode(tokenizer, text) + [tokenizer.eos_token_id]
        return Completion(ids, [0.0] * len(ids), "stop", *text_and_offsets(tokenizer, ids))

    def generate(asked, limits, seeds, n=1, temperature=1.0, top_p=1.0):
        calls.append(asked)
        if len(calls) == 1:
            return [[completion("Okay, maybe there is no such x at all.\n\n", False)]]
        right = prefix_right if len(calls) == 2 else going_on_right
        return [[completion("", i < right) for i in range(n)]]

    sampler = types.SimpleNamespace(tokenizer=tokenizer, generate=generate)
    groups = rl_mrt.rollouts_prefix(args, sampler, placed(problems), (0, 0))
    advantages = [row[0] for row in rl_mrt.advantages_of(args, groups)[0]]
    return advantages, rl_mrt.rollout_stats(args, groups), calls, groups


@pytest.mark.parametrize("J", [0, 1])
def test_prefix_variant_reinforces_what_beats_stopping(tokenizer, J):
    """Half of the rollouts that go on are right: with J(μ|c) = 0 going on is on balance reinforced, with 1 stopping."""
    advantages, stats, _, _ = scripted(tokenizer, prefix_right=4 * J, going_on_right=2)
    grpo = 0.5 / (0.5 + 1e-4)
    np.testing.assert_allclose(advantages, np.array([grpo, grpo, -grpo, -grpo]) + np.array([1, 1, 0, 0]) - J)
    assert (stats["J_prefix"], stats["progress_of_going_on"]) == (J, 0.5 - J)


def test_trap_1_normalising_the_bonus_within_the_shared_prefix_group_would_be_grpo():
    """r = f + α(f - c) is affine in f when c is shared; after mean and std it is GRPO's advantage. Ours is not."""
    f = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    for alpha, c in ((0.4, 0.25), (1.6, 0.75)):
        trapped = common.group_advantages(f + alpha * (f - c))
        torch.testing.assert_close(trapped, common.group_advantages(f), atol=1e-3, rtol=0)
        ours = common.group_advantages(f) + alpha * (f - c)
        assert (ours - common.group_advantages(f)).abs().max() > 0.1


def test_prefix_variant_trains_only_what_follows_the_prefix(tokenizer):
    _, _, calls, groups = scripted(tokenizer, prefix_right=0, going_on_right=2)
    partial, stops, contexts = calls
    assert contexts[0] == groups[0][0].prompt and contexts[0][: len(partial[0])] == partial[0]
    assert stops[0][: len(contexts[0])] == contexts[0]
    tail = tokenizer.decode(stops[0][len(contexts[0]) :]).lstrip("\n")
    assert tail in (common.STOP_PHRASE, "</think>")  # the latter where the prefix is the complete thought


def test_prefixes_leave_room_to_answer_and_end_where_an_episode_does(sampler, tokenizer):
    problems = data.load_problems("tiny", "train", 24)
    prompts = [prompt_ids(tokenizer, p["problem"]) for p in problems]
    args = options("--bonus", "1", "--variant", "prefix", "--group-size", "2", "--max-tokens", "60")
    groups = rl_mrt.rollouts_prefix(args, sampler, placed(problems), (0, 0))
    cuts = [len(group[0].prompt) - len(prompt) for group, prompt in zip(groups, prompts)]
    assert max(cuts) > 0 and max(cuts) + args.answer_tokens <= args.max_tokens
    for group, cut in zip(groups, cuts):
        prefix = tokenizer.decode(group[0].prompt[len(group[0].prompt) - cut :])
        assert cut == 0 or (prefix.endswith("\n\n") and "</think>" not in prefix)


def test_without_a_thinking_marker_the_prefix_is_graded_with_what_follows(sampler, tokenizer, monkeypatch):
    """An answer that stands in the prefix is not lost, and no prefix ends after a complete answer."""
    monkeypatch.setattr(common, "thinks", lambda _: False)
    args = options("--bonus", "1")
    problems = data.load_problems("tiny", "validation", 1)
    prompts = [prompt_ids(tokenizer, problems[0]["problem"])]
    prefixes = [f"so \\boxed{{{problems[0]['answer']}}}"]
    groups = rl_mrt.sample_groups(args, sampler, placed(problems), prompts, 1, (0,), prefixes)
    assert all(trace.reward == 1 for trace in groups[0])


# ------------------------------------------------------------------------------------------------ one real update


def one_update(model, tokenizer, args, seed=0):
    model = copy.deepcopy(model)
    sampler = Sampler(TransformersEngine(model), tokenizer)
    problems = data.load_problems("tiny", "train", args.problems_per_step)
    rollouts = rl_mrt.rollouts_grpo if args.bonus == 0 else rl_mrt.rollouts_online
    groups = rollouts(args, sampler, placed(problems), (seed, 0))
    advantages = rl_mrt.advantages_of(args, groups)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    model.train()
    metrics = rl_mrt.update(args, model, partial(token_logprobs, model), None, optimizer, groups, advantages)
    return groups, advantages, [b - p.detach() for b, p in zip(before, model.parameters())], metrics


def test_bonus_zero_is_grpo_token_for_token(model, tokenizer):
    """The gradient of --bonus 0 equals a GRPO gradient written out here from the published formula."""
    args = options("--bonus", "0", "--max-grad-norm", "0")
    groups, _, got, metrics = one_update(model, tokenizer, args)
    reference = copy.deepcopy(model)
    rewards = np.array([[t.reward for t in g] for g in groups])
    assert 0 < rewards.mean() < 1
    total = sum(len(t.completion.token_ids) for g in groups for t in g)
    for group, row in zip(groups, rewards):
        for trace, r in zip(group, row):
            advantage = (r - row.mean()) / (row.std() + 1e-4)
            ids = torch.tensor([trace.prompt + trace.completion.token_ids])
            logp = reference(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
            (-advantage * logp[len(trace.prompt) - 1 :].sum() / total).backward()
    for grad, p in zip(got, reference.parameters()):
        torch.testing.assert_close(grad, p.grad, atol=2e-6, rtol=1e-3)
    assert metrics["sampler_gap_max"] < 1e-4 and metrics["trained_tokens"] == total


@pytest.mark.parametrize("variant", ["online", "prefix"])
def test_bonus_zero_ignores_the_variant_and_a_bonus_does_not(model, tokenizer, variant):
    sampler = Sampler(TransformersEngine(model), tokenizer)
    problems = data.load_problems("tiny", "train", 4)
    args = options("--bonus", "1", "--variant", variant)
    groups = rl_mrt.ROLLOUTS[variant](args, sampler, placed(problems), (0, 0))
    with_bonus = rl_mrt.advantages_of(args, groups)
    args.bonus = 0.0
    without = rl_mrt.advantages_of(args, groups)
    outcome = rl_mrt.outcome_advantages(args, groups)
    for row, a in zip((r for rows in without for r in rows), (r for rows in outcome for r in rows), strict=True):
        np.testing.assert_allclose(row, a)
    assert not all(np.allclose(a, b) for x, y in zip(with_bonus, without) for a, b in zip(x, y))


def test_micro_batch_size_does_not_change_the_step_nor_mrt_the_sampled_tokens(model, tokenizer):
    flags = "--bonus 1 --variant online --progress likelihood --max-grad-norm 0 --max-tokens-per-batch"
    mrt, _, whole, _ = one_update(model, tokenizer, options(*flags.split(), "100000"))
    *_, split, _ = one_update(model, tokenizer, options(*flags.split(), "300"))
    for a, b in zip(whole, split):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    args = options("--bonus", "0")
    problems = data.load_problems("tiny", "train", args.problems_per_step)
    grpo = rl_mrt.rollouts_grpo(args, Sampler(TransformersEngine(model), tokenizer), placed(problems), (0, 0))
    for a, b in zip((t for g in grpo for t in g), (t for g in mrt for t in g), strict=True):
        assert a.completion.token_ids == b.completion.token_ids


def test_several_updates_a_batch_use_the_policy_before_the_first(model, tokenizer):
    *_, metrics = one_update(model, tokenizer, options("--bonus", "0", "--updates-per-batch", "2", "--lr", "1"))
    assert metrics["sampler_gap_max"] < 1e-4


# ------------------------------------------------------------------------------------------------ length penalty, J


def test_length_penalty_is_arora_and_zanettes():
    rewards = torch.tensor([[1.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    lengths = torch.tensor([[10.0, 20.0, 500.0, 30.0]], dtype=torch.float64)
    got = rl_mrt.penalise_length(rewards, lengths, 0.4)[0].tolist()
    z = 10 / (200 / 3) ** 0.5
    sigmoid = 1 / (1 + np.exp(-z))
    np.testing.assert_allclose(got, [1 - 0.4 * (1 - sigmoid), 1 - 0.4 * 0.5, 0, 1 - 0.4 * sigmoid], rtol=1e-6)
    one = rl_mrt.penalise_length(torch.tensor([[1.0, 0.0]]), torch.tensor([[9.0, 4.0]]), 0.4)
    assert one.tolist() == [[pytest.approx(0.8), 0.0]]


def test_likelihood_agrees_with_many_sampled_answers(sampler, tokenizer, problems, prompts):
    """Two independent routes to J(μ|prefix): exact likelihood, and 64 sampled and graded answers."""
    rows = sampler.generate(prompts[:4], 150, [(3, i) for i in range(4)])
    how = Segmentation(max_episodes=32)
    traces = [common.read_trace(tokenizer, p, q, c, how) for p, q, (c,) in zip(problems, prompts, rows)]
    common.grade_traces(traces)
    set_sampled_J(sampler, traces, Forcing(64, 8), (5,))
    sampled = np.concatenate([t.J for t in traces])
    set_likelihood_J(sampler, traces)
    exact = np.concatenate([t.J for t in traces])
    assert len(exact) > 12 and np.ptp(exact) > 0.5
    error = np.sqrt(np.maximum(exact * (1 - exact), 0.01) / 64)
    assert (np.abs(sampled - exact) < 5 * error + 0.02).all()


# ------------------------------------------------------------------------------------------------ recorded prefixes


@pytest.fixture()
def recorded(sampler, problems, prompts, tmp_path):
    """A run of analyze_r1.py on four problems, two traces each, as its folder."""
    rows = sampler.generate(prompts[:4], 100, [(9, i) for i in range(4)], n=2)
    groups = common.read_traces(sampler.tokenizer, problems[:4], prompts, rows)
    traces = [trace for group in groups for trace in group]
    set_sampled_J(sampler, traces, Forcing(4, 8), (3,))
    config = {"script": "analyze_r1.py", "settings": {"model": "tiny"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(trace.record()) + "\n" for trace in traces))
    return tmp_path


def test_recorded_prefixes_are_those_of_the_records_and_only_what_follows_is_sampled(sampler, tokenizer, recorded):
    args = options("--variant", "prefix", "--prefixes", str(recorded), "--group-size", "3")
    problems = rl_mrt.recorded_prefixes(args, tokenizer)
    assert problems == rl_mrt.recorded_prefixes(args, tokenizer)
    for problem in problems:
        ids, J = problem["prefix"]["token_ids"], problem["prefix"]["J"]
        rows = [r for r in jsonl(recorded / "records.jsonl") if r["id"] == problem["id"]]
        assert any(r["token_ids"][: len(ids)] == ids and (len(ids), J) in zip(r["boundaries"], r["J"]) for r in rows)
    assert any(problem["prefix"]["token_ids"] for problem in problems)
    before = sampler.sampled_tokens
    groups = rl_mrt.rollouts_prefix(args, sampler, placed(problems), (0, 0))
    drawn = [trace for group in groups for trace in group]
    assert sampler.sampled_tokens - before == sum(len(trace.completion.token_ids) for trace in drawn)
    for problem, group in zip(problems, groups):
        ids = problem["prefix"]["token_ids"]
        for trace in group:
            assert trace.prefix_J == problem["prefix"]["J"] and "prefix" not in trace.record()
            assert trace.prompt[len(trace.prompt) - len(ids) :] == ids


def test_no_two_draws_share_a_stream(sampler, tokenizer, problems, recorded, monkeypatch):
    """numpy pads a seed with zeros: were (1, 2) and (1, 2, 0) both seeds, a cut would follow from a first token."""
    seeds, stock = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: seeds.append(seed) or stock(seed))
    rl_mrt.rollouts_prefix(options("--variant", "prefix"), sampler, placed(problems[:3]), (0, 1))
    rl_mrt.recorded_prefixes(options("--variant", "prefix", "--prefixes", str(recorded)), tokenizer)
    streams = {tuple(np.trim_zeros(seed, "b")) for seed in seeds}
    assert len(streams) == len(seeds) > 30


@pytest.mark.parametrize(
    "f, expected",
    [((1, 0, 0, 1), (1.7498, -1.2498, -1.2498, 1.7498)), ((1, 1, 1, 1), (0.75,) * 4), ((0, 0, 0, 0), (-0.25,) * 4)],
)
def test_the_advantage_with_a_recorded_J(f, expected):
    group = [a_trace([0.0], reward=float(outcome)) for outcome in f]
    for trace in group:
        trace.prefix_J = 0.25
    (rows,) = rl_mrt.advantages_of(options("--variant", "prefix", "--bonus", "1"), [group])
    np.testing.assert_allclose([row[0] for row in rows], expected, atol=5e-5)


def test_records_that_are_no_prefixes_are_refused(tokenizer, recorded, capsys):
    args = options("--variant", "prefix", "--prefixes", str(recorded))
    records = jsonl(recorded / "records.jsonl")
    for change, message in (
        ({"J": []}, "have no J"),
        ({"prompt_tokens": 3}, "another tokenizer or chat template"),
        ({"text": "?"}, "another tokenizer or chat template"),
    ):
        (recorded / "records.jsonl").write_text("".join(json.dumps({**r, **change}) + "\n" for r in records))
        assert message in refusal(capsys, rl_mrt.recorded_prefixes, args, tokenizer)
    (recorded / "config.json").unlink()
    assert "no config.json and records.jsonl" in refusal(capsys, rl_mrt.recorded_prefixes, args, tokenizer)
    for flags in (["--bonus", "0", "--variant", "prefix"], ["--variant", "online"]):
        assert "needs --variant prefix" in refusal(capsys, options, *flags, "--prefixes", str(recorded))
