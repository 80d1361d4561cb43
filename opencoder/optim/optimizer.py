"""The optimizer of a run: torch's fused AdamW or SGD over the parameters of this rank, with fp32 master weights for
16-bit ones, the global gradient norm, clipping, and state that a checkpoint can name.

Gradients of 16-bit parameters are folded into fp32 main gradients after each micro-batch (`fold_gradients`): a sum of
many small bf16 numbers would lose its tail."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from opencoder.config import OptimConfig
from opencoder.parallel.gradients import global_grad_norm, reduce_gradients
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.placement import Placement, placement_of

NO_DECAY_DIMS = 1
"""Parameters with at most this many dimensions (norms, biases) get no weight decay."""


class Optimizer:
    """Updates `parameters` (checkpoint key → parameter)."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.parameters = dict(parameters)
        self.placements = {key: placement_of(p) for key, p in self.parameters.items()}
        self.masters: dict[str, nn.Parameter] = {}
        for key, p in self.parameters.items():
            wide = p.dtype in (torch.float32, torch.float64)
            self.masters[key] = p if wide else nn.Parameter(p.detach().float())
        self.inner = self._build()

    def _build(self) -> torch.optim.Optimizer:
        c = self.config
        decay = [m for m in self.masters.values() if m.dim() > NO_DECAY_DIMS]
        plain = [m for m in self.masters.values() if m.dim() <= NO_DECAY_DIMS]
        groups = [{"params": decay, "weight_decay": c.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        if c.name == "adamw":
            return torch.optim.AdamW(groups, lr=c.lr, betas=c.betas, eps=c.eps, fused=True)
        return torch.optim.SGD(groups, lr=c.lr, momentum=c.momentum, fused=True)

    def fold_gradients(self) -> None:
        """Add the 16-bit gradients of the last backward to the fp32 main gradients (no-op for wide parameters)."""
        for key, p in self.parameters.items():
            master = self.masters[key]
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

    def reduce_gradients(self) -> torch.Tensor:
        """Sum gradients over the data axes; returns the global gradient norm before clipping, 0-dim."""
        gradients = self.gradients()
        reduce_gradients(gradients, self.mesh)
        return global_grad_norm(gradients, self.mesh)

    def step(self, *, lr: float, grad_norm: torch.Tensor) -> float:
        """Clip by the global norm, update, drop the gradients. Returns the clip factor (1.0: not clipped)."""
        clip = 1.0
        if self.config.clip_norm is not None:
            clip = min(1.0, self.config.clip_norm / (float(grad_norm) + 1e-6))
        if clip < 1.0:
            torch._foreach_mul_([g for g, _ in self.gradients()], clip)
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        with torch.no_grad():
            for key, p in self.parameters.items():
                if self.masters[key] is not p:
                    p.copy_(self.masters[key])
        return clip

    def state_tensors(self) -> dict[str, tuple[torch.Tensor, Placement]]:
        """What a checkpoint must hold beside the weights: `optim.<name>.<key>` → (local tensor, placement).

        Creates the state if no step has been taken, so that a resumed run has somewhere to load it to."""
        tensors = {}
        for key, master in self.masters.items():
            placement = self.placements[key]
            for name, tensor in self._state_of(master).items():
                tensors[f"optim.{name}.{key}"] = (tensor, placement)
            if master is not self.parameters[key]:
                tensors[f"optim.master.{key}"] = (master.detach(), placement)
        return tensors

    def _state_of(self, master: nn.Parameter) -> dict[str, torch.Tensor]:
        names = ("exp_avg", "exp_avg_sq") if self.config.name == "adamw" else ("momentum_buffer",)
        state = self.inner.state[master]
        if "step" not in state and self.config.name == "adamw":
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        for name in names:
            if state.get(name) is None:
                state[name] = torch.zeros_like(master)
        return {name: state[name] for name in names}

    def set_step_count(self, step: int) -> None:
        """Tell the optimizer how many updates its state has seen (AdamW's bias correction), after loading it."""
        for master in self.masters.values():
            if self.config.name == "adamw":
                self.inner.state[master]["step"] = torch.tensor(float(step), device=master.device)
