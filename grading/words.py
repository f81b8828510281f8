"""Rules for words: yes and no, options, remarks that say nothing new, parameters that may have any name."""

import re

from grading.lists import letters, renamed
from grading.texts import AND, RELATION, Same, hopeless, plain

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


def without_remark(text: str) -> str:
    r"""12 for "12 since 3\cdot4=12", 2x for "2x for all real x" and "2x, x\ne2"; "0 for odd n" and "2n where n=3" stay."""  # noqa: E501
    said = plain(text)
    cuts = [cut.start() for cut in _REASON.finditer(said)][:1] + [cut.start() for cut in _DOMAIN.finditer(said)]
    for cut in cuts[:9]:
        head, remark = (
            re.sub(r" (?:for|where|with)$", "", said[:cut].rstrip(" ,;.(")),
            said[cut:].lstrip(" ,;(").rstrip(")"),
        )
        domain = re.sub(r"^(?:for|where|with) ", "", remark)
        if not re.fullmatch(r"[a-zA-Z](?:_\w)?(?: ?, ?[a-zA-Z])* ?(?:\\(?:in|[lgn]e)(?![a-z])|[<>])[^,;=]*", domain):
            if not _REASON.match(remark) or re.match(r"(?:where|with)\b.*= ?-?[0-9]", remark):
                continue
        prose = re.search(r"[a-zA-Z]{3,} [a-zA-Z]{2,}", re.sub(r"\\[a-zA-Z]+", "", head)) or RELATION.search(head)
        if re.search(r"\b(?:if|when|unless|otherwise|else)$", head):
            continue
        if head and not prose and not hopeless(head) and not _RESTRICTS.search(remark):
            return head
    return text


def renamed_parameter(gold: str, answer: str, same: Same) -> bool:
    r"""n\pi, n\in\mathbb{Z} for k\pi, k\in\mathbb{Z}; Ae^x for any constant A for Ce^x, C\in\mathbb{R}."""

    def parameters(text: str) -> list[str]:
        rest = (
            plain(text)[len(without_remark(text)) :]
            if without_remark(text) != text
            else text
            if "mathbb" in text
            else ""
        )
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
    sentence, value = (
        re.sub(r"\\[a-zA-Z]+(?:_\{\w+\})?", "", said[: cuts[-1].start()]),
        said[cuts[-1].end() :].strip(" ."),
    )
    if not re.search(r"\b[a-z]{3}|\b[Aa]ns|[^\x00-\xff]", sentence) or r"\{" in said:
        return False
    return not (len(is_words) > 1 and re.search(AND, said)) and same(gold, value.strip("()") if "=" in value else value)
