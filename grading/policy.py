r"""Third stage: what counts as the same answer, against and beyond math-verify's verdict. Only the worker imports this.

`equal` asks for the verdict on two single things (values.py), unless a veto forbids it, and then every addition. A rule
sees two cleaned texts, and `same`, which puts the whole question about parts of them; rules do not know each other. A
reading is the simplest rule: what one text says in plainer words. docs/answers.md has the table of them.
"""

import re
from functools import lru_cache

from latex2sympy2_extended.math_normalization import extract_boxed_content

from grading.box import clean

# isort: off
from grading.lists import (
    AND, NAME, RELATION, Same, assigned, bare, enclosed, hopeless, items, letters, lists, named, number, plain, renamed,
    renamed_argument, sets, sides, solution_set, split, squeeze, worth,
)  # fmt: skip
from grading.notations import (
    bases, congruences, decimal_comma, dimensions, durations, in_digits, percents, plainer, points, ratios,
    units,
)  # fmt: skip

# isort: on
from grading.values import same as same_values

_SAID = [  # what is said in words, in the commonest languages of answers
    (word, re.compile(pattern, re.IGNORECASE))
    for word, pattern in {
        "yes": "yes|oui|s[ií]|ja|да|是的?",
        "no": "no|non|nein|nee|нет|否|不是",
        "true": "true|vrai|wahr|verdadero|vero|верно|истина|正确|对|真",
        "false": "false|faux|falsch|falso|неверно|ложь|错误?|假",
        "none": r"none|nothing|(?:there (?:is|are) )?no (?:real |such )?(?:solutions?|values?|numbers?|integers?)(?: exists?)?"  # noqa: E501
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


OPTION = re.compile(
    r"(?:(?i:the )?(?i:correct |final )?(?i:option|choice|answer|ans)(?i: is)?:? ?|选项?|答案[是:]? ?)?"
    r"(?:\( ?([A-Ja-j]) ?\)|([A-J])(?=[).:] |[).:]?$))[).:]* ?((?![,;]|and\b|or\b)[-\w\\($].*)?"
)
HEDGE = re.compile(
    r"\b(?:not|or|n?either|maybe|possibly|perhaps|incorrect|wrong|vs|versus|but|unless|otherwise|except|if|odd|even|else|remainder)\b"
    r"|\( ?[A-J] ?\)|\b[A-J][).:]"
)


def options(gold: str, answer: str, same: Same) -> bool:
    """(C), "C) 7" and "option C" for C, "B) 12" for 12; several letters in any order: "A, B, D" and BDA for ABD."""
    if re.fullmatch("[A-J]{2,6}", gold) and len(set(gold)) == len(gold):
        joined = re.sub(rf"[(), ;]|{AND}", "", plain(answer))
        return sorted(gold) == sorted(joined)
    g, a = OPTION.fullmatch(plain(gold)), OPTION.fullmatch(plain(answer)) or re.fullmatch("([a-j])()()", answer)
    g, a = (found if found and not HEDGE.search(found[3] or "") else None for found in (g, a))
    if g and a:
        return (g[1] or g[2]).upper() == (a[1] or a[2]).upper()
    return bool((g and g[3] and same(g[3], answer)) or (a and a[3] and same(gold, a[3])))


# ================================================================================================== remarks

_REASON = re.compile(
    r"\b(?:since|because|as (?:required|desired|claimed|\w+ ?=)|attained|achieved|occurs|obtained|by (?:the|symmetry|AM)|respectively"  # noqa: E501
    r"|for (?:all|any|every|each|some)|where|with|in (?:total|all)|altogether|для|因为)(?!\w)"
)
_DOMAIN = re.compile(r"[,(;]| (?=[a-zA-Z](?:_\w)? ?(?:\\(?:in|[lgn]e)(?![a-z])|[<>]))")
_RESTRICTS = re.compile(r"\b(?:if|otherwise|or|odd|even|else|except|remainder|not|but|unless|(?:is|equals) -?[0-9])\b")
_PROSE = re.compile("[a-zA-Z]{3} [a-zA-Z]{2}")
_ON_NAMES = re.compile(
    r"(?:for |where |with )?[a-zA-Z](?:_\w)?(?: ?, ?[a-zA-Z])* ?(?:\\(?:in|[lgn]e)(?![a-z])|[<>])[^,;=]*"
)


def without_remark(text: str) -> str:
    r"""12 for "12 since 3\cdot4=12", 2x for "2x for all real x" and "2x, x\ne2"; "0 for odd n" and "2n where n=3" stay."""  # noqa: E501
    said = plain(text)
    cuts = [cut.start() for cut in _REASON.finditer(said)][:1] + [cut.start() for cut in _DOMAIN.finditer(said)]
    for cut in cuts[:9]:
        head = re.sub(r" (?:for|where|with)$", "", said[:cut].rstrip(" ,;.("))
        remark = said[cut:].lstrip(" ,;(").rstrip(")")
        reason = _REASON.match(remark) and not re.match(r"(?:where|with)\b.*= ?-?[0-9]", remark)
        prose = _PROSE.search(re.sub(r"\\[a-zA-Z]+", "", head)) or RELATION.search(head)
        if (reason or _ON_NAMES.fullmatch(remark)) and head and not prose and not hopeless(head):
            if not _RESTRICTS.search(remark) and not re.search(r"\b(?:if|when|unless|otherwise|else)$", head):
                return head
    return text


def renamed_parameter(gold: str, answer: str, same: Same) -> bool:
    r"""n\pi, n\in\mathbb{Z} for k\pi, k\in\mathbb{Z}; Ae^x for any constant A for Ce^x, C\in\mathbb{R}."""

    def parameters(text: str) -> list[str]:
        head = without_remark(text)
        rest = plain(text)[len(head) :] if head != text else text if "mathbb" in text else ""
        return re.findall(r"(?<![a-zA-Z\\])([a-zA-Z])(?= ?(?:\\in(?![a-z])|is an?\b|$))", rest)

    g, a = parameters(gold), parameters(answer)
    if len(g) != 1 or len(a) != 1 or g == a or g[0] in letters(re.sub(r"\\mathbb ?\{\w\}", "", answer)):
        return False
    return same(re.sub(r"\|| : |:", r"\\mid ", gold), re.sub(r"\|| : |:", r"\\mid ", renamed(answer, a[0], g[0])))


def conclusion(gold: str, answer: str, same: Same) -> bool:
    """6 for "so the answer is 6" and "... 72/12 = 6 людей": the value after the last "is" of a sentence."""
    said = plain(answer)
    is_words = list(re.finditer(r"\b(?:is|est|it's|equals)\b|[:是为]", said))
    cuts = is_words or list(re.finditer("=", said))
    if not cuts or "=" in gold or re.search("[a-z]{3} ", gold) or not re.match(r"[^\W\d_]{2}|[A-Z] ?[:=]", said):
        return False
    sentence, value = said[: cuts[-1].start()], said[cuts[-1].end() :].strip(" .")
    sentence = re.sub(r"\\[a-zA-Z]+(?:_\{\w+\})?", "", sentence)
    if not re.search(r"\b[a-z]{3}|\b[Aa]ns|[^\x00-\xff]", sentence) or r"\{" in said:
        return False
    return not (len(is_words) > 1 and re.search(AND, said)) and same(gold, value.strip("()") if "=" in value else value)


# ================================================================================================== the whole question

_NO_LETTERS = re.compile(r"\\[a-zA-Z]+|\{[pv]?matrix\}")
_NO_PRODUCT = re.compile(r"\\(?:angle|triangle|bar|subset|Rightarrow)(?![a-z])")
_BINDS = re.compile(r"\\(?:sum|prod|int|lim|text)(?![a-z])|\\Xi|\{ ?d ?\}")
MAX_CHARS, MAX_GOLD = 300, 3000  # longer answers are wrong unless the gold is long; longer golds are compared as text


def misread(gold: str, answer: str) -> bool:
    """Must math-verify's verdict not be asked? Vetoes, each with an example."""
    both = f"{gold} {answer}"
    letters = [set(re.findall("[a-zA-Z]", _NO_LETTERS.sub("", text))) - {"e", "i", "E"} for text in (gold, answer)]
    return (
        any(len(items(text)[1]) > 1 for text in (gold, answer))  # 2,3,3 for 2,2,3: its sets know no order, no number
        or len(split(gold, "=")) != len(split(answer, "="))  # x+y=5 for 5: an equation is not its last side
        or ":" in both  # 1:2 for 1/2
        or bool(_NO_PRODUCT.search(both))  # \angle ACB for \angle ABC
        or (letters[0] != letters[1] and not _BINDS.search(both))  # 2x for 2
    )


READINGS = (plainer, without_remark, in_digits)
ADDITIONS = (
    named, lists, assigned, renamed_argument, sets, words, options, renamed_parameter, units, durations, percents,
    ratios, points, congruences, bases, decimal_comma, dimensions, conclusion,
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

    if not misread(gold, answer) and (read := worth(gold)) is not None and same_values(read, worth(answer)):
        return True
    readings = ((reading(gold), reading(answer)) for reading in READINGS)
    if any(pair != (gold, answer) and same(*pair) for pair in readings):
        return True
    return any(rule(gold, answer, same) for rule in ADDITIONS)


@lru_cache(maxsize=100_000)
def cleaned(text: str) -> str | None:
    """The text after the table of cleaning; None if it is hopeless."""
    if text.strip() in ("NaN", "nan", "None", "null") or hopeless(text := bare(clean(text))):
        return None
    return text


def read_gold(gold: str) -> str | None:
    """A gold, cleaned; None if nothing can be compared with it: that is an error in the data."""
    text = extract_boxed_content(gold, "last") if re.search(r"\\(?:boxed|fbox)", gold) else gold
    return text if len(text) > MAX_GOLD else cleaned(text)


def right(gold: str, answer: str) -> bool:
    """Is an extracted answer the gold?"""
    read = read_gold(gold)
    text = cleaned(answer) if len(answer) <= max(MAX_CHARS, 2 * len(gold)) else None
    return text is not None and read is not None and equal(read, text, {})


def as_asked(gold: str, answer: str) -> str | None:
    """An answer read as the gold's form asks, for voting: a bare list with its brackets, x=5 as 5 if no name is asked."""  # noqa: E501
    read, text = read_gold(gold), cleaned(answer) if len(answer) <= MAX_CHARS else None
    if text is None or read is None:
        return None
    text = bare(plainer(text))
    if option := OPTION.fullmatch(plain(text)):
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
        opening, closing = "()" if enclosed(read)[0] == "()" and not brackets else (r"\{", r"\}")
        text = opening + ", ".join(entries) + closing
    if text.endswith("%") and not read.endswith("%") and (many := number(text.rstrip("% "))) is not None:
        text = str(many / 100)
    return text


def same_vote(gold: str, a: str, b: str) -> bool:
    """Are two wrong answers one and the same answer to the question with this gold?"""
    x, y = as_asked(gold, a), as_asked(gold, b)
    return x is not None and y is not None and (equal(x, y, {}) or equal(y, x, {}))


QUESTIONS = {"right": right, "vote": same_vote, "readable": lambda gold: read_gold(gold) is not None}
