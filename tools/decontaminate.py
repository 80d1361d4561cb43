"""`opencoder decontaminate`: find the tasks of benchmarks in files of documents, and drop the documents that hold them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from opencoder.console import Parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Check, write matches (and what is clean), print the counts."""
    parser = Parser("decontaminate", "Find the tasks of benchmarks in documents: shared n-grams and entry-point names.")
    parser.add_argument("--input", nargs="+", required=True, help="parquet, jsonl(.gz, .zst), or folders of them")
    parser.add_argument(
        "--against", nargs="+", required=True, help="humaneval, or jsonl(.gz, .zst) with a task per line"
    )
    parser.add_argument("--output", required=True, help="folder; or, to list matches only, a file .jsonl or .parquet")
    parser.add_argument("--action", choices=["report", "drop"], default="report", help="drop: also write what is clean")
    parser.add_argument("--ngram", type=int, default=10, help="tokens that a document and a task must share in a row")
    parser.add_argument("--text-column", help="column with the text; default: `text`, else `content`")
    parser.add_argument(
        "--conversations",
        action="store_true",
        help="rows are conversations (`messages`, or `instruction` and `output`): every turn is searched, names wherever they stand",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of DecontaminateConfig, e.g. entry_points=word"
    )
    args = parser.parse_intermixed_args(argv)
    # As in build-corpus: a list option takes the overrides that follow it.
    taken = [p for p in (*args.input, *args.against) if "=" in p and not os.path.lexists(p)]
    overrides = [*args.overrides, *taken]

    from opencoder.config_loading import parse_tree, read_tree
    from opencoder.corpus.decontaminate_files import decontaminate_files
    from opencoder.corpus_config import DecontaminateConfig
    from opencoder.posttrain.conversations import text_of

    tree = read_tree(None, overrides)
    given = {"against": [p for p in args.against if p not in taken], "action": args.action, "ngram": args.ngram}
    if args.conversations:
        given["entry_points"] = "word"
    config = parse_tree(DecontaminateConfig, {**given, **tree})
    inputs = [p for p in args.input if p not in taken]
    text = {"text_of": text_of if args.conversations else None, "text_column": args.text_column}
    report = decontaminate_files(inputs, args.output, config, overwrite=args.overwrite, **text)
    looked_for, counts = report["looked_for"], report["counts"]
    for benchmark, tasks in looked_for["benchmarks"].items():
        found = sum(row["benchmark"] == benchmark for row in report["documents_by_task"])
        sides = report["documents_by_side"].get(benchmark, {})
        by_side = ", ".join(f"{side} {n}" for side, n in sides.items()) or "none"
        print(f"{benchmark}: {found} of {tasks} tasks found; documents by side: {by_side}")
    print(
        f"{counts['documents']:,} documents, {counts['contaminated']:,} with a match, {counts['kept']:,} kept; "
        f"{len(looked_for['names_not_specific'])} entry points are too common to look for"
    )
    print(f"matches: {args.output}")
    return 0


if __name__ == "__main__":
    run(main)
