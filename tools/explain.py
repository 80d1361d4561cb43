"""`opencoder explain`: why one file was kept or dropped."""

from __future__ import annotations

from collections.abc import Sequence

from opencoder.console import Parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Print the verdict: stage, rule, value, threshold, cluster."""
    parser = Parser("explain", "Say why a file of a corpus was kept or dropped.")
    parser.add_argument("corpus", help="--output folder of build-corpus")
    parser.add_argument("file", help="path as in the corpus, or the SHA-256 of its bytes")
    args = parser.parse_args(argv)

    from opencoder.corpus.explain import explain

    print(explain(args.corpus, args.file))
    return 0


if __name__ == "__main__":
    run(main)
