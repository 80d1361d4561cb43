"""Packed rows against the plain loop: one conversation after another through the model, without packing, padding or a mask."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from opencoder.config import OptimConfig
from opencoder.data.loader import BatchLoader
from opencoder.data.sft import Packing, SftBlend, build_sft_dataset
from opencoder.model.decoder import Decoder, named_parameters
from opencoder.parallel.placement import placement_of
from tests.harness import run_cases
from tests.model.cases import SMALL
from tests.parity.cases import LENGTH, Case
from tests.parity.update import TOLERANCE, Outcome, build, errors, worst_of
from tests.posttrain.cases import conversations, labels_of, write

SETTINGS = OptimConfig(clip_norm=None, lr=1e-3, betas=(0.0, 0.0), eps=1.0)
"""The first moment is the gradient."""
ROWS = 8
PAIRS = conversations(33, longest=50, seed=5)
LAYOUTS = {
    "one process": Case(1, SMALL, 2),
    "dp2": Case(2, SMALL, 2),
    "tp2-sp": Case(2, SMALL, 4, {"tp": 2, "sequence_parallel": True}),
    "cp2": Case(2, SMALL, 4, {"cp": 2}),
    "cp2-ulysses": Case(2, SMALL, 4, {"cp": 2, "context_attention": "ulysses"}),
    "pp2": Case(2, SMALL, 2, {"pp": 2}),
}


def rows(prefix: str) -> SftBlend:
    return build_sft_dataset([(prefix, 1.0)], num_rows=ROWS, seq_len=LENGTH, seed=3, packing=Packing(epochs=1))


def packed(rank: int, world: int, case: Case, prefix: str) -> Outcome:
    """One update on the rows, at a layout."""
    _, mesh, model, optimizer, step = build(case, SETTINGS)
    loader = BatchLoader(
        rows(prefix),
        global_batch_size=ROWS,
        micro_batch_size=case.micro_batch,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
        document_mask=True,
    )
    result = step.update(next(iter(loader)), lr=1e-3)
    state, parameters = optimizer.state_tensors(), named_parameters(model)
    return Outcome(
        {"loss": float(result.loss), "norm": float(result.grad_norm), "targets": float(result.targets)},
        {key: state[f"optim.exp_avg.{key}"][0] for key in parameters},
        {},
        {key: placement_of(p).slice_of(mesh) for key, p in parameters.items()},
    )


def plain(rank: int, world: int, case: Case) -> Outcome:
    """The loop."""
    model = build(case, SETTINGS).model
    assert isinstance(model, Decoder)
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for pair in PAIRS:
        inputs, labels = (torch.tensor(part)[None] for part in labels_of(pair))
        total = total + cross_entropy(model(inputs)[0], labels[0], ignore_index=-100, reduction="sum")
        count += int((labels >= 0).sum())
    (total / count).backward()  # type: ignore[no-untyped-call]
    parameters = named_parameters(model)
    gradients = {key: p.grad for key, p in parameters.items() if p.grad is not None}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    return Outcome(
        {"loss": float(total.detach() / count), "norm": float(norm), "targets": float(count)}, gradients, {}, {}
    )


def test_packed_updates_equal_the_plain_loop(tmp_path: Path) -> None:
    prefix = str(write(tmp_path / "a", PAIRS))
    filled = len(rows(prefix).members[0])
    assert ROWS - 2 < filled < ROWS, filled  # the last row is empty
    (expected,) = run_cases(plain, 1, {"": (Case(1, SMALL),)})[""]
    found: dict[str, list[Outcome]] = {}
    for world in (1, 2):
        chosen = {name: (case, prefix) for name, case in LAYOUTS.items() if case.world == world}
        found |= run_cases(packed, world, chosen)
    for name, outcomes in found.items():
        worst = worst_of([errors(each, expected) for each in outcomes], set(expected.gradients))
        assert max(worst.values()) < TOLERANCE, (name, worst)
