"""The folder of a run: who owns it, what it was made with, its records; progress of long work."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from huggingface_hub import try_to_load_from_cache

from engine import first_line, plural, say_once, tell
from engine.models import ROOT, resolve_model
from engine.processes import ranks, wait_for_ranks
from engine.served_engine import is_served
from run.files import digest, fail, parse_lines, remove, repair, whole_lines, write_json, writing


def short_name(path: str) -> str:
    """What a model, a data set or a list of either is called in the names of runs: NAME for runs/NAME/model."""
    names = [part.strip("/").removesuffix("/model").removesuffix(".jsonl").split("/")[-1] for part in path.split(",")]
    return "+".join(names).replace(":", "")


def script_name() -> str:
    """The script whose run a folder holds: the one now running."""
    return Path(sys.argv[0]).name


def config_of(run: Path) -> dict | None:
    """config.json of the run in a folder; None if there is none (a model's folder has another config.json)."""
    config = parsed(run / "config.json")
    return config if isinstance(config, dict) and isinstance(config.get("settings"), dict) else None


def parsed(file: Path) -> Any:
    """What a JSON file holds; None if it is not there or is cut."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@dataclass
class RecordedRun:
    """An earlier run of any script, read from its folder."""

    name: str
    settings: dict
    records: list[dict]
    script: str = ""
    inputs: dict[str, dict] = field(default_factory=dict)  # as of `open_run`


def recorded_run(run: Path, flag: str, *fields: str) -> RecordedRun:
    """The run that a flag names by its folder or by a file of records in it. Ends the program if there is none, or if a
    record lacks one of the fields."""
    file = run if run.suffix == ".jsonl" else run / "records.jsonl"
    folder = file.parent if config_of(file.parent) else file.parent.parent
    config = config_of(folder)
    if config is None or not file.is_file():
        kinds = "base", "samples_1", "*/evaluation_*"  # of star_mrt.py
        others = sorted(str(f) for name in kinds for f in run.glob(f"{name}.jsonl"))
        instead = f"; name one of {', '.join(others)}" if others else ""
        fail(f"{flag} {run}: no config.json and records.jsonl of a run there{instead}")
    script, settings, records = config.get("script", "an unknown script"), config["settings"], load_records(file)
    if not records:
        fail(f"{flag} {run}: its records hold no trace")
    for name in fields:
        if lacking := sum(record.get(name) in (None, [], {}) for record in records):
            fail(f"{flag} {run}: {lacking} of {len(records)} records of this run of {script} have no {name}")
    if flag != "--from" and any("step" in record for record in records):
        fail(f"{flag} {run}: the records of this run of {script} are of a model that changes in training")
    if script == "star_mrt.py":  # held-out problems, and models that have no name
        model = settings["model"] if file.name in ("base.jsonl", "samples_1.jsonl") else str(run)
        held_out = {"dataset": settings["eval_dataset"] or settings["dataset"], "split": settings["eval_split"]}
        settings = {**settings, **(held_out if "samples" not in file.name else {}), "model": model}
    return RecordedRun(run.name.removesuffix(".jsonl"), settings, records, script, parsed(folder / "inputs.json") or {})


MAY_CHANGE = (  # between a run and its --resume
    "resume overwrite config markers_file out concurrency context batch_problems checkpoint_every report_to dry_run "
    "unusual"
).split()


def identity(args: argparse.Namespace, *may_change: str) -> dict:
    """The settings that make a run what it is, as JSON holds them: --resume needs the same."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    if is_served(settings["engine"]):
        settings["engine"] = "served"  # wherever it is
    return {name: value for name, value in settings.items() if name not in (*MAY_CHANGE, *may_change)}


LOCK = ".lock"  # in the folder of a run; the operating system releases it when its owner ends, in any way
BEFORE = {LOCK, "inputs.json", "inputs.json.tmp", "config.json.tmp"}  # what is there before a run has its config.json
held: list[FileLock] = []


def own(out: Path) -> None:
    """Reserves a folder for this process (of several, the first) until it ends; if another has it, ends the program."""
    if ranks()[0] > 0:
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
    names, existing = content_of(out), config_of(out)
    if not names - BEFORE:
        return False
    if existing is None:
        if LOCK not in names or parsed(out / "config.json") is not None:
            fail(f"--out {out}: holds something that is not a run of this program; name another folder")
        if not args.overwrite:
            fail(f"--out {out}: holds a run whose config.json is cut; --overwrite starts again")
        existing = {"settings": {}}
    own(out)
    earlier, now = existing["settings"], identity(args, *may_change)
    script = existing.get("script", script_name())
    if script != script_name():  # such as the training run that holds the model to evaluate
        fail(f"--out {out}: holds a run of {script}; name another folder")
    if args.overwrite:
        spare_inputs(args)
        return False
    if not args.resume:
        fail(f"--out {out}: holds a run already; add --resume to continue it or --overwrite to discard it")
    if parsed(out / "inputs.json") is None:
        fail(f"--out {out}: what the run there read is not recorded; --overwrite starts again")
    changed = [k for k in now if now[k] != earlier.get(k)]
    if changed:
        differences = ", ".join(f"--{k.replace('_', '-')} {earlier.get(k)} (now {now[k]})" for k in changed)
        fail(f"--out {out}: the run there has other settings: {differences}")
    return True


def content_of(out: Path) -> set[str]:
    """What a folder holds, nothing if there is none yet. Ends the program if it could not be made."""
    try:
        if out.is_dir():
            return {path.name for path in out.iterdir()}
        nearest = next(folder for folder in out.absolute().parents if folder.exists() or folder.is_symlink())
        if out.exists() or out.is_symlink() or not (nearest.is_dir() and os.access(nearest, os.W_OK)):
            fail(f"--out {out}: is no folder, and none can be made there")
    except OSError as error:
        fail(f"--out {str(out)[:200]}: cannot be made: {first_line(error)}")
    return set()


def spare_inputs(args: argparse.Namespace) -> None:
    """Ends the program if --overwrite would delete what another flag names, also behind links."""
    for flag, value in vars(args).items():
        for name in str(value).split(",") if flag != "out" and isinstance(value, (str, Path)) else []:
            for file in [Path(name), *Path(name).glob("*")] if name and os.path.exists(name) else []:
                if any(Path(at(file)).is_relative_to(at(args.out)) for at in (os.path.abspath, os.path.realpath)):
                    flag = flag.removesuffix("_file").replace("_", "-")
                    fail(f"--out {args.out}: --overwrite would delete what --{flag} {name} names; take another folder")


def open_run(args: argparse.Namespace, inputs: dict[str, dict], *may_change: str, may_grow: bool = True) -> Path:
    """Creates the folder of a run with these `inputs` and its `config.json`, or makes the one there ready to be
    continued, if its inputs are the same. `may_change` as in `check_out`.

    `inputs`: {what they are: {name: digest}}. With `may_grow` there may be more of a kind than there were; with --limit
    among what may change also fewer. A run of which inputs.json is missing is one that was being overwritten."""
    out = args.out
    if check_out(args, *may_change):
        repair(out)
        recorded: dict[str, dict] = parsed(out / "inputs.json")
        for kind, now in inputs.items():
            before = recorded.get(kind, now)
            names = dict.fromkeys([*now, *before] if "limit" not in may_change else now)
            other = [n for n in names if before.get(n) != now.get(n) and (n in before or not may_grow)]
            if other:
                fail(f"--out {out}: the run there has other {kind} ({len(other)} of {len(before)}, such as {other[0]})")
        merged = {kind: {**recorded.get(kind, {}), **inputs.get(kind, {})} for kind in {**recorded, **inputs}}
        if merged != recorded:
            write_json(out / "inputs.json", merged)
        return out
    with writing(out, "nothing was begun"):
        out.mkdir(parents=True, exist_ok=True)
        own(out)
        remove(out / "inputs.json")
        for path in out.iterdir():  # of the run to overwrite
            if path.name not in (LOCK, "config.json"):
                remove(path)
    write_json(out / "inputs.json", inputs)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    about = {"script": script_name(), "id": uuid.uuid4().hex[:8], "command": sys.argv, "versions": versions()}
    write_json(out / "config.json", {"settings": identity(args), **about, "device": device})
    return out


def open_run_once(args, inputs: dict[str, dict]) -> Path:
    """`open_run` of a training by one process, once all have looked at the folder. Its problems are drawn from all of
    them, so none may be added."""
    wait_for_ranks()
    if ranks()[0] == 0:
        open_run(args, inputs, may_grow=False)
    wait_for_ranks()
    return args.out


def weights_digest(model: str) -> str:
    """Of the files that decide what a model writes; of one of the Hub the commit."""
    folder = Path(resolve_model(model))
    if not folder.is_dir():
        cached = try_to_load_from_cache(model, "config.json")
        return Path(cached).parent.name if isinstance(cached, str) else ""
    patterns = ("*.safetensors", "*.bin", "config.json", "generation_config.json", "tokenizer.json")
    return digest(*sorted(path for pattern in patterns for path in folder.glob(pattern)))


def load_records(file: Path) -> list[dict]:
    """The traces of a records.jsonl, each (step, problem, sample) once; a line that a crash cut is dropped."""
    rows = parse_lines(file, whole_lines(file))
    if not all({"id", "sample"} <= row.keys() for row in rows):
        fail(f"{file}: a line is not the record of a trace; those of early versions cannot be read any more")
    return list({(r.get("step"), r["id"], r["sample"]): r for r in rows}.values())


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
    began, before, done = time.time(), sampler.sampled_tokens, 0
    for batch, first in batches:
        yield batch, first
        done += len(batch)
        seconds = time.time() - began
        rate = (sampler.sampled_tokens - before) / max(seconds, 1e-9)
        left = duration(seconds * (len(todo) - done) / done)
        told = f"{len(problems) - len(todo) + done} of {plural(len(problems), 'problem')}"
        tell(f"{told}  {rate:,.0f} tokens/s  {left} left")


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the commit of this checkout where git knows it."""
    installed = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    installed["transformers"] = importlib.metadata.version("transformers")
    describe = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.check_output(describe, cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
        installed["commit"] = commit.strip()
    return installed


def metrics_reporter(args: argparse.Namespace, run: Path) -> Callable[[dict], object]:
    """A function that sends a step's metrics to --report-to, from the first process and each step once: the last one
    sent is in `reported`. `metrics.jsonl` and a picture are written in any case, so a service that fails costs a
    warning."""
    if getattr(args, "report_to", None) is None or ranks()[0] > 0:
        return lambda metrics: None
    reported = run / "reported"

    def warned(call: Callable, *values):
        try:
            return call(*values)
        except Exception as error:
            say_once(f"warning: --report-to {args.report_to}: {first_line(error)}; {run / 'metrics.jsonl'} has it all")

    def send(metrics: dict) -> None:
        if metrics["step"] > (parsed(reported) or 0):
            log(metrics)
            write_json(reported, metrics["step"])

    log: Any = warned(open_service, args, run, parsed(reported) or 0)
    return lambda metrics: log and warned(send, metrics)


def open_service(args: argparse.Namespace, run: Path, last: int) -> Callable[[dict], object]:
    """What logs metrics with tensorboard, wandb or trackio; a run that is resumed after a `last` step is one run there,
    too."""
    if args.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(
            run / "tensorboard", purge_step=last + 1
        )  # that step may be there, but not in `reported`

        def log(metrics: dict) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, metrics["step"])
            writer.flush()

        return log
    service = importlib.import_module(args.report_to)  # the two others have the same two calls
    more = {"id": (config_of(run) or {}).get("id")} if args.report_to == "wandb" else {}
    config = {name: str(value) for name, value in vars(args).items()}
    service.init(project="mrt", name=run.name, config=config, resume="allow", **more)
    return lambda metrics: service.log(metrics, step=metrics["step"])
