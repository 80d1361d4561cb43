"""AdamW or SGD whose state is split over the data-parallel ranks (ZeRO-1): each updates an equal interval of the flattened
parameters and holds masters and state for that alone.

Bytes on each rank, P parameters of it, d ranks in dp·cp, AdamW: bf16 2P weights + 4P main gradients + 12P/d; fp32
4P + 4P + 8P/d; fp64 twice that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from opencoder.config import OptimConfig
from opencoder.parallel.gradients import norm_over_world
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.placement import placement_of
from opencoder.parallel.sharded import Bucket, Buckets

from .base import StateTensor
from .update import STATE_NAMES, Piece, Settings, clip_factor, settings_of, update, with_others


class ShardedOptimizer:
    """Updates `parameters` (checkpoint key → parameter). What its methods promise stands in base.Optimizer.

    The parameters become views of its buffers: they may be filled in place, not replaced."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimConfig,
        mesh: Mesh,
        *,
        modules: Sequence[nn.Module] = (),
    ) -> None:
        """`parameters` in the order of the forward pass. `modules`: the models they belong to; the new weights then arrive
        while the next forward pass runs, and without them before `step` returns."""
        self.config, self.mesh = config, mesh
        self.parameters = dict(parameters)
        self.placements = {key: placement_of(p) for key, p in self.parameters.items()}
        self.buckets = Buckets(self.parameters, self.placements, mesh)
        self.steps = 0
        """Updates the state has seen: AdamW's bias correction."""
        self._norm: torch.Tensor | None = None
        self._begun: set[str] = set()
        self._last = False
        self._overlap = bool(modules)
        self._gradients = {key: self.buckets.gradient(key) for key in self.parameters}
        self._buffers: list[torch.Tensor] = []
        self.pieces: dict[str, Piece] = {}
        for bucket in self.buckets.buckets:
            self._add_pieces(bucket)
        self._groups: dict[Settings, list[str]] = defaultdict(list)
        for key in self.parameters:
            if self.pieces[key].parameter.numel():
                self._groups[settings_of(key, self.placements[key], config)].append(key)
        for key, p in self.parameters.items():
            p.register_post_accumulate_grad_hook(lambda _, key=key: self._accumulated(key))
        for module in modules:
            self.buckets.wait_before_forward(module)

    def _add_pieces(self, bucket: Bucket) -> None:
        """Masters and state for this rank's interval of `bucket`, and the views of them for each parameter."""
        first, last = bucket.share
        owned = bucket.weights[first:last]
        narrow = bucket.weights.dtype != bucket.gradients.dtype
        master = owned.to(bucket.gradients.dtype) if narrow else owned
        states = {name: torch.zeros_like(owned, dtype=bucket.gradients.dtype) for name in STATE_NAMES[self.config.name]}
        self._buffers += [*states.values(), *([master] if narrow else [])]
        for key in bucket.slots:
            begin, end = bucket.owned(key)
            weight = bucket.weights[begin:end]
            here = slice(max(begin - first, 0), max(end - first, 0))
            self.pieces[key] = Piece(
                weight,
                master[here] if narrow else weight,
                bucket.gradients[begin:end],
                {name: state[here] for name, state in states.items()},
            )

    # ---- gradients ----

    def _accumulated(self, key: str) -> None:
        """Backward has added to the gradient of `key`. Does not happen in every pipeline schedule."""
        if self.buckets.of[key].gathering is not None:
            raise RuntimeError(f"the forward pass did not wait for the new weights of {key}: they may have been stale")
        self._fold(key)
        if self._last:
            self.buckets.complete([key])

    def _fold(self, key: str) -> None:
        p, main = self.parameters[key], self._gradients[key]
        if p.grad is None or p.grad is main:
            return
        if key in self._begun:
            main += p.grad
        else:
            main.copy_(p.grad)
            self._begun.add(key)
        # autograd goes on adding to a wide gradient where it lies
        p.grad = main if p.dtype == main.dtype else None

    @torch.no_grad()
    def fold_gradients(self, keys: Iterable[str] | None = None) -> None:
        """Bring the gradients of the last backward to the buffers, where a hook has not done it already."""
        for key in self.parameters if keys is None else keys:
            self._fold(key)

    def last_backward(self) -> None:
        """The next backward is the last of the step: reductions start within it, as gradients become complete."""
        self._last = True

    def start_reduction(self, keys: Iterable[str]) -> None:
        """Start the reduce-scatter of every bucket that is complete with `keys`, in the order of the buckets."""
        keys = list(keys)
        self.fold_gradients(keys)
        self.buckets.complete(keys)

    def finish_reduction(self, others_sq_norm: torch.Tensor | None = None) -> torch.Tensor:
        """Sum all gradients over the axes of their placements; returns the global gradient norm before clipping, 0-dim."""
        self._last = False
        self.fold_gradients()
        missing = [key for key in self.parameters if key not in self._begun]
        if missing:
            raise RuntimeError(f"no gradient for {', '.join(missing[:3])}: the backward pass did not reach it")
        self.buckets.finish()
        by_copies: dict[int, list[torch.Tensor]] = defaultdict(list)
        for keys in self._groups.values():
            for key in keys:
                ranks = self.buckets.of[key].data.size
                by_copies[self.placements[key].copies(self.mesh) // ranks].append(self.pieces[key].gradient)
        norm = norm_over_world(by_copies, self.mesh, self.buckets.buckets[0].weights.device)
        self._norm = with_others(norm, others_sq_norm)
        return self._norm

    # ---- update ----

    def step(self, *, lr: float, skip: torch.Tensor | None = None) -> torch.Tensor:
        """Clip by the global norm, update this rank's intervals, start to exchange them. Returns the clip factor."""
        if self._norm is None:
            raise RuntimeError("step() before finish_reduction(): the gradients are not those of all ranks yet")
        clip = clip_factor(self._norm, self.config)
        self._norm = None
        self.steps += 1
        factor = clip if self.config.clip_norm is not None else None
        for settings, keys in self._groups.items():
            pieces = [self.pieces[key] for key in keys]
            update(pieces, settings, self.config, step=self.steps, lr=lr, clip=factor, skip=skip)
        for p in self.parameters.values():
            p.grad = None
        self._begun.clear()
        self.buckets.start_gather()
        if not self._overlap:
            self.wait_weights()
        return clip

    def wait_weights(self) -> None:
        """Until all parameters are those of the last update."""
        self.buckets.wait_weights()

    # ---- state ----

    def state_tensors(self) -> dict[str, StateTensor]:
        """`optim.<name>.<key>` → (this rank's interval, placement, interval within its flattened part)."""
        self.wait_weights()
        tensors: dict[str, StateTensor] = {}
        for key, piece in self.pieces.items():
            bucket, placement = self.buckets.of[key], self.placements[key]
            start = bucket.slots[key][0]
            begin, end = bucket.owned(key)
            where = (begin - start, end - start)
            for name, tensor in piece.state.items():
                tensors[f"optim.{name}.{key}"] = (tensor, placement, where)
            if piece.master is not piece.parameter:
                tensors[f"optim.master.{key}"] = (piece.master, placement, where)
        return tensors

    def state_bytes(self) -> int:
        """Bytes this rank holds for good: weights, main gradients, masters and state."""
        return self.buckets.nbytes() + sum(t.nbytes for t in self._buffers)

    @torch.no_grad()
    def weights_changed(self) -> None:
        """Take over weights that were loaded into the parameters: the master weights follow them."""
        for piece in self.pieces.values():
            if piece.master is not piece.parameter:
                piece.master.copy_(piece.parameter)

    def set_step_count(self, step: int) -> None:
        """Tell the optimizer how many updates its state has seen (AdamW's bias correction), after loading it."""
        self.steps = step
