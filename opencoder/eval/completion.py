"""From what a model wrote to a program. Everything here takes time linear in the text.

Completion mode: the text goes on from the prompt and ends at the first stop. Chat mode: the program stands in a fenced block."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence

THINK_END = "</think>"
ATTEMPTS = 3
"""Cuts made at most to find a prefix that parses."""
MAX_PARSED = 1 << 20
"""Characters; what is longer is not parsed but run as it is."""
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^\n]*$", re.MULTILINE)


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops`."""
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def after_thinking(text: str) -> str:
    """What follows the reasoning; of a text whose reasoning never ends, nothing is left of the answer but the text itself."""
    return text.rpartition(THINK_END)[2]


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of each fenced block, Markdown's rules: a block ends at a fence of the same character, at least as long and
    without a language; one that never ends goes to the end of the text."""
    blocks = []
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif fence[1][0] == opened[1][0] and len(fence[1]) >= len(opened[1]) and not fence[2]:
            blocks.append((opened[2].lower(), text[opened.end() + 1 : fence.start()]))
            opened = None
    if opened is not None:
        blocks.append((opened[2].lower(), text[opened.end() + 1 :]))
    return blocks


def from_chat(text: str, entry_point: str = "") -> str:
    """The program in an answer: the first block that defines the entry point, else the longest; without a block the answer itself."""
    text = after_thinking(text)
    blocks = [code for _, code in code_blocks(text)]
    if not blocks:
        return text
    wanted = re.compile(rf"\b(def|class|function|func|fn)\s+{re.escape(entry_point)}\b") if entry_point else None
    return next((code for code in blocks if wanted and wanted.search(code)), max(blocks, key=len))


def defines(source: str, name: str) -> bool:
    """Whether a line of Python defines the function or class."""
    return re.search(rf"^(?:async[ \t]+)?(?:def|class)[ \t]+{re.escape(name)}\b", source, re.MULTILINE) is not None


def valid_prefix(source: str) -> str:
    """Python that runs on into what does not parse (a sentence, a function cut off by the token limit), without its statements
    from the first that does not. Unchanged if it parses, and if a few cuts do not help."""
    if len(source) > MAX_PARSED:
        return source
    text = source
    for _ in range(ATTEMPTS):
        line = _error_line(text)
        if line is None:
            return text
        lines = text.split("\n")
        start = min(line, len(lines)) - 1
        while start > 0 and (not lines[start].strip() or lines[start][0] in " \t)]}#"):
            start -= 1
        while start > 0 and lines[start - 1].startswith("@"):
            start -= 1
        text = "\n".join(lines[:start]).rstrip() + "\n"
        if not text.strip():
            return source
    return text if _error_line(text) is None else source


def as_module(prompt: str) -> str | None:
    """A prompt made whole Python: a function that ends with its docstring is whole, another gets the body `pass`; None if that does
    not help."""
    return next((text for text in (prompt, prompt + "\n    pass\n") if _error_line(text) is None), None)


def _error_line(source: str) -> int | None:
    """The line of the first syntax error, None if there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in the model's strings
            ast.parse(source)
    except SyntaxError as error:
        return max(error.lineno or 1, 1)
    except (ValueError, RecursionError, MemoryError):
        return 1
    return None
