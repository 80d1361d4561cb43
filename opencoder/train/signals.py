"""SIGTERM: finish the step, save, exit 0. SIGUSR1: finish the step, save, go on.

A signal may reach one rank only or reach ranks in different steps, so the ranks agree once a step on what was asked.
(torchrun hands SIGTERM on to its workers, kills them after its --shutdown-timeout, and itself returns 1.)"""

from __future__ import annotations

import signal
from types import FrameType
from typing import NamedTuple

import torch

from opencoder.parallel.group import Group


class Asked(NamedTuple):
    """What any rank was asked to do since the last agreement."""

    save: bool
    stop: bool
    failed: bool
    """A rank has seen its background save fail: all must look at theirs."""


class Signals:
    """Installs the handlers; `agree` is called by every rank once a step."""

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

    def agree(self, world: Group, device: torch.device, *, failed: bool = False) -> Asked:
        """What was asked of any rank, or has `failed` on one; the same answer on all. Clears the request to save."""
        flags = torch.tensor([self._save, self._stop, failed], dtype=torch.int32, device=device)
        # Cleared before the exchange: a signal that arrives during it is kept for the next step.
        self._save = False
        world.all_reduce(flags)
        save, stop, failed = (bool(n) for n in flags.tolist())
        return Asked(save=save or stop, stop=stop, failed=failed)

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
