"""Benchmark: the estimators of J(μ|prefix) against 256 sampled answers, on the same prefixes of the embedded model.

python tests/bench_progress.py [--traces 64] [--max-tokens 256] [--out FOLDER]
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plumbing.hf_engine import TransformersEngine
from plumbing.sampler import Sampler

from common import Segmentation, read_traces, set_likelihood_J, set_sampled_J
from plumbing import data, flags, models, report, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=flags.positive_int, default=64)
    parser.add_argument("--max-tokens", type=flags.positive_int, default=256)
    parser.add_argument("--out", type=Path, help="summary.json goes there")
    args = parser.parse_args()
    tokenizer = models.load_tokenizer("tiny")
    sampler = Sampler(TransformersEngine(models.load_model("tiny", "cpu")), tokenizer)
    problems = data.load_problems("tiny", "validation", args.traces)
    prompts = [models.prompt_ids(tokenizer, p["problem"]) for p in problems]
    sampled = sampler.generate(prompts, args.max_tokens, [(7, i) for i in range(len(prompts))])
    how = Segmentation(max_episodes=32)
    traces = [trace for (trace,) in read_traces(tokenizer, problems, prompts, sampled, how)]

    def estimate(answers: int, seed: int):
        """J's from so many sampled answers, or from the likelihood for none."""
        before, began = (sampler.sampled_tokens, sampler.computed_tokens), time.perf_counter()
        if answers:
            set_sampled_J(sampler, traces, Forcing(answers, 8), (seed,))
        else:
            set_likelihood_J(sampler, traces)
        cost = sampler.sampled_tokens - before[0], sampler.computed_tokens - before[1], time.perf_counter() - began
        return np.concatenate([t.values for t in traces]), cost

    reference, _ = estimate(256, 1)
    estimators = {f"{n} sampled answer{'s' * (n > 1)}": n for n in (1, 4, 16)}
    rows, summary = [], {"traces": len(traces), "prefixes": len(reference), "estimators": {}}
    for name, answers in {**estimators, "likelihood": 0}.items():
        values, (drawn, computed, seconds) = estimate(answers, 2)
        error = values - reference
        of = {
            "correlation": float(np.corrcoef(values, reference)[0, 1]),
            "bias": float(error.mean()),
            "variance": float(error.var()),
            "RMS error": float(np.sqrt((error**2).mean())),
            "sampled tokens": drawn,
            "computed tokens": computed,
            "seconds": seconds,
        }
        summary["estimators"][name] = of
        figures = [f"{of['correlation']:.4f}", f"{of['bias']:+.4f}", f"{of['variance']:.4f}", f"{of['RMS error']:.4f}"]
        rows.append([name, *figures, f"{drawn:,}", f"{computed:,}", f"{seconds:.1f}"])
    print(f"{len(traces)} traces, {len(reference)} prefixes, reference: 256 sampled answers each\n")
    print(report.markdown(["estimator", *of], rows))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        runs.write_json(args.out / "summary.json", summary)


if __name__ == "__main__":
    main()
