"""Tokenizers, templates, weights, checkpoints and folders as users have them, not only as they should be."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import refusal, run_settings
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from engine.models import ROOT, load_model, load_tokenizer
from engine.sampler import Sampler
from engine.thoughts import thinks, thought_is_open
from engine.tokens import encode, prompt_ids, text_and_offsets
from engine.transformers_engine import TransformersEngine, ways_of
from run import flags, training
from run.folder import open_run

ROOT = ROOT


def byte_fallback(metaspace: bool):
    """A small tokenizer of Gemma's or, with `metaspace`, of Llama 2's kind."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    vocabulary = {s: i for i, s in enumerate(special)} | {f"<0x{b:02X}>": 4 + b for b in range(256)}
    for c in "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?+-=*/\\{}()<>²≡'$":
        vocabulary[c] = len(vocabulary)
    t = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metaspace:
        t.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        t.normalizer = normalizers.Replace(" ", "▁")
    t.decoder = decoders.Sequence(steps)
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    t.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=t, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", bos_token="<s>"
    )


@pytest.mark.parametrize("metaspace", [False, True])
def test_any_ids_have_a_text_and_offsets(metaspace):
    t = byte_fallback(metaspace)
    rng = np.random.default_rng(0)
    names = [["<0x47>", "<0x80>", "Y"], ["<0xC3>", "<0xA9>", "<0xC3>", "x"], ["▁", "<0xF0>", "</s>", "<0x9F>", "b"]]
    rows = [t.convert_tokens_to_ids(row) for row in names] + rng.integers(0, len(t), (300, 12)).tolist()
    for ids in rows:
        text, offsets = text_and_offsets(t, ids)
        whole = t.decode(ids, skip_special_tokens=True)
        assert text.replace("\ufffd", "") == whole.replace("\ufffd", "")
        assert len(offsets) == len(ids) + 1 and offsets == sorted(offsets)
        assert offsets[0] == 0 and offsets[-1] == len(text)


@pytest.mark.parametrize("metaspace", [False, True])
def test_tokens_that_go_on_a_text_get_no_space(metaspace):
    t = byte_fallback(metaspace)
    before = t.encode("Let me see.", add_special_tokens=False)
    for text in ("\n\nTime is up.", "\n</think>", "Final Answer:** \\boxed{", "2}", " so"):
        assert t.decode([*before, *encode(t, text)]) == "Let me see." + text
    assert thinks(t)


@pytest.mark.parametrize("end, is_open", [("<think>\n", True), ("<think>\n\n</think>\n\n", False), ("", None)])
def test_whether_a_thought_is_open_is_read_off_the_prompt(end, is_open):
    t = AutoTokenizer.from_pretrained(ROOT / "tiny")
    t.chat_template = t.chat_template.replace("<think>\\n", end.replace("\n", "\\n")).replace("<think>\n", end)
    assert thought_is_open(t, prompt_ids(t, "1+1?")) is is_open


def test_template_arguments_and_a_template_that_raises(capsys):
    t = AutoTokenizer.from_pretrained(ROOT / "tiny")
    t.chat_template = "{{ messages[0]['content'] }}{% if mood is defined %}{{ mood }}{% endif %}"
    assert t.decode(prompt_ids(t, "1+1?", {"mood": "!"})) == "1+1?!"
    t.chat_template = "{{ raise_exception('a system message is needed') }}"
    assert "its chat template fails: a system message is needed" in refusal(capsys, prompt_ids, t, "1+1?")


def test_a_base_models_prompt_has_its_beginning_and_no_end(tokenizer):
    t = AutoTokenizer.from_pretrained(ROOT / "tiny")
    t.chat_template = None
    bare = prompt_ids(t, "1+1?")
    ends = [("<|end|>", 257), ("<|user|>", t.convert_tokens_to_ids("<|user|>"))]
    t.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=ends
    )
    assert prompt_ids(t, "1+1?") == [ends[1][1], *bare]


def test_python_only_tokenizers_and_adapters_are_refused(tmp_path, capsys):
    ByT5Tokenizer().save_pretrained(tmp_path / "byt5")
    (tmp_path / "byt5" / "config.json").write_text('{"model_type": "llama"}')
    assert "Python only" in refusal(capsys, load_tokenizer, str(tmp_path / "byt5"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "is an adapter" in refusal(capsys, load_tokenizer, str(tmp_path / "adapter"))


def test_weights_that_are_nan_end_a_run_before_and_while_it_samples(tokenizer, prompts, capsys):
    model = load_model("tiny", "cpu")
    engine = TransformersEngine(model)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight[3, 5] = math.nan
    for temperature in (0.0, 1.0):
        sampler = Sampler(engine, tokenizer)
        assert "not finite" in refusal(capsys, sampler.generate, prompts[:2], 3, [(0,), (1,)], 1, temperature)
    assert "not finite" in refusal(capsys, ways_of, model)


def test_a_setting_given_twice_is_refused(tmp_path, capsys):
    for lines in ("steps: 1\nlr: 1e-4\nsteps: 7\n", "group-size: 2\ngroup_size: 8\n"):
        (tmp_path / "c.yaml").write_text(lines)
        assert "is set twice" in refusal(capsys, flags.read_config, tmp_path / "c.yaml")


def test_a_folder_has_one_owner_and_a_killed_one_leaves_it(tmp_path, capsys):
    code = (
        f"import sys, time; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; sys.argv[0] = {sys.argv[0]!r}\n"
        f"from pathlib import Path; from conftest import run_settings; from run.folder import open_run\n"
        f"open_run(run_settings(Path({str(tmp_path / 'run')!r})), {{}}); print('open', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout and other.stdout.readline() == "open\n"
    for resume, overwrite in ((True, False), (False, True)):
        error = refusal(capsys, open_run, run_settings(tmp_path / "run", resume, overwrite), {})
        assert "another process is writing there" in error
    other.kill()
    other.wait()
    open_run(run_settings(tmp_path / "run", resume=True), {})


@pytest.mark.parametrize("damage", ["training.pt", "model.safetensors", "missing"])
def test_only_the_newest_checkpoint_stays_and_a_cut_one_is_named(tmp_path, tokenizer, damage, capsys):
    model = load_model("tiny", "cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        training.save_checkpoint(tmp_path, model, tokenizer, optimizer, {"step": step})
    newest = tmp_path / "checkpoints" / "step_000002"
    assert [newest] == list(newest.parent.iterdir())
    assert training.load_checkpoint(newest, model, optimizer) == {"step": 2}
    if damage == "missing":
        (newest / "training.pt").unlink()
    else:
        os.truncate(newest / damage, 5000)
    line = refusal(capsys, training.load_checkpoint, newest, model, optimizer)
    assert f"{newest} cannot be read (" in line and "--overwrite" in line


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_both_signals_finish_the_step_and_write_a_checkpoint(tmp_path, number, code):
    command = [sys.executable, "rl_mrt.py", "--engine", "transformers", "--bonus", "0", "--eval-every", "0", "--steps"]
    more = ["200", "--problems-per-step", "2", "--group-size", "2", "--max-tokens", "60", "--out", str(tmp_path / "k")]
    run = subprocess.Popen(command + more, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines, began = tmp_path / "k" / "metrics.jsonl", time.time()
    while not (lines.exists() and lines.read_text().count("\n") > 1) and time.time() - began < 60:
        time.sleep(0.1)
    run.send_signal(number)
    out, error = run.communicate(timeout=60)
    assert run.returncode == code and not error and "--resume" in out.splitlines()[-1]
    done = len(lines.read_text().splitlines())
    assert json.loads((tmp_path / "k" / "config.json").read_text())
    assert (tmp_path / "k" / "checkpoints" / f"step_{done:06d}").exists()


def test_positions_that_move_are_told(capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    sizes = dict(vocab_size=704, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=20, rope_parameters=rope)).eval()
    ways_of(model)
    assert "beyond 20 tokens its positions depend" in capsys.readouterr().out
