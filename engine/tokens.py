"""Tokens and their text: prompts, what continues them, where a thought ends."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, groupby, takewhile

from tokenizers.decoders import DecodeStream

from engine import Refused, first_line

THINK_END = "</think>"
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
    """The text of the tokens and where each starts in it (len + 1 offsets); special tokens write nothing.

    Decoded as a stream, so a character of several tokens starts at the token that completes it; nothing is ever encoded
    again. Any ids that a model may draw are fine: the text is that of `decode` up to replacement characters.
    """
    whole = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    with contextlib.suppress(Exception):  # byte-fallback tokenizers: characters that later tokens take back
        stream, lost, pieces = DecodeStream(skip_special_tokens=True), lost_bytes(tokenizer, token_ids), []
        for place, token in enumerate(token_ids):
            pieces.append("\ufffd" if place in lost else stream.step(tokenizer.backend_tokenizer, token) or "")
        text = "".join(pieces)
        if text.replace("\ufffd", "") == whole.replace("\ufffd", ""):
            return text, [0, *accumulate(map(len, pieces))]
    starts = (
        tokenizer.decode(token_ids[:i], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for i in range(len(token_ids))
    )
    shared = (sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(start, whole))) for start in starts)
    return whole, [*accumulate(shared, max), len(whole)]


def lost_bytes(tokenizer, token_ids: list[int]) -> set[int]:
    """The positions of the single bytes of byte-fallback tokenizers that do not form characters. The decoder gives up
    all bytes of such a run, even those of complete characters."""
    silent = set(tokenizer.all_special_ids)
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
    """Every id that ends a turn; some models have several."""
    ids = generation_config.eos_token_id if generation_config else None
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


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


def prompt_ids(tokenizer, problem: str, template: dict | None = None) -> list[int]:
    """The problem through the chat template, up to where the model starts to think; `template`: its arguments, such
    as {"enable_thinking": False}. The user message is the bare problem, as in the authors' code; a model that does
    not think is asked for a boxed answer, or it seldom gives one.
    """
    if not thinks(tokenizer):
        problem += "\n\n" + BOX_INSTRUCTION
    if tokenizer.chat_template is None:  # a base model: the bare text, with the tokenizer's own beginning but no end
        ids = tokenizer.encode(problem + "\n\n")
        text = tokenizer.encode(problem + "\n\n", add_special_tokens=False)
        ends = (end for end in range(len(ids), len(text) - 1, -1) if ids[end - len(text) : end] == text)
        return ids[: next(ends, len(ids))]
    messages = [{"role": "user", "content": problem}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **(template or {}))
    except Exception as error:
        raise Refused(f"--model {tokenizer.name_or_path}: its chat template fails: {first_line(error)}") from error
    return tokenizer.encode(text, add_special_tokens=False)


def thought_is_open(tokenizer, prompt: list[int]) -> bool | None:
    """Does a prompt end within a thought? None where it has no marker, so that the model may think or answer."""
    text = tokenizer.decode(prompt)
    opened, closed = text.rfind(THINK_END.replace("/", "")), text.rfind(THINK_END)
    return None if opened == closed else opened > closed


def thinks(tokenizer) -> bool:
    """Does the vocabulary have the end-of-thinking marker as one token? If not, the whole completion is the thought."""
    return len(encode(tokenizer, THINK_END)) == 1
