"""Processes, devices and threads: what must be settled before a tensor exists."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from opencoder.config import Config, TrainConfig
from opencoder.errors import ConfigError
from opencoder.parallel.group import processes
from opencoder.parallel.mesh import Mesh, create_mesh, kv_replicas_of

from .watchdog import watched

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
START_UP_S = 600
"""Processes may come this far apart."""


def world_size() -> int:
    """Processes of the job, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def restarts_left() -> int:
    """How often torchrun's agent would start this process again if it failed; 0 without torchrun."""
    env = os.environ
    return int(env.get("TORCHELASTIC_MAX_RESTARTS", "0")) - int(env.get("TORCHELASTIC_RESTART_COUNT", "0"))


def pick_device(config: TrainConfig) -> torch.device:
    """The device of this process."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but torch sees no CUDA device: set train.device=cpu or auto")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own: {torch.cuda.device_count()} are visible; start as many "
            "processes per node as there are GPUs"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextmanager
def environment(config: Config) -> Iterator[tuple[Mesh, torch.device]]:
    """Process group, mesh, device, threads and seeds of this process; the process group is closed at the end. Meanwhile a
    watchdog looks for ranks that hang or are gone."""
    device = pick_device(config.train)
    _set_threads(config.train, device)
    set_determinism(config.train)
    # torch's own time-out says little of who is late, and ends no rank but those that wait: the watchdog comes before it.
    timeout_s = max(START_UP_S, 2 * config.train.timeout_s)
    with processes(device.type, size=world_size(), timeout_s=timeout_s):
        p = config.parallel
        replicas = kv_replicas_of(config.model.kv_heads, p.tp)
        mesh = create_mesh(
            tp=p.tp, pp=p.pp, cp=p.cp, kv_replicas=replicas, device_type=device.type, timeout_s=timeout_s
        )
        with watched(
            mesh,
            timeout_s=config.train.timeout_s,
            run_dir=Path(config.run_dir),
            on_cuda=device.type == "cuda",
        ):
            yield mesh, device


def _set_threads(config: TrainConfig, device: torch.device) -> None:
    """On a CPU the processes of one machine share its cores; torchrun would give each a single thread."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def set_determinism(config: TrainConfig) -> None:
    """Seeds, and what `train.deterministic` asks for. Comes before CUDA starts, which reads the cuBLAS setting once."""
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)  # noqa: NPY002  libraries that use the global state must not differ between runs
    torch.manual_seed(config.seed)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
