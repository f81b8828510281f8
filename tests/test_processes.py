"""Several processes train as one does; what interrupts a training leaves it whole."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    PATIENCE,
    ROOT,
    assert_same_content,
    assert_same_weights,
    ended,
    jsonl,
    main_with,
    refusal,
    run_here,
    same_content,
    succeeded,
    wait_until,
)

import rl_mrt
from engine.processes import LAUNCHED
from run import training

# Five problems a step: two and three processes have uneven shares, and batches of different numbers and sizes.
FLAGS = "--bonus 1 --variant online --progress likelihood --problems-per-step 5 --group-size 4 --max-tokens 96 "
FLAGS += "--steps 3 --eval-every 3 --eval-problems 7 --max-tokens-per-batch 700 --updates-per-batch 2 --stop-credit 20"
TRAINING = f"rl_mrt.py {FLAGS} --out run"


def launch(start, folder: Path, count: int, command: str) -> list:
    """So many processes of a run, as torchrun starts them, but forked from one that has imported the libraries."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [dict(zip(LAUNCHED, (str(r), str(count), str(r), "localhost", str(port)))) for r in range(count)]
    return [start(folder, command, **environment) for environment in ranks]


def all_succeeded(processes: list, folder: Path) -> str:
    """What the first of them printed; the others, nothing."""
    first, *others = [ended(process, folder) for process in processes]
    assert [done.returncode for done in others] == [0] * len(others), first.stderr
    assert all(not (folder / f"stdout{number}.txt").read_text() for number in range(1, len(processes)))
    return succeeded(first)


def processor_seconds(process) -> float:
    ticks = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def curve(run: Path) -> list[list[float]]:
    names = ("loss", "grad_norm", "entropy", "clip_share", "reward", "progress_per_episode", "sampled_tokens")
    return [[line[name] for name in names] for line in jsonl(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, execute):
    folder = tmp_path_factory.mktemp("alone")
    succeeded(execute(folder, TRAINING))
    return folder / "run"


def assert_same(run: Path, alone: Path) -> None:
    same_content(curve(run), curve(alone), 1e-5, "metrics")
    assert_same_content(run, alone, files=("records.jsonl", "validation.jsonl"))
    assert_same_weights(run / "model", alone / "model", 2e-4)


WRAPPED = f"""
import atexit, runpy, sys
from pathlib import Path
def tell():  # registered first, it runs last
    names = {{task.joinpath('comm').read_text().strip() for task in Path('/proc/self/task').iterdir()}}
    sys.stderr.write(f'at the end: {{sorted(names)}}\\n')
atexit.register(tell)
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / "rl_mrt.py")!r}, run_name='__main__')
"""


def test_torchrun_trains_as_one_process_and_no_thread_of_the_group_outlives_the_run(tmp_path, alone):
    """One that does may ask for the interpreter's lock after its end, and abort a run that is complete."""
    (tmp_path / "wrapped.py").write_text(WRAPPED)
    words = f"-m torch.distributed.run --standalone --nproc-per-node=2 wrapped.py {FLAGS} --out run".split()
    with (tmp_path / "out.txt").open("w") as out:
        command, environment = [sys.executable, *words], {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=out, stderr=out, timeout=PATIENCE)
    printed = (tmp_path / "out.txt").read_text()
    assert done.returncode == 0, printed[-9000:]
    assert printed.count("step    1 ") == 1  # one process speaks
    if Path("/proc/self/task").exists():  # lists threads as Linux does
        assert printed.count("at the end: ") == 2 and "gloo" not in printed
    assert "Warning: `torch" not in printed
    assert_same(tmp_path / "run", alone)
    assert json.loads((tmp_path / "run/model/config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]


@pytest.fixture(scope="module")
def broken(tmp_path_factory, start):
    """A training of two processes that ended because the second was killed, after a checkpoint."""
    folder = tmp_path_factory.mktemp("broken")
    first, second = launch(start, folder, 2, f"{TRAINING} --checkpoint-every 1")
    wait_until((folder / "run/checkpoints/step_000001").exists, first, second)
    second.kill()
    assert ended(first, folder).returncode != 0  # it does not wait for one that never comes
    return folder / "run"


@pytest.mark.parametrize("count", [1, 3])
def test_a_checkpoint_of_two_processes_goes_on_in_one_and_in_three(tmp_path, start, broken, alone, count):
    shutil.copytree(broken, tmp_path / "run")
    printed = all_succeeded(launch(start, tmp_path, count, f"{TRAINING} --resume"), tmp_path)
    assert "resumed from" in printed
    assert_same(tmp_path / "run", alone)


def test_a_signal_in_a_long_sampling_leaves_a_checkpoint_at_once(tmp_path, start):
    """Not after the step: torchrun kills 30 seconds after SIGTERM."""
    long = "--problems-per-step 64 --group-size 16 --max-tokens 384 --eval-every 0"
    processes, printed = launch(start, tmp_path, 2, f"{TRAINING} {long}"), tmp_path / "stdout.txt"
    wait_until(lambda: printed.exists() and "rollouts a step" in printed.read_text(), *processes)
    begun = [processor_seconds(process) for process in processes]
    wait_until(lambda: all(processor_seconds(p) > b + 0.5 for p, b in zip(processes, begun)), *processes)
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)
    assert [ended(process, tmp_path).returncode for process in processes] == [128 + signal.SIGTERM] * 2
    assert "stopped after step 0, with a checkpoint; --resume goes on" in printed.read_text()
    assert [f.name for f in (tmp_path / "run/checkpoints").iterdir()] == ["step_000000"]


def test_two_processes_fine_tune_as_one(tmp_path, start):
    command = "star_mrt.py --limit 7 --num-samples 2 --max-tokens 160 --forced-answers 2 --batch-problems 4 "
    command += "--batch-size 3 --filter mrt --iterations 2 --eval-problems 2 --budgets 160 --lr 1e-4 --out run"
    folders = tmp_path / "one", tmp_path / "two"
    for count, folder in enumerate(folders, 1):
        folder.mkdir()
        all_succeeded(launch(start, folder, count, command), folder)
    files = ("samples_1.jsonl", "mrt/selected_1.jsonl", "base.jsonl")
    assert_same_content(folders[1] / "run", folders[0] / "run", files=files)
    for iteration in (1, 2):
        curves = [[line["loss"] for line in jsonl(f / f"run/mrt/tuning_{iteration}/metrics.jsonl")] for f in folders]
        assert len(curves[0]) > 3
        same_content(curves[1], curves[0], 1e-4, f"losses of iteration {iteration}")
    assert (folders[1] / "run/star.png").exists()


def test_fewer_problems_than_processes_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(rl_mrt, "start_processes", lambda: (0, 2))
    assert "--problems-per-step" in refusal(capsys, main_with(monkeypatch, rl_mrt, "--problems-per-step", "1"))


# ---------------------------------------------------------------------------------------------- interruptions


def test_a_full_disk_is_one_line_and_the_last_checkpoint_survives(tmp_path, model, tokenizer, capsys):
    """A limit on the size of files stands in for the disk: what writes the weights fails with an error of its own."""
    optimizer = torch.optim.AdamW(model.parameters())
    training.save_checkpoint(tmp_path, model, tokenizer, optimizer, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        message = refusal(capsys, training.save_checkpoint, tmp_path, model, tokenizer, optimizer, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "step_000002" in message and "step_000001" in message
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    assert training.load_checkpoint(tmp_path / "checkpoints/step_000001", model, optimizer) == {"step": 1}


# ---------------------------------------------------------------------------------------------- plan, reports


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    printed = run_here(tmp_path, f"{TRAINING} --dry-run")
    assert "0.6M parameters, 1 process" in printed and "3 steps of 5 × 4 = 20 rollouts" in printed
    assert "GiB" in printed and not (tmp_path / "run").exists()


def test_a_missing_reporter_is_told_at_once(capsys, monkeypatch):
    monkeypatch.setattr(rl_mrt.importlib.util, "find_spec", lambda name: None)
    assert "--report-to wandb" in refusal(capsys, rl_mrt.flags, ["--report-to", "wandb"])


def test_importance_weights_are_one_for_the_same_policy(alone):
    for line in jsonl(alone / "metrics.jsonl"):
        assert line["importance_weight"] == pytest.approx(1, abs=1e-5)
