"""gpu_check.py: does each part work on this machine, and what does it take? One page, to be pasted into an issue.

    python -m experiments.gpu_check                  # on a GPU; most of the time is vLLM's starts
    python -m experiments.gpu_check --toy            # the same at toy size, for which a CPU will do

Each stage is a process of its own with a time limit, so that one that crashes or hangs takes no other with it. What it
prints is in OUT/STAGE.log, what it found in OUT/STAGE.md, all of that in OUT/report.md. Exit code 1 if a stage failed.
"""

import argparse
import copy
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import rl_mrt
from common import Trace
from engine import models
from engine.logprobs import token_logprobs
from engine.models import ROOT
from engine.sampler import Sampler, open_sampler
from engine.tokens import Completion, prompt_ids
from engine.vllm_engine import vllm_or_why_not
from run import data, training
from run.files import fail, read_jsonl, write_text
from run.folder import device_name, versions

LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.3}  # nats between vLLM's log-prob of a token and the trainer's
TRAINING = "--bonus 1 --variant online --progress sampled --problems-per-step 4 --group-size 4 --max-tokens 128 "
TRAINING += "--eval-every 0 --steps 2"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
TABLE_3: dict[str, Any] = dict(vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28)
TABLE_3 |= dict(num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=False)  # R1-Distill-Qwen-1.5B
TOY: dict[str, Any] = TABLE_3 | dict(vocab_size=1000, hidden_size=96, intermediate_size=256, num_hidden_layers=2)
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362, "RTX 4090": 165}
GIB = 2**30


# ---------------------------------------------------------------------------------------------- the stages
# Each yields what it finds, line by line, and raises or exits where something is wrong.


def devices(args) -> Iterator[str]:
    yield ", ".join(f"{name} {version}" for name, version in versions().items())
    works, why_not = vllm_or_why_not()
    yield f"{works or why_not}; {platform.platform()}, {os.cpu_count()} cores"
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        yield f"GPU {number}: {card.name}, {card.total_memory / GIB:.1f} GiB, CUDA {torch.version.cuda}"
    with suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        yield "driver " + subprocess.run(query, capture_output=True, text=True).stdout.strip().replace("\n", ", ")
    if not torch.cuda.is_available():
        yield "no GPU: what follows is on the CPU"


def training_with_vllm(args) -> Iterator[str]:
    yield from train(args, "rl", "--engine", "vllm")


def weight_sync(args) -> Iterator[str]:
    sampler, prompts, limit = embedded_model_in_vllm()
    start = gap(sampler, prompts)
    train_a_little(sampler.model, prompts, lr=3e-3)
    stale = gap(sampler, prompts)
    sampler.sync()
    synced = gap(sampler, prompts)
    yield f"vLLM's and the trainer's log-probs differ by at most {start:.1e} nats (limit {limit:g})"
    yield f"after updates that vLLM has not been given: {stale:.1e} (to be above the limit); given them: {synced:.1e}"
    if not max(start, synced) <= limit < stale:
        raise SystemExit("vLLM does not follow the trained weights")


def sleeping_engine(args) -> Iterator[str]:
    sampler, prompts, limit = embedded_model_in_vllm()
    sleeps, used = sampler.engine.sleeps, [used_memory()]
    sampler.pause()
    used.append(used_memory())
    train_a_little(sampler.model, prompts, lr=3e-3)
    if sleeps:  # what the update of a large model leaves in PyTorch's cache must not keep vLLM from waking
        torch.empty(int(0.8 * torch.cuda.mem_get_info()[0]), dtype=torch.uint8, device="cuda")
    used.append(used_memory())
    sampler.sync()
    used.append(used_memory())
    told = "GiB of the card in use: awake {:.1f}, asleep {:.1f}, with an update's cache {:.1f}, awake again {:.1f}"
    yield told.format(*used) if sleeps else "vLLM does not sleep on a CPU; pause, update and sync all the same"
    if sleeps and used[0] - used[1] < 0.2 * torch.cuda.mem_get_info()[1] / GIB:
        raise SystemExit("awake it has half of the card, and asleep it should give nearly all of that back")
    after = gap(sampler, prompts)
    yield f"after waking, log-probs differ by at most {after:.1e} nats (limit {limit:g})"
    if not after <= limit:
        raise SystemExit("it woke with other weights or with an old prefix cache")


def real_update(args) -> Iterator[str]:
    """Four sequences of full length, two at a time, with a reference, as in rl_mrt.py by default. FLOPs: five passes
    (forward, again for checkpointing, backward counts twice, reference), each with 2 for a weight and token (without
    the input embeddings) and 2 × layers × width × length a token for causal attention."""
    on_gpu, dtype, length = torch.cuda.is_available(), models.pick_dtype("auto"), 512 if args.toy else 16_384
    config = Qwen2Config(**(TOY if args.toy else TABLE_3))
    count, parts = training.update_memory(config, 2 * length, dtype, reference=True, world=1)
    estimate, card = sum(parts.values()) / GIB, torch.cuda.mem_get_info()[1] / GIB if on_gpu else 0
    yield f"{count / 1e6:,.1f}M parameters, 4 × {length:,} tokens; estimate of --dry-run: {estimate:.2f} GiB"
    if on_gpu and card < 0.9 * estimate:
        yield f"skipped: this card has {card:.0f} GiB"
        return
    torch.manual_seed(0)
    with torch.device(models.pick_device()):
        model: Any = Qwen2ForCausalLM(config)
    reference = copy.deepcopy(model).eval()
    training.prepare(model, dtype, token_logprobs, recompute=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    groups = [[random_trace(model, place, length, dtype) for _ in range(2)] for place in range(2)]
    advantages = [[np.random.default_rng(0).normal(size=len(t.completion.token_ids)) for t in g] for g in groups]
    sizes = f"--problems-per-step 2 --group-size 2 --temperature 1 --max-tokens-per-batch {2 * length}".split()
    settings = rl_mrt.flags(["--model", "random", *sizes])
    weights = count - config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.hidden_size * length
    peak = next((tflops for name, tflops in PEAKS.items() if name in device_name()), None)
    for name in ("first", "second"):
        began = time.perf_counter()
        metrics = rl_mrt.update(settings, model, reference, optimizer, groups, advantages)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        speed = 4 * length * 5 * 2 * (weights + attention) / seconds / 1e12
        share = f", {speed / peak:.0%} of the card's {peak}" if peak else ""
        yield f"{name} update: {seconds:.1f} s, {4 * length / seconds:,.0f} tokens/s, {speed:.2g} TFLOP/s{share}"
    yield f"gradient norm {metrics['grad_norm']:.3g}"
    if on_gpu:
        peaks = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
        yield "peak {:.1f} GiB, {:.1f} with what PyTorch holds in reserve".format(*peaks)


def two_processes(args) -> Iterator[str]:
    if torch.cuda.device_count() == 1:
        yield "skipped: one GPU"
        return
    exact = ("--engine", "transformers", "--dtype", "float32")
    yield from train(args, "one", *exact)
    yield from train(args, "two", *exact, launcher=TORCHRUN)
    alone, two = (read_jsonl(args.out / name / "metrics.jsonl") for name in ("one", "two"))
    for name in ("reward", "tokens", "loss", "grad_norm"):
        if not np.allclose([a[name] for a in alone], [b[name] for b in two], rtol=1e-4, atol=1e-4):
            raise SystemExit(f"{name} differs between one process and two")
    if vllm_or_why_not()[0]:
        yield from train(args, "two-vllm", "--engine", "vllm", launcher=TORCHRUN)


# ---------------------------------------------------------------------------------------------- what they share


def train(args, name: str, *flags: str, launcher: tuple[str, ...] = ()) -> Iterator[str]:
    """Two steps of the real command on the embedded model, and what its metrics say."""
    command = [sys.executable, *launcher, str(ROOT / "rl_mrt.py"), *TRAINING.split(), *flags]
    command += ["--out", str(args.out / name), "--overwrite"]
    print("$", shlex.join(command), flush=True)
    if code := subprocess.run(command).returncode:
        raise SystemExit(f"{name}: rl_mrt.py ended with code {code}")
    told = "step {step}: right {reward:.2f}, tokens {tokens:.1f}, loss {loss:+.5f}, gradient norm {grad_norm:.4f}, "
    told += (
        "sampler and trainer differ by at most {sampler_gap_max:.1e}, {sampling_seconds:.1f} + {update_seconds:.1f} s"
    )
    for metrics in read_jsonl(args.out / name / "metrics.jsonl"):
        yield f"{name}, {told.format(**metrics)}"


def embedded_model_in_vllm() -> tuple[Any, list[list[int]], float]:
    """(a sampler with vLLM that follows the embedded model, prompts, the limit of `gap`), as in rl_mrt.py."""
    tokenizer, model = models.load_tokenizer("tiny"), models.load_model("tiny", models.pick_device())
    sampler = open_sampler(SimpleNamespace(engine="vllm", model="tiny", dtype="auto"), tokenizer, 400, trained=model)
    problems = data.load_problems("tiny", "validation", 12)
    prompts = [prompt_ids(tokenizer, problem["problem"]) for problem in problems]
    return sampler, prompts, LIMIT[models.pick_dtype("auto")]


def gap(sampler: Sampler, prompts: list[list[int]], temperature: float = 1.0, max_tokens: int = 60) -> float:
    """Largest |sampler - trainer| over the log-probs of tokens that the sampler draws."""
    engine: Any = sampler.engine
    seeds, worst = [(5, i) for i in range(len(prompts))], 0.0
    rows = sampler.generate(prompts, max_tokens, seeds, n=2, temperature=temperature)
    for prompt, row in zip(prompts, rows):
        for c in row:
            logprobs = logprobs_after(engine.model, prompt + c.token_ids, len(prompt), engine.dtype, temperature)
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


def used_memory() -> float:
    """GiB of the card in use, by whomever."""
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    return (total - free) / GIB


def random_trace(model, place: int, length: int, dtype: torch.dtype) -> Trace:
    """Random tokens with the log-probs that the model gives them, as a sampler would hand them over."""
    ids = torch.randint(0, model.config.vocab_size, (length,)).tolist()
    completion = Completion(ids[64:], logprobs_after(model, ids, 64, dtype).tolist(), "length")
    return Trace({"id": str(place), "place": place}, ids[:64], completion, [0], False, None)


# ---------------------------------------------------------------------------------------------- running them

STAGES = {  # name: (what it does, title, most seconds, is it about vLLM?)
    "devices": (devices, "Versions and devices", 300, False),
    "training": (training_with_vllm, "Two steps of MRT online, vLLM in the trainer's process", 900, True),
    "weights": (weight_sync, "vLLM follows the trained weights", 900, True),
    "sleep": (sleeping_engine, "vLLM sleeps through an update", 900, True),
    "update": (real_update, "An update of Table 3's shape, random weights", 900, False),
    "processes": (two_processes, "Two processes train as one", 1800, False),
}


def stage_here(args) -> Iterator[str]:
    function, _, _, about_vllm = STAGES[args.stage]
    works, why_not = vllm_or_why_not() if about_vllm else ("", "")
    if works is None and why_not == "vLLM is not installed":
        yield "skipped: vllm is not installed"
    elif works is None:
        raise SystemExit(why_not)
    else:
        yield from function(args)


def run_stage(command: list[str], found: Path, seconds: float) -> tuple[str, str]:
    """Runs a stage's command, which writes `found`; returns (ok, skipped or FAILED, its part of the page). Whatever it
    leaves running is ended."""
    log, ended = found.with_suffix(".log"), f"It took longer than {seconds:g} s and was ended."
    found.write_text("", encoding="utf-8")
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
        try:
            ended = f"It ended with code {process.wait(seconds)}."
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    text = "".join(f"- {line}\n" for line in found.read_text(encoding="utf-8").splitlines())
    if process.wait() == 0:
        return "skipped" if "- skipped:" in text else "ok", text
    last = "".join(f"    {line}\n" for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
    return "FAILED", f"{text}\n{ended} Please send this page and `{log}`; the end of what it printed:\n\n{last}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size, for which a CPU will do")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"))
    parser.add_argument("--stage", choices=STAGES, help="this stage alone, in this process")
    args = parser.parse_args()
    if not (args.toy or torch.cuda.is_available()):
        fail("no GPU that PyTorch can use; --toy checks what a CPU can")
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage:
        with (args.out / f"{args.stage}.md").open("w", encoding="utf-8", buffering=1) as found:
            found.writelines(f"{line}\n" for line in stage_here(args))
        return
    parts, states = [], []
    for number, (name, (_, title, seconds, _)) in enumerate(STAGES.items(), 1):
        command, began = [sys.executable, "-m", "experiments.gpu_check", "--stage", name], time.time()
        command += ["--out", str(args.out), *["--toy"] * args.toy]
        state, text = run_stage(command, args.out / f"{name}.md", seconds)
        states.append(state)
        parts.append(f"## {number}. {title}: {state}, {time.time() - began:.0f} s\n\n{text}")
        print(parts[-1], flush=True)
        counts = ", ".join(f"{states.count(s)} {s}" for s in ("ok", "skipped", "FAILED") if s in states)
        write_text(args.out / "report.md", "\n".join([f"# GPU check: {counts}\n", *parts]))
    print(f"The page is {args.out / 'report.md'}; paste it into an issue, whatever it says.")
    raise SystemExit("FAILED" in states)


if __name__ == "__main__":
    main()
