"""Samples of fixed length from an indexed dataset, in Megatron's order: documents shuffled, concatenated, cut into
samples that overlap by one token, samples shuffled. The order depends on the seed and the number of samples alone."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opencoder.errors import DataError

from .cache import IndexCache, cache_folder
from .fim import Fim
from .groups import GroupNames, Groups
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
    groups: NDArray[np.int16] | None = None
    """(S, 2) source and language of the document that each label is from, as data/groups.py numbers them."""


class Piece(NamedTuple):
    """Tokens [begin, end) of the document at place `slot` of the document index."""

    slot: int
    document: int
    begin: int
    end: int


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
        self.groups: Groups | None = None
        """Set by `build_lm_dataset`, for samples that carry them."""
        self.group_names: GroupNames | None = None
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
        pieces = self._pieces(i)
        text = np.concatenate([self._read(piece) for piece in pieces], dtype=np.int64)
        assert len(text) == self.seq_len + 1, (len(text), self.seq_len)
        groups = None
        lengths = [piece.end - piece.begin for piece in pieces]
        if self.groups is not None:
            groups = self.groups.of([piece.document for piece in pieces], lengths)[1:]
        return Sample(text[:-1], text[1:], _bounds(lengths), groups)

    def bounds(self, i: int) -> NDArray[np.int32]:
        """`cu_seqlens` of sample i, without its tokens being read."""
        return _bounds([piece.end - piece.begin for piece in self._pieces(i)])

    def _pieces(self, i: int) -> list[Piece]:
        """What sample i is made of, the label of its last token included."""
        k = self.shuffle_index.item(i)
        (first, start), (last, stop) = self.sample_index[k].tolist(), self.sample_index[k + 1].tolist()
        pieces = []
        for slot, document in enumerate(self.document_index[first : last + 1].tolist(), first):
            end = stop + 1 if slot == last else self.data.sizes.item(document)
            pieces.append(Piece(slot, document, start if slot == first else 0, end))
        return pieces

    def _read(self, piece: Piece) -> NDArray[np.generic]:
        text = self.data.get(piece.document, piece.begin, piece.end - piece.begin)
        if self.fim is None:
            return text
        whole = piece.end == self.data.sizes.item(piece.document)
        return self.fim.apply(text.astype(np.int64), slot=piece.slot, offset=piece.begin, ends_document=whole)


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
