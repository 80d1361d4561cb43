"""ChatML: a conversation to token ids, with the answers marked.

Each turn is `<|im_start|>`, role, newline, text, `<|im_end|>`, newline; a conversation without a system turn gets the default one.
The ids are those that transformers' `apply_chat_template` gives with the template saved beside the tokenizer (data/tokenizer.py),
but for text that holds the marks themselves: there they are taken apart like any other characters, so that what a user wrote never
ends a turn. Learned is the text of an answer and the `<|im_end|>` after it; the newline that follows belongs to the template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tokenizers import Tokenizer

from opencoder.data.tokenizer import BOS, SYSTEM, TURN_END, LoadedTokenizer
from opencoder.errors import DataError

Learn = Literal["all", "last"]
"""Which answers of a conversation are learned."""
ROLES = ("system", "user", "assistant")
PROBE = [
    {"role": "user", "content": "def f(x):\n\n    return x  # ünïcödé\n"},
    {"role": "assistant", "content": "```python\nprint(1234567)\n```"},
    {"role": "user", "content": "\n  it's 日本語"},
]


class Message(NamedTuple):
    """One turn."""

    role: str
    content: str


class Encoded(NamedTuple):
    """A conversation in n tokens."""

    ids: list[int]
    """(n,)"""
    learned: list[bool]
    """(n,) whether the token is a target."""
    turns: list[int]
    """Tokens up to the end of each turn, the default system turn included."""


class ChatEncoder:
    """Encodes conversations with one tokenizer. Raises DataError if it lacks the marks of a turn."""

    def __init__(self, loaded: LoadedTokenizer) -> None:
        # A copy: the switch would change what others get from the same tokenizer.
        self.tokenizer = Tokenizer.from_str(loaded.tokenizer.to_str())
        self.tokenizer.encode_special_tokens = True
        start, end = (self.tokenizer.token_to_id(mark) for mark in (BOS, TURN_END))
        if start is None or end is None:
            raise DataError(f"the tokenizer does not have {BOS} and {TURN_END}: ChatML needs both as special tokens")
        self.start, self.end = start, end
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = {number for number, token in added.items() if token.special} | {self.start, self.end}
        self.newline = self._text("\n")
        self.headers = {role: self._text(f"{role}\n") for role in ROLES}

    def _text(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not self.special.isdisjoint(ids):
            found = next(i for i in ids if i in self.special)
            raise DataError(
                f"the tokenizer makes the special token {self.tokenizer.id_to_token(found)!r} of plain text: use one whose model "
                "does not hold its special tokens"
            )
        return ids

    def encode(self, messages: Sequence[Message], *, learn: Learn = "all") -> Encoded:
        """Ids of the conversation. `learn`: every answer, or the last turn alone if it is one."""
        ids: list[int] = []
        learned: list[bool] = []
        turns: list[int] = []
        every = with_system(messages)
        for number, message in enumerate(every):
            header = self.headers[message.role]
            # Header and text in one piece, as transformers has them: a line end at the start of the text may join the header's.
            body = self._text(f"{message.role}\n{message.content}")
            is_target = message.role == "assistant" and (learn == "all" or number == len(every) - 1)
            first = _answer_start(header, body) if is_target else len(body)
            turn = [self.start, *body, self.end, *self.newline]
            ids += turn
            learned += [False] * (1 + first) + [is_target] * (len(body) - first + 1) + [False] * len(self.newline)
            turns.append(len(ids))
        return Encoded(ids, learned, turns)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids after which the answer to the conversation comes."""
        return [*self.encode(messages).ids, self.start, *self.headers["assistant"]]


def _answer_start(header: list[int], body: list[int]) -> int:
    """Place in `body` of the first token that is of the answer alone. A token that took the header's line end in cannot come after
    a prompt, so it is not learned."""
    same = next((i for i, (a, b) in enumerate(zip(header, body, strict=False)) if a != b), len(header))
    return same if same == len(header) else min(same + 1, len(body))


def with_system(messages: Sequence[Message]) -> list[Message]:
    """The conversation with the default system turn before it, if it has none."""
    if messages and messages[0].role == "system":
        return list(messages)
    return [Message("system", SYSTEM), *messages]


def check_template(folder: str | Path, encoder: ChatEncoder) -> bool:
    """Whether the tokenizer in `folder` has a chat template. Raises DataError if it gives other ids than `encoder`."""
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if theirs.chat_template is None:
        return False
    found = theirs.apply_chat_template(PROBE, add_generation_prompt=True, return_dict=False)
    if list(found) != encoder.prompt([Message(**turn) for turn in PROBE]):
        raise DataError(
            f"the chat template of the tokenizer {folder} is not the ChatML of OpenCoder, so a model tuned here would be asked in "
            "another form than it learned: replace `chat_template` in tokenizer_config.json by opencoder.data.tokenizer.CHAT_TEMPLATE"
        )
    return True
