"""The numbers of evaluate.py from records made by hand, and the real benchmarks' scale."""

import json
import time

import numpy as np
import pytest

import evaluate
from evaluate import token_ratio
from run.report import tokens_to_reach
from run.traces import vote_rate


def options(*flags):
    return evaluate.flags(list(flags))


def record(i, answers, gold="7", tokens=100, logprobs=None):
    """The records of a problem's traces."""
    about = {"id": str(i), "problem": f"p{i}", "gold": gold, "tokens": tokens, "boundaries": [0, tokens - 5]}
    rows = [{**about, "sample": s, "boxed": a, "reward": float(a == gold)} for s, a in enumerate(answers)]
    for row, logprob in zip(rows, logprobs or [-0.5] * len(rows)):
        none = row["boxed"] is None
        row |= {"verdict": "none" if none else "right" if row["reward"] else "wrong", "finished": not none}
        row |= {"finish": "length" if none else "stop", "mean_logprob": logprob}
        row |= {"J": [], "answer_tokens": [], "forced": []}
    return rows


def test_each_metric_of_a_problem_by_hand():
    args = options("--num-samples", "4", "--k", "1,2,4", "--metric", "all")
    values = evaluate.problem_values(args, record(0, ["7", "7.0", "3", None]) + record(1, ["3", "3", None, None]))
    values = {name: of_problems.tolist() for name, of_problems in values.items()}
    assert values["pass@1"] == [0.25, 0.0]
    assert values["pass@2"] == [0.5, 0.0] and values["pass@4"] == [1.0, 0.0]
    # {7, 7.0} and 3 and none: pairs 77 7 3 -> ties; by hand over the 6 pairs: 1, ½, 1, ½, 1, 0
    assert values["maj@2"][0] == pytest.approx((1 + 0.5 + 1 + 0.5 + 1 + 0) / 6)
    assert values["maj@4"] == [1.0, 0.0]


def test_likelihood_votes_weigh_two_to_the_mean_log_prob():
    row = record(0, ["7", "3", "3"], logprobs=[-0.1, -2.0, -2.5])
    assert vote_rate(row, row[0]["gold"], 3) == 0.0
    assert 2**-0.1 > 2**-2.0 + 2**-2.5
    assert vote_rate(row, row[0]["gold"], 3, weighted=True) == 1.0


def test_tokens_to_reach_a_score_lie_on_the_line_between_two_points():
    tokens, scores = np.array([100.0, 200.0, 400.0]), np.array([0.5, 0.7, 0.8])
    assert tokens_to_reach(0.6, tokens, scores) == pytest.approx(150)
    assert tokens_to_reach(0.75, tokens, scores) == pytest.approx(300)
    assert tokens_to_reach(0.4, tokens, scores) == 100 and tokens_to_reach(0.9, tokens, scores) == np.inf
    assert tokens_to_reach(0.6, [10, 20, 30], [0.2, 0.7, 0.4]) == pytest.approx(18)  # the first time


def test_token_ratio_is_two_where_a_model_needs_half_of_the_tokens():
    rng = np.random.default_rng(0)
    scores = np.sort(rng.random((50, 4)), axis=1)
    slow = {"tokens": np.tile([200.0, 400, 600, 800], (50, 1)), "maj@k": scores}
    fast = {"tokens": slow["tokens"] / 2, "maj@k": scores}
    ratio = token_ratio(slow, fast, "maj@k")
    assert ratio["ratio"] == pytest.approx(2) and ratio["low"] == pytest.approx(2) == pytest.approx(ratio["high"])


def write_run(folder, dataset, model, rows, **settings):
    folder.mkdir(parents=True)
    base = {"dataset": dataset, "model": model, "split": "test", "max_tokens": 256, "temperature": 1.0, "top_p": 1.0}
    base |= {"forced_answers": 4, "max_episodes": 32, **settings}
    (folder / "config.json").write_text(json.dumps({"settings": base}))
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for of_problem in rows for r in of_problem))
    return folder


def test_compare_pairs_problems_and_makes_one_table_of_several_data_sets(tmp_path, capsys):
    right, half = ["7", "7"], ["7", "3"]
    a = write_run(tmp_path / "a-x", "x.jsonl", "runs/a/model", [record(i, half) for i in range(6)])
    b = write_run(tmp_path / "b-x", "x.jsonl", "runs/b/model", [record(i, right) for i in range(2, 8)])
    c = write_run(tmp_path / "a-y", "y.jsonl", "runs/a/model", [record(i, half) for i in range(4)])
    d = write_run(tmp_path / "b-y", "y.jsonl", "runs/b/model", [record(i, half) for i in range(4)])
    args = options("--compare", str(a), str(b), str(c), str(d), "--out", str(tmp_path / "out"))
    evaluate.compare(args, args.compare)
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "| a | 0.500 [0.500, 0.500] | 0.500 [0.500, 0.500] | 0.500 [0.500, 0.500] |" in text
    assert "| b | 1.000 [1.000, 1.000] | 0.500 [0.500, 0.500] | 0.750 [0.750, 0.750] |" in text
    assert "on the same 4 problems" in text  # 2 … 5 of x.jsonl are in both
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["x.jsonl"]["difference_to_first"]["b-x"]["pass@1"]["mean"] == 0.5


@pytest.mark.parametrize("max_tokens", [256, 1000, 16384])
def test_what_is_compared_by_default_suits_the_records(tmp_path, max_tokens):
    """Budgets are quarters of the longest thought, k goes up to the samples, whatever --model is by default."""
    rows = [record(i, ["7"] * 16, tokens=max_tokens // 2) for i in range(3)]
    rows = [[{**r, "J": [0.0, 1.0], "answer_tokens": [1.0, 1.0]} for r in of_problem] for of_problem in rows]
    runs = [str(write_run(tmp_path / name, "x", name, rows, max_tokens=max_tokens)) for name in "ab"]
    for flags, budgets in (((), [max_tokens * part // 4 for part in (1, 2, 3, 4)]), (("--budgets", "7,9"), [7, 9])):
        args = options("--compare", *runs, *flags, "--out", str(tmp_path / "out"))
        evaluate.compare(args, args.compare)
        metrics = json.loads((tmp_path / "out" / "summary.json").read_text())["x"]["runs"]["a"]["metrics"]
        assert [name for name in metrics if name.startswith("regret@")] == [f"regret@{b}" for b in budgets]
        assert [name for name in metrics if name.startswith("maj@")] == ["maj@2", "maj@4", "maj@8", "maj@16"]


def test_problems_with_one_id_and_different_texts_are_not_paired(tmp_path, capsys):
    other = [[{**r, "problem": "something else"} for r in record(i, ["7", "7"])] for i in range(4)]
    a = write_run(tmp_path / "a", "x", "a", [record(i, ["7", "3"]) for i in range(4)])
    b = write_run(tmp_path / "b", "x", "b", other)
    args = options("--compare", str(a), str(b), "--out", str(tmp_path / "out"))
    with pytest.raises(SystemExit):
        evaluate.compare(args, args.compare)
    assert "no problem in common" in capsys.readouterr().err


def test_many_problems_with_64_samples_are_scored_in_seconds():
    rng, rows = np.random.default_rng(0), []
    for i in range(50):
        p = rng.beta(0.7, 0.7)
        wrong = [None if rng.random() < 0.1 else str(rng.zipf(1.6) + 10) for _ in range(64)]
        rows += record(i, ["7" if rng.random() < p else answer for answer in wrong])
    args, began = options("--num-samples", "64", "--metric", "all"), time.process_time()
    summary = evaluate.summarise(rows, evaluate.problem_values(args, rows))
    assert time.process_time() - began < 20  # a third of a second of the processor
    assert summary["metrics"]["maj@64"]["mean"] > summary["metrics"]["pass@1"]["mean"]
