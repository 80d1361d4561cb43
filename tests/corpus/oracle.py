"""The answers of the published filter on real files (oracle_files), compared with ours: `python -m tests.corpus.oracle` prints
the agreement per signal, with --default what the default mode changes."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from opencoder.config import load_corpus_config
from opencoder.corpus import rules, signals
from opencoder.corpus.signal_table import signal_names, write_signals

from . import oracle_files

TOLERANCE = 1e-6


@dataclass
class Agreement:
    """How far ours and the published answers agree."""

    files: Counter[str] = field(default_factory=Counter)
    """Files per signal."""
    wrong: dict[str, list[tuple[str, float | None, float | None]]] = field(default_factory=lambda: defaultdict(list))
    """Per signal: path, ours, theirs."""
    verdicts: int = 0
    wrong_verdicts: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    """Paths whose language or doc type differs."""


def compare(table: Path) -> Agreement:
    """Agreement of a table written in compat mode. Only signals that this version has are looked at, and the verdict is that
    of their rules without a random draw."""
    result = Agreement()
    ours = {row["path"]: row for row in pq.read_table(table).to_pylist()}
    random = {rule.published(group) for rule in rules.load_rules() if rule.probability < 1 for group in rule.groups}
    for truth in oracle_files.truths():
        row = ours[truth["path"]]
        if (row["language"], row["doc_type"]) != (truth["program_lang"], truth["doc_type"]):
            result.languages.append(truth["path"])
            continue
        known: set[str] = set()
        if row["doc_type"] in ("code", "data", "text"):
            known = {name for group in signals.groups(row["doc_type"], row["language"]) for name in group}
        for name in known & set(truth["signals"]):
            a, b = row[name], truth["signals"][name]
            result.files[name] += 1
            if (a is None) != (b is None) or (a is not None and abs(a - float(b)) > TOLERANCE):
                result.wrong[name].append((truth["path"], a, b))
        judged = known - random
        theirs = {name for name, hit in truth["hits"].items() if hit} & judged
        result.verdicts += 1
        if bool(set(row["hits"]) & judged) != bool(theirs) or (
            not known and row["keep"] != (truth["effective"] == "1")
        ):
            result.wrong_verdicts.append(truth["path"])
    return result


def report(found: Agreement) -> str:
    """The agreement as a table."""
    lines = []
    for name in sorted(found.files, key=lambda n: (-len(found.wrong[n]) / found.files[n], n)):
        wrong, files = len(found.wrong[name]), found.files[name]
        lines.append(f"{name:<52}{files:>6} files {wrong:>4} off {1 - wrong / files:>10.3%}")
    pairs, off = sum(found.files.values()), sum(map(len, found.wrong.values()))
    lines.append(f"{len(found.files)} signals, {pairs:,} pairs, {off} off: {1 - off / pairs:.4%}")
    wrong_verdicts = len(found.wrong_verdicts)
    lines.append(f"{found.verdicts:,} verdicts, {wrong_verdicts} off: {1 - wrong_verdicts / found.verdicts:.3%}")
    return "\n".join(lines)


def run(workers: int = 1) -> Agreement:
    """Compute and compare."""
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch) / "signals.parquet"
        write_signals(
            [str(oracle_files.unpack(Path(scratch)))], table, load_corpus_config(), compat=True, workers=workers
        )
        return compare(table)


def effects() -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """What the default mode changes: signal → (files whose value differs from compat mode's, files whose hit does), and
    counts of files by what happens to their verdict and language. Rules that draw do so alike in both modes."""
    with tempfile.TemporaryDirectory() as scratch:
        corpus, rows = str(oracle_files.unpack(Path(scratch))), []
        for compat in (True, False):
            table = Path(scratch) / "signals.parquet"
            write_signals([corpus], table, load_corpus_config(), compat=compat)
            rows.append({row["path"]: row for row in pq.read_table(table).to_pylist()})
    changed: dict[str, tuple[int, int]] = {}
    pairs = [(row, rows[1][path]) for path, row in rows[0].items()]
    same = [(a, b) for a, b in pairs if (a["language"], a["doc_type"]) == (b["language"], b["doc_type"])]
    for name in signal_names():
        values = sum(a[name] != b[name] for a, b in same)
        hits = sum((name in a["hits"]) != (name in b["hits"]) for a, b in same)
        if values or hits:
            changed[name] = (values, hits)
    verdicts = {
        "files": len(pairs),
        "of another language": len(pairs) - len(same),
        "dropped in compat mode, kept in default mode": sum(b["keep"] and not a["keep"] for a, b in pairs),
        "kept in compat mode, dropped in default mode": sum(a["keep"] and not b["keep"] for a, b in pairs),
        "with errors in default mode": sum(bool(b["errors"]) for _, b in pairs),
    }
    return changed, verdicts


def main() -> None:
    """Print agreement, or with --default what the default mode changes."""
    if oracle_files.folder() is None:
        sys.exit(f"no oracle: set OPENCODER_ORACLE to the folder that holds {oracle_files.ANSWERS}")
    if "--default" in sys.argv:
        changed, verdicts = effects()
        for name, (values, hits) in changed.items():
            print(f'    "{name}": ({values}, {hits}),')
        for what, count in verdicts.items():
            print(f'    "{what}": {count},')
        return
    found = run()
    print(report(found))
    for name, wrong in found.wrong.items():
        for path, ours, theirs in wrong[:3]:
            print(f"  {name} {path}: {ours} instead of {theirs}")


if __name__ == "__main__":
    main()
