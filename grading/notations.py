"""Rules for other ways to write the same: number words, units, ratios, points, congruences, bases, binomials."""

import re
from fractions import Fraction
from itertools import pairwise
from typing import Any

from grading.box import TEXT
from grading.lists import AND, Same, enclosed, items, number, plain, split, squeeze

_NAMES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"  # noqa: E501
NUMBERS = {word: n for n, word in enumerate(_NAMES.split())}
NUMBERS |= {word: 10 * n for n, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_SCALES = dict(dozen=12, score=20, hundred=100, thousand=10**3, lakh=10**5, million=10**6, crore=10**7, billion=10**9)
_SCALES |= dict(bn=10**9, trillion=10**12) | {"百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_PARTS = dict(half=2, halve=2, third=3, quarter=4, fifth=5, eighth=8, ninth=9, twelfth=12, permille=1000, basis=10**4)
_PARTS = {re.sub("y$", "ie", word) + "th": n for word, n in (NUMBERS | _SCALES).items() if n} | _PARTS
_POWERS = {"squared": 2, "cubed": 3}


def in_digits(text: str) -> str:
    """21 for twenty-one, 3000000 for "3 million", 7/16 for "7 sixteenths", 1/2 for "one half", 36 for "6 squared"."""
    first, *rest = re.sub(r"(?<=[a-z])-(?=[a-z])|,? and (?=[a-z])", " ", plain(text).lower()).split(" ")
    start = NUMBERS.get(first, 1 if first in ("a", "an") else number(first))
    total, current, used = Fraction(0), Fraction(start or 0), 0
    for token in rest if start is not None else ():
        word = token if token in NUMBERS | _SCALES | _PARTS else token.removesuffix("s")
        if word in NUMBERS and first not in "0123456789":
            current += NUMBERS[word]
        elif word == "hundred":
            current *= 100
        elif word in _SCALES:
            total, current = total + current * _SCALES[word], Fraction()
        elif word in _PARTS or word in _POWERS:
            whole = total + current
            total, current = whole / _PARTS[word] if word in _PARTS else whole ** _POWERS[word], Fraction()
        else:
            break
        used += 1
    left = " ".join(rest[used:]).removeprefix("points").strip()
    return text if not used and first not in NUMBERS else f"{total + current} {left}".strip()


_UNITS = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimetre|cm centimeter centimetre|m meter metre|km kilometer kilometre|in inch inche|ft foot feet|yd yard|mi mile"  # noqa: E501
        "|mg milligram|g gram|kg kilogram|lb pound|oz ounce|ml mL milliliter|l L liter litre|s sec second|min minute|h hr hour|day|week|month"  # noqa: E501
        "|yr year|mph|kph kmh|dollar USD|cent|euro EUR|rad radian|deg degree|N newton|J joule|W watt|V volt|A ampere|K kelvin|Pa pascal|Hz"  # noqa: E501
    ).split("|")
    for name in names.split()
}
_FILLER = set(
    "square sq cubic cu per of the in a an total each red blue people men women children person unit with certainty inclusive"  # noqa: E501
    " mol Omega kJ eV kPa kW dm dl cl cc rs gbp inr jpy cny erg rpm".split()
)
_NO_UNIT = re.compile(
    r"\b(?:or|and|not|if|for|when|where|then|mod|modulo|to|is|than|more|less|below|negative|minus|plus|times|over|factorial|choose|base|out|least"
    r"|most|either|otherwise|except|unless|but|only|doubles?d?|twice|triples?d?|halve[sd]|infinity|root|power|approx\w*|(?:de|in)crease|basis|score"
    r"|dozens?|remainder|pairs|per ?mille?|percent\w*|squares?d|cubed|vs|versus|maybe|possibly|\w*(?:illion|thousand|hundred)\w*|\w{2,}(?:th|rd)s?"  # noqa: E501
    r"|halves|quarters|seconds? of|crore|lakh|bn|tens|scores|gross|folds?)\b|[万亿千百]"
)
_TAIL = re.compile(
    rf"(?:{TEXT}|\\(?:Omega|cdot|times|mu|circ)(?![a-z])|[a-zA-Z./ ·]|\^ ?\{{? ?-?[0-9] ?\}}?|[^\x00-\x7f])+"
)
_TAIL_START = re.compile(
    r"(?<=[0-9})!\]a-z]) ?\\text ?\{|(?<=[0-9})!\]]) ?(?=[a-zA-Z]{2}|m\^)| (?=[a-zA-Z](?:[ /^.]|$))|(?<=[0-9}]) ?(?=[^\x00-\x7f]|\\mu ?\\text|\\Omega)"  # noqa: E501
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
    r"""5 km/h, \$5 and "5 apples" for 5; a unit may be missing, but 5 minutes is not 5 hours, and 5 million is not 5."""  # noqa: E501
    g, a = quantity(gold), quantity(answer)
    if (g is None and a is None) or (g and a and g[1] and a[1] and g[1] != a[1]):
        return False
    return same(g[0] if g else gold, a[0] if a else answer)


def durations(gold: str, answer: str, same: Same) -> bool:
    """90 minutes and "1 hour 30 minutes" for 1.5 hours."""

    def seconds(text: str) -> Fraction | None:
        total, each = Fraction(0), {"s": 1, "min": 60, "h": 3600, "day": 86400, "week": 604800}
        for part in re.split(rf" ?(?:,|{AND}) ?|(?<=[a-z]) (?=[0-9])", plain(text)):
            many, _, unit = part.rpartition(" ")
            seconds = each.get(_UNITS.get(unit, _UNITS.get(unit.removesuffix("s"), "")))
            if seconds is None or (n := number(many)) is None:
                return None
            total += n * seconds
        return total

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


def ratios(gold: str, answer: str, same: Same) -> bool:
    """6:8 for 3:4; neither 4:3 nor 3/4, and no times of the day."""
    g, a = split(gold, ":"), split(answer, ":")
    if len(g) < 2 or len(g) != len(a) or re.fullmatch("[0-9]{1,2} ?: ?[0-5][0-9]", gold):
        return False
    return all(same(rf"({x})\cdot({w})", rf"({z})\cdot({y})") for (x, y), (z, w) in zip(pairwise(g), pairwise(a)))


def points(gold: str, answer: str, same: Same) -> bool:
    r"""P(1,-2,3), a column and \hat{i}-2\hat{j}+3\hat{k} for (1,-2,3)."""

    def coordinates(text: str, other: str) -> str:
        column = re.fullmatch(r"\\begin ?\{pmatrix\}([^&]*)\\end ?\{pmatrix\}", text)
        if column and len(entries := split(column[1], r"\\\\")) > 1:
            return f"({', '.join(entries)})"
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
        head, _, modulus = re.sub(r"\\?(?<![a-z])[pb]?mod(?![a-z])", "@", text).partition("@")
        name, _, rest = re.sub(r"\\equiv(?![a-z])", "=", head).rpartition("=")
        numbers = [number(item) for item in items(rest.strip(" (,"))[1]]
        modulus = modulus.strip("(){} ")
        exact = modulus.isdigit() and int(modulus) and None not in numbers
        return name.strip(), {n % int(modulus) for n in numbers if n is not None} if exact else squeeze(rest), modulus

    g, a = residues(gold), residues(answer)
    return bool(g[2] and g[1:] == a[1:] and (not g[0] or not a[0] or g[0] == a[0]))


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


def dimensions(gold: str, answer: str, same: Same) -> bool:
    r"""5 by 3 cm for "5 cm by 3 cm" and 5\text{ cm} \times 3\text{ cm}."""
    g, a = (split(text, r"\\text ?\{ ?by ?\}|\bby\b|\\times(?![a-z])") for text in (gold, answer))
    return len(g) == len(a) > 1 and all(map(same, g, a)) and bool(quantity(g[-1]) or quantity(a[-1]))


def decimal_comma(gold: str, answer: str, same: Same) -> bool:
    """3,75 for 3.75."""
    one, two = sorted((gold, answer), key=lambda text: "," in text)
    return bool(re.fullmatch(r"[0-9]+\.[0-9]+", one)) and two.replace(",", ".") == one


TABLE = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"^\\therefore(?![a-z])", ""),
        (r"^[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}$", lambda m: m[0].replace(",", "")),  # Indian groups
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
