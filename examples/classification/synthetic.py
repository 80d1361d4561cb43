"""Siblings of any number of classes as datasets: DIR/train and DIR/held_out, and DIR/classes.yaml that trains on them.

python examples/classification/synthetic.py --output DIR --classes 1e6 --samples 2e6
opencoder train DIR/classes.yaml [model.head.selection=full]"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from run import OPTIM

from opencoder.console import Parser, ProgressBar, run
from opencoder.data.classification_writer import ClassificationWriter
from opencoder.errors import UserError
from opencoder.files import write_text
from opencoder.tools.class_bench.synthetic import Siblings

BLOCK = 1 << 14
HELD_OUT_FROM = 2**40
"""Numbers of held-out samples begin here: no number of training samples comes so far."""
BATCH = 256
KNN_UP_TO = 200_000
"""Classes. The graph of more takes a few cores longer than the training: their configuration has random rows."""


def write(made: Siblings, prefix: Path, first: int, samples: int) -> None:
    """Samples `first` to `first + samples` as the dataset `prefix`, block after block."""
    with (
        ClassificationWriter(prefix, "features", classes=made.classes, width=made.dim, dtype="float16") as writer,
        ProgressBar(prefix.name, total=samples, unit="samples") as bar,
    ):
        for begin in range(0, samples, BLOCK):
            numbers = np.arange(first + begin, first + min(begin + BLOCK, samples))
            writer.add_features(*made.samples(numbers))
            bar.advance(len(numbers))


def config_of(output: Path, made: Siblings, steps: int, held_out: int) -> dict[str, Any]:
    """The configuration of one pass over the samples."""
    steps = max(20, steps)
    head: dict[str, Any] = {"selection": "random"}
    if made.classes <= KNN_UP_TO:
        rebuild = {"first_step": steps // 8, "every": steps // 4, "background": False, "probe_recall": 0.0}
        head = {"selection": "knn", "neighbours": min(32, made.classes), "rebuild": rebuild}
    return {
        "run_dir": str(output / "run"),
        "model": {
            "layers": 1, "hidden_size": made.dim, "encoder": {"input": "features", "width": made.dim},
            "head": {
                "kind": "class", "classes": made.classes, "variant": "cosine", "scale": 20.0, "optimizer": "sgd", "rho": 0.1,
                "tail_correction": True, **head,
            },
        },
        "data": {
            "kind": "classification", "blend": [{"prefix": str(output / "train")}], "validation": str(output / "held_out"),
        },
        "train": {
            "steps": steps, "global_batch_size": BATCH, "micro_batch_size": BATCH, "eval_every": steps,
            "eval_samples": held_out,
        },
        "optim": OPTIM,
        "log": {"every": max(1, steps // 20)},
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Write both datasets and a configuration."""
    parser = Parser("classification: synthetic.py", "Classes in groups of similar ones, of any number.")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--classes", type=float, default=1e5, help="number of classes")
    parser.add_argument("--dim", type=int, default=64, help="numbers of a sample")
    parser.add_argument("--samples", type=float, default=1e6, help="for training")
    parser.add_argument("--held-out", type=float, default=2e4, help="samples held out")
    parser.add_argument("--zipf", action="store_true", help="labels as frequent as 1/rank")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    args = parser.parse_args(argv)
    if min(args.samples, args.held_out) < 1:
        raise UserError(f"--samples {args.samples:g} --held-out {args.held_out:g}: at least one of each")
    made = Siblings(int(args.classes), args.dim, zipf=args.zipf, seed=args.seed)
    write(made, args.output / "train", 0, int(args.samples))
    write(made, args.output / "held_out", HELD_OUT_FROM, int(args.held_out))
    tree = config_of(args.output, made, int(args.samples) // BATCH, int(args.held_out))
    write_text(args.output / "classes.yaml", yaml.safe_dump(tree, sort_keys=False))
    print(f"{args.output}: {made.classes:,} classes; opencoder train {args.output / 'classes.yaml'}")
    return 0


if __name__ == "__main__":
    run(main)
