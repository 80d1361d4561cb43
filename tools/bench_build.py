"""`opencoder bench-corpus --only build`: the whole of `build-corpus` on real code, and what it would take for 10^9 files.

Each build is a process of its own. Constants are measured, the sizes beyond what was built are computed from them: the work on
shards grows with bytes, the tasks `exact` and `groups` and the driver with files. Their slopes come from records made up for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opencoder.config import load_corpus_config
from opencoder.console import ProgressBar
from opencoder.corpus.engine import memory
from opencoder.corpus.read import SCHEMA
from opencoder.corpus.stages import duplicates
from opencoder.corpus.verdict import evaluate

CENTRAL = ("exact", "licences", "groups", "sample")
"""Stages of one task, whose time is that of one core whatever the number of workers."""
RECORDS = (100_000, 500_000)
SHARD = 4000
CEILING_FILES = 1000
STUCK_S = 300
"""A process that another waits for longer than this has failed."""
NEAR_SHARE = 0.1
"""Near-duplicates among the made-up records."""


def measure(inputs: Sequence[str], workers: Sequence[int], folder: str | None = None) -> dict[str, Any]:
    """Build with each number of workers, with the last once more unchanged and once verified. `folder` is emptied and used."""
    own = tempfile.mkdtemp(dir=folder)
    found: dict[str, Any] = {"workers": {}}
    try:
        with ProgressBar("bench", total=len(workers) + 5, unit="builds") as bar:
            found["ceiling"] = ceiling(max(workers))
            bar.advance()
            for count in workers:
                output = Path(own) / f"workers-{count}"
                found["workers"][str(count)] = _build(inputs, output, count)
                bar.advance()
            for name, more in (("unchanged", []), ("verified", ["--verify"])):
                found[name] = _build(inputs, output, workers[-1], *more)["seconds"]
                bar.advance()
            little = Path(own) / "little.py"
            little.write_text("x = 1\n")
            found["least"] = _build([str(little)], Path(own) / "least", workers[-1])
            bar.advance()
            found["disk"] = {"work": _size(output / "work"), "output": _size(output) - _size(output / "work")}
            found["central"] = central()
            bar.advance()
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return found


def _build(inputs: Sequence[str], output: Path, workers: int, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "opencoder.tools.build_corpus", "--input", *inputs, "--output", str(output)]
    start = time.perf_counter()
    subprocess.run([*command, "--workers", str(workers), "--keep-work", *more], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return {
        "seconds": seconds,
        "files": report["counts"]["in"],
        "bytes": report["bytes"]["in"],
        "kept": report["counts"]["kept"],
        "timings": report["timings"],
    }


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


# ---- what the machine allows ----


def ceiling(workers: int) -> float:
    """How much more of the same work `workers` processes do at a time than one alone, when they share nothing: signals and
    verdicts of the standard library. Cores that share a cache, memory or a clock budget do not reach `workers`."""
    alone = max(_signals_alike(1))
    return workers * alone / max(_signals_alike(workers)) if workers > 1 else 1.0


def _signals_alike(processes: int) -> list[float]:
    """Seconds that each of so many processes takes, all starting together."""
    context = get_context("spawn")
    start, seconds = context.Barrier(processes), context.SimpleQueue()
    running = [context.Process(target=_signals, args=(start, seconds)) for _ in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    if any(process.exitcode for process in running):
        raise RuntimeError("a process of the benchmark failed; its message stands above")
    return [seconds.get() for _ in running]


def _signals(start: Any, seconds: Any) -> None:
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("*/*.py") if "site-packages" not in path.parts)[:CEILING_FILES]
    texts = [(path.name, path.read_text(encoding="utf-8", errors="replace")) for path in files]
    for timed in (False, True):
        if timed:
            start.wait(timeout=STUCK_S)
        began = time.perf_counter()
        for name, text in texts if timed else texts[:20]:
            evaluate(text, path=name, size_bytes=len(text), language="python", doc_type="code", identity=None)
    seconds.put(time.perf_counter() - began)


# ---- what grows with the number of files ----


def central() -> dict[str, dict[str, float]]:
    """Seconds and peak bytes per record of the tasks that hold all records, from the difference of two sizes."""
    found: dict[str, dict[str, float]] = {}
    for task in ("exact", "groups"):
        small, large = (_in_process(task, n) for n in RECORDS)
        found[task] = {
            name: max(0.0, large[name] - small[name]) / (RECORDS[1] - RECORDS[0]) for name in ("seconds", "bytes")
        }
    return found


def _in_process(task: str, records: int) -> dict[str, float]:
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        metas = _metas(Path(folder), records)
        with context.Pool(1) as pool:
            return pool.apply(_central_task, (task, metas, folder))


def _metas(folder: Path, records: int) -> list[Path]:
    """Records without text, as `read` writes them: a tenth are copies of the one before."""
    schema = SCHEMA.remove(SCHEMA.get_field_index("text"))
    paths = []
    for shard, start in enumerate(range(0, records, SHARD)):
        numbers = [n - (n % 10 == 9) for n in range(start, min(start + SHARD, records))]
        count = len(numbers)
        columns: dict[str, Any] = {name: pa.nulls(count, schema.field(name).type) for name in schema.names}
        columns |= {
            "id": [f"{n * 2654435761 % 2**64:064x}" for n in numbers],
            "path": [f"owner-{n // 500}/project/src/module_{n // 20:08d}/file_{n:010d}.py" for n in numbers],
            "source": ["code"] * count,
            "status": ["kept"] * count,
            "size_bytes": [5000] * count,
        }
        paths.append(folder / f"{shard:06d}.meta.parquet")
        pq.write_table(pa.table(columns, schema=schema), paths[-1], compression="zstd")
    return paths


def _central_task(task: str, metas: list[Path], folder: str) -> dict[str, float]:
    config = load_corpus_config(None, []).model_dump(mode="json")
    shards = len(metas)
    copies, numbers = ([Path(folder) / f"{n:06d}.{kind}" for n in range(shards)] for kind in ("parquet", "npy"))
    memory.reset_peak()
    before, start = memory.peak_rss(), time.perf_counter()
    duplicates.exact(metas, [*copies, *numbers], shards=shards, known_parts=[], config=config)
    if task == "groups":
        rows = sum(int((np.load(path) >= 0).sum()) for path in numbers)
        members = np.arange(1, rows, round(1 / NEAR_SHARE), dtype=np.int64)
        forest = Path(folder) / "forest.npy"
        np.save(forest, np.stack([members - 1, members], 1))
        memory.reset_peak()
        before, start = memory.peak_rss(), time.perf_counter()
        near = [Path(folder) / f"{n:06d}.near" for n in range(shards)]
        duplicates.groups([forest, *numbers, *metas], near, shards=shards)
    return {"seconds": time.perf_counter() - start, "bytes": float(memory.peak_rss() - before)}


# ---- the table ----


def table(found: dict[str, Any], files: int = 10**9) -> str:
    """The measured rows, and the projection to `files` of the same mean size."""
    runs = {int(n): run for n, run in found["workers"].items()}
    first, last = runs[min(runs)], runs[max(runs)]
    lines = [f"build-corpus: {first['files']:,} files, {first['bytes'] / 1e6:,.1f} MB, {first['kept']:,} kept"]
    for n, run in sorted(runs.items()):
        rate, peak = run["bytes"] / run["seconds"] / 1e6, run["timings"]["peak_worker_bytes"] / 1e6
        driver = run["timings"]["peak_driver_bytes"] / 1e6
        lines.append(
            f"  {n} workers  {run['seconds']:>7.1f} s  {rate:>6.2f} MB/s  {first['seconds'] / run['seconds']:.2f}×   "
            f"peak of a worker {peak:,.0f} MB, of the driver {driver:,.0f} MB"
        )
    if max(runs) > 1:
        lines.append(
            f"  {max(runs)} processes that share nothing do {found['ceiling']:.2f}× the work of one on this machine"
        )
    for name in ("unchanged", "verified"):
        lines.append(f"  {name:<10}{found[name]:>7.1f} s  {found[name] / last['seconds']:.3f} of the first")
    stages = {k: v for k, v in last["timings"].items() if k not in _NOT_STAGES}
    lines.append("  seconds of work: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items()))
    return "\n".join([*lines, *projection(found, files)])


_NOT_STAGES = ("tasks", "cpu", "peak_worker_bytes", "peak_driver_bytes", "total")


def projection(found: dict[str, Any], files: int) -> list[str]:
    """What `files` files of the same mean size would take, computed from the measured constants."""
    last = found["workers"][max(found["workers"], key=int)]
    scale = files / last["files"]
    stages = {k: v for k, v in last["timings"].items() if k not in (*_NOT_STAGES, *CENTRAL)}
    hours = scale * sum(stages.values()) / 3600
    driver = {
        name: (_driver(last)[name] - _driver(found["least"])[name]) / last["files"] for name in ("seconds", "bytes")
    }
    lines = [
        f"computed for {files:,} files of {last['bytes'] / last['files']:,.0f} bytes ({scale * last['bytes'] / 1e12:.1f} TB):"
    ]
    lines.append(f"  work on shards {hours:,.0f} core-hours; on 1,024 cores {hours / 1024:.1f} hours")
    for task, slope in found["central"].items():
        lines.append(
            f"  task {task}: {slope['seconds'] * files / 3600:,.1f} hours on one core, "
            f"{slope['bytes'] * files / 1e9:,.0f} GB of memory ({slope['bytes']:,.0f} bytes a file)"
        )
    lines.append(
        f"  driver: {driver['seconds'] * files / 3600:,.1f} hours, {driver['bytes'] * files / 1e9:,.0f} GB of memory "
        f"({driver['bytes']:,.0f} bytes a file)"
    )
    lines.append(
        f"  disk: {scale * found['disk']['work'] / 1e12:,.1f} TB while it works, "
        f"{scale * found['disk']['output'] / 1e12:,.1f} TB of output"
    )
    return lines


def _driver(run: dict[str, Any]) -> dict[str, float]:
    """What the driver does beside waiting for tasks."""
    times = run["timings"]
    return {"seconds": times["total"] - times["tasks"], "bytes": times["peak_driver_bytes"]}
