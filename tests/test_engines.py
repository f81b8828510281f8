"""The contract of the engines: the same tokens, log-probs, limits and likelihoods, whichever answers; vLLM where it is
installed. What the transformers engine shares between rows. Tokenizers, templates, weights, checkpoints and folders as
users have them, not only as they should be."""

import math
import os
import string
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, keys, refusal, write
from servers import KEY, Served, VllmServe
from test_gpu import needs_vllm
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rl_mrt
from engine import transformers_engine
from engine.models import load_model, load_tokenizer
from engine.prefixes import pack_prefixes
from engine.sampler import Sampler
from engine.served_engine import ServedEngine
from engine.thoughts import thinks
from engine.tokens import encode, prompt_ids, text_and_offsets
from engine.transformers_engine import TransformersEngine, draw, ways_of
from engine.vllm_engine import VllmEngine
from run import flags, training
from run.folder import check_out

IN_VLLM = [pytest.param(name, marks=needs_vllm) for name in ("vllm", "vllm serve")]


@pytest.fixture(scope="module", params=["transformers", "served", *IN_VLLM])
def engine(request, model, tokenizer, tmp_path_factory):
    """A sampler of the embedded model, by each engine."""
    of_model = TransformersEngine(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        if "serve" in request.param:
            by_vllm = request.param == "vllm serve"
            server = VllmServe(tmp_path_factory.mktemp("vllm")) if by_vllm else Served(model, tokenizer)
            yield server.over(tokenizer)
            server.end()
            return
        vllm = request.param == "vllm"
        sampler = Sampler(VllmEngine(str(ROOT / "tiny"), torch.float32, 400, of_model) if vllm else of_model, tokenizer)
        yield sampler
        sampler.close()


@pytest.fixture(scope="module")
def uneven(tokenizer, prompts):
    """Prompts of different lengths."""
    more = encode(tokenizer, "Okay, try x = 8: 8² ≡ 3, + 17 ≡ 20 vs 5: no.\n\n")
    return [p + more[:i] for i, p in enumerate(prompts[:7])]


def test_greedy_tokens_equal_transformers_generate(engine, model, tokenizer, uneven):
    for prompt, (c,) in zip(uneven, engine.generate(uneven, 40, keys(uneven), temperature=0)):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        assert c.token_ids == expected[0, len(prompt) :].tolist()
        assert (c.text, c.offsets) == text_and_offsets(tokenizer, c.token_ids)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.0, 0.8)])
def test_log_probs_are_those_of_the_distribution_sampled_from(engine, model, uneven, temperature, top_p):
    for prompt, row in zip(uneven, engine.generate(uneven, 30, keys(uneven), 2, temperature, top_p)):
        for c in row:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + c.token_ids])).logits[0, len(prompt) - 1 : -1]
            probs = (logits.double() / temperature).softmax(-1)
            for p in probs if top_p < 1 else ():  # the long way: tokens, most likely first, until their mass is top_p
                order = p.argsort(descending=True)
                p[order[1 + int((p[order].cumsum(0) < top_p).sum()) :]] = 0
            logprobs = (probs / probs.sum(-1, keepdim=True)).log()
            expected = logprobs[torch.arange(len(c.token_ids)), torch.tensor(c.token_ids)]
            np.testing.assert_allclose(c.logprobs, expected.tolist(), atol=1e-4)


def test_a_sample_depends_on_its_seed_and_number_and_not_on_the_batch(engine, uneven, monkeypatch):
    def ids(prompts, seeds, **how):
        return [[c.token_ids for c in row] for row in engine.generate(prompts, 50, seeds, **how)]

    together = ids(uneven, keys(uneven), n=3)
    assert ids(uneven[4:5], [(0, 4)], n=3) == together[4:5]
    assert ids(uneven[4:5], [(0, 4)], n=1, first=2) == [together[4][2:]]
    monkeypatch.setattr(transformers_engine, "MAX_ROWS", 2)
    assert ids(uneven[3:6], keys(uneven)[3:6], n=3) == together[3:6]
    assert len(set(map(tuple, together[4]))) > 1 and ids(uneven[4:5], [(1, 4)], n=3) != together[4:5]


def test_each_prompt_keeps_its_own_limit_and_a_chosen_end_of_turn_is_a_token(engine, tokenizer, uneven):
    limits, reasons = [1 + 25 * i for i in range(len(uneven))], set()
    before = engine.sampled_tokens
    rows = engine.generate(uneven, limits, keys(uneven), n=2)
    for limit, row in zip(limits, rows):
        for c in row:
            reasons.add(c.finish_reason)
            assert 1 <= len(c.token_ids) == len(c.logprobs) <= limit
            ended = c.token_ids[-1] == tokenizer.eos_token_id
            assert c.finish_reason == ("stop" if ended else "length") and (ended or len(c.token_ids) == limit)
            assert tokenizer.eos_token_id not in c.token_ids[:-1]
    assert reasons == {"stop", "length"}
    assert engine.sampled_tokens - before == sum(len(c.token_ids) for row in rows for c in row)


def test_a_stop_token_ends_a_completion_and_belongs_to_it(engine, tokenizer, prompts):
    (marker,) = encode(tokenizer, "</think>")
    rows = engine.generate(prompts[:6], 200, keys(prompts[:6]), stop=[marker])
    ended = [c for (c,) in rows if c.finish_reason == "stop"]
    assert ended and all(c.token_ids[-1] == marker and c.token_ids.count(marker) == 1 for c in ended)


def test_likelihoods_equal_a_plain_forward(engine, model, uneven):
    if isinstance(engine.engine, ServedEngine):
        pytest.skip("no script asks a server for likelihoods")
    heads = [p[:k] for p in uneven for k in (3, 6, len(p))]
    tails = [[5, 6, 7, 8][: 1 + i % 4] for i in range(len(heads))]
    for head, tail, value in zip(heads, tails, engine.score(heads, tails)):
        with torch.no_grad():
            logp = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        assert value == pytest.approx(sum(float(logp[len(head) - 1 + i, t]) for i, t in enumerate(tail)), abs=1e-4)


def test_what_is_too_long_or_empty_is_refused_before_the_call_and_costs_nothing(engine, uneven):
    before = engine.sampled_tokens
    if not isinstance(engine.engine, TransformersEngine):  # there the run has checked it
        with pytest.raises(ValueError, match=r"exceed the (engine's 400|server's 4096)"):
            engine.generate([*uneven, uneven[0] * 900], 50, keys([*uneven, 0]))
    for prompts, limit in (([[]], 5), ([[1]], 0)):
        with pytest.raises(ValueError):
            engine.generate(prompts, limit, [(0,)])
    assert engine.sampled_tokens == before
    assert len(engine.generate(uneven, 5, keys(uneven))) == len(uneven)


def test_draws_follow_the_distribution():
    """A chi-square test of 20,000 draws, and no token without probability is ever drawn."""
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -1.0, 2.0, -math.inf]])
    token, _ = draw(logits.expand(20_000, -1), torch.from_numpy(np.random.default_rng(0).random(20_000)), 1.0, 1.0)
    counts, expected = torch.bincount(token, minlength=6).double(), logits[0].double().softmax(-1) * 20_000
    assert counts[0] == counts[5] == 0
    assert float(((counts - expected) ** 2 / expected)[1:5].sum()) < 16.3  # 99.9 % of χ² with 3 degrees of freedom
    for u, last in ((0.0, 1), (1 - 2**-53, 4)):
        token, logprob = draw(logits, torch.tensor([u], dtype=torch.float64), 1.0, 1.0)
        assert torch.isfinite(logprob).all() and token.item() == last


def test_shared_prefixes_are_computed_once(sampler, prompts):
    prefix = prompts[0] + list(range(300, 360))
    asked = [prefix[: len(prompts[0]) + 10 * k] + [260, 261] for k in range(2, 7)]
    sampler.generate(asked, 3, keys(asked), n=4)
    assert sampler.computed_tokens - sampler.sampled_tokens == len(prefix) + 5 * 2  # not Σ of the five prompts
    assert len(pack_prefixes(asked)) == 1


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
    if kind is None:  # its characters of several tokens are whole or absent
        assert text_and_offsets(t, encode(t, "8² ≡ 3,é漢🙂 end\n\n"))[0] == "8² ≡ 3,é漢🙂 end\n\n"
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
