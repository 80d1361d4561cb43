"""Saving while training goes on: a thread copies the state in host memory, then writes it. Weights and optimizer state change
in the update alone, so the next one is all that has to wait for the copy; forward and backward passes run beside it.

The ranks' threads talk over a gloo group of their own: collectives of two threads over one group would interleave. One save
is under way at a time; the next one, SIGTERM and the end of the run wait for it. A kill at any moment leaves a hidden
temporary folder, which the next start removes, and the older checkpoints."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opencoder.config import CheckpointConfig, Config
from opencoder.parallel.group import Group, Records
from opencoder.parallel.mesh import Mesh

from . import native
from .parts import Part, Tensors
from .replicas import check_replicas

ABANDON_S = 60
"""How long a run that ends with an error waits for a save under way, which may itself wait for a rank that is gone."""


class Saver:
    """The checkpoints of one run. Every rank calls the same methods in the same order."""

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        mesh: Mesh,
        *,
        timeout_s: float,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`say` is told when a save is done; from a thread of its own if `config.async_save`."""
        self.run_dir, self.config, self.mesh, self.say = run_dir, config, mesh, say
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._buffers: dict[str, torch.Tensor] = {}
        self._staged = threading.Event()
        self._staged.set()
        if config.async_save:
            self.mesh = replace(mesh, world=_own_group(mesh.world, timeout_s))

    def save(
        self, step: int, tensors: Tensors, *, config: Config, state: dict[str, Any], tokenizer: Path | None = None
    ) -> float:
        """Save `tensors` as the checkpoint of `step`; returns the seconds that training had to wait. Raises Failure, also
        for the save before, if it was in the background. Then the tensors may not change before `wait_staged`."""
        start = time.perf_counter()
        self.wait()
        if not self.config.async_save:
            self._write(step, tensors, config, state, tokenizer)
            return time.perf_counter() - start
        arguments = (step, tensors, config, copy.deepcopy(state), tokenizer)
        self._staged.clear()
        # A daemon: a run that ends with an error must not wait for ranks that are gone.
        self._thread = threading.Thread(target=self._in_background, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        return time.perf_counter() - start

    def wait_staged(self) -> float:
        """Until the tensors of a save under way may change; returns the seconds that took."""
        start = time.perf_counter()
        self._staged.wait()
        return time.perf_counter() - start

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save under way has failed; the ranks learn it at different steps, so they must
        agree before they `wait`."""
        return self._error is not None

    def wait(self) -> None:
        """Until nothing is under way. Raises what the save raised, on all ranks alike."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def abandon(self) -> None:
        """The run ends with an error of its own: give a save under way a while, and say how it ended."""
        if self._thread is None:
            return
        self._thread.join(ABANDON_S)
        if self._thread.is_alive():
            self.say(f"a checkpoint was still being written after {ABANDON_S} s and is given up")
        elif self._error is not None:
            self.say(f"the checkpoint under way failed too: {self._error}")

    def _in_background(self, step: int, tensors: Tensors, *arguments: Any) -> None:
        try:
            try:
                staged = self._stage(tensors)
            finally:
                self._staged.set()
            self._write(step, staged, *arguments)
        except BaseException as error:  # handed over to the training thread by `wait`
            self._error = error

    def _write(
        self, step: int, tensors: Tensors, config: Config, state: dict[str, Any], tokenizer: Path | None
    ) -> None:
        start = time.perf_counter()
        if self.config.check_replicas:
            check_replicas(tensors, self.mesh)
        folder = native.save(
            self.run_dir,
            step,
            tensors,
            self.mesh,
            config=config,
            state=state,
            tokenizer=tokenizer,
            keep=self.config.keep,
            keep_every=self.config.keep_every,
        )
        self.say(f"saved {folder} in {time.perf_counter() - start:.1f} s")

    def _stage(self, tensors: Tensors) -> dict[str, Part]:
        """Copies in host memory, in buffers that are kept from save to save (pinned for a GPU)."""
        staged: dict[str, Part] = {}
        for key, (local, *where) in tensors.items():
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self._buffers[key] = buffer
            buffer.copy_(local.detach(), non_blocking=local.is_cuda)
            staged[key] = (buffer, *where)
        if any(local.is_cuda for local, *_ in tensors.values()):
            torch.cuda.synchronize()
        return staged


def _own_group(world: Group, timeout_s: float) -> Group:
    """All ranks once more, over gloo, with records of its own: those of the mesh belong to the training thread."""
    if world.size == 1:
        return world
    made = dist.new_group(list(world.ranks), timeout=timedelta(seconds=timeout_s), backend="gloo")
    return Group(world.size, world.rank, made, "checkpoint", world.ranks, Records())
