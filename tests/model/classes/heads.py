"""A class head on each rank, and the same layer in one process with torch's own loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from opencoder.config import HeadConfig, OptimConfig
from opencoder.model.classes import rows, scored
from opencoder.model.classes.head import ClassHead
from opencoder.parallel.mesh import Mesh, create_mesh
from opencoder.parallel.placement import placement_of

N, D, B = 1003, 32, 32
SGD = OptimConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.01)


def config(**keys: Any) -> HeadConfig:
    return HeadConfig(**{"kind": "class", "classes": N, "optimizer": "sgd", "permute": False, **keys})


def draw(seed: int = 0, classes: int = N, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Weight (N, D), inputs (B, D), backbone (D, D), labels (B,)."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, D, generator=g, dtype=torch.float64) * 0.3
    inputs = torch.randn(B, D, generator=g, dtype=torch.float64)
    backbone = torch.randn(D, D, generator=g, dtype=torch.float64) / D**0.5
    labels = torch.randint(classes, (B,), generator=g)
    return weight.to(dtype), inputs.to(dtype), backbone.to(dtype), labels


def head_on(
    mesh: Mesh, weight: torch.Tensor, head_config: HeadConfig, *, optim: OptimConfig = SGD, **more: Any
) -> ClassHead:
    """This rank's part of `weight` (N, D)."""
    head = ClassHead(head_config, mesh, dim=weight.shape[1], optim=optim, **more).to(weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight[placement_of(head.weight).slice_of(mesh)])
    return head


@contextmanager
def small_chunks() -> Iterator[None]:
    """Several chunks of a rank's rows, as there are of a real size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scored, "LEAST_ROWS", 64)
        patch.setitem(scored.CHUNK_ELEMENTS, "cpu", 64 * B)
        patch.setitem(rows.CHUNK_ELEMENTS, "cpu", 64 * D)
        yield


def mesh_of(rank: int, world: int, *, tp: int = 1) -> Mesh:
    return create_mesh(tp=tp) if world > 1 else Mesh()


def own(x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Samples of this rank."""
    return x.chunk(mesh.dp_cp.size)[mesh.dp_cp.rank]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


def reference(
    weight: torch.Tensor, inputs: torch.Tensor, backbone: torch.Tensor, labels: torch.Tensor, *, smoothing: float = 0.0
) -> tuple[torch.Tensor, ...]:
    """Mean loss over valid samples, gradients of the class matrix and of the backbone, in fp64 by torch's own means."""
    w, a = weight.double().clone().requires_grad_(), backbone.double().clone().requires_grad_()
    loss = F.cross_entropy(inputs.double() @ a @ w.t(), labels, label_smoothing=smoothing)
    return loss.detach(), *torch.autograd.grad(loss, (w, a))
