import atexit
import inspect
import json
import multiprocessing.connection
import os
import re
import subprocess
import sys
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from typing import Any

# ======================================================================================================
# Answer grading: the last \boxed{...} of a response against the gold answer, exactly.
#
# An answer is read once into a small form (a tuple: number, percent, words, option letter, list, name,
# ..., or "latex" for the rest). Numbers, words and brackets are compared here, with exact fractions; only
# pairs of "latex" leaves go to math-verify, in a child process that can be killed.
#
# Policy, decided once. The gold's form says how an answer is read.
#   gold       | answer                   | verdict and rule
#   1/2, 10    | 0.5, 2/4, 010, 10.0      | right: equal in value; no simplest form is asked for
#   1/3, \pi   | 0.333333, 3.14159        | wrong: no tolerance; a decimal gold is its exact value too
#   7/2        | 3\frac12, 3 1/2          | right: an integer before a proper fraction is a mixed number
#   12345      | 12,345 12{,}345 12\,345  | right: groups of three; "12, 345" and "(12,345)" are two numbers
#   0.5, 50\%  | 50\%, 0.5                | right: p% is p/100 ...
#   20, 20\%   | 20\%, 20                | right: ... or p if p > 1 ("what percent?"); 5 is not 500
#   5\text{cm} | 5\text{m}, 5, \$5, 5^\circ | right: units, currency and degree signs are ignored
#   (1,2)      | 1,2                      | right: brackets may be missing, order counts; not (2,1), not [1,2]
#   1,2        | 2,1  \{2,1\}  2 or 1     | right: a bare list or a set has no order; all of it, nothing more
#   4          | 4 or 5, \pm 4            | wrong: several candidates are no answer
#   [-2,7]     | x\in[-2,7], -2\le x\le7 | right: inequalities in one unknown are intervals; brackets count
#   5          | x=5, 2+3=5               | right: a name is dropped, otherwise every side must equal the gold
#   81         | (x+y)^2=81               | wrong: by the same rule
#   x=5        | y=5                      | wrong: another unknown; plain 5 is right
#   y=2x+3     | 2x-y+3=0, 2x+3           | right: an equation may be rearranged and scaled
#   R^2        | r^2                      | wrong: upper and lower case are different symbols
#   B          | (B), \text{b}, (B)\ 12   | right: an option letter, with or without its text
#   12         | (B)\ 12                  | right: an option's text, with its letter
#   Yes        | yes, \text{YES.}         | right: case, punctuation and a leading article are ignored
#   1010_2     | 1010                     | right: a missing base is the gold's; 10 or 12_8 would be wrong
#   1010       | 1010_2                   | wrong: a base other than ten for a decimal gold
#   any        | 1/0, NaN; no closed, filled box after </think> | wrong
# ======================================================================================================

MAX_ANSWER_CHARS = 300  # longer answers are wrong unread, unless the gold itself is long
# Limits for one question to math-verify. CPU time decides, so a busy machine does not change a verdict.
GRADER_CPU_SECONDS, GRADER_WALL_SECONDS, GRADER_START_SECONDS = 3, 10, 120
grader_timeouts = 0  # questions that were killed, in this process

_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(?:\{|([^\s{}$\\]+))?|\\.|[{}]", re.DOTALL)


def extract_answer(response: str) -> str | None:
    r"""Content of the last balanced \boxed{...} or \fbox{...} (also "\boxed 42"), or None; linear time.

    Only what follows the last </think> counts; an open <think>, an unclosed box or an empty one is no answer.
    """
    answer_part = response.rpartition("</think>")[2]
    if "<think>" in answer_part:
        return None
    last_start, last = -1, None
    open_braces: list[tuple[bool, int]] = []  # (opened by a box?, where its content starts)
    for token in _BOX_TOKEN.finditer(answer_part):
        text = token[0]
        if text == "}":
            is_box, start = open_braces.pop() if open_braces else (False, 0)
            if is_box and start > last_start:
                last_start, last = start, answer_part[start : token.start()]
        elif text.endswith("{") and text != r"\{":
            open_braces.append((text != "{", token.end()))
        elif token[1]:
            last_start, last = token.start(), token[1].rstrip(".,;:)")
    return (last or "").strip() or None


# --- reading an answer into a form ---

_UNICODE = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∪": r"\cup ",
        "∈": r"\in ",
        "≈": r"\approx ",
        "√": r"\sqrt ",
        "²": "^2",
        "³": "^3",
        "½": r"\frac12",
        "°": "",
        "€": "",
        "£": "",
        "\u200b": "",
    }
)
_REWRITES = [
    (re.compile(pattern), new)
    for pattern, new in [  # one spelling for each thing; order matters
        (r"\\(?:left|right)\s*\.|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits)(?![a-zA-Z])", ""),
        (r"(?<!\\)\\[,;:> ]|\\q?quad|~|\s+", " "),
        (r"\\!|(?<!\\)\\[()\[\]]|\\?\$", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:mbox|text[a-z]+|math(?:rm|bf|it|sf)|operatorname)(?![a-zA-Z])|\\text\s+(?=\{)", r"\\text"),
        (r"_\s*(?:\{\s*\\text\s*\{\s*(\w+)\s*\}\s*\}|\\text\s*\{\s*(\w+)\s*\})", r"_{\1\2}"),
        (r"\\text\s*\{\s*(?:\\?%|percent(?:age)?|pct)\s*\}|\\%|\b(?:percent(?:age)?|pct)\b", "%"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])", ""),
        (r"\\(?:le|leq|leqslant)(?![a-zA-Z])|<=", r"\\le "),
        (r"\\(?:ge|geq|geqslant)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\*\*", "^"),
        (r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\bnp\.(?=[a-z])", ""),
        (r"^\s*([a-z])\s*(?=\([^()]*\]$|\[[^\[\]]*\)$)", r"\1\\in "),
        (r"(?<![\\a-zA-Z])(pi|sqrt|infty|(?:arc)?(?:sin|cos|tan)|ln|log|exp)(?![a-zA-Z])", r"\\\1"),
        (r"\+\s*\\infty", r"\\infty"),
    ]
]
_GROUPED = re.compile(r"(?<![0-9.])[1-9][0-9]{0,2}(?:(?:,\\!\s*|\{,\}|\\[,;: !]|\s)[0-9]{3})+(?![0-9/])")
_DIGITS = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_SIMPLE_FRAC = re.compile(
    rf"\\frac\s*(?:\{{\s*([-+]?\s*{_DIGITS})\s*\}}|([0-9]))"
    rf"\s*(?:\{{\s*([-+]?\s*{_DIGITS})\s*\}}|([0-9]))"
)
_NUMBER = re.compile(
    rf"([-+]?)\s*(?:([0-9]+)\s+)?([-+]?\s*{_DIGITS})"
    r"(?:(?:[eE]|\s*(?:\\times|\\cdot)\s*10\s*\^)\s*\{?\s*([-+]?[0-9]{1,3})\s*\}?)?"
    rf"(?:\s*/\s*([-+]?\s*{_DIGITS}))?"
)
_SYMBOL = r"(?:\\[a-zA-Z]+|[a-zA-Z])(?:_(?:\w|\{[^{}]*\}))?'*"
_NAME = re.compile(  # what may stand before "=": x, x_1, f(x), (x,y), AB, |AB|, \angle ABC, \text{Area}, Area
    rf"{_SYMBOL}(?:\s*\([\w,\s]*\))?|\(\s*{_SYMBOL}(?:\s*,\s*{_SYMBOL})+\s*\)|\|?[A-Z](?:\s?[A-Z]){{1,3}}\|?"
    r"|\\(?:angle|overline)\s*\{?[A-Z_0-9{} ]+\}?|\\text\s*\{[^{}]*\}|[A-Z][a-z]{2,}"
)
_SEPARATOR = (
    r"[,;]|\\text\s*\{[,\s]*(?:and|or)[,\s]*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])"
    r"|\\(?:lor|vee|land|wedge)(?![a-zA-Z])"
)
_OPTION = re.compile(r"\(\s*([A-J])\s*\)[:.]?\s*(.*)|([A-J])(?:[).]\s+(.*))?|\(\s*([a-j])\s*\)")
_TEXT_UNIT = re.compile(r"(.*[0-9a-zA-Z})!])\s*\\text\s*\{([^{}0-9]*)\}(?:\s*\^\s*\{?\s*-?[0-9]\s*\}?)?")
_BARE_UNIT = re.compile(
    r"(.*[0-9})])\s*((?:[ckm]m|km|k?g|mg|m[lL]|ft|in|hr|mph|sq|[a-z]{4,}s?)(?:[ ./]+[a-z]+)*)"
    r"(?:\s*\^\s*\{?\s*-?[0-9]\s*\}?)?"
)
_NOT_A_UNIT = re.compile(r"\s*(?:|[eijd]|pi)\s*|.*\b(?:or|and|not|if|for|when|where|then|mod|to|is)\b.*|.*=.*")
_PROSE = re.compile(r"(?:(?<![\\a-zA-Z])[a-zA-Z]{2,}[ ,]+){2}[a-zA-Z]{2,}")


def _split(text: str, pattern: str) -> list[str]:
    """Split at the matches of `pattern` outside all brackets."""
    parts, start, depth = [], 0, 0
    for token in re.finditer(rf"(?P<cut>{pattern})|\\?[{{(\[]|\\?[}})\]]", text):
        if token["cut"] is None:
            depth += 1 if token[0][-1] in "{([" else -1
        elif depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]


def _enclosed(text: str) -> tuple[str, str] | None:
    r"""("(]", "0,1") for "(0,1]", ("\{\}", ...) for a set: one pair of brackets around all of the text."""
    depth, opening = 0, ""
    for token in re.finditer(r"\\?[{(\[]|\\?[})\]]", text):
        if depth == 0:
            if token.start():
                return None
            opening = token[0]
        depth += 1 if token[0][-1] in "{([" else -1
        if depth == 0:
            inside = text[len(opening) : token.start()]
            return (opening + token[0], inside.strip()) if token.end() == len(text) else None
    return None


def _read_number(text: str) -> Fraction | None:
    """Exact value of an integer, decimal, power-of-ten decimal, fraction or mixed number."""
    text = _SIMPLE_FRAC.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text).strip()
    match = _NUMBER.fullmatch(text)
    if not match:
        return None
    sign, whole, top, exponent, bottom = (part and re.sub("[ ,]", "", part) for part in match.groups())
    value = Fraction(top) * Fraction(10) ** int(exponent or 0) / Fraction(bottom or 1)
    if whole is not None:
        if bottom is None or not (top + bottom).isdigit() or value >= 1:
            return None  # two numbers in a row, or a product
        value += int(whole)
    return -value if sign == "-" else value


def _read_inequality(text: str) -> tuple | None:
    """The interval of a bound such as x > 2, 2 < x or 1 <= x < 2, named after its unknown."""
    operators = re.findall(r"\\le |\\ge |<|>", text)
    parts = _split(text, r"\\le |\\ge |<|>")
    if set(operators) <= {r"\ge ", ">"}:  # turn round, so that the small end comes first
        parts, operators = parts[::-1], [{">": "<"}.get(operator, r"\le ") for operator in operators[::-1]]
    if len(parts) != len(operators) + 1 or not set(operators) <= {r"\le ", "<"}:
        return None
    closed = [operator == r"\le " for operator in operators]
    if len(parts) == 2 and _NAME.fullmatch(parts[0]):
        parts, closed = [r"-\infty", *parts], [False, *closed]
    elif len(parts) == 2 and _NAME.fullmatch(parts[1]):
        parts, closed = [*parts, r"\infty"], [*closed, False]
    if len(parts) != 3 or not _NAME.fullmatch(parts[1]):
        return None
    ends = (_read(parts[0]), _read(parts[2]))
    brackets = ("[" if closed[0] else "(") + ("]" if closed[1] else ")")
    return ("named", _squeeze(parts[1]), ("list", brackets, ends)) if None not in ends else None


def _squeeze(latex: str) -> str:
    """Drop the spaces that separate nothing."""
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", latex)


def _read_list(brackets: str, texts: list[str]) -> tuple | None:
    flat = []
    for item in [_read(text) for text in texts if text]:
        if item is None:
            return None
        # "1 \pm 2, 5" is three answers
        flat += item[2] if item[:2] == ("list", "") else [item]
    return ("list", brackets, tuple(flat))


def _read(text: str) -> tuple | None:
    """Form of a cleaned answer, or None if it is hopeless. ZeroDivisionError if it divides by zero."""
    text = text.strip().rstrip(".,;").strip()
    enclosed = _enclosed(text)
    while enclosed and enclosed[0] == "{}":
        text = enclosed[1]
        enclosed = _enclosed(text)
    number = _read_number(text.removesuffix("%").rstrip())
    if number is not None:
        return ("percent" if text.endswith("%") else "number", number)
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip()
    two_numbers = re.search(r"(?<![_^0-9.])(?<!frac )(?<!frac)[0-9][0-9.]*\s+[0-9]", text)
    if not plain or two_numbers or plain.lower() in ("nan", "none", "null"):
        return None
    if whole := re.fullmatch(r"\\text\s*\{([^{}]*[0-9][^{}]*)\}", text):
        return _read(whole[1])
    if option := _OPTION.fullmatch(plain):
        letter, content = option[1] or option[3] or option[5].upper(), option[2] or option[4]
        return ("option", letter, _read(content) if content else None)
    unit = _TEXT_UNIT.fullmatch(text) or _BARE_UNIT.fullmatch(text)
    if unit and not _NOT_A_UNIT.fullmatch(unit[2]) and not _PROSE.search(unit[1]):
        return _read(unit[1])
    if _PROSE.search(plain):
        return ("words", re.sub(r"[^a-z0-9]", "", plain.lower()))
    if len(items := [item for item in _split(text, _SEPARATOR) if item]) > 1:
        return _read_list("", items)
    if len(parts := _split(text, r"\\approx(?![a-z])")) > 1:
        return _read(parts[1] if not parts[0] or _NAME.fullmatch(parts[0]) else parts[0])
    if len(parts := _split(text, r"\\in(?![a-z])")) == 2 and _NAME.fullmatch(parts[0]):
        value = _read(parts[1])
        return value and ("named", _squeeze(parts[0]), value)
    if len(parts := _split(text, r"\\cup(?![a-z])")) > 1:
        return _read_list(r"\{\}", parts)
    if re.search(r"\\le |\\ge |\\ne |<|>", text):
        return _read_inequality(text) or ("relation", _squeeze(text))
    if len(parts := _split(text, "=")) > 1:
        if _NAME.fullmatch(parts[0]):
            value = _read(parts[-1])
            return value and ("named", _squeeze(parts[0]), value)
        sides = tuple(_read(part) for part in parts)
        return ("equation", _squeeze(text), sides) if all(sides) else None
    if enclosed:
        brackets, inside = enclosed
        items = [item for item in _split(inside, "[,;]") if item]
        if len(items) == 1 and brackets in ("()", r"\{\}"):
            return _read(items[0])
        return _read_list(brackets, items)
    if text.count(r"\pm") == 1:
        return _read_list("", [text.replace(r"\pm", "+"), text.replace(r"\pm", "-")])
    if based := re.fullmatch(r"([0-9A-F]+)\s*_\s*\{?\s*([0-9]+)\s*\}?", text):
        return ("base", based[1].lstrip("0"), int(based[2]))
    if re.fullmatch(r"[0-9]+(\s*:\s*[0-9]+)+(\s*[ap]\.?m)?", plain, re.IGNORECASE):
        return ("words", re.sub(r"[ .]", "", plain.lower()))
    wordy = re.search("[a-z]{4}|^(yes|no|odd|all)$", plain.lower()) or (plain != text and len(plain) > 1)
    if wordy and re.fullmatch(r"[a-zA-Z][^0-9\\_^*/+={}()]*", plain):
        return ("words", re.sub(r"^(?:a|an|the) |[^a-z]", "", plain.lower()))
    text = re.sub(r"\\text\s*\{\s*([a-zA-Z])\s*\}", r"\1", text)  # \mathrm{e}
    return ("latex", _squeeze(text.removeprefix("+")))


@lru_cache(maxsize=100_000)
def read_answer(text: str) -> tuple | None:
    r"""The form of an answer string, None when hopeless (empty, unbalanced, divided by zero, NaN).

    ("number", Fraction)  ("percent", Fraction)  ("base", digits, base)  ("words", text)  ("latex", latex)
    ("option", letter, form of its text or None)  ("equation", latex, forms of the sides)  ("relation", latex)
    ("named", name, form)  ("list", brackets, forms), brackets: "" (bare list), "\{\}", "()", "(]", ...
    """
    text = unicodedata.normalize("NFKC", text.translate(_UNICODE))
    text = _GROUPED.sub(lambda number: re.sub("[^0-9]", "", number[0]), text)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    bare = re.sub(r"\\[{}]", "", text)
    balanced = len(re.findall(r"[(\[]", text)) == len(re.findall(r"[)\]]", text))
    if not balanced or bare.count("{") != bare.count("}"):
        return None
    try:
        return _read(text)
    except (ZeroDivisionError, RecursionError, ValueError):  # ValueError: an integer of thousands of digits
        return None


# --- comparing two forms ---


def _latex(form: tuple) -> str | None:
    """The form as LaTeX for math-verify; None for what it must not decide (words, lists, bases, options)."""
    kind, value = form[:2]
    if kind in ("number", "percent"):
        value = value / 100 if kind == "percent" else value
        return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    if kind == "named":
        inner = _latex(form[2])
        return inner and f"{value}={inner}"
    return value if kind in ("latex", "equation", "relation") else None


def _same(gold: tuple, answer: tuple) -> bool:
    """Whether an answer's form equals a gold's, by the policy; TimeoutError if math-verify was killed."""
    if gold == answer:
        return True
    kinds = gold[0], answer[0]
    if kinds == ("named", "named") and gold[1] == answer[1]:
        return _same(gold[2], answer[2])
    if {"named", "equation"} >= set(kinds) or kinds == ("relation", "relation"):
        return _ask_math_verify(_latex(gold), _latex(answer))
    if gold[0] == "named":
        return _same(gold[2], answer)
    if answer[0] == "named":
        return gold[0] not in ("equation", "relation") and _same(gold, answer[2])
    if answer[0] == "equation":
        return all(_same(gold, side) for side in answer[2])
    if gold[0] == "option":
        return answer[1].upper() == gold[1] if kinds[1] in ("option", "latex") else False
    if answer[0] == "option" and answer[2]:
        return _same(gold, answer[2])
    if gold[0] == "base":
        return answer == ("number", Fraction(gold[1])) if gold[1].isdigit() else False
    if answer[0] == "base":
        return answer[2] == 10 and gold == ("number", Fraction(answer[1] or 0))
    if set(kinds) == {"number", "percent"}:
        number, percent = (gold[1], answer[1]) if kinds[0] == "number" else (answer[1], gold[1])
        return number == percent / 100 or (number == percent and abs(percent) > 1)
    if kinds == ("list", "list"):
        return _same_list(gold[1], gold[2], answer[1], answer[2])
    if "words" in kinds:
        return kinds[0] == "words" and re.sub(r"[^a-z]", "", str(answer[1]).lower()) == gold[1]
    return "latex" in kinds and _ask_math_verify(_latex(gold), _latex(answer))


def _same_list(gold_brackets: str, golds: tuple, brackets: str, answers: tuple) -> bool:
    if {gold_brackets, brackets} <= {"", r"\{\}"}:
        golds, left = tuple(dict.fromkeys(golds)), list(dict.fromkeys(answers))
        if len(golds) != len(left):
            return False
        for gold in golds:
            found = next((answer for answer in left if _same(gold, answer)), None)
            if found is None:
                return False
            left.remove(found)
        return True
    if gold_brackets == brackets or {gold_brackets, brackets} == {"", "()"}:
        return len(golds) == len(answers) and all(map(_same, golds, answers))
    return False


# --- math-verify in a child process: sympy can take for ever on a hostile answer, so it must be killable ---


def _grading_worker(cpu_seconds: int) -> None:
    """Main program of the child: reads lines [gold, answer] of LaTeX, writes right, wrong or unreadable."""
    import json
    import logging
    import os
    import re
    import resource
    import signal
    import sys
    from functools import lru_cache

    from latex2sympy2_extended import NormalizationConfig
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy, normalize_latex
    from math_verify import verify
    from sympy import Float, I, MatrixBase, Rational, nan, simplify, zoo
    from sympy.core.relational import Equality, Relational

    logging.disable(logging.CRITICAL)
    replies, sys.stdout = sys.stdout, sys.stderr
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    normalization = NormalizationConfig(units=False, malformed_operators=True, nits=False, boxed="none")
    conversion = ConversionConfig(lowercase_symbols=False, interpret_as_mixed_fractions=False)
    # Names that math-verify's parser takes for constants, or not at all.
    misread = [
        (r"\\gamma(?![a-zA-Z])", r"\\mu_{gamma}"),
        (r"\\hbar(?![a-zA-Z])", r"\\mu_{hbar}"),
        (r"\\odot(?![a-zA-Z])", "o"),
        (r"E_", r"\\Xi_"),
        (r"([0-9])\s*\\frac", r"\1\\cdot\\frac"),
        (r"\\sqrt\s*(\[\w+\])?\s*(\w)", r"\\sqrt\1{\2}"),
    ]

    @lru_cache(maxsize=10_000)
    def read(latex):
        for pattern, new in misread:
            latex = re.sub(pattern, new, latex)
        if re.search(r"[0-9]\s*_", latex):
            return None  # the base of a number would be dropped
        try:  # math-verify's parser without its stripping of "units", which takes variables for units
            value: Any = latex2sympy(
                normalize_latex(latex, normalization),
                is_real=True,
                normalization_config=None,
                conversion_config=conversion,
            )
            exact = {decimal: Rational(str(decimal)) for decimal in value.atoms(Float)}
            exact |= {symbol: I for symbol in value.free_symbols if symbol.name == "i"}
            return value.xreplace(exact) if exact else value
        except Exception:
            return None

    def differ(gold, answer):
        """Different in 40 digits at one of two points: verify is less exact, and slow on wrong answers."""
        symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
        for shift in (0, 5):
            point = {symbol: Rational(7 + shift + 4 * k, 3) for k, symbol in enumerate(symbols)}
            try:
                a, b = (value.evalf(60, subs=point) for value in (gold, answer))
                if a.is_zero or b.is_zero:
                    return simplify(gold - answer) != 0
                scale = abs(a) + abs(b)
                if b.has(nan, zoo) or (scale.is_finite and bool(abs(a - b) > scale * Rational(1, 10**40))):
                    return True
            except (TypeError, ValueError, AttributeError):
                pass  # no number comes out: f(x), a set, an unevaluated sum
        return False

    def same(gold, answer):
        relations = [isinstance(value, Relational) for value in (gold, answer)]
        if any(relations):
            if not all(relations):
                return False
            if gold.free_symbols != answer.free_symbols:
                return False
            ratio = simplify((gold.lhs - gold.rhs) / (answer.lhs - answer.rhs))
            if not ratio.is_number or not ratio.is_finite or ratio.is_zero:
                return False
            if type(gold) is type(answer):
                return isinstance(gold, Equality) or gold.rel_op == "!=" or bool(ratio.is_positive)
            return gold.reversed.rel_op == answer.rel_op and bool(ratio.is_negative)
        if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase):
            return gold.shape == answer.shape and all(map(same, gold.flat(), answer.flat()))
        return not differ(gold, answer) and verify(
            gold, answer, float_rounding=30, numeric_precision=30, timeout_seconds=None
        )

    def reply(gold, answer):
        gold = read(gold)
        if gold is None or gold.has(nan, zoo):
            return "unreadable"
        if answer is None:
            return "right"
        answer = read(answer)
        try:
            return "right" if answer is not None and same(gold, answer) else "wrong"
        except Exception:
            return "wrong"

    if reply(r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}") != "right":  # an unfit antlr: all would be wrong
        raise SystemExit("math-verify does not work here: pip install 'math-verify[antlr4_13_2]'")
    print("ready", file=replies, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody reads its messages from here on
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # SIGPROF ends this process, even inside C code
        verdict = reply(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(verdict, file=replies, flush=True)


class _Worker:
    """math-verify in a child process; `ask` gives its verdict, or "" if it hung and had to be killed."""

    def __init__(self):
        source = f"{inspect.getsource(_grading_worker)}\n_grading_worker({GRADER_CPU_SECONDS})"
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process: Any = subprocess.Popen([sys.executable, "-c", source], bufsize=0, **pipes)
        if self.receive(GRADER_START_SECONDS) != "ready":
            self.process.kill()
            message = self.process.communicate()[1].decode()[-500:]
            raise RuntimeError(f"the grading worker did not start: {message}")

    def receive(self, seconds: float) -> str:
        """One line, or "" if the process ended or said nothing for so long."""
        ready = multiprocessing.connection.wait([self.process.stdout.fileno()], seconds)
        return self.process.stdout.readline().decode().strip() if ready else ""

    def ask(self, gold: str, answer: str | None) -> str:
        verdict = ""
        try:
            self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            verdict = self.receive(GRADER_WALL_SECONDS)
        except BrokenPipeError:
            pass
        finally:
            if not verdict:  # also on Ctrl-C: a late reply must not be read as the next one's
                self.stop()
        return verdict

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


_idle: list[_Worker] = []  # at most one worker for each thread that grades
_owner = os.getpid()  # a forked process must not share its parent's pipes
_lock = threading.Lock()


@atexit.register
def _stop_workers() -> None:
    while _owner == os.getpid() and _idle:
        _idle.pop().stop()


@lru_cache(maxsize=100_000)
def _math_verify(gold: str, answer: str | None) -> str:
    """math-verify's verdict on two LaTeX strings: "right", "wrong", "unreadable" (the gold) or "timeout"."""
    global grader_timeouts, _owner
    with _lock:
        if _owner != os.getpid():
            _idle.clear()
            _owner = os.getpid()
        worker = _idle.pop() if _idle else None
    if worker is None or worker.process.poll() is not None:
        worker = _Worker()
    verdict = worker.ask(gold, answer)
    with _lock:
        if verdict:
            _idle.append(worker)
        else:
            grader_timeouts += 1
    return verdict or "timeout"


def _ask_math_verify(gold: str | None, answer: str | None) -> bool:
    if gold is None or answer is None or r"\text" in answer:
        return False
    verdict = _math_verify(gold, answer)
    if verdict == "timeout":
        raise TimeoutError
    return verdict == "right"


# --- the grader's public functions ---


@lru_cache(maxsize=100_000)
def _read_gold(gold: str) -> tuple:
    text = extract_answer(gold) if r"\boxed" in gold else gold
    form: Any = read_answer(text) if text else None
    leaves = [form]
    while leaves:
        leaf = leaves.pop()
        symbolic = leaf is not None and leaf[0] in ("latex", "equation", "relation")
        if leaf is None or (symbolic and _math_verify(leaf[1], None) != "right"):
            raise ValueError(f"gold answer cannot be parsed: {gold!r}")
        leaves += leaf[2] if leaf[0] == "list" else [leaf[2]] if leaf[0] == "named" else []
    return form


def check_gold(gold: str) -> None:
    """ValueError, naming the gold, if it cannot be parsed: that is an error in the data, no wrong answer."""
    _read_gold(gold)


@lru_cache(maxsize=100_000)
def _verdict(answer: str | None, gold: str) -> str:
    gold_form = _read_gold(gold)
    if answer is None or not answer.strip():
        return "none"
    if len(answer) > max(MAX_ANSWER_CHARS, 2 * len(gold)):
        return "wrong"
    form = read_answer(answer)
    try:
        return "right" if form is not None and _same(gold_form, form) else "wrong"
    except TimeoutError:
        return "timeout"


def grade_all(pairs: list[tuple[str | None, str]]) -> list[str]:
    """Verdict on each (extracted answer, gold): right, wrong, none (no answer) or timeout. Uses all cores."""
    different = list(dict.fromkeys(pairs))
    threads = min(os.cpu_count() or 1, len(different) // 50)  # a worker starts in 2 s, so few answers need but one
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:  # what takes long is in the workers' processes
            verdicts = dict(zip(different, pool.map(lambda pair: _verdict(*pair), different)))
    else:
        verdicts = {pair: _verdict(*pair) for pair in different}
    return [verdicts[pair] for pair in pairs]


def answers_equal(answer: str | None, gold: str) -> bool:
    """Whether an extracted answer equals the gold by the policy table; ValueError for an unparsable gold."""
    return _verdict(answer, gold) == "right"


def grade(response: str, gold: str) -> bool:
    r"""Whether the last box of `response` (what follows the thought) holds the gold answer.

    False for no box and for hopeless or endless answers; ValueError for a gold that cannot be parsed.
    """
    return answers_equal(extract_answer(response), gold)


def group_answers(answers: list[str | None], gold: str) -> list[int | None]:
    """Class of each answer under mathematical equality, for voting: None for no answer, 0 for right answers.

    Right answers are class 0 (also when there is none); wrong ones are 1, 2, ... in order of appearance.
    """
    classes: dict[str, int] = {}
    representatives: list[tuple | None] = []
    for answer in answers:
        verdict = _verdict(answer, gold)
        if answer is None or verdict == "none" or answer in classes:
            continue
        form = read_answer(answer) if len(answer) <= MAX_ANSWER_CHARS and verdict == "wrong" else None
        if verdict == "right":
            classes[answer] = 0
            continue
        for number, other in enumerate(representatives, 1):
            try:
                if form is not None and other is not None and _same(other, form):
                    classes[answer] = number
                    break
            except TimeoutError:
                continue
        else:
            representatives.append(form)
            classes[answer] = len(representatives)
    return [None if answer is None else classes.get(answer) for answer in answers]
