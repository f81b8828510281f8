"""Thoughts: the marks around one are the model's own, found in its chat template and vocabulary; where one ends."""

from __future__ import annotations

import contextlib
import re
from bisect import bisect_right
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING

from engine import say_once

if TYPE_CHECKING:
    from engine.tokens import Completion

# Marks that are looked for where the chat template does not write a thought itself.
KNOWN_MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
)
PROBLEM, THOUGHT, ANSWER = "How many are seven eights?", "Seven eights, let me see.", "It is fifty-six."
TODAY = date(2025, 3, 10)  # of every run


@dataclass(frozen=True)
class ThinkMarks:
    """A model writes `open` thought `close` answer, with these line ends. `header`: the end of what its chat template
    writes before that; marks in front of it are the problem's or the system message's."""

    open: str
    close: str
    header: str = ""

    @property
    def opening(self) -> str:
        return self.open.strip()

    @property
    def closing(self) -> str:
        return self.close.strip()


@lru_cache
def marks_of(tokenizer) -> ThinkMarks | None:
    """The marks of a model's thoughts: those named with --think-marks, else those that its chat template writes or
    mentions, else known ones whose end is a token of its vocabulary; None if it does not think."""
    named, template = tokenizer.init_kwargs.get("think_marks"), str(tokenizer.chat_template)
    prompt, turn = rendered_turn(tokenizer)
    after = prompt.rpartition(PROBLEM)[2]
    begun, _, rest = turn.partition(THOUGHT)
    between = rest.partition(ANSWER)[0] if ANSWER in rest else ""
    found = [named] if named else [marks for marks in KNOWN_MARKS if marks[1] in between]
    if between.strip():  # marks that only this template knows
        before = begun.rpartition(prompt)[2].strip() if prompt in begun else ""
        found.append((before or between.strip().replace("/", "", 1), between.strip()))
    found += [marks for marks in KNOWN_MARKS if marks[0] in after]
    found += [marks for marks in KNOWN_MARKS if marks[1] in template]
    found += [marks for marks in KNOWN_MARKS if len(tokenizer.encode(marks[1], add_special_tokens=False)) == 1]
    if not found:
        return None
    opening, closing = map(str.strip, found[0])
    spaces = ("\n", "\n")  # after the opening, before the closing
    if closing in between:
        spaces = begun[len(begun.rstrip()) :], between[: len(between) - len(between.lstrip())]
    header = after.partition(opening)[0].partition(closing)[0].rstrip()
    return ThinkMarks(opening + spaces[0], spaces[1] + closing, header)


def thinks(tokenizer) -> bool:
    """Has the model marks for a thought? If not, its whole completion is the thought."""
    return marks_of(tokenizer) is not None


def what_was_seen(tokenizer) -> str:
    """Why a model has no marks, for messages."""
    _, turn = rendered_turn(tokenizer)
    seen = f", which writes {turn.rpartition(PROBLEM)[2][-80:]!r}" if turn else ""
    return f"no marks of a thought in its vocabulary or chat template{seen}; --think-marks OPEN CLOSE names them"


# ================================================================================================== templates


def render(tokenizer, messages: list[dict], prompt: bool = True, **template) -> str:
    """Messages through the chat template; `prompt`: up to where the model writes. One that asks for the date is told
    `TODAY`, by a macro in the place of transformers' function."""
    text = tokenizer.get_chat_template()
    if "strftime_now" in text:
        say_once(f"the chat template asks for the date: it is told {TODAY} on every day, so that a run can be repeated")
        codes = "".join(f"|replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in "aAbBdHIjmMpSuUVwWyY")
        text = f"{{% macro strftime_now(form) %}}{{{{ form{codes} }}}}{{% endmacro %}}{{{{ '' }}}}{text}"
    return tokenizer.apply_chat_template(
        messages, chat_template=text, tokenize=False, add_generation_prompt=prompt, **template
    )


def rendered_turn(tokenizer) -> tuple[str, str]:
    """(a prompt, the same with a thought and an answer), as the chat template writes them; empty where it cannot."""
    user = {"role": "user", "content": PROBLEM}
    thought = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), THOUGHT)
    with contextlib.suppress(Exception):
        prompt = render(tokenizer, [user])
        return prompt, render(tokenizer, [user, {"role": "assistant", "content": ANSWER, **thought}], prompt=False)
    return "", ""


def end_of_turn(tokenizer) -> int | None:
    """The token that the chat template writes after an answer, if it is one that text never holds."""
    user, assistant = {"role": "user", "content": PROBLEM}, {"role": "assistant", "content": ANSWER}
    marks, added = marks_of(tokenizer), tokenizer.added_tokens_decoder
    for chat in ([user, assistant], [user, assistant, user]):
        with contextlib.suppress(Exception):
            rest = render(tokenizer, chat, prompt=False).partition(ANSWER)[2].lstrip()
            first = tokenizer.encode(rest, add_special_tokens=False)[0]
            if first in added and not (marks and added[first].content in marks.open + marks.close):
                return first
    return None


@lru_cache
def silent_ids(tokenizer) -> frozenset[int]:
    """The special tokens, which write no text, but for those that marks are made of."""
    marks = marks_of(tokenizer)
    kept = marks.open + marks.close if marks else ""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(number for number, token in added if token.special and token.content not in kept)


# ================================================================================================== completions


def thought_is_open(tokenizer, prompt: list[int], written: str = "") -> bool | None:
    """Does a prompt, with what is written after it, end within a thought? None where it has no mark, so that the model
    may think or answer."""
    marks, text = marks_of(tokenizer), tokenizer.decode(prompt)
    if marks is None:
        return None
    text = text[max(0, text.rfind(marks.header)) :] + written
    opened, closed = text.rfind(marks.opening), text.rfind(marks.closing)
    return None if opened == closed else opened > closed


def thought_tokens(tokenizer, completion: Completion) -> int:
    """Of a completion that begins within a thought, the tokens before its end: a mark, or the end of the turn."""
    marks = marks_of(tokenizer)
    place = completion.text.find(marks.closing) if marks else -1
    if place >= 0:
        return bisect_right(completion.offsets, place) - 1  # the token that the mark begins in
    return len(completion.token_ids) - (completion.finish_reason == "stop")


def split_thought(tokenizer, prompt: list[int], completion: Completion) -> tuple[int, str | None, bool]:
    """(tokens of the thought, the answer's text or None, has the model ended the thought?).

    Without marks the whole completion is thought and answer at once. With them, a thought that was cut before its end
    has no answer, whatever boxes it holds; a completion that answers at once, after a prompt that has closed the
    thought or opened none, has an empty thought.
    """
    marks, text, end = marks_of(tokenizer), completion.text, thought_tokens(tokenizer, completion)
    stopped = completion.finish_reason == "stop"
    if marks and marks.closing in text:
        return end, final_part(tokenizer, text.partition(marks.closing)[2]), True
    if mark := re.match(r"<[^<>\s]+>|\[[A-Z_]+\]|◁\w+▷", tokenizer.decode(completion.token_ids[:16]).lstrip()):
        if not (marks and marks.opening.startswith(mark[0])) and len(completion.token_ids) > 1:
            say_once(f"warning: a completion begins with {mark[0]}; if that opens a thought, name it by --think-marks")
    if marks is None:
        return end, text, stopped
    is_open = thought_is_open(tokenizer, prompt, text)
    if is_open is False or (is_open is None and stopped):
        return 0, text, True
    return end, None, False


def final_part(tokenizer, text: str) -> str:
    """What follows the last thought in a text; nothing where that is left open."""
    marks = marks_of(tokenizer)
    pieces = text.split(marks.closing) if marks else [text]
    while len(pieces) > 1 and not pieces[-1].strip():
        pieces.pop()
    return "" if marks and marks.opening in pieces[-1] else pieces[-1]


def opening_after(tokenizer, prompt: list[int], written: str = "") -> str:
    """What a model writes before a thought: nothing where its chat template has opened or closed one, or where what it
    has written begins without."""
    marks = marks_of(tokenizer)
    if marks is None or thought_is_open(tokenizer, prompt) is not None:
        return ""
    return marks.open if not written or written.lstrip().startswith(marks.opening) else ""
