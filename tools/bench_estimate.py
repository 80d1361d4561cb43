"""`opencoder bench-estimate`: the memory and traffic that `train --dry-run` foretells beside those of real steps on CPUs.

Every layout runs two updates of the trainer in fresh processes, under torch's profiler, whose events tell the peak of live
tensor bytes; the resident memory is its peak less what was resident before the model. glibc is told to map every tensor from 1 MiB
on by itself: left alone it keeps some of those that are freed, more or less of them from run to run."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opencoder.console import Parser, run
from opencoder.errors import ConfigError, Failure
from opencoder.files import write_json

UPDATES = 2
TENSORS_GOAL, RESIDENT_GOAL = 0.10, 0.20
"""Largest difference of the estimate, as a share of what is measured."""
WIDE = {"hidden_size": 1024, "heads": 8, "kv_heads": 4, "ffn_size": 2816, "vocab_size": 8192, "max_seq_len": 2048}
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


@dataclass(frozen=True)
class Layout:
    """What a row of the table runs."""

    world: int
    layers: int
    micro_batches: int
    """Of each rank, one sample each."""
    parallel: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=lambda: WIDE)
    seq_len: int = 1024


LAYOUTS: dict[str, Layout] = {
    "one process": Layout(1, 3, 2, seq_len=2048),
    "one process, full recompute": Layout(1, 5, 2, train={"recompute": "full"}),
    "one process, bf16": Layout(1, 4, 2, train={"precision": "bf16"}),
    "tp 2, sequence parallel": Layout(2, 8, 2, {"tp": 2, "sequence_parallel": True}),
    "pp 2, 1f1b": Layout(2, 8, 3, {"pp": 2}),
    "pp 2, interleaved": Layout(2, 8, 4, {"pp": 2, "schedule": "interleaved", "virtual_stages": 2}),
    "pp 2, zb": Layout(2, 8, 3, {"pp": 2, "schedule": "zb"}),
    "pp 2, zbv": Layout(2, 8, 3, {"pp": 2, "schedule": "zbv", "virtual_stages": 2}),
    "cp 2, ring": Layout(2, 4, 2, {"cp": 2}, seq_len=2048),
    "cp 2, ulysses": Layout(2, 4, 2, {"cp": 2, "context_attention": "ulysses"}, seq_len=2048),
    "dp 2, sharded": Layout(2, 7, 2, {"sharded_optimizer": True}, seq_len=512),
    "tp 2, pp 2, attention recomputed": Layout(4, 20, 2, {"tp": 2, "pp": 2}, {"recompute": "attention"}, seq_len=512),
}


def tree_of(layout: Layout, folder: Path) -> dict[str, Any]:
    """The configuration of a run at `layout` in `folder`, with the dataset `folder`/data."""
    split = {axis: layout.parallel.get(axis, 1) for axis in ("tp", "pp", "cp")}
    dp = layout.world // (split["tp"] * split["pp"] * split["cp"])
    return {
        "run_dir": str(folder / "run"),
        "model": {**layout.model, "layers": layout.layers},
        "parallel": layout.parallel,
        "data": {"blend": [{"prefix": str(folder / "data")}], "seq_len": layout.seq_len, "cache_dir": str(folder / "cache")},
        "train": {
            "steps": UPDATES, "global_batch_size": dp * layout.micro_batches, "micro_batch_size": 1, "device": "cpu",
            **layout.train,
        },
        "optim": {"schedule": "constant"},
        "log": {"tensorboard": False},
    }  # fmt: skip


def write_dataset(prefix: Path, tokens: int, vocabulary: int) -> None:
    """Random tokens, enough for the steps of a layout."""
    import numpy as np

    from opencoder.data.indexed import IndexedWriter

    draw = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(8):
            writer.add_document(draw.integers(0, vocabulary, tokens // 8 + 2).astype(np.uint16))


def take_steps(config: Any, mesh: Any, device: Any) -> dict[str, int]:
    """Two updates of a trainer; the bytes that this rank handed over in the second, by group and collective."""
    from opencoder.train.loop import Trainer

    trainer = Trainer(config, mesh, device)
    batches = trainer.data.batches(0)
    for update in range(UPDATES):
        trainer.mesh.records.step = update
        _, micro_batches = next(batches)
        trainer.train_step.update(micro_batches, lr=1e-4)
    trainer.optimizer.wait_weights()
    found: dict[str, int] = {}
    for record in mesh.records.recent():
        if record.step == UPDATES - 1:
            key = f"{record.group} {record.operation}"
            found[key] = found.get(key, 0) + record.bytes
    return found


class TensorPeak:
    """The most bytes of CPU tensors alive at a time while the block runs, less those of its begin, once it has ended: `bytes`.

    From the events of torch's profiler, each of which carries what the process has allocated by then. Only the threads that do the
    block's work leave events, but with torch's own flag for it the count follows what every thread frees: gloo's threads often hold
    the last reference to what was sent, and a sum of the events misses that."""

    bytes = 0

    def __enter__(self) -> TensorPeak:
        import torch

        library = Path(torch.__file__).parent / "lib" / "libc10.so"
        try:
            self._counts = ctypes.c_bool.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_report_cpu_memory_usage")
        except (OSError, ValueError) as error:
            raise Failure(f"torch {torch.__version__} is none that bench-estimate knows: {error}") from None
        self._before, self._counts.value = self._counts.value, True
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        from torch._C._profiler import _EventType

        self._profiler.__exit__(*error)
        self._counts.value = self._before
        if error[0] is not None:
            return
        profiler: Any = self._profiler.profiler
        left = list(profiler.kineto_results.experimental_event_tree())
        found = []
        while left:
            event = left.pop()
            left += event.children
            if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
                found.append((event.start_time_ns, event.extra_fields.total_allocated, event.extra_fields.alloc_size))
        if not found:
            raise Failure("torch.profiler has recorded no memory events: this torch is none that bench-estimate knows")
        _, total, size = min(found)
        begin = total - size
        self.bytes = max(begin, *(total for _, total, _ in found)) - begin


class Resident:
    """The largest resident memory of this process while the block runs, less that at its begin."""

    def __enter__(self) -> Resident:
        self.start = self.most = _resident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(0.002):
            self.most = max(self.most, _resident())

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def be_rank(settings: str) -> int:
    """(internal) One rank of a layout: prints its measurement as JSON."""
    import torch

    from opencoder.config import Config
    from opencoder.train import loop  # noqa: F401  its imports are not the model's memory
    from opencoder.train.environment import environment

    config = Config.model_validate(json.loads(Path(settings).read_text()))
    with environment(config) as (mesh, device):
        some = torch.ones(512, 512, requires_grad=True)
        some.mm(some).sum().backward()  # nor are the buffers of the libraries
        with TensorPeak() as tensors, Resident() as resident:
            sent = take_steps(config, mesh, device)
    print(json.dumps({"tensors": tensors.bytes, "resident": resident.most - resident.start, "sent": sent}))
    return 0


def run_ranks(settings: Path, world: int) -> list[dict[str, Any]]:
    """What each rank of a layout measured, in fresh processes. Raises Failure if one ends badly."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "opencoder.tools.bench_estimate", "--rank", str(settings)]
    variables = {
        **os.environ,
        **ALLOCATOR,
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
    }
    ranks = [
        subprocess.Popen(
            argv,
            env={**variables, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        answers = [rank.communicate() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for number, (rank, (out, error)) in enumerate(zip(ranks, answers, strict=True)):
        if rank.returncode or not out:
            raise Failure(f"rank {number} of {settings} ended with status {rank.returncode}: {error.strip()[-2000:]}")
    return [json.loads(out.splitlines()[-1]) for out, _ in answers]


def measure(layout: Layout) -> dict[str, Any]:
    """One row: estimated and measured peaks, of the rank with the highest."""
    from opencoder.config import Config, validate
    from opencoder.train.estimate import estimate

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree = tree_of(layout, folder)
        config = Config.model_validate(tree)
        validate(config, layout.world)
        samples = config.train.global_batch_size * (UPDATES + 1)
        write_dataset(folder / "data", samples * layout.seq_len, config.model.vocab_size)
        settings = folder / "settings.json"
        settings.write_text(json.dumps(tree))
        start = time.perf_counter()
        ranks = run_ranks(settings, layout.world)
        seconds = time.perf_counter() - start
    return {
        "estimate": estimate(config, layout.world).peak,
        "tensors": max(rank["tensors"] for rank in ranks),
        "resident": max(rank["resident"] for rank in ranks),
        "ranks": ranks,
        "seconds": seconds,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as text (a Markdown table)."""
    lines = [
        "| layout | estimate GiB | live tensors GiB | estimate / tensors | resident GiB | estimate / resident |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        gib = {key: row[key] / 2**30 for key in ("estimate", "tensors", "resident")}
        lines.append(
            f"| {name} | {gib['estimate']:.2f} | {gib['tensors']:.2f} | {row['estimate'] / row['tensors']:.2f} | "
            f"{gib['resident']:.2f} | {row['estimate'] / row['resident']:.2f} |"
        )
    return "\n".join(lines)


def within_goals(row: dict[str, Any]) -> bool:
    """Both differences are within their bounds."""
    return (
        abs(row["estimate"] / row["tensors"] - 1) <= TENSORS_GOAL
        and abs(row["estimate"] / row["resident"] - 1) <= RESIDENT_GOAL
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the layouts and print the table; 1 if a row misses a bound."""
    parser = Parser("bench-estimate", "The estimate of `train --dry-run` beside the memory of real steps, on CPUs.")
    parser.add_argument("--only", nargs="*", metavar="LAYOUT", help=f"some of: {'; '.join(LAYOUTS)}")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--rank", metavar="FILE", help="(internal) be one rank of a layout")
    args = parser.parse_args(argv)
    if args.rank:
        return be_rank(args.rank)
    names = args.only or list(LAYOUTS)
    if unknown := [name for name in names if name not in LAYOUTS]:
        raise ConfigError(f"--only {unknown[0]!r} is no layout: choose from {'; '.join(LAYOUTS)}")
    rows = {}
    for name in names:
        rows[name] = measure(LAYOUTS[name])
        print(table({name: rows[name]}).splitlines()[-1], f"{rows[name]['seconds']:.0f} s", flush=True)
    print(table(rows))
    missed = [name for name, row in rows.items() if not within_goals(row)]
    print(
        f"bounds: live tensors within {TENSORS_GOAL:.0%}, resident within {RESIDENT_GOAL:.0%}: "
        + (f"missed by {'; '.join(missed)}" if missed else "met by all")
    )
    if args.json:
        write_json(args.json, rows)
    return 1 if missed else 0


if __name__ == "__main__":
    run(main)
