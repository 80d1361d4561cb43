"""From the numbers of a step to its row of metrics, and what they ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from opencoder.config import Config
from opencoder.data.groups import GroupNames
from opencoder.errors import Failure
from opencoder.model.decoder import parameter_count
from opencoder.optim.guard import Memory
from opencoder.parallel.mesh import Mesh

from .late import Late
from .metrics import flops_per_token, losses_by_group, measure_gemm_tflops
from .report import Report
from .signals import Asked
from .skipping import Skipping
from .stages import Stage


@dataclass
class Done:
    """A step that is done, or on a GPU queued, and what the host knew of it then."""

    step: int
    stage: Stage
    start: float
    """time.perf_counter() when it began."""
    lr: float
    tokens: int = 0
    """Trained on so far, this step included."""
    left_out: bool = False
    """Told beforehand: nothing was worked out."""
    groups: GroupNames | None = None
    """Groups of the data that its losses are summed by."""
    compared_with: Memory | None = None
    """What the guard remembered before it; None: what it remembers when the numbers are read."""
    valid: dict[str, float] = field(default_factory=dict)
    """The loss on the validation samples, if it was worked out."""
    comm_bytes: int = 0
    save_wait_s: float = 0.0
    numbers: Late = field(init=False)
    """`loss`, `grad_norm` and so on; `worst`: the highest of all ranks of step_s, data_wait_s, mem_gib, seconds blocked in
    collectives, and of the flags of `Asked`; `ranks`, if due: of all ranks, what straggler.py reports."""


class Teller:
    """Reads steps in their order, on all ranks alike."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        device: torch.device,
        report: Report,
        skipping: Skipping | None,
        *,
        late: bool,
        dtype: torch.dtype,
    ) -> None:
        """`late`: the host has queued later steps by then, so that its clock says when a step was done, not how long it took."""
        self.config, self.device, self.report, self.skipping = config, device, report, skipping
        self.late, self._last_there = late, 0.0
        peak_tflops = config.log.peak_tflops or measure_gemm_tflops(device, dtype)
        self.peak = peak_tflops * 1e12 * mesh.world.size
        self.parameters = parameter_count(config.model)

    def tell(self, done: Done) -> Asked:
        """Write down a step, and a skipped batch; returns what any rank was asked by its end.

        Raises Failure for a loss or norm that is not finite, unless such updates are skipped."""
        numbers = done.numbers.read()
        asked = Asked(*(bool(n) for n in numbers["worst"][4:]))
        if done.left_out:
            known = {"step": done.step, "loss": None, "grad_norm": None, "lr": done.lr, "tokens": done.tokens}
            self.report.step({**known, "skipped": True, "left_out": True, **done.valid})
            return asked
        row = self._row(done, numbers)
        if self.skipping is None:
            _stop_if_not_finite(row)
        elif row["skipped"]:
            compared_with = self.skipping.guard.state(done.compared_with)
            self.skipping.note(done.step, loss=row["loss"], grad_norm=row["grad_norm"], compared_with=compared_with)
        if "ranks" in numbers:
            self.report.straggler.report(done.step, numbers["ranks"])
        self.report.step(row)
        return asked

    def _row(self, done: Done, numbers: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Metrics of a step; the same on every rank, but its time where it is `late`: each has its own clock, and they wait for
        each other in every step."""
        row: dict[str, Any] = {"step": done.step}
        row |= {"loss": float(numbers["loss"]), "grad_norm": float(numbers["grad_norm"])}
        row |= {"lr": done.lr, "tokens": done.tokens}
        if "z_loss" in numbers:
            row["z_loss"] = float(numbers["z_loss"])
        if done.groups is not None and "by_group" in numbers:
            row |= losses_by_group(numbers["by_group"], done.groups)
        if "skip" in numbers:
            row["skipped"] = bool(numbers["skip"])
        row |= {**done.valid, "save_wait_s": done.save_wait_s}
        row["step_s"], row["data_wait_s"], row["mem_gib"], blocked_s = numbers["worst"][:4].tolist()
        if self.late:
            there = done.numbers.wait()
            row["step_s"], self._last_there = there - max(done.start, self._last_there), there
        row |= {"comm_bytes": done.comm_bytes, "comm_wait_s": blocked_s if self.device.type == "cpu" else None}
        seq_len, samples = done.stage.settings.seq_len, done.stage.settings.global_batch_size
        row["tokens_per_s"] = seq_len * samples / row["step_s"]
        row["mfu"] = flops_per_token(self.config.model, self.parameters, seq_len) * row["tokens_per_s"] / self.peak
        return row


def _stop_if_not_finite(row: dict[str, Any]) -> None:
    if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
        raise Failure(
            f"step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}: not finite. Lower optim.lr or look at "
            "the data of this step; the newest checkpoint is from before it"
        )
