"""The folder of a run: who owns it, what it was made with, its records; progress of long work."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from engine import first_line
from engine.models import ROOT, resolve_model
from engine.processes import ranks, wait_for_ranks
from engine.served_engine import is_served
from run.files import checksum, fail, repair, whole_lines, write_json


def short_name(path: str) -> str:
    """What a model, a data set or a list of either is called in the names of runs: NAME for runs/NAME/model."""
    path = path.strip("/").removesuffix("/model").removesuffix(".jsonl")
    return path.replace(",", "+").split("/")[-1].replace(":", "")


def script_name() -> str:
    """The script whose run a folder holds: the one now running."""
    return Path(sys.argv[0]).name


def config_of(run: Path) -> dict | None:
    """config.json of the run in a folder; None if there is none (a model's folder has another config.json)."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        return config if isinstance(config["settings"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def settings_of(run: Path, flag: str, script: str, setting: str) -> dict:
    """The settings of an earlier run that a flag names; ends the program if `script` has recorded nothing there.
    `setting`: one that only this script has."""
    settings = (config_of(run) or {}).get("settings", {})
    if setting not in settings or not (run / "records.jsonl").exists():
        fail(f"{flag} {run}: no config.json and records.jsonl of a run of {script} there")
    return settings


MAY_CHANGE = "resume overwrite config out concurrency context batch_problems checkpoint_every keep report_to dry_run"


def identity(args: argparse.Namespace, *may_change: str) -> dict:
    """The settings that make a run what it is, as JSON holds them: --resume needs the same."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    if is_served(settings["engine"]):
        settings["engine"] = "served"  # wherever it is
    return {name: value for name, value in settings.items() if name not in (*MAY_CHANGE.split(), *may_change)}


LOCK = ".lock"  # in the folder of a run; the operating system releases it when its owner ends, in any way
held: list[FileLock] = []


def own(out: Path) -> None:
    """Reserves a folder for this process (of several, the first) until it ends; if another has it, ends the program."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        held.append(FileLock(out / LOCK, timeout=0, is_singleton=True))
        held[-1].acquire()
    except Timeout:
        fail(f"--out {out}: another process is writing there")
    except OSError as error:
        fail(f"--out {out}: cannot be written: {first_line(error)}")


def check_out(args: argparse.Namespace, *may_change: str) -> bool:
    """Ends the program if the run may not be written to --out; returns whether there is one to continue. `may_change`:
    settings that only say how much this script makes or shows, so that --resume may have others."""
    out = args.out
    if out.exists() and not out.is_dir():
        fail(f"--out {out}: is not a folder")
    if not out.exists() or not any(path.name != LOCK for path in out.iterdir()):
        return False
    existing = config_of(out)
    if existing is None:
        fail(f"--out {out}: holds something that is not a run of this program; name another folder")
    own(out)
    earlier, now = existing["settings"], identity(args, *may_change)
    script = existing.get("script", script_name())
    if script != script_name():  # such as the training run that holds the model to evaluate
        fail(f"--out {out}: holds a run of {script}; name another folder")
    if args.overwrite:
        return False
    if not args.resume:
        fail(f"--out {out}: holds a run already; add --resume to continue it or --overwrite to discard it")
    changed = [k for k in now if now[k] != earlier.get(k)]
    if changed:
        differences = ", ".join(f"--{k.replace('_', '-')} {earlier.get(k)} (now {now[k]})" for k in changed)
        fail(f"--out {out}: the run there has other settings: {differences}")
    return True


def open_run(args: argparse.Namespace, problems: list[dict], *may_change: str) -> Path:
    """Creates the folder of a run on these problems and its `config.json`, or makes the one there ready to be
    continued. `may_change` as in `check_out`."""
    out = args.out
    if check_out(args, *may_change):
        repair(out)
    else:
        out.mkdir(parents=True, exist_ok=True)
        own(out)
        for path in out.iterdir():  # of the run to overwrite
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        about = {"script": script_name(), "versions": versions(), "device": device_name(), "command": sys.argv}
        write_json(out / "config.json", {"settings": identity(args), **about})
    same_inputs(out, problems, args.tokenizer or args.model)
    return out


def open_run_once(args, problems: list[dict]) -> Path:
    """`open_run` by one process, once all have looked at the folder."""
    wait_for_ranks()
    if ranks()[0] == 0:
        open_run(args, problems)
    wait_for_ranks()
    return args.out


def same_inputs(run: Path, problems: list[dict], model: str) -> None:
    """Ends a run that is continued with other problems under the same ids, or with other weights in its model's folder
    than it began with (`inputs.json`); problems may be added."""
    file, folder = run / "inputs.json", Path(resolve_model(model))
    recorded = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"weights": {}, "problems": {}}
    contents = {p["id"]: [p["problem"], p["answer"], *([p["prefix"]] if "prefix" in p else [])] for p in problems}
    digests = {name: f"{zlib.crc32(json.dumps(content).encode()):08x}" for name, content in contents.items()}
    changed = [name for name, digest in digests.items() if recorded["problems"].get(name, digest) != digest]
    if changed:
        fail(f"--out {run}: the run there has other problems ({len(changed)} of {len(digests)}, such as {changed[0]})")
    weights = {path.name: checksum(path) for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])}
    if weights != recorded["weights"] and file.exists():
        fail(f"--out {run}: the run there began with other weights in {model}")
    write_json(file, {"weights": weights, "problems": {**recorded["problems"], **digests}})


def load_records(file: Path) -> list[dict]:
    """The traces of a records.jsonl, each (step, problem, sample) once; a line that a crash cut is dropped."""
    records = [json.loads(line) for line in whole_lines(file)]
    if records and "samples" in records[0]:
        fail(f"{file}: holds one line per problem, as earlier versions wrote it; run it again")
    return list({(r.get("step"), r["id"], r["sample"]): r for r in records}.values())


def unrecorded(file: Path, problems: list[dict], counts: list[int], size: int, sampler) -> Iterator[tuple]:
    """What a records.jsonl lacks of `counts[i]` traces of problem i, in batches of at most `size` problems: (indices of
    the problems, their first missing sample). Prints the progress after each batch."""
    have = Counter(record["id"] for record in load_records(file)) if file.exists() else Counter()
    firsts = [have[problem["id"]] for problem in problems]
    todo = [i for i, first in enumerate(firsts) if first < counts[i]]
    batches = []
    for first in sorted({firsts[i] for i in todo}):
        alike = [i for i in todo if firsts[i] == first]
        batches += [(alike[start : start + size], first) for start in range(0, len(alike), size)]
    clock, done = Clock(len(todo), "problems", sampler), 0
    for batch, first in batches:
        yield batch, first
        done += len(batch)
        clock.tell(done)


class Clock:
    """Progress of long work: a line with the speed and the time left."""

    def __init__(self, total: int, what: str, sampler):
        self.total, self.what, self.sampler = total, what, sampler
        self.began, self.tokens = time.time(), sampler.sampled_tokens

    def tell(self, done: int) -> None:
        seconds = time.time() - self.began
        rate = (self.sampler.sampled_tokens - self.tokens) / max(seconds, 1e-9)
        left = duration(seconds * (self.total - done) / max(1, done))
        print(f"{done} of {self.total} {self.what}  {rate:,.0f} tokens/s  {left} left", flush=True)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the commit of this checkout where git knows it."""
    installed = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    installed["transformers"] = importlib.metadata.version("transformers")
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        installed["commit"] = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    return installed


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def metrics_reporter(args: argparse.Namespace, run: Path) -> Callable[[dict], object]:
    """A function that sends a step's metrics to --report-to; `metrics.jsonl` and a picture are written in any case."""
    if getattr(args, "report_to", None) is None:
        return lambda metrics: None
    if args.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run / "tensorboard")
        return lambda metrics: [writer.add_scalar(name, value, metrics["step"]) for name, value in metrics.items()]
    service = importlib.import_module(args.report_to)  # wandb and trackio have the same two calls
    service.init(project="mrt", name=run.name, config={k: str(v) for k, v in vars(args).items()})
    return lambda metrics: service.log(metrics, step=metrics["step"])
