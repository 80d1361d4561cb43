"""The part of `bench-corpus` that measures signals and verdicts on real files, one process, one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from opencoder.errors import Failure

PARSED = ("python", "javascript", "html")
"""Languages whose signals need a syntax tree; their parsers' time is told apart."""


class File(NamedTuple):
    """A file to judge."""

    text: str
    path: str
    size_bytes: int
    language: str
    doc_type: str


def read_files(inputs: Sequence[str], megabytes: float) -> list[File]:
    """Files with signals, spread evenly over the inputs until `megabytes` are together. Raises Failure if there is none."""
    from opencoder.config import load_corpus_config
    from opencoder.corpus.read import find_items, read_item

    config = load_corpus_config()
    items = [item for item in find_items(list(inputs), config) if not item.container]
    total = sum(item.size for item in items)
    step = max(1, int(total / (megabytes * 1e6)))
    files = []
    for item in items[::step]:
        for record in read_item(item, config):
            if record.text is not None:
                assert record.language is not None
                assert record.doc_type is not None
                files.append(File(record.text, record.path, record.size_bytes, record.language, record.doc_type))
    if not files:
        raise Failure(f"no file with signals in {', '.join(inputs)}")
    return files


def judge(files: Sequence[File]) -> int:
    """Signals and verdicts of all files; how many are kept."""
    from opencoder.corpus.verdict import evaluate

    return sum(
        evaluate(
            f.text, path=f.path, size_bytes=f.size_bytes, language=f.language, doc_type=f.doc_type, identity="0" * 64
        ).keep
        for f in files
    )


def decide(files: Sequence[File]) -> int:
    """Verdicts alone, each from the first rule that hits; how many are kept."""
    from opencoder.corpus import signals
    from opencoder.corpus.verdict import first_hit

    kept = 0
    for f in files:
        document = signals.make_document(
            f.text, size_bytes=f.size_bytes, doc_type=f.doc_type, language=f.language, path=f.path
        )
        kept += first_hit(document, "0" * 64) is None
    return kept


def split(files: Sequence[File]) -> None:
    """Code and comments of all files."""
    from opencoder.corpus.lexing import split

    for f in files:
        split(f.text, f.language)


def own_signals(files: Sequence[File]) -> None:
    """The signals of the files' own languages, code and comments given."""
    from opencoder.corpus import signals

    for f in files:
        document = signals.make_document(
            f.text, size_bytes=f.size_bytes, doc_type=f.doc_type, language=f.language, path=f.path
        )
        for function in signals.LANGUAGE_SIGNALS[f.language].values():
            function(document)


def measure(files: Sequence[File], rounds: int) -> list[dict[str, Any]]:
    """Rows: name, files, megabytes, mb_per_s of CPU time (best of `rounds`; the sides alternate)."""
    plain = [f for f in files if f.language not in PARSED]
    groups: dict[str, tuple[Sequence[File], Callable[[Sequence[File]], Any]]] = {
        "signals + verdicts, all files": (files, judge),
        "verdicts alone, cheap rules first, all files": (files, decide),
        "signals + verdicts, no parser rule": (plain, judge),
        "of it code and comments apart": (plain, split),
    }
    for language in PARSED:
        own = [f for f in files if f.language == language]
        groups[f"signals + verdicts, {language}"] = (own, judge)
        groups[f"of it the signals of {language}, parser included"] = (own, own_signals)
    groups = {name: (chosen, side) for name, (chosen, side) in groups.items() if chosen}
    if judge(files) != decide(files):
        raise Failure("the verdicts of all rules and of the first hit differ")
    best = dict.fromkeys(groups, float("inf"))
    for _ in range(rounds):
        for name, (chosen, side) in groups.items():
            start = time.process_time()
            side(chosen)
            best[name] = min(best[name], time.process_time() - start)
    rows = []
    for name, (chosen, _) in groups.items():
        megabytes = sum(f.size_bytes for f in chosen) / 1e6
        rows.append({"name": name, "files": len(chosen), "megabytes": megabytes, "mb_per_s": megabytes / best[name]})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    return "\n".join(
        f"{row['name']:<58}{row['files']:>6} files{row['megabytes']:>8.1f} MB{row['mb_per_s']:>9.2f} MB/s"
        for row in rows
    )
