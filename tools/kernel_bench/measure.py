"""Timing contenders against each other, and the rates of the machine they are held against."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

Run = Callable[[], object]
BATCH_S = 0.1
"""A measurement repeats a run until it lasts about this long: with a fifth of it the first runs after a change of contender,
whose tensors are not in cache, still weighed a tenth to a third."""


class Times(NamedTuple):
    """Seconds of one run."""

    best: float
    q20: float
    q50: float
    q80: float


def quantiles(seconds: list[float]) -> Times:
    """Of a list of measurements."""
    if len(seconds) == 1:
        return Times(*seconds * 4)
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return Times(min(seconds), cuts[1], cuts[4], cuts[7])


def interleaved(runs: Mapping[str, Run], rounds: int, device: torch.device) -> dict[str, Times]:
    """Times of each, taken in turns: what slows the machine for a while then slows all."""
    if device.type == "cuda":
        return {name: _on_gpu(run) for name, run in runs.items()}
    repeats = {}
    for name, run in runs.items():
        run()  # warm up: memory, threads, compilation
        start = time.perf_counter()
        run()
        repeats[name] = max(1, min(1000, round(BATCH_S / (time.perf_counter() - start))))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {name: quantiles(s) for name, s in seconds.items()}


def _on_gpu(run: Run) -> Times:
    """By events, with the second-level cache emptied before each run."""
    from triton.testing import do_bench

    return quantiles([ms / 1e3 for ms in do_bench(run, warmup=50, rep=200, return_mode="all")])


def copy_rate(device: torch.device, megabytes: int) -> float:
    """Bytes per second of a copy, read and written counted, of a tensor of that size."""
    source = torch.ones(megabytes * 250_000, device=device)
    target = torch.empty_like(source)
    best = interleaved({"copy": lambda: target.copy_(source)}, 5, device)["copy"].best
    return 2 * source.numel() * 4 / best


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large square product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = interleaved({"gemm": lambda: torch.mm(a, b, out=out)}, 5, device)["gemm"].best
    return 2 * n**3 / best


def release() -> None:
    """Gives freed memory back to the system, which glibc keeps with the settings these benchmarks run under."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc's alone
        trim(0)


def peak_extra(run: Run, device: torch.device) -> int:
    """Bytes that a run needs beyond what is there before it. On a CPU of the whole process: in one of its own."""
    if device.type == "cuda":
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    release()  # what the allocator keeps free is resident, and a run that fits in it would count as needing nothing
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size counts from here
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    assert found is not None, name
    return int(found[1]) * 1024
