"""Registration with torch: each operator's schema once, its kernels per device, a fake one for torch.compile and an
autograd formula.

CPU kernels are the C++ ones (csrc/ops, loaded with torch.ops.load_library), CUDA kernels the Triton ones. Under
TRITON_INTERPRET=1 the same schemas exist a second time, in the namespace `opencoder_interpreted`, where the CPU kernels
are Triton's: the interpreter then passes through the same registration as a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from ._dispatch import register

log = logging.getLogger("opencoder")

TRITON_MISSING = None if importlib.util.find_spec("triton") else "triton is not installed: pip install triton"
"""Why the Triton kernels cannot run at all, None if they can."""
INTERPRETED = TRITON_MISSING is None and os.environ.get("TRITON_INTERPRET") == "1"

_FUNCTIONS: dict[tuple[str, str], Any] = {}
"""(namespace, operator) → the autograd Function that `call` uses."""
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)
"""Skips the part of dispatch that would look for a gradient formula; without it all works, some microseconds slower."""
_BUILT = torch.library.Library("opencoder", "DEF")
_TWIN = torch.library.Library("opencoder_interpreted", "DEF") if INTERPRETED else None
Ops = Any
"""A namespace of torch.ops."""


class TritonModule:
    """A module of kernels/triton_kernels, imported when one of its functions is first called: on a CPU, where none is,
    Triton then costs no time and memory."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, function: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            module = importlib.import_module(f"{__package__}.triton_kernels.{self._name}")
            return getattr(module, function)(*args, **kwargs)

        return run


@cache
def cpp_missing() -> str | None:
    """None once the C++ operators are loaded, else why they are not; said once in the log."""
    if os.environ.get("OPENCODER_NO_EXT") == "1":
        return "OPENCODER_NO_EXT=1"
    here = Path(__file__).resolve().parent.parent
    # In a clone this file lies in kernels/ beside opencoder/, in a wheel in opencoder/kernels/.
    found = [*here.glob("_ops*.so"), *(here / "opencoder").glob("_ops*.so")]
    reason = "the C++ operators were not built"
    if found:
        try:
            torch.ops.load_library(str(found[0]))
            return None
        except OSError as error:
            reason = f"{found[0].name} does not load: {error}"
    log.warning(
        "%s: reference implementations are used. To build them, install a C++20 compiler (Debian: apt-get install g++) "
        "and run `pip install --no-build-isolation -e .`",
        reason,
    )
    return reason


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    python: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    refuse_backward: bool = False,
) -> None:
    """Define one operator in each namespace. `triton` is its CUDA kernel, `python` one for every device; what has neither has
    a C++ kernel alone.

    `setup(ctx, inputs, output)` saves for `backward(ops, ctx, *grads)`, which is given the namespace whose operators it
    must call. With `refuse_backward` a gradient through the operator is an error: for those that are a backward."""
    name = schema.partition("(")[0]
    for library in filter(None, (_BUILT, _TWIN)):
        library.define(schema)
        qualified = f"{library.ns}::{name}"
        torch.library.register_fake(qualified, fake, lib=library)
        if triton is not None:
            library.impl(name, triton, "CUDA" if library is _BUILT else "CPU")
        if python is not None:
            library.impl(name, python, "CompositeExplicitAutograd")
        if backward is not None:
            formula = partial(backward, getattr(torch.ops, library.ns))
            torch.library.register_autograd(qualified, formula, setup_context=setup, lib=library)
            _FUNCTIONS[library.ns, name] = _function(library.ns, name, setup, formula)
        elif refuse_backward:
            torch.library.register_autograd(qualified, partial(_refuse, name), lib=library)


def _function(namespace: str, name: str, setup: Any, formula: Callable[..., Any]) -> Any:
    """The operator with its formula as an autograd Function."""

    def forward(ctx: Any, *args: Any) -> Any:
        with _below_autograd():
            output = getattr(getattr(torch.ops, namespace), name)(*args)
        setup(ctx, args, output)
        return output

    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # create_graph=True: what is called must refuse a second derivative
            return formula(ctx, *grads)
        with _below_autograd():
            return formula(ctx, *grads)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{namespace}_{name}", (torch.autograd.Function,), members)


def call(ops: Ops, name: str, *args: Any) -> Any:
    """`ops.name(*args)`, differentiable. Where nothing is traced it goes around torch.library's own way to the formula,
    which costs three times as much per call (134 against 53 µs for RMSNorm forward and backward)."""
    if torch.compiler.is_compiling():
        return getattr(ops, name)(*args)
    if torch.is_grad_enabled():
        return _FUNCTIONS[ops.name, name].apply(*args)
    with _below_autograd():
        return getattr(ops, name)(*args)


def scaled(gradient: torch.Tensor, factor: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """A gradient of `of` that was worked out in forward, times a 0-dim upstream gradient.

    In place, so that it exists once: a second backward finds it changed, which torch refuses. Not so while a graph is
    traced, where tensors are of types of their own and results of the forward pass may not be changed."""
    if type(gradient) is not torch.Tensor:
        return _Once.apply(gradient * factor, of)
    if gradient.device.type != "cpu" or factor != 1:  # on a GPU looking would mean waiting
        gradient.mul_(factor)
    return _Once.apply(gradient, of)


class _Once(torch.autograd.Function):
    """The gradient itself. It was worked out in forward, so torch would take it for a constant: this refuses to
    differentiate it instead."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("double backward is not offered; use impl='reference', which is plain torch")


def _refuse(name: str, ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(f"{name}: double backward is not offered; use impl='reference', which is plain torch")


CPP_MISSING = cpp_missing()
"""Why the C++ operators cannot run, None if they can. Settled at import, so that torch.compile sees a constant."""


def _tensor(first: Any) -> torch.Tensor:
    return first[0] if isinstance(first, (list, tuple)) else first


def cpp_supports(first: Any, *args: Any, **kwargs: Any) -> str | None:
    """For the dispatcher: whether the C++ operators run where the call's first tensor is."""
    if CPP_MISSING is None and _tensor(first).device.type != "cpu":
        return f"the tensors are on {_tensor(first).device.type}; the C++ operators are for cpu"
    return CPP_MISSING


def triton_supports(first: Any, *args: Any, **kwargs: Any) -> str | None:
    """For the dispatcher: whether Triton runs where the call's first tensor is, in its type."""
    x = _tensor(first)
    if TRITON_MISSING is not None:
        return TRITON_MISSING
    if x.device.type != "cuda" and not INTERPRETED:
        return (
            f"the tensors are on {x.device.type}; Triton kernels are for cuda (or any device with TRITON_INTERPRET=1)"
        )
    if x.dtype == torch.bfloat16 and INTERPRETED:
        return "Triton's interpreter computes bf16 wrongly; use fp32, fp16 or fp64"
    return None


def ops_of(x: torch.Tensor) -> Ops:
    """The namespace whose kernels for the device of `x` are Triton's."""
    return torch.ops.opencoder if x.device.type == "cuda" else torch.ops.opencoder_interpreted


def register_both(
    operator: str,
    run: Callable[..., Any],
    *,
    cpp: Callable[..., str | None] = cpp_supports,
    triton: Callable[..., str | None] = triton_supports,
) -> None:
    """Register `run(ops, *args, **kwargs)` as the operator's C++ and as its Triton implementation."""

    def with_cpp(*args: Any, **kwargs: Any) -> Any:
        return run(torch.ops.opencoder, *args, **kwargs)

    def with_triton(*args: Any, **kwargs: Any) -> Any:
        return run(ops_of(_tensor(args[0])), *args, **kwargs)

    register(operator, "cpp", cpp, missing=lambda: CPP_MISSING)(with_cpp)
    register(operator, "triton", triton, missing=lambda: TRITON_MISSING)(with_triton)


def statistics_type(x: torch.Tensor) -> torch.dtype:
    """The type of row statistics and arithmetic: fp64 for fp64, otherwise fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def like(x: torch.Tensor) -> torch.Tensor:
    """For fake kernels: a contiguous tensor of the shape and type of `x`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
