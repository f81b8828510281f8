"""What the rules see of a cleaned text: its brackets, items, sides, names and numbers."""

import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from grading.box import TEXT, T, W

Same = Callable[[str, str], bool]  # the whole question about two texts, which a rule may ask about parts
OR, AND = rf"{W}(?:or|oder|ou|или|或者?){T}", rf"{W}(?:and|et|und|и|和){T}"
RELATION = re.compile(rf"\\(?:[lgn]e|in){T}|[<>]")
SYMBOL = r"(?:\\(?:mathbb|hat|bar) ?\{?[a-zA-Z]\}?|\\[a-zA-Z]+|[a-zA-Z])(?:_(?:\w|\{\w+\}))?'{0,3}"
# what may stand before "=": x, f(x), E[X], (x,y), AB, |AB|, \angle ABC, \text{Area}, Area, [ABC], \frac{AB}{CD}, x:y
NAME = re.compile(
    rf"{SYMBOL}(?:\^ ?\{{?-1\}}?)? ?(?:\([\\\w, ]*\)|\[[A-Z]\])?|\([^()=]*,[^()=]*\)|\|?[A-Z](?: ?[A-Z]){{1,3}}\|?"
    rf"|(?:s|R|\\sigma)\^ ?\{{?2\}}?"
    rf"|\\(?:angle|bar|triangle) ?\{{?[A-Z_0-9 ]+\}}?|\\text ?\{{[^{{}}]*\}}|[A-Z][a-z]{{2,}}|\[[A-Z]{{3,5}}\]"
    rf"|\\frac\{{ ?[a-zA-Z]{{1,2}} ?\}}\{{ ?[a-zA-Z]{{1,2}} ?\}}|{SYMBOL} ?: ?{SYMBOL}"
)
_BRACKET = r"\\?[{(\[]|\\?[})\]]"
_GREEK = set(r"\alpha \beta \gamma \delta \theta \lambda \mu \rho \sigma \phi \omega".split())
_SIGNS = re.compile(rf"\\[pm][pm]{T}")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)|^[1-9]\d?(?:,\d\d)+,\d{3}$")
_DIGITS = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"([-+]?) ?(?:([0-9]+) )?([-+]? ?{_DIGITS})"
    rf"(?:(?:[eE]| ?\\(?:times|cdot) ?\{{?10\}}? ?\^) ?\{{? ?([-+]?[0-9]{{1,3}}) ?\}}?)?(?: ?/ ?([-+]? ?{_DIGITS}))?"
)
_FRAC = re.compile(rf"\\frac ?\{{ ?([-+]? ?{_DIGITS}) ?\}} ?\{{ ?([-+]? ?{_DIGITS}) ?\}}")
_BROKEN = re.compile(  # 2+, x^^2, 1/0, 3 5, ((((
    r"[(\[{]{40}|(?<!\^)[-+*/^_=<>]$|\^ ?\^|\\frac ?\{[^{}]{0,99}\} ?(?:\{ ?[0.]+ ?\}|$)|/ ?(?:0+\.?0*|\.0+)(?![0-9.])"
    r"|(?<![_^0-9.{])(?<!frac )(?<!frac)[0-9][0-9.]{0,99} [0-9](?![0-9]{0,99}/[0-9])"
)


def split(text: str, pattern: str) -> list[str]:
    """Parts between the matches of `pattern` outside all brackets, without empty ones."""
    parts, start, depth = [], 0, 0
    for token in re.finditer(rf"(?P<cut>{pattern})|{_BRACKET}", text):
        if token["cut"] is None:
            depth += 1 if token[0][-1] in "{([" else -1
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
        depth += 1 if token[0][-1] in "{([" else -1
        if depth == 0 and token.end() == len(text):
            return opening + token[0], text[len(opening) : token.start()].strip()
    return "", text


def bare(text: str) -> str:
    """Without outer braces, a plus, a final stop, and commas between thousands outside brackets: 1000 of "{1,000}."."""
    text = re.sub(r"^[+=] ?(?=[\w\\])", "", text.strip(" ").rstrip(".,;: ")).removesuffix("\\").strip()
    while (whole := enclosed(text))[0] == "{}":
        text = whole[1].rstrip(".,; ")
    if "," in text and not re.search(r"[(\[]|\\\{", text):
        text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    return text


@lru_cache(maxsize=20_000)
def plain(text: str) -> str:
    """Without the braces of its texts."""
    return " ".join(re.sub(TEXT, r" \1 ", text).split()) if r"\text" in text else text


def squeeze(text: str) -> str:
    """Without the spaces that separate nothing."""
    return re.sub(r"(?<!\w) | (?!\w)", "", text)


def letters(text: str) -> set[str]:
    """The letters that may be unknowns."""
    names = re.findall(r"\\[a-zA-Z]+|[a-zA-Z]", re.sub(r"\{[pv]?matrix\}", "", text))
    return {name for name in names if len(name) == 1 or name in _GREEK} - {"e", "i", "E"}


@lru_cache(maxsize=20_000)
def number(text: str) -> Fraction | None:
    """Exact value of an integer, decimal, power-of-ten decimal, fraction or mixed number."""
    match = _NUMBER.fullmatch(_FRAC.sub(r" \1/\2", text).strip()) if len(text) < 4000 else None
    if not match:
        return None
    sign, whole, top, exponent, bottom = (part and part.replace(" ", "") for part in match.groups())
    if bottom and not Fraction(bottom):
        return None
    value = Fraction(top) * Fraction(10) ** int(exponent or 0) / Fraction(bottom or 1)
    if whole is not None:
        if bottom is None or not (top + bottom).isdigit() or value >= 1:
            return None  # two numbers in a row, or a product
        value += int(whole)
    return -value if sign == "-" else value


def hopeless(text: str) -> bool:
    """Empty, broken off, unbalanced, divided by zero, two numbers side by side, NaN."""
    count = Counter(re.sub(r"\\[{}]", "", text))
    balanced = count["{"] == count["}"] and count["("] + count["["] == count[")"] + count["]"]
    return not balanced or bool(_BROKEN.search(re.sub(TEXT, r"\\text{}", text))) or not re.search(r"\w|\\", text)


def upper_and_lower(text: str) -> list[str]:
    r"""(+1, -2) and (-1, +2) for (\pm1, \mp2): all the upper signs, or all the lower ones."""
    return [_SIGNS.sub(lambda m, signs=signs: signs[m[0][1] == "m"], text) for signs in ("+-", "-+")]


@lru_cache(maxsize=20_000)
def items(text: str) -> tuple[str, list[str]]:
    r"""Brackets, items: ("()", ["1", "2"]) of (1,2), "1 by 2", ("", ...) of "1, 2", ("or", ...) of "1 or 2", 1\pm2."""
    brackets, inside = enclosed(text)
    if brackets == "()" and _SIGNS.search(text):
        return "or", upper_and_lower(text)
    if brackets in ("()", r"\{\}", "[]"):
        parts = split(inside, "[,;]")
        flat = [item for part in parts for item in (items(part)[1] if _SIGNS.search(part) else [part])]
        brackets = "()" if brackets == "[]" and len(flat) > 2 else brackets
        return (brackets, flat) if len(flat) > 1 or brackets == r"\{\}" else ("", [text])
    for separator in (OR, AND, ";", ","):
        if len(parts := [part.strip(" ,") for part in split(text, separator)]) > 1:
            systems = separator in (OR, ";") or all("=" in part and "," in part for part in parts)
            each = [[part] if (systems and "=" in part) or enclosed(part)[0] else items(part)[1] for part in parts]
            return "or" if separator == OR else "", [item for part in each for item in part]
    if len(_SIGNS.findall(text)) == 1:
        return "or", [way.removeprefix("+").strip() for way in upper_and_lower(text)]
    factors = split(text, r"\bby\b")  # 5 cm by 3 cm
    return ("()", factors) if len(factors) > 1 else ("", [text])


def sides(text: str) -> list[str]:
    """The sides of an equation or of a chain of them; the text itself if it is none."""
    return [text] if RELATION.search(text) or len(items(text)[1]) > 1 else split(text, "=")


ON_NAME = re.compile(
    rf"(?:\\xi|[a-zA-Z](?:_\w)?) ?(?:\\(?:in|[lgn]e){T}|[<>])(?:[^,;=]|, ?(?=[^()\[\]]*[)\]}}])){{0,80}}$"
)
_REMARK = re.compile(
    r"(?<=[ ,;(])(?:(?:since|because|as (?:required|desired|claimed)|attained|achieved|obtained|by (?:the|symmetry|AM)"
    r"|respectively|for (?:all|any|every|each|some|integers?)|\\forall|where|with|which|для|因为"
    rf"|in (?:total|all))(?!\w).*$|(?:for (?:[a-zA-Z] ?, ?){{0,3}})?{ON_NAME.pattern})"
)
HEDGE = re.compile(
    r"\b(?:not|never|cannot|or|n?either|may|maybe|might|could|possibly|perhaps|probably|likely|guess|incorrect|wrong|false"
    r"|vs|but|unless|except|if|otherwise|odd|even|else|remainder|is -?[0-9])\b|^(?:where|with)\b.*= ?-?[0-9]"
    r"|\( ?[A-J] ?\)|\b[A-J][).:]"
)
_OPEN = re.compile(rf"[a-zA-Z]{{3}} [a-zA-Z]{{2}}|\b(?:if|when|unless|otherwise|else)$|{RELATION.pattern}")


def numbers_of(said: str) -> str:
    """Which numbers a remark speaks of: N, Z or R, or nothing of that kind."""
    found = re.search(r"\\in ?\\mathbb ?\{? ?([NZR]) ?\}?(?: ?([\^_]))?", said)
    if found:
        return "N" if found[2] and found[1] == "Z" else found[1] + (found[2] or "")
    words = re.search(r"(natural|(?:positive|negative) integer)|(integer)|(real)", said)
    return "NZR"[words.lastindex - 1] if words and words.lastindex else ""


def remark(text: str) -> tuple[str, str]:
    """("12", "since 3\\cdot4=12"), ("2x", "for all real x"), ("2x", "x\\ne2"); not of "2x for odd x"."""
    found = _REMARK.search(said := plain(text))
    if not found or HEDGE.search(found[0]) or any(re.match("-?[0-9]", part) for part in split(found[0], "[,;]")[1:]):
        return text, ""
    head = said[: found.start()].rstrip(" ,;.(")
    whole = (
        not hopeless(head)
        and not head.endswith((r"\exists", r"\forall"))
        and not _OPEN.search(re.sub(r"\\(?![lgn]e|in)[a-zA-Z]+", "", head))
    )
    return (head, found[0]) if whole else (text, "")
