"""`opencoder convert`: checkpoints to and from Hugging Face format.

An export may run on several processes, each of which writes its share of the files:
`torchrun --nproc-per-node 4 -m opencoder.tools.convert_checkpoint --from native --to hf …`"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from opencoder.console import Parser, run
from opencoder.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Convert one checkpoint; prints the folder written."""
    parser = Parser("convert", "Convert a checkpoint between the native and the Hugging Face format (Llama shapes).")
    formats = ("hf", "native")
    parser.add_argument("--from", dest="source_format", choices=formats, required=True, help="format of --input")
    parser.add_argument("--to", dest="target_format", choices=formats, required=True, help="format of --output")
    parser.add_argument("--input", required=True, help="checkpoint folder, run folder (its latest) or HF folder")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--dtype", choices=("fp64", "fp32", "bf16", "fp16"), help="type of exported HF weights")
    args = parser.parse_args(argv)
    if args.source_format == args.target_format:
        raise UserError(f"--from and --to are both {args.source_format}: one must be hf and the other native")
    if not Path(args.input).is_dir():
        raise UserError(f"--input {args.input} is not a folder")

    if args.target_format == "hf":
        _export(args)
        return 0
    if args.dtype is not None:
        raise UserError("--dtype is for export to hf; an import keeps the type of the tensors")

    from opencoder.checkpoint import hf
    from opencoder.train.environment import world_size

    if world_size() > 1:
        raise UserError(f"an import runs in one process, not in {world_size()}: start it without torchrun")
    print(f"wrote {hf.import_(args.input, args.output)}")
    return 0


def _export(args: Namespace) -> None:
    from opencoder.checkpoint import hf_export
    from opencoder.parallel.group import Records, processes, world_group
    from opencoder.train.environment import START_UP_S, world_size

    with processes("cpu", size=world_size(), timeout_s=START_UP_S):
        world = world_group(Records())
        written = hf_export.export(args.input, args.output, dtype=args.dtype, world=world)
        if world.rank == 0:
            print(f"wrote {written}")


if __name__ == "__main__":
    run(main)
