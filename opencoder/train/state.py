"""Where a run stands, and how it gets there: a new start, given weights, or the newest checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from opencoder.checkpoint import folders, hf, native
from opencoder.checkpoint.parts import Tensors
from opencoder.checkpoint.together import together
from opencoder.config import Config
from opencoder.errors import ConfigError, DataError
from opencoder.model.decoder import named_parameters
from opencoder.model.encoder import HEAD_KEY, PROJECTION_KEY
from opencoder.optim.base import Optimizer
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.placement import placement_of

from .data import plan_stages
from .stages import Stage, consumed_samples


@dataclass
class RunState:
    """The position of a run; with weights and optimizer state it is all that a resumed run needs."""

    step: int = 0
    """Optimizer updates done."""
    tokens: int = 0
    """Tokens trained on."""
    stages: list[Stage] = field(default_factory=list)
    """Data stages, as `plan_stages` makes them."""
    saved_step: int | None = None
    """Step of the newest checkpoint that this state was read from or written to."""

    forked_from: str | None = None
    """The checkpoint of another run that this one began with (`checkpoint.fork`), as configured."""
    skipped: list[int] = field(default_factory=list)
    """Steps, from 1, whose update was left out when it was worked out."""
    left_out: list[int] = field(default_factory=list)
    """Steps, done or to come, whose batches rewinds took out: nothing is worked out, and there is no update."""
    asked_out: list[int] = field(default_factory=list)
    """The same for `train.skip.steps`. Not saved: the configuration says it again."""
    rewinds: int = 0
    """How often the run has gone back (train/rewind.py)."""
    guard: dict[str, Any] | None = None
    """What the guard remembers, as of the newest checkpoint."""
    blends: list[dict[str, Any]] = field(default_factory=list)
    """What each begun stage has read of its datasets (train/data.py: account), as of the newest checkpoint."""
    head: dict[str, Any] | None = None
    """What a class head remembers beside tensors (train/class_loop.py), as of the newest checkpoint."""
    source: Path | None = None
    """The checkpoint that the state was read from. Not saved."""

    def skipped_in_a_row(self, step: int) -> int:
        """Steps up to `step`, the newest that is known of, whose update was left out."""
        n = 0
        while n < len(self.skipped) and self.skipped[-1 - n] == step - n:
            n += 1
        return n

    def leaves_out(self, step: int) -> bool:
        """Whether nothing is to be worked out for `step`."""
        return step in self.left_out or step in self.asked_out

    def for_checkpoint(self) -> dict[str, Any]:
        """What stands in the checkpoint's state.json beside the step."""
        return {
            "tokens": self.tokens,
            "consumed_samples": consumed_samples(self.stages, self.step),
            "stages": [stage.record() for stage in self.stages],
            "blends": self.blends,
            "skipped_batches": list(self.skipped),
            "left_out_batches": list(self.left_out),
            "rewinds": self.rewinds,
            "guard": self.guard,
            "forked_from": self.forked_from,
            **({"head": self.head} if self.head is not None else {}),
        }


def weights_of(model: nn.Module) -> Tensors:
    """The model's part of a checkpoint."""
    return {key: (p, placement_of(p)) for key, p in named_parameters(model).items()}


def tensors_of(model: nn.Module, optimizer: Optimizer) -> Tensors:
    """Every tensor of a checkpoint, its weights those of the last update."""
    optimizer.wait_weights()
    return {**weights_of(model), **optimizer.state_tensors()}


def restore(
    config: Config, model: nn.Module, optimizer: Optimizer, mesh: Mesh, *, say: Callable[[str], None]
) -> RunState:
    """Resume from the run's newest checkpoint, or start new: with the whole state of `checkpoint.fork`, or the weights of
    `checkpoint.load`, if given.

    Raises ConfigError for what does not fit the configuration, DataError for a checkpoint that is damaged."""
    c, run_dir = config.checkpoint, Path(config.run_dir)
    if c.resume == "never" and folders.list_checkpoints(run_dir):
        raise ConfigError(
            f"{run_dir} already holds checkpoints and checkpoint.resume=never: choose another run_dir, or "
            "checkpoint.resume=auto to go on"
        )
    found = folders.newest_intact(run_dir, mesh.world)
    forked_from = c.fork
    if found is not None:
        forked_from = native.read_state(found).get("forked_from")
        if c.fork is not None and forked_from != c.fork:
            raise ConfigError(
                f"checkpoint.fork={c.fork}, but {run_dir} already holds a run that did not begin with it: choose another "
                "run_dir, or remove checkpoint.fork to go on"
            )
    elif c.fork is not None:
        found = _source(c.fork, mesh)
    else:
        head = None
        if c.load is not None:
            head = _load_weights(c.load, config, model, mesh)
            optimizer.weights_changed()
            say(f"initial weights from {c.load}")
        return RunState(stages=plan_stages(config), asked_out=_asked_out(config), head=head)
    own = found.parent.parent == run_dir
    saved = native.read_state(found)
    step = saved["step"]
    stages = plan_stages(config, saved["stages"], step=step, before=native.read_config(found), fork=not own)
    _check_classes(config, native.read_config(found), found)
    native.load_tensors(found, tensors_of(model, optimizer), mesh, checked=True)
    optimizer.set_step_count(step)
    rewinds = mesh.world.gather_objects(rewinds_of(run_dir) if own and mesh.world.rank == 0 else [])[0]
    left_out = {*saved.get("left_out_batches", []), *(n for entry in rewinds for n in entry["left_out"])}
    say(f"{'resumed' if own else 'forked'} from {found} at step {step}")
    return RunState(
        step,
        saved["tokens"],
        stages,
        saved_step=step if own else None,
        forked_from=forked_from,
        skipped=saved.get("skipped_batches", []),
        left_out=sorted(left_out),
        asked_out=_asked_out(config),
        rewinds=max(saved.get("rewinds", 0), len(rewinds)),
        guard=saved.get("guard"),
        blends=saved.get("blends", []),
        head=saved.get("head"),
        source=found,
    )


def _check_classes(config: Config, before: Config, folder: Path) -> None:
    """Rows of another number of classes are no rows of these. Raises ConfigError."""
    now, then = config.model.head, before.model.head
    for key in ("kind", "classes", "dim"):
        if getattr(now, key) != getattr(then, key):
            raise ConfigError(
                f"model.head.{key}={getattr(now, key)}, but checkpoint {folder} was written with {getattr(then, key)}: keep that, or "
                "start a new run_dir"
            )


def _asked_out(config: Config) -> list[int]:
    return config.train.skip.steps if config.train.skip is not None else []


def rewinds_file(run_dir: Path) -> Path:
    """Where a run writes down that it went back. Newer than any checkpoint right after it did."""
    return run_dir / "skipped" / "rewinds.json"


def rewinds_of(run_dir: Path) -> list[dict[str, Any]]:
    """Each time that the run went back, oldest first: at_step, to_step, left_out. Raises DataError."""
    file = rewinds_file(run_dir)
    if not file.is_file():
        return []
    try:
        found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{file} cannot be read ({error}): mend it, or remove it to take those batches in again"
        ) from error
    return found


def _source(fork: str, mesh: Mesh) -> Path:
    """The intact checkpoint meant by `checkpoint.fork`, the same on all ranks. Of another run: nothing there is touched."""
    with together(mesh.world, f"{fork} cannot be read", "look at its permissions"):
        found = folders.resolve(fork) if mesh.world.rank == 0 else None
    source: Path = mesh.world.gather_objects(found)[0]
    folders.check_files(source, mesh.world)
    return source


def _load_weights(source: str, config: Config, model: nn.Module, mesh: Mesh) -> dict[str, Any] | None:
    """Returns what a class head remembers beside tensors, if the checkpoint has one. An encoder takes the layers of a language
    model."""
    tensors, classes = weights_of(model), config.model.head.kind == "class"
    layers = {key: part for key, part in tensors.items() if key not in (HEAD_KEY, PROJECTION_KEY)}
    if hf.is_hf_folder(Path(source)):
        hf.load_weights(Path(source), layers if classes else tensors, mesh)
        return None
    folder = folders.resolve(source)
    before = native.read_config(folder)
    if not classes or before.model.head.kind == "vocab":
        native.load_tensors(folder, layers if classes else tensors, mesh)
        return None
    _check_classes(config, before, folder)
    native.load_tensors(folder, tensors, mesh)
    head = native.read_state(folder).get("head")
    return None if head is None else {"order": head["order"]}  # the rows are in its order, whatever the seed is here
