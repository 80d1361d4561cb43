"""Prints the largest errors of every layout against one process: `python -m tests.parity.run [NAME…]`."""

from __future__ import annotations

import sys

from tests.parity.cases import CASES
from tests.parity.update import run_all


def main(names: list[str]) -> None:
    """Print the tables."""
    table = run_all({name: case for name, case in CASES.items() if not names or name in names})
    print(f"{'layout':22} {'loss':>9} {'norm':>9} {'clip':>9} {'evaluation':>10}  worst gradient")
    for name, found in table.items():
        key = max((k for k in found if k.startswith("gradient ")), key=found.__getitem__)
        numbers = " ".join(f"{found[k]:9.1e}" for k in ("loss", "norm", "clip"))
        print(f"{name:22} {numbers} {found['evaluation']:10.1e}  {found[key]:.1e} {key.removeprefix('gradient ')}")


if __name__ == "__main__":
    main(sys.argv[1:])
