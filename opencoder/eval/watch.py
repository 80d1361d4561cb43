"""Evaluates each checkpoint of a run as it appears."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opencoder.checkpoint import folders
from opencoder.errors import Failure, UserError
from opencoder.files import write_json

TRIES = 3
"""Times that a checkpoint whose evaluation fails is taken up again."""


def watch(
    run_dir: str | Path,
    output: str | Path,
    evaluate: Callable[[Path, Path], dict[str, Any]],
    *,
    interval_s: float = 30.0,
    until_step: int | None = None,
    once: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Call `evaluate(checkpoint, output/step_…)` for each checkpoint that has no results yet, oldest first, and keep `curve.json`:
    the results by step. Ends after `until_step`, or with `once` when nothing is left. Returns 1 if one could not be evaluated.

    Checkpoints appear whole (they are renamed when written); one that the run removes meanwhile is passed over."""
    run_dir, output = Path(run_dir), Path(output)
    if not run_dir.is_dir():
        raise UserError(f"--watch {run_dir} is not a folder: give the run folder")
    tries: dict[str, int] = {}
    while True:
        found = sorted(folders.list_checkpoints(run_dir), key=folders.step_of)
        todo = [f for f in found if not _done(output, f) and tries.get(f.name, 0) < TRIES]
        for folder in todo:
            tries[folder.name] = tries.get(folder.name, 0) + 1
            try:
                results = evaluate(folder, output / folder.name)
            except (Failure, UserError, OSError) as error:
                if folder.is_dir():
                    print(f"{folder.name}: not evaluated: {error}", file=sys.stderr, flush=True)
                else:
                    tries[folder.name] = TRIES  # removed meanwhile
                continue
            write_json(output / folder.name / "results.json", results)
            _write_curve(output)
        last = max((folders.step_of(f) for f in found if _done(output, f)), default=-1)
        if (until_step is not None and last >= until_step) or (once and not _left(output, found, tries)):
            return int(any(not _done(output, f) for f in found))
        if not todo:
            sleep(interval_s)


def _done(output: Path, folder: Path) -> bool:
    return (output / folder.name / "results.json").is_file()


def _left(output: Path, found: list[Path], tries: dict[str, int]) -> bool:
    return any(not _done(output, f) and tries.get(f.name, 0) < TRIES for f in found)


def _write_curve(output: Path) -> None:
    import json

    steps = sorted((p.parent for p in output.glob("step_*/results.json")), key=lambda p: folders.step_of(p))
    rows = []
    for folder in steps:
        results = json.loads((folder / "results.json").read_text())
        scores = {f"{name} {k}": v for name, r in results.items() if "pass" in r for k, v in r["pass"].items()}
        losses = {f"{name} loss": r["all"]["loss"] for name, r in results.items() if "all" in r}
        rows.append({"step": folders.step_of(folder), **scores, **losses})
    write_json(output / "curve.json", rows)
