"""`opencoder preprocess-sft`: conversations to a tuning dataset."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from opencoder.console import Parser, run
from opencoder.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Encode and print what was written, what was left out and how well it packs."""
    parser = Parser("preprocess-sft", "Conversations to PREFIX.bin, .idx and .mask for data.kind=sft (ChatML).")
    parser.add_argument(
        "--input", nargs="+", required=True, help="jsonl(.gz, .zst) or parquet files, or folders of them"
    )
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--output-prefix", required=True, help="PREFIX of the files to write")
    parser.add_argument("--seq-len", type=int, default=4096, help="places of a sample: data.seq_len of the run")
    parser.add_argument(
        "--on-long",
        choices=["cut", "drop"],
        default="cut",
        help="a longer conversation: cut after an answer, or drop it",
    )
    parser.add_argument(
        "--learn", choices=["all", "last"], default="all", help="every answer of a conversation, or the last"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first row that cannot be learned from")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.workers < 1:
        raise UserError(f"--workers {args.workers} must be at least 1")

    from opencoder.posttrain.preprocess import Job, preprocess_sft

    job = Job(tuple(args.input), args.tokenizer, args.seq_len, args.on_long, args.learn, args.strict)
    print(summary(args.output_prefix, preprocess_sft(job, args.output_prefix, workers=args.workers)))
    return 0


def summary(prefix: str, done: dict[str, Any]) -> str:
    """The report in lines."""
    lengths, packing, long = done["lengths"], done["packing"], done["longer_than_context"]
    lines = [
        f"{prefix}: {done['documents']:,} conversations of {done['rows']:,} rows, {done['answers']:,} answers, {done['tokens']:,} "
        f"tokens, {done['learned_tokens']:,} of them targets",
        f"tokens of a conversation: median {lengths['median']}, mean {lengths['mean']:.1f}, 90 % {lengths['p90']}, 99 % "
        f"{lengths['p99']}, most {lengths['most']}",
        f"longer than {packing['seq_len']}: {long['long']:,}, of which {long['cut']:,} cut after an answer, "
        f"{long['dropped']:,} dropped",
        f"packing: {packing['rows']:,} samples of {packing['seq_len']}, {packing['conversations_per_row']:.2f} "
        f"conversations in each, {packing['efficiency']:.2%} of the places used",
    ]
    if not done["chat_template"]:
        lines.append("the tokenizer has no chat template: transformers will not know how to ask the tuned model")
    for kind, n in done["problems"].items():
        if n:
            first = done["problems_told"][kind]
            lines.append(f"left out: {kind} {n:,}; the first: {first[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
