"""Signals and verdicts of many files as a Parquet table: what `compute-signals` writes."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from opencoder.console import ProgressBar
from opencoder.corpus_config import CorpusConfig
from opencoder.files import atomic_path

from .language import EXCLUDED, UNKNOWN, detect
from .read import Item, Record, find_items, read_item
from .rules import load_rules
from .verdict import evaluate

TASK_FILES = 200
TASK_BYTES = 4_000_000
"""Most input of one task; its files are read one after the other."""
IN_FLIGHT = 4
"""Tasks per worker that are handed out or wait to be written: bounds memory."""


class Counts(NamedTuple):
    """What `write_signals` did."""

    files: int
    kept: int
    dropped: int
    without_signals: int
    """Of the dropped ones: unreadable, or of unknown or excluded type."""
    errors: int
    """Files with at least one error."""


def signal_names() -> list[str]:
    """Every published name, in the order of rules.yaml and, for an entry of several groups, of its groups."""
    groups = dict.fromkeys(group for rule in load_rules() for group in rule.groups)
    return [rule.published(group) for group in groups for rule in load_rules() if group in rule.groups]


def schema() -> pa.Schema:
    """Columns of the table. Signals are float64, flags 0 or 1; `errors` has one text `SIGNAL: error` per signal that failed,
    or `file: …` where the file could not be read."""
    head = [("path", pa.string()), ("source", pa.string()), ("id", pa.string()), ("language", pa.string()),
            ("doc_type", pa.string()), ("natural_language", pa.string()), ("size_bytes", pa.int64()), ("keep", pa.bool_()),
            ("hits", pa.list_(pa.string()))]  # fmt: skip
    signals = [(name, pa.float64()) for name in signal_names()]
    return pa.schema([*head, *signals, ("errors", pa.list_(pa.string()))])


def write_signals(
    inputs: Sequence[str], output: str | Path, config: CorpusConfig, *, compat: bool = False, workers: int = 1
) -> Counts:
    """One row per file or document of the inputs, sorted by source and path, in the file `output`. The rows do not depend on
    the number of workers. Raises DataError for an input that does not exist."""
    items = find_items(list(inputs), config)
    tasks = list(_tasks(items))
    counts = Counts(0, 0, 0, 0, 0)
    with (
        atomic_path(output) as temporary,
        pq.ParquetWriter(temporary, schema(), compression="zstd") as writer,
        ProgressBar("signals", total=len(items), unit="files") as bar,
    ):
        for task, table in zip(tasks, _tables(tasks, config, compat, workers), strict=True):
            writer.write_table(table)
            counts = _add(counts, table)
            bar.advance(len(task))
    return counts


def _tasks(items: list[Item]) -> Iterator[list[Item]]:
    task: list[Item] = []
    size = 0
    for item in items:
        if task and (len(task) >= TASK_FILES or size + item.size > TASK_BYTES):
            yield task
            task, size = [], 0
        task.append(item)
        size += item.size
    if task:
        yield task


def _tables(tasks: list[list[Item]], config: CorpusConfig, compat: bool, workers: int) -> Iterator[pa.Table]:
    """The tables of the tasks, in order."""
    if workers == 1:
        for task in tasks:
            yield signal_table(task, config, compat)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting: deque[Future[pa.Table]] = deque()
        for task in tasks:
            waiting.append(pool.submit(signal_table, task, config, compat))
            if len(waiting) >= IN_FLIGHT * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def signal_table(items: list[Item], config: CorpusConfig, compat: bool) -> pa.Table:
    """The rows of some files."""
    return pa.Table.from_pylist([row for item in items for row in _rows(item, config, compat)], schema=schema())


def _rows(item: Item, config: CorpusConfig, compat: bool) -> Iterator[dict[str, Any]]:
    # The published filter takes any file that decodes: empty ones, those with NUL bytes, and of any size.
    records = [_decode(item)] if compat and not item.container else read_item(item, config)
    for record in records:
        yield _row(record, compat)


def _decode(item: Item) -> Record:
    record = Record(item.path, item.source)
    try:
        data = Path(item.file).read_bytes()
    except OSError as error:
        return record.fail(f"cannot be read: {error.strerror or error}")
    record.id, record.size_bytes = hashlib.sha256(data).hexdigest(), len(data)
    try:
        record.text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return record.drop("read", "encoding", error.start, "not UTF-8 (value: first bad byte)")
    return record


def _row(record: Record, compat: bool) -> dict[str, Any]:
    language, doc_type = detect(record.path, compat=compat)
    row: dict[str, Any] = {
        "path": record.path,
        "source": record.source,
        "id": record.id,
        "language": language,
        "doc_type": doc_type,
        "size_bytes": record.size_bytes,
        "keep": False,
        "hits": [],
        "errors": [],
    }
    if doc_type in (UNKNOWN, EXCLUDED) and record.stage != "read":
        return row
    if record.text is None:
        why = record.reason if record.threshold is None else f"{record.reason}: {record.value} ({record.threshold})"
        row["errors"] = [f"file: {why}"]
        return row
    verdict = evaluate(
        record.text,
        path=record.path,
        size_bytes=record.size_bytes,
        language=language,
        doc_type=doc_type,
        identity=record.id,
        compat=compat,
    )
    row.update({name: None if value is None else float(value) for name, value in verdict.values.items()})
    row["natural_language"], row["keep"] = verdict.natural_language, verdict.keep
    row["hits"] = list(dict.fromkeys(hit.rule for hit in verdict.hits))
    row["errors"] = [f"{name}: {error}" for name, error in verdict.errors.items()]
    return row


def _add(counts: Counts, table: pa.Table) -> Counts:
    kept = pc.sum(table["keep"]).as_py() or 0
    bare = pc.sum(pc.is_null(table["natural_language"])).as_py() or 0
    errors = pc.sum(pc.greater(pc.list_value_length(table["errors"]), 0)).as_py() or 0
    new = (len(table), kept, len(table) - kept, bare, errors)
    return Counts(*(a + b for a, b in zip(counts, new, strict=True)))
