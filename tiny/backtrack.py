"""tiny/backtrack.py: the embedded reasoner that backtracks (Figure 5), its problems, and the command that rebuilds it.

    Find u, 18 or else 20, 21, and v, 5 or else 3, 2, such that u² + v ≡ 10 (mod 31). The answer is 10u + v.

    Node 1: u = 18.                                            <- an attempt
    Node 2: v = 5, 18² ≡ 14, + v ≡ 19 vs 10: off by -9.
    Node 3: \\boxed{185}
    Wait, this seems off. Let's try something else.            <- the decision where to go back to
    Backtrack to beginning
    Node 1: u = 21.                                            <- another attempt
    Node 2: v = 5, 21² ≡ 7, + v ≡ 12 vs 10: off by -2.
    Node 3: \\boxed{215}
    Wait, this seems off. Let's try something else.
    Backtrack to Line 2
    Node 2: v = 3, 21² ≡ 7, + v ≡ 10 vs 10: yes.
    Node 3: \\boxed{213}

Line 2 mends a wrong v, the beginning a wrong u, Line 3 nothing; how far off it is tells which. The stored model has the
skill (its lines are right) but hardly the strategy: it goes back anywhere, tries again what has failed, gives up early
and goes on after it has found the answer. tests/test_backtrack.py has the figures that its samples must meet.

    python -m tiny.backtrack --rebuild       # problems, and the warm start from scratch (half an hour on one core)
"""

import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from engine.tokens import BOX_INSTRUCTION, encode, prompt_ids
from run.backtracking import ASKED, BEGUN, RETRY
from tiny.build import Draw, build_model, command, store, tokenizer_of, warm_start
from tiny.problems import write

PRIME, US, VS = 31, range(16, 31), range(1, 6)  # the squares of the u's are different modulo 31
LEVELS = (2, 3, 4)  # difficulty: the candidates for u, and as many for v
SIZES = {"train": 600, "validation": 150, "test": 250}  # problems of each level
FLAGS = dict(dataset="tiny/backtrack", variant="prefix", max_tokens=160, answer_tokens=24)  # defaults with this model
LIKELY = 0.6  # of the candidate named first; the others share the rest
PLACES = {1: "Backtrack to beginning\n", 2: "Backtrack to Line 2\n", 3: "Backtrack to Line 3\n"}  # by line redone


def pose(rng: random.Random, n: int) -> dict:
    """A problem with n candidates for each number and one solution."""
    while True:
        us, vs = rng.sample(US, n), rng.sample(VS, n)
        u, v = guess(us, rng), guess(vs, rng)
        target = (u * u + v) % PRIME
        if sum((a * a + b) % PRIME == target for a in us for b in vs) == 1:
            first, second = (f"{xs[0]} or else {', '.join(map(str, xs[1:]))}" for xs in (us, vs))
            text = f"Find u, {first}, and v, {second}, such that u² + v ≡ {target} (mod {PRIME})."
            return {"problem": text + " The answer is 10u + v.", "answer": str(10 * u + v), "level": n}


def guess(candidates: list[int], rng: random.Random) -> int:
    return rng.choices(candidates, [LIKELY, *[(1 - LIKELY) / (len(candidates) - 1)] * (len(candidates) - 1)])[0]


def parts(problem: dict) -> tuple[list[int], list[int], int, int, int]:
    """(candidates for u, for v, target, the right u, the right v)."""
    us, vs, rest = (list(map(int, re.findall(r"\d+", part))) for part in re.split(r" and | such ", problem["problem"]))
    return us, vs, rest[0], *divmod(int(problem["answer"]), 10)


def numbers(problem: dict) -> tuple:
    """What makes a problem the same as another, whatever order its candidates are in."""
    us, vs, target, *_ = parts(problem)
    return frozenset(us), frozenset(vs), target


@cache
def pool() -> dict[tuple, dict]:
    """The problems of all splits, no two the same, by their `numbers`."""
    rng, found = random.Random(PRIME), {}
    for name, n in ((f"{split}-{n}-{i}", n) for split in SIZES for i in range(SIZES[split]) for n in LEVELS):
        while (key := numbers(problem := pose(rng, n))) in found:
            pass
        found[key] = {**problem, "id": f"backtrack-{name}"}
    return found


def problems(split: str, levels: tuple[int, ...] = LEVELS) -> list[dict]:
    """`{problem, answer, id, level}`; levels take turns."""
    return [p for p in pool().values() if p["id"].startswith(f"backtrack-{split}-") and p["level"] in levels]


def attempt(u: int, v: int, target: int, line: int = 1) -> str:
    """The nodes of an attempt from a line on."""
    total = (u * u + v) % PRIME
    off = (target - total + PRIME // 2) % PRIME - PRIME // 2
    nodes = (
        f"Node 1: u = {u}.\n",
        f"Node 2: v = {v}, {u}² ≡ {u * u % PRIME}, + v ≡ {total} vs {target}: {f'off by {off}' if off else 'yes'}.\n",
        f"Node 3: \\boxed{{{10 * u + v}}}",
    )
    return "".join(nodes[line - 1 :])


def warm_start_trace(problem: dict, rng: random.Random, corrected: float = 0.15) -> tuple[list[str], bool]:
    """(attempts, each with the backtrack before it; does the turn end there?). After a failed attempt a share of
    `corrected` goes back to the fault and is right, as in the published pairs; the others go back anywhere and try
    anything, so that strategy is left to learn."""
    us, vs, target, right_u, right_v = parts(problem)
    u, v = guess(us, rng), guess(vs, rng)
    texts = [attempt(u, v, target)]
    while len(texts) < 12:
        found = (u, v) == (right_u, right_v)
        if rng.random() < (0.8 if found else 0.15):
            return texts, True
        if not found and rng.random() < corrected:
            line, u, v = 2 if u == right_u else 1, right_u, right_v
        else:
            line = rng.choices((1, 2, 3), (0.4, 0.35, 0.25))[0]
            u, v = guess(us, rng) if line == 1 else u, guess(vs, rng) if line < 3 else v
        texts.append(RETRY + PLACES[line] + attempt(u, v, target, line))
    return texts, False


def examples(tokenizer) -> Draw:
    """Traces of problems of no split. The loss is on what follows the first attempt, as published; in every other trace
    also on that attempt, right or wrong: to imitate only right guesses is to learn to solve it without an attempt."""

    def draw(rng: random.Random) -> tuple[list[int], list[int], list[int]]:
        while numbers(problem := pose(rng, rng.choice(LEVELS))) in pool():
            pass
        texts, ends = warm_start_trace(problem, rng)
        pieces = [prompt_ids(tokenizer, problem["problem"]), *(encode(tokenizer, text) for text in texts)]
        pieces[-1] = pieces[-1] + [tokenizer.eos_token_id] * ends
        untrained = rng.choice((1, 2))
        mask = [int(number >= untrained) for number, piece in enumerate(pieces) for _ in piece]
        return [token for piece in pieces for token in piece], mask, []

    return draw


def build_tokenizer() -> Any:
    phrases = ["Find u", " and v", " or else", " such that u² + v", f" (mod {PRIME}). The answer is 10u + v."]
    phrases += ["\n\n" + BOX_INSTRUCTION, ASKED, BEGUN, RETRY, *PLACES.values(), "Node 3: \\boxed{", "}", ": yes.\n"]
    phrases += [text for x in (*US, *VS) for text in (f", {x}", f" {x},", str(x))]
    phrases += [text for u in US for text in (f"Node 1: u = {u}.\n", f" {u}² ≡ {u * u % PRIME},")]
    phrases += [f"Node 2: v = {v}," for v in VS]
    phrases += [f": off by {d}.\n" for d in range(-(PRIME // 2), PRIME // 2 + 1) if d]
    phrases += [f"{sign}{r}" for r in range(PRIME) for sign in (" ≡ ", " + v ≡ ", " vs ")]
    return tokenizer_of(phrases, ASKED, BEGUN)


def rebuild(steps: int, batch: int, lr: float, seed: int, out: Path) -> None:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, flags={"parameterization": "backtracking", **FLAGS})
    warm_start(model, tokenizer, examples(tokenizer), steps, batch, lr, random.Random(seed), answer_weight=0)
    store(model, tokenizer, out)
    write(out / "problems.jsonl.gz", problems, LEVELS)


if __name__ == "__main__":
    command(__doc__, rebuild, steps=2000, batch=48, out=Path(__file__).resolve().parent / "backtrack")
