"""Functions that the tests of the task engine run in other processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def number(inputs: list[Path], outputs: list[Path], *, value: int) -> dict[str, int]:
    """Write a number."""
    outputs[0].write_text(str(value))
    return {"value": value}


def process(inputs: list[Path], outputs: list[Path]) -> None:
    """Write the number of the process."""
    outputs[0].write_text(str(os.getpid()))


def total(inputs: list[Path], outputs: list[Path]) -> None:
    """Write the sum of the inputs."""
    outputs[0].write_text(str(sum(int(path.read_text()) for path in inputs)))


def shout(inputs: list[Path], outputs: list[Path]) -> None:
    """Write the input in capitals, and its length."""
    text = inputs[0].read_text()
    outputs[0].write_text(text.upper())
    outputs[1].write_text(str(len(text)))


def fail(inputs: list[Path], outputs: list[Path], *, text: str) -> None:
    """Raise after half of the work."""
    outputs[0].write_text("half")
    raise RuntimeError(text)


def nothing(inputs: list[Path], outputs: list[Path]) -> None:
    """Forget to write."""


def log_call(inputs: list[Path], outputs: list[Path], *, calls: str, seconds: float = 0.0) -> None:
    """Leave a line per call in the file `calls`, with start and end."""
    start = time.time()
    time.sleep(seconds)
    outputs[0].write_text("done")
    with open(calls, "a") as file:
        file.write(f"{outputs[0].stem} {start} {time.time()}\n")


def die(inputs: list[Path], outputs: list[Path], *, calls: str, times: int) -> None:
    """Be killed in mid-work, the first `times` times that it is called."""
    with open(calls, "a") as file:
        file.write(f"{outputs[0].stem} {time.time()}\n")
    outputs[0].write_text("half")
    if Path(calls).read_text().count(f"{outputs[0].stem} ") <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    outputs[0].write_text("whole")


def leave(inputs: list[Path], outputs: list[Path]) -> None:
    """End the process."""
    sys.exit(3)


def hold(inputs: list[Path], outputs: list[Path], *, mebibytes: int, seconds: float) -> None:
    """Take memory."""
    block = bytearray(os.urandom(1 << 20) * mebibytes)
    time.sleep(seconds)
    outputs[0].write_text(str(len(block)))


def fill_disk(inputs: list[Path], outputs: list[Path]) -> None:
    """Write to a device that is full."""
    outputs[0].write_text("half")
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


def touch_source(inputs: list[Path], outputs: list[Path]) -> None:
    """Change the input that is being read."""
    outputs[0].write_text(inputs[0].read_text())
    inputs[0].write_text("changed in between")
