"""Tokens per second of the engines on the same prompts in one run, and what vLLM's prefix cache saves.

python tests/bench_engine.py [--model tiny] [--max-tokens 128]

Rows: plain transformers `generate` (one padded batch), our transformers engine, vLLM where it is installed. Only the
ratios mean anything: another process on the machine slows all of them, and OpenMP code most.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plumbing.hf_engine import TransformersEngine
from plumbing.sampler import Sampler
from plumbing.vllm_engine import VllmEngine, vllm_or_why_not

from plumbing import data, models, runs


def plain_generate(model, tokenizer, prompts, max_tokens) -> int:
    """One left-padded batch through transformers; returns the sampled tokens."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    stop = models.stop_token_ids(tokenizer, model.generation_config)
    settings = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, eos_token_id=stop, pad_token_id=stop[0])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, **settings)[:, width:]
    ended = torch.isin(out, torch.tensor(stop)).int()
    return int((ended.cumsum(1) - ended == 0).sum())  # up to and with the first end of turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 256])
    args = parser.parse_args()
    tokenizer, model = models.load_tokenizer(args.model), models.load_model(args.model, "cpu")
    problems = data.load_problems("tiny", "train", max(args.sizes))
    lines = "Okay, try x = 8: 8² ≡ 3, + 17 ≡ 20 vs 5: no.\n\n" * 200
    more = models.encode(tokenizer, lines)
    prompts = [models.prompt_ids(tokenizer, p["problem"]) + more[: 7 * i % 150] for i, p in enumerate(problems)]
    samplers = {"our transformers engine": Sampler(TransformersEngine(model), tokenizer)}
    works, why_not = vllm_or_why_not()
    if works:
        longest = max(len(more) + 100, max(map(len, prompts)) + args.max_tokens)
        path = runs.resolve_model(args.model)
        samplers[works] = Sampler(VllmEngine(path, torch.float32, longest), tokenizer)
    else:
        print(why_not)
    print(
        f"{args.model}, prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, at most "
        f"{args.max_tokens} sampled\n"
    )
    print(f"{'tokens/s':32s}" + "".join(f"{size:>8d}" for size in args.sizes))
    speeds = {"transformers generate": []}
    for size in args.sizes:
        began = time.perf_counter()
        tokens = plain_generate(model, tokenizer, prompts[:size], args.max_tokens)
        speeds["transformers generate"].append(tokens / (time.perf_counter() - began))
        for name, sampler in samplers.items():
            before, began = sampler.sampled_tokens, time.perf_counter()
            sampler.generate(prompts[:size], args.max_tokens, [(0, i) for i in range(size)])
            speed = (sampler.sampled_tokens - before) / (time.perf_counter() - began)
            speeds.setdefault(name, []).append(speed)
    for name, row in speeds.items():
        print(f"{name:32s}" + "".join(f"{speed:8,.0f}" for speed in row))
    ratios = [a / b for a, b in zip(speeds["our transformers engine"], speeds["transformers generate"])]
    print(f"{'ours / transformers generate':32s}" + "".join(f"{r:8.1f}" for r in ratios))

    trace = models.prompt_ids(tokenizer, problems[0]["problem"]) + more
    asked = [trace[:end] for end in range(100, len(trace), 100)]
    print(f"\n4 forced answers at {len(asked)} boundaries of a trace of {len(trace)} tokens:")
    for name, sampler in samplers.items():
        before = sampler.computed_tokens - sampler.sampled_tokens
        sampler.generate(asked, 4, [(1, i) for i in range(len(asked))], n=4)
        computed = sampler.computed_tokens - sampler.sampled_tokens - before
        total = 4 * sum(map(len, asked))
        repeated = total - len(asked[-1])
        print(
            f"{name:32s} {total:,} prompt tokens, {computed:,} computed: "
            f"{(total - computed) / repeated:.1%} of what repeats is shared"
        )


if __name__ == "__main__":
    main()
