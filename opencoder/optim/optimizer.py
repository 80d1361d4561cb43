"""AdamW or SGD with the whole state of this rank's parameters on each data-parallel rank: fp32 master weights for 16-bit
ones, the global gradient norm, clipping, and state that a checkpoint can name.

Gradients of 16-bit parameters are folded into fp32 main gradients after each micro-batch (`fold_gradients`): a sum of
many small bf16 numbers would lose its tail."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from opencoder.config import OptimConfig
from opencoder.parallel.gradients import global_grad_norm, reduce_gradients
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.placement import Placement, placement_of

from .base import StateTensor
from .update import STATE_NAMES, Piece, Settings, clip_factor, settings_of, update, with_others


class ReplicatedOptimizer:
    """Updates `parameters` (checkpoint key → parameter). What its methods promise stands in base.Optimizer."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.parameters = dict(parameters)
        self.placements = {key: placement_of(p) for key, p in self.parameters.items()}
        self._groups: dict[Settings, list[str]] = defaultdict(list)
        for key, placement in self.placements.items():
            self._groups[settings_of(key, placement, config)].append(key)
        self.masters: dict[str, torch.Tensor] = {}
        for key, p in self.parameters.items():
            wide = p.dtype in (torch.float32, torch.float64)
            self.masters[key] = p if wide else p.detach().float()
        self.state = {
            key: {name: torch.zeros_like(master) for name in STATE_NAMES[config.name]}
            for key, master in self.masters.items()
        }
        self.steps = 0
        """Updates the state has seen: AdamW's bias correction."""
        self._norm: torch.Tensor | None = None

    def fold_gradients(self, keys: Iterable[str] | None = None) -> None:
        """Add the 16-bit gradients of the last backward to the fp32 main gradients (no-op for wide parameters)."""
        for key in self.parameters if keys is None else keys:
            p, master = self.parameters[key], self.masters[key]
            if master is p or p.grad is None:
                continue
            if master.grad is None:
                master.grad = p.grad.float()
            else:
                master.grad += p.grad
            p.grad = None

    def gradients(self) -> list[tuple[torch.Tensor, Placement]]:
        """Main gradients with their placements. A parameter without a gradient is a defect and raises."""
        missing = [key for key, m in self.masters.items() if m.grad is None]
        if missing:
            raise RuntimeError(f"no gradient for {', '.join(missing[:3])}: the backward pass did not reach it")
        return [(m.grad, self.placements[key]) for key, m in self.masters.items() if m.grad is not None]

    def last_backward(self) -> None:
        """Nothing: all gradients are reduced together in `finish_reduction`."""

    def start_reduction(self, keys: Iterable[str]) -> None:
        """Nothing: all gradients are reduced together in `finish_reduction`."""

    def finish_reduction(self, others_sq_norm: torch.Tensor | None = None) -> torch.Tensor:
        """Sum gradients over the axes of their placements; returns the global gradient norm before clipping, 0-dim."""
        gradients = self.gradients()
        reduce_gradients(gradients, self.mesh)
        self._norm = with_others(global_grad_norm(gradients, self.mesh), others_sq_norm)
        return self._norm

    def step(self, *, lr: float, skip: torch.Tensor | None = None) -> torch.Tensor:
        """Clip by the global norm, update, drop the gradients. Returns the clip factor, 0-dim (1: not clipped)."""
        if self._norm is None:
            raise RuntimeError("step() before finish_reduction(): the gradients are not those of all ranks yet")
        clip = clip_factor(self._norm, self.config)
        self._norm = None
        self.steps += 1
        factor = clip if self.config.clip_norm is not None else None
        for settings, keys in self._groups.items():
            pieces = [self._piece(key) for key in keys]
            update(pieces, settings, self.config, step=self.steps, lr=lr, clip=factor, skip=skip)
        for master in self.masters.values():
            master.grad = None
        return clip

    def _piece(self, key: str) -> Piece:
        master = self.masters[key]
        assert master.grad is not None, key
        return Piece(self.parameters[key], master, master.grad, self.state[key])

    def wait_weights(self) -> None:
        """Nothing: every rank has updated all of them."""

    def state_bytes(self) -> int:
        """Bytes of weights, main gradients, masters and state, the gradients counted as they are during a step."""
        tensors = [
            *self.parameters.values(),
            *self.masters.values(),  # as many bytes as their gradients
            *(m for key, m in self.masters.items() if m is not self.parameters[key]),
            *(tensor for state in self.state.values() for tensor in state.values()),
        ]
        return sum(t.nbytes for t in tensors)

    def state_tensors(self) -> dict[str, StateTensor]:
        """What a checkpoint must hold beside the weights: `optim.<name>.<key>` → (local tensor, placement)."""
        tensors: dict[str, StateTensor] = {}
        for key, master in self.masters.items():
            placement = self.placements[key]
            for name, tensor in self.state[key].items():
                tensors[f"optim.{name}.{key}"] = (tensor, placement)
            if master is not self.parameters[key]:
                tensors[f"optim.master.{key}"] = (master.detach(), placement)
        return tensors

    @torch.no_grad()
    def weights_changed(self) -> None:
        """Take over weights that were loaded into the parameters: the master weights follow them."""
        for key, p in self.parameters.items():
            if self.masters[key] is not p:
                self.masters[key].copy_(p)

    def set_step_count(self, step: int) -> None:
        """Tell the optimizer how many updates its state has seen (AdamW's bias correction), after loading it."""
        self.steps = step
