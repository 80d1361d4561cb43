"""Every layout equals one process, in fp64: loss, gradient norm, clip factor and every parameter gradient, with loss
masks that differ between ranks and micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opencoder.config import OptimConfig
from opencoder.model.decoder import named_parameters
from opencoder.model.initialise import build_model
from opencoder.optim.optimizer import ReplicatedOptimizer
from opencoder.parallel.mesh import create_mesh
from opencoder.parallel.placement import placement_of
from tests.harness import run_ranks
from tests.model.cases import FULL, SMALL, batch, model_config

SAMPLES, LENGTH = 8, 64
TOLERANCE = 1e-11


def one_update(
    rank: int, world: int, tp: int, base: dict[str, Any], micro_batch: int, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Loss, gradient norm, clip factor, gradients and updated weights (this rank's parts) of one optimizer step."""
    config = model_config(base)
    mesh = create_mesh(tp=tp)
    model = build_model(config, mesh, dtype=dtype, device=torch.device("cpu"), seed=3)
    optimizer = ReplicatedOptimizer(named_parameters(model), OptimConfig(clip_norm=0.1, lr=1e-3), mesh)
    tokens, labels = batch(config.vocab_size, SAMPLES, LENGTH)
    step = micro_batch * mesh.dp.size
    shares = [
        slice(i + mesh.dp.rank * micro_batch, i + (mesh.dp.rank + 1) * micro_batch) for i in range(0, SAMPLES, step)
    ]
    count = model.lm_head.begin_step(labels[s] for s in shares)
    total = torch.zeros((), dtype=torch.float64)
    for share in shares:
        loss, _ = model.loss(tokens[share], labels[share])
        (loss / count).backward()
        total += loss.detach()
    norm = optimizer.finish_reduction()
    gradients = {k: p.grad.clone() for k, p in named_parameters(model).items()}
    clip = float(optimizer.step(lr=1e-3))
    loss = float(mesh.dp.all_reduce(total)) / count
    parts = {k: placement_of(p).slice_of(mesh) for k, p in named_parameters(model).items()}
    weights = {k: p.detach() for k, p in named_parameters(model).items()}
    return {
        "count": count,
        "loss": loss,
        "norm": float(norm),
        "clip": clip,
        "grads": gradients,
        "parts": parts,
        "weights": weights,
    }


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


LAYOUTS = [
    pytest.param(2, 2, FULL, 8, id="tp2"),
    pytest.param(2, 1, FULL, 4, id="dp2"),
    pytest.param(4, 2, FULL, 2, id="tp2-dp2"),
    pytest.param(4, 1, SMALL, 1, id="dp4"),
    pytest.param(4, 4, {**SMALL, "kv_heads": 4}, 4, id="tp4"),
    pytest.param(2, 2, {**SMALL, "tie_embeddings": True}, 2, id="tp2-tied"),
    pytest.param(1, 1, FULL, 1, id="micro-batches"),
]


@pytest.mark.parametrize(("world", "tp", "base", "micro_batch"), LAYOUTS)
def test_layout_equals_one_process(world: int, tp: int, base: dict[str, Any], micro_batch: int) -> None:
    truth = run_ranks(one_update, 1, 1, base, SAMPLES)[0]
    assert truth["clip"] < 1, "the case must clip"
    for result in run_ranks(one_update, world, tp, base, micro_batch):
        assert result["count"] == truth["count"]
        for name in ("loss", "norm", "clip"):
            assert abs(result[name] / truth[name] - 1) <= TOLERANCE, name
        for key, part in result["parts"].items():
            assert relative(result["grads"][key], truth["grads"][key][part]) <= TOLERANCE, key
            assert relative(result["weights"][key], truth["weights"][key][part]) <= TOLERANCE, key


def test_fp32_layouts_differ_by_no_more_than_fp32_noise() -> None:
    truth = run_ranks(one_update, 1, 1, SMALL, SAMPLES)[0]
    single = run_ranks(one_update, 1, 1, SMALL, SAMPLES, torch.float32)[0]
    noise = {k: relative(single["grads"][k], truth["grads"][k]) for k in truth["grads"]}
    for result in run_ranks(one_update, 4, 2, SMALL, 2, torch.float32):
        for key, part in result["parts"].items():
            error = relative(result["grads"][key], truth["grads"][key][part])
            assert error <= 4 * max(noise[key], max(noise.values())), (key, error, noise[key])
