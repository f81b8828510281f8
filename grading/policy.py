r"""Third stage: what counts as the same answer, beyond and against math-verify's verdict. Only the worker imports this.

`right` asks math-verify (values.py) about two single things, unless a veto turns that down, and then each addition. A
rule sees two cleaned texts and `same`, which asks the whole question about parts of them; rules do not know each other.
A reading is the simplest rule: what one text says in plainer words, tried on both sides. docs/answers.md lists them all.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from grading.box import TEXT, T, W, clean, extract_answer
from grading.values import same as same_values
from grading.values import value, works  # noqa: F401

Same = Callable[[str, str], bool]
MAX_DEPTH, MAX_CHARS, MAX_GOLD_CHARS = 40, 300, 3000  # brackets in brackets; longer answers are wrong unless the gold is long
OR, AND = (rf"\\text ?\{{[, ]*(?:{w})[, ]*\}}|{W}(?:{w}){T}" for w in ("or|oder|ou|или|或者?", "and|et|und|и|和"))
SYMBOL = r"(?:\\(?:mathbb|vec|hat|bar|dot) ?\{?[a-zA-Z]{1,3}\}?|\\[a-zA-Z]+|[a-zA-Z])(?:_(?:\w|\{[^{}]*\}))?'{0,3}"
NAME = re.compile(  # what may stand before "=": x, x_1, f(x), (x,y), AB, |AB|, \angle ABC, \text{Area}, V_1:V_2, \frac{AB}{CD}
    rf"{SYMBOL}(?: ?(?:\([\w, ]*\)|\[[A-Z]\]))?|\( ?{SYMBOL}(?: ?, ?{SYMBOL})+ ?\)|\|?[A-Z](?: ?[A-Z]){{1,3}}\|?"
    rf"|\\(?:angle|bar|triangle) ?\{{?[A-Z_0-9{{}} ]+\}}?|\\text ?\{{[^{{}}]*\}}|[A-Z][a-z]{{2,}}|\[[A-Z]{{3,5}}\]"
    rf"|\\frac\{{ ?[A-Z]{{1,2}} ?\}}\{{ ?[A-Z]{{1,2}} ?\}}|{SYMBOL} ?: ?{SYMBOL}"
)
_BRACKET = r"\\?[{(\[]|\\?[})\]]|\\[lr]angle"
_DIGITS = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"([-+]?) ?(?:([0-9]+) )?([-+]? ?{_DIGITS})(?:(?:[eE]| ?(?:\\times|\\cdot) ?\{{?10\}}? ?\^) ?\{{? ?([-+]?[0-9]{{1,3}}) ?\}}?)?"
    rf"(?: ?/ ?([-+]? ?{_DIGITS}))?"
)
_FRAC = re.compile(rf"\\frac ?\{{ ?([-+]? ?{_DIGITS}) ?\}} ?\{{ ?([-+]? ?{_DIGITS}) ?\}}")
_BROKEN = re.compile(
    r"[-+*/^_=<>] ?$|\^ ?\^|\\frac ?\{[^{}]*\} ?(?:\{ ?0 ?\}|$)|/ ?0(?![0-9.])"
    r"|(?<![_^0-9.{])(?<!frac )(?<!frac)[0-9][0-9.]* [0-9](?![0-9]*/[0-9])"
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


def enclosed(text: str) -> tuple[str, str] | None:
    r"""("(]", "0,1") for "(0,1]", ("\{\}", ...) for a set: one pair of brackets around all of the text."""
    depth, opening = 0, ""
    for token in re.finditer(_BRACKET, text):
        if depth == 0:
            if token.start():
                return None
            opening = token[0]
        depth += 1 if token[0][-1] in "{([" or token[0] == r"\langle" else -1
        if depth == 0:
            inside = text[len(opening) : token.start()].strip()
            brackets = (opening + token[0]).replace(r"\langle\rangle", "()")
            return (brackets, inside) if token.end() == len(text) else None
    return None


def bare(text: str) -> str:
    """Without outer braces, a final stop, and the commas of thousands outside brackets: "{1,000}." is "1000"."""
    text = re.sub(r"^\+ ?(?=[\w\\])|(?:(?<!\\)[.,;:]|\\| )+$", "", text.strip()).strip()
    while (whole := enclosed(text)) and whole[0] == "{}":
        text = whole[1].rstrip(".,;")
    if "," in text:
        depth = 0

        def joined(match: re.Match) -> str:
            nonlocal depth
            depth += (match[0] in "([{") - (match[0] in ")]}")
            return match[0] if depth > 0 or match[0] in ")]}" else match[0].replace(",", "")

        text = _GROUPS.sub(joined, text)
    return text


def plain(text: str) -> str:
    """Without the braces of its texts."""
    return " ".join(re.sub(TEXT, r" \1 ", text).split())


def squeeze(text: str) -> str:
    """Without the spaces that separate nothing."""
    return re.sub(r"(?<!\w) | (?!\w)", "", text)


@lru_cache(maxsize=20_000)
def number(text: str) -> Fraction | None:
    """Exact value of an integer, decimal, power-of-ten decimal, fraction or mixed number."""
    match = _NUMBER.fullmatch(_FRAC.sub(r" \1/\2", text).strip()) if len(text) < 5000 else None
    if not match:
        return None
    sign, whole, top, exponent, bottom = (part and part.replace(" ", "") for part in match.groups())
    if bottom and not Fraction(bottom):
        return None
    number = Fraction(top) * Fraction(10) ** int(exponent or 0) / Fraction(bottom or 1)
    if whole is not None:
        if bottom is None or not (top + bottom).isdigit() or number >= 1:
            return None  # two numbers in a row, or a product
        number += int(whole)
    return -number if sign == "-" else number


def worth(text: str) -> Any:
    """The value of one thing: exactly of a number, else as math-verify's parser reads it."""
    return value(text) if (exact := number(text)) is None else sympy.Rational(exact.numerator, exact.denominator)


def hopeless(text: str) -> bool:
    """Empty, broken off, unbalanced, too deep, divided by zero, two numbers side by side, NaN."""
    depth = deepest = 0
    for sign in (unescaped := re.sub(r"\\[{}]", "", text)):
        depth += (sign in "({[") - (sign in ")}]")
        deepest = max(deepest, depth)
    return bool(
        depth
        or deepest > MAX_DEPTH
        or unescaped.count("{") != unescaped.count("}")
        or not re.search(r"\w|\\", text)
        or _BROKEN.search(re.sub(r"\\text ?\{[^{}]*\}", r"\\text{}", text))
        or text in ("NaN", "nan", "None", "null")
    )


# ================================================================================================== lists, systems


def items(text: str) -> tuple[str, list[str]]:
    r"""("()", ["1", "2"]) for "(1,2)"; brackets "" and the items of a bare list: "1, 2 or 3", "1 \pm 2"."""
    if (whole := enclosed(text)) and whole[0] in ("()", r"\{\}", "[]"):
        spaced = split(whole[1], r"[,;] |;") if re.search(r"[,;] ", whole[1]) else []
        parts = spaced if len(spaced) > 1 and re.search(r"[0-9],[0-9]{3}", whole[1]) else split(whole[1], "[,;]")
        return (whole[0], parts) if len(parts) > 1 or whole[0] == r"\{\}" else ("", [text])
    for separator in (OR, rf",? ?(?:{AND})", ";", ", ", ","):
        if len(parts := split(text, separator)) > 1:
            flat = [item for part in parts for item in (items(part)[1] if "=" not in part and not enclosed(part) else [part])]
            return ("or" if separator == OR else "", flat)
    if len(split(text, r"\\[pm]p?m(?![a-z])")) + (text[:3] in (r"\pm", r"\mp")) == 2 and text.count(r"\pm") + text.count(r"\mp") == 1:
        return ("or", [re.sub(r"\\[pm]p?m ?", sign, text, count=1) for sign in "+-"])
    if text.count(r"\pm") == 1 and "=" not in text:
        return ("or", [text.replace(r"\pm", sign) for sign in "+-"])
    return ("", [text])


def matched(gold: list[str], answer: list[str], same: Same) -> bool:
    """Each item of one is an item of the other, as often as there."""
    rest = list(answer)
    for item in gold:
        found = next((other for other in rest if same(item, other)), None)
        if found is None:
            return False
        rest.remove(found)
    return not rest


def lists(gold: str, answer: str, same: Same) -> bool:
    r"""(1,2) for 1,2 in this order, \{2,1\} and "2 or 1" for 1,2 in any; 2,2,3 is not 2,3,3, but \{1,1,2\} is \{1,2\}."""
    (gold_brackets, golds), (brackets, answers) = items(gold), items(answer)
    if (len(golds) == 1 and gold_brackets == r"\{\}") != (len(answers) == 1 and brackets == r"\{\}"):
        one, other = (golds[0], answer) if len(golds) == 1 else (gold, answers[0])
        return r"\emptyset" not in one + other and same(one, other)
    if max(len(golds), len(answers)) < 2 and gold_brackets != r"\{\}":
        return False
    loose = ("", "or", r"\{\}")
    ordered = {gold_brackets, brackets} & {"()", "[]"}
    if ordered:
        free = {gold_brackets, brackets} - ordered
        fits = len(ordered) == 1 and free <= {""} and (ordered == {"()"} or not free or len(golds) > 2)
        return fits and len(golds) == len(answers) and all(map(same, golds, answers))
    if gold_brackets not in loose or brackets not in loose:
        return False
    if {gold_brackets, brackets} == {"", "or"} and any(_RELATION.search(i) or re.fullmatch(r"\(?[A-J]\)?", i) for i in golds + answers):
        return False  # "x>1 or x<3" is not "x>1 and x<3"
    if r"\{\}" in (gold_brackets, brackets) or all(map(enclosed, golds + answers)):  # a set knows each item once
        return all(any(same(g, a) for a in answers) for g in golds) and all(any(same(g, a) for g in golds) for a in answers)
    return matched(golds, answers, same)


def unknowns(text: str) -> dict[str, str] | None:
    """{x: 3, y: 5} of "x=3 and y=5", "(x,y)=(3,5)", "x=y=3"; None for anything else."""
    found: dict[str, str] = {}
    for part in [part for item in split(text, rf",(?! ?\\text)|;|{AND}") for part in [item]]:
        *names, last = split(part, "=")
        if not names or not all(map(NAME.fullmatch, names)):
            return None
        for name in names:
            tuple_name, values = enclosed(name), enclosed(last)
            if tuple_name and tuple_name[0] == "()" and values:
                pairs = list(zip(split(tuple_name[1], ","), split(values[1], "[,;]"), strict=False))
            else:
                pairs = [(name, last)]
            if any(squeeze(key) in found for key, _ in pairs):
                return None
            found |= {squeeze(key): entry for key, entry in pairs}
    return found


def systems(gold: str, answer: str, same: Same) -> bool:
    """y=5, x=3 for x=3, y=5; (3,5) and 3,5 for it, the names in the order of the gold, or else of the alphabet."""
    g, a = unknowns(gold), unknowns(answer)
    if g and a and len(g) > 1 and len(a) > 1:
        return g.keys() == a.keys() and all(same(g[name], a[name]) for name in g)
    if g and len(g) > 1:
        brackets, values = items(answer)
        return brackets in ("", "()") and "=" not in answer and len(values) == len(g) and all(map(same, g.values(), values))
    if a and len(a) > 1:
        brackets, values = items(gold)
        if brackets == "()":
            return len(values) == len(a) and all(map(same, values, (a[name] for name in sorted(a))))
        return brackets == "" and len(values) > 1 and matched(values, list(a.values()), same)
    return False


def one_unknown(gold: str, answer: str, same: Same) -> bool:
    r"""2,3 and "n=2 or n=3" for n=2, 3."""

    def stripped(text: str) -> tuple[str, str] | None:
        parts = [split(part, "=") for part in items(text)[1]]
        names = {squeeze(part[0]) for part in parts if len(part) == 2}
        if len(parts) < 2 or len(names) != 1 or len(parts[0]) != 2 or not NAME.fullmatch(parts[0][0]):
            return None
        return names.pop(), " or ".join(part[-1] for part in parts)

    g, a = stripped(gold), stripped(answer)
    if g and a:
        return g[0] == a[0] and same(g[1], a[1])
    if g or a:
        other = gold if a else answer
        name = split(other, "=")[0] if "=" in other and not enclosed(other) else None
        if name and len(items(other)[1]) > 1:
            return False
        return same(g[1] if g else gold, a[1] if a else answer)
    return False


def sides(text: str) -> list[str]:
    """The sides of an equation or of a chain of them; the text itself if it is none."""
    return [text] if _RELATION.search(text) or len(items(text)[1]) > 1 else split(text, "=")


def _symbols(text: str) -> set[str]:
    return set(re.findall(r"\\[a-zA-Z]+|[a-zA-Z]", re.sub(r"\\text ?\{[^{}]*\}|\\(?:frac|sqrt|pi|cdot|times|left|right)", "", text)))


def named(gold: str, answer: str, same: Same) -> bool:
    r"""x=5, m+n=108 and 2+3=5 for 5, 108 and 5; not y=5 for x=5, 4=5 for 5, x^2-1=0 for 0."""
    golds, answers = sides(gold), sides(answer)
    if len(golds) > 1:
        if not all(map(NAME.fullmatch, golds[:-1])):
            return False
        if len(answers) == 1:
            return not any(sign in answer for sign in ("=", r"\equiv")) and same(golds[-1], answer)
        if squeeze(golds[0]) != squeeze(answers[0]):
            return False
        gold, answers = golds[-1], answers[1:]
        if len(answers) == 1:
            return same(gold, answers[0])
    elif len(answers) < 2:
        return False
    if NAME.fullmatch(answers[-1]) and not NAME.fullmatch(answers[0]) and len(answers[-1]) == 1:
        answers = answers[::-1]  # 5 = x
    *left, last = answers
    if not all(map(NAME.fullmatch, left)) and number(last) == 0 and len(left) == 1 and _symbols(left[0]):
        return False
    for side in left if not NAME.fullmatch(left[0]) else ():
        if not NAME.fullmatch(side) and not (_symbols(side) and not _symbols(side) & _symbols(last)) and not same(gold, side):
            return False
    return same(gold, last)


def renamed_argument(gold: str, answer: str, same: Same) -> bool:
    """f(t)=3t for f(x)=3x, a_k=2^k for a_n=2^n."""
    (head, *right), (other, *other_right) = split(gold, "="), split(answer, "=")
    pattern = r"(\w+) ?(\(|_\{?) ?([a-z]) ?[)}]?"
    a, b = re.fullmatch(pattern, head), re.fullmatch(pattern, other)
    if not (a and b and len(right) == len(other_right) == 1 and a[1] == b[1] and a[2] == b[2] and a[3] != b[3]):
        return False
    letter, new = (rf"(?<![a-zA-Z\\]){x}(?![a-zA-Z])" for x in (b[3], a[3]))
    loose = rf"(?<!\\)(?<![a-zA-Z]){b[3]}(?![a-z])|(?<=[a-zA-Z0-9])(?<!\\){b[3]}(?![a-zA-Z])"
    return not re.search(new, other_right[0]) and same(right[0], re.sub(f"{letter}|{loose}", a[3], other_right[0]))


# ================================================================================================== sets


@lru_cache(maxsize=10_000)
def solution_set(text: str) -> tuple[str, Any] | None:
    r"""("x", (1,3)) for 1<x<3, "x>1 and x<3", x\in(1,3), \{x \mid 1<x<3\}; the name is "" for (1,3) and \mathbb{R}."""
    text = text.strip()
    for pattern, join in ((OR, sympy.Union), (r"\\cup(?![a-z])", sympy.Union), (rf"{AND}|;|,", None), (r"\\cap(?![a-z])", sympy.Intersection)):
        parts = split(text, pattern)
        if len(parts) > 1:
            sets = [solution_set(part) for part in parts]
            if r"\ne" in parts[0] and not any(map(_RELATION.search, parts[1:])):  # x \ne 0, 3
                sets = [solution_set(part if n == 0 else parts[0].split(r"\ne")[0] + r"\ne " + part) for n, part in enumerate(parts)]
            names = {found[0] for found in sets if found} - {""}
            if None in sets or len(names) > 1 or (join is None and not names):
                return None
            values = [found[1] for found in sets if found]
            if join is None and (meet := sympy.Intersection(*values)) is not sympy.S.EmptySet:
                return names.pop(), meet
            if join is None and re.search(AND, text):
                return names.pop(), sympy.S.EmptySet
            return (names or {""}).pop(), (join or sympy.Union)(*values)
    if len(parts := split(text, r"\\setminus(?![a-z])|-(?= ?\\\{)")) == 2:
        a, b = (solution_set(part) for part in parts)
        return ("", sympy.Complement(a[1], b[1])) if a and b else None
    if len(parts := split(text, r"\\in(?![a-z])")) == 2 and NAME.fullmatch(parts[0]):
        inner = solution_set(parts[1])
        return inner and (squeeze(parts[0]), inner[1])
    whole = enclosed(text)
    if whole and whole[0] == r"\{\}":
        if len(parts := split(whole[1], r"\\mid(?![a-z])|\||:")) == 2:
            inner = solution_set(parts[1])
            return ("", inner[1]) if inner and inner[0] == squeeze(re.split(r"\\in(?![a-z])", parts[0])[0]) else None
        values = [worth(item) for item in split(whole[1], ",")]
        return ("", sympy.FiniteSet(*values)) if all(isinstance(v, sympy.Expr) for v in values) else None
    if whole and whole[0] in ("()", "[]", "(]", "[)") and len(ends := split(whole[1], "[,;]")) == 2:
        low, high = map(worth, ends)
        if not all(isinstance(v, sympy.Expr) for v in (low, high)) or (low > high) == True:  # noqa: E712
            return None
        return "", sympy.Interval(low, high, whole[0][0] == "(", whole[0][1] == ")")
    if _RELATION.search(text) or "=" in text:
        return _solved(text)
    read = value(text) if r"\mathbb" in text or r"\emptyset" in text else None
    return ("", read) if isinstance(read, sympy.Set) else None


_RELATION = re.compile(r"\\[lgn]e(?![a-z])|<|>")


def _solved(text: str) -> tuple[str, Any] | None:
    """The set that a chain of relations in one unknown allows: 1 <= x < 2, |x| > 2, x != 2."""
    signs = re.findall(r"\\[lgn]e(?![a-z])|[<>=]", text)
    parts = [worth(part) for part in split(text, r"\\[lgn]e(?![a-z])|[<>=]")]
    if len(parts) != len(signs) + 1 or not all(isinstance(part, sympy.Expr) for part in parts):
        return None
    parts = [part.replace(lambda e: isinstance(e, AppliedUndef), lambda e: sympy.Symbol(str(e))) for part in parts]
    names = set().union(*(part.free_symbols for part in parts))
    plain_side = [part for part in parts if part.is_Symbol]
    unknown = plain_side[0] if len(plain_side) == 1 else names.pop() if len(names) == 1 else None
    kinds = {r"\le": sympy.Le, r"\ge": sympy.Ge, r"\ne": sympy.Ne, "<": sympy.Lt, ">": sympy.Gt, "=": sympy.Eq}
    if unknown is None:
        return None
    found: Any = sympy.S.Reals
    for sign, (left, right) in zip(signs, pairwise(parts)):
        if left == unknown or right == unknown:
            end = right if left == unknown else left
            if end.has(unknown):
                return None
            low = (sign in (r"\ge", ">")) == (left == unknown)
            if sign in ("=", r"\ne"):
                piece = sympy.FiniteSet(end) if sign == "=" else sympy.Complement(sympy.S.Reals, sympy.FiniteSet(end))
            else:
                ends = (end, sympy.oo) if low else (-sympy.oo, end)
                piece = sympy.Interval(*ends, low and sign in "<>", not low and sign in "<>")
        else:
            relation = kinds[sign](left, right)
            piece = relation.as_set() if hasattr(relation, "as_set") else None
        if piece is None:
            return None
        found = sympy.Intersection(found, piece)
    return str(unknown), found


def sets(gold: str, answer: str, same: Same) -> bool:
    r"""1<x<3 and "x>1 and x<3" for (1,3), x\ne2 for \mathbb{R}\setminus\{2\}; another unknown is wrong."""
    if not all(re.search(r"[<>=()\[\]]|\\[lgn]e(?![a-z])|\\\{|\\in|\\mathbb|\\emptyset|real", text) for text in (gold, answer)):
        return False
    a, b = solution_set(gold), solution_set(answer)
    return bool(a and b and (not a[0] or not b[0] or a[0] == b[0]) and same_values(a[1], b[1]))


# ================================================================================================== words


_SAID = {  # what is said in words, in the commonest languages of answers
    "yes": "yes|oui|s[ií]|ja|да|是的?",
    "no": "no|non|nein|nee|нет|否|不是",
    "true": "true|vrai|wahr|verdadero|vero|верно|истина|正确|对|真",
    "false": "false|faux|falsch|falso|неверно|ложь|错误?|假",
    "none": "none|no(?: real| such)? (?:solutions?|values?|numbers?|integers?)(?: exists?)?|there (?:is|are) no(?: real)? solutions?|nothing"
    r"|aucune?(?: solution)?|keine?(?: lösung(?:en)?)?|ning[uú]n[oa]?|nessun[oa]?|нет решений|无解|没有|\\emptyset|(?:the )?empty set|dne"
    "|does not exist|undefined|impossible",
}
_SAID_PATTERNS = [(word, re.compile(pattern)) for word, pattern in _SAID.items()]


def words(gold: str, answer: str, same: Same) -> bool:
    """yes, YES. for Yes, "an ellipse" for ellipse, oui for yes, "no solution" for none; nothing else is ignored."""

    def said(text: str) -> str:
        text = re.sub(r"[a-zA-Z]{2,}|^A\b", lambda word: word[0].lower(), plain(text))
        text = re.sub(r"(?<=[a-z]{2})-(?=[a-z]{2})", " ", re.sub(r"(?<=[a-z]),(?= ?[a-z]{2})|[.!?'\"]+(?!\w)", " ", text))
        text = re.sub(r" ?([^\w ]) ?", r"\1", " ".join(re.sub(r"^ ?(?:an?|the) ", "", text).split()))
        return next((word for word, pattern in _SAID_PATTERNS if pattern.fullmatch(text)), text)

    wordy = re.search(r"[^\W\d_]{4}|[^\x00-\x7f]|(?i:\bno\b|\byes\b|\ball\b|\bdne\b)", re.sub(r"\\[a-zA-Z]+", "", gold)) or r"\text" in gold or gold == r"\emptyset"
    if answer in ("None", "NaN") or not wordy:
        return False
    return said(gold) == said(answer)


_OPTION = re.compile(
    r"(?:(?i:the )?(?i:correct |final )?(?i:option|choice|answer|ans)(?i: is)?:? ?|选项?|答案[是:]? ?)?"
    r"(?:\( ?([A-Ja-j]) ?\)|([A-J])(?=[).:] |[).:]?$))[).:]* ?((?![,;]|and\b|or\b)[-\w\\($].*)?"
)


def options(gold: str, answer: str, same: Same) -> bool:
    """(C), "C) 7" and "option C" for C, "B) 12" for 12; several letters in any order: "A, B, D" and BDA for ABD."""

    def choice(text: str) -> tuple[str, str] | None:
        found = _OPTION.fullmatch(plain(text)) or re.fullmatch("()([a-j])()", text)
        if not found or (found[3] and (re.search(r"\([A-Ja-j]\)|\b[A-J][).:]", found[3]) or re.search(_HEDGE, found[3]))):
            return None
        return (found[1] or found[2]).upper(), found[3] or ""

    g, a = choice(gold), choice(answer)
    if re.fullmatch("[A-J]{2,6}", gold) and len(set(gold)) == len(gold):
        letters = items(plain(answer))[1] if len(items(plain(answer))[1]) > 1 else [answer]
        if all(re.fullmatch(r"\(?[A-J]\)?", letter) for letter in letters) or re.fullmatch("[A-J]{2,6}", answer):
            return sorted(gold) == sorted(re.findall("[A-J]", answer))
    if g and a:
        return g[0] == a[0] and (gold, answer) != (g[0], a[0]) and not (g[1] and a[1] and not same(g[1], a[1]) and not g[0] == a[0])
    if g and g[1]:
        return same(g[1], answer)
    return bool(a and a[1] and not g and same(gold, a[1]))


_HEDGE = r"\b(?:not|or|either|neither|maybe|possibly|perhaps|incorrect|wrong|vs|versus|but|unless|otherwise|except|if|odd|even|else)\b"
_REASON = re.compile(
    r"(.*?[^ ,;.(])[ ,;.]*\(?(?:\\text ?\{)? ?"
    r"\b(?:(?:since|because|as (?:required|desired|claimed|\w+ =)|attained|achieved|which is (?:attained|achieved)|when we|by (?:the|symmetry|AM)"
    r"|for (?:all|any|every|each|some)|where|with|для всех|in (?:total|all)|each|altogether|respectively|(?:occurs|obtained) (?:at|when))\b"
    r"|для|因为).*"
)
_DOMAIN = re.compile(
    r"(.+?)[ ,;]*(?:\\q?quad|,|\(| |\\text ?\{ ?(?:for|where|with|,)? ?\}|\\text\{ ?\()+ ?(?:(?:for|where|with) )?"
    r"([a-zA-Z](?:_\w)?(?: ?, ?[a-zA-Z])* ?(?:\\in(?![a-z])|\\[lgn]e(?![a-z])|[<>])[^,;=]*)\)?"
)
_RESTRICTS = re.compile(r"\b(?:if|otherwise|or|odd|even|else|except|remainder|not|but|unless|(?:is|equals) -?[0-9])\b")


def without_remark(text: str) -> str:
    r"""12 for "12 since 3\cdot4=12", 2x for "2x for all real x" and "2x, x\ne2"; "0 for odd n" stays."""
    shorter = plain(text)
    for pattern in (_REASON, _DOMAIN):
        found = pattern.fullmatch(shorter)
        if found and not hopeless(found[1]) and not _RESTRICTS.search(shorter[len(found[1]) :]) and not re.search(r"[a-zA-Z]{3,} [a-zA-Z]{2,}|[<>]", re.sub(r"\\[lg]e(?![a-z])", "<", found[1]).replace("\\", " \\")):
            remark = shorter[len(found[1]) :]
            if pattern is _REASON and re.search(r"where|with", remark[:12]) and re.search(r"= ?-?[0-9]", remark):
                return text  # 2n where n=3
            return found[1]
    return text


def renamed_parameters(gold: str, answer: str, same: Same) -> bool:
    r"""n\pi, n\in\mathbb{Z} for k\pi, k\in\mathbb{Z}; Ae^x for any constant A for Ce^x, C\in\mathbb{R}."""

    def parameters(text: str) -> list[str]:
        rest = plain(text)[len(without_remark(text)) :] if without_remark(text) != text else ""
        if whole := enclosed(text):
            rest = text if r"\mid" in text or ":" in text or "|" in text else ""
        return re.findall(r"(?<![a-zA-Z\\])([a-zA-Z])(?= ?(?:\\in(?![a-z])|is an?\b|\W*$))(?!\W*\}$)", rest)

    g, a = parameters(gold), parameters(answer)
    if len(g) != 1 or len(a) != 1 or g == a:
        return False
    renamed = re.sub(rf"(?<![a-zA-Z\\]){a[0]}(?![a-z])|(?<=[0-9)]){a[0]}", g[0], answer)
    return g[0] not in re.findall("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", plain(answer))) and same(gold, renamed)


# ================================================================================================== numbers in words

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBERS = {word: n for n, word in enumerate(_ONES.split())} | {word: 10 * n for n, word in enumerate(_TENS.split(), 2)}
_SCALES = {"dozen": 12, "score": 20, "hundred": 100, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7}
_SCALES |= {"billion": 10**9, "bn": 10**9, "trillion": 10**12, "万": 10**4, "亿": 10**8, "百": 100, "千": 1000}
_PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "eighth": 8, "ninth": 9, "twelfth": 12}
_PARTS |= {re.sub("y$", "ie", w) + "th": n for w, n in (_NUMBERS | _SCALES).items() if n and f"{w}th" not in ("fiveth", "eightth", "nineth", "twelveth")}
_PARTS |= {"basis point": 10**4, "permille": 1000, "per mille": 1000}


def in_digits(text: str) -> str:
    """21 for twenty-one, 3000000 for "3 million", 7/16 for "7 sixteenths", 2.5 for "2 dollars and 50 cents"."""
    said = plain(text).lower()
    if money := re.fullmatch(r"([0-9]+) dollars? (?:and )?([0-9]{1,2}) cents?", said):
        return f"{money[1]}.{int(money[2]):02}"
    if not re.search("[^\\W\\d_]", said):
        return text
    total, current = 0, 0
    for word in re.split("[ -]", re.sub(r"\band ", "", said)):
        if word in _NUMBERS:
            current += _NUMBERS[word]
        elif word in _SCALES and current:
            total, current = (total, current * 100) if word == "hundred" else (total + current * _SCALES[word], 0)
        else:
            break
    else:
        return str(total + current)
    match = re.fullmatch(r"(.*[0-9}!)]|an?|one) ?-? ?([^\W\d_]+(?: points?| mille)?)(?: (.*))?", said)
    if match and (scale := match[2] if match[2] in _SCALES | _PARTS | _POWERS else match[2].removesuffix("s")) in _SCALES | _PARTS | _POWERS:
        many = number(re.sub("^(?:an?|one)$", "1", match[1]))
        if many is not None:
            result = many ** _POWERS[scale] if scale in _POWERS else many * (_SCALES.get(scale) or Fraction(1, _PARTS[scale] if scale in _PARTS else 1))
            return f"{result} {match[3] or ''}".strip()
    return text


_POWERS = {"squared": 2, "cubed": 3}
_UNITS = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimetre|cm centimeter centimetre|m meter metre|km kilometer kilometre|in inch inche|ft foot feet|yd yard|mi mile"
        "|mg milligram|g gram|kg kilogram|lb pound|oz ounce|ml mL milliliter|l L liter litre|s sec second|min minute|h hr hour|day|week|month"
        "|yr year|mph|kph kmh|dollar USD|cent|euro EUR|rad radian|deg degree|N newton|J joule|W watt|V volt|A ampere|K kelvin|Pa pascal|Hz"
    ).split("|")
    for name in names.split()
}
_FILLER = set("square sq cubic cu per of the in a an total all each red blue green people men women children person unit with certainty inclusive sq. mol kJ eV kPa kW dm dl cl cc rs gbp inr jpy cny fps erg rpm".split())
_NO_UNIT = re.compile(
    r"\b(?:or|and|not|if|for|when|where|then|mod|modulo|to|is|than|more|less|below|negative|minus|plus|times|over|factorial|choose|base|out"
    r"|least|most|either|otherwise|except|unless|but|only|double[sd]?|twice|triple[sd]?|halve[sd]|infinity|root|power|approx\w*|decrease|increase|basis"
    r"|score|dozen|remainder|pairs|per ?mille?|percent\w*|points? of|squares?d|cubed|vs|versus|maybe|possibly|\w*(?:illion|thousand|hundred)s?\w*|\w{2,}(?:th|rd)s?|seconds? of|crore|lakh|bn)\b"
)
_TAIL = re.compile(r"(?:\\text ?\{(?:[^{}0-9]|\^ ?\{? ?-?[0-9] ?\}?)*\}|\\Omega|[a-zA-Z.]|\^ ?\{? ?-?[0-9] ?\}?| |/|\\cdot|\\times|\\mu|\\circ|·|[^\x00-\x7f])+")
_CURRENCY = re.compile(r"([-+]?) ?(?:US|R|Rs\.?|USD|EUR|GBP|INR|JPY|CNY|RMB|CAD|AUD|CHF|HK) ?(?=[-0-9.])(.*)")


def quantity(text: str) -> tuple[str, list[str]] | None:
    """("5", ["km", "h"]) of "5 km/h": a value and the units after it; None if there is none or it is more than a unit."""
    if money := _CURRENCY.fullmatch(plain(text)):
        return money[1] + money[2], []
    start = re.search(r"(?<=[0-9})!\]a-z]) ?\\text ?\{|(?<=[0-9})!\]]) ?(?=[a-zA-Z]{2})| (?=[a-zA-Z](?:[ /^.]|$))|(?<=[0-9}]) ?(?=[^\x00-\x7f]|\\mu ?\\text|\\Omega)", text)
    while start and (depth := text[: start.start()].count("{") - text[: start.start()].count("}")) > 0:
        start = re.compile(r" ?\\text ?\{").search(text, start.end())
    if not start or not _TAIL.fullmatch(tail := text[start.start() :].strip()):
        return None
    named_units = re.findall(r"[^\W\d_]+", plain(tail.replace(r"\cdot", " ").replace(r"\times", " ")))
    short = r"\text" in tail or any(len(unit) > 1 for unit in named_units)
    if _NO_UNIT.search(plain(tail)) or not named_units or named_units in (["e"], ["i"], ["pi"], ["x"], ["d"], ["j"]):
        return None
    last = named_units[-1]
    for unit in named_units:
        known = unit in _UNITS or unit.removesuffix("s") in _UNITS or unit.lower() in _FILLER or not unit.isascii()
        if not known and not (len(last) > 3 and last.endswith("s") and not last.endswith("ss") and len(unit) > 2):
            return None
    if not short and number(text[: start.start()]) is None:
        return None
    return text[: start.start()].strip(), [_UNITS.get(u) or _UNITS.get(u.removesuffix("s")) or "" for u in named_units]


def units(gold: str, answer: str, same: Same) -> bool:
    r"""5 km/h, \$5 and "5 apples" for 5; a unit may be missing, but 5 minutes is not 5 hours, and 5 million is not 5."""
    g, a = quantity(gold), quantity(answer)
    if g is None and a is None:
        return False
    known = [[unit for unit in read[1] if unit] for read in (g, a) if read]
    if len(known) == 2 and all(known) and known[0] != known[1]:
        return False
    return same(g[0] if g else gold, a[0] if a else answer)


_SECONDS = {"s": 1, "min": 60, "h": 3600, "day": 86400, "week": 604800}


def durations(gold: str, answer: str, same: Same) -> bool:
    """90 minutes and "1 hour 30 minutes" for 1.5 hours."""

    def seconds(text: str) -> Fraction | None:
        parts = re.findall(r"([0-9.]+|\\frac\{\d+\}\{\d+\}) ?([a-z]+)[ ,]*(?:and )?", said := plain(text))
        total = Fraction(0)
        for many, unit in parts:
            unit = _UNITS.get(unit, _UNITS.get(unit.removesuffix("s"), ""))
            if unit not in _SECONDS or number(many) is None:
                return None
            total += (number(many) or 0) * _SECONDS[unit]
        rest = re.sub(r"([0-9.]+|\\frac\{\d+\}\{\d+\}) ?([a-z]+)[ ,]*(?:and )?", "", said)
        return total if parts and not rest else None

    a, b = seconds(gold), seconds(answer)
    return a is not None and a == b


def percents(gold: str, answer: str, same: Same) -> bool:
    r"""0.5 and 50\% for each other; 20 for 20\% ("what percent?"), but 5 is not 500\%."""
    g, a = gold.endswith("%"), answer.endswith("%")
    x, y = gold.rstrip("% "), answer.rstrip("% ")
    if g and a:
        return same(x, y)
    if g == a:
        return False
    many = number(x if g else y)
    if many is None:
        return same(*((f"({x})/100", answer) if g else (gold, f"({y})/100")))
    other = number(answer if g else gold)
    return other == many / 100 or other == many > 1 if other is not None else same(*((str(many / 100), answer) if g else (gold, str(many / 100))))


def ratios(gold: str, answer: str, same: Same) -> bool:
    """6:8 for 3:4; neither 4:3 nor 3/4, and no times of the day."""
    g, a = split(gold, ":"), split(answer, ":")
    if len(g) < 2 or len(g) != len(a) or re.fullmatch("[0-9]{1,2} ?: ?[0-5][0-9]", gold):
        return False
    return all(same(f"({x})\\cdot({w})", f"({z})\\cdot({y})") for (x, y), (z, w) in zip(pairwise(g), pairwise(a)))


# ================================================================================================== other notations


def points(gold: str, answer: str, same: Same) -> bool:
    r"""P(1,-2,3), a column and \hat{i}-2\hat{j}+3\hat{k} for (1,-2,3)."""

    def coordinates(text: str) -> str:
        if column := re.fullmatch(r"\\begin ?\{pmatrix\}([^&]*?)(?:\\\\)? ?\\end ?\{pmatrix\}(\^ ?\{?T\}?)?", text):
            return f"({column[1].replace(chr(92) * 2, ', ')})" if r"\\" in column[1] else text
        if row := re.fullmatch(r"\\begin ?\{pmatrix\}([^\\]*&[^\\]*)\\end ?\{pmatrix\}(?:\^ ?\{?(?:T|\\top)\}?)", text):
            return f"({row[1].replace('&', ', ')})"
        if named_point := re.fullmatch(r"[A-Z](?:_\w)?'? ?=? ?(\(.*[,;].*\))", text):
            return named_point[1]
        if re.search(r"\\hat ?\{?i", text) or re.search(r"\\hat ?\{?j", text):
            found = {axis: "0" for axis in "ijk"}
            terms = re.findall(r"([-+]? ?[^-+]*?)\\hat ?\{? ?\\?([ijk])(?:math)? ?\}?", text)
            found |= {axis: re.sub(r"^([-+]?) ?$", r"\g<1>1", part.strip()).lstrip("+") for part, axis in terms}
            return f"({found['i']}, {found['j']}, {found['k']})"
        return text

    g, a = coordinates(gold), coordinates(answer)
    brackets = {(enclosed(text) or ("",))[0] for text in (g, a)}
    return (g, a) != (gold, answer) and brackets == {"()"} and same(g, a)


def congruences(gold: str, answer: str, same: Same) -> bool:
    r"""n\equiv7\pmod5 and "n mod 5 = 2" for n\equiv2\pmod5; several residues in any order."""

    def residues(text: str) -> tuple[str, Any, str] | None:
        said = plain(text)
        found = re.fullmatch(r"(?:(.*?)(?:\\equiv(?![a-z])|=))?(.*?)(?:\\[pb]?mod(?![a-z])|\(? ?(?<![a-z])mod(?![a-z]))(.*)", said)
        if late := re.fullmatch(r"(\w+) ?\\?[pb]?mod(?![a-z]) ?\{?(\w+)\}? ?= ?(.*)", said):
            name, rest, modulus = late[1], late[3], late[2]
        elif found:
            name, rest, modulus = (found[1] or "").strip(), found[2], found[3].strip("(){} ")
        else:
            return None
        numbers = [number(item) for item in items(rest.strip())[1]]
        if modulus.isdigit() and int(modulus) and None not in numbers:
            return name, {n % int(modulus) for n in numbers if n is not None}, modulus
        return name, squeeze(rest), modulus

    g, a = residues(gold), residues(answer)
    return bool(g and a and g[1:] == a[1:] and (not g[0] or not a[0] or g[0] == a[0]) and g[2])


def pieces(gold: str, answer: str, same: Same) -> bool:
    r"""The pieces of a function, in any order: "-x if x<0, x if x\ge0" for \begin{cases}x&x\ge0\\-x&x<0\end{cases}."""

    def parts(text: str) -> list[tuple[str, str]]:
        text = re.sub(rf"\\text ?\{{ ?({_IF}|and|,| )+ ?\}}", " if ", text)
        text = re.sub(r"(?: ?\bif )+", " if ", re.sub(rf"\\text ?\{{ ?(?:{_IF}) ", r" if \\text{", text))
        found = [re.split(rf" ?,? ?\b(?:{_IF}) ", plain(part), maxsplit=1) for part in split(text, r"[,;](?! ?(?:\\text ?\{ ?)?if )")]
        return [(part[0].strip(), re.sub(r"\bn is |\b(?:is|n) ", "", part[1]).strip()) for part in found if len(part) == 2] if all(
            len(part) == 2 for part in found) else []  # fmt: skip

    (name, *_), (other, *_) = split(gold, "="), split(answer, "=")
    if NAME.fullmatch(name) and NAME.fullmatch(other) and name == other:
        gold, answer = gold[len(name) :].lstrip("= "), answer[len(other) :].lstrip("= ")
    g, a = parts(gold), parts(answer)
    if len(g) < 2 or len(g) != len(a):
        return False
    return all(any(same(x, z) and (squeeze(c) == squeeze(d) or same(c, d) or sorted(c.split()) == sorted(d.split())) for z, d in a) for x, c in g)


_IF = "if|for|when|where"


def bases(gold: str, answer: str, same: Same) -> bool:
    r"""1010_{\text{two}}, "1010 in base 2", (1010)_2, 0b1010 and 1010 for 1010_2; its decimal value is another answer."""

    def digits(text: str) -> tuple[str, str] | None:
        said = plain(text)
        if hexed := re.fullmatch("0([xb])([0-9A-Fa-f]+)", said):
            return hexed[2].upper().lstrip("0"), {"x": "16", "b": "2"}[hexed[1]]
        found = re.fullmatch(r"(-?) ?\(? ?([0-9A-F]+) ?\)? ?(?:_ ?\{? ?(\w+) ?\}?|\(?(?:in )?base ?-?(\w+)\)?)", said)
        base = found and (found[3] or found[4])
        if not found or not base or not (base.isdigit() or base in _NUMBERS):
            return None
        return found[1] + found[2].lstrip("0"), base if base.isdigit() else str(_NUMBERS[base])

    g, a = digits(gold), digits(answer)
    if g and a:
        return g == a
    if g:
        return re.fullmatch(r"-?[0-9A-F]+", answer) is not None and g[0] == answer.lstrip("0")
    return bool(a and a[1] == "10" and same(gold, a[0]))


def digit_groups(gold: str, answer: str, same: Same) -> bool:
    """1,25,000 (Indian groups) for 125000, and 3,75 (a decimal comma) for 3.75."""
    if re.fullmatch(r"[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}", answer):
        return same(gold, answer.replace(",", ""))
    return re.fullmatch(r"[0-9]+\.[0-9]+", gold) is not None and answer.replace(",", ".") == gold


def dotted(text: str) -> str:
    r"""1,2,3,4 for 1,2,\ldots,4."""
    brackets, parts = items(text)
    if len(parts) > 3 and parts[-2] == r"\ldots":
        numbers = [number(part) for part in parts[:-2] + parts[-1:]]
        if all(n is not None and n.denominator == 1 for n in numbers):
            first, *_, before, last = (int(n) for n in numbers if n is not None)
            step = int(numbers[1] or 0) - first
            if step > 0 and before + step <= last <= first + 99 * step and (last - first) % step == 0 and all(
                y - x == step for x, y in pairwise(int(n) for n in numbers[:-1] if n is not None)):  # fmt: skip
                inside = ", ".join(map(str, range(first, last + 1, step)))
                return brackets[: len(brackets) // 2] + inside + brackets[len(brackets) // 2 :] if brackets != "or" else inside
    return text


_READINGS = [
    (re.compile(pattern), new)
    for pattern, new in [
        # The answer is 6; Therefore 6; 答案是 6
        (r"^(?:\\therefore|(?i:(?:(?:so|hence|thus|therefore|then)[, ]+)*(?:the )?(?:final |correct )?(?:answer|ans|result|value)(?:(?: is|:|=)+ ?))|(?i:so|hence|thus|therefore)\b,?|答案[是为:]* ?) ?(.+)$", r"\1"),
        # so the answer is 6, "the number is not 10 which is 11", 计算: 72000/18=4000千克
        (r"^[^=]*(?:[^\W\d_]{2,}[^\w=]+){2,}(?:.* )?(?:is|est|it's|equals|:|=) ([^=]*[0-9][^=]*)$|^[^=]*[\u0400-\uffff][^=]*(?:.*=|是|为) ?([^=是为]+)$", lambda m: m[1] or m[2]),
        # 4\pi (\approx 12.57), x=\sqrt2\approx1.414, approximately 3.14
        (r"^(.+?)[ ,]*(?:\( ?)?(?:\\approx(?![a-z])|\b(?:approximately|approx\.?|about|roughly)(?![a-z])) ?[^()]*\)?$", r"\1"),
        (r"^(?:\\approx(?![a-z])|(?:approximately|approx\.?|about|roughly)\b) ?(.+)$", r"\1"),
        # C(10,3), {}^{10}C_3, \mathrm{C}_{10}^3, A_5^2, P(5,2)
        (r"(?<![a-zA-Z\\])C ?\( ?([^(),]+) ?, ?([^(),]+) ?\)|(?:\{ ?\})?(?:\^|_) ?\{?(\w+)\}? ?C ?_ ?\{?(\w+)\}?|(?<![a-zA-Z\\])C ?_ ?\{?(\w+)\}? ?\^ ?\{?(\w+)\}?",
         lambda m: rf"\binom{{{m[1] or m[3] or m[5]}}}{{{m[2] or m[4] or m[6]}}}"),
        (r"(?<![a-zA-Z\\])[AP] ?_ ?\{?(\w+)\}? ?\^ ?\{?(\w+)\}?|(?:\{ ?\})?(?:\^|_) ?\{?(\w+)\}? ?P ?_ ?\{?(\w+)\}?",
         lambda m: rf"\frac{{{m[1] or m[3]}!}}{{({m[1] or m[3]}-{m[2] or m[4]})!}}"),
        # \mathbb{R}_{>0}, all real x with x<2
        (r"^\\mathbb ?\{? ?R ?\}? ?(?:\^ ?\{? ?\+ ?\}?|_ ?\{? ?(?:\+|> ?0) ?\}?)$", r"(0,\\infty)"),
        (r"^\\mathbb ?\{? ?R ?\}? ?_ ?\{? ?\\ge ?0 ?\}?$", r"[0,\\infty)"),
        (r"^(?:the set of )?(?:all )?(?:the )?real(?: number)?s?(?: ?[a-z] ?)?(?: ?(?:with|such that|where|satisfying) ?)(.+)$", r"\1"),
        (r"^(?:the set of )?(?:all )?(?:the )?real(?: number)?s$", r"\\mathbb{R}"),
        # f\colon x\mapsto x^2, f(x)\equiv0
        (r"^(\w) ?: ?(\w) ?\\mapsto(?![a-z]) ?(.+)$", r"\1(\2)=\3"),
        (r"^(\w\(\w\)) ?\\equiv(?![a-z]) ?([^()]*(?:\([^()]*\)[^()]*)*)$", r"\1=\2"),
        # 20\% decrease
        (r"^(.*%) ?(?:decrease|increase|off|discount|more|less)$", r"\1"),
        # 9:30 a.m.
        (r"^(?:at )?([0-9]{1,2})(?::([0-9]{2}))? ?([apAP])\.? ?[mM]\.?$", lambda m: rf"\text{{at {int(m[1])}:{m[2] or '00'} {m[3].lower()}m}}"),
    ]
]  # fmt: skip


def plainer(text: str) -> str:
    """What the table of readings makes of a text, one after the other."""
    for pattern, new in _READINGS:
        said = plain(text)
        if (read := pattern.sub(new, said)) != said:
            text = read
    return text


READINGS = (plainer, without_remark, in_digits, dotted)
RULES = (
    named, lists, systems, one_unknown, renamed_argument, sets, words, options, renamed_parameters, units, durations, percents,
    ratios, points, congruences, pieces, bases, digit_groups,
)  # fmt: skip


# ================================================================================================== verdict


def equal(gold: str, answer: str, seen: set[tuple[str, str]], depth: int = 0) -> bool:
    """Is a cleaned answer a cleaned gold?"""
    gold, answer = bare(gold), bare(answer)
    if not gold or not answer or (gold, answer) in seen or depth > 8:
        return False
    a, b = number(gold), number(answer)
    if a is not None and b is not None:
        return a == b
    if squeeze(gold) == squeeze(answer):
        return True
    seen.add((gold, answer))

    def same(x: str, y: str) -> bool:
        return equal(x, y, seen, depth + 1)

    if not any(veto(gold, answer) for veto in VETOES) and same_values(worth(gold), worth(answer)):
        return True
    for reading in READINGS:
        if (g := reading(gold)) != gold or (a2 := reading(answer)) != answer:
            if same(g, reading(answer)):
                return True
    return any(rule(gold, answer, same) for rule in RULES)


def listed(gold: str, answer: str) -> bool:
    """2,3,3 for 2,2,3 and (2,1) for (1,2): math-verify's sets know neither order nor number; lists compares the items."""
    return any(len(items(text)[1]) > 1 for text in (gold, answer))


def half_named(gold: str, answer: str) -> bool:
    """x+y=5 for 5 or x=y for y: an equation is not its last side; named tells which are."""
    return ("=" in gold) != ("=" in answer)


def compared_sizes(gold: str, answer: str) -> bool:
    """12:30 for 2/5, 1:2 for 1/2: the parser reads a ratio as a quotient."""
    return ":" in gold or ":" in answer


def names_of_points(gold: str, answer: str) -> bool:
    """\\angle ACB for \\angle ABC: the parser reads a product."""
    return bool(re.search(r"\\(?:angle|triangle|bar|subset|Rightarrow)(?![a-z])", gold + answer))


VETOES = (names_of_points, listed, half_named, compared_sizes)


@lru_cache(maxsize=100_000)
def cleaned(text: str) -> str | None:
    """The text after the table of cleaning; None if it is hopeless or much too long."""
    if len(text) > MAX_GOLD_CHARS:
        return None
    text = bare(clean(text))
    return None if hopeless(text) else text


def checked_gold(gold: str) -> str:
    """A gold, cleaned; ValueError, naming it, if nothing can be compared with it: that is an error in the data."""
    text = extract_answer(gold) if r"\boxed" in gold or r"\fbox" in gold else gold
    if text and len(text) > MAX_GOLD_CHARS:
        return text
    if not text or (read := cleaned(text)) is None:
        raise ValueError(f"gold answer cannot be parsed: {gold if len(gold) < 200 else gold[:200] + '...'!r}")
    return read


def check(gold: str) -> str | None:
    """What is wrong with a gold, or None."""
    try:
        return checked_gold(gold) and None
    except ValueError as error:
        return str(error)


def right(gold: str, answer: str) -> bool:
    """Is an extracted answer the gold? ValueError for a gold that cannot be read."""
    read = checked_gold(gold)
    if len(answer) > max(MAX_CHARS, 2 * len(gold)):
        return False
    text = cleaned(answer)
    return text is not None and equal(read, text, set())


def as_asked(gold: str, answer: str) -> str | None:
    """An answer read as the gold's form asks, for voting: a bare list with its brackets, x=5 as 5 if no name is asked."""
    read, text = checked_gold(gold), cleaned(answer) if len(answer) <= MAX_CHARS else None
    if text is None:
        return None
    text = bare(plainer(text))
    option = _OPTION.fullmatch(plain(text))
    if option and re.fullmatch("[A-J]", read):
        return option[1] or option[2]
    if option and option[3]:
        text = option[3]
    parts, golds = sides(text), sides(read)
    if len(golds) < 2 < 1 + len(parts) and NAME.fullmatch(parts[0]):
        text = parts[-1]
    if len(golds) > 1 and len(parts) < 2 and NAME.fullmatch(golds[0]):
        text = f"{golds[0]}={text}"
    brackets, entries = items(text)
    if brackets in ("", "or") and len(entries) > 1 and "=" not in text and solution_set(text) is None:
        wanted = (enclosed(read) or ("",))[0]
        text = f"({', '.join(entries)})" if wanted == "()" and brackets == "" else rf"\{{{', '.join(entries)}\}}"
    if text.endswith("%") and not read.endswith("%") and (many := number(text.rstrip("% "))) is not None:
        text = str(many / 100)
    return text


def same_vote(gold: str, a: str, b: str) -> bool:
    """Are two wrong answers one and the same answer to the question with this gold?"""
    x, y = as_asked(gold, a), as_asked(gold, b)
    return x is not None and y is not None and (equal(x, y, set()) or equal(y, x, set()))
