"""Corpora for the tests of the report: one with something of everything, and counts that no build has to make."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from opencoder.config import load_corpus_config
from opencoder.corpus import report
from opencoder.corpus.build import CLUSTERS, build_corpus

from .test_build import good

HOSTILE = (
    "# </pre></details><script>window.hostile = 1</script><img src=//example.com/x onerror='window.hostile = 1'>\n"
)
UNSEEN = "# \u202e reversed \u2066 isolated \u2069 zero\u200bwidth \x07 bell \x1b[31m escape \u2028 line \ufeff mark\n"
LONG = "/".join(f"folder_with_a_name_of_which_nothing_may_be_broken_{i}" * 3 for i in range(4))
EVIL_NAME = "<script>window.hostile = 1<\u2044script>\u202eevil.py"
NOTICE = "# Copyright (c) 2019 Jane Doe\n# SPDX-License-Identifier: MIT\n\n"
PROMPT = "def add_all_numbers(values):\n    '''Add all the numbers of a list and give back the sum.'''\n"
TIMINGS = {
    "tasks": 61.0,
    "cpu": 100.5,
    "peak_worker_bytes": 540_000_256,
    "peak_driver_bytes": 210_000_128,
    "read": 44.04,
    "judge": 295.05,
    "total": 9000.0,
}


def write_sources(root: Path) -> Path:
    """Files of each fate, and of people who mean harm."""
    files = {f"good{i}.py": good(i) for i in range(5)}
    files |= {
        "copy.py": good(0),
        "near.py": good(1).replace("compute", "combine", 1),
        "long/" + LONG + "/near.py": good(2) + "#\n",
    }
    files |= {
        "hostile.py": HOSTILE + UNSEEN + good(6),
        "short.py": HOSTILE + UNSEEN,
        EVIL_NAME: UNSEEN,
        "page.html": HOSTILE,
    }
    files |= {"mail.py": good(7) + 'ADMIN = "jane.doe@gmail.com"\n', "notice.py": NOTICE + good(8), "empty.py": ""}
    files |= {
        "leak.py": good(9) + PROMPT + "    return sum(values)\n",
        "what.zzz": good(10),
        "line.js": f'a = "{"x" * 9000}";\n',
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / "nul.py").write_bytes(b"x = 1\n\0\n<script>window.hostile = 1</script>")
    (root / "broken.py").symlink_to("absent.py")
    os.mkfifo(root / "pipe.py")
    return root


def build_everything(folder: Path) -> Path:
    """A corpus in whose report each section has something to show; its folder."""
    root = folder / "src"
    root.mkdir()
    task = {
        "task_id": "t/1",
        "prompt": PROMPT,
        "canonical_solution": "    return sum(values)\n",
        "entry_point": "add_all_numbers",
    }
    (folder / "bench.jsonl").write_text(json.dumps(task) + "\n")
    settings = ["dedup.preset=bigcode", f"decontaminate.against=['{folder / 'bench.jsonl'}']"]
    build_corpus([str(write_sources(root))], folder / "out", load_corpus_config(None, settings))
    return folder / "out"


def counts(fates: list[list[Any]], **more: Any) -> dict[str, Any]:
    """The counts of one shard, as opencoder.corpus.stages.output writes them, with these fates."""
    counters = ("tables", "table_bytes", "hits", "hit_bytes", "alone", "pii", "licences", "licence_sources")
    empty: dict[str, Any] = {name: {} for name in (*counters, "totals", "samples")}
    lists: dict[str, Any] = {name: [] for name in (*report.LISTS, "near")}
    return {"fates": fates, **empty, **lists, "left_out": dict.fromkeys(report.LISTS, 0), **more}


def assembled(shards: list[dict[str, Any]], *overrides: str) -> dict[str, Any]:
    """The report of these counts, with neither duplicates nor a build."""
    config = load_corpus_config(None, list(overrides))
    found = report.assemble(shards, CLUSTERS.empty_table(), config)
    return {**found, "timings": TIMINGS}


def nothing() -> dict[str, Any]:
    """The report of no files."""
    return assembled([counts([])])


def many() -> dict[str, Any]:
    """600 languages, a reason each, a trillion files, and lists that overflow."""
    fates: list[list[Any]] = []
    for i in range(600):
        name = f"language number {i} {'of a long name ' * (i % 3)}"
        fates += [
            ["kept", "", "", name, 10**9 + i, 10**15],
            ["dropped", "rules", f"reason_{i}", name, 10**6 * (600 - i), 10**12],
        ]
    failures = [{"path": f"{LONG}/{i}", "reason": "x" * 500} for i in range(1000)]
    return assembled([counts(fates, failures=failures, left_out={**dict.fromkeys(report.LISTS, 0), "failures": 7})] * 2)
