"""Going back after a row of updates that were left out (train.skip.on_stop=rewind), and the list of it, RUN/skipped/rewinds.json.

A row alone changes no weights, as its updates were never made. Going back mends what was wrong before it: state damaged in
memory, or with `train.skip.rewind_before` the updates that led there, whose batches are then left out too (as arXiv:2204.02311,
section 5.1, does by hand)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from opencoder.checkpoint import folders, native
from opencoder.checkpoint.together import together
from opencoder.config import Config
from opencoder.errors import Failure
from opencoder.files import remove_directory, write_json, write_text
from opencoder.optim.base import Optimizer
from opencoder.optim.guard import Guard
from opencoder.parallel.mesh import Mesh

from .state import RunState, rewinds_file, rewinds_of, tensors_of

NOTHING_SEEN: dict[str, Any] = {"losses": [], "norms": []}


def rewind(config: Config, state: RunState, model: nn.Module, optimizer: Optimizer, guard: Guard, mesh: Mesh) -> None:
    """Put model, optimizer, guard and `state` back to the newest checkpoint from before the row of steps just left out, and
    leave out their batches when the run comes to them again. No save may be under way.

    Raises Failure, on all ranks alike, if there is no such checkpoint or `max_rewinds` are used up."""
    skip = config.train.skip
    assert skip is not None
    run_dir, world, at = Path(config.run_dir), mesh.world, state.step
    row = state.skipped_in_a_row(at)
    first = max(1, at - row + 1 - skip.rewind_before)
    what = f"step {at}: {row} updates in a row were left out"
    if state.rewinds >= skip.max_rewinds:
        raise _alike(world.rank, f"{what} after {state.rewinds} rewinds, train.skip.max_rewinds={skip.max_rewinds}: "
                     f"lower optim.lr, or look at the batches in {rewinds_file(run_dir).parent}")  # fmt: skip
    found = folders.newest_intact(run_dir, world, before=first)
    if found is None:
        raise _alike(world.rank, f"{what}, and there is no checkpoint from before step {first} to go back to: set "
                     "checkpoint.every lower, or checkpoint.keep higher")  # fmt: skip
    left_out = list(range(first, at + 1))
    with together(world, f"{run_dir} cannot be written", "look at its permissions and free space"):
        if world.rank == 0:
            _write_down(run_dir, found, {"at_step": at, "to_step": folders.step_of(found), "left_out": left_out})
    saved = native.read_state(found)
    native.load_tensors(found, tensors_of(model, optimizer), mesh, checked=True)
    optimizer.set_step_count(saved["step"])
    guard.load(saved.get("guard") or NOTHING_SEEN)
    state.step, state.tokens, state.saved_step = saved["step"], saved["tokens"], saved["step"]
    state.head, state.source = saved.get("head"), found
    state.skipped, state.blends = saved.get("skipped_batches", []), saved.get("blends", [])
    state.left_out = sorted({*state.left_out, *left_out})
    state.rewinds += 1


def _write_down(run_dir: Path, checkpoint: Path, entry: dict[str, Any]) -> None:
    """A kill at any moment leaves a run that goes on from `checkpoint`, or from where it was."""
    write_text(checkpoint.parent / "latest", checkpoint.name + "\n")
    rewinds_file(run_dir).parent.mkdir(parents=True, exist_ok=True)
    write_json(rewinds_file(run_dir), [*rewinds_of(run_dir), entry])
    for later in folders.list_checkpoints(run_dir):
        if folders.step_of(later) > folders.step_of(checkpoint):
            remove_directory(later)


def _alike(rank: int, text: str) -> Failure:
    failure = Failure(text)
    failure.told_elsewhere = rank != 0
    return failure
