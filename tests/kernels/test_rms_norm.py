"""RMSNorm: every implementation against an fp64 truth; wide rows, other weight types, bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from opencoder import kernels as K

from .matrix import DEVICE, GRADIENT, INTERPRETED, assert_accepted, draw, dtypes, each, error, evaluate

pytestmark = pytest.mark.fast
EPS = 1e-5


def plain_norm(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor | None = None) -> Any:
    """The formula in the given type, operation by operation: what an eager model would do."""
    t = x if r is None else x + r
    y = t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + EPS) * w
    return y if r is None else (y, t)


SHAPES = [(0, 8), (1, 1), (3, 8), (5, 41), (2, 7, 128), (19, 760), (3, 1128), (2, 4096), (199, 24)]
# In the interpreter a wide row takes milliseconds a block; backward goes on from 16,384 values with the looping kernel.
WIDE = [(2, 40000)] if INTERPRETED else [(3, 65536), (1, 131072), (4096, 1024)]


@each("rms_norm")
@dtypes
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(impl: str, dtype: torch.dtype, with_residual: bool, shape: tuple[int, ...]) -> None:
    inputs = [draw(*shape), 1 + 0.1 * draw(shape[-1], seed=1), draw(*shape, seed=2) if with_residual else None]
    inputs = [None if x is None else x.to(dtype) for x in inputs]

    def ours(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor | None) -> Any:
        return K.rms_norm(x, w, eps=EPS, residual=r, impl=impl)

    truth = evaluate(plain_norm, [None if x is None else x.double() for x in inputs])
    # The gradient of a row of one value is 0 but for eps.
    assert_accepted(evaluate(ours, inputs), evaluate(plain_norm, inputs), truth, dtype, floor=0.1)


@each("rms_norm")
@pytest.mark.parametrize("shape", WIDE)
def test_wide_rows(impl: str, shape: tuple[int, ...]) -> None:
    inputs = [draw(*shape), 1 + 0.1 * draw(shape[-1], seed=1), draw(*shape, seed=2)]
    truth = evaluate(plain_norm, inputs)
    narrow = [x.float() for x in inputs]
    mine = evaluate(lambda x, w, r: K.rms_norm(x, w, eps=EPS, residual=r, impl=impl), narrow)
    assert_accepted(mine, evaluate(plain_norm, narrow), truth, torch.float32)


@each("rms_norm")
def test_inputs_of_any_scale(impl: str) -> None:
    x, w = draw(4, 64, dtype=torch.float32), draw(64, seed=1, dtype=torch.float32)
    for factor in (1e-4, 30.0, 1e4):
        y, truth = K.rms_norm(x * factor, w, eps=EPS, impl=impl), plain_norm((x * factor).double(), w.double())
        assert error(y, truth) <= 2e-6


@each("rms_norm")
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_residual", [False, True])
def test_fp32_weight_beside_16_bit_activations(impl: str, dtype: torch.dtype, with_residual: bool) -> None:
    inputs = [draw(33, 96, dtype=dtype), 1 + draw(96, seed=1).float()]
    inputs += [draw(33, 96, seed=2, dtype=dtype)] if with_residual else []
    mine = evaluate(lambda x, w, *r: K.rms_norm(x, w, eps=EPS, residual=r[0] if r else None, impl=impl), inputs)
    truth = evaluate(plain_norm, [x.double() for x in inputs])
    assert (mine["y0"].dtype, mine["d0"].dtype, mine["d1"].dtype) == (dtype, dtype, torch.float32)
    assert error(mine["y0"], truth["y0"]) <= 2.5e-3
    assert all(error(mine[name], truth[name]) <= GRADIENT[dtype] for name in mine if name.startswith("d"))


@each("rms_norm")
def test_the_norm_is_taken_of_the_unrounded_sum(impl: str) -> None:
    x, r = torch.full((1, 8), 1.0, device=DEVICE).half(), torch.full((1, 8), 2.0**-12, device=DEVICE).half()
    y, total = K.rms_norm(x, torch.ones(8, device=DEVICE), eps=0.0, residual=r, impl=impl)
    assert torch.equal(total, x)  # 1 + 2⁻¹² rounds to 1
    assert torch.equal(y, torch.ones_like(y))
    _, total = K.rms_norm(x, torch.ones(8, device=DEVICE), eps=0.0, residual=x, impl=impl)
    assert torch.equal(total, 2 * x)


@each("rms_norm")
def test_a_nan_stays_in_its_row(impl: str) -> None:
    x = draw(4, 8, dtype=torch.float32)
    x[2, 3] = torch.nan
    x[0] = torch.inf
    y = K.rms_norm(x, torch.ones(8, device=DEVICE), eps=EPS, impl=impl)
    assert y[2].isnan().all()
    assert y[0].isnan().all()  # inf / inf
    assert not y[[1, 3]].isnan().any()


@each("rms_norm")
def test_no_rows_give_a_weight_gradient_of_zeros(impl: str) -> None:
    w = torch.ones(8, requires_grad=True, device=DEVICE)
    K.rms_norm(torch.empty(0, 8, requires_grad=True, device=DEVICE), w, eps=EPS, impl=impl).sum().backward()
    assert torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.parametrize(
    ("x", "w", "r", "says"),
    [
        (torch.ones(2, 4), torch.ones(5), None, r"weight must be \(4,\), got \(5,\)"),
        (torch.ones(2, 4), torch.ones(4, 1), None, "weight must be"),
        (torch.ones(2, 4, dtype=torch.int64), torch.ones(4), None, "x is torch.int64; allowed"),
        (torch.ones(2, 4), torch.ones(4), torch.ones(2, 3), "residual must be"),
        (torch.ones(2, 4), torch.ones(4), torch.ones(2, 4).double(), "residual must be torch.float32"),
        (torch.ones(2, 0), torch.ones(0), None, "M=0; it must be at least 1"),
        (torch.ones(2, 4), torch.ones(4, device="meta"), None, "x on cpu, weight on meta"),
    ],
)
def test_bad_input_is_named(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        K.rms_norm(x, w, eps=EPS, residual=r)


def test_a_negative_eps_is_named() -> None:
    with pytest.raises(ValueError, match=r"eps=-1\.0; it must be at least 0"):
        K.rms_norm(torch.ones(2, 4), torch.ones(4), eps=-1.0)


def test_without_the_library_the_reference_runs_and_says_once_what_is_missing() -> None:
    code = (
        "import torch, logging; logging.basicConfig()\n"
        "from opencoder import kernels as K\n"
        "x, w = torch.ones(2, 4), torch.ones(4)\n"
        "for _ in range(3): K.rms_norm(x, w, eps=1e-5)\n"
        "print(K.explain('rms_norm', x, w, eps=1e-5))"
    )
    env = {**os.environ, "OPENCODER_NO_EXT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "cpp: OPENCODER_NO_EXT=1" in done.stdout
    assert "reference: can serve  <- runs" in done.stdout
