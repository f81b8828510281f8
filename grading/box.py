r"""First stage: the boxed answer of a response, and one spelling for what means the same in LaTeX.

extract_answer may run anywhere: one pass over the text. clean runs in the worker; none of its patterns is super-linear.
"""

import html
import re
from fractions import Fraction
from unicodedata import category, decimal, name, normalize

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
    opened: list[tuple[int, int]] = []  # where its box starts, or -1; where its content starts
    for token in _BOX_TOKEN.finditer(text):
        if token[0] == "}":
            start, inside = opened.pop() if opened else (-1, 0)
            if start >= 0 and not (boxes and start < boxes[-1][0]):
                boxes.append((start, token.end(), text[inside : token.start()].strip()))
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append((token.start() if token[0] != "{" else -1, token.end()))
        elif token[1]:
            boxes.append((token.start(), token.end(), token[1].rstrip(".,;:)")))
    parts, after = [], 0
    for start, end, content in reversed(boxes):
        if parts and not _BETWEEN.fullmatch(text, end, after):
            break
        parts, after = [content, *parts], start
    return None if "" in parts else ", ".join(dict.fromkeys(parts)) or None


_GLYPHS = r"""
− -  – -  — -  ‐ -  ‑ -  × \times~  · \cdot~  ⋅ \cdot~  ÷ /  ∞ \infty~  ± \pm~  ∓ \mp~  ∠ \angle~  △ \triangle~
≤ \le~  ⩽ \le~  ≦ \le~  ≥ \ge~  ⩾ \ge~  ≧ \ge~  ≠ \ne~  ≈ \approx~  ≡ \equiv~  ∧ \land~  ∨ \lor~  → \to~  ∴ \therefore~
∪ \cup~  ∩ \cap~  ∈ \in~  ∖ \setminus~  ∅ \emptyset~  ∣ \mid~  ⟨ \langle~  ⟩ \rangle~  、 ,~  。 .  ‖ \|
ℝ \mathbb{R}  ℤ \mathbb{Z}  ℕ \mathbb{N}  ℚ \mathbb{Q}  ℂ \mathbb{C}  √ sqrt  ∛ \sqrt[3]  ∜ \sqrt[4]
∑ \sum~  ∏ \prod~  ∫ \int~  ⌊ \lfloor~  ⌋ \rfloor~  ⌈ \lceil~  ⌉ \rceil~  º ^\circ~  ° ^\circ~  ℃ ^\circ~  ℉ ^\circ~
⁄ /  ∕ /  ∶ :  ′ '  ’ '  ″ ''  € EUR~  £ GBP~  ¥ CNY~  ￥ CNY~  ₹ INR~  ₩ KRW~  µ \mu~
"""
_AS_LATEX = str.maketrans(dict(re.findall(r"(\S) (\S+)", _GLYPHS)))  # "~" is a space
_FONTS = "boldsymbol bm pmb underline mathbf mathit mathsf mathtt mathnormal mathcal emph"
_MACROS = {  # one macro or sign for each meaning
    name: new
    for new, names in {
        "": "left right middle displaystyle textstyle limits nolimits strut mathstrut blacksquare pounds yen"
        " euro tiny scriptsize small normalsize large Large LARGE huge Huge rm bf it bfseries therefore checkmark"
        f" ensuremath {_FONTS}",
        r"\le ": "leq leqslant", r"\ge ": "geq geqslant", r"\ne ": "neq", "<": "lt", ">": "gt",
        r"\{": "lbrace", r"\}": "rbrace", "|": "vert lvert rvert", " or ": "lor vee", " and ": "land wedge",
        ":": "colon", "(": "langle", ")": "rangle", r"\setminus ": "smallsetminus backslash",
        r"\mathbb{R}": "R", r"\emptyset ": "varnothing", r"\infty ": "infinity inf oo", r"\ldots ": "dots cdots",
        r"\frac": "dfrac tfrac cfrac", r"\bar": "overline", r"\log_{10} ": "lg", r"\tan ": "tg", r"\cot ": "ctg cotg",
        r"\csc ": "cosec", r"\arctan ": "arctg", r"\arccot ": "arcctg", "^\\circ ": "degree degrees degreeCelsius",
        r"\epsilon ": "varepsilon", r"\phi ": "varphi",
    }.items()
    for name in names.split()
}  # fmt: skip
TEXT = r"\\text ?\{((?:[^{}]|\{[^{}]{0,80}\})*)\}"
_NTH = "(?:st|nd|rd|th)"
T = r"(?![a-zA-Z])"  # after a macro or a word
W = r"(?<![\\a-zA-Z])"  # before a word that is not a macro
_FUNCTIONS = (
    "arc(?:sin|cos|tan|cot)h?|sinh?|cosh?|tanh?|coth?|sec|csc|cis|ln|log|exp|gcd|lcm|c?tg|cotg|arcc?tg|lg|cosec|sqrt"
    "|infinity|infty|inf|oo|(?:max|min|det)(?=\\}? ?[({_\\\\])"
)


def _environment(match: re.Match) -> str:
    r"""x&=3\\y&=4 as "x=3, y=4"; S&=1+2\\&=3 as "S=1+2 =3"; a,&x>0\\b&x<0 as "a if x>0, b if x<0"."""
    brace, name, rows = match.groups()
    if "matrix" in name or (name == "array" and "=" not in rows and not brace):
        return rf"{brace or ''}\begin{{pmatrix}}{rows}\end{{pmatrix}}"
    rows = re.sub(r"\\\\ ?(?:\[\w{1,9}\])? ?(?=& ?=)|& ?(?=[=<>]|\\[lg]e(?![a-z])|\\approx)|(?<=[=<>]) ?&", "", rows)
    parts = [[part.strip(" ,;.") for part in row.split("&", 1)] for row in rows.split(r"\\")]
    return ", ".join(" if ".join(part) for part in parts if part[0])


def _repeating(match: re.Match) -> str:
    r"""0.1666... as \frac{15}{90}."""
    whole, start, *period = map(lambda digits: digits or "", match.groups())
    period = "".join(period)
    all_but_period = int((whole + start) or 0)
    value = Fraction(int(whole + start + period) - all_but_period, (10 ** len(period) - 1) * 10 ** len(start))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


_TABLE = [
    (re.compile(pattern), new)
    for pattern, new in [  # one spelling for each thing; order matters
        # typesetting without meaning, what people type, one macro for each meaning
        (rf"\\(?:left|right) ?\.|\\[bB]igg?[lrm]?{T}|(?<=\\\\) ?\[[0-9.]*(?:pt|em|ex|[cm]m)\]", ""),
        (rf"(?<![\^_]) ?\\(?:{_FONTS.replace(' ', '|')}) ?\{{([^{{}}]*)\}}", r" \1"),
        (r"(?<![0-9])([0-9]{1,4}) ?\^ ?\{? ?\\circ ?\}? ?([0-9]+) ?(?:'|\^ ?\{? ?\\prime ?\}?)",  # 22°30'
         lambda m: rf"\frac{{{60 * int(m[1]) + int(m[2])}}}{{60}}^\circ"),
        (r"<(su[pb])>([^<>]{1,80})</\1>", lambda m: f"{'^' if m[1] == 'sup' else '_'}{{{m[2]}}}"),
        (r"\\(?:[hv]space\*?|(?:text)?color|[hv]?phantom|tag\*?) ?\{[^{}]{0,80}\}|(?<!\\)\\[,;:> ]|\\q?quad|~|`+"
         r"|</?(?:b|i|p|em|strong|code|br) ?/?>", " "),
        (r"(?<=[0-9])\{ ?([:.]) ?\}", r"\1"), (r"^([-+]?) ?\\?\$ ?(?=[0-9.][^$]*$)", r"\1USD "),
        (r"\\! ?|(?<!\\)\\[()\[\]]|\\?\$|\*\*(?=[^\d(a-zA-Z\\]|$)|(?<![\w)}])\*\*", ""),
        (rf"\\(?:mbox|text[a-z]+|mathrm|operatorname\*?){T}|\\text (?=\{{)", r"\\text"),
        (rf"{W}sqrt ?([0-9]+(?:\.[0-9]+)?|[a-zA-Z]{T}|\\[a-zA-Z]+)", r"\\sqrt{\1}"),
        (rf"\\text ?\{{ ?({_FUNCTIONS}|floor|ceil) ?\}}|{W}(pi|{_FUNCTIONS}){T}", r"\\\1\2 "),
        (rf"\\(?:vec|overrightarrow){T}(?: ?\{{([^{{}}]{{1,9}})\}})?", r"\1"),
        (r"\\(?:bar|overline) ?\{ ?([A-Z]{2}) ?\}", r"\1"),
        (r"\\log ?_ ?\{? ?e(?: ?\}|\b)", r"\\ln "),
        (r"\\([a-zA-Z]+)", lambda m: _MACROS.get(m[1], m[0])),
        (r"\\frac ?\{ ?(\\text ?\{[^{}]{1,40}\}) ?\} ?\{ ?(\\text ?\{[^{}]{1,40}\}(?:\^ ?\{?[0-9]\}?)?) ?\}", r"\1/\2"),
        (r"\\(?:num|qty|SI) ?\{([^{}]{0,80})\}(?: ?\{([^{}]{0,80})\})?", r"\1\\text{\2}"),
        (r"\\text ?\{([^{}a-zA-Z]*)\}|^\\text ?\{([^{}]*(?:[0-9,;]|\b(?:and|or)\b)[^{}]*)\}$", r"\1\2"),
        (r"\\text ?\{ ?,? ?(and|or|by|if|或者?|和|или|и|oder|und|ou|et) ?,? ?\}", r" \1 "), (r"^([A-J])\)", r"(\1)"),
        (r"<=", r"\\le "), (r">=", r"\\ge "), (r"\\not ?=|!=", r"\\ne "), (r"\.\.\.+", r"\\ldots "),
        (r"\\\{ ?\\\}", r"\\emptyset "), (r"\^ ?\{? ?\\prime ?\}?", "'"), (r"\^ ?\*|\*\*", "^"),
        (rf"(?<=[0-9]) ?(?:{_NTH}{T}|\^? ?\\text ?\{{{_NTH} ?\}}|\^ ?\{{ ?(?:\\text ?\{{{_NTH} ?\}}|{_NTH}) ?\}})", ""),
        (r"\\text ?\{ ?(?:\\?%|per ?cent(?:age)?|pct) ?\}|\\%|\b(?:per ?cent(?:age)?|pct)\b", "%"),
        (rf"\^ ?\{{ ?\\circ ?\}}|\^ ?\\circ{T}", r"^\\circ "),
        # rows and matrices, French intervals, fractions, roots and exponents without braces
        (r"(\\\{ ?)?\\begin ?\{((?!vmatrix)\w+\*?)\} ?(?:\{[lcr| ]{0,20}\})?([^\0]{0,2000}?)\\end ?\{\2\}",
         _environment),
        (r"([\[\]])([^][(),;]{1,80}[,;][^][(),;]{1,80})([\[\]])",  # ]1,2[ is (1,2)
         lambda m: ("(" if m[1] == "]" else "[") + m[2] + (")" if m[3] == "[" else "]")),
        (rf"(?:\{{|^)([^{{}}]{{0,80}})\\(choose|over){T}([^{{}}]{{0,80}})(?:\}}|$)",
         lambda m: rf"\{'binom' if m[2] == 'choose' else 'frac'}{{{m[1]}}}{{{m[3]}}}"),
        (r"\\frac ?(?![{ ])(\\[a-zA-Z]+|\w)", r"\\frac{\1}"),
        (r"(\\frac ?\{[^{}]{0,80}(?:\{[^{}]{0,80}\}[^{}]{0,80}){0,4}\}) ?(?![{ ])(\\[a-zA-Z]+|\w)", r"\1{\2}"),
        (r"\\sqrt ?(\[\w+\])? ?(\\[a-zA-Z]+|\w)", r"\\sqrt\1{\2}"), (r"\\(hat|bar|tilde) (\w)", r"\\\1{\2}"),
        (r"\^ ?(-?[0-9]+(?:\.[0-9]+)?)", r"^{\1}"),
        (r"(\\sqrt|\^) ?\(((?:[^()]|\((?:[^()]|\([^()]{0,80}\)){0,80}\)){0,200})\)", r"\1{\2}"),
        # repeating decimals, thousands
        (r"(?<![0-9.])([0-9]{0,20})\.([0-9]{0,20})(?:\(([0-9]{1,20})\)"
         r"|\\(?:bar|dot) ?\{? ?([0-9]{1,20}) ?\}?(?:([0-9]{0,20})\\dot ?\{?([0-9])\}?)?)", _repeating),
        (r"(?<![0-9])([0-9]{0,20})\.([0-9]{0,20}?)([0-9]{1,20}?)\3+ ?\\ldots", _repeating),
        (r"(?<![0-9.])[1-9][0-9]{0,2}(?:(?: ?\{,\} ?| )[0-9]{3})+(?![0-9/])", lambda m: re.sub("[^0-9]", "", m[0])),
    ]
]  # fmt: skip
_ANGLE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?|\\?[a-zA-Z]{1,20}|\([^()]{1,80}\)|\{[^{}]{1,80}\}) ?\^\\circ")


def _of_glyph(glyph: str) -> str:
    """A digit of another script or a Greek letter as LaTeX; nothing for what has no width."""
    if category(glyph) == "Nd":
        return str(decimal(glyph))
    if letter := re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (\w+)", name(glyph, "")):
        return rf"\{letter[2].lower() if letter[1] == 'SMALL' else letter[2].capitalize()} "
    return "" if category(glyph) == "Cf" else glyph


def clean(text: str) -> str:
    r"""LaTeX with one spelling for each sign, macro and number: "\Large 4\,\mathrm{cm}²" is "4 \text{cm}^{2}"."""
    text = re.sub(r"&(?:lt|gt|amp|nbsp|le|ge|times|#[0-9]{1,5});", lambda m: html.unescape(m[0]), text)
    text = re.sub("[²³¹⁰ⁱ⁴-ⁿ]+", lambda m: f"^{{{normalize('NFKC', m[0])}}}", text)
    text = re.sub("[₀-₎ₐ-ₜ]+", lambda m: f"_{{{normalize('NFKC', m[0])}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: r"\frac{" + normalize("NFKC", m[0]).replace("⁄", "}{") + "}", text)
    text = normalize("NFKC", text.translate(_AS_LATEX))
    text = " ".join("".join(map(_of_glyph, text)).translate(_AS_LATEX).split())  # what NFKC made of full-width signs
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z()])", r"\\", text)
    for pattern, new in _TABLE:
        text = " ".join(pattern.sub(new, text).split())
    if re.search(rf"\\(?:sin|cos|tan|cot|sec|csc|cis)h?{T}", text):
        text = _ANGLE.sub(r"(\1\\cdot\\frac{\\pi}{180})", text)
    text = re.sub(r"^((?:[-0-9./{}]|\\frac)+) ?\^\\circ ?(?:\\text ?\{ ?)?([CF]?)(?: ?\})?$", r"\1 degree\2", text)
    return re.sub(rf"\^\\circ ?(?:\\text ?\{{ ?[CF] ?\}}|[CF]{T})?", "", text).strip()
