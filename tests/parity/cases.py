"""The layouts that must equal one process, and the batch they see. A layout that becomes possible adds a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

from opencoder.data.loader import MicroBatch
from tests.model.cases import FULL, SMALL, batch

PIPE: dict[str, Any] = {**SMALL, "layers": 6}
"""Enough layers for several stages on a rank."""
SAMPLES, LENGTH = 8, 64
"""Of the global batch. The share of masked labels differs from sample to sample."""


@dataclass(frozen=True)
class Case:
    """One layout over `world` processes."""

    world: int
    base: dict[str, Any] = field(default_factory=lambda: FULL)
    """Model settings, as in ModelConfig."""
    micro_batch: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    """As in ParallelConfig."""
    documents: bool = False
    """Samples are cut in documents that do not see one another."""
    z_loss: float = 0.0
    recompute: str = "none"
    """As train.recompute."""
    targets: tuple[tuple[int, ...], ...] | None = None
    """Of each sample the positions whose labels count, none for samples beyond these; None: as `batch` masks them."""

    @property
    def truth(self) -> Case:
        """The same model and batch in one process, whole."""
        return Case(1, self.base, SAMPLES, documents=self.documents, z_loss=self.z_loss, targets=self.targets)


CASES: dict[str, Case] = {
    "micro-batches": Case(1),
    "tp2": Case(2, micro_batch=8, parallel={"tp": 2}),
    "dp2": Case(2, micro_batch=4),
    "tp2-tied": Case(2, {**SMALL, "tie_embeddings": True}, 2, {"tp": 2}),
    "dp2-documents": Case(2, SMALL, 2, documents=True),
    "tp2-dp2": Case(4, micro_batch=2, parallel={"tp": 2}),
    "dp4": Case(4, SMALL),
    "tp4": Case(4, {**SMALL, "kv_heads": 4}, 4, {"tp": 4}),
    "tp2-dp2-documents": Case(4, SMALL, 2, {"tp": 2}, documents=True),
    "dp2-sharded": Case(2, micro_batch=2, parallel={"sharded_optimizer": True}),
    "dp4-sharded": Case(4, SMALL, parallel={"sharded_optimizer": True}),
    "dp2-tp2-sharded": Case(4, SMALL, 2, {"tp": 2, "sharded_optimizer": True}, documents=True),
    "tp2-sp": Case(2, micro_batch=4, parallel={"tp": 2, "sequence_parallel": True}),
    "tp2-sp-documents": Case(2, SMALL, 2, {"tp": 2, "sequence_parallel": True}, documents=True),
    "tp2-dp2-sp": Case(4, {**SMALL, "tie_embeddings": True}, 2, {"tp": 2, "sequence_parallel": True}, documents=True),
    "tp4-sp": Case(4, {**SMALL, "kv_heads": 4}, 1, {"tp": 4, "sequence_parallel": True}),
    "tp4-kv2": Case(4, SMALL, 4, {"tp": 4}, documents=True),
    "tp4-kv1-sp": Case(4, {**SMALL, "kv_heads": 1}, 2, {"tp": 4, "sequence_parallel": True}),
    "tp2-no-overlap": Case(2, SMALL, 4, {"tp": 2, "overlap": False}, documents=True),
    "tp2-sp-no-overlap": Case(2, SMALL, 4, {"tp": 2, "overlap": False, "sequence_parallel": True}),
    "tp2-sp-z-loss": Case(2, SMALL, 2, {"tp": 2, "sequence_parallel": True}, z_loss=1e-2),
    "tp2-dp2-kv1": Case(4, {**SMALL, "kv_heads": 1}, 2, {"tp": 2}),
    "cp2": Case(2, micro_batch=4, parallel={"cp": 2}, documents=True),
    "cp2-dense": Case(2, SMALL, 2, {"cp": 2}),
    "cp2-tp2": Case(4, micro_batch=2, parallel={"cp": 2, "tp": 2}, documents=True),
    "cp2-dp2": Case(4, SMALL, 2, {"cp": 2}, documents=True),
    "cp2-ulysses": Case(2, SMALL, 2, {"cp": 2, "context_attention": "ulysses"}, documents=True),
    "cp2-tp2-ulysses": Case(
        4, micro_batch=2, parallel={"cp": 2, "tp": 2, "context_attention": "ulysses"}, documents=True
    ),
    "cp2-tp2-sp": Case(4, SMALL, 2, {"cp": 2, "tp": 2, "sequence_parallel": True}, documents=True),
    "cp2-tp4-kv2": Case(8, SMALL, 4, {"cp": 2, "tp": 4}, documents=True),
    "cp4": Case(4, {**SMALL, "tie_embeddings": True}, 2, {"cp": 4}, documents=True),
    "cp4-ulysses": Case(4, SMALL, 4, {"cp": 4, "context_attention": "ulysses"}, documents=True),
    "cp2-tp2-dp2-sp": Case(8, SMALL, 2, {"cp": 2, "tp": 2, "sequence_parallel": True}, documents=True),
    "pp2": Case(2, micro_batch=2, parallel={"pp": 2, "layout": [5, 3]}),
    "pp2-documents": Case(2, SMALL, 2, {"pp": 2}, documents=True),
    "pp2-tp2": Case(4, SMALL, 2, {"pp": 2, "tp": 2}, documents=True),
    "pp2-dp2": Case(4, SMALL, 1, {"pp": 2}, documents=True),
    "pp2-tp2-sp": Case(4, SMALL, 2, {"pp": 2, "tp": 2, "sequence_parallel": True}, documents=True),
    "pp2-interleaved": Case(2, micro_batch=2, parallel={"pp": 2, "virtual_stages": 2, "schedule": "interleaved"}),
    "pp2-zb": Case(2, PIPE, 1, {"pp": 2, "virtual_stages": 2, "schedule": "zb"}, documents=True),
    "pp2-zbv": Case(2, micro_batch=2, parallel={"pp": 2, "virtual_stages": 2, "schedule": "zbv"}),
    "pp2-tp2-zbv": Case(4, PIPE, 2, {"pp": 2, "tp": 2, "virtual_stages": 2, "schedule": "zbv"}, documents=True),
    "pp4-interleaved": Case(4, PIPE, 1, {"pp": 4, "virtual_stages": 2, "schedule": "interleaved"}, documents=True),
    "pp2-dp2-sharded": Case(4, PIPE, 1, {"pp": 2, "sharded_optimizer": True}, documents=True),
    "pp2-dp2-sharded-zbv": Case(
        4, PIPE, 1, {"pp": 2, "virtual_stages": 2, "schedule": "zbv", "sharded_optimizer": True}, documents=True
    ),
    "pp2-tied": Case(2, {**SMALL, "tie_embeddings": True}, 2, {"pp": 2}, documents=True),
    "pp2-zbv-tied": Case(
        2, {**PIPE, "tie_embeddings": True}, 2, {"pp": 2, "virtual_stages": 2, "schedule": "zbv"}, documents=True
    ),
    "pp4-interleaved-tied": Case(
        4, {**PIPE, "tie_embeddings": True}, 1, {"pp": 4, "virtual_stages": 2, "schedule": "interleaved"}
    ),
    "pp2-tp2-dp2-sharded-tied": Case(
        8,
        {**SMALL, "tie_embeddings": True},
        1,
        {"pp": 2, "tp": 2, "sequence_parallel": True, "sharded_optimizer": True},
    ),
    "pp2-dp2-sharded-zbv-tied": Case(
        4,
        {**PIPE, "tie_embeddings": True},
        1,
        {"pp": 2, "virtual_stages": 2, "schedule": "zbv", "sharded_optimizer": True},
    ),
    "pp2-cp2": Case(4, PIPE, 2, {"pp": 2, "cp": 2}, documents=True),
    "pp2-cp2-zbv": Case(4, PIPE, 2, {"pp": 2, "cp": 2, "virtual_stages": 2, "schedule": "zbv"}, documents=True),
    "pp2-tp2-zb-sp": Case(
        4, PIPE, 2, {"pp": 2, "tp": 2, "virtual_stages": 2, "schedule": "zb", "sequence_parallel": True}, z_loss=1e-2
    ),
    "cp2-tp2-kv1-sp": Case(
        4, {**SMALL, "kv_heads": 1}, 2, {"cp": 2, "tp": 2, "sequence_parallel": True}, documents=True
    ),
    "dp2-tp2-sharded-sp": Case(
        4, SMALL, 2, {"tp": 2, "sequence_parallel": True, "sharded_optimizer": True}, documents=True
    ),
}


SCHEDULES: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "interleaved": {"schedule": "interleaved", "virtual_stages": 2},
    "zb": {"schedule": "zb", "virtual_stages": 2},
    "zbv": {"schedule": "zbv", "virtual_stages": 2},
}


def product_of_axes(ranks: int = 8) -> dict[str, Case]:
    """{tp, pp, cp, dp: 1 or 2} of at most so many ranks, with and without sequence parallelism, under every schedule."""
    found: dict[str, Case] = {}
    for tp, pp, cp, dp in product((1, 2), repeat=4):
        world = tp * pp * cp * dp
        if not 1 < world <= ranks:
            continue
        sizes = {"tp": tp, "pp": pp, "cp": cp}
        name = "-".join(f"{axis}2" for axis, size in {**sizes, "dp": dp}.items() if size > 1)
        for sp in (False, True)[:tp]:
            for schedule, settings in SCHEDULES.items() if pp > 1 else [("", {})]:
                parallel = {**sizes, "sequence_parallel": sp, **settings}
                full_name = "-".join(filter(None, [name, "sp" if sp else "", schedule]))
                found[full_name] = Case(world, {**SMALL, "layers": 4}, 1, parallel, documents=True)
    return found


def micro_batches(case: Case, vocab: int, dp_rank: int, dp_size: int, *, seed: int = 0) -> list[MicroBatch]:
    """This rank's share of a global batch, cut as the loader cuts it (data/loader.py)."""
    tokens, labels = batch(vocab, SAMPLES, LENGTH, seed=seed)
    if case.targets is not None:
        labels = _counted_alone(tokens, case.targets)
    b = case.micro_batch
    found = []
    for begin in range(dp_rank * b, SAMPLES, b * dp_size):
        rows = slice(begin, begin + b)
        bounds, longest = (_bounds(range(begin, begin + b)), LENGTH) if case.documents else (None, None)
        found.append(MicroBatch(tokens[rows], labels[rows], bounds, longest))
    return found


def _counted_alone(tokens: torch.Tensor, targets: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """The next token at the positions of `targets`, elsewhere −100."""
    labels = torch.full_like(tokens, -100)
    for sample, positions in enumerate(targets):
        for at in positions:
            labels[sample, at] = tokens[sample, (at + 1) % LENGTH]
    return labels


def _bounds(samples: range) -> torch.Tensor:
    """Sample i of the global batch is cut at positions of its own; sample 0 is one document."""
    bounds = [0]
    for at, sample in enumerate(samples):
        inner = sorted({(7 * sample * k) % LENGTH for k in range(1, 4)} - {0})
        bounds += [at * LENGTH + position for position in (*inner, LENGTH)]
    return torch.tensor(bounds, dtype=torch.int32)
