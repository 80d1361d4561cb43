"""Checkpoints saved at one layout and loaded at another: `python -m tests.parity.reshard` prints the table of all pairs.

Weights, masters and optimizer state are filled with values drawn from their keys, so what must come back is known without
training. Each rank compares its parts bit by bit; so does a process that reads the whole checkpoint. Exit status 1 if one bit is
wrong."""

from __future__ import annotations

import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from opencoder.checkpoint import native
from opencoder.checkpoint.parts import Tensors
from opencoder.config import Config, OptimConfig
from opencoder.model.decoder import named_parameters
from opencoder.parallel.mesh import Mesh
from opencoder.train.state import tensors_of
from tests.harness import run_cases
from tests.model.cases import SMALL
from tests.parity.cases import Case
from tests.parity.update import build

BASE = {**SMALL, "layers": 4}  # two key/value heads: over tp 4 each stands on two ranks
V2 = {"pp": 2, "virtual_stages": 2}
ZERO = {"sharded_optimizer": True}
LAYOUTS: dict[str, Case] = {
    "one": Case(1, BASE),
    "tp2": Case(2, BASE, parallel={"tp": 2}),
    "tp2-dp2-zero": Case(4, BASE, parallel={"tp": 2, "sequence_parallel": True, **ZERO}),
    "pp2-uneven": Case(2, BASE, parallel={"pp": 2, "layout": [3, 1]}),
    "tp4-kv2": Case(4, BASE, parallel={"tp": 4}),
    "tp4-kv2-dp2-zero": Case(8, BASE, parallel={"tp": 4, **ZERO}),
    "zbv-uneven": Case(2, BASE, parallel={**V2, "schedule": "zbv", "layout": [2, 1, 1, 0]}),
    "cp2-zero": Case(2, BASE, parallel={"cp": 2, **ZERO}),
    "interleaved": Case(2, BASE, parallel={**V2, "schedule": "interleaved"}),
    "dp4-zero": Case(4, BASE, parallel=ZERO),
    "zb": Case(2, BASE, parallel={**V2, "schedule": "zb", "layout": [1, 2, 1, 0]}),
    "cp2-dp2": Case(4, BASE, parallel={"cp": 2}),
    "tp2-pp2": Case(4, BASE, parallel={"tp": 2, "pp": 2}),
    "zbv-dp2-zero": Case(4, BASE, parallel={**V2, "schedule": "zbv", **ZERO}),
    "tp2-pp2-dp2-zero": Case(8, BASE, parallel={"tp": 2, "pp": 2, "layout": [1, 3], **ZERO}),
}
Pair = tuple[str, str]
"""Layout that saves, layout that loads."""


def true_value(key: str, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
    """What the tensor `key` holds, whole."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def own_tensors(case: Case) -> tuple[Tensors, Mesh]:
    """All that a checkpoint of this rank holds, in 16 bits with fp32 masters and state."""
    _, mesh, model, optimizer, _ = build(case, OptimConfig(), torch.bfloat16)
    tensors = tensors_of(model, optimizer)
    assert len(tensors) == 4 * len(named_parameters(model))
    return tensors, mesh


def expected_parts(tensors: Tensors, mesh: Mesh) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Key, this rank's part, and what must stand there."""
    for key, part in tensors.items():
        placement = part[1]
        local = true_value(key, placement.global_shape, part[0].dtype)[placement.slice_of(mesh)]
        if len(part) == 3:
            local = local.flatten()[slice(*part[2])]
        yield key, part[0].detach(), local


def save(rank: int, world: int, case: Case, folder: str) -> None:
    """A checkpoint of the true values."""
    tensors, mesh = own_tensors(case)
    for _, part, value in expected_parts(tensors, mesh):
        part.copy_(value)
    config = Config.model_validate({"run_dir": folder, "model": case.base, "parallel": case.parallel})
    native.save(Path(folder), 1, tensors, mesh, config=config, state={"tokens": 0})


def load(rank: int, world: int, case: Case, folder: str) -> tuple[list[str], int]:
    """Keys whose part is not what it must be, and the number of values compared."""
    tensors, mesh = own_tensors(case)
    for part in tensors.values():
        part[0].detach().fill_(float("nan"))
    native.load_tensors(Path(folder) / "checkpoints" / "step_00000001", tensors, mesh)
    found = list(expected_parts(tensors, mesh))
    return [key for key, part, value in found if not torch.equal(part, value)], sum(v.numel() for _, _, v in found)


def load_whole(rank: int, world: int, folder: str) -> list[str]:
    """Keys of one process' model that the checkpoint does not hold as they must be."""
    tensors = {
        key: torch.empty(part[1].global_shape, dtype=part[0].dtype)
        for key, part in own_tensors(Case(1, BASE))[0].items()
    }
    native.load_whole(Path(folder) / "checkpoints" / "step_00000001", tensors)
    return [key for key, t in tensors.items() if not torch.equal(t, true_value(key, t.shape, t.dtype))]


def run_pairs(pairs: Iterable[Pair]) -> dict[Pair, list[str]]:
    """Pair → what is wrong after loading; (layout, "") → what is wrong in the checkpoint itself."""
    pairs = list(pairs)
    found: dict[Pair, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        writers = list(dict.fromkeys(a for a, _ in pairs))
        runs = {name: f"{folder}/{name}" for name in writers}
        _by_world(save, {name: (name, runs[name]) for name in writers})
        for name, ranks in run_cases(load_whole, 1, {name: (runs[name],) for name in writers}).items():
            found[name, ""] = ranks[0]
        loaded = _by_world(load, {(a, b): (b, runs[a]) for a, b in pairs})
    for pair, ranks in loaded.items():
        assert all(compared for _, compared in ranks), pair
        found[pair] = sorted({key for wrong, _ in ranks for key in wrong})
    return found


def _by_world(work: Any, asked: dict[Any, tuple[str, str]]) -> dict[Any, Any]:
    """`work` of every (layout, run folder); layouts of one size share their processes."""
    found: dict[Any, Any] = {}
    for world in sorted({LAYOUTS[layout].world for layout, _ in asked.values()}):
        chosen = {n: (LAYOUTS[layout], run) for n, (layout, run) in asked.items() if LAYOUTS[layout].world == world}
        found |= run_cases(work, world, chosen, timeout_s=500)
    return found


def main() -> int:
    """Print the table; the exit status."""
    found = run_pairs(product(LAYOUTS, LAYOUTS))
    keys = len(own_tensors(LAYOUTS["one"])[0])
    print(
        f"{keys} tensors, bit by bit; '=': all of them, a number: so many are wrong. Down: saved at, across: loaded at"
    )
    print(" " * 20 + " ".join(f"{i:>2}" for i in range(len(LAYOUTS))) + "  whole")
    for i, a in enumerate(LAYOUTS):
        row = " ".join(f"{len(found[a, b]) or '=':>2}" for b in (*LAYOUTS, ""))
        print(f"{i:>2} {a:17}{row}")
    wrong = [pair for pair, keys in found.items() if keys]
    print(f"{len(LAYOUTS) ** 2} pairs, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
