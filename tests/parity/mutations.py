"""Does the matrix notice faults? `python -m tests.parity.mutations [NAME…]` puts each fault of faults.py into the ranks of one
layout, and prints by which quantity it was found out.

Exit status 1 if a fault is not noticed, if one was never reached, or if a layout fails without a fault."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import NamedTuple

from tests.harness import RankError, run_cases, run_ranks
from tests.parity.cases import CASES, Case
from tests.parity.faults import FAULTS
from tests.parity.patches import Patches
from tests.parity.update import TOLERANCE, Outcome, errors, one_update, save_truth, worst_of

CONTROL = "no fault"


class Verdict(NamedTuple):
    """What came of one fault."""

    reached: bool
    wrong: dict[str, float]
    """Quantities beyond the tolerance, with their errors."""
    seconds: float
    raised: str = ""
    """The last line of an error: a fault must be silent, so it no longer fits the code it was written for."""


def _with_fault(rank: int, world: int, name: str, case: Case, file: str) -> tuple[int, dict[str, float]]:
    import torch

    patches = Patches()
    if name != CONTROL:
        FAULTS[name].apply(patches)
    truth = Outcome(**torch.load(file, mmap=True, weights_only=False))
    found = errors(one_update(rank, world, case), truth)
    return patches.reached, found


def try_fault(name: str, layout: str, file: str, keys: set[str]) -> Verdict:
    """Run `layout` with the fault `name` in every rank, and compare with the truth in `file`."""
    start = time.monotonic()
    try:
        ranks = run_ranks(_with_fault, CASES[layout].world, name, CASES[layout], file)
    except RankError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Verdict(False, {}, time.monotonic() - start, raised=lines[-1].strip())
    found = worst_of([errors for _, errors in ranks], keys)
    wrong = {key: error for key, error in found.items() if error > TOLERANCE}
    return Verdict(any(reached for reached, _ in ranks), wrong, time.monotonic() - start)


def run_faults(names: list[str], *, control: bool = True) -> dict[tuple[str, str], Verdict]:
    """(fault, layout) → verdict. `control`: the layouts they need come first, without a fault."""
    layouts = list(dict.fromkeys(FAULTS[name].layout for name in names))
    truths = {layout: CASES[layout].truth for layout in layouts}
    with tempfile.TemporaryDirectory() as folder:
        files = {layout: os.path.join(folder, layout) for layout in layouts}
        keys = run_cases(save_truth, 1, {layout: (truths[layout], files[layout]) for layout in layouts})
        pairs = [(CONTROL, layout) for layout in layouts if control]
        pairs += [(name, FAULTS[name].layout) for name in names]
        return {(name, layout): try_fault(name, layout, files[layout], set(keys[layout][0])) for name, layout in pairs}


def survivors(verdicts: dict[tuple[str, str], Verdict]) -> list[str]:
    """What is not as it must be, one line each."""
    found = []
    for (name, layout), verdict in verdicts.items():
        if verdict.raised:
            found.append(f"{name}: raised at {layout}: {verdict.raised}")
        elif name == CONTROL:
            found += [f"{layout} fails without a fault: {list(verdict.wrong)[:3]}"] if verdict.wrong else []
        elif not verdict.reached:
            found.append(f"{name}: never reached at {layout}")
        elif not verdict.wrong:
            found.append(f"{name}: not noticed at {layout}")
    return found


def main(names: list[str]) -> int:
    """Print the table; the exit status."""
    unknown = [name for name in names if name not in FAULTS]
    if unknown:
        print(f"no fault {unknown[0]!r}; there are:\n  " + "\n  ".join(FAULTS), file=sys.stderr)
        return 2
    verdicts = run_faults(names or list(FAULTS))
    print(
        f"bar {TOLERANCE:.0e}\n{'fault':66} {'layout':20} {'caught':6} {'s':>4}  wrong: how many, numbers, worst tensor"
    )
    for (name, layout), verdict in verdicts.items():
        numbers = [key for key in verdict.wrong if " " not in key]
        tensors = [key for key in verdict.wrong if " " in key]
        told = [
            f"{key} {verdict.wrong[key]:.0e}"
            for key in (*numbers, *sorted(tensors, key=lambda k: -verdict.wrong[k])[:1])
        ]
        caught = "-" if name == CONTROL else "yes" if verdict.wrong and verdict.reached else "NO"
        print(f"{name:66} {layout:20} {caught:6} {verdict.seconds:4.1f}  {len(verdict.wrong)}: {', '.join(told)}")
    problems = survivors(verdicts)
    print(
        f"{len([1 for name, _ in verdicts if name != CONTROL])} faults, {len(problems)} problems", *problems, sep="\n  "
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
