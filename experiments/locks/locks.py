"""experiments/locks/locks.py: two locks, a throw-away harder task for a kill test (issue 35, item 3). Not merged.

    Find x between 1 and 30 such that x² + 17 ≡ 5 (mod 61). Find y between 1 and 30 such that y² +3 ≡7 vs7 (mod 61).

    python -m experiments.locks.locks demos                  # what the demonstrations are like
    python -m experiments.locks.locks train --out runs/locks/base --steps 1200

A thought tries candidates for x until it finds it, then for y; the answer is \\boxed{(x, y)}, an ordered pair. The
demonstrations waste as those of tiny/build.py do; the warm start goes on from the embedded weights. The tokenizer is
tiny's, plus the phrases that have a y in the place of an x; their embeddings start as those of the phrases with x.
y's numbers are tokens of their own, too (` 8² ≡3, +3 ≡6 vs7` where x has ` 8² ≡ 3, + 17 ≡ 20 vs 5`): with shared ones the
model added x's summand to y's squares for 425 steps (half of its lines wrong, nothing right). The base was made in five
parts, each from the last one's checkpoint: 400 steps with shared tokens; 200 with y's own squares and summands; 100 with
targets, too; 100 + 240 with sums, too (batches of 16 from here on); there it took x's target into its first y line and
copied it from line to line. So the problem states y's target with the very token of the lines (`vs7`): 100 steps; 100 with
--number-weight 20, since a y's first line is one token in several hundred; and the last ones, weighted so, with a problem
that states y's target as a line does (`≡7 vs7`), which a head that copies from earlier lines finds: 200, then
200 more with --number-weight 3 --answer-weight 2 --give-up 0.02 --work 0.45 (right rose from .14 ± .03 to .22).
"""

import argparse
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken

from common import ANSWER_CUE, STOP_PHRASE
from engine import models
from engine.tokens import encode, prompt_ids
from tiny.build import DOUBTS, GIVE_UP, OPENINGS, THINK_END
from tiny.problems import PRIME, equations

N = 30
PLUS, SAME, VERSUS = {"x": " + ", "y": " +"}, {"x": " ≡ ", "y": " ≡"}, {"x": " vs ", "y": " vs"}


def asked(v: str, target: int) -> str:
    return f" ≡ {target}" if v == "x" else f" ≡{target} vs{target}"


def pose(first: tuple[int, int], second: tuple[int, int], split: str, place: int) -> dict:
    text = " ".join(
        f"Find {v} between 1 and {N} such that {v}²{PLUS[v]}{b}{asked(v, (s * s + b) % PRIME)} (mod {PRIME})."
        for v, (b, s) in zip("xy", (first, second))
    )
    name = f"locks-{split}-{first[0]}-{first[1]}-{second[0]}-{second[1]}"
    return {"problem": text, "answer": f"({first[1]}, {second[1]})", "id": name, "place": place}


def problems(split: str, count: int, seed: int = 0) -> list[dict]:
    """Random pairs of the equations of one split, none twice."""
    rng, pool = random.Random(f"{split}-{seed}"), equations(split)
    pairs = dict.fromkeys((rng.choice(pool), rng.choice(pool)) for _ in range(2 * count))
    return [pose(*pair, split, place) for place, pair in enumerate(list(pairs)[:count])]


def line(v: str, x: int, b: int, target: int, verb: str = "try") -> str:
    total = (x * x + b) % PRIME
    verdict = f": yes, {v} = {x} works.\n\n" if total == target else ": no.\n\n"
    return f"{verb} {v} = {x}: {x}²{SAME[v]}{x * x % PRIME},{PLUS[v]}{b}{SAME[v]}{total}{VERSUS[v]}{target}{verdict}"


def demonstration(locks: list[tuple[int, int]], rng: random.Random, give_up=0.03, work=(0.4, 0.3, 0.3)):
    """tiny/build.warm_start_trace over two locks: (thought, where its episodes end)."""
    thought, ends, at = "", [], 0
    tried: list[list[int]] = [[], []]
    targets = [(s * s + b) % PRIME for b, s in locks]
    for episode in range(80):
        thought += "Okay, " if episode == 0 else rng.choice(OPENINGS)
        kind = "try" if episode == 0 else rng.choices(("try", "recheck", "doubt"), work)[0]
        if at == 2:
            kind = rng.choice(("recheck", "doubt"))
        if kind == "try":
            (b, s), v = locks[at], "xy"[at]
            untried = [x for x in range(1, N + 1) if x not in tried[at]]
            for x in rng.sample(untried, min(3, len(untried))):
                thought += line(v, x, b, targets[at])
                tried[at].append(x)
                if x == s:
                    at += 1
                    break
        elif kind == "recheck":  # what the lock at hand has tried, or what was found last
            if at == 2 or (at == 1 and not tried[1]):
                again, lock = [locks[at - 1][1]] * 3, at - 1
            else:
                again, lock = rng.sample(tried[at], min(3, len(tried[at]))), at
            for x in again:
                thought += line("xy"[lock], x, locks[lock][0], targets[lock], "check")
        else:
            thought += "".join(rng.sample(DOUBTS, 3))
        ends.append(len(thought))
        if at == 2 and rng.random() < 0.4:
            break
        if at < 2 and rng.random() < give_up:
            thought += GIVE_UP
            break
    return thought, ends


def left(thought: str, v: str, solution: int) -> list[int]:
    """The candidates that a thought has not ruled out."""
    if f"{v} = {solution} works" in thought:
        return [solution]
    return [x for x in range(1, N + 1) if f"try {v} = {x}:" not in thought] or [solution]


def locks_of(problem: dict) -> list[tuple[int, int]]:
    b, x, c, y = map(int, problem["id"].split("-")[2:])
    return [(b, x), (c, y)]


def example_text(locks, rng: random.Random, **how):
    """(thought, stop text, answer text, candidates of x and of y), as tiny/build.warm_start_text."""
    thought, ends = demonstration(locks, rng, **how)
    stop = THINK_END + "\n\n**"
    if rng.random() < 0.4:
        cut = rng.choice([0, *ends])
        thought, stop = thought[:cut], ("" if cut else "\n\n") + STOP_PHRASE
    candidates = [left(thought, v, s) for v, (_, s) in zip("xy", locks)]
    x, y = map(rng.choice, candidates)
    return thought, stop, f"{ANSWER_CUE}({x}, {y})}}", candidates


def with_y():
    """(tokenizer, model): tiny's, with phrases for y that start as those for x."""
    tokenizer, model = models.load_tokenizer("tiny"), models.load_model("tiny", "cpu")
    like = {" Find y between 1": "Find x between 1", " such that y²": " such that x²"}
    for x in range(1, N + 1):
        like |= {f"{verb} y = {x}:": f"{verb} x = {x}:" for verb in ("try", "check")}
        like |= {f": yes, y = {x} works.\n\n": f": yes, x = {x} works.\n\n", f", {x})": str(x)}
    was = tokenizer.convert_tokens_to_ids(list(like.values()))
    assert all(t < 675 for t in was) and len(tokenizer) == 675
    assert tokenizer.add_tokens([AddedToken(t, normalized=False) for t in like]) == len(like)
    model.resize_token_embeddings(math.ceil(len(tokenizer) / 64) * 64, mean_resizing=False)
    weight = model.get_input_embeddings().weight.data
    new = tokenizer.convert_tokens_to_ids(list(like))
    torch.manual_seed(0)
    weight[new] = weight[was] + 0.02 * torch.randn(len(was), weight.shape[1])
    return tokenizer, model


def typed(tokenizer, model) -> None:
    """Adds tokens for y's squares, summands and targets, which start as x's with a common shift."""
    like = {f" {x}² ≡{x * x % PRIME},": f" {x}² ≡ {x * x % PRIME}," for x in range(1, N + 1)}
    for sign in (" +", " ≡", " vs"):
        like |= {f"{sign}{b}": f"{sign} {b}" for b in range(PRIME)}
    like = {t: was for t, was in like.items() if t not in tokenizer.get_vocab()}
    was = tokenizer.convert_tokens_to_ids(list(like.values()))
    assert tokenizer.add_tokens([AddedToken(t, normalized=False) for t in like]) == len(like)
    model.resize_token_embeddings(math.ceil(len(tokenizer) / 64) * 64, mean_resizing=False)
    weight, torch_seed = model.get_input_embeddings().weight.data, torch.manual_seed(1)
    shift = torch.randn(weight.shape[1], generator=torch_seed)
    weight[tokenizer.convert_tokens_to_ids(list(like))] = weight[was] + shift / shift.norm() * weight[was].norm(dim=1).mean() / 2


def draws(tokenizer, **how):
    pool, number = equations("train"), {str(x): encode(tokenizer, str(x))[0] for x in range(1, N + 1)}

    def draw(rng):
        first, second = rng.choice(pool), rng.choice(pool)
        problem = pose(first, second, "train", 0)
        thought, stop, answer, candidates = example_text([first, second], rng, **how)
        prompt = prompt_ids(tokenizer, problem["problem"])
        body, tail = tokenizer.encode(thought, add_special_tokens=False), encode(tokenizer, stop)
        end = tokenizer.encode(answer, add_special_tokens=False) + [tokenizer.eos_token_id]
        natural = stop.startswith(THINK_END)
        mask = [0] * len(prompt) + [1] * len(body) + [int(natural)] * len(tail) + [1] * len(end)
        return prompt + body + tail + end, mask, candidates

    return draw, number


def train(args) -> None:
    """tiny/build.warm_start with two answered numbers."""
    tokenizer, model = with_y() if not args.go_on else (models.load_tokenizer(args.go_on), models.load_model(args.go_on, "cpu"))
    if args.typed:
        typed(tokenizer, model)
    rng = random.Random(args.seed)
    draw, number = draws(tokenizer, give_up=args.give_up, work=(args.work, (1 - args.work) / 2, (1 - args.work) / 2))
    pair = {x: encode(tokenizer, f", {x})")[0] for x in range(1, N + 1)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1, (s + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, s / args.steps)))),
    )
    began, pool, tokens = time.time(), [], 0
    model.train()
    kinds = {sign: torch.tensor(tokenizer.convert_tokens_to_ids([f"{sign}{r}" for r in range(PRIME)]))
             for sign in (" + ", " +", " ≡ ", " ≡", " vs ", " vs")}
    right: dict[str, float] = {}
    for step in range(args.steps):
        if not pool:
            texts = [draw(rng) for _ in range(args.batch * 16)]
            texts.sort(key=lambda t: len(t[0]))
            pool = [texts[i : i + args.batch] for i in range(0, len(texts), args.batch)]
            rng.shuffle(pool)
        texts = pool.pop()
        width = max(len(ids) for ids, _, _ in texts)
        ids = torch.tensor([i + [tokenizer.pad_token_id] * (width - len(i)) for i, _, _ in texts])
        mask = torch.tensor([m + [0] * (width - len(m)) for _, m, _ in texts])
        even = torch.zeros(2, len(texts), len(model.get_input_embeddings().weight))
        for row, (_, _, (xs, ys)) in enumerate(texts):
            even[0, row, [number[str(x)] for x in xs]] = 1 / len(xs)
            even[1, row, [pair[y] for y in ys]] = 1 / len(ys)
        rows = torch.arange(len(texts))
        places = torch.tensor([[len(t) - 5 for t, _, _ in texts], [len(t) - 4 for t, _, _ in texts]])  # ( x , y) } end
        states = model.model(input_ids=ids[:, :-1]).last_hidden_state
        where = mask[:, 1:].clone()
        where[rows, places[0]] = where[rows, places[1]] = 0
        logits = model.lm_head(states[where.bool()])
        count = int(mask[:, 1:].sum())
        losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][where.bool()], reduction="none")
        numbers = torch.isin(ids[:, 1:][where.bool()], torch.cat(list(kinds.values())))
        loss = losses.sum() / count
        guesses = [torch.nn.functional.cross_entropy(model.lm_head(states[rows, places[i]]), even[i]) for i in (0, 1)]
        total = (losses * (1 + (args.number_weight - 1) * numbers)).sum() / count + args.answer_weight * sum(guesses)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tokens += count
        with torch.no_grad():
            wanted = ids[:, 1:][where.bool()]
            hit = (logits.argmax(-1) == wanted).float()
            for name, chosen in kinds.items():
                inside = torch.isin(wanted, chosen)
                if inside.any():
                    right[name] = 0.9 * right.get(name, 0.0) + 0.1 * hit[inside].mean().item()
        if step % 25 == 0 or step == args.steps - 1:
            surplus = [guesses[i].item() - np.mean([math.log(len(t[2][i])) for t in texts]) for i in (0, 1)]
            spent = time.time() - began
            weight = 1 - 0.9 ** (step + 1)
            print("  ".join(f"{name} {value / weight:.2f}" for name, value in right.items()))
            print(f"step {step:5d}  loss {loss.item():.4f}  x {surplus[0]:.3f} y {surplus[1]:.3f} nats from even  "
                  f"{tokens / spent:,.0f} tokens/s  {spent / (step + 1) * (args.steps - step - 1) / 60:.1f} min left "
                  f"(cpu {time.process_time() / 60:.1f} min)", flush=True)
        if step % 100 == 99 or step == args.steps - 1:
            model.save_pretrained(args.out)
            tokenizer.save_pretrained(args.out)


def demos(args) -> None:
    tokenizer, _ = with_y()
    rng, draw = random.Random(1), None
    for give_up, work in ((0.03, 0.4), (0.02, 0.4), (0.03, 0.5), (0.03, 0.6)):
        found, lengths, whole = [], [], []
        for problem in problems("train", 400):
            locks = locks_of(problem)
            thought, _ = demonstration(locks, rng, give_up=give_up, work=(work, (1 - work) / 2, (1 - work) / 2))
            ids = tokenizer.encode(thought, add_special_tokens=False)
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == thought
            lengths.append(len(ids) + 7)
            whole.append(f"y = {locks[1][1]} works" in thought)
            found.append(f"x = {locks[0][1]} works" in thought)
        L, W = np.array(lengths), np.array(whole)
        shares = {cap: round(float((W & (L <= cap)).mean()), 3) for cap in (384, 512, 640, 768)}
        cut = {cap: round(float((L > cap).mean()), 3) for cap in (384, 512, 640, 768)}
        print(give_up, work, "both", W.mean(), "x", np.mean(found), "tokens", L.mean(), "right by", shares, "cut", cut)
    draw, _ = draws(tokenizer)
    ids, mask, candidates = draw(random.Random(3))
    print(tokenizer.decode(ids), tokenizer.convert_ids_to_tokens(ids)[-8:], candidates, sum(mask))
    print([len(prompt_ids(tokenizer, p["problem"])) for p in problems("test", 3)], len(tokenizer))
    print(tokenizer.tokenize(problems("test", 1)[0]["problem"]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("demos", "train"))
    parser.add_argument("--out", type=Path, default=Path("runs/locks/base"))
    parser.add_argument("--go-on", default=None)
    parser.add_argument("--typed", action="store_true")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--answer-weight", type=float, default=1.0)
    parser.add_argument("--number-weight", type=float, default=1.0, help="of what a line's numbers lose")
    parser.add_argument("--give-up", type=float, default=0.03)
    parser.add_argument("--work", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    demos(args) if args.what == "demos" else train(args)


if __name__ == "__main__":
    main()
