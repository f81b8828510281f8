"""The scripts with the backtracking parameterization: rollouts, filter, linearised search, a real model's files."""

import json
import shutil

import pytest
from conftest import ROOT, Watched, assert_same_bits, jsonl, main_with, refusal, run_here, write_rows
from transformers import LlamaConfig, LlamaForCausalLM

import analyze_r1
import budget_force
import rl_mrt
import star_mrt
from common import Trace, reward
from engine.models import described, load_model, load_tokenizer
from engine.tokens import Completion, encode, prompt_ids, text_and_offsets
from run import backtracking as bt
from run.data import Columns, load_problems
from run.traces import checked_prompts, sample_traces, segmentation
from tiny.backtrack import PLACES, attempt, problems

MODEL = "tiny/backtrack"


@pytest.fixture(scope="module")
def watched():
    return Watched(load_model(MODEL, "cpu"), load_tokenizer(MODEL))


def trace_of(tokenizer, text: str, J: list[float], ends=True) -> Trace:
    """A trace of a written text with these J."""
    ids = encode(tokenizer, text) + [tokenizer.eos_token_id] * ends
    completion = Completion(ids, [], "stop" if ends else "length", *text_and_offsets(tokenizer, ids))
    boundaries = [completion.offsets.index(start) for start, _ in bt.backtracking_spans(text)] + [len(ids) - ends]
    assert len(boundaries) == len(J)
    problem = {**problems("train")[0], "place": 0}
    return Trace(problem, prompt_ids(tokenizer, problem["problem"]), completion, boundaries, ends, text, J=J)


WRONG, RIGHT = attempt(18, 5, 10), attempt(21, 3, 10)
BACK, ON = bt.RETRY + PLACES[1], bt.RETRY + PLACES[2]


# ------------------------------------------------------------------------------------------------ defaults


def test_the_parameterization_is_the_models_own_and_is_handed_on(tmp_path):
    assert rl_mrt.flags([]).parameterization == "open-ended"
    for script in (analyze_r1, star_mrt, rl_mrt, budget_force):
        args = script.flags(["--model", MODEL])
        assert (args.parameterization, args.dataset, args.answer_tokens) == ("backtracking", MODEL, 24), script
    run_here(tmp_path, f"rl_mrt.py --model {MODEL} --steps 1 --problems-per-step 2 --eval-every 0 --out r")
    trained = str(tmp_path / "r" / "model")
    assert described(trained)["flags"] == described(MODEL)["flags"]
    assert budget_force.flags(["--model", trained]).style == "window"


@pytest.mark.parametrize(
    "script, flags, says",
    [
        (analyze_r1, "--parameterization backtracking", "--parameterization backtracking: not for tiny"),
        (rl_mrt, f"--model {MODEL} --progress likelihood --variant online", "--progress likelihood"),
        (budget_force, "--style window", "--style window and --parameterization backtracking go together"),
        (budget_force, f"--model {MODEL} --style paper", "--style window and --parameterization backtracking"),
    ],
)
def test_what_does_not_go_together_is_refused(monkeypatch, capsys, tmp_path, script, flags, says):
    assert says in refusal(capsys, main_with(monkeypatch, script, *flags.split(), "--out", tmp_path / "none"))


# ------------------------------------------------------------------------------------------------ self-training


def test_the_filter_keeps_the_backtrack_with_most_progress_that_ends_right(watched):
    text = WRONG + BACK + WRONG + BACK + RIGHT + ON + WRONG + ON + RIGHT
    J = [0.3, 0, 0.4, 0, 0.5, 1, 0.1, 0, 0.9, 1]
    kept = star_mrt.keep_backtracks(watched.tokenizer, [trace_of(watched.tokenizer, text, J)], 0.5)
    ids, first, weights = kept[0].fine_tuned()
    assert watched.tokenizer.decode(ids[first:]) == ON + RIGHT + "<|end|>" and weights.shape[1] == len(ids) - first
    assert len(kept) == 1 and kept[0].episodes - kept[0].before == 1
    (about,) = [star_mrt.count_kept([kept[0].trace], kept)]
    assert about["progress_per_episode"] == pytest.approx(0.9)


@pytest.mark.parametrize(
    "text, J",
    [
        (WRONG + BACK + WRONG, [0.3, 0, 0.9, 0]),  # it does not end right
        (WRONG + BACK + RIGHT, [0.3, 0, 0.4, 1]),  # luck
        (RIGHT + BACK + RIGHT, [0.3, 1, 0.9, 1]),  # no progress
        (WRONG + "\n" + RIGHT, [0.3, 0, 1]),  # no marker
        (WRONG, [0.3, 0]),
    ],
)
def test_the_filter_drops_luck_and_what_makes_no_progress(watched, text, J):
    assert star_mrt.keep_backtracks(watched.tokenizer, [trace_of(watched.tokenizer, text, J)], 0.5) == []


# ------------------------------------------------------------------------------------------------ RL


def test_rollouts_go_on_from_a_first_attempt_and_c_is_its_success(watched):
    args = rl_mrt.flags(["--model", MODEL, "--bonus", "1", "--group-size", "4"])
    drawn = [{**problem, "place": place} for place, problem in enumerate(problems("train")[:8])]
    groups = rl_mrt.ROLLOUTS[args.variant if args.bonus else "grpo"](args, watched, drawn, (0, 0))
    for problem, group in zip(drawn, groups):
        prompt = prompt_ids(watched.tokenizer, problem["problem"])
        for trace in group:
            context = watched.tokenizer.decode(trace.prompt[len(prompt) :])
            assert context == bt.first_episode(context) + bt.RETRY == trace.problem["prefix"]["text"]
            assert trace.prefix_J == reward(problem, context) and len(trace.prompt) <= args.prompt_tokens
            assert trace.reward == reward(problem, trace.completion.text)  # graded alone
            assert trace.answer == trace.completion.text
    assert {trace.prefix_J for group in groups for trace in group} == {0.0, 1.0}


def test_recorded_first_attempts_are_what_is_gone_on_from(watched, tmp_path, capsys):
    sizes = "--limit 4 --num-samples 2 --forced-answers 1"
    run_here(tmp_path, f"analyze_r1.py --model {MODEL} --split train {sizes} --out a")
    flags = ["--model", MODEL, "--prefixes", str(tmp_path / "a")]
    found = rl_mrt.recorded_prefixes(rl_mrt.flags(flags), watched.tokenizer)
    records = jsonl(tmp_path / "a" / "records.jsonl")
    for problem in found:
        texts = [bt.first_episode(r["text"]) for r in records if r["id"] == problem["id"]]
        assert problem["prefix"]["text"].removesuffix(bt.RETRY) in texts
        assert problem["prefix"]["J"] == reward(problem, problem["prefix"]["text"])
    short = rl_mrt.flags([*flags, "--prompt-tokens", "20"])
    assert "exceed --prompt-tokens" in refusal(capsys, rl_mrt.recorded_prefixes, short, watched.tokenizer)


def test_a_training_without_bonus_goes_on_from_nothing_and_online_has_J_everywhere(watched):
    drawn = [{**problem, "place": place} for place, problem in enumerate(problems("train")[:3])]
    for flags, kind in ((["--bonus", "0"], "grpo"), (["--variant", "online"], "online")):
        args = rl_mrt.flags(["--model", MODEL, "--group-size", "3", *flags])
        for group in rl_mrt.ROLLOUTS[kind](args, watched, drawn, (0, 0)):
            for trace in group:
                assert trace.prefix_J is None and len(trace.J) == (len(trace.boundaries) if kind == "online" else 0)


# ------------------------------------------------------------------------------------------------ linearised search


def searched(watched, *flags, count=5):
    args = budget_force.flags(["--model", MODEL, "--extensions", "4", "--extension-tokens", "12", *map(str, flags)])
    args.num_samples = 2
    chosen = problems("test")[:count]
    prompts, _ = checked_prompts(args, watched.tokenizer, chosen)
    groups = sample_traces(args, watched, chosen, prompts, segmentation(args))
    traces = [trace for group in groups for trace in group]
    watched.calls.clear()
    return args, traces, budget_force.search(args, watched, traces)


def test_a_search_goes_on_token_by_token_and_every_attempt_votes(watched):
    args, traces, found = searched(watched, "--window", 2)
    phrase = encode(watched.tokenizer, bt.RETRY)
    for t, (trace, chain) in enumerate(zip(traces, found)):
        own = len(bt.attempts_in_full(trace.completion.text))
        history, spent = bt.window(watched.tokenizer, trace.completion.token_ids)[1], len(trace.completion.token_ids)
        assert len(chain) == own + args.extensions
        for number, (prompts, rows, _) in enumerate(watched.calls):
            shown, ids = bt.window(watched.tokenizer, history, 2)
            assert prompts[t] == trace.prompt + ids + phrase and shown == min(2, own + number)
            new = bt.first_attempt(rows[t][0])
            spent += len(new.token_ids)
            point = chain[own + number]
            assert (point["spent"], point["shown"]) == (spent, shown)
            assert point["verdict"] == ("right" if reward(trace.problem, new.text) else "wrong")
            assert point["stands"] == (rows[t][0].finish_reason == "stop" and new.text == rows[t][0].text)
            history += phrase + new.token_ids[: len(new.token_ids) - point["stands"]]
    assert {point["stands"] for chain in found for point in chain} == {True, False}
    assert searched(watched, "--window", 2, count=3)[2] == found[:6]  # whatever else is in the batch


def test_a_window_shows_its_oldest_attempt_in_full(watched):
    text = WRONG + BACK + RIGHT + ON + attempt(21, 5, 10, 2) + ON + attempt(21, 2, 10, 2)
    ids = encode(watched.tokenizer, text)
    shown = {w: watched.tokenizer.decode(bt.window(watched.tokenizer, ids, w)[1]) for w in range(6)}
    assert shown[0] == "" and shown[1] == attempt(21, 2, 10)
    assert shown[2] == attempt(21, 5, 10) + ON + attempt(21, 2, 10, 2)
    assert shown[4] == shown[5] == text and bt.window(watched.tokenizer, ids, 9)[0] == 4


def test_without_room_for_an_attempt_none_is_shown_and_it_is_counted(watched, monkeypatch):
    monkeypatch.setattr(budget_force, "context_of", lambda args: 36)  # room for one at most
    args, traces, found = searched(watched)
    assert {point["shown"] for chain in found for point in chain[-args.extensions :]} <= {0, 1}
    monkeypatch.setattr(budget_force, "context_of", lambda args: 30)
    args, traces, found = searched(watched)
    assert all(point["shown"] == 0 for chain in found for point in chain[-args.extensions :])
    assert all(prompt == trace.prompt for prompts, *_ in watched.calls for prompt, trace in zip(prompts, traces))
    records = [{**trace.record(), "search": chain} for trace, chain in zip(traces, found)]
    counts = budget_force.counts_of(budget_force.folder.RecordedRun("run", {}, records), True)
    assert counts["without_room"] > 0.5


def test_a_vote_counts_what_ended_within_the_tokens():
    search = [
        {"boxed": "7", "stands": False, "spent": 10, "shown": 0},
        {"boxed": "8", "stands": False, "spent": 20, "shown": 1},
        {"boxed": None, "stands": False, "spent": 25, "shown": 2},
        {"boxed": "8", "stands": False, "spent": 30, "shown": 2},
        {"boxed": "7", "stands": True, "spent": 40, "shown": 3},
    ]
    record = {"gold": "7", "search": search}
    within = {budget: budget_force.vote_within(record, budget) for budget in (9, 10, 20, 29, 30, 40)}
    assert within == {9: 0.0, 10: 1.0, 20: 0.5, 29: 0.5, 30: 0.0, 40: 0.5}
    assert [budget_force.vote_within(record, b, standing=True) for b in (30, 40)] == [0.0, 1.0]


def test_a_search_from_the_command_line_goes_on_to_the_same_bits(tmp_path):
    command = f"budget_force.py --model {MODEL} --limit 4 --num-samples 3 --extensions 2 --batch-problems 2"
    run_here(tmp_path, f"{command} --out a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    lines = (tmp_path / "a" / "records.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b" / "records.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:30])
    run_here(tmp_path, f"{command} --out b --resume")
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    summary, again = (json.loads((tmp_path / n / "summary.json").read_text())["runs"][n] for n in "ab")
    assert summary == again
    assert {"maj@3", "search@3", "standing@3"} <= summary["metrics"].keys() and summary["markers_to_no_line"] == 0
    run_here(tmp_path, "budget_force.py --compare a b --out c")
    both = json.loads((tmp_path / "c" / "summary.json").read_text())
    assert both["difference_to_first"]["b"]["search@2"]["mean"] == 0 and (tmp_path / "c" / "search.png").exists()
    assert "24 extensions of at most 32 tokens" in run_here(tmp_path, f"{command} --dry-run")


# ------------------------------------------------------------------------------------------------ what is lacking


def test_markers_that_are_missing_or_lead_nowhere_are_told_and_counted(watched, capsys):
    nowhere = bt.RETRY + "Backtrack to Line 9\n"
    assert bt.marker_counts([WRONG, WRONG + nowhere + RIGHT + ON]) == {"without_marker": 0.5, "markers_to_no_line": 0.5}
    bt.tell_markers([trace_of(watched.tokenizer, WRONG, [0, 0])])
    told = capsys.readouterr().out
    assert told.startswith("none of the first 1 traces has a line like") and told.count("\n") == 1
    bt.tell_markers([trace_of(watched.tokenizer, WRONG + nowhere, [0, 0, 0], ends=False)])
    assert capsys.readouterr().out.startswith("of the first markers 100.0% name a line")
    bt.tell_markers([trace_of(watched.tokenizer, WRONG + BACK + RIGHT, [0, 0, 0, 1])])
    assert capsys.readouterr().out == ""
    full = bt.attempts_in_full(WRONG + nowhere + RIGHT)
    assert len(full) == 2 and len(full[1]) == 3  # the nodes say what is written again


# ------------------------------------------------------------------------------------------------ a real model's files


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The embedded model's weights as a Llama of files, whose chat template knows nothing of backtracking."""
    folder = tmp_path_factory.mktemp("llama")
    model, tokenizer = load_model(MODEL, "cpu"), load_tokenizer(MODEL)
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    names += "max_position_embeddings tie_word_embeddings rms_norm_eps rope_parameters eos_token_id pad_token_id"
    config = LlamaConfig(**{name: getattr(model.config, name) for name in names.split()}, attention_bias=True)
    copy = LlamaForCausalLM(config)
    lacking, unknown = copy.load_state_dict(model.state_dict(), strict=False)
    assert not unknown and all("o_proj.bias" in name for name in lacking)
    for name in lacking:
        copy.get_parameter(name).data.zero_()
    copy.save_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    given = [(p["problem"], f"It is so.\nThe answer is: {p['answer']}") for p in problems("train")[:24]]
    write_rows(folder / "problems.jsonl", *[{"query": query, "response": response} for query, response in given])
    return folder


SMALL = {
    "rl": "--problems-per-step 4 --steps 1 --kl 0.04 --dtype float32 --lr 1e-4 --prompt-tokens 120",
    "star": "--batch-size 8 --num-samples 4 --forced-answers 4 --answer-tokens 24 --dtype float32 --iterations 1",
}


@pytest.mark.parametrize("name", SMALL)
def test_the_published_configurations_run_on_a_llama_of_files(llama, tmp_path, name):
    command, out = f"{name}_mrt.py {SMALL[name]} --max-tokens 120 --out run", tmp_path / "run"
    here = ["--config", ROOT / f"configs/{name}_backtracking.yaml", "--model", llama, "--limit", 24]
    here += ["--dataset", llama / "problems.jsonl", *"--problem-column query --answer-column response".split()]
    told = run_here(tmp_path, command, *here, "--dry-run")
    assert ("4 first attempts" if name == "rl" else "24 problems") in told
    run_here(tmp_path, command, *here)
    record = jsonl(out / ("records.jsonl" if name == "rl" else "samples_1.jsonl"))[0]
    tokenizer, problem = load_tokenizer(str(llama)), {"problem": record["problem"]}
    chat, begun = bt.asked_to_backtrack(tokenizer, problem["problem"])
    assert str(chat).count("Node #") == 1 and tokenizer.decode(begun) == bt.BEGUN
    assert record["prompt_tokens"] >= len(prompt_ids(tokenizer, chat)) + len(begun)
    if name == "rl":
        assert all(r["prefix_J"] in (0, 1) for r in jsonl(out / "records.jsonl"))
        assert len(jsonl(out / "records.jsonl")) == 16 and "without_marker" in jsonl(out / "metrics.jsonl")[0]
        assert described(str(out / "model"))["flags"] == {"parameterization": "backtracking"}
        assert star_mrt.flags(["--model", str(out / "model")]).parameterization == "backtracking"
    else:
        kept = jsonl(out / "mrt" / "selected_1.jsonl")
        assert kept and all(k["text"].startswith(bt.RETRY) and k["text"].endswith("}<|end|>") for k in kept)
        assert described(str(out / "mrt" / "model_1"))["flags"] == {"parameterization": "backtracking"}


def test_the_configurations_hold_what_is_published():
    rl = rl_mrt.flags(["--config", str(ROOT / "configs/rl_backtracking.yaml")])
    assert (rl.model, rl.limit) == ("meta-llama/Llama-3.2-3B-Instruct", 20_000) and rl_mrt.begins_with_attempt(rl)
    assert (rl.group_size, rl.group_size * rl.problems_per_step) == (4, 256)
    assert (rl.prompt_tokens, rl.max_tokens) == (1500, 1024)
    star = star_mrt.flags(["--config", str(ROOT / "configs/star_backtracking.yaml")])
    assert (star.model, star.max_tokens, star.filter) == ("meta-llama/Llama-3.1-8B-Instruct", 4096, "mrt")
    assert star.parameterization == "backtracking"


def test_answers_of_metamath_are_read(tmp_path):
    responses = (
        "2 + 5 = 7\n#### 7\nThe answer is: 7",
        "Half of it is $\\boxed{\\frac{1}{2}}$. The answer is: \\frac{1}{2}",
        "So it is 9.\nThe answer is: 9",
    )
    file = write_rows(tmp_path / "m.jsonl", *[{"query": "?", "response": response} for response in responses])
    found = load_problems(file, "train", columns=Columns("query", "response"))
    assert [p["answer"] for p in found] == ["7", "\\frac{1}{2}", "9"]
