"""The driver of `build-corpus`: sources → exact dedup → fuzzy dedup → rules → clean/, dropped/, clusters, report.

Work lies under OUTPUT/work/ until the end. The result depends on the inputs and the configuration alone: not on the
number of workers, nor on interruptions."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opencoder import __version__
from opencoder.config import CorpusConfig
from opencoder.console import ProgressBar
from opencoder.errors import ConfigError, UserError
from opencoder.files import atomic_path, fsync_directory, write_json

from . import dedup, report, stages
from .read import Item, check_columns, find_items
from .stages import META, shard_path

SHARD_FILES = 500
"""Files per task at most, beside `shard_bytes`."""
CLUSTERS = pa.schema([("id", pa.string()), ("kept_id", pa.string()), ("jaccard", pa.float64()), ("path", pa.string()),
                      ("kept_path", pa.string()), ("kind", pa.string())])  # fmt: skip


@dataclass
class Verdicts:
    """What becomes of each record of each shard; starts with what reading said."""

    tables: list[pa.Table]
    """Records without text, one table per shard."""
    columns: dict[str, list[Any]] = field(init=False)
    """status, stage, reason, value, threshold, hits over all records."""

    def __post_init__(self) -> None:
        self.table = pa.concat_tables(self.tables)
        self.columns = {n: self.table[n].to_pylist() for n in ("status", "stage", "reason", "value", "threshold")}
        self.columns["hits"] = [None] * len(self.table)
        self.starts = np.concatenate([[0], np.cumsum([len(t) for t in self.tables])]).astype(np.int64)

    @property
    def alive(self) -> NDArray[np.bool_]:
        """Records that nothing has dropped so far."""
        return np.array([status == "kept" for status in self.columns["status"]], dtype=bool)

    def of_shard(self, number: int, values: NDArray[Any]) -> NDArray[Any]:
        """The part of a per-record array that belongs to a shard."""
        return values[self.starts[number] : self.starts[number + 1]]

    def drop(
        self, row: int, stage: str, reason: str, value: float | None, threshold: str | None, hits: str | None = None
    ) -> None:
        """Drop record `row`."""
        new = {
            "status": "dropped",
            "stage": stage,
            "reason": reason,
            "value": value,
            "threshold": threshold,
            "hits": hits,
        }
        for name, content in new.items():
            self.columns[name][row] = content

    def shard_table(self, number: int) -> pa.Table:
        """The verdict columns of a shard."""
        part = slice(int(self.starts[number]), int(self.starts[number + 1]))
        types = {"value": pa.float64()}
        return pa.table({n: pa.array(v[part], types.get(n, pa.string())) for n, v in self.columns.items()})


def build_corpus(
    inputs: Sequence[str], output: str | Path, config: CorpusConfig, *, workers: int = 1, overwrite: bool = False
) -> dict[str, Any]:
    """Build a corpus in folder `output`; returns the report. Raises UserError if `output` holds another corpus."""
    start = time.monotonic()
    output = Path(output)
    _check_config(config)
    items = find_items(list(inputs), config)
    for item in items:
        if item.container:
            check_columns(item)
    fingerprint = _fingerprint(items, config)
    finished = _claim(output, config, fingerprint, overwrite)
    if finished is not None:
        return finished
    work = output / "work"
    shards = _shards(items, config)
    timings: dict[str, float] = {}
    with _Pool(workers) as pool:
        pool.run(
            "read",
            [(stages.read_task, work, n, part, config) for n, part in enumerate(shards)],
            work,
            "parquet",
            timings,
        )
        verdicts = Verdicts(
            [pq.read_table(shard_path(work, "read", n, "parquet"), columns=META) for n in range(len(shards))]
        )
        clusters = _exact(verdicts, config)
        clusters += _fuzzy(verdicts, config, work, pool, timings)
        errors = _rules(verdicts, config, work, pool, timings)
        tasks = [(stages.output_task, work, n, verdicts.shard_table(n)) for n in range(len(shards))]
        # Verdicts may differ from those of a build that was killed in between: outputs are always written again.
        pool.run("output", tasks, None, "parquet", timings)
    result = report.assemble(verdicts, config, clusters, errors)
    _finish(
        output, work, len(shards), clusters, result, config, fingerprint, {**timings, "total": time.monotonic() - start}
    )
    return result


def _check_config(config: CorpusConfig) -> None:
    d = config.dedup
    if d.preset == "custom" and (d.bands is None or d.rows is None):
        raise ConfigError("dedup.preset=custom needs dedup.bands and dedup.rows")
    if d.preset != "custom" and (d.bands is not None or d.rows is not None):
        raise ConfigError(f"dedup.bands and dedup.rows belong to dedup.preset=custom, not to {d.preset}")


def _fingerprint(items: list[Item], config: CorpusConfig) -> str:
    listing = [(i.source, i.path, i.container, i.size, i.mtime_ns) for i in items]
    return hashlib.sha256(json.dumps([__version__, config.model_dump(mode="json"), listing]).encode()).hexdigest()


def _claim(output: Path, config: CorpusConfig, fingerprint: str, overwrite: bool) -> dict[str, Any] | None:
    """Make `output` ours, or return the report of an equal corpus that is there already."""
    manifest, marker = output / "manifest.json", output / "work" / "claim.json"
    for known in (manifest, marker):
        if not known.is_file() or overwrite:
            continue
        facts = json.loads(known.read_text(encoding="utf-8"))
        mine = config.model_dump(mode="json")
        if facts["config"] != mine:
            raise UserError(
                f"{output} holds a corpus with other parameters ({_difference(facts['config'], mine)}): choose another "
                "--output, or --overwrite"
            )
        if facts["fingerprint"] == fingerprint:
            if known == manifest:
                shutil.rmtree(output / "work", ignore_errors=True)
                result: dict[str, Any] = json.loads((output / "report.json").read_text(encoding="utf-8"))
                return result
            return None
    if output.exists() and any(output.iterdir()) and not manifest.is_file() and not marker.is_file():
        raise UserError(f"--output {output} is not empty and holds no corpus: choose a new or empty folder")
    shutil.rmtree(output / "work", ignore_errors=True)
    manifest.unlink(missing_ok=True)
    write_json(marker, {"config": config.model_dump(mode="json"), "fingerprint": fingerprint})
    return None


def _difference(a: dict[str, Any], b: dict[str, Any], path: str = "") -> str:
    """The first key in which two configurations differ, with both values."""
    for key in sorted({*a, *b}):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            if found := _difference(x, y, f"{path}{key}."):
                return found
        elif x != y:
            return f"{path}{key} is {x} there and {y} here"
    return ""


def _shards(items: list[Item], config: CorpusConfig) -> list[list[Item]]:
    """Consecutive files up to shard_bytes or SHARD_FILES; a container has a shard to itself."""
    shards: list[list[Item]] = []
    size = 0
    for item in items:
        full = not shards or size + item.size > config.shard_bytes or len(shards[-1]) >= SHARD_FILES
        if full or item.container or shards[-1][-1].container:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.size
    return shards or [[]]


class _Pool:
    """Runs tasks in processes; a task whose output exists is skipped."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def __enter__(self) -> _Pool:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.pool = (
            ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn")) if self.workers > 1 else None
        )
        return self

    def __exit__(self, *exc: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def run(
        self, stage: str, tasks: list[tuple[Any, ...]], done_in: Path | None, suffix: str, timings: dict[str, float]
    ) -> None:
        """Run each (function, work, number, …) whose output `done_in`/stage/number.suffix is not there yet."""
        start = time.monotonic()
        with ProgressBar(stage, total=len(tasks), unit="shards") as bar:
            missing = [t for t in tasks if done_in is None or not shard_path(done_in, stage, t[2], suffix).is_file()]
            bar.advance(len(tasks) - len(missing))
            if self.pool is None:
                for function, *args in missing:
                    function(*args)
                    bar.advance()
            else:
                futures = [self.pool.submit(function, *args) for function, *args in missing]
                for future in as_completed(futures):
                    future.result()
                    bar.advance()
        timings[stage] = time.monotonic() - start


def _subset(verdicts: Verdicts, rows: NDArray[np.int64]) -> pa.Table:
    """The columns that the keep rule reads, for some records; `key` tells records of equal content apart."""
    table = verdicts.table.select(["id", "stars", "commit_time", "path", "source"]).take(pa.array(rows))
    return table.rename_columns(["id", "stars", "commit_time", "path", "key"])


def _cluster_row(verdicts: Verdicts, row: int, keep: int, jaccard: float, kind: str) -> dict[str, Any]:
    table = verdicts.table
    return {
        "id": table["id"][row].as_py(),
        "kept_id": table["id"][keep].as_py(),
        "jaccard": jaccard,
        "path": table["path"][row].as_py(),
        "kept_path": table["path"][keep].as_py(),
        "kind": kind,
    }


def _exact(verdicts: Verdicts, config: CorpusConfig) -> list[dict[str, Any]]:
    if not config.dedup.exact:
        return []
    rows = np.flatnonzero(verdicts.alive)
    clusters = []
    for drop, keep in sorted(dedup.exact_duplicates(_subset(verdicts, rows)).items()):
        row, kept = int(rows[drop]), int(rows[keep])
        clusters.append(_cluster_row(verdicts, row, kept, 1.0, "exact"))
        verdicts.drop(row, "exact_dedup", "exact_duplicate", 1.0, f"same bytes as {clusters[-1]['kept_path']}")
    return clusters


def _fuzzy(
    verdicts: Verdicts, config: CorpusConfig, work: Path, pool: _Pool, timings: dict[str, float]
) -> list[dict[str, Any]]:
    if not config.dedup.fuzzy:
        return []
    alive = verdicts.alive
    shards = range(len(verdicts.tables))
    tasks: list[tuple[Any, ...]] = [(stages.keys_task, work, n, verdicts.of_shard(n, alive), config) for n in shards]
    pool.run("keys", tasks, work, "npy", timings)
    start = time.monotonic()
    keys = np.concatenate([np.load(shard_path(work, "keys", n, "npy")) for n in shards])
    rows = np.flatnonzero(alive)
    pairs = {
        int(rows[a]): int(rows[b]) for a, b in dedup.fuzzy_duplicates_of_keys(keys, _subset(verdicts, rows)).items()
    }
    member = np.zeros(len(alive), bool)
    member[[*pairs, *pairs.values()]] = True
    text: dict[int, str] = {}
    for n in shards:
        found = stages.texts(work, n, verdicts.of_shard(n, member)) if verdicts.of_shard(n, member).any() else []
        text.update({int(verdicts.starts[n]) + row: content for row, content in found})
    clusters = []
    bands, band_rows = stages.lsh_shape(config)
    for row, kept in sorted(pairs.items()):
        similarity = round(dedup.jaccard(text[row], text[kept], config.dedup.ngram), 8)
        clusters.append(_cluster_row(verdicts, row, kept, similarity, "fuzzy"))
        threshold = f"a band of {band_rows} of {bands} shared within the cluster of {clusters[-1]['kept_path']}"
        verdicts.drop(row, "fuzzy_dedup", "near_duplicate", similarity, threshold)
    timings["groups"] = time.monotonic() - start
    return clusters


def _rules(
    verdicts: Verdicts, config: CorpusConfig, work: Path, pool: _Pool, timings: dict[str, float]
) -> list[dict[str, Any]]:
    """Judge what is left; returns the signals that failed."""
    if not config.rules.enabled:
        return []
    alive = verdicts.alive
    shards = range(len(verdicts.tables))
    tasks: list[tuple[Any, ...]] = [(stages.rules_task, work, n, verdicts.of_shard(n, alive), config) for n in shards]
    pool.run("rules", tasks, work, "parquet", timings)
    failed = []
    for n in shards:
        for found in pq.read_table(shard_path(work, "rules", n, "parquet")).to_pylist():
            row = int(verdicts.starts[n]) + found["row"]
            hits = json.loads(found["hits"])
            if hits:
                verdicts.drop(row, "rules", hits[0]["rule"], hits[0]["value"], hits[0]["threshold"], found["hits"])
            path = verdicts.table["path"][row].as_py()
            failed += [{"path": path, "signal": s, "error": e} for s, e in json.loads(found["errors"]).items()]
    return failed


def _finish(
    output: Path,
    work: Path,
    shards: int,
    clusters: list[dict[str, Any]],
    result: dict[str, Any],
    config: CorpusConfig,
    fingerprint: str,
    timings: dict[str, float],
) -> None:
    """Move the parts into place, write clusters, report and, last, the manifest that says the corpus is whole."""
    for stage in ("clean", "dropped", "failed"):
        shutil.rmtree(output / stage, ignore_errors=True)
        (output / stage).mkdir()
        for n in range(shards):
            part = shard_path(work, stage, n, "parquet")
            if pq.read_metadata(part).num_rows or n == 0:  # at least one file, so that the columns are known
                shutil.copy2(part, output / stage / f"part-{n:06d}.parquet")
        fsync_directory(output / stage)
    with atomic_path(output / "clusters.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(clusters, schema=CLUSTERS), temporary)
    report.add_samples(output, result, config)
    rounded = {name: round(seconds, 3) for name, seconds in timings.items()}
    report.write(output, {**result, "timings": rounded})
    files = sorted(p for s in ("clean", "dropped", "failed") for p in (output / s).iterdir())
    write_json(
        output / "manifest.json",
        {
            "version": __version__,
            "fingerprint": fingerprint,
            "config": config.model_dump(mode="json"),
            "counts": result["counts"],
            "files": {str(p.relative_to(output)): p.stat().st_size for p in files},
            "timings": rounded,
        },
    )
    shutil.rmtree(work)
