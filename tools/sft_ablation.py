"""`opencoder sft-ablation`: stage 1, stage 1 then 2, or both mixed; held-out answer loss of each."""

from __future__ import annotations

import logging
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opencoder.console import Parser, run
from opencoder.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the arms that are not done, print the table."""
    parser = Parser("sft-ablation", "Tune a small model in stages and mixed, on conversations made of real code.")
    parser.add_argument("--model", required=True, help="run, checkpoint or Hugging Face folder, with its tokenizer")
    parser.add_argument("--output", required=True, help="folder of everything the ablation makes")
    parser.add_argument("--input", nargs="+", help="Python code (default: this interpreter's standard library)")
    parser.add_argument("--broad", type=int, default=1500, help="conversations of the broad set, at most")
    parser.add_argument("--practical", type=int, default=700, help="conversations of the practical set, at most")
    parser.add_argument("--held-out", type=int, default=200, help="conversations of each set that are measured on")
    parser.add_argument("--epochs", type=int, default=3, help="of the practical set; the broad one is read once")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--batch", type=int, default=8, help="samples per update")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of every arm")
    parser.add_argument("--threads", type=int, help="CPU threads of training (default: all cores)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not Path(args.model).is_dir():
        raise UserError(f"--model {args.model} is not a folder")
    if min(args.broad, args.practical, args.held_out, args.epochs, args.batch) < 1:
        raise UserError("--broad, --practical, --held-out, --epochs and --batch must be at least 1")

    from opencoder.posttrain.ablation import Ablation, Setting

    inputs = tuple(args.input or [sysconfig.get_paths()["stdlib"]])
    sizes = {"broad": args.broad, "practical": args.practical, "held_out": args.held_out, "epochs": args.epochs}
    setting = Setting(
        args.model, inputs, **sizes, seq_len=args.seq_len, batch=args.batch, lr=args.lr, threads=args.threads
    )
    start = time.monotonic()
    print(table(Ablation(setting, args.output).run()))
    print(f"{args.output}/ablation.json, ablation.png; {time.monotonic() - start:.0f} s")
    return 0


def table(result: dict[str, Any]) -> str:
    """Held-out answer loss of each arm on each set."""
    lines = [f"{'held-out answer loss':<20}  {'broad':>8}  {'practical':>10}  {'updates':>8}"]
    for arm, losses in result["held_out_answer_loss"].items():
        steps = result["steps"].get(arm, 0)
        lines.append(f"{arm:<20}  {losses['broad']:>8.4f}  {losses['practical']:>10.4f}  {steps:>8}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
