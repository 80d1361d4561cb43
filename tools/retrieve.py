"""`opencoder retrieve`: the classes that samples go with best, by the export of a class head."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opencoder.console import Parser, run
from opencoder.errors import UserError

if TYPE_CHECKING:
    import torch

    from opencoder.checkpoint.class_folder import ClassFolder


def main(argv: Sequence[str] | None = None) -> int:
    """Print the best classes of each query, best first."""
    args = _parser().parse_args(argv)
    if sum(given is not None for given in (args.query, args.query_file, args.features)) != 1:
        raise UserError("give the samples with exactly one of --query, --query-file and --features")

    from opencoder.checkpoint.class_folder import ClassFolder

    folder = ClassFolder(args.model)
    names = _names(args.names, folder.facts["classes"]) if args.names else None
    features = _features(folder, args)
    values, classes = folder.search(features, min(args.top, folder.facts["classes"]), backend=args.backend)
    for query, (logits, found) in enumerate(zip(values.tolist(), classes.tolist(), strict=True), 1):
        if args.json:
            row = {"query": query, "classes": found, "logits": logits}
            print(json.dumps(row | ({"names": [names[c] for c in found]} if names else {}), ensure_ascii=False))
            continue
        for place, (logit, c) in enumerate(zip(logits, found, strict=True), 1):
            print(f"query {query}  {place:>3}  class {c}  logit {logit:.4f}" + (f"  {names[c]}" if names else ""))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser("retrieve", "Find the classes that samples go with best, in a folder made by `export-classes`.")
    parser.add_argument("--model", required=True, help="folder made by export-classes")
    parser.add_argument("--query", nargs="+", metavar="TEXT", help="samples as texts")
    parser.add_argument(
        "--query-file", nargs="+", metavar="FILE", help="samples as the texts of files; -: standard input"
    )
    parser.add_argument(
        "--features", metavar="FILE.npy", help="samples as rows of numbers, for a model that takes those"
    )
    parser.add_argument("--top", type=int, default=5, help="classes to print of each")
    parser.add_argument("--names", metavar="FILE", help="names of the classes, one a line in their order")
    parser.add_argument(
        "--backend", choices=("torch", "faiss"), default="torch", help="what searches; both look at all rows"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object a query")
    return parser


def _features(folder: ClassFolder, args: argparse.Namespace) -> torch.Tensor:
    if args.features is not None:
        import numpy as np

        try:
            return folder.features_of_numbers(np.load(args.features, allow_pickle=False))
        except (OSError, EOFError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"--features {args.features} cannot be read: {error}") from error
    texts = args.query
    if texts is None:
        try:
            texts = [sys.stdin.read() if f == "-" else Path(f).read_text(encoding="utf-8") for f in args.query_file]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--query-file: {error}") from error
    return folder.features_of_tokens(folder.tokens_of(texts))


def _names(path: str, classes: int) -> list[str]:
    try:
        names = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--names {path} cannot be read: {error}") from error
    if len(names) != classes:
        raise UserError(f"--names {path} has {len(names)} lines, the model {classes} classes: give one a line")
    return names


if __name__ == "__main__":
    run(main)
