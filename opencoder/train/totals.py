"""What a step sums over its micro-batches, in one vector, so that ranks exchange it in one message."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from opencoder.parallel.cross_entropy import IGNORE


class Totals:
    """Sums over tokens: their losses, what the z-loss adds to them, and for each of `groups` groups (data/groups.py) losses
    and targets."""

    def __init__(self, device: torch.device, groups: int = 0) -> None:
        self.groups = groups
        self.values = torch.zeros(2 + 2 * groups, dtype=torch.float64, device=device)
        """(2 + 2·groups,) loss, z-loss, losses by group, targets by group."""

    def add(
        self,
        loss_sum: torch.Tensor,
        statistics: Mapping[str, torch.Tensor],
        targets: torch.Tensor,
        groups: torch.Tensor | None,
    ) -> None:
        """One micro-batch as its head gives it; targets (B, S), groups (B, S, any), negative where there is none."""
        self.values[0] += loss_sum.detach()
        self.values[1] += statistics["z_loss"]
        if not self.groups:
            return
        assert groups is not None
        numbers = groups.flatten(0, 1).long()
        counted = (targets.reshape(-1, 1) != IGNORE) & (numbers >= 0)
        # The others go to a place of their own: to leave them out would be to wait for the device.
        places = torch.where(counted, numbers, self.groups).flatten()
        losses = statistics["token_losses"].double()[:, None].expand(numbers.shape).flatten()
        sums = self.values.new_zeros(2, self.groups + 1)
        sums.index_add_(1, places, torch.stack([losses, torch.ones_like(losses)]))
        self.by_group.add_(sums[:, :-1])

    @property
    def loss(self) -> torch.Tensor:
        """Sum of token losses, 0-dim."""
        return self.values[0]

    @property
    def z_loss(self) -> torch.Tensor:
        """0-dim."""
        return self.values[1]

    @property
    def by_group(self) -> torch.Tensor:
        """(2, groups): losses, targets."""
        return self.values[2:].view(2, self.groups)
