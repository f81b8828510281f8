"""What the rules see of a cleaned text (brackets, items, numbers), and the rules for lists, systems, equations, sets.

A rule gets gold, answer and `same`, which asks about parts of them.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from grading.box import TEXT, T, W
from grading.values import same as same_values
from grading.values import value

Same = Callable[[str, str], bool]  # what a rule asks about parts: is the second the answer if the first is the gold?
MAX_DEPTH = 40  # of brackets in brackets
OR, AND = (rf"\\text ?\{{[, ]?(?:{w})[, ]?\}}|{W}(?:{w}){T}" for w in ("or|oder|ou|или|或者?", "and|et|und|и|和"))
SYMBOL = r"(?:\\(?:mathbb|vec|hat|bar) ?\{?[a-zA-Z]\}?|\\[a-zA-Z]+|[a-zA-Z])(?:_(?:\w|\{\w+\}))?'{0,3}"
NAME = re.compile(  # what may stand before "=": x, f(x), (x,y), AB, |AB|, \angle ABC, [ABC], \text{Area}, V_1:V_2, \frac{AB}{CD}  # noqa: E501
    rf"{SYMBOL} ?(?:\([\w, ]*\)|\[[A-Z]\])?|\( ?{SYMBOL}(?: ?, ?{SYMBOL})+ ?\)|\|?[A-Z](?: ?[A-Z]){{1,3}}\|?"
    rf"|\\(?:angle|bar|triangle) ?\{{?[A-Z_0-9 ]+\}}?|\\text ?\{{[^{{}}]*\}}|[A-Z][a-z]{{2,}}|\[[A-Z]{{3,5}}\]"
    rf"|\\frac\{{ ?[A-Z]{{1,2}} ?\}}\{{ ?[A-Z]{{1,2}} ?\}}|{SYMBOL} ?: ?{SYMBOL}"
)
RELATION = re.compile(r"\\(?:[lgn]e|in)(?![a-z])|[<>]")
_BRACKET = r"\\?[{(\[]|\\?[})\]]|\\[lr]angle"
_DIGITS = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"([-+]?) ?(?:([0-9]+) )?([-+]? ?{_DIGITS})(?:(?:[eE]| ?\\(?:times|cdot) ?\{{?10\}}? ?\^) ?\{{? ?([-+]?[0-9]{{1,3}}) ?\}}?)?"  # noqa: E501
    rf"(?: ?/ ?([-+]? ?{_DIGITS}))?"
)
_FRAC = re.compile(rf"\\frac ?\{{ ?([-+]? ?{_DIGITS}) ?\}} ?\{{ ?([-+]? ?{_DIGITS}) ?\}}")
_BROKEN = re.compile(
    r"[-+*/^_=<>]$|\^ ?\^|\\frac ?\{[^{}]{0,99}\} ?(?:\{ ?0 ?\}|$)|/ ?0(?![0-9.])"
    r"|(?<![_^0-9.{])(?<!frac )(?<!frac)[0-9][0-9.]{0,99} [0-9](?![0-9]{0,99}/[0-9])"
)
_SIGNS = re.compile(r"\\[pm][pm](?![a-z])")
_GROUP = re.compile(r"[0-9],[0-9]{3}")
_GROUPS = re.compile(r"[(\[{]|[)\]}]|(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])")


def split(text: str, pattern: str) -> list[str]:
    """Parts between the matches of `pattern` outside all brackets, without empty ones."""
    parts, start, depth = [], 0, 0
    for token in re.finditer(rf"(?P<cut>{pattern})|{_BRACKET}", text):
        if token["cut"] is None:
            depth += 1 if token[0][-1] in "{([" or token[0] == r"\langle" else -1
        elif depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [part for part in [*parts, text[start:].strip()] if part]


def enclosed(text: str) -> tuple[str, str]:
    r"""("(]", "0,1") for "(0,1]", ("\{\}", ...) for a set: one pair of brackets around all of the text; ("", text)."""
    depth, opening = 0, ""
    for token in re.finditer(_BRACKET, text):
        if depth == 0 and token.start():
            break
        opening = opening or token[0]
        depth += 1 if token[0][-1] in "{([" or token[0] == r"\langle" else -1
        if depth == 0 and token.end() == len(text):
            return (opening + token[0]).replace(r"\langle\rangle", "()"), text[len(opening) : token.start()].strip()
    return "", text


def bare(text: str) -> str:
    """Without outer braces, a plus, a final stop, and commas between thousands outside brackets: 1000 of "{1,000}."."""
    text = re.sub(r"^\+ ?(?=[\w\\])", "", text.strip(" ").rstrip(".,;: ")).removesuffix("\\").strip()
    while (whole := enclosed(text))[0] == "{}":
        text = whole[1].rstrip(".,; ")
    depth = 0

    def joined(match: re.Match) -> str:
        nonlocal depth
        depth += (match[0] in "([{") - (match[0] in ")]}")
        return match[0] if depth > 0 else match[0].replace(",", "")

    return _GROUPS.sub(joined, text) if "," in text else text


@lru_cache(maxsize=20_000)
def plain(text: str) -> str:
    """Without the braces of its texts."""
    return " ".join(re.sub(TEXT, r" \1 ", text).split()) if r"\text" in text else text


def squeeze(text: str) -> str:
    """Without the spaces that separate nothing."""
    return re.sub(r"(?<!\w) | (?!\w)", "", text)


@lru_cache(maxsize=20_000)
def number(text: str) -> Fraction | None:
    """Exact value of an integer, decimal, power-of-ten decimal, fraction or mixed number."""
    match = _NUMBER.fullmatch(_FRAC.sub(r" \1/\2", text).strip()) if len(text) < 4000 else None
    if not match:
        return None
    sign, whole, top, exponent, bottom = (part and part.replace(" ", "") for part in match.groups())
    number = Fraction(top) * Fraction(10) ** int(exponent or 0) / (Fraction(bottom or 1) or 1)
    if whole is not None:
        if bottom is None or not (top + bottom).isdigit() or number >= 1:
            return None  # two numbers in a row, or a product
        number += int(whole)
    return -number if sign == "-" else number


def worth(text: str) -> Any:
    """The value of one thing: exactly of a number, else as math-verify's parser reads it."""
    exact = number(text)
    return value(text) if exact is None else sympy.Rational(exact.numerator, exact.denominator)


def hopeless(text: str) -> bool:
    """Empty, broken off, unbalanced, too deep, divided by zero, two numbers side by side, NaN."""
    depth = deepest = 0
    for sign in (unescaped := re.sub(r"\\[{}]", "", text)):
        depth += (sign in "({[") - (sign in ")}]")
        deepest = max(deepest, depth)
    if depth or deepest > MAX_DEPTH or unescaped.count("{") != unescaped.count("}") or text in ("NaN", "None", "null"):
        return True
    return not re.search(r"\w|\\", text) or bool(_BROKEN.search(re.sub(TEXT, r"\\text{}", text)))


@lru_cache(maxsize=20_000)
def items(text: str) -> tuple[str, list[str]]:
    r"""Brackets and items of a list: ("()", ["1", "2"]) of "(1,2)"; ("", ...) of "1, 2", ("or", ...) of "1 or 2", 1 \pm 2."""  # noqa: E501
    brackets, inside = enclosed(text)
    if brackets in ("()", r"\{\}", "[]"):
        spaced = split(inside, r"[,;] |;") if _GROUP.search(inside) else []  # (1,000, 2,000)
        parts = spaced if len(spaced) > 1 else split(inside, "[,;]")
        flat = [item for part in parts for item in (items(part)[1] if _SIGNS.search(part) else [part])]
        return (brackets, flat) if len(flat) > 1 or brackets == r"\{\}" else ("", [text])
    for separator in (OR, AND, ";", ", ", ","):
        if len(parts := [part.strip(" ,") for part in split(text, separator)]) > 1:
            systems = separator in (OR, ";") or all("=" in part and "," in part for part in parts)
            each = [[part] if (systems and "=" in part) or enclosed(part)[0] else items(part)[1] for part in parts]
            return "or" if separator == OR else "", [item for part in each for item in part]
    if len(_SIGNS.findall(text)) == 1:
        return "or", [_SIGNS.sub(sign, text).removeprefix("+").strip() for sign in "+-"]
    return "", [text]


# ================================================================================================== rules


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
    single = [parts for name, parts in ((kind, golds), (other, answers)) if name == r"\{\}"]
    if len(single) == 1 and len(single[0]) == 1:  # 5 for \{5\}
        one, two = (golds[0], answer) if kind == r"\{\}" else (gold, answers[0])
        return r"\emptyset" not in one + two and enclosed(one)[0] == enclosed(two)[0] and same(one, two)
    if max(len(golds), len(answers)) < 2 and kinds != {r"\{\}"}:
        return False
    if ordered := kinds & {"()", "[]"}:
        loose = ordered == {"()"} or len(kinds) == 1 or len(golds) > 2  # "1,2" is no interval
        fits = len(ordered) == 1 and kinds <= {*ordered, ""} and loose
        return fits and len(golds) == len(answers) and all(map(same, golds, answers))
    if all("=" in i and "," not in i for i in golds) != all("=" in i and "," not in i for i in answers):
        return False  # names decide the order
    if kinds == {"", "or"} and any(RELATION.search(i) or re.fullmatch(r"\(?[A-J]\)?", i) for i in golds + answers):
        return False  # "x>1 or x<3" is not "x>1, x<3"
    if r"\{\}" in kinds or all(enclosed(item)[0] for item in golds + answers):  # a set knows each item once
        found = all(any(same(g, a) for a in answers) for g in golds)
        return found and all(any(same(g, a) for g in golds) for a in answers)
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
    if not names or len({len(each) == 1 for each in names}) > 1 or (g and a and names[0] != names[1]):
        return False
    values = [[part for _, part in pairs] for pairs in (g, a)]
    if len(names[0]) == 1:
        one, two = (" or ".join(each) if each else text for each, text in zip(values, (gold, answer)))
        return ("=" not in one + two or bool(g and a)) and same(one, two)
    if g and a:
        return len(g) == len(a) == len(names[0]) and all(same(dict(g)[name], part) for name, part in a)
    brackets, entries = items(unnamed := answer if g else gold)
    if brackets not in ("", "()") or "=" in unnamed or not len(entries) == len(g or a) == len(names[0]):
        return False
    if a and not brackets:
        return matched(entries, values[1], same)
    return all(map(same, values[0], entries) if g else map(same, entries, dict(sorted(a)).values()))


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
            return not RELATION.search(answer) and not re.search(r"=|\\equiv", answer) and same(golds[-1], answer)
        return squeeze(golds[0]) == squeeze(answers[0]) and same(golds[-1], answers[-1])
    if len(answers) > 1 and re.fullmatch("[a-z]", answers[-1]) and not NAME.fullmatch(answers[0]):
        answers = answers[::-1]  # 5 = x
    *left, last = answers
    if not left or NAME.fullmatch(left[0]):
        return bool(left) and same(gold, last)
    if len(left) == 1 and number(last) == 0 and letters(left[0]):
        return False
    if any(re.search(r"[a-zA-Z]{2} ", re.sub(r"\\[a-zA-Z]+", "", plain(side))) for side in left):
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
