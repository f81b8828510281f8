"""Several processes train as one does; what interrupts a training leaves it whole."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    PATIENCE,
    ROOT,
    assert_same_bits,
    assert_same_content,
    assert_same_weights,
    jsonl,
    refusal,
    same_content,
    succeeded,
)

import rl_mrt
from run import training

# Five problems a step: two and three processes have uneven shares, and batches of different numbers and sizes.
FLAGS = (
    "--bonus 1 --variant online --progress likelihood --problems-per-step 5 --group-size 4 --max-tokens 96 --steps 3"
)
FLAGS += " --eval-every 3 --eval-problems 7 --max-tokens-per-batch 700"
FLAGS += " --updates-per-batch 2 --stop-credit 20"


def torchrun(folder: Path, count: int, *flags, script: str = "rl_mrt.py", launch: str = "") -> subprocess.Popen:
    command = [
        sys.executable,
        *f"-m torch.distributed.run --standalone --nproc-per-node={count} {launch}".split(),
        ROOT / script,
        *(FLAGS.split() if script == "rl_mrt.py" else ()),
        *flags,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = (folder / "out.txt").open("w")
    return subprocess.Popen([*map(str, command)], cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, folder: Path) -> str:
    assert process.wait(timeout=PATIENCE) == 0, (folder / "out.txt").read_text()[-9000:]
    return (folder / "out.txt").read_text()


def curve(run: Path) -> list[list[float]]:
    names = ("loss", "grad_norm", "entropy", "clip_share", "reward", "progress_per_episode", "sampled_tokens")
    return [[line[name] for name in names] for line in jsonl(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, execute):
    folder = tmp_path_factory.mktemp("alone")
    succeeded(execute(folder, "rl_mrt.py", *FLAGS.split(), "--out", "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    printed = finish(torchrun(folder, 2, "--out", "run"), folder)
    assert printed.count("step    1 ") == 1  # one process speaks
    return folder / "run"


def assert_same(run: Path, alone: Path) -> None:
    same_content(curve(run), curve(alone), 1e-5, "metrics")
    assert_same_content(run, alone, files=("records.jsonl", "validation.jsonl"))
    assert_same_weights(run / "model", alone / "model", 2e-4)


def test_two_processes_train_as_one(of_two, alone):
    assert_same(of_two, alone)
    config = json.loads((of_two / "model/config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A training of two processes that SIGTERM stopped, with a checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    process = torchrun(folder, 2, "--out", "run")
    while not (folder / "run/metrics.jsonl").exists():
        assert process.poll() is None, (folder / "out.txt").read_text()
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=PATIENCE) != 0
    return folder / "run"


def test_a_signal_in_a_long_sampling_leaves_a_checkpoint_at_once(tmp_path):
    """torchrun kills 30 seconds after SIGTERM; SIGUSR1 it has to be told to pass on."""
    long = "--problems-per-step 64 --group-size 16 --max-tokens 384 --eval-every 0 --out run".split()
    process = torchrun(tmp_path, 2, *long, launch="--signals-to-handle SIGTERM,SIGUSR1")
    while "rollouts a step" not in (tmp_path / "out.txt").read_text():
        assert process.poll() is None, (tmp_path / "out.txt").read_text()
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=PATIENCE) != 0
    assert "stopped after step 0, with a checkpoint; --resume goes on" in (tmp_path / "out.txt").read_text()
    assert [f.name for f in (tmp_path / "run/checkpoints").iterdir()] == ["step_000000"]


@pytest.mark.parametrize("count", [1, 3])
def test_a_checkpoint_of_two_processes_goes_on_in_one_and_in_three(tmp_path, execute, stopped, alone, count):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    if count == 1:
        printed = succeeded(execute(tmp_path, "rl_mrt.py", *FLAGS.split(), "--out", "run", "--resume"))
    else:
        printed = finish(torchrun(tmp_path, count, "--out", "run", "--resume"), tmp_path)
    assert "resumed from" in printed
    assert_same(run, alone)


def test_two_processes_fine_tune_as_one(tmp_path, execute):
    flags = "--limit 7 --num-samples 2 --max-tokens 160 --forced-answers 4 --batch-problems 4 --batch-size 3 --epochs 2"
    flags = [*flags.split(), *"--filter mrt --iterations 2 --eval-problems 3 --budgets 160 --lr 1e-4 --out run".split()]
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        folder.mkdir()
    succeeded(execute(folders[0], "star_mrt.py", *flags))
    finish(torchrun(folders[1], 2, *flags, script="star_mrt.py"), folders[1])
    files = ("samples_1.jsonl", "mrt/selected_1.jsonl", "base.jsonl")
    assert_same_content(folders[1] / "run", folders[0] / "run", files=files)
    for iteration in (1, 2):
        curves = [[line["loss"] for line in jsonl(f / f"run/mrt/tuning_{iteration}/metrics.jsonl")] for f in folders]
        assert len(curves[0]) > 3
        same_content(curves[1], curves[0], 1e-4, f"losses of iteration {iteration}")
    assert (folders[1] / "run/star.png").exists()


def test_a_process_that_dies_brings_the_others_down(tmp_path):
    process = torchrun(tmp_path, 2, "--out", "run", "--steps", "500")
    deadline = time.time() + PATIENCE
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait(timeout=PATIENCE) != 0
    assert "SIGKILL" in (tmp_path / "out.txt").read_text() or "-9" in (tmp_path / "out.txt").read_text()
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_fewer_problems_than_processes_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rl_mrt.py", "--problems-per-step", "1"])
    monkeypatch.setattr(rl_mrt, "start_processes", lambda: (0, 2))
    assert "--problems-per-step" in refusal(capsys, rl_mrt.main)


# ---------------------------------------------------------------------------------------------- interruptions


def test_sigterm_writes_a_checkpoint_from_which_the_run_goes_on(tmp_path, start, execute, alone):
    flags = [*FLAGS.split(), "--checkpoint-every", 100, "--out", "run"]
    process = start(tmp_path, "rl_mrt.py", *flags)
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(PATIENCE)
    assert process.exitcode == 143 and "stopped after step" in (tmp_path / "stdout.txt").read_text()
    assert "Traceback" not in (tmp_path / "stderr.txt").read_text()
    assert len(list((tmp_path / "run/checkpoints").glob("step_??????"))) == 1
    succeeded(execute(tmp_path, "rl_mrt.py", *flags, "--resume"))
    assert_same_bits(tmp_path / "run", alone, ("records.jsonl", "model/model.safetensors"))


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


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, execute):
    printed = succeeded(execute(tmp_path, "rl_mrt.py", *FLAGS.split(), "--dry-run", "--out", "run"))
    assert "0.6M parameters, 1 process" in printed and "3 steps of 5 × 4 = 20 rollouts" in printed
    assert "GiB" in printed and not (tmp_path / "run").exists()


def test_a_missing_reporter_is_told_at_once(capsys, monkeypatch):
    monkeypatch.setattr(rl_mrt.importlib.util, "find_spec", lambda name: None)
    assert "--report-to wandb" in refusal(capsys, rl_mrt.flags, ["--report-to", "wandb"])
    assert "--report-to" in refusal(capsys, rl_mrt.flags, ["--report-to", "paper"])


def test_importance_weights_are_one_for_the_same_policy_and_capped(model, tokenizer, alone):
    lines = jsonl(alone / "metrics.jsonl")
    assert all(line["importance_weight"] == pytest.approx(1, abs=1e-5) for line in lines)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists threads as Linux does")
def test_no_thread_of_the_process_group_outlives_the_run(tmp_path):
    """One that does may ask for the interpreter's lock after its end, and abort a run that is complete."""
    (tmp_path / "wrapped.py").write_text(
        "import atexit, runpy, sys\n"
        "from pathlib import Path\n"
        "def tell():  # registered first, it runs last\n"
        "    names = {task.joinpath('comm').read_text().strip() for task in Path('/proc/self/task').iterdir()}\n"
        "    sys.stderr.write(f'at the end: {sorted(names)}\\n')\n"
        "atexit.register(tell)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(ROOT / 'rl_mrt.py')!r}, run_name='__main__')\n"
    )
    flags = (*FLAGS.split(), "--steps", "1", "--eval-every", "0", "--out", "run")
    printed = finish(torchrun(tmp_path, 2, *flags, script=str(tmp_path / "wrapped.py")), tmp_path)
    assert printed.count("at the end: ") == 2 and "gloo" not in printed and "Warning: `torch" not in printed
