"""RMSNorm: every implementation against an fp64 truth, its registration with torch, and bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from opencoder import kernels as K
from opencoder.kernels._library import cpp_missing

pytestmark = pytest.mark.fast
EPS = 1e-5
IMPLS = [
    "reference",
    pytest.param("cpp", marks=pytest.mark.skipif(cpp_missing() is not None, reason=str(cpp_missing()))),
]
# Relative Frobenius error no implementation may exceed, whatever torch's own error is.
CAPS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 2.5e-3}
GRAD_CAPS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain(x: torch.Tensor, w: torch.Tensor, residual: torch.Tensor | None) -> Any:
    """The formula in the given type, operation by operation: what an eager model would do."""
    total = x if residual is None else x + residual
    y = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS) * w
    return y, total


def error(a: torch.Tensor, truth: torch.Tensor) -> float:
    return float((a.double() - truth).norm() / truth.norm().clamp_min(1e-300)) if truth.numel() else 0.0


def run_all(
    function: Callable[..., Any], x: torch.Tensor, w: torch.Tensor, r: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Outputs and gradients under fixed, non-uniform upstream gradients."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    r = None if r is None else r.clone().requires_grad_()
    y, total = function(x, w, r)
    loss = (y * draw(*y.shape, seed=7).to(y.dtype)).sum()
    if r is not None:
        loss = loss + (total * draw(*y.shape, seed=8).to(y.dtype)).sum()
    loss.backward()
    found = {"y": y.detach(), "dx": x.grad, "dw": w.grad}
    return found | ({} if r is None else {"total": total.detach(), "dr": r.grad})


def ours(impl: str) -> Callable[..., Any]:
    def function(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor | None) -> Any:
        out = K.rms_norm(x, w, eps=EPS, residual=r, impl=impl)
        return out if r is not None else (out, x)

    return function


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", list(CAPS))
@pytest.mark.parametrize("shape", [(1, 8), (3, 8), (5, 41), (2, 7, 128), (199, 760), (17, 2240)])
def test_error_is_at_most_twice_that_of_plain_torch(
    impl: str, with_residual: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, w = draw(*shape).to(dtype), (1 + 0.1 * draw(shape[-1], seed=1)).to(dtype)
    r = draw(*shape, seed=2).to(dtype) if with_residual else None
    truth = run_all(plain, x.double(), w.double(), None if r is None else r.double())
    naive, mine = run_all(plain, x, w, r), run_all(ours(impl), x, w, r)
    for name, value in mine.items():
        cap = (GRAD_CAPS if name.startswith("d") else CAPS)[dtype]
        assert value.dtype == dtype
        assert error(value, truth[name]) <= min(2 * error(naive[name], truth[name]) + cap / 10, cap), name


@pytest.mark.parametrize("impl", IMPLS)
def test_fp32_weight_beside_bf16_activations(impl: str) -> None:
    x, w = draw(33, 96).bfloat16(), (1 + draw(96, seed=1)).float()
    mine = run_all(ours(impl), x, w, None)
    truth = run_all(plain, x.double(), w.double(), None)
    assert (mine["y"].dtype, mine["dw"].dtype) == (torch.bfloat16, torch.float32)
    assert error(mine["y"], truth["y"]) <= 2.5e-3
    assert error(mine["dw"], truth["dw"]) <= 1e-2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradcheck(impl: str, with_residual: bool) -> None:
    x, w = draw(3, 5).requires_grad_(), (1 + draw(5, seed=1)).requires_grad_()
    inputs = (x, w) + ((draw(3, 5, seed=2).requires_grad_(),) if with_residual else ())
    assert torch.autograd.gradcheck(lambda x, w, r=None: K.rms_norm(x, w, eps=EPS, residual=r, impl=impl), inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_that_are_not_contiguous(impl: str) -> None:
    base, w = draw(6, 64), draw(32, seed=1)
    for x in (base[:, 1:33], base[:, ::2], base[:4, :32].T.contiguous().T, base[:1, :32].expand(5, 32)):
        assert torch.allclose(K.rms_norm(x, w, eps=EPS, impl=impl), plain(x, w, None)[0], rtol=1e-12)
    x = draw(4, 32).requires_grad_()
    K.rms_norm(x, w, eps=EPS, impl=impl).sum().backward()  # the upstream gradient has stride 0
    z = x.detach().clone().requires_grad_()
    plain(z, w, None)[0].sum().backward()
    assert torch.allclose(x.grad, z.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_and_a_nan_stays_in_its_row(impl: str) -> None:
    w = torch.ones(8, requires_grad=True)
    empty = torch.empty(0, 8, requires_grad=True)
    K.rms_norm(empty, w, eps=EPS, impl=impl).sum().backward()
    assert empty.grad.shape == (0, 8)
    assert torch.equal(w.grad, torch.zeros(8))
    x = draw(4, 8).float()
    x[2, 3] = torch.nan
    y = K.rms_norm(x, w, eps=EPS, impl=impl)
    assert y[2].isnan().all()
    assert not y[[0, 1, 3]].isnan().any()


needs_cpp = pytest.mark.skipif(cpp_missing() is not None, reason=str(cpp_missing()))


@needs_cpp
def test_same_bits_for_any_number_of_threads() -> None:
    x, w = draw(100, 33).float(), draw(33, seed=1).float()
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run_all(ours("cpp"), x, w, x))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@needs_cpp
def test_opcheck() -> None:
    x, w, r = (t.requires_grad_() for t in (draw(3, 8), draw(8, seed=1), draw(3, 8, seed=2)))
    torch.library.opcheck(torch.ops.opencoder.rms_norm_fwd.default, (x, w, EPS))
    torch.library.opcheck(torch.ops.opencoder.add_rms_norm_fwd.default, (x, r, w, EPS))
    rstd = torch.ops.opencoder.rms_norm_fwd(x, w, EPS)[1].detach()
    x, w = x.detach(), w.detach()
    torch.library.opcheck(torch.ops.opencoder.rms_norm_bwd.default, (x, x, x, w, rstd))
    torch.library.opcheck(torch.ops.opencoder.rms_norm_bwd.default, (x, None, x, w, rstd))


@needs_cpp
def test_compiled_without_graph_break_gives_the_same() -> None:
    x, w, r = draw(6, 16), draw(16, seed=1), draw(6, 16, seed=2)
    compiled = torch.compile(ours("cpp"), fullgraph=True, backend="aot_eager")
    expected, found = run_all(ours("cpp"), x, w, r), run_all(compiled, x, w, r)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@needs_cpp
def test_double_backward_is_refused() -> None:
    x, w = draw(2, 4).requires_grad_(), draw(4, seed=1).requires_grad_()
    (g,) = torch.autograd.grad(K.rms_norm(x, w, eps=EPS, impl="cpp").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


@pytest.mark.parametrize(
    ("x", "w", "r", "says"),
    [
        (torch.ones(2, 4), torch.ones(5), None, r"weight must be \(4,\), got \(5,\)"),
        (torch.ones(2, 4), torch.ones(4, 1), None, "weight must be"),
        (torch.ones(2, 4, dtype=torch.int64), torch.ones(4), None, "x is torch.int64; allowed"),
        (torch.ones(2, 4), torch.ones(4), torch.ones(2, 3), "residual must be"),
        (torch.ones(2, 4), torch.ones(4), torch.ones(2, 4).double(), "residual must be torch.float32"),
    ],
)
def test_bad_input_is_named(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        K.rms_norm(x, w, eps=EPS, residual=r)


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
