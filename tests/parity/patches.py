"""Deliberate faults at run time: functions of this process are replaced, and it is counted how often the replacements ran."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from opencoder.parallel.group import Group, Handle


class Patches:
    """What was replaced in this process, for good: it is started for one fault and ends with it."""

    def __init__(self) -> None:
        self.reached = 0
        """Times that a fault had its effect."""

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """`owner.name` becomes make(what it was). Every call of the new function counts."""
        _set(owner, name, self._counted(make(getattr(owner, name))))

    def replace_item(self, mapping: dict[Any, Any], key: Any, make: Callable[[Any], Any]) -> None:
        """The same for a function that stands in a table."""
        mapping[key] = self._counted(make(mapping[key]))

    def _counted(self, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.reached += 1
            return function(*args, **kwargs)

        return counted

    def silence(self, owner: Any, name: str, operation: str, *, op: str | None = None) -> None:
        """Within `owner.name`, the group's `operation` leaves its tensor as it is and sends nothing (`op`: of this kind alone)."""
        inside = [0]

        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            inside[0] += 1
            try:
                return original(*args, **kwargs)
            finally:
                inside[0] -= 1

        _set(owner, name, watched)
        send = getattr(Group, operation)

        def silent(group: Group, x: Any, *args: Any, **kwargs: Any) -> Any:
            kind = kwargs.get("op", args[0] if args else "sum")
            if not inside[0] or group.size == 1 or op not in (None, kind):
                return send(group, x, *args, **kwargs)
            self.reached += 1
            return Handle((), lambda: x) if operation.startswith("start_") else x

        setattr(Group, operation, silent)


def _set(owner: Any, name: str, function: Any) -> None:
    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(function) if static else function)
