"""What a build did: counts, funnel, languages, rules, duplicates, samples; report.json. opencoder.corpus.report_page shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from opencoder.corpus_config import CorpusConfig
from opencoder.files import write_json, write_text

from . import dedup, report_page, rules

STAGES = ("read", "language", "exact_dedup", "fuzzy_dedup", "transform", "rules", "decontaminate", "sample")
CLUSTER_EXAMPLES = 10
LISTED = 1000
"""Failures, signal errors and benchmark matches that the report lists; the rest is counted, in `left_out`."""
LISTS = ("matches", "failures", "signal_errors")

Fates = list[tuple[str, str, str, str, int, int]]
"""(status, stage, reason, language, files, bytes)."""


def assemble(counts: Sequence[dict[str, Any]], clusters: pa.Table, config: CorpusConfig) -> dict[str, Any]:
    """The report's numbers from the counts of the shards (opencoder.corpus.stages.output), the table of clusters and the
    near-duplicates. The order of the shards changes nothing but that of lists."""
    fates: Fates = [tuple(row) for shard in counts for row in shard["fates"]]
    files = {s: sum(f[4] for f in fates if f[0] == s) for s in ("kept", "dropped", "failed")}
    sizes = {s: sum(f[5] for f in fates if f[0] == s) for s in ("kept", "dropped", "failed")}
    totals = _added(shard["totals"] for shard in counts)
    reasons, volumes = Counter[str](), Counter[str]()
    for status, stage, reason, _, n, size in fates:
        if status == "dropped":
            reasons[f"{stage}: {reason}"] += n
            volumes[f"{stage}: {reason}"] += size
    return {
        "counts": {"in": sum(files.values()), **files},
        "bytes": {"in": sum(sizes.values()), **sizes, "clean": totals.get("clean_bytes", 0)},
        "funnel": _funnel(fates),
        "by_language": _by_language(fates),
        "by_rule": _by_rule(counts, reasons, volumes),
        "by_reason": dict(sorted(reasons.items())),
        "bytes_by_reason": dict(sorted(volumes.items())),
        "transform": {
            **{name: totals.get(name, 0) for name in ("with_header", "removed_chars", "with_pii")},
            **{name: _added(shard[name] for shard in counts) for name in ("pii", "licences", "licence_sources")},
        },
        "decontaminate": {"enabled": bool(config.decontaminate.against), "action": config.decontaminate.action},
        **{name: _listed(counts, name)[:LISTED] for name in LISTS},
        "left_out": {
            name: max(0, len(_listed(counts, name)) - LISTED) + sum(shard["left_out"][name] for shard in counts)
            for name in LISTS
        },
        "clusters": _clusters(clusters, counts),
        "dedup": _dedup(config),
        **_samples(counts, reasons, config),
    }


def _dedup(config: CorpusConfig) -> dict[str, Any]:
    recipe = dedup.recipe_of(config.dedup)
    bands, rows = recipe.bands, recipe.rows
    chosen = config.dedup.model_dump(include={"exact", "fuzzy", "preset", "level", "check_jaccard"})
    return {
        **chosen,
        "bands": bands,
        "rows": rows,
        "threshold": round(dedup.threshold(bands, rows), 4),
        "s_curve": [[j, round(p, 6)] for j, p in dedup.s_curve(bands, rows)],
    }


def _added(parts: Any) -> dict[str, int]:
    total = Counter[str]()
    for part in parts:
        total.update(part)
    return dict(sorted(total.items()))


def _listed(counts: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [row for shard in counts for row in shard[name]]


def _funnel(fates: Fates) -> list[dict[str, Any]]:
    """For each stage: files and bytes that reach it, and what it drops."""
    rows = []
    files, volume = sum(f[4] for f in fates), sum(f[5] for f in fates)
    for name in ("failed", *STAGES):
        gone = [f for f in fates if (f[0] == "failed" if name == "failed" else f[0] == "dropped" and f[1] == name)]
        dropped, size = sum(f[4] for f in gone), sum(f[5] for f in gone)
        rows.append({"stage": name, "files_in": files, "bytes_in": volume, "dropped": dropped, "bytes_dropped": size})
        files, volume = files - dropped, volume - size
    return rows


def _by_language(fates: Fates) -> list[dict[str, Any]]:
    """For each language: files and bytes read and kept, and under `dropped` those that each reason took."""
    table: dict[str, dict[str, Any]] = {}
    for status, stage, reason, language, n, size in fates:
        empty = dict.fromkeys(("files", "bytes", "kept", "kept_bytes", "failed", "failed_bytes"), 0)
        row = table.setdefault(language, {**empty, "dropped": {}})
        row["files"] += n
        row["bytes"] += size
        if status == "kept":
            row["kept"] += n
            row["kept_bytes"] += size
        elif status == "failed":
            row["failed"] += n
            row["failed_bytes"] += size
        else:
            cell = row["dropped"].setdefault(f"{stage}: {reason}", {"files": 0, "bytes": 0})
            cell["files"] += n
            cell["bytes"] += size
    return sorted(({"language": k, **v} for k, v in table.items()), key=lambda r: (-r["files"], r["language"]))


def _by_rule(counts: Sequence[dict[str, Any]], reasons: Counter[str], volumes: Counter[str]) -> list[dict[str, Any]]:
    """For each rule that hits: files and bytes it judges and hits, files that no other rule hits, and files and bytes whose
    first hit it is. share: of the files it judges."""
    names = ("hits", "hit_bytes", "alone", "tables", "table_bytes")
    hits, hit_bytes, alone, tables, table_bytes = (_added(shard[name] for shard in counts) for name in names)
    quantities = {rule.published(group): rule.quantity for rule in rules.load_rules() for group in rule.groups}
    judging = _tables_of_rules()
    rows = []
    for name, n in sorted(hits.items(), key=lambda item: (-item[1], item[0])):
        judged = sum(tables.get(table, 0) for table in judging[name])
        rows.append(
            {
                "rule": name,
                "quantity": quantities[name],
                "tables": judging[name],
                "judged": judged,
                "judged_bytes": sum(table_bytes.get(table, 0) for table in judging[name]),
                "hits": n,
                "hit_bytes": hit_bytes[name],
                "alone": alone.get(name, 0),
                "first": reasons[f"rules: {name}"],
                "first_bytes": volumes[f"rules: {name}"],
                "share": round(n / judged, 6),
            }
        )
    return rows


def _tables_of_rules() -> dict[str, list[str]]:
    """Published name of a rule → the tables in which it has a condition."""
    found: dict[str, list[str]] = {}
    for table in rules.TABLES:
        for name in dict.fromkeys(condition.signal for condition in rules.conditions(table)):
            found.setdefault(name, []).append(table)
    return found


def _clusters(clusters: pa.Table, counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Number and sizes of clusters of each kind, and examples of the near-duplicates, the least similar first."""
    found: dict[str, Any] = {}
    kinds, ids, paths = (clusters[name].to_pylist() for name in ("kind", "kept_id", "kept_path"))
    for kind in ("exact", "fuzzy"):
        sizes = Counter((i, p) for k, i, p in zip(kinds, ids, paths, strict=True) if k == kind)
        spread = Counter(n + 1 for n in sizes.values())
        found[kind] = {
            "clusters": len(sizes),
            "dropped": sum(sizes.values()),
            "sizes": {str(k): spread[k] for k in sorted(spread)},
        }
    pairs = [pair for shard in counts for pair in shard["near"]]
    found["examples"] = sorted(pairs, key=lambda pair: pair["jaccard"])[:CLUSTER_EXAMPLES]
    return found


def _samples(counts: Sequence[dict[str, Any]], reasons: Counter[str], config: CorpusConfig) -> dict[str, Any]:
    """Some files per reason, some that were kept, and some that the rules of each table kept, chosen by a hash of the seed
    and the file: the same for the same corpus, however it is split."""
    drawn: dict[str, list[dict[str, Any]]] = {}
    for shard in counts:
        for reason, rows in shard["samples"].items():
            drawn.setdefault(reason, []).extend(rows)
    chosen = {
        reason: [
            {name: value for name, value in row.items() if name != "draw"}
            for row in sorted(rows, key=lambda row: row["draw"])[: config.samples_per_rule]
        ]
        for reason, rows in drawn.items()
    }
    shown = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return {
        "samples": [{"reason": reason, "files": n, "samples": chosen.get(reason, [])} for reason, n in shown],
        "kept_samples": chosen.get("kept", []),
        "kept_by_table": [
            {"table": table, "samples": chosen[f"kept: {table}"]}
            for table in rules.TABLES
            if f"kept: {table}" in chosen
        ],
        "seed": config.seed,
    }


def write(output: Path, result: dict[str, Any]) -> None:
    """report.json, report.html and timings.html. Times stand in the last only, and in `timings` of the first: all else is the
    same at each run."""
    write_json(output / "report.json", result)
    write_text(output / "report.html", report_page.report(result))
    write_text(output / "timings.html", report_page.timings(result["timings"]))
