"""Values as plain data between the program under test and the checker. Standard library only.

Only builtin types cross, by exact type: no class, no method, no `__eq__` of the program under test does. A message is a table of
containers and a list of roots: {"t": [[tag, children…], …], "r": [reference, …]}. A reference is a JSON atom (None, bool, str, an
int of at most 53 bits, a float) or a list [kind, …]; ["@", i] is container i, so that shared and cyclic structure survives.
What has no plain form becomes a handle ["h", n], which only the program's side can look into."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

SAFE_INT = 1 << 53
MUTABLE = {"l": list, "d": dict, "s": set, "q": deque}
FROZEN = {"t": tuple, "f": frozenset}
_TAGS: tuple[tuple[type, str], ...] = (
    (list, "l"),
    (tuple, "t"),
    (dict, "d"),
    (set, "s"),
    (frozenset, "f"),
    (deque, "q"),
)


class BadValue(ValueError):
    """A message that is no value, or a value that has no plain form."""


def tag_of(value: Any) -> str | None:
    """The tag of a container, subclasses included."""
    return next((tag for kind, tag in _TAGS if isinstance(value, kind)), None)


def children(value: Any, tag: str) -> list[Any]:
    """The values in a container, by the methods of its builtin type; of a dict keys and values in turn."""
    if tag == "d":
        return [part for pair in dict.items(value) for part in pair]
    return list({"l": list, "t": tuple, "s": set, "f": frozenset, "q": deque}[tag].__iter__(value))  # type: ignore[attr-defined]


class Writer:
    """Encodes values into one table. `handle` gives the number of an object without a plain form, or raises BadValue."""

    def __init__(self, handle: Callable[[Any], int], known: list[Any] | None = None) -> None:
        self._handle = handle
        self.known = known or []
        self.table: list[Any] = [None] * len(self.known)
        self._index = {id(value): i for i, value in enumerate(self.known)}
        self.held: list[Any] = list(self.known)
        """The containers in the order of the table. (And an id is only good while its object lives.)"""

    def write(self, roots: list[Any]) -> dict[str, Any]:
        """The message for `roots`, with the present content of the containers known from before."""
        for i, value in enumerate(self.known):
            self._fill(i, value)
        references = [self._reference(root) for root in roots]
        return {"t": self.table, "r": references}

    def _fill(self, index: int, value: Any) -> None:
        tag = tag_of(value)
        assert tag is not None, type(value)
        self.table[index] = [tag, *(self._reference(child) for child in children(value, tag))]

    def _reference(self, value: Any) -> Any:
        atom = _atom(value)
        if atom is not None:
            return atom[0]
        if tag_of(value) is None:
            return ["h", self._handle(value)]
        if id(value) not in self._index:
            self._add(value)
        return ["@", self._index[id(value)]]

    def _add(self, root: Any) -> None:
        """Give `root` and all containers below it their rows: frozen ones after what they hold, without recursion."""
        stack = [(root, False)]
        later = []
        while stack:
            value, done = stack.pop()
            tag = tag_of(value)
            if tag is None or (not done and id(value) in self._index):
                continue
            if tag in MUTABLE:
                self._reserve(value)
                later.append(value)
                stack += [(child, False) for child in children(value, tag)]
            elif done:
                if id(value) not in self._index:
                    self._reserve(value)
                    later.append(value)
            else:
                stack.append((value, True))
                stack += [(child, False) for child in children(value, tag)]
        for value in later:
            self._fill(self._index[id(value)], value)

    def _reserve(self, value: Any) -> None:
        self._index[id(value)] = len(self.table)
        self.table.append(None)
        self.held.append(value)


def _atom(value: Any) -> tuple[Any] | None:
    """The reference to a value that is no container, in a tuple; None if it has none."""
    if value is None or value is True or value is False:
        return (value,)
    if isinstance(value, str):
        return (str.__str__(value),)
    if isinstance(value, int):
        number = int.__int__(value)
        return (number if -SAFE_INT < number < SAFE_INT else ["i", hex(number)],)
    if isinstance(value, float):
        return (float.__float__(value),)
    if isinstance(value, complex):
        return (["c", complex.__complex__(value).real, complex.__complex__(value).imag],)
    if isinstance(value, bytes | bytearray):
        return (["b" if isinstance(value, bytes) else "B", bytes(value).hex()],)
    if isinstance(value, range):
        return (["R", *(hex(n) for n in (value.start, value.stop, value.step))],)
    if isinstance(value, Decimal):
        return (["D", Decimal.__str__(value)],)
    if isinstance(value, Fraction):
        return (["F", hex(value.numerator), hex(value.denominator)],)
    if value is Ellipsis:
        return (["E"],)
    return _numpy_atom(value)


def _numpy_atom(value: Any) -> tuple[Any] | None:
    if type(value).__module__ != "numpy":
        return None
    if type(value).__name__ == "ndarray" and value.dtype.kind in "biufc":
        return (["N", value.dtype.str, list(value.shape), value.tobytes().hex()],)
    item = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else None
    return _atom(item) if type(item) in (bool, int, float, complex, str) else None


class Reader:
    """Decodes messages. `handle` makes what stands for a handle; `known` are the containers of an earlier message, which are
    brought up to date in place, so that a change to an argument is seen by who passed it."""

    def __init__(self, handle: Callable[[int], Any], known: list[Any] | None = None) -> None:
        self._handle = handle
        self._known = known or []
        self.objects: list[Any] = []

    def read(self, message: Any) -> list[Any]:
        """The roots of a message. Raises BadValue for anything that Writer would not have written."""
        try:
            table, roots = message["t"], message["r"]
            self.objects = [self._start(i, row) for i, row in enumerate(table)]
            for i, row in enumerate(table):  # frozen ones: what they hold stands before them, or is filled below
                if isinstance(self.objects[i], _Unbuilt):
                    self.objects[i] = self._build(i, row)
            for i, row in enumerate(table):
                if row[0] in MUTABLE:
                    self._fill(self.objects[i], row)
            return [self._value(root) for root in roots]
        except BadValue:
            raise
        except (TypeError, ValueError, KeyError, IndexError, ArithmeticError, AttributeError) as error:
            raise BadValue(f"not a value: {type(error).__name__}: {error}") from error

    def _start(self, index: int, row: Any) -> Any:
        tag = row[0]
        if index < len(self._known):
            if tag_of(self._known[index]) != tag:
                raise BadValue(f"container {index} changed its type to {tag}")
            return self._known[index]
        if tag in MUTABLE:
            return MUTABLE[tag]()
        if tag in FROZEN:
            return _Unbuilt()
        raise BadValue(f"unknown tag {tag!r}")

    def _build(self, index: int, row: Any) -> Any:
        parts = [self._value(part) for part in row[1:]]
        if any(isinstance(part, _Unbuilt) for part in parts):
            raise BadValue(f"container {index} holds one that comes later")
        return FROZEN[row[0]](parts)

    def _fill(self, target: Any, row: Any) -> None:
        parts = [self._value(part) for part in row[1:]]
        if row[0] == "d":
            fresh = dict(zip(parts[::2], parts[1::2], strict=True))
            target.clear()
            target.update(fresh)
        elif row[0] == "l":
            target[:] = parts
        else:
            target.clear()
            (target.update if row[0] == "s" else target.extend)(parts)

    def _value(self, reference: Any) -> Any:
        if not isinstance(reference, list):
            if isinstance(reference, dict):
                raise BadValue("an object where a reference belongs")
            return reference
        kind, *rest = reference
        if kind == "@":
            if not 0 <= rest[0] < len(self.objects):
                raise BadValue(f"no container {rest[0]}")
            return self.objects[rest[0]]
        if kind == "h":
            return self._handle(int(rest[0]))
        return _ATOMS[kind](*rest)


class _Unbuilt:
    """Stands for a frozen container whose parts are not read yet."""


def _array(dtype: str, shape: list[int], data: str) -> Any:
    import numpy

    kind = numpy.dtype(dtype)
    if kind.kind not in "biufc" or math.prod(shape) * kind.itemsize * 2 != len(data):
        raise BadValue("not an array")
    return numpy.frombuffer(bytes.fromhex(data), kind).reshape(shape).copy()


def _whole(text: str) -> int:
    return int(text, 16)


_ATOMS: dict[str, Callable[..., Any]] = {
    "i": _whole,
    "c": complex,
    "b": bytes.fromhex,
    "B": bytearray.fromhex,
    "R": lambda *parts: range(*map(_whole, parts)),
    "D": Decimal,
    "F": lambda top, bottom: Fraction(_whole(top), _whole(bottom)),
    "E": lambda: Ellipsis,
    "N": _array,
}
