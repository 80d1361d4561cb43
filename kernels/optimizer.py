"""The public functions `adamw_step` and `grad_norm`, lists of tensors in few launches, and `sgd_rows_step`, some rows of a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import _checks
from ._dispatch import choose, register
from ._library import CPP_MISSING, Ops, TritonModule, cpp_supports, define, register_both, statistics_type
from .reference import optimizer as _reference

_triton = TritonModule("optimizer")

Tensors = Sequence[torch.Tensor]


@torch.no_grad()
def adamw_step(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    masters: Tensors | None = None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_coef: float | torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    impl: str = "auto",
) -> None:
    """One AdamW update in place, `step` counted from 1; gradients are multiplied by `clip_coef` on the way, not changed.

    The state is fp32 (fp64 for fp64 parameters). 16-bit parameters need fp32 `masters`: those are updated, and the
    parameters are set to them, rounded. Gradients have their parameter's type or the state's. `clip_coef` may be a 0-dim
    tensor, so that a GPU need not be waited for; so is `skip`, a boolean: where it is true nothing is changed, whatever the
    gradients hold. Source: arXiv:1711.05101."""
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _check_lists(lists | ({} if masters is None else {"masters": masters}))
    if step < 1:
        raise ValueError(f"adamw_step: step={step}; steps count from 1")
    _checks.at_least("adamw_step", 0, lr=lr, eps=eps, weight_decay=weight_decay)
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw_step: betas={betas}; allowed: [0, 1)")
    if isinstance(clip_coef, torch.Tensor) and clip_coef.numel() != 1:
        raise ValueError(f"adamw_step: clip_coef must be a number or 0-dim, got {tuple(clip_coef.shape)}")
    if skip is not None and (skip.numel() != 1 or skip.dtype != torch.bool or skip.device != _device(params, skip)):
        raise ValueError(
            f"adamw_step: skip must be one boolean on the device of the parameters, got {skip.dtype} {tuple(skip.shape)} "
            f"on {skip.device}"
        )
    if not params:
        return
    arguments = (params, grads, exp_avgs, exp_avg_sqs, masters)
    options: dict[str, Any] = {
        "step": step,
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "clip_coef": clip_coef,
        "skip": skip,
    }
    choose("adamw_step", impl, params[0].device, *arguments, **options).run(*arguments, **options)


@torch.no_grad()
def grad_norm(tensors: Tensors, *, impl: str = "auto") -> torch.Tensor:
    """The 2-norm of all values of all tensors, 0-dim fp32 on their device (fp64 if they are fp64); not synchronised."""
    if not tensors:
        raise ValueError("grad_norm: an empty list; the norm of no tensor has no device")
    _checks.floating("grad_norm", **{f"tensors[{i}]": t for i, t in enumerate(tensors)})
    norm: torch.Tensor = choose("grad_norm", impl, tensors[0].device, tensors).run(tensors)
    return norm


@torch.no_grad()
def sgd_rows_step(
    weight: torch.Tensor,
    momentum_buffer: torch.Tensor,
    grad: torch.Tensor,
    rows: torch.Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float = 0.0,
    clip_coef: float = 1.0,
    impl: str = "auto",
) -> None:
    """SGD with momentum, as torch.optim.SGD has it, of the rows `rows` of `weight` (N, D) alone, in place, with `grad` (m, D) times
    `clip_coef`; the other rows and their momentum keep every bit.

    rows: int64 (m,), distinct. momentum_buffer: (N, D). All three are fp32, or all fp64."""
    _checks.same_dtype("sgd_rows_step", weight=weight, momentum_buffer=momentum_buffer, grad=grad)
    _checks.one_device("sgd_rows_step", weight=weight, momentum_buffer=momentum_buffer, grad=grad, rows=rows)
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"sgd_rows_step: weight is {weight.dtype}; allowed: fp32, fp64")
    wanted = (weight.shape, (*rows.shape, *weight.shape[1:]))
    if (weight.dim(), rows.dim()) != (2, 1) or (momentum_buffer.shape, tuple(grad.shape)) != wanted:
        raise ValueError(
            f"sgd_rows_step: weight (N, D), momentum_buffer (N, D), grad (m, D), rows (m,) do not fit: got "
            f"{[tuple(t.shape) for t in (weight, momentum_buffer, grad, rows)]}"
        )
    if rows.dtype != torch.int64 or not (weight.is_contiguous() and momentum_buffer.is_contiguous()):
        raise ValueError("sgd_rows_step: rows must be int64; weight and momentum_buffer, updated in place, contiguous")
    _checks.at_least("sgd_rows_step", 0, lr=lr, momentum=momentum, weight_decay=weight_decay)
    arguments = (weight, momentum_buffer, grad, rows)
    options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "clip_coef": clip_coef}
    choose("sgd_rows_step", impl, weight.device, *arguments, **options).run(*arguments, **options)


def _device(params: Tensors, otherwise: torch.Tensor) -> torch.device:
    return params[0].device if params else otherwise.device


def _check_lists(lists: dict[str, Tensors]) -> None:
    params = lists["params"]
    if len({len(tensors) for tensors in lists.values()}) > 1:
        raise ValueError(f"adamw_step: lists of different lengths: { {n: len(t) for n, t in lists.items()} }")
    for i, p in enumerate(params):
        wide = statistics_type(p)
        for name, tensors in lists.items():
            t = tensors[i]
            allowed = {"params": (p.dtype,), "grads": (p.dtype, wide)}.get(name, (wide,))
            if t.shape != p.shape or t.device != p.device or t.dtype not in allowed:
                raise ValueError(
                    f"adamw_step: {name}[{i}] is {t.dtype} {tuple(t.shape)} on {t.device}; it must be "
                    f"{' or '.join(map(str, dict.fromkeys(allowed)))} {tuple(p.shape)} on {p.device} like params[{i}]"
                )
            if name != "grads" and not t.is_contiguous():
                raise ValueError(f"adamw_step: {name}[{i}] is not contiguous; it is updated in place")
        if p.dtype != wide and "masters" not in lists:
            raise ValueError(f"adamw_step: params[{i}] is {p.dtype} and needs fp32 masters")
        if p.dtype not in _checks.FLOATS:
            raise ValueError(f"adamw_step: params[{i}] is {p.dtype}; allowed: fp64, fp32, bf16, fp16")


def _adamw(
    ops: Ops,
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    masters: Tensors | None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_coef: float | torch.Tensor | None,
    skip: torch.Tensor | None,
) -> None:
    with_cpp = ops is torch.ops.opencoder and params[0].device.type == "cpu"
    if with_cpp and skip is not None and skip:  # on a CPU, looking at it costs nothing
        return
    control = params[0].new_zeros(2, dtype=torch.float64)
    control[0] = 1.0 if clip_coef is None else clip_coef
    if skip is not None:
        control[1] = skip
    grads = [g.contiguous() for g in grads]
    clip = control[0] if with_cpp else control
    ops.adamw_step_(params, grads, exp_avgs, exp_avg_sqs, masters or [], clip, lr, *betas, eps, weight_decay, step)


def _torch_supports(params: Tensors, *args: Any, clip_coef: Any = None, **options: Any) -> str | None:
    grads, _, _, masters = args
    if masters is not None:
        return "torch's fused AdamW has no master weights"
    if clip_coef is not None:
        return "torch's fused AdamW has no clip factor"
    if len({t.dtype for t in (*params, *grads)}) > 1:
        return "torch's fused AdamW takes one type"
    if params[0].device.type not in ("cpu", "cuda"):
        return f"torch's fused AdamW is for cpu and cuda, not {params[0].device.type}"
    return None


@register("adamw_step", "torch", _torch_supports)
def _torch_adamw(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    masters: None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_coef: None,
    skip: torch.Tensor | None,
) -> None:
    # The operator counts the step itself, in tensors. What it calls infinite is what a gradient scaler found.
    steps = [torch.tensor(float(step), device=p.device) for p in params]
    torch._fused_adamw_(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), [], steps,
        lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
        found_inf=None if skip is None else skip.float(),
    )  # fmt: skip


@register("grad_norm", "torch")
def _torch_norm(tensors: Tensors) -> torch.Tensor:
    norms = torch._foreach_norm(list(tensors), 2, dtype=_widest(tensors))
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].dtype) for n in norms]))


def _widest(tensors: Tensors) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _grad_norm(ops: Ops, tensors: Tensors) -> torch.Tensor:
    norm: torch.Tensor = ops.square_sum(list(tensors)).sqrt().to(_widest(tensors))
    return norm


@register("sgd_rows_step", "cpp", cpp_supports, missing=lambda: CPP_MISSING)
def _cpp_sgd_rows(
    weight: torch.Tensor,
    momentum_buffer: torch.Tensor,
    grad: torch.Tensor,
    rows: torch.Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
    clip_coef: float,
) -> None:
    updated = (weight, momentum_buffer, grad.contiguous(), rows.contiguous())
    torch.ops.opencoder.sgd_rows_step_(*updated, lr, momentum, weight_decay, clip_coef)


register("adamw_step", "reference")(_reference.adamw_step)
register("sgd_rows_step", "reference")(_reference.sgd_rows_step)
register("grad_norm", "reference")(_reference.grad_norm)
register_both("adamw_step", _adamw)
register_both("grad_norm", _grad_norm)

# `clip`: in C++ the factor, in Triton that and a number that is not 0 where the step is to be skipped.
define(
    "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] masters, Tensor clip, float lr, float beta1, float beta2, float eps, float weight_decay, int step) -> ()",
    fake=lambda *arguments: None,
    triton=_triton.adamw_step,
)
define(
    "square_sum(Tensor[] tensors) -> Tensor",
    fake=lambda tensors: tensors[0].new_empty((), dtype=torch.float64),
    triton=_triton.square_sum,
)
define(
    "sgd_rows_step_(Tensor(a!) weight, Tensor(b!) momentum_buffer, Tensor grad, Tensor rows, float lr, float momentum, "
    "float weight_decay, float clip) -> ()",
    fake=lambda *arguments: None,
    python=_reference.sgd_rows_step,
)
