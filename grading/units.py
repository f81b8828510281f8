"""Rules for number words and units: 21 for twenty-one, 10 m/s for 36 km/h."""

import re
from collections import Counter
from fractions import Fraction
from typing import Any

import sympy
from sympy.physics import units as si
from sympy.physics.units.prefixes import PREFIXES
from sympy.physics.units.systems.si import dimsys_SI

from grading.box import T
from grading.forms import Same, number, plain

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
NUMBERS = {word: n for n, word in enumerate([*_ONES.split(), "seventeen", "eighteen", "nineteen"])}
NUMBERS |= {word: 10 * n for n, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
TIMES = dict(dozen=12, score=20, hundred=100, thousand=10**3, lakh=10**5, million=10**6, crore=10**7, billion=10**9)
TIMES |= {"trillion": 10**12, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
TIMES |= {re.sub("y$", "ie", word) + "th": Fraction(1, n) for word, n in (NUMBERS | TIMES).items() if n}
_PARTS = dict(half=2, halve=2, third=3, quarter=4, fifth=5, eighth=8, ninth=9, twelfth=12)
TIMES |= {word: Fraction(1, n) for word, n in _PARTS.items()}


def in_digits(text: str) -> str:
    """21 for twenty-one, 3000000 for "3 million", 7/16 for "7 sixteenths", 7/2 for "three and a half"."""
    said = re.sub(r"(?<=\d)([百千万亿]+)(?![克米瓦])", r" \1 ", plain(text).lower())
    if half := re.fullmatch(r"(.+?) and (?:a|one|1) half", said):
        whole = number(in_digits(half[1]))
        return str(whole + Fraction(1, 2)) if whole is not None else text
    if re.search(r"\w-\w+(?:th|third|half|quarter)\b", said):
        return text  # twenty-fifth
    said = re.sub(r"\b(hundred|thousand|million|billion),? and ", r"\1 ", said)
    first, *rest = re.sub("(?<=[a-z])-(?=[a-z])", " ", said).split()
    start = NUMBERS.get(first, 1 if first in ("a", "an") else number(first))
    total, current, used = Fraction(0), Fraction(start or 0), 0
    for token in rest if start is not None else ():
        word = token if token in NUMBERS | TIMES else token.removesuffix("s")
        if word in NUMBERS and first in NUMBERS:
            if current % 100 and (current % 10 or current % 100 < 20 or NUMBERS[word] > 9):
                return text  # two numbers in a row
            current += NUMBERS[word]
        elif word == "hundred":
            current *= 100
        elif word in TIMES:
            total, current = total + current * TIMES[word], Fraction()
        else:
            break
        used += 1
    return " ".join([str(total + current), *rest[used:]]) if used or first in NUMBERS else text


_ALIAS = dict(min="minute", hr="hour", sec="second", lb="pound", metre="meter", litre="liter", inche="inch")
_PER_HOUR = {"mph": si.mile.scale_factor, "kph": si.km.scale_factor}
_OTHER: dict[str, tuple[dict, Any]] = {name: ({name: 1}, 1) for name in "week month oz pc yr degreeC degreeF".split()}
_MONEY = "usd US dollar|eur euro|gbp|inr R Rs Rs. rupee|cny yuan rmb|jpy yen|krw won|chf"  # sympy has no such
CURRENCY = {name.lower(): names.split()[0] for names in _MONEY.split("|") for name in names.split()}
_OTHER |= {name: ({code: 1}, 1) for name, code in CURRENCY.items() if len(name) > 1 and not hasattr(si, name)}
_OTHER |= {name: ({"length": 1, "time": -1}, by / si.hour.scale_factor) for name, by in _PER_HOUR.items()}
_OTHER |= {name: ({"usd": 1}, sympy.Rational(1, 100)) for name in ("cent", "¢")}
_WITH_UNITS = set("of the in a an each total unit red blue people men women children person rpm erg omega".split())
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_UNIT_START = re.compile(r"(?<=[0-9})!\]]) ?(?=[a-zA-Z]{2}|m\^|[^\x00-\x7f]|\\mu|\\Omega)| (?=[a-zA-Z])")
_UNIT = re.compile(rf"(?:\\(?:Omega|cdot|times|mu|circ){T}|[./ ·¢]|[^\W\d_]|\^ ?\{{? ?-?[0-9] ?\}}?)+")
_NO_THINGS = {
    *"pair percent fold time double triple square power root minu plu thi millone quadrillion"
    " milliard reciprocal factorial negative inverse multiple".split(),
    *NUMBERS,
    *TIMES,
}
_SCALE = re.compile("[万亿萬億千百](?![克米瓦])|分之|以上|以下|左右|[或余多]|тыс|милл|млн|млрд|или")
_CODES = "|".join(map(re.escape, sorted(CURRENCY, key=len, reverse=True)))
_CURRENCY = re.compile(rf"([-+]?) ?({_CODES}) ?(?=[-0-9.])(.*)", re.IGNORECASE)


def unit(word: str) -> tuple[dict[str, int], Any] | None:
    """What a unit measures, and how much; ({}, 1) of a word that stands with units or counts things; None of others."""
    for name in (word, word.removesuffix("s"), word.lower(), word.lower().removesuffix("s")):
        if (meant := _ALIAS.get(name, name)) in _OTHER:
            return _OTHER[meant]
        known: Any = getattr(si, meant, None)
        named = len(word) > 1 or (name == word and type(known) is si.Quantity)  # 5 J, but not 5 c of light
        if isinstance(known, si.Quantity) and named and name not in ("permille", "pm"):
            of = {str(d.name): n for d, n in dimsys_SI.get_dimensional_dependencies(known.dimension).items()}
            return of or {str(known.dimension): 1}, known.scale_factor
    if prefixed := re.fullmatch("([kMGmncdμ])([mgsLlWJNVAKCFT]|Hz|eV|Pa|cal|bar|mol|pc)", word):
        of, scale = unit(prefixed[2]) or ({}, 1)
        return of, scale * PREFIXES[prefixed[1].replace("μ", "mu")].scale_factor
    counts = re.fullmatch("[a-z]{2,}[^s]s", word) and word[:-1] not in _NO_THINGS
    return ({}, 1) if counts or name in _WITH_UNITS or not word.isascii() else None


def quantity(given: str) -> tuple[str, dict[str, int], Any] | None:
    """("5", {length: 1, time: -2}, 1000) of "5 km/s^2": value, what it measures, unit; None if other words follow."""
    text = plain(given)
    if two := re.fullmatch(r"([0-9.]+ ?[a-z]+),? (?:and )?([0-9.]+ ?[a-z]+)", text):
        one, two = map(quantity, two.groups())
        if one and two and one[1] == two[1] != {}:
            return rf"{one[0]}+{two[0]}\cdot({sympy.latex(two[2] / one[2])})", *one[1:]
    if money := _CURRENCY.fullmatch(text):
        return money[1] + money[3], {CURRENCY[money[2].lower()]: 1}, 1
    start = _UNIT_START.search(text)
    if not start or not _UNIT.fullmatch(tail := text[start.start() :]) or _SCALE.search(tail):
        return None
    head, tail = text[: start.start()].strip(), re.sub(r"\\(?:cdot|times|mu|circ)", " ", tail)
    if re.search(r"(?<![\\a-zA-Z])[^\W\d_]{3}|^[^\W\d_]{2}$", head):
        return None  # parallel lines; 2 red, 3 blue; no solutions
    words = re.findall(r"(/|\bper\b)|([^\W\d_]+|¢)(?: ?\^ ?\{? ?(-?[0-9]))?", tail)
    if max((len(word) for _, word, _ in words), default=0) < 2 and tail.isascii():
        several = len(words) > 1 and r"\text" not in given and not re.match(" ?[mN] ?/ ?(?:s|kg)", tail)
        if several or number(head.replace(",", ".")) is None:
            return None  # 5 m, but not x m; \frac{1}{2} m v^2 is no 1/2
    measures, scale, sign, power = Counter(), sympy.Integer(1), 1, 1
    for per, word, exponent in words:
        sign = -1 if per else sign
        if word in _POWERS:
            power = _POWERS[word]
        elif word:
            if (found := unit(word)) is None:
                return None
            n = sign * int(exponent or power)
            measures.update({name: n * times for name, times in found[0].items()})
            scale *= found[1] ** n
            power = 1 if found[0] else power
    return head, {name: n for name, n in measures.items() if n}, scale


def units(gold: str, answer: str, same: Same) -> bool:
    r"""5 km/h, \$5 and "5 apples" for 5, 90 minutes for 1.5 hours; not 5 minutes for 5 hours, nor 5 million for 5."""
    g, a = quantity(gold), quantity(answer)
    if "%" in gold + answer and (g or a) and not (g and a):
        return False
    if r"\pi" in gold + answer and (of := g or a) and not (g and a) and of[2] == sympy.pi / 180:
        return same(rf"({of[0]})\cdot\frac{{\pi}}{{180}}", answer if g else gold)
    foreign = [re.sub(r"[\x00-\x7f\W]", "", plain(text)) for text in (gold, answer)]
    if all(foreign) and not any(map(str.startswith, foreign, foreign[::-1])):  # km and m in Russian
        return False
    plain_degrees = any(re.search(r"degree(?![CFs])", text) for text in (gold, answer))  # of angle, or of some scale
    if g and a and g[1] and a[1] and g[1:] != a[1:] and not (plain_degrees and "degree" in gold and "degree" in answer):
        return g[1] == a[1] and same(*(rf"({head})\cdot({sympy.latex(of)})" for head, _, of in (g, a)))
    return bool(g or a) and same(g[0] if g else gold, a[0] if a else answer)
