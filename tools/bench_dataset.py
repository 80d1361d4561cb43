"""`opencoder bench-dataset`: random reads beside megatron-core, the index of a large dataset, start-up with many datasets.

Reads: both sides read the same files, alternating, best of the rounds; what they read is compared. The large dataset has
real lengths and a .bin of the right size without content: building an index reads lengths only."""

from __future__ import annotations

import importlib
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from opencoder.console import Parser, run
from opencoder.errors import Failure
from opencoder.files import write_json

SEQ_LEN = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = Parser("bench-dataset", "Random reads beside megatron-core, building and caching indices.")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each; the best counts")
    parser.add_argument("--reads", type=int, default=50_000, help="random reads of one measurement")
    parser.add_argument("--documents", type=int, default=1_000_000, help="documents of the large dataset")
    parser.add_argument("--tokens", type=int, default=1_000_000_000, help="tokens of the large dataset, about")
    parser.add_argument("--prefixes", type=int, default=256, help="datasets of the blend")
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        numbers: dict[str, Any] = {"reads": bench_reads(folder, args.reads, args.rounds)}
        numbers["index"] = bench_index(folder, args.documents, args.tokens, args.rounds)
        numbers["blend"] = bench_blend(folder, args.prefixes, args.rounds)
    if args.json:
        write_json(args.json, numbers)
    return 0


PART = 64
"""Tokens of a read inside a document."""


def bench_reads(folder: Path, reads: int, rounds: int) -> dict[str, float]:
    """Microseconds per random read of a whole document and of a part of one, ours and megatron-core's."""
    from opencoder.data.indexed import IndexedDataset, IndexedWriter

    draw = np.random.default_rng(0)
    lengths = draw.integers(200, 4000, 5000)
    with IndexedWriter(folder / "reads", np.int32) as writer:
        for length in lengths.tolist():
            writer.add_document(draw.integers(0, 96_000, length))
    ours, peer = IndexedDataset(folder / "reads"), megatron_dataset()
    sides: dict[str, Any] = {"ours": ours}
    if peer is not None:
        sides["megatron-core"] = peer(str(folder / "reads"))
    documents, offsets = draw.integers(0, len(lengths), reads).tolist(), draw.integers(0, 100, reads).tolist()
    for i, offset in zip(documents[:1000], offsets, strict=False):
        for side in sides.values():
            if not np.array_equal(side[i], ours[i]) or not np.array_equal(
                side.get(i, offset, PART), ours[i][offset:][:PART]
            ):
                raise Failure(f"document {i} is read differently by the two sides")
    found: dict[str, float] = {}
    for _ in range(rounds):
        for name, data in sides.items():
            for what, work in (
                ("documents", lambda d=data: [d[i] for i in documents]),
                ("parts", lambda d=data: [d.get(i, o, PART) for i, o in zip(documents, offsets, strict=True)]),
            ):
                key = f"{name}, {what}"
                found[key] = min(found.get(key, float("inf")), seconds_of(work) / reads * 1e6)
    for what in ("documents", "parts"):
        line = f"random reads of {what:<10} ours {found[f'ours, {what}']:.2f} µs"
        if peer is not None:
            ratio = found[f"megatron-core, {what}"] / found[f"ours, {what}"]
            line += f"   megatron-core {found[f'megatron-core, {what}']:.2f} µs   {ratio:.2f}×"
        print(line)
    if peer is None:
        print("megatron-core: not installed, not measured (pip install --no-deps megatron-core)")
    return found


def megatron_dataset() -> Any:
    """megatron-core's IndexedDataset, or None if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the absence of Transformer Engine
        try:
            return importlib.import_module("megatron.core.datasets.indexed_dataset").IndexedDataset
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != "megatron":
                raise
            return None


def bench_index(folder: Path, documents: int, tokens: int, rounds: int) -> dict[str, float]:
    """Building the index of one large dataset, in memory: seconds, and peak memory beside the arrays' own size."""
    from opencoder.data.gpt import INDICES, GPTDataset
    from opencoder.data.indexed import IndexedDataset, index_bytes

    draw = np.random.default_rng(0)
    lengths = draw.multinomial(tokens, draw.dirichlet(np.ones(documents))).astype(np.int32)
    with open(folder / "large.bin", "wb") as file:
        file.truncate(2 * int(lengths.sum()))
    parts = index_bytes(np.uint16, lengths, np.arange(documents + 1, dtype=np.int64))
    (folder / "large.idx").write_bytes(b"".join(parts))
    data = IndexedDataset(folder / "large")
    found: dict[str, float] = {}
    for epochs in (1, 3):
        samples = epochs * tokens // SEQ_LEN - epochs

        def build(samples: int = samples) -> GPTDataset:
            return GPTDataset(data, seq_len=SEQ_LEN, num_samples=samples, seed=1)

        seconds = min(seconds_of(build) for _ in range(rounds))
        tracemalloc.start()
        built = build()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        arrays = sum(getattr(built, f"{name}_index").nbytes for name in INDICES)
        found |= {f"seconds, {epochs} epochs": seconds, f"peak / arrays, {epochs} epochs": peak / arrays}
        print(
            f"index of {tokens:,} tokens, {documents:,} documents, {epochs} epoch(s) of {SEQ_LEN}: {seconds:.2f} s, "
            f"peak {peak / 2**20:.1f} MiB = {peak / arrays:.2f} × the arrays"
        )
    return found


def bench_blend(folder: Path, prefixes: int, rounds: int) -> dict[str, float]:
    """Opening a blend of many datasets: the first time, and when its indices are cached."""
    from opencoder.data.cache import IndexCache
    from opencoder.data.indexed import IndexedWriter
    from opencoder.data.lm import build_lm_dataset

    draw = np.random.default_rng(0)
    blend = []
    for n in range(prefixes):
        with IndexedWriter(folder / f"part-{n:03d}", np.uint16) as writer:
            for length in draw.integers(100, 4000, 200).tolist():
                writer.add_document(np.zeros(length, np.uint16))
        blend.append((str(folder / f"part-{n:03d}"), float(draw.integers(1, 10))))
    samples = 2000 * prefixes
    found = {"first": float("inf"), "cached": float("inf")}
    for round_ in range(rounds):
        for what in found:
            cache = IndexCache(folder / f"cache-{round_}")
            build = partial(build_lm_dataset, blend, num_samples=samples, seq_len=512, seed=1, cache=cache)
            found[what] = min(found[what], seconds_of(build))
    print(
        f"blend of {prefixes} datasets, {samples:,} samples: {found['first']:.2f} s the first time, "
        f"{found['cached']:.2f} s from the cache"
    )
    return found


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    run(main)
