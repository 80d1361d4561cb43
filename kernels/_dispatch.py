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

log = logging.getLogger("opencoder")

ENVIRONMENT = "OPENCODER_KERNELS"

# What `auto` tries, best first, by operator and device type. `reference` is the definition and always the last.
# The adapters (flash_attn, apex, liger) stand where the published numbers put them; each is skipped unless installed.
ORDER: dict[str, dict[str, tuple[str, ...]]] = {
    "rms_norm": {"cpu": ("cpp", "reference"), "cuda": ("triton", "apex", "reference")},
    "rotary": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "swiglu": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    # Dense: torch's SDPA (cuDNN on Hopper, flash elsewhere). Documents, windows, softcap: what it cannot serve.
    "attention": {"cpu": ("cpp", "torch", "reference"), "cuda": ("torch", "flash_attn", "triton", "reference")},
    "attention_backward": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "cross_entropy": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "ce_stats": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "ce_grad": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "linear_cross_entropy": {"cpu": ("cpp", "torch", "reference"), "cuda": ("triton", "torch", "reference")},
    "adamw_step": {"cpu": ("cpp", "torch", "reference"), "cuda": ("triton", "torch", "reference")},
    "grad_norm": {"cpu": ("cpp", "torch", "reference"), "cuda": ("triton", "torch", "reference")},
}


class UnsupportedKernel(ValueError):
    """A named implementation cannot serve the call, or does not exist."""


class Implementation(NamedTuple):
    """One way to do an operator."""

    name: str
    run: Callable[..., Any]
    supports: Callable[..., str | None]
    """Given the call's arguments: None, or the reason why not."""
    missing: str | None = None
    """Why no call at all can be served in this installation."""


_REGISTRY: dict[str, dict[str, Implementation]] = {operator: {} for operator in ORDER}
_CHOICE: ContextVar[dict[str, str] | None] = ContextVar("opencoder_kernels", default=None)
_WARNED: set[str] = set()


def _anything(*args: Any, **kwargs: Any) -> str | None:
    return None


def register(
    operator: str, name: str, supports: Callable[..., str | None] = _anything, *, missing: str | None = None
) -> Callable[..., Any]:
    """Decorator: the function becomes implementation `name` of `operator`; `missing`: why it is not installed."""

    def add(run: Callable[..., Any]) -> Callable[..., Any]:
        _REGISTRY[operator][name] = Implementation(name, run, supports, missing)
        return run

    return add


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


def choose(operator: str, impl: str, device_type: str, *args: Any, **kwargs: Any) -> Implementation:
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
    for name in ORDER[operator].get(device_type, ("reference",)):
        found = implementations.get(name)
        if found is not None and found.supports(*args, **kwargs) is None:
            if name == "reference" and device_type == "cuda" and ORDER[operator]["cuda"][0] != "reference":
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
    device_type = next((t.device.type for t in tensors if hasattr(t, "device")), "cpu")
    named = impl if impl != "auto" else _from_context().get(operator) or _from_environment().get(operator, "auto")
    order = ORDER[operator].get(device_type, ("reference",))
    lines = [
        f"{operator} on {device_type}: {'named: ' + named if named != 'auto' else 'auto, order ' + ', '.join(order)}"
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
    """One line for the start of a run: what each operator would use first."""
    context, environment = _from_context(), _from_environment()
    parts = []
    for operator, devices in ORDER.items():
        name = context.get(operator) or environment.get(operator, "auto")
        if name == "auto":
            found = (_REGISTRY[operator].get(n) for n in devices.get(device_type, ("reference",)))
            name = next((i.name for i in found if i is not None and i.missing is None), "reference")
        parts.append(f"{operator}={name}")
    return f"kernels on {device_type}: " + " ".join(parts)
