"""Cross entropy against torch, whole and as the halves of a split vocabulary; bad input."""

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


def test_another_ignore_index() -> None:
    logits, targets = draw(7, 11), TARGETS.masked_fill(TARGETS == -100, 10)  # 10 is a real class unless it is ignored
    ours, theirs = (f(logits, targets, ignore_index=10) for f in (K.cross_entropy, F.cross_entropy))
    assert torch.allclose(ours, theirs, rtol=1e-12)
    assert not torch.allclose(ours, K.cross_entropy(logits, targets))


def test_gradients_of_z_loss_and_softcap() -> None:
    logits = draw(4, 5).requires_grad_()
    targets = torch.tensor([0, 4, -100, 2])
    assert torch.autograd.gradcheck(lambda x: K.cross_entropy(x, targets, z_loss=0.1, softcap=2.0), (logits,))


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


def test_scale_may_be_a_number_or_a_tensor() -> None:
    logits = draw(7, 11)
    lse = logits.logsumexp(-1)
    each = [K.ce_grad(logits, TARGETS, lse, s) for s in (0.5, torch.tensor(0.5), torch.full((7,), 0.5).double())]
    truth = 0.5 * (logits.softmax(-1) - F.one_hot(TARGETS.clamp_min(0), 11)) * (TARGETS != -100)[:, None]
    for grad in each:
        assert torch.allclose(grad, truth, rtol=1e-12, atol=1e-14)


def test_a_shard_of_masked_vocabulary_adds_nothing() -> None:
    logits = draw(7, 12)
    logits[:, 8:] = -torch.inf  # the last of three shards holds padding only
    stats = [K.ce_stats(p, TARGETS, i * 4) for i, p in enumerate(logits.chunk(3, 1))]
    assert torch.equal(stats[2][1], torch.zeros(7, dtype=torch.float64))
    highest = torch.stack([s[0] for s in stats]).amax(0)
    lse = highest + sum(s[1] * (s[0] - highest).exp() for s in stats).log()
    assert torch.allclose(lse, logits.logsumexp(-1), rtol=1e-12)
    assert torch.equal(K.ce_grad(logits[:, 8:], torch.zeros(7).long(), lse, 1.0, 8), torch.zeros(7, 4).double())


def test_a_nan_stays_in_its_row() -> None:
    logits = draw(7, 11)
    logits[3, 4] = torch.nan
    highest, sum_exp, _ = K.ce_stats(logits, TARGETS, 0)
    lse = highest + sum_exp.log()
    assert lse.isnan().tolist() == [row == 3 for row in range(7)]
    grad = K.ce_grad(logits, TARGETS, lse, 1.0)
    assert grad.isnan().any(1).tolist() == [row == 3 for row in range(7)]


@pytest.mark.parametrize("rows", [0, 1, 64, 65, 199])
def test_any_number_of_rows(rows: int) -> None:
    logits, targets = draw(rows, 13), torch.arange(rows) % 13
    highest, sum_exp, target = K.ce_stats(logits, targets, 0)
    lse = highest + sum_exp.log()
    assert torch.allclose(lse - target, F.cross_entropy(logits, targets, reduction="none"), rtol=1e-12)
    truth = logits.softmax(-1) - F.one_hot(targets, 13)
    assert torch.allclose(K.ce_grad(logits, targets, lse, 1.0), truth, rtol=1e-12, atol=1e-14)


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
        (torch.ones(2, 3), torch.tensor([0, 1]), {"label_smoothing": 1.5}, r"label_smoothing=1.5; allowed: \[0, 1\]"),
        (torch.ones(2, 3), torch.tensor([0, 1]), {"softcap": 0.0}, "softcap=0.0; it must be positive"),
        (torch.ones(2, 3, dtype=torch.int64), torch.tensor([0, 1]), {}, "logits is torch.int64; allowed"),
    ],
)
def test_bad_input_is_named(logits: torch.Tensor, targets: torch.Tensor, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        K.cross_entropy(logits, targets, **options)


LOGITS = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("lse", "scale", "out", "says"),
    [
        (torch.ones(2, 1), 1.0, None, r"lse must be \(2,\), got \(2, 1\)"),
        (torch.ones(2), torch.ones(2, 1), None, r"scale must be a number or \(2,\), got \(2, 1\)"),
        (torch.ones(2), 1.0, torch.ones(3, 2), "out is torch.float32"),
        (torch.ones(2), 1.0, torch.ones(2, 3).double(), "out is torch.float64"),
    ],
)
def test_bad_input_of_the_backward_half_is_named(
    lse: torch.Tensor, scale: float | torch.Tensor, out: torch.Tensor | None, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        K.ce_grad(LOGITS, torch.tensor([0, 1]), lse, scale, out=out)
