r"""Third stage: what counts as the same answer, against and beyond math-verify's verdict. Only the worker imports this.

`equal` asks for the verdict on two single things (values.py), unless a veto forbids it, and then every addition. A rule
sees two cleaned texts, and `same`, which puts the whole question about parts of them; rules do not know each other. A
reading is the simplest rule: what one text says in plainer words. docs/answers.md has the table of them.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from grading.box import TEXT, T, W, boxes, clean
from grading.values import same as same_values
from grading.values import value


MAX_DEPTH, MAX_CHARS, MAX_GOLD = 40, 300, 3000  # brackets in brackets; longer answers are wrong unless the gold is long
OR, AND = (rf"\\text ?\{{[, ]?(?:{w})[, ]?\}}|{W}(?:{w}){T}" for w in ("or|oder|ou|или|或者?", "and|et|und|и|和"))
SYMBOL = r"(?:\\(?:mathbb|vec|hat|bar) ?\{?[a-zA-Z]\}?|\\[a-zA-Z]+|[a-zA-Z])(?:_(?:\w|\{\w+\}))?'{0,3}"
NAME = re.compile(  # what may stand before "=": x, f(x), (x,y), AB, |AB|, \angle ABC, [ABC], \text{Area}, V_1:V_2, \frac{AB}{CD}
    rf"{SYMBOL} ?(?:\([\w, ]*\)|\[[A-Z]\])?|\( ?{SYMBOL}(?: ?, ?{SYMBOL})+ ?\)|\|?[A-Z](?: ?[A-Z]){{1,3}}\|?"
    rf"|\\(?:angle|bar|triangle) ?\{{?[A-Z_0-9 ]+\}}?|\\text ?\{{[^{{}}]*\}}|[A-Z][a-z]{{2,}}|\[[A-Z]{{3,5}}\]"
    rf"|\\frac\{{ ?[A-Z]{{1,2}} ?\}}\{{ ?[A-Z]{{1,2}} ?\}}|{SYMBOL} ?: ?{SYMBOL}"
)
RELATION = re.compile(r"\\(?:[lgn]e|in)(?![a-z])|[<>]")
_BRACKET = r"\\?[{(\[]|\\?[})\]]|\\[lr]angle"
_DIGITS = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"([-+]?) ?(?:([0-9]+) )?([-+]? ?{_DIGITS})(?:(?:[eE]| ?\\(?:times|cdot) ?\{{?10\}}? ?\^) ?\{{? ?([-+]?[0-9]{{1,3}}) ?\}}?)?"
    rf"(?: ?/ ?([-+]? ?{_DIGITS}))?"
)
_FRAC = re.compile(rf"\\frac ?\{{ ?([-+]? ?{_DIGITS}) ?\}} ?\{{ ?([-+]? ?{_DIGITS}) ?\}}")
_BROKEN = re.compile(
    r"[-+*/^_=<>]$|\^ ?\^|\\frac ?\{[^{}]{0,99}\} ?(?:\{ ?0 ?\}|$)|/ ?0(?![0-9.])"
    r"|(?<![_^0-9.{])(?<!frac )(?<!frac)[0-9][0-9.]{0,99} [0-9](?![0-9]{0,99}/[0-9])"
)
_GROUPS = re.compile(r"[(\[{]|[)\]}]|(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])")

# ================================================================================================== texts


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
    r"""Brackets and items of a list: ("()", ["1", "2"]) of "(1,2)"; ("", ...) of "1, 2", ("or", ...) of "1 or 2", 1 \pm 2."""
    brackets, inside = enclosed(text)
    if brackets in ("()", r"\{\}", "[]"):
        spaced = split(inside, r"[,;] |;") if re.search(r"[,;] ", inside) and re.search(r"[0-9],[0-9]{3}", inside) else []
        parts = spaced if len(spaced) > 1 else split(inside, "[,;]")
        parts = [item for part in parts for item in (items(part)[1] if re.search(r"\\[pm][pm](?![a-z])", part) else [part])]
        if len(parts) > 1 or brackets == r"\{\}":
            return brackets, parts
        return "", [text]
    for separator in (OR, AND, ";", ", ", ","):
        if len(parts := [part.strip(" ,") for part in split(text, separator)]) > 1:
            flat = [item for part in parts for item in ([part] if (separator in (OR, ";") and "=" in part) or enclosed(part)[0] else items(part)[1])]
            return "or" if separator == OR else "", flat
    if len(signs := re.findall(r"\\[pm][pm](?![a-z])", text)) == 1:
        return "or", [re.sub(r"\\[pm][pm](?![a-z])", sign, text).removeprefix("+").strip() for sign in "+-"]
    return "", [text]


# ================================================================================================== lists, names, sets


def matched(golds: list[str], answers: list[str], same: Same) -> bool:
    """Each item of one is an item of the other, as often as there."""
    rest = list(answers)
    for item in golds:
        if (found := next((other for other in rest if same(item, other)), None)) is None:
            return False
        rest.remove(found)
    return not rest


def lists(gold: str, answer: str, same: Same) -> bool:
    r"""(1,2) for 1,2 in this order, \{2,1\} and "2 or 1" for 1,2 in any; 2,2,3 is not 2,3,3, but \{1,1,2\} is \{1,2\}."""
    (kind, golds), (other, answers) = items(gold), items(answer)
    kinds = {kind, other}
    if (kinds != {r"\{\}"} and r"\{\}" in kinds and len(golds) == len(answers) == 1) or (kinds == {r"\{\}", "()"} and 1 in (
        len(golds), len(answers))):  # fmt: skip
        one, two = golds[0] if kind == r"\{\}" else gold, answers[0] if other == r"\{\}" else answer
        return r"\emptyset" not in one + two and enclosed(one)[0] == enclosed(two)[0] and same(one, two)
    if max(len(golds), len(answers)) < 2 and kinds != {r"\{\}"}:
        return False
    if ordered := kinds & {"()", "[]"}:
        fits = len(ordered) == 1 and kinds <= {*ordered, ""} and (ordered == {"()"} or len(kinds) == 1 or len(golds) > 2)
        return fits and len(golds) == len(answers) and all(map(same, golds, answers))
    if all("=" in item for item in golds) != all("=" in item for item in answers):
        return False  # names decide the order
    if kinds == {"", "or"} and any(RELATION.search(i) or re.fullmatch(r"\(?[A-J]\)?", i) for i in golds + answers):
        return False  # "x>1 or x<3" is not "x>1, x<3"
    if r"\{\}" in kinds or all(enclosed(item)[0] for item in golds + answers):  # a set knows each item once
        return all(any(same(g, a) for a in answers) for g in golds) and all(any(same(g, a) for g in golds) for a in answers)
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
    """y=5, x=3 and (3,5) for x=3, y=5; "n=3 or n=2" and 2,3 for n=2, 3. Without names, theirs or the alphabet's order."""
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
    return all(map(same, values[0], entries)) if g else all(map(same, entries, (dict(a)[name] for name in sorted(dict(a)))))


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
            return "=" not in answer and not RELATION.search(answer) and r"\equiv" not in answer and same(golds[-1], answer)
        return squeeze(golds[0]) == squeeze(answers[0]) and same(golds[-1], answers[-1])
    if len(answers) > 1 and re.fullmatch("[a-z]", answers[-1]) and not NAME.fullmatch(answers[0]):
        answers = answers[::-1]  # 5 = x
    *left, last = answers
    if not left or NAME.fullmatch(left[0]):
        return bool(left) and same(gold, last)
    if len(left) == 1 and number(last) == 0 and letters(left[0]):
        return False
    return same(gold, last) and all((letters(side) and not letters(side) & letters(last)) or same(gold, side) for side in left)


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
    read = read.replace(lambda e: isinstance(e, AppliedUndef), lambda e: sympy.Symbol(str(e), real=True))
    if len(free := getattr(read, "free_symbols", ())) != 1 or not hasattr(read, "as_set"):
        return None
    return str(*free), read.as_set()


def sets(gold: str, answer: str, same: Same) -> bool:
    r"""1<x<3 and "x>1 and x<3" for (1,3), x\ne2 for \mathbb{R}\setminus\{2\}; another unknown is wrong."""
    if not all(re.search(r"[<>=()\[\]]|\\(?:[lgn]e|in|mathbb|emptyset|\{)", text) for text in (gold, answer)):
        return False
    a = solution_set(gold)
    b = a and solution_set(answer)
    return bool(a and b and (not a[0] or not b[0] or a[0] == b[0]) and same_values(a[1], b[1]))

# ================================================================================================== words, options

_SAID = [  # what is said in words, in the commonest languages of answers
    (word, re.compile(pattern, re.IGNORECASE))
    for word, pattern in {
        "yes": "yes|oui|s[ií]|ja|да|是的?",
        "no": "no|non|nein|nee|нет|否|不是",
        "true": "true|vrai|wahr|verdadero|vero|верно|истина|正确|对|真",
        "false": "false|faux|falsch|falso|неверно|ложь|错误?|假",
        "none": r"none|nothing|(?:there (?:is|are) )?no (?:real |such )?(?:solutions?|values?|numbers?|integers?)(?: exists?)?"
        r"|aucune?(?: solution)?|keine?(?: lösung(?:en)?)?|ning[uú]n[oa]?|nessun[oa]?|нет решений|无解|没有|\\emptyset"
        "|(?:the )?empty set|dne|does not exist|undefined|impossible",
    }.items()
]


def words(gold: str, answer: str, same: Same) -> bool:
    """YES. for Yes, "an ellipse" for ellipse, oui for yes, \\emptyset for "no solution"; nothing else is ignored."""

    def said(text: str) -> str:
        text = re.sub(r"[a-zA-Z]{2,}|^A\b", lambda word: word[0].lower(), plain(text))
        text = re.sub(r"(?<=[a-z]{2})[-,](?=[ a-z]{2})|[.!?'\"](?!\w)", " ", text)
        text = re.sub(r" ?([^\w ]) ?", r"\1", " ".join(re.sub(r"^(?:an?|the) ", "", text).split()))
        return next((word for word, pattern in _SAID if pattern.fullmatch(text)), text)

    wordy = re.search(r"[^\W\d_]{4}|[^\x00-\x7f]|(?i:\b(?:no|yes|all|dne)\b)", re.sub(r"\\[a-zA-Z]+", "", gold))
    return bool(wordy or r"\text" in gold or gold == r"\emptyset") and said(gold) == said(answer)


_OPTION = re.compile(
    r"(?:(?i:the )?(?i:correct |final )?(?i:option|choice|answer|ans)(?i: is)?:? ?|选项?|答案[是:]? ?)?"
    r"(?:\( ?([A-Ja-j]) ?\)|([A-J])(?=[).:] |[).:]?$))[).:]* ?((?![,;]|and\b|or\b)[-\w\\($].*)?"
)
_HEDGE = re.compile(
    r"\b(?:not|or|n?either|maybe|possibly|perhaps|incorrect|wrong|vs|versus|but|unless|otherwise|except|if|odd|even|else|remainder)\b"
    r"|\( ?[A-J] ?\)|\b[A-J][).:]"
)


def options(gold: str, answer: str, same: Same) -> bool:
    """(C), "C) 7" and "option C" for C, "B) 12" for 12; several letters in any order: "A, B, D" and BDA for ABD."""
    if re.fullmatch("[A-J]{2,6}", gold) and len(set(gold)) == len(gold):
        joined = re.sub(rf"[(), ;]|{AND}", "", plain(answer))
        return sorted(gold) == sorted(joined)
    g, a = _OPTION.fullmatch(plain(gold)), _OPTION.fullmatch(plain(answer)) or re.fullmatch("([a-j])()()", answer)
    g, a = (found if found and not _HEDGE.search(found[3] or "") else None for found in (g, a))
    if g and a:
        return (g[1] or g[2]).upper() == (a[1] or a[2]).upper()
    return bool((g and g[3] and same(g[3], answer)) or (a and a[3] and same(gold, a[3])))


# ================================================================================================== remarks

_REASON = re.compile(
    r"\b(?:since|because|as (?:required|desired|claimed|\w+ ?=)|attained|achieved|occurs|obtained|by (?:the|symmetry|AM)|respectively"
    r"|for (?:all|any|every|each|some)|where|with|in (?:total|all)|altogether|для|因为)(?!\w)"
)
_DOMAIN = re.compile(r"[,(;]| (?=[a-zA-Z](?:_\w)? ?(?:\\(?:in|[lgn]e)(?![a-z])|[<>]))")
_RESTRICTS = re.compile(r"\b(?:if|otherwise|or|odd|even|else|except|remainder|not|but|unless|(?:is|equals) -?[0-9])\b")


def without_remark(text: str) -> str:
    r"""12 for "12 since 3\cdot4=12", 2x for "2x for all real x" and "2x, x\ne2"; "0 for odd n" and "2n where n=3" stay."""
    said = plain(text)
    cuts = [cut.start() for cut in _REASON.finditer(said)][:1] + [cut.start() for cut in _DOMAIN.finditer(said)]
    for cut in cuts[:9]:
        head, remark = re.sub(r" (?:for|where|with)$", "", said[:cut].rstrip(" ,;.(")), said[cut:].lstrip(" ,;(").rstrip(")")
        domain = re.sub(r"^(?:for|where|with) ", "", remark)
        if not re.fullmatch(r"[a-zA-Z](?:_\w)?(?: ?, ?[a-zA-Z])* ?(?:\\(?:in|[lgn]e)(?![a-z])|[<>])[^,;=]*", domain):
            if not _REASON.match(remark) or re.match(r"(?:where|with)\b.*= ?-?[0-9]", remark):
                continue
        prose = re.search(r"[a-zA-Z]{3,} [a-zA-Z]{2,}", re.sub(r"\\[a-zA-Z]+", "", head)) or RELATION.search(head)
        if head and not prose and not hopeless(head) and not _RESTRICTS.search(remark):
            return head
    return text


def renamed_parameter(gold: str, answer: str, same: Same) -> bool:
    r"""n\pi, n\in\mathbb{Z} for k\pi, k\in\mathbb{Z}; Ae^x for any constant A for Ce^x, C\in\mathbb{R}."""

    def parameters(text: str) -> list[str]:
        rest = plain(text)[len(without_remark(text)) :] if without_remark(text) != text else text if "mathbb" in text else ""
        return re.findall(r"(?<![a-zA-Z\\])([a-zA-Z])(?= ?(?:\\in(?![a-z])|is an?\b|$))", rest)

    g, a = parameters(gold), parameters(answer)
    if len(g) != 1 or len(a) != 1 or g == a or g[0] in letters(re.sub(r"\\mathbb ?\{\w\}", "", answer)):
        return False
    return same(re.sub(r"\|| : |:", r"\\mid ", gold), re.sub(r"\|| : |:", r"\\mid ", renamed(answer, a[0], g[0])))


def conclusion(gold: str, answer: str, same: Same) -> bool:
    """6 for "so the answer is 6" and "... 72/12 = 6 людей": the value after the last "is" of a sentence."""
    said = plain(answer)
    cuts = list(re.finditer(r"\b(?:is|est|it's|equals)\b|[=:是为](?!=)", said))
    sentence = re.sub(r"\\[a-zA-Z]+(?:_\{\w+\})?", "", said[: cuts[-1].start()]) if cuts and "=" not in gold else ""
    if not re.search(r"\b[a-z]{3}|\b[Aa]ns|[^\x00-\xff]", sentence) or r"\{" in sentence or re.search("[a-z]{3} ", gold):
        return False
    statements = sum(cut[0] != "=" for cut in cuts)
    return not (statements > 1 and re.search(AND, said)) and same(gold, said[cuts[-1].end() :].rstrip(".)"))


# ================================================================================================== quantities

_NAMES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_NUMBERS = {word: n for n, word in enumerate(_NAMES.split())}
_NUMBERS |= {word: 10 * n for n, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_SCALES: dict[str, int | Fraction] = {"dozen": 12, "score": 20, "hundred": 100, "thousand": 10**3, "lakh": 10**5, "million": 10**6}
_SCALES |= {"crore": 10**7, "billion": 10**9, "bn": 10**9, "trillion": 10**12, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fifth": 5, "eighth": 8, "ninth": 9, "twelfth": 12, "permille": 1000}
_PARTS |= {re.sub("y$", "ie", word) + "th": n for word, n in (_NUMBERS | _SCALES).items() if n}
_PARTS |= {"basis": 10**4}


def in_digits(text: str) -> str:
    """21 for twenty-one, 3000000 for "3 million", 7/16 for "7 sixteenths", 1/2 for "one half", 36 for "6 squared"."""
    tokens = re.sub(r"(?<=[a-z])-(?=[a-z])|,? and (?=[a-z])", " ", plain(text).lower()).split(" ")
    total, current, used = Fraction(0), None, 0
    for token in tokens:
        word = token if token in _NUMBERS | _SCALES | _PARTS else token.removesuffix("s")
        if used == 0:
            current = Fraction(_NUMBERS[word]) if word in _NUMBERS else Fraction(1) if token in ("a", "an") else number(token)
        elif current is None or word in ("squared", "cubed"):
            total, current = (total + (current or 0)) ** {"squared": 2, "cubed": 3}.get(word, 1), None
            used += 1
            break
        elif word in _NUMBERS and tokens[0] not in "0123456789":
            current += _NUMBERS[word]
        elif word in _SCALES:
            total, current = (total, current * 100) if word == "hundred" else (total + current * _SCALES[word], Fraction(0))
        elif word in _PARTS:
            total, current = (total + current) / _PARTS[word], Fraction(0)
        else:
            break
        if current is None:
            return text
        used += 1
    rest = " ".join(tokens[used:]).removeprefix("points").strip()
    return text if used == 0 or (used == 1 and tokens[0] not in _NUMBERS) else f"{total + (current or 0)} {rest}".strip()


_UNITS = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimetre|cm centimeter centimetre|m meter metre|km kilometer kilometre|in inch inche|ft foot feet|yd yard|mi mile"
        "|mg milligram|g gram|kg kilogram|lb pound|oz ounce|ml mL milliliter|l L liter litre|s sec second|min minute|h hr hour|day|week|month"
        "|yr year|mph|kph kmh|dollar USD|cent|euro EUR|rad radian|deg degree|N newton|J joule|W watt|V volt|A ampere|K kelvin|Pa pascal|Hz"
    ).split("|")
    for name in names.split()
}
_FILLER = set(
    "square sq cubic cu per of the in a an total each red blue people men women children person unit with certainty inclusive"
    " mol Omega kJ eV kPa kW dm dl cl cc rs gbp inr jpy cny erg rpm".split()
)
_NO_UNIT = re.compile(
    r"\b(?:or|and|not|if|for|when|where|then|mod|modulo|to|is|than|more|less|below|negative|minus|plus|times|over|factorial|choose|base|out|least"
    r"|most|either|otherwise|except|unless|but|only|doubles?d?|twice|triples?d?|halve[sd]|infinity|root|power|approx\w*|(?:de|in)crease|basis|score"
    r"|dozens?|remainder|pairs|per ?mille?|percent\w*|squares?d|cubed|vs|versus|maybe|possibly|\w*(?:illion|thousand|hundred)\w*|\w{2,}(?:th|rd)s?"
    r"|halves|quarters|seconds? of|crore|lakh|bn)\b|[万亿千百]"
)
_TAIL = re.compile(rf"(?:{TEXT}|\\(?:Omega|cdot|times|mu|circ)(?![a-z])|[a-zA-Z./ ·]|\^ ?\{{? ?-?[0-9] ?\}}?|[^\x00-\x7f])+")
_TAIL_START = re.compile(
    r"(?<=[0-9})!\]a-z]) ?\\text ?\{|(?<=[0-9})!\]]) ?(?=[a-zA-Z]{2}|m\^)| (?=[a-zA-Z](?:[ /^.]|$))|(?<=[0-9}]) ?(?=[^\x00-\x7f]|\\mu ?\\text|\\Omega)"
)
_CURRENCY = re.compile(r"([-+]?) ?(?:US|R|Rs\.?|USD|EUR|GBP|INR|JPY|CNY|RMB|CAD|AUD|CHF|HK) ?(?=[-0-9.])(.*)")


def quantity(text: str) -> tuple[str, list[str]] | None:
    """("5", ["km", "h"]) of "5 km/h": a value and its known units; None if what follows it is not only a unit."""
    if money := _CURRENCY.fullmatch(plain(text)):
        return money[1] + money[2], []
    start = _TAIL_START.search(text)
    while start and text.count("{", 0, start.start()) - text.count("}", 0, start.start()):
        start = _TAIL_START.search(text, start.end() + 1)
    if not start or not _TAIL.fullmatch(tail := text[start.start() :].strip()):
        return None
    head, said = text[: start.start()].strip(), plain(re.sub(r"\\(?:cdot|times|mu|circ)", " ", tail))
    units = re.findall(r"[^\W\d_]+", said)
    if _NO_UNIT.search(said) or not units or units in (["e"], ["i"], ["pi"], ["x"], ["d"], ["j"]):
        return None
    for unit in units:
        known = {unit, unit.removesuffix("s"), unit.lower()} & (_UNITS.keys() | _FILLER) or not unit.isascii()
        if not known and not (any(re.fullmatch(r"\w{3,}(?<!s)s", each) for each in units) and len(unit) > 2):
            return None
    if r"\text" not in tail and not any(len(unit) > 1 for unit in units) and number(head.replace(",", ".")) is None:
        return None  # 5 m, but not x m
    return head, [_UNITS[u] for unit in units for u in {unit, unit.removesuffix("s")} & _UNITS.keys()][:4]


def units(gold: str, answer: str, same: Same) -> bool:
    r"""5 km/h, \$5 and "5 apples" for 5; a unit may be missing, but 5 minutes is not 5 hours, and 5 million is not 5."""
    g, a = quantity(gold), quantity(answer)
    if (g is None and a is None) or (g and a and g[1] and a[1] and g[1] != a[1]):
        return False
    return same(g[0] if g else gold, a[0] if a else answer)


def durations(gold: str, answer: str, same: Same) -> bool:
    """90 minutes and "1 hour 30 minutes" for 1.5 hours."""

    def seconds(text: str) -> Fraction | None:
        parts = [part.rsplit(" ", 1) for part in re.split(rf" ?(?:,|{AND}) ?|(?<=[a-z]) (?=[0-9])", plain(text))]
        each = {"s": 1, "min": 60, "h": 3600, "day": 86400, "week": 604800}
        values = [(number(part[0]), each.get(_UNITS.get(part[-1], _UNITS.get(part[-1].removesuffix("s"), "")))) for part in parts]
        return sum((n * unit for n, unit in values if n is not None and unit), Fraction(0)) if all(
            n is not None and unit for n, unit in values) else None  # fmt: skip

    return (total := seconds(gold)) is not None and total == seconds(answer)


def percents(gold: str, answer: str, same: Same) -> bool:
    r"""0.5 and 50\% for each other; 20 for 20\% ("what percent?"), but 5 is not 500\%."""
    x, y = gold.rstrip("% "), answer.rstrip("% ")
    if (x == gold) == (y == answer):
        return x != gold and same(x, y)
    share, other = (x, answer) if x != gold else (y, gold)
    many, plain_number = number(share), number(other)
    if many is not None and many == plain_number:
        return many > 1
    share = f"({share})/100" if many is None else str(many / 100)
    return same(share, other) if x != gold else same(other, share)


# ================================================================================================== other notations


def ratios(gold: str, answer: str, same: Same) -> bool:
    """6:8 for 3:4; neither 4:3 nor 3/4, and no times of the day."""
    g, a = split(gold, ":"), split(answer, ":")
    if len(g) < 2 or len(g) != len(a) or re.fullmatch("[0-9]{1,2} ?: ?[0-5][0-9]", gold):
        return False
    return all(same(rf"({x})\cdot({w})", rf"({z})\cdot({y})") for (x, y), (z, w) in zip(pairwise(g), pairwise(a)))


def points(gold: str, answer: str, same: Same) -> bool:
    r"""P(1,-2,3), a column and \hat{i}-2\hat{j}+3\hat{k} for (1,-2,3)."""

    def coordinates(text: str) -> str:
        column = re.fullmatch(r"\\begin ?\{pmatrix\}([^&]*)\\end ?\{pmatrix\}|\\begin ?\{pmatrix\}(.*&.*)\\end ?\{pmatrix\}\^ ?\{?(?:T|\\top)\}?", text)
        if column and (r"\\" in text) != bool(column[2]):
            return "(" + re.sub(r"\\\\|&", ", ", (column[1] or column[2]).strip().removesuffix(r"\\")) + ")"
        if re.fullmatch(r"[A-Z](?:_\w)?'? ?=? ?\([^()]*[,;][^()]*\)", text):
            return text[text.index("(") :]
        terms = re.findall(r"([-+]? ?[^-+]{0,40})\\hat ?\{? ?\\?([ijk])(?:math)? ?\}?", text)
        parts = {axis: part.replace(" ", "").removeprefix("+") for part, axis in terms}
        return "(" + ", ".join({"": "1", "-": "-1"}.get(parts.get(i, "0"), parts.get(i, "0")) for i in "ijk") + ")" if terms else text

    g, a = coordinates(gold), coordinates(answer)
    return (g, a) != (gold, answer) and enclosed(g)[0] == enclosed(a)[0] == "()" and same(g, a)


def congruences(gold: str, answer: str, same: Same) -> bool:
    r"""n\equiv7\pmod5 and "n mod 5 = 2" for n\equiv2\pmod5; several residues in any order."""

    def residues(text: str) -> tuple[str, Any, str]:
        text = re.sub(r"^(\w) ?\\?[pb]?mod(?![a-z]) ?\{?(\w+)\}? ?= ?(\w+)$", r"\1\\equiv \3\\pmod \2", plain(text))
        head, _, modulus = re.sub(r"\\?\b[pb]?mod(?![a-z])", "@", re.sub(r"\\[pb]?mod(?![a-z])", "@", text)).partition("@")
        name, _, rest = ("", "", head) if r"\equiv" not in head and "=" not in head else re.sub(r"\\equiv(?![a-z])", "=", head).partition("=")
        numbers = [number(item) for item in items(rest.strip(" (,"))[1]]
        modulus = modulus.strip("(){} ")
        exact = modulus.isdigit() and int(modulus) and None not in numbers
        return name.strip(), {n % int(modulus) for n in numbers if n is not None} if exact else squeeze(rest), modulus

    g, a = residues(gold), residues(answer)
    return bool(g[2] and g[1:] == a[1:] and (not g[0] or not a[0] or g[0] == a[0]))


def pieces(gold: str, answer: str, same: Same) -> bool:
    r"""The pieces of a function, in any order: "-x if x<0, x if x\ge0" for \begin{cases}x&x\ge0\\-x&x<0\end{cases}."""

    def parts(text: str) -> list[list[str]]:
        text = re.sub(r"(?: if)+", " if", re.sub(r",? ?\b(?:if|for|when|where)\b,? ?", " if ", plain(text)).replace("  ", " "))
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
    r"""1010_{\text{two}}, "1010 in base 2", (1010)_2, 0b1010 and 1010 for 1010_2; its decimal value is another answer."""

    def digits(text: str) -> tuple[str, str] | None:
        said = re.sub(r"^0b([01]+)$", r"\1_2", re.sub(r"^0x([0-9A-Fa-f]+)$", r"\1_16", plain(text)))
        found = re.fullmatch(r"(-?) ?\(? ?([0-9A-Fa-f]+) ?\)? ?(?:_ ?\{? ?(\w+) ?\}?|\(?(?:in )?base ?-?(\w+)\)?)", said)
        base = str(_NUMBERS.get(found[3] or found[4], found[3] or found[4])) if found else ""
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


_READINGS = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"^\\therefore(?![a-z])", ""),
        (r"^([a-zA-Z](?:_\w)?) ?\\approx(?![a-z])", r"\1="),  # x\approx11
        (r"^(?:\\approx(?![a-z])|(?:approximately|approx\.?|about|roughly)\b)", ""),  # \approx 2.7
        (r"[,( ]?(?:\\approx(?![a-z])|\b(?:approximately|approx\.?|about|roughly)(?![a-z]))[^()]{0,80}\)?$", ""),  # 4\pi (\approx 12.57)
        (r"(?<![a-zA-Z\\])C ?\( ?(\w+) ?, ?(\w+) ?\)|(?:\{ ?\})?[\^_] ?\{?(\w+)\}? ?C ?_ ?\{?(\w+)\}?|(?<![a-zA-Z\\])C ?_ ?\{?(\w+)\}? ?\^ ?\{?(\w+)\}?",
         lambda m: rf"\binom{{{m[1] or m[3] or m[5]}}}{{{m[2] or m[4] or m[6]}}}"),  # C(10,3), {}^{10}C_3, C_{10}^3
        (r"(?<![a-zA-Z\\])[AP] ?_ ?\{?(\w+)\}? ?\^ ?\{?(\w+)\}?|(?:\{ ?\})?[\^_] ?\{?(\w+)\}? ?P ?_ ?\{?(\w+)\}?",
         lambda m: rf"\frac{{{m[1] or m[3]}!}}{{({m[1] or m[3]}-{m[2] or m[4]})!}}"),  # A_5^2, {}^5P_2
        (r"^\\mathbb ?\{? ?R ?\}? ?(?:\^ ?\{? ?\+ ?\}?|_ ?\{? ?(?:\+|> ?0) ?\}?)$", r"(0,\\infty)"),
        (r"^\\mathbb ?\{? ?R ?\}? ?_ ?\{? ?\\ge ?0 ?\}?$", r"[0,\\infty)"),
        (r"^(?:the set of )?(?:all )?(?:the )?real(?: number)?s? ?[a-z]? (?:with|such that|where|satisfying) ?(?=.)", ""),
        (r"^(?:the set of )?(?:all )?(?:the )?real(?: number)?s$", r"\\mathbb{R}"),
        (r"^(\w) ?: ?(\w) ?\\mapsto(?![a-z])", r"\1(\2)="),  # f: x\mapsto x^2
        (r"^(\w\(\w\)) ?\\equiv(?![a-z])(?!.*mod)", r"\1="),  # f(x)\equiv0
        (r"^(.*%) ?(?:decrease|increase|off|discount|more|less)$", r"\1"),
        (r"^([0-9]+) dollars? (?:and )?([0-9]{2}) cents?$", r"\1.\2"),
        (r"^(?:at )?([0-9]{1,2})(?::([0-9]{2}))? ?([apAP])\.? ?[mM]\.?$", lambda m: rf"\text{{at {int(m[1])}:{m[2] or '00'} {m[3].lower()}m}}"),
    ]
]  # fmt: skip


def plainer(text: str) -> str:
    """What the table of readings makes of a text."""
    for pattern, new in _READINGS:
        text = read.strip() if (read := pattern.sub(new, plain(text))) != plain(text) else text
    return text


# ================================================================================================== the whole question


def listed(gold: str, answer: str) -> bool:
    """2,3,3 for 2,2,3 and (2,1) for (1,2): math-verify's sets know neither order nor number; lists compares the items."""
    return any(len(items(text)[1]) > 1 for text in (gold, answer))


def half_named(gold: str, answer: str) -> bool:
    """x+y=5 for 5: an equation is not its last side; named tells which are."""
    return len(split(gold, "=")) != len(split(answer, "="))


def read_as_quotient(gold: str, answer: str) -> bool:
    """1:2 for 1/2."""
    return ":" in gold or ":" in answer


def read_as_product(gold: str, answer: str) -> bool:
    r"""\angle ACB for \angle ABC."""
    return bool(re.search(r"\\(?:angle|triangle|bar|subset|Rightarrow)(?![a-z])", gold + answer))


def other_letters(gold: str, answer: str) -> bool:
    """2x for 2: a letter that the other does not have (and that no sum or limit binds); sympy need not look."""
    if re.search(r"\\(?:sum|prod|int|lim|text)(?![a-z])|\\Xi|\{ ?d ?\}", gold + answer):
        return False
    a, b = (set(re.findall("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+|\{[pv]?matrix\}", "", text))) - {"e", "i", "E"} for text in (gold, answer))
    return a != b


VETOES = (listed, half_named, read_as_quotient, read_as_product, other_letters)
READINGS = (plainer, without_remark, in_digits, dotted)
ADDITIONS = (
    named, lists, assigned, renamed_argument, sets, words, options, renamed_parameter, units, durations, percents, ratios, points,
    congruences, pieces, bases, digit_groups, dimensions, conclusion,
)  # fmt: skip


def equal(gold: str, answer: str, known: dict[tuple[str, str], bool], depth: int = 0) -> bool:
    """Is a cleaned answer a cleaned gold? `known` are the pairs that this question has met."""
    pair = gold, answer = bare(gold), bare(answer)
    if pair not in known:
        known[pair] = False  # while it is open
        known[pair] = bool(gold and answer and depth < 9 and _equal(gold, answer, known, depth))
    return known[pair]


def _equal(gold: str, answer: str, known: dict[tuple[str, str], bool], depth: int) -> bool:
    if squeeze(gold) == squeeze(answer):
        return True
    a, b = number(gold), number(answer)
    if a is not None and b is not None:
        return a == b

    def same(x: str, y: str) -> bool:
        return equal(x, y, known, depth + 1)

    if not any(veto(gold, answer) for veto in VETOES) and (read := worth(gold)) is not None and same_values(read, worth(answer)):
        return True
    readings = ((reading(gold), reading(answer)) for reading in READINGS)
    return any(pair != (gold, answer) and same(*pair) for pair in readings) or any(rule(gold, answer, same) for rule in ADDITIONS)


@lru_cache(maxsize=100_000)
def cleaned(text: str) -> str | None:
    """The text after the table of cleaning; None if it is hopeless."""
    if text.strip() in ("NaN", "nan", "None", "null") or hopeless(text := bare(clean(text))):
        return None
    return text


def read_gold(gold: str) -> str:
    """A gold, cleaned; ValueError, naming it, if nothing can be compared with it: that is an error in the data."""
    boxed = boxes(gold)
    text = ", ".join(gold[i:j].strip() for i, j in boxed if not any(i < k < j for k, _ in boxed)) if re.search(r"\\(?:A?boxed|fbox)", gold) else gold
    if len(text) > MAX_GOLD:
        return text
    if not text or (read := cleaned(text)) is None:
        raise ValueError(f"gold answer cannot be parsed: {gold if len(gold) < 200 else gold[:200] + '...'!r}")
    return read


def check(gold: str) -> str | None:
    """What is wrong with a gold, or None."""
    try:
        return read_gold(gold) and None
    except ValueError as error:
        return str(error)


def right(gold: str, answer: str) -> bool:
    """Is an extracted answer the gold? ValueError for a gold that cannot be read."""
    read = read_gold(gold)
    text = cleaned(answer) if len(answer) <= max(MAX_CHARS, 2 * len(gold)) else None
    return text is not None and equal(read, text, {})


def as_asked(gold: str, answer: str) -> str | None:
    """An answer read as the gold's form asks, for voting: a bare list with its brackets, x=5 as 5 if no name is asked."""
    read, text = read_gold(gold), cleaned(answer) if len(answer) <= MAX_CHARS else None
    if text is None:
        return None
    text = bare(plainer(text))
    if option := _OPTION.fullmatch(plain(text)):
        if re.fullmatch("[A-J]", read):
            return option[1] or option[2]
        text = option[3] or text
    parts, golds = sides(text), sides(read)
    if len(golds) == 1 < len(parts) and NAME.fullmatch(parts[0]):
        text = parts[-1]
    elif len(parts) == 1 < len(golds) and NAME.fullmatch(golds[0]):
        text = f"{golds[0]}={text}"
    brackets, entries = items(text)
    if brackets in ("", "or") and len(entries) > 1 and "=" not in text and solution_set(text) is None:
        text = f"({', '.join(entries)})" if enclosed(read)[0] == "()" and not brackets else rf"\{{{', '.join(entries)}\}}"
    if text.endswith("%") and not read.endswith("%") and (many := number(text.rstrip("% "))) is not None:
        text = str(many / 100)
    return text


def same_vote(gold: str, a: str, b: str) -> bool:
    """Are two wrong answers one and the same answer to the question with this gold?"""
    x, y = as_asked(gold, a), as_asked(gold, b)
    return x is not None and y is not None and (equal(x, y, {}) or equal(y, x, {}))
