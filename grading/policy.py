r"""Third stage: what counts as the same answer, against and beyond the verdict on values. Only the worker imports this.

`equal` compares two cleaned texts: as texts, as numbers, then by each rule, the first of which asks for their values,
the second what they say in plainer words (a reading is such a function of one text). A rule sees gold, answer and
`same`, which puts the whole question about parts of them; rules do not know each other. The table of them is in
docs/answers.md.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise, product
from typing import Any

import sympy
from latex2sympy2_extended.math_normalization import extract_boxed_content
from sympy import oo
from sympy.core.function import AppliedUndef

from grading import forms, values
from grading.box import T, W, clean
from grading.families import antiderivatives, families, parameters
from grading.forms import (
    AND,
    HEDGE,
    NAME,
    ON_NAME,
    OR,
    RELATION,
    Same,
    bare,
    enclosed,
    items,
    letters,
    number,
    numbers_of,
    plain,
    remark,
    sides,
    split,
    squeeze,
)
from grading.units import NUMBERS, in_digits, units

MAX_CHARS, MAX_GOLD = 300, 3000  # longer answers are wrong unless the gold is long; longer golds are compared as text


def _near(match: re.Match) -> str:
    """Drops an approximation, unless it is none."""
    head, near = number(match.string[: match.start()].strip()), number(match[1].strip())
    return match[0] if head is not None and near is not None and abs(head - near) * 20 > abs(head) else ""


def _rows(match: re.Match) -> str:
    rows = [row.replace(",", "&") for row in re.findall(r"\[([^][]*)\]", match[1])]
    return r"\begin{pmatrix}" + r" \\ ".join(rows) + r"\end{pmatrix}"


_INT = "(-?[0-9]{1,4})"


def _run(match: re.Match) -> str:
    r"""1, 3, 5, 7 of 1, 3, \ldots, 7."""
    first, second, last = (int(match[place]) for place in (1, 2, 4))
    numbers = list(range(first, last + (1 if last > first else -1), second - first)) if second != first else []
    fits = 3 < len(numbers) < 100 and numbers[-1] == last and match[3] in (None, str(numbers[2]))
    return ", ".join(map(str, numbers)) if fits else match[0]


_SMALL = r" ?\{?([0-9]+|[a-zA-Z])\}? ?"
_NO_BUT = r"(?!.*\b(?:yes|no|never|false|but|only|unless|incorrect)\b)[^0-9]*$"
_ABOUT = rf"(?:\\approx{T}|\b(?:approximately|approx\.?|about|roughly){T})"
NOTATIONS = [
    (re.compile(pattern), new)
    for pattern, new in [
        (rf"^(\\?\w+?(?:_\w)?|\([a-z](?:, ?[a-z])+\)) ?(?:\\approx{T}|\\in(?= ?\\\{{))", r"\1="),
        (rf"^(\w\(\w\)) ?\\equiv{T}(?!.*mod)", r"\1="),
        (rf"^{_ABOUT}", ""), (rf"[,( ]?{_ABOUT}([^()]{{0,80}})\)?$", _near),  # \approx 2.7, 4\pi (\approx 12.57)
        (rf"{W}C ?\( ?(\w+) ?, ?(\w+) ?\)|(?:^|\{{ ?\}}|[-+*/(= ])[\^_]{_SMALL}C ?_{_SMALL}(?!\w)"
         rf"|{W}C ?_{_SMALL}\^{_SMALL}(?!\w)",
         lambda m: rf"\binom{{{m[1] or m[3] or m[5]}}}{{{m[2] or m[4] or m[6]}}}"),  # C(10,3), {}^{10}C_3, C_{10}^3
        (rf"(?:^|\{{ ?\}})[\^_]{_SMALL}P ?_{_SMALL}(?!\w)|{W}A ?_{_SMALL}\^{_SMALL}(?!\w)",
         lambda m: rf"\frac{{{m[1] or m[3]}!}}{{({m[1] or m[3]}-{m[2] or m[4]})!}}"),  # {}_5P_2, A_5^2
        (r"^\\mathbb ?\{? ?R ?\}? ?[\^_] ?\{? ?(?:\+|> ?0) ?\}?$", r"(0,\\infty)"),
        (r"^(?:the set of |all |the )*real(?: number)?s$", r"\\mathbb{R}"),
        (r"\\cis ?(\([^()]*\)|[^ ]*)", r"(\\cos \1+i\\sin \1)"), (r"\\lambda ?_ ?\{?\d\}?(?= ?=)", r"\\lambda"),
        (r"^(-?[^-+%]*[^-+% ]) ?%$", r"(\1)/100"), (r" \( ?or ([^()]*)\)$", r" or \1"),
        (r"^(?:negative|minus) (?=[\w\\.]+$)", "-"), (rf"^(?i:(yes|true))[,.;:] (?!.*\bnot\b){_NO_BUT}", r"\1"),
        (rf"^(?i:(no|false))[,.;:] (?!.*\b(?:is|does) (?:true|correct|right|possible|hold)){_NO_BUT}", r"\1"),
        (rf"(?<![\w.]){_INT}, ?{_INT}, ?(?:{_INT}, ?)?\\ldots ?,? ?{_INT}(?![\w.])", _run),
        (r"^\\\{((?:[^,;|:\\]|\\(?![{}]|emptyset|mid)|\([^()]*\))+)\\\}$", r"\1"),  # \{5\}
        (r"^(\w+)(?: (squared)| cubed)$", lambda m: f"{m[1]}^{2 if m[2] else 3}"),
        (r"^(?:(?:the )?[Pp]oint )?(?:[A-MO-TV-Z](?:_\w)?'? ?=? ?)?(\([^()]*[,;][^()]*\))$", r"\1"),  # P(1,2)
        (r"^(-? ?(?:[0-9./]|\\(?:frac|sqrt) ?(?:\{[^{}]{1,40}\}){1,2}|[a-z])+) ?\(([^()]*,[^()]*)\)$",
         lambda m: "(" + ", ".join(x if x.strip() == "0" else rf"{m[1]}\cdot({x})" for x in m[2].split(",")) + ")"),
        (r"^\\\{(?: ?[a-z] ?\\mid ?[a-z] ?=)?([^|]{1,80}?)(?:\\mid|[|:,])( ?[a-z] ?\\in[^|]{1,80})\\\}$", r"\1, \2"),
        (r"^[a-zA-Z](?:\(\w\)|_\w)? ?=(?=[^=]* (?:if|for) )", ""), (r"\+ ?const(?:ant)?\.?$", "+C"),
        (r"^\[ ?((?:\[[^][]{1,80}\] ?,? ?){2,9})\]$", _rows),  # [[1,2],[3,4]]
        (r"^\\begin ?\{pmatrix\}([^&]*\\\\[^&]*)\\end ?\{pmatrix\}$"  # a column, and a row^T
         r"|^(?:[(\[]|\\begin ?\{pmatrix\})([^][(){}\\]*)(?:[)\]]|\\end ?\{pmatrix\}) ?\^ ?\{?(?:T|\\top)\}?$",
         lambda m: "(" + re.sub(r"&|\\\\", ",", m[1] or m[2]) + ")"),
        (r"^(?:at )?([0-9]{1,2})(?: ?: ?([0-5][0-9]))? ?([aApP])\.? ?[mM]\.?$",
         lambda m: f"{int(m[1]) % 12 + 12 * (m[3] in 'pP')}:{m[2] or '00'} oclock"),  # 3:30 PM is 15:30
        (r"^(1[3-9]|2[0-3]) ?: ?([0-5][0-9])$", r"\1:\2 oclock"),
        (r"^(?i:(?:so|thus|hence|therefore|the|final|correct|[ ,])*(?:answer|ans|答案) ?(?:is\b|:|是)(?: ?:)? ?)", ""),
        (r"^(-? ?)\(? ?([0-9A-Fa-f]*[0-9][0-9A-Fa-f]*|[A-F]+(?= ?\)? ?_ ?\{? ?1[1-6])) ?\)? ?"
         r"(?:_ ?\{? ?\(?(\w+)\)? ?\}?|\(?(?:in )?base ?-?(\w+)\)?)$",
         lambda m: f"{m[1]}{m[2].upper()}_{NUMBERS.get(m[3] or m[4], m[3] or m[4])}"),
    ]
]  # fmt: skip


def plainer(text: str) -> str:
    """What the table of notations makes of a text."""
    for pattern, new in NOTATIONS:
        text = read.strip() if (read := pattern.sub(new, plain(text))) != plain(text) else text
    return text


def remarks(gold: str, answer: str, same: Same) -> bool:
    r"""12 since 3\cdot4=12 for 12; 2x, x\ge0 for 2x, but 2k, k\in\mathbb{N} is not 2k, k\in\mathbb{Z}."""
    (g, of_gold), (a, of_answer) = remark(gold), remark(answer)
    on = [found[0].rstrip(" )") if found else "" for found in map(ON_NAME.search, (of_gold, of_answer))]
    apart = all(on) and len({bool(re.search(rf"\\in{T}", text)) for text in on}) == 1 and not same(*on)
    domains = {domain for domain in map(numbers_of, (of_gold, of_answer)) if domain}
    return bool(of_gold or of_answer) and not apart and len(domains) < 2 and same(g, a)


def components(text: str) -> str:
    r"""(1, -2, 3) for i-2j+3k and \hat{i}-2\hat{j}+3\hat{k}."""
    said = re.sub(r"(?:\\hat ?)?\{\\?([ijk])(?:math ?)?\}|\\hat ([ijk])| ", r"\1\2", text)
    of = {name: sign + (factor or "1") for sign, factor, name in re.findall(r"([-+]?)([^-+]{0,40}?)([ijk])", said)}
    terms = re.fullmatch(r"(?:(?:^|[-+])[^-+ijk]*[ijk])+", said) and len(re.findall("[ijk]", said)) == len(of)
    whole = terms and ("j" in of or r"\hat" in text)
    return f"({', '.join(of.get(name, '0') for name in 'ijk'[: 2 + ('k' in of)])})" if whole else text


def assigned(text: str) -> str:
    r"""(x, y)=(3, 5) for "y=5 and x=3", n=\{2, 3\} for "n=2, 3" and "n=2 or n=3"."""
    pairs: list[tuple[str, str]] = []
    for part in items(text)[1] if not enclosed(text)[0] else ():
        *names, last = split(part, "=")
        if RELATION.search(part) or not (names or pairs) or not all(map(NAME.fullmatch, names)):
            return text
        for name in names or [pairs[-1][0]]:
            several = enclosed(name)[0] == "()" and len(items(name)[1]) == len(items(last)[1])
            pairs += zip(items(name)[1], items(last)[1]) if several else [(squeeze(name), last)]
    names, parts = sorted({name for name, _ in pairs}), ", ".join(part for _, part in sorted(pairs))
    if 1 < len(pairs) == len(names):
        return f"({', '.join(names)})=({parts})"
    return rf"{names[0]}=\{{{parts}\}}" if 1 == len(names) < len(pairs) else text


def lists(gold: str, answer: str, same: Same) -> bool:
    r"""(1,2) for 1,2 in this order, \{2,1\} and "2 or 1" in any; 2,2,3 is not 2,3,3, but \{1,1,2\} is \{1,2\}."""
    (kind, golds), (other, answers) = items(gold), items(answer)
    kinds = {kind, other}
    if max(len(golds), len(answers)) < 2:
        return False
    if r"\ldots" in golds + answers:
        return len(golds) == len(answers) and all(map(same, golds, answers))
    if len(golds) == 1 and other == "or":  # 13/4 or 3.25
        return all(same(gold, item) for item in answers)
    if ordered := kinds & {"()", "[]"}:
        loose = ordered == {"()"} or len(kinds) == 1 or len(golds) > 2  # "1,2" is no interval
        fits = len(ordered) == 1 and kinds <= {*ordered, ""} and loose
        return fits and len(golds) == len(answers) and all(map(same, golds, answers))
    named, other_named = (all("=" in item and "," not in item for item in each) for each in (golds, answers))
    apart = kinds == {"", "or"} and any(RELATION.search(i) or re.fullmatch(r"\(?[A-J]\)?", i) for i in golds + answers)
    if named != other_named or apart:
        return False  # names decide the order; "x>1 or x<3" is not "x>1, x<3"
    if r"\{\}" in kinds or all(enclosed(item)[0] for item in golds + answers):  # a set knows each item once
        golds, answers = (
            list({squeeze(item): item for item in each}.values()) if brackets or kinds == {""} else each
            for brackets, each in ((kind, golds), (other, answers))
        )
    kept, given = ({re.sub(r"^[-\d./ ]+", "", plain(item)): item for item in each} for each in (golds, answers))
    if len(kept) == len(golds) and kept.keys() == given.keys() and all(re.match("[a-z]{2}", word) for word in kept):
        return all(same(kept[word], given[word]) for word in kept)  # 2 red, 3 blue
    rest = list(answers)
    for item in golds:
        if (found := next((other for other in rest if same(item, other)), None)) is None:
            return False
        rest.remove(found)
    return not rest


_GRAPH = re.compile(r"^[a-z]('*)\([a-z]\)$")
_STATED = re.compile(rf"{RELATION.pattern}|=|\\equiv")


def named(gold: str, answer: str, same: Same) -> bool:
    r"""x=5, m+n=108 and 2+3=5 for 5, 108 and 5; not y=5 for x=5, 4=5 for 5, x^2-1=0 for 0."""
    (*names, asked), (*left, last) = sides(gold), sides(answer)
    if names:
        x, y = squeeze(names[0]), squeeze(left[0]) if left else ""
        graph = y[:1] != x[0] and "y" in x[0] + y[:1] and _GRAPH.sub(r"y\1", x) == _GRAPH.sub(r"y\1", y)  # y=, f(x)=
        short = [re.sub(r"^(\w'*)\(\w\)$", r"\1", name) for name in (x, y)]  # y of y(x)
        alike = x == y or graph or (short[0] == short[1] in (x, y)) if left else not _STATED.search(answer)
        return alike and all(map(NAME.fullmatch, names)) and same(asked, last)
    if not left:
        return False
    if NAME.fullmatch(left[0]):
        names = items(left[0])[1]
        in_order = sorted(names) == names  # (y,x)=(1,2) is not (1,2)
        return in_order and all(same(gold, x) for x in [*(x for x in left[1:] if not letters(x)), last])
    equation = len(left) == 1 and number(last) == 0 and letters(left[0])
    sentence = re.search(r"[a-zA-Z]{2} ", re.sub(r"\\[a-zA-Z]+", "", plain("=".join(left))))
    apart = [side for side in left if letters(side) and not letters(side) & letters(last)]
    return not equation and not sentence and same(gold, last) and all(same(gold, x) for x in left if x not in apart)


def _solved(text: str) -> tuple[str, Any] | None:
    """("x", (1,3)) of 1<x<3 and x\\in(1,3); ("", (1,3)) of (1,3)."""
    if within := re.fullmatch(rf"(\\?\w+(?:\(\w\))?) ?(?:\\in{T}|=(?= ?\\\{{)) ?(.+)", text):
        inside = _solved(within[2])
        return (within[1], inside[1]) if inside and not inside[0] else None
    read: Any = values.value(text.replace(";", ","))
    if isinstance(read, sympy.Set):
        return "", read.doit()
    if read is None or isinstance(read, sympy.Expr) or not hasattr(read, "as_set"):
        return None
    relation: Any = read.xreplace({f: sympy.Symbol(str(f), real=True) for f in read.atoms(AppliedUndef)})  # 0<f(x)<1
    if len(relation.free_symbols) != 1 or not values.solved(relation):
        return None  # x^2=4 is the question to which \{2,-2\} is the answer
    return str(*relation.free_symbols), relation.as_set()


@lru_cache(maxsize=10_000)
def solution_set(text: str) -> tuple[str, Any] | None:
    r"""("x", (1,3)) of "x>1 and x<3" and "x>1, x<3"; ("", (1,3)) of \{x \mid 1<x<3\}."""
    if builder := re.fullmatch(r"\\\{ ?(\w) ?(?:\\in[^|:]{1,40})?(?:\\mid|\||:)(.*)\\\}", text):
        inner = solution_set(builder[2].strip())
        return ("", inner[1]) if inner and inner[0] == builder[1] else None
    text = re.sub(r"^(\w ?\\ne) ?(-?\w+), ?(-?\w+)$", r"\1 \2, \1 \3", text)
    ways = [[_solved(part) for part in split(way, rf"{AND}|[,;]")] for way in split(text, OR)]
    solved = [part for way in ways for part in way if part]
    names = {name for name, _ in solved if name}
    if len(solved) < sum(map(len, ways)) or len(names) > 1 or not (names or len(solved) == len(ways)):
        return None
    union = sympy.Union(*(sympy.Intersection(*(part for _, part in filter(None, way))) for way in ways))
    if union is sympy.S.EmptySet and not re.search(AND, text):  # "x<1, x>2" can only be either
        union = sympy.Union(*(part for _, part in solved))
    return "".join(names), union


def sets(gold: str, answer: str, same: Same) -> bool:
    r"""1<x<3 and "x>1 and x<3" for (1,3), x\ne2 for \mathbb{R}\setminus\{2\}; another unknown is wrong."""
    a, b = solution_set(gold), solution_set(answer)
    if not a or not b or r"\ldots" in gold + answer:
        return False
    return (a[0] == b[0] or not (a[0] and b[0])) and values.same(a[1], b[1])


_SAID = {  # what is said in words, in the commonest languages of answers
    "yes": "yes|oui|s[ií]|ja|да|是的?",
    "no": "no|non|nein|nee|нет|否|不是",
    "true": "true|vrai|wahr|verdadero|vero|верно|истина|正确|对|真",
    "false": "false|faux|falsch|falso|неверно|ложь|错误?|假",
    "none": r"none|nothing|(?:there (?:is|are) )?no (?:real |such )?(?:solution|value|number|integer)s?(?: exists?)?"
    r"|aucune?(?: solution)?|keine?(?: lösung(?:en)?)?|ning[uú]n[oa]?|nessun[oa]?|нет решений|无解|没有|\\emptyset"
    r"|(?:the )?empty set|dne|does not exist|undefined|impossible",
    "infinite": r"\\infty|infinite(?:ly many)?(?: solutions?)?",
}


def in_words(text: str) -> str:
    """A sentence without case, article and stops; yes, no, true, false or none for what says so."""
    text = re.sub(r"[^\W\d_]{2,}|^A\b", lambda word: word[0].lower(), plain(text))
    hyphens = "" if "\\" in text else r"(?<=[a-z]{2})[-,](?=[ a-z]{2})|"
    text = re.sub(hyphens + r"(?<=[^\W\d_]{3})[.!?'](?!\w)|\"|[.!?]$", " ", text)
    text = re.sub(r"^(?:an?|the) (?:(?:series|sequence|integral|limit) )?", "", text)
    text = re.sub(r" ?([^\w ]) ?", r"\1", " ".join(text.split()))
    return next((word for word, names in _SAID.items() if re.fullmatch(names, text, re.IGNORECASE)), text)


def words(gold: str, answer: str, same: Same) -> bool:
    """YES. for Yes, "an ellipse" for ellipse, oui for yes, \\emptyset for "no solution"; nothing else is ignored."""
    said, letters_of = in_words(gold), re.sub(r"\\[a-zA-Z]+", "", gold)
    wordy = said in _SAID or r"\text" in gold or re.search(r"[^\W\d_]{4}|[^\x00-\x7f]", letters_of)
    return bool(wordy) and said == in_words(answer)


def _pieces(text: str) -> tuple[set[str], list[tuple[Any, Any]]]:
    r"""({"x"}, [(x, [0, oo)), (-x, (-oo, 0))]) of "x if x\ge0, -x if x<0": the unknown, values, and where they hold;
    (set(), [(|x|, None)]) of |x|. Any exception for conditions in words or on several unknowns."""
    found: list[tuple[Any, Any]] = []
    names: set[str] = set()
    for part in split(plain(text), "[,;]"):
        of, *when = (enclosed(side)[1] for side in re.split(r" (?:if|for|when) |(?= (?:otherwise|else)$)", part))
        where: Any = None
        if when and when[0].strip() in ("otherwise", "else"):
            where = sympy.Complement(sympy.S.Reals, sympy.Union(*(where for _, where in found)))
        elif when:
            name, where = solution_set(when[0]) or ("", sympy.S.EmptySet)
            names.add(name or "?")
        found.append((values.value(of), where))
    unknowns = names | {str(x) for of, _ in found for x in of.free_symbols if names}
    if "?" in names or len(unknowns) > 1:
        raise ValueError("no unknown, or several")
    return names, found


def pieces(gold: str, answer: str, same: Same) -> bool:
    r"""x^2 for x\ge0 is x^2 if 0\le x, and "x if x\ge0, -x otherwise" is |x|: equal on the same numbers."""
    said = (re.sub(r"\bis ", "", re.sub(r"\b([a-z]{3,}) (\w)$", r"\2 \1", plain(text))) for text in (gold, answer))
    g, a = (re.split(r"(?: (?:if|for|when)\b)+ ?", text) for text in said)
    if len(g) == len(a) == 2:
        return same(g[0], a[0]) and same(g[1], a[1])
    (name, ours), (other, theirs) = _pieces(gold), _pieces(answer)
    everywhere = len(theirs) == 1 and theirs[0][1] is None
    domains = [sympy.Union(*(where for _, where in found)) for found in (ours, ours if everywhere else theirs)]
    other = {str(x) for x in theirs[0][0].free_symbols} or name if everywhere else other
    return (
        name == other
        and domains[0] == domains[1]
        and all(
            _same_on(v, w, where if everywhere else sympy.Intersection(where, there))
            for (v, where), (w, there) in product(ours, theirs)
        )
    )


def _same_on(v: Any, w: Any, where: Any) -> bool:
    """Are two values of at most one variable equal on a union of intervals and single numbers?"""
    t = sympy.Symbol("t", real=True)
    parts: Any = where.args if isinstance(where, sympy.Union) else [where]
    (y,) = v.free_symbols | w.free_symbols or {t}
    for part in parts if where is not sympy.S.EmptySet else ():
        low, high, places = part.inf, part.sup, part
        if isinstance(part, sympy.Interval):  # as functions of t that stay in it
            ends = low + t**2 if high is oo else high - t**2 if low is -oo else low + (high - low) / (1 + t**2)
            places = [t if part == sympy.S.Reals else ends]
        if not all(values.same(v.subs(y, place), w.subs(y, place)) for place in places):
            return False
    return True


OPTION = re.compile(
    r"(?:(?i:the )?(?i:correct |final )?(?i:option|choice|answer|ans)(?i: is)?:? ?|故?选项?:?|答案[是:]? ?)?"
    r"(?:\( ?([A-Ja-j]) ?\)|([A-J])(?=[).:] |[).:]?$))[).:]* ?((?![,;]|and\b|or\b)(?:(?<= )-|[\w\\($]).*)?"
)
_OTHER_OPTION = re.compile(rf"{HEDGE.pattern}|(?<!不是)(?<!not)(?:^|[ ,$])[A-J](?:[ ,$]|$)")


def options(gold: str, answer: str, same: Same) -> bool:
    """(C), "C) 7" and "option C" for C, "B) 12" for 12; several letters in any order: "A, B, D" and BDA for ABD."""
    several = [re.sub(rf"[(), ;]|\\[{{}}]|{AND}", "", plain(text)) for text in (gold, answer)]
    if re.fullmatch("[A-J]{2,6}", several[0]) and sorted({*several[0]}) == [*several[0]]:  # BAC is an order
        return sorted(several[0]) == sorted(several[1])
    g, a = OPTION.fullmatch(plain(gold)), OPTION.fullmatch(plain(answer)) or re.fullmatch("([a-j])()()", answer)
    g, a = (found if found and not _OTHER_OPTION.search(found[3] or "") else None for found in (g, a))
    if g and a:
        return (g[1] or g[2]).upper() == (a[1] or a[2]).upper()
    return bool((g and g[3] and same(g[3], answer)) or (a and a[3] and same(gold, a[3])))


_ENDS = re.compile(r"=|\b(?:is|are|est?|ist|equals?)\b|[是为]|(?<=[^\W\d]):(?= )")
_FIRST_NUMBER = re.compile(r"(?<=[^\W\d_]{2} )(?=[-\d])")
_ANOTHER = re.compile(  # a bound, a neighbour, a part, something made of the answer
    r"\b(?:than|least|most|over|under|above|below|between|about|after|before|exceed\w*|bound\w*|fewer|greater|less"
    r"|close|differ\w*|square|cube|double|twice|half|minus|plus|negative|opposite|reciprocal|mod|one of|first)\b"
    r"| (?:o|oder|ou|или) "
)


def conclusion(gold: str, answer: str, same: Same) -> bool:
    """6 for "so the answer is 6", "it costs 72/12 = 6" and "there are 6 ways", not for "Max is 2 when x=6"."""
    text = re.split(r"\. (?=.)", plain(answer))[-1]
    said, *more = re.split(_ENDS.pattern[2 * ("=" in gold) :], text)
    said, *more = [said, *more] if more else _FIRST_NUMBER.split(text, 1)
    last, before = more.pop() if more else "", " ".join(more)
    prose = re.search(r"[^\W\d_A-Z]{3} |[^\x00-\xff]{2}", re.sub(r"\\[a-zA-Z]+", "", said + " "))
    of_a_case = re.match(r"(?i:[-0-9]|(?:when|if|suppose|assume|let|where|for)\b)", said)
    several = re.search(r"[,;]|\b(?:and|or|when|where|which|with|at|if|for)\b", before)
    unsure = HEDGE.search(said + before) or _ANOTHER.search(text)
    sum_of = re.search(r"[-+*/^] ?[\d\\][^a-zA-Z]*$", said)  # the answer + 1 = 6
    stated = prose and not (of_a_case or several or unsure or (sum_of and not re.search(r"\d ?[-+*/^]", said)))
    return bool(stated) and same(gold, last.strip(" ."))


def ratios(gold: str, answer: str, same: Same) -> bool:
    """6:8 for 3:4; neither 4:3 nor 3/4, and no times of the day, but "3:30 pm" for 3:30."""
    if re.fullmatch("[0-9]{1,2} ?: ?[0-5][0-9]", gold) and not re.search(r"\bto\b", plain(answer)):
        return bool(re.fullmatch(rf"0?{squeeze(gold)} ?(?i:[ap]\.?m\.?|noon)?", squeeze(plain(answer))))
    g, a = (split(plain(text), r":|\bto\b") for text in (gold, answer))
    if len(g) < 2 or len(g) != len(a) or 0 in [number(part) for part in a]:
        return False
    return all(same(rf"({x})\cdot({w})", rf"({z})\cdot({y})") for (x, y), (z, w) in zip(pairwise(g), pairwise(a)))


def conventions(gold: str, answer: str, same: Same) -> bool:
    r"""1010 for 1010_2, whose decimal value is another answer; 3,75 for 3.75; 20 for 20\% and back; "20\% less"."""
    read, share = plainer(gold), number(gold.rstrip("% "))
    percent = "%" in gold + answer and share is not None and share == number(answer.rstrip("% ")) and share > 1
    roots = "_" in answer and "_" not in gold and same(gold, re.sub(r"_ ?\{?\d\}?(?= ?=)", "", answer))
    natural = "\\ln" in gold and same(gold, re.sub(r"\\log(?! ?_)", r"\\ln", answer))
    commas = re.fullmatch(r"[0-9]+,[0-9]+", answer) and answer.replace(",", ".") == gold
    commas = commas or (re.fullmatch(r"0,[0-9]+", gold) and gold.replace(",", ".") == answer)
    worded = re.fullmatch(r"([0-9.]+ ?%) (?:of [a-z ]{3,30}|[a-z]{3,12})", plain(answer))
    of_all = worded and "%" in gold and not HEDGE.search(answer) and same(gold, worded[1])
    in_base = re.fullmatch(r"-?([0-9A-F]+)_\d+", read) and read.split("_")[0] == answer.lstrip("0")
    return bool(percent or natural or commas or of_all or roots or in_base)


_NO_PRODUCT = re.compile(rf":|\\(?:angle|triangle|bar|subset|Rightarrow|ldots){T}")
_QUESTION = re.compile(rf"\\(?:int|lim|partial){T}|\\frac ?\{{ ?d")  # what the problem asks for is not its answer
_BINDS = re.compile(rf"\\(?:sum|prod|int|lim|text){T}|\{{ ?d ?\}}")


def by_value(gold: str, answer: str, same: Same) -> bool:
    """Are the values equal, where no veto forbids to ask?"""
    both = f"{gold} {answer}"
    vetoed = (
        any(len(items(text)[1]) > 1 for text in (gold, answer))  # 2,3,3 for 2,2,3: its sets know no order, no number
        or len(split(gold, "=")) != len(split(answer, "="))  # x+y=5 for 5: an equation is not its last side
        or (_QUESTION.search(answer) and not _QUESTION.search(gold))
        or _NO_PRODUCT.search(both)  # 1:2 for 1/2, \angle ACB for \angle ABC
        or (letters(gold) != letters(answer) and not _BINDS.search(both))  # 2x for 2
    )
    return not vetoed and values.same(values.value(gold), values.value(answer))


def in_other_words(gold: str, answer: str, same: Same) -> bool:
    """Are they the same after one of the readings?"""
    return any(pair != (gold, answer) and same(*pair) for pair in ((read(gold), read(answer)) for read in READINGS))


READINGS = (plainer, components, in_digits, assigned)
RULES = (
    parameters, by_value, in_other_words, remarks, named, lists, pieces, sets, words, options, units, ratios, families,
    antiderivatives, conventions, conclusion,
)  # fmt: skip


def holds(rule: Callable[[str, str, Same], bool], gold: str, answer: str, same: Same) -> bool:
    try:
        return rule(gold, answer, same)
    except Exception:  # whatever sympy raises: another rule may do better
        return False


def equal(gold: str, answer: str, known: dict[tuple[str, str], bool], depth: int = 0) -> bool:
    """Is a cleaned answer a cleaned gold? `known` are the pairs that this question has met."""

    def same(x: str, y: str) -> bool:
        return equal(x, y, known, depth + 1)

    pair = gold, answer = bare(gold), bare(answer)
    if pair not in known:
        known[pair] = False  # while it is open
        a, b = number(gold), number(answer)
        if squeeze(gold) == squeeze(answer):
            known[pair] = bool(gold)
        elif None not in (a, b):
            known[pair] = a == b
        elif gold and answer and depth < 9:
            known[pair] = any(holds(rule, gold, answer, same) for rule in RULES)
    return known[pair]


@lru_cache(maxsize=100_000)
def cleaned(text: str) -> str | None:
    """The text after the table of cleaning; None if it is hopeless."""
    return None if forms.hopeless(text := bare(clean(text))) else text


def read_gold(gold: str) -> str | None:
    """A gold, cleaned; None if nothing can be compared with it: that is an error in the data."""
    text = extract_boxed_content(gold, "last") if re.search(r"\\(?:boxed|fbox)", gold) else gold
    missing = text.strip() in ("None", "null", "NaN", "nan")  # what programs write for nothing
    return text if len(text) > MAX_GOLD else None if missing else cleaned(text)


def right(gold: str, answer: str) -> bool:
    """Is an extracted answer the gold?"""
    read = read_gold(gold)
    text = cleaned(answer) if len(answer) <= max(MAX_CHARS, 2 * len(gold)) else None
    return text is not None and read is not None and equal(read, text, {})


def as_asked(gold: str, answer: str) -> str | None:
    """An answer read as the gold's form asks, for voting: a list with its brackets, x=5 as 5 if no name is asked."""
    read, text = read_gold(gold), cleaned(answer) if len(answer) <= MAX_CHARS else None
    if text is None or read is None:
        return None
    if option := OPTION.fullmatch(plain(text := bare(plainer(text)))):
        text = option[3] if option[3] and not re.fullmatch("[A-J]", read) else option[1] or option[2]
    (*names, last), asked = sides(text), sides(read)[:-1]
    if names and NAME.fullmatch(names[0]) and not asked:
        text = last
    elif asked and not names and NAME.fullmatch(asked[0]):
        text = f"{asked[0]}={text}"
    brackets, entries = items(text)
    if brackets in ("", "or") and len(entries) > 1 and "=" not in text and solution_set(text) is None:
        opening, closing = "()" if enclosed(read)[0] == "()" and not brackets else (r"\{", r"\}")
        text = opening + ", ".join(entries) + closing
    return text


def same_vote(gold: str, a: str, b: str) -> bool:
    """Are two wrong answers one and the same answer to the question with this gold?"""
    x, y = as_asked(gold, a), as_asked(gold, b)
    return x is not None and y is not None and (equal(x, y, {}) or equal(y, x, {}))


QUESTIONS = {"right": right, "vote": same_vote, "readable": lambda gold: read_gold(gold) is not None}
