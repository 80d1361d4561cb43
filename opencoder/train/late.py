"""Numbers that the host reads when the device has them, without waiting for what was asked of the device since.

A step of training is a queue of work. A host that reads its loss before it queues the next step leaves the device idle until
that work arrives; one that reads it a step later does not."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

LAG = {"cpu": 0, "cuda": 1}
"""Steps that are queued before the numbers of one are read. On a CPU there is no queue."""


def on_device(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """(n,) fp64 on `device`, without waiting for it."""
    host = torch.tensor(values, dtype=torch.float64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class Late:
    """Tensors of one device on their way to the host, any shapes and types that fp64 holds exactly."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Their copy follows what is queued already."""
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        packed = torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()])
        self._numbers, self._copied = packed, None
        if packed.is_cuda:
            self._numbers = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._numbers.copy_(packed, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._there: float | None = None

    def wait(self) -> float:
        """Until they are there; returns when that was first known, as time.perf_counter() tells it."""
        if self._there is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._there = time.perf_counter()
        return self._there

    def read(self) -> dict[str, torch.Tensor]:
        """The tensors, on the host, fp64."""
        self.wait()
        parts = self._numbers.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)}
