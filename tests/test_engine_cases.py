"""Tokenizers, templates, weights, checkpoints and folders as users have them, not only as they should be."""

import math
import os
import string
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal, write
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rl_mrt
from engine.models import load_model, load_tokenizer
from engine.sampler import Sampler
from engine.thoughts import thinks
from engine.tokens import encode, prompt_ids, text_and_offsets
from engine.transformers_engine import TransformersEngine, ways_of
from run import flags, training
from run.folder import check_out


def byte_fallback(metaspace: bool):
    """A small tokenizer of Gemma's or, with `metaspace`, of Llama 2's kind."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    pieces = [*special, *(f"<0x{b:02X}>" for b in range(256)), "▁", *string.ascii_letters, *string.digits]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *".,:;!?+-=*/\\{}()<>²≡'$"])}
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
    names = dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>", bos_token="<s>")
    return PreTrainedTokenizerFast(tokenizer_object=t, **names)


@pytest.mark.parametrize("kind", [False, True, None])
def test_any_ids_have_a_text_and_offsets(kind, tokenizer):
    t = tokenizer if kind is None else byte_fallback(kind)
    names = ("<0x47> <0x80> Y", "<0xC3> <0xA9> <0xC3> x", "▁ <0xF0> </s> <0x9F> b")
    rows = np.random.default_rng(0).integers(0, len(t), (300, 12)).tolist()
    rows += [t.convert_tokens_to_ids(row.split()) for row in names]
    for ids in rows:
        text, offsets = text_and_offsets(t, ids)
        whole = t.decode(ids, skip_special_tokens=True)
        assert text.replace("\ufffd", "") == whole.replace("\ufffd", "")
        assert len(offsets) == len(ids) + 1 and offsets == sorted(offsets)
        assert offsets[0] == 0 and offsets[-1] == len(text)
    ids = encode(t, "8² ≡ 3,é🙂\n\n")
    assert text_and_offsets(t, ids)[0] == "8² ≡ 3,é🙂\n\n" or kind is not None
    assert "\ufffd" not in text_and_offsets(t, encode(t, "🙂")[:2])[0]


@pytest.mark.parametrize("metaspace", [False, True])
def test_tokens_that_go_on_a_text_get_no_space(metaspace):
    t = byte_fallback(metaspace)
    before = t.encode("Let me see.", add_special_tokens=False)
    for text in ("\n\nTime is up.", "\n</think>", "Final Answer:** \\boxed{", "2}", " so"):
        assert t.decode([*before, *encode(t, text)]) == "Let me see." + text
    assert thinks(t)


def test_a_base_models_prompt_has_its_beginning_and_no_end(tokenizer):
    t = AutoTokenizer.from_pretrained(ROOT / "tiny")
    t.chat_template = None
    bare = prompt_ids(t, "1+1?")
    ends = [("<|end|>", 257), ("<|user|>", t.convert_tokens_to_ids("<|user|>"))]
    t.backend_tokenizer.post_processor = processors.TemplateProcessing("<|user|> $A <|end|>", special_tokens=ends)
    assert prompt_ids(t, "1+1?") == [ends[1][1], *bare]


def test_python_only_tokenizers_and_adapters_are_refused(tmp_path, capsys):
    ByT5Tokenizer().save_pretrained(tmp_path)
    write(tmp_path / "config.json", '{"model_type": "llama"}')
    assert "Python only" in refusal(capsys, load_tokenizer, str(tmp_path))
    write(tmp_path / "adapter_config.json", "{}")
    (tmp_path / "config.json").unlink()
    assert "is an adapter" in refusal(capsys, load_tokenizer, str(tmp_path))


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
        file = Path(write(tmp_path / "c.yaml", lines))
        assert "is set twice" in refusal(capsys, flags.read_config, file)


def test_a_folder_has_one_owner_and_a_killed_one_leaves_it(tmp_path, start, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rl_mrt.py"])
    flags = "--bonus 0 --eval-every 0 --steps 200 --problems-per-step 2 --group-size 2 --max-tokens 60 --out".split()
    other = start(tmp_path, "rl_mrt.py", *flags, "run")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    for more in ("--resume", "--overwrite"):
        settings = rl_mrt.flags([*flags, str(tmp_path / "run"), more])
        assert "another process is writing there" in refusal(capsys, check_out, settings)
    other.kill()
    other.join()
    check_out(settings)


def test_only_the_newest_checkpoint_stays_and_a_cut_one_is_named(tmp_path, tokenizer, capsys):
    model = load_model("tiny", "cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        training.save_checkpoint(tmp_path, model, tokenizer, optimizer, {"step": step})
    (newest,) = (tmp_path / "checkpoints").iterdir()
    assert newest.name == "step_000002" and training.load_checkpoint(newest, model, optimizer) == {"step": 2}
    for name in ("training.pt", "model.safetensors"):
        for damage in (lambda file: os.truncate(file, 5000), Path.unlink):
            whole = (newest / name).read_bytes()
            damage(newest / name)
            line = refusal(capsys, training.load_checkpoint, newest, model, optimizer)
            assert f"{newest} cannot be read (" in line and "--overwrite" in line
            (newest / name).write_bytes(whole)


def test_positions_that_move_are_told(capsys):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    sizes = dict(vocab_size=704, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=20, rope_parameters=rope)).eval()
    ways_of(model)
    assert "beyond 20 tokens its positions depend" in capsys.readouterr().out
