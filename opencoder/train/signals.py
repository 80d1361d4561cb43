"""SIGTERM: finish the step, save, exit 0. SIGUSR1: finish the step, save, go on.

A signal may reach one rank only or reach ranks in different steps, so the ranks agree once a step on what was asked.
(torchrun hands SIGTERM on to its workers, kills them after its --shutdown-timeout, and itself returns 1.)"""

from __future__ import annotations

import signal
from types import FrameType
from typing import NamedTuple


class Asked(NamedTuple):
    """What some rank was asked to do."""

    save: bool = False
    stop: bool = False
    """Save, and stop."""
    failed: bool = False
    """A rank has seen its background save fail: all must look at theirs."""

    def __bool__(self) -> bool:
        return any(self)

    def merged(self, other: Asked) -> Asked:
        """What either says."""
        return Asked(*(a or b for a, b in zip(self, other, strict=True)))


class Signals:
    """Installs the handlers; `take` is called by every rank once a step."""

    def __init__(self) -> None:
        self._save = self._stop = False
        self._previous = {
            number: signal.signal(number, handler)
            for number, handler in ((signal.SIGTERM, self._on_term), (signal.SIGUSR1, self._on_usr1))
        }

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    def _on_usr1(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    def take(self, *, failed: bool) -> Asked:
        """What this rank was asked since the last call, for all to agree on. A request to save is cleared, so one that comes
        later is kept for the next step."""
        asked = Asked(self._save, self._stop, failed)
        self._save = False
        return asked

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
