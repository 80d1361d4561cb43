"""The optimizer that a configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from opencoder.config import OptimConfig
from opencoder.parallel.mesh import Mesh

from .base import Optimizer
from .optimizer import ReplicatedOptimizer
from .sharded import ShardedOptimizer


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    config: OptimConfig,
    mesh: Mesh,
    *,
    sharded: bool,
    modules: Sequence[nn.Module] = (),
) -> Optimizer:
    """`sharded`: split over the data-parallel ranks. `modules`: the models that `parameters` belong to, all of this rank."""
    if sharded:
        return ShardedOptimizer(parameters, config, mesh, modules=modules)
    return ReplicatedOptimizer(parameters, config, mesh)
