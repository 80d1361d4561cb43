"""The output layer for very many classes: a label for each sample, rows split over ranks, a softmax over all of them or over those
that a step selects.

N classes, N_r here; D width; b samples of this rank in a micro-batch; P ranks in the class group. See docs/classification.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from opencoder import kernels as K
from opencoder.config import HeadConfig, OptimConfig
from opencoder.parallel.cross_entropy import IGNORE
from opencoder.parallel.mesh import SINGLE, Mesh
from opencoder.parallel.placement import Placement, place

from . import probe
from .partition import Partition
from .rows import RowOptimizer, check_state
from .scored import KEPT_BYTES, RowGradient, ScoredRows, Scratch
from .selection import Selection, quota_of, select_rows
from .softmax import Groups, Scoring, sharded_softmax
from .topk import best_classes
from .variants import Variant, directions

if TYPE_CHECKING:
    from .columns import ColumnGraph

StateTensor = tuple[torch.Tensor, Placement]
_REPLICATED = {"tp": ("dp", "cp"), "dp_cp": ("tp",), "world": ()}


def groups_of(mesh: Mesh, class_group: str) -> Groups:
    """Whom the ranks of `class_group` share samples with: those along tp see the same ones, those along dp and cp others."""
    data = mesh.group(("dp", "cp"))
    if class_group == "tp":
        return Groups(mesh.tp, SINGLE, mesh.tp)
    if class_group == "dp_cp":
        return Groups(data, data, SINGLE)
    return Groups(mesh.world, data, mesh.tp)


class ClassHead(nn.Module):
    """Owns the class matrix: the parameter `weight` (N_r, D), its gradient and its optimizer. The trainer's optimizer and its
    reduction of gradients leave it out.

    A step: `begin_step` with all labels; `loss` and its backward pass for each micro-batch; `grad_sq_norm` for the global norm;
    `apply_gradients`. All ranks of the mesh make the same calls in the same order, with the same b."""

    def __init__(
        self,
        config: HeadConfig,
        mesh: Mesh,
        *,
        dim: int,
        optim: OptimConfig,
        key: str = "lm_head.weight",
        seed: int = 0,
        feature_grad_scale: float = 1.0,
    ) -> None:
        """`dim`: width D of features. `key`: the weight's name in checkpoints. `seed`: of the random selection.
        `feature_grad_scale`: as in softmax.Scoring, for trainers that average the backbone's gradients; ours adds them."""
        super().__init__()
        if config.classes is None:
            raise ValueError("ClassHead: config.classes is not set: give the number of classes")
        check_state(config, optim)
        self.config, self.mesh, self.optim, self.key, self.seed = config, mesh, optim, key, seed
        self.groups = groups_of(mesh, config.class_group)
        self.data = mesh.group(("dp", "cp"))
        self.replicas = self.data if config.class_group == "tp" else SINGLE
        """Ranks with the same rows and other samples: they add up their gradients of rows."""
        self.variant = Variant(config.variant, config.scale, config.margin)
        self.feature_grad_scale = feature_grad_scale
        self.partition = Partition(config.classes, self.groups.classes.size)
        self.first = self.partition.start(self.groups.classes.rank)
        shape = (config.classes, dim)
        placement = Placement(shape, 0, config.class_group, _REPLICATED[config.class_group], ())
        self.weight = place(nn.Parameter(torch.empty(self.partition.size(self.groups.classes.rank), dim)), placement)
        self.placement = placement
        self.steps = 0
        """Steps begun in training."""
        self.columns: ColumnGraph | None = None
        """Neighbours of all classes among the rows here; None, with selection knn too: scored classes are random."""
        self.selection: Selection | None = None
        """Of the last step; None with selection full."""
        self.probe = probe.Probe()
        self._probe_due = False
        self.scratch = Scratch()
        self._optimizer: RowOptimizer | None = None
        self._labels: torch.Tensor | None = None
        self._gathered: torch.Tensor | None = None
        """(ranks, n): labels of the step's micro-batches, one after the other, of all ranks whose features are gathered."""
        self._passed = 0
        """How many of a rank's have been used."""
        self._rows: ScoredRows | None = None
        self._gradient: RowGradient | None = None

    @property
    def optimizer(self) -> RowOptimizer:
        """Made at first use, when the weight has its type and device."""
        if self._optimizer is None or self._optimizer.weight is not self.weight:
            self._optimizer = RowOptimizer(self.weight, self.config, self.optim)
        return self._optimizer

    # ---- a step ----

    def begin_step(self, labels_of_all_micro_batches: Iterable[torch.Tensor]) -> torch.Tensor:
        """Labels (b,) of this rank, −100 where a sample is ignored → valid samples of the step over all data ranks, 0-dim.

        In training it also selects the classes that the whole step scores. Raises ValueError, on all ranks, for a label that is no
        class."""
        labels = torch.cat([labels.reshape(-1) for labels in labels_of_all_micro_batches])
        # Of all ranks that see other samples, also for rows split over tp: all copies of a row must be scored in one step.
        gathered = self.data.all_gather(labels)
        self._check_labels(gathered)
        valid = gathered[gathered != IGNORE]
        if self.training:
            self._gathered = (gathered if self.groups.samples.size > 1 else labels).view(-1, labels.numel())
            self._passed = 0
            self._select(valid)
            self.steps += 1
        return torch.tensor(valid.numel(), device=labels.device)

    def _check_labels(self, gathered: torch.Tensor) -> None:
        wrong = ((gathered < 0) & (gathered != IGNORE)) | (gathered >= self.partition.classes)
        if wrong.any():
            place = int(wrong.nonzero()[0])
            rank, sample = divmod(place, gathered.shape[0] // self.data.size)
            raise ValueError(
                f"label {int(gathered[place])} of sample {sample} of data rank {rank} is no class: labels are in "
                f"[0, {self.partition.classes}), as model.head.classes={self.partition.classes} says, or {IGNORE} for a sample to "
                "be ignored"
            )

    def _select(self, labels: torch.Tensor) -> None:
        """`labels`: all valid ones of the step."""
        self._close()
        self._probe_due = self.steps % probe.EVERY == 0
        self._rows = self._all_rows() if self.config.selection == "full" else self._selected(labels)
        self._gradient = RowGradient(self._rows, self.scratch)

    def _selected(self, labels: torch.Tensor) -> ScoredRows:
        config = self.config
        selection = select_rows(
            labels,
            self.partition,
            self.groups.classes.rank,
            rho=config.rho,
            columns=self.columns,
            uniform_mix=config.uniform_mix,
            seed=self.seed,
            step=self.steps,
        )
        self.selection, self._labels = selection, labels
        offsets = None
        if config.tail_correction:
            # The random rows stand for all that priority did not choose: their part of the sum is then right on average.
            weight = torch.tensor(selection.fill_weight, dtype=torch.float32, device=labels.device)
            offsets = torch.where(selection.hard, 0, weight)
        total = self._scored_of_all(labels) if config.label_smoothing else None
        return ScoredRows(
            self.weight, selection.rows, offsets, total, self.variant.cosine, self._copied(selection.rows)
        )

    def _copied(self, ids: torch.Tensor) -> torch.Tensor | None:
        """The rows `ids`, if a copy of them is worth its memory."""
        weight, shape = self.weight.detach(), (ids.shape[0], self.weight.shape[1])
        if shape[0] * shape[1] * weight.element_size() > KEPT_BYTES:
            return None
        room = self.scratch.take("rows", shape[0] * shape[1], weight, weight.dtype)
        return torch.index_select(weight, 0, ids, out=room.view(shape))

    def _scored_of_all(self, labels: torch.Tensor) -> int:
        """Classes that all ranks score for these labels: each rank its quota, or its labels where those are more."""
        parts = range(self.partition.parts)
        own = self.partition.owner(labels.unique()).bincount(minlength=self.partition.parts).tolist()
        return sum(max(quota_of(self.config.rho, self.partition.size(r)), own[r]) for r in parts)

    def _all_rows(self) -> ScoredRows:
        return ScoredRows(self.weight, total=self.partition.classes, cosine=self.variant.cosine)

    def loss(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """features (b, D), labels (b,) → sum of losses over this rank's samples (0-dim), statistics without gradients: `tokens`,
        valid samples; `token_losses` (b,), 0 where ignored; `z_loss`, 0. Micro-batches come in the order of `begin_step`.

        In training over the classes that `begin_step` selected; in evaluation over all of them, without gradients; margins
        count in both. The sum must be multiplied by the same factor on all ranks before its backward pass."""
        self._check_features(features, labels)
        training = self.training and torch.is_grad_enabled()
        rows, gradient = (self._rows, self._gradient) if training else (self._all_rows(), None)
        if rows is None:
            raise RuntimeError("ClassHead.loss() before begin_step(): the classes of the step are not selected yet")
        labels = labels.reshape(-1)
        gathered = self._gathered_before(labels) if training else self.groups.samples.all_gather(labels)
        places = rows.places(gathered - self.first)
        self._check_scored(gathered, places)
        if self.variant.cosine:
            features = directions(features)
        scoring = self._scoring(rows)
        if training and self._probe_due and self.selection is not None:
            self._probe_due = False
            self.probe.measure(features, labels, self.first, scoring, self.selection)
        total, each = sharded_softmax(features, gathered, places, scoring, gradient)
        return total, {"tokens": (labels != IGNORE).sum(), "token_losses": each, "z_loss": total.new_zeros(())}

    def _gathered_before(self, labels: torch.Tensor) -> torch.Tensor:
        """Those of the micro-batch `labels` (b,) of all ranks, (B,), out of what begin_step gathered."""
        assert self._gathered is not None
        begin, end = self._passed, self._passed + labels.numel()
        found = self._gathered[:, begin:end]
        text = "ClassHead.loss(): micro-batches must come as begin_step() was given them: the same labels in the same order"
        own = found[self.groups.samples.rank]
        if own.shape != labels.shape:
            raise ValueError(text)
        _require((own == labels).all(), text)
        self._passed = end
        return found.flatten()

    def _check_scored(self, gathered: torch.Tensor, places: torch.Tensor) -> None:
        """Every valid label has its place on the rank it belongs to."""
        local = gathered - self.first
        here = (local >= 0) & (local < self.weight.shape[0])
        unknown = (gathered >= self.partition.classes) | ((gathered < 0) & (gathered != IGNORE))
        fine = ~((here & (places < 0)) | unknown).any()
        _require(
            fine, "ClassHead.loss(): a label is not among the scored classes: begin_step() must be given all labels"
        )

    def _scoring(self, rows: ScoredRows) -> Scoring:
        smoothing = self.config.label_smoothing
        return Scoring(rows, self.groups, self.variant, smoothing, self.feature_grad_scale)

    def _check_features(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        width = self.weight.shape[1]
        if features.dim() != 2 or features.shape[1] != width or features.shape[0] != labels.numel():
            raise ValueError(
                f"ClassHead: features are {tuple(features.shape)}, labels {tuple(labels.shape)}; wanted: (b, {width}) and (b,), one "
                "feature for each label"
            )

    def logits_topk(
        self, features: torch.Tensor, k: int, *, class_of: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """features (b, D) → the k largest logits over all classes (b, k), fp32 and without margins, and the classes they are of,
        int64; of equal ones the smaller class comes first. `class_of`: from rows to classes, where they are in another order. Called
        by all ranks."""
        if not 1 <= k <= self.partition.classes:
            raise ValueError(f"logits_topk: k={k}; allowed: 1 to model.head.classes={self.partition.classes}")
        x = directions(features) if self.variant.cosine else features
        ids = torch.arange(self.first, self.first + self.weight.shape[0], device=self.weight.device)
        ids = ids if class_of is None else class_of(ids)
        return best_classes(x, self._all_rows(), ids, self.groups, self.variant, k)

    # ---- what the trainer does with the owned weight ----

    def grad_sq_norm(self) -> torch.Tensor:
        """Squared norm of the gradient of the whole class matrix, 0-dim fp64, equal on all ranks; after the step's last backward
        pass. Copies of the rows add up their gradients first."""
        values = self.finished_gradient()
        return self.groups.classes.all_reduce(K.grad_norm([values]).double().square())

    def finished_gradient(self) -> torch.Tensor:
        """Gradient of this rank's scored rows (m, D), once the step's last backward pass is over."""
        if self._gradient is None:
            raise RuntimeError("ClassHead: no step was begun: call begin_step() in training mode first")
        if self._gradient.finished:
            return self._gradient.finish()
        values = self._gradient.finish()
        return self.replicas.all_reduce(values)

    def owned_parameters(self) -> list[nn.Parameter]:
        """Parameters the head updates itself (excluded from the optimizer and from gradient reduction): the class matrix."""
        return [self.weight]

    def apply_gradients(
        self, lr: float, clip_coef: float | torch.Tensor | None, skip: torch.Tensor | None = None
    ) -> None:
        """Update the scored rows with the gradient times `clip_coef`, and drop it. Where the boolean `skip` is true, nothing changes;
        the step is counted all the same."""
        values = self.finished_gradient()
        assert self._rows is not None
        self.optimizer.step(self._rows, values, lr=lr, clip=clip_coef, skip=skip)
        self._close()

    def _close(self) -> None:
        """The step is over: its buffers are free."""
        if self._gradient is not None:
            self._gradient.close()
        if self._rows is not None and self._rows.kept is not None:
            self.scratch.give_back("rows", self._rows.kept.view(-1))
        self._rows = self._gradient = None

    def metrics(self) -> dict[str, float]:
        """What is known of the selection: `eps`, `coverage` of the step measured last (see probe.py), `active_per_label`, classes
        scored on all ranks for each distinct label of the last step. Sends nothing; waits for the device."""
        found = self.probe.values()
        if self._labels is not None and self._labels.numel():
            found["active_per_label"] = self._scored_of_all(self._labels) / self._labels.unique().numel()
        return found

    def state_tensors(self) -> dict[str, StateTensor]:
        """What a checkpoint must hold beside the weight: `optim.<name>.<key>` → (this rank's rows, where they live)."""
        return {f"optim.{name}.{self.key}": (t, self.placement) for name, t in self.optimizer.state.items()}

    def set_step_count(self, step: int) -> None:
        """Tell how many updates the state has seen, after loading it."""
        self.steps = self.optimizer.steps = step

    def weights_changed(self) -> None:
        """Take over a weight that was loaded into the parameter."""
        self.optimizer.weights_changed()


def _require(fine: torch.Tensor, text: str) -> None:
    """ValueError with `text` unless the 0-dim `fine` is true; on a GPU an error later, as the host does not wait."""
    if fine.device.type == "cpu":
        if not fine:
            raise ValueError(text)
    else:
        torch._assert_async(fine, text)
