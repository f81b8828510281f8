r"""First stage: the boxed answer of a response, and one spelling for what means the same in LaTeX.

extract_answer may run anywhere: one pass over the text. clean runs in the worker; none of its patterns is super-linear.
"""

import html
import re
import unicodedata
from fractions import Fraction
from unicodedata import decomposition

_THOUGHT_END = re.compile(r"</think(?:ing)?>|\[/THINK\]|<\|channel\|>\s*final\s*(?:<\|message\|>)?")
_THOUGHT_START = re.compile(r"<think(?:ing)?>|\[THINK\]|<\|channel\|>\s*analysis")
_BOX_TOKEN = re.compile(
    r"\\{1,2}(?:A?boxed|[fb]box|framebox)(?![a-zA-Z])(?:\[[^][{}]{0,80}\])?\s*(?:\{|([^\s{}$\\]+))?|\\.|[{}]", re.DOTALL
)
_BETWEEN = re.compile(r"(?:[\s,;$]|\\[][() ]|\\q?quad|\\text\s?\{\s?(?:and|or)\s?\}|\b(?:and|or)\b)*")


def extract_answer(response: str) -> str | None:
    r"""Content of the last balanced \boxed{...}, \fbox{...}, \Aboxed{...} (also "\boxed 42"), or None; linear time.

    Boxes with nothing but commas or "and" between them are one answer, a list. Only what follows the thought counts; an
    open <think>, an unclosed box or an empty one is no answer.
    """
    pieces = _THOUGHT_END.split(response.rstrip())
    while len(pieces) > 2 and not pieces[-1].strip():
        pieces.pop()  # </think>\boxed{7}\n</think>
    if _THOUGHT_START.search(text := pieces[-1]):
        return None
    boxes: list[tuple[int, int, str]] = []  # where it starts and ends, what is in it; none within another
    open_braces: list[tuple[int, int]] = []  # where its box starts, or -1; where its content starts
    for token in _BOX_TOKEN.finditer(text):
        if token[0] == "}":
            start, inside = open_braces.pop() if open_braces else (-1, 0)
            if start >= 0 and not (boxes and start < boxes[-1][0]):
                boxes.append((start, token.end(), text[inside : token.start()].strip()))
        elif token[0].endswith("{") and token[0] != r"\{":
            open_braces.append((token.start() if token[0] != "{" else -1, token.end()))
        elif token[1]:
            boxes.append((token.start(), token.end(), token[1].rstrip(".,;:)")))
    parts, after = [], 0
    for start, end, content in reversed(boxes):
        if parts and not _BETWEEN.fullmatch(text, end, after):
            break
        parts, after = [content, *parts], start
    return None if "" in parts else ", ".join(dict.fromkeys(parts)) or None


# ================================================================================================== cleaning

_GLYPHS = r"""
− -  – -  — -  ‐ -  ‑ -  × \times~  · \cdot~  ⋅ \cdot~  ÷ /  ∞ \infty~  ± \pm~  ∓ \mp~  ∠ \angle~  △ \triangle~
≤ \le~  ⩽ \le~  ≦ \le~  ≥ \ge~  ⩾ \ge~  ≧ \ge~  ≠ \ne~  ≈ \approx~  ≡ \equiv~  ∧ \land~  ∨ \lor~  → \to~  ∴ \therefore~
∪ \cup~  ∩ \cap~  ∈ \in~  ∖ \setminus~  ∅ \emptyset~  ∣ \mid~  ⟨ \langle~  ⟩ \rangle~  、 ,~  。 .  ‖ \|
ℝ \mathbb{R}  ℤ \mathbb{Z}  ℕ \mathbb{N}  ℚ \mathbb{Q}  ℂ \mathbb{C}  √ sqrt  ∛ \sqrt[3]  ∜ \sqrt[4]
∑ \sum~  ∏ \prod~  ∫ \int~  ⌊ \lfloor~  ⌋ \rfloor~  ⌈ \lceil~  ⌉ \rceil~  º ^\circ~  ° ^\circ~  ℃ ^\circ~  ℉ ^\circ~
⁄ /  ∕ /  ∶ :  ′ '  ’ '  ″ ''  € $  £ $  ¥ $  ￥ $  ₹ $  ₩ $  µ \mu~
"""
_AS_LATEX = str.maketrans(dict(re.findall(r"(\S) (\S+)", _GLYPHS)))  # "~" is a space
_SIGNS = [chr(code) for code in range(0x3000) if code != ord("º")]
_RAISED = {  # runs of raised and lowered signs
    sign: re.compile(f"[{''.join(c for c in _SIGNS if decomposition(c).startswith(kind))}]+")
    for kind, sign in (("<super>", "^"), ("<sub>", "_"))
}
TEXT = r"\\text ?\{((?:[^{}]|\{[^{}]{0,80}\})*)\}"
T = r"(?![a-zA-Z])"  # after a macro or a word
W = r"(?<![\\a-zA-Z])"  # before a word that is not a macro
_IN_BRACKETS = r"\(((?:[^()]|\((?:[^()]|\([^()]{0,80}\)){0,80}\)){0,200})\)"
_FUNCTIONS = (
    "arc(?:sin|cos|tan|cot)h?|sinh?|cosh?|tanh?|coth?|sec|csc|ln|log|exp|gcd|lcm|c?tg|cotg|arcc?tg|lg|cosec"
    "|(?:max|min|det)(?= ?[({_]| ?\\\\)"
)
_ROWS = r"aligned|align\*?|gathered|gather\*?|split|equation\*?|cases|dcases|rcases"
_MACROS = {  # one macro or sign for each meaning
    name: new
    for new, names in {
        "": "left right middle displaystyle textstyle limits nolimits strut mathstrut pounds yen euro"
        " tiny scriptsize small normalsize large Large LARGE huge Huge rm bf it bfseries"
        " boldsymbol bm pmb underline mathbf mathit mathsf mathtt mathnormal mathcal emph ensuremath",
        r"\le ": "le leq leqslant", r"\ge ": "ge geq geqslant", r"\ne ": "ne neq", "<": "lt", ">": "gt",
        r"\{": "lbrace", r"\}": "rbrace", "|": "vert lvert rvert", r"\text{or}": "lor vee", r"\text{and}": "land wedge",
        ":": "colon", r"\setminus ": "smallsetminus backslash", r"\mathbb{R}": "R reals Reals",
        r"\emptyset ": "varnothing", r"\ldots ": "dots cdots ldots dotsb dotsc dotsm",
        r"\frac": "dfrac tfrac cfrac", r"\bar": "overline", r"\log_{10} ": "lg", r"\tan ": "tg", r"\cot ": "ctg cotg",
        r"\csc ": "cosec", r"\arctan ": "arctg", r"\arccot ": "arcctg",
    }.items()
    for name in names.split()
}  # fmt: skip


def _repeating(whole: str, start: str, period: str) -> str:
    r"""0.1666... as \frac{15}{90}."""
    nines = (10 ** len(period) - 1) * 10 ** len(start)
    value = Fraction(int((whole + start + period) or 0) - int((whole + start) or 0), nines)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


_MACRO = (r"\\([a-zA-Z]+)", lambda m: _MACROS.get(m[1], m[0]))
_ARGUMENTS = [
    (rf"{opening} ?{_IN_BRACKETS}", new)
    for opening, new in ((r"\\sqrt", r"\\sqrt{\1}"), (r"\\exp", r"e^{\1}"), (r"\^", r"^{\1}")) * 2  # one in another
]
_TABLE = [
    (re.compile(pattern), new)
    for pattern, new in [  # one spelling for each thing; order matters
        # typesetting without meaning
        (rf"\\(?:left|right) ?\.|\\[bB]igg?[lrm]?{T}", ""),
        _MACRO,
        (r"</?(?:b|i|em|strong|span|p|code|br|math) ?/?>|`+", " "),
        (r"<(?P<s>su[pb])>([^<>]{1,80})</(?P=s)>", lambda m: f"{'^' if m[1] == 'sup' else '_'}{{{m[2]}}}"),
        (r"\\(?:[hv]space\*?|(?:text)?color|[hv]?phantom|tag\*?|label) ?\{[^{}]{0,80}\}", " "),
        (r"(?<!\\)\\[,;:> ]|\\q?quad|\\enspace|\\thinspace|\\hfill|~", " "),
        (r",? ?\\! ?", ","),
        (r"(?<!\\)\\[()\[\]]|\\?\$|\*\*(?=[^\d(a-zA-Z\\]|$)|(?<![\w)}])\*\*", ""),
        (rf"\\(?:mbox|text[a-z]+|mathrm|operatorname\*?){T}|\\text (?=\{{)", r"\\text"),
        (r"\\(?:num|qty) ?\{", "{"),
        (r"\\SI ?\{([^{}]{0,80})\} ?\{([^{}]{0,80})\}", r"\1\\text{\2}"),
        (r"^\\text ?\{([^{}]*(?:[0-9,;]|\b(?:and|or)\b)[^{}]*)\}$", r"\1"),
        (r"\\text ?\{([^{}a-zA-Z]*)\}", r"\1"),
        (r"^([A-J])\)", r"(\1)"),
        (r"\^ ?\{? ?\\prime ?\}?", "'"),
        # rows: a system, a chain or the pieces of a function
        (rf"\\begin ?\{{(?:{_ROWS})\}}([^\0]{{0,2000}}?)\\end ?\{{(?:{_ROWS})\}}", lambda m: _rows(m[1])),
        (r"\\begin ?\{array\} ?(?:\{[lcr| ]{0,20}\})?([^\0]{0,2000}?)\\end ?\{array\}",
         lambda m: _rows(m[1]) if "=" in m[1] else rf"\begin{{pmatrix}}{m[1]}\end{{pmatrix}}"),
        (r"(\\(?:begin|end)) ?\{(?:small|[bB])?matrix\}", r"\1{pmatrix}"),
        # one macro or sign for each meaning, as people type it
        (r"<=", r"\\le "), (r">=", r"\\ge "), (r"\\not ?=|!=", r"\\ne "), (r"\.\.\.+", r"\\ldots "),
        (r"\\\{ ?\\\}", r"\\emptyset "), (r"\^ ?\*|\*\*", "^"), (rf"{W}(?:infinity|infty|inf|oo){T}", r"\\infty "),
        (rf"\\text ?\{{ ?({_FUNCTIONS}|floor|ceil|(?:max|min|det)(?=\}} ?[({{_\\])) ?\}}", r"\\\1 "),
        (rf"{W}(pi|{_FUNCTIONS}){T}", r"\\\1 "),
        _MACRO,
        (rf"\{{([^{{}}]{{0,80}})\\(choose|over){T}([^{{}}]{{0,80}})\}}|^([^{{}}]{{0,80}})\\(choose|over){T}([^{{}}]{{0,80}})$",
         lambda m: rf"\{'binom' if 'choose' in m.groups() else 'frac'}{{{m[1] or m[4]}}}{{{m[3] or m[6]}}}"),
        (r"\\frac ?\{ ?(d|\\partial) ?(?:\^ ?\{? ?([0-9]) ?\}?)? ?([a-zA-Z]) ?\} ?\{ ?\1 ?([a-zA-Z][^{}]{0,20}) ?\}",
         lambda m: f"\\Xi_{{{m[1][1:]}d{m[2] or ''}{m[3]}{re.sub('[^0-9a-zA-Z]', '', m[4])}}}"),
        (r"\\text ?\{ ?(?:\\?%|per ?cent(?:age)?|pct) ?\}|\\%|\b(?:per ?cent(?:age)?|pct)\b", "%"),
        (rf"\^ ?\{{ ?\\circ ?\}}|\\degree(?:s|Celsius)?{T}|\^ ?\\circ{T}", r"^\\circ "),
        (rf"{W}sqrt ?([0-9]+(?:\.[0-9]+)?|[a-zA-Z]{T}|\\[a-zA-Z]+)", r"\\sqrt{\1}"),
        (rf"{W}sqrt(?= ?[({{\[])", r"\\sqrt"),
        (r"\^ ?(-?[0-9]+(?:\.[0-9]+)?)", r"^{\1}"),
        (r"([\[\]])([^][(),;]{1,80}[,;][^][(),;]{1,80})([\[\]])",  # French intervals: ]1,2[ is (1,2)
         lambda m: ("(" if m[1] == "]" else "[") + m[2] + (")" if m[3] == "[" else "]")),
        # fractions and roots without braces
        (r"\\frac ?(?![{ ])(\\[a-zA-Z]+|\w)", r"\\frac{\1}"),
        (r"(\\frac ?\{[^{}]{0,80}(?:\{[^{}]{0,80}\}[^{}]{0,80}){0,4}\}) ?(?![{ ])(\\[a-zA-Z]+|\w)", r"\1{\2}"),
        (r"\\sqrt ?(\[\w+\])? ?(\\[a-zA-Z]+|\w)", r"\\sqrt\1{\2}"),
        *_ARGUMENTS,
        # numbers
        (r"(?<![0-9])([0-9]{0,20})\.([0-9]{0,20})\\(?:bar|dot) ?(?:\{ ?([0-9]{1,20}) ?\}|([0-9]))"
         r"(?:([0-9]{0,20})\\dot ?\{?([0-9])\}?)?",
         lambda m: _repeating(m[1], m[2], "".join(filter(None, m.groups()[2:])))),
        (r"(?<![0-9])([0-9]{0,20})\.([0-9]{0,20}?)([0-9]{1,20}?)\3+ ?\\ldots", lambda m: _repeating(*m.groups())),
        (r"(?<![0-9.])([0-9]{0,20})\.([0-9]{0,20})\(([0-9]{1,20})\)", lambda m: _repeating(*m.groups())),
        (r"(?<![0-9.])[1-9][0-9]{0,2}(?:(?: ?\{,\} ?| )[0-9]{3})+(?![0-9/])", lambda m: re.sub("[^0-9]", "", m[0])),
    ]
]  # fmt: skip


def _rows(rows: str) -> str:
    r"""x&=3\\y&=4 as "x=3, y=4"; S&=1+2\\&=3 as "S=1+2 =3"; a,&x>0\\b&x<0 as "a \text{if} x>0, b \text{if} x<0"."""
    rows = re.sub(r"\\\\ ?(?:\[\w{1,9}\])? ?(?=& ?=)", "", rows)
    rows = re.sub(r"& ?(?=[=<>]|\\[lg]e(?![a-z])|\\approx)|(?<=[=<>]) ?&", "", rows)
    parts = [[part.strip(" ,;") for part in row.split("&", 1)] for row in rows.split(r"\\")]
    return ", ".join(r" \text{if} ".join(part) for part in parts if part[0])


def _of_glyph(glyph: str) -> str:
    """A fraction, a digit of another script or a Greek letter as LaTeX; nothing for what has no width."""
    if decomposition(glyph).startswith("<fraction>"):
        top, _, bottom = unicodedata.normalize("NFKC", glyph).partition("⁄")
        return rf"\frac{{{top}}}{{{bottom}}}"
    if unicodedata.category(glyph) == "Nd":
        return str(unicodedata.decimal(glyph))
    name = unicodedata.name(glyph, "").split()
    if name[:1] == ["GREEK"] and len(name) == 4 and name[1] in ("SMALL", "CAPITAL"):
        return rf"\{name[3].lower() if name[1] == 'SMALL' else name[3].capitalize()} "
    return "" if unicodedata.category(glyph) == "Cf" else glyph


def clean(text: str) -> str:
    r"""LaTeX with one spelling for each sign, macro and number: "\Large 4\,\mathrm{cm}²" is "4 \text{cm}^{2}"."""
    text = re.sub(r"&(?:lt|gt|amp|nbsp|le|ge|times|#[0-9]{1,5});", lambda m: html.unescape(m[0]), text)
    for sign, raised in _RAISED.items():
        text = raised.sub(lambda m, sign=sign: f"{sign}{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = "".join(map(_of_glyph, unicodedata.normalize("NFKC", "".join(map(_of_glyph, text.translate(_AS_LATEX))))))
    text = " ".join(text.translate(_AS_LATEX).split())  # what NFKC made of full-width signs
    if r"\begin" not in text and r"\\" in text:
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)
    for pattern, new in _TABLE:
        text = " ".join(pattern.sub(new, text).split())
    if re.search(rf"\\(?:sin|cos|tan|cot|sec|csc)h?{T}", text):
        angle = r"([0-9]{1,20}(?:\.[0-9]{1,20})?|\\?[a-zA-Z]{1,20}|\([^()]{1,80}\)|\{[^{}]{1,80}\}) ?\^\\circ"
        text = re.sub(angle, r"(\1\\cdot\\frac{\\pi}{180})", text)
    return re.sub(rf"\^\\circ ?(?:\\text ?\{{ ?[CF] ?\}}|[CF]{T})?", "", text).strip()
