"""A case ready to run: every contender with tensors of its own, and what its results should be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cases import Case, Function


class Prepared:
    """`runs`: contender → a call without arguments that gives outputs, or outputs and gradients."""

    def __init__(
        self, case: Case, device: torch.device, *, without: Sequence[str] = (), only: str | None = None
    ) -> None:
        self.case, self.device = case, device
        chosen = {n: f for n, f in case.contenders.items() if n not in without and only in (None, n)}
        # Tensors of its own for each: some packages write over their inputs.
        self.runs: dict[str, Callable[[], list[torch.Tensor]]] = {n: self._run_of(f) for n, f in chosen.items()}

    def _run_of(self, function: Function) -> Callable[[], list[torch.Tensor]]:
        inputs = [x.requires_grad_(self.case.backward) for x in self.case.inputs(self.device)]
        upstream: list[torch.Tensor] = []

        def forward() -> list[torch.Tensor]:
            with torch.no_grad():
                return listed(function(*inputs))

        def forward_and_backward() -> list[torch.Tensor]:
            outputs = listed(function(*inputs))
            if not upstream:
                upstream.extend(upstream_like(outputs))
            return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]

        return forward_and_backward if self.case.backward else forward

    def expected(self) -> list[torch.Tensor]:
        """What the runs should give, in fp64."""
        inputs = [x.double().requires_grad_(self.case.backward) for x in self.case.inputs(self.device)]
        if not self.case.backward:
            with torch.no_grad():
                return listed(self.case.truth(*inputs))
        outputs = listed(self.case.truth(*inputs))
        return [*outputs, *torch.autograd.grad(outputs, inputs, upstream_like(outputs))]

    def wrong(self) -> dict[str, str]:
        """Contender → why its results are not right; one that cannot run at all is among them."""
        expected = self.expected()
        found = {}
        for name, run in self.runs.items():
            try:
                results = run()
            except Exception as error:  # of any package and kind: the table says so in its place
                found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            worst = max((relative_error(a, b) for a, b in zip(results, expected, strict=False)), default=0.0)
            if not worst <= self.case.tolerance:  # a NaN is wrong too
                found[name] = f"error {worst:.1e}, allowed {self.case.tolerance:.0e}"
        return found


def listed(outputs: Any) -> list[torch.Tensor]:
    """One tensor or several, as a list; nothing as an empty one."""
    if outputs is None:
        return []
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def upstream_like(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients to send back: drawn from the same seed for each contender, 1 for a loss."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [
        torch.ones_like(o)
        if o.dim() == 0
        else torch.randn(o.shape, generator=generator, device=o.device, dtype=torch.float32).to(o.dtype)
        for o in outputs
    ]


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """‖found − truth‖ / ‖truth‖."""
    return float((found.detach().double() - truth.detach()).norm() / truth.detach().norm().clamp_min(1e-30))
