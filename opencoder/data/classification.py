"""Datasets of labelled samples (data.kind: classification), memory-mapped, in files that numpy reads.

    PREFIX.labels.npy            int64 (N,) class of each sample
    PREFIX.tokens.npy            kind tokens: uint16 or int32 (tokens,) ids of all samples, one after the other
    PREFIX.offsets.npy           int64 (N + 1,) where each begins; only where samples differ in length
    PREFIX.features.npy          kind features: float16 or float32 (N, width)
    PREFIX.classification.json   what they are; written last (classification_writer.py)

N samples, B of them in a batch, S tokens of the longest that is taken."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from opencoder.errors import DataError

from .indexed import IDENTITY_BLOCKS, IDENTITY_TOKENS
from .loader import MASKED, MicroBatch
from .mapping import map_npy

FORMAT = 1
KINDS = ("tokens", "features")


def description_file(prefix: str | Path) -> Path:
    """The JSON file of the dataset PREFIX."""
    return Path(f"{prefix}.classification.json")


class ClassificationDataset:
    """Memory-mapped reader. Raises DataError for files that are missing, cut off, or do not fit each other."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        facts = _described(description_file(prefix))
        self.facts: dict[str, Any] = facts
        self.kind: str = facts["kind"]
        """tokens or features."""
        self.classes: int = facts["classes"]
        """Labels are below this."""
        self.longest: int = facts["longest"]
        """Tokens of the longest sample; of features their width."""
        self.labels: NDArray[np.int64] = self._map("labels", (facts["samples"],))
        """(N,)"""
        self.offsets: NDArray[np.int64] | None = None
        if self.kind == "features":
            self.inputs = self._map("features", (facts["samples"], self.longest))
            return
        if facts["ragged"]:
            self.offsets = self._map("offsets", (facts["samples"] + 1,))
        self.inputs = self._map("tokens", (facts["tokens"],))

    def __reduce__(self) -> tuple[type[ClassificationDataset], tuple[str]]:
        """Loader workers that are not forked open the files anew."""
        return ClassificationDataset, (self.prefix,)

    def _map(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        path = Path(f"{self.prefix}.{name}.npy")
        if not path.is_file():
            raise DataError(f"{path} does not exist beside {description_file(self.prefix).name}: copy it there")
        try:
            array = map_npy(path)
        except ValueError as error:
            raise DataError(f"{error}; write the dataset again with `opencoder write-classification`") from error
        if array.shape != shape:
            raise DataError(
                f"{path} has shape {array.shape}, {description_file(self.prefix).name} says {shape}: they are of two datasets"
            )
        return array

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, i: int) -> NDArray[Any]:
        """Token ids (any,) or features (width,) of sample i, without copying."""
        if self.kind == "features":
            features: NDArray[Any] = self.inputs[i]
            return features
        if self.offsets is None:
            return self.inputs[i * self.longest : (i + 1) * self.longest]
        return self.inputs[self.offsets.item(i) : self.offsets.item(i + 1)]

    @cached_property
    def identity(self) -> str:
        """Hex SHA-256 of the description and of pieces spread over labels and inputs: another dataset under the same name is
        noticed without reading all of it."""
        found = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode())
        for array in (self.labels, self.inputs):
            last = max(len(array) - IDENTITY_TOKENS, 0)
            for block in range(IDENTITY_BLOCKS):
                start = last * block // (IDENTITY_BLOCKS - 1)
                found.update(array[start : start + IDENTITY_TOKENS].tobytes())
        return found.hexdigest()


def _described(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(
            f"{path} does not exist: give PREFIX of a dataset that `opencoder write-classification` has written"
        )
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        form, kind = facts.get("format"), facts.get("kind")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error}): write the dataset again") from error
    if form != FORMAT or kind not in KINDS:
        raise DataError(
            f"{path} has format {form} and kind {kind}; this version reads format {FORMAT} with kind tokens or features"
        )
    return facts


class Labelled(NamedTuple):
    """One sample."""

    number: int
    """In its dataset."""
    inputs: NDArray[Any]
    label: int


class Shuffled:
    """Samples by position, epoch after epoch, each in an order of its own that follows from (seed, epoch) alone: the position is
    the number of samples consumed, whatever the number of ranks."""

    def __init__(self, dataset: ClassificationDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self._orders: dict[int, NDArray[Any]] = {}

    def __len__(self) -> int:
        """Of one epoch; positions go on beyond it."""
        return len(self.dataset)

    def number(self, position: int) -> int:
        """Which sample of the dataset stands at `position`."""
        epoch, at = divmod(position, len(self.dataset))
        return int(self._order(epoch)[at])

    def __getitem__(self, position: int) -> Labelled:
        number = self.number(position)
        return Labelled(number, self.dataset.get(number), int(self.dataset.labels[number]))

    def _order(self, epoch: int) -> NDArray[Any]:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}  # a batch may lie in two
            n = len(self.dataset)
            order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(n)
            self._orders[epoch] = order.astype(np.int32 if n < 2**31 else np.int64)
        return self._orders[epoch]


class Evaluated:
    """The first `samples` positions of a shuffled dataset, once each; what a whole number of batches asks for beyond them is
    masked."""

    def __init__(self, shuffled: Shuffled, samples: int) -> None:
        self.shuffled, self.samples = shuffled, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, position: int) -> Labelled:
        if position < self.samples:
            return self.shuffled[position]
        return self.shuffled[0]._replace(label=MASKED)


class Collate:
    """Stacks samples: tokens (B, S) int64 with 0 after the end of each, `lengths` (B,); or features (B, width) fp32.

    Raises DataError for a label or an id out of range and for features that are not finite, with the number of the sample."""

    def __init__(self, dataset: ClassificationDataset, seq_len: int, *, vocab_size: int | None = None) -> None:
        """Samples of more than `seq_len` tokens are cut. `vocab_size`: what ids must be below."""
        self.prefix, self.kind, self.classes = dataset.prefix, dataset.kind, dataset.classes
        self.length = min(seq_len, dataset.longest)
        self.vocab_size = vocab_size

    def __call__(self, samples: list[Labelled]) -> MicroBatch:
        for sample in samples:
            if sample.label != MASKED and not 0 <= sample.label < self.classes:
                raise DataError(
                    f"{self.prefix}: sample {sample.number} has label {sample.label}, allowed are 0 to {self.classes - 1}: "
                    "write the dataset again"
                )
        labels = torch.tensor([sample.label for sample in samples])
        if self.kind == "features":
            return MicroBatch(self._features(samples), labels, None, None)
        tokens = np.zeros((len(samples), self.length), np.int64)
        lengths = np.zeros(len(samples), np.int64)
        for row, sample in enumerate(samples):
            ids = sample.inputs[: self.length]
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
        if self.vocab_size is not None and (wrong := (tokens >= self.vocab_size).any(1)).any():
            sample = samples[int(wrong.argmax())]
            raise DataError(
                f"{self.prefix}: sample {sample.number} has the token {int(sample.inputs.max())}, and model.vocab_size is "
                f"{self.vocab_size}: raise it, or write the dataset with the model's tokenizer"
            )
        return MicroBatch(torch.from_numpy(tokens), labels, None, None, lengths=torch.from_numpy(lengths))

    def _features(self, samples: list[Labelled]) -> torch.Tensor:
        rows = np.stack([sample.inputs for sample in samples]).astype(np.float32)
        wrong = ~np.isfinite(rows).all(1)
        if wrong.any():
            raise DataError(
                f"{self.prefix}: sample {samples[int(wrong.argmax())].number} has features that are not finite: remove it, and "
                "write the dataset again"
            )
        return torch.from_numpy(rows)
