"""A conversation to the ids that its answer comes after, with the chat template of any tokenizer of transformers.

`apply_chat_template` renders a text and tokenises that, so a mark that a user wrote (`<|im_end|>`) becomes the special token and
ends the turn. Here it stays text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

PRIVATE = range(0xE000, 0xF900)
"""Characters without a meaning: they stand for marks in texts while the template is rendered."""


def prompt_ids(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of `turns` ({role, content}) and of the beginning of an answer. Those of `apply_chat_template` where no content holds a
    special token's text. Raises ValueError if the contents use up the private characters of Unicode."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = sorted(added, key=len, reverse=True)
    contents = "".join(turn["content"] for turn in turns)
    free = (chr(code) for code in PRIVATE if chr(code) not in contents)
    try:
        stand_in = {mark: next(free) for mark in marks if mark in contents}
    except StopIteration:
        raise ValueError("a message holds all private characters of Unicode: take some out") from None
    masked = [{**turn, "content": _replaced(turn["content"], stand_in)} for turn in turns]
    text = tokenizer.apply_chat_template(masked, tokenize=False, add_generation_prompt=True)
    if not stand_in:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    back = {character: mark for mark, character in stand_in.items()}
    ids: list[int] = []
    for piece in re.split(f"({'|'.join(map(re.escape, marks))})", text):
        if piece in added:
            ids.append(added[piece])
        elif piece:
            whole = _replaced(piece, back)
            ids += tokenizer(whole, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def _replaced(text: str, by: Mapping[str, str]) -> str:
    if not by:
        return text
    return re.sub("|".join(map(re.escape, sorted(by, key=len, reverse=True))), lambda found: by[found[0]], text)
