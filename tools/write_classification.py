"""`opencoder write-classification`: labelled samples to a memory-mapped dataset (data.kind: classification)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from opencoder.console import Parser, run
from opencoder.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Write the dataset and print what is in it."""
    args = _parser().parse_args(argv)
    for name in ("classes", "seq_len", "vocab_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")

    from opencoder.data.classification_input import Asked, column_of, find_inputs, write_dataset

    files = find_inputs(args.input)
    asked = Asked(
        files,
        column=args.column or column_of(files[0]),
        label=args.label,
        classes=args.classes,
        tokenizer=args.tokenizer,
        seq_len=args.seq_len,
        vocab_size=args.vocab_size,
        dtype=args.dtype,
    )
    done = write_dataset(asked, args.output_prefix)
    inputs = f"features of width {done['longest']}"
    if done["kind"] == "tokens":
        inputs = f"{done['tokens']:,} tokens, at most {done['longest']} a sample"
    print(f"{args.output_prefix}: {done['samples']:,} samples, {done['classes']:,} classes, {inputs}")
    if missing := done["classes_without_samples"]:
        named = ", ".join(map(str, done["first_without_samples"]))
        print(f"warning: {missing:,} classes have no sample (the first are {named}): nothing teaches them")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "write-classification",
        "Write labelled samples (token ids, texts or features, each with a class) as a memory-mapped dataset.",
    )
    parser.add_argument("--input", nargs="+", required=True, help="parquet, jsonl(.gz, .zst) or npz files, or folders")
    parser.add_argument("--output-prefix", required=True, help="PREFIX of the files to write")
    parser.add_argument(
        "--column", choices=("tokens", "text", "features"), help="what samples are; default: what is there"
    )
    parser.add_argument("--label", default="label", help="column or key with the class, a whole number from 0")
    parser.add_argument("--classes", type=int, help="number of classes; default: the largest label and one")
    parser.add_argument("--tokenizer", help="tokenizer folder, for texts; its hash is kept")
    parser.add_argument("--seq-len", type=int, help="cut samples to so many tokens")
    parser.add_argument(
        "--vocab-size", type=int, help="ids are below this; default: the tokenizer's, or the largest id and one"
    )
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float32", help="how features are kept")
    return parser


if __name__ == "__main__":
    run(main)
