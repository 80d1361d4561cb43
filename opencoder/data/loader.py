"""Batches of one optimizer step, the same global order for any number of data-parallel ranks and loader workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from opencoder.errors import ConfigError

from .gpt import Sample

MASKED = -100
"""A label that is no target."""


class MicroBatch(NamedTuple):
    """Samples of one forward pass; B samples of S tokens."""

    tokens: torch.Tensor
    """(B, S) int64"""
    labels: torch.Tensor
    """(B, S) int64, −100 = masked"""
    cu_seqlens: torch.Tensor | None
    """Document bounds over the B·S tokens seen as one row, int32; None without a document mask."""
    max_seqlen: int | None
    """Longest document, tokens."""
    groups: torch.Tensor | None = None
    """(B, S, 2) int16: source and language of the document that each label is from, as data/groups.py numbers them."""
    lengths: torch.Tensor | None = None
    """(B,) int64: tokens of each sample that are not padding, where a sample has one label (data/classification.py). Then `labels`
    is (B,), and `tokens` may be features (B, width)."""


class _Samples(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class _Bounded(_Samples, Protocol):
    seq_len: int

    def bounds(self, i: int) -> NDArray[np.int32]: ...


class _WithoutText:
    """The samples of a rank that needs no tokens: all labels masked, and MASKED for tokens, which no model takes."""

    def __init__(self, dataset: _Bounded, *, document_mask: bool) -> None:
        self.dataset, self.document_mask = dataset, document_mask
        self.nothing = np.broadcast_to(np.int64(MASKED), dataset.seq_len)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Sample:
        bounds = self.dataset.bounds(i) if self.document_mask else np.zeros(0, np.int32)
        return Sample(self.nothing, self.nothing, bounds)


class BatchLoader:
    """Iterating gives, for each optimizer step from `start_sample` on, this rank's micro-batches; every time the same ones.

    Of the global batch that begins at sample s, micro-batch m of rank r holds samples s + (m·dp + r)·b + [0, b), with b
    the micro-batch size: the position in the data is one number. Raises ConfigError if the batch does not divide."""

    def __init__(
        self,
        dataset: _Samples,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_sample: int = 0,
        end_sample: int | None = None,
        document_mask: bool = False,
        workers: int = 0,
        text: bool = True,
        pin_memory: bool = False,
        collate: Callable[[list[Any]], MicroBatch] | None = None,
    ) -> None:
        """`text` False: the tokens and labels are not read, and stand there masked. `pin_memory`: batches lie in memory that a
        GPU can copy from on its own. `collate` stacks samples of another kind than text."""
        per_pass = micro_batch_size * dp_size
        if global_batch_size % per_pass:
            raise ConfigError(
                f"global batch of {global_batch_size} is not a multiple of micro-batch·dp = "
                f"{micro_batch_size}·{dp_size}: set it to a multiple of {per_pass}"
            )
        self.dataset = dataset if text else _WithoutText(dataset, document_mask=document_mask)  # type: ignore[arg-type]
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.start_sample = start_sample
        self.end_sample = len(dataset) if end_sample is None else end_sample
        self.collate = collate or _Collate(document_mask)
        self.workers, self.pin_memory = workers, pin_memory

    def _batches(self) -> Iterator[list[int]]:
        """Indices of each of this rank's micro-batches, in order; an incomplete last global batch is left out."""
        stride, b = self.micro_batch_size * self.dp_size, self.micro_batch_size
        for step in range(self.start_sample, self.end_sample - self.global_batch_size + 1, self.global_batch_size):
            for first in range(step, step + self.global_batch_size, stride):
                begin = first + self.dp_rank * b
                yield list(range(begin, begin + b))

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        loader: DataLoader[Any] = DataLoader(
            self.dataset,  # type: ignore[arg-type]  # a map-style dataset by its methods
            batch_sampler=self._batches(),  # any iterable will do
            num_workers=self.workers,
            collate_fn=self.collate,
            prefetch_factor=2 if self.workers else None,
            pin_memory=self.pin_memory,
        )
        per_step = self.global_batch_size // (self.micro_batch_size * self.dp_size)
        step: list[MicroBatch] = []
        for micro_batch in loader:
            step.append(micro_batch)
            if len(step) == per_step:
                yield step
                step = []


class _Collate:
    """Stacks samples; with a document mask, chains their bounds."""

    def __init__(self, document_mask: bool) -> None:
        self.document_mask = document_mask

    def __call__(self, samples: list[Sample]) -> MicroBatch:
        tokens = torch.from_numpy(np.stack([s.tokens for s in samples]))
        labels = torch.from_numpy(np.stack([s.labels for s in samples]))
        given = [s.groups for s in samples if s.groups is not None]
        groups = torch.from_numpy(np.stack(given)) if given else None
        if not self.document_mask:
            return MicroBatch(tokens, labels, None, None, groups)
        length = tokens.shape[1]
        bounds = [np.zeros(1, np.int32), *(s.cu_seqlens[1:] + i * length for i, s in enumerate(samples))]
        cu_seqlens = np.concatenate(bounds).astype(np.int32)
        return MicroBatch(tokens, labels, torch.from_numpy(cu_seqlens), int(np.diff(cu_seqlens).max()), groups)
