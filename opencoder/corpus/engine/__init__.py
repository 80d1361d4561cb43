"""The task engine: pure tasks over files, run in processes of this machine, on Ray or in the elements of a job array.

docs/engine.md explains it."""

from .array import ArrayExecutor, run_share
from .choose import make_executor
from .driver import DiskFull, FailedTask, RunReport, TasksFailed, run
from .guards import Stopped
from .local import Executor, LocalExecutor
from .ray_cluster import RayExecutor
from .task import DamagedFile, Input, Task, open_verified, read_manifest, verified_path

__all__ = [
    "ArrayExecutor",
    "DamagedFile",
    "DiskFull",
    "Executor",
    "FailedTask",
    "Input",
    "LocalExecutor",
    "RayExecutor",
    "RunReport",
    "Stopped",
    "Task",
    "TasksFailed",
    "make_executor",
    "open_verified",
    "read_manifest",
    "run",
    "run_share",
    "verified_path",
]
