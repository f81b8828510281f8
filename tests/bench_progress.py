"""Benchmark: the estimators of J(μ|prefix) against 256 sampled answers, on the same prefixes of the embedded model.

python tests/bench_progress.py [traces]
"""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from common import ForcedAnswers


def main(count: int) -> None:
    tokenizer = common.load_tokenizer("tiny")
    sampler = common.Sampler(common.TransformersEngine(common.load_model("tiny", "cpu")), tokenizer)
    problems = common.load_problems("tiny", "validation", count)
    prompts = [common.prompt_ids(tokenizer, p["problem"]) for p in problems]
    sampled = sampler.generate(prompts, 256, [(7, i) for i in range(len(prompts))])
    traces = [common.read_trace(tokenizer, p, q, c, 32) for p, q, (c,) in zip(problems, prompts, sampled)]
    common.grade_traces(traces)

    def estimate(how: ForcedAnswers, seed: int):
        before, began = (sampler.sampled_tokens, sampler.computed_tokens), time.perf_counter()
        common.success_rates(sampler, traces, how, (seed,))
        cost = sampler.sampled_tokens - before[0], sampler.computed_tokens - before[1], time.perf_counter() - began
        return np.concatenate([t.values for t in traces]), cost

    def sampled_answers(n: int):
        return ForcedAnswers("sampled", n, 8, 1.0)

    reference, _ = estimate(sampled_answers(256), 1)
    print(f"{len(traces)} traces, {len(reference)} prefixes, reference: 256 sampled answers each")
    print("| estimator | correlation | bias | RMS error | sampled tokens | computed tokens | seconds |")
    print("|---|---|---|---|---|---|---|")
    estimators = [(f"{n} sampled", sampled_answers(n)) for n in (1, 4, 16)]
    for name, how in [*estimators, ("likelihood", ForcedAnswers("likelihood", 0, 0, 1.0))]:
        values, (drawn, computed, seconds) = estimate(how, 2)
        error = values - reference
        print(
            f"| {name} | {np.corrcoef(values, reference)[0, 1]:.4f} | {error.mean():+.4f} | "
            f"{np.sqrt((error**2).mean()):.4f} | {drawn:,} | {computed:,} | {seconds:.1f} |"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64)
