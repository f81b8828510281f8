r"""Rules for answers that stand for many: progressions, formulas with parameters, antiderivatives."""

import re
from itertools import permutations
from typing import Any

import sympy

from grading.box import T
from grading.forms import NAME, OR, RELATION, Same, enclosed, items, numbers_of, plain, remark, sides, split, squeeze
from grading.values import same_value, value

MODULO = rf"\\?(?<![a-z])[pb]?mod{T}"


def progressions(text: str) -> tuple[set[str], list[tuple[Any, Any]], bool]:
    r"""({"n"}, [(4, 1), (4, 3)], True) of n\equiv1,3\pmod4, "n mod 4 = 1 or 3" and n=4k\pm1, k\in\mathbb{Z}: names, the
    period and a member of each, and does it say that all its members are meant? Any exception if it is none."""
    head, said = remark(re.sub(rf"^(\w) ?{MODULO} ?\{{?(\w+)\}}? ?= ?(.+)$", r"\1=\3\\pmod \2", plain(text)))
    some = RELATION.search(re.sub(r"\\in ?\\mathbb ?\{? ?Z", "", said))
    if some or numbers_of(said) not in ("", "Z"):
        raise ValueError("of other numbers, or of some of them")
    names, found = set(), []
    for way in split(head, OR):
        body, modulo, modulus = re.sub(MODULO, "@", way).partition("@")
        *named, last = re.split(rf"=|\\equiv{T}", body.strip() if not modulo else body.rstrip(" (,"))
        names.update(map(squeeze, named))
        for item in items(last.strip())[1]:
            member, period = value(item.split("=")[-1].strip(" ,")), value(modulus.strip("(){} "))
            if not modulo:
                (symbol,) = member.free_symbols
                if str(symbol) in names:
                    raise ValueError("an equation for its own unknown")
                member, period = member.subs(symbol, 0), member.diff(symbol)
            found.append((abs(period), member))
    return names, found, numbers_of(said) == "Z" or bool(re.search(MODULO, head))


def families(gold: str, answer: str, same: Same) -> bool:
    r"""x=10n-1 and "x=9 mod 10" for x=10k+9, k\in\mathbb{Z}: the same numbers, however they are counted."""
    (names, ours, whole), (others, theirs, said) = map(progressions, (gold, answer))
    if not whole or (re.search(MODULO, gold) and not said) or (names and others and names != others):
        return False
    ratios = [period / ours[0][0] for period, _ in ours + theirs]
    most = sympy.Rational(sympy.ilcm(*(ratio.p for ratio in ratios)), sympy.igcd(*(ratio.q for ratio in ratios)))
    if most > 60 * min(ratios):
        return False
    common = most * ours[0][0]
    of_ours, of_theirs = (
        {sympy.simplify((member + n * period) / common) % 1 for period, member in found for n in range(common / period)}
        for found in (ours, theirs)
    )
    return of_ours == of_theirs and all(place.is_Rational for place in of_ours)


_SYMBOL = re.compile(r"\\text ?\{[^{}]*\}|[a-zA-Z]{4,}|\\[a-zA-Z]+|([a-zA-Z](?:_ ?\{?\d\}?)?)")
_DECLARED = re.compile(
    r"^\w(?:'+|\^ ?\{-1\}|_\w(?=\())? ?(?:\(|_\{?) ?([a-z])(?= ?[)}]? ?=)"  # f(x)=, f^{-1}(x)=, a_n=
    r"|\\(?:sum|prod) ?_ ?\{ ?([a-z]) ?=|(?<=[,:|( ])([a-zA-Z])(?= ?(?:\\in(?![a-z])|is an?\b))(?<!^.)"
    r"|(?:constant|integer|real|any|some|all) ([a-zA-Z])\b"
)
_CONSTANT = re.compile(  # y=Ce^x, c_1x, y=A\cos x, but not AC or \sin C
    r"(?<![A-Za-z\\])(?<!\\(?:sin|cos|tan) )"
    r"(C(?:_ ?\{?\d\}?)?|c_ ?\{?\d\}?|(?:(?<=[=+(] )|(?<=[=+(]))[ABDK](?=[a-z\\]))(?![A-Z(]| ?=)"
)
_USUAL, _VARIABLES = re.compile("[a-dkA-DK]"), {*"xytuz", r"\theta"}  # letters of constants, of what they stand beside


def symbols(text: str) -> dict[str, None]:
    """The letters of a formula, with their indices, in order."""
    return dict.fromkeys(name for name in _SYMBOL.findall(text) if name and name not in "eiE")


def parameters(gold: str, answer: str, same: Same) -> bool:
    r"""f(t)=3t for f(x)=3x, n\pi for k\pi, k\in\mathbb{Z}, y=Ae^x+B for y=C_1e^x+C_2: their names do not matter."""
    ours, theirs = symbols(remark(gold)[0]), symbols(sides(remark(answer)[0])[-1])
    bound, declared = ({x for match in _DECLARED.findall(plain(text)) for x in match if x} for text in (gold, answer))
    if not bound and declared:
        usual = "[cks-u]" if enclosed(gold)[0] == "()" else "[cCkK]"
        bound = {x for x in ours if x not in theirs and re.match(usual, x)}
    elif not bound and all(_USUAL.match(x) for x in theirs if x not in ours):
        constants = {*_CONSTANT.findall(gold)}
        bound = constants if set() < {*ours} - constants <= _VARIABLES else bound
    argument, other = ((found := _DECLARED.match(text)) and found[1] for text in (gold, answer))
    bound = bound if other else bound - {argument}  # f(t)=3t is f(x)=3x, 3t is not
    old, new = [x for x in ours if x in bound], [x for x in theirs if x not in ours or x in bound]
    if not 0 < len(old) == len(new) < 4:
        return False
    ways = [dict(zip(old, order)) for order in permutations(new)]
    return any(same(_SYMBOL.sub(lambda m, way=way: way.get(m[1], m[0]), gold), answer) for way in ways)


def antiderivatives(gold: str, answer: str, same: Same) -> bool:
    r"""-\frac12\cos^2x+C for \frac12\sin^2x+C: they differ by a constant."""
    (*names, g), (*others, a) = sides(gold), sides(answer)
    heads = [re.fullmatch(r"(.*[^ ]) ?\+ ?[cC](?:_ ?\{?\d\}?)?", text) for text in (g, a)]
    fits = all(heads) and all(map(NAME.fullmatch, names + others)) and (names == others or not (names and others))
    if not fits or r"\int" in a:
        return False
    f, h = (value(head[1]).doit() for head in heads if head)
    (x,) = f.free_symbols | h.free_symbols  # of one variable: the c of ax+c is given
    return str(x) in _VARIABLES and same_value(f.diff(x), h.diff(x))
