"""AdamW or SGD with the whole state of this rank's parameters on each data-parallel rank: fp32 master weights for 16-bit
ones, the global gradient norm, clipping, and state that a checkpoint can name.

Gradients of 16-bit parameters are folded into fp32 main gradients after each micro-batch (`fold_gradients`): a sum of
many small bf16 numbers would lose its tail."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.optim.sgd import sgd

from opencoder import kernels as K
from opencoder.config import OptimConfig
from opencoder.parallel.gradients import global_grad_norm, reduce_gradients
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.placement import Placement, placement_of

NO_DECAY_DIMS = 1
"""Parameters with at most this many dimensions (norms, biases) get no weight decay."""
STATE_NAMES = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""State tensors of each parameter, by the name of the optimizer."""


class ReplicatedOptimizer:
    """Updates `parameters` (checkpoint key → parameter). What its methods promise stands in base.Optimizer."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.parameters = dict(parameters)
        self.placements = {key: placement_of(p) for key, p in self.parameters.items()}
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

    def start_reduction(self, keys: Iterable[str]) -> None:
        """Nothing yet: all gradients are reduced together in `finish_reduction`."""

    def finish_reduction(self) -> torch.Tensor:
        """Sum gradients over the axes of their placements; returns the global gradient norm before clipping, 0-dim."""
        gradients = self.gradients()
        reduce_gradients(gradients, self.mesh)
        self._norm = global_grad_norm(gradients, self.mesh)
        return self._norm

    def step(self, *, lr: float, skip: torch.Tensor | None = None) -> torch.Tensor:
        """Clip by the global norm, update, drop the gradients. Returns the clip factor, 0-dim (1: not clipped)."""
        if self._norm is None:
            raise RuntimeError("step() before finish_reduction(): the gradients are not those of all ranks yet")
        clip = torch.ones_like(self._norm)
        if self.config.clip_norm is not None:
            clip = (self.config.clip_norm / (self._norm + 1e-6)).clamp(max=1.0)
        self._norm = None
        self.steps += 1
        decay = [key for key, m in self.masters.items() if m.dim() > NO_DECAY_DIMS]
        plain = [key for key, m in self.masters.items() if m.dim() <= NO_DECAY_DIMS]
        for keys, weight_decay in ((decay, self.config.weight_decay), (plain, 0.0)):
            if keys:
                update = self._adamw if self.config.name == "adamw" else self._sgd
                update(keys, lr, weight_decay, clip if self.config.clip_norm is not None else None, skip)
        for master in self.masters.values():
            master.grad = None
        return clip

    def _adamw(
        self,
        keys: list[str],
        lr: float,
        weight_decay: float,
        clip: torch.Tensor | None,
        skip: torch.Tensor | None,
    ) -> None:
        """The clip factor is applied on the way, so that gradients are read once and not written."""
        masters = [self.masters[key] for key in keys]
        params = [self.parameters[key] for key in keys]
        narrow = any(p is not m for p, m in zip(params, masters, strict=True))
        first, second = ([self.state[key][name] for key in keys] for name in STATE_NAMES["adamw"])
        c = self.config
        K.adamw_step(
            params,
            self._grads(masters),
            first,
            second,
            masters if narrow else None,
            step=self.steps,
            lr=lr,
            betas=c.betas,
            eps=c.eps,
            weight_decay=weight_decay,
            clip_coef=clip,
            skip=skip,
        )

    @torch.no_grad()
    def _sgd(
        self,
        keys: list[str],
        lr: float,
        weight_decay: float,
        clip: torch.Tensor | None,
        skip: torch.Tensor | None,
    ) -> None:
        masters = [self.masters[key] for key in keys]
        grads = self._grads(masters)
        if clip is not None:
            torch._foreach_mul_(grads, clip.to(grads[0].dtype))
        buffers: list[torch.Tensor | None] = [self.state[key]["momentum_buffer"] for key in keys]
        changed = [*masters, *(b for b in buffers if b is not None)]
        before = None if skip is None else [t.clone() for t in changed]
        momentum = self.config.momentum
        sgd(
            masters, grads, buffers, foreach=True, weight_decay=weight_decay, momentum=momentum, lr=lr, dampening=0.0,
            nesterov=False, maximize=False,
        )  # fmt: skip
        if skip is not None and before is not None:
            for tensor, old in zip(changed, before, strict=True):
                tensor.copy_(torch.where(skip, old, tensor))
        for key in keys:
            if self.masters[key] is not self.parameters[key]:
                self.parameters[key].copy_(self.masters[key])

    @staticmethod
    def _grads(masters: list[torch.Tensor]) -> list[torch.Tensor]:
        return [m.grad for m in masters if m.grad is not None]

    def state_tensors(self) -> dict[str, tuple[torch.Tensor, Placement]]:
        """What a checkpoint must hold beside the weights: `optim.<name>.<key>` → (local tensor, placement)."""
        tensors = {}
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
