"""The driver of `build-corpus`: it lists the tasks, has the engine run them, and puts their outputs in place.

    read ──┬─ exact ─┬─ first ─ shared ─ full ─ forest ─ groups ─┬─ judge ─┬─ output
           └─ licences ───────────────────────────────────────────┘  sample ┘

`read`, `first`, `full`, `judge` and `output` are one task per shard, `shared` and `forest` one per partition of the keys, the
others one each. Work lies under OUTPUT/work/ until the end. The result depends on the inputs and the configuration alone: not
on executor, workers or interruptions."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from opencoder import __version__
from opencoder.corpus_config import CorpusConfig
from opencoder.errors import UserError
from opencoder.files import atomic_path, fsync_directory, write_json

from . import dedup, plan, report
from . import sample as sampling
from .decontaminate import benchmark_files
from .engine import make_executor, run
from .engine.memory import peak_rss
from .read import Item, check_columns, find_items
from .transform.licence import check_allow_list

SHARD_FILES = 4000
"""Files per task at most, beside `shard_bytes`: of small ones it holds about 2 kB each."""
UNPACKED = 5
"""Bytes of text per byte of a packed container; source code packs 3 to 10 times."""
CLUSTERS = pa.schema([("id", pa.string()), ("kept_id", pa.string()), ("jaccard", pa.float64()), ("path", pa.string()),
                      ("kept_path", pa.string()), ("kind", pa.string())])  # fmt: skip


def build_corpus(
    inputs: Sequence[str],
    output: str | Path,
    config: CorpusConfig,
    *,
    workers: int = 1,
    overwrite: bool = False,
    keep_work: bool = False,
    verify: bool = False,
) -> dict[str, Any]:
    """Build a corpus in folder `output`; returns the report. Raises UserError if `output` holds another corpus.

    `keep_work` leaves the tasks' files, so that a later build after a change of inputs does only what the change touches.
    `verify` hashes what was done before, sources included, instead of trusting size and time."""
    start = time.monotonic()
    output = Path(output)
    _check_config(config)
    items = find_items(list(inputs), config)
    for item in items:
        check_columns(item)
    fingerprint = _fingerprint(items, config)
    finished = _finished(output, config, fingerprint, overwrite)
    if finished is not None and not verify:
        return finished
    work = _claim(output, config, fingerprint, overwrite)
    shards = _shards(items, config)
    tasks = plan.tasks(shards, config, bytes_in=sum(item.size for item in items))
    with make_executor(config.engine, workers=workers) as executor:
        done = run(
            tasks, folder=work, executor=executor, label="build", max_failures=config.engine.max_failures,
            retries=config.engine.retries, verify=verify,
        )  # fmt: skip
    clusters = _clusters(work, len(shards))
    counts = [
        json.loads((work / f"output/{n:06d}.counts.json").read_text(encoding="utf-8")) for n in range(len(shards))
    ]
    result = report.assemble(counts, clusters, config)
    timings = {"tasks": done.wall_s, "cpu": done.cpu_s, "peak_worker_bytes": done.peak_rss_bytes, "peak_driver_bytes": peak_rss(),
               **plan.stage_seconds(work, tasks), "total": time.monotonic() - start}  # fmt: skip
    _finish(output, work, len(shards), clusters, result, config, fingerprint, timings)
    if not keep_work:
        shutil.rmtree(work)
    return result


def _check_config(config: CorpusConfig) -> None:
    recipe = dedup.recipe_of(config.dedup)
    for known in plan.known_corpora(config):
        if known.keys.name == dedup.SIGNATURES:
            dedup.check_signatures(known.keys, recipe)
    sampling.check(config)
    check_allow_list(config.transform.licences)
    benchmark_files(config.decontaminate)


def result_config(config: CorpusConfig) -> dict[str, Any]:
    """The configuration without what changes nothing in the result."""
    plain = config.model_dump(mode="json")
    del plain["engine"]
    return plain


def _fingerprint(items: list[Item], config: CorpusConfig) -> str:
    facts = [__version__, result_config(config), [item.plain() for item in items]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _finished(output: Path, config: CorpusConfig, fingerprint: str, overwrite: bool) -> dict[str, Any] | None:
    """The report of an equal corpus that is there already. Raises UserError for one with other parameters."""
    manifest = output / "manifest.json"
    for known in (manifest, output / "work" / "claim.json"):
        if not known.is_file() or overwrite:
            continue
        facts = json.loads(known.read_text(encoding="utf-8"))
        mine = result_config(config)
        if facts["config"] != mine:
            raise UserError(
                f"{output} holds a corpus with other parameters ({_difference(facts['config'], mine)}): choose another "
                "--output, or --overwrite"
            )
        if facts["fingerprint"] == fingerprint and known == manifest:
            result: dict[str, Any] = json.loads((output / "report.json").read_text(encoding="utf-8"))
            return result
    return None


def _claim(output: Path, config: CorpusConfig, fingerprint: str, overwrite: bool) -> Path:
    """Make `output` ours; the folder to work in, with whatever an earlier build left there."""
    manifest, work = output / "manifest.json", output / "work"
    marker = work / "claim.json"
    if output.exists() and any(output.iterdir()) and not manifest.is_file() and not marker.is_file():
        raise UserError(f"--output {output} is not empty and holds no corpus: choose a new or empty folder")
    if overwrite:
        shutil.rmtree(work, ignore_errors=True)
    manifest.unlink(missing_ok=True)
    write_json(marker, {"config": result_config(config), "fingerprint": fingerprint})
    return work


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
    """Consecutive files and containers up to `shard_bytes` of text or SHARD_FILES; a larger one has a shard to itself."""
    shards: list[list[Item]] = []
    size = 0
    for item in items:
        text = item.size * (UNPACKED if item.packed else 1)
        if not shards or size + text > config.shard_bytes or len(shards[-1]) >= SHARD_FILES:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += text
    return shards or [[]]


def _clusters(work: Path, shards: int) -> pa.Table:
    """Every dropped copy with what is kept in its place."""
    columns = ["id", "path", "stage", "kept_id", "kept_path", "value"]
    parts = [pq.read_table(work / f"output/{n:06d}.dropped.parquet", columns=columns) for n in range(shards)]
    table = pa.concat_tables(parts)
    table = table.filter(pc.is_valid(table["kept_id"]))
    kinds = pc.if_else(pc.equal(table["stage"], "exact_dedup"), "exact", "fuzzy")
    found = {"id": table["id"], "kept_id": table["kept_id"], "jaccard": table["value"], "path": table["path"],
             "kept_path": table["kept_path"], "kind": kinds}  # fmt: skip
    return pa.table(found, schema=CLUSTERS).sort_by([("kind", "ascending"), ("path", "ascending"), ("id", "ascending")])


def _finish(
    output: Path,
    work: Path,
    shards: int,
    clusters: pa.Table,
    result: dict[str, Any],
    config: CorpusConfig,
    fingerprint: str,
    timings: dict[str, float],
) -> None:
    """Put the parts into place, write clusters, report and, last, the manifest that says the corpus is whole."""
    for stage in ("clean", "dropped", "failed"):
        shutil.rmtree(output / stage, ignore_errors=True)
        (output / stage).mkdir()
        for n in range(shards):
            part = work / f"output/{n:06d}.{stage}.parquet"
            if pq.read_metadata(part).num_rows or n == 0:  # at least one file, so that the columns are known
                shutil.copy2(part, output / stage / f"part-{n:06d}.parquet")
        fsync_directory(output / stage)
    with atomic_path(output / "clusters.parquet") as temporary:
        pq.write_table(clusters, temporary)
    (output / dedup.SIGNATURES).unlink(missing_ok=True)  # of the corpus that was here before
    if config.dedup.store_signatures:
        _store_signatures(output, work, shards, config)
    rounded = {name: round(seconds, 3) for name, seconds in timings.items()}
    result["timings"] = rounded
    report.write(output, result)
    files = sorted(p for s in ("clean", "dropped", "failed") for p in (output / s).iterdir())
    write_json(
        output / "manifest.json",
        {
            "version": __version__,
            "fingerprint": fingerprint,
            "config": result_config(config),
            "counts": result["counts"],
            "files": {str(p.relative_to(output)): p.stat().st_size for p in files},
            "timings": rounded,
        },
    )


def _store_signatures(output: Path, work: Path, shards: int, config: CorpusConfig) -> None:
    """Keys of what was kept, for later builds against this one: of the texts as they were compared, before the transform."""

    def batches() -> Iterator[tuple[list[str], pa.ChunkedArray]]:
        for n in range(shards):
            clean = pq.read_table(work / f"output/{n:06d}.clean.parquet", columns=["id", "path", "source"])
            names = {(r["id"], r["path"], r["source"]) for r in clean.to_pylist()}
            read = pq.read_table(work / f"read/{n:06d}.parquet", columns=["id", "path", "source", "status", "text"])
            rows = read.select(["id", "path", "source"]).to_pylist()
            kept = [i for i, r in enumerate(rows) if (r["id"], r["path"], r["source"]) in names]
            yield clean["id"].to_pylist(), read["text"].take(pa.array(kept, pa.int64()))

    dedup.write_signatures(output / dedup.SIGNATURES, batches(), dedup.recipe_of(config.dedup))
