"""What every command shares: argument parsing, exit codes and progress.

Exit 0 success; 2 a mistake of the user, told in one line; 1 otherwise. Progress is a bar on a terminal and plain
lines elsewhere, always on stderr, so that stdout holds results only."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .errors import Failure, UserError

PLAIN_INTERVAL_S = 5.0
"""Seconds between two plain progress lines where there is no terminal."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default, except where there is none to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, [], ()) or action.default is argparse.SUPPRESS:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and whose help shows every default."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=f"opencoder {prog}", description=description, formatter_class=_HelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def run(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Call a command's `main` and turn its outcome into the exit status of the process."""
    try:
        sys.exit(main(argv) or 0)
    except UserError as error:
        if not error.told_elsewhere:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except Failure as error:
        if not error.told_elsewhere:
            print(f"failed: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our stdout went away (`| head`): not an error of this program.
        sys.stderr.close()
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class ProgressBar:
    """Progress of one long task: `with ProgressBar("tokenize", total=n, unit="documents") as bar: bar.advance()`.

    `total=None` means unknown. `postfix` is a short free text (a loss, a rate)."""

    def __init__(self, name: str, *, total: int | None = None, unit: str = "items", enabled: bool = True) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, 0
        self._enabled = enabled
        self._postfix = ""
        self._last_line = self._start = time.monotonic()
        self._rich: Progress | None = None
        if enabled and sys.stderr.isatty():
            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
            columns += [TimeRemainingColumn(), TextColumn("{task.fields[postfix]}")]
            self._rich = Progress(*columns, console=Console(stderr=True))
            self._task = self._rich.add_task(name, total=total, postfix="")

    def __enter__(self) -> ProgressBar:
        if self._rich:
            self._rich.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._rich:
            self._rich.stop()
        elif self._enabled and self.done:
            self._print_line()

    def advance(self, n: int = 1, *, postfix: str | None = None) -> None:
        """Count `n` more units as done."""
        self.done += n
        if postfix is not None:
            self._postfix = postfix
        if self._rich:
            self._rich.update(self._task, advance=n, postfix=self._postfix)
        elif self._enabled and time.monotonic() - self._last_line >= PLAIN_INTERVAL_S:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        of = f"/{self.total}" if self.total is not None else ""
        rate = self.done / max(self._last_line - self._start, 1e-9)
        tail = f"  {self._postfix}" if self._postfix else ""
        print(f"{self.name}: {self.done}{of} {self.unit} ({rate:.1f}/s){tail}", file=sys.stderr, flush=True)
