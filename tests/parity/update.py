"""Runs a layout through the trainer's own step, and compares what came out with one process."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opencoder.checkpoint import native
from opencoder.config import Config, ModelConfig, OptimConfig, ParallelConfig
from opencoder.model.decoder import Decoder, Part, named_parameters
from opencoder.model.initialise import build_model
from opencoder.optim.base import Optimizer
from opencoder.optim.build import build_optimizer
from opencoder.parallel.mesh import Mesh, create_mesh, kv_replicas_of
from opencoder.parallel.placement import placement_of
from opencoder.train.pipeline_runner import Chunks, PipelineRunner, build_chunks, models_of
from opencoder.train.state import tensors_of
from opencoder.train.step import TrainStep
from tests.harness import run_cases
from tests.model.cases import model_config
from tests.parity.cases import LENGTH, Case, micro_batches

CPU = torch.device("cpu")
LR = 1e-3
TOLERANCE = 1e-11
"""In fp64, of every relative error: design.md §6. What was measured is 1e-14 at most."""


class Outcome(NamedTuple):
    """One rank's view of one optimizer update."""

    numbers: dict[str, float]
    """loss, norm, clip, targets; evaluation: the loss after the update."""
    gradients: dict[str, torch.Tensor]
    """Clipped, this rank's parts: AdamW's first moment with β = 0."""
    weights: dict[str, torch.Tensor]
    """After the update, this rank's parts."""
    parts: dict[str, tuple[slice, ...]]
    """Where these stand in the whole tensors."""
    intervals: dict[str, tuple[int, int]] | None = None
    """Where the gradients that are flat stand in their flattened part."""


class Rank(NamedTuple):
    """One rank of a layout, ready to train a fresh model."""

    config: ModelConfig
    mesh: Mesh
    model: Decoder | Chunks
    optimizer: Optimizer
    step: TrainStep


def build(case: Case, settings: OptimConfig, dtype: torch.dtype = torch.float64) -> Rank:
    """This rank's share of the model of `case`, as the trainer builds it."""
    config = model_config(case.base)
    parallel = ParallelConfig.model_validate(case.parallel)
    replicas = kv_replicas_of(config.kv_heads, parallel.tp)
    mesh = create_mesh(tp=parallel.tp, pp=parallel.pp, cp=parallel.cp, kv_replicas=replicas)

    def build_part(part: Part | None = None) -> Decoder:
        return build_model(
            config,
            mesh,
            dtype=dtype,
            device=CPU,
            seed=3,
            recompute=case.recompute,
            part=part,
            parallel=parallel,
            z_loss=case.z_loss,
        )

    one_part = mesh.pp.size == 1
    model = build_part() if one_part else build_chunks(config, parallel, mesh, seq_len=LENGTH, build=build_part)
    optimizer = build_optimizer(
        named_parameters(model), settings, mesh, sharded=parallel.sharded_optimizer, modules=models_of(model)
    )
    runner = None
    if isinstance(model, Chunks):
        again = case.recompute != "none"
        runner = PipelineRunner(model, optimizer, mesh, parallel, device=CPU, recompute=again)
    return Rank(config, mesh, model, optimizer, TrainStep(model, optimizer, mesh, device=CPU, runner=runner))


# With β = (0, 0) the first moment is the clipped gradient itself. AdamW's update would then be the gradient's sign, whose weights
# say nothing of it: eps far above the gradients makes the update proportional to them instead.
SETTINGS = OptimConfig(clip_norm=0.1, lr=LR, betas=(0.0, 0.0), eps=1.0)


def one_update(rank: int, world: int, case: Case, dtype: torch.dtype = torch.float64) -> Outcome:
    """One update of a fresh model at the layout of `case`, with a norm that clips, and an evaluation after it."""
    config, mesh, model, optimizer, step = build(case, SETTINGS, dtype)
    batch = micro_batches(case, config.vocab_size, mesh.dp.rank, mesh.dp.size)
    result = step.update(batch, lr=LR)
    names = {"loss": result.loss, "norm": result.grad_norm, "clip": result.clip, "targets": result.targets}
    # In two batches of unequal size where there are enough micro-batches; it sees the weights of the update.
    names["evaluation"] = step.evaluate([part for part in (batch[:1], batch[1:]) if part])
    state = optimizer.state_tensors()
    parameters = named_parameters(model)
    moments = {key: state[f"optim.exp_avg.{key}"] for key in parameters}
    return Outcome(
        {name: float(value) for name, value in names.items()},
        {key: part[0] for key, part in moments.items()},
        {key: p.detach() for key, p in parameters.items()},
        {key: placement_of(p).slice_of(mesh) for key, p in parameters.items()},
        {key: part[2] for key, part in moments.items() if len(part) == 3},
    )


def save_update(rank: int, world: int, case: Case, folder: str) -> None:
    """The same update, and what a run saves after it."""
    config, mesh, model, optimizer, step = build(case, SETTINGS)
    step.update(micro_batches(case, config.vocab_size, mesh.dp.rank, mesh.dp.size), lr=LR)
    settings = Config.model_validate({"run_dir": folder, "model": case.base, "parallel": case.parallel})
    native.save(Path(folder), 1, tensors_of(model, optimizer), mesh, config=settings, state={"tokens": 0})


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
    return worst_of([errors(outcome, truth) for outcome in outcomes], set(truth.gradients))


def worst_of(per_rank: list[dict[str, float]], keys: set[str]) -> dict[str, float]:
    names = {name for found in per_rank for name in found}
    absent = {f"gradient {key}" for key in keys} - names
    assert not absent, f"no rank holds {sorted(absent)}"
    # A number that is not finite is the worst there is, and max() would not say so.
    return {
        name: max(e if math.isfinite(e) else math.inf for e in (found[name] for found in per_rank if name in found))
        for name in sorted(names)
    }


def save_truth(rank: int, world: int, case: Case, file: str) -> list[str]:
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
        keys = run_cases(save_truth, 1, {name: (case, files[name]) for name, case in truths}, timeout_s=600)
        for world in sorted({case.world for case in cases.values()}):
            chosen = {n: (c, dtype, files[repr(c.truth)]) for n, c in cases.items() if c.world == world}
            found |= run_cases(_errors_against, world, chosen, timeout_s=600)
    return {name: worst_of(found[name], set(keys[repr(case.truth)][0])) for name, case in cases.items()}
