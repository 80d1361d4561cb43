"""Several gloo processes of this machine for one measurement: each gets the settings and prints its numbers as JSON."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opencoder.errors import Failure

TIMEOUT_S = 1800


def run_ranks(work: str, settings: dict[str, Any], world: int, *, timeout_s: float = TIMEOUT_S) -> list[dict[str, Any]]:
    """What each rank printed that did `work` (a name that bench_classification knows), one thread each. Raises Failure if a
    rank ends badly, or if they take longer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.json"
        file.write_text(json.dumps(settings))
        argv = [sys.executable, "-m", "opencoder.tools.bench_classification", "--rank", work, str(file)]
        files = [(Path(folder) / f"{r}.out", Path(folder) / f"{r}.err") for r in range(world)]
        ranks = [
            subprocess.Popen(
                argv, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=out.open("w"), stderr=log.open("w")
            )
            for r, (out, log) in enumerate(files)
        ]
        try:
            codes = [rank.wait(timeout_s) for rank in ranks]
        except subprocess.TimeoutExpired as error:
            raise Failure(f"{work} on {world} ranks took longer than {timeout_s:.0f} s") from error
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        for number, (code, (out, log)) in enumerate(zip(codes, files, strict=True)):
            if code or not out.stat().st_size:
                raise Failure(f"rank {number} of {work} ended with status {code}: {log.read_text().strip()[-2000:]}")
        return [json.loads(out.read_text().splitlines()[-1]) for out, _ in files]


def be_rank(work: Callable[[Any, dict[str, Any]], dict[str, Any]], settings: str) -> int:
    """(in the process of a rank) Do `work(mesh, settings)` and print what it returns."""
    with mesh() as made:
        print(json.dumps(work(made, json.loads(Path(settings).read_text()))))
    return 0


@contextmanager
def mesh() -> Iterator[Any]:
    """The mesh of this process's job, data parallel alone; one thread."""
    import torch

    from opencoder.parallel.group import processes
    from opencoder.parallel.mesh import create_mesh

    torch.set_num_threads(1)
    with processes("cpu", size=int(os.environ.get("WORLD_SIZE", "1")), timeout_s=TIMEOUT_S):
        yield create_mesh()
