"""What a run tells while it goes: the first rank prints and writes RUN/metrics.jsonl, all ranks together RUN/ranks.jsonl."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from opencoder.config import Config
from opencoder.console import ProgressBar
from opencoder.files import write_text
from opencoder.parallel.mesh import Mesh

from .metrics import MetricsLog
from .straggler import Straggler


class Report:
    """Open from the first step of a run to its last. All ranks call the same methods; the files are written by the first."""

    def __init__(self, config: Config, mesh: Mesh, device: torch.device, *, step: int) -> None:
        """`step`: steps done."""
        self.config, self.mesh, self.device = config, mesh, device
        self.first_rank = mesh.world.rank == 0
        self.total_steps = config.train.total_steps()
        on_terminal = self.first_rank and sys.stderr.isatty()
        self.bar = ProgressBar("train", total=self.total_steps, unit="steps", enabled=on_terminal)
        self.bar.__enter__()
        self.bar.advance(step)
        self._open(step)

    def _open(self, step: int) -> None:
        config, run_dir = self.config, Path(self.config.run_dir)
        self.metrics = None
        if self.first_rank:
            run_dir.mkdir(parents=True, exist_ok=True)
            settings = config.model_dump(mode="json")
            write_text(run_dir / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
            self.metrics = MetricsLog(run_dir, config.log, first_step=step + 1, settings=settings)
        self.straggler = Straggler(self.mesh.world, self.device, run_dir, every=config.log.every, first_step=step + 1)

    def go_back(self, step: int) -> None:
        """The run goes on from an earlier `step`: what was written of the steps after it goes."""
        self._close_files()
        self._open(step)
        self.bar.advance(step - self.bar.done)

    def step(self, row: dict[str, Any]) -> None:
        """A step is done. What stands in `row` is the same on all ranks."""
        if self.metrics is None:
            return
        self.metrics.write(row)
        self.bar.advance(1, postfix="left out" if row["loss"] is None else f"loss {row['loss']:.4f}")
        self._print(row)

    def close(self) -> None:
        """Make everything durable."""
        self.bar.__exit__(None, None, None)
        self._close_files()

    def _close_files(self) -> None:
        self.straggler.close()
        if self.metrics is not None:
            self.metrics.close()

    def _print(self, row: dict[str, Any]) -> None:
        if row["step"] % self.config.log.every and "valid_loss" not in row and not row.get("skipped"):
            return
        tail = f"  valid_loss {row['valid_loss']:.4f}" if "valid_loss" in row else ""
        tail += f"  accuracy {row['accuracy']:.2%}" if "accuracy" in row else ""
        at = f"step {row['step']}/{self.total_steps}"
        if row["loss"] is None:
            print(f"{at}  left out{tail}", flush=True)
            return
        tail += "  skipped" if row.get("skipped") else ""
        print(
            f"{at}  loss {row['loss']:.4f}  grad_norm {row['grad_norm']:.3f}  "
            f"lr {row['lr']:.2e}  {row['tokens_per_s']:.0f} tokens/s  mfu {row['mfu']:.1%}  "
            f"{row['mem_gib']:.2f} GiB{tail}",
            flush=True,
        )
