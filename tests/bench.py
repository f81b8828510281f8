"""Benchmarks: python tests/bench.py NAME [...] [--trl-python PYTHON] [--rows FILE.jsonl ...] [--authors grader.py]

engine    tokens a second of transformers' `generate` (one padded batch), our transformers engine and vLLM, where it is
          there, on the same prompts
progress  estimators of J against 256 sampled answers on the same prefixes: error, cost
update    log-probs and loss of an update at a vocabulary of 152k, forward and backward: time and peak memory of ours
          (chunks of logits, computed again in the backward pass), of all logits at once, and of TRL's way. The head's
          matmul is done four times by us, three times plainly: ours cannot be below 4/3 in the matmuls
trl       whole GRPO steps against TRL's GRPOTrainer, both with transformers as the engine: same model, prompts, group
          size, lengths; and what progress costs, --bonus 1 against --bonus 0 at equal rollouts
grading   our grader, math-verify alone and the authors' grader.py (if given) by kind of answer: rows decided right,
          and accepted wrongly, of tests/answers.txt or of files with rows {gold, output, expected, kind}

Each compares in one run, on the embedded model unless it says otherwise. Only ratios mean anything: another process on
the machine slows all rows, and OpenMP code most. PYTHON: one with trl and what requirements-cpu.txt has.
"""

import argparse
import importlib.util
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from math_verify import parse, verify
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Forcing, Segmentation, grade, read_traces, set_likelihood_J, set_sampled_J
from engine import models
from engine.logprobs import token_logprobs
from engine.models import ROOT, resolve_model
from engine.sampler import Sampler
from engine.tokens import encode, prompt_ids, stop_token_ids
from engine.transformers_engine import TransformersEngine
from engine.vllm_engine import VllmEngine, vllm_or_why_not
from run import data, report
from run.files import json_line

LINE = "Okay, try x = 8: 8² ≡ 3, + 17 ≡ 20 vs 5: no.\n\n"


def clocked(work, *arguments, **named):
    """(what the call returns, its seconds)."""
    began = time.perf_counter()
    return work(*arguments, **named), time.perf_counter() - began


def embedded():
    """(tokenizer, model, a sampler with our engine)."""
    tokenizer, model = models.load_tokenizer("tiny"), models.load_model("tiny", "cpu")
    return tokenizer, model, Sampler(TransformersEngine(model), tokenizer)


def plain_generate(model, tokenizer, prompts, max_tokens: int, n: int = 1) -> int:
    """One left-padded batch through transformers; returns the sampled tokens, each row's end of turn included."""
    stop, width = stop_token_ids(tokenizer, model.generation_config), max(map(len, prompts))
    ids = torch.tensor([[stop[0]] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    settings = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, eos_token_id=stop, pad_token_id=stop[0])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, num_return_sequences=n, **settings)
    ended = torch.isin(out[:, width:], torch.tensor(stop)).int()
    return int((ended.cumsum(1) - ended == 0).sum())


def bench_engine(args) -> None:
    tokenizer, model, ours = embedded()
    sizes, max_tokens, more = (16, 64, 256), 256, encode(tokenizer, LINE * 200)
    problems = data.load_problems("tiny", "train", max(sizes))
    prompts = [prompt_ids(tokenizer, p["problem"]) + more[: 7 * i % 150] for i, p in enumerate(problems)]
    samplers, speeds = {"our transformers engine": ours}, {"transformers generate": []}
    works, why_not = vllm_or_why_not()
    if works:
        engine = VllmEngine(resolve_model("tiny"), torch.float32, max(map(len, prompts)) + max_tokens)
        samplers[works] = Sampler(engine, tokenizer)
    print(works or why_not)
    for size in sizes:
        tokens, seconds = clocked(plain_generate, model, tokenizer, prompts[:size], max_tokens)
        speeds["transformers generate"].append(tokens / seconds)
        for name, of in samplers.items():
            before = of.sampled_tokens
            _, seconds = clocked(of.generate, prompts[:size], max_tokens, [(0, i) for i in range(size)])
            speeds.setdefault(name, []).append((of.sampled_tokens - before) / seconds)
    ratios = np.divide(speeds["our transformers engine"], speeds["transformers generate"])
    rows = [(name, [f"{speed:,.0f}" for speed in row]) for name, row in speeds.items()]
    for name, row in [("tokens/s, prompts at once:", sizes), *rows, ("ours / generate", [f"{r:.1f}" for r in ratios])]:
        print(f"{name:32s}" + "".join(f"{cell!s:>8s}" for cell in row))


def bench_progress(args) -> None:
    tokenizer, _, sampler = embedded()
    problems = data.load_problems("tiny", "validation", 96)
    prompts = [prompt_ids(tokenizer, p["problem"]) for p in problems]
    sampled = sampler.generate(prompts, 256, [(7, i) for i in range(len(prompts))])
    how = Segmentation(max_episodes=32)
    traces = [trace for (trace,) in read_traces(tokenizer, problems, prompts, sampled, how)]

    def estimate(answers: int, seed: int) -> np.ndarray:
        """J's from so many sampled answers, or from the likelihood for none."""
        if answers:
            set_sampled_J(sampler, traces, Forcing(answers, 8), (seed,))
        else:
            set_likelihood_J(sampler, traces)
        return np.concatenate([trace.J for trace in traces])

    many, rows = 256, []
    reference = estimate(many, 1)
    for name, answers in {"1 sampled answer": 1, "4": 4, "16": 16, "likelihood": 0}.items():
        before = sampler.sampled_tokens, sampler.computed_tokens
        values, seconds = clocked(estimate, answers, 2)
        error, r = values - reference, np.corrcoef(values, reference)[0, 1]
        moments = f"{r:.4f}", f"{error.mean():+.4f}", f"{error.var():.4f}", f"{np.sqrt((error**2).mean()):.4f}"
        tokens = sampler.sampled_tokens - before[0], sampler.computed_tokens - before[1]
        rows.append([name, *moments, *(f"{count:,}" for count in tokens), f"{seconds:.1f}"])
    print(f"{len(traces)} traces, {len(reference)} prefixes, reference: {many} sampled answers each\n")
    columns = "estimator, correlation, bias, variance, RMS error, sampled tokens, computed tokens, seconds"
    print(report.markdown(columns.split(", "), rows))


# ------------------------------------------------------------------------------------------------ against TRL


def in_process(python: str, call: str, rows: str = "") -> dict:
    """What a function of this file returns, called in a process of its own."""
    code = f"import json, sys; sys.path[:0] = [{str(ROOT / 'tests')!r}]; import bench; print(json.dumps(bench.{call}))"
    done = subprocess.run([python, "-c", code], input=rows, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def one_update(variant: str, tokens: int = 4096) -> dict[str, float]:
    """Peak of resident memory above what there was before the update; seconds of the clock and of the processor."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=151_936, hidden_size=256, intermediate_size=1024, num_hidden_layers=2)
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    model, ids = Qwen2ForCausalLM(config), torch.randint(0, 151_936, (max(1, tokens // 1024), 1024 + 1))
    where = torch.ones_like(ids, dtype=torch.bool)
    where[:, 0] = False
    advantage = torch.randn(int(where.sum()))
    model(ids[:, :8]).logits.sum().backward()  # gradients exist, libraries are warm
    model.zero_grad(set_to_none=False)
    if variant == "TRL":
        from trl.trainer.utils import selective_log_softmax
    before, began, computing = peak_mib(), time.perf_counter(), time.process_time()
    if variant == "ours":
        logprobs, _ = token_logprobs(model, ids, where)
    elif variant == "TRL":
        logprobs = selective_log_softmax(model(ids).logits[:, :-1], ids[:, 1:]).flatten()
    else:
        logits = model(ids).logits[:, :-1]
        logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten()
    ratio = (logprobs - logprobs.detach()).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum() / len(advantage)
    loss.backward()
    seconds, processor = time.perf_counter() - began, time.process_time() - computing
    norm = float(sum(p.grad.double().pow(2).sum() for p in model.parameters()).sqrt())
    return {"MiB": peak_mib() - before, "s": seconds, "s of processor": processor, "gradient norm": norm}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bench_update(args) -> None:
    """The rows take turns, each time as a process of its own; medians."""
    rows = {"ours": sys.executable, "plain": sys.executable} | ({"TRL": args.trl_python} if args.trl_python else {})
    results = {variant: [] for variant in rows}
    for _ in range(3):
        for variant, python in rows.items():
            results[variant].append(in_process(python, f"one_update({variant!r})"))
    for variant, of in results.items():
        median = {name: statistics.median(run[name] for run in of) for name in of[0]}
        told = "  ".join(f"{value:,.6g} {name}" for name, value in median.items())
        pairs = list(zip(of, results["plain"]))
        ratios = {name: statistics.median(run[name] / plain[name] for run, plain in pairs) for name in list(median)[:3]}
        print(f"{variant:6s} {told}  of plain: " + ", ".join(f"{ratio:.2f} {name}" for name, ratio in ratios.items()))


STEPS, PROBLEMS, GROUP, TOKENS = 4, 32, 8, 256


def trl_steps() -> dict[str, float]:
    """In TRL's Python: {tokens, seconds} of all steps but the first; the problems are on stdin."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    marks, lengths = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            marks.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "completions/mean_length" in logs:
                lengths.append(logs["completions/mean_length"])

    def reward(completions, answer, **kwargs):
        return [float(f"\\boxed{{{a}}}" in c[0]["content"]) for c, a in zip(completions, answer)]

    rows = [json.loads(line) for line in sys.stdin]
    prompts = [{"prompt": [{"role": "user", "content": r["problem"]}], "answer": r["answer"]} for r in rows]
    sizes = dict(max_steps=STEPS, per_device_train_batch_size=PROBLEMS * GROUP, num_generations=GROUP)
    sampling = dict(max_completion_length=TOKENS, temperature=1.0, top_k=0, top_p=1.0, seed=0)
    update = dict(beta=0.0, learning_rate=5e-4, bf16=False, gradient_checkpointing=False, use_cpu=True)
    with tempfile.TemporaryDirectory() as out:
        quiet = dict(output_dir=out, logging_steps=1, save_strategy="no", report_to=[])
        config, train = GRPOConfig(**sizes, **sampling, **update, **quiet), Dataset.from_list(prompts)
        model = str(ROOT / "tiny")
        GRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=train, callbacks=[Clock()]).train()
    return {"tokens": sum(lengths[1:]) * PROBLEMS * GROUP, "seconds": marks[-1] - marks[0]}


def our_steps(flags: str) -> dict[str, float]:
    """The same of rl_mrt.py, and the tokens that these steps sampled and computed."""
    settings = f"--dataset tiny --limit 525 --lr 5e-4 --steps {STEPS} --problems-per-step {PROBLEMS} "
    settings += f"--group-size {GROUP} "
    settings += f"--max-tokens {TOKENS} --eval-every 0 --checkpoint-every 1000000 --engine transformers {flags} --out"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "rl_mrt.py"), *settings.split(), f"{folder}/run"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        first, *lines = map(json.loads, Path(folder, "run/metrics.jsonl").read_text().splitlines())
    totals = {name: lines[-1][name] - first[name] for name in ("seconds", "sampled_tokens", "computed_tokens")}
    return {"tokens": sum(line["trained_tokens"] for line in lines), **totals}


def bench_trl(args) -> None:
    ours = our_steps("--bonus 0")
    measured = {"ours --bonus 0": ours}
    if args.trl_python:
        rows = "".join(json_line(problem) for problem in data.load_problems("tiny", "train"))
        measured["TRL GRPOTrainer"] = in_process(args.trl_python, "trl_steps()", rows)
    speeds = {name: of["tokens"] / of["seconds"] for name, of in measured.items()}
    for name, speed in speeds.items():
        times = f"ours is {speeds['ours --bonus 0'] / speed:.1f} times as fast"
        print(f"{name:16s} {measured[name]['tokens']:9,.0f} tokens trained  {speed:8,.0f} tokens/s: {times}")
    for flags in ("prefix", "online --progress sampled", "online --progress likelihood"):
        of = our_steps(f"--bonus 1 --variant {flags}")
        per = {name: of[name] / of["tokens"] / (ours[name] / ours["tokens"]) for name in list(of)[1:]}
        told = ", ".join(f"{ratio:.2f} × {name}" for name, ratio in per.items())
        print(f"--bonus 1 --variant {flags:28s} a trained token costs, against --bonus 0: {told}")


# ------------------------------------------------------------------------------------------------ answers


def own_rows() -> list[dict]:
    """The rows of answers.txt; its comments are their kinds."""
    rows, kind = [], ""
    for line in Path(__file__).with_name("answers.txt").read_text(encoding="utf-8").split("\n"):
        kind = line[2:] if line[:2] == "# " else kind
        gold, _, answers = line[2:].partition(" | ")
        for answer in answers.split(" ; ") if line[:2] in ("+ ", "- ") else ():
            output = rf"\boxed{{{answer}}}"
            rows.append({"gold": gold, "output": output, "expected": line[0] == "+", "kind": kind})
    return rows


def math_verify_alone(output: str, gold: str) -> bool:
    """With its own defaults; the gold delimited, as it asks for."""
    return verify(parse(rf"\boxed{{{gold}}}"), parse(output))


def bench_grading(args) -> None:
    logging.disable(logging.CRITICAL)
    graders = {"ours": grade, "math-verify": math_verify_alone}
    if args.authors:
        spec = importlib.util.spec_from_file_location("authors_grader", args.authors)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        graders["authors"] = module.solution_eq_ans
    table: dict[str, np.ndarray] = {}
    for row in [json.loads(line) for file in args.rows for line in Path(file).open(encoding="utf-8")] or own_rows():
        cells = [1]
        for grader in graders.values():
            try:
                verdict = bool(grader(row["output"], row["gold"]))
            except ValueError:  # a gold that it refuses
                verdict = False
            cells += [verdict is row["expected"], verdict and not row["expected"]]
        for kind in (row["kind"], "all"):
            table[kind] = table.get(kind, 0) + np.array(cells)
    table["all"] = table.pop("all")
    head = [cell for name in graders for cell in (f"{name}: right", "accepts wrongly")]
    print(report.markdown(["kind", "rows", *head], [[kind, *map(str, cells)] for kind, cells in table.items()]))


BENCHES = {
    "grading": bench_grading,
    "engine": bench_engine,
    "progress": bench_progress,
    "update": bench_update,
    "trl": bench_trl,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=BENCHES, metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--trl-python", metavar="PYTHON", help="adds TRL's row to update and trl")
    parser.add_argument("--rows", nargs="+", default=[], metavar="FILE", help="grades these rows")
    parser.add_argument("--authors", metavar="FILE", help="adds the grader.py of the paper's code to grading")
    args = parser.parse_args()
    for name in args.names:
        print(f"\n## {name}\n", flush=True)
        BENCHES[name](args)


if __name__ == "__main__":
    main()
