"""Rotary embedding against complex multiplication, SwiGLU against its formula; gradients; bad input."""

from __future__ import annotations

import pytest
import torch

from opencoder import kernels as K

pytestmark = pytest.mark.fast


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rotated", [16, 8])
@pytest.mark.parametrize("batched", [False, True])
def test_rotary_is_a_rotation_of_complex_pairs(rotated: int, batched: bool) -> None:
    q, k = draw(2, 5, 4, 16), draw(2, 5, 2, 16, seed=1)
    angles = draw(*((2, 5) if batched else (5,)), rotated // 2, seed=2).float()
    found = K.rotary(q, k, angles.cos(), angles.sin())
    for x, y in zip((q, k), found, strict=True):
        half = rotated // 2
        turned = torch.complex(x[..., :half], x[..., half:rotated])
        turn = torch.complex(angles.cos().double(), angles.sin().double())
        turned = turned * (turn[:, :, None] if batched else turn[None, :, None])
        truth = torch.cat([turned.real, turned.imag, x[..., rotated:]], -1)
        assert torch.allclose(y, truth, rtol=1e-12, atol=1e-13)


def test_swiglu_and_gradients() -> None:
    gate, up = draw(3, 5).requires_grad_(), draw(3, 5, seed=1).requires_grad_()
    assert torch.allclose(K.swiglu(gate, up), gate / (1 + (-gate).exp()) * up, rtol=1e-12)
    assert torch.autograd.gradcheck(K.swiglu, (gate, up))
    cos = draw(4, 4, seed=2).float()
    q = draw(1, 4, 2, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: K.rotary(q, q, cos, cos)[0], (q,))


@pytest.mark.parametrize(("dtype", "cap"), [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 2.5e-3)])
def test_narrow_types_err_no_more_than_their_rounding(dtype: torch.dtype, cap: float) -> None:
    gate, up = draw(40, 30).to(dtype), draw(40, 30, seed=1).to(dtype)
    found, truth = K.swiglu(gate, up), gate.double() * gate.double().sigmoid() * up.double()
    # Two roundings, of silu and of the product: at most twice the error of one.
    assert found.dtype == dtype
    assert (found.double() - truth).norm() <= 2 * cap * truth.norm()
    q, angles = draw(2, 9, 3, 16).to(dtype), (draw(9, 8, seed=2) * 1000).float()
    found, _ = K.rotary(q, q, angles.cos(), angles.sin())
    truth, _ = K.rotary(q.double(), q.double(), angles.cos().double(), angles.sin().double())
    assert found.dtype == dtype
    assert (found.double() - truth).norm() <= cap * truth.norm()


def test_bad_shapes_of_elementwise_operators_are_named() -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        K.swiglu(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="types differ"):
        K.swiglu(torch.ones(2, 3), torch.ones(2, 3).double())
    with pytest.raises(ValueError, match=r"up is torch\.int64; allowed"):
        K.swiglu(torch.ones(2, 3), torch.ones(2, 3).long())
    with pytest.raises(ValueError, match=r"q and k must be \(B,S,H,D\)"):
        K.rotary(torch.ones(4, 2, 8), torch.ones(4, 2, 8), torch.ones(4, 4), torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"q and k must be \(B,S,H,D\)"):
        K.rotary(torch.ones(1, 4, 2, 8), torch.ones(1, 5, 2, 8), torch.ones(4, 4), torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"cos and sin must be \(4, R/2\)"):
        K.rotary(torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2, 8), torch.ones(3, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="with R ≤ 8"):
        K.rotary(torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2, 8), torch.ones(4, 5), torch.ones(4, 5))
