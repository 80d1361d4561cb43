"""The training loop of a class head (model.head.kind: class): loop.py with another model, other data and another evaluation."""

from __future__ import annotations

from typing import Any

import torch

from opencoder.config import Config
from opencoder.data.loader import BatchLoader
from opencoder.model.decoder import named_parameters
from opencoder.model.encoder import HEAD_KEY, Encoder, build_encoder
from opencoder.optim.base import Optimizer
from opencoder.optim.build import build_optimizer
from opencoder.optim.with_head import WithHead
from opencoder.parallel.mesh import Mesh

from .class_data import ClassData, class_validation_loader
from .class_step import ClassRunner, Evaluation, evaluate
from .loop import Trainer


class ClassTrainer(Trainer):
    """One run on this rank."""

    model: Encoder

    def __init__(self, config: Config, mesh: Mesh, device: torch.device) -> None:
        self.evaluation: Evaluation | None = None
        """The newest."""
        super().__init__(config, mesh, device)

    def _build(self) -> Encoder:
        c = self.config
        return build_encoder(
            c.model,
            self.mesh,
            optim=c.optim,
            dtype=self.dtype,
            device=self.device,
            seed=c.train.seed,
            recompute=c.train.recompute,
            parallel=c.parallel,
        )

    def _build_optimizer(self) -> Optimizer:
        """The head's own parameters are not the optimizer's, nor reduced over the ranks."""
        parameters = {key: p for key, p in named_parameters(self.model).items() if key != HEAD_KEY}
        sharded = self.config.parallel.sharded_optimizer
        backbone = build_optimizer(parameters, self.config.optim, self.mesh, sharded=sharded, modules=[self.model])
        return WithHead(backbone, self.model.lm_head)

    def _build_runner(self) -> ClassRunner:
        return ClassRunner(self.model, self.optimizer, self.device)

    def _open_data(self) -> ClassData:
        state, pin_memory = self.state, self.device.type == "cuda"
        return ClassData(self.config, state.stages, self.mesh, step=state.step, pin_memory=pin_memory)

    def _open_validation(self) -> BatchLoader | None:
        return class_validation_loader(self.config, self.mesh, pin_memory=self.device.type == "cuda")

    def _count_parameters(self) -> int:
        """With the whole class matrix."""
        with torch.device("meta"):
            return sum(p.numel() for p in Encoder(self.config.model, optim=self.config.optim).parameters())

    def evaluate(self, loader: BatchLoader) -> float:
        """Mean loss over all classes; the rest is kept in `evaluation`."""
        self.evaluation = evaluate(self.model, self.mesh, loader, self.device)
        return self.evaluation.loss

    def _evaluated(self, *args: Any) -> dict[str, float]:
        """The evaluation, if it is time for it, and what the head tells of itself."""
        row = super()._evaluated(*args)
        if row and self.evaluation is not None:
            row |= {"accuracy": self.evaluation.top1, "accuracy_top5": self.evaluation.top5}
        return row
