"""experiments/compare.py: does MRT beat outcome-reward RL, and when? Sections 7 and 8 on the embedded model.

    python -m experiments.compare             # the core: GRPO, MRT online, both with a length penalty, MRT prefix
    python -m experiments.compare --all       # every method, longer runs, STaR, extensions, estimators, equal compute
    python -m experiments.compare --search    # the learning-rate search on validation problems; its winners stand in
                                              # the config
    python -m experiments.compare --report    # tables and figures again, from the runs that are there

Everything is a command of the scripts with the settings of experiments/compare.yaml, one process a core, and is printed
as it starts; what was stopped is resumed. The methods of the core have the same search, test problems and number of
sampled tokens (forced answers included). Intervals are 95 % and over seeds and problems at once: both are drawn again,
seeds for each method, problems for all methods together. One seed: they are over problems alone.
"""

import argparse
import itertools
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments import report
from experiments.report import COMPUTED, computed_tokens, folder, in_core, slug, trains_longer
from plumbing.flags import positive_int, read_config
from plumbing.runs import ROOT, config_of, duration, fail


def flags(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "experiments" / "compare.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--pages", type=Path, help="folder of tables and figures (default: pages/ in --out)")
    parser.add_argument("--all", action="store_true", help="everything, not only the core methods")
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--search", action="store_true", help="the learning-rate search alone")
    alone.add_argument("--report", action="store_true", help="no run: tables and figures from those that are there")
    parser.add_argument("--jobs", type=positive_int, default=os.cpu_count(), help="processes at once")
    args = parser.parse_args(argv)
    args.pages = args.pages or args.out / "pages"
    return args


def main() -> None:
    args = flags()
    config = read_config(args.config)
    failed = 0
    if args.search:
        failed = run_all(args, search_jobs(args, config))
        print(report.search_table(args, config))
    elif not args.report:
        methods = dict.fromkeys(["base", *config["core"], *(config["methods"] if args.all else ())])
        failed = run_all(args, method_jobs(args, config, methods) + (star_jobs(args, config) if args.all else []))
        if args.all:
            failed += run_all(args, equal_compute_jobs(args, config) + other_jobs(args, config))
    if not args.search:
        report.write_report(args, config)
    if failed:
        fail(f"of the commands {failed} failed, see above; what they would have made is left out")


# ---------------------------------------------------------------------------------------------- what is run

Job = list[tuple[Path, list[str]]]  # commands, one after the other, each with the file that is there when it is done


def command(script: str, out: Path, settings: dict, more: str = "") -> tuple[Path, list[str]]:
    """What is there when the command is done, and the command; `more` overrides the settings."""
    flags = [part for name, value in settings.items() for part in (f"--{name}", f"{value}")]
    return out / "summary.json", [script, *flags, *shlex.split(more), "--out", str(out)]


def trained(args, config, method: str, seed: int, lr: float, out: Path) -> tuple:
    settings = {**config["train"], "lr": lr, "seed": seed}
    return command("rl_mrt.py", out, settings, config["methods"][method]["flags"])


def search_jobs(args, config) -> list[Job]:
    """Every method with every learning rate, one seed; each model's pass@1 on validation problems."""
    jobs, seed = [], config["search"]["seed"]
    for lr, method in itertools.product(config["search"]["lr"], config["methods"]):
        if trains_longer(config, method):
            continue
        run = args.out / "search" / f"{slug(method)}-lr{lr:g}"
        settings = {**config["evaluate"], "split": "validation", "model": run / "model", "seed": seed}
        test = command("evaluate.py", run / "validation", settings, "--metric pass@1")
        jobs.append([trained(args, config, method, seed, lr, run), test])
    return jobs


def seeds_of(config, method: str) -> list[int]:
    kind = "core" if in_core(config, method) else "others"
    return config["methods"].get(method, {}).get("seeds", config["seeds"][kind])


def method_jobs(args, config, methods: Iterable[str]) -> list[Job]:
    """Training, evaluation and budget forcing, that of the core and of longer training: the first seed's, or --all."""
    jobs: list[Job] = []
    for seed, method in itertools.product(config["seeds"]["core"], methods):
        if seed not in seeds_of(config, method):
            continue
        run, job = folder(args, method, seed), []
        if method != "base":
            job.append(trained(args, config, method, seed, config["methods"][method]["lr"], run))
        where = {"model": "tiny" if method == "base" else run / "model", "seed": seed}
        job.append(command("evaluate.py", run / "test", {**config["evaluate"], **where}))
        extended = in_core(config, method) or trains_longer(config, method)
        if extended and (args.all or seed == config["seeds"]["core"][0]):
            job.append(command("budget_force.py", run / "force", {**config["force"], **where}))
        jobs.append(job)
    return jobs


def equal_compute_jobs(args, config) -> list[Job]:
    """Each method's last model that had computed no more tokens than GRPO of the same seed had at its end."""
    jobs = []
    for seed in config["seeds"]["core"]:
        grpo = folder(args, "GRPO", seed)
        if not (grpo / "summary.json").exists():
            continue
        limits = {what: of[-1] for what, of in computed_tokens(grpo).items()}
        for method, of_method in config["methods"].items():
            run, no_bonus = folder(args, method, seed), "--bonus 0" in of_method["flags"]
            if no_bonus or trains_longer(config, method) or not (run / "summary.json").exists():
                continue
            for what, tokens in computed_tokens(run).items():
                step = max(1, int((tokens <= limits[what]).sum()))
                settings = {"model": run / "checkpoints" / f"step_{step:06d}", "seed": seed}
                jobs.append([command("evaluate.py", run / COMPUTED[what][0], {**config["evaluate"], **settings})])
    return jobs


def star_jobs(args, config) -> list[Job]:
    jobs = []
    for seed in config["seeds"]["star"]:
        run = folder(args, "STaR", seed)
        job = [command("star_mrt.py", run, {**config["star"], "seed": seed})]
        for name in ("outcome", "mrt"):
            model = run / name / f"model_{config['star']['iterations']}"
            settings = {**config["evaluate"], "model": model, "seed": seed}
            job.append(command("evaluate.py", run / f"test-{name}", settings))
        jobs.append(job)
    return jobs


def other_jobs(args, config) -> list[Job]:
    """The other scripts' figures, of the models with the first seed; and the estimators of J against 256 answers."""
    seed = config["seeds"]["core"][0]
    jobs = [
        [command("analyze_r1.py", args.out / "analysis", config["analyze"])],
        [command("tests/bench_progress.py", args.out / "estimators", config["estimators"])],
    ]
    budgets = {"budgets": config["evaluate"]["budgets"]}
    for script, out, of, settings in (("evaluate.py", "evaluation", "test", budgets),
                                      ("budget_force.py", "budgets", "force", {})):  # fmt: skip
        runs = [folder(args, name, seed) / of for name in ("base", *config["core"])]
        runs = [str(run) for run in runs if (run / "summary.json").exists()]
        if runs:
            jobs.append([command(script, args.out / out, settings, shlex.join(["--compare", *runs]))])
    return jobs


def run_all(args, jobs: list[Job]) -> int:
    """Runs what is not done yet, --jobs at a time with one thread each; the output of each is a file beside it. Returns
    how many failed; what follows a failed command in its job is not run. What is there must be of the same command."""
    for done, line in itertools.chain(*jobs):
        made = (config_of(done.parent) or {}).get("command")
        if made and [part for part in made[1:] if part != "--resume"] != line[1:]:
            fail(f"{done.parent}: was made with other settings; remove it, or give another --out")
    todo = [job for job in jobs if not all(done.exists() for done, _ in job)]
    began, finished, lock = time.time(), 0, threading.Lock()

    def run(job: Job) -> bool:
        nonlocal finished
        error = ""
        for done, line in job:
            if done.exists():
                continue
            out = done.parent
            out.parent.mkdir(parents=True, exist_ok=True)
            line = [*line, "--resume"] if (out / "config.json").exists() else line
            with lock:
                print("python " + shlex.join(line), flush=True)
            with (out.parent / f"{out.name}.log").open("a") as log:
                code = subprocess.run([sys.executable, str(ROOT / line[0]), *line[1:]], stdout=log, stderr=log,
                                      env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode  # fmt: skip
            if code:
                error = f"error: {shlex.join(line)} ended with {code}: see {log.name}"
                break
        with lock:
            finished += 1
            left = duration((time.time() - began) / finished * (len(todo) - finished))
            print(error or f"{finished} of {len(todo)} done, {left} left",
                  file=sys.stderr if error else sys.stdout, flush=True)  # fmt: skip
        return not error

    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(run, todo)).count(False)


if __name__ == "__main__":
    main()
