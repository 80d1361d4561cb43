"""What a step scores on this rank: some of its rows, or all, and the gradient of those alone.

N_r classes of this rank, m of them scored, D width, B samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch

from .variants import SMALLEST_NORM

CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Logits worked on at a time: what stays in a core's second cache; on a GPU, what bounds the copies beside them."""
KEPT_BYTES = 1 << 25
"""Scored rows are copied once a step where the copy is no larger: gathering short rows three times costs more than its memory."""
LEAST_ROWS = 256
"""Of a chunk, however many samples: the sum of the features' gradients is read and written once for each."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Scratch:
    """Buffers that are used again: asking the system for new pages takes as long as filling them."""

    def __init__(self) -> None:
        self._free: dict[str, list[torch.Tensor]] = {}

    def take(self, purpose: str, elements: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A flat buffer of unknown contents on the device of `like`."""
        free = self._free.setdefault(purpose, [])
        if free and (free[0].numel(), free[0].dtype, free[0].device) == (elements, dtype, like.device):
            return free.pop()
        free.clear()  # of another size: the batch or the number of scored rows has changed, and with it all that will be asked for
        return torch.empty(elements, dtype=dtype, device=like.device)

    def give_back(self, purpose: str, buffer: torch.Tensor) -> None:
        """The contents are not needed any more."""
        self._free[purpose].append(buffer)


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """Rows `ids` (m,), ascending and distinct local ids, of `weight` (N_r, D); None: all of them."""

    weight: torch.Tensor
    ids: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    """(m,), added to the logits of each row."""
    total: int | None = None
    """Classes scored on all ranks; None: those of `ids`."""
    cosine: bool = False
    """Rows are brought to length 1."""
    kept: torch.Tensor | None = None
    """(m, D), a copy of the rows `ids`, of which they are then read instead of gathering them anew each time."""
    _rooms: dict[torch.dtype, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def count(self) -> int:
        """m."""
        return self.weight.shape[0] if self.ids is None else self.ids.shape[0]

    @property
    def total_count(self) -> int:
        """Classes scored on all ranks."""
        return self.count if self.total is None else self.total

    def chunks(self, samples: int) -> Iterator[tuple[int, int]]:
        """[begin, end) of places, of about CHUNK_ELEMENTS logits for that many samples."""
        bound = CHUNK_ELEMENTS.get(self.weight.device.type, CHUNK_ELEMENTS["cuda"])
        step = max(LEAST_ROWS, bound // max(1, samples))
        return ((begin, min(begin + step, self.count)) for begin in range(0, self.count, step))

    @cached_property
    def inverse_norms(self) -> torch.Tensor:
        """(m, 1), 1/‖row‖, 0 for a row without direction, as the weight is when they are first asked for."""
        parts = [_inverse_norms(self.raw(*chunk)) for chunk in self.chunks(self.weight.shape[1])]
        return torch.cat(parts)

    def raw(self, begin: int, end: int) -> torch.Tensor:
        """Rows at these places as they are stored, (end − begin, D): a view where all are scored, otherwise a copy that lasts
        until the next call."""
        weight = self.weight.detach()
        if self.ids is None:
            return weight[begin:end]
        if self.kept is not None:
            return self.kept[begin:end]
        return torch.index_select(weight, 0, self.ids[begin:end], out=self._room(weight.dtype, end - begin))

    def rows(self, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows at these places as logits are made of them, (end − begin, D); they last until the next call."""
        if not self.cosine:
            return self.raw(begin, end).to(dtype)
        inverse = self.inverse_norms[begin:end]  # before raw(): it may make them, and asks for rows itself
        rows = self.raw(begin, end)
        return torch.mul(rows, inverse, out=self._room(wide(rows.dtype), end - begin)).to(dtype)

    def _room(self, dtype: torch.dtype, n: int) -> torch.Tensor:
        """(n, D) of one buffer: new pages for each chunk would cost more than what is done with them."""
        if dtype not in self._rooms or self._rooms[dtype].shape[0] < n:
            self._rooms[dtype] = torch.empty(n, self.weight.shape[1], dtype=dtype, device=self.weight.device)
        return self._rooms[dtype][:n]

    def places(self, local: torch.Tensor) -> torch.Tensor:
        """Local ids (B,) → the place of each among the scored rows, −1 where it is none of them."""
        if self.ids is None:
            return torch.where((local >= 0) & (local < self.count), local, -1)
        place = torch.searchsorted(self.ids, local).clamp_(max=self.count - 1)
        return torch.where(self.ids[place] == local, place, -1)


@dataclass(eq=False)
class RowGradient:
    """Gradient of the scored rows of one step, summed over its micro-batches: ids as in `rows`, never an (N_r, D) tensor of
    mostly zeros."""

    rows: ScoredRows
    scratch: Scratch
    values: torch.Tensor | None = field(default=None, init=False)
    """(m, D) in fp32 (fp64), of the rows as logits are made of them: see `finish`; None before the first backward."""
    finished: bool = field(default=False, init=False)

    def opened(self) -> tuple[torch.Tensor, bool]:
        """The buffer, and whether it already holds something that is to be added to."""
        if self.finished:
            raise RuntimeError("a backward pass came after the step's gradient was finished: call begin_step() first")
        if self.values is not None:
            return self.values, True
        weight = self.rows.weight
        flat = self.scratch.take("gradient", self.rows.count * weight.shape[1], weight, wide(weight.dtype))
        self.values = flat.view(self.rows.count, weight.shape[1])
        return self.values, False

    def finish(self) -> torch.Tensor:
        """(m, D), the gradient of the rows as they are stored. Once a step, after its last backward pass.

        d/dw of a function of ŵ = w/‖w‖ with gradient g is (g − ŵ(ŵ·g))/‖w‖. It is linear in g, so once for all micro-batches."""
        if self.values is None:
            raise RuntimeError("no gradient of the class matrix: no backward pass of a loss came since begin_step()")
        if self.rows.cosine and not self.finished:
            for begin, end in self.rows.chunks(self.values.shape[1]):
                g = self.values[begin:end]
                inverse = self.rows.inverse_norms[begin:end]
                rows = self.rows.raw(begin, end).to(g.dtype)
                rows = rows * inverse
                g.sub_(rows * (rows * g).sum(1, keepdim=True)).mul_(inverse)
        self.finished = True
        return self.values

    def close(self) -> None:
        """The gradient is used up."""
        if self.values is not None:
            self.scratch.give_back("gradient", self.values.view(-1))
            self.values = None


def _inverse_norms(rows: torch.Tensor) -> torch.Tensor:
    """(n, D) → (n, 1)."""
    norms = rows.to(wide(rows.dtype)).square().sum(1, keepdim=True).sqrt_()
    return torch.where(norms > SMALLEST_NORM, norms, torch.inf).reciprocal_()
