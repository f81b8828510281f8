"""Peak memory and time of one update's log-probs and loss, forward and backward, at a real vocabulary.

python tests/bench_update.py [--tokens 4096] [--repeats 3] [--trl-python PYTHON]

Rows: ours (chunks of logits, computed again in the backward pass); plain (all logits, log_softmax in float32); and,
with a Python that has TRL installed, TRL's selective_log_softmax on all logits. Each is a process of its own; the peak
is that of its resident memory above what it had before the update. The rows take turns; the times are medians, of the
clock and of the processor, which other work on the machine disturbs less.

The head's matmul is done three times plainly (logits, gradients of hidden states and of the head) and four times by us,
so ours cannot be below 4/3 of plain in the matmuls; what is gained beside them lowers the ratio again.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[1]


def one(variant: str, tokens: int) -> dict:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    ids = torch.randint(0, 151_936, (max(1, tokens // 1024), 1024 + 1))
    where = torch.ones_like(ids, dtype=torch.bool)
    where[:, 0] = False
    advantage = torch.randn(int(where.sum()))
    model(ids[:, :8]).logits.sum().backward()  # gradients exist, libraries are warm
    if variant == "ours":
        sys.path.insert(0, str(ROOT))
        from plumbing import models
    elif variant == "trl":
        from trl.trainer.utils import selective_log_softmax
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, computing = time.perf_counter(), time.process_time()
    if variant == "ours":
        logprobs, _ = models.token_logprobs(model, ids, where)
    else:
        logits = model(ids).logits[:, :-1]
        if variant == "trl":
            logprobs = selective_log_softmax(logits, ids[:, 1:]).flatten()
        else:
            logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten()
    ratio = (logprobs - logprobs.detach()).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum() / len(advantage)
    loss.backward()
    seconds, processor = time.perf_counter() - began, time.process_time() - computing
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    norm = float(sum(p.grad.double().pow(2).sum() for p in model.parameters()).sqrt())
    return {"peak_mib": peak / 1024, "seconds": seconds, "processor_seconds": processor, "gradient_norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trl-python", help="a Python with torch and trl, for the third row")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(one(args.variant, args.tokens)))
        return
    rows = {"ours": sys.executable, "plain": sys.executable}
    if args.trl_python:
        rows["trl"] = args.trl_python
    print(f"{args.tokens} tokens, vocabulary 151,936, float32")
    results = {variant: [] for variant in rows}
    for _ in range(args.repeats):
        for variant, python in rows.items():
            command = [python, __file__, "--variant", variant, "--tokens", str(args.tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results[variant].append(json.loads(done.stdout.splitlines()[-1]))
    for variant, runs in results.items():
        median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        ratios = {
            name: statistics.median(run[name] / plain[name] for run, plain in zip(runs, results["plain"]))
            for name in ("peak_mib", "seconds", "processor_seconds")
        }
        print(
            f"{variant:6s} peak {median['peak_mib']:8,.0f} MiB  {median['seconds']:6.1f} s, of processor "
            f"{median['processor_seconds']:6.1f} s  gradient norm {median['gradient_norm']:.6f}  of plain: memory "
            f"{ratios['peak_mib']:.2f}, time {ratios['seconds']:.2f}, of processor {ratios['processor_seconds']:.2f}"
        )


if __name__ == "__main__":
    main()
