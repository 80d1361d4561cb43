"""What fails on one rank fails on all, at once and with the same words: nobody is left waiting in a collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.checkpoint.api import CheckpointException

from opencoder.errors import Failure, UserError
from opencoder.parallel.mesh import Group


@contextmanager
def together(group: Group, what: str, remedy: str) -> Iterator[None]:
    """Run the block on every rank of `group`; nobody leaves before all are through it.

    An OSError or a checkpoint error on any rank raises the same Failure on all, `what (rank r: cause): remedy`; a mistake
    of the user's (UserError) is raised on all too. Any other exception is a defect: it keeps its traceback where it
    happened, and the other ranks raise a Failure that names that rank. Only one rank's error is printed."""
    error: Exception | CheckpointException | None = None
    try:
        yield
    except (Exception, CheckpointException) as caught:  # the latter is a BaseException
        error = caught
    outcomes = group.gather_objects(None if error is None else _outcome(error))
    failed = [(rank, *outcome) for rank, outcome in enumerate(outcomes) if outcome is not None]
    if not failed:
        return
    rank, kind, text = failed[0]
    if error is not None and kind == "defect" and group.rank == rank:
        raise error
    named = f"rank {rank}: {text}" if group.size > 1 and not text.startswith("rank ") else text
    if kind == "user":
        raised: Failure | UserError = error if isinstance(error, UserError) else UserError(text)
    else:
        raised = Failure(f"{what} ({named}): {remedy}")
    raised.told_elsewhere = group.rank != (rank if kind == "defect" else 0)
    raise raised from error


def _outcome(error: BaseException) -> tuple[str, str]:
    """(kind, text) of an error; a checkpoint error wraps one exception per rank, the first of which counts."""
    where = ""
    if isinstance(error, CheckpointException):
        rank, (error, _) = min(error.failures.items())
        where = f"rank {rank}: "
    if isinstance(error, UserError):
        return "user", str(error)
    if isinstance(error, OSError):
        return "failure", f"{where}{error}"
    return "defect", f"{where}{type(error).__name__}: {error}"
