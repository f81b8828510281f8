"""budget_force.py: thoughts cut and extended on real tokens, without the bugs of the implementations people copy."""

import itertools
import json

import numpy as np
import pytest
from conftest import Watched, a_run, main_with, refusal, same_content

import budget_force
import common
from engine.tokens import Completion, encode, text_and_offsets
from run.traces import sample_traces


@pytest.fixture()
def watched(model, tokenizer):
    return Watched(model, tokenizer)


def options(*flags):
    args = budget_force.flags(["--model", "tiny", "--max-tokens", "120", "--forced-answers", "2", *map(str, flags)])
    args.num_samples = 2
    return args


@pytest.fixture()
def traces(watched, problems, prompts):
    groups = sample_traces(options(), watched, problems[:6], prompts[:6])
    watched.calls.clear()
    traces = [trace for group in groups for trace in group]
    assert {t.finished for t in traces} == {True, False}, "the test needs thoughts that ended and that were cut"
    return traces


# ---------------------------------------------------------------------------------------------- exploit


def test_one_thought_serves_all_budgets_and_is_told_to_stop_only_where_it_was_cut(watched, traces):
    budgets = [10, 40, 120]
    results = budget_force.exploit(options("--budgets", "10,40,120"), watched, traces)
    phrase = encode(watched.tokenizer, common.STOP_PHRASE)
    asked = {tuple(prompt) for prompt in watched.calls[0][0]}
    assert len(watched.calls) == 1  # all budgets of all traces in one call
    for trace, of in zip(traces, results):
        end = trace.boundaries[-1]
        for budget in budgets:
            assert of[budget]["thought_tokens"] <= min(budget, end)
            if trace.finished and end <= budget:
                assert not of[budget]["cut"] and of[budget]["J"] == trace.reward
                assert of[budget]["thought_tokens"] + of[budget]["answer_tokens"] == len(trace.completion.token_ids)
                continue
            at = of[budget]["thought_tokens"]
            prompt = common.forced_prompt(watched.tokenizer, trace, at)
            assert tuple(prompt) in asked and prompt[-len(phrase) :] == phrase
            assert prompt[: len(trace.prompt) + at] == trace.prompt + trace.completion.token_ids[:at]
            assert trace.prefix(at).endswith("\n\n") or at == min(budget, end)


def test_only_what_follows_the_thought_is_graded(watched, tokenizer, problems, prompts):
    """A thought that boxes the right answer over and over, and an answer of one token, which can hold no box."""
    text = f"so \\boxed{{{problems[0]['answer']}}}.\n\n" * 10
    ids = encode(tokenizer, text)
    completion = Completion(ids, [], "length", *text_and_offsets(tokenizer, ids))
    trace = common.read_trace(tokenizer, problems[0], prompts[0], completion)
    args = options("--answer-tokens", "1", "--budgets", "20,40", "--extensions", "2", "--extension-tokens", "4")
    for of in (budget_force.exploit(args, watched, [trace])[0], budget_force.extrapolate(args, watched, [trace])[0]):
        assert all(point["J"] == 0 and [a["boxed"] for a in point["forced"]] == [None, None] for point in of.values())


# ---------------------------------------------------------------------------------------------- extrapolate


def test_extensions_continue_the_very_tokens(watched, tokenizer, traces):
    args = options("--extensions", "6", "--extension-tokens", "20")
    before = watched.sampled_tokens
    results = budget_force.extrapolate(args, watched, traces)
    marker = encode(tokenizer, "</think>")[0]
    answering = [call for call in watched.calls if not call[2]]
    thinking = [call for call in watched.calls if call[2]]
    assert [list(of) for of in results] == [[0, 2, 4, 6]] * len(traces) and len(answering) == 4
    assert all(stop == [marker] for *_, stop in thinking)
    for t, trace in enumerate(traces):
        thoughts = []
        for (prompts, _, _), w in zip(answering, (0, 2, 4, 6)):
            prompt = prompts[t]
            assert prompt[: len(trace.prompt)] == trace.prompt and prompt[-1] == marker
            assert prompt.count(marker) == 1 and tokenizer.eos_token_id not in prompt[len(trace.prompt) :]
            thought = prompt[len(trace.prompt) :][: results[t][w]["thought_tokens"]]
            assert len(thought) == results[t][w]["thought_tokens"]
            thoughts.append(thought)
        # each thought begins with the one before it, and the first with the sampled tokens themselves
        assert all(after[: len(thought)] == thought for thought, after in itertools.pairwise(thoughts))
        sampled = trace.completion.token_ids[: trace.boundaries[-1]]
        assert thoughts[0] == sampled[: len(thoughts[0])]
        assert thoughts[0] == sampled or not trace.finished
        string = max(len(encode(tokenizer, "\n" + s)) for s in args.strings)
        growth = np.diff([len(thought) for thought in thoughts])
        assert all(0 <= g <= 2 * (args.extension_tokens + string) for g in growth)
    generated = sum(of[6]["generated"] - t.boundaries[-1] for of, t in zip(results, traces))
    answers = sum(2 * of[w]["answer_tokens"] for of in results for w in of)
    assert watched.sampled_tokens - before == generated + answers


def test_the_strings_come_in_turn_and_a_cut_paragraph_is_dropped(watched, tokenizer, traces):
    args = options("--extensions", "5", "--extension-tokens", "12")
    budget_force.extrapolate(args, watched, traces)
    thinking = [prompts for prompts, _, stop in watched.calls if stop]
    for prompts, string in zip(thinking, ["Wait", "But wait", "Alternatively", "But hold on", "Wait"]):
        assert all(tokenizer.decode(prompt).endswith("\n" + string) for prompt in prompts)
    text = "first.\n\nsecond, which is not fini"
    kept = budget_force.drop_unfinished(tokenizer, encode(tokenizer, text), 99, 0)
    assert tokenizer.decode(kept) == "first.\n\n"
    whole = encode(tokenizer, "first.\n\n")
    start = whole + encode(tokenizer, "\nWait")  # "\n\n\nWait": the string's own line is no paragraph end
    for added, kept in ((", and so", whole), (", done.\n\nand", start + encode(tokenizer, ", done.\n\n"))):
        more = start + encode(tokenizer, added)
        assert budget_force.drop_unfinished(tokenizer, more, len(whole), len(start)) == kept
    one = encode(tokenizer, "only one paragraph")
    assert budget_force.drop_unfinished(tokenizer, one, len(one), 0) == one


def test_results_do_not_depend_on_the_batch(watched, traces):
    args = options("--extensions", "2", "--extension-tokens", "16")
    together = budget_force.extrapolate(args, watched, traces)
    same_content(budget_force.extrapolate(args, watched, traces[4:6]), together[4:6])


# ---------------------------------------------------------------------------------------------- numbers


def test_the_curve_joins_cuts_or_episodes_and_extensions():
    cut = {"thought_tokens": 10, "answer_tokens": 2.0, "J": 0.25, "cut": True}
    free = {"thought_tokens": 30, "answer_tokens": 3.0, "J": 1.0, "cut": False}
    extended = {str(w): {"thought_tokens": 30 + 10 * w, "answer_tokens": 3.0, "J": 0.5 + w / 8} for w in (0, 2)}
    sample = {"boundaries": [0, 30], "J": [], "answer_tokens": [], "exploit": {"10": cut, "40": free}}
    sample["extrapolate"] = extended
    assert budget_force.curve(sample, "answer") == ([12.0, 33.0, 53.0], [0.25, 0.5, 0.75])
    tokens, values = budget_force.curve({**sample, "J": [0.0, 0.5], "answer_tokens": [2.0, 3.0]}, "answer")
    assert (tokens, values) == ([2.0, 33.0, 33.0, 53.0], [0.0, 0.5, 0.5, 0.75])


def test_regret_budgets_go_on_where_extensions_may_reach():
    args = options("--budgets", "60,120", "--extensions", "4", "--extension-tokens", "30")
    assert budget_force.regret_budgets(vars(args)) == [60, 120, 180, 240]
    assert budget_force.regret_budgets({**vars(args), "style": "window"}) == [60, 120]


# ---------------------------------------------------------------------------------------------- refusals


def test_a_model_without_a_thinking_marker_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(budget_force, "thinks", lambda _: False)
    main = main_with(monkeypatch, budget_force, "--out", tmp_path / "run", "--engine", "transformers")
    assert "no thought to cut or to extend" in refusal(capsys, main) and not (tmp_path / "run").exists()


def test_thoughts_must_be_an_analysis_of_the_one_model(capsys, monkeypatch, tmp_path):
    analysis = a_run(tmp_path / "analysis", "analyze_r1.py", model="a", episodes_per_point=1, max_tokens=96)
    (analysis / "records.jsonl").write_text('{"id": "0", "sample": 0, "token_ids": [1], "boundaries": [0, 1]}\n')
    for thoughts, model, told in (
        (analysis, "a,b", "thoughts of --model a, not of a,b"),
        (tmp_path, "tiny", "--thoughts"),
    ):
        flags = ("--thoughts", thoughts, "--model", model, "--out", tmp_path / "run", "--engine", "transformers")
        assert told in refusal(capsys, main_with(monkeypatch, budget_force, *flags))


@pytest.mark.parametrize("limit, told", [(2, "the first 2 of 3 problems"), (3, ""), (9, "")])
def test_it_says_how_many_of_the_thoughts_are_taken(capsys, tmp_path, limit, told):
    analysis = a_run(tmp_path / "analysis", "analyze_r1.py", model="tiny", episodes_per_point=1, max_tokens=256)
    row = {"sample": 0, "token_ids": [1, 2], "boundaries": [0, 1]}
    lines = [json.dumps({"id": str(i), **row}) + "\n" for i in range(3)]
    (analysis / "records.jsonl").write_text("".join(lines))
    args = options("--thoughts", analysis, "--limit", limit)
    assert len(budget_force.read_thoughts(args)) == min(3, limit)
    said = capsys.readouterr().out
    assert told in said and bool(told) == ("--limit" in said)
