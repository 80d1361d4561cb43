"""What a build did: counts, funnel, kept shares, samples; as report.json and as one self-contained report.html."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pyarrow.parquet as pq

from opencoder.config import CorpusConfig
from opencoder.files import write_json, write_text

from . import dedup
from .rules import load_rules
from .stages import lsh_shape

if TYPE_CHECKING:
    from .build import Verdicts

STAGES = ("read", "language", "exact_dedup", "fuzzy_dedup", "rules")
CLUSTER_EXAMPLES = 10
SAMPLE_SOURCES = 12
"""Reasons shown with samples, the commonest first."""


def assemble(
    verdicts: Verdicts, config: CorpusConfig, clusters: list[dict[str, Any]], errors: list[dict[str, Any]]
) -> dict[str, Any]:
    """The report's numbers. Raises AssertionError if a record is lost: in = kept + dropped + failed."""
    sizes = verdicts.table["size_bytes"].to_pylist()
    languages = verdicts.table["language"].to_pylist()
    status, stage, reason = (verdicts.columns[name] for name in ("status", "stage", "reason"))
    counts = {"in": len(status), **{s: status.count(s) for s in ("kept", "dropped", "failed")}}
    assert counts["in"] == counts["kept"] + counts["dropped"] + counts["failed"], counts
    size_of = {s: sum(n for n, st in zip(sizes, status, strict=True) if st == s) for s in ("kept", "dropped", "failed")}
    bands, rows = lsh_shape(config)
    return {
        "counts": counts,
        "bytes": {"in": sum(sizes), **size_of},
        "funnel": _funnel(status, stage, sizes),
        "by_language": _by_language(status, stage, languages, sizes),
        "by_rule": _by_rule(verdicts),
        "by_reason": dict(
            sorted(
                Counter(f"{s}: {r}" for s, r, st in zip(stage, reason, status, strict=True) if st == "dropped").items()
            )
        ),
        "failures": _failures(verdicts),
        "signal_errors": errors,
        "clusters": _clusters(clusters),
        "dedup": {
            "bands": bands,
            "rows": rows,
            "threshold": round(dedup.threshold(bands, rows), 4),
            "s_curve": [[j, round(p, 6)] for j, p in dedup.s_curve(bands, rows)],
        },
    }


def _funnel(status: list[str], stage: list[str | None], sizes: list[int]) -> list[dict[str, Any]]:
    """For each stage: files and bytes that reach it, and what it drops."""
    rows = []
    files, volume = len(status), sum(sizes)
    for name in ("failed", *STAGES):
        gone = [
            n
            for st, sg, n in zip(status, stage, sizes, strict=True)
            if (st == "failed" if name == "failed" else st == "dropped" and sg == name)
        ]
        rows.append(
            {"stage": name, "files_in": files, "bytes_in": volume, "dropped": len(gone), "bytes_dropped": sum(gone)}
        )
        files, volume = files - len(gone), volume - sum(gone)
    return rows


def _by_language(
    status: list[str], stage: list[str | None], languages: list[str | None], sizes: list[int]
) -> list[dict[str, Any]]:
    table: dict[str, dict[str, int]] = {}
    for st, language, size in zip(status, languages, sizes, strict=True):
        row = table.setdefault(language or "-", {"files": 0, "bytes": 0, "kept": 0, "kept_bytes": 0})
        row["files"] += 1
        row["bytes"] += size
        row["kept"] += st == "kept"
        row["kept_bytes"] += size if st == "kept" else 0
    return sorted(({"language": k, **v} for k, v in table.items()), key=lambda r: (-r["files"], r["language"]))


def _by_rule(verdicts: Verdicts) -> list[dict[str, Any]]:
    """For each rule: files it hits, and those that no other rule hits."""
    import json

    hits, only = Counter[str](), Counter[str]()
    judged = 0
    for text, status, stage in zip(
        verdicts.columns["hits"], verdicts.columns["status"], verdicts.columns["stage"], strict=True
    ):
        judged += status == "kept" or (status == "dropped" and stage == "rules")
        names = {hit["rule"] for hit in json.loads(text)} if text else set()
        hits.update(names)
        if len(names) == 1:
            only.update(names)
    quantities = {rule.name: rule.quantity for rule in load_rules()}
    rows = []
    for name, n in sorted(hits.items(), key=lambda item: (-item[1], item[0])):
        quantity = quantities[name.removeprefix("qsc_code_").removeprefix("qsc_doc_")]
        rows.append({"rule": name, "quantity": quantity, "hits": n, "alone": only[name], "share": round(n / judged, 6)})
    return rows


def _failures(verdicts: Verdicts) -> list[dict[str, str]]:
    paths = verdicts.table["path"].to_pylist()
    pairs = zip(paths, verdicts.columns["reason"], verdicts.columns["status"], strict=True)
    return [{"path": path, "reason": reason} for path, reason, status in pairs if status == "failed"]


def _clusters(clusters: list[dict[str, Any]]) -> dict[str, Any]:
    """Number and sizes of clusters of each kind, and examples of the near-duplicates."""
    found: dict[str, Any] = {}
    for kind in ("exact", "fuzzy"):
        mine = [c for c in clusters if c["kind"] == kind]
        sizes = Counter((c["kept_id"], c["kept_path"]) for c in mine)
        spread = Counter(n + 1 for n in sizes.values())
        found[kind] = {
            "clusters": len(sizes),
            "dropped": len(mine),
            "sizes": {str(k): spread[k] for k in sorted(spread)},
        }
    examples = sorted((c for c in clusters if c["kind"] == "fuzzy"), key=lambda c: (c["jaccard"], c["path"]))
    found["examples"] = [{k: c[k] for k in ("path", "kept_path", "jaccard")} for c in examples[:CLUSTER_EXAMPLES]]
    return found


def add_samples(output: Path, result: dict[str, Any], config: CorpusConfig) -> None:
    """Some dropped files per reason, chosen by a hash of the seed and the file: the same for the same corpus."""
    dropped = [row for part in sorted((output / "dropped").iterdir()) for row in pq.read_table(part).to_pylist()]
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for row in dropped:
        by_reason.setdefault(f"{row['stage']}: {row['reason']}", []).append(row)
    samples = []
    for reason, rows in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))[:SAMPLE_SOURCES]:
        rows.sort(key=lambda r: hashlib.sha256(f"{config.seed}:{r['path']}:{r['id']}".encode()).digest())
        columns = ("path", "language", "value", "threshold", "size_bytes", "excerpt")
        chosen = [{name: row[name] for name in columns} for row in rows[: config.samples_per_rule]]
        samples.append({"reason": reason, "files": len(rows), "samples": chosen})
    result["samples"] = samples


def write(output: Path, result: dict[str, Any]) -> None:
    """report.json and report.html."""
    write_json(output / "report.json", result)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(size=human_size, count=lambda n: f"{n:,}", percent=lambda x: f"{x:.1%}", number=_number)
    page = environment.get_template("report.html.j2")
    write_text(
        output / "report.html",
        page.render(curve=_curve_points(result), **{k: v for k, v in result.items() if k != "timings"}),
    )


def human_size(n: float) -> str:
    """12,345,678 → 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:,.4g}"


def _curve_points(result: dict[str, Any]) -> str:
    """The S-curve as points of an SVG polyline in a box of 300 × 120."""
    return " ".join(f"{(j - 0.5) * 600:.1f},{120 - 120 * p:.1f}" for j, p in result["dedup"]["s_curve"])
