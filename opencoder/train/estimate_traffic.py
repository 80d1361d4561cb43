"""What a rank hands over in one step: which collective, over which axis, how many bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from opencoder.config import Config
from opencoder.model.decoder import Part
from opencoder.model.recompute import modules_of

from .estimate_layers import Sizes


class Transfer(NamedTuple):
    """Collectives of one kind over one axis, in one step."""

    axis: str
    """tp, kv, cp (attention), data (dp and cp together: gradients), pp."""
    operation: str
    """As in Group's records; send: between pipeline stages."""
    bytes: int
    """Handed over by this rank, as Group counts them."""
    size: int
    """Ranks of the axis."""

    @property
    def sent(self) -> int:
        """Bytes that leave the rank where the ranks form a ring."""
        n = self.size
        share = {
            "all_reduce": 2 * (n - 1) / n, "reduce_scatter": (n - 1) / n, "all_to_all": (n - 1) / n, "all_gather": n - 1,
        }  # fmt: skip
        return int(self.bytes * share.get(self.operation, 1))


class Gradients(NamedTuple):
    """Numbers of parameters on the rank, by what their gradients are summed over beside the data axes."""

    all: int
    norms: int
    keys: int
    """Of key and value matrices."""


def transfers(
    config: Config,
    s: Sizes,
    parts: Sequence[Part],
    micro_batches: int,
    *,
    data: int,
    kv: int,
    gradients: Gradients,
    boundaries: int,
) -> list[Transfer]:
    """Of a rank that holds `parts`. `data`: ranks in dp·cp; `kv`: neighbours that hold the same key/value heads; `boundaries`: its
    borders to stages on other ranks."""
    found: dict[tuple[str, str], int] = {}
    for part in parts:
        for axis, operation, size in _of_part(config, s, part):
            found[axis, operation] = found.get((axis, operation), 0) + micro_batches * size
    found["pp", "send"] = micro_batches * boundaries * s.hidden
    sizes = {"tp": s.tp, "cp": s.cp, "pp": config.parallel.pp, "data": data, "kv": kv}
    if s.split:
        found["tp", "all_reduce"] = found.get(("tp", "all_reduce"), 0) + gradients.norms * s.wide
    found["kv", "all_reduce"] = gradients.keys * s.wide
    if config.parallel.sharded_optimizer:
        found["data", "reduce_scatter"] = gradients.all * s.wide
        found["data", "all_gather"] = gradients.all * s.width // data
    else:
        found["data", "all_reduce"] = gradients.all * s.wide
    return [
        Transfer(axis, operation, size, sizes[axis])
        for (axis, operation), size in found.items()
        if size and sizes[axis] > 1
    ]


def _of_part(config: Config, s: Sizes, part: Part) -> Iterator[tuple[str, str, int]]:
    """(axis, operation, bytes) for one micro-batch."""
    for number in part.layers:
        again = modules_of(config.train.recompute, number)
        yield from _attention(s, 2 if again & {"full", "attention"} else 1)
        yield from _tensor_parallel(s, again)
    if part.first:  # rows of the table
        yield from (
            [("tp", "reduce_scatter", s.whole), ("tp", "all_gather", s.hidden)]
            if s.split
            else [("tp", "all_reduce", s.whole)]
        )
    if part.last:
        yield from (
            [("tp", "all_gather", s.hidden), ("tp", "reduce_scatter", s.whole)]
            if s.split
            else [("tp", "all_reduce", s.whole)]
        )
        yield "tp", "all_reduce", 3 * s.tokens * s.wide  # largest logit; sum of exponentials and the target's logit


def _tensor_parallel(s: Sizes, again: frozenset[str]) -> Iterator[tuple[str, str, int]]:
    """Attention and MLP: into the split matrices, and out of them. What runs again stops before the last sum."""
    entries = 2 + (2 if "full" in again else len(again & {"attention", "mlp"}))
    exits = 2 + (1 if "full" in again else 0)
    if not s.split:
        yield "tp", "all_reduce", (exits + 2) * s.whole
        return
    gathers = entries + 2 + (2 if s.overlap else 0)  # in backward: gradients, and under overlap the input once more
    yield "tp", "all_gather", gathers * s.hidden
    yield "tp", "reduce_scatter", (exits + 2) * s.whole


def _attention(s: Sizes, forwards: int) -> Iterator[tuple[str, str, int]]:
    """Over cp: keys and values go round in forward and backward, and their gradients round and home; or tokens for heads and back."""
    if s.ring:
        once = (s.cp - 1) * 2 * s.keys
        yield "cp", "exchange", (forwards + 1) * once + s.cp * 2 * s.keys * (s.wide // s.width)
    elif s.cp > 1:
        yield "cp", "all_to_all", (forwards + 1) * (2 * s.queries + 2 * s.exchanged_keys)
