"""Losses of 20 updates at some layouts and in one process, with AdamW as a run has it, on two batches in turn: the loss falls by a
third, so it depends on every update before.

The bar is that of a single update. Rounding (1e-16 at the first step) grows, as AdamW divides by the root of the second moment:
5e-15 of the loss and 7e-14 of the norm were measured at step 20. A bar of 1e-9 would let a fault in a rarely used term pass."""

from __future__ import annotations

import torch

from opencoder.config import OptimConfig
from tests.harness import run_cases
from tests.model.cases import SMALL
from tests.parity.cases import Case, micro_batches
from tests.parity.update import build

STEPS = 20
BASE = {**SMALL, "layers": 4}
ZBV = {"virtual_stages": 2, "schedule": "zbv"}
LAYOUTS: dict[str, Case] = {
    "tp2-sp": Case(2, BASE, 2, {"tp": 2, "sequence_parallel": True}, documents=True),
    "pp2": Case(2, BASE, 2, {"pp": 2}, documents=True),
    "pp2-zbv": Case(2, BASE, 2, {"pp": 2, **ZBV}, documents=True),
    "cp2": Case(2, BASE, 4, {"cp": 2}, documents=True),
    "dp2-sharded": Case(2, BASE, 2, {"sharded_optimizer": True}, documents=True),
    "tp2-dp2-pp2": Case(8, BASE, 2, {"tp": 2, "pp": 2}, documents=True),
}


def losses(rank: int, world: int, case: Case) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    config, mesh, _, _, step = build(case, OptimConfig())
    found = []
    for i in range(STEPS):
        batch = micro_batches(case, config.vocab_size, mesh.dp.rank, mesh.dp.size, seed=i % 2)
        result = step.update(batch, lr=1e-2)
        found.append((float(result.loss), float(result.grad_norm)))
    return found


def run_steps(layouts: dict[str, Case]) -> tuple[list[float], dict[str, tuple[list[float], list[float]]]]:
    """Losses of one process; layout → largest relative errors over its ranks, of the loss and the norm of each step."""
    (truth,) = run_cases(losses, 1, {"": (next(iter(layouts.values())).truth,)})[""]
    expected = torch.tensor(truth, dtype=torch.float64)
    errors = {}
    for world in sorted({case.world for case in layouts.values()}):
        chosen = {name: (case,) for name, case in layouts.items() if case.world == world}
        for name, ranks in run_cases(losses, world, chosen, timeout_s=300).items():
            apart = (torch.tensor(ranks, dtype=torch.float64) / expected - 1).abs().amax(0)
            errors[name] = apart[:, 0].tolist(), apart[:, 1].tolist()
    return expected[:, 0].tolist(), errors
