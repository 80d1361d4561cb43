"""What a benchmark gives: tasks, each with its prompt, its stops and its way of scoring."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from opencoder.errors import DataError

from . import completion

Mode = Literal["completion", "chat"]
MODES: tuple[Mode, ...] = ("completion", "chat")
CHAT = (
    "Please provide a self-contained {language} script that solves the following problem in a markdown code block:\n"
    "```{fence}\n{prompt}\n```\n"
)
PYTHON_STOPS = ("\nif __name__", "\ndef main(", "\nprint(", "\n```")
"""A main guard, a main function, output at the start of a line, the end of a block."""
PYTHON_BASE_STOPS = (*PYTHON_STOPS, "\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert ", "\n@", "\n#")
"""Besides, for models that go on with the next function."""


@dataclass(frozen=True)
class Judge:
    """Scored by `Sandbox.judge`: the test runs in another process than the program, which can forge nothing."""

    job: dict[str, Any]
    """Fields of `checker.run` without the source."""


@dataclass(frozen=True)
class TextCases:
    """Scored by running the program on texts and comparing what it prints here, outside of the sandbox."""

    cases: Sequence[tuple[str, str]]
    """(standard input, expected standard output)."""


@dataclass(frozen=True)
class UnitTests:
    """Scored by unittest in the program's own process: honest programs only (docs/evaluation.md, guarantees)."""

    test: str


@dataclass(frozen=True)
class OwnTests:
    """Program and test are one source of a language other than Python: scored by its exit codes with the test, and with a test that
    must fail."""

    language: str
    test: str


Scoring = Judge | TextCases | UnitTests | OwnTests


@dataclass(frozen=True)
class Task:
    """One task."""

    id: str
    prompt: str
    """What a model completes."""
    scoring: Scoring
    entry_point: str = ""
    solution: str = ""
    """The benchmark's own, as a completion of the prompt; empty if it has none."""
    instruction: str = ""
    """What a chat model is asked; empty: the prompt in the usual frame."""
    language: str = "python"
    stops: tuple[str, ...] = PYTHON_BASE_STOPS
    chat_stops: tuple[str, ...] = ()
    prefix: str = ""
    """What the program begins with, if not with the prompt: of tasks whose prompt is no code."""
    prompt_is_code: bool = True
    time_scale: float = 1.0
    """Factor on the limits of time."""
    facts: dict[str, str] = field(default_factory=dict)
    """Further fields for the results (difficulty, date)."""

    def question(self, mode: Mode) -> str:
        """The text a model is given."""
        if mode == "completion":
            return self.prompt
        fence = {"javascript": "js", "c++": "cpp"}.get(self.language, self.language)
        name = self.language.capitalize() if self.language.isalpha() else self.language
        return self.instruction or CHAT.format(language=name, fence=fence, prompt=self.prompt.strip())

    def program(self, text: str, mode: Mode) -> str:
        """The program in what a model wrote."""
        if mode == "completion":
            body = completion.cut_at_stops(text, self.stops)
            source = (self.prompt if self.prompt_is_code else self.prefix) + body
        else:
            body = completion.cut_at_stops(completion.from_chat(text, self.entry_point), self.chat_stops)
            source = self._from_answer(body)
        return completion.valid_prefix(source) if self.language == "python" else source

    def _from_answer(self, body: str) -> str:
        if not self.prompt_is_code:
            return self.prefix + body
        if isinstance(self.scoring, OwnTests):
            return without_closing(body, self.scoring)
        if self.entry_point and not completion.defines(body, self.entry_point):
            return self.prompt + body  # the answer is the function's body
        # The prompt's helpers and imports come first: an answer may use them without repeating them.
        return (completion.as_module(self.prompt) or "") + "\n" + body


def without_closing(body: str, scoring: OwnTests) -> str:
    """An answer without the closing braces that the test brings along (of Java its class too, which the test closes at its end)."""
    closing = re.match(r"\s*((?:\}\s*)*)", scoring.test)
    count = closing[1].count("}") if closing else 0
    for _ in range(count + (scoring.language == "java")):
        body = body.rstrip().removesuffix("}")
    return body


def need(row: dict[str, Any], name: str, kind: type, where: str) -> Any:
    """A field of a task file. Raises DataError naming file, line, field and what was expected."""
    if name not in row:
        raise DataError(f"{where} has no field `{name}`; it has {', '.join(map(str, row)) or 'none'}")
    if not isinstance(row[name], kind):
        raise DataError(f"{where}: `{name}` is a {type(row[name]).__name__}; a {kind.__name__} is needed")
    return row[name]
