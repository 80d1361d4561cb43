"""Ranks for parallel tests: gloo processes forked from a server that has torch loaded already (0.1 s, not 4–11 s).

    results = run_ranks(work, 2, argument)  # work(rank, world_size, argument) in each process; a module-level function
    results = run_cases(work, 2, {"a": (1,), "b": (2,)})  # work(rank, world_size, 1), then …2, in the same processes

A rank that raises makes `run_ranks` raise with its traceback; ranks that hang are killed after `timeout_s`."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.checkpoint", "tests.preload"])


class RankError(AssertionError):
    """A rank failed; the text is its traceback."""


def run_ranks(work: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """`[work(rank, world_size, *args) for each rank]`, each in a process of its own with a gloo group set up."""
    with tempfile.TemporaryDirectory() as folder:
        results = _context.Queue()
        store = os.path.join(folder, "store")
        processes = [
            _context.Process(target=_rank_main, args=(work, rank, world_size, store, results, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(results, processes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def run_cases(
    work: Callable[..., Any], world_size: int, cases: Mapping[str, tuple[Any, ...]], *, timeout_s: float = 120
) -> dict[str, list[Any]]:
    """`{name: [work(rank, world_size, *arguments) for each rank]}`, all cases one after another in one set of processes.

    The first that fails ends all, and the error says which it was: the ranks may no longer be in step. `timeout_s` is for
    all of them together."""
    per_rank = run_ranks(_in_turn, world_size, work, dict(cases), timeout_s=timeout_s)
    return {name: [found[name] for found in per_rank] for name in cases}


def _in_turn(rank: int, world_size: int, work: Callable[..., Any], cases: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    found = {}
    for name, arguments in cases.items():
        try:
            found[name] = work(rank, world_size, *arguments)
        except BaseException as error:
            error.add_note(f"in case {name!r}")
            raise
    return found


def _collect(results: Any, processes: list[Any], deadline: float) -> list[Any]:
    gathered: dict[int, Any] = {}
    while len(gathered) < len(processes):
        try:
            rank, error, value = results.get(timeout=0.2)
        except queue.Empty:
            dead = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in gathered]
            if dead:
                raise RankError(f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode}") from None
            if time.monotonic() > deadline:
                missing = sorted(set(range(len(processes))) - set(gathered))
                raise RankError(f"ranks {missing} did not answer in time") from None
            continue
        if error is not None:
            raise RankError(f"rank {rank}:\n{error}")
        gathered[rank] = pickle.loads(value)
    return [gathered[rank] for rank in range(len(processes))]


def _rank_main(work: Callable[..., Any], rank: int, world_size: int, store: str, results: Any, args: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    answered = False
    try:
        if world_size > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
            )
        value = work(rank, world_size, *args)
        results.put((rank, None, pickle.dumps(value)))  # by value: shared tensors would die with the rank
        results.close()
        results.join_thread()
        answered = True
        if world_size > 1:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        if answered:  # the parent has what it wants and ends the others, which this rank may notice in the barrier
            os._exit(0)
        results.put((rank, traceback.format_exc(), None))
        results.close()
        results.join_thread()
        os._exit(1)
