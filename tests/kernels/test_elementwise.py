"""Rotary embedding and SwiGLU: every implementation against an fp64 truth, and against complex multiplication; bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from opencoder import kernels as K

from .matrix import DEVICE, assert_accepted, draw, dtypes, each, evaluate

pytestmark = pytest.mark.fast


def plain_rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    cos, sin = (t.to(q.dtype)[..., None, :] for t in (cos, sin))
    half = cos.shape[-1]

    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    return turn(q), turn(k)


@each("rotary")
@dtypes
@pytest.mark.parametrize(
    ("shape", "heads", "rotated"),
    [((2, 5, 4, 16), 2, 16), ((1, 1, 1, 80), 1, 80), ((1, 3, 14, 160), 14, 160), ((2, 4, 6, 96), 3, 64), ((1, 7, 3, 20), 3, 6)],
)  # fmt: skip
@pytest.mark.parametrize("per_batch", [False, True])
def test_rotary(
    impl: str, dtype: torch.dtype, shape: tuple[int, ...], heads: int, rotated: int, per_batch: bool
) -> None:
    b, s, _, d = shape
    angles = draw(*((b, s) if per_batch else (s,)), rotated // 2, seed=5).float() * 100
    cos, sin = angles.cos(), angles.sin()
    inputs = [draw(*shape, dtype=dtype), draw(b, s, heads, d, seed=1, dtype=dtype)]
    truth = evaluate(lambda q, k: plain_rotary(q, k, cos.double(), sin.double()), [x.double() for x in inputs])
    mine = evaluate(lambda q, k: K.rotary(q, k, cos, sin, impl=impl), inputs)
    assert_accepted(mine, evaluate(lambda q, k: plain_rotary(q, k, cos, sin), inputs), truth, dtype)
    q, k = (x.clone() for x in inputs)
    returned = K.rotary(q, k, cos, sin, inplace=True, impl=impl)
    assert returned[0] is q
    assert returned[1] is k
    assert torch.equal(q, mine["y0"])
    assert torch.equal(k, mine["y1"])


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


def plain_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


@each("swiglu")
@dtypes
@pytest.mark.parametrize("shape", [(0, 8), (1,), (3, 41), (2, 3, 1000), (1, 2049)])
@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_swiglu(impl: str, dtype: torch.dtype, shape: tuple[int, ...], factor: float) -> None:
    inputs = [(draw(*shape) * factor).to(dtype), draw(*shape, seed=1, dtype=dtype)]
    truth = evaluate(plain_swiglu, [x.double() for x in inputs])
    mine = evaluate(lambda gate, up: K.swiglu(gate, up, impl=impl), inputs)
    assert_accepted(mine, evaluate(plain_swiglu, inputs), truth, dtype)


@each("swiglu")
def test_swiglu_far_out(impl: str) -> None:
    gate = torch.tensor([-torch.inf, -1e4, -200.0, -90.0, 90.0, 200.0, 1e4, torch.nan], device=DEVICE)
    out = K.swiglu(gate, torch.ones_like(gate), impl=impl)
    assert out[1:4].abs().max() <= 1e-35
    assert torch.equal(out[4:7], gate[4:7])
    assert out[7].isnan()


@each("rotary")
def test_in_place_is_refused_where_a_gradient_is_wanted_or_memory_is_not_contiguous(impl: str) -> None:
    q, cos = torch.ones(1, 4, 2, 8, device=DEVICE), torch.ones(4, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"inplace=True where a gradient is wanted; call it under torch.no_grad"):
        K.rotary(q.clone().requires_grad_(), q, cos, cos, inplace=True, impl=impl)
    with pytest.raises(ValueError, match="inplace=True needs contiguous q and k"):
        K.rotary(q.transpose(1, 2).contiguous().transpose(1, 2), q, cos, cos, inplace=True, impl=impl)


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
    with pytest.raises(TypeError, match="gate is list; it must be a tensor"):
        K.swiglu([1.0], torch.ones(1))
    with pytest.raises(ValueError, match="with R ≤ 8"):
        K.rotary(torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2, 8), torch.ones(4, 5), torch.ones(4, 5))
