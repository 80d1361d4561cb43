"""Tasks `sample`, which finds where over-represented languages are cut, and `output`, which writes a shard's part of clean/,
dropped/ and failed/ and counts what the report needs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opencoder.corpus_config import CorpusConfig

from .. import sample as sampling
from .near import compare

CLEAN = (
    "id", "path", "source", "repo", "language", "doc_type", "text", "size_bytes", "licence", "licence_source",
    "licence_type", "stars", "commit_time", "blob_id", "transform",
)  # fmt: skip
DROPPED = (
    "id", "path", "language", "stage", "reason", "value", "threshold", "source", "size_bytes", "hits", "kept_id",
    "kept_path", "excerpt",
)  # fmt: skip
TYPES = {
    "value": pa.float64(), "size_bytes": pa.int64(), "stars": pa.int64(), "commit_time": pa.int64(),
    "text": pa.large_string(),
}  # fmt: skip
EXAMPLE = ("kept_path", "jaccard", "excerpt", "kept_excerpt")
"""Columns of NEAR, beside the path, that the report needs of pairs to be shown."""
EXCERPT_CHARS = 600
"""Characters of a dropped file that the report may show."""
FAILURES = 1000
"""Failures and signal errors that a shard lists."""


def sample(inputs: list[Path], outputs: list[Path], *, config: dict[str, Any]) -> None:
    """Inputs: JUDGED of all shards. Output: the cuts in JSON. Memory: half a megabyte per language with a budget."""
    settings = CorpusConfig.model_validate(config).sample
    tables = (pq.read_table(p, columns=["id", "language", "size_bytes", "status"]) for p in inputs)
    merged = sampling.merge(sampling.totals(t.filter(pa.compute.equal(t["status"], "kept")), settings) for t in tables)
    outputs[0].write_text(json.dumps(sampling.cuts(merged, settings), sort_keys=True), encoding="utf-8")


def output(inputs: list[Path], outputs: list[Path], *, config: dict[str, Any]) -> None:
    """Inputs: a shard's texts, COPIES, NEAR, JUDGED, the cuts. Outputs: clean, dropped, failed, and the counts in JSON. The
    kept files of near-duplicates are read where they lie, beside the texts.

    Memory: the texts of a shard, twice, and two row groups."""
    settings = CorpusConfig.model_validate(config)
    records: list[dict[str, Any]] = pq.read_table(inputs[0]).to_pylist()
    near = compare(pq.read_table(inputs[2]), [r["text"] for r in records], inputs[0].parent, settings.dedup.ngram)
    for row in pq.read_table(inputs[1]).to_pylist():
        kept = {name: row[name] for name in ("kept_id", "kept_path")}
        _drop(records[row["place"]], "exact_dedup", "exact_duplicate", 1.0, f"same bytes as {row['kept_path']}", **kept)
    for row in near:
        kept = {name: row[name] for name in ("kept_id", "kept_path")}
        threshold = f"in the near-duplicate cluster of {row['kept_path']}"
        _drop(records[row["place"]], "fuzzy_dedup", "near_duplicate", row["jaccard"], threshold, **kept)
    for row in pq.read_table(inputs[3]).to_pylist():
        record = records[row.pop("place")]
        excerpt = (record["text"] or "")[:EXCERPT_CHARS]
        size = record["size_bytes"]
        record |= row
        record |= {"excerpt": excerpt, "clean_bytes": row["size_bytes"], "size_bytes": size}
    cuts = {name: sampling.Cut(*cut) for name, cut in json.loads(inputs[4].read_text(encoding="utf-8")).items()}
    alive = [r for r in records if r["status"] == "kept"]
    table = pa.table({n: [r[n] for r in alive] for n in ("id", "language")}
                     | {"size_bytes": pa.array([r["clean_bytes"] for r in alive], pa.int64())})  # fmt: skip
    for decision in sampling.decide(table, cuts, settings.sample):
        _drop(alive[decision.row], decision.stage, decision.reason, decision.value, decision.threshold)
    for path, status, columns in zip(outputs, ("kept", "dropped", "failed"), (CLEAN, DROPPED, DROPPED), strict=False):
        _write(path, [r for r in records if r["status"] == status], columns)
    counts = _counts(records, settings)
    counts["near"] = [
        {"path": records[row["place"]]["path"], **{name: row[name] for name in EXAMPLE}}
        for row in near
        if row["excerpt"]
    ]
    outputs[3].write_text(json.dumps(counts, sort_keys=True), encoding="utf-8")


def _drop(record: dict[str, Any], stage: str, reason: str, value: float | None, threshold: str, **more: Any) -> None:
    excerpt = record.get("excerpt") or (record["text"] or "")[:EXCERPT_CHARS]
    record |= {"status": "dropped", "stage": stage, "reason": reason, "value": value, "threshold": threshold}
    record |= {"text": None, "excerpt": excerpt, **more}


def _write(path: Path, records: list[dict[str, Any]], columns: Iterable[str]) -> None:
    arrays = {n: pa.array([r.get(n) for r in records], TYPES.get(n, pa.string())) for n in columns}
    pq.write_table(pa.table(arrays), path, compression="zstd", row_group_size=1024)


# ---- what the report needs ----


def _counts(records: list[dict[str, Any]], config: CorpusConfig) -> dict[str, Any]:
    """Counts that can be added up over shards (`report.add`), and the shard's share of what is listed."""
    fates: Counter[tuple[str, ...]] = Counter()
    sizes: Counter[tuple[str, ...]] = Counter()
    found: dict[str, Counter[str]] = {
        name: Counter() for name in ("hits", "alone", "pii", "licences", "licence_sources")
    }
    totals: Counter[str] = Counter()
    listed: dict[str, list[Any]] = {name: [] for name in ("failures", "signal_errors", "matches")}
    for record in records:
        fate = (record["status"], record["stage"] or "", _reason(record), record["language"] or "-")
        fates[fate] += 1
        sizes[fate] += record["size_bytes"]
        if record["status"] == "failed":
            listed["failures"].append({"path": record["path"], "reason": record["reason"]})
        if "clean_bytes" not in record:
            continue
        totals["judged"] += 1
        names = {hit["rule"] for hit in json.loads(record["hits"] or "[]")}
        found["hits"].update(names)
        found["alone"].update(names if len(names) == 1 else ())
        errors = json.loads(record["errors"] or "{}").items()
        listed["signal_errors"] += [{"path": record["path"], "signal": s, "error": e} for s, e in errors]
        listed["matches"] += [{"path": record["path"], **match} for match in json.loads(record["matches"] or "[]")]
        if record["status"] == "kept":
            found["pii"].update(json.loads(record["pii"] or "{}"))
            found["licences"][record["licence"] or "unknown"] += 1
            found["licence_sources"][record["licence_source"]] += 1
            totals["clean_bytes"] += record["clean_bytes"]
            totals["with_pii"] += record["pii"] is not None
            totals["with_header"] += bool(record["removed_chars"])
            totals["removed_chars"] += record["removed_chars"] or 0
    return {
        "fates": [[*fate, n, sizes[fate]] for fate, n in sorted(fates.items())],
        **{name: dict(sorted(counter.items())) for name, counter in found.items()},
        "totals": dict(totals),
        "samples": _samples(records, config),
        "left_out": {name: max(0, len(rows) - FAILURES) for name, rows in listed.items()},
        **{name: rows[:FAILURES] for name, rows in listed.items()},
    }


def _reason(record: dict[str, Any]) -> str:
    return "" if record["status"] != "dropped" else str(record["reason"])


def _samples(records: list[dict[str, Any]], config: CorpusConfig) -> dict[str, list[dict[str, Any]]]:
    """For each reason, and for what is kept, the shard's candidates: those with the smallest hash of seed and file."""
    groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for record in records:
        if record["status"] == "failed":
            continue
        group = "kept" if record["status"] == "kept" else f"{record['stage']}: {record['reason']}"
        draw = hashlib.sha256(f"{config.seed}:{record['path']}:{record['id']}".encode("utf-8", "replace")).hexdigest()
        groups.setdefault(group, []).append((draw, record))
    columns = ("path", "language", "value", "threshold", "size_bytes", "excerpt")
    return {
        group: [
            {"draw": draw, **{name: record.get(name) for name in columns}}
            for draw, record in sorted(rows, key=lambda row: row[0])[: config.samples_per_rule]
        ]
        for group, rows in sorted(groups.items())
    }
