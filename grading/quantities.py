"""Rules for quantities: numbers in words, units, durations, percents."""

import re
from fractions import Fraction

from grading.box import TEXT
from grading.texts import AND, Same, number, plain

_NAMES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"  # noqa: E501
NUMBERS = {word: n for n, word in enumerate(_NAMES.split())}
NUMBERS |= {word: 10 * n for n, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_SCALES: dict[str, int | Fraction] = {
    "dozen": 12,
    "score": 20,
    "hundred": 100,
    "thousand": 10**3,
    "lakh": 10**5,
    "million": 10**6,
}
_SCALES |= {
    "crore": 10**7,
    "billion": 10**9,
    "bn": 10**9,
    "trillion": 10**12,
    "百": 100,
    "千": 1000,
    "万": 10**4,
    "亿": 10**8,
}
_PARTS = {
    "half": 2,
    "halve": 2,
    "third": 3,
    "quarter": 4,
    "fifth": 5,
    "eighth": 8,
    "ninth": 9,
    "twelfth": 12,
    "permille": 1000,
}
_PARTS |= {re.sub("y$", "ie", word) + "th": n for word, n in (NUMBERS | _SCALES).items() if n}
_PARTS |= {"basis": 10**4}


def in_digits(text: str) -> str:
    """21 for twenty-one, 3000000 for "3 million", 7/16 for "7 sixteenths", 1/2 for "one half", 36 for "6 squared"."""
    tokens = re.sub(r"(?<=[a-z])-(?=[a-z])|,? and (?=[a-z])", " ", plain(text).lower()).split(" ")
    total, current, used = Fraction(0), None, 0
    for token in tokens:
        word = token if token in NUMBERS | _SCALES | _PARTS else token.removesuffix("s")
        if used == 0:
            current = (
                Fraction(NUMBERS[word]) if word in NUMBERS else Fraction(1) if token in ("a", "an") else number(token)
            )
        elif current is None or word in ("squared", "cubed"):
            total, current = (total + (current or 0)) ** {"squared": 2, "cubed": 3}.get(word, 1), None
            used += 1
            break
        elif word in NUMBERS and tokens[0] not in "0123456789":
            current += NUMBERS[word]
        elif word in _SCALES:
            total, current = (
                (total, current * 100) if word == "hundred" else (total + current * _SCALES[word], Fraction(0))
            )
        elif word in _PARTS:
            total, current = (total + current) / _PARTS[word], Fraction(0)
        else:
            break
        if current is None:
            return text
        used += 1
    rest = " ".join(tokens[used:]).removeprefix("points").strip()
    return text if used == 0 or (used == 1 and tokens[0] not in NUMBERS) else f"{total + (current or 0)} {rest}".strip()


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
        parts = [part.rsplit(" ", 1) for part in re.split(rf" ?(?:,|{AND}) ?|(?<=[a-z]) (?=[0-9])", plain(text))]
        each = {"s": 1, "min": 60, "h": 3600, "day": 86400, "week": 604800}
        values = [
            (number(part[0]), each.get(_UNITS.get(part[-1], _UNITS.get(part[-1].removesuffix("s"), ""))))
            for part in parts
        ]
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
