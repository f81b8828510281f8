"""Tiny random models of many architectures: engine, update and likelihood against one plain forward a sequence."""

import logging
import re

import numpy as np
import pytest
import torch
from conftest import refusal
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import rl_mrt
from engine.logprobs import token_logprobs, without_noise
from engine.models import load_model
from engine.sampler import Sampler
from engine.transformers_engine import TransformersEngine, ways_of
from run import training

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES["max_position_embeddings"] = 512
GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=512)
DEEP = dict(hidden_size=32, num_hidden_layers=2)
WINDOW = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
HEAD, EXPERTS = dict(head_dim=8), dict(num_local_experts=4)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, **HEAD)
LINEAR = dict(layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4, linear_num_key_heads=2)
LINEAR |= dict(linear_key_head_dim=8, linear_value_head_dim=8)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8, mamba_d_ssm=64)
CAPPED = dict(final_logit_softcapping=3.0, attn_logit_softcapping=5.0)
SCALED = dict(logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.3)
ROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
CONV = dict(layer_types=["conv", "full_attention"], block_ff_dim=48, block_multiple_of=16)
OPT = dict(ffn_dim=48, word_embed_proj_dim=32)
FAST, LIKE_A_STATE = ("shared", True, True), ("cached", True, False)

# name: (type, sizes or none of them, settings, (how it samples, update in batches?, likelihood shares prefixes?))
MODELS = {
    "llama": ("llama", SIZES, {}, FAST),
    "llama eager": ("llama", SIZES, dict(attn_implementation="eager"), FAST),
    "qwen2": ("qwen2", SIZES, dict(tie_word_embeddings=True), FAST),
    "qwen2 window": ("qwen2", SIZES, dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), FAST),
    "qwen3": ("qwen3", SIZES, HEAD, FAST),
    "qwen3_moe": ("qwen3_moe", SIZES, MOE, FAST),
    "olmo2": ("olmo2", SIZES, {}, FAST),
    "olmo3": ("olmo3", SIZES, WINDOW, FAST),
    "exaone4": ("exaone4", SIZES, WINDOW, FAST),
    "gemma": ("gemma", SIZES, HEAD, FAST),
    "gemma2": ("gemma2", SIZES, dict(query_pre_attn_scalar=8, **HEAD, **CAPPED, **WINDOW), FAST),
    "gemma3_text": ("gemma3_text", SIZES, dict(query_pre_attn_scalar=8, **HEAD, **WINDOW), FAST),
    "gpt2 with dropout": ("gpt2", GPT, dict(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2), FAST),
    "gpt_neox": ("gpt_neox", {k: v for k, v in SIZES.items() if "key_value" not in k}, {}, FAST),
    "mistral": ("mistral", SIZES, dict(sliding_window=8), FAST),
    "phi3": ("phi3", SIZES, dict(sliding_window=8, resid_pdrop=0.2), FAST),
    "starcoder2": ("starcoder2", SIZES, dict(sliding_window=8, residual_dropout=0.2), FAST),
    "granite": ("granite", SIZES, SCALED, FAST),
    "cohere": ("cohere", SIZES, dict(logit_scale=0.25), FAST),
    "cohere2": ("cohere2", SIZES, dict(logit_scale=0.25, **WINDOW), FAST),
    "gpt_oss": ("gpt_oss", SIZES, dict(num_experts_per_tok=2, **HEAD, **EXPERTS, **WINDOW, **ROPE), FAST),
    "mixtral with router noise": ("mixtral", SIZES, dict(router_jitter_noise=0.3, **EXPERTS), FAST),
    "falcon": ("falcon", SIZES, dict(alibi=False), FAST),
    "lfm2": ("lfm2", SIZES, CONV, LIKE_A_STATE),
    "qwen3_next": ("qwen3_next", SIZES, dict(shared_expert_intermediate_size=24, **MOE, **LINEAR), LIKE_A_STATE),
    "qwen3_5_text": ("qwen3_5_text", SIZES, HEAD | LINEAR, LIKE_A_STATE),
    "falcon_h1": ("falcon_h1", SIZES, HEAD | MAMBA, LIKE_A_STATE),
    "bloom": ("bloom", {}, dict(hidden_size=32, n_layer=2, n_head=4), LIKE_A_STATE),
    "mamba": ("mamba", {}, dict(state_size=8, **DEEP), LIKE_A_STATE),
    "rwkv": ("rwkv", {}, dict(attention_hidden_size=32, **DEEP), ("uncached", True, False)),
    "opt": ("opt", SIZES, dict(dropout=0.2, **OPT), ("cached", False, False)),
}


def build(kind: str, sizes: dict, settings: dict, tokenizer):
    """Random weights that make a wrong mask visible."""
    settings = {**sizes, **settings}
    attention = settings.pop("attn_implementation", None)
    ids = dict(eos_token_id=257, pad_token_id=256, bos_token_id=None)
    config = CONFIG_MAPPING[kind](vocab_size=len(tokenizer), **settings, **ids)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if any(part in name for part in ("embed", "wte", "wpe")):
                weights.normal_(0, 0.6)
            elif weights.ndim > 1:
                weights.normal_(0, 1.2 / weights.shape[-1] ** 0.5)
            elif "norm" in name or "ln" in name:
                weights += 0.1 * torch.randn_like(weights)
    return model


def plain(model, ids: list[int]) -> torch.Tensor:
    """Log-probs [T - 1] of each token but the first and the largest log-prob there, with a gradient."""
    tokens = torch.tensor([ids])
    output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    logprobs = output.logits[0, :-1].log_softmax(-1)
    return torch.stack([logprobs.gather(-1, tokens[0, 1:, None])[:, 0], logprobs.amax(-1)])


@pytest.mark.parametrize("name", MODELS)
def test_engine_update_and_likelihood_equal_the_plain_forward(name, tokenizer, capsys):
    kind, sizes, settings, ways = MODELS[name]
    model = build(kind, sizes, settings, tokenizer)
    sampler = Sampler(TransformersEngine(model), tokenizer)
    found = sampler.ways
    assert (found.sample, found.update == "chunks", found.score == "shared") == ways
    told = capsys.readouterr().out
    assert told.count("\n") == (0 if ways == FAST else 1) and (not told or kind in told)
    assert re.fullmatch(r"(.*takes plain paths: .*\((.*: (off by [\d.]+ nats|not possible with its code))\)\n)?", told)

    rng = np.random.default_rng(7)
    trunk = rng.integers(0, 650, 20).tolist()
    prompts = [
        trunk[:shared] + rng.integers(0, 650, own).tolist()
        for shared, own in [(0, 3), (20, 4), (12, 3), (0, 34), (6, 5), (20, 9), (0, 9)]
    ]
    limits = [9, 3, 12, 4, 5, 2, 8]
    for prompt, row in zip(prompts, sampler.generate(prompts, limits, [(i,) for i in range(7)], n=2, temperature=0)):
        for c in row:
            own, best = plain(model, prompt + c.token_ids).detach()[:, len(prompt) - 1 :]
            torch.testing.assert_close(torch.tensor(c.logprobs), own, atol=1e-3, rtol=0)
            torch.testing.assert_close(own, best, atol=1e-3, rtol=0)

    width = max(map(len, prompts))
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts])
    where = torch.tensor([[0 < i < len(p) for i in range(width)] for p in prompts])
    expected = torch.cat([plain(model, p)[0] for p in prompts])
    expected.mean().backward()
    gradient = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
    model.zero_grad()
    model.train()  # what it switches on must not show
    got, _ = token_logprobs(model, ids, where, way=found.update)
    got.mean().backward()
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
    found = {n: w.grad for n, w in model.named_parameters() if n in gradient}
    torch.testing.assert_close(found, gradient, atol=1e-3, rtol=1e-3)

    tails = [rng.integers(0, 650, 1 + i % 4).tolist() for i in range(7)]
    sums = [float(plain(model, p + t).detach()[0, len(p) - 1 :].sum()) for p, t in zip(prompts, tails)]
    np.testing.assert_allclose(sampler.score(prompts, tails), sums, atol=1e-3)


def test_a_model_that_cannot_be_used_is_refused_in_one_line(tokenizer, capsys):
    """bert is not causal, rwkv rescales its weights when it evaluates, the others' passes raise."""
    bert = build("bert", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, {}, tokenizer)
    assert refusal(capsys, ways_of, bert).startswith("error: bert")
    kind, sizes, of_rwkv, _ = MODELS["rwkv"]
    rwkv, broken = build(kind, sizes, of_rwkv, tokenizer), build("qwen2", SIZES, {}, tokenizer)
    settings, ways = rl_mrt.flags(["--dtype", "float32"]), ways_of(broken)
    line = refusal(capsys, training.prepare, settings, rwkv, ways_of(rwkv))
    assert "cannot be trained: its forward pass changes its weights" in line
    broken.get_submodule("model.layers.0").register_full_backward_hook(lambda *_: 1 / 0)
    line = refusal(capsys, training.prepare, settings, broken, ways)
    assert "cannot be trained: its backward pass fails: division" in line
    broken.register_forward_pre_hook(lambda *_: 1 / 0)
    assert "its own forward fails: division by zero" in refusal(capsys, ways_of, broken)


def test_gpt2_with_its_padding_token_at_the_end_of_a_row_says_nothing(tokenizer):
    told: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = told.append
    logging.getLogger("transformers").addHandler(handler)
    transformers_logging.get_logger("transformers.modeling_utils").warning_once.cache_clear()
    model = build("gpt2", GPT, {}, tokenizer)
    ids = torch.tensor([[5, 9, 300], [7, 8, model.config.pad_token_id]])
    token_logprobs(model, ids, ids > 7)
    logging.getLogger("transformers").removeHandler(handler)
    assert not told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_of_any_size_is_tried(dtype, tokenizer):
    """A window of 1,000 tokens, then one that one layer forgets in batches."""
    model = build("mistral", SIZES, dict(sliding_window=1000), tokenizer)

    def forget_window(_, args, options):
        mask = options["attention_mask"]
        if mask is not None and len(mask) > 1:
            options["attention_mask"] = torch.ones_like(mask).tril()
        return args, options

    assert ways_of(model, dtype, samples=False).update == "chunks"
    model.get_submodule("model.layers.0").register_forward_pre_hook(forget_window, with_kwargs=True)
    assert ways_of(model, dtype, samples=False).update == "rows" and model.config.sliding_window == 1000


def test_a_moderate_defect_shows_in_bf16():
    """The embedded model, with what one layer's attention adds 10 % too large in batches."""
    model, factor = load_model("tiny", "cpu"), 1.0
    model.get_submodule("model.layers.1.self_attn").register_forward_hook(
        lambda _module, _args, output: (output[0] * factor if len(output[0]) > 1 else output[0], *output[1:])
    )
    assert ways_of(model, torch.bfloat16, samples=False).update == "chunks"
    factor = 1.1
    assert ways_of(model, torch.bfloat16, samples=False).update == "rows"


@pytest.mark.parametrize("kind, settings", [("qwen2", {"attention_dropout": 0.3}), ("opt", {"dropout": 0.3, **OPT})])
def test_gradient_checkpointing_recomputes_layers_and_their_noise_stays_off(kind, settings, tokenizer):
    model, ids = build(kind, SIZES, settings, tokenizer), torch.randint(0, 650, (2, 12))
    where = torch.arange(12).expand(2, -1) > 0
    runs = []
    for recompute in (False, True):
        if recompute:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        calls: list[int] = []
        block = next(m for name, m in model.named_modules() if name.endswith("layers.0.self_attn"))
        hook = block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.zero_grad()
        model.train()
        logprobs, _ = token_logprobs(model, ids, where)
        logprobs.sum().backward()
        hook.remove()
        runs.append([len(calls), logprobs.detach(), [w.grad.clone() for w in model.parameters() if w.grad is not None]])
    assert runs[1][0] > runs[0][0], "layers were not computed again"
    torch.testing.assert_close(runs[0][1:], runs[1][1:])
    without_noise(model)
    with torch.no_grad():
        without_noise(model)
    assert not any(m.training for m in model.modules())
