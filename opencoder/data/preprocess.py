"""Documents to PREFIX.bin/.idx: streaming, several processes, memory bounded by the batches in flight.

The input is cut into parts of PART_DOCUMENTS documents. Each part is tokenised by one worker into files of its own under
PREFIX.parts/, named by a fingerprint of the whole job; a part that is there is not made again, so a killed job goes on.
At the end the parts are joined in order: the result does not depend on workers or interruptions."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import random
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opencoder import __version__
from opencoder.console import ProgressBar
from opencoder.errors import UserError
from opencoder.files import atomic_open, atomic_path, sha256_of, write_json

from . import tokenizer as tok
from .documents import Document, find_files, read_documents
from .encoders import Encoder, make_encoder
from .fim import FimIds, arrange
from .indexed import IndexedWriter, token_dtype

PART_DOCUMENTS = 512
PART_CHARACTERS = 2_000_000
"""A part ends at whichever comes first, so one part's memory is bounded."""
SCHEMA = pa.schema([("id", pa.string()), ("source", pa.string()), ("language", pa.string())])


@dataclass(frozen=True)
class Job:
    """What is asked for; every field changes the result, and none else does."""

    inputs: tuple[str, ...]
    tokenizer: str
    column: str = "text"
    append_eod: bool = True
    fim_rate: float = 0.0
    seed: int = 1234

    def fingerprint(self, files: list[Path], tokenizer_hash: str) -> str:
        """Identity of the result: options, tokenizer, tool version, and the input files' contents."""
        contents = [(p.name, sha256_of(p)) for p in files]
        options = {k: v for k, v in asdict(self).items() if k not in ("inputs", "tokenizer")}
        what = json.dumps(
            [__version__, PART_DOCUMENTS, PART_CHARACTERS, tokenizer_hash, options, contents], sort_keys=True
        )
        return hashlib.sha256(what.encode()).hexdigest()


def preprocess(
    job: Job, prefix: str | Path, *, workers: int = 1, backend: str = "auto", overwrite: bool = False
) -> dict[str, Any]:
    """Write PREFIX.bin, .idx, .json and .docs.parquet; returns what PREFIX.json holds.

    Raises UserError if PREFIX exists with other parameters and `overwrite` is not set."""
    start = time.monotonic()
    if not 0.0 <= job.fim_rate <= 1.0:
        raise UserError(f"--fim-rate {job.fim_rate} must be between 0 and 1")
    files = find_files(job.inputs)
    loaded = tok.load(job.tokenizer)
    if job.fim_rate > 0 and loaded.fim_ids is None:
        raise UserError(f"--fim-rate {job.fim_rate}: the tokenizer {job.tokenizer} has no fill-in-the-middle tokens")
    fingerprint = job.fingerprint(files, loaded.hash)
    finished = _finished(Path(f"{prefix}.json"), fingerprint, overwrite)
    if finished is not None:
        return finished
    parts = Path(f"{prefix}.parts")
    _claim(parts, fingerprint)
    made = _make_parts(job, files, parts, workers, backend)
    return _join(prefix, parts, made, loaded, fingerprint, time.monotonic() - start)


def _finished(description: Path, fingerprint: str, overwrite: bool) -> dict[str, Any] | None:
    """The description of an equal job that is done already."""
    if not description.is_file() or overwrite:
        return None
    known: dict[str, Any] = json.loads(description.read_text(encoding="utf-8"))
    if known.get("fingerprint") == fingerprint:
        shutil.rmtree(f"{description.with_suffix('')}.parts", ignore_errors=True)  # of a kill just before the end
        return known
    raise UserError(
        f"{description} is from another job (fingerprint {str(known.get('fingerprint'))[:12]}, this one {fingerprint[:12]}): "
        "choose another --output-prefix, or --overwrite"
    )


def _claim(parts: Path, fingerprint: str) -> None:
    """Make the folder of parts this job's own; parts of another job are removed."""
    marker = parts / "fingerprint"
    if parts.exists() and (not marker.is_file() or marker.read_text(encoding="utf-8") != fingerprint):
        shutil.rmtree(parts)
    parts.mkdir(parents=True, exist_ok=True)
    with atomic_open(marker) as file:
        file.write(fingerprint)


def _cut(files: list[Path], column: str) -> Iterator[list[Document]]:
    """The documents of all files in parts."""
    part: list[Document] = []
    characters = 0
    for document in itertools.chain.from_iterable(read_documents(file, column=column) for file in files):
        part.append(document)
        characters += len(document.text)
        if len(part) >= PART_DOCUMENTS or characters >= PART_CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part


def _make_parts(job: Job, files: list[Path], parts: Path, workers: int, backend: str) -> list[int]:
    """Tokenise what is missing; returns the numbers of all parts."""
    numbers: list[int] = []
    waiting: deque[Future[int]] = deque()
    context = multiprocessing.get_context("spawn")
    settings = (job, str(parts), backend)
    with (
        ProcessPoolExecutor(max(workers, 1), context, initializer=_start_worker, initargs=settings) as pool,
        ProgressBar("preprocess", unit="documents") as bar,
    ):
        for number, documents in enumerate(_cut(files, job.column)):
            numbers.append(number)
            if _part(parts, number, "json").is_file():
                bar.advance(len(documents))
                continue
            while len(waiting) >= 2 * max(workers, 1):  # bounds the documents in memory
                bar.advance(waiting.popleft().result())
            waiting.append(pool.submit(_tokenise_part, number, documents))
        for future in waiting:
            bar.advance(future.result())
    return numbers


def _part(parts: Path, number: int, suffix: str) -> Path:
    return parts / f"{number:06d}.{suffix}"


# ---- in the worker ----

_worker: dict[str, Any] = {}


def _start_worker(job: Job, parts: str, backend: str) -> None:
    tok.without_parallelism()
    loaded = tok.load(job.tokenizer)
    _worker.update(job=job, parts=Path(parts), loaded=loaded, encoder=make_encoder(job.tokenizer, loaded, backend))


def _tokenise_part(number: int, documents: list[Document]) -> int:
    """Write one part: .bin, .lengths.npy, .docs.parquet, and last .json, which marks it whole."""
    job, parts, loaded = _worker["job"], _worker["parts"], _worker["loaded"]
    encoder: Encoder = _worker["encoder"]
    dtype = token_dtype(loaded.size)
    if job.fim_rate > 0:
        arrays = [_encode_fim(encoder, loaded, job, document, dtype) for document in documents]
    else:
        arrays = encoder([document.text for document in documents], dtype)
    if job.append_eod:
        eod = np.array([loaded.eod_id], dtype)
        arrays = [np.concatenate([ids, eod]) for ids in arrays]
    lengths = np.array([len(ids) for ids in arrays], np.int32)
    with atomic_open(_part(parts, number, "bin"), "wb") as file:
        file.writelines(ids.tobytes() for ids in arrays)
    with atomic_open(_part(parts, number, "lengths.npy"), "wb") as file:
        np.save(file, lengths)
    columns = {
        "id": [d.identity() for d in documents],
        "source": [d.source for d in documents],
        "language": [d.language for d in documents],
    }
    table = pa.table(columns, schema=SCHEMA)
    with atomic_path(_part(parts, number, "docs.parquet")) as temporary:
        pq.write_table(table, temporary)
    empty = sum(not document.text for document in documents)
    counts = {"documents": len(documents), "tokens": int(lengths.sum()), "empty": empty}
    write_json(_part(parts, number, "json"), counts)
    return len(documents)


def _encode_fim(encoder: Encoder, loaded: tok.LoadedTokenizer, job: Job, document: Document, dtype: Any) -> Any:
    """Cut the characters into prefix, middle and suffix with probability fim_rate, half as PSM and half as SPM
    (arXiv:2207.14255). The draw depends on the seed and the document alone."""
    draw = random.Random(f"{job.seed}:{document.identity()}")
    text = document.text
    if draw.random() >= job.fim_rate or len(text) < 3:
        return encoder([text], dtype)[0]
    assert loaded.fim_ids is not None
    a, b = sorted(draw.sample(range(len(text) + 1), 2))
    prefix, middle, suffix = encoder([text[:a], text[a:b], text[b:]], dtype)
    return arrange(FimIds(*loaded.fim_ids), prefix, middle, suffix, spm=draw.random() >= 0.5)


# ---- at the end ----


def _join(
    prefix: str | Path, parts: Path, numbers: list[int], loaded: tok.LoadedTokenizer, fingerprint: str, seconds: float
) -> dict[str, Any]:
    totals = {"documents": 0, "tokens": 0, "empty": 0}
    with (
        IndexedWriter(prefix, token_dtype(loaded.size)) as writer,
        atomic_path(f"{prefix}.docs.parquet") as temporary,
        pq.ParquetWriter(temporary, SCHEMA) as table,
    ):
        for number in numbers:
            counts = json.loads(_part(parts, number, "json").read_text(encoding="utf-8"))
            totals = {key: totals[key] + counts[key] for key in totals}
            writer.add_part(_part(parts, number, "bin"), np.load(_part(parts, number, "lengths.npy")))
            table.write_table(pq.read_table(_part(parts, number, "docs.parquet")))
    description = {
        "tokenizer_hash": loaded.hash,
        "vocab_size": loaded.size,
        "eod_id": loaded.eod_id,
        "im_end_id": loaded.im_end_id,
        "version": __version__,
        "fingerprint": fingerprint,
        "documents": totals["documents"],
        "tokens": totals["tokens"],
        "empty_documents": totals["empty"],
        "timings": {"seconds": round(seconds, 3)},
    }
    write_json(f"{prefix}.json", description)
    shutil.rmtree(parts)
    return description
