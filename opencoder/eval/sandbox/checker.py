"""The checker's side: runs a benchmark's test in an interpreter that never runs the code under test.

The test calls proxies; arguments go to the program's process as plain values and results come back so. Comparisons are made here,
on builtin types only. Standard library only: the zygote imports this."""

from __future__ import annotations

import builtins
import copy
import dis
import importlib
import json
import math
import socket
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any

from . import frames, values

DETAIL = 2000
"""Characters kept of what went wrong."""


class ProgramError(Exception):
    """The program raised an exception of a class that is not builtin."""


class ProgramGone(BaseException):
    """The program's process ended, or sent what is no answer. No `except Exception` in a test swallows it."""


class NotPlain(BaseException):
    """The test asks for something that this harness cannot carry: no verdict about the program."""


class Link:
    """Requests to the program's process."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self.broken = False
        self.raised: list[BaseException] = []
        """Exceptions of the program's, which must not be taken for the test's own."""

    def ask(self, do: str, *arguments: Any) -> Any:
        """One operation. Raises what the program raised, as a builtin class; ProgramGone if it is gone."""
        writer = values.Writer(_handle_of)
        try:
            message = {"do": do, "value": writer.write(list(arguments))}
        except values.BadValue as error:
            raise NotPlain(str(error)) from error
        try:
            frames.send(self._channel, message)
            answer = frames.receive(self._channel)
            if "raised" in answer:
                names, text = answer["raised"]
                raised = _exception(names, str(text))
            else:
                (result,) = values.Reader(self._remote, writer.held).read(answer["value"])
                return result
        except (frames.ChannelError, values.BadValue, KeyError, TypeError, ValueError, RecursionError) as error:
            self.broken = True
            raise ProgramGone(f"{type(error).__name__}: {error}") from None
        self.raised.append(raised)
        raise raised

    def _remote(self, number: int) -> Remote:
        return Remote(self, number)


class Remote:
    """Something of the program's that has no plain form. Equality is identity of the proxy: the program's `__eq__` is never asked."""

    def __init__(self, link: Link, number: int) -> None:
        self.__dict__["_link"] = link
        self.__dict__["_number"] = number

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._link.ask("call", self, list(arguments), named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.ask("getattr", self, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._link.ask("items", self))

    def __len__(self) -> int:
        return int(self._link.ask("len", self))

    def __getitem__(self, key: Any) -> Any:
        return self._link.ask("getitem", self, key)

    def __bool__(self) -> bool:
        return bool(self._link.ask("true", self))

    def __str__(self) -> str:
        return str(self._link.ask("text", self))


def _handle_of(value: Any) -> int:
    if isinstance(value, Remote):
        return int(value._number)
    raise values.BadValue(f"an argument of type {type(value).__name__} has no plain form")


def _exception(names: Any, text: str) -> BaseException:
    """The nearest builtin class of the program's exception; exits become ProgramError: they are not the test's own."""
    for name in names:
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception:
            try:
                return kind(text)
            except TypeError:
                break  # UnicodeDecodeError and others want more arguments
    return ProgramError(f"{names[0] if names else '?'}: {text}")


def run(control: socket.socket, channel: socket.socket) -> None:
    """Read a job, do it, send the outcome: {"outcome": passed | failed | unscorable, "kind", "detail"}."""
    job = frames.receive(control)
    link = Link(channel)
    try:
        link.ask("load", job["source"], job.get("module", "program"))
        _MODES[job["mode"]](job, link)
        outcome = {"outcome": "passed", "kind": "", "detail": ""}
    except ProgramGone as error:
        outcome = {"outcome": "failed", "kind": "program gone", "detail": str(error)}
    except NotPlain as error:
        outcome = {"outcome": "unscorable", "kind": "value", "detail": str(error)}
    except ImportError as error:
        ours = any(error is other for other in link.raised)
        outcome = {
            "outcome": "failed" if ours else "unscorable",
            "kind": type(error).__name__,
            "detail": _detail(error),
        }
    except BaseException as error:
        outcome = {"outcome": "failed", "kind": type(error).__name__, "detail": _detail(error)}
    if link.broken and outcome["outcome"] == "passed":  # a bare `except:` in a test swallowed ProgramGone
        outcome = {"outcome": "failed", "kind": "program gone", "detail": "during a call that the test swallowed"}
    frames.send(control, outcome)


def _check(job: dict[str, Any], link: Link) -> None:
    """HumanEval: the prompt's helpers, then the test, then check(candidate)."""
    space: dict[str, Any] = {"__name__": "test"}
    exec(compile(job["setup"], "<prompt>", "exec", dont_inherit=True), space)
    space[job["entry_point"]] = candidate = link.ask("lookup", job["entry_point"])
    exec(compile(job["test"], "<test>", "exec", dont_inherit=True), space)
    space["check"](candidate)


def _script(job: dict[str, Any], link: Link) -> None:
    """MBPP: statements; names that neither they nor the setup define are the program's. A builtin name is the program's only if it
    is the function asked for (one is called `sum`): a program that redefines `set` or `len` must not change the test."""
    space: dict[str, Any] = {"__name__": "test"}
    exec(compile(job["setup"], "<setup>", "exec", dont_inherit=True), space)
    code = compile(job["test"], "<test>", "exec", dont_inherit=True)
    for name in sorted(free_names(code) - set(space)):
        if name == job["entry_point"] or not (hasattr(builtins, name) or name in sys.stdlib_module_names):
            space[name] = link.ask("lookup", name)
        elif not hasattr(builtins, name):
            space[name] = importlib.import_module(name)  # never the program's `math`
    exec(code, space)


def _cases(job: dict[str, Any], link: Link) -> None:
    """Pairs of arguments and expected value. {"cases" (JSON): [[arguments, expected], …], "tolerance"}."""
    target = link.ask("lookup", job["entry_point"])
    for number, (arguments, expected) in enumerate(json.loads(job["cases"])):
        found = target(*arguments)
        assert equal(found, expected, job["tolerance"]), f"case {number}: {_short(found)} != {_short(expected)}"


def _same(job: dict[str, Any], link: Link) -> None:
    """EvalPlus: the program agrees with the reference solution on every input. {"reference", "inputs" (JSON), "tolerance"}."""
    space: dict[str, Any] = {"__name__": "reference"}
    exec(compile(job["reference"], "<reference>", "exec", dont_inherit=True), space)
    target = link.ask("lookup", job["entry_point"])
    for number, arguments in enumerate(json.loads(job["inputs"])):
        expected = space[job["entry_point"]](*copy.deepcopy(arguments))
        found = target(*arguments)
        assert equal(found, expected, job["tolerance"]), f"input {number}: {_short(found)} != {_short(expected)}"


_MODES = {"check": _check, "script": _script, "cases": _cases, "same": _same}


def equal(found: Any, expected: Any, tolerance: float) -> bool:
    """Equality as EvalPlus has it: `==`, or numbers within `tolerance` (absolute; and 1e-7 relative), also inside lists and tuples.
    A list equals a tuple: expected values may come from JSON."""
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(equal, found, expected, [tolerance] * len(found)))
    if isinstance(found, bool) or isinstance(expected, bool):
        return bool(found == expected)
    if isinstance(found, int | float) and isinstance(expected, float):
        allowed = tolerance or 1e-6
        return bool(found == expected) or math.isclose(found, expected, rel_tol=1e-7, abs_tol=allowed)
    return bool(found == expected)


def free_names(code: types.CodeType) -> set[str]:
    """Global names that the code and its functions read and nobody in it stores or imports."""
    read: set[str] = set()
    stored: set[str] = set()
    stack = [code]
    while stack:
        part = stack.pop()
        for instruction in dis.get_instructions(part):
            if instruction.opname in ("LOAD_NAME", "LOAD_GLOBAL"):
                read.add(instruction.argval)
            elif instruction.opname in ("STORE_NAME", "STORE_GLOBAL"):
                stored.add(instruction.argval)
        stack += [constant for constant in part.co_consts if isinstance(constant, types.CodeType)]
    return read - stored


def _short(value: Any) -> str:
    return repr(value)[:200]


def _detail(error: BaseException) -> str:
    """The statement of the test that failed, and the message."""
    lines = [f"line {frame.lineno} of {frame.filename}" for frame in traceback.extract_tb(error.__traceback__)]
    place = next((line for line in reversed(lines) if "<" in line), "")
    return f"{error} ({place})"[:DETAIL] if place else str(error)[:DETAIL]
