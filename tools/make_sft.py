"""`opencoder make-sft`: conversations out of real Python code."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opencoder.console import Parser, run
from opencoder.errors import Failure, UserError
from opencoder.files import atomic_open, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Write broad.jsonl and practical.jsonl, each with a held-out part, and report.json."""
    parser = Parser(
        "make-sft", "Conversations from Python functions with docstrings: to write, explain, complete and name them."
    )
    parser.add_argument(
        "--input", nargs="+", help="Python files or folders (default: this interpreter's standard library)"
    )
    parser.add_argument("--output", required=True, help="folder of the jsonl files")
    parser.add_argument("--least-lines", type=int, default=3, help="lines of a function, docstring not counted")
    parser.add_argument("--most-lines", type=int, default=30, help="the same, at most")
    parser.add_argument(
        "--most-characters", type=int, default=1200, help="of a function, and of its docstring, at most"
    )
    args = parser.parse_args(argv)
    if not 1 <= args.least_lines <= args.most_lines:
        raise UserError(f"--least-lines {args.least_lines} must be between 1 and --most-lines {args.most_lines}")

    from opencoder.posttrain.from_code import Limits, make_sets

    limits = Limits(args.least_lines, args.most_lines, most_characters=args.most_characters)
    inputs = [Path(path) for path in args.input or [sysconfig.get_paths()["stdlib"]]]
    sets, counts = make_sets(inputs, limits)
    if not counts["taken"]:
        raise Failure(f"none of {counts['functions']} functions passes the filters: {counts}")
    for name, rows in sets.items():
        write_rows(Path(args.output) / f"{name}.jsonl", rows)
    report = {"counts": counts, "rows": {name: len(rows) for name, rows in sets.items()}}
    write_json(Path(args.output) / "report.json", report)
    print(f"{counts['files']:,} files, {counts['functions']:,} functions, {counts['taken']:,} taken")
    print(", ".join(f"{name}.jsonl {len(rows):,} rows" for name, rows in sets.items()))
    return 0


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """As jsonl."""
    with atomic_open(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run(main)
