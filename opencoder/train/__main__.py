"""`opencoder train CONFIG [key=value…]`, and `torchrun … -m opencoder.train CONFIG …` for many processes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from opencoder.config import data_parallel_size, load_config, validate
from opencoder.console import Parser, run
from opencoder.errors import ConfigError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Train, resume, or check a configuration. Returns the exit status."""
    parser = Parser("train", "Train a model. A run that was interrupted goes on from its newest checkpoint.")
    parser.add_argument("config", help="YAML file; see examples/ and opencoder/config.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. optim.lr=1e-4")
    parser.add_argument("--dry-run", action="store_true", help="check the configuration, print sizes, memory, traffic")
    parser.add_argument("--world-size", type=int, help="processes that --dry-run assumes (default: those running)")
    args = parser.parse_intermixed_args(argv)  # options and overrides in any order
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load_config(args.config, args.overrides)

    from .environment import environment, restarts_left, world_size

    if args.world_size is not None and not args.dry_run:
        raise ConfigError("--world-size belongs to --dry-run: start real processes with torchrun --nproc-per-node")
    if args.world_size is not None and args.world_size < 1:
        raise ConfigError(f"--world-size={args.world_size} must be at least 1")
    size = args.world_size or world_size()
    validate(config, size)
    if args.dry_run:
        from .estimate import describe

        print(describe(config, size))
        return 0

    from .class_loop import ClassTrainer
    from .loop import Trainer
    from .memory_check import check_memory

    try:
        with environment(config) as (mesh, device):
            if mesh.world.rank == 0:
                print(f"dp = {data_parallel_size(config, size)}", flush=True)
            check_memory(config, mesh, device)
            kind = ClassTrainer if config.model.head.kind == "class" else Trainer
            kind(config, mesh, device).run()
    except UserError as error:
        if (left := restarts_left()) and not error.told_elsewhere:
            print(
                f"hint: torchrun starts this {left} more times, in vain: stop it and mend what follows",
                file=sys.stderr,
            )
        raise
    return 0


if __name__ == "__main__":
    run(main)
