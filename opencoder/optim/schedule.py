"""Learning-rate schedules. Steps count from 0; the rate at step s is the one used for the (s+1)-th update."""

from __future__ import annotations

import math

from opencoder.config import OptimConfig


def lr_at(step: int, config: OptimConfig, total_steps: int) -> float:
    """Learning rate of update `step`: linear warm-up, then the schedule; the last update of a decay has `min_lr`.

    wsd: constant, then the tail of `decay_steps` at the end of the run (arXiv:2404.06395). cosine: half a period from
    peak to min_lr over the rest of the run. Raises ValueError if step is not in [0, total_steps)."""
    if not 0 <= step < total_steps:
        raise ValueError(f"step={step} is outside the run: it must be in [0, {total_steps})")
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        r = (step + 1 - config.warmup_steps) / (total_steps - config.warmup_steps)
        return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * r)) / 2
    decay_start = total_steps - config.decay_steps
    if step < decay_start:
        return config.lr
    return decayed(config, (step + 1 - decay_start) / config.decay_steps)


def decayed(config: OptimConfig, r: float) -> float:
    """Learning rate when the share r in (0, 1] of the decay is done.

    `exponential` is a straight line in log(lr); the others are those of Megatron-LM, lr = min + (peak − min)·coeff."""
    peak, low = config.lr, config.min_lr
    if config.decay_shape == "exponential":
        return peak * (low / peak) ** r
    coeff = {
        "exponential_megatron": 2 * 0.5**r - 1,
        "linear": 1 - r,
        "cosine": (1 + math.cos(math.pi * r)) / 2,
        "minus_sqrt": 1 - math.sqrt(r),
    }[config.decay_shape]
    return low + (peak - low) * coeff
