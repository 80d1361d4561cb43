"""Runs a layout through the trainer's own step, and compares what came out with one process.

`python -m tests.parity.run [NAME…]` prints the largest errors of every layout."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from typing import Any, NamedTuple

import torch

from opencoder.config import OptimConfig, ParallelConfig
from opencoder.model.decoder import Decoder, Part, named_parameters
from opencoder.model.initialise import build_model
from opencoder.optim.build import build_optimizer
from opencoder.parallel.mesh import create_mesh, kv_replicas_of
from opencoder.parallel.placement import placement_of
from opencoder.train.pipeline_runner import Chunks, PipelineRunner, build_chunks, models_of
from opencoder.train.step import TrainStep
from tests.harness import run_cases
from tests.model.cases import model_config
from tests.parity.cases import CASES, LENGTH, Case, micro_batches

CPU = torch.device("cpu")
LR = 1e-3


class Outcome(NamedTuple):
    """One rank's view of one optimizer update."""

    numbers: dict[str, float]
    """loss, norm, clip, targets."""
    gradients: dict[str, torch.Tensor]
    """Clipped, this rank's parts: AdamW's first moment with β = 0."""
    weights: dict[str, torch.Tensor]
    """After the update, this rank's parts."""
    parts: dict[str, tuple[slice, ...]]
    """Where these stand in the whole tensors."""
    intervals: dict[str, tuple[int, int]] | None = None
    """Where the gradients that are flat stand in their flattened part."""


def one_update(rank: int, world: int, case: Case, dtype: torch.dtype = torch.float64) -> Outcome:
    """One update of a fresh model at the layout of `case`, with a norm that clips."""
    config = model_config(case.base)
    parallel = ParallelConfig.model_validate(case.parallel)
    replicas = kv_replicas_of(config.kv_heads, parallel.tp)
    mesh = create_mesh(tp=parallel.tp, pp=parallel.pp, cp=parallel.cp, kv_replicas=replicas)

    def build(part: Part | None = None) -> Decoder:
        return build_model(
            config, mesh, dtype=dtype, device=CPU, seed=3, part=part, parallel=parallel, z_loss=case.z_loss
        )

    model = build_chunks(config, parallel, mesh, seq_len=LENGTH, build=build) if mesh.pp.size > 1 else build()
    # With β = (0, 0) the first moment is the clipped gradient itself. AdamW's update would then be the gradient's sign, whose
    # weights say nothing of it: eps far above the gradients makes the update proportional to them instead.
    settings = OptimConfig(clip_norm=0.1, lr=LR, betas=(0.0, 0.0), eps=1.0)
    sharded = case.parallel.get("sharded_optimizer", False)
    optimizer = build_optimizer(named_parameters(model), settings, mesh, sharded=sharded, modules=models_of(model))
    runner = PipelineRunner(model, optimizer, mesh, parallel, device=CPU) if isinstance(model, Chunks) else None
    step = TrainStep(model, optimizer, mesh, device=CPU, runner=runner)
    result = step.update(micro_batches(case, config.vocab_size, mesh.dp.rank, mesh.dp.size), lr=LR)
    state = optimizer.state_tensors()
    names = {"loss": result.loss, "norm": result.grad_norm, "clip": result.clip, "targets": result.targets}
    parameters = named_parameters(model)
    moments = {key: state[f"optim.exp_avg.{key}"] for key in parameters}
    return Outcome(
        {name: float(value) for name, value in names.items()},
        {key: part[0] for key, part in moments.items()},
        {key: p.detach() for key, p in parameters.items()},
        {key: placement_of(p).slice_of(mesh) for key, p in parameters.items()},
        {key: part[2] for key, part in moments.items() if len(part) == 3},
    )


def errors(found: Outcome, truth: Outcome) -> dict[str, float]:
    """Relative errors: of each number, and of each tensor as ‖a − b‖ / ‖b‖, named `gradient <key>` and `weight <key>`."""
    intervals = found.intervals or {}
    result = {name: abs(value / truth.numbers[name] - 1) for name, value in found.numbers.items()}
    for what, ours, theirs in (
        ("gradient", found.gradients, truth.gradients),
        ("weight", found.weights, truth.weights),
    ):
        for key, tensor in ours.items():
            whole = theirs[key][found.parts[key]].double()
            if what == "gradient" and key in intervals:
                whole = whole.flatten()[slice(*intervals[key])]
                if not whole.numel():
                    continue
            result[f"{what} {key}"] = float((tensor.double() - whole).norm() / whole.norm())
    return result


def worst(outcomes: list[Outcome], truth: Outcome) -> dict[str, float]:
    """The largest error of each quantity over the ranks. Raises AssertionError if a parameter is on no rank."""
    return _worst([errors(outcome, truth) for outcome in outcomes], set(truth.gradients))


def _worst(per_rank: list[dict[str, float]], keys: set[str]) -> dict[str, float]:
    names = {name for found in per_rank for name in found}
    absent = {f"gradient {key}" for key in keys} - names
    assert not absent, f"no rank holds {sorted(absent)}"
    # A number that is not finite is the worst there is, and max() would not say so.
    return {
        name: max(e if math.isfinite(e) else math.inf for e in (found[name] for found in per_rank if name in found))
        for name in sorted(names)
    }


def _save_truth(rank: int, world: int, case: Case, file: str) -> list[str]:
    """One process' outcome into a file; its keys."""
    truth = one_update(rank, world, case)
    torch.save(truth._asdict(), file)
    return list(truth.gradients)


def _errors_against(rank: int, world: int, case: Case, dtype: torch.dtype, file: str) -> dict[str, float]:
    """Errors of this rank. Compared here: the tensors of all ranks and layouts would be gigabytes."""
    return errors(one_update(rank, world, case, dtype), Outcome(**torch.load(file, mmap=True, weights_only=False)))


def run_all(cases: dict[str, Case], *, dtype: torch.dtype = torch.float64) -> dict[str, dict[str, float]]:
    """Name of a layout → its `worst` errors. Layouts of one size share their processes."""
    truths = list({repr(case.truth): case.truth for case in cases.values()}.items())
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: os.path.join(folder, f"{i}.pt") for i, (name, _) in enumerate(truths)}
        keys = run_cases(_save_truth, 1, {name: (case, files[name]) for name, case in truths}, timeout_s=600)
        for world in sorted({case.world for case in cases.values()}):
            chosen = {n: (c, dtype, files[repr(c.truth)]) for n, c in cases.items() if c.world == world}
            found |= run_cases(_errors_against, world, chosen, timeout_s=600)
    return {name: _worst(found[name], set(keys[repr(case.truth)][0])) for name, case in cases.items()}


def main(names: list[str]) -> None:
    """Print the table."""
    table = run_all({name: case for name, case in CASES.items() if not names or name in names})
    print(f"{'layout':22} {'loss':>9} {'norm':>9} {'clip':>9}  worst gradient")
    for name, found in table.items():
        key = max((k for k in found if k.startswith("gradient ")), key=found.__getitem__)
        numbers = " ".join(f"{found[k]:9.1e}" for k in ("loss", "norm", "clip"))
        print(f"{name:22} {numbers}  {found[key]:.1e} {key.removeprefix('gradient ')}")


if __name__ == "__main__":
    main(sys.argv[1:])
