"""`opencoder export-classes`: a checkpoint with a class head as a folder that `retrieve` and faiss search in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opencoder.console import Parser, run
from opencoder.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Export one checkpoint; prints what was written."""
    parser = Parser(
        "export-classes", "Write the encoder and the class matrix of a checkpoint as a folder to search in."
    )
    parser.add_argument("--input", required=True, help="checkpoint folder or run folder (its latest)")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--shard-mib", type=int, default=1024, help="largest safetensors file of the class matrix")
    args = parser.parse_args(argv)
    if not Path(args.input).is_dir():
        raise UserError(f"--input {args.input} is not a folder")
    if args.shard_mib < 1:
        raise UserError(f"--shard-mib {args.shard_mib} must be at least 1")

    from opencoder.checkpoint.class_export import export_classes

    facts = export_classes(args.input, args.output, shard_bytes=args.shard_mib << 20)
    print(f"wrote {args.output}: {facts['classes']:,} classes of width {facts['dim']}, of step {facts['step']}")
    return 0


if __name__ == "__main__":
    run(main)
