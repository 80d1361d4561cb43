"""What runs again in the backward pass changes no gradient, and what it makes again is not kept."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from opencoder.config import OptimConfig, ParallelConfig, RecomputeConfig
from opencoder.model.decoder import Decoder, Part, RMSNorm, named_parameters
from opencoder.model.initialise import build_model
from opencoder.model.recompute import MODULES
from opencoder.optim.optimizer import ReplicatedOptimizer
from opencoder.parallel.mesh import Mesh, create_mesh
from opencoder.tools.bench_estimate import TensorPeak
from opencoder.train.pipeline_runner import Chunks, PipelineRunner, build_chunks
from opencoder.train.step import TrainStep
from tests.harness import run_cases
from tests.parity.cases import Case, micro_batches

from .cases import SMALL, batch, model_config

CPU = torch.device("cpu")
PAIRS = [RecomputeConfig(modules=["norm", *others]) for others in (["attention"], ["mlp"], ["attention", "mlp"])]
SETTINGS = [*MODULES, *PAIRS]


def gradients(
    recompute: Any, dtype: torch.dtype, change: Callable[[Decoder], Decoder] = lambda model: model
) -> dict[str, torch.Tensor]:
    model = change(build_model(model_config(), Mesh(), dtype=dtype, device=CPU, seed=1, recompute=recompute))
    tokens, labels = batch(250, 2, 16)
    model.loss(tokens, labels)[0].backward()
    return {key: p.grad for key, p in named_parameters(model).items() if p.grad is not None}


def same(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> bool:
    assert found.keys() == truth.keys()
    return all(torch.equal(found[key], truth[key]) for key in truth)


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("recompute", SETTINGS, ids=str)
def test_recompute_changes_nothing(recompute: Any, dtype: torch.dtype) -> None:
    assert same(gradients(recompute, dtype), gradients("none", dtype))


def with_norms_of_rounded_sums(model: Decoder) -> Decoder:
    """In the layers: the last norm is fused with its addition as ever."""

    def of(norm: RMSNorm) -> Callable[..., Any]:
        def forward(x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            return RMSNorm.forward(norm, x if residual is None else x + residual)

        return forward

    for name, module in model.named_modules():
        if isinstance(module, RMSNorm) and name != "norm":
            module.forward = of(module)  # type: ignore[method-assign]
    return model


@pytest.mark.fast
@pytest.mark.parametrize("recompute", ["norm", *PAIRS], ids=str)
def test_in_16_bits_norms_made_again_are_those_of_rounded_sums(recompute: Any) -> None:
    assert same(
        gradients(recompute, torch.bfloat16), gradients("none", torch.bfloat16, change=with_norms_of_rounded_sums)
    )


def peak(recompute: Any) -> int:
    """Most bytes of live tensors in a forward and backward pass, above what is there before it."""
    model = build_model(model_config(layers=6), Mesh(), dtype=torch.float64, device=CPU, seed=1, recompute=recompute)
    tokens, labels = batch(250, 4, 64)
    model.loss(tokens, labels)[0].backward()  # gradients are there from now on
    with TensorPeak() as tensors:
        model.loss(tokens, labels)[0].backward()
    return tensors.bytes


def test_the_peak_falls_with_what_runs_again() -> None:
    """All modules one by one keep no more than whole layers do, and make less of a layer at a time."""
    both = RecomputeConfig(modules=["norm", "mlp"])
    peaks = [peak(recompute) for recompute in ("none", "norm", "mlp", both, "full", PAIRS[-1])]
    assert all(lower < higher for higher, lower in pairwise(peaks)), peaks
    assert peak("attention") < peaks[0]
    assert peak(RecomputeConfig(modules=["full", "norm"])) == peaks[4]


def updated(rank: int, world: int, settings: dict[str, Any], recompute: str) -> dict[str, torch.Tensor]:
    """Gradients of an update at a layout."""
    parallel, config = ParallelConfig.model_validate(settings), model_config(layers=4)
    mesh = create_mesh(tp=parallel.tp, pp=parallel.pp)

    def build(part: Part | None = None) -> Decoder:
        return build_model(
            config,
            mesh,
            dtype=torch.float64,
            device=CPU,
            seed=3,
            recompute=recompute,
            part=part,
            parallel=parallel,
        )

    model = build_chunks(config, parallel, mesh, seq_len=64, build=build) if mesh.pp.size > 1 else build()
    optimizer = ReplicatedOptimizer(named_parameters(model), OptimConfig(betas=(0.0, 0.0), clip_norm=None), mesh)
    runner = PipelineRunner(model, optimizer, mesh, parallel, device=CPU) if isinstance(model, Chunks) else None
    step = TrainStep(model, optimizer, mesh, device=CPU, runner=runner)
    step.update(micro_batches(Case(1, SMALL, 2, documents=True), config.vocab_size, 0, 1), lr=1e-3)
    return {key: state["exp_avg"] for key, state in optimizer.state.items()}


def test_norms_made_again_change_nothing_over_ranks() -> None:
    """Under a schedule that splits the backward pass too, which other modules that run again keep together."""
    layouts: dict[str, dict[str, Any]] = {
        "tp": {"tp": 2},
        "sp": {"tp": 2, "sequence_parallel": True},
        "no overlap": {"tp": 2, "sequence_parallel": True, "overlap": False},
        "zb": {"pp": 2, "schedule": "zb"},
    }
    cases = {f"{name} {again}": (settings, again) for name, settings in layouts.items() for again in ("none", "norm")}
    found = run_cases(updated, 2, cases)
    for name in layouts:
        for ours, theirs in zip(found[f"{name} norm"], found[f"{name} none"], strict=True):
            assert same(ours, theirs), name
