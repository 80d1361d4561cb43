"""`opencoder bench-checkpoint`: saving and loading beside the disk's own rate, and what a background save makes training wait.

The disk's rate is measured in the same rounds, interleaved: one file of the same size, written front to back and synced beside
the one before, which it then replaces, as a checkpoint does; then dropped from the page cache and read. (Written over itself it
would be given the pages that it has just freed; in a virtual machine, where others may cost ten times as much, that is another
thing.) What is best of the rounds counts. Checksums and fsync are included.

Training is matrix products on all threads for about two seconds, after which the update waits for what is still being copied.
Its wait is what the loop's `save_wait_s` adds up; what the products lose to the copying thread is told beside it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from opencoder.checkpoint import folders, native
from opencoder.checkpoint.parts import Tensors
from opencoder.checkpoint.saver import Saver
from opencoder.config import CheckpointConfig, Config
from opencoder.console import Parser, run
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.placement import replicated

STATE = {"tokens": 0, "consumed_samples": 0, "stages": [], "skipped_batches": []}
BLOCK = 8 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table."""
    parser = Parser("bench-checkpoint", "Saving and loading checkpoints beside the disk's sequential rate.")
    parser.add_argument("--folder", default="/tmp/bench-checkpoint", help="on the disk to measure; made and removed")
    parser.add_argument("--mib", type=int, default=1024, help="size of the state")
    parser.add_argument("--tensor-mib", type=int, default=16, help="size of one tensor")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    folder = Path(args.folder)
    folder.mkdir(parents=True)
    try:
        best = measure(folder, args.mib, args.tensor_mib, args.rounds)
    finally:
        shutil.rmtree(folder)
    print(table(best, args.mib))
    return 0


def measure(folder: Path, mib: int, tensor_mib: int, rounds: int) -> dict[str, float]:
    """Side → best seconds of `rounds`, each of which runs every side once."""
    rows = tensor_mib * 256  # of 1024 fp32 numbers: 4 KiB
    tensors: Tensors = {f"t{i}": (torch.randn(rows, 1024), replicated((rows, 1024))) for i in range(mib // tensor_mib)}
    model = {"layers": 1, "hidden_size": 8, "heads": 1, "ffn_size": 8, "vocab_size": 8}
    config = Config.model_validate({"run_dir": str(folder), "model": model})
    train = _training()
    savers = {name: Saver(folder / name, _settings(name), Mesh(), timeout_s=600) for name in ("save", "wait")}
    block = torch.randn(BLOCK // 4).numpy().data.cast("B")
    sides: dict[str, Callable[[], float]] = {
        "disk write": lambda: _timed(lambda: _write(folder / "plain", block, mib)),
        "disk read": lambda: _timed(lambda: _read(folder / "plain")),
        "save": lambda: savers["save"].save(1, tensors, config=config, state=STATE),
        "load": lambda: _load(folders.resolve(folder / "save"), tensors),
        "training": lambda: _timed(train),
        "wait": lambda: _trained_meanwhile(savers["wait"], tensors, config, train, meanwhile),
    }
    meanwhile: list[float] = []
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, side in sides.items():
            if name == "disk read":
                _forget(folder / "plain")
            seconds = side()
            best[name] = min(best.get(name, seconds), seconds)
            savers["wait"].wait()
    return best | {"meanwhile": min(meanwhile)}


def table(best: dict[str, float], mib: int) -> str:
    """What was measured, as Markdown."""
    rate = {name: mib / 1024 / seconds for name, seconds in best.items()}
    return "\n".join(
        [
            f"| {mib} MiB of fp32 state, one process | seconds | GiB/s | limit | share |",
            "|---|---|---|---|---|",
            f"| save | {best['save']:.2f} | {rate['save']:.2f} | write and fsync {rate['disk write']:.2f} GiB/s | "
            f"{rate['save'] / rate['disk write']:.0%} |",
            f"| load, nothing cached | {best['load']:.2f} | {rate['load']:.2f} | read {rate['disk read']:.2f} GiB/s | "
            f"{rate['load'] / rate['disk read']:.0%} |",
            f"| wait for a background save | {best['wait']:.3f} | | save {best['save']:.2f} s | "
            f"{best['wait'] / best['save']:.1%} |",
            f"| training beside its copy | {best['meanwhile']:.2f} | | alone {best['training']:.2f} s | "
            f"{best['meanwhile'] - best['training']:.2f} s | "
            f"{(best['meanwhile'] - best['training']) / best['save']:.1%} of a save |",
        ]
    )


def _settings(name: str) -> CheckpointConfig:
    return CheckpointConfig(async_save=name == "wait", keep=1)


def _training() -> Callable[[], None]:
    """About two seconds of matrix products."""
    a = torch.randn(2048, 2048)

    def products(times: int) -> None:
        for _ in range(times):
            torch.mm(a, a)

    products(1)
    once = _timed(lambda: products(4)) / 4
    return lambda: products(max(1, round(2 / once)))


def _trained_meanwhile(
    saver: Saver, tensors: Tensors, config: Config, train: Callable[[], None], meanwhile: list[float]
) -> float:
    """What training waits for a background save until its next update; `meanwhile` gets what the work took beside it."""
    waited = saver.save(1, tensors, config=config, state=STATE)
    meanwhile.append(_timed(train))
    return waited + saver.wait_staged()


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _write(path: Path, block: memoryview, mib: int) -> None:
    beside = path.with_suffix(".new")
    with open(beside, "wb", buffering=0) as file:
        for _ in range((mib << 20) // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    os.replace(beside, path)


def _read(path: Path) -> None:
    buffer = bytearray(BLOCK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _load(folder: Path, tensors: Tensors) -> float:
    for path in folder.rglob("*"):
        if path.is_file():
            _forget(path)
    return _timed(lambda: native.load_tensors(folder, tensors, Mesh()))


if __name__ == "__main__":
    run(main)
