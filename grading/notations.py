"""Rules for other ways to write the same: ratios, points, congruences, pieces of functions, bases, binomials."""

import re
from itertools import pairwise
from typing import Any

from grading.quantities import NUMBERS, quantity
from grading.texts import NAME, RELATION, Same, enclosed, items, number, plain, split, squeeze


def ratios(gold: str, answer: str, same: Same) -> bool:
    """6:8 for 3:4; neither 4:3 nor 3/4, and no times of the day."""
    g, a = split(gold, ":"), split(answer, ":")
    if len(g) < 2 or len(g) != len(a) or re.fullmatch("[0-9]{1,2} ?: ?[0-5][0-9]", gold):
        return False
    return all(same(rf"({x})\cdot({w})", rf"({z})\cdot({y})") for (x, y), (z, w) in zip(pairwise(g), pairwise(a)))


def points(gold: str, answer: str, same: Same) -> bool:
    r"""P(1,-2,3), a column and \hat{i}-2\hat{j}+3\hat{k} for (1,-2,3)."""

    def coordinates(text: str, other: str) -> str:
        column = re.fullmatch(
            r"\\begin ?\{pmatrix\}([^&]*)\\end ?\{pmatrix\}|\\begin ?\{pmatrix\}(.*&.*)\\end ?\{pmatrix\}\^ ?\{?(?:T|\\top)\}?",  # noqa: E501
            text,
        )
        if column and (r"\\" in text) != bool(column[2]):
            return "(" + re.sub(r"\\\\|&", ", ", (column[1] or column[2]).strip().removesuffix(r"\\")) + ")"
        if re.fullmatch(r"[A-Z](?:_\w)?'? ?=? ?\([^()]*[,;][^()]*\)", text):
            return text[text.index("(") :]
        terms = re.findall(r"([-+]? ?[^-+]{0,40})\\hat ?\{? ?\\?([ijk])(?:math)? ?\}?", text)
        parts = {axis: part.replace(" ", "").removeprefix("+") for part, axis in terms}
        each = [parts.get(axis, "0") for axis in ("ijk" if "k" in parts or len(items(other)[1]) == 3 else "ij")]
        return f"({', '.join(part + '1' if part in ('', '-') else part for part in each)})" if terms else text

    g, a = coordinates(gold, answer), coordinates(answer, gold)
    return (g, a) != (gold, answer) and enclosed(g)[0] == enclosed(a)[0] == "()" and same(g, a)


def congruences(gold: str, answer: str, same: Same) -> bool:
    r"""n\equiv7\pmod5 and "n mod 5 = 2" for n\equiv2\pmod5; several residues in any order."""

    def residues(text: str) -> tuple[str, Any, str]:
        text = re.sub(r"^(\w) ?\\?[pb]?mod(?![a-z]) ?\{?(\w+)\}? ?= ?(\w+)$", r"\1\\equiv \3\\pmod \2", plain(text))
        head, _, modulus = re.sub(r"\\?\b[pb]?mod(?![a-z])", "@", re.sub(r"\\[pb]?mod(?![a-z])", "@", text)).partition(
            "@"
        )
        name, _, rest = (
            ("", "", head)
            if r"\equiv" not in head and "=" not in head
            else re.sub(r"\\equiv(?![a-z])", "=", head).partition("=")
        )
        numbers = [number(item) for item in items(rest.strip(" (,"))[1]]
        modulus = modulus.strip("(){} ")
        exact = modulus.isdigit() and int(modulus) and None not in numbers
        return name.strip(), {n % int(modulus) for n in numbers if n is not None} if exact else squeeze(rest), modulus

    g, a = residues(gold), residues(answer)
    return bool(g[2] and g[1:] == a[1:] and (not g[0] or not a[0] or g[0] == a[0]))


def pieces(gold: str, answer: str, same: Same) -> bool:
    r"""The pieces of a function, in any order: "-x if x<0, x if x\ge0" for \begin{cases}x&x\ge0\\-x&x<0\end{cases}."""

    def parts(text: str) -> list[list[str]]:
        text = re.sub(
            r"(?: if)+", " if", re.sub(r",? ?\b(?:if|for|when|where)\b,? ?", " if ", plain(text)).replace("  ", " ")
        )
        each = [part.split(" if ") for part in split(text, "[,;]")]
        return each if all(len(part) == 2 for part in each) else []

    def condition(x: str, y: str) -> bool:
        one, two = (sorted(set(re.findall(r"\\?\w+|[^\w ]", text)) - {"is", "n", "$"}) for text in (x, y))
        return (one == two and RELATION.search(x) is None) or same(x, y)

    name, _, body = gold.partition("=")
    if NAME.fullmatch(name.strip()) and answer.startswith(name):
        gold, answer = body, answer[len(name) + 1 :]
    g, a = parts(gold), parts(answer)
    return len(g) == len(a) > 1 and all(any(same(x, y) and condition(c, d) for y, d in a) for x, c in g)


def bases(gold: str, answer: str, same: Same) -> bool:
    r"""1010_{\text{two}}, "1010 in base 2", (1010)_2, 0b1010 and 1010 for 1010_2; its decimal value is another answer."""  # noqa: E501

    def digits(text: str) -> tuple[str, str] | None:
        said = re.sub(r"^0b([01]+)$", r"\1_2", re.sub(r"^0x([0-9A-Fa-f]+)$", r"\1_16", plain(text)))
        found = re.fullmatch(
            r"(-?) ?\(? ?([0-9A-Fa-f]+) ?\)? ?(?:_ ?\{? ?(\w+) ?\}?|\(?(?:in )?base ?-?(\w+)\)?)", said
        )
        base = str(NUMBERS.get(found[3] or found[4], found[3] or found[4])) if found else ""
        return (found[1] + found[2].upper().lstrip("0"), base) if found and base.isdigit() else None

    g, a = digits(gold), digits(answer)
    if a and a[1] == "10":
        return same(gold, a[0])
    return bool(g and (g == a or (a is None and g[0] == answer.lstrip("0"))))


def digit_groups(gold: str, answer: str, same: Same) -> bool:
    """1,25,000 (Indian groups) for 125000, and 3,75 (a decimal comma) for 3.75."""
    if re.fullmatch(r"[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}", answer):
        return same(gold, answer.replace(",", ""))
    one, two = sorted((gold, answer), key=lambda text: "," in text)
    return bool(re.fullmatch(r"[0-9]+\.[0-9]+", one)) and two.replace(",", ".") == one


def dimensions(gold: str, answer: str, same: Same) -> bool:
    r"""5 by 3 cm for "5 cm by 3 cm" and 5\text{ cm} \times 3\text{ cm}."""
    g, a = (split(text, r"\\text ?\{ ?by ?\}|\bby\b|\\times(?![a-z])") for text in (gold, answer))
    return len(g) == len(a) > 1 and all(map(same, g, a)) and bool(quantity(g[-1]) or quantity(a[-1]))


def dotted(text: str) -> str:
    r"""1,2,3,4 for 1,2,\ldots,4."""
    brackets, parts = items(text)
    numbers = [number(part) for part in parts if part != r"\ldots"]
    if len(parts) < 4 or parts[-2] != r"\ldots" or len(numbers) != len(parts) - 1 or None in numbers:
        return text
    first, *_, before, last = whole = [int(n) for n in numbers if n is not None and n.denominator == 1] or [0, 0, 0]
    step = whole[1] - first
    full = list(range(first, last + 1, step)) if 0 < step and last < first + 99 * step else []
    if full[: len(whole) - 1] != whole[:-1] or full[-1] != last or before == last:
        return text
    half = len(brackets) // 2
    return brackets[:half] + ", ".join(map(str, full)) + brackets[half:]


TABLE = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"^\\therefore(?![a-z])", ""),
        (r"^([a-zA-Z](?:_\w)?) ?\\approx(?![a-z])", r"\1="),  # x\approx11
        (r"^(?:\\approx(?![a-z])|(?:approximately|approx\.?|about|roughly)\b)", ""),  # \approx 2.7
        (r"[,( ]?(?:\\approx(?![a-z])|\b(?:approximately|approx\.?|about|roughly)(?![a-z]))[^()]{0,80}\)?$", ""),  # 4\pi (\approx 12.57)  # noqa: E501
        (r"(?<![a-zA-Z\\])C ?\( ?(\w+) ?, ?(\w+) ?\)|(?:\{ ?\})?[\^_] ?\{?(\w+)\}? ?C ?_ ?\{?(\w+)\}?|(?<![a-zA-Z\\])C ?_ ?\{?(\w+)\}? ?\^ ?\{?(\w+)\}?",  # noqa: E501
         lambda m: rf"\binom{{{m[1] or m[3] or m[5]}}}{{{m[2] or m[4] or m[6]}}}"),  # C(10,3), {}^{10}C_3, C_{10}^3
        (r"(?<![a-zA-Z\\])[AP] ?_ ?\{?(\w+)\}? ?\^ ?\{?(\w+)\}?|(?:\{ ?\})?[\^_] ?\{?(\w+)\}? ?P ?_ ?\{?(\w+)\}?",
         lambda m: rf"\frac{{{m[1] or m[3]}!}}{{({m[1] or m[3]}-{m[2] or m[4]})!}}"),  # A_5^2, {}^5P_2
        (r"^\\mathbb ?\{? ?R ?\}? ?(?:\^ ?\{? ?\+ ?\}?|_ ?\{? ?(?:\+|> ?0) ?\}?)$", r"(0,\\infty)"),
        (r"^\\mathbb ?\{? ?R ?\}? ?_ ?\{? ?\\ge ?0 ?\}?$", r"[0,\\infty)"),
        (r"^(?:the set of )?(?:all )?(?:the )?real(?: number)?s? ?[a-z]? (?:with|such that|where|satisfying) ?(?=.)", ""),  # noqa: E501
        (r"^(?:the set of )?(?:all )?(?:the )?real(?: number)?s$", r"\\mathbb{R}"),
        (r"^(\w) ?: ?(\w) ?\\mapsto(?![a-z])", r"\1(\2)="),  # f: x\mapsto x^2
        (r"^(\w\(\w\)) ?\\equiv(?![a-z])(?!.*mod)", r"\1="),  # f(x)\equiv0
        (r"^(.*%) ?(?:decrease|increase|off|discount|more|less)$", r"\1"),
        (r"^([0-9]+) dollars? (?:and )?([0-9]{2}) cents?$", r"\1.\2"),
        (r"^(?:at )?([0-9]{1,2})(?::([0-9]{2}))? ?([apAP])\.? ?[mM]\.?$", lambda m: rf"\text{{at {int(m[1])}:{m[2] or '00'} {m[3].lower()}m}}"),  # noqa: E501
    ]
]  # fmt: skip


def plainer(text: str) -> str:
    """What the table of readings makes of a text."""
    for pattern, new in TABLE:
        text = read.strip() if (read := pattern.sub(new, plain(text))) != plain(text) else text
    return text
