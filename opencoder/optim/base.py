"""What the training step asks of an optimizer, however its state is spread over the ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from opencoder.parallel.placement import Placement

StateTensor = tuple[torch.Tensor, Placement] | tuple[torch.Tensor, Placement, tuple[int, int]]
"""This rank's part and where it lives; with an interval, the part is flat and holds just that piece of what the placement
gives this rank."""


class Optimizer(Protocol):
    """Updates the parameters of this rank. Keys are checkpoint keys.

    One step: backward and `fold_gradients` for each micro-batch; `start_reduction` as early as gradients are complete, if
    at all; `finish_reduction`; `step`. Nothing in it waits for the device."""

    def fold_gradients(self, keys: Iterable[str] | None = None) -> None:
        """Add the gradients of the last backward to the main gradients; `keys` None: of all parameters. Called after each
        micro-batch, or after each weight-backward of a pipeline stage."""

    def last_backward(self) -> None:
        """The next backward pass is the last of this step, and each gradient is complete once it has been added to: their
        sum over the ranks may be started within it. Need not be called."""

    def start_reduction(self, keys: Iterable[str]) -> None:
        """The main gradients of these parameters are complete for this step: their sum over the ranks may be started. May be
        called for some of them or for none: what was not started is reduced in `finish_reduction`."""

    def finish_reduction(self, others_sq_norm: torch.Tensor | None = None) -> torch.Tensor:
        """Sum all gradients over the ranks that their placements name; returns the global gradient norm before clipping,
        0-dim, the same on every rank. `others_sq_norm`: squared norm of gradients that are not this optimizer's, equal on all
        ranks, which counts too. Raises RuntimeError for a parameter without a gradient."""

    def step(self, *, lr: float, skip: torch.Tensor | None = None) -> torch.Tensor:
        """Clip by the norm of `finish_reduction`, update, drop the gradients. Returns the clip factor, 0-dim (1: not
        clipped). Where the boolean `skip`, equal on all ranks, is true, weights and state stay as they are; the step is
        counted all the same, so that the host need not know."""

    def wait_weights(self) -> None:
        """Until all parameters are those of the last update: to be called before they are read other than by a forward pass."""

    def state_tensors(self) -> dict[str, StateTensor]:
        """What a checkpoint must hold beside the weights: `optim.<name>.<key>` → (this rank's part, where it lives). Waits for
        the weights."""

    def state_bytes(self) -> int:
        """Bytes this rank holds from step to step: weights, main gradients, masters and state."""

    def set_step_count(self, step: int) -> None:
        """Tell how many updates the state has seen (AdamW's bias correction), after loading it."""

    def weights_changed(self) -> None:
        """Take over weights that were loaded into the parameters: the master weights follow them."""
