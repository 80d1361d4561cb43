"""Leaves out updates that would do harm: a loss or gradient norm that is not finite, or far above those before it.

Everything stays on the device: what the host wants to know, it reads from the result later."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from opencoder.parallel.mesh import Group

SMALLEST_SPREAD = 1e-4
"""Standard deviation that is assumed at least, as a share of the mean: a loss that no longer moves has no spikes of rounding."""


class Memory(NamedTuple):
    """What a guard remembers."""

    values: torch.Tensor
    """(2, window): losses, norms; a ring."""
    seen: torch.Tensor
    """Updates made, 0-dim."""


class Guard:
    """(global loss, gradient norm) → true where the update must be left out, 0-dim boolean, the same on every rank.

    Compares with mean + sigma · standard deviation of the last `window` updates that were made; until half of them are
    there, only what is not finite is left out (as in OLMo-core's SkipStepOptimizer)."""

    def __init__(self, *, window: int, sigma: float, world: Group, device: torch.device) -> None:
        self.window, self.sigma, self.world = window, sigma, world
        self._values = torch.zeros(2, window, dtype=torch.float64, device=device)
        """Losses, norms: a ring."""
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._places = torch.arange(window, device=device)

    def __call__(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Look at an update, and remember it if it is to be made."""
        now = torch.stack([loss.detach().double(), grad_norm.detach().double()])
        n = self._count.clamp(max=self.window)
        known = self._places < n
        mean = (self._values * known).sum(1) / n.clamp(min=1)
        variance = ((self._values - mean[:, None]).square() * known).sum(1) / (n - 1).clamp(min=1)
        spread = torch.maximum(variance.sqrt(), SMALLEST_SPREAD * mean.abs())
        far_off = (now > mean + self.sigma * spread).any() & (n >= max(2, self.window // 2))
        # One rank's last bit must not decide alone: ranks that disagree would never meet again.
        skip = self.world.all_reduce((~now.isfinite().all() | far_off).to(torch.uint8), "max").bool()
        place = (self._count % self.window).view(1)
        self._values.index_copy_(1, place, torch.where(skip, self._values.index_select(1, place), now[:, None]))
        self._count += ~skip
        return skip

    def snapshot(self) -> Memory:
        """What is remembered now, on the device. Does not wait for it."""
        return Memory(self._values.clone(), self._count.clone())

    def state(self, memory: Memory | None = None) -> dict[str, Any]:
        """What is remembered, oldest first, for a checkpoint; or was when the snapshot `memory` was made. Waits for the device."""
        values, seen = memory or (self._values, self._count)
        count = int(seen)
        values = values[:, :count] if count < self.window else values.roll(-(count % self.window), 1)
        return {"losses": values[0].tolist(), "norms": values[1].tolist()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`; of a longer window the newest are taken."""
        values = torch.tensor([state["losses"], state["norms"]], dtype=torch.float64)[:, -self.window :]
        self._values[:, : values.shape[1]] = values.to(self._values.device)
        self._count.fill_(values.shape[1])
