"""Prints the largest errors of every layout against one process: `python -m tests.parity.run [NAME…]`; with `--product`, of
every combination of axes and schedules instead."""

from __future__ import annotations

import sys

from tests.parity.cases import CASES, product_of_axes
from tests.parity.steps import LAYOUTS, STEPS, run_steps
from tests.parity.update import run_all


def main(names: list[str]) -> int:
    """Print the tables; the exit status."""
    if names == ["--product"]:
        print_updates(run_all(product_of_axes()))
        return 0
    unknown = [name for name in names if name not in CASES and name not in LAYOUTS]
    if unknown:
        print(f"no layout {unknown[0]!r}; there are {', '.join([*CASES, *LAYOUTS])}", file=sys.stderr)
        return 2
    updates, runs = ({n: case for n, case in table.items() if not names or n in names} for table in (CASES, LAYOUTS))
    if updates:
        print_updates(run_all(updates))
    if runs:
        print_steps(*run_steps(runs))
    return 0


def print_updates(table: dict[str, dict[str, float]]) -> None:
    """Errors of one update."""
    print(f"{'layout':26} {'loss':>9} {'norm':>9} {'clip':>9} {'evaluation':>10}  worst gradient")
    for name, found in table.items():
        key = max((k for k in found if k.startswith("gradient ")), key=found.__getitem__)
        numbers = " ".join(f"{found[k]:9.1e}" for k in ("loss", "norm", "clip"))
        print(f"{name:26} {numbers} {found['evaluation']:10.1e}  {found[key]:.1e} {key.removeprefix('gradient ')}")


def print_steps(losses: list[float], table: dict[str, tuple[list[float], list[float]]]) -> None:
    """Errors of a short run."""
    print(f"\n{STEPS} steps, one process: loss {losses[0]:.4f} to {losses[-1]:.4f}")
    print(f"{'layout':26} {'loss, step 1':>12} {'last step':>9} {'largest':>9}  largest of the norm")
    for name, (loss, norm) in table.items():
        print(f"{name:26} {loss[0]:12.1e} {loss[-1]:9.1e} {max(loss):9.1e}  {max(norm):.1e}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
