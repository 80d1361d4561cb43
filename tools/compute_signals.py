"""`opencoder compute-signals`: every quality signal and verdict of each file, as a Parquet table; nothing is removed."""

from __future__ import annotations

import os
from collections.abc import Sequence

from opencoder.console import Parser, run
from opencoder.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table and print how many files would be kept."""
    parser = Parser("compute-signals", "Quality signals and verdicts per file; docs/rules.md explains them.")
    parser.add_argument("--input", nargs="+", required=True, help="folders, files, jsonl(.gz, .zst) or parquet")
    parser.add_argument("--output", required=True, metavar="FILE.parquet", help="table to write")
    parser.add_argument("--compat", action="store_true", help="behave as the published filter, defects included")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise UserError(f"--workers {args.workers} must be at least 1")
    if not args.output.endswith(".parquet"):
        raise UserError(f"--output {args.output} must be a file name that ends in .parquet")
    if os.path.isdir(args.output):
        raise UserError(f"--output {args.output} is a folder: name a file in it")

    from opencoder.config import load_corpus_config
    from opencoder.corpus.signal_table import write_signals

    counts = write_signals(args.input, args.output, load_corpus_config(), compat=args.compat, workers=args.workers)
    print(
        f"{counts.files:,} files: {counts.kept:,} kept, {counts.dropped:,} dropped "
        f"({counts.without_signals:,} of them without signals), {counts.errors:,} with errors"
    )
    print(f"table: {args.output}")
    return 0


if __name__ == "__main__":
    run(main)
