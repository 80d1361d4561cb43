"""`train.memory_check`: the estimate against the memory that is free, before anything is built."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from opencoder.config import Config
from opencoder.errors import ConfigError
from opencoder.parallel.mesh import Mesh

from .estimate import GIB, estimate

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def check_memory(config: Config, mesh: Mesh, device: torch.device) -> None:
    """Compare what the ranks of this machine will hold with what is free. Called by all ranks; the first tells.

    Raises ConfigError on all of them if it is too little and train.memory_check=refuse."""
    if config.train.memory_check == "off":
        return
    ranks = estimate(config, mesh.world.size, cuda=device.type == "cuda").ranks
    need, free = ranks[mesh.pp.rank].peak.total, free_memory(device)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    everywhere = mesh.world.gather_objects((need, free))
    short: list[tuple[int, int, int, int]] = []
    for first in range(0, len(everywhere), local):  # the ranks of a machine follow one another, and share its memory
        together = everywhere[first : first + local]
        available = min((found for _, found in together if found is not None), default=None)
        asked = sum(size for size, _ in together)
        if available is not None and asked > available:
            short.append((asked - available, first, asked, available))
    if not short:
        return
    _, first, asked, available = max(short)
    who = f"rank {first}" if local == 1 else f"ranks {first} to {first + local - 1} of one machine"
    text = (
        f"{who}: the estimated peak is {asked / GIB:.2f} GiB, {available / GIB:.2f} GiB are free; see `train --dry-run`, and lower "
        "train.micro_batch_size, set train.recompute, or split further (parallel.tp, pp, sharded_optimizer)"
    )
    if config.train.memory_check == "refuse":
        error = ConfigError(f"{text}; or set train.memory_check=warn")
        error.told_elsewhere = mesh.world.rank != 0
        raise error
    if mesh.world.rank == 0:
        print(f"warning: {text}", flush=True)


def free_memory(device: torch.device) -> int | None:
    """Bytes that new tensors may take: of the GPU, or of this machine within the limit of its control group. None: unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    if MEMINFO.is_file():
        sizes = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
        found.append(int(sizes["MemAvailable"].split()[0]) * 1024)
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        # files in the page cache count as used, and give way
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        found.append(int(text) - int(used.read_text()) + int(statistics.get("inactive_file", 0)))
    return min(found) if found else None
