"""`opencoder train-tokenizer`: a byte-level BPE tokenizer from documents."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from opencoder.console import Parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Train and write a Hugging Face tokenizer folder."""
    parser = Parser("train-tokenizer", "Train a byte-level BPE tokenizer with OpenCoder's special tokens.")
    parser.add_argument(
        "--input", nargs="+", required=True, help="parquet or jsonl(.gz, .zst) files, or folders of them"
    )
    parser.add_argument("--output", required=True, help="folder to write; transformers' AutoTokenizer loads it")
    parser.add_argument("--vocab-size", type=int, required=True, help="entries, special tokens included")
    parser.add_argument("--column", default="text", help="column or key that holds the text")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from opencoder.data import tokenizer
    from opencoder.data.documents import find_files

    texts = tokenizer.texts_of(find_files(args.input), args.column)
    trained = tokenizer.train(texts, vocab_size=args.vocab_size, show_progress=sys.stderr.isatty())
    tokenizer.save(trained, args.output)
    print(f"wrote {args.output}: {trained.get_vocab_size()} entries")
    return 0


if __name__ == "__main__":
    run(main)
