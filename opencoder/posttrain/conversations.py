"""Conversations out of jsonl(.gz, .zst) and parquet files, in the forms `messages` and `instruction`/`output`.

A row that is none is a `Problem` with file, place and kind; reading goes on after it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from opencoder.compressed import ERRORS as DAMAGE
from opencoder.compressed import open_decompressed
from opencoder.corpus.json_lines import object_of
from opencoder.data.documents import find_files
from opencoder.errors import DataError

from .chat import ROLES, Message

__all__ = ["PROBLEMS", "Conversation", "Problem", "find_files", "parse", "read_conversations", "read_rows", "text_of"]

PROBLEMS = (
    "broken_line",
    "no_conversation",
    "unknown_role",
    "empty_message",
    "no_text",
    "system_not_first",
    "no_answer",
)
"""What can be wrong with a row."""
_BLANK_LINES = re.compile(r"(?:[^\S\n]*\n)+")


class Conversation(NamedTuple):
    """A row that can be learned from."""

    place: str
    """FILE:LINE, or FILE, row N (from 0) of a parquet file."""
    messages: list[Message]
    """The last one is an answer."""
    id: str = ""
    language: str = ""
    trimmed: int = 0
    """Turns after the last answer, and blank lines before answers, that were taken away."""


class Problem(NamedTuple):
    """A row that cannot."""

    place: str
    kind: str
    """One of PROBLEMS."""
    text: str
    """What is wrong."""

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | Problem]]:
    """(place, row) of every row of a file. Raises DataError if the file itself is damaged."""
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                number = 0
                for batch in file.iter_batches(batch_size=256):
                    for row in batch.to_pylist():
                        yield f"{path}, row {number}", row
                        number += 1
            return
        with open_decompressed(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    place = f"{path}:{number}"
                    found = object_of(line)
                    yield place, Problem(place, "broken_line", found) if isinstance(found, str) else found
    except (*DAMAGE, pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged or truncated: {error}") from error


def read_conversations(path: Path) -> Iterator[Conversation | Problem]:
    """Every row of a file as what it is. Raises DataError if the file itself is damaged."""
    for place, row in read_rows(path):
        yield row if isinstance(row, Problem) else parse(row, place)


def parse(row: dict[str, Any], place: str) -> Conversation | Problem:
    """The conversation of a row.

    Forms: `messages` (a list of {role, content}), or `instruction` and `output` with `input` and `system` if there are any."""
    turns = _turns(row)
    if isinstance(turns, str):
        return Problem(place, "no_conversation", turns)
    messages: list[Message] = []
    trimmed = 0
    for number, turn in enumerate(turns):
        role: Any = turn.get("role")
        content: Any = turn.get("content")
        if role not in ROLES:
            return Problem(
                place, "unknown_role", f"message {number} has the role {role!r}; allowed are {', '.join(ROLES)}"
            )
        problem = _text_problem(content)
        if problem is not None:
            return Problem(place, problem[0], f"message {number} ({role}) {problem[1]}")
        if role == "system" and number:
            return Problem(place, "system_not_first", f"message {number} is a system message; it may only come first")
        if role == "assistant":
            # They would join the line end of the turn's header, which no prompt can end with.
            content, blank = _without_blank_lines(content)
            trimmed += blank
        messages.append(Message(role, content))
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    if last < 0 or all(message.role != "user" for message in messages[:last]):
        return Problem(place, "no_answer", "no assistant message answers a user message")
    trimmed += len(messages) - last - 1
    return Conversation(place, messages[: last + 1], str(row.get("id") or ""), str(row.get("language") or ""), trimmed)


def text_of(row: dict[str, Any]) -> str:
    """The texts of all turns of a row, a blank line between two, for searches in them. Raises ValueError if it is no conversation."""
    turns = _turns(row)
    if isinstance(turns, str):
        raise ValueError(turns)
    contents = [turn["content"] for turn in turns if turn["content"] is not None]
    if not all(isinstance(content, str) for content in contents):
        raise ValueError("a message has a content that is not a text")
    return "\n\n".join(contents)


def _turns(row: dict[str, Any]) -> list[dict[str, Any]] | str:
    """The turns as they stand in the row, or what is wrong with it."""
    given = row.get("messages")
    if given is not None:
        if not isinstance(given, list) or not all(isinstance(turn, dict) for turn in given):
            return "`messages` is no list of {role, content}"
        return [{"role": turn.get("role"), "content": turn.get("content")} for turn in given]
    if "instruction" not in row or "output" not in row:
        return f"neither `messages` nor `instruction` and `output`; it has {', '.join(map(str, row)) or 'nothing'}"
    question = row["instruction"]
    if isinstance(question, str) and isinstance(row.get("input"), str) and row["input"].strip():
        question = f"{question}\n\n{row['input']}"
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def _text_problem(content: Any) -> tuple[str, str] | None:
    if content is None or (isinstance(content, str) and not content.strip()):
        return "empty_message", "is empty"
    if not isinstance(content, str):
        return "no_text", f"is a {type(content).__name__}, not a text"
    try:
        content.encode()
    except UnicodeEncodeError:
        return "no_text", "holds half a surrogate pair, which is no text in UTF-8"
    return None


def _without_blank_lines(text: str) -> tuple[str, int]:
    match = _BLANK_LINES.match(text)
    return (text[match.end() :], 1) if match else (text, 0)
