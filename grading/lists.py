"""Rules for lists, systems, equations and sets. A rule gets gold, answer and `same`, which asks about parts of them."""

import re
from functools import lru_cache
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from grading.box import TEXT
from grading.texts import AND, NAME, OR, RELATION, Same, enclosed, items, number, plain, split, squeeze, worth
from grading.values import same as same_values


def matched(golds: list[str], answers: list[str], same: Same) -> bool:
    """Each item of one is an item of the other, as often as there."""
    rest = list(answers)
    for item in golds:
        if (found := next((other for other in rest if same(item, other)), None)) is None:
            return False
        rest.remove(found)
    return not rest


def lists(gold: str, answer: str, same: Same) -> bool:
    r"""(1,2) for 1,2 in this order, \{2,1\} and "2 or 1" for 1,2 in any; 2,2,3 is not 2,3,3, but \{1,1,2\} is \{1,2\}."""  # noqa: E501
    (kind, golds), (other, answers) = items(gold), items(answer)
    kinds = {kind, other}
    if (kinds != {r"\{\}"} and r"\{\}" in kinds and len(golds) == len(answers) == 1) or (kinds == {r"\{\}", "()"} and 1 in (  # noqa: E501
        len(golds), len(answers))):  # fmt: skip
        one, two = golds[0] if kind == r"\{\}" else gold, answers[0] if other == r"\{\}" else answer
        return r"\emptyset" not in one + two and enclosed(one)[0] == enclosed(two)[0] and same(one, two)
    if max(len(golds), len(answers)) < 2 and kinds != {r"\{\}"}:
        return False
    if ordered := kinds & {"()", "[]"}:
        fits = (
            len(ordered) == 1 and kinds <= {*ordered, ""} and (ordered == {"()"} or len(kinds) == 1 or len(golds) > 2)
        )
        return fits and len(golds) == len(answers) and all(map(same, golds, answers))
    if all("=" in i and "," not in i for i in golds) != all("=" in i and "," not in i for i in answers):
        return False  # names decide the order
    if kinds == {"", "or"} and any(RELATION.search(i) or re.fullmatch(r"\(?[A-J]\)?", i) for i in golds + answers):
        return False  # "x>1 or x<3" is not "x>1, x<3"
    if r"\{\}" in kinds or all(enclosed(item)[0] for item in golds + answers):  # a set knows each item once
        return all(any(same(g, a) for a in answers) for g in golds) and all(
            any(same(g, a) for g in golds) for a in answers
        )
    return matched(golds, answers, same)


def assignments(text: str) -> list[tuple[str, str]]:
    """[("x", "3"), ("y", "5")] of "x=3 and y=5" and "(x,y)=(3,5)", [("n", "2"), ("n", "3")] of "n=2, 3"; else []."""
    pairs: list[tuple[str, str]] = []
    for part in items(text)[1] if not enclosed(text)[0] else ():
        *names, last = split(part, "=")
        if RELATION.search(part) or not (names or pairs) or not all(map(NAME.fullmatch, names)):
            return []
        for name in names or [pairs[-1][0]]:
            several = enclosed(name)[0] == "()" and len(items(name)[1]) == len(items(last)[1])
            pairs += zip(items(name)[1], items(last)[1]) if several else [(squeeze(name), last)]
    return pairs if len(pairs) > 1 else []


def assigned(gold: str, answer: str, same: Same) -> bool:
    """y=5, x=3 and (3,5) for x=3, y=5; "n=3 or n=2" and 2,3 for n=2, 3. Without names, theirs or the alphabet's order."""  # noqa: E501
    g, a = assignments(gold), assignments(answer)
    names = [{name for name, _ in pairs} for pairs in (g, a) if pairs]
    values = [[part for _, part in pairs] for pairs in (g, a)]
    if not names or len({len(each) == 1 for each in names}) > 1 or (g and a and names[0] != names[1]):
        return False
    if len(names[0]) == 1:
        one, two = (" or ".join(each) if each else text for each, text in zip(values, (gold, answer)))
        return ("=" not in one + two or bool(g and a)) and same(one, two)
    if len(g or a) != len(names[0]) or (g and a and len(g) != len(a)):
        return False
    if g and a:
        return all(same(dict(g)[name], part) for name, part in a)
    brackets, entries = items(answer if g else gold)
    if brackets not in ("", "()") or "=" in (answer if g else gold) or len(entries) != len(g or a):
        return False
    if a and not brackets:
        return matched(entries, values[1], same)
    return (
        all(map(same, values[0], entries))
        if g
        else all(map(same, entries, (dict(a)[name] for name in sorted(dict(a)))))
    )


@lru_cache(maxsize=20_000)
def sides(text: str) -> list[str]:
    """The sides of an equation or of a chain of them; the text itself if it is none."""
    return [text] if RELATION.search(text) or len(items(text)[1]) > 1 else split(text, "=")


def letters(text: str) -> set[str]:
    return set(re.findall(r"\\[a-zA-Z]+|[a-zA-Z]", re.sub(rf"{TEXT}|\\(?:frac|sqrt|pi|cdot|times)", "", text)))


def named(gold: str, answer: str, same: Same) -> bool:
    r"""x=5, m+n=108 and 2+3=5 for 5, 108 and 5; not y=5 for x=5, 4=5 for 5, x^2-1=0 for 0."""
    golds, answers = sides(gold), sides(answer)
    if len(golds) > 1:
        if not all(map(NAME.fullmatch, golds[:-1])):
            return False
        if len(answers) == 1:
            return (
                "=" not in answer
                and not RELATION.search(answer)
                and r"\equiv" not in answer
                and same(golds[-1], answer)
            )
        return squeeze(golds[0]) == squeeze(answers[0]) and same(golds[-1], answers[-1])
    if len(answers) > 1 and re.fullmatch("[a-z]", answers[-1]) and not NAME.fullmatch(answers[0]):
        answers = answers[::-1]  # 5 = x
    *left, last = answers
    if not left or NAME.fullmatch(left[0]):
        return bool(left) and same(gold, last)
    if len(left) == 1 and number(last) == 0 and letters(left[0]):
        return False
    if any(re.search(r"[a-zA-Z]{2,} ", re.sub(r"\\[a-zA-Z]+", "", plain(side))) for side in left):
        return False  # a sentence
    return same(gold, last) and all(
        (letters(side) and not letters(side) & letters(last)) or same(gold, side) for side in left
    )


def renamed_argument(gold: str, answer: str, same: Same) -> bool:
    """f(t)=3t for f(x)=3x, a_k=2^k for a_n=2^n."""
    (head, *right), (other, *other_right) = split(gold, "="), split(answer, "=")
    a, b = (re.fullmatch(r"(\w) ?(\(|_\{?) ?([a-z]) ?[)}]?", text) for text in (head, other))
    if not (a and b and len(right) == len(other_right) == 1 and a[1] == b[1] and a[2] == b[2] and a[3] != b[3]):
        return False
    return a[3] not in letters(other_right[0]) and same(right[0], renamed(other_right[0], b[3], a[3]))


def renamed(text: str, old: str, new: str) -> str:
    return re.sub(rf"\\[a-zA-Z]+|{old}", lambda m: new if m[0] == old else m[0], text)


@lru_cache(maxsize=10_000)
def solution_set(text: str) -> tuple[str, Any] | None:
    r"""("x", (1,3)) of 1<x<3, "x>1 and x<3", x\in(1,3); ("", (1,3)) of (1,3) and \{x \mid 1<x<3\}."""
    brackets, inside = enclosed(text)
    if brackets == r"\{\}" and len(parts := split(inside, r"\\mid(?![a-z])|\||:")) == 2:
        inner = solution_set(parts[1])
        return ("", inner[1]) if inner and inner[0] == re.split(r" ?\\in", parts[0])[0] else None
    for pattern, kind in ((OR, sympy.Union), (AND, sympy.Intersection), ("[,;]", None)):
        if len(parts := split(text, pattern)) > 1:
            if r"\ne" in parts[0] and not any(map(RELATION.search, parts[1:])):  # x \ne 0, 3
                parts = [parts[0], *(parts[0].split(r"\ne")[0] + r"\ne " + part for part in parts[1:])]
            sets = [found for part in parts if (found := solution_set(part))]
            names = {name for name, _ in sets} - {""}
            if len(sets) < len(parts) or len(names) > 1 or not (names or kind is sympy.Union):
                return None
            joined = (kind or sympy.Intersection)(*(found for _, found in sets))
            if kind is None and joined is sympy.S.EmptySet:  # "x<1, x>2" can only be either
                joined = sympy.Union(*(found for _, found in sets))
            return (names or {""}).pop(), joined
    read = worth(text.replace(";", ",") if brackets else text)
    if read is None or isinstance(read, sympy.Expr):
        return None
    if isinstance(read, sympy.Eq) and isinstance(read.rhs, sympy.Set):
        return str(read.lhs), read.rhs.doit()
    if isinstance(read, sympy.Set):
        return "", read.doit()
    relation: Any = read.replace(lambda e: isinstance(e, AppliedUndef), lambda e: sympy.Symbol(str(e), real=True))
    if len(free := getattr(relation, "free_symbols", ())) != 1 or not hasattr(relation, "as_set"):
        return None
    return str(*free), relation.as_set()


def sets(gold: str, answer: str, same: Same) -> bool:
    r"""1<x<3 and "x>1 and x<3" for (1,3), x\ne2 for \mathbb{R}\setminus\{2\}; another unknown is wrong."""
    if not all(re.search(r"[<>=()\[\]]|\\(?:[lgn]e|in|mathbb|emptyset|\{)", text) for text in (gold, answer)):
        return False
    a = solution_set(gold)
    b = a and solution_set(answer)
    return bool(a and b and (not a[0] or not b[0] or a[0] == b[0]) and same_values(a[1], b[1]))
