"""Writes datasets of labelled samples (classification.py), block after block: memory does not grow with the samples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from opencoder import __version__
from opencoder.errors import DataError
from opencoder.files import fsync_directory, temporary_name, write_json

from .classification import FORMAT, description_file
from .indexed import token_dtype

NAMED = 10
"""Classes without samples that are told by number."""


class _GrowingNpy:
    """A .npy file whose first dimension is known at its end. numpy leaves room for it in the header."""

    def __init__(self, path: Path, dtype: Any, width: tuple[int, ...] = ()) -> None:
        self.path, self.dtype, self.width, self.rows = path, np.dtype(dtype), width, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(temporary_name(path), "wb")  # noqa: SIM115  closed in finish or drop
        self._header()
        self._begin = self.file.tell()

    def _header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.rows, *self.width)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def add(self, array: NDArray[Any]) -> None:
        self.rows += len(array)
        self.file.write(np.ascontiguousarray(array, self.dtype).data)

    def finish(self) -> None:
        """All is on disk, under its temporary name."""
        self.file.seek(0)
        self._header()
        assert self.file.tell() == self._begin, (self.path, self._begin)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def drop(self) -> None:
        self.file.close()
        temporary_name(self.path).unlink(missing_ok=True)


class ClassificationWriter:
    """`with ClassificationWriter(prefix, "tokens", vocab_size=n) as w: w.add_tokens(samples, labels)`, or `w.add_features`.

    The files appear under their names when the block ends without an error, PREFIX.classification.json last. Raises DataError
    naming the sample at fault, by its number from 0."""

    def __init__(
        self,
        prefix: str | Path,
        kind: Literal["tokens", "features"],
        *,
        classes: int | None = None,
        vocab_size: int | None = None,
        width: int | None = None,
        dtype: Literal["float16", "float32"] = "float32",
        facts: dict[str, Any] | None = None,
    ) -> None:
        """`classes` None: the largest label and one. Kind tokens: ids are below `vocab_size`, None: the largest id and one.
        Kind features: rows of `width` numbers kept as `dtype`. `facts`: more for the description, such as tokenizer_hash."""
        if kind == "features" and width is None:
            raise ValueError("kind features needs width")
        self.prefix, self.kind, self.classes, self.vocab_size = str(prefix), kind, classes, vocab_size
        self.facts, self.width, self.samples, self._largest_id = dict(facts or {}), width, 0, -1
        self._seen = np.zeros(classes or 1, bool)
        self._labels = _GrowingNpy(Path(f"{prefix}.labels.npy"), np.int64)
        self._lengths: list[NDArray[np.int64]] = []
        stored = dtype if kind == "features" else token_dtype(vocab_size) if vocab_size else np.int32
        shape = (width,) if kind == "features" and width is not None else ()
        self._inputs = _GrowingNpy(Path(f"{prefix}.{kind}.npy"), stored, shape)
        self._files = [self._labels, self._inputs]

    def add_tokens(self, samples: Sequence[NDArray[Any] | Sequence[int]], labels: NDArray[Any] | Sequence[int]) -> None:
        """Samples of one token at least, and the label of each."""
        numbers = self._check_labels(labels, len(samples))
        lengths = np.array([len(sample) for sample in samples], np.int64)
        if not lengths.all():
            raise DataError(f"sample {self.samples + int(lengths.argmin())} has no tokens: leave it out")
        if len(lengths):
            flat = np.concatenate([np.asarray(sample) for sample in samples])
            if not np.issubdtype(flat.dtype, np.integer):
                raise DataError(
                    f"tokens of the samples from {self.samples} on are {flat.dtype}: they must be whole numbers"
                )
            wrong = flat < 0 if self.vocab_size is None else (flat < 0) | (flat >= self.vocab_size)
            if wrong.any():
                at = int(wrong.argmax())
                sample = self.samples + int(np.searchsorted(lengths.cumsum(), at, side="right"))
                allowed = "0 and more" if self.vocab_size is None else f"0 to {self.vocab_size - 1}"
                raise DataError(f"sample {sample} has the token {flat[at]}, allowed are {allowed}")
            self._largest_id = max(self._largest_id, int(flat.max()))
            self._inputs.add(flat)
            self._lengths.append(lengths)
        self._add_labels(numbers)

    def add_features(self, rows: NDArray[Any], labels: NDArray[Any] | Sequence[int]) -> None:
        """rows (n, width), and the label of each."""
        numbers = self._check_labels(labels, len(rows))
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise DataError(
                f"samples from {self.samples} on have features of shape {rows.shape[1:]}, not ({self.width},) as those before"
            )
        with np.errstate(over="ignore"):  # told below
            stored = rows.astype(self._inputs.dtype)
        wrong = ~np.isfinite(stored).all(1)
        if wrong.any():
            raise DataError(
                f"sample {self.samples + int(wrong.argmax())} has features that are not finite as {self._inputs.dtype}: leave it "
                "out, or scale them"
            )
        self._inputs.add(stored)
        self._add_labels(numbers)

    def _check_labels(self, labels: NDArray[Any] | Sequence[int], samples: int) -> NDArray[np.int64]:
        found = np.asarray(labels)
        if found.shape != (samples,):
            raise DataError(
                f"{samples} samples from {self.samples} on have labels of shape {found.shape}: give one each"
            )
        if samples and not np.issubdtype(found.dtype, np.integer):
            raise DataError(
                f"labels of the samples from {self.samples} on are {found.dtype}: they must be whole numbers"
            )
        numbers = found.astype(np.int64)
        wrong = numbers < 0
        if self.classes is not None:
            wrong |= numbers >= self.classes
        if wrong.any():
            at = int(wrong.argmax())
            allowed = "0 and more" if self.classes is None else f"0 to {self.classes - 1}"
            raise DataError(f"sample {self.samples + at} has label {numbers[at]}, allowed are {allowed}")
        return numbers

    def _add_labels(self, numbers: NDArray[np.int64]) -> None:
        if not len(numbers):
            return
        if (most := int(numbers.max()) + 1) > len(self._seen):
            self._seen = np.concatenate([self._seen, np.zeros(max(most, 2 * len(self._seen)) - len(self._seen), bool)])
        self._seen[numbers] = True
        self._labels.add(numbers)
        self.samples += len(numbers)

    def finalise(self) -> dict[str, Any]:
        """Make all files durable and visible; returns the description."""
        if not self.samples:
            raise DataError(f"{self.prefix}: there is no sample to write")
        ragged = self._add_offsets() if self.kind == "tokens" else False
        for file in self._files:
            file.finish()
        described = description_file(self.prefix)
        described.unlink(missing_ok=True)  # of an older dataset: it must not describe new files
        for file in self._files:
            os.replace(temporary_name(file.path), file.path)
        if not ragged:
            Path(f"{self.prefix}.offsets.npy").unlink(missing_ok=True)
        fsync_directory(described.parent)
        facts = self._description(ragged)
        write_json(described, facts)
        return facts

    def _add_offsets(self) -> bool:
        """Whether samples differ in length."""
        lengths = np.concatenate(self._lengths)
        self.longest = int(lengths.max())
        if (lengths == self.longest).all():
            return False
        offsets = _GrowingNpy(Path(f"{self.prefix}.offsets.npy"), np.int64)
        self._files.append(offsets)
        offsets.add(np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))
        return True

    def _description(self, ragged: bool) -> dict[str, Any]:
        classes = self.classes or int(np.flatnonzero(self._seen)[-1]) + 1
        empty = np.flatnonzero(~self._seen[:classes])
        facts = {
            "format": FORMAT,
            "kind": self.kind,
            "samples": self.samples,
            "classes": classes,
            "classes_without_samples": len(empty),
            "first_without_samples": empty[:NAMED].tolist(),
            "dtype": str(self._inputs.dtype),
            "tool_version": __version__,
            **self.facts,
        }
        if self.kind == "features":
            return {**facts, "longest": self.width}
        vocabulary = self.vocab_size or self._largest_id + 1
        return {
            **facts,
            "longest": self.longest,
            "ragged": ragged,
            "tokens": self._inputs.rows,
            "vocab_size": vocabulary,
        }

    def __enter__(self) -> ClassificationWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.described = self.finalise()
        finally:
            for file in self._files:  # what has its name already is not under the temporary one
                file.drop()
