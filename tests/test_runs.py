"""A run and what surrounds it: what it reads, who it is, what asks it to end, disks that fail at any write."""

import contextlib
import json
import os
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
    SCRIPTS,
    assert_same_bits,
    ended,
    jsonl,
    refusal,
    run_here,
    run_settings,
    succeeded,
    wait_until,
    write_rows,
)
from huggingface_hub import constants
from urllib3.exceptions import HTTPError

import engine
import rl_mrt
from engine import models
from engine.processes import LAUNCHED, ranks
from engine.served_engine import Served, ServedEngine, ask, connect
from run import data, training
from run.files import append_jsonl, on_stop, read_jsonl, remove, repair, whole_lines, write_text
from run.folder import held, metrics_reporter, open_run, weights_digest
from run.traces import problem_digests

# ------------------------------------------------------------------------------------------------ faults at any place

SAMPLED = "--max-tokens 64 --limit 4 --num-samples 2 --forced-answers 2 --batch-problems 2"
RUNS = {
    "rl_mrt": "--bonus 1 --progress sampled --forced-answers 2 --problems-per-step 2 --group-size 2 --max-tokens 48 "
    "--steps 5 --checkpoint-every 2 --eval-every 3 --eval-problems 2",
    "evaluate": SAMPLED,
    "analyze_r1": f"{SAMPLED} --direct-model tiny --direct-samples 2",
    "budget_force": f"{SAMPLED} --budgets 32,64 --extensions 2 --extension-tokens 8",
    "star_mrt": f"{SAMPLED} --filter outcome --iterations 1 --epochs 1 --batch-size 2 --eval-problems 2",
}
FILES = {
    "rl_mrt": "records.jsonl metrics.jsonl validation.jsonl summary.json model/model.safetensors model/config.json",
    "evaluate": "records.jsonl summary.json summary.md",
    "analyze_r1": "records.jsonl direct.jsonl summary.json summary.md",
    "budget_force": "records.jsonl summary.json summary.md",
    "star_mrt": "samples_1.jsonl base.jsonl summary.json summary.md outcome/model_1/model.safetensors",
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, execute):
    """{script: (folder of a run that nothing disturbed, how many faults it had room for)}, made when asked for."""
    made = {}

    def of(script: str):
        if script not in made:
            folder = tmp_path_factory.mktemp(script)
            succeeded(execute(folder, f"{script}.py {RUNS[script]} --out run", fault=("count", 0)))
            made[script] = folder / "run", int((folder / "faults.txt").read_text())
        return made[script]

    return of


# Each in the run that --resume takes up after the one before, and at a share of what a whole run does to files. The
# first is while the folder is made. All shares are less than 1, so that the last one comes before the end.
FAULTS = [[("kill", 0.02), ("fail", 0.1), ("stop", 0.2), ("kill", 0.2), ("fail", 0.3)]]
SIGNALS = dict(zip(SCRIPTS, ("SIGTERM", "SIGINT", "SIGTERM", "SIGINT", "SIGHUP")))
if os.environ.get("MRT_EVERY_FAULT"):  # hours
    FAULTS = [[(kind, place / 100)] for kind in ("kill", "fail", "stop") for place in range(100)]


def litter(run: Path) -> None:
    """What a crash at the worst moment leaves behind: lines without an end, half-written files and folders."""
    for name in ("metrics.jsonl", "records.jsonl", "validation.jsonl"):
        with (run / name).open("ab") as file:
            file.write('{"step": 1, "text": "7²'.encode()[:-1])  # within a character
    for name in ("checkpoints/step_000002.tmp", "checkpoints/step_000005.tmp", "model.tmp"):
        (run / name).mkdir(parents=True, exist_ok=True)
        (run / name / "model.safetensors").write_bytes(b"half a model")
    (run / "metrics.jsonl.tmp").write_text("half a file")


@pytest.mark.parametrize("faults", FAULTS, ids=str)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_goes_on_from_any_fault_to_the_same_bits(tmp_path, execute, straight, script, faults):
    undisturbed, count = straight(script)
    command, run = f"{script}.py {RUNS[script]} --out run", tmp_path / "run"
    for kind, place in faults:
        kind = SIGNALS[script] if kind == "stop" else kind
        done = execute(tmp_path, command, *["--resume"] * run.exists(), fault=(kind, 1 + int(place * (count - 1))))
        assert "Traceback" not in done.stderr, done.stderr
        if kind == "kill":
            assert done.returncode == -signal.SIGKILL
        elif kind == "fail":
            told = done.stderr.splitlines()[-1] if done.stderr else ""
            assert (done.returncode, told[:7]) == (2, "error: ") or done.returncode == 0, done.stderr
        else:
            assert done.returncode == 128 + signal.Signals[kind]
            left_a_training = done.stdout.endswith(", with a checkpoint; --resume goes on\n") and not done.stderr
            assert left_a_training or (done.stderr.startswith(f"stopped by {kind}") and done.stderr.count("\n") == 1)
            assert left_a_training or script != "rl_mrt"
        if script == "rl_mrt" and (run / "config.json").exists():
            litter(run)
    succeeded(execute(tmp_path, command, "--resume"))
    assert_same_bits(run, undisturbed, FILES[script].split())
    assert [folder.name for folder in run.glob("checkpoints/*")] == ["step_000005"] * (script == "rl_mrt")


@pytest.mark.parametrize("missing", ["", "model", "summary.json"])
def test_resuming_a_finished_training_changes_nothing(tmp_path, straight, missing):
    """Also where it was killed after its last checkpoint and before the model, or the summary, was written."""
    shutil.copytree(straight("rl_mrt")[0], tmp_path / "run")
    if missing:
        remove(tmp_path / "run" / "summary.json")
        remove(tmp_path / "run" / missing)
    run_here(tmp_path, f"rl_mrt.py {RUNS['rl_mrt']} --out run --resume")
    assert_same_bits(tmp_path / "run", straight("rl_mrt")[0], FILES["rl_mrt"].split())


def test_a_signal_before_the_first_step_is_one_line_and_an_exit_code(tmp_path, start):
    """While the model that is there is validated; faults at any place, above, have the others."""
    process = start(tmp_path, f"rl_mrt.py {RUNS['rl_mrt']} --eval-problems 96 --out run")
    wait_until((tmp_path / "run" / "config.json").exists, process)
    os.kill(process.pid, signal.SIGUSR1)
    done = ended(process, tmp_path)
    assert done.returncode == 128 + signal.SIGUSR1
    assert done.stderr.startswith("stopped by SIGUSR1") and done.stderr.count("\n") == 1


def test_ctrl_c_while_the_libraries_are_loaded(tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "evaluate.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    status, deadline = Path(f"/proc/{process.pid}/status"), time.time() + PATIENCE
    while not int(status.read_text().split("SigCgt:")[1].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=PATIENCE)[1] == "stopped by SIGINT; what is recorded is kept, --resume goes on\n"
    assert process.returncode == 130 and not list(tmp_path.iterdir())


def test_a_signal_while_the_other_processes_never_come(tmp_path, start):
    lone = dict(zip(LAUNCHED, ("0", "2", "0", "localhost", "0")))
    process, printed = start(tmp_path, "rl_mrt.py", **lone), tmp_path / "stdout.txt"
    wait_until(lambda: printed.exists() and "waiting for all 2 processes" in printed.read_text(), process)
    os.kill(process.pid, signal.SIGINT)
    done = ended(process, tmp_path)
    assert done.returncode == 128 + signal.SIGINT and done.stderr.count("\n") == 1


def test_ctrl_c_waits_for_no_request():
    def interrupt(*_):
        raise KeyboardInterrupt

    server, began = object.__new__(ServedEngine), time.time()
    server.served = Served("m", "m", concurrency=2)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            server.at_once(time.sleep, [(4,)] * 9)
        assert time.time() - began < 3
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("when", ["before", "inside", "in another process", "in the update", "never"])
def test_a_step_is_left_where_no_weight_changes(tmp_path, monkeypatch, when):
    saved, number = [], signal.SIGHUP
    monkeypatch.setattr(training, "save_checkpoint", lambda run, *_: saved.append(run))
    settings = run_settings(tmp_path, lr=1.0, warmup=0.0, schedule="constant", checkpoint_every=9)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    steps = training.Steps(settings, tmp_path, None, None, optimizer, {}, 3)
    if when == "in another process":
        monkeypatch.setattr(training, "sum_over_ranks", lambda values: [values[0] + 1])
    left, stepped = False, []
    try:
        for step in steps:
            if when == "before":
                os.kill(os.getpid(), number)
            with steps.can_be_left():
                if when == "inside":
                    os.kill(os.getpid(), number)
                    pytest.fail("went on")
            if when == "in the update":
                os.kill(os.getpid(), number)
            steps.count({}, "")
            stepped.append(step)
            steps.checkpoint()
    except SystemExit as stop:
        left = stop.code
    finally:
        on_stop(signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert left == {"never": False, "in another process": 143}.get(when, 128 + number)
    assert stepped == {"never": [0, 1, 2], "in the update": [0]}.get(when, [])
    assert saved == ([] if when == "never" else [tmp_path])


# ------------------------------------------------------------------------------------------------ what a run reads


def opened(run, inputs, *may_change, resume=False, overwrite=False, may_grow=True, **settings) -> None:
    open_run(run_settings(run, resume, overwrite, **settings), inputs, *may_change, may_grow=may_grow)
    while held:
        held.pop().release()


GROWN, OTHER = ("abc", "abcd", "ab limit"), ("abcd training", "ab", "dabc", "acb limit", "abx")


@pytest.mark.parametrize("names", [*GROWN, *OTHER])
def test_what_may_grow_may_grow_at_the_end(capsys, tmp_path, names):
    """Of a training nothing may, since it draws from all of its problems; with --limit there may be fewer."""
    goes_on, (names, *how) = names in GROWN, names.split()
    inputs = [{"problems": {name: f"{place} {name}" for place, name in enumerate(of)}} for of in ("abc", names)]
    opened(tmp_path / "run", inputs[0])
    before = (tmp_path / "run" / "inputs.json").read_bytes()
    again = [tmp_path / "run", inputs[1], *(["limit"] if "limit" in how else [])]
    settings = dict(resume=True, may_grow="training" not in how)
    if goes_on:
        opened(*again, **settings)
        recorded = json.loads((tmp_path / "run" / "inputs.json").read_text())["problems"]
        assert list(recorded) == sorted({*"abc", *names})
    else:
        assert "other problems" in refusal(capsys, opened, *again, **settings)
        assert (tmp_path / "run" / "inputs.json").read_bytes() == before


def test_a_digest_is_of_problem_gold_prompt_and_weights(tmp_path):
    problem = {"id": "a", "problem": "1+1?", "answer": "2"}
    same = problem_digests([problem], [[1, 2]])
    assert problem_digests([dict(problem)], [[1, 2]]) == same
    for change, prompt in ({"answer": "3"}, [1, 2]), ({"problem": "?"}, [1, 2]), ({}, [1]):
        assert problem_digests([{**problem, **change}], [prompt]) != same
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = weights_digest(str(tmp_path))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert weights_digest(str(tmp_path)) != first


@pytest.mark.parametrize(
    "ids, expected",
    [("ab", "a b"), ("aba", "a b a-1"), ("aaa", "a a-1 a-2"), (["a", "a-1", "a"], "a a-1 a-2"), ([None] * 2, "0 1")],
    ids=str,
)
def test_an_id_does_not_depend_on_later_rows(tmp_path, ids, expected):
    rows = [{"problem": f"{n}+1?", "answer": str(n), **({"id": name} if name else {})} for n, name in enumerate(ids)]
    write_rows(tmp_path / "d.jsonl", *rows)
    for limit in range(1, len(rows) + 1):
        found = [p["id"] for p in data.load_problems(str(tmp_path / "d.jsonl"), "train", limit)]
        assert found == expected.split()[:limit]


# ------------------------------------------------------------------------------------------------ nothing is destroyed


@pytest.mark.parametrize(
    "flag, place", [("model", "model"), ("dataset", "d.jsonl"), ("config", "c.yaml"), ("prefixes", "model")]
)
@pytest.mark.parametrize("way", ["plain", "through a link", "with dots", "linked from outside"])
def test_overwrite_spares_what_the_run_reads(capsys, tmp_path, flag, place, way):
    run = tmp_path / "run"
    opened(run, {})
    (run / "model").mkdir()
    for name in ("model/w.safetensors", "d.jsonl", "c.yaml"):
        (run / name).write_text("precious")
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "outside").symlink_to(run / place)
    named = {"plain": run / place, "through a link": tmp_path / "link" / place, "with dots": run / ".." / "run" / place}
    value = named.get(way, tmp_path / "outside")
    assert f"--{flag}" in refusal(capsys, opened, run, {}, overwrite=True, **{flag: str(value)})
    assert (run / "model/w.safetensors").exists() and (run / "d.jsonl").exists() and (run / "inputs.json").exists()


def test_overwrite_takes_links_away_and_nothing_behind_them(tmp_path):
    opened(tmp_path / "run", {})
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "step").write_text("precious")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch")
    (tmp_path / "run" / "model").symlink_to(tmp_path / "gone")
    opened(tmp_path / "run", {}, overwrite=True)
    assert {f.name for f in (tmp_path / "run").iterdir()} <= {".lock", "config.json", "inputs.json"}
    assert (tmp_path / "scratch" / "step").read_text() == "precious"


HALF_MADE = {  # {what is there: files}; only where a config.json was written must it be --overwrite
    "config half written": {".lock": "", "config.json.tmp": "{"},
    "before config": {".lock": "", "inputs.json": "{}"},
    "config cut": {".lock": "", "config.json": '{"settings": {"mo', "inputs.json": "{}"},
    "half overwritten": {".lock": "", "config.json": '{"settings": {}}', "records.jsonl": ""},  # inputs went first
}


@pytest.mark.parametrize("what", HALF_MADE)
@pytest.mark.parametrize("way", ["", "resume", "overwrite"])
def test_a_half_made_folder_can_be_taken_up(capsys, tmp_path, what, way):
    (run := tmp_path / "run").mkdir()
    for name, text in HALF_MADE[what].items():
        (run / name).write_text(text)
    settings = {way: True} if way else {}
    if way == "overwrite" or "config.json" not in HALF_MADE[what]:
        opened(run, {}, **settings)
        assert {f.name for f in run.iterdir()} <= {".lock", "config.json", "inputs.json"}
    else:
        assert "--overwrite" in refusal(capsys, opened, run, {}, **settings)


@pytest.mark.parametrize("out", ["/dev/null/run", "x" * 300, "link", "link/run", "file/run"])
def test_an_out_that_cannot_be_made(capsys, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "further")
    (tmp_path / "file").write_text("notes")
    assert "--out" in refusal(capsys, opened, tmp_path / out if out[0] != "/" else type(tmp_path)(out), {})
    assert {f.name for f in tmp_path.iterdir()} == {"link", "file"}


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    "gradient, rate, weight, says",
    [
        (float("nan"), 0.1, 1.0, "gradient norm is nan"),
        (float("inf"), 0.1, 1.0, "gradient norm is inf"),
        (0.0, 0.1, 1.0, "these settings train nothing"),
        (1.0, 1e-30, 1.0, "the weights did not move"),
        (1.0, 1e38, 3e38, "the weights are not finite after the step"),
        (1.0, 0.1, 1.0, ""),
    ],
)
def test_an_update_that_trains_nothing_or_breaks_the_weights_is_told(gradient, rate, weight, says):
    model = torch.nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.data, parameter.grad = torch.full_like(parameter, -weight), torch.full_like(parameter, gradient)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with pytest.raises(FloatingPointError, match=says) if says else contextlib.nullcontext():
        assert training.optimizer_step(model, optimizer, 0.0) > 0


# ------------------------------------------------------------------------------------------------ progress


def test_long_work_says_what_it_is_at(capsys, monkeypatch):
    for name, value in (("FIRST", 0.1), ("QUIET", 0.3), ("last_told", 0.0)):
        monkeypatch.setattr(engine, name, value)
    said = []
    with engine.telling(lambda: "at work"):
        wait_until(lambda: said.append(capsys.readouterr().out) or "".join(said) == "at work\n" * 2)
        monkeypatch.setattr(engine, "QUIET", 60)
        time.sleep(0.5)
        capsys.readouterr()
        engine.tell("a step")  # it is not quiet for a while
        time.sleep(0.5)
    assert capsys.readouterr().out == "a step\n"


def test_a_hub_out_of_reach_is_told_once_and_not_asked_again(capsys, monkeypatch):
    def nobody():
        raise OSError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models, "get_session", nobody)
    models.reach_hub.cache_clear()
    for _ in range(2):
        assert "--model nobody/nothing" in refusal(capsys, models.load_tokenizer, "nobody/nothing")
    models.reach_hub()
    assert constants.HF_HUB_OFFLINE


def test_a_lost_server_is_told_at_once(capsys):
    address = "http://127.0.0.1:9/v1"
    with pytest.raises(HTTPError):
        ask(connect(), f"{address}/models", tries=2)
    assert "warning: 127.0.0.1:9 is busy or away" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize("field", ["problem", "answer", "id"])
def test_half_a_character_in_a_row_is_told(capsys, tmp_path, field):
    row = {"problem": "1+1?", "answer": "2", "id": "a"}
    rows = row, {**row, field: "2 \ud83d"}
    write_rows(tmp_path / "d.jsonl", *rows)
    assert "row 2: holds half a character" in refusal(capsys, data.load_problems, str(tmp_path / "d.jsonl"), "train")


def test_half_a_character_is_written_and_read_back(tmp_path):
    row = {"text": "² \ud83d"}
    append_jsonl(tmp_path / "r.jsonl", [row])
    assert read_jsonl(tmp_path / "r.jsonl") == [row]
    write_text(tmp_path / "t.md", row["text"])
    assert (tmp_path / "t.md").read_text(encoding="utf-8") == "² \\ud83d"


WHOLE = b'{"a": 1}\n{"a": 2}\n'


@pytest.mark.parametrize("end", [b"", b'{"a": ', b'{"a": \n', b'{"a": "\xc2', b"\n\n", b'{"a"\n\n\0\0', b'"text"\n'])
def test_a_cut_line_is_dropped_wherever_it_stands_at_the_end(tmp_path, end):
    file = tmp_path / "r.jsonl"
    file.write_bytes(WHOLE + end)
    assert whole_lines(file) == WHOLE
    repair(tmp_path)
    assert file.read_bytes() == WHOLE
    file.write_bytes(WHOLE[:-1])  # an editor may take the last newline away
    assert whole_lines(file) == WHOLE


# ------------------------------------------------------------------------------------------------ processes, services


@pytest.mark.parametrize("values", ["", "1", "1 2", "1 2 1", "1 2 1 - 1", "1 2 1 host 1"])
def test_a_rank_is_believed_from_a_launcher_only(monkeypatch, values):
    """Which sets all five; "-" is one that is empty."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in zip(LAUNCHED, values.split()):
        monkeypatch.setenv(name, value.strip("-"))
    assert ranks() == ((1, 2) if "host" in values else (0, 1))


def launched(monkeypatch, rank: int, world: int) -> None:
    for name, value in zip(LAUNCHED, (rank, world, rank, "localhost", 1)):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("rank, world", [(2, 2), (-1, 2), ("one", 2)])
def test_ranks_that_cannot_be(capsys, monkeypatch, rank, world):
    launched(monkeypatch, rank, world)
    assert "RANK" in refusal(capsys, ranks)


@pytest.mark.parametrize("script", ["evaluate", "analyze_r1", "budget_force"])
def test_a_script_of_one_process_refuses_torchrun(capsys, monkeypatch, script):
    launched(monkeypatch, 1, 2)
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    assert "without torchrun" in refusal(capsys, __import__(script).main)


SERVICE = """
def init(**settings): print("init", settings["id"], settings["resume"])
def log(metrics, step):
    if step == 3: raise OSError("no network")
    print("log", step)
"""


def test_a_service_is_told_each_step_once_and_costs_a_warning_at_most(capsys, monkeypatch, tmp_path):
    (tmp_path / "wandb.py").write_text(SERVICE)
    monkeypatch.syspath_prepend(tmp_path)
    run, args = tmp_path / "run", rl_mrt.flags(["--report-to", "wandb"])
    opened(run, {})
    for steps in ([1, 2], [1, 2, 3, 4]):
        tell = metrics_reporter(args, run)
        for step in steps:
            tell({"step": step, "loss": 0.5})
    printed = capsys.readouterr().out
    name = json.loads((run / "config.json").read_text())["id"]
    assert printed.count(f"init {name} allow") == 2 and printed.count("no network") == 1
    assert [line for line in printed.splitlines() if line.startswith("log")] == ["log 1", "log 2", "log 4"]
    launched(monkeypatch, 1, 2)
    assert metrics_reporter(args, run)({"step": 9}) is None and capsys.readouterr().out == ""


def test_tensorboard_has_each_step_once(tmp_path, execute):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    command = f"rl_mrt.py {RUNS['rl_mrt']} --steps 3 --eval-every 0 --report-to tensorboard --out run"
    execute(tmp_path, command, fault=("kill", 60))
    succeeded(execute(tmp_path, command, "--resume"))
    told = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    told.Reload()
    steps = [line["step"] for line in jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert [event.step for event in told.Scalars("loss")] == steps
