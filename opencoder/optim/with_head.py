"""The optimizer of a model whose head owns parameters and updates them itself (model/classes/head.py): one norm, one clip factor
and one decision to skip for both."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from opencoder.model.classes.head import ClassHead

from .base import Optimizer, StateTensor
from .update import Settings


class WithHead:
    """`backbone` for all parameters but those that `head` owns. What the methods promise stands in base.Optimizer."""

    def __init__(self, backbone: Optimizer, head: ClassHead, settings: Settings) -> None:
        """`settings`: of the class matrix. Its state must not have been made yet."""
        self.backbone, self.head, self.lr_scale = backbone, head, settings.lr_scale
        head.optim = head.optim.model_copy(update={"weight_decay": settings.weight_decay})

    def fold_gradients(self, keys: Iterable[str] | None = None) -> None:
        """Those of the backbone: the head gathers its own."""
        self.backbone.fold_gradients(keys)

    def last_backward(self) -> None:
        """The backbone's reduction may start."""
        self.backbone.last_backward()

    def start_reduction(self, keys: Iterable[str]) -> None:
        """Of the backbone."""
        self.backbone.start_reduction(keys)

    def finish_reduction(self, others_sq_norm: torch.Tensor | None = None) -> torch.Tensor:
        """Norm over backbone and class matrix, each value counted once."""
        own = self.head.grad_sq_norm()
        return self.backbone.finish_reduction(own if others_sq_norm is None else own + others_sq_norm)

    def step(self, *, lr: float, skip: torch.Tensor | None = None) -> torch.Tensor:
        """Update both."""
        clip = self.backbone.step(lr=lr, skip=skip)
        self.head.apply_gradients(lr * self.lr_scale, clip, skip)
        return clip

    def wait_weights(self) -> None:
        """The head's are there at once."""
        self.backbone.wait_weights()

    def state_tensors(self) -> dict[str, StateTensor]:
        """Of both."""
        return {**self.backbone.state_tensors(), **self.head.state_tensors()}

    def state_bytes(self) -> int:
        """Of both: of the head its rows and their state, as its gradient is there during a step alone."""
        rows = [p.nbytes for p in self.head.owned_parameters()]
        return (
            self.backbone.state_bytes() + sum(rows) + sum(part[0].nbytes for part in self.head.state_tensors().values())
        )

    def set_step_count(self, step: int) -> None:
        """Of both."""
        self.backbone.set_step_count(step)
        self.head.set_step_count(step)

    def weights_changed(self) -> None:
        """Of both."""
        self.backbone.weights_changed()
        self.head.weights_changed()
