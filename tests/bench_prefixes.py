"""What sharing prefixes saves when every boundary of every trace is forced to answer.

python tests/bench_prefixes.py [--traces 64]

Against the straightforward way (the authors' script's): one engine call a trace, every prefix a prompt of its own. Same
traces, same answers to sample, one run; only the ratio of the seconds means anything.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plumbing.hf_engine import TransformersEngine
from plumbing.sampler import Sampler

import common
from plumbing import data, models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--traces", type=int, default=64)
    parser.add_argument("--lines", type=int, default=60, help="lines of a trace; an episode has three")
    args = parser.parse_args()
    tokenizer, model = models.load_tokenizer(args.model), models.load_model(args.model, "cpu")
    sampler = Sampler(TransformersEngine(model), tokenizer)
    traces = []
    for i, problem in enumerate(data.load_problems("tiny", "train", args.traces)):
        lines = [f"try x = {(7 * i + n) % 30}: {n}² ≡ 3, + 17 ≡ 20 vs 5: no.\n\n" for n in range(args.lines + i % 10)]
        text = "".join(("Wait, " if n % 3 == 0 else "") + line for n, line in enumerate(lines))
        ids = models.encode(tokenizer, text)
        completion = models.Completion(ids, [], "length", *models.text_and_offsets(tokenizer, ids))
        prompt = models.prompt_ids(tokenizer, problem["problem"])
        traces.append(common.read_trace(tokenizer, problem, prompt, completion))
    asked = [[common.forced_prompt(tokenizer, t, b) for b in t.boundaries] for t in traces]
    requested = sum(len(prompt) for row in asked for prompt in row)
    print(f"{len(traces)} traces, {sum(map(len, asked))} boundaries, {requested:,} prompt tokens, 4 answers each")

    began = time.perf_counter()
    common.set_sampled_J(sampler, traces, Forcing(4, 8), (0,))
    shared, computed = time.perf_counter() - began, sampler.computed_tokens - sampler.sampled_tokens
    print(f"shared prefixes, one call   {computed:10,} prompt tokens computed {shared:8.1f} s")

    stop = models.stop_token_ids(tokenizer, model.generation_config)
    settings = dict(do_sample=True, top_k=0, num_return_sequences=4, eos_token_id=stop, pad_token_id=stop[0])
    began, computed = time.perf_counter(), 0
    for row in asked:
        width = max(map(len, row))
        ids = torch.tensor([[stop[0]] * (width - len(p)) + p for p in row])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in row])
        with torch.inference_mode():
            model.generate(ids, attention_mask=mask, max_new_tokens=8, **settings)
        computed += 4 * sum(map(len, row))
    loop = time.perf_counter() - began
    print(
        f"a call a trace, nothing shared {computed:7,} prompt tokens computed {loop:8.1f} s: {loop / shared:.1f} times"
    )


if __name__ == "__main__":
    main()
