"""`opencoder preprocess`: documents to a tokenised .bin/.idx dataset."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from opencoder.console import Parser, run
from opencoder.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Tokenise and print what was written."""
    parser = Parser("preprocess", "Tokenise documents into PREFIX.bin and PREFIX.idx (Megatron's format).")
    parser.add_argument(
        "--input", nargs="+", required=True, help="parquet or jsonl(.gz, .zst) files, or folders of them"
    )
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--output-prefix", required=True, help="PREFIX of the files to write")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--fim-rate", type=float, default=0.0, help="share of documents cut for fill-in-the-middle")
    parser.add_argument("--column", default="text", help="column or key that holds the text")
    parser.add_argument("--no-append-eod", action="store_true", help="do not end documents with the eos token")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the fill-in-the-middle draws")
    backends = ("auto", "tokenizers", "gigatoken")
    parser.add_argument("--backend", choices=backends, default="auto", help="auto: gigatoken if installed and equal")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset made with other parameters")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.workers < 1:
        raise UserError(f"--workers {args.workers} must be at least 1")

    from opencoder.data.preprocess import Job, preprocess

    job = Job(tuple(args.input), args.tokenizer, args.column, not args.no_append_eod, args.fim_rate, args.seed)
    done = preprocess(job, args.output_prefix, workers=args.workers, backend=args.backend, overwrite=args.overwrite)
    empty = f", {done['empty_documents']} of them empty" if done["empty_documents"] else ""
    print(f"{args.output_prefix}: {done['documents']} documents{empty}, {done['tokens']:,} tokens")
    return 0


if __name__ == "__main__":
    run(main)
