"""Which implementation of an operator runs, and why.

`auto` takes the first entry of the operator's order list that supports the arguments; it changes speed and rounding,
never results. A choice by name (`impl=`, `use(...)`, OPENCODER_KERNELS) is kept or refused, never replaced."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

log = logging.getLogger("opencoder")

ENVIRONMENT = "OPENCODER_KERNELS"

# What `auto` tries, best first. Keys: a device type; one with an architecture ("cuda sm_80"); one with a kind of call
# ("cuda packed"). The kind counts before the architecture, the plain device last. `reference` is the definition and always
# the last. The adapters (flash_attn, apex) stand where published numbers put them; each is skipped
# unless installed. Liger is run by name only.
Order = dict[str, tuple[str, ...]]
_ROWS: Order = {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")}
_LISTS: Order = {"cpu": ("cpp", "torch", "reference"), "cuda": ("triton", "torch", "reference")}
_CPP_OR_TORCH: Order = {"cpu": ("cpp", "torch", "reference"), "cuda": ("torch", "reference")}
ORDER: dict[str, Order] = {
    "rms_norm": _ROWS | {"cuda": ("triton", "apex", "reference")},
    "rotary": _ROWS,
    "swiglu": _ROWS,
    "attention": {
        "cpu": ("cpp", "torch", "reference"),
        # SDPA is cuDNN's kernel on Hopper; on Ampere it is an older FlashAttention than the package's. What SDPA has not
        # (window, softcap, log-sum-exp) goes on to the next.
        "cuda": ("torch", "flash_attn", "triton", "reference"),
        "cuda sm_80": ("flash_attn", "torch", "triton", "reference"),
        # SDPA for documents is a loop over them that waits for the GPU.
        "cuda packed": ("flash_attn", "triton", "torch", "reference"),
    },
    "attention_backward": _ROWS,
    "cross_entropy": _ROWS,
    "ce_stats": _ROWS,
    "ce_grad": _ROWS,
    "linear_cross_entropy": _LISTS,
    "adamw_step": _LISTS,
    "grad_norm": _LISTS,
    "sgd_rows_step": _ROWS | {"cuda": ("reference",)},
    "merge_nearest": _ROWS | {"cuda": ("torch", "reference")},
    "neighbour_priority": _CPP_OR_TORCH,
    "smallest_keys": _CPP_OR_TORCH,
}


class UnsupportedKernel(ValueError):
    """A named implementation cannot serve the call, or does not exist."""


class Implementation(NamedTuple):
    """One way to do an operator."""

    name: str
    run: Callable[..., Any]
    supports: Callable[..., str | None]
    """Given the call's arguments: None, or the reason why not."""
    missing: Callable[[], str | None] | None = None
    """Why no call at all can be served in this installation."""


_KINDS: dict[str, Callable[..., str]] = {}
"""Operators whose calls are of several kinds: the kind of a call, "" for the plain one."""
_REGISTRY: dict[str, dict[str, Implementation]] = {operator: {} for operator in ORDER}
_CHOICE: ContextVar[dict[str, str] | None] = ContextVar("opencoder_kernels", default=None)
_WARNED: set[str] = set()


def _anything(*args: Any, **kwargs: Any) -> str | None:
    return None


def register(
    operator: str,
    name: str,
    supports: Callable[..., str | None] = _anything,
    *,
    missing: Callable[[], str | None] | None = None,
) -> Callable[..., Any]:
    """Decorator: the function becomes implementation `name` of `operator`; `missing`: why it is not installed."""

    def add(run: Callable[..., Any]) -> Callable[..., Any]:
        _REGISTRY[operator][name] = Implementation(name, run, supports, missing)
        return run

    return add


def kinds(operator: str) -> Callable[..., Any]:
    """Decorator: the function tells an operator's call's kind, by which the order list is chosen."""

    def add(kind: Callable[..., str]) -> Callable[..., str]:
        _KINDS[operator] = kind
        return kind

    return add


def order_of(operator: str, device: torch.device, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    """The implementations `auto` tries for this call, best first."""
    orders, name = ORDER[operator], device.type
    kind = _KINDS[operator](*args, **kwargs) if operator in _KINDS else ""
    special = kind or (_architecture(device) if name == "cuda" else "")
    return next((orders[key] for key in (f"{name} {special}", name) if key in orders), ("reference",))


def _architecture(device: torch.device) -> str:
    """sm_90; nothing while torch.compile traces, which may not ask the driver: the general list then counts."""
    if torch.compiler.is_compiling():
        return ""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _checked(choice: dict[str, str], origin: str) -> dict[str, str]:
    for operator, name in choice.items():
        if operator not in _REGISTRY:
            raise UnsupportedKernel(f"{origin}: no operator `{operator}`{_near(operator, _REGISTRY)}")
        known = {*_REGISTRY[operator], "auto"}
        if name not in known:
            raise UnsupportedKernel(f"{origin}: {operator} has no implementation `{name}`; it has {sorted(known)}")
    return choice


def _near(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean `{close[0]}`?)" if close else f"; operators: {', '.join(names)}"


@contextmanager
def use(**choice: str) -> Iterator[None]:
    """Within the block, run the named implementations: `with use(rms_norm="reference"):`. Wins over the environment.

    A graph compiled inside keeps the choice it was traced with."""
    token = _CHOICE.set({**_from_context(), **_checked(choice, "use()")})
    try:
        yield
    finally:
        _CHOICE.reset(token)


def _from_context() -> dict[str, str]:
    return _CHOICE.get() or {}


def _from_environment() -> dict[str, str]:
    """OPENCODER_KERNELS: `attention=torch,rms_norm=reference`, or one name for every operator that has it."""
    text = os.environ.get(ENVIRONMENT, "")
    choice: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        operator, equals, name = part.partition("=")
        if equals:
            choice[operator.strip()] = name.strip()
            continue
        having = [o for o, impls in _REGISTRY.items() if part in impls]
        if not having:
            raise UnsupportedKernel(f"{ENVIRONMENT}={text}: no operator has an implementation `{part}`")
        choice.update(dict.fromkeys(having, part))
    return _checked(choice, f"{ENVIRONMENT}={text}")


def choose(operator: str, impl: str, device: torch.device, *args: Any, **kwargs: Any) -> Implementation:
    """The implementation for this call: `impl` if it is a name, else the context's, the environment's, `auto`'s."""
    implementations = _REGISTRY[operator]
    if impl == "auto":
        impl = _from_context().get(operator) or _from_environment().get(operator, "auto")
    if impl != "auto":
        _checked({operator: impl}, "impl")
        reason = implementations[impl].supports(*args, **kwargs)
        if reason is None:
            return implementations[impl]
        able = [i.name for i in implementations.values() if i.supports(*args, **kwargs) is None]
        raise UnsupportedKernel(f"{operator}[{impl}]: {reason}; implementations that can: {', '.join(able)}")
    for name in order_of(operator, device, *args, **kwargs):
        found = implementations.get(name)
        if found is not None and found.supports(*args, **kwargs) is None:
            if name == "reference" and device.type == "cuda":
                _warn_once(operator)
            return found
    return implementations["reference"]


def _warn_once(operator: str) -> None:
    if operator not in _WARNED:
        _WARNED.add(operator)
        log.warning("%s runs the reference implementation on CUDA; K.explain(%r, …) says why", operator, operator)


def explain(operator: str, *args: Any, **kwargs: Any) -> str:
    """What would run for this call, and for each implementation why or why not."""
    if operator not in _REGISTRY:
        raise UnsupportedKernel(f"explain: no operator `{operator}`{_near(operator, _REGISTRY)}")
    impl = kwargs.pop("impl", "auto")
    _checked({operator: impl}, "explain")
    tensors = (a[0] if isinstance(a, (list, tuple)) and a else a for a in (*args, *kwargs.values()))
    device = next((t.device for t in tensors if hasattr(t, "device")), torch.device("cpu"))
    named = impl if impl != "auto" else _from_context().get(operator) or _from_environment().get(operator, "auto")
    order = order_of(operator, device, *args, **kwargs)
    lines = [
        f"{operator} on {device.type}: {'named: ' + named if named != 'auto' else 'auto, order ' + ', '.join(order)}"
    ]
    runs = None
    for name in [*order, *(n for n in _REGISTRY[operator] if n not in order)]:
        found = _REGISTRY[operator].get(name)
        reason = found.supports(*args, **kwargs) if found else "not available in this installation"
        eligible = name == named if named != "auto" else name in order
        if reason is None and eligible and runs is None:
            runs = name
        lines.append(f"  {name}: {reason or 'can serve'}{'  <- runs' if runs == name else ''}")
    return "\n".join(lines)


def chosen(device_type: str = "cpu") -> str:
    """One line for the start of a run: what each operator would use first, for its plainest call."""
    context, environment = _from_context(), _from_environment()
    parts = []
    for operator, orders in ORDER.items():
        name = context.get(operator) or environment.get(operator, "auto")
        if name == "auto":
            found = (_REGISTRY[operator].get(n) for n in orders.get(device_type, ("reference",)))
            installed = (i for i in found if i is not None and (i.missing is None or i.missing() is None))
            name = next((i.name for i in installed), "reference")
        parts.append(f"{operator}={name}")
    return f"kernels on {device_type}: " + " ".join(parts)
