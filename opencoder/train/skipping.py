"""Updates that a run leaves out (train.skip): who decides, and what is written down of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from opencoder.config import Config
from opencoder.errors import Failure
from opencoder.files import write_json
from opencoder.optim.guard import Guard
from opencoder.parallel.mesh import Mesh

from .state import RunState


class Skipping:
    """Counts the updates that the guard leaves out, and writes their batches to RUN/skipped/step_XXXXXXXX.json."""

    def __init__(self, config: Config, state: RunState, mesh: Mesh, device: torch.device) -> None:
        """Goes on from what `state` remembers. `config.train.skip` must be set."""
        settings = config.train.skip
        assert settings is not None
        self.config, self.settings, self.state = config, settings, state
        self.first_rank = mesh.world.rank == 0
        self.guard = Guard(window=settings.window, sigma=settings.sigma, world=mesh.world, device=device)
        if state.guard is not None:
            self.guard.load(state.guard)

    def note(self, step: int, *, loss: float, grad_norm: float, compared_with: dict[str, Any]) -> None:
        """The update of `step` was left out; writes that down. `compared_with`: what the guard remembered then."""
        state = self.state
        stage = next(stage for stage in state.stages if stage.first_step < step <= stage.end)
        samples = stage.settings.global_batch_size
        state.skipped.append(step)
        if self.first_rank:
            self.file(step).parent.mkdir(parents=True, exist_ok=True)
            found = {"loss": loss, "grad_norm": grad_norm}
            write_json(
                self.file(step),
                {
                    "step": step,
                    **{name: value if math.isfinite(value) else str(value) for name, value in found.items()},
                    "compared_with": compared_with,
                    "stage": stage.record(),
                    "samples": [(step - stage.first_step + n) * samples for n in (-1, 0)],
                },
            )

    def file(self, step: int) -> Path:
        """Where the batch of `step` is written down."""
        return Path(self.config.run_dir) / "skipped" / f"step_{step:08}.json"

    def must_rewind(self, step: int) -> bool:
        """Whether `stop_after` updates up to `step` were left out and the run is to go back; Failure if it is to stop then."""
        row = self.state.skipped_in_a_row(step)
        if row >= self.settings.stop_after and self.settings.on_stop == "stop":
            raise Failure(
                f"step {step}: {row} updates in a row were left out, train.skip.stop_after="
                f"{self.settings.stop_after}: lower optim.lr, or look at the batches in "
                f"{self.file(step).parent}; the newest checkpoint is from step {self.state.saved_step or 0}"
            )
        return row >= self.settings.stop_after
