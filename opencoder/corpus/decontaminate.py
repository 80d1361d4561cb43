"""Finding the tasks of benchmarks in training data.

Tokens are those of the near-duplicate search: the non-empty parts of re.split(r"\\W+", text.lower()). So case, white space,
punctuation and comment marks do not hide a copy; renamed identifiers do. A task has two texts, prompt followed by solution,
and test. A document matches a task if it shares one n-gram (10 tokens by default) with it, or defines a function under the
name of its entry point. Every n-gram of a task counts but

- those with fewer than `min_words` distinct tokens that do not begin with a digit: `0, 1, 2, …` is in every test suite;
- those that more than `max_tasks` tasks share: they are the benchmark's own boilerplate (HumanEval: `check some edge cases
  that are easy to work out by hand`).

A name counts if it is specific: two words or more (`below_zero`, `digitSum`), at least 8 characters, and not in
common_functions.txt. `Decontaminator.summary` says what was left out for which reason. A text shorter than n tokens has no
n-gram of its own; a short solution is still found together with the end of its prompt."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from opencoder.corpus_config import DecontaminateConfig

from .benchmarks import BenchmarkTask, benchmark_file, load_benchmark
from .minhash import tokens
from .ngram_index import Gram, make_index

Side = Literal["prompt", "solution", "test", "entry_point"]
SIDES: tuple[Side, ...] = ("prompt", "solution", "test")
MAX_SPANS = 1000
"""Spans of n-grams, and of names, listed per document; `Matches.left_out` counts the others."""
MIN_NAME = 8
"""Characters of a specific name."""
_HUMP = re.compile(r"[a-z0-9][A-Z]|[A-Za-z0-9]_+[A-Za-z0-9]")
# A definition, seen from the name: a keyword before it, or a function assigned to it. Both look at a few characters only.
_BEFORE = re.compile(r"\b(?:def|function|func|fn|fun|sub|proc|method|defun|defn|define)[ \t]{1,8}$")
_AFTER = re.compile(r"[ \t]{0,8}(?:[(<\[{\r\n]|$)")
_ASSIGNED = re.compile(r"[ \t]{0,8}[:=][ \t]{0,8}(?:async[ \t]{1,8})?(?:function|lambda|func|fn)\b")
_CONTEXT = 40


@dataclass(frozen=True)
class Match:
    """A place where a document meets a task."""

    benchmark: str
    task: str
    side: Side
    """Part of the task that was found; entry_point: its name."""
    start: int
    """Character of the document where the span begins."""
    end: int
    """Where it ends (exclusive)."""
    ngrams: int
    """Positions in the span from which n tokens on are those of the task; 0 for an entry point."""

    def reason(self, ngram: int) -> tuple[str, float, str]:
        """(reason, value, threshold) as a corpus records them for a document dropped because of this match."""
        task = f"{self.benchmark} {self.task}"
        if self.side == "entry_point":
            return "benchmark_name", 0.0, f"defines the entry point of {task}"
        return "benchmark_ngrams", float(self.ngrams), f">= 1 {ngram}-gram of {task} ({self.side})"


class Matches(list[Match]):
    """Matches of one document, by position."""

    left_out: int = 0
    """Spans beyond MAX_SPANS."""

    def worst(self) -> Match | None:
        """The match with most n-grams, the first of equals: the reason to give for dropping the document."""
        return max(self, key=lambda match: match.ngrams, default=None)


def benchmark_files(config: DecontaminateConfig) -> list[Path]:
    """The files behind `config.against`: what a result depends on beside the documents. Raises UserError."""
    return [benchmark_file(name) for name in config.against]


class Decontaminator:
    """Looks for the tasks of benchmarks in texts; for pretraining and for tuning data alike."""

    def __init__(self, tasks: Sequence[BenchmarkTask], config: DecontaminateConfig | None = None) -> None:
        """`config.against` is not read here; see `of_config`."""
        self.config = config or DecontaminateConfig()
        self.tasks = list(tasks)
        self._left_out: dict[str, int] = {"few_words": 0, "many_tasks": 0}
        refs, grams = self._grams()
        self.ngrams = len(grams)
        covered = {gram.key // len(SIDES) for gram in grams}
        self.without_ngrams = [t.id for i, t in enumerate(self.tasks) if i not in covered]
        self.names, self.unspecific = self._names()
        self._name_list = list(self.names)
        self._index = make_index(
            refs, grams, ngram=self.config.ngram, keys=len(SIDES) * len(self.tasks), names=self._name_list
        )

    @classmethod
    def of_config(cls, config: DecontaminateConfig) -> Decontaminator:
        """One that looks for the benchmarks in `config.against`. Raises UserError or DataError as `load_benchmark`."""
        return cls([task for name in config.against for task in load_benchmark(name, config.fields)], config)

    @staticmethod
    @lru_cache(maxsize=2)
    def shared(config_json: str) -> Decontaminator:
        """The one of `config.model_dump_json()`, made once per process: for tasks that run many times in one."""
        return Decontaminator.of_config(DecontaminateConfig.model_validate_json(config_json))

    def _grams(self) -> tuple[list[list[str]], list[Gram]]:
        """The texts as tokens, and their n-grams that count."""
        n = self.config.ngram
        refs: list[list[str]] = []
        grams: list[Gram] = []
        for number, task in enumerate(self.tasks):
            prompt = tokens(task.prompt)
            for words, sides in (([*prompt, *tokens(task.solution)], SIDES[:2]), (tokens(task.test), SIDES[2:])):
                for offset in range(len(words) - n + 1):
                    side = sides[0] if len(sides) == 1 or offset + n <= len(prompt) else sides[1]
                    if side in self.config.sides:
                        grams.append(Gram(len(refs), offset, number * len(SIDES) + SIDES.index(side)))
                refs.append(words)
        owners: defaultdict[tuple[str, ...], set[int]] = defaultdict(set)
        texts = [tuple(refs[g.ref][g.offset : g.offset + n]) for g in grams]
        for gram, text in zip(grams, texts, strict=True):
            owners[text].add(gram.key // len(SIDES))
        good: dict[tuple[str, ...], bool] = {}
        for text, tasks in owners.items():
            few = len({word for word in text if not word[0].isdigit()}) < min(self.config.min_words, n)
            many = len(tasks) > self.config.max_tasks
            self._left_out["few_words"] += few
            self._left_out["many_tasks"] += many and not few
            good[text] = not few and not many
        return refs, [gram for gram, text in zip(grams, texts, strict=True) if good[text]]

    def _names(self) -> tuple[dict[str, list[int]], list[str]]:
        """Lower-cased entry points to look for with their tasks, and those that say too little."""
        names: dict[str, list[int]] = {}
        unspecific = set()
        for number, task in enumerate(self.tasks):
            if not task.entry_point or self.config.entry_points == "off":
                continue
            if is_specific(task.entry_point):
                names.setdefault(task.entry_point.lower(), []).append(number)
            else:
                unspecific.add(task.entry_point)
        return names, sorted(unspecific)

    def check(self, text: str) -> Matches:
        """Every place where `text` meets a task, by position; empty if it is clean."""
        lowered = text.lower()
        runs, names, left_out = self._index.check(lowered.encode("utf-8", "surrogatepass"), MAX_SPANS)
        found = Matches()
        found.left_out = left_out
        if len(runs) == 0 and len(names) == 0:
            return found
        if len(lowered) != len(text):
            runs[:, 1:3], names[:, 1:3] = _unlowered(text, runs[:, 1:3]), _unlowered(text, names[:, 1:3])
        for key, start, end, count, _, _ in runs.tolist():
            task = self.tasks[key // len(SIDES)]
            found.append(Match(task.benchmark, task.id, SIDES[key % len(SIDES)], start, end, count))
        found += self._named(text, names, found)
        found.sort(key=lambda m: (m.start, m.end, m.benchmark, m.task, m.side))
        return found

    def _named(self, text: str, names: NDArray[np.int64], found: Matches) -> list[Match]:
        """Matches for the names that stand where they count, at most MAX_SPANS; `found` counts the others."""
        named: list[Match] = []
        for name, start, end in names.tolist():
            if self.config.entry_points == "definition" and not _is_definition(text, start, end):
                continue
            for number in self.names[self._name_list[name]]:
                if len(named) == MAX_SPANS:
                    found.left_out += 1
                    continue
                task = self.tasks[number]
                named.append(Match(task.benchmark, task.id, "entry_point", start, end, 0))
        return named

    def summary(self) -> dict[str, Any]:
        """What is looked for and what is not, for reports."""
        return {
            "benchmarks": dict(sorted(Counter(task.benchmark for task in self.tasks).items())),
            "ngram": self.config.ngram,
            "ngrams": self.ngrams,
            "ngrams_left_out_few_words": self._left_out["few_words"],
            "ngrams_left_out_many_tasks": self._left_out["many_tasks"],
            "tasks_without_ngrams": self.without_ngrams,
            "entry_points": self.config.entry_points,
            "names": sorted(self.names),
            "names_not_specific": self.unspecific,
        }


def is_specific(name: str) -> bool:
    """Whether a function's name points to a task: see the top of this file."""
    return len(name) >= MIN_NAME and _HUMP.search(name) is not None and name.lower() not in common_functions()


@cache
def common_functions() -> frozenset[str]:
    """Function names that real code uses without having seen a benchmark, lower-cased."""
    text = resources.files("opencoder.corpus").joinpath("common_functions.txt").read_text(encoding="utf-8")
    return frozenset(line for line in text.splitlines() if line and not line.startswith("#"))


def _is_definition(text: str, start: int, end: int) -> bool:
    after = text[end : end + _CONTEXT]
    if _ASSIGNED.match(after):
        return True
    return _AFTER.match(after) is not None and _BEFORE.search(text[max(0, start - _CONTEXT) : start]) is not None


def _unlowered(text: str, spans: NDArray[np.int64]) -> NDArray[np.int64]:
    """Spans of text.lower() as spans of `text`. Of all characters only İ (U+0130) becomes two: i and a combining dot, which
    is no word character, so no token begins or ends between a dot and what follows it."""
    places = np.array([match.start() for match in re.finditer("\u0130", text)], np.int64)
    lowered = places + np.arange(len(places))

    def back(position: NDArray[np.int64]) -> NDArray[np.int64]:
        return position - np.searchsorted(lowered, position)

    return np.stack([back(spans[:, 0]), back(spans[:, 1] - 1) + 1], axis=1)


def excerpt(text: str, match: Match, most: int = 300) -> str:
    """The matched part of a document, at most `most` characters of it."""
    part = text[match.start : match.end]
    return part if len(part) <= most else part[: most - 1] + "…"
