"""Find a package's functions by symbol and signature."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class Symbol(NamedTuple):
    """A function of another package and the parameters that are passed to it."""

    module: str
    name: str
    """Of a function, or of an autograd Function, whose `forward` is then looked at (without its context)."""
    positional: tuple[str, ...]
    keywords: tuple[str, ...] = ()

    def misfit(self, parameters: Sequence[str], without_default: Sequence[str]) -> str | None:
        """Why a function with these parameters cannot be called so, None if it can."""
        if tuple(parameters[: len(self.positional)]) != self.positional:
            return f"takes ({', '.join(parameters)}), expected first ({', '.join(self.positional)})"
        passed = {*self.positional, *self.keywords}
        unknown = [k for k in self.keywords if k not in parameters]
        if unknown:
            return f"has no parameter {', '.join(unknown)}"
        needed = [p for p in without_default if p not in passed]
        return f"needs {', '.join(needed)} too" if needed else None


class Found(NamedTuple):
    """The functions by name, or why they cannot be used."""

    functions: dict[str, Callable[..., Any]]
    missing: str | None


class Adapter:
    """A package's functions, looked for when first asked about: importing some of them takes seconds."""

    def __init__(self, look: Callable[[], Found]) -> None:
        self._look = look
        self._found: Found | None = None

    def found(self) -> Found:
        """What there is."""
        if self._found is None:
            self._found = self._look()
        return self._found

    def missing(self) -> str | None:
        """Why it cannot be used, None if it can."""
        if self._found is None and torch.compiler.is_compiling():
            return "not looked for while torch.compile traces; K.chosen(), K.explain() or one call before does that"
        return self.found().missing

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.found().functions[name]


def find(package: str, symbols: Sequence[Symbol], *, how: str) -> Found:
    """Import each symbol; `how` tells the user how to get the package."""
    functions: dict[str, Callable[..., Any]] = {}
    if importlib.util.find_spec(package) is None:
        return Found({}, f"{package} is not installed: {how}")
    for symbol in symbols:
        called = f"{symbol.module}.{symbol.name}"
        try:
            found = getattr(importlib.import_module(symbol.module), symbol.name)
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            # OSError and RuntimeError: a library built for another torch does not load.
            return Found({}, f"a package `{package}` is installed but {called} does not import ({error}): {how}")
        names, needed = parameters_of(found)
        if (reason := symbol.misfit(names, needed)) is not None:
            return Found({}, f"{called} {reason}; the adapter was written for another version")
        functions[symbol.name] = getattr(found, "apply", found)
    return Found(functions, None)


def parameters_of(function: Any) -> tuple[list[str], list[str]]:
    """Names of the parameters, and of those without a default, of a function or of an autograd Function's forward."""
    forward = getattr(function, "forward", None)
    parameters = list(inspect.signature(forward or function).parameters.values())
    parameters = parameters[1:] if forward is not None else parameters
    return [p.name for p in parameters], [p.name for p in parameters if p.default is p.empty]
