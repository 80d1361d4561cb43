"""The executor `ray`: the same jobs as Ray tasks, on a running cluster or one started on this machine.

Only jobs and manifests travel through Ray, a few kB each; data stays in files of the shared folder. Retries are the
driver's, so that they are counted and reported in one way everywhere."""

from __future__ import annotations

import importlib
from typing import Any

from opencoder.errors import UserError

from .execute import Job, Outcome, execute

PER_CPU = 2
"""Jobs in flight per CPU of the cluster: one runs while the next is handed over."""


class RayExecutor:
    """Runs jobs on Ray. `address`: as of ray.init ("auto": the running cluster; None: RAY_ADDRESS, else a new local one
    with `workers` CPUs). A task asks for one CPU and, if it states its memory, for that. Needs the extra `ray`; on a
    cluster, the folder must be shared and opencoder installed on every node in one version (checked per task)."""

    def __init__(self, address: str | None = None, *, workers: int | None = None) -> None:
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise UserError("executor ray needs Ray: pip install 'opencoder[ray]', or choose executor local") from error
        self._ray = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            local = {} if address else {"num_cpus": workers, "include_dashboard": False}
            try:
                ray.init(address=address, log_to_driver=False, logging_level="warning", **local)
            except ConnectionError as error:
                raise UserError(
                    f"Ray cluster {address} does not answer ({error}): start one or give no address"
                ) from error
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if cpus < 1:
            self.close()
            raise UserError("the Ray cluster has no CPU for tasks: start a node with CPUs")
        self.capacity = PER_CPU * cpus
        self._execute = ray.remote(max_retries=0)(execute)
        self._jobs: dict[Any, Job] = {}

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def submit(self, job: Job) -> None:
        """Hand a job to Ray."""
        wants: dict[str, Any] = {"num_cpus": 1, "name": job.task.name}
        if job.task.memory is not None:
            wants["memory"] = job.task.memory
        self._jobs[self._execute.options(**wants).remote(job)] = job

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Outcomes that have come in."""
        pending = list(self._jobs)
        ready, rest = self._ray.wait(pending, num_returns=1, timeout=timeout_s)
        if ready and rest:
            more, _ = self._ray.wait(rest, num_returns=len(rest), timeout=0)
            ready += more
        return [self._outcome(reference, self._jobs.pop(reference)) for reference in ready]

    def _outcome(self, reference: Any, job: Job) -> Outcome:
        errors = self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(reference)
            return outcome
        except errors.OutOfMemoryError as error:
            return Outcome(job, "killed", error=f"Ray ended it because memory ran out: {_first_line(error)}")
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError) as error:
            return Outcome(job, "killed", error=f"its process or node was lost: {_first_line(error)}")
        except errors.RayError as error:
            return Outcome(job, "failed", error=f"Ray could not run it: {_first_line(error)}", traceback=str(error))

    def cancel(self) -> None:
        """Kill what runs."""
        for reference in self._jobs:
            self._ray.cancel(reference, force=True)
        self._jobs.clear()

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._ours and self._ray.is_initialized():
            self._ray.shutdown()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
