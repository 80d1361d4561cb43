"""The graph of nearest classes in a run: made when the configuration says, saved with the run's checkpoints and read from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from opencoder.checkpoint import native
from opencoder.checkpoint.parts import Tensors
from opencoder.config import Config
from opencoder.model.classes.head import ClassHead
from opencoder.model.classes.rebuild import BuildOptions, GraphKeeper, Schedule, background_group
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.placement import Placement

KEY = "graph.lm_head"
"""Checkpoint key of the lists, int32 (N, K)."""


class Graph:
    """Of a head with `selection: knn`. All methods are called by all ranks."""

    def __init__(self, config: Config, head: ClassHead, mesh: Mesh, *, samples: int) -> None:
        """`samples`: of one pass over the training data."""
        settings, t = config.model.head, config.train
        rebuild = settings.rebuild
        self.head, self.mesh = head, mesh
        self.placement = Placement(
            (head.partition.classes, settings.neighbours),
            0,
            head.placement.axis,
            head.placement.replicated_over,
            (),
        )
        on_cuda = head.weight.device.type == "cuda"
        group, background = head.groups.classes, None
        if rebuild.background and not t.deterministic:
            background = background_group(group, mesh.world, timeout_s=t.timeout_s)
        self.keeper = GraphKeeper(
            head.partition,
            group,
            BuildOptions(
                settings.neighbours, rebuild.products or ("fp16" if on_cuda else "fp32"), settings.candidate_ratio
            ),
            Schedule(
                config.optim.warmup_steps if rebuild.first_step is None else rebuild.first_step,
                rebuild.every or -(-samples // t.global_batch_size),
                rebuild.probe_recall,
                rebuild.max_age,
            ),
            background=background,
            everyone=mesh.world,  # copies of the class matrix must change graphs together too
            seed=t.seed,
        )

    def before_step(self, step: int) -> None:
        """`step` updates are done: start a build, or take up what is there."""
        if self.keeper.before_step(step, self.head.weight.detach()):
            self.head.columns = self.keeper.columns

    def metrics(self, step: int) -> dict[str, float]:
        """graph_age, probe_recall, where they are known."""
        return self.keeper.metrics(step)

    def close(self) -> None:
        """Give up a build that is under way, once it is over: its collectives would meet those of the next."""
        self.keeper.close()

    # ---- checkpoints ----

    def tensors(self) -> Tensors:
        """The lists in use, none before the first build."""
        lists = self.keeper.lists()
        return {} if lists is None else {KEY: (lists, self.placement)}

    def state(self) -> dict[str, Any]:
        """Step of the weights that the graph was made of."""
        return {"graph_step": self.keeper.built_at}

    def restore(self, state: dict[str, Any], source: Path) -> None:
        """Take up the graph of checkpoint `source`, written with `state`; without one, or with one of another K, there is none until
        it is time."""
        built_at = state.get("graph_step")
        neighbours = native.read_config(source).model.head.neighbours
        if built_at is None or neighbours != self.placement.global_shape[1]:
            self.head.columns = self.keeper.columns = self.keeper.built_at = None
            return
        lists = torch.empty(self.head.weight.shape[0], neighbours, dtype=torch.int32)
        native.load_tensors(source, {KEY: (lists, self.placement)}, self.mesh, checked=True)
        self.keeper.load(lists.to(self.head.weight.device), built_at)
        self.head.columns = self.keeper.columns
