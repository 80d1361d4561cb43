"""Labelled samples out of parquet, jsonl(.gz, .zst) and npz files, a block at a time, for ClassificationWriter."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opencoder.compressed import ERRORS as DAMAGE
from opencoder.compressed import open_decompressed
from opencoder.errors import DataError, UserError

from .classification_writer import ClassificationWriter
from .documents import JSONL
from .encoders import make_encoder
from .tokenizer import load

COLUMNS = ("tokens", "text", "features")
BLOCK = 4096
"""Samples that are in memory at one time; of npz files all are."""


class Block(NamedTuple):
    """Samples of one file, in order."""

    where: str
    """Of the first, for messages."""
    inputs: Any
    """Token ids, texts or rows of features."""
    labels: Any


def find_inputs(paths: Iterable[str | Path]) -> list[Path]:
    """The files named or lying in the folders named, sorted. Raises DataError if there are none."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.is_file() and _kind(p))
        elif not path.is_file():
            raise DataError(f"{path} does not exist")
        elif _kind(path) is None:
            raise DataError(f"{path} is neither parquet, jsonl(.gz, .zst) nor npz: convert it, or give another file")
        else:
            found.append(path)
    if not found:
        raise DataError(f"no parquet, jsonl or npz file in {', '.join(map(str, paths))}")
    return found


def _kind(path: Path) -> str | None:
    if path.name.startswith("."):
        return None
    if path.suffix in (".parquet", ".npz"):
        return path.suffix[1:]
    return "jsonl" if path.name.endswith(JSONL) else None


def column_of(file: Path) -> str:
    """Which of COLUMNS the samples of a file stand in. Raises DataError if it has none of them, or several."""
    kind = _kind(file)
    try:
        if kind == "parquet":
            names = list(pq.read_schema(file).names)
        elif kind == "npz":
            with np.load(file, allow_pickle=False) as arrays:
                names = list(arrays.files)
        else:
            with open_decompressed(file) as lines:
                first = json.loads(next((line for line in lines if line.strip()), b"{}"))
            names = list(first) if isinstance(first, dict) else []
    except (pa.ArrowException, ValueError, zipfile.BadZipFile, *DAMAGE) as error:
        raise DataError(f"{file} is damaged: {error}") from error
    known = [name for name in COLUMNS if name in names]
    if len(known) != 1:
        raise DataError(
            f"{file} has {', '.join(names) or 'nothing'}; exactly one of {', '.join(COLUMNS)} must be there: say which with --column"
        )
    return known[0]


def read_blocks(file: Path, column: str, label: str) -> Iterator[Block]:
    """The samples of a file. Raises DataError naming file and row."""
    kind = _kind(file)
    reader = {"parquet": _parquet_blocks, "npz": _npz_blocks}.get(kind or "", _json_blocks)
    try:
        yield from reader(file, column, label)
    except (pa.ArrowException, zipfile.BadZipFile, *DAMAGE) as error:
        raise DataError(f"{file} is damaged or truncated: {error}") from error


def _parquet_blocks(path: Path, column: str, label: str) -> Iterator[Block]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        for name in (column, label):
            if name not in names:
                raise DataError(f"{path} has no column `{name}`; it has {', '.join(names)}")
        row = 0
        for batch in file.iter_batches(batch_size=BLOCK, columns=[column, label]):
            inputs = _arrow_inputs(batch.column(column), f"{path}: row {row} and the {BLOCK - 1} after it")
            labels = batch.column(label).to_numpy(zero_copy_only=False)
            yield Block(f"{path}: row {row}", inputs, labels)
            row += len(batch)


def _arrow_inputs(found: pa.Array, where: str) -> Any:
    if found.null_count:
        raise DataError(f"{where}: {found.null_count} of them have no inputs: remove them")
    if pa.types.is_string(found.type) or pa.types.is_large_string(found.type):
        return found.to_pylist()
    if not (
        pa.types.is_list(found.type) or pa.types.is_large_list(found.type) or pa.types.is_fixed_size_list(found.type)
    ):
        raise DataError(f"{where} hold {found.type}: lists of numbers, or texts, are wanted")
    flat = found.flatten().to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_list(found.type):
        return flat.reshape(len(found), -1)
    offsets = found.offsets.to_numpy()
    return np.split(flat, (offsets[1:-1] - offsets[0])) if len(found) else []


def _npz_blocks(path: Path, column: str, label: str) -> Iterator[Block]:
    with np.load(path, allow_pickle=False) as file:
        names = (column, label if label in file.files else "labels")
        missing = [name for name in names if name not in file.files]
        if missing:
            raise DataError(f"{path} has no array `{missing[0]}`; it has {', '.join(file.files)}")
        inputs, labels = (file[name] for name in names)
        if "offsets" in file.files and inputs.ndim == 1:
            inputs = np.split(inputs, file["offsets"][1:-1])
    if len(inputs) != len(labels):
        raise DataError(f"{path} has {len(inputs)} samples and {len(labels)} labels: give one each")
    for first in range(0, len(labels), BLOCK):
        yield Block(f"{path}: row {first}", inputs[first : first + BLOCK], labels[first : first + BLOCK])


def _json_blocks(path: Path, column: str, label: str) -> Iterator[Block]:
    inputs: list[Any] = []
    labels: list[int] = []
    with open_decompressed(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number} is not a JSON document: {error}") from error
            if not isinstance(row, dict) or column not in row or type(row.get(label)) is not int:
                raise DataError(f"{path}:{number} must hold `{column}`, and a whole number under `{label}`")
            inputs.append(row[column])
            labels.append(row[label])
            if len(labels) == BLOCK:
                yield Block(f"{path}:{number - BLOCK + 1}", inputs, np.array(labels))
                inputs, labels = [], []
    if labels:
        yield Block(str(path), inputs, np.array(labels))


class Asked(NamedTuple):
    """What `opencoder write-classification` is told."""

    files: list[Path]
    column: str
    label: str = "label"
    classes: int | None = None
    tokenizer: str | None = None
    seq_len: int | None = None
    """Samples are cut to so many tokens."""
    vocab_size: int | None = None
    dtype: Literal["float16", "float32"] = "float32"


def write_dataset(asked: Asked, prefix: str) -> dict[str, Any]:
    """Write PREFIX.* from all files, in their order; returns the description. Raises DataError naming file and row, or the number
    of the sample."""
    blocks = (block for file in asked.files for block in read_blocks(file, asked.column, asked.label))
    if asked.column == "features":
        return _write_features(asked, prefix, blocks)
    facts: dict[str, Any] = {}
    encode, vocabulary = None, asked.vocab_size
    if asked.tokenizer is not None:
        loaded = load(asked.tokenizer)
        facts, vocabulary = {"tokenizer_hash": loaded.hash}, vocabulary or loaded.size
        encode = make_encoder(asked.tokenizer, loaded, "tokenizers")
    if asked.column == "text" and encode is None:
        raise UserError("samples that are texts need --tokenizer")
    with ClassificationWriter(prefix, "tokens", classes=asked.classes, vocab_size=vocabulary, facts=facts) as writer:
        for block in blocks:
            inputs = block.inputs
            with _told(block):
                if asked.column == "text":
                    assert encode is not None
                    if not all(isinstance(text, str) for text in inputs):
                        raise DataError("a sample that is no text")
                    inputs = encode(inputs, np.int64)
                writer.add_tokens([ids[: asked.seq_len] for ids in inputs], block.labels)
    return writer.described


def _write_features(asked: Asked, prefix: str, blocks: Iterator[Block]) -> dict[str, Any]:
    first = next(blocks, None)
    if first is None:
        raise DataError(f"{', '.join(map(str, asked.files))}: there is no sample")
    with _told(first):
        width = len(first.inputs[0])
    with ClassificationWriter(prefix, "features", classes=asked.classes, width=width, dtype=asked.dtype) as writer:
        for block in (first, *blocks):
            with _told(block):
                writer.add_features(np.asarray(block.inputs, np.float32), block.labels)
    return writer.described


class _told:
    """Errors within say where the samples stand that the writer names by number."""

    def __init__(self, block: Block) -> None:
        self.where = block.where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, (DataError, TypeError, ValueError)):
            raise DataError(f"in the block from {self.where}: {error}") from error
