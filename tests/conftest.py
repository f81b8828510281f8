"""Shared pieces of the tests: the embedded model, loaded once; what is promised of two runs; real data, where at hand.

The promise. On one machine, with one engine and one number of processes, a run is the same bits each time, also when it
was interrupted and resumed: `assert_same_bits`. With another number of processes, on another machine or with another
number of threads, everything discrete is the same (token ids, texts, boundaries, outcomes, choices), and every real
number within `TOLERANCE`: `assert_same_content`.
"""

import argparse
import contextlib
import errno
import importlib
import io
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and so it would be in the runs started here
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

from engine import models  # noqa: E402
from engine.sampler import Sampler  # noqa: E402
from engine.tokens import prompt_ids  # noqa: E402
from engine.transformers_engine import TransformersEngine  # noqa: E402
from run import data  # noqa: E402
from run.files import end_in_one_line  # noqa: E402
from run.folder import held, open_run  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"  # real benchmarks, where they are at hand; tests that want them skip without
TOLERANCE = 1e-4  # of a log-prob, a J, a loss of the embedded model in float32
TIMING = ("seconds", "sampling_seconds", "update_seconds")  # the clock is promised by nobody


def run_settings(out: Path, resume=False, overwrite=False, **settings) -> argparse.Namespace:
    """Settings of a run in a folder, as a script's flags are parsed."""
    every = {"model": "tiny", "tokenizer": None, "engine": "transformers", **settings}
    return argparse.Namespace(out=out, resume=resume, overwrite=overwrite, **every)


# ------------------------------------------------------------------------------------------------ what two runs share


def jsonl(file: Path) -> list[dict]:
    """The rows of a complete JSON-lines file. Only "\\n" ends a line: texts of a model hold the rarer line ends."""
    text = file.read_text(encoding="utf-8")
    assert text.endswith("\n"), f"{file} ends within a line"
    return [json.loads(line) for line in text[:-1].split("\n")]


def same_content(ours, theirs, tolerance: float = TOLERANCE, where: str = "") -> None:
    """Two JSON values: numbers with a point within the tolerance, everything else exactly; `TIMING` is left out."""
    assert type(ours) is type(theirs), f"{where}: {ours!r} and {theirs!r}"
    if isinstance(ours, dict):
        ours, theirs = ({k: v for k, v in of.items() if k not in TIMING} for of in (ours, theirs))
        assert list(ours) == list(theirs), f"{where}: fields {list(ours)} and {list(theirs)}"
        for name in ours:
            same_content(ours[name], theirs[name], tolerance, f"{where}.{name}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), f"{where}: {len(ours)} and {len(theirs)} items"
        for number, (a, b) in enumerate(zip(ours, theirs)):
            same_content(a, b, tolerance, f"{where}[{number}]")
    elif isinstance(ours, float):
        near = math.isclose(ours, theirs, rel_tol=tolerance, abs_tol=tolerance)
        assert near or (math.isnan(ours) and math.isnan(theirs)), f"{where}: {ours} and {theirs}"
    else:
        assert ours == theirs, f"{where}: {ours!r} and {theirs!r}"


def read_file(file: Path):
    return jsonl(file) if file.suffix == ".jsonl" else json.loads(file.read_text(encoding="utf-8"))


def assert_same_content(run: Path, other: Path, tolerance: float = TOLERANCE, files=("records.jsonl",)) -> None:
    """JSON files of two runs on different machines, with different numbers of processes or batches."""
    for name in files:
        same_content(read_file(run / name), read_file(other / name), tolerance, name)


def assert_same_bits(run: Path, other: Path, files=("records.jsonl",)) -> None:
    """Files of two runs on one machine, with one number of processes and one engine; but for `TIMING`."""
    for name in files:
        if name.endswith("metrics.jsonl") or name == "summary.json":
            same_content(read_file(run / name), read_file(other / name), 0.0, name)
        else:
            assert (run / name).read_bytes() == (other / name).read_bytes(), name


def assert_same_weights(run: Path, other: Path, tolerance: float) -> None:
    """Models in Hugging Face format."""
    ours, theirs = (models.load_model(str(folder), "cpu").state_dict() for folder in (run, other))
    assert list(ours) == list(theirs)
    for name, weights in ours.items():
        torch.testing.assert_close(weights, theirs[name], atol=tolerance, rtol=0)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_rows(path: Path, *rows) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def a_run(folder: Path, script: str | None = None, **settings) -> Path:
    """A folder as a run leaves it, with something to lose; `script` if not this process's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script or sys.argv[0]])
        open_run(run_settings(folder, **settings), {})
    held.pop().release()  # that run has ended
    write(folder / "metrics.jsonl", '{"step": 1}\n')
    return folder


def main_with(monkeypatch, script, *argv):
    """The script's main() as a call without arguments."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
    return script.main


def run_here(folder: Path, command: str, *flags) -> str:
    """What `python command flags` prints in a folder. It runs in this process: a new one imports for seconds."""
    script, *words = command.split()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(ROOT / script), *words, *map(str, flags)])
        try:
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()
        finally:
            while held:
                held.pop().release()
    return printed.getvalue()


def refusal(capsys, call, *args, **kwargs) -> str:
    """What a user reads of a call that must be refused, as a script would end: one line on stderr, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        end_in_one_line(lambda: call(*args, **kwargs))
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1 and len(line) > 8, line
    return line.rstrip("\n")


# ------------------------------------------------------------------------------------------------ the embedded model


def copy_of_tiny(folder: Path, *without: str) -> Path:
    """The embedded model in a folder of its own, which may be written to where the checkout may not."""
    folder.mkdir(exist_ok=True)
    for file in (ROOT / "tiny").iterdir():
        if file.is_file() and file.name not in without:
            shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return models.load_tokenizer("tiny")


@pytest.fixture(scope="session")
def model():
    """The embedded model in float32. Tests that train copy it."""
    torch.manual_seed(0)
    return models.load_model("tiny", "cpu")


@pytest.fixture()
def sampler(model, tokenizer):
    return Sampler(TransformersEngine(model), tokenizer)


class Watched(Sampler):
    """The real sampler, which keeps what it was asked and what it gave: (prompts, rows, where to stop) of each call."""

    def __init__(self, model, tokenizer):
        super().__init__(TransformersEngine(model), tokenizer)
        self.calls = []

    def generate(self, prompts, *args, stop=(), **more):
        rows = super().generate(prompts, *args, stop=stop, **more)
        self.calls.append((prompts, rows, list(stop)))
        return rows


@pytest.fixture(scope="session")
def problems():
    return data.load_problems("tiny", "validation", 12)


@pytest.fixture(scope="session")
def prompts(tokenizer, problems):
    return [prompt_ids(tokenizer, p["problem"]) for p in problems]


def keys(prompts) -> list[tuple[int, int]]:
    """A seed for each prompt."""
    return [(0, i) for i in range(len(prompts))]


# ------------------------------------------------------------------------------------------------ real processes

SCRIPTS = ("rl_mrt", "evaluate", "analyze_r1", "budget_force", "star_mrt")
PATIENCE = 1800  # seconds that a process of some seconds may take on a busy machine


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def inject(kind: str, number: int, folder: Path) -> None:
    """Of what this process does to names and files in a folder (opening to write, syncing, renaming, removing, cutting,
    making a folder) the `number`-th is where it is killed (kind "kill"), fails as on a full disk ("fail") or is asked
    to end (the name of a signal). How many there were so far is in faults.txt beside the folder."""
    count, fsync = 0, os.fsync

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        changes = event in ("os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir", "os.fsync")
        changes = changes or (event == "open" and isinstance(args[1], str) and bool(set(args[1]) & set("wax+")))
        if not changes or not isinstance(args[0], (str, Path)):
            return
        if folder in Path(os.path.abspath(args[0])).parents:
            count += 1
            (folder.parent / "faults.txt").write_text(str(count))
            if count == number and kind == "fail":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.Signals[kind])

    def synced(file: int) -> None:
        hook("os.fsync", (os.readlink(f"/proc/self/fd/{file}"),))
        fsync(file)

    sys.addaudithook(hook)
    os.fsync = synced


def child(command: list[str], folder: Path, fault: tuple | None, env: dict[str, str]) -> None:
    """In the forked process: what `python SCRIPT.py …` does, or `python -m MODULE …`, with its output in files."""
    os.chdir(folder)
    os.environ |= env
    if fault:
        inject(*fault, folder / "run")
    rank = env.get("RANK", "0").strip("0")  # of several processes in a folder all but the first have a number
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{name}{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = command
    if command[0].endswith(".py"):
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    else:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)


@pytest.fixture(scope="session")
def start():
    """start(folder, command, *flags, fault=…, **environment) → a running process, forked from one that has imported the
    libraries. `command`: a script or a module, and flags."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*SCRIPTS, "tiny.build", "datasets", "matplotlib.pyplot", "conftest"])
    with pytest.MonkeyPatch.context() as patch:  # the server keeps the environment that it starts in
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()

    def start_one(folder: Path, command: str, *flags, fault=None, **env):
        words = [*command.split(), *map(str, flags)]
        process = context.Process(target=child, args=(words, folder, fault, env))
        process.start()
        return process

    return start_one


def ended(process, folder: Path) -> Done:
    """A started process, once it has ended."""
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        pytest.fail(f"a process in {folder} took longer than {PATIENCE} s")
    printed = [(folder / name).read_text(encoding="utf-8") for name in ("stdout.txt", "stderr.txt")]
    return Done(process.exitcode, *printed)


@pytest.fixture(scope="session")
def execute(start):
    """execute(folder, command, *flags, fault=…) → Done, when the process has ended."""
    return lambda folder, command, *flags, fault=None: ended(start(folder, command, *flags, fault=fault), folder)


def wait_until(there, *processes) -> None:
    """Until there() is true, while the processes run."""
    deadline = time.time() + PATIENCE
    while not there():
        assert all(process.is_alive() for process in processes) and time.time() < deadline, "it never came to that"
        time.sleep(0.005)


def succeeded(done) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_at_line(process, file: Path, count: int) -> None:
    """SIGKILL as soon as the file has so many lines: those of a whole batch, since a write may be cut within one."""
    wait_until(lambda: file.exists() and file.read_bytes().count(b"\n") >= count, process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


# ------------------------------------------------------------------------------------------------ what tests say


def pytest_terminal_summary(terminalreporter) -> None:
    """With -v: the lines that tests have given `record_property("page", line)`, below their names."""
    for state in ("passed", "failed", "skipped"):
        for test in terminalreporter.stats.get(state, []) if terminalreporter.verbosity > 0 else []:
            lines = [f"- {line}" for name, line in test.user_properties if name == "page"]
            if lines:
                title = test.nodeid.split("::")[-1].replace("_", " ")
                terminalreporter.write_line("\n".join([f"\n## {title}: {state}, {test.duration:.0f} s\n", *lines]))
