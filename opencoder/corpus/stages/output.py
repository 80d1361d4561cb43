"""Tasks `sample`, which finds where over-represented languages are cut, and `output`, which writes a shard's part of clean/,
dropped/ and failed/ and counts what the report needs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opencoder.corpus_config import CorpusConfig

from .. import sample as sampling
from ..transform import transform
from .judging import EXCERPT_CHARS
from .near import PAIR_CHARS, compare, examples
from .shards import row_groups

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
EXAMPLE = ("path", "kept_path", "jaccard", "excerpt", "kept_excerpt")
"""What the report needs of pairs of near-duplicates to be shown."""
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

    Memory: three row groups of texts, and 300 bytes per dropped duplicate."""
    settings = CorpusConfig.model_validate(config)
    copies = {row["place"]: row for row in pq.read_table(inputs[1]).to_pylist()}
    near = {row["place"]: row for row in pq.read_table(inputs[2]).to_pylist()}
    cut = _sampled(inputs[3], inputs[4], settings)
    counts = Counts(settings)
    shown: list[dict[str, Any]] = []
    statuses = (("kept", CLEAN), ("dropped", DROPPED), ("failed", DROPPED))
    with ExitStack() as stack:
        writers = [
            stack.enter_context(pq.ParquetWriter(path, _schema(columns), compression="zstd"))
            for path, (_, columns) in zip(outputs[:3], statuses, strict=True)
        ]
        for (start, table), (_, judged) in zip(row_groups(inputs[0]), row_groups(inputs[3]), strict=True):
            records: list[dict[str, Any]] = table.to_pylist()
            places = range(start, start + len(records))
            alike = [near[place] for place in places if place in near]
            compare(
                alike, [records[row["place"] - start]["text"] for row in alike], inputs[0].parent, settings.dedup.ngram
            )
            shown = examples([*shown, *({**_named(records[row["place"] - start]), **row} for row in alike)])
            of_place = {row["place"]: row for row in judged.to_pylist()}
            _add_excerpts([r for place, r in zip(places, records, strict=True) if place not in of_place], settings)
            for place, record in zip(places, records, strict=True):
                _settle(record, copies.get(place), near.get(place), of_place.get(place), cut.get(place))
            for writer, (status, columns) in zip(writers, statuses, strict=True):
                if some := [r for r in records if r["status"] == status]:
                    writer.write_table(_table(some, columns), row_group_size=1024)
            counts.add(records)
    for row in shown:
        row |= {name: _excerpt(row[name], row, settings, PAIR_CHARS) for name in ("excerpt", "kept_excerpt")}
    found = counts.result() | {"near": [{name: row[name] for name in EXAMPLE} for row in shown]}
    outputs[3].write_text(json.dumps(found, sort_keys=True), encoding="utf-8")


def _sampled(judged: Path, cuts: Path, config: CorpusConfig) -> dict[int, sampling.Decision]:
    """place → why a record that was kept so far is left out after all."""
    found = {name: sampling.Cut(*cut) for name, cut in json.loads(cuts.read_text(encoding="utf-8")).items()}
    table = pq.read_table(judged, columns=["place", "id", "language", "size_bytes", "status"])
    table = table.filter(pa.compute.equal(table["status"], "kept"))
    places = table["place"].to_pylist()
    return {places[decision.row]: decision for decision in sampling.decide(table, found, config.sample)}


def _settle(
    record: dict[str, Any],
    copy: dict[str, Any] | None,
    near: dict[str, Any] | None,
    judged: dict[str, Any] | None,
    cut: sampling.Decision | None,
) -> None:
    """Write what became of a record into it: at most one of copy, near and judged is there, cut with judged alone."""
    if copy is not None:
        kept = {name: copy[name] for name in ("kept_id", "kept_path")}
        _drop(record, "exact_dedup", "exact_duplicate", 1.0, f"same bytes as {copy['kept_path']}", **kept)
    elif near is not None:
        kept = {name: near[name] for name in ("kept_id", "kept_path")}
        threshold = f"in the near-duplicate cluster of {near['kept_path']}"
        _drop(record, "fuzzy_dedup", "near_duplicate", near["jaccard"], threshold, **kept)
    elif judged is not None:
        size = record["size_bytes"]
        record |= {name: value for name, value in judged.items() if name != "place"}
        record |= {"clean_bytes": judged["size_bytes"], "size_bytes": size}
        if cut is not None:
            _drop(record, cut.stage, cut.reason, cut.value, cut.threshold)


def _named(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("path", "language")}


def _add_excerpts(records: list[dict[str, Any]], config: CorpusConfig) -> None:
    """Of records that were not judged; those with the same bytes in one go."""
    made: dict[tuple[Any, ...], str] = {}
    for record in records:
        key = (record["id"], record["language"], record["text"] is None)
        if key not in made:
            made[key] = _excerpt(record["text"], record, config, EXCERPT_CHARS)
        record["excerpt"] = made[key]


def _excerpt(text: str | None, record: dict[str, Any], config: CorpusConfig, chars: int) -> str:
    """The beginning of a text as a report may show it: without the personal data that the corpus does not hold either."""
    begin = (text or "")[: 2 * chars]  # what is cut at its end is not recognised, and not shown
    if config.transform.enabled:
        begin = transform(begin, language=record["language"], path=record["path"], config=config.transform).text
    return begin[:chars]


def _drop(record: dict[str, Any], stage: str, reason: str, value: float | None, threshold: str, **more: Any) -> None:
    record |= {"status": "dropped", "stage": stage, "reason": reason, "value": value, "threshold": threshold}
    record |= {"text": None, **more}


def _schema(columns: Iterable[str]) -> pa.Schema:
    return pa.schema([(name, TYPES.get(name, pa.string())) for name in columns])


def _table(records: list[dict[str, Any]], columns: Iterable[str]) -> pa.Table:
    schema = _schema(columns)
    return pa.table([pa.array([r.get(f.name) for r in records], f.type) for f in schema], schema=schema)


# ---- what the report needs ----


class Counts:
    """Counts that can be added up over shards (opencoder.corpus.report), and the shard's share of what is listed."""

    def __init__(self, config: CorpusConfig) -> None:
        self.config = config
        self.files: Counter[tuple[str, ...]] = Counter()
        self.sizes: Counter[tuple[str, ...]] = Counter()
        self.found: dict[str, Counter[str]] = {
            name: Counter()
            for name in ("tables", "table_bytes", "hits", "hit_bytes", "alone", "pii", "licences", "licence_sources")
        }
        self.totals: Counter[str] = Counter()
        self.listed: dict[str, list[Any]] = {name: [] for name in ("failures", "signal_errors", "matches")}
        self.left_out: Counter[str] = Counter()
        self.samples: dict[str, list[dict[str, Any]]] = {}

    def add(self, records: list[dict[str, Any]]) -> None:
        """Count some records."""
        for record in records:
            fate = (record["status"], record["stage"] or "", _reason(record), record["language"] or "-")
            self.files[fate] += 1
            self.sizes[fate] += record["size_bytes"]
            if record["status"] == "failed":
                self._list("failures", {"path": record["path"], "reason": record["reason"]})
            if "clean_bytes" in record:
                self._judged(record)
        self._sample(records)

    def _judged(self, record: dict[str, Any]) -> None:
        self.totals["judged"] += 1
        size = record["size_bytes"]
        if record["table"] is not None:
            self.found["tables"][record["table"]] += 1
            self.found["table_bytes"][record["table"]] += size
        names = {hit["rule"] for hit in json.loads(record["hits"] or "[]")}
        self.found["hits"].update(names)
        self.found["hit_bytes"].update(dict.fromkeys(names, size))
        self.found["alone"].update(names if len(names) == 1 else ())
        for signal, error in json.loads(record["errors"] or "{}").items():
            self._list("signal_errors", {"path": record["path"], "signal": signal, "error": error})
        for match in json.loads(record["matches"] or "[]"):
            self._list("matches", {"path": record["path"], **match})
        if record["status"] == "kept":
            self.found["pii"].update(json.loads(record["pii"] or "{}"))
            self.found["licences"][record["licence"] or "unknown"] += 1
            self.found["licence_sources"][record["licence_source"]] += 1
            self.totals["clean_bytes"] += record["clean_bytes"]
            self.totals["with_pii"] += record["pii"] is not None
            self.totals["with_header"] += bool(record["removed_chars"])
            self.totals["removed_chars"] += record["removed_chars"] or 0

    def _list(self, name: str, row: dict[str, Any]) -> None:
        if len(self.listed[name]) < FAILURES:
            self.listed[name].append(row)
        else:
            self.left_out[name] += 1

    def _sample(self, records: list[dict[str, Any]]) -> None:
        """Of each reason, of what is kept and of what each table of rules keeps, candidates: those with the smallest hash of
        seed and file."""
        columns = ("path", "language", "value", "threshold", "size_bytes", "excerpt")
        for record in records:
            if record["status"] == "failed":
                continue
            groups = [f"{record['stage']}: {record['reason']}"]
            if record["status"] == "kept":
                groups = ["kept"] if record.get("table") is None else ["kept", f"kept: {record['table']}"]
            name = f"{self.config.seed}:{record['path']}:{record['id']}"
            draw = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()
            for group in groups:
                best = self.samples.setdefault(group, [])
                if len(best) < self.config.samples_per_rule or (best and draw < best[-1]["draw"]):
                    best.append({"draw": draw, **{name: record.get(name) for name in columns}})
                    best.sort(key=lambda row: str(row["draw"]))
                    del best[self.config.samples_per_rule :]

    def result(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "fates": [[*fate, n, self.sizes[fate]] for fate, n in sorted(self.files.items())],
            **{name: dict(sorted(counter.items())) for name, counter in self.found.items()},
            "totals": dict(self.totals),
            "samples": dict(sorted(self.samples.items())),
            "left_out": {name: self.left_out[name] for name in self.listed},
            **self.listed,
        }


def _reason(record: dict[str, Any]) -> str:
    return "" if record["status"] != "dropped" else str(record["reason"])
