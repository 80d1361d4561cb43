"""Cross entropy against torch, whole and as the halves of a split vocabulary; rotary and SwiGLU; bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from opencoder import kernels as K

pytestmark = pytest.mark.fast


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


TARGETS = torch.tensor([0, 10, -100, 7, 5, -100, 3])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_torch(reduction: str, smoothing: float) -> None:
    logits = (draw(7, 11) * 3).requires_grad_()
    options = {"reduction": reduction, "label_smoothing": smoothing}
    ours, theirs = K.cross_entropy(logits, TARGETS, **options), F.cross_entropy(logits, TARGETS, **options)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    a, b = (
        torch.autograd.grad((x * draw(*x.shape, seed=2)).sum(), logits, retain_graph=True)[0] for x in (ours, theirs)
    )
    assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)


def test_z_loss_and_softcap() -> None:
    logits = draw(7, 11) * 3
    capped = 2.0 * torch.tanh(logits / 2.0)
    valid = TARGETS != -100
    truth = F.cross_entropy(capped, TARGETS, reduction="none") + 0.1 * capped.logsumexp(-1) ** 2 * valid
    assert torch.allclose(
        K.cross_entropy(logits, TARGETS, softcap=2.0, z_loss=0.1, reduction="none"), truth, rtol=1e-12
    )


def test_all_ignored() -> None:
    targets = torch.full((7,), -100)
    logits = draw(7, 11).requires_grad_()
    total = K.cross_entropy(logits, targets, reduction="sum")
    total.backward()
    assert total == 0
    assert torch.equal(logits.grad, torch.zeros(7, 11, dtype=torch.float64))
    assert K.cross_entropy(logits, targets).isnan()


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["plain", "large offset"])
@pytest.mark.parametrize("in_place", [False, True])
def test_split_halves_equal_the_whole(shards: int, offset: float, in_place: bool) -> None:
    logits = (draw(7, 12) * 3 + offset).requires_grad_()
    scale = draw(7, seed=3)
    losses = F.cross_entropy(logits, TARGETS, reduction="none")
    (truth,) = torch.autograd.grad((losses * scale).sum(), logits)
    parts = [p.clone() for p in logits.detach().chunk(shards, 1)]
    width = 12 // shards
    stats = [K.ce_stats(p, TARGETS, i * width) for i, p in enumerate(parts)]
    highest = torch.stack([s[0] for s in stats]).amax(0)
    lse = highest + sum(s[1] * (s[0] - highest).exp() for s in stats).log()
    target = sum(s[2] for s in stats)
    assert torch.allclose((lse - target)[TARGETS != -100], losses[TARGETS != -100], rtol=1e-9)
    grads = [K.ce_grad(p, TARGETS, lse, scale, i * width, out=p if in_place else None) for i, p in enumerate(parts)]
    assert all((g is p) == in_place for g, p in zip(grads, parts, strict=True))
    assert torch.allclose(torch.cat(grads, 1), truth, rtol=1e-8, atol=1e-11)


def test_masked_rows_are_zero_whatever_they_hold() -> None:
    logits = draw(7, 11)
    logits[2] = torch.inf
    grad = K.ce_grad(logits, TARGETS, torch.zeros(7, dtype=torch.float64), 1.0)
    assert torch.equal(grad[[2, 5]], torch.zeros(2, 11, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "cap"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_narrow_types_use_wide_statistics(dtype: torch.dtype, cap: float) -> None:
    wide = (draw(50, 300) * 4).to(dtype).double()
    targets = torch.arange(50)
    highest, sum_exp, target = K.ce_stats(wide.to(dtype), targets, 0)
    assert highest.dtype == sum_exp.dtype == target.dtype == torch.float32
    lse = highest + sum_exp.log()
    assert torch.allclose(lse.double(), wide.logsumexp(-1), rtol=1e-5)
    grad = K.ce_grad(wide.to(dtype), targets, lse, 0.5)
    truth = 0.5 * (wide.softmax(-1) - F.one_hot(targets, 300))
    assert grad.dtype == dtype
    assert (grad.double() - truth).norm() <= cap * truth.norm()


@pytest.mark.parametrize(
    ("logits", "targets", "options", "says"),
    [
        (torch.ones(2, 3, 4), torch.zeros(2, dtype=torch.int64), {}, r"logits must be \(T, V\)"),
        (torch.ones(2, 3), torch.zeros(3, dtype=torch.int64), {}, r"targets must be \(2,\)"),
        (torch.ones(2, 3), torch.zeros(2), {}, "targets are torch.float32"),
        (torch.ones(2, 3), torch.tensor([0, 3]), {}, r"targets lie in \[0, 3\]; allowed: \[0, 3\)"),
        (torch.ones(2, 3), torch.tensor([0, -1]), {}, r"targets lie in \[-1, 0\]"),
        (torch.ones(2, 3), torch.tensor([0, 1]), {"reduction": "max"}, "reduction='max'"),
    ],
)
def test_bad_input_is_named(logits: torch.Tensor, targets: torch.Tensor, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        K.cross_entropy(logits, targets, **options)


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


def test_bad_shapes_of_elementwise_operators_are_named() -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        K.swiglu(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"cos and sin must be \(4, R/2\)"):
        K.rotary(torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2, 8), torch.ones(3, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="with R ≤ 8"):
        K.rotary(torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2, 8), torch.ones(4, 5), torch.ones(4, 5))
