"""Which rank is slow: what each spends a step on, for all ranks in RUN/ranks.jsonl, and a line that warns of one that others
wait for. The step times of the ranks themselves are alike: the fast ones wait in collectives for the slow."""

from __future__ import annotations

import logging
import statistics
from pathlib import Path
from typing import Any

import torch

from opencoder.parallel.mesh import Group

from .late import on_device
from .metrics import RowFile

log = logging.getLogger("opencoder")
SLOW = 1.2
"""Times the median of the ranks."""
LEAST_EXCESS_S = 0.02
"""Per step, above the median: what a busy host costs a rank now and then."""


class Straggler:
    """Collects what a step took on this rank, and every `every` steps what it took on all of them."""

    def __init__(self, world: Group, device: torch.device, run_dir: Path, *, every: int, first_step: int) -> None:
        """Rows of steps that a resumed run does again are removed. The same on all ranks."""
        self.world, self.device, self.every = world, device, every
        self.file = RowFile(run_dir / "ranks.jsonl", first_step=first_step) if world.rank == 0 else None
        self._sums = [0.0, 0.0]
        self._steps = 0
        self._slow: int | None = None
        self._told: int | None = None

    def add(self, step: int, *, busy_s: float, data_wait_s: float, mem_gib: float) -> torch.Tensor | None:
        """What `step` took here: seconds busy (not waiting in collectives), of these seconds waiting for data, and the
        highest memory so far. All ranks call this for the same steps. Returns what all ranks took, (ranks, 3), on the device,
        if a report of it is due."""
        self._sums = [self._sums[0] + busy_s, self._sums[1] + data_wait_s]
        self._steps += 1
        if step % self.every:
            return None
        mine = on_device([*(each / self._steps for each in self._sums), mem_gib], self.device)
        self._sums, self._steps = [0.0, 0.0], 0
        return self.world.all_gather(mine).view(-1, 3)

    def report(self, step: int, table: torch.Tensor) -> None:
        """Write down what `add` found at `step`, read to the host by now, and warn of a rank that the others wait for."""
        if self.file is None:
            return
        busy, data_wait, mem = table.T.tolist()
        row: dict[str, Any] = {"step": step, "busy_s": busy, "data_wait_s": data_wait, "mem_gib": mem}
        on_cuda = self.device.type == "cuda"
        # There the host runs ahead of the device and waits for nobody, so its time says nothing of being busy.
        self.file.write(row | {"busy_s": None} if on_cuda else row)
        if on_cuda:
            return
        busy = row["busy_s"]
        median, slowest = statistics.median(busy), max(busy)
        if slowest <= SLOW * median or slowest - median < LEAST_EXCESS_S:
            self._slow = self._told = None
            return
        rank, before = busy.index(slowest), self._slow
        self._slow = rank
        if rank == before and rank != self._told:  # twice in a row is no accident; and told once, not at every row
            self._told = rank
            log.warning(
                "WARNING: rank %d is slow: busy %.3f s a step, of which %.3f s waiting for data, where the median of the "
                "ranks is %.3f s; the others wait for it (step %d, RUN/ranks.jsonl)",
                rank, slowest, row["data_wait_s"][rank], median, row["step"],
            )  # fmt: skip

    def close(self) -> None:
        """Make everything durable."""
        if self.file is not None:
            self.file.close()
