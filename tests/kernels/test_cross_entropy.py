"""Cross entropy, whole and as the halves of a split vocabulary: every implementation against an fp64 truth; bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from opencoder import kernels as K

from .matrix import DEVICE, GRADIENT, INTERPRETED, assert_accepted, draw, dtypes, each, error, evaluate

pytestmark = pytest.mark.fast


def targets_for(rows: int, classes: int) -> torch.Tensor:
    """Some ignored, the last class among them."""
    targets = torch.arange(rows) * 7 % classes
    targets[1::4] = -100
    if rows:
        targets[0] = classes - 1
    return targets.to(DEVICE)


def plain_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, z_loss: float = 0.0, softcap: float | None = None, **options: Any
) -> torch.Tensor:
    x = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(x, targets, **options)
    if z_loss:
        extra = z_loss * x.logsumexp(-1).square() * (targets != -100)
        loss = loss + {"none": extra, "sum": extra.sum()}.get(
            options["reduction"], extra.sum() / (targets != -100).sum()
        )
    return loss


OPTIONS: list[dict[str, Any]] = [
    {"reduction": "mean"},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "z_loss": 1e-2},
    {"reduction": "mean", "softcap": 5.0, "z_loss": 1e-3, "label_smoothing": 0.2},
]


SHAPES = [(0, 11), (1, 11), (7, 1000), (2, 50257), (9, 4097)]
if not INTERPRETED:
    SHAPES += [(3, 32000), (2, 128256), (2, 131072), (2, 151936)]


@each("cross_entropy")
@dtypes
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o))
def test_cross_entropy(impl: str, dtype: torch.dtype, rows: int, classes: int, options: dict[str, Any]) -> None:
    if not rows and options["reduction"] == "mean":
        pytest.skip("the mean of no rows")
    logits, targets = (draw(rows, classes) * 3).to(dtype), targets_for(rows, classes)
    truth = evaluate(lambda x: plain_cross_entropy(x, targets, **options), [logits.double()])
    plain = evaluate(lambda x: plain_cross_entropy(x, targets, **options), [logits])
    mine = evaluate(lambda x: K.cross_entropy(x, targets, impl=impl, **options), [logits])
    losses = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}
    assert_accepted(mine, plain, truth, dtype, forward_caps=losses)


@each("cross_entropy")
def test_cross_entropy_with_a_large_common_offset_and_extreme_rows(impl: str) -> None:
    logits, targets = draw(6, 100, dtype=torch.float32), torch.tensor([5, 3, -100, 99, 0, 1], device=DEVICE)
    shifted = K.cross_entropy(logits + 1e4, targets, reduction="none", impl=impl)
    truth = F.cross_entropy((logits + 1e4).double(), targets, reduction="none")
    assert error(shifted, truth) <= 1e-3  # the spacing of fp32 at 1e4
    logits[0, 5] = 1e4  # certain: no loss
    logits[2] = torch.inf  # ignored, so it may hold anything
    logits[3, :99] = -torch.inf
    logits[4, 7] = torch.nan
    logits = logits.requires_grad_()
    losses = K.cross_entropy(logits, targets, reduction="none", impl=impl)
    losses.nan_to_num().sum().backward()
    assert losses.isnan().tolist() == [False, False, False, False, True, False]
    assert losses[[0, 2, 3]].tolist() == [0.0, 0.0, 0.0]
    assert not logits.grad[[0, 1, 2, 3, 5]].isnan().any()
    assert torch.equal(logits.grad[2], torch.zeros_like(logits.grad[2]))


@each("ce_grad")
@dtypes
@pytest.mark.parametrize("shards", [1, 3])
def test_halves_of_a_split_vocabulary(impl: str, dtype: torch.dtype, shards: int) -> None:
    logits, targets, scale = (draw(9, 120) * 3).to(dtype), targets_for(9, 120), draw(9, seed=3)
    wide = logits.double().clone().requires_grad_()
    losses = F.cross_entropy(wide, targets, reduction="none") + 1e-2 * wide.logsumexp(-1) ** 2 * (targets != -100)
    (truth,) = torch.autograd.grad((losses * scale).sum(), wide)
    parts, width = [p.clone() for p in logits.chunk(shards, 1)], 120 // shards
    stats = [K.ce_stats(p, targets, i * width, impl=impl) for i, p in enumerate(parts)]
    highest = torch.stack([s[0] for s in stats]).amax(0)
    lse = highest + sum(s[1] * (s[0] - highest).exp() for s in stats).log()
    live = targets != -100
    found = (lse - sum(s[2] for s in stats) + 1e-2 * lse**2)[live]
    assert error(found, losses[live]) <= (1e-12 if dtype == torch.float64 else 1e-6)
    for in_place in (False, True):
        options = {"z_loss": 1e-2, "impl": impl}
        grads = [
            K.ce_grad(p, targets, lse, scale, i * width, out=p if in_place else None, **options)
            for i, p in enumerate(parts)
        ]
        assert error(torch.cat(grads, 1), truth) <= GRADIENT[dtype]


TARGETS = torch.tensor([0, 10, -100, 7, 5, -100, 3], device=DEVICE)


@each("cross_entropy")
def test_another_ignore_index(impl: str) -> None:
    logits, targets = draw(7, 11), TARGETS.masked_fill(TARGETS == -100, 10)  # 10 is a real class unless it is ignored
    ours = K.cross_entropy(logits, targets, ignore_index=10, impl=impl)
    assert error(ours, F.cross_entropy(logits, targets, ignore_index=10)) <= 1e-12
    assert not torch.allclose(ours, K.cross_entropy(logits, targets, impl=impl))


@each("cross_entropy")
def test_int32_targets(impl: str) -> None:
    logits = draw(7, 11)
    found = K.cross_entropy(logits, TARGETS.int(), impl=impl)
    assert torch.equal(found, K.cross_entropy(logits, TARGETS, impl=impl))


@each("cross_entropy")
def test_all_ignored(impl: str) -> None:
    targets = torch.full((7,), -100, device=DEVICE)
    logits = draw(7, 11).requires_grad_()
    total = K.cross_entropy(logits, targets, reduction="sum", impl=impl)
    total.backward()
    assert total == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    assert K.cross_entropy(logits, targets, impl=impl).isnan()


@each("ce_grad")
def test_masked_rows_are_zero_whatever_they_hold(impl: str) -> None:
    logits = draw(7, 11)
    logits[2] = torch.inf
    grad = K.ce_grad(logits, TARGETS, torch.zeros(7, device=DEVICE).double(), 1.0, impl=impl)
    assert torch.equal(grad[[2, 5]], torch.zeros_like(grad[[2, 5]]))


@each("ce_grad")
def test_scale_may_be_a_number_or_a_tensor(impl: str) -> None:
    logits = draw(7, 11)
    lse = logits.logsumexp(-1)
    scales = (0.5, torch.tensor(0.5, device=DEVICE), torch.full((7,), 0.5, device=DEVICE).double())
    truth = 0.5 * (logits.softmax(-1) - F.one_hot(TARGETS.clamp_min(0), 11)) * (TARGETS != -100)[:, None]
    for scale in scales:
        assert error(K.ce_grad(logits, TARGETS, lse, scale, impl=impl), truth) <= 1e-12


@each("ce_grad")
def test_a_shard_of_masked_vocabulary_adds_nothing(impl: str) -> None:
    logits = draw(7, 12)
    logits[:, 8:] = -torch.inf  # the last of three shards holds padding only
    stats = [K.ce_stats(p, TARGETS, i * 4, impl=impl) for i, p in enumerate(logits.chunk(3, 1))]
    assert torch.equal(stats[2][1], torch.zeros_like(stats[2][1]))
    highest = torch.stack([s[0] for s in stats]).amax(0)
    lse = highest + sum(s[1] * (s[0] - highest).exp() for s in stats).log()
    assert error(lse, logits.logsumexp(-1)) <= 1e-12
    grad = K.ce_grad(logits[:, 8:], torch.zeros_like(TARGETS), lse, 1.0, 8, impl=impl)
    assert torch.equal(grad, torch.zeros_like(grad))


@each("ce_grad")
def test_a_nan_stays_in_its_row(impl: str) -> None:
    logits = draw(7, 11)
    logits[3, 4] = torch.nan
    highest, sum_exp, _ = K.ce_stats(logits, TARGETS, 0, impl=impl)
    lse = highest + sum_exp.log()
    assert lse.isnan().tolist() == [row == 3 for row in range(7)]
    grad = K.ce_grad(logits, TARGETS, lse, 1.0, impl=impl)
    assert grad.isnan().any(1).tolist() == [row == 3 for row in range(7)]


@each("ce_grad")
@pytest.mark.parametrize("rows", [0, 1, 64, 65, 199])
def test_any_number_of_rows(impl: str, rows: int) -> None:
    logits, targets = draw(rows, 13), torch.arange(rows, device=DEVICE) % 13
    highest, sum_exp, target = K.ce_stats(logits, targets, 0, impl=impl)
    lse = highest + sum_exp.log()
    assert error(lse - target, F.cross_entropy(logits, targets, reduction="none")) <= 1e-12
    truth = logits.softmax(-1) - F.one_hot(targets, 13)
    assert error(K.ce_grad(logits, targets, lse, 1.0, impl=impl), truth) <= 1e-12


@each("ce_stats")
def test_narrow_types_have_wide_statistics(impl: str) -> None:
    logits = (draw(50, 300) * 4).half()
    stats = K.ce_stats(logits, torch.arange(50, device=DEVICE), 0, impl=impl)
    assert {s.dtype for s in stats} == {torch.float32}
    assert error(stats[0] + stats[1].log(), logits.double().logsumexp(-1)) <= 1e-6


@each("ce_grad")
def test_softcap_of_the_halves(impl: str) -> None:
    logits = (draw(7, 12) * 5).requires_grad_()
    losses = plain_cross_entropy(logits, TARGETS, softcap=3.0, z_loss=1e-2, reduction="none")
    (truth,) = torch.autograd.grad(losses.sum(), logits)
    parts = [p.detach().clone() for p in logits.chunk(2, 1)]
    stats = [K.ce_stats(p, TARGETS, 6 * i, softcap=3.0, impl=impl) for i, p in enumerate(parts)]
    highest = torch.stack([s[0] for s in stats]).amax(0)
    lse = highest + sum(s[1] * (s[0] - highest).exp() for s in stats).log()
    found = (lse - sum(s[2] for s in stats) + 1e-2 * lse**2) * (TARGETS != -100)
    assert error(found, losses) <= 1e-12
    options = {"z_loss": 1e-2, "softcap": 3.0, "impl": impl}
    grads = [K.ce_grad(p, TARGETS, lse, 1.0, 6 * i, **options) for i, p in enumerate(parts)]
    assert error(torch.cat(grads, 1), truth) <= 1e-12


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
        (torch.ones(2, 0), torch.tensor([0, 0]), {}, r"logits \(2, 0\) have no class"),
        (torch.ones(2, 3), torch.tensor([0, 1], device="meta"), {}, "logits on cpu, targets on meta"),
        (torch.ones(2, 3), torch.tensor([0, 1]), {"z_loss": -1.0}, "z_loss=-1.0; it must be at least 0"),
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
        (torch.ones(2, device="meta"), 1.0, None, "logits on cpu, lse on meta"),
        (torch.ones(2), torch.ones(2, device="meta"), None, "logits on cpu, scale on meta"),
    ],
)
def test_bad_input_of_the_backward_half_is_named(
    lse: torch.Tensor, scale: float | torch.Tensor, out: torch.Tensor | None, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        K.ce_grad(LOGITS, torch.tensor([0, 1]), lse, scale, out=out)
