"""Why one file is in the corpus or not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from opencoder.errors import DataError, nearest


def explain(folder: str | Path, query: str) -> str:
    """The verdict on every file with this path or SHA-256 in the corpus `folder`. Raises DataError if there is none."""
    root = Path(folder)
    if not (root / "manifest.json").is_file():
        raise DataError(
            f"{root} holds no finished corpus: give the --output folder of a build-corpus that ran to its end"
        )
    column = "id" if re.fullmatch(r"[0-9a-f]{64}", query) else "path"
    answers = []
    for stage in ("clean", "dropped", "failed"):
        for part in sorted((root / stage).glob("*.parquet")):
            table = pq.read_table(part, columns=[c for c in pq.read_schema(part).names if c not in ("text", "excerpt")])
            for row in table.filter(pc.equal(table[column], query)).to_pylist():
                answers.append(_answer(stage, row, root))
    if not answers:
        raise DataError(
            f"no file with {column} {query} in {root}{nearest(query, _paths(root)) if column == 'path' else ''}"
        )
    return "\n\n".join(answers)


def _answer(stage: str, row: dict[str, Any], root: Path) -> str:
    lines = [
        f"{row['path']}  ({row['source']}, {row['language'] or 'no language'}, {row['size_bytes']} bytes)",
        f"  id {row['id']}",
    ]
    if stage == "clean":
        lines.append("  KEPT: no stage dropped it")
        lines += _near(root, "kept_id", row["id"], row["path"])
        return "\n".join(lines)
    if stage == "failed":
        return "\n".join([*lines, f"  FAILED: {row['reason']}"])
    value = "" if row["value"] is None else f", value {row['value']:.6g}"
    lines.append(f"  DROPPED at stage {row['stage']}: {row['reason']}{value}, dropped if {row['threshold']}")
    if row["hits"]:
        for hit in json.loads(row["hits"]):
            lines.append(f"    rule {hit['rule']}: value {hit['value']:.6g}, dropped if {hit['threshold']}")
    if row["stage"] in ("exact_dedup", "fuzzy_dedup"):
        lines += _near(root, "id", row["id"], row["path"])
    return "\n".join(lines)


def _near(root: Path, column: str, identity: str, path: str) -> list[str]:
    """Lines about the clusters that the file is in."""
    table = pq.read_table(root / "clusters.parquet")
    mine = pc.and_(
        pc.equal(table[column], identity), pc.equal(table["kept_path" if column == "kept_id" else "path"], path)
    )
    if column == "kept_id":
        rows = table.filter(mine).to_pylist()
        return [
            f"    kept in place of {r['path']} ({r['kind']} duplicate, Jaccard {r['jaccard']:.4f})" for r in rows[:20]
        ]
    rows = table.filter(mine).to_pylist()
    return [
        f"    kept: {r['kept_path']} ({r['kind']} duplicate, Jaccard {r['jaccard']:.4f}), id {r['kept_id']}"
        for r in rows
    ]


def _paths(root: Path) -> list[str]:
    parts = [p for stage in ("clean", "dropped", "failed") for p in sorted((root / stage).glob("*.parquet"))]
    return pa.concat_tables([pq.read_table(p, columns=["path"]) for p in parts])["path"].to_pylist()
