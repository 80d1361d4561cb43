"""Errors that are a user's to mend. Everything else is a defect of ours and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what was asked for or given. Its text says what is wrong, what is allowed and what to do.

    Commands print it as one line and exit with status 2."""

    told_elsewhere = False
    """Raised alike on all ranks of a job, and another rank prints it."""


class ConfigError(UserError):
    """A configuration that cannot be run."""


class DataError(UserError):
    """An input file, dataset or checkpoint that is missing, damaged or of the wrong kind."""


class Failure(Exception):
    """Something went wrong that is neither a user's mistake nor a defect of ours (a full disk, a fault found by a check
    that was asked for). Commands print it as one line and exit with status 1."""

    told_elsewhere = False
    """Raised alike on all ranks of a job, and another rank prints it."""


class VerificationError(Failure):
    """A check that the user asked for (`verify-dataset`) and that failed."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """' (did you mean `x`?)' for the allowed name closest to `name`, or '' if none is close."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean `{close[0]}`?)" if close else ""
