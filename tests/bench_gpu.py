"""One real update at the shape of Qwen2.5-1.5B (random weights) on sequences of 16K tokens: peak memory, tokens per
second, share of the card's bf16 peak.

python tests/bench_gpu.py                  # on a GPU; peak of an H100 by default, --peak-tflops for another card
python tests/bench_gpu.py --toy            # the same code at toy size, to see that it runs

It has not been run on a GPU by us. FLOPs are counted as 8 N T for N parameters and T tokens (forward 2, forward again
for gradient checkpointing 2, backward 4), and for attention 16 L H S / 2 a token (causal, the same passes).
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rl_mrt
from common import Trace
from plumbing import models, runs, training
from plumbing.models import Completion

SHAPE = dict(
    vocab_size=151_936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    max_position_embeddings=32_768,
)
TOY = dict(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    max_position_embeddings=32_768,
)


def traces_of(model, count: int, length: int, dtype) -> list[list[Trace]]:
    """Groups of two random traces with the log-probs that the model gives them, as a sampler would hand them over."""
    device, groups = model.device, []
    for place in range(count // 2):
        group = []
        for _ in range(2):
            ids = torch.randint(0, model.config.vocab_size, (1, length), device=device)
            where = torch.ones_like(ids, dtype=torch.bool)
            where[:, :64] = False
            with torch.no_grad(), models.autocast(dtype):
                logprobs, _ = models.token_logprobs(model, ids, where)
            ids = ids[0].tolist()
            completion = Completion(ids[64:], logprobs.tolist(), "length")
            group.append(Trace({"id": str(place), "place": place}, ids[:64], completion, [0], False, None))
        groups.append(group)
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 of the card (H100 SXM: 989)")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    length = 512 if args.toy else args.tokens
    if not args.toy and not torch.cuda.is_available():
        runs.fail("no GPU here; --toy shows the same at toy size")
    device, dtype = models.pick_device(), models.pick_dtype("auto")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**(TOY if args.toy else SHAPE))).to(device)
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    groups = traces_of(model, args.sequences, length, dtype)
    rng = np.random.default_rng(0)
    advantages = [[rng.normal(size=len(t.completion.token_ids)) for t in group] for group in groups]
    settings = SimpleNamespace(
        updates_per_batch=1,
        problems_per_step=len(groups),
        group_size=2,
        temperature=1,
        clip=0.2,
        kl=0.0,
        is_cap=2.0,
        max_grad_norm=1,
        max_tokens_per_batch=length,
        dtype="auto",
    )
    model.train()
    for name in ("first (with AdamW's moments to make)", "second"):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.perf_counter()
        metrics = rl_mrt.update(settings, model, None, optimizer, groups, advantages)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        tokens, config = args.sequences * length, model.config
        parameters = sum(p.numel() for p in model.parameters())
        attention = 16 * config.num_hidden_layers * config.hidden_size * length / 2
        flops = tokens * (8 * parameters + attention)
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB peak, " if device == "cuda" else ""
        speed = flops / seconds / 1e12
        print(f"{runs.device_name()}: {name} update of {args.sequences} × {length:,} tokens:")
        print(
            f"  {parameters / 1e6:,.0f}M parameters, {peak}{tokens / seconds:,.0f} tokens/s, {speed:.1f} TFLOP/s = "
            f"{speed / args.peak_tflops:.0%} of the peak, sampler gap {metrics['sampler_gap_mean']:.1e}"
        )
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        training.save_model(Path(folder) / "model", model, models.load_tokenizer("tiny"))
        print(f"saved in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
