"""Two sets of labelled crops from real Python code: which function is this from, and what is called here?

    python examples/classification/extract.py --output DIR [--input PATH…] [--classes N]

Without --input: the standard library and the installed packages of this interpreter. Files are read in the order of the hash of
their names, several at a time; functions are taken until there are N, calls from all files. The same files give the same output at
any number of workers. Writes:

    DIR/functions.parquet  file, name, line, text, locals   one row a class, the row's number is the label
    DIR/callees.parquet    name, sites, held_out            the same for callees
    DIR/sites.parquet      label, held_out, before, after   calls, held out by file
    DIR/facts.json         what was read and found"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
from functions import Function, Site, read_file, site_text

from opencoder.console import Parser, ProgressBar, run
from opencoder.errors import DataError
from opencoder.files import atomic_path, write_json

HELD_OUT_OF = 5
"""One file in this many is held out of training."""
BLOCK = 20_000


class Source(NamedTuple):
    """A file to read."""

    path: str
    name: str
    """Relative to its root, with the root's own name in front: the same on every machine."""


class Called(NamedTuple):
    """Calls of a name, counted."""

    train: int
    held_out: int


def default_roots() -> list[Path]:
    """The standard library and the installed packages of this interpreter."""
    paths = sysconfig.get_paths()
    return [Path(p) for p in dict.fromkeys((paths["stdlib"], paths["purelib"], paths["platlib"]))]


def sources(roots: Sequence[Path]) -> list[Source]:
    """Every .py file under the roots once, in the order of the hash of its name. Raises DataError if a root is none."""
    found: dict[str, Source] = {}
    for root in roots:
        if not root.exists():
            raise DataError(f"--input {root} does not exist: give files or folders of Python code")
        names = [root] if root.is_file() else sorted(root.rglob("*.py"))
        for path in names:
            real = os.path.realpath(path)
            relative = path.name if root.is_file() else f"{root.name}/{path.relative_to(root).as_posix()}"
            found.setdefault(real, Source(real, relative))
    if not found:
        raise DataError(f"no .py file under {', '.join(map(str, roots))}: give files or folders of Python code")
    return sorted(found.values(), key=lambda s: hashlib.sha256(s.name.encode()).digest())


def _read(source: Source, functions: bool) -> tuple[list[Function], list[Site]]:
    try:
        return read_file(Path(source.path).read_bytes(), functions=functions)
    except OSError:
        return [], []  # gone, or not ours to read


def _texts(job: tuple[Source, list[Site]]) -> list[tuple[str, str]]:
    data = Path(job[0].path).read_bytes()
    return [site_text(data, site) for site in job[1]]


def is_held_out(source: Source) -> bool:
    """Whether calls of the file are for evaluation alone."""
    return hashlib.sha256(b"held out " + source.name.encode()).digest()[0] % HELD_OUT_OF == 0


class _Table:
    """Rows written in blocks, so that memory stays bounded."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema, self.rows = schema, []
        self.writer = pq.ParquetWriter(path, schema, compression="zstd")

    def add(self, *values: Any) -> None:
        self.rows.append(values)
        if len(self.rows) >= BLOCK:
            self.flush()

    def flush(self) -> None:
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.schema)
        self.writer.write_table(
            pa.table([pa.array(c, f.type) for c, f in zip(columns, self.schema, strict=True)], self.schema)
        )
        self.rows = []

    def close(self) -> None:
        self.flush()
        self.writer.close()


FUNCTIONS = pa.schema(
    [("file", pa.string()), ("name", pa.string()), ("line", pa.int32()), ("text", pa.string()), ("locals", pa.int32())]
)
CALLEES = pa.schema([("name", pa.string()), ("sites", pa.int32()), ("held_out", pa.int32())])
SITES = pa.schema([("label", pa.int32()), ("held_out", pa.bool_()), ("before", pa.string()), ("after", pa.string())])


def extract(
    roots: Sequence[Path], output: Path, *, classes: int, callee_sites: int, workers: int, train_cap: int = 24
) -> dict[str, Any]:
    """Write the tables; what was found. `classes=0`: all functions of all files. Callees: names with at least `callee_sites` calls
    of which some are in files for training and some in files held out; of each at most `train_cap` calls are for training."""
    files = sources(roots)
    output.mkdir(parents=True, exist_ok=True)
    found: dict[bytes, None] = {}
    calls: list[tuple[Source, list[Site]]] = []
    total = repeated = 0

    def more() -> bool:
        return not classes or len(found) < classes

    with ProcessPoolExecutor(workers) as pool:
        with (
            atomic_path(output / "functions.parquet") as path,
            ProgressBar("read", total=len(files), unit="files") as bar,
        ):
            table = _Table(path, FUNCTIONS)
            for source, (functions, sites) in _in_order(pool, files, more):
                calls.append((source, sites))
                for function in functions:
                    if not more():
                        break
                    total += 1
                    if function.key in found:
                        repeated += 1
                    else:
                        found[function.key] = None
                        table.add(source.name, function.name, function.line, function.text, function.locals)
                bar.advance(postfix=f"{len(found)} functions")
            table.close()
        kept = _callees(calls, callee_sites)
        written = _write_sites(pool, output, calls, kept, train_cap)
    return {
        "files": len(files),
        "functions": total,
        "functions of one text": repeated,
        "function classes": len(found),
        "callee classes": len(kept),
        "calls for training": written.train,
        "calls held out": written.held_out,
    }


def _in_order(
    pool: ProcessPoolExecutor, files: Sequence[Source], more: Callable[[], bool]
) -> Iterator[tuple[Source, tuple[list[Function], list[Site]]]]:
    """Results in the order of the files, with functions while there are to be `more`; a block of files is read at a time."""
    for start in range(0, len(files), 512):
        some = files[start : start + 512]
        yield from zip(some, pool.map(_read, some, [more()] * len(some), chunksize=16), strict=True)


def _callees(calls: Sequence[tuple[Source, list[Site]]], least: int) -> dict[str, int]:
    """Names to be classes → label, in the order of their names."""
    counts: dict[str, list[int]] = {}
    for source, sites in calls:
        side = int(is_held_out(source))
        for site in sites:
            counts.setdefault(site.name, [0, 0])[side] += 1
    names = sorted(n for n, (train, held_out) in counts.items() if train + held_out >= least and train and held_out)
    return {name: label for label, name in enumerate(names)}


def _write_sites(
    pool: ProcessPoolExecutor,
    output: Path,
    calls: Sequence[tuple[Source, list[Site]]],
    labels: dict[str, int],
    train_cap: int,
    held_out_cap: int = 2,
) -> Called:
    counts = {name: [0, 0] for name in labels}
    jobs = []
    for source, sites in calls:
        side, cap = (1, held_out_cap) if is_held_out(source) else (0, train_cap)
        chosen = []
        for site in sites:
            if site.name in counts and counts[site.name][side] < cap:
                counts[site.name][side] += 1
                chosen.append(site)
        if chosen:
            jobs.append((source, chosen))
    with atomic_path(output / "sites.parquet") as path:
        table = _Table(path, SITES)
        for start in range(0, len(jobs), 512):
            some = jobs[start : start + 512]
            for (source, sites), texts in zip(some, pool.map(_texts, some, chunksize=16), strict=True):
                for site, (before, after) in zip(sites, texts, strict=True):
                    table.add(labels[site.name], is_held_out(source), before, after)
        table.close()
    with atomic_path(output / "callees.parquet") as path:
        table = _Table(path, CALLEES)
        for name, (train, held_out) in counts.items():
            table.add(name, train, held_out)
        table.close()
    return Called(*(sum(c[side] for c in counts.values()) for side in (0, 1)))


def main(argv: Sequence[str] | None = None) -> int:
    """Extract and print what was found."""
    parser = Parser("classification: extract.py", "Functions and calls of real Python code, as classes.")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--input", nargs="*", type=Path, help="files or folders of Python code, instead of the installed ones"
    )
    parser.add_argument("--also", nargs="*", type=Path, default=[], help="files or folders beside those")
    parser.add_argument("--classes", type=int, default=100_000, help="functions to stop at; 0: all of all files")
    parser.add_argument("--callee-sites", type=int, default=5, help="calls that a name needs to be a class")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args(argv)
    start = time.monotonic()
    roots = [*(args.input or default_roots()), *args.also]
    facts = extract(roots, args.output, classes=args.classes, callee_sites=args.callee_sites, workers=args.workers)
    facts["seconds"] = round(time.monotonic() - start, 1)
    write_json(args.output / "facts.json", facts)
    for name, value in facts.items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    run(main)
