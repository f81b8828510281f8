"""Whole GRPO steps (sampling, scoring, update) against TRL's GRPOTrainer: same model, prompts, group size and lengths,
both with transformers as the engine, one run.

python tests/bench_trl.py --trl-python PYTHON [--steps 4]      PYTHON: a Python with torch, trl and datasets

Prints sampled-and-trained tokens per second of all steps but the first; only the ratio means anything. And the cost of
progress: --bonus 1 against --bonus 0 at equal rollouts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROBLEMS, GROUP, TOKENS = 32, 8, 256


def trl_steps(steps: int) -> None:
    """The body of the TRL process: prints {tokens, seconds} of all steps but the first."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rows = [json.loads(line) for line in sys.stdin]
    marks, lengths = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            marks.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "completions/mean_length" in logs:
                lengths.append(logs["completions/mean_length"])

    def reward(completions, answer, **kwargs):
        return [float(f"\\boxed{{{a}}}" in c[0]["content"]) for c, a in zip(completions, answer)]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=PROBLEMS * GROUP,
            num_generations=GROUP,
            max_completion_length=TOKENS,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            beta=0.0,
            learning_rate=5e-4,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            seed=0,
        )
        data = Dataset.from_list(
            [{"prompt": [{"role": "user", "content": r["problem"]}], "answer": r["answer"]} for r in rows]
        )
        trainer = GRPOTrainer(
            model=str(ROOT / "tiny"), reward_funcs=reward, args=config, train_dataset=data, callbacks=[Clock()]
        )
        trainer.train()
    tokens = sum(lengths[1:]) * PROBLEMS * GROUP
    print(json.dumps({"tokens": tokens, "seconds": marks[-1] - marks[0], "steps": steps - 1}))


def our_steps(steps: int, *flags: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            ROOT / "rl_mrt.py",
            "--dataset",
            "tiny",
            "--limit",
            525,
            "--lr",
            5e-4,
            "--steps",
            steps,
            "--eval-every",
            0,
            "--problems-per-step",
            PROBLEMS,
            "--group-size",
            GROUP,
            "--max-tokens",
            TOKENS,
            "--checkpoint-every",
            10**6,
            "--engine",
            "transformers",
            "--out",
            f"{folder}/run",
            *flags,
        ]
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    return {
        "tokens": sum(line["trained_tokens"] for line in lines[1:]),
        "seconds": lines[-1]["seconds"] - lines[0]["seconds"],
        "sampled": lines[-1]["sampled_tokens"] - lines[0]["sampled_tokens"],
        "computed": lines[-1]["computed_tokens"] - lines[0]["computed_tokens"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--as-trl", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_trl:
        trl_steps(args.steps)
        return
    ours = our_steps(args.steps, "--bonus", "0")
    speed = ours["tokens"] / ours["seconds"]
    print(f"ours --bonus 0   {ours['tokens']:9,.0f} tokens trained  {ours['seconds']:6.1f} s  {speed:8,.0f} tokens/s")
    if args.trl_python:
        sys.path.insert(0, str(ROOT))
        from plumbing import data, runs

        rows = "".join(runs.json_line(p) for p in data.load_problems("tiny", "train"))
        command = [args.trl_python, __file__, "--as-trl", "--steps", str(args.steps)]
        done = subprocess.run(command, input=rows, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        theirs = json.loads(done.stdout.splitlines()[-1])
        other = theirs["tokens"] / theirs["seconds"]
        print(
            f"TRL GRPOTrainer  {theirs['tokens']:9,.0f} tokens trained  {theirs['seconds']:6.1f} s  {other:8,.0f} "
            f"tokens/s: ours is {speed / other:.1f} times as fast"
        )
    for name, flags in (
        ("prefix", ["--variant", "prefix"]),
        ("online, 4 sampled", ["--variant", "online", "--progress", "sampled"]),
        ("online, likelihood", ["--variant", "online", "--progress", "likelihood"]),
    ):
        of = our_steps(args.steps, "--bonus", "1", *flags)
        per = [of[k] / of["tokens"] / (ours[k] / ours["tokens"]) for k in ("sampled", "computed", "seconds")]
        print(
            f"--bonus 1, {name:20s} a trained token costs, against --bonus 0: {per[0]:.2f} × sampled, "
            f"{per[1]:.2f} × computed, {per[2]:.2f} × seconds"
        )


if __name__ == "__main__":
    main()
