"""The public functions for softmax over very many classes: nearest rows of a matrix, and the choice of active ones."""

from __future__ import annotations

import torch

from ._dispatch import choose, register
from .reference import classes as _reference

FAR = _reference.FAR
"""Priority of a row that is nobody's neighbour."""


def neighbour_priority(
    labels: torch.Tensor,
    offsets: torch.Tensor,
    ids: torch.Tensor,
    positions: torch.Tensor,
    rows: int,
    *,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists in CSR form → for each of `rows` rows, its best place in the lists of `labels` and in how many it is.

    labels: int64 (U,), each once. List y is ids[offsets[y]:offsets[y + 1]] (int32, rows) with positions (int16 or int32);
    offsets int32 or int64. Both results are int32 (rows,); the first is FAR where the second is 0."""
    for name, tensor, allowed in (
        ("labels", labels, (torch.int64,)),
        ("offsets", offsets, (torch.int32, torch.int64)),
        ("ids", ids, (torch.int32,)),
        ("positions", positions, (torch.int16, torch.int32)),
    ):
        if tensor.dim() != 1 or tensor.dtype not in allowed:
            raise ValueError(
                f"neighbour_priority: {name} must be 1-D {' or '.join(map(str, allowed))}, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )
    if ids.shape != positions.shape:
        raise ValueError(f"neighbour_priority: {ids.numel()} ids but {positions.numel()} positions")
    arguments = (labels, offsets, ids, positions, rows)
    found: tuple[torch.Tensor, torch.Tensor] = choose("neighbour_priority", impl, labels.device, *arguments).run(
        *arguments
    )
    return found


def smallest_keys(
    priority: torch.Tensor, count: int, hard: int, *, seed: int, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` of the rows of priority (N,) int32, ascending (int64), and which of them were chosen by priority (bool).

    By priority: the `hard` smallest (fewer where the others are FAR), ties to the smaller row. The rest is drawn uniformly from
    the rows that are left, by `seed` (64 bits), the same with every implementation and on every device."""
    if priority.dim() != 1 or priority.dtype != torch.int32:
        raise ValueError(
            f"smallest_keys: priority must be 1-D int32, got {priority.dtype} of shape {tuple(priority.shape)}"
        )
    if not 0 <= hard <= count <= priority.numel():
        raise ValueError(f"smallest_keys: 0 ≤ hard={hard} ≤ count={count} ≤ {priority.numel()} rows must hold")
    found: tuple[torch.Tensor, torch.Tensor] = choose(
        "smallest_keys", impl, priority.device, priority, count, hard
    ).run(priority, count, hard, seed)
    return found


for _name in ("reference", "torch"):  # on a GPU the definition is what torch does best
    register("neighbour_priority", _name)(_reference.neighbour_priority)
    register("smallest_keys", _name)(_reference.smallest_keys)
