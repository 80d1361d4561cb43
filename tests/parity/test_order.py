"""What a step is made of does not depend on the layout: the samples, their order, and the loss whatever the micro-batch size."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from opencoder.config import Config, OptimConfig
from opencoder.data.indexed import IndexedWriter
from opencoder.data.loader import MicroBatch
from opencoder.parallel.mesh import Group, Mesh, create_mesh
from opencoder.train.data import TrainingData, plan_stages
from tests.harness import run_cases
from tests.model.cases import SMALL
from tests.parity.cases import Case, micro_batches
from tests.parity.update import TOLERANCE, build

STEPS, BATCH, MICRO = 5, 8, 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {}, "tp2-dp2": {"tp": 2}, "pp2-dp2": {"pp": 2}, "cp2-dp2": {"cp": 2}, "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-cp2": {"tp": 2, "cp": 2}, "tp4": {"tp": 4},
}  # fmt: skip
"""Of four ranks."""
Digests = dict[int, list[list[str]]]
"""Data-parallel rank → step → digest of each micro-batch."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A blend of two datasets, documents masked, fill-in-the-middle on, two stages."""
    folder = tmp_path_factory.mktemp("data")
    for i, name in enumerate("ab"):
        with IndexedWriter(folder / name, np.uint16) as writer:
            for j in range(60):
                writer.add_document([(7 * i + 3 * j + k) % 240 for k in range(20 + j % 30)])
    blend = [{"prefix": str(folder / "a"), "weight": 3}, {"prefix": str(folder / "b"), "weight": 1}]
    return {
        "run_dir": str(folder / "run"),
        "model": SMALL,
        "data": {
            "blend": blend, "seq_len": 32, "document_mask": True, "split": "100,0,0",
            "fim": {"rate": 0.5, "ids": [247, 248, 249]},
            "stages": [{"from_step": 3, "blend": blend[1:]}],
        },
        "train": {"steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": MICRO},
    }  # fmt: skip


def digest(mb: MicroBatch) -> str:
    parts = [mb.tokens.numpy(), mb.labels.numpy()]
    assert mb.cu_seqlens is not None
    return hashlib.sha256(b"".join(part.tobytes() for part in [*parts, mb.cu_seqlens.numpy()])).hexdigest()


def digests(tree: dict[str, Any], mesh: Mesh, workers: int, step: int = 0) -> list[list[str]]:
    """Of the micro-batches that the trainer of this rank gets from `step` on."""
    config = Config.model_validate({**tree, "data": {**tree["data"], "workers": workers}})
    data = TrainingData(config, plan_stages(config), mesh, step=step)
    return [[digest(mb) for mb in batch] for _, batch in data.batches(step)]


def on_rank(rank: int, world: int, tree: dict[str, Any], layout: dict[str, int], step: int) -> tuple[int, Any]:
    mesh = create_mesh(**layout)
    return mesh.dp.rank, digests(tree, mesh, 0, step)


def global_order(of_ranks: Digests) -> list[list[str]]:
    """Step → digests in the order of the global batch."""
    size = len(of_ranks)
    return [
        [of_ranks[rank][step][m] for m in range(BATCH // MICRO // size) for rank in range(size)]
        for step in range(len(of_ranks[0]))
    ]


def test_every_layout_and_number_of_workers_reads_the_same_batches(tree: dict[str, Any]) -> None:
    truth = digests(tree, Mesh(), 0)
    assert [len(step) for step in truth] == [BATCH // MICRO] * STEPS
    assert len({each for step in truth for each in step}) == STEPS * BATCH // MICRO
    cases = {f"{name} from {step}": (tree, layout, step) for name, layout in LAYOUTS.items() for step in (0, 2)}
    for name, ranks in run_cases(on_rank, 4, cases).items():
        per_rank: Digests = dict(ranks)
        assert all(found == per_rank[dp_rank] for dp_rank, found in ranks), name  # equal over tp, pp and cp
        assert global_order(per_rank) == truth[int(name[-1]) :], name


@pytest.mark.parametrize("dp", [1, 2])
def test_workers_change_nothing(dp: int, tree: dict[str, Any]) -> None:
    meshes = [Mesh(dp=Group(dp, rank)) for rank in range(dp)]  # ranks of the harness may not start processes
    assert global_order({m.dp.rank: digests(tree, m, 2) for m in meshes}) == digests(tree, Mesh(), 0)


# ---- micro-batches ----

BASE = {**SMALL, "layers": 4}
SIZES = {
    "one": {}, "cp2": {"cp": 2}, "pp2": {"pp": 2}, "pp2-zbv": {"pp": 2, "virtual_stages": 2, "schedule": "zbv"},
}  # fmt: skip


def numbers(rank: int, world: int, case: Case) -> list[float]:
    """Evaluation, loss, norm, and evaluation after the update."""
    config, mesh, _, _, step = build(case, OptimConfig())
    batch = micro_batches(case, config.vocab_size, mesh.dp.rank, mesh.dp.size)
    before = step.evaluate([batch])
    result = step.update(batch, lr=1e-2)
    return [float(x) for x in (before, result.loss, result.grad_norm, step.evaluate([batch]))]


def test_the_loss_does_not_depend_on_the_micro_batch_size() -> None:
    cases = {
        f"{name} {size}": (Case(1 if name == "one" else 2, BASE, size, parallel, documents=True),)
        for name, parallel in SIZES.items()
        for size in (1, 2, 4, 8)
        if not (parallel.get("pp") and size == 8)  # fewer micro-batches than stages
    }
    alone = {name: case for name, case in cases.items() if name.startswith("one")}
    found = run_cases(numbers, 1, alone) | run_cases(numbers, 2, {n: c for n, c in cases.items() if n not in alone})
    truth = found["one 8"][0]
    assert len(found) == 4 + 4 + 3 + 3
    for name, ranks in found.items():
        assert ranks == [pytest.approx(truth, rel=TOLERANCE)] * len(ranks), name
