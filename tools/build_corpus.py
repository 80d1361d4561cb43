"""`opencoder build-corpus`: sources to clean and dropped documents with a report."""

from __future__ import annotations

import os
from collections.abc import Sequence

from opencoder.console import Parser, run
from opencoder.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Build and print the funnel."""
    parser = Parser("build-corpus", "Clean and dedupe source files; an interrupted build goes on where it stopped.")
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="folders, files, archives, git repositories, jsonl(.gz, .zst), parquet, or URLs of them (docs/sources.md)",
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--config", help="YAML file; keys in opencoder/corpus_config.py")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument(
        "--keep-work", action="store_true", help="keep the tasks' files: a later build does only what changed"
    )
    parser.add_argument(
        "--verify", action="store_true", help="hash sources and earlier results instead of trusting size and time"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus made with other parameters")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. dedup.preset=bigcode")
    args = parser.parse_intermixed_args(argv)  # options and overrides in any order
    # `--input A B key=value`: argparse hands the overrides to --input, which takes as many words as it can get.
    overrides = [*args.overrides, *(p for p in args.input if "=" in p and "://" not in p and not os.path.lexists(p))]
    inputs = [p for p in args.input if p not in overrides]
    if args.workers < 1:
        raise UserError(f"--workers {args.workers} must be at least 1")
    if not inputs:
        raise UserError("--input names no file or folder")

    from opencoder.config import load_corpus_config
    from opencoder.corpus.build import build_corpus

    config = load_corpus_config(args.config, overrides)
    report = build_corpus(
        inputs, args.output, config, workers=args.workers, overwrite=args.overwrite, keep_work=args.keep_work,
        verify=args.verify,
    )  # fmt: skip
    for row in report["funnel"]:
        print(f"{row['stage']:<12} {row['files_in']:>9,} in {row['dropped']:>9,} dropped")
    counts = report["counts"]
    print(
        f"{counts['in']:,} in = {counts['kept']:,} kept + {counts['dropped']:,} dropped + {counts['failed']:,} failed"
    )
    print(f"report: {os.path.join(args.output, 'report.html')}")
    return 0


if __name__ == "__main__":
    run(main)
