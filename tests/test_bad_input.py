"""Bad input: one line on stderr that says what is wrong, exit code 2, before expensive work, with nothing destroyed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, a_run, copy_of_tiny, main_with, refusal, run_settings, write, write_rows

import analyze_r1
import budget_force
import evaluate
import rl_mrt
import star_mrt
from engine import models
from engine.tokens import prompt_ids
from run import data
from run.files import end_in_one_line
from run.folder import open_run

SCRIPTS = [rl_mrt, evaluate, analyze_r1, budget_force, star_mrt]
GOOD_ROW = {"problem": "1 + 1 = ?", "answer": "2"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ------------------------------------------------------------------------------------------------ flags

REFUSED = {  # the line begins with the flag
    rl_mrt: "--max-tokens 0 | --max-tokens -5 | --max-tokens 12.5 | --bonus -1 | --bonus nan | --bonus inf "
    "| --bonus much | --group-size 0 | --limit 0 | --steps 0 | --seed one | --seed -1 | --temperature -1 "
    "| --eval-every -1 | --variant suffix | --resume --overwrite | --report-to paper | --group-size 1 "
    "| --temperature 0 | --temperature nan "
    "| --length-penalty 1 | --stop-credit 20 --bonus 0 | --progress likelihood --variant prefix | --warmup 1 | --lr 0 "
    "| --max-tokens 1 --bonus 1 | --chat-template-kwargs [] | --think-marks A A "
    '| --chat-template-kwargs {"x":"\\ud83d"}',
    evaluate: "--top-p 0 | --top-p 1.5 | --top-p nan | --k 1,two | --budgets 0 | --seed -1 | --num-samples 0 | --k 99 "
    "| --model tiny,some/model | --tokenizer some/model",
    analyze_r1: "--engine http://localhost:1/v1 --dry-run | --seed -1 | --episodes-per-point 0 | --from nowhere "
    "| --markers nowhere",
    budget_force: "--seed -1 | --extensions -1 | --strings a,,b | --thoughts nowhere | --budgets x | --top-p 0",
    star_mrt: "--seed -1 | --min-success 1.5 | --temperature 0 | --epochs 0 | --filter all",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_flags_may_not_be(capsys, script):
    for command in REFUSED[script].split(" | "):
        line = refusal(capsys, script.flags, command.split())
        assert line.startswith(f"error: {command.split()[0]}") and len(line) < 300, line
    for flag in ("--no-such-flag", "--lim=3"):
        assert flag in refusal(capsys, script.flags, [flag])
    assert "half a character" in refusal(capsys, script.flags, ["--dataset", os.fsdecode(b"d\xff.jsonl")])


def test_settings_that_look_odd_but_are_sound():
    assert rl_mrt.flags("--bonus 0 --progress likelihood".split()).bonus == 0
    assert evaluate.flags("--temperature 0".split()).temperature == 0


DEFAULTS = {
    "": "online nats",
    "--variant prefix": "prefix sampled",
    "--progress likelihood": "online likelihood",
    "--model some/model": "prefix sampled",
    "--model some/model --variant online": "online sampled",
}


@pytest.mark.parametrize("flags", DEFAULTS)
def test_the_default_is_what_was_confirmed_for_the_model(flags):
    args = rl_mrt.flags(["--bonus", "1", *flags.split()])
    assert f"{args.variant} {args.progress}" == DEFAULTS[flags]


def test_other_settings_have_another_folder_and_what_resume_may_change_has_not():
    def out(script, flags: str) -> str:
        return str(script.flags(flags.split()).out)

    assert out(evaluate, "") == out(evaluate, "--max-tokens 256 --k 2 --limit 3") == "runs/eval-tiny-tiny"
    assert out(rl_mrt, "--bonus 0 --kl 0.04 --concurrency 3") == "runs/rl-tiny-grpo-seed0-kl-0.04"
    named = {
        *(out(evaluate, f"--model {m}") for m in ("runs/a/model", "runs/b/model", "runs/a/model,runs/b/model")),
        *(out(evaluate, f"--compare runs/{runs}") for runs in ("a", "b", "a runs/b")),
        *(out(rl_mrt, flags) for flags in ("--seed 0", "--seed 1", "--bonus 0.5", "--eval-every 0", "--limit 9")),
        out(analyze_r1, f"--max-steps 0 --problem-column {'x' * 300}"),
    }
    assert len(named) == 12 and all(len(name) < 200 for name in named)


# ------------------------------------------------------------------------------------------------ --config


def config(tmp_path: Path, text: str) -> list[str]:
    return ["--config", write(tmp_path / "c.yaml", text)]


def test_a_config_file_sets_defaults_and_flags_override_it(tmp_path):
    text = "bonus: 0.5\nvariant: online\nmax-tokens: 99\ngroup_size: 3\nlr: 1e-6\nskip-unusable: true\nseed:\n"
    args, usual = rl_mrt.flags([*config(tmp_path, text), *"--group-size 5 --bonus 0".split()]), rl_mrt.flags([])
    assert (args.bonus, args.group_size) == (0.0, 5)
    assert (args.variant, args.max_tokens, args.lr, args.skip_unusable) == ("online", 99, 1e-6, True)
    assert (args.temperature, args.seed) == (usual.temperature, usual.seed)
    args = evaluate.flags(config(tmp_path, "compare: [a, b]\nk: 1,2\n"))
    assert args.compare == [Path("a"), Path("b")] and args.k == [1, 2]


UNUSABLE = {  # {what the line says: texts}
    "--bonsu": ["bonsu: 1"],
    "1": ["1: 2"],
    "c.yaml": ["bonus: [1", "a: b: c"],
    "name: value": ["- bonus\n- lr", "just words", ""],
    "set twice": ["lr: 1\nlr: 2"],
    "half a character": ['dataset: "\\ud83d"'],
    "not both": ["overwrite: true\nresume: true"],
    # judged as the flag's own value would be: its type, its choices, and true or false for a switch
    "bonus": ["bonus: high", "bonus: -1", "bonus: .nan"],
    "max-tokens": ["max-tokens: 0", "max-tokens: [1, 2]"],
    **{text.split(":")[0]: [text] for text in ("steps: true", "lr: {a: 1}", "variant: suffix", "dtype: float16")},
    **{text.split(":")[0]: [text] for text in ("skip-unusable: maybe", "overwrite: 'false'", "resume: 2")},
}


@pytest.mark.parametrize("says", UNUSABLE)
def test_config_files_that_cannot_be_used(capsys, tmp_path, says):
    for text in UNUSABLE[says]:
        assert says in refusal(capsys, rl_mrt.flags, config(tmp_path, text + "\n")), text


def test_config_files_that_cannot_be_read(capsys, tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x80\x81")
    for path in (tmp_path / "nowhere.yaml", tmp_path, tmp_path / "c.yaml"):
        assert str(path) in refusal(capsys, rl_mrt.flags, ["--config", str(path)])


# ------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize("response", [{}, {"response": None}, {"response": ["a"]}], ids=str)
def test_given_responses_that_cannot_be_read(capsys, monkeypatch, tmp_path, response):
    rows = {"problem": "?", "answer": "2", "response": "fine"}, {"problem": "?", "answer": "2", **response}
    file = write_rows(tmp_path / "r.jsonl", *rows)
    message = refusal(capsys, main_with(monkeypatch, analyze_r1, "--traces", file, "--out", tmp_path / "run"))
    assert "r.jsonl, row 2: column response" in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "row", [{"text": "?", "label": "2"}, {"problem": "?", "label": "2"}, {"text": "?", "answer": "2"}]
)
def test_unknown_columns_are_listed(capsys, tmp_path, row):
    message = refusal(capsys, data.load_problems, write_rows(tmp_path / "d.jsonl", row), "train")
    assert ", ".join(row) in message and "problem|question|prompt" in message and "answer|solution" in message


@pytest.mark.parametrize(
    "row",
    [
        *({"problem": "?", "answer": answer} for answer in ("", "   ", None, "it follows\n#### ", r"\frac{1}{")),
        *({"problem": problem, "answer": "2"} for problem in ("", " \n", None, ["1 + 1"])),
        {"problem": "?", "solution": "so it is 2"},
        {"problem": "?"},
        {"answer": "2"},
    ],
    ids=json.dumps,
)
def test_a_row_that_cannot_be_used_is_named(capsys, tmp_path, row):
    file = write_rows(tmp_path / "d.jsonl", GOOD_ROW, GOOD_ROW, row, GOOD_ROW)
    message = refusal(capsys, data.load_problems, file, "train")
    assert "d.jsonl" in message and "row 3" in message


@pytest.mark.parametrize(
    "dataset, split, says",
    [
        *((name, "train", name) for name in ("nowhere.jsonl", "nowhere.json", "nobody/nothing", ".")),
        *((f"tiny:{level}", "train", "--dataset") for level in ("1", "31", "0", "-5", "abc", "10;20", "10,1")),
        ("tiny", "nope", "--split nope: the tiny problems have train, validation, test"),
    ],
)
def test_a_data_set_that_is_not_there_is_named(capsys, tmp_path, monkeypatch, dataset, split, says):
    monkeypatch.chdir(tmp_path)
    assert says in refusal(capsys, data.load_problems, dataset, split)


@pytest.mark.parametrize("bad", ["--dataset", "--limit 4 --eval-dataset"])
def test_bad_data_does_not_cost_the_run_that_would_be_overwritten(capsys, monkeypatch, tmp_path, bad):
    run = a_run(tmp_path / "run", "rl_mrt.py")
    file = write_rows(tmp_path / "d.jsonl", GOOD_ROW, {"problem": "?", "answer": ""})
    flags = [*bad.split(), file, *"--steps 1 --overwrite --out".split(), run]
    assert "row 2" in refusal(capsys, main_with(monkeypatch, rl_mrt, *flags))
    assert (run / "metrics.jsonl").exists()


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("missing", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_a_model_folder_without_a_file_it_needs(capsys, tmp_path, missing):
    folder = str(copy_of_tiny(tmp_path / "m", missing))
    if missing == "model.safetensors":
        assert folder in refusal(capsys, models.load_model, folder, "cpu")
    else:
        assert f"--model {folder}: the folder has no {missing}" in refusal(capsys, models.load_tokenizer, folder)


def test_what_takes_the_place_of_a_chat_template_is_said_once(capsys, tmp_path):
    folder = copy_of_tiny(tmp_path / "base", "chat_template.jinja")
    tokenizer = models.load_tokenizer(str(folder))
    models.load_tokenizer(str(folder))
    assert capsys.readouterr().out == f"{folder} has no chat template: its prompt is the bare problem\n"
    assert prompt_ids(tokenizer, "What?") == tokenizer.encode("What?\n\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_model_is_told_before_a_data_set_is_fetched(capsys, monkeypatch, tmp_path, script):
    """Without --dataset that is the paper's, of gigabytes; the tokenizer is a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load_problems", lambda *_: pytest.fail("the data set was loaded first"))
    assert "--model nobody/nothing" in refusal(capsys, main_with(monkeypatch, script, "--model", "nobody/nothing"))
    write(copy_of_tiny(tmp_path / "m") / "config.json", '{"model_type": "qw')
    assert "--model m" in refusal(capsys, main_with(monkeypatch, script, *"--model m --out out".split()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_prompt_longer_than_the_context_is_named(capsys, monkeypatch, tmp_path, script):
    run = a_run(tmp_path / "run", f"{script.__name__}.py")
    rows = {**GOOD_ROW, "id": "short"}, {"problem": "a long story " * 600, "answer": "2", "id": "the-long-one"}
    file = write_rows(tmp_path / "d.jsonl", *rows)
    message = refusal(capsys, main_with(monkeypatch, script, "--dataset", file, "--out", run, "--overwrite"))
    assert "the-long-one" in message and "4096" in message
    assert (run / "metrics.jsonl").exists()


def test_the_budget_counts_towards_the_context(capsys, monkeypatch, tmp_path):
    flags = "--limit 1 --max-tokens 4090 --eval-every 0 --out".split()
    assert "tiny-train-" in refusal(capsys, main_with(monkeypatch, rl_mrt, *flags, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_told_before_anything_is_sampled(capsys, monkeypatch, tmp_path):
    folder = copy_of_tiny(tmp_path / "m")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    last = vocabulary["added_tokens"][-1]
    vocabulary["added_tokens"] += [{**last, "id": i, "content": f"<|f{i}|>"} for i in range(last["id"] + 1, 751)]
    write(folder / "tokenizer.json", json.dumps(vocabulary))
    (folder / "chat_template.jinja").open("a").write("<|f750|>")
    for script in SCRIPTS:
        flags = "--dataset tiny --engine transformers --limit 1 --model".split()
        line = refusal(capsys, main_with(monkeypatch, script, *flags, folder, "--out", tmp_path / "out"))
        assert "token 750 is beyond its 704 embeddings" in line and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ the output folder


def test_a_run_is_neither_mixed_with_another_nor_lost(capsys, tmp_path):
    run = a_run(tmp_path / "run", bonus=0.0, lr=1e-3)
    before = files_of(run)
    message = refusal(capsys, open_run, run_settings(run, bonus=0.0, lr=1e-3), {})
    assert str(run) in message and "--resume" in message and "--overwrite" in message
    message = refusal(capsys, open_run, run_settings(run, resume=True, bonus=1.0, lr=1e-3), {})
    assert "--bonus 0.0 (now 1.0)" in message and "--lr" not in message
    open_run(run_settings(run, resume=True, bonus=0.0, lr=1e-3), {})
    assert files_of(run) == before
    open_run(run_settings(run, overwrite=True, bonus=1.0), {})
    assert set(files_of(run)) == {".lock", "config.json", "inputs.json"}
    assert json.loads((run / "config.json").read_text())["settings"]["bonus"] == 1.0


@pytest.mark.parametrize("way", [{}, {"resume": True}, {"overwrite": True}], ids=str)
@pytest.mark.parametrize("what", ["thesis", "model", "broken", "list", "file", "another script's"])
def test_what_is_not_a_run_of_this_script_is_never_touched(capsys, tmp_path, what, way):
    """A folder of anything else; a model's, which has a config.json, too; a config.json nobody can read; a file; the
    run that `evaluate.py --model runs/a/model --out runs/a --overwrite` would delete with the model in it."""
    folder = tmp_path / "precious"
    if what == "model":
        copy_of_tiny(folder)
    elif what == "another script's":
        a_run(folder, script="another.py")
    elif what == "file":
        write(folder, "notes")
    else:
        folder.mkdir()
        write(folder / "thesis.tex", "years of work")
        if what != "thesis":
            write(folder / "config.json", '{"settings": {"mod' if what == "broken" else "[1, 2]")
    before = folder.read_bytes() if what == "file" else files_of(folder)
    assert str(folder) in refusal(capsys, open_run, run_settings(folder, **way), {})
    assert (folder.read_bytes() if what == "file" else files_of(folder)) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_taken_output_folder_is_told_before_data_and_model_are_loaded(capsys, monkeypatch, tmp_path, script):
    run = a_run(tmp_path / "run")
    for module, name in ((data, "load_problems"), (models, "load_tokenizer"), (models, "load_model")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("expensive work came first"))
    assert str(run) in refusal(capsys, main_with(monkeypatch, script, "--out", run))


# ------------------------------------------------------------------------------------------------ earlier runs


def test_earlier_runs_that_are_none(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    row = {"id": "a", "sample": 0}
    rows = {"training": [{**row, "step": 0, "reward": 1.0}], "empty": [], "bare": [row]}
    for name, records in rows.items():
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "records.jsonl", *records)
        if name != "bare":
            write(tmp_path / name / "config.json", '{"settings": {"max_tokens": 8}}')
    for name in ("nowhere", *rows):
        for script, flag in ((evaluate, "--compare"), (budget_force, "--compare"), (analyze_r1, "--from")):
            assert f"{flag} {name}" in refusal(capsys, main_with(monkeypatch, script, flag, name))
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------ real processes


@pytest.mark.parametrize(
    "error, code, says",
    [
        (BrokenPipeError(), 141, "stopped by SIGPIPE"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device; what is recorded"),
    ],
)
def test_an_output_that_nobody_takes_is_one_line(capsys, monkeypatch, error, code, says):
    def main():
        raise error

    monkeypatch.setattr(os, "dup2", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        end_in_one_line(main)
    line = capsys.readouterr().err
    assert stop.value.code == code and line.startswith(says) and line.count("\n") == 1


@pytest.mark.parametrize(
    "command, says",
    [
        ("rl_mrt.py --dataset rows.jsonl --out run --overwrite", "row 2"),
        *((f"{script.__name__}.py --model nobody/nothing --dataset tiny --out out", "--model") for script in SCRIPTS),
    ],
)
def test_a_real_process_says_one_line_and_exits_with_2(tmp_path, execute, command, says):
    write_rows(tmp_path / "rows.jsonl", GOOD_ROW, {"problem": "?", "answer": ""})
    a_run(tmp_path / "run", script="rl_mrt.py")
    before = sorted(tmp_path.rglob("*"))
    done = execute(tmp_path, command)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and says in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    for name in ("stdout.txt", "stderr.txt"):
        (tmp_path / name).unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_packages_that_are_not_installed_are_one_line():
    command = [sys.executable, "-S", str(ROOT / "rl_mrt.py")]  # without site-packages
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: not installed: torch, ") and "requirements-cpu.txt" in done.stderr
