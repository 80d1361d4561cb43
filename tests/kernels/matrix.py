"""What the kernel tests share: which implementations and types run here, seeded tensors, and the acceptance rule.

The same tests run on a CPU (reference, cpp, torch), in a process with TRITON_INTERPRET=1 (triton; no bf16, which the
interpreter computes wrongly) and, with OPENCODER_TEST_DEVICE=cuda, on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from opencoder.kernels import _dispatch
from opencoder.kernels._library import CPP_MISSING, INTERPRETED

DEVICE = os.environ.get("OPENCODER_TEST_DEVICE", "cpu")
EXTERNAL = ("flash_attn", "apex", "liger")  # tests of their own: test_adapters.py
DTYPES = [torch.float64, torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
# Relative Frobenius error that no implementation may exceed, whatever plain torch's own error is.
FORWARD = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 2.5e-3}
GRADIENT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def implementations(operator: str) -> list[str]:
    """Those of our own that can run in this process. In the interpreter only Triton's: the rest run elsewhere."""
    names = []
    for name in _dispatch._REGISTRY[operator]:
        needs = {"cpp": CPP_MISSING is None and DEVICE == "cpu", "triton": INTERPRETED or DEVICE == "cuda"}
        runs_here = needs.get(name, True)
        if name not in EXTERNAL and runs_here and (not INTERPRETED or name == "triton"):
            names.append(name)
    return names


def each(operator: str) -> Any:
    """A parameter `impl` over `implementations(operator)`."""
    return pytest.mark.parametrize("impl", implementations(operator))


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal values, the same for every type up to rounding."""
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(DEVICE)


def error(found: torch.Tensor, truth: torch.Tensor, floor: float = 0.0) -> float:
    """‖found − truth‖ / ‖truth‖, 0 if there is nothing to compare. A truth whose root mean square is below `floor` counts
    as having that: one that is exactly 0 has no relative error."""
    if not truth.numel():
        return 0.0
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).norm() / truth.norm().clamp_min(max(1e-300, floor * truth.numel() ** 0.5)))


Outputs = dict[str, torch.Tensor]


def evaluate(
    function: Callable[..., torch.Tensor | Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor | None]
) -> Outputs:
    """Outputs `y0…` and gradients `d0…` of the inputs under fixed, non-uniform upstream gradients."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    upstream = [
        draw(*y.shape, seed=100 + i).to(y.dtype) if y.dim() else torch.ones_like(y) for i, y in enumerate(outputs)
    ]
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(outputs, wanted, upstream)
    return {f"y{i}": y.detach() for i, y in enumerate(outputs)} | {f"d{i}": g for i, g in enumerate(grads)}


def assert_accepted(
    mine: Outputs,
    plain: Outputs,
    truth: Outputs,
    dtype: torch.dtype,
    *,
    gradient_caps: dict[torch.dtype, float] = GRADIENT,
    forward_caps: dict[torch.dtype, float] = FORWARD,
    floor: float = 0.0,
) -> None:
    """Each result errs at most twice as much as plain torch in the same type, and never more than its cap.

    The rule of flash-attention's tests: it scales itself to the case. The caps keep both from drifting together."""
    assert mine.keys() == truth.keys()
    for name, value in mine.items():
        cap = (gradient_caps if name.startswith("d") else forward_caps)[dtype]
        allowed = min(2 * error(plain[name], truth[name], floor) + cap / 10, cap)
        assert value.shape == truth[name].shape, name
        assert error(value, truth[name], floor) <= allowed, (name, error(value, truth[name], floor), allowed)
