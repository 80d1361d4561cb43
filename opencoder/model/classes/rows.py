"""Updates of some rows of a matrix: AdamW and SGD with momentum, where a step has a gradient of the scored rows alone.

lazy (sheet 2.10, [O]): momentum, moments and weight decay are touched with their row, the others keep every bit; AdamW's bias
correction counts the steps of all rows. dense_equivalent: what torch's optimizers do where the other rows' gradients are zero:
they decay, and move on by momentum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from opencoder import kernels as K
from opencoder.config import HeadConfig, OptimConfig
from opencoder.errors import ConfigError

from .scored import ScoredRows, wide

STATE_NAMES = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""As in opencoder/optim/update.py: a checkpoint names them alike."""
CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Values updated at a time: of some rows, copies of all their state exist meanwhile."""
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Consecutive scored rows: places [begin, end) of the gradient, local rows `index`."""

    index: slice | torch.Tensor
    begin: int
    end: int


def check_state(config: HeadConfig, optim: OptimConfig) -> None:
    """ConfigError for adamw with a state of 16 bits that cannot hold second moments."""
    if config.optimizer != "adamw" or config.state_dtype == "fp32":
        return
    if config.state_dtype == "fp16":
        raise ConfigError(
            "model.head.state_dtype=fp16 with model.head.optimizer=adamw: squares of small gradients are zero in fp16; set "
            "state_dtype to fp32 or bf16, or optimizer to sgd"
        )
    if 1 - optim.betas[1] < 2 * torch.finfo(torch.bfloat16).eps:
        raise ConfigError(
            f"model.head.state_dtype=bf16 with optim.betas[1]={optim.betas[1]}: bf16 has 8 bits, and a second moment that changes by "
            f"{1 - optim.betas[1]:.1g} of itself in a step would mostly stay; set optim.betas[1] to 0.98 or less, or state_dtype "
            "to fp32"
        )


class RowOptimizer:
    """Updates rows of `weight` (N_r, D) and owns its state. 16-bit weights have master rows in fp32, or, with a state of 16
    bits, none: they are then rounded at each update.

    Raises ConfigError as check_state does."""

    def __init__(self, weight: torch.nn.Parameter, config: HeadConfig, optim: OptimConfig) -> None:
        check_state(config, optim)
        self.weight, self.config, self.optim = weight, config, optim
        self.steps = 0
        """Updates the state has seen."""
        self._rooms: dict[str, torch.Tensor] = {}
        narrow_state = config.state_dtype != "fp32"
        dtype = _TYPES[config.state_dtype] if narrow_state else wide(weight.dtype)
        self.state = {name: torch.zeros_like(weight, dtype=dtype) for name in STATE_NAMES[config.optimizer]}
        """By name, (N_r, D)."""
        if weight.dtype != wide(weight.dtype) and not narrow_state:
            self.state["master"] = weight.detach().float()

    @torch.no_grad()
    def step(
        self,
        rows: ScoredRows,
        gradient: torch.Tensor,
        *,
        lr: float,
        clip: float | torch.Tensor | None = None,
        skip: torch.Tensor | None = None,
    ) -> None:
        """Update with `gradient` (m, D) of `rows`, times `clip`. Where the boolean `skip` is true, weight and state stay as they
        are; the step is counted all the same. A copy of the rows that `rows` keeps is used up."""
        self.steps += 1
        if skip is not None and skip.device.type == "cpu":  # nobody need be waited for to know it
            if skip:
                return
            skip = None
        if isinstance(clip, torch.Tensor) and clip.device.type == "cpu":
            clip = float(clip)
        everything = self.config.row_update == "dense_equivalent" and rows.ids is not None
        if rows.ids is not None and not everything and skip is None and self._in_place(gradient):
            K.sgd_rows_step(
                self.weight.detach(), self.state["momentum_buffer"], gradient, rows.ids, lr=lr, momentum=self.optim.momentum,
                weight_decay=self.optim.weight_decay, clip_coef=1.0 if clip is None else float(clip),
            )  # fmt: skip
            return
        for chunk in self._chunks(rows, everything=everything):
            g = gradient[chunk.begin : chunk.end]
            if everything:
                assert isinstance(chunk.index, slice)
                assert rows.ids is not None
                whole = g.new_zeros(chunk.index.stop - chunk.index.start, g.shape[1])
                g = whole.index_copy_(0, rows.ids[chunk.begin : chunk.end] - chunk.index.start, g)
            kept = rows.kept[chunk.begin : chunk.end] if rows.kept is not None and not everything else None
            self._update(chunk.index, g, lr, clip, skip, kept)

    def _in_place(self, gradient: torch.Tensor) -> bool:
        """Whether some rows are updated where they are, without copies of them."""
        return (
            self.config.optimizer == "sgd"
            and self.weight.device.type == "cpu"
            and {self.weight.dtype, self.state["momentum_buffer"].dtype} == {gradient.dtype}
        )

    def _chunks(self, rows: ScoredRows, *, everything: bool) -> Iterator[_Chunk]:
        n, width = self.weight.shape
        bound = CHUNK_ELEMENTS.get(self.weight.device.type, CHUNK_ELEMENTS["cuda"])
        size = max(64, bound // width)
        if everything:
            starts = torch.arange(0, n + size, size, device=self.weight.device).clamp_(max=n)
            assert rows.ids is not None
            places = torch.searchsorted(rows.ids, starts).tolist()
            for i, start in enumerate(range(0, n, size)):
                yield _Chunk(slice(start, min(start + size, n)), places[i], places[i + 1])
            return
        for begin in range(0, rows.count, size):
            end = min(begin + size, rows.count)
            yield _Chunk(slice(begin, end) if rows.ids is None else rows.ids[begin:end], begin, end)

    def _update(
        self,
        index: slice | torch.Tensor,
        g: torch.Tensor,
        lr: float,
        clip: float | torch.Tensor | None,
        skip: torch.Tensor | None,
        kept: torch.Tensor | None = None,
    ) -> None:
        """Rows `index` in wide copies (views where they are wide and consecutive), updated and put back. `kept`: a copy of those
        of the weight, which is used up."""
        stored = {"weight": self.weight.detach(), **self.state}
        held = {
            name: kept if name == "weight" and kept is not None else self._taken(name, tensor, index)
            for name, tensor in stored.items()
        }
        main = "master" if "master" in stored else "weight"
        works = {name: tensor.to(g.dtype) for name, tensor in held.items() if main == name or name != "weight"}
        if self.config.optimizer == "adamw":
            self._adamw(works[main], g, works, lr, clip, skip)
        else:
            self._sgd(works[main], g, works, lr, clip, skip)
        results = {**works, "weight": works[main]}
        for name, tensor in stored.items():
            made = results[name]
            if made is held[name] and isinstance(index, slice):
                continue  # a view: it is there already
            made = made.to(tensor.dtype)
            if skip is not None and main == "master" and name == "weight":
                made = torch.where(skip, held[name], made)  # a loaded weight need not be its master rounded
            if isinstance(index, slice):
                tensor[index] = made
            else:
                _put(tensor, index, made)

    def _adamw(
        self,
        w: torch.Tensor,
        g: torch.Tensor,
        works: dict[str, torch.Tensor],
        lr: float,
        clip: float | torch.Tensor | None,
        skip: torch.Tensor | None,
    ) -> None:
        optim = self.optim
        K.adamw_step(
            [w], [g], [works["exp_avg"]], [works["exp_avg_sq"]], step=self.steps, lr=lr, betas=optim.betas, eps=optim.eps,
            weight_decay=optim.weight_decay, clip_coef=clip, skip=skip,
        )  # fmt: skip

    def _sgd(
        self,
        w: torch.Tensor,
        g: torch.Tensor,
        works: dict[str, torch.Tensor],
        lr: float,
        clip: float | torch.Tensor | None,
        skip: torch.Tensor | None,
    ) -> None:
        """torch.optim.SGD's: decay is added to the gradient, the rate is applied to the momentum."""
        buffer, momentum, decay = works["momentum_buffer"], self.optim.momentum, self.optim.weight_decay
        if skip is None and not isinstance(clip, torch.Tensor):
            buffer.mul_(momentum).add_(g, alpha=1.0 if clip is None else clip)
            if decay:
                buffer.add_(w, alpha=decay)
            w.add_(buffer, alpha=-lr)
            return
        moved = (buffer * momentum).add_(g if clip is None else g * clip).add_(w, alpha=decay)
        updated = w.add(moved, alpha=-lr)
        if skip is not None:
            moved, updated = torch.where(skip, buffer, moved), torch.where(skip, w, updated)
        buffer.copy_(moved)
        w.copy_(updated)

    def weights_changed(self) -> None:
        """Take over weights that were loaded into the parameter."""
        if "master" in self.state:
            self.state["master"].copy_(self.weight.detach())

    def _taken(self, name: str, tensor: torch.Tensor, index: slice | torch.Tensor) -> torch.Tensor:
        """Rows of it: a view, or a copy in one room for all chunks, whose pages are there already."""
        if isinstance(index, slice):
            return tensor[index]
        n = index.shape[0]
        if name not in self._rooms or self._rooms[name].shape[0] < n:
            self._rooms[name] = tensor.new_empty(n, tensor.shape[1])
        return torch.index_select(tensor, 0, index, out=self._rooms[name][:n])


def _put(tensor: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """tensor[index] = rows. On the CPU index_copy_ moves element by element, so in 16-byte elements where they fit."""
    if tensor.device.type == "cpu" and tensor.shape[1] * tensor.element_size() % 16 == 0:
        tensor, rows = tensor.view(torch.complex128), rows.view(torch.complex128)
    tensor.index_copy_(0, index, rows)
