"""Metrics of a run: RUN/metrics.jsonl (every step), TensorBoard, optionally wandb, and the model FLOP utilisation.

MFU convention: 6 FLOPs per parameter and token with the input embedding left out, plus 12·L·H·D·S for attention counted
in full (no causal discount), as torchtitan and OLMo-core count; the peak is `log.peak_tflops` or the rate of a large
matrix product measured at start in the training precision, so on a CPU it is a share of the GEMM rate."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from opencoder.config import LogConfig, ModelConfig, OptimConfig
from opencoder.data.groups import GroupNames
from opencoder.errors import ConfigError
from opencoder.files import atomic_open
from opencoder.model.encoder import Encoder, TokenTrunk

MFU_CONVENTION = "6N without input embedding + 12·L·H·D·S per token (full attention)"


def flops_per_token(config: ModelConfig, parameters: int, seq_len: int) -> float:
    """Model FLOPs per trained token, forward and backward; with a class head over the classes that a step scores, once a sample."""
    if config.head.kind == "class":
        return _class_flops(config, seq_len)
    embedding = 0 if config.tie_embeddings else config.padded_vocab_size * config.hidden_size
    attention = 12 * config.layers * config.heads * config.head_dim * seq_len
    return 6.0 * (parameters - embedding) + attention


@lru_cache(maxsize=4)
def _class_flops(config: ModelConfig, seq_len: int) -> float:
    with torch.device("meta"):
        model = Encoder(config, optim=OptimConfig())
    tokens = isinstance(model.trunk, TokenTrunk)
    trunk = sum(p.numel() for name, p in model.trunk.named_parameters() if not name.startswith("embed_tokens"))
    attention = 12 * config.layers * config.heads * config.head_dim * seq_len if tokens else 0
    classes, dim = model.lm_head.placement.global_shape
    scored = classes if config.head.selection == "full" else classes * config.head.rho
    projection = 0 if model.projection is None else model.projection.weight.numel()
    return 6.0 * trunk + attention + 6.0 * (projection + scored * dim) / seq_len


PEAK_S, PEAK_ROUNDS = 0.1, 4
"""Seconds and products that the peak is the best of, at least: the first one warms up, and takes longer than that on a GPU."""


def measure_gemm_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Best rate of large matrix products on this device in `dtype`, in TFLOP/s. Several of them: what else the machine does
    for a moment should not make the peak of a whole run too low."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best, begun, rounds = float("inf"), time.perf_counter(), 0
    while rounds < PEAK_ROUNDS or time.perf_counter() - begun < PEAK_S:
        rounds += 1
        _synchronise(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e12


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory so far, GiB: allocated on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def losses_by_group(by_group: torch.Tensor, names: GroupNames) -> dict[str, dict[str, float]]:
    """`loss_by_source` and `loss_by_language`: name → mean token loss, for those that the batch had targets of. by_group
    (2, groups): sums of losses, numbers of targets. A key of which nothing is known is left out."""
    sums, counts = by_group.tolist()
    n = len(names.sources)
    found: dict[str, dict[str, float]] = {}
    for key, first, members in (("loss_by_source", 0, names.sources), ("loss_by_language", n, names.languages)):
        means = {name: sums[i] / counts[i] for i, name in enumerate(members, first) if counts[i]}
        if means:
            found[key] = means
    return found


class RowFile:
    """A file of JSON rows, each with its `step`, that a run appends to."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        """Rows of steps that a resumed run does again are removed first."""
        rows = [row for row in read_rows(path) if row["step"] < first_step]
        with atomic_open(path) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed in close()

    def write(self, row: dict[str, Any]) -> None:
        """Append `row` and flush it: after a kill at most the step under way is missing."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Make everything durable."""
        os.fsync(self._file.fileno())
        self._file.close()


class MetricsLog:
    """Writes one row per step. Opened on rank 0 only."""

    def __init__(self, run_dir: Path, config: LogConfig, *, first_step: int, settings: dict[str, Any]) -> None:
        """Rows of steps that a resumed run does again are removed first."""
        self.file = RowFile(run_dir / "metrics.jsonl", first_step=first_step)
        self.every = config.every
        self.writer = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run_dir / "tb"), purge_step=first_step)
        self.wandb = _start_wandb(run_dir, settings) if config.wandb else None

    def write(self, row: dict[str, Any]) -> None:
        """Append `row` (it has `step`). Numbers that are not finite become null: JSON has none. A value may be a dict of numbers,
        which are shown as key/name."""
        row = {k: _finite(v) for k, v in row.items()}
        self.file.write(row)
        if row["step"] % self.every == 0 or "valid_loss" in row:
            numbers = {k: v for k, v in _flat(row).items() if k != "step" and v is not None}
            for key, value in numbers.items():
                if self.writer is not None:
                    self.writer.add_scalar(key, value, row["step"])
            if self.wandb is not None:
                self.wandb.log(numbers, step=row["step"])

    def close(self) -> None:
        """Make everything durable."""
        self.file.close()
        if self.writer is not None:
            self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        found |= {f"{key}/{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return found


def _start_wandb(run_dir: Path, settings: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("log.wandb=true needs the package wandb: pip install 'opencoder[wandb]'") from error
    return wandb.init(dir=str(run_dir), config=settings, resume="allow", id=run_dir.name)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
