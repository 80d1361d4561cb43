"""Checks of arguments, shared by the operators: each names the argument, its value and what is allowed."""

from __future__ import annotations

from itertools import pairwise

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def floating(operator: str, **tensors: torch.Tensor) -> None:
    """Every tensor is of a supported floating type, and all are on one device."""
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{operator}: {name} is {type(t).__name__}; it must be a tensor")
        if t.dtype not in FLOATS:
            raise ValueError(f"{operator}: {name} is {t.dtype}; allowed: fp64, fp32, bf16, fp16")
    one_device(operator, **tensors)


def one_device(operator: str, **tensors: torch.Tensor) -> None:
    """All tensors are on one device."""
    devices = {name: t.device for name, t in tensors.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{operator}: tensors on different devices: {listed}; move them to one")


def at_least(operator: str, least: float, **numbers: float) -> None:
    """Every number is at least `least`; a NaN is not."""
    for name, value in numbers.items():
        if not value >= least:
            raise ValueError(f"{operator}: {name}={value}; it must be at least {least:g}")


def same_dtype(operator: str, **tensors: torch.Tensor) -> None:
    """All tensors have one type."""
    types = {name: t.dtype for name, t in tensors.items()}
    if len(set(types.values())) > 1:
        raise ValueError(f"{operator}: types differ: {types}; cast them to one")


def cu_seqlens(operator: str, name: str, bounds: torch.Tensor, total: int, longest: int | None = None) -> None:
    """`bounds` is int32, 1-D, and (where its values are at hand: on a CPU, outside torch.compile) rises from 0 to `total`,
    by at most `longest` at a time."""
    if bounds.dtype != torch.int32 or bounds.dim() != 1 or bounds.numel() < 1:
        raise ValueError(f"{operator}: {name} must be 1-D int32, got {bounds.dtype} of shape {tuple(bounds.shape)}")
    if longest is not None and (not isinstance(longest, int) or longest < 0):
        raise ValueError(
            f"{operator}: max_seqlen={longest!r}; it must be an int of the host from 0 on: a tensor would have to be waited for"
        )
    if bounds.device.type == "cpu" and not torch.compiler.is_compiling():
        values = bounds.tolist()
        falling = any(b < a for a, b in pairwise(values))
        if values[0] != 0 or values[-1] != total or falling:
            raise ValueError(
                f"{operator}: {name} must rise from 0 to the {total} tokens, got {values[:8]}…{values[-1]}"
            )
        found = max((b - a for a, b in pairwise(values)), default=0)
        if longest is not None and found > longest:
            raise ValueError(f"{operator}: max_seqlen={longest}, but {name} holds a document of {found} tokens")


def targets(operator: str, logits: torch.Tensor, target: torch.Tensor) -> None:
    """logits (T, V) and integer targets (T,)."""
    if logits.dim() != 2:
        raise ValueError(f"{operator}: logits must be (T, V), got {tuple(logits.shape)}; flatten the leading dims")
    if logits.shape[1] == 0:
        raise ValueError(f"{operator}: logits {tuple(logits.shape)} have no class; V must be at least 1")
    one_device(operator, logits=logits, targets=target)
    if target.shape != logits.shape[:1]:
        raise ValueError(f"{operator}: targets must be ({logits.shape[0]},), got {tuple(target.shape)}")
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{operator}: targets are {target.dtype}; allowed: int64, int32")


def positive_cap(operator: str, softcap: float | None) -> None:
    """A cap is positive or absent."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{operator}: softcap={softcap}; it must be positive, None for no cap")


def loss_options(operator: str, reduction: str, z_loss: float, label_smoothing: float, softcap: float | None) -> None:
    """The options of a cross entropy are in range."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{operator}: reduction={reduction!r}; allowed: mean, sum, none")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{operator}: label_smoothing={label_smoothing}; allowed: [0, 1]")
    positive_cap(operator, softcap)
    at_least(operator, 0, z_loss=z_loss)


def target_range(operator: str, target: torch.Tensor, classes: int, ignore_index: int) -> None:
    """Every target is a class or ignored; looked at only where that costs no synchronisation."""
    if target.device.type != "cpu" or not target.numel() or torch.compiler.is_compiling():
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if wrong.any():
        valid = target[target != ignore_index]
        raise ValueError(
            f"{operator}: targets lie in [{int(valid.min())}, {int(valid.max())}]; allowed: [0, {classes}) and "
            f"ignore_index={ignore_index}"
        )
