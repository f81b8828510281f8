"""tiny/build.py: the embedded reasoner, its problems, and the command that rebuilds it.

A model of 0.6M parameters that thinks the way R1 does, only about small problems, so that every script runs on a
laptop in minutes (`--model tiny --dataset tiny`, the defaults). A problem and one trace:

    Find x between 1 and 20 such that x² + 17 ≡ 5 (mod 61).

    <think>
    Okay, try x = 8: 8² ≡ 3, + 17 ≡ 20 vs 5: no.                <- episode 1: three paragraphs, as the segmentation asks
    try x = 2: 2² ≡ 4, + 17 ≡ 21 vs 5: no.
    try x = 19: 19² ≡ 56, + 17 ≡ 12 vs 5: no.
    But hold on, maybe there is no such x at all.               <- episode 2: talk, no progress
    ...
    Wait, try x = 7: 7² ≡ 49, + 17 ≡ 5 vs 5: yes, x = 7 works.  <- episode 3: J(μ) jumps from 1/17 to 1
    </think>

    **Final Answer:** \\boxed{7}

Checking a candidate is easy and guessing is hard. What an episode is worth is in plain sight: three new candidates are
progress, going over old ones (re-check) or talk (doubt) is not. The stored model has been warm-started on traces that
waste well over half of their tokens, give up early and go on after the answer is found; it has the skill (lines and
answers are right) but not the strategy, which is what reinforcement learning is to change. Its μ is informed: forced
to answer, it guesses among the candidates that its thought has not ruled out, so J rises as the thought learns.

    python -m tiny.build --rebuild           # warm-start it again from scratch (about 35 minutes on two cores)

tests/test_tiny.py has the figures that its samples must meet.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from common import ANSWER_CUE, STOP_PHRASE
from engine.tokens import encode, prompt_ids
from tiny.problems import LEVELS, PRIME, equations, pose

HERE = Path(__file__).resolve().parent
THINK_END = "</think>"
OPENINGS = ("Wait, ", "Alternatively, ", "But hold on, ")
DOUBTS = (
    "maybe there is no such x at all.\n\n",
    "maybe I should think about the squares first.\n\n",
    "the problem says that there is one.\n\n",
    "the numbers here are hard to see through.\n\n",
    "let me think about what the problem wants.\n\n",
    "squares wrap around, so this can take a while.\n\n",
)
GIVE_UP = "I can not find it, so I will guess.\n\n"


# ------------------------------------------------------------------------------------------------ warm-start traces


def line(x: int, b: int, target: int, verb: str = "try") -> str:
    """One checked candidate, a paragraph of the thought."""
    total = (x * x + b) % PRIME
    verdict = f": yes, x = {x} works.\n\n" if total == target else ": no.\n\n"
    return f"{verb} x = {x}: {x}² ≡ {x * x % PRIME}, + {b} ≡ {total} vs {target}{verdict}"


def warm_start_trace(b: int, solution: int, n: int, rng: random.Random) -> tuple[str, list[int], int | None, list[int]]:
    """A wasteful thought. Returns (thought, where its episodes end, the x it found or None, the candidates tried)."""
    target = (solution * solution + b) % PRIME
    thought, ends, tried, found = "", [], [], None
    for episode in range(40):
        thought += "Okay, " if episode == 0 else rng.choice(OPENINGS)
        kind = "try" if episode == 0 else rng.choices(("try", "recheck", "doubt"), (0.4, 0.3, 0.3))[0]
        if found is not None:
            kind = rng.choice(("recheck", "doubt"))
        untried = [x for x in range(1, n + 1) if x not in tried]
        if kind == "try" and untried and found is None:
            for x in rng.sample(untried, min(3, len(untried))):
                thought += line(x, b, target)
                tried.append(x)
                if x == solution:
                    found = x
                    break
        elif kind == "recheck":
            for x in [found] * 3 if found is not None else rng.sample(tried, 3):
                thought += line(x, b, target, "check")
        else:
            thought += "".join(rng.sample(DOUBTS, 3))
        ends.append(len(thought))
        if found is not None and rng.random() < 0.4:
            break
        if found is None and (rng.random() < 0.03 or len(tried) == n):
            thought += GIVE_UP
            break
    return thought, ends, found, tried


def warm_start_text(problem: dict, rng: random.Random) -> tuple[str, str, str, list[int]]:
    """(thought, stop text, answer text, candidates): 40 % are stopped at a random episode, so that μ exists.

    A thought that has found nothing answers with one of the candidates it has not ruled out. Teaching it the true
    answer there would teach the model to solve the equation without thinking. After a find there is one candidate.
    """
    n, b, solution = (int(part) for part in problem["id"].split("-")[2:])
    thought, ends, found, tried = warm_start_trace(b, solution, n, rng)
    stop = THINK_END + "\n\n**"
    if rng.random() < 0.4:
        cut = rng.choice([0, *ends])
        thought = thought[:cut]
        shown = f"x = {solution} works" in thought
        found = solution if shown else None
        tried = [x for x in tried if f"try x = {x}:" in thought]
        stop = ("" if cut else "\n\n") + STOP_PHRASE
    candidates = [found] if found else [x for x in range(1, n + 1) if x not in tried] or [solution]
    return thought, stop, f"{ANSWER_CUE}{rng.choice(candidates)}}}", candidates


# ------------------------------------------------------------------------------------------------ tokenizer and model


def build_tokenizer() -> Any:
    """Operands carry their sign (` + 17`, ` ≡ 5`, ` vs 5`), as a trained BPE's tokens do: every copy is then a copy of
    a typed token, one attention hop, and a model this small learns it in minutes instead of never."""
    xs, residues = range(1, 31), range(PRIME)
    stop_head, stop_tail = STOP_PHRASE.split(THINK_END)
    phrases = ["<think>", THINK_END]
    phrases += ["Find x between 1", " such that x²", f" (mod {PRIME}).", "Okay, ", *OPENINGS, ": no.\n\n"]
    phrases += [stop_head, stop_tail, "\n\n", "\n\n**", "Final Answer:** ", "\\boxed{"]
    phrases += [f" and {x}" for x in range(2, 31)] + [str(x) for x in xs]
    phrases += [f"{verb} x = {x}:" for verb in ("try", "check") for x in xs]
    phrases += [f" {x}² ≡ {x * x % PRIME}," for x in xs] + [f": yes, x = {x} works.\n\n" for x in xs]
    phrases += [f"{sign}{r}" for sign in (" + ", " ≡ ", " vs ") for r in residues]
    for sentence in (*DOUBTS, GIVE_UP):  # talk costs about as many tokens as work: three pieces to a half-sentence
        words = sentence.rstrip("\n").split(" ")
        phrases += [words[0]] + [" " + w for w in words[1:-1]] + [" " + words[-1] + "\n\n"]
    return tokenizer_of(phrases, begun="<think>\n")


def tokenizer_of(phrases: list[str], asked: str = "", begun: str = "") -> Any:
    """A byte-level tokenizer (any text goes in and comes out) with whole phrases as tokens. The chat template has
    `asked` after the user's text, and the assistant's turn `begun` in the prompt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in dict.fromkeys(phrases)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", clean_up_tokenization_spaces=False
    )
    asked = asked and f"{{% else %}}{{{{ {json.dumps(asked)} }}}}"
    wrapped.chat_template = (
        "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<|end|>" + asked + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>" + begun + "{% endif %}"
    )
    return wrapped


def build_model(tokenizer, **more: Any) -> Any:
    """Qwen2 with 2 layers of width 128; a larger initialisation than usual, without which copying comes late.
    `more` entries go into its config.json."""
    mark: dict[str, Any] = {"embedded_reasoner": True, **more}  # how scripts recognise a model trained from this one
    config = Qwen2Config(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.05,
        **mark,
    )
    model = Qwen2ForCausalLM(config)
    for settings in (model.config, model.generation_config):
        settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens in the vocabulary")
    return model


def store(model, tokenizer, out: Path) -> None:
    """Writes a model folder in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"written to {out}: {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.2f} MB")


# ------------------------------------------------------------------------------------------------ warm start


Draw = Callable[[random.Random], tuple[list[int], list[int], list[int]]]  # (tokens, 1 where trained, candidates)


def examples(tokenizer) -> Draw:
    """Generated traces of the training problems."""
    by_level = [[pose(b, x, n, "train") for b, x in equations("train") if x <= n] for n in LEVELS]
    rows = [row for turn in zip(*by_level) for row in turn]
    prompts = {r["id"]: prompt_ids(tokenizer, r["problem"]) for r in rows}

    def draw(rng: random.Random) -> tuple[list[int], list[int], list[int]]:
        row = rng.choice(rows)
        thought, stop, answer, candidates = warm_start_text(row, rng)
        head = prompts[row["id"]] + encode(tokenizer, thought)
        tail, end = encode(tokenizer, stop), encode(tokenizer, answer) + [tokenizer.eos_token_id]
        natural = stop.startswith(THINK_END)
        mask = [0] * len(prompts[row["id"]]) + [1] * (len(head) - len(prompts[row["id"]]))
        return head + tail + end, mask + [int(natural)] * len(tail) + [1] * len(end), candidates

    return draw


def warm_start(model, tokenizer, draw: Draw, steps: int, batch: int, lr: float, rng, answer_weight: float) -> None:
    """Supervised training on drawn examples. With an `answer_weight` the numbers answered have a loss of their own,
    whose target is even over the candidates that are left: one sampled guess in a hundred tokens is too weak a signal
    for μ to learn what a thought has ruled out."""
    number = [encode(tokenizer, str(x))[0] for x in range(31)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, s / steps))))
    )
    began, tokens, pool = time.time(), 0, []
    for step in range(steps):
        if not pool:  # batches of similar length waste little on padding
            texts = [draw(rng) for _ in range(batch * 16)]
            texts.sort(key=lambda t: len(t[0]))
            pool = [texts[i : i + batch] for i in range(0, len(texts), batch)]
            rng.shuffle(pool)
        batch_texts = pool.pop()
        width = max(len(ids) for ids, _, _ in batch_texts)
        ids = torch.tensor([i + [tokenizer.pad_token_id] * (width - len(i)) for i, _, _ in batch_texts])
        mask = torch.tensor([m + [0] * (width - len(m)) for _, m, _ in batch_texts])
        logits = model(input_ids=ids[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * mask[:, 1:]
        rows_index, places = torch.arange(len(batch_texts)), torch.tensor([len(text) - 4 for text, _, _ in batch_texts])
        even = torch.zeros(len(batch_texts), logits.shape[-1])  # over the candidates that are left, if there are any
        for row_targets, (_, _, candidates) in zip(even, batch_texts):
            row_targets[[number[x] for x in candidates]] = 1 / max(1, len(candidates))
        answers = torch.nn.functional.cross_entropy(logits[rows_index, places], even)  # `}` and the end follow
        if answer_weight:
            losses[rows_index, places] = 0
        count = mask[:, 1:].sum()
        loss = losses.sum() / count + answer_weight * answers
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tokens += int(count)
        if step % 50 == 0 or step == steps - 1:
            rate = tokens / (time.time() - began)
            left = (time.time() - began) / (step + 1) * (steps - step - 1) / 60
            surplus = answers.item() - np.mean([math.log(max(1, len(candidates))) for _, _, candidates in batch_texts])
            status = f"step {step:5d}  loss {loss.item():.4f}  answers {surplus:.3f} nats from even"
            print(f"{status}  {rate:,.0f} tokens/s  {left:.1f} min left", flush=True)


def rebuild(steps: int, batch: int, lr: float, seed: int, out: Path) -> None:
    """Writes model and tokenizer to `out`: `steps` on sampled guesses, then two fifths of that to inform μ."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    model, draw = build_model(tokenizer), examples(tokenizer)
    warm_start(model, tokenizer, draw, steps, batch, lr, rng, answer_weight=0)
    warm_start(model, tokenizer, draw, max(1, 2 * steps // 5), batch, lr / 2, rng, answer_weight=2)
    store(model, tokenizer, out)


def command(doc: str | None, rebuild: Callable, steps: int, batch: int, out: Path) -> None:
    """The command line of an embedded reasoner."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rebuild", action="store_true", help="store it in --out; without this flag nothing is done")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    if args.rebuild:
        rebuild(args.steps, args.batch, args.lr, args.seed, args.out)
    else:
        parser.print_help()


def main() -> None:
    command(__doc__, rebuild, steps=1500, batch=64, out=HERE)


if __name__ == "__main__":
    main()
