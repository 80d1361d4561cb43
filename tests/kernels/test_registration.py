"""What torch knows of the operators: opcheck, torch.compile without graph breaks, refused double backward; layouts that
are not contiguous; the same bits twice and for any number of threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from opencoder import kernels as K
from opencoder.kernels._library import CPP_MISSING, INTERPRETED

from .matrix import DEVICE, draw, error, evaluate

pytestmark = pytest.mark.skipif(CPP_MISSING is not None and not INTERPRETED, reason=str(CPP_MISSING))
IMPL = "triton" if INTERPRETED or DEVICE == "cuda" else "cpp"
OPS = torch.ops.opencoder_interpreted if INTERPRETED else torch.ops.opencoder
TARGETS = torch.tensor([0, 10, -100, 7], device=DEVICE)
BOUNDS = torch.tensor([0, 3, 4], dtype=torch.int32, device=DEVICE)
ANGLES = torch.linspace(0, 3, 12, device=DEVICE).view(4, 3)


def rotary(q: torch.Tensor, k: torch.Tensor) -> Any:
    return K.rotary(q, k, ANGLES.cos(), ANGLES.sin(), impl=IMPL)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return K.attention(q, k, v, cu_seqlens=BOUNDS, max_seqlen=3, impl=IMPL)


def linear(x: torch.Tensor, weight: torch.Tensor, reduction: str = "mean") -> Any:
    options = {"z_loss": 0.1, "softcap": 3.0, "label_smoothing": 0.1, "chunk_tokens": 3}
    return K.linear_cross_entropy(x, weight, TARGETS, reduction=reduction, impl=IMPL, **options)


# name -> (function of the tensors, their shapes)
CALLS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "rms_norm": (lambda x, w: K.rms_norm(x, w, eps=1e-5, impl=IMPL), [(6, 16), (16,)]),
    "add_rms_norm": (lambda x, w, r: K.rms_norm(x, w, eps=1e-5, residual=r, impl=IMPL), [(6, 16), (16,), (6, 16)]),
    "swiglu": (lambda a, b: K.swiglu(a, b, impl=IMPL), [(5, 8), (5, 8)]),
    "rotary": (rotary, [(2, 4, 3, 8), (2, 4, 1, 8)]),
    "cross_entropy none": (lambda x: K.cross_entropy(x, TARGETS, softcap=3.0, reduction="none", impl=IMPL), [(4, 11)]),
    "cross_entropy": (lambda x: K.cross_entropy(x, TARGETS, z_loss=0.1, softcap=3.0, impl=IMPL), [(4, 11)]),
    "linear_cross_entropy": (linear, [(4, 3), (11, 3)]),
    "linear_cross_entropy none": (partial(linear, reduction="none"), [(4, 3), (11, 3)]),
    "attention": (attention, [(4, 2, 16), (4, 1, 16), (4, 1, 16)]),
}
calls = pytest.mark.parametrize("name", CALLS)


@calls
def test_gradcheck(name: str) -> None:
    function, shapes = CALLS[name]
    inputs = [draw(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    # Milliseconds a launch in the interpreter: there by random projections instead of value by value.
    if name in ("linear_cross_entropy", "cross_entropy"):
        # gradcheck goes backward several times through one forward; one that is not summed keeps what it needs for that.
        function, shapes = CALLS[f"{name} none"]
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=0.0, fast_mode=INTERPRETED)


def test_gradcheck_of_the_log_sum_exp() -> None:
    q, k, v = (draw(1, 4, 1, 16, seed=i).requires_grad_() for i in range(3))
    with_lse = lambda q, k, v: K.attention(q, k, v, return_lse=True, impl=IMPL)  # noqa: E731
    assert torch.autograd.gradcheck(with_lse, (q, k, v), fast_mode=INTERPRETED)


@calls
@pytest.mark.filterwarnings("ignore:.*scalar.*")
def test_compiled_without_graph_break_gives_the_same(name: str) -> None:
    function, shapes = CALLS[name]
    inputs = [draw(*s, seed=i) for i, s in enumerate(shapes)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, found = evaluate(function, inputs), evaluate(compiled, inputs)
    assert all(torch.equal(expected[n], found[n]) for n in expected)


@calls
def test_layouts_that_are_not_contiguous(name: str) -> None:
    """Transposed, strided, offset by one value, and the stride-0 gradient that sum().backward() makes."""
    function, shapes = CALLS[name]
    plain = [draw(*s, seed=i) for i, s in enumerate(shapes)]
    truth = evaluate(function, plain)

    def transposed(x: torch.Tensor) -> torch.Tensor:
        return (
            x.t().contiguous().t()
            if x.dim() == 2
            else x.transpose(0, 1).contiguous().transpose(0, 1)
            if x.dim() > 1
            else x
        )

    def strided(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x], -1)[..., 0]

    def offset(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    for change in (transposed, strided, offset):
        found = evaluate(lambda *xs, change=change: function(*(change(x) for x in xs)), plain)
        assert all(error(found[n], truth[n]) <= 1e-13 for n in truth), change
    leaves = [x.clone().requires_grad_() for x in plain]
    outs, again = ((o if isinstance(o, tuple) else (o,)) for o in (function(*leaves), function(*leaves)))
    expanded = torch.autograd.grad([o.sum() for o in outs], leaves)
    dense = torch.autograd.grad(again, leaves, [torch.ones_like(o) for o in again])
    assert all(error(a, b) <= 1e-13 for a, b in zip(expanded, dense, strict=True))


@calls
def test_the_same_bits_again_and_for_any_number_of_threads(name: str) -> None:
    function, shapes = CALLS[name]
    # Enough for several threads where the number of rows is free; the interpreter has none.
    rows = 1 if INTERPRETED or name in ("rotary", "attention") or "cross_entropy" in name else 200
    inputs = [
        draw(*(rows * s[0], *s[1:]) if len(s) > 1 else s, seed=i, dtype=torch.float32) for i, s in enumerate(shapes)
    ]
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        results.append(evaluate(function, inputs))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0][n], other[n]) for other in results for n in other)


@calls
def test_every_output_is_written_whole(name: str) -> None:
    """New memory is filled with NaN: what an operator leaves unwritten would show."""
    function, shapes = CALLS[name]
    inputs = [draw(*s, seed=i) for i, s in enumerate(shapes)]
    expected = evaluate(function, inputs)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty and its like return
    try:
        assert torch.empty(3).isnan().all()
        found = evaluate(function, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(expected[n], found[n]) for n in expected)


@calls
def test_double_backward_is_refused(name: str) -> None:
    function, shapes = CALLS[name]
    inputs = [draw(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    out = function(*inputs)
    first = out[0] if isinstance(out, tuple) else out
    (gradient,) = torch.autograd.grad(first.square().sum(), inputs[0], create_graph=True)
    if name == "rotary":  # linear: its backward is the operator itself, and may be differentiated
        return
    with pytest.raises(RuntimeError, match="double backward is not offered"):
        gradient.sum().backward()


def operator_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments for each registered operator."""
    x, w = draw(3, 8), draw(8, seed=1)
    rstd = OPS.rms_norm_fwd(x, w, 1e-5)[1]
    q, k = draw(2, 4, 3, 8), draw(2, 4, 1, 8, seed=1)
    logits, options = draw(4, 11), (-100, 0.1, 0.1, 2.0)
    lse = OPS.ce_forward(logits, TARGETS, *options)[1]
    heads = [draw(4, h, 16, seed=h) for h in (2, 1, 1)]
    rest = (BOUNDS, BOUNDS, 3, True, 2, -1, 5.0, 0.25)
    out, statistics = OPS.attention_fwd(*heads, *rest)
    params = [draw(3, 5), draw(7)]
    state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    matrices = draw(4, 3).requires_grad_(), draw(11, 3, seed=1).requires_grad_()
    clip = torch.ones((), dtype=torch.float64, device=DEVICE)
    control = clip if IMPL == "cpp" else torch.stack([clip, 0 * clip])  # on a GPU with the flag that skips the step
    numbers, x32, w32 = torch.arange(8, device=DEVICE), x.float(), draw(2, 8).float()
    return {
        "rms_norm_fwd": (x.clone().requires_grad_(), w.clone().requires_grad_(), 1e-5),
        "add_rms_norm_fwd": (x.clone().requires_grad_(), x.clone().requires_grad_(), w.clone().requires_grad_(), 1e-5),
        "rms_norm_bwd": (x, None, x, w, rstd),
        "swiglu_fwd": (x.clone().requires_grad_(), x.clone().requires_grad_()),
        "swiglu_bwd": (x, x, x),
        "rotary": (q.clone().requires_grad_(), k.clone().requires_grad_(), ANGLES.cos(), ANGLES.sin(), False),
        "rotary_": (q, k, ANGLES.cos(), ANGLES.sin(), True),
        "ce_forward": (logits.clone().requires_grad_(), TARGETS, *options),
        "ce_with_gradient": (logits.clone().requires_grad_(), TARGETS, clip, *options),
        "ce_with_gradient_": (logits.clone(), TARGETS, clip, *options),
        "ce_stats": (logits, TARGETS, 3, 2.0),
        "ce_backward": (lse, logits, TARGETS, lse, 0, *options),
        "ce_backward_": (lse, logits.clone(), TARGETS, lse, 0, *options),
        "ce_backward_out": (lse, logits, TARGETS, lse, 0, *options, torch.empty_like(logits)),
        "attention_fwd": (*(t.clone().requires_grad_() for t in heads), *rest),
        "attention_bwd": (out, *heads, out, statistics, None, *rest),
        "linear_ce": (*matrices, TARGETS, IMPL, 3, 0.1, 0.1, 2.0),
        "linear_ce_with_gradients": (*matrices, TARGETS, IMPL, 3, 0.1, 0.1, 2.0, True, True),
        "linear_ce_backward": (lse, *(m.detach() for m in matrices), TARGETS, lse, IMPL, 3, 0.1, 0.1, 2.0, True, False),
        "adamw_step_": (params, [p.clone() for p in params], *state, [], control, 1e-3, 0.9, 0.95, 1e-8, 0.1, 1),
        "square_sum": (params,),
        "sgd_rows_step_": (w32.clone(), w32.clone(), w32[:2].clone(), numbers[:2], 0.1, 0.9, 0.01, 0.5),
        "merge_nearest_": (numbers.view(2, 4).clone(), w32 @ x32.t(), w32, x32, numbers[:2], 4, 1e-6),
        "neighbour_priority": (numbers[:1], BOUNDS, numbers[:4].int(), numbers[:4].short(), 5),
        "smallest_keys": (numbers.int(), 4, 2, -5),
    }


@pytest.mark.parametrize("name", operator_calls() if CPP_MISSING is None or INTERPRETED else [])
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(OPS, name).default, operator_calls()[name])


def test_every_operator_is_checked() -> None:
    known = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith(f"{OPS.name}::")}
    assert {n.partition("::")[2] for n in known} == set(operator_calls())


def test_nothing_is_written_beside_an_output() -> None:
    """Into the middle of a buffer of NaN: the rows before and after keep theirs."""
    guarded = torch.full((8, 11), torch.nan, dtype=torch.float64, device=DEVICE)
    logits = draw(4, 11)
    K.ce_grad(logits, TARGETS, logits.logsumexp(-1), 1.0, out=guarded[2:6], impl=IMPL)
    assert not guarded[2:6].isnan().any()
    assert guarded[[0, 1, 6, 7]].isnan().all()
