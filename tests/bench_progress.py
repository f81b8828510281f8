"""Benchmark: the estimators of J(μ|prefix) against 256 sampled answers, on the same prefixes of the embedded model.

python tests/bench_progress.py [--traces 64] [--max-tokens 256] [--out FOLDER]
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from common import ForcedAnswers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=common.positive_int, default=64)
    parser.add_argument("--max-tokens", type=common.positive_int, default=256)
    parser.add_argument("--out", type=Path, help="summary.json goes there")
    args = parser.parse_args()
    tokenizer = common.load_tokenizer("tiny")
    sampler = common.Sampler(common.TransformersEngine(common.load_model("tiny", "cpu")), tokenizer)
    problems = common.load_problems("tiny", "validation", args.traces)
    prompts = [common.prompt_ids(tokenizer, p["problem"]) for p in problems]
    sampled = sampler.generate(prompts, args.max_tokens, [(7, i) for i in range(len(prompts))])
    traces = [trace for (trace,) in common.read_traces(tokenizer, problems, prompts, sampled, max_episodes=32)]

    def estimate(how: ForcedAnswers, seed: int):
        before, began = (sampler.sampled_tokens, sampler.computed_tokens), time.perf_counter()
        common.success_rates(sampler, traces, how, (seed,))
        cost = sampler.sampled_tokens - before[0], sampler.computed_tokens - before[1], time.perf_counter() - began
        return np.concatenate([t.values for t in traces]), cost

    def sampled_answers(n: int):
        return ForcedAnswers("sampled", n, 8, 1.0)

    reference, _ = estimate(sampled_answers(256), 1)
    estimators = {f"{n} sampled answer{'s' * (n > 1)}": sampled_answers(n) for n in (1, 4, 16)}
    rows, summary = [], {"traces": len(traces), "prefixes": len(reference), "estimators": {}}
    for name, how in {**estimators, "likelihood": ForcedAnswers("likelihood", 0, 0, 1.0)}.items():
        values, (drawn, computed, seconds) = estimate(how, 2)
        error = values - reference
        of = {"correlation": float(np.corrcoef(values, reference)[0, 1]), "bias": float(error.mean()),
              "variance": float(error.var()), "RMS error": float(np.sqrt((error**2).mean())),
              "sampled tokens": drawn, "computed tokens": computed, "seconds": seconds}  # fmt: skip
        summary["estimators"][name] = of
        figures = [f"{of['correlation']:.4f}", f"{of['bias']:+.4f}", f"{of['variance']:.4f}", f"{of['RMS error']:.4f}"]
        rows.append([name, *figures, f"{drawn:,}", f"{computed:,}", f"{seconds:.1f}"])
    print(f"{len(traces)} traces, {len(reference)} prefixes, reference: 256 sampled answers each\n")
    print(common.markdown(["estimator", *of], rows))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        common.write_json(args.out / "summary.json", summary)


if __name__ == "__main__":
    main()
