"""AdamW and the gradient norm: every implementation against an fp64 truth written out; bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opencoder import kernels as K

from .matrix import DEVICE, draw, dtypes, each, error

pytestmark = pytest.mark.fast


def plain_adamw(
    p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: int, clip: float
) -> tuple[torch.Tensor, ...]:
    g = g * clip
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    p = p - 1e-2 * 0.1 * p - 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    return p, m, v


@each("adamw_step")
@dtypes
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("wide_grads", [False, True])
def test_adamw(impl: str, dtype: torch.dtype, clip: float | None, wide_grads: bool) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = dtype != wide
    if impl == "torch" and (clip is not None or narrow):
        pytest.skip("refused, which test_dispatch.py looks at")
    shapes = [(3, 5), (1,), (0,), (70, 500), (33000,)]
    params = [draw(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
    masters = [p.to(wide) for p in params] if narrow else None
    states = [[torch.zeros_like(p, dtype=wide) for p in params] for _ in range(2)]
    truth = [(p.double().clone(), *(torch.zeros_like(p).double() for _ in range(2))) for p in params]
    for step in (1, 2, 3):
        grads = [draw(*s, seed=10 * step + i).to(wide if wide_grads else dtype) for i, s in enumerate(shapes)]
        kept = [g.clone() for g in grads]
        coefficient = torch.tensor(clip, device=DEVICE) if clip and step == 2 else clip
        K.adamw_step(
            params, grads, *states, masters, step=step, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
            clip_coef=coefficient, impl=impl,
        )  # fmt: skip
        # The state is compared where it is kept: the fp32 rounding of a 0-dim clip counts as input.
        factor = 1.0 if clip is None else float(coefficient)
        truth = [plain_adamw(p, g.double(), m, v, step, factor) for (p, m, v), g in zip(truth, kept, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True)), "gradients are not to be changed"
    for i, (p, m, v) in enumerate(truth):
        for mine, true in ((masters or params)[i], p), (states[0][i], m), (states[1][i], v):
            assert error(mine, true) <= (1e-12 if wide == torch.float64 else 1e-6)
        if masters is not None:
            assert torch.equal(params[i], masters[i].to(dtype))


@each("sgd_rows_step")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("momentum", "decay", "clip"), [(0.9, 0.0, 1.0), (0.0, 0.1, 0.3), (0.5, 0.01, 2.0)])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_sgd_of_some_rows(
    impl: str, dtype: torch.dtype, momentum: float, decay: float, clip: float, width: int
) -> None:
    weight = draw(2000, width, dtype=dtype)
    buffer = torch.zeros_like(weight)
    true, others = torch.nn.Parameter(weight.double().clone()), weight.clone()
    torchs = torch.optim.SGD([true], lr=0.1, momentum=momentum, weight_decay=decay)
    rows = torch.randperm(2000, generator=torch.Generator().manual_seed(1))[:700].to(DEVICE)
    for step in range(3):
        grad = draw(700, width, seed=step + 1, dtype=dtype)
        kept = grad.clone()
        K.sgd_rows_step(
            weight, buffer, grad, rows, lr=0.1, momentum=momentum, weight_decay=decay, clip_coef=clip, impl=impl
        )
        assert torch.equal(grad, kept)
        true.grad = torch.zeros_like(true)
        true.grad[rows] = grad.double() * clip
        torchs.step()
    assert error(weight[rows], true.detach()[rows]) <= (1e-13 if dtype == torch.float64 else 1e-6)
    if momentum:
        assert error(buffer[rows], torchs.state[true]["momentum_buffer"][rows]) <= (
            1e-13 if dtype == torch.float64 else 1e-6
        )
    rest = torch.ones(2000, dtype=torch.bool, device=DEVICE)
    rest[rows] = False
    assert torch.equal(weight[rest], others[rest])
    assert not buffer[rest].any()


MATRIX, SOME = torch.ones(4, 2), torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("tensors", "options", "says"),
    [
        ((MATRIX.half(), MATRIX.half(), MATRIX[:2].half(), SOME), {}, "weight is torch.float16; allowed: fp32, fp64"),
        ((MATRIX, MATRIX.double(), MATRIX[:2], SOME), {}, "torch.float64"),
        ((MATRIX, MATRIX, MATRIX[:3], SOME), {}, r"do not fit: got \[\(4, 2\), \(4, 2\), \(3, 2\), \(2,\)\]"),
        ((MATRIX, MATRIX[:2], MATRIX[:2], SOME), {}, "do not fit"),
        ((MATRIX, MATRIX, MATRIX[:2], SOME.int()), {}, "rows must be int64"),
        ((MATRIX.t().contiguous().t(), MATRIX, MATRIX[:2], SOME), {}, "updated in place, contiguous"),
        ((MATRIX, MATRIX, MATRIX[:2], SOME), {"momentum": -0.1}, "momentum=-0.1; it must be at least 0"),
    ],
)
def test_rows_that_do_not_fit_are_named(tensors: tuple[torch.Tensor, ...], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        K.sgd_rows_step(*tensors, **({"lr": 0.1, "momentum": 0.9} | options))


@each("sgd_rows_step")
@pytest.mark.parametrize("row", [-1, 4])
def test_a_row_that_is_not_there_is_refused(impl: str, row: int) -> None:
    if DEVICE != "cpu":
        pytest.skip("a GPU reports it later, as a fault of the device")
    with pytest.raises((RuntimeError, IndexError)):
        K.sgd_rows_step(MATRIX.clone(), MATRIX.clone(), MATRIX[:2], torch.tensor([0, row]), lr=1, momentum=0, impl=impl)


@each("grad_norm")
@dtypes
def test_grad_norm(impl: str, dtype: torch.dtype) -> None:
    tensors = [draw(*s, seed=i, dtype=dtype) for i, s in enumerate([(3, 5), (1,), (0,), (300, 500), (7, 33000)])]
    truth = torch.cat([t.double().flatten() for t in tensors]).norm()
    norm = K.grad_norm(tensors, impl=impl)
    assert norm.shape == ()
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # torch sums a long fp32 tensor with an error of its own.
    assert error(norm, truth) <= (1e-12 if dtype == torch.float64 else 1e-5 if impl == "torch" else 1e-6)
    tensors[3].view(-1)[77] = torch.nan
    assert K.grad_norm(tensors, impl=impl).isnan()


@each("grad_norm")
def test_large_gradients_do_not_overflow(impl: str) -> None:
    norm = K.grad_norm([torch.full((1000,), 1e30, device=DEVICE)], impl=impl)
    if impl == "torch":  # squares in fp32
        assert norm.isinf()
    else:
        assert error(norm, torch.tensor(1e30, dtype=torch.float64).to(DEVICE) * 1000**0.5) <= 1e-6


@each("adamw_step")
def test_state_of_a_resumed_step_and_a_step_without_decay(impl: str) -> None:
    """The update depends on `step`, not on how often it was called."""
    p, g = draw(50, dtype=torch.float32), draw(50, seed=1, dtype=torch.float32)
    m, v = draw(50, seed=2, dtype=torch.float32), draw(50, seed=3, dtype=torch.float32).abs()
    truth = plain_adamw(p.double(), g.double(), m.double(), v.double(), 7, 1.0)
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "impl": impl}
    K.adamw_step([p], [g], [m], [v], step=7, weight_decay=0.1, **options)
    assert all(error(mine, true) <= 1e-6 for mine, true in zip((p, m, v), truth, strict=True))
    before, zero = p.clone(), torch.zeros_like(p)
    K.adamw_step([p], [zero], [zero.clone()], [zero.clone()], step=1, weight_decay=0.0, **options)
    assert torch.equal(p, before)


@each("adamw_step")
def test_a_nan_gradient_stays_where_it_is(impl: str) -> None:
    p, g, m, v = torch.ones(8, device=DEVICE), torch.ones(8, device=DEVICE), *torch.zeros(2, 8, device=DEVICE)
    g[3] = torch.nan
    K.adamw_step([p], [g], [m], [v], step=1, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, impl=impl)
    assert p.isnan().tolist() == [i == 3 for i in range(8)]


@each("adamw_step")
@dtypes
def test_a_skipped_step_changes_nothing_whatever_the_gradients(impl: str, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if impl == "torch" and dtype != wide:
        pytest.skip("refused, which is looked at below")
    params = [draw(*s, seed=i, dtype=dtype) for i, s in enumerate([(3, 5), (70, 500), (0,)])]
    masters = [p.to(wide) * 1.001 for p in params] if dtype != wide else None
    states = [[draw(*p.shape, seed=7 + k).abs().to(wide) for p in params] for k in range(2)]
    tensors = [*params, *(masters or []), *states[0], *states[1]]
    before = [t.clone() for t in tensors]
    grads = [torch.full_like(p, torch.nan) for p in params]
    options: dict[str, Any] = {
        "step": 2,
        "lr": 1e-2,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "impl": impl,
    }
    if impl != "torch":
        options["clip_coef"] = torch.tensor(torch.nan, device=DEVICE)
    K.adamw_step(params, grads, *states, masters, skip=torch.tensor(True, device=DEVICE), **options)
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
    # And with a flag that is false the step is the usual one.
    grads = [draw(*p.shape, seed=20 + i, dtype=dtype) for i, p in enumerate(params)]
    options["clip_coef"] = None
    usual = [[t.clone() for t in group] for group in (params, *states)]
    K.adamw_step(usual[0], grads, *usual[1:], masters and [m.clone() for m in masters], **options)
    K.adamw_step(params, grads, *states, masters, skip=torch.tensor(False, device=DEVICE), **options)
    assert all(
        torch.equal(a, b)
        for ours, theirs in zip((params, *states), usual, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    assert not torch.equal(params[1], before[1])


ONE = [torch.ones(3)]


@pytest.mark.parametrize(
    ("lists", "options", "says"),
    [
        ((ONE, [], ONE, ONE), {}, "lists of different lengths"),
        ((ONE, [torch.ones(2)], ONE, ONE), {}, r"grads\[0\] is torch.float32 \(2,\) on cpu; it must be"),
        ((ONE, ONE, [torch.ones(3).half()], ONE), {}, r"exp_avgs\[0\] is torch.float16"),
        (([torch.ones(3).half()], ONE, ONE, ONE), {}, r"params\[0\] is torch.float16 and needs fp32 masters"),
        (([torch.ones(3).int()], [torch.ones(3).int()], ONE, ONE), {}, r"params\[0\] is torch.int32"),
        (([torch.ones(6)[::2]], ONE, ONE, ONE), {}, r"params\[0\] is not contiguous; it is updated in place"),
        ((ONE, ONE, ONE, ONE), {"step": 0}, "step=0; steps count from 1"),
        ((ONE, ONE, ONE, ONE), {"lr": -1.0}, "lr=-1.0; it must be at least 0"),
        ((ONE, ONE, ONE, ONE), {"eps": float("nan")}, "eps=nan; it must be at least 0"),
        ((ONE, ONE, ONE, ONE), {"weight_decay": -0.1}, "weight_decay=-0.1; it must be at least 0"),
        ((ONE, ONE, ONE, ONE), {"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\); allowed: \[0, 1\)"),
        ((ONE, ONE, ONE, ONE), {"skip": torch.ones(2).bool()}, r"skip must be one boolean .*, got torch.bool \(2,\)"),
        ((ONE, ONE, ONE, ONE), {"skip": torch.tensor(1.0)}, r"skip must be one boolean .*, got torch.float32"),
        ((ONE, ONE, ONE, ONE), {"clip_coef": torch.ones(2)}, r"clip_coef must be a number or 0-dim, got \(2,\)"),
    ],
)
def test_bad_input_is_named(lists: tuple[list[torch.Tensor], ...], options: dict[str, Any], says: str) -> None:
    usual: dict[str, Any] = {"step": 1, "lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    with pytest.raises(ValueError, match=says):
        K.adamw_step(*lists, **(usual | options))


def test_no_tensors() -> None:
    K.adamw_step([], [], [], [], step=1, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    with pytest.raises(ValueError, match="grad_norm: an empty list"):
        K.grad_norm([])
    with pytest.raises(ValueError, match=r"tensors\[1\] is torch.int64; allowed"):
        K.grad_norm([torch.ones(2), torch.ones(2).long()])


def test_torch_refuses_what_its_fused_adamw_cannot_do() -> None:
    usual: dict[str, Any] = {
        "step": 1,
        "lr": 1e-2,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "impl": "torch",
    }
    with pytest.raises(K.UnsupportedKernel, match="torch's fused AdamW has no clip factor"):
        K.adamw_step(ONE, ONE, ONE, ONE, clip_coef=0.5, **usual)
    narrow = [torch.ones(3).half()]
    with pytest.raises(K.UnsupportedKernel, match="torch's fused AdamW has no master weights"):
        K.adamw_step(narrow, narrow, ONE, ONE, ONE, **usual)
