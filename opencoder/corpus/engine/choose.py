"""From the configuration to an executor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .array import ArrayExecutor
from .local import LocalExecutor
from .ray_cluster import RayExecutor

if TYPE_CHECKING:  # each worker imports this package; the configuration would cost it 0.2 s
    from opencoder.corpus_config import EngineConfig


def make_executor(config: EngineConfig, *, workers: int) -> LocalExecutor | RayExecutor | ArrayExecutor:
    """The executor that `config` names, to be used as a context manager. `workers`: processes of this machine, for local
    and for a Ray cluster that is started here. Raises UserError if ray is asked for and missing."""
    if config.executor == "ray":
        return RayExecutor(config.ray_address, workers=workers)
    if config.executor == "array":
        return ArrayExecutor(count=config.array_count, command=config.array_command)
    limit = config.memory_per_worker_mb
    return LocalExecutor(workers, memory_per_worker=None if limit is None else limit << 20)
