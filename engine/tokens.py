"""Tokens and their text: prompts and what continues them."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, groupby, takewhile

from tokenizers.decoders import DecodeStream

from engine import Refused, first_line
from engine.thoughts import (
    end_of_turn,
    final_part,
    marks_of,
    opening_after,
    render,
    silent_ids,
    thinks,
    thought_is_open,
)

BOX_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."  # Qwen's for mathematics


@dataclass
class Completion:
    """What the model wrote after a prompt. `logprobs[i]` is the log-probability of `token_ids[i]` under the
    distribution it was drawn from. Token `i` writes `text[offsets[i]:offsets[i + 1]]`."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop": the model itself ended it, by its last token; "length": cut at the limit
    text: str = ""
    offsets: list[int] = field(default_factory=list)


def text_and_offsets(tokenizer, token_ids: list[int]) -> tuple[str, list[int]]:
    """The text of the tokens and where each starts in it (len + 1 offsets); special tokens write nothing, but for those
    in the marks of a thought.

    Decoded as a stream, so a character of several tokens starts at the token that completes it; nothing is ever encoded
    again. Any ids that a model may draw are fine: the text is that of `decode` up to replacement characters.
    """
    silent = silent_ids(tokenizer)

    def decode(ids: list[int]) -> str:
        return tokenizer.decode([i for i in ids if i not in silent], clean_up_tokenization_spaces=False)

    whole = decode(token_ids)
    with contextlib.suppress(Exception):  # byte-fallback tokenizers: characters that later tokens take back
        stream, lost, pieces = DecodeStream(skip_special_tokens=False), lost_bytes(tokenizer, token_ids), []
        for place, token in enumerate(token_ids):
            text = "" if token in silent else stream.step(tokenizer.backend_tokenizer, token) or ""
            pieces.append("\ufffd" if place in lost else text)
        text = "".join(pieces)
        if text.replace("\ufffd", "") == whole.replace("\ufffd", ""):
            return text, [0, *accumulate(map(len, pieces))]
    starts = (decode(token_ids[:i]) for i in range(len(token_ids)))
    shared = (sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(start, whole))) for start in starts)
    return whole, [*accumulate(shared, max), len(whole)]


def lost_bytes(tokenizer, token_ids: list[int]) -> set[int]:
    """The positions of the single bytes of byte-fallback tokenizers that do not form characters. The decoder gives up
    all bytes of such a run, even those of complete characters."""
    silent = silent_ids(tokenizer)
    tokens = [(i, t) for i, t in enumerate(tokenizer.convert_ids_to_tokens(token_ids)) if token_ids[i] not in silent]
    lost: set[int] = set()
    for is_byte, run in groupby(tokens, key=lambda pair: bool(re.fullmatch("<0x[0-9A-F]{2}>", pair[1] or ""))):
        if is_byte:
            places, names = zip(*run)
            try:
                bytes(int(name[3:5], 16) for name in names).decode()
            except UnicodeDecodeError:
                lost |= set(places)
    return lost


def stop_token_ids(tokenizer, generation_config) -> list[int]:
    """Every id that ends a turn, by the configuration, the tokenizer or the chat template; some models have several."""
    ids = generation_config.eos_token_id if generation_config else None
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id, end_of_turn(tokenizer)] if i is not None})


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a text that continues another: no special token, and none of the spaces that SentencePiece
    tokenizers put before what they take for a beginning."""
    return list(_encode(tokenizer, text))


@lru_cache(maxsize=4096)
def _encode(tokenizer, text: str) -> tuple[int, ...]:
    for before in ("", "\n", "x", ".", "0", "{"):
        anchor = tokenizer.encode(before or "x", add_special_tokens=False)
        ids = tokenizer.encode(before + text, add_special_tokens=False)
        if before and ids[: len(anchor)] != anchor:  # merged with the anchor
            continue
        ids = ids[len(anchor) :] if before else ids
        if tokenizer.decode([*anchor, *ids]) == tokenizer.decode(anchor) + text:
            return tuple(ids)
    return tuple(tokenizer.encode(text, add_special_tokens=False))  # it normalises: no tokens spell exactly this


def prompt_ids(tokenizer, problem: str | list[dict], template: dict | None = None) -> list[int]:
    """The problem, or the chat that ends with it, through the chat template, up to where the model starts to think;
    `template`: its arguments, such as {"enable_thinking": False}. The user message is the bare problem, as in the
    authors' code; a model that does not think is asked for a boxed answer, or it seldom gives one. Refused: a template
    that fails, or that leaves a message out.
    """
    chat, name = [{"role": "user", "content": problem}] if isinstance(problem, str) else problem, tokenizer.name_or_path
    asked = chat[-1]["content"] + ("" if thinks(tokenizer) else "\n\n" + BOX_INSTRUCTION)
    if tokenizer.chat_template is None:  # a base model: the bare text, with the tokenizer's own beginning but no end
        if len(chat) > 1:
            raise Refused(f"--model {name}: without a chat template there is no place for messages before the problem")
        ids = tokenizer.encode(asked + "\n\n")
        text = tokenizer.encode(asked + "\n\n", add_special_tokens=False)
        ends = (end for end in range(len(ids), len(text) - 1, -1) if ids[end - len(text) : end] == text)
        return ids[: next(ends, len(ids))]
    chat = [*chat[:-1], {**chat[-1], "content": asked}]
    try:
        text = render(tokenizer, chat, **(template or {}))
    except Exception as error:
        raise Refused(f"--model {name}: its chat template fails: {first_line(error)}") from error
    for message in chat:  # of an earlier answer a template may leave the thought out
        if final_part(tokenizer, message["content"]).strip() not in text:
            what = f"the {message['role']} message {message['content'][:60]!r}"
            raise Refused(f"--model {name}: its chat template gives a prompt without {what}")
    return tokenizer.encode(text, add_special_tokens=False)


def end_of_thought(tokenizer, prompt: list[int], thought: str) -> list[int]:
    """The tokens that end a thought of this text after a prompt as the model ends its own; an empty thought is opened
    first, and where the prompt has closed it already, nothing is left to write."""
    marks = marks_of(tokenizer)
    if marks is None or (not thought and thought_is_open(tokenizer, prompt) is False):
        return []
    opening = "" if thought else opening_after(tokenizer, prompt)
    return encode(tokenizer, opening + (marks.close.lstrip() if thought.endswith("\n") else marks.close))


def stop_ids_of_thought(tokenizer) -> list[int]:
    """The token that ends a thought, if it never stands within one; else its text has to be looked for."""
    marks = marks_of(tokenizer)
    ids = encode(tokenizer, marks.closing) if marks else []
    return ids[:1] if len(ids) == 1 or (ids and ids[0] in tokenizer.added_tokens_decoder) else []
