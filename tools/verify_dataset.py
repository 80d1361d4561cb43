"""`opencoder verify-dataset`: integrity of a .bin/.idx dataset."""

from __future__ import annotations

from collections.abc import Sequence

from opencoder.console import Parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Exit 0 and print counts, or exit 1 and name the first fault."""
    parser = Parser("verify-dataset", "Check PREFIX.bin and PREFIX.idx from header to last token.")
    parser.add_argument("prefix", help="PREFIX of the dataset")
    args = parser.parse_args(argv)

    from opencoder.data.verify import verify_dataset

    facts = verify_dataset(args.prefix)
    print(f"{args.prefix}: sound; " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    return 0


if __name__ == "__main__":
    run(main)
