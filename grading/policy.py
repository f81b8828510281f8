r"""Third stage: what counts as the same answer, against and beyond math-verify's verdict. Only the worker imports this.

`equal` asks for the verdict on two single things (values.py), unless a veto forbids it, and then every addition. A rule
sees two cleaned texts, and `same`, which puts the whole question about parts of them; rules do not know each other. A
reading is the simplest rule: what one text says in plainer words. docs/answers.md has the table of them.
"""

import re
from functools import lru_cache

from latex2sympy2_extended.math_normalization import extract_boxed_content

from grading.box import clean
from grading.lists import assigned, lists, named, renamed_argument, sets, sides, solution_set
from grading.notations import bases, congruences, digit_groups, dimensions, dotted, pieces, plainer, points, ratios
from grading.quantities import durations, in_digits, percents, units
from grading.texts import NAME, bare, enclosed, hopeless, items, number, plain, split, squeeze, worth
from grading.values import same as same_values
from grading.words import OPTION, conclusion, options, renamed_parameter, without_remark, words

MAX_CHARS, MAX_GOLD = 300, 3000  # longer answers are wrong unless the gold is long; longer golds are compared as text


def listed(gold: str, answer: str) -> bool:
    """2,3,3 for 2,2,3 and (2,1) for (1,2): math-verify's sets know neither order nor number; lists compares the items."""  # noqa: E501
    return any(len(items(text)[1]) > 1 for text in (gold, answer))


def half_named(gold: str, answer: str) -> bool:
    """x+y=5 for 5: an equation is not its last side; named tells which are."""
    return len(split(gold, "=")) != len(split(answer, "="))


def read_as_quotient(gold: str, answer: str) -> bool:
    """1:2 for 1/2."""
    return ":" in gold or ":" in answer


def read_as_product(gold: str, answer: str) -> bool:
    r"""\angle ACB for \angle ABC."""
    return bool(re.search(r"\\(?:angle|triangle|bar|subset|Rightarrow)(?![a-z])", gold + answer))


def other_letters(gold: str, answer: str) -> bool:
    """2x for 2: a letter that the other does not have (and that no sum or limit binds); sympy need not look."""
    if re.search(r"\\(?:sum|prod|int|lim|text)(?![a-z])|\\Xi|\{ ?d ?\}", gold + answer):
        return False
    a, b = (
        set(re.findall("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+|\{[pv]?matrix\}", "", text))) - {"e", "i", "E"}
        for text in (gold, answer)
    )
    return a != b


VETOES = (listed, half_named, read_as_quotient, read_as_product, other_letters)
READINGS = (plainer, without_remark, in_digits, dotted)
ADDITIONS = (
    named, lists, assigned, renamed_argument, sets, words, options, renamed_parameter, units, durations, percents, ratios, points,  # noqa: E501
    congruences, pieces, bases, digit_groups, dimensions, conclusion,
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

    if (
        not any(veto(gold, answer) for veto in VETOES)
        and (read := worth(gold)) is not None
        and same_values(read, worth(answer))
    ):
        return True
    readings = ((reading(gold), reading(answer)) for reading in READINGS)
    return any(pair != (gold, answer) and same(*pair) for pair in readings) or any(
        rule(gold, answer, same) for rule in ADDITIONS
    )


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
        text = (
            f"({', '.join(entries)})" if enclosed(read)[0] == "()" and not brackets else rf"\{{{', '.join(entries)}\}}"
        )
    if text.endswith("%") and not read.endswith("%") and (many := number(text.rstrip("% "))) is not None:
        text = str(many / 100)
    return text


def same_vote(gold: str, a: str, b: str) -> bool:
    """Are two wrong answers one and the same answer to the question with this gold?"""
    x, y = as_asked(gold, a), as_asked(gold, b)
    return x is not None and y is not None and (equal(x, y, {}) or equal(y, x, {}))


QUESTIONS = {"right": right, "vote": same_vote, "readable": lambda gold: read_gold(gold) is not None}
