"""star_mrt.py: what each filter keeps, what is trained, and that a killed run goes on to the same models."""

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import assert_same_bits, jsonl, kill_at_line, main_with, succeeded

import common
import star_mrt
from common import Forcing, Trace, set_sampled_J
from engine import models
from engine.logprobs import token_logprobs
from engine.sampler import Sampler
from engine.tokens import Completion
from engine.transformers_engine import TransformersEngine
from run.traces import sample_traces
from run.training import fine_tuning_step


def options(*flags):
    return star_mrt.flags(["--model", "tiny", *map(str, flags)])


def trace(values, right=1.0, finished=True, name="p"):
    """A thought of one token an episode, J at its boundaries, and an answer of one token."""
    ids = list(range(300, 300 + len(values) - 1)) + [9] * finished
    completion = Completion(ids, [], "stop" if finished else "length", "x" * len(ids), list(range(len(ids) + 1)))
    t = Trace({"id": name, "problem": "?", "answer": "7"}, [1, 2], completion, list(range(len(values))), finished, None)
    t.reward, t.J, t.answer_tokens = right, list(values), [1.0] * len(values)
    return t


@pytest.mark.parametrize(
    "values, cut",
    [
        ((0.0, 0.5, 1.0, 1.0), 2),  # the first prefix with the highest J: what follows made no progress
        ((0.0, 1.0, 0.2, 0.9), 1),  # it lost afterwards
        ((0.1, 0.2, 0.3), None),  # never likely to be right: an answer would be luck
        ((0.6, 0.6, 0.6), None),  # all prefixes equal: no progress
        ((1.0, 0.2, 0.9), None),  # known from the start
        ((0.0, 0.0, 0.0), None),  # never solved
        ((0.7,), None),  # no episode
        ((0.4, 0.5), 1),  # just enough
    ],
)
def test_mrt_cuts_at_the_first_prefix_with_all_of_the_progress(values, cut):
    assert star_mrt.keep_progress([trace(values)], 0.5) == ({} if cut is None else {0: cut})


def test_mrt_keeps_a_cut_thought_whose_own_end_was_wrong_or_missing():
    lost = [trace((0.0, 1.0, 0.0), right=0.0), trace((0.0, 1.0), right=0.0, finished=False)]
    assert star_mrt.keep_progress(lost, 0.5) == {0: 1, 1: 1}
    assert star_mrt.keep_right(lost) == {}


def test_the_best_and_shortest_come_first_and_no_problem_crowds_out_others():
    traces = [trace((0, 0, 0.9)), trace((0, 0, 1.0)), trace((0, 1.0)), trace((0, 0.6), name="q"), trace((0, 1.0))]
    chosen = star_mrt.keep_progress(traces, 0.5)
    assert list(chosen) == [2, 4, 1, 0, 3]
    examples = [star_mrt.Example(t, traces[t], cut, [], []) for t, cut in chosen.items()]
    assert [e.number for e in star_mrt.first_of_problem(examples, 2)] == [2, 4, 3]


def test_plain_star_keeps_right_traces_whole():
    traces = [trace((0, 1, 1)), trace((0, 1), right=0.0), trace((0, 0))]
    assert star_mrt.keep_right(traces) == {0: 2, 2: 1}


def test_a_right_answer_that_the_limit_cut_after_its_box_is_not_trained(tokenizer):
    cut = trace((0, 1))
    cut.completion.finish_reason = "length"
    assert star_mrt.keep_right([cut]) == {}
    assert star_mrt.begin_example(tokenizer, 0, cut, 1).answer == []  # to be sampled


@pytest.fixture(scope="module")
def sampled(model, tokenizer, problems, prompts):
    sampler = Sampler(TransformersEngine(model), tokenizer)
    groups = sample_traces(options(), sampler, problems, prompts)
    traces = [t for group in groups for t in group]
    set_sampled_J(sampler, traces, Forcing(8, 8), (0,))
    return sampler, traces


def test_examples_are_the_sampled_tokens_and_end_in_a_right_answer(sampled):
    sampler, traces = sampled
    tokenizer = sampler.tokenizer
    examples = star_mrt.select(options(), "mrt", sampler, traces, 1)
    assert len(examples) > 3
    cuts = 0
    for example in examples:
        (ids, first, weights), row = example.fine_tuned(), example.record(tokenizer)
        t = traces[row["trace"]]
        assert ids[:first] == t.prompt and len(ids) - first == weights.size == row["tokens"] and (weights == 1).all()
        assert ids[first : first + row["cut"]] == t.completion.token_ids[: row["cut"]]
        assert ids[-1] == tokenizer.eos_token_id
        answer = tokenizer.decode(ids[first:]).rsplit("</think>", 1)[1]
        assert common.grade(answer, t.problem["answer"])
        cuts += row["cut"] < t.boundaries[-1]
        assert row["J"] >= 0.5 and row["J"] > row["J_empty"]
    assert cuts, "the test needs a thought that was cut"


def test_plain_star_trains_on_the_very_completions(sampled):
    sampler, traces = sampled
    examples = star_mrt.select(options("--per-problem", 4), "outcome", sampler, traces, 1)
    assert len(examples) == sum(t.reward for t in traces)
    for example in examples:
        ids, first, weights = example.fine_tuned()
        assert ids[first:] == traces[example.number].completion.token_ids and (weights == 1).all()


def test_one_step_has_the_gradient_of_a_plain_transformers_forward(model, sampled):
    """Cross entropy over completion tokens, mean over all tokens of the batch, whatever the micro-batches."""
    sampler, traces = sampled
    kept = star_mrt.select(options(), "mrt", sampler, traces, 1)
    examples = [example.fine_tuned() for example in kept]
    plain, ours = copy.deepcopy(model), copy.deepcopy(model)
    total, count = torch.zeros(()), 0
    for ids, first, _ in examples:
        labels = torch.tensor([[-100] * first + ids[first:]])
        loss = plain(input_ids=torch.tensor([ids]), labels=labels).loss
        tokens = int((labels != -100).sum())
        total, count = total + loss * tokens, count + tokens
    (total / count).backward()
    args = options("--max-tokens-per-batch", 300, "--max-grad-norm", 0)
    value = fine_tuning_step(
        args, ours, partial(token_logprobs, ours), torch.optim.SGD(ours.parameters(), lr=0.0), examples
    )
    assert value == pytest.approx((total / count).item(), abs=1e-5)
    for a, b in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ processes

TOY = "--limit 7 --num-samples 2 --max-tokens 160 --forced-answers 2 --batch-problems 4 --batch-size 2 --epochs 2 "
TOY += "--checkpoint-every 2 --eval-problems 2 --budgets 64,160"


@pytest.fixture(scope="module")
def straight(tmp_path_factory, execute):
    folder = tmp_path_factory.mktemp("star")
    succeeded(execute(folder, f"star_mrt.py {TOY} --out run"))
    return folder / "run"


def test_two_iterations_of_both_filters_from_the_same_samples(straight):
    summary = json.loads((straight / "summary.json").read_text())
    assert set(summary["models"]) == {"base", "STaR 1", "STaR 2", "MRT-STaR 1", "MRT-STaR 2"}
    assert "regret@160" in summary["mrt_minus_star"]
    for name in ("outcome", "mrt"):
        kept = jsonl(straight / name / "selected_1.jsonl")
        line = summary["kept"][name][0]
        assert line["traces"] == len(kept) and line["tokens"] == sum(k["tokens"] for k in kept)
        assert line["sampled_traces"] == 14 and not (straight / name / "samples_1.jsonl").exists()
        folders = ("tiny", straight / name / "model_1", straight / name / "model_2")
        base, first, second = (models.load_model(str(f), "cpu").model.norm.weight for f in folders)
        assert not torch.equal(base, first) and not torch.equal(first, second)
    assert (straight / "star.png").stat().st_size > 5000
    expected = np.mean([r["reward"] for r in jsonl(straight / "base.jsonl")])
    assert summary["models"]["base"]["right"]["mean"] == pytest.approx(expected)


def test_a_run_killed_in_its_fine_tuning_resumes_to_the_same_models(tmp_path, start, execute, straight):
    """test_runs.py has it of the samples."""
    command = f"star_mrt.py {TOY} --out run"
    kill_at_line(start(tmp_path, command), tmp_path / "run/outcome/tuning_1/metrics.jsonl", 3)
    succeeded(execute(tmp_path, command, "--resume"))
    files = "summary.json summary.md samples_1.jsonl mrt/samples_2.jsonl mrt/selected_2.jsonl"
    files += " mrt/model_2/model.safetensors outcome/model_2/model.safetensors"
    assert_same_bits(tmp_path / "run", straight, files.split())


def test_a_filter_that_keeps_nothing_says_so_and_exits_with_3(tmp_path, monkeypatch, capsys):
    flags = (*TOY.split(), *"--filter outcome --max-tokens 6 --out".split(), tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        main_with(monkeypatch, star_mrt, *flags)()
    assert stop.value.code == 3 and "the filter outcome kept no trace in iteration 1" in capsys.readouterr().out
    assert len(jsonl(tmp_path / "run/samples_1.jsonl")) == 14 and not (tmp_path / "run/outcome/model_1").exists()
