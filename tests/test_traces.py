"""Thoughts, episodes as token spans, and the prompts of the meta-prover."""

import pytest

import common
import engine.tokens
from common import STOP_PHRASE, Forcing, Segmentation, forced_prompt, read_trace, set_likelihood_J, set_sampled_J
from engine.tokens import Completion, encode, prompt_ids, text_and_offsets
from run import data
from tiny import problems as equations
from tiny.build import line

TWO_EPISODES = (
    "Okay, try x = 8: 8² ≡ 3, + 17 ≡ 20 vs 5: no.\n\ntry x = 2: 2² ≡ 4, + 17 ≡ 21 vs 5: no.\n\n"
    "try x = 9: 9² ≡ 20, + 17 ≡ 37 vs 5: no.\n\nWait, try x = 7: 7² ≡ 49, + 17 ≡ 5 vs 5: yes, x = 7 works.\n\n"
)


def completion_of(tokenizer, text, finish="stop"):
    ids = encode(tokenizer, text) + [tokenizer.eos_token_id] * (finish == "stop")
    got, offsets = text_and_offsets(tokenizer, ids)
    assert got == text
    return Completion(ids, [0.0] * len(ids), finish, got, offsets)


def trace_of(tokenizer, text, finish="stop", max_episodes=32, gold="7"):
    problem = {"problem": "p", "answer": gold, "id": "1"}
    how = Segmentation(max_episodes=max_episodes)
    return read_trace(tokenizer, problem, [1, 2], completion_of(tokenizer, text, finish), how)


def text_between(trace, start, end):
    return trace.prefix(end)[len(trace.prefix(start)) :]


def test_episodes_are_contiguous_token_spans_that_cover_the_thought(tokenizer):
    trace = trace_of(tokenizer, TWO_EPISODES + "</think>\n\n**Final Answer:** \\boxed{7}")
    assert len(trace.boundaries) == 3 and trace.boundaries[0] == 0 and trace.finished
    first, second = (text_between(trace, a, b) for a, b in zip(trace.boundaries, trace.boundaries[1:]))
    assert first + second == TWO_EPISODES and second.startswith("Wait, try x = 7")
    assert trace.answer == "\n\n**Final Answer:** \\boxed{7}"
    assert trace.completion.token_ids[trace.boundaries[-1]] == encode(tokenizer, "</think>")[0]


def test_every_sampled_trace_splits_as_its_text_does(tokenizer, sampler, problems, prompts):
    rows = sampler.generate(prompts, 200, [(9, i) for i in range(len(prompts))], n=4)
    for problem, prompt, row in zip(problems, prompts, rows):
        for c in row:
            trace = read_trace(tokenizer, problem, prompt, c, Segmentation(max_episodes=50))
            thought = c.text.split("</think>")[0]
            episodes = [text_between(trace, a, b) for a, b in zip(trace.boundaries, trace.boundaries[1:])]
            assert "".join(episodes) == thought
            assert episodes == [thought[a:b] for a, b in common.episode_spans(thought, Segmentation(49))]


def test_long_thoughts_are_joined_to_at_most_so_many_episodes(tokenizer):
    thought = "".join(
        "Wait, maybe there is no such x at all.\n\n" + "the problem says that there is one.\n\n" * 2 for _ in range(11)
    )
    for most in (1, 3, 4, 11, 20):
        trace = trace_of(tokenizer, thought, "length", most)
        assert len(trace.boundaries) - 1 <= most
        assert trace.boundaries[-1] == len(trace.completion.token_ids)


@pytest.mark.parametrize("text", ["I think \\boxed{7}", TWO_EPISODES + "so \\boxed{7}"])
def test_a_thought_that_was_cut_has_no_answer_whatever_boxes_it_holds(tokenizer, text):
    trace = trace_of(tokenizer, text, "length")
    common.grade_traces([trace])
    assert not trace.finished and trace.answer is None and trace.reward == 0


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_thought_that_the_model_opens_itself_and_does_not_end_is_no_answer(tokenizer, finish):
    """The prompt opens none; text without any marker, though, is an answer."""
    opened = trace_of(tokenizer, "<think>\nso \\boxed{7}", finish)
    assert not opened.finished and opened.answer is None and opened.boundaries[-1] > 0
    plain = trace_of(tokenizer, "so \\boxed{7}", "stop")
    assert plain.finished and plain.answer == "so \\boxed{7}" and plain.boundaries == [0]


def test_only_what_follows_the_thought_is_graded(tokenizer):
    wrong = trace_of(tokenizer, "so \\boxed{7}</think>\n\n**Final Answer:** \\boxed{9}")
    right = trace_of(tokenizer, "so \\boxed{9}</think>\n\n**Final Answer:** \\boxed{7}")
    common.grade_traces([wrong, right])
    assert (wrong.reward, right.reward) == (0, 1)


def test_empty_thoughts_have_one_boundary_and_no_episode(tokenizer):
    trace = trace_of(tokenizer, "</think>\n\n**Final Answer:** \\boxed{7}")
    assert trace.boundaries == [0] and trace.finished


def test_forced_prompts_are_the_published_text_over_the_sampled_tokens(tokenizer):
    trace = trace_of(tokenizer, TWO_EPISODES + "</think>\n\n**Final Answer:** \\boxed{7}")
    empty, middle, end = trace.boundaries
    for boundary in (empty, middle):
        ids = forced_prompt(tokenizer, trace, boundary)
        assert ids[: 2 + boundary] == [1, 2] + trace.completion.token_ids[:boundary]
        assert tokenizer.decode(ids[2:]) == trace.prefix(boundary).rstrip("\n") + "\n\n" + STOP_PHRASE
    whole = tokenizer.decode(forced_prompt(tokenizer, trace, end)[2:])
    assert whole == TWO_EPISODES + "</think>"  # the complete thought gets only the end-of-thinking marker


@pytest.mark.parametrize("ending", ["", "\n", "\n\n"])
def test_the_stop_phrase_stands_after_exactly_one_blank_line(tokenizer, ending):
    trace = trace_of(tokenizer, "the numbers" + ending, "length")
    text = tokenizer.decode(forced_prompt(tokenizer, trace, trace.boundaries[-1])[2:])
    assert text == "the numbers\n\n" + STOP_PHRASE


def test_j_is_one_where_the_prefix_holds_the_answer_and_small_where_it_does_not(sampler, tokenizer):
    problem = next(p for p in data.load_problems("tiny", "test") if p["level"] == 30)
    _, _, _, b, x = problem["id"].split("-")
    prompt = prompt_ids(tokenizer, problem["problem"])
    target = (int(x) ** 2 + int(b)) % equations.PRIME
    miss = [y for y in range(1, 31) if y != int(x)][:3]
    thought = "Okay, " + "".join(line(y, int(b), target) for y in miss)
    thought += "Wait, " + line(int(x), int(b), target)
    completion = completion_of(tokenizer, thought, "length")
    trace = read_trace(tokenizer, problem, prompt, completion, Segmentation(max_episodes=8))
    for estimate in (lambda *of: set_sampled_J(*of, Forcing(16, 8), (0,)), set_likelihood_J):
        estimate(sampler, [trace])
        assert trace.J[0] < 0.3 and trace.J[1] < 0.3 and trace.J[2] > 0.9
        assert all(n <= 8 for n in trace.answer_tokens)


def test_only_a_model_that_does_not_think_is_asked_for_a_box(tokenizer, monkeypatch):
    problem = "Find x between 1 and 10 such that x² + 6 ≡ 26 (mod 61)."
    assert tokenizer.decode(prompt_ids(tokenizer, problem)) == f"<|user|>{problem}<|assistant|><think>\n"
    monkeypatch.setattr(engine.tokens, "thinks", lambda _: False)
    assert "within \\boxed{}." in tokenizer.decode(prompt_ids(tokenizer, problem))
