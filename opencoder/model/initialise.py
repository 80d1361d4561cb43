"""Initial weights that do not depend on the layout: every tensor is drawn from (seed, its key), in blocks of rows, and
each rank draws the blocks it holds."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn

from opencoder.config import ModelConfig, ParallelConfig, RecomputeConfig
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.placement import place, placement_of

from .decoder import Decoder, Part, named_parameters

BLOCK_ROWS = 1024
"""Rows per draw. Part of the definition of the initial weights: another number gives other weights for one seed."""


def build_model(
    config: ModelConfig,
    mesh: Mesh,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    recompute: str | RecomputeConfig = "none",
    part: Part | None = None,
    parallel: ParallelConfig | None = None,
    z_loss: float = 0.0,
) -> Decoder:
    """This rank's shards of the model, or of a `part` of it, with their initial weights."""
    with torch.device("meta"):
        model = Decoder(config, mesh, recompute=recompute, part=part, parallel=parallel, z_loss=z_loss)
    placements = {name: placement_of(p) for name, p in model.named_parameters()}
    model = model.to(dtype).to_empty(device=device)
    if config.tie_embeddings and model.part.last:
        # to_empty makes new parameters, one for each place a tied one stood in
        model.lm_head.weight = model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        place(parameter, placements[name])
    initialise(model, mesh, config, seed=seed)
    return model


@torch.no_grad()
def initialise(model: nn.Module, mesh: Mesh, config: ModelConfig, *, seed: int) -> None:
    """Norms to 1, matrices to N(0, std²) with the `std_of` each, drawn in fp32 so that a run in fp64 starts from the same numbers."""
    for key, parameter in named_parameters(model).items():
        placement, std = placement_of(parameter), std_of(key, config)
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        rows, columns = placement.slice_of(mesh)
        width = placement.global_shape[1]
        for block in range(rows.start // BLOCK_ROWS, -(-rows.stop // BLOCK_ROWS)):
            first = block * BLOCK_ROWS
            n = min(BLOCK_ROWS, placement.global_shape[0] - first)
            drawn = torch.randn(n, width, generator=_generator(seed, key, block), dtype=torch.float32) * std
            low, high = max(rows.start, first), min(rows.stop, first + n)
            parameter[low - rows.start : high - rows.start].copy_(drawn[low - first : high - first, columns])


def std_of(key: str, config: ModelConfig) -> float:
    """Standard deviation of the initial values of the matrix with this checkpoint key. Depth scaling, from GPT-2: 2·layers
    updates add up in the residual stream, and with it their sum has the size of one."""
    if config.init == "depth_scaled" and key.endswith((".o_proj.weight", ".down_proj.weight")):
        return config.init_std / math.sqrt(2 * config.layers)
    return config.init_std


def _generator(seed: int, key: str, block: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{key}:{block}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
