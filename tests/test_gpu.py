"""Does each part work on a GPU, and what does it take? `make gpu-check` runs these tests and prints what they say.

Without a GPU they run at toy size: those with vLLM under `make test-vllm`, the others under `make test`.
"""

import copy
import os
import platform
import re
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import PATIENCE, ROOT, jsonl
from transformers import Qwen2Config, Qwen2ForCausalLM

import rl_mrt
from common import Trace
from engine import models
from engine.checks import Ways
from engine.logprobs import token_logprobs
from engine.sampler import Sampler, open_sampler
from engine.tokens import Completion
from engine.vllm_engine import vllm_or_why_not
from run import training
from run.folder import versions

ON_GPU = torch.cuda.is_available()
works, why_not = vllm_or_why_not()
needs_vllm = pytest.mark.skipif(works is None, reason=why_not)
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.3}  # nats between vLLM's log-prob of a token and the trainer's
SIZES = dict(vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28)
HEADS = dict(num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=False)
TABLE_3 = Qwen2Config(**SIZES, **HEADS)  # R1-Distill-Qwen-1.5B
TOY = Qwen2Config(vocab_size=1000, hidden_size=96, intermediate_size=256, num_hidden_layers=2, **HEADS)
GIB = 2**30


@pytest.fixture()
def say(record_property):
    """say(line): it is printed below the test's name when all have ended, see conftest.py."""
    return partial(record_property, "page")


def used_memory() -> float:
    """GiB of the card in use, by whomever."""
    free, total = torch.cuda.mem_get_info() if ON_GPU else (0, 0)
    return (total - free) / GIB


def train(say, folder, *flags: str, processes: int = 1) -> list[dict]:
    """Two steps of MRT online on the embedded model; their metrics."""
    several = f"-m torch.distributed.run --standalone --nproc-per-node={processes}".split() if processes > 1 else []
    settings = "--bonus 1 --variant online --progress sampled --problems-per-step 4 --group-size 4 --max-tokens 128 "
    settings += "--eval-every 0 --steps 2"
    command = [sys.executable, *several, str(ROOT / "rl_mrt.py"), *settings.split(), *flags, "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    metrics = jsonl(folder / "metrics.jsonl")
    told = "{}, step {step}: right {reward:.2f}, loss {loss:+.5f}, gradient norm {grad_norm:.4f}, sampler and trainer "
    told += "differ by at most {sampler_gap_max:.1e}, {sampling_seconds:.1f} + {update_seconds:.1f} s"
    for step in metrics:
        say(told.format(folder.name, **step))
    return metrics


def test_vllm_finds_the_device(say):
    say(", ".join(f"{name} {version}" for name, version in versions().items()))
    say(f"{works or why_not}; {platform.platform()}, {os.cpu_count()} cores, CUDA {torch.version.cuda}")
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        say(f"GPU {number}: {card.name}, {card.total_memory / GIB:.1f} GiB")
    assert works or why_not == "vLLM is not installed"
    assert not (works and ON_GPU) or works.endswith("cuda")


@needs_vllm
def test_a_training_with_vllm_in_its_process(tmp_path, say):
    train(say, tmp_path / "vllm", "--engine", "vllm")


@pytest.mark.skipif(torch.cuda.device_count() < 2 and (ON_GPU or not works), reason="test_processes.py is for CPUs")
def test_two_processes_train_as_one(tmp_path, say):
    exact = ("--engine", "transformers", "--dtype", "float32")
    alone, two = (train(say, tmp_path / f"processes-{n}", *exact, processes=n) for n in (1, 2))
    for name in ("reward", "tokens", "loss", "grad_norm"):
        np.testing.assert_allclose([a[name] for a in alone], [b[name] for b in two], rtol=1e-4, atol=1e-4, err_msg=name)
    if works:
        train(say, tmp_path / "processes-2-vllm", "--engine", "vllm", processes=2)


def test_an_update_of_table_3(say):
    """Four sequences of full length, random weights and tokens, two at a time, with a reference, as rl_mrt.py does."""
    config, length, dtype = (TABLE_3, 16_384, torch.bfloat16) if ON_GPU else (TOY, 512, torch.float32)
    count, parts = training.update_memory(config, 2 * length, dtype, reference=True, world=1)
    estimate = sum(parts.values()) / GIB
    say(f"{count / 1e6:,.1f}M parameters, 4 × {length:,} tokens; estimate of --dry-run: {estimate:.2f} GiB")
    if ON_GPU and torch.cuda.mem_get_info()[1] / GIB < 0.9 * estimate:
        pytest.skip("the card is too small")
    torch.manual_seed(0)
    with torch.device(models.pick_device()):
        model = Qwen2ForCausalLM(config)
    reference = partial(token_logprobs, copy.deepcopy(model).eval())
    groups = [[random_trace(model, place, length, dtype) for _ in range(2)] for place in range(2)]
    advantages = [[np.random.default_rng(0).normal(size=len(t.completion.token_ids)) for t in g] for g in groups]
    sizes = f"--problems-per-step 2 --group-size 2 --temperature 1 --max-tokens-per-batch {2 * length}"
    settings = rl_mrt.flags([*sizes.split(), "--model", "random", "--dtype", str(dtype).removeprefix("torch.")])
    score = training.prepare(settings, model, Ways("shared", "chunks", "shared"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for name in ("first", "second"):
        began = time.perf_counter()
        metrics = rl_mrt.update(settings, model, score, reference, optimizer, groups, advantages)
        if ON_GPU:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        say(f"{name} update: {seconds:.1f} s, {4 * length / seconds:,.0f} tokens/s, norm {metrics['grad_norm']:.3g}")
        assert 0 < metrics["grad_norm"] < np.inf
    if ON_GPU:
        peaks = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
        say("peak {:.1f} GiB, {:.1f} with what PyTorch holds in reserve".format(*peaks))


def random_trace(model, place: int, length: int, dtype: torch.dtype) -> Trace:
    """Random tokens with the log-probs that the model gives them, as a sampler would hand them over."""
    ids = torch.randint(0, model.config.vocab_size, (length,)).tolist()
    completion = Completion(ids[64:], logprobs_after(model, ids, 64, dtype).tolist(), "length")
    return Trace({"id": str(place), "place": place}, ids[:64], completion, [0], False, None)


def test_the_memory_in_the_readme_is_the_estimate():
    pages = "README.md", "configs/rl_r1_distill_1.5b.yaml"
    readme, config = (" ".join((ROOT / page).read_text(encoding="utf-8").replace("#", "").split()) for page in pages)
    for world, sentence in ((8, "{:.0f} GiB a GPU"), (1, "an update takes {:.0f} GiB")):
        _, parts = training.update_memory(TABLE_3, 32_768, torch.bfloat16, reference=True, world=world)
        told = sentence.format(sum(parts.values()) / GIB)
        assert told in readme and told in config
    resting = sum(parts[name] for name in ("weights, gradients, moments", "reference of the KL penalty")) / GIB
    assert f"sampling takes {resting:.0f} GiB" in readme and f"the rest is {resting:.0f}" in config
    names = ("limit", "problems-per-step", "group-size")
    limit, problems, group = (int(re.search(rf"{name}: (\d+)", config)[1]) for name in names)
    assert f"{-(-limit // problems)} steps of {problems * group} rollouts" in readme


@needs_vllm
def test_vllm_follows_the_trained_weights_and_sleeps_through_an_update(tokenizer, prompts, say):
    model, dtype = models.load_model("tiny", models.pick_device()), models.pick_dtype("auto")
    sampler = open_sampler("vllm", "tiny", tokenizer, dtype, 400, trained=model)
    limit, gaps, used = LIMIT[dtype], [gap(sampler, model, prompts)], [used_memory()]
    train_a_little(model, prompts, lr=3e-3)
    gaps.append(gap(sampler, model, prompts))
    sampler.sync()
    gaps.append(gap(sampler, model, prompts))
    sampler.pause()
    used.append(used_memory())
    train_a_little(model, prompts, lr=3e-3)
    if ON_GPU:  # what the update of a large model leaves in PyTorch's cache must not keep vLLM from waking
        torch.empty(int(0.8 * torch.cuda.mem_get_info()[0]), dtype=torch.uint8, device="cuda")
    used.append(used_memory())
    sampler.sync()
    used.append(used_memory())
    gaps.append(gap(sampler, model, prompts))
    sampler.close()
    told = "log-probs of vLLM and the trainer differ by at most {:.1e} nats, before vLLM is given an update {:.1e}, "
    told += "then {:.1e}, after another that it slept through {:.1e}; limit {:g}"
    say(told.format(*gaps, limit))
    if ON_GPU:
        told = "GiB of the card in use: awake {:.1f}, asleep {:.1f}, with an update's cache {:.1f}, awake again {:.1f}"
        say(told.format(*used))
        assert used[0] - used[1] > 0.2 * torch.cuda.mem_get_info()[1] / GIB  # awake it has half of the card
    assert max(gaps[0], gaps[2], gaps[3]) <= limit < gaps[1]


def gap(sampler: Sampler, model, prompts: list[list[int]], temperature: float = 1.0, max_tokens: int = 60) -> float:
    """Largest |sampler - trainer| over the log-probs of tokens that the sampler draws."""
    worst = 0.0
    seeds = [(5, i) for i in range(len(prompts))]
    for prompt, row in zip(prompts, sampler.generate(prompts, max_tokens, seeds, n=2, temperature=temperature)):
        for c in row:
            logprobs = logprobs_after(model, prompt + c.token_ids, len(prompt), sampler.engine.dtype, temperature)
            worst = max(worst, float((logprobs - torch.tensor(c.logprobs)).abs().max()))
    return worst


def logprobs_after(model, ids: list[int], first: int, dtype: torch.dtype, temperature: float = 1.0) -> torch.Tensor:
    """The model's log-probs of the tokens from place `first`."""
    row = torch.tensor([ids], device=model.device)
    where = (torch.arange(len(ids), device=model.device) >= first)[None]
    with torch.no_grad(), models.autocast(dtype):
        return token_logprobs(model, row, where, temperature)[0].cpu()


def train_a_little(model, prompts: list[list[int]], steps: int = 3, lr: float = 1e-3) -> None:
    """Moves the weights, whatever for."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        ids = torch.tensor([p[:8] for p in prompts], device=model.device)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
