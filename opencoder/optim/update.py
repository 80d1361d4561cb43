"""What an optimizer does to the values it owns, whether these are whole parameters or intervals of them: AdamW or SGD, with the
settings of each parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch.optim.sgd import sgd

from opencoder import kernels as K
from opencoder.config import OptimConfig
from opencoder.errors import ConfigError
from opencoder.parallel.placement import Placement

NO_DECAY_DIMS = 1
"""Parameters with at most this many dimensions in the whole model (norms, biases) get no weight decay."""
STATE_NAMES = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""State tensors of each parameter, by the name of the optimizer."""


class Settings(NamedTuple):
    """How a parameter is updated."""

    lr_scale: float
    """Times the schedule's rate."""
    weight_decay: float


class Piece(NamedTuple):
    """Values that are updated: a parameter, or an interval of its flattened form. All tensors have one shape."""

    parameter: torch.Tensor
    """What the model computes with."""
    master: torch.Tensor
    """fp32 copy of 16-bit ones; `parameter` itself if that is wide."""
    gradient: torch.Tensor
    state: Mapping[str, torch.Tensor]


def settings_of(key: str, placement: Placement, config: OptimConfig) -> Settings:
    """Settings of the parameter `key`: those of the first of `optim.groups` that matches. Decay depends on the shape in the
    whole model, not on that of a piece."""
    decay = config.weight_decay if len(placement.global_shape) > NO_DECAY_DIMS else 0.0
    for group in config.groups:
        if fnmatchcase(key, group.match):
            return Settings(group.lr_scale, decay if group.weight_decay is None else group.weight_decay)
    return Settings(1.0, decay)


def check_groups(config: OptimConfig, keys: Iterable[str]) -> None:
    """ConfigError for one of `optim.groups` that is the first match of no parameter; `keys`: those of the whole model."""
    keys = list(keys)
    for i, group in enumerate(config.groups):
        matched = [key for key in keys if fnmatchcase(key, group.match)]
        if not matched:
            raise ConfigError(
                f"optim.groups.{i}: match={group.match!r} matches no parameter: write it like the checkpoint keys, for "
                f"example {keys[-1]!r} or '*.mlp.*'"
            )
        earlier = [other.match for other in config.groups[:i]]
        if all(any(fnmatchcase(key, match) for match in earlier) for key in matched):
            raise ConfigError(
                f"optim.groups.{i}: all that match={group.match!r} matches belongs to a group before it, and the first that "
                "matches counts: put it before them"
            )


def with_others(norm: torch.Tensor, others_sq_norm: torch.Tensor | None) -> torch.Tensor:
    """Norm of all gradients: those of `norm` and others whose squared norm is given."""
    return norm if others_sq_norm is None else (norm.square() + others_sq_norm).sqrt()


def clip_factor(norm: torch.Tensor, config: OptimConfig) -> torch.Tensor:
    """What gradients of global norm `norm` are multiplied by, 0-dim; 1 without clipping."""
    if config.clip_norm is None:
        return torch.ones_like(norm)
    return (config.clip_norm / (norm + 1e-6)).clamp(max=1.0)


def update(
    pieces: Sequence[Piece],
    settings: Settings,
    config: OptimConfig,
    *,
    step: int,
    lr: float,
    clip: torch.Tensor | None,
    skip: torch.Tensor | None,
) -> None:
    """Update `pieces` in place, `step` counted from 1, gradients times `clip`; where `skip` is true nothing changes."""
    if not pieces:
        return
    apply = _adamw if config.name == "adamw" else _sgd
    apply(pieces, settings, config, step, lr * settings.lr_scale, clip, skip)


def _adamw(
    pieces: Sequence[Piece],
    settings: Settings,
    config: OptimConfig,
    step: int,
    lr: float,
    clip: torch.Tensor | None,
    skip: torch.Tensor | None,
) -> None:
    """The clip factor is applied on the way, so that gradients are read once and not written."""
    narrow = any(piece.parameter is not piece.master for piece in pieces)
    first, second = ([piece.state[name] for piece in pieces] for name in STATE_NAMES["adamw"])
    K.adamw_step(
        [piece.parameter for piece in pieces],
        [piece.gradient for piece in pieces],
        first,
        second,
        [piece.master for piece in pieces] if narrow else None,
        step=step,
        lr=lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=settings.weight_decay,
        clip_coef=clip,
        skip=skip,
    )


@torch.no_grad()
def _sgd(
    pieces: Sequence[Piece],
    settings: Settings,
    config: OptimConfig,
    step: int,
    lr: float,
    clip: torch.Tensor | None,
    skip: torch.Tensor | None,
) -> None:
    masters, grads = [piece.master for piece in pieces], [piece.gradient for piece in pieces]
    if clip is not None:
        torch._foreach_mul_(grads, clip.to(grads[0].dtype))
    buffers: list[torch.Tensor | None] = [piece.state["momentum_buffer"] for piece in pieces]
    changed = [*masters, *(b for b in buffers if b is not None)]
    before = None if skip is None else [t.clone() for t in changed]
    sgd(
        masters, grads, buffers, foreach=True, weight_decay=settings.weight_decay, momentum=config.momentum, lr=lr,
        dampening=0.0, nesterov=False, maximize=False,
    )  # fmt: skip
    if skip is not None and before is not None:
        for tensor, old in zip(changed, before, strict=True):
            tensor.copy_(torch.where(skip, old, tensor))
    for piece in pieces:
        if piece.master is not piece.parameter:
            piece.parameter.copy_(piece.master)
