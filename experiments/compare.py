"""experiments/compare.py: does MRT beat outcome-reward RL, and when? Sections 6 and 8 on the embedded model.

    python -m experiments.compare             # the confirmation: fixed before it ran, on problems nothing was chosen by
    python -m experiments.compare --report    # tables and figures again, from the runs that are there

Everything is a command of the scripts with the settings of experiments/compare.yaml, one process a core, and is printed
as it starts; what was stopped is resumed. All methods have the same problems and number of sampled tokens (forced
answers included), each method with the best setting that was found for it (findings.md).
"""

import argparse
import itertools
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.models import ROOT
from experiments import report
from experiments.report import folder
from run.files import end_in_one_line, fail
from run.flags import positive_int, read_config
from run.folder import config_of, duration


def flags(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "experiments" / "compare.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--pages", type=Path, help="folder of tables and figures (default: pages/ in --out)")
    parser.add_argument("--report", action="store_true", help="no run: tables and figures from those that are there")
    parser.add_argument("--jobs", type=positive_int, default=os.cpu_count(), help="processes at once")
    args = parser.parse_args(argv)
    args.pages = args.pages or args.out / "pages"
    return args


def main() -> None:
    args = flags()
    config = read_config(args.config)
    failed = 0 if args.report else run_all(args, jobs_of(args, config))
    report.write_report(args, config)
    if failed:
        fail(f"{failed} commands failed (see above); their results are left out")


# ---------------------------------------------------------------------------------------------- what is run

Job = list[tuple[Path, list[str]]]  # commands, one after the other, each with the file that is there when it is done


def command(script: str, out: Path, *settings: dict) -> tuple[Path, list[str]]:
    """The file that is there when the command is done, and the command: later settings override earlier ones."""
    merged = {name: value for part in settings for name, value in part.items()}
    words = [part for name, value in {**merged, "out": out}.items() for part in (f"--{name}", f"{value}")]
    return out / "summary.json", [*shlex.split(script), *words]


def jobs_of(args, config) -> list[Job]:
    """A training of each method and seed, then its model on test problems. Of self-training that is the last one."""
    jobs: list[Job] = []
    script, test = config["confirm"].get("script", "evaluate.py"), config["confirm"]["evaluate"]
    tuning = config.get("star")
    for seed in range(max(config["confirm"]["seeds"].values())):
        for method in (m for m, count in config["confirm"]["seeds"].items() if seed < count):
            run, job = folder(args, method, seed), []
            model = config["confirm"].get("base", "tiny")
            if method in config.get("methods", {}):
                model, job = run / "model", [command(config["methods"][method], run, config["train"], {"seed": seed})]
            elif method in config.get("self-training", {}):
                words = config["self-training"][method]
                model = run / words.split("--filter ")[1].split()[0] / f"model_{tuning['iterations']}"
                job = [command(words, run, tuning, {"seed": seed})]
            jobs.append([*job, command(script, run / "test", test, {"model": model, "seed": seed})])
    return jobs


def run_all(args, jobs: list[Job]) -> int:
    """Runs what is not done yet, --jobs at a time with one thread each; the output of each is a file beside it. Returns
    how many failed; what follows a failed command in its job is not run. What is there must be of the same command."""
    for done, words in itertools.chain(*jobs):
        there = [word for word in ((config_of(done.parent) or {}).get("command") or [])[1:] if word != "--resume"]
        if there and there != words[-len(there) :]:
            fail(f"{done.parent}: was made with other settings; remove it, or give another --out")
    todo = [job for job in jobs if not all(done.exists() for done, _ in job)]
    began, finished, lock = time.time(), 0, threading.Lock()

    def run(job: Job) -> bool:
        nonlocal finished
        error = ""
        for done, words in job:
            if done.exists():
                continue
            out = done.parent
            out.parent.mkdir(parents=True, exist_ok=True)
            words = [*words, "--resume"] if (out / "config.json").exists() else words
            with lock:
                print("python " + shlex.join(words), flush=True)
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            with (out.parent / f"{out.name}.log").open("a") as log:
                line = [sys.executable, str(ROOT / words[0]), *words[1:]]
                code = subprocess.run(line, stdout=log, stderr=log, env=environment).returncode
            if code:
                error = f"error: {shlex.join(words)} ended with {code}: see {log.name}"
                break
        with lock:
            finished += 1
            left = duration((time.time() - began) / finished * (len(todo) - finished))
            progress = f"{finished} of {len(todo)} done, {left} left"
            print(error or progress, file=sys.stderr if error else sys.stdout, flush=True)
        return not error

    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(run, todo)).count(False)


if __name__ == "__main__":
    end_in_one_line(main)
