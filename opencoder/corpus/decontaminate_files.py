"""Decontamination of files of documents: parquet and jsonl(.gz, .zst) with a text column, read as streams."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from opencoder.compressed import ERRORS as DAMAGE
from opencoder.console import ProgressBar
from opencoder.corpus_config import DecontaminateConfig
from opencoder.errors import DataError, UserError
from opencoder.files import atomic_open, atomic_path, replace_directory, write_json

from . import json_lines
from .decontaminate import Decontaminator, excerpt

SUFFIXES = (".parquet", *json_lines.SUFFIXES)
TEXT_COLUMNS = ("text", "content")
BATCH_ROWS = 64
"""Rows of a parquet file that are read at one time."""
GROUP_ROWS, GROUP_CHARACTERS = 1024, 16_000_000
"""A row group is written at so many rows, or so many characters in them."""
MAX_LINE = 256 << 20
"""Bytes of a jsonl line; a longer one is an error."""
ROWS = pa.schema(
    [
        ("file", pa.string()),
        ("row", pa.int64()),
        ("id", pa.string()),
        ("path", pa.string()),
        ("benchmark", pa.string()),
        ("task", pa.string()),
        ("side", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("line", pa.int64()),
        ("ngrams", pa.int64()),
        ("excerpt", pa.string()),
    ]
)
"""One row per match: file and row (from 0) of the document, its `id` and `path` columns if it has them, characters of the
span, the line of the document it begins in (from 1)."""


@dataclass(frozen=True)
class _Document:
    row: int
    text: str
    columns: dict[str, Any]


Write = Callable[[_Document], None]
TextOf = Callable[[dict[str, Any]], str]
"""The text of a row, where it is not in one column. Raises ValueError for a row without."""


def decontaminate_files(
    inputs: Sequence[str],
    output: str | Path,
    config: DecontaminateConfig,
    *,
    text_column: str | None = None,
    text_of: TextOf | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Check every document of `inputs` (files, or folders of them) against `config.against`; returns the report.

    `output` is a folder, which gets matches.parquet, report.json and, if the action is drop, the documents without a match
    under clean/ in the format they came in; or a file .jsonl or .parquet for the matches alone (action report). Written
    whole or not at all. `text_of` gives a row's text instead of `text_column`. Raises UserError for what cannot be asked for,
    DataError with file and line or row for bad data."""
    output = Path(output)
    if not config.against:
        raise UserError("nothing to look for: name humaneval or a jsonl file of tasks")
    table = output.name.endswith((".jsonl", ".parquet"))
    if table and config.action == "drop":
        raise UserError(f"--action drop writes documents: give a folder as output, not the file {output}")
    if not table:
        _check_folder(output, overwrite)
    files = find_files(inputs)
    decontaminator = Decontaminator.of_config(config)
    text = text_of or text_column
    if table:
        with atomic_path(output) as temporary:
            return _run(files, decontaminator, text, temporary, output.suffix, None)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        clean = temporary / "clean" if config.action == "drop" else None
        report = _run(files, decontaminator, text, temporary / "matches.parquet", ".parquet", clean)
        write_json(temporary / "report.json", report)
        replace_directory(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return report


def _check_folder(output: Path, overwrite: bool) -> None:
    if output.is_file():
        raise UserError(f"output {output} is a file: give a folder, or a name that ends in .jsonl or .parquet")
    if output.is_dir() and any(output.iterdir()):
        if not (output / "matches.parquet").is_file():
            raise UserError(f"output {output} is not empty and holds no earlier result: choose a new or empty folder")
        if not overwrite:
            raise UserError(f"output {output} holds an earlier result: choose another folder, or --overwrite")


def find_files(inputs: Sequence[str]) -> list[tuple[str, Path]]:
    """(name in reports, path) of the data files, sorted. Raises UserError for an input without any."""
    found: dict[str, Path] = {}
    for name in inputs:
        root = Path(name)
        if root.is_dir():
            paths = sorted(p for p in root.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
            named = [(f"{root.resolve().name}/{p.relative_to(root).as_posix()}", p) for p in paths]
        elif root.is_file() and root.name.endswith(SUFFIXES):
            named = [(root.name, root)]
        elif root.exists():
            raise UserError(f"input {name}: allowed are files {', '.join(SUFFIXES)} and folders of them")
        else:
            raise UserError(f"input {name} does not exist")
        if not named:
            raise UserError(f"input folder {name} holds no file {', '.join(SUFFIXES)}")
        for short, path in named:
            if found.setdefault(short, path) != path:
                raise UserError(f"two inputs are called {short} ({found[short]} and {path}): give their common folder")
    return sorted(found.items())


def _run(
    files: list[tuple[str, Path]],
    decontaminator: Decontaminator,
    text: TextOf | str | None,
    matches_path: Path,
    suffix: str,
    clean: Path | None,
) -> dict[str, Any]:
    """Check all documents, write matches and clean documents; the report."""
    tasks: Counter[tuple[str, str]] = Counter()
    sides: defaultdict[str, Counter[str]] = defaultdict(Counter)
    counts = Counter(documents=0, contaminated=0, matches=0, spans_left_out=0)
    with ExitStack() as stack:
        bar = stack.enter_context(ProgressBar("decontaminate", unit="documents"))
        write_match = stack.enter_context(_match_writer(matches_path, suffix))
        for name, path in files:
            with _copier(path, clean / name if clean else None) as keep:
                for document in _documents(path, text):
                    found = decontaminator.check(document.text)
                    counts["documents"] += 1
                    counts["contaminated"] += bool(found)
                    counts["matches"] += len(found)
                    counts["spans_left_out"] += found.left_out
                    for key in {(m.benchmark, m.task) for m in found}:
                        tasks[key] += 1
                    for benchmark, side in {(m.benchmark, m.side) for m in found}:
                        sides[benchmark][side] += 1
                    for match in found:
                        write_match(_match_row(name, document, match))
                    if not found:
                        keep(document)
                    bar.advance()
    action = decontaminator.config.action
    return {
        "action": action,
        "counts": {**counts, "kept": counts["documents"] - counts["contaminated"] * (action == "drop")},
        "looked_for": decontaminator.summary(),
        "documents_by_side": {b: dict(sorted(c.items())) for b, c in sorted(sides.items())},
        "documents_by_task": [{"benchmark": b, "task": t, "documents": n} for (b, t), n in sorted(tasks.items())],
    }


def _match_row(name: str, document: _Document, match: Any) -> dict[str, Any]:
    text = document.text
    return {
        "file": name,
        "row": document.row,
        **{k: None if document.columns.get(k) is None else str(document.columns[k]) for k in ("id", "path")},
        "benchmark": match.benchmark,
        "task": match.task,
        "side": match.side,
        "start": match.start,
        "end": match.end,
        "line": text.count("\n", 0, match.start) + 1,
        "ngrams": match.ngrams,
        "excerpt": excerpt(text, match).encode("utf-8", "replace").decode(),
    }


# ---- reading ----


def _documents(path: Path, text: TextOf | str | None) -> Iterator[_Document]:
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    column = text if isinstance(text, str) else None
    try:
        for number, row in rows:
            where = f"{path}, row {number}"
            if callable(text):
                try:
                    yield _Document(number, text(row), row)
                except ValueError as error:
                    raise DataError(f"{where}: {error}") from error
                continue
            if column is None:
                column = next((c for c in TEXT_COLUMNS if c in row), None)
            if column is None or column not in row:
                raise DataError(f"{where} has no column {column or ' or '.join(TEXT_COLUMNS)}; it has {', '.join(row)}")
            if not isinstance(row[column], str):
                raise DataError(f"{where}: `{column}` is a {type(row[column]).__name__}, not a string")
            yield _Document(number, row[column], row)
    except (*DAMAGE, pa.ArrowException) as error:
        raise DataError(f"{path} is damaged or cut off: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            for row in batch.to_pylist():
                yield number, row
                number += 1


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    return enumerate(row for _, row in json_lines.objects(path, max_line=MAX_LINE))


# ---- writing ----


@contextmanager
def _match_writer(path: Path, suffix: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    if suffix == ".jsonl":
        with open(path, "w", encoding="utf-8") as file:

            def write(row: dict[str, Any]) -> None:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

            yield write
        return
    with pq.ParquetWriter(path, ROWS, compression="zstd") as writer, _batches(writer, ROWS) as add:
        yield add


@contextmanager
def _batches(writer: pq.ParquetWriter, schema: pa.Schema) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Collects rows and writes them as row groups."""
    rows: list[dict[str, Any]] = []
    characters = 0

    def add(row: dict[str, Any]) -> None:
        nonlocal characters
        rows.append(row)
        characters += sum(len(value) for value in row.values() if isinstance(value, str | bytes))
        if len(rows) >= GROUP_ROWS or characters >= GROUP_CHARACTERS:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            rows.clear()
            characters = 0

    yield add
    if rows:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))


@contextmanager
def _copier(source: Path, target: Path | None) -> Iterator[Write]:
    """Writes documents to `target` in the format of `source`; with target None it writes nothing."""
    if target is None:
        yield lambda document: None
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".parquet":
        try:
            schema = pq.read_schema(source)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{source} is damaged or cut off: {error}") from error
        with pq.ParquetWriter(target, schema, compression="zstd") as writer, _batches(writer, schema) as add:
            yield lambda document: add(document.columns)
        return
    with _open_compressed(target) as file:

        def write(document: _Document) -> None:
            file.write(json.dumps(document.columns, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")

        yield write


@contextmanager
def _open_compressed(path: Path) -> Iterator[IO[bytes]]:
    with atomic_open(path, "wb") as raw:
        if path.suffix == ".gz":
            # No time and no name in the header: equal input, equal bytes.
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
                yield file  # type: ignore[misc]
        elif path.suffix == ".zst":
            with zstandard.ZstdCompressor().stream_writer(raw, closefd=False) as file:
                yield file
        else:
            yield raw
