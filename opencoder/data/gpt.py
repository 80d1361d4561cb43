"""Samples of fixed length from an indexed dataset, in Megatron's order: documents shuffled, concatenated, cut into
samples that overlap by one token, samples shuffled. The order depends on the seed and the number of samples alone."""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opencoder.errors import DataError

from .cache import IndexCache
from .fim import Fim
from .index import build_sample_index
from .indexed import IndexedDataset

INDICES = ("document", "sample", "shuffle")
SEPARATE_LAST_EPOCH_BELOW = 0.80
"""If less than this share of the last epoch is wanted, it is shuffled apart: its few documents stay at the end."""


class Sample(NamedTuple):
    """One training sample; S is the sequence length."""

    tokens: NDArray[np.int64]
    """(S,)"""
    labels: NDArray[np.int64]
    """(S,) the next token of each; −100 = masked."""
    cu_seqlens: NDArray[np.int32]
    """Bounds of the documents inside, from 0 to S, out of the index (never guessed from end-of-document tokens)."""


def split_bounds(split: str, n: int) -> list[tuple[int, int]]:
    """Contiguous ranges [begin, end) of n documents in the proportions of `split`, e.g. "95,5,0"."""
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    if not shares or min(shares) < 0 or sum(shares) <= 0:
        raise DataError(f"data.split={split!r} must be numbers of which one is positive, for example 95,5,0")
    edges = np.concatenate([[0.0], np.cumsum(shares) / sum(shares)])
    at = [round(float(edge) * n) for edge in edges]
    return list(pairwise(at))


def cache_folder(prefix: str) -> Path:
    """Where the indices of a dataset are kept if nothing else is asked for; it may be deleted at any time."""
    return Path(f"{prefix}.cache")


class GPTDataset:
    """`num_samples` samples of `seq_len` tokens from documents [begin, end) of `data`; None: one epoch. Without a
    `cache` its indices are built in memory.

    Raises DataError if the range holds too few tokens for one sample."""

    def __init__(
        self,
        data: IndexedDataset,
        *,
        seq_len: int,
        num_samples: int | None,
        seed: int,
        begin: int = 0,
        end: int | None = None,
        cache: IndexCache | None = None,
        fim: Fim | None = None,
    ) -> None:
        self.data, self.seq_len, self.fim = data, seq_len, fim
        end = len(data) if end is None else end
        epoch_tokens = int(data.sizes[begin:end].sum(dtype=np.int64))
        if epoch_tokens < seq_len + 1:
            raise DataError(
                f"{data.prefix}: documents {begin} to {end} hold {epoch_tokens} tokens, a sample needs {seq_len + 1}: "
                "give more data, a shorter data.seq_len or another data.split"
            )
        epochs = 1 if num_samples is None else _epochs(num_samples, seq_len, epoch_tokens)
        available = (epochs * epoch_tokens - 1) // seq_len
        separate_at = _separate_at(epochs, epoch_tokens, seq_len, num_samples)

        def build() -> dict[str, NDArray[Any]]:
            random = np.random.RandomState(seed)
            documents = _document_index((begin, end), epochs, random, separate_last=separate_at is not None)
            samples = build_sample_index(np.asarray(data.sizes), documents, seq_len=seq_len, num_samples=available)
            shuffle = _shuffle_index(separate_at or available, available, random)
            return {"document": documents, "sample": samples, "shuffle": shuffle}

        if cache is None:
            indices = build()
        else:
            asked = {"seq_len": seq_len, "num_samples": num_samples, "seed": seed, "documents": [begin, end]}
            what = {"kind": "gpt", "lengths": data.lengths_hash, **asked}
            indices = cache.get(cache_folder(data.prefix), what, INDICES, build)
        self.document_index, self.sample_index, self.shuffle_index = (indices[name] for name in INDICES)

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def __getitem__(self, i: int) -> Sample:
        k = self.shuffle_index.item(i)
        (first, start), (last, stop) = self.sample_index[k].tolist(), self.sample_index[k + 1].tolist()
        documents = self.document_index[first : last + 1].tolist()
        pieces = []
        for n, document in enumerate(documents):
            begin = start if n == 0 else 0
            end = stop + 1 if n == last - first else self.data.sizes.item(document)
            piece = self.data.get(document, begin, end - begin)
            if self.fim is not None:
                whole = end == self.data.sizes.item(document)
                piece = self.fim.apply(piece.astype(np.int64), slot=first + n, offset=begin, ends_document=whole)
            pieces.append(piece)
        text = np.concatenate(pieces, dtype=np.int64)
        assert len(text) == self.seq_len + 1, (len(text), self.seq_len)
        return Sample(text[:-1], text[1:], _bounds([len(piece) for piece in pieces]))


def _bounds(lengths: list[int]) -> NDArray[np.int32]:
    """Ends of the pieces that hold tokens, from 0 to their sum less the last label."""
    *ends, total = accumulate(lengths)
    inner = {end for end in ends if 0 < end < total - 1}
    return np.array([0, *sorted(inner), total - 1], np.int32)


def _epochs(num_samples: int, seq_len: int, epoch_tokens: int) -> int:
    """Least number of epochs with enough tokens for the samples and the last label."""
    return max(1, -(-(num_samples * seq_len + 1) // epoch_tokens))


def _separate_at(epochs: int, epoch_tokens: int, seq_len: int, num_samples: int | None) -> int | None:
    """The sample at which the separately shuffled last epoch begins, or None if it is mixed with the others."""
    if epochs == 1 or num_samples is None:
        return None
    before = ((epochs - 1) * epoch_tokens - 1) // seq_len
    per_epoch = (epoch_tokens - 1) // seq_len
    return before if num_samples - before < int(SEPARATE_LAST_EPOCH_BELOW * per_epoch) else None


def _document_index(
    sequences: tuple[int, int], epochs: int, random: np.random.RandomState, *, separate_last: bool
) -> NDArray[np.int32]:
    """Made in place: at 10^8 documents a second copy would be felt."""
    begin, end = sequences
    index = np.empty((epochs, end - begin), np.int32)
    index[:] = np.arange(begin, end, dtype=np.int32)
    flat = index.reshape(-1)
    if not separate_last:
        random.shuffle(flat)
        return flat
    random.shuffle(flat[: -(end - begin)])
    random.shuffle(flat[-(end - begin) :])
    return flat


def _shuffle_index(first: int, total: int, random: np.random.RandomState) -> NDArray[np.generic]:
    index = np.arange(total, dtype=np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64)
    random.shuffle(index[:first])
    if first < total:
        random.shuffle(index[first:])
    return index
