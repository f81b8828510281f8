"""analyze_r1.py: numbers from records made by hand, given responses of every kind."""

import json

import numpy as np
import pytest
from conftest import SHARED

import analyze_r1
import common
from common import Forcing, Segmentation, set_sampled_J
from engine.tokens import encode, prompt_ids
from grading.box import extract_answer
from run import data
from run.traces import regret_at


def options(*flags):
    return analyze_r1.flags([*map(str, flags)])


GOLD = "7"


def boundary(classes):
    """Forced answers at one boundary, equal ones sharing a class; 0 is right."""
    verdicts = ["none" if c is None else "wrong" if c else "right" for c in classes]
    boxes = [None if c is None else f"{c}0" if c else GOLD for c in classes]
    fields = {"tokens": 4, "mean_logprob": -0.5, "text": "…"}
    return [{"boxed": box, "verdict": verdict, **fields} for box, verdict in zip(boxes, verdicts)]


def sample(rows, tokens, episodes=None, right=1.0):
    """A trace whose boundaries lie at `tokens` and have the forced answers `rows`."""
    return {
        **{"text": "x" * tokens[-1], "finish": "stop", "finished": True, "boxed": GOLD, "reward": right},
        **{"verdict": "right" if right else "wrong", "tokens": tokens[-1], "episodes": episodes or len(tokens) - 1},
        **{"boundaries": tokens, "characters": tokens, "J": [row.count(0) / len(row) for row in rows]},
        **{"answer_tokens": [4.0] * len(tokens), "forced": [boundary(row) for row in rows]},
    }


def problem(i, *samples):
    """The records of a problem's traces."""
    return [{"id": str(i), "problem": f"p{i}", "gold": GOLD, "sample": n, **s} for n, s in enumerate(samples)]


NONE, HALF, ALL = [1, 1, 2, None], [0, 0, 1, 2], [0, 0, 0, 0]


@pytest.fixture()
def by_hand():
    """Two problems: one trace of 2 episodes that learns, one of 3 that wins and loses, one of a single point."""
    records = [
        *problem(0, sample([NONE, HALF, ALL], [0, 10, 20]), sample([NONE], [0], episodes=1, right=0.0)),
        *problem(1, sample([NONE, ALL, ALL, NONE], [0, 10, 20, 40], right=0.0)),
    ]
    for record in records:
        record["maj"] = {kind: analyze_r1.votes(record, kind) for kind in ("weighted", "plain")}
    return records


def test_votes_at_each_boundary_are_exact(by_hand):
    learns = by_hand[0]
    assert learns["maj"]["plain"][0] == [0, 0, 0, 0] and learns["maj"]["plain"][2] == [1, 1, 1, 1]
    # two right, two different wrong ones; of the 6 pairs: 1 both right, 4 ties with one right, 1 both wrong
    one, two, four, eight = learns["maj"]["plain"][1]
    assert one == 0.5 and two == pytest.approx((1 + 4 * 0.5) / 6) and four == eight == 1.0
    assert learns["maj"]["weighted"] == learns["maj"]["plain"]  # equal log-probs
    learns["forced"][1][2]["mean_logprob"] = 1.1  # a wrong one outvotes both: 2^1.1 > 2 · 2^-½
    assert analyze_r1.votes(learns, "weighted")[1] == pytest.approx([0.5, (1 + 2 * 0.5) / 6, 0, 0])


def test_panels_count_their_traces_and_a_trace_that_ended_keeps_its_value(by_hand, monkeypatch):
    summary = analyze_r1.summarise(options(), by_hand)
    (panel,) = summary["panels"]
    assert (panel["traces"], panel["problems"], panel["episodes"]) == (3, 2, [1, 3])
    assert panel["after_episodes"] == [0, 1, 2, 3]
    # problem 0: mean of its two traces; then the mean over problems
    means = [cell["mean"] for cell in panel["plain"][1]]
    assert means == pytest.approx([0, ((0.5 + 0) / 2 + 1) / 2, ((1 + 0) / 2 + 1) / 2, ((1 + 0) / 2 + 0) / 2])
    assert panel["tokens"][1] == pytest.approx([4, 4 + (10 / 2 + 10) / 2, 4 + (20 / 2 + 20) / 2, 4 + (20 / 2 + 40) / 2])
    assert panel["tokens"][8][0] == 32
    monkeypatch.setattr(analyze_r1, "PANEL", 1)
    narrow = analyze_r1.summarise(options(), by_hand)["panels"]
    assert [(p["episodes"], p["traces"]) for p in narrow] == [([1, 1], 1), ([2, 2], 1), ([3, 3], 1)]


def test_progress_says_where_it_is_made_and_how_much_of_it_is_noise(by_hand):
    moved = analyze_r1.summarise(options(), by_hand)["progress"]
    assert moved["episodes"] == 5  # +½ +½ | +1 0 -1
    assert moved["mean"]["mean"] == pytest.approx((0.5 + 0.0) / 2)
    assert moved["positive"]["mean"] == pytest.approx((1 + 1 / 3) / 2)
    assert moved["negative"]["mean"] == pytest.approx((0 + 1 / 3) / 2)
    assert moved["deviation"] == pytest.approx(np.std([0.5, 0.5, 1, 0, -1]))
    assert moved["noise"] == pytest.approx(np.sqrt(2 * 0.25 / 3 / 5))  # J = ½ from 4 answers, at two ends of 5 × 2
    counts, edges = moved["histogram"]["episodes"], moved["histogram"]["edges"]
    assert sum(counts) == 5 and counts[np.searchsorted(edges, 0) - 1] == 1  # a bar is centred on 0
    assert [f["episodes"] for f in moved["by_fifth_of_the_trace"]] == [2, 1, 1, 1]


def test_regrets_are_those_of_metrics(by_hand):
    args = options("--budgets", "20,40")
    summary = analyze_r1.summarise(args, by_hand)
    for budget in (20, 40):
        regrets = [regret_at(record, budget) for record in by_hand]
        expected = np.mean([np.mean(regrets[:2]), regrets[2]])  # problems weigh the same
        assert summary["regret"][budget]["normalised"]["mean"] == pytest.approx(expected)
        assert summary["regret"][budget]["cumulative"]["mean"] == pytest.approx(budget * expected)
    regret = [cell["mean"] for cell in summary["regret_over_episodes"]]
    assert regret[:3] == pytest.approx([1.0, 1 + ((0.5 + 1) / 2 + 0) / 2, 1 + 0.375 + ((0 + 1) / 2 + 0) / 2])
    ratios = [common.additional_regret(record["maj"]["weighted"]) for record in by_hand]
    assert np.isnan(ratios[1])  # one point: nothing to think on to
    assert summary["additional_regret"]["mean"] == pytest.approx((ratios[0] + ratios[2]) / 2)


def test_noise_of_the_estimate_is_what_repeated_sampling_shows():
    """True J's 0.5 everywhere: the deviation of progress is noise alone, and the noise says so."""
    rng = np.random.default_rng(0)
    rows = [[[0 if rng.random() < 0.5 else 1 for _ in range(8)] for _ in range(4)] for _ in range(400)]
    moved = analyze_r1.progress([r for i, row in enumerate(rows) for r in problem(i, sample(row, [0, 5, 10, 15]))])
    assert moved["noise"] == pytest.approx(moved["deviation"], rel=0.08)


# ---------------------------------------------------------------------------------------------- given responses

STEPS, AGAIN = "Okay, try x = 8.\n\nno.\n\nand so on\n\n", "Wait, again {}.\n\nno.\n\nstill no.\n\n"


def long_thought(episodes: int) -> str:
    return STEPS + "".join(map(AGAIN.format, range(episodes)))


EPISODES = long_thought(3)


def given(tokenizer, response, *flags, marked=True):
    args, row = options(*flags), {"problem": "What is 3 + 4?", "answer": "7", "id": "0"}
    return analyze_r1.given_trace(args, tokenizer, row, prompt_ids(tokenizer, row["problem"]), response, marked)


@pytest.mark.parametrize(
    "response, points, answer",
    [
        ("<think>\n" + EPISODES + "</think>\n\n\\boxed{7}", 5, "7"),
        (EPISODES + "</think>\\boxed{7}", 5, "7"),
        ("<think>\n" + EPISODES + "and then \\boxed{7} was cut", 5, None),  # a box in an unfinished thought is none
        ("<think></think>\n\\boxed{7}", None, "7"),
        ("</think>\\boxed{7}", 1, "7"),
        ("one paragraph</think>\\boxed{8}", 2, "8"),
        ("答案是七。\n\nいや、待って。\n\nВот так. é 🙂\n\n\n\n" + EPISODES + "</think>\\boxed{7}", 5, "7"),
    ],
    ids=["whole", "without <think>", "cut", "empty", "nothing", "one episode", "other languages"],
)
def test_given_responses_of_every_kind(tokenizer, sampler, response, points, answer):
    trace = given(tokenizer, response)
    if points:
        assert len(trace.boundaries) == points
    assert trace.boundaries[0] == 0 and trace.boundaries == sorted(set(trace.boundaries))
    rest = trace.completion.token_ids[trace.boundaries[-1] :]  # marker and answer count as tokens of the trace
    assert rest[:1] == (encode(tokenizer, "</think>") if trace.finished else [])
    assert extract_answer(trace.answer or "") == answer
    assert trace.completion.text.replace("<think>", "").strip() == response.replace("<think>", "").strip()
    for b in trace.boundaries[1:-1]:
        assert trace.prefix(b).endswith("\n\n")
    common.grade_traces([trace])
    set_sampled_J(sampler, [trace], Forcing(2, 6), (0,))
    assert len(trace.J) == len(trace.boundaries) and all(len(row) == 2 for row in trace.forced)


def test_five_hundred_episodes_stop_at_the_limit_and_are_grouped(tokenizer):
    text = long_thought(500) + "</think>\\boxed{7}"
    assert len(given(tokenizer, text).boundaries) == 51
    assert len(given(tokenizer, text, "--episodes-per-point", "5").boundaries) == 11
    assert len(given(tokenizer, text, "--max-steps", "999").boundaries) == 502


def test_responses_without_any_marker_hold_their_answers(tokenizer):
    trace = given(tokenizer, "3 + 4 is \\boxed{7}", marked=False)
    assert extract_answer(trace.answer) == "7" and not trace.finished


def test_windows_line_ends_and_scattered_rows(tmp_path):
    cells = ("A", "1", "one\r\n\r\ntwo</think>1"), ("B", "2", "x"), ("A", "1", "")
    rows = [dict(zip(("problem", "answer", "response"), row)) for row in cells]
    file = tmp_path / "r.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems, responses = data.load_responses(file, None)
    assert [p["problem"] for p in problems] == ["A", "B"]
    assert responses == [["one\n\ntwo</think>1", ""], ["x"]]


def test_unusable_responses_are_told_and_a_problem_without_any_is_kept(tokenizer, tmp_path, capsys):
    args = options("--traces", "r.jsonl")
    problems = [{"problem": p, "answer": "1", "id": str(i)} for i, p in enumerate("ABC")]
    prompts = [prompt_ids(tokenizer, p["problem"]) for p in problems]
    responses = [["fine</think>\\boxed{1}", " "], ["  "], ["word " * 5000 + "</think>1"]]
    groups, longest = analyze_r1.read_given(args, tokenizer, problems, prompts, responses)
    said = capsys.readouterr().out
    assert [len(g) for g in groups] == [1, 0, 0] and longest < 4096
    assert "problem 1: no usable response" in said and "problem 2: no usable response" in said
    assert "left out 2 responses, empty" in said and "left out 1 response, beyond" in said
    with pytest.raises(SystemExit):
        analyze_r1.read_given(args, tokenizer, problems[1:2], prompts[1:2], responses[1:2])


@pytest.mark.skipif(not (SHARED / "official_segmentation.jsonl").exists(), reason="the reference data are not there")
def test_a_given_trace_has_a_boundary_at_every_official_episode(tokenizer):
    """The published code's numbers of episodes, from whole responses: every text about once, each setting with some.
    The texts of all are compared in test_metrics.py."""
    rows = [json.loads(line) for line in (SHARED / "official_segmentation.jsonl").read_text().splitlines()]
    traces = [json.loads(line) for line in (SHARED / "traces_nemo_gym.jsonl").read_text().splitlines()]
    for row in rows[::7]:
        text = row["text"] if "text" in row else traces[row["line"]]["response"]
        text = text.replace("<think>", "[think]").replace("</think>", "[/think]")
        flags = ("--max-steps", row["max_steps"], "--episodes-per-point", row["group_size"])
        trace = given(tokenizer, text + "</think>", *flags)
        starts = [trace.completion.offsets[b] for b in trace.boundaries]
        rule = Segmentation(row["max_steps"], row["group_size"])
        spans = common.episode_spans(trace.prefix(trace.boundaries[-1]), rule)
        assert len(spans) == row["n_merged"]
        for (start, _), at in zip(spans, starts):
            assert 0 <= at - start < 12  # the first token that starts in the episode


# ---------------------------------------------------------------------------------------------- cost


def test_forced_answers_cost_tokens_linear_in_the_trace(tokenizer, sampler):
    """Twice the trace and twice its boundaries: about twice the computed tokens, four times the requested ones."""
    computed, requested = [], []
    for repeats in (20, 40):
        trace = given(tokenizer, long_thought(repeats) + "</think>")
        common.grade_traces([trace])
        before = sampler.computed_tokens
        set_sampled_J(sampler, [trace], Forcing(2, 4), (0,))
        computed.append(sampler.computed_tokens - before)
        requested.append(sum(len(common.forced_prompt(tokenizer, trace, b)) for b in trace.boundaries))
    assert computed[1] < 2.3 * computed[0] and requested[1] > 3.3 * requested[0]
