"""The backtracking parameterization: episodes, markers, windows, and what the bonus does that a reward does not."""

import re
from itertools import pairwise

import numpy as np
import pytest
import torch

import rl_mrt
from common import Forcing, Trace, grade_traces, group_advantages, reward, set_sampled_J
from engine.models import load_model, load_tokenizer
from engine.sampler import Sampler
from engine.tokens import Completion, encode, prompt_ids, text_and_offsets
from engine.transformers_engine import TransformersEngine
from run import backtracking as bt
from tiny.backtrack import PLACES, attempt, parts, problems

A1 = "Node 1: u = 12.\nNode 2: v = 5: no.\nNode 3: \\boxed{125}"
A2 = "Node 2: v = 8: yes.\nNode 3: \\boxed{128}"
TO_2, TO_0 = bt.RETRY + "Backtrack to Line 2\n", bt.RETRY + "Backtrack to beginning\n"


def episodes(text: str) -> list[str]:
    return [text[start:end] for start, end in bt.backtracking_spans(text)]


def test_an_episode_ends_at_a_box_or_after_a_marker_line():
    assert episodes(A1 + TO_2 + A2) == [A1, TO_2, A2]
    assert episodes(A1 + TO_0 + A1 + TO_2 + A2) == [A1, TO_0, A1, TO_2, A2]


@pytest.mark.parametrize("tail", ["", "\n", "\n\n"])
def test_white_space_after_the_last_box_is_no_episode(tail):
    assert episodes(A1 + tail) == [A1 + tail]


def test_what_is_left_over_is_an_episode():
    assert episodes(A1 + TO_2 + "Node 2: v =") == [A1, TO_2, "Node 2: v ="]
    assert episodes("") == [""] and episodes("Node 1: u") == ["Node 1: u"]
    assert episodes(A1 + "\nI hope so.") == [A1, "\nI hope so."]


def test_a_box_may_stand_in_a_sentence_and_a_marker_only_at_the_beginning_of_a_line():
    assert episodes("So it is $\\boxed{\\frac{1}{2}}$.\nBacktrack to Line 1, then.\nNode 1:") == [
        "So it is $\\boxed{\\frac{1}{2}}$.",
        "\nBacktrack to Line 1, then.\n",
        "Node 1:",
    ]
    assert len(episodes("I could Backtrack to Line 2\nor not")) == 1


@pytest.mark.parametrize("text", [A1, A1 + TO_2, A1 + TO_2 + A2 + TO_0, "x", "", "\\boxed{", bt.RETRY * 3])
def test_spans_cover_the_text(text):
    spans = bt.backtracking_spans(text)
    assert spans[0][0] == 0 and spans[-1][1] == len(text)
    assert all(end == start for (_, end), (start, _) in pairwise(spans))


def test_a_continuation_counts_up_to_its_first_attempt():
    assert bt.first_episode(A2 + TO_0 + A1) == A2
    assert bt.first_episode(TO_2 + A2 + TO_0 + A1) == TO_2 + A2
    assert bt.first_episode("Node 2: v") == "Node 2: v"


def test_markers_and_whether_their_lines_exist():
    assert bt.backtracks(A1 + TO_2 + A2 + TO_0) == [(2, True), (1, True)]
    assert bt.backtracks(A1 + bt.RETRY + "Backtrack to Line 7\n") == [(7, False)]
    assert bt.backtracks(A1 + bt.RETRY + "Backtrack to Line 0\n") == [(0, False)]
    assert bt.backtracks("Backtrack to beginning\n" + A1) == [(1, False)]
    assert bt.backtracks(A1 + TO_2 + bt.RETRY + "Backtrack to Line 3\n") == [(2, True), (3, False)]  # it was given up
    assert bt.backtracks(A1) == []


def test_an_attempt_in_full_has_the_lines_it_shares():
    text = A1 + TO_2 + A2 + TO_2 + A2.replace("8", "9") + TO_0 + A1
    full = ["".join(text[start:end] for start, end in spans) for spans in bt.attempts_in_full(text)]
    head = A1.partition("Node 2")[0]
    assert full == [A1, head + A2, head + A2.replace("8", "9"), A1]


def test_normalising_c_in_the_reward_is_grpo_and_the_bonus_beside_it_is_not():
    f = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]], dtype=torch.float64)
    c, alpha = torch.tensor([0.25, 0.5, 0.0, 1.0], dtype=torch.float64), 1.6
    grpo, in_reward = group_advantages(f), group_advantages(f + alpha * (f - c[:, None]))
    # std + 1e-4 is all that keeps the two from being the same number
    std = f.std(-1, keepdim=True, unbiased=False)
    torch.testing.assert_close(in_reward * (std + 1e-4 / (1 + alpha)), grpo * (std + 1e-4), rtol=0, atol=1e-12)
    assert (in_reward - grpo).abs().max() < 1e-3
    completion = Completion([7, 8], [0.0, 0.0], "stop", "ab", [0, 1, 2])
    groups = [[Trace({}, [1], completion, [0, 2], True, None, reward=r) for r in row.tolist()] for row in f]
    for group, known in zip(groups, c.tolist()):
        for trace in group:
            trace.prefix_J = known
    for bonus in (alpha, 0):
        args = rl_mrt.flags(["--model", "tiny/backtrack", "--bonus", str(bonus)])
        found = torch.tensor(np.array(rl_mrt.advantages_of(args, groups)))  # [groups, G, tokens]
        torch.testing.assert_close(found, (grpo + bonus * (f - c[:, None]))[..., None].expand(-1, -1, 2))
    assert args.bonus == 0 and float(grpo[1].abs().max()) == 0  # a group without a signal has one: c


# ------------------------------------------------------------------------------------------------ the embedded model


@pytest.fixture(scope="module")
def sampler():
    return Sampler(TransformersEngine(load_model("tiny/backtrack", "cpu")), load_tokenizer("tiny/backtrack"))


def attempts(n: int) -> Forcing:
    return Forcing(n, 24, 1.0, 1.0, bt.prompt_or_attempt, bt.first_attempt)


def trace_of(tokenizer, problem: dict, text: str, ends: bool) -> Trace:
    """A trace of a given text, as `read_trace` will read it with this rule."""
    prompt, ids = prompt_ids(tokenizer, problem["problem"]), encode(tokenizer, text) + [tokenizer.eos_token_id] * ends
    completion = Completion(ids, [0.0] * len(ids), "stop" if ends else "length", *text_and_offsets(tokenizer, ids))
    spans = bt.backtracking_spans(completion.text)
    boundaries = [completion.offsets.index(start) for start, _ in spans] + [len(ids) - ends]
    trace = Trace(problem, prompt, completion, boundaries, ends, completion.text)
    grade_traces([trace])
    return trace


def test_J_of_attempts_is_their_verdict_and_of_markers_what_one_attempt_achieves(sampler):
    problem = next(p for p in problems("train") if p["level"] == 3)
    us, vs, target, u, v = parts(problem)
    wrong_u, wrong_v = next(x for x in us if x != u), next(x for x in vs if x != v)
    start = attempt(wrong_u, v, target) + bt.RETRY + PLACES[2] + attempt(wrong_u, wrong_v, target, 2)
    text = start + bt.RETRY + PLACES[1] + attempt(u, wrong_v, target) + bt.RETRY + PLACES[2] + attempt(u, v, target, 2)
    trace = trace_of(sampler.tokenizer, problem, text, ends=True)
    before = sampler.sampled_tokens
    set_sampled_J(sampler, [trace, trace_of(sampler.tokenizer, problem, text, True)], attempts(200), (1,))
    assert [trace.J[j] for j in (1, 3, 5, 7)] == [0, 0, 0, 1] and not any(trace.forced[j] for j in (1, 3, 5, 7))
    assert all(len(trace.forced[j]) == 200 for j in (0, 2, 4, 6))
    assert trace.J[2] < 0.05  # no v mends a wrong u
    ((*first,),) = sampler.generate([trace.prompt], 24, [(9,)], n=600)
    rate = np.mean([re.findall(r"boxed{(\d+)}", c.text)[:1] == [problem["answer"]] for c in first])
    assert trace.J[0] == pytest.approx(rate, abs=0.12)  # at the start that of first attempts; three standard errors
    assert 0.15 < trace.J[6]  # one does mend a wrong v
    assert sampler.sampled_tokens - before < 5 * 200 * 24  # what both traces ask is asked once
    assert all(a.text.count("\\boxed") <= 1 for answers in trace.forced for a in answers)


def test_an_unfinished_attempt_is_completed_and_one_that_ended_has_answered(sampler):
    problem = problems("train")[0]
    us, vs, target, u, v = parts(problem)
    text = attempt(u, v, target) + bt.RETRY + PLACES[1] + attempt(us[0], vs[0], target)[:24]
    trace = trace_of(sampler.tokenizer, problem, text, ends=False)
    set_sampled_J(sampler, [trace], attempts(50), (2,))
    assert trace.J[1] == 1 and len(trace.forced[3]) == 50
    end = trace.boundaries[1]
    assert reward(problem, trace.prefix(end - 1)) == 0
    assert reward(problem, trace.prefix(end)) == reward(problem, trace.completion.text) == 1
