"""The training loop of a class head (model.head.kind: class): loop.py with another model, other data and another evaluation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from opencoder.checkpoint.parts import Tensors
from opencoder.config import Config
from opencoder.data.classification import ClassificationDataset
from opencoder.data.loader import BatchLoader, MicroBatch
from opencoder.model.classes.permutation import Permutation
from opencoder.model.decoder import named_parameters
from opencoder.model.encoder import HEAD_KEY, Encoder, build_encoder
from opencoder.optim.base import Optimizer
from opencoder.optim.build import build_optimizer
from opencoder.optim.update import settings_of
from opencoder.optim.with_head import WithHead
from opencoder.parallel.mesh import Mesh

from .class_data import ClassData, class_validation_loader
from .class_graph import Graph
from .class_step import ClassRunner, Evaluation, evaluate
from .loop import Trainer
from .skipping import Skipping
from .telling import Done


class ClassTrainer(Trainer):
    """One run on this rank."""

    model: Encoder

    def __init__(self, config: Config, mesh: Mesh, device: torch.device) -> None:
        self.evaluation: Evaluation | None = None
        """The newest."""
        super().__init__(config, mesh, device)
        self.graph = self._open_graph()
        self._restore_head()

    def _open_graph(self) -> Graph | None:
        if self.config.model.head.selection != "knn":
            return None
        dataset = ClassificationDataset(self.config.data.blend[0].prefix)
        return Graph(self.config, self.model.lm_head, self.mesh, samples=len(dataset))

    def _restore_head(self) -> None:
        """What the checkpoint holds beside weights and state: the order of classes, and the graph."""
        state, source = self.state.head, self.state.source
        if state is not None:
            self.model.order = Permutation(**state["order"]) if state["order"] is not None else None
        if self.graph is not None and state is not None and source is not None:
            self.graph.restore(state, source)

    def save(self) -> None:
        """With the order of classes and the graph."""
        order = self.model.order
        self.state.head = {"order": None if order is None else asdict(order)}
        if self.graph is not None:
            self.state.head |= self.graph.state()
        super().save()

    def _tensors(self) -> Tensors:
        return {**super()._tensors(), **(self.graph.tensors() if self.graph is not None else {})}

    def run(self) -> None:
        """As Trainer.run; a graph that is being made is waited for at the end."""
        super().run()
        if self.graph is not None:
            self.graph.close()

    def _go_back(self, skipping: Skipping, at: int) -> None:
        if self.graph is not None:
            self.graph.close()
        super()._go_back(skipping, at)
        self._restore_head()

    def _update(self, done: Done, micro_batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
        if self.graph is not None:
            self.graph.before_step(done.step - 1)
        return super()._update(done, micro_batches)

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
        head = self.model.lm_head
        parameters = {key: p for key, p in named_parameters(self.model).items() if key != HEAD_KEY}
        sharded = self.config.parallel.sharded_optimizer
        backbone = build_optimizer(parameters, self.config.optim, self.mesh, sharded=sharded, modules=[self.model])
        return WithHead(backbone, head, settings_of(HEAD_KEY, head.placement, self.config.optim))

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
        if self.state.step % self.config.log.every == 0:
            row |= self.model.lm_head.metrics()
            if self.graph is not None:
                row |= self.graph.metrics(self.state.step)
        return row
