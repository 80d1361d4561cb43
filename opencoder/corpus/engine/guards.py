"""What a driver keeps off: signals at the wrong moment, and a second driver in its folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opencoder.errors import Failure, UserError

log = logging.getLogger("opencoder")


class Stopped(Failure):
    """A signal ended the run; what is done is kept."""


class Signals:
    """Turns Ctrl-C and SIGTERM into exceptions at a place of the driver's choice; only in the main thread."""

    def __init__(self) -> None:
        self.seen = 0

    def __enter__(self) -> Signals:
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.seen == signal.SIGINT == number:
            raise KeyboardInterrupt  # asked twice: the driver is busy with something long, a large file to hash
        self.seen = number

    def check(self) -> None:
        """Raise what the signal asks for, if one has come."""
        if self.seen == signal.SIGINT:
            raise KeyboardInterrupt
        if self.seen:
            raise Stopped(f"stopped by {signal.Signals(self.seen).name}; what is done is kept: start again to go on")


@contextmanager
def only_driver(folder: Path, *, shared: bool) -> Iterator[None]:
    """One driver per folder. Array jobs (`shared`) hold no lock: their driver holds it, and their shares are disjoint."""
    if shared:
        yield
        return
    with open(folder / ".driver.lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                log.warning("%s cannot be locked (%s): do not start two drivers there", folder, error.strerror)
            else:
                raise UserError(f"another run is at work in {folder}: wait for it or stop it") from None
        yield
