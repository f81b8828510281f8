"""tiny/problems.py: the problems of the embedded reasoner. `python -m tiny.problems` writes problems.jsonl.gz, the data
set that `--dataset tiny` and `tiny:10`, `tiny:20`, `tiny:30` (candidates) name.

    Find x between 1 and 20 such that x² + 17 ≡ 5 (mod 61).

Checking a candidate is easy and guessing is hard. Difficulty is the number of candidates.
"""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

FILE = Path(__file__).resolve().parent / "problems.jsonl.gz"
PRIME = 61  # 1²…30² are different modulo 61, so every problem has exactly one solution
LEVELS = (10, 20, 30)  # difficulty: the number of candidates
SPLITS = {"train": 0.6, "validation": 0.15, "test": 0.25}


def equations(split: str) -> list[tuple[int, int]]:
    """The equations (b, x) of a split, in a fixed shuffled order. An equation belongs to one split whatever the
    difficulty, so the splits are disjoint by construction."""
    pairs = [(b, x) for b in range(PRIME) for x in range(1, 31)]
    random.Random(PRIME).shuffle(pairs)
    start = round(sum(list(SPLITS.values())[: list(SPLITS).index(split)]) * len(pairs))
    return pairs[start : start + round(SPLITS[split] * len(pairs))]


def pose(b: int, x: int, n: int, split: str) -> dict:
    return {
        "problem": f"Find x between 1 and {n} such that x² + {b} ≡ {(x * x + b) % PRIME} (mod {PRIME}).",
        "answer": str(x),
        "id": f"tiny-{split}-{n}-{b}-{x}",
        "level": n,
    }


def problems(split: str, levels: tuple[int, ...] = LEVELS) -> list[dict]:
    """The problems of a split, in a fixed order: `{problem, answer, id, level}`.

    An equation is used at most once, at one level, so problems are independent. Levels take turns, so the first n
    hold them in equal shares; within a level the solution is uniform, since level n is drawn with weight 1/n.
    """
    rng = random.Random(split)
    rows: dict[int, list[dict]] = {n: [] for n in levels}
    for b, x in equations(split):
        n = rng.choices(levels, [1 / n for n in levels])[0]
        if x <= n:
            rows[n].append(pose(b, x, n, split))
    return [rows[n][i] for i in range(min(map(len, rows.values()))) for n in levels]


def rows(problems: Callable, levels: tuple[int, ...]) -> list[dict]:
    """Every problem once, with its split and its place in each subset that has it: `mixed`, which the name of the data
    set alone means, and one per level."""
    by_id: dict[str, dict] = {}
    for split in SPLITS:
        for subset, chosen in (("mixed", levels), *((str(n), (n,)) for n in levels)):
            for place, problem in enumerate(problems(split, chosen)):
                row = by_id.setdefault(problem["id"], {**problem, "split": split, "place": {}})
                row["place"][subset] = place
    return list(by_id.values())


def write(file: Path, problems: Callable, levels: tuple[int, ...]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(problems, levels))
    file.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{file}: {text.count(chr(10))} problems, {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    write(FILE, problems, LEVELS)
