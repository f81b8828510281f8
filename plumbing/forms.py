"""Reading answers: text → tidy → parse, the first two stages of answers.py (its table says what each form means).

tidy gives one spelling to each sign, macro and number. parse takes what is said in words first, then lists, sets and
relations, then single values; what nothing else claims is "latex", for algebra.py to read.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

MAX_PARSED_CHARS, MAX_DEPTH = 3000, 40  # longer texts are compared as text; depth of brackets

# ================================================================================================== tidy

_GLYPHS = r"""
− -  – -  — -  ‐ -  ‑ -  × \times~  · \cdot~  ⋅ \cdot~  ÷ /  ∞ \infty~  ± \pm~  ∓ \mp~  ∠ \angle~
≤ \le~  ⩽ \le~  ≦ \le~  ≥ \ge~  ⩾ \ge~  ≧ \ge~  ≠ \ne~  ≈ \approx~  ≡ \equiv~  ∧ \land~  ∨ \lor~
∪ \cup~  ∩ \cap~  ∈ \in~  ∖ \setminus~  ∅ \emptyset~  ∣ \mid~  ⟨ \langle~  ⟩ \rangle~
ℝ \mathbb{R}  ℤ \mathbb{Z}  ℕ \mathbb{N}  ℚ \mathbb{Q}  ℂ \mathbb{C}  √ sqrt  ∛ \sqrt[3]  ∜ \sqrt[4]
∑ \sum~  ∏ \prod~  ∫ \int~  ⌊ \lfloor~  ⌋ \rfloor~  ⌈ \lceil~  ⌉ \rceil~  º ^\circ~  ° ^\circ~
⁄ /  ∕ /  ∶ :  ′ '  ’ '  € $  £ $  ¥ $  ￥ $  ₹ $
"""
_AS_LATEX = str.maketrans(dict(re.findall(r"(\S) (\S+)", _GLYPHS)))  # "~" is a space
_PLAIN = r"(?<![\\a-zA-Z])"  # before a word that is not a macro
_END = r"(?![a-zA-Z])"  # after a macro
_FUNCTIONS = r"(?:arc)?(?:sin|cos|tan|cot)|sec|csc|ln|log|lg|exp"
_TRIG = re.compile(rf"\\(?:(?:sin|cos|tan|cot|sec|csc)h?){_END}")
_REWRITES = [
    (re.compile(pattern), new)
    for pattern, new in [  # one spelling for each thing; order matters
        # layout and emphasis
        (r"\\(?:left|right)\s*\.", ""),
        (rf"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|(?:no)?limits){_END}", ""),
        (r"\\[hv]space\*?\s*\{[^{}]*\}|\\(?:text)?color\s*\{[^{}]*\}", " "),
        (r"(?<!\\)\\[,;:> ]|\\q?quad|\\enspace|~|\s+", " "),
        (r",\s*\\!\s*(?=[0-9]{3})", ","),
        (r"\\!|(?<!\\)\\[()\[\]]|\\?\$|\\(?:pounds|euro|yen)(?![a-zA-Z])", ""),
        (rf"\\(?:boldsymbol|bm|pmb|underline|math(?:bf|it|sf|tt|normal)|emph){_END}", ""),
        (rf"\\(?:mbox|text[a-z]+|mathrm|operatorname){_END}|\\text\s+(?=\{{)", r"\\text"),
        (r"\\text\s*\{\s*\}", " "),
        (r"^\s*\*\*(.*)\*\*\W*$", r"\1"),
        (rf"\\text\s*\{{\s*({_FUNCTIONS})\s*\}}", r"\\\1 "),
        (rf"\\[dtc]frac{_END}", r"\\frac"),
        # one macro or sign for each meaning
        (rf"\\(?:le|leq|leqslant){_END}|<=", r"\\le "),
        (rf"\\(?:ge|geq|geqslant){_END}|>=", r"\\ge "),
        (rf"\\lt{_END}", "<"),
        (rf"\\gt{_END}", ">"),
        (rf"\\(?:neq|ne|not\s*=){_END}|!=", r"\\ne "),
        (rf"\\lbrace{_END}", r"\\{"),
        (rf"\\rbrace{_END}", r"\\}"),
        (rf"\\(?:vee|lor){_END}", r"\\text{or}"),
        (rf"\\(?:wedge|land){_END}", r"\\text{and}"),
        (rf"\\(?:smallsetminus|backslash){_END}", r"\\setminus "),
        (rf"\\(?:R|reals|Reals){_END}", r"\\mathbb{R}"),
        (rf"\\(?:[lc]?dots[bcmio]?|cdots){_END}|\.\.\.+", r"\\ldots "),
        (rf"\\varnothing{_END}|\\\{{\s*\\\}}", r"\\emptyset "),
        (r"\\begin\s*\{(?:array|[bvB]?matrix)\}(\s*\{[lcr|]*\})?", r"\\begin{pmatrix}"),
        (r"\\end\s*\{(?:array|[bvB]?matrix)\}", r"\\end{pmatrix}"),
        (r"[\[(]\s*(\\begin\{pmatrix\}.*\\end\{pmatrix\})\s*[\])]", r"\1"),
        (r"\*\*", "^"),
        (rf"\\colon{_END}", ":"),
        (r"\\lg\b", r"\\log_{10}"),
        (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}|^([^{}]*)\\choose(?![a-zA-Z])([^{}]*)$", r"\\binom{\1\3}{\2\4}"),
        (r"\^\s*\{?\s*\\prime\s*\}?", "'"),
        (
            r"\\frac\s*\{\s*(d|\\partial)\s*(?:\^\s*\{?\s*([0-9])\s*\}?)?\s*([a-zA-Z])\s*\}\s*\{\s*\1\s*([a-zA-Z][^{}]*?)\s*\}",
            lambda m: f"\\Xi_{{{m[1][1:]}d{m[2] or ''}{m[3]}{re.sub('[^0-9a-zA-Z]', '', m[4])}}}",
        ),
        (r"_\s*(?:\{\s*\\text\s*\{\s*(\w+)\s*\}\s*\}|\\text\s*\{\s*(\w+)\s*\})", r"_{\1\2}"),
        (r"\\text\s*\{\s*(?:\\?%|per ?cent(?:age)?|pct)\s*\}|\\%|\b(?:per ?cent(?:age)?|pct)\b", "%"),
        (r"\^\s*\{\s*\\circ\s*\}|\\degree(?:s|Celsius)?(?![a-zA-Z])|\^\s*\\circ(?![a-zA-Z])", r"^\\circ "),
        # as people type it
        (r"\bnp\.(?=[a-z])|\bmath\.(?=[a-z])", ""),
        (rf"{_PLAIN}(?:infinity|infty|inf){_END}", r"\\infty "),
        (rf"{_PLAIN}(pi|{_FUNCTIONS}){_END}", r"\\\1 "),
        (rf"{_PLAIN}sqrt\s*([0-9]+(?:\.[0-9]+)?|[a-zA-Z]{_END}|\\[a-zA-Z]+)", r"\\sqrt{\1}"),
        (rf"{_PLAIN}sqrt(?=\s*[({{\[])", r"\\sqrt"),
        (r"\^\s*(-?[0-9]+(?:\.[0-9]+)?)", r"^{\1}"),
        (r"\+\s*\\infty", r"\\infty"),
        (r"^\s*([a-z])\s*(?=\([^()]*\]$|\[[^\[\]]*\)$)", r"\1\\in "),
        # French intervals: ]1,2[ is (1,2)
        (
            r"([\[\]])([^][(),;]+[,;][^][(),;]+)([\[\]])",
            lambda m: ("(" if m[1] == "]" else "[") + m[2] + (")" if m[3] == "[" else "]"),
        ),
        (r"^\s*((?:\\text\s*\{\s*)?)([A-J])\)", r"\1(\2)"),
        # numbers
        (r"([0-9]+)!!", lambda m: str(math.prod(range(int(m[1][:3]), 0, -2)))),
        (
            r"(?<![0-9])([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))(?:([0-9]*)\\dot\s*\{?([0-9])\}?)?",
            lambda m: _repeating(m[1], m[2], "".join(filter(None, m.groups()[2:]))),
        ),
        (r"(?<![0-9])([0-9]*)\.([0-9]{0,20}?)([0-9]{1,20}?)\3+\s*\\ldots", lambda m: _repeating(m[1], m[2], m[3])),
        (r"(?<![0-9.])[1-9][0-9]{0,2}(?:(?:\{,\}|\s)[0-9]{3})+(?![0-9/])", lambda m: re.sub("[^0-9]", "", m[0])),
    ]
]


def _repeating(whole: str, start: str, period: str) -> str:
    r"""0.1666... as \frac{15}{90}."""
    nines = (10 ** len(period) - 1) * 10 ** len(start)
    value = Fraction(int((whole + start + period) or 0) - int((whole + start) or 0), nines)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _of_glyph(glyph: str) -> str:
    if (
        unicodedata.decomposition(glyph).startswith("<fraction>")
        and len(whole := unicodedata.normalize("NFKC", glyph).split("⁄")) == 2
        and all(whole)
    ):
        return rf"\frac{{{whole[0]}}}{{{whole[1]}}}"
    if unicodedata.category(glyph) == "Nd":
        return str(unicodedata.decimal(glyph))
    name = unicodedata.name(glyph, "").split()
    if name[:1] == ["GREEK"] and len(name) == 4 and name[1] in ("SMALL", "CAPITAL"):
        return rf"\{name[3].lower() if name[1] == 'SMALL' else name[3].capitalize()} "
    return "" if unicodedata.category(glyph) == "Cf" else glyph


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes; the text's end if it does not."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in "({[") - (text[at] in ")}]")
        if depth == 0:
            return at
    return len(text)


def _brace(text: str, opening: str, new: str) -> str:
    r"""sqrt(...) as \sqrt{...}, exp(...) as e^{...}: `opening` matches up to its parenthesis."""
    while match := re.search(opening, text):
        end = _closing(text, match.end() - 1)
        text = f"{text[: match.start()]}{new}{{{text[match.end() : end]}}}{text[end + 1 :]}"
    return text


def tidy(text: str) -> str:
    """LaTeX with one spelling for each sign, macro and number."""
    for kind, sign in (("<super>", "^"), ("<sub>", "_")):
        raised = {c for c in text if unicodedata.decomposition(c).startswith(kind) and c != "º"}
        for run in re.findall(f"[{''.join(raised)}]+", text) if raised else ():
            text = text.replace(run, f"{sign}{{{unicodedata.normalize('NFKC', run)}}}", 1)
    text = "".join(map(_of_glyph, unicodedata.normalize("NFKC", "".join(map(_of_glyph, text.translate(_AS_LATEX))))))
    text = text.translate(_AS_LATEX)  # what NFKC made of full-width signs
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = _brace(text, r"\\sqrt\s*\(", r"\sqrt")
    text = _brace(text, r"\\exp\s*\(", "e^")
    text = _brace(text, r"\^\s*\(", "^")
    if _TRIG.search(text):
        text = re.sub(r"([0-9.]+|\\?[a-zA-Z]+|\([^()]*\)|\{[^{}]*\})\s*\^\\circ", r"(\1\\cdot\\frac{\\pi}{180})", text)
    return re.sub(r"\^\\circ\s*(?:\\text\s*\{\s*[CF]\s*\}|[CF](?![a-zA-Z]))?", "", text).strip()


# ================================================================================================== parse

_DIGITS = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_SIMPLE_FRAC = re.compile(
    rf"\\frac\s*(?:\{{\s*([-+]?\s*{_DIGITS})\s*\}}|([0-9]))\s*(?:\{{\s*([-+]?\s*{_DIGITS})\s*\}}|([0-9]))"
)
_NUMBER = re.compile(
    rf"([-+]?)\s*(?:([0-9]+)\s+)?([-+]?\s*{_DIGITS})"
    r"(?:(?:[eE]|\s*(?:\\times|\\cdot)\s*10\s*\^)\s*\{?\s*([-+]?[0-9]{1,3})\s*\}?)?"
    rf"(?:\s*/\s*([-+]?\s*{_DIGITS}))?"
)
_TWO_NUMBERS = re.compile(r"(?<![_^0-9.])(?<!frac )(?<!frac)[0-9][0-9.]*\s+[0-9]")
_BROKEN = re.compile(r"[-+*/^_=<>]\s*$|\^\s*\^|\\frac\s*\{[^{}]*\}\s*(?:\{\s*0\s*\}|$)|/\s*0(?![0-9.])")
_PERIOD = re.compile(r"(?<![0-9])([0-9]*)\.([0-9]*)\(([0-9]+)\)$")
_SYMBOL = r"(?:\\[a-zA-Z]+|[a-zA-Z])(?:_(?:\w|\{[^{}]*\}))?'*"
_NAME = re.compile(  # what may stand before "=": x, x_1, f(x), (x,y), AB, |AB|, \angle ABC, \text{Area}, Area
    rf"{_SYMBOL}(?:\s*\([\w,\s]*\))?|\(\s*{_SYMBOL}(?:\s*,\s*{_SYMBOL})+\s*\)|\|?[A-Z](?:\s?[A-Z]){{1,3}}\|?"
    r"|\\(?:angle|overline)\s*\{?[A-Z_0-9{} ]+\}?|\\text\s*\{[^{}]*\}|[A-Z][a-z]{2,}"
)
_OR, _AND = (rf"\\text\s*\{{[,\s]*{w}[,\s]*\}}|(?<![a-zA-Z\\]){w}(?![a-zA-Z])" for w in ("or", "and"))
_RELATION = r"\\le |\\ge |\\ne |<|>"
_OPTION = re.compile(
    r"(?:(?i:the )?(?i:correct |final )?(?i:option|choice|answer)(?i: is)?:?\s*)?"
    r"(?:\(\s*([A-Ja-j])\s*\)|([A-J])(?=[).:]\s|[).:]?$))[).:]*\s*((?![,;]|and\b|or\b)[-\w\\($].*)?"
)
_CLOCK = re.compile(r"([0-9]{1,2})(?::([0-9]{2}))?\s*([ap])\.?\s*m\.?", re.IGNORECASE)
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = ("half|halve", "third", "quarter|fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_SCALES |= {word: Fraction(1, n) for n, words in enumerate(_PARTS, 2) for word in words.split("|")}
_SCALES |= {"hundredth": Fraction(1, 100), "thousandth": Fraction(1, 1000), "squared": 2, "cubed": 3}
_SCALED = re.compile(rf"(.*[0-9}}!)]|an?|one)\s*(?:-\s*)?\b({'|'.join(sorted(_SCALES, reverse=True))})s?\b(.*)")
_CURRENCY = re.compile(r"([-+]?)\s*(?:US|Rs\.?|USD|EUR|GBP|INR|JPY|CNY|RMB|CAD|AUD)\s*(?=[-0-9.])(.*)")
_UNIT = r"(?:\\text\s*\{(?:[^{}0-9]|\^\s*\{\s*-?[0-9]\s*\})*\}|[a-zA-Z]+\.?)(?:\s*\^\s*\{\s*-?[0-9]\s*\})?"
_WITH_UNIT = re.compile(
    rf"(.*?(?:[0-9}})!\]]|[a-zA-Z](?=\s*\\text)))(\s*)({_UNIT}(?:\s*(?:/|\\cdot|\\times)?\s*{_UNIT})*)"
)
_UNITS = set(
    "mm cm dm km mg kg ml mL dl cl hr hrs min mins sec secs ft yd mi lb lbs oz mph kph kmh Hz Pa kPa eV kW kJ mol rad"
    " deg sq cu cc USD EUR GBP INR of per in the an a s g h l m t L N J W V A K C F".split()
)
_NO_UNIT = re.compile(
    r"\b(?:or|and|not|if|for|when|where|then|mod|modulo|to|is|than|more|less|below|negative|minus|plus|times|over|factorial"
    r"|choose|base|out|least|most|either|otherwise|except|unless|but|only|double|twice|triple|infinity|root|power|with|approx\w*)\b|="
)
_QUALIFIED = re.compile(
    r"(.+?)[\s,;(]*((?<![a-zA-Z\\])(?:for\s+(?:all|any|every|each|some)|where|with"
    r"|for(?=\s+\\?[a-zA-Z]+\s*(?:\\[lgn]e |\\in|[<>])))(?![a-zA-Z]).*"
    r"|\(\s*[a-z]\s*(?:\\[lgn]e |\\in(?![a-z])|[<>])[^()]*\))"
)
_RESTRICTS = re.compile(r"=|\b(?:if|otherwise|or|odd|even|else|except|remainder|(?:is|equals)\s+-?[0-9])\b")
_ABOUT = r"(?:approximately|approx\.?|about|roughly)"
_APPROXIMATE = re.compile(rf"^{_ABOUT}\s+|\s*\(?\b{_ABOUT}\)?$")
_PROSE = re.compile(r"(?:(?<![\\a-zA-Z])[a-zA-Z]{2,}[ ,]+){2}[a-zA-Z]{2,}")
_MODULO = re.compile(r"(?:(.*?)\\equiv(?![a-z]))?(.*?)(?:\\[pb]?mod(?![a-z])|\(?\s*\\?(?<![a-z])mod(?![a-z]))\s*(.*)")


def _split(text: str, pattern: str) -> list[str]:
    """Split at the matches of `pattern` outside all brackets; empty parts are left out."""
    parts, start, depth = [], 0, 0
    for token in re.finditer(rf"(?P<cut>{pattern})|\\?[{{(\[]|\\?[}})\]]|\\[lr]angle", text):
        if token["cut"] is None:
            depth += 1 if token[0][-1] in "{([" or token[0] == r"\langle" else -1
        elif depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [part for part in [*parts, text[start:].strip()] if part]


def _enclosed(text: str) -> tuple[str, str] | None:
    r"""("(]", "0,1") for "(0,1]", ("\{\}", ...) for a set: one pair of brackets around all of the text."""
    depth, opening = 0, ""
    for token in re.finditer(r"\\?[{(\[]|\\?[})\]]|\\[lr]angle", text):
        if depth == 0:
            if token.start():
                return None
            opening = token[0]
        depth += 1 if token[0][-1] in "{([" or token[0] == r"\langle" else -1
        if depth == 0:
            inside = text[len(opening) : token.start()]
            brackets = (opening + token[0]).replace(r"\langle\rangle", "()")
            return (brackets, inside.strip()) if token.end() == len(text) else None
    return None


def _number(text: str) -> Fraction | None:
    """Exact value of an integer, decimal, power-of-ten decimal, fraction or mixed number."""
    match = _NUMBER.fullmatch(_SIMPLE_FRAC.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text).strip())
    if not match:
        return None
    sign, whole, top, exponent, bottom = (part and re.sub("[ ,]", "", part) for part in match.groups())
    value = Fraction(top) * Fraction(10) ** int(exponent or 0) / Fraction(bottom or 1)
    if whole is not None:
        if bottom is None or not (top + bottom).isdigit() or value >= 1:
            return None  # two numbers in a row, or a product
        value += int(whole)
    return -value if sign == "-" else value


def _squeeze(latex: str) -> str:
    """Drop the spaces that separate nothing."""
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", latex)


def _words(plain: str) -> tuple:
    """Text is compared word by word; signs, digits and decimals count."""
    text = re.sub(r"[a-zA-Z]{2,}|^A\b", lambda word: word[0].lower(), plain)
    text = re.sub(r"(?<=[a-z]{2})-(?=[a-z]{2})", " ", re.sub(r"(?<=[a-z]),(?=\s*[a-z]{2})|[.!?'\"]+(?!\w)", " ", text))
    return ("words", re.sub(r"\s*([^\w\s])\s*", r"\1", re.sub(r"^\s*(?:an?|the)\s+|\s+", " ", text)).strip())


def _unit(head: str, space: str, tail: str) -> str:
    """Is what follows a number a unit? "yes", "no" or "perhaps": 5 m may be a product."""
    bare = re.findall(r"[a-zA-Z]+", re.sub(r"\\text\s*\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|\\[a-z]+", "", tail))
    text = re.sub(r"\\text\s*\{|\}", " ", tail)
    if _NO_UNIT.search(text) or _PROSE.search(head) or re.fullmatch(r"\s*(?:[eijd]|pi)?\s*", text):
        return "no"
    if any(word not in _UNITS and not re.fullmatch("[A-Z]?[a-z]{3,}", word) for word in bare):
        return "no"
    if bare and not space and (len(bare[0]) < 2 or any(word not in _UNITS for word in bare)):
        return "no"  # 2abcd
    return "perhaps" if len(bare) == 1 and len(bare[0]) == 1 and r"\text" not in tail else "yes"


def contains(form: Any, kind: str) -> bool:
    return isinstance(form, tuple) and (form[:1] == (kind,) or any(contains(part, kind) for part in form))


def latex_of(form: tuple) -> str | None:
    """The form as LaTeX for math-verify; None for what it must not decide (words, lists, bases, options)."""
    kind, value = form[:2]
    if kind in ("number", "percent"):
        value = value / 100 if kind == "percent" else value
        return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    if kind == "named":
        inner = latex_of(form[2])
        return inner and f"{value}={inner}"
    return value if kind in ("latex", "equation", "relation") and r"\text" not in value else None


def set_of(form: tuple | None) -> tuple | None:
    """The form as a set for algebra.py: a number is the set that holds it, (1,2) is an interval."""
    if form is None or form[0] == "set":
        return form and form[1]
    items = form[2] if form[0] == "list" else (form,)
    values = [latex_of(item) for item in items]
    if None in values:
        return None
    if form[0] == "list" and "{" not in form[1] and form[1] and len(items) == 2:
        return ("interval", form[1], *values)
    return ("finite", *values) if form[0] != "list" or form[1] in ("", "or", r"\{\}") else None


def _is_domain(form: tuple) -> bool:
    return form[0] == "set" or (form[0] == "latex" and form[1].startswith(r"\mathbb"))


def joined_sets(kind: str, parts: Iterable[tuple | None]) -> tuple | None:
    sets = [set_of(part) for part in parts]
    return None if None in sets else ("set", (kind, *sets))


def _list(brackets: str, texts: list[str], kind: str = "listed") -> tuple | None:
    r"""The items of a list, or what they say together: x=3, y=5 is (x,y)=(3,5); x>0, x<5 is a set; x, x>0 is x.

    kind: "union" or "both" for conditions joined by or, and; "listed" where only a comma joins them.
    """
    if len(texts) > 1 and r"\ne " in texts[0] and all(_number(text) is not None for text in texts[1:]):
        texts = [texts[0], *(texts[0].split(r"\ne ")[0] + r"\ne " + text for text in texts[1:])]
        kind = "both"
    flat: list[tuple] = []
    for item in map(_parse, texts):
        if item is None:
            return None
        flat += item[2] if item[:2] in (("list", ""), ("list", "or")) else [item]  # "1 \pm 2, 5" is three answers
    if len({item[1][:1] == "(" for item in flat if item[0] == "named"}) == 2:  # "x=1, y=2 and z=3"
        tuples = [item for item in flat if item[0] == "named" and item[1][:1] == "("]
        pairs = [pair for t in tuples if t[2][0] == "list" for pair in zip(t[1][1:-1].split(","), t[2][2])]
        flat = [*(("named", *pair) for pair in pairs), *(item for item in flat if item not in tuples)]
    names = [item[1] for item in flat if item[0] == "named"]
    conditions = [item for item in flat[1:] if item[0] == "relation" or (item[0] == "named" and _is_domain(item[2]))]
    if len(conditions) == len(flat) - 1 > 0 and flat[0][0] == "latex":
        unknowns = set(re.findall(r"[a-zA-Z]+", " ".join(item[1] for item in conditions if item[0] == "named")))
        return flat[0] if unknowns and unknowns <= set(re.findall(r"[a-zA-Z]+", flat[0][1])) else None
    if any(item[0] == "named" and item[2][0] == "set" for item in flat) and len(set(names)) == 1:
        sets = joined_sets(kind, [item[2] if item[0] == "named" else item for item in flat])
        return sets and ("named", names[0], sets)
    if not brackets and len(names) == len(flat) == len(set(names)) > 1:
        return _named_tuple(names, [item[2] for item in flat])
    if not brackets and len(set(names)) == 1 and flat[0][0] == "named" and len(names) in (1, len(flat)):
        return ("named", names[0], ("list", "or", tuple(item[2] if item[0] == "named" else item for item in flat)))
    return ("list", "or" if kind == "union" else brackets, tuple(flat))


def _named_tuple(names: Sequence[str], values: Sequence[tuple]) -> tuple:
    return ("named", f"({','.join(names)})", ("list", "()", tuple(values)))


def by_name(form: tuple) -> tuple:
    """(y,x)=(5,3) as (x,y)=(3,5)."""
    names = form[1][1:-1].split(",") if form[0] == "named" and form[1].startswith("(") else []
    if not names or form[2][0] != "list" or len(names) != len(form[2][2]):
        return form
    return _named_tuple(*zip(*sorted(zip(names, form[2][2]), key=lambda pair: pair[0])))


def _inequality(text: str) -> tuple | None:
    """The set that x > 2, 2 < x, 1 <= x < 2 or x != 2 allows, named after its unknown."""
    operators = re.findall(_RELATION, text)
    parts = _split(text, _RELATION)
    if set(operators) <= {r"\ge ", ">"}:  # reversed, so that the smaller end comes first
        parts, operators = parts[::-1], [{">": "<"}.get(operator, r"\le ") for operator in operators[::-1]]
    if len(parts) != len(operators) + 1:
        return None
    if operators == [r"\ne "] and _NAME.fullmatch(parts[0]):
        hole = set_of(_parse(parts[1]))
        return hole and ("named", _squeeze(parts[0]), ("set", ("without", ("reals",), hole)))
    if not set(operators) <= {r"\le ", "<"}:
        return None
    closed = [operator == r"\le " for operator in operators]
    if len(parts) == 2 and _NAME.fullmatch(parts[0]):
        parts, closed = [r"-\infty", *parts], [False, *closed]
    elif len(parts) == 2 and _NAME.fullmatch(parts[1]):
        parts, closed = [*parts, r"\infty"], [*closed, False]
    if len(parts) != 3 or not _NAME.fullmatch(parts[1]):
        return None
    ends = [_parse(parts[0]), _parse(parts[2])]
    if None in ends:
        return None
    interval = set_of(("list", ("[" if closed[0] else "(") + ("]" if closed[1] else ")"), tuple(ends)))
    return interval and ("named", _squeeze(parts[1]), ("set", interval))


def _parse(text: str) -> tuple | None:
    """Form of a tidy answer, or None if it is hopeless. ZeroDivisionError if it divides by zero."""
    text = text.strip().rstrip(".,;:").strip()
    enclosed = _enclosed(text)
    while enclosed and enclosed[0] == "{}":
        text = enclosed[1]
        enclosed = _enclosed(text)
    number = _number(_PERIOD.sub(lambda m: _repeating(*m.groups()), text.removesuffix("%").rstrip()))
    if number is not None:
        return ("percent" if text.endswith("%") else "number", number)
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip()
    if not plain or _TWO_NUMBERS.search(text) or _BROKEN.search(text) or plain.lower() in ("nan", "none", "null"):
        return None
    # what is said in words
    if whole := re.fullmatch(r"\\text\s*\{([^{}]*(?:[0-9,;]|\b(?:and|or)\b)[^{}]*)\}", text):
        return _parse(whole[1])
    if option := _OPTION.fullmatch(plain):
        content = _parse(option[3]) if option[3] else None
        if not option[3] or (content and not contains(content, "option")):
            return ("option", (option[1] or option[2]).upper(), content)
        if not re.search(rf"[,;]|{_AND}|{_OR}", text):
            return None
    if clock := _CLOCK.fullmatch(plain):
        return ("words", f"{int(clock[1])}:{clock[2] or '00'} {clock[3].lower()}m")
    if re.fullmatch(r"(?:(?:the )?set of )?(?:all )?(?:the )?real(?: number)?s|\\mathbb\s*\{r\}", plain.lower()):
        return ("set", ("reals",))
    if scaled := _SCALED.fullmatch(plain):
        number, scale = _number(re.sub("^(?:an?|one)$", "1", scaled[1])), _SCALES[scaled[2]]
        if number is None:
            return None
        return _parse(f"{number**scale if scaled[2] in ('squared', 'cubed') else number * scale}{scaled[3]}")
    if (exact := _APPROXIMATE.sub("", plain)) != plain:
        return _parse(exact)
    if money := _CURRENCY.fullmatch(plain):
        return _parse(money[1] + money[2])
    if (unit := _WITH_UNIT.fullmatch(text)) and (is_unit := _unit(*unit.groups())) != "no":
        value = _parse(unit[1])
        return ("quantity", value, _squeeze(text)) if value and is_unit == "perhaps" else value
    qualified = _QUALIFIED.fullmatch(plain)
    if qualified and not _RESTRICTS.search(qualified[2]) and not _PROSE.search(qualified[1]):
        return _parse(qualified[1])
    if _PROSE.search(plain):
        return _words(plain)
    # lists, sets, relations
    for separator, kind in ((_OR, "union"), (_AND, "both"), (";", "listed"), (r",(?=\s)", "listed"), (",", "listed")):
        if len(items := _split(text, separator)) > 1:
            return _list("", items, kind)
    if len(parts := _split(text, r"\\approx(?![a-z])")) > 1 or text.startswith(r"\approx"):
        return _parse(parts[1] if len(parts) > 1 and _NAME.fullmatch(parts[0]) else parts[0])
    if len(parts := _split(text, r"\\in(?![a-z])")) == 2 and _NAME.fullmatch(parts[0]):
        value = _parse(parts[1])
        return value and ("named", _squeeze(parts[0]), value)
    for operator, kind in ((r"\\cup", "union"), (r"\\cap", "both"), (r"\\setminus|-(?=\s*\\\{)", "without")):
        if len(parts := _split(text, rf"(?:{operator})(?![a-z])")) > 1:
            return joined_sets(kind, map(_parse, parts)) or ("latex", _squeeze(text))
    if modulo := _MODULO.fullmatch(plain):
        residue, modulus = _parse(modulo[2]), _parse(modulo[3].strip("(){} ")) if modulo[3].strip("(){} ") else None
        return residue and modulus and ("modulo", _squeeze(modulo[1] or ""), residue, modulus)
    if enclosed and enclosed[0] == r"\{\}" and len(parts := _split(enclosed[1], r"\\mid(?![a-z])|\||:")) == 2:
        condition = _parse(parts[1])
        name = re.split(r"\\in(?![a-z])", parts[0])[0]
        if condition and condition[0] == "named" and condition[1] == _squeeze(name):
            return condition[2]
        return ("latex", _squeeze(text))
    if len(_split(text, _RELATION)) > 1:
        return _inequality(text) or ("relation", _squeeze(text))
    if len(parts := _split(text, "=")) > 1:
        if _NAME.fullmatch(parts[0]):
            value = _parse(parts[-1])
            return value and ("named", _squeeze(parts[0]), value)
        sides = tuple(_parse(part) for part in parts)
        return ("equation", _squeeze(text), sides) if all(sides) else None
    if enclosed:
        brackets, inside = enclosed
        items = _split(inside, r"[,;](?=\s)|;") if re.search(r",\s", inside) else _split(inside, "[,;]")
        if len(items) == 1 and brackets == "()":
            return _parse(items[0])
        value = _list(brackets, items)
        closed = brackets in ("[]", "(]", "[)") and value and len(value[2]) == 2 and set_of(value)
        return ("set", closed) if closed else value
    if text.count(r"\pm") == 1:
        return _list("", [text.replace(r"\pm", "+"), text.replace(r"\pm", "-")], "union")
    # single values
    if based := re.fullmatch(r"\(?\s*([0-9A-F]+)\s*\)?\s*_\s*\{?\s*([0-9]+)\s*\}?", text):
        return ("base", based[1].lstrip("0"), int(based[2])) if based[2] != "10" else _parse(based[1])
    if len(parts := _split(text, ":")) > 1:
        return _list(":", parts)
    wordy = re.search("[a-z]{4}|^(yes|no|odd|all)$", plain.lower()) or (plain != text and len(plain) > 1)
    if wordy and re.fullmatch(r"[a-zA-Z][^0-9\\_^*/+={}()]*", plain):
        return _words(plain)
    if re.search(r"(?<![\\a-zA-Z])(?:[a-zA-Z]{4,}\s+[a-zA-Z]{2,}|[a-zA-Z]{2,}\s+[a-zA-Z]{4,})", plain):
        return _words(plain)
    text = re.sub(r"\\text\s*\{\s*([a-zA-Z])\s*\}", r"\1", text)  # \mathrm{e}
    return ("latex", _squeeze(text.removeprefix("+")))


@lru_cache(maxsize=100_000)
def parse(text: str) -> tuple | None:
    r"""The form of an answer, None when hopeless (empty, broken off, divided by zero, NaN).

    ("number", Fraction)  ("percent", Fraction)  ("base", digits, base)  ("words", text)  ("latex", latex)
    ("quantity", form of 5, "5m")  ("option", letter, form of its text or None)  ("equation", latex, forms of the sides)
    ("relation", latex)  ("named", name, form)  ("modulo", left side, form, form)  ("set", set of algebra.py)
    ("list", brackets, forms), brackets: "" (bare list), "or" (x=1 or x=2, 1 \pm 2), "\{\}", "()", ":" (ratio), ...
    """
    if len(text) > MAX_PARSED_CHARS:
        return _words(text)
    text = tidy(text)
    depth = deepest = 0
    for sign in re.sub(r"\\[{}]", "", text):
        depth += (sign in "({[") - (sign in ")}]")
        deepest = max(deepest, depth)
    plain = re.sub(r"\\[{}]", "", text)
    if depth or deepest > MAX_DEPTH or plain.count("{") != plain.count("}") or not re.search(r"\w|\\", text):
        return None
    try:
        return _parse(text)
    except (ZeroDivisionError, RecursionError, ValueError):  # ValueError: an integer of thousands of digits
        return None
