"""Bad input: one line on stderr that says what is wrong, exit code 2, before expensive work, with nothing destroyed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refusal, run_settings

import analyze_r1
import budget_force
import evaluate
import rl_mrt
import star_mrt
from engine import models
from engine.tokens import prompt_ids
from run import data
from run.folder import held, open_run

ROOT = Path(__file__).resolve().parents[1]
GOOD_ROW = {"problem": "1 + 1 = ?", "answer": "2"}


def parser_refusal(capsys, call, argv: list[str]) -> str:
    """The same for what argparse refuses: its usage lines come first."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(argv)
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last, last
    return last


def main_with(monkeypatch, script, *argv):
    """The script's main() as a call without arguments."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
    return script.main


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


def copy_of_tiny(folder: Path, *without: str) -> Path:
    """The embedded model in a folder of its own, which may be written to where the checkout may not."""
    folder.mkdir(exist_ok=True)
    for file in (ROOT / "tiny").iterdir():
        if file.is_file() and file.name not in without:
            shutil.copyfile(file, folder / file.name)
    return folder


# ------------------------------------------------------------------------------------------------ analysis


def test_given_responses_that_cannot_be_read(capsys, monkeypatch, tmp_path):
    row = {"problem": "?", "answer": "2"}
    for response in ({}, {"response": None}, {"response": ["a"]}):
        file = write_rows(tmp_path / "r.jsonl", {**row, "response": "fine"}, {**row, **response})
        main = main_with(monkeypatch, analyze_r1, "--traces", file, "--out", tmp_path / "run")
        message = refusal(capsys, main)
        assert "r.jsonl, row 2: column response" in message and not (tmp_path / "run").exists()
    main = main_with(monkeypatch, analyze_r1, "--traces", tmp_path / "nowhere.jsonl", "--out", tmp_path / "run")
    assert "nowhere.jsonl" in refusal(capsys, main)


def test_redrawing_what_is_no_analysis(capsys, monkeypatch, tmp_path):
    for folder in (tmp_path / "nowhere", a_run(tmp_path / "training")):
        assert str(folder) in refusal(capsys, main_with(monkeypatch, analyze_r1, "--from", folder))


# ------------------------------------------------------------------------------------------------ data sets


def test_unknown_columns_are_listed(capsys, tmp_path):
    for row in ({"text": "?", "label": "2"}, {"problem": "?", "label": "2"}, {"text": "?", "answer": "2"}):
        message = refusal(capsys, data.load_problems, write_rows(tmp_path / "d.jsonl", row), "train")
        assert ", ".join(row) in message and "problem|question|prompt" in message and "answer|solution" in message


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "empty"),
        ("\n \n", "empty"),
        ('{"problem": "a", "answer": "1"}\n\n{"problem": "b", "ans\n', "line 3"),
        ("problem,answer\n1+1,2\n", "line 1"),
        ('{"problem": "a", "answer": "1"}\n["b", "2"]\n', "line 2"),
        ("3\n", "line 1"),
        ("null\n", "line 1"),
    ],
)
def test_files_that_are_no_json_lines(capsys, tmp_path, text, says):
    message = refusal(capsys, data.load_problems, write(tmp_path / "d.jsonl", text), "train")
    assert "d.jsonl" in message and says in message


def test_a_file_that_is_no_text(capsys, tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"problem": "\xff\xfe\x80", "answer": "1"}\n')
    assert "d.jsonl" in refusal(capsys, data.load_problems, str(tmp_path / "d.jsonl"), "train")


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "?", "answer": ""},
        {"problem": "?", "answer": "   "},
        {"problem": "?", "answer": None},
        {"problem": "?", "answer": "it follows\n#### "},
        {"problem": "?", "answer": r"\frac{1}{"},
        {"problem": "?"},
        {"problem": "", "answer": "2"},
        {"problem": " \n", "answer": "2"},
        {"problem": None, "answer": "2"},
        {"problem": ["1 + 1"], "answer": "2"},
        {"answer": "2"},
    ],
    ids=json.dumps,
)
def test_a_row_that_cannot_be_used_is_named(capsys, tmp_path, row):
    file = write_rows(tmp_path / "d.jsonl", GOOD_ROW, GOOD_ROW, row, GOOD_ROW)
    message = refusal(capsys, data.load_problems, file, "train")
    assert "d.jsonl" in message and "row 3" in message


def test_a_solution_without_a_box_is_named(capsys, tmp_path):
    rows = {"problem": "?", "solution": r"so \boxed{2}"}, {"problem": "?", "solution": "so it is 2"}
    message = refusal(capsys, data.load_problems, write_rows(tmp_path / "d.jsonl", *rows), "train")
    assert "row 2" in message and "boxed" in message


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere.json", "nobody/nothing", "."])
def test_a_data_set_that_is_not_there_is_named(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert name in refusal(capsys, data.load_problems, name, "train")


@pytest.mark.parametrize("dataset", ["tiny:1", "tiny:31", "tiny:0", "tiny:-5", "tiny:abc", "tiny:10;20", "tiny:10,1"])
def test_wrong_levels_of_the_tiny_problems(capsys, dataset):
    assert "--dataset" in refusal(capsys, data.load_problems, dataset, "train")


def test_a_split_that_the_tiny_problems_lack(capsys):
    message = refusal(capsys, data.load_problems, "tiny", "nope")
    assert "--split nope" in message and "train" in message and "validation" in message and "test" in message


# ------------------------------------------------------------------------------------------------ models


def test_a_model_out_of_reach_is_named(capsys):
    assert "--model nobody/nothing" in refusal(capsys, models.load_tokenizer, "nobody/nothing")


@pytest.mark.parametrize("missing", ["config.json", "tokenizer_config.json"])
def test_a_model_folder_without_a_file_it_needs(capsys, tmp_path, missing):
    folder = copy_of_tiny(tmp_path / "m", missing)
    message = refusal(capsys, models.load_tokenizer, str(folder))
    assert str(folder) in message and f"no {missing}" in message


def test_what_takes_the_place_of_a_chat_template_is_said_once(capsys, tmp_path):
    folder = copy_of_tiny(tmp_path / "base", "chat_template.jinja")
    tokenizer = models.load_tokenizer(str(folder))
    models.load_tokenizer(str(folder))
    assert capsys.readouterr().out == f"{folder} has no chat template: its prompt is the bare problem\n"
    assert prompt_ids(tokenizer, "What?") == tokenizer.encode("What?\n\n")


def test_a_model_folder_without_weights(capsys, tmp_path):
    folder = copy_of_tiny(tmp_path / "m", "model.safetensors")
    assert str(folder) in refusal(capsys, models.load_model, str(folder), "cpu")


@pytest.mark.parametrize("script", [rl_mrt, evaluate, analyze_r1, budget_force, star_mrt])
def test_a_model_folder_with_a_broken_configuration(capsys, monkeypatch, tmp_path, script):
    folder = copy_of_tiny(tmp_path / "m")
    write(folder / "config.json", '{"model_type": "qw')
    main = main_with(monkeypatch, script, "--model", folder, "--dataset", "tiny", "--out", tmp_path / "out")
    assert str(folder) in refusal(capsys, main)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", [rl_mrt, evaluate, analyze_r1, budget_force, star_mrt])
def test_a_wrong_model_is_told_before_a_data_set_is_fetched(capsys, monkeypatch, tmp_path, script):
    """Without --dataset that is the paper's, of gigabytes; the tokenizer is a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load_problems", lambda *_: pytest.fail("the data set was loaded first"))
    assert "--model nobody/nothing" in refusal(capsys, main_with(monkeypatch, script, "--model", "nobody/nothing"))


@pytest.mark.parametrize("script", [rl_mrt, evaluate, analyze_r1, budget_force, star_mrt])
def test_a_prompt_longer_than_the_context_is_named(capsys, monkeypatch, tmp_path, script):
    run = a_run(tmp_path / "run", f"{script.__name__}.py")
    rows = {**GOOD_ROW, "id": "short"}, {"problem": "a long story " * 600, "answer": "2", "id": "the-long-one"}
    file = write_rows(tmp_path / "d.jsonl", *rows)
    message = refusal(capsys, main_with(monkeypatch, script, "--dataset", file, "--out", run, "--overwrite"))
    assert "the-long-one" in message and "4096" in message
    assert (run / "metrics.jsonl").exists()


def test_the_budget_counts_towards_the_context(capsys, monkeypatch, tmp_path):
    main = main_with(
        monkeypatch, rl_mrt, *"--limit 1 --max-tokens 4090 --eval-every 0".split(), "--out", tmp_path / "out"
    )
    assert "tiny-train-" in refusal(capsys, main)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    "argv",
    [
        ["--max-tokens", "0"],
        ["--max-tokens", "-5"],
        ["--max-tokens", "12.5"],
        ["--bonus", "-1"],
        ["--bonus", "nan"],
        ["--bonus", "inf"],
        ["--bonus", "much"],
        ["--group-size", "0"],
        ["--limit", "0"],
        ["--steps", "0"],
        ["--seed", "one"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--eval-every", "-1"],
        ["--variant", "suffix"],
        ["--resume", "--overwrite"],
        ["--no-such-flag"],
    ],
    ids=" ".join,
)
def test_values_that_the_parser_refuses(capsys, argv):
    assert argv[0] in parser_refusal(capsys, rl_mrt.flags, argv) or "resume" in argv[0]


@pytest.mark.parametrize(
    "argv",
    [
        ["--group-size", "1"],
        ["--temperature", "0"],
        ["--length-penalty", "1"],
        ["--stop-credit", "20", "--bonus", "0"],
        ["--progress", "likelihood", "--variant", "prefix"],
    ],
    ids=" ".join,
)
def test_settings_that_make_no_sense(capsys, argv):
    assert argv[0] in refusal(capsys, rl_mrt.flags, argv)


@pytest.mark.parametrize("script", [rl_mrt, evaluate, analyze_r1, budget_force, star_mrt])
def test_a_negative_seed_is_refused_before_numpy_does(capsys, script):
    assert "--seed" in parser_refusal(capsys, script.flags, ["--seed", "-1"])


def test_the_prefix_variant_needs_room_for_a_prefix(capsys):
    assert "--max-tokens" in refusal(capsys, rl_mrt.flags, ["--bonus", "1", "--max-tokens", "1"])


def test_settings_that_look_odd_but_are_sound():
    assert rl_mrt.flags(["--bonus", "0", "--progress", "likelihood"]).bonus == 0
    assert evaluate.flags(["--temperature", "0"]).temperature == 0


@pytest.mark.parametrize(
    "argv, variant, progress",
    [
        ([], "online", "nats"),
        (["--variant", "prefix"], "prefix", "sampled"),
        (["--progress", "likelihood"], "online", "likelihood"),
        (["--model", "some/model"], "prefix", "sampled"),
        (["--model", "some/model", "--variant", "online"], "online", "sampled"),
    ],
)
def test_the_default_is_what_was_confirmed_for_the_model(argv, variant, progress):
    args = rl_mrt.flags(["--bonus", "1", *argv])
    assert (args.variant, args.progress) == (variant, progress)


@pytest.mark.parametrize(
    "argv",
    [["--top-p", "0"], ["--top-p", "1.5"], ["--top-p", "nan"], ["--k", "1,two"], ["--budgets", "0"]],
    ids=" ".join,
)
def test_settings_of_an_evaluation_that_make_no_sense(capsys, argv):
    assert argv[0] in refusal(capsys, evaluate.flags, argv)


# ------------------------------------------------------------------------------------------------ the output folder


def test_a_run_is_neither_mixed_with_another_nor_lost(capsys, tmp_path):
    run = a_run(tmp_path / "run", bonus=0.0, lr=1e-3)
    before = {f.name: f.read_bytes() for f in run.iterdir()}
    message = refusal(capsys, open_run, run_settings(run, bonus=0.0, lr=1e-3), {})
    assert str(run) in message and "--resume" in message and "--overwrite" in message
    message = refusal(capsys, open_run, run_settings(run, resume=True, bonus=1.0, lr=1e-3), {})
    assert "--bonus 0.0 (now 1.0)" in message and "--lr" not in message
    assert {f.name: f.read_bytes() for f in run.iterdir()} == before
    open_run(run_settings(run, resume=True, bonus=0.0, lr=1e-3), {})
    assert {f.name: f.read_bytes() for f in run.iterdir()} == before


def test_overwrite_replaces_a_run(tmp_path):
    run = a_run(tmp_path / "run", bonus=0.0)
    open_run(run_settings(run, overwrite=True, bonus=1.0), {})
    assert {f.name for f in run.iterdir()} == {".lock", "config.json", "inputs.json"}
    assert json.loads((run / "config.json").read_text())["settings"]["bonus"] == 1.0


@pytest.mark.parametrize("resume, overwrite", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("what", ["thesis", "model", "broken", "list"])
def test_what_is_not_a_run_is_never_touched(capsys, tmp_path, what, resume, overwrite):
    """A folder of anything else; a model folder, which has a config.json, too; a config.json nobody can read."""
    folder = tmp_path / "precious"
    if what == "model":
        copy_of_tiny(folder)
    else:
        folder.mkdir()
        write(folder / "thesis.tex", "years of work")
        if what != "thesis":
            write(folder / "config.json", '{"settings": {"mod' if what == "broken" else "[1, 2]")
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    assert str(folder) in refusal(capsys, open_run, run_settings(folder, resume, overwrite), {})
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_folder_that_is_a_file(capsys, tmp_path, overwrite):
    write(tmp_path / "out", "notes")
    assert str(tmp_path / "out") in refusal(capsys, open_run, run_settings(tmp_path / "out", overwrite=overwrite), {})
    assert (tmp_path / "out").read_text() == "notes"


@pytest.mark.parametrize("script", [rl_mrt, evaluate, analyze_r1, budget_force, star_mrt])
def test_a_taken_output_folder_is_told_before_data_and_model_are_loaded(capsys, monkeypatch, tmp_path, script):
    run = a_run(tmp_path / "run")
    for module, name in ((data, "load_problems"), (models, "load_tokenizer"), (models, "load_model")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("expensive work came first"))
    assert str(run) in refusal(capsys, main_with(monkeypatch, script, "--out", run))


@pytest.mark.parametrize("bad", ["rows", "eval-dataset"])
def test_bad_data_does_not_cost_the_run_that_would_be_overwritten(capsys, monkeypatch, tmp_path, bad):
    run = a_run(tmp_path / "run", "rl_mrt.py")
    file = write_rows(tmp_path / "d.jsonl", GOOD_ROW, {"problem": "?", "answer": ""})
    flags = ["--dataset", file] if bad == "rows" else ["--limit", 4, "--eval-dataset", file]
    message = refusal(capsys, main_with(monkeypatch, rl_mrt, *flags, "--steps", 1, "--out", run, "--overwrite"))
    assert "row 2" in message
    assert (run / "metrics.jsonl").exists()


# ------------------------------------------------------------------------------------------------ --config


def test_a_config_file_sets_defaults_and_flags_override_it(tmp_path):
    file = write(
        tmp_path / "c.yaml",
        "bonus: 0.5\nvariant: online\nmax-tokens: 99\ngroup_size: 3\nlr: 1e-6\nskip-unusable: true\n",
    )
    args = rl_mrt.flags(["--config", file, "--group-size", "5", "--bonus", "0"])
    assert (args.bonus, args.group_size) == (0.0, 5)
    assert (args.variant, args.max_tokens, args.lr, args.skip_unusable) == ("online", 99, 1e-6, True)
    assert args.temperature == rl_mrt.flags([]).temperature


def test_a_key_without_a_value_leaves_the_default(tmp_path):
    args = rl_mrt.flags(["--config", write(tmp_path / "c.yaml", "bonus:\nmax-tokens:\nseed:\n")])
    default = rl_mrt.flags([])
    assert (args.bonus, args.max_tokens, args.seed) == (default.bonus, default.max_tokens, default.seed)


@pytest.mark.parametrize(
    "text, says",
    [
        ("bonsu: 1\n", "--bonsu"),
        ("1: 2\n", "1"),
        ("bonus: [1\n", ""),
        ("a: b: c\n", ""),
        ("- bonus\n- lr\n", "name: value"),
        ("just words\n", "name: value"),
        ("", "name: value"),
    ],
)
def test_config_files_that_cannot_be_used(capsys, tmp_path, text, says):
    file = write(tmp_path / "c.yaml", text)
    message = refusal(capsys, rl_mrt.flags, ["--config", file])
    assert file in message and says in message


def test_config_files_that_cannot_be_read(capsys, tmp_path):
    assert "nowhere.yaml" in refusal(capsys, rl_mrt.flags, ["--config", str(tmp_path / "nowhere.yaml")])
    assert str(tmp_path) in refusal(capsys, rl_mrt.flags, ["--config", str(tmp_path)])
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x80\x81")
    assert "c.yaml" in refusal(capsys, rl_mrt.flags, ["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    "text",
    [
        "bonus: high",
        "bonus: -1",
        "bonus: .nan",
        "max-tokens: 0",
        "max-tokens: [1, 2]",
        "steps: true",
        "lr: {a: 1}",
        "variant: suffix",
        "dtype: float16",
        "skip-unusable: maybe",
        "overwrite: 'false'",
        "resume: 2",
    ],
)
def test_config_values_of_the_wrong_type(capsys, tmp_path, text):
    """Judged as the flag's own value would be: its type, its choices, and true or false for a switch."""
    file = write(tmp_path / "c.yaml", text + "\n")
    assert text.split(":")[0] in parser_refusal(capsys, rl_mrt.flags, ["--config", file])


def test_overwrite_in_a_config_file_does_not_discard_a_run_that_is_to_go_on(tmp_path):
    """Refused, or the flag wins; never both, of which --overwrite would come first."""
    try:
        args = rl_mrt.flags(["--config", write(tmp_path / "c.yaml", "overwrite: true\n"), "--resume"])
    except SystemExit as stop:
        assert stop.code == 2
    else:
        assert args.resume and not args.overwrite


def test_a_config_file_can_name_the_runs_to_compare(tmp_path):
    file = write(tmp_path / "c.yaml", "compare: [a, b]\nk: 1,2\n")
    args = evaluate.flags(["--config", file])
    assert args.compare == [Path("a"), Path("b")] and args.k == [1, 2]


# ------------------------------------------------------------------------------------------------ comparisons


def test_comparing_what_is_no_evaluation(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    record = {"id": "a", "sample": 0, "gold": "2"}
    for name, row in (
        ("training", {"step": 0, "id": "a", "sample": 0, "reward": 1.0}),
        ("empty", None),
        ("bare", record),
    ):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "records.jsonl", *[row] * (row is not None))
        if name != "bare":
            write(tmp_path / name / "config.json", '{"settings": {"max_tokens": 8}}')
    for name in ("nowhere", "training", "empty", "bare"):
        message = refusal(capsys, main_with(monkeypatch, evaluate, "--compare", name))
        assert name in message and "--compare" in message
        assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "script, settings",
    [(evaluate, {"top_p": 1.0}), (budget_force, {"extension_tokens": 8})],
    ids=["evaluate", "budget_force"],
)
def test_records_of_an_earlier_version_are_refused(capsys, monkeypatch, tmp_path, script, settings):
    """One line a problem with its samples in a list, as it was once written."""
    run = a_run(tmp_path / "run", f"{script.__name__}.py", **settings)
    write_rows(run / "records.jsonl", {"id": "a", "answer": "2", "samples": [{"right": 1.0}]})
    message = refusal(capsys, main_with(monkeypatch, script, "--compare", run, "--out", tmp_path / "out"))
    assert str(run / "records.jsonl") in message and "one line per problem" in message
    assert not (tmp_path / "out").exists()


def test_an_analysis_of_an_earlier_version_is_refused(capsys, monkeypatch, tmp_path):
    run = a_run(tmp_path / "run", "analyze_r1.py", max_steps=49, episodes_per_point=1, max_tokens=96)
    write_rows(run / "records.jsonl", {"id": "a", "answer": "2", "samples": [{"right": 1.0}]})
    for script, *argv in (
        (analyze_r1, "--from", run),
        (budget_force, "--model", "tiny", "--thoughts", run, "--engine", "transformers"),
    ):
        assert "one line per problem" in refusal(capsys, main_with(monkeypatch, script, *argv))


def test_the_run_of_another_script_is_not_overwritten(tmp_path, capsys):
    """`evaluate.py --model runs/a/model --out runs/a --overwrite` would delete the model that it evaluates."""
    run = a_run(tmp_path / "run", script="another.py")
    with pytest.raises(SystemExit) as stop:
        open_run(run_settings(run, overwrite=True), {})
    assert stop.value.code == 2 and "another.py" in capsys.readouterr().err
    assert (run / "metrics.jsonl").exists()


# ------------------------------------------------------------------------------------------------ real processes


@pytest.mark.parametrize(
    "command, says",
    [
        ("rl_mrt.py --dataset rows.jsonl --out run --overwrite", "row 2"),
        ("evaluate.py --model nobody/nothing --dataset tiny --out out", "--model nobody/nothing"),
        ("evaluate.py --compare nowhere run", "nowhere"),
    ],
)
def test_a_real_process_says_one_line_and_exits_with_2(tmp_path, monkeypatch, command, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_rows(tmp_path / "rows.jsonl", GOOD_ROW, {"problem": "?", "answer": ""})
    a_run(tmp_path / "run", script="rl_mrt.py")
    before = sorted(tmp_path.rglob("*"))
    script, *argv = command.split()
    done = subprocess.run([sys.executable, str(ROOT / script), *argv], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
