"""Conversations to a tuning dataset: PREFIX.bin, .idx, .mask, .docs.parquet and .json.

Rows are encoded by several processes and written in the order of the input, so the result depends on input and options alone. A row
that cannot be learned from is counted by kind, the first ones with file and line; `strict` stops at the first."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opencoder import __version__
from opencoder.console import ProgressBar
from opencoder.data import tokenizer as tok
from opencoder.data.indexed import token_dtype
from opencoder.data.preprocess import SCHEMA
from opencoder.data.sft_files import SftWriter
from opencoder.data.sft_packing import efficiency, pack_rows
from opencoder.errors import DataError, UserError
from opencoder.files import atomic_path, write_json

from .chat import ChatEncoder, Learn, Message, check_template
from .conversations import PROBLEMS, Conversation, Problem, find_files, read_conversations

BATCH = 256
"""Rows that a worker gets at one time."""
TOLD = 20
"""Problems of each kind that are told with their place."""
QUANTILES = (0, 50, 90, 99, 100)


@dataclass(frozen=True)
class Job:
    """What is asked for; every field changes the result, and none else does."""

    inputs: tuple[str, ...]
    tokenizer: str
    seq_len: int = 4096
    """Places of a row: a conversation has at most so many tokens and one."""
    on_long: Literal["cut", "drop"] = "cut"
    """A longer one loses the turns after the last answer that fits, or all."""
    learn: Learn = "all"
    strict: bool = False


class Row(NamedTuple):
    """An encoded conversation."""

    ids: NDArray[Any]
    learned: NDArray[np.bool_]
    identity: str
    source: str
    language: str
    answers: int
    was_long: bool
    trimmed: int


def preprocess_sft(job: Job, prefix: str | Path, *, workers: int = 1) -> dict[str, Any]:
    """Write the dataset; returns what PREFIX.json holds. Raises DataError for bad data, with `strict` for the first bad row."""
    if job.seq_len < 2:
        raise UserError(f"--seq-len {job.seq_len} must be at least 2")
    start = time.monotonic()
    files = find_files(job.inputs)
    loaded = tok.load(job.tokenizer)
    has_template = check_template(job.tokenizer, ChatEncoder(loaded))
    tally = _Tally()
    with (
        SftWriter(prefix, token_dtype(loaded.size)) as writer,
        atomic_path(f"{prefix}.docs.parquet") as temporary,
        pq.ParquetWriter(temporary, SCHEMA) as table,
    ):
        for rows in _encoded(job, files, workers):
            good = [row for row in rows if isinstance(row, Row)]
            for row in rows:
                if isinstance(row, Problem) and job.strict and row.kind != "too_long":
                    raise DataError(f"{row}; without --strict such rows are counted and left out")
                tally.add(row)
            for row in good:
                writer.add(row.ids, row.learned)
            columns = {"id": [r.identity for r in good], "source": [r.source for r in good]}
            table.write_table(pa.table({**columns, "language": [r.language for r in good]}, schema=SCHEMA))
        if not tally.lengths:
            raise DataError(f"no conversation in {', '.join(job.inputs)} can be learned from: {tally.summary()}")
    description = {
        "kind": "sft",
        "tokenizer_hash": loaded.hash,
        "vocab_size": loaded.size,
        "eod_id": loaded.eod_id,
        "im_end_id": loaded.im_end_id,
        "chat_template": has_template,
        "version": __version__,
        "documents": len(tally.lengths),
        "options": {"seq_len": job.seq_len, "on_long": job.on_long, "learn": job.learn},
        **tally.report(job.seq_len),
        "timings": {"seconds": round(time.monotonic() - start, 3)},
    }
    write_json(f"{prefix}.json", description)
    return description


class _Tally:
    """Counts of what was read."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.learned: list[int] = []
        self.counts = Counter(rows=0, answers=0, trimmed=0, long=0, cut=0, dropped=0)
        self.problems: dict[str, list[str]] = {}
        self.problem_counts: Counter[str] = Counter()

    def add(self, row: Row | Problem) -> None:
        """Count one row."""
        self.counts["rows"] += 1
        if isinstance(row, Problem):
            if row.kind == "too_long":
                self.counts["long"] += 1
                self.counts["dropped"] += 1
                return
            self.problem_counts[row.kind] += 1
            told = self.problems.setdefault(row.kind, [])
            if len(told) < TOLD:
                told.append(str(row))
            return
        self.lengths.append(len(row.ids))
        self.learned.append(int(row.learned.sum()))
        self.counts.update(answers=row.answers, trimmed=row.trimmed, long=row.was_long, cut=row.was_long)

    def summary(self) -> str:
        """The counts of what was left out, in words."""
        found = [f"{name} {n}" for name, n in self.problem_counts.items()]
        return (
            ", ".join([*found, *([f"too long {self.counts['dropped']}"] if self.counts["dropped"] else [])]) or "no row"
        )

    def report(self, seq_len: int) -> dict[str, Any]:
        """Counts, lengths, and how well they pack into rows of `seq_len`."""
        lengths = np.array(self.lengths, np.int64)
        rows = pack_rows(lengths - 1, seq_len, seed=0, window=16384, epochs=1)
        n = len(rows.bounds) - 1
        quantiles = np.percentile(lengths, QUANTILES, method="lower").astype(int).tolist()
        return {
            "tokens": int(lengths.sum()),
            "learned_tokens": sum(self.learned),
            "rows": self.counts["rows"],
            "answers": self.counts["answers"],
            "turns_and_blank_lines_trimmed": self.counts["trimmed"],
            "problems": {kind: self.problem_counts[kind] for kind in PROBLEMS},
            "problems_told": self.problems,
            "longer_than_context": {key: self.counts[key] for key in ("long", "cut", "dropped")},
            "lengths": dict(zip(("least", "median", "p90", "p99", "most"), quantiles, strict=True)) | {"mean": float(lengths.mean())},
            "packing": {
                "seq_len": seq_len,
                "rows": n,
                "conversations_per_row": len(lengths) / n,
                "efficiency": efficiency(lengths - 1, rows, seq_len),
            },
        }  # fmt: skip


# ---- encoding ----


def _encoded(job: Job, files: list[Path], workers: int) -> Iterator[list[Row | Problem]]:
    """All rows in order, by batches."""
    batches = _batches(files)
    with ProgressBar("preprocess-sft", unit="rows") as bar:
        if workers <= 1:
            _start_worker(job)
            for batch in batches:
                bar.advance(len(batch))
                yield _encode_batch(batch)
            return
        waiting: deque[Future[list[Row | Problem]]] = deque()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job,)) as pool:
            for batch in batches:
                waiting.append(pool.submit(_encode_batch, batch))
                if len(waiting) >= 2 * workers:  # bounds the rows in memory
                    yield _next(waiting, bar)
            while waiting:
                yield _next(waiting, bar)


def _next(waiting: deque[Future[list[Row | Problem]]], bar: ProgressBar) -> list[Row | Problem]:
    rows = waiting.popleft().result()
    bar.advance(len(rows))
    return rows


def _batches(files: list[Path]) -> Iterator[list[Conversation | Problem]]:
    for file in files:
        rows = read_conversations(file)
        while batch := list(islice(rows, BATCH)):
            yield batch


_worker: dict[str, Any] = {}


def _start_worker(job: Job) -> None:
    tok.without_parallelism()
    loaded = tok.load(job.tokenizer)
    _worker.update(job=job, encoder=ChatEncoder(loaded), dtype=token_dtype(loaded.size))


def _encode_batch(batch: list[Conversation | Problem]) -> list[Row | Problem]:
    job, encoder = _worker["job"], _worker["encoder"]
    return [row if isinstance(row, Problem) else encode(row, job, encoder, _worker["dtype"]) for row in batch]


def encode(conversation: Conversation, job: Job, encoder: ChatEncoder, dtype: Any) -> Row | Problem:
    """A conversation as ids; one that is longer than the context is cut at the end of an answer, or a Problem `too_long`."""
    messages = conversation.messages
    encoded = encoder.encode(messages, learn=job.learn)
    longest = job.seq_len + 1
    was_long = len(encoded.ids) > longest
    if was_long:
        kept = _fitting(messages, encoded.turns, longest) if job.on_long == "cut" else 0
        if not kept:
            return Problem(conversation.place, "too_long", f"{len(encoded.ids)} tokens, at most {longest} fit")
        encoded = encoder.encode(messages[:kept], learn=job.learn)
    ids, mask = np.array(encoded.ids, dtype), np.array(encoded.learned, bool)
    answers = int((mask[1:] & ~mask[:-1]).sum())
    source = Path(conversation.place).name  # wherever the file lies: the same bytes
    return Row(
        ids, mask, conversation.id or source, source, conversation.language, answers, was_long, conversation.trimmed
    )


def _fitting(messages: list[Message], turns: list[int], longest: int) -> int:
    """Turns up to the last answer to a user that ends within `longest` tokens; 0: none does."""
    before = len(turns) - len(messages)  # a default system turn
    asked = next(i for i, message in enumerate(messages) if message.role == "user")
    ends = [
        i + 1
        for i, message in enumerate(messages)
        if i > asked and message.role == "assistant" and turns[before + i] <= longest
    ]
    return max(ends, default=0)
