"""The program's side: loads the code under test in its own process and answers calls with plain values.

Whatever the code does to this process, all it can send are values. Standard library only: the zygote imports this."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import Any

from . import frames, values

CALL_TEXT = 500
"""Characters kept of an exception's text."""


class Server:
    """Objects of the program that have no plain form, by number, and the operations on them."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.globals: dict[str, Any] = {}

    def keep(self, value: Any) -> int:
        """The number by which the other side may speak of `value`."""
        self.objects.append(value)
        return len(self.objects) - 1

    def load(self, source: str, name: str) -> None:
        """Run the code in a fresh module."""
        module = type(sys)(name)
        sys.modules[name] = module
        self.globals = module.__dict__
        self.globals["__builtins__"] = __builtins__
        exec(compile(source, "<program>", "exec", dont_inherit=True), self.globals)

    def lookup(self, path: str) -> Any:
        """A global of the program by name; `Class.method` is that method of a fresh instance."""
        first, _, method = path.partition(".")
        if first not in self.globals:
            raise NameError(f"name '{first}' is not defined")
        return getattr(self.globals[first](), method) if method else self.globals[first]

    def call(self, target: Any, arguments: list[Any], named: dict[str, Any]) -> Any:
        """Call it."""
        return target(*arguments, **named)

    def items(self, target: Any) -> list[Any]:
        """All items of something iterable."""
        return list(target)


def serve(channel: socket.socket) -> None:
    """Answer requests until the other side closes the channel."""
    server = Server()
    operations: dict[str, Callable[..., Any]] = {
        "load": server.load,
        "lookup": server.lookup,
        "call": server.call,
        "getattr": getattr,
        "items": server.items,
        "len": len,
        "getitem": lambda target, key: target[key],
        "text": str,
        "true": bool,
    }
    while True:
        try:
            request = frames.receive(channel)
        except frames.ChannelError:
            return
        frames.send(channel, _answer(server, operations, request))


def _answer(server: Server, operations: dict[str, Callable[..., Any]], request: dict[str, Any]) -> dict[str, Any]:
    try:
        reader = values.Reader(server.objects.__getitem__)
        arguments = reader.read(request["value"])
        result = operations[request["do"]](*arguments)
        return {"value": values.Writer(server.keep, reader.objects).write([result])}
    except BaseException as error:
        # SystemExit and KeyboardInterrupt too: to the tests they are exceptions like others.
        return {"raised": [_class_names(error), _text(error)[:CALL_TEXT]]}


def _class_names(error: BaseException) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as second:  # the program's own __str__
        return f"<no text: {type(second).__name__}>"
