"""Task `judge`: what is done to each record that dedup left, and whether it stays: transform, licence, rules, benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opencoder.corpus_config import CorpusConfig

from .. import rules, verdict
from ..decontaminate import Decontaminator, excerpt
from ..transform import Transformed, licence, transform
from .licences import repository_key
from .shards import row_groups

JUDGED = pa.schema(
    [
        ("place", pa.int64()),
        ("id", pa.string()),
        ("language", pa.string()),
        ("size_bytes", pa.int64()),
        ("status", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("value", pa.float64()),
        ("threshold", pa.string()),
        ("table", pa.string()),
        ("hits", pa.string()),
        ("errors", pa.string()),
        ("matches", pa.string()),
        ("licence", pa.string()),
        ("licence_source", pa.string()),
        ("transform", pa.string()),
        ("removed_chars", pa.int64()),
        ("pii", pa.string()),
        ("excerpt", pa.string()),
        ("text", pa.large_string()),
    ]
)
"""One row per record that dedup left. place: in the shard. size_bytes: of the text in UTF-8, which is null unless the record
stays. table: of thresholds, null unless the rules judged it. excerpt: of every one, so that reports show no personal data.
hits, errors, matches, transform and pii are JSON."""
EXCERPT_CHARS = 600
"""Characters of a file that the report may show."""
MATCHES = 20
"""Places of benchmark tasks that are listed per document."""


def judge(inputs: list[Path], outputs: list[Path], *, config: dict[str, Any]) -> None:
    """Inputs: a shard's texts, COPIES, NEAR, the licences of its repositories, benchmark files. Output: JUDGED.

    One row group for each of the texts'. Memory: two row groups (opencoder.corpus.stages.reading.FLUSH_BYTES)."""
    settings = CorpusConfig.model_validate(config)
    gone = {place for path in inputs[1:3] for place in pq.read_table(path, columns=["place"])["place"].to_pylist()}
    judge_one = _Judge(settings, json.loads(inputs[3].read_text(encoding="utf-8")))
    with pq.ParquetWriter(outputs[0], JUDGED, compression="zstd") as writer:
        for start, table in row_groups(inputs[0]):
            status = table["status"].to_pylist()
            left = [i for i in range(len(table)) if status[i] == "kept" and start + i not in gone]
            records = table.take(pa.array(left, pa.int64())).to_pylist()
            rows = [{"place": start + i, **judge_one(record)} for i, record in zip(left, records, strict=True)]
            writer.write_table(pa.Table.from_pylist(rows, schema=JUDGED))


class _Judge:
    """Record → a row of JUDGED without its place."""

    def __init__(self, config: CorpusConfig, repositories: dict[str, dict[str, str]]) -> None:
        self.config = config
        self.repositories: dict[str, licence.RepositoryLicences] = {}
        for key, folders in repositories.items():
            self.repositories[key] = licence.RepositoryLicences([])
            self.repositories[key].folders = folders
        on = config.decontaminate.against
        self.benchmarks = Decontaminator.shared(config.decontaminate.model_dump_json()) if on else None

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        text = record["text"]
        row: dict[str, Any] = {"id": record["id"], "language": record["language"], "status": "kept"}
        row |= {"licence": record["licence"], "licence_source": "given" if record["licence"] else "none"}
        dropped: tuple[str, str, float | None, str | None] | None = None
        if self.config.transform.enabled:
            done = transform(text, language=record["language"], path=record["path"], config=self.config.transform)
            text = done.text
            dropped = self._transformed(row, record, done)
        if self.config.rules.enabled and dropped is None:
            dropped = self._rules(row, record, text)
        if self.benchmarks is not None:
            found = self._benchmarks(row, text)
            dropped = dropped or found
        row["size_bytes"] = len(text.encode("utf-8", "surrogatepass"))
        row |= {"text": text, "excerpt": text[:EXCERPT_CHARS]}
        if dropped is not None:
            row |= dict(zip(("stage", "reason", "value", "threshold"), dropped, strict=True))
            row |= {"status": "dropped", "text": None}
        return row

    def _transformed(
        self, row: dict[str, Any], record: dict[str, Any], done: Transformed
    ) -> tuple[str, str, float | None, str | None] | None:
        """Write down what was done; the drop if the licence is not allowed, or nothing is left."""
        settings = self.config.transform
        files = self.repositories.get(repository_key(record["source"], record["repo"]))
        file = files.of(record["path"]) if files is not None else None
        found = done.licence
        if found.source == "none":
            found = licence.licence_of((), (), given=record["licence"], file=file)
        row |= {"licence": found.expression, "licence_source": found.source}
        row["removed_chars"] = sum(end - start for start, end in done.header.removed)
        if done.changed:
            row["transform"] = json.dumps(done.record(), sort_keys=True)
        if done.pii:
            row["pii"] = json.dumps(done.pii_counts, sort_keys=True)
        if not licence.is_allowed(found, settings.licences, unknown=settings.unknown_licence):
            return (
                "transform",
                "licence",
                None,
                f"{found.expression or 'unknown'} is not among {', '.join(settings.licences)}",
            )
        if not done.text.strip():
            return "transform", "empty", 0.0, "nothing but a notice"
        return None

    def _rules(
        self, row: dict[str, Any], record: dict[str, Any], text: str
    ) -> tuple[str, str, float | None, str | None] | None:
        found = verdict.evaluate(
            text, path=record["path"], size_bytes=record["size_bytes"], language=record["language"],
            doc_type=record["doc_type"], identity=record["id"], compat=self.config.rules.compat,
        )  # fmt: skip
        row["table"] = rules.table_for(record["doc_type"], record["language"], found.natural_language)
        if found.errors:
            row["errors"] = json.dumps(found.errors, sort_keys=True)
        if not found.hits:
            return None
        row["hits"] = json.dumps([hit._asdict() for hit in found.hits])
        first = found.hits[0]
        return "rules", first.rule, first.value, first.threshold

    def _benchmarks(self, row: dict[str, Any], text: str) -> tuple[str, str, float | None, str | None] | None:
        assert self.benchmarks is not None
        found = self.benchmarks.check(text)
        worst = found.worst()
        if worst is None:
            return None
        row["matches"] = json.dumps(
            [
                {"benchmark": m.benchmark, "task": m.task, "side": m.side, "start": m.start, "end": m.end,
                 "ngrams": m.ngrams, "excerpt": excerpt(text, m)}
                for m in found[:MATCHES]
            ]
        )  # fmt: skip
        if self.config.decontaminate.action != "drop":
            return None
        return "decontaminate", *worst.reason(self.config.decontaminate.ngram)
