"""The training loop: the same for one process and many."""

from __future__ import annotations

import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from opencoder import kernels as K
from opencoder.checkpoint import folders, hf, native
from opencoder.checkpoint.saver import Saver
from opencoder.config import Config
from opencoder.console import ProgressBar
from opencoder.data.loader import BatchLoader, MicroBatch
from opencoder.errors import ConfigError, Failure
from opencoder.files import write_text
from opencoder.model.decoder import Documents, named_parameters
from opencoder.model.initialise import build_model
from opencoder.optim.optimizer import Optimizer
from opencoder.optim.schedule import lr_at
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.placement import placement_of

from .data import plan_stages, training_loader, training_samples, validation_loader
from .environment import DTYPES, TIMEOUT_S
from .metrics import MFU_CONVENTION, MetricsLog, flops_per_token, measure_gemm_tflops, peak_memory_gib
from .preflight import check_inputs
from .signals import Asked, Signals

log = logging.getLogger("opencoder")


class Trainer:
    """One run on this rank: builds or resumes it, steps, saves, evaluates."""

    def __init__(self, config: Config, mesh: Mesh, device: torch.device) -> None:
        check_inputs(config)
        self.config, self.mesh, self.device = config, mesh, device
        self.run_dir = Path(config.run_dir)
        self.first_rank = mesh.world.rank == 0
        self.dtype = DTYPES[config.train.precision]
        t = config.train
        self.model = build_model(
            config.model, mesh, dtype=self.dtype, device=device, seed=t.seed, recompute=t.recompute
        )
        self.optimizer = Optimizer(named_parameters(self.model), config.optim, mesh)
        self.step, self.tokens = 0, 0
        self.saved_step: int | None = None
        self.saver = Saver(self.run_dir, config.checkpoint, mesh, timeout_s=TIMEOUT_S, say=self._say)
        self.save_wait_s = 0.0
        """Seconds that steps have waited for checkpoints since the last row of metrics."""
        self.stages: list[dict[str, Any]] = []
        self._restore()
        self.total_steps = t.total_steps()
        self.samples = training_samples(config.data, self.stages)
        self.validation = validation_loader(config, mesh)
        self.parameters = sum(math.prod(placement_of(p).global_shape) for p in self.model.parameters())

    # ---- state ----

    def _weights(self) -> dict[str, Any]:
        return {key: (p, placement_of(p)) for key, p in named_parameters(self.model).items()}

    def _restore(self) -> None:
        """Resume from the run's newest checkpoint, or start new, with the weights of `checkpoint.load` if given."""
        c = self.config.checkpoint
        if c.resume == "never" and folders.list_checkpoints(self.run_dir):
            raise ConfigError(
                f"{self.run_dir} already holds checkpoints and checkpoint.resume=never: choose another run_dir, or "
                "checkpoint.resume=auto to go on"
            )
        found = folders.newest_intact(self.run_dir, self.mesh.world)
        saved_stages = None
        if found is not None:
            state, before = native.read_state(found), native.read_config(found)
            self._check_same_data(before)
            native.load_tensors(found, {**self._weights(), **self.optimizer.state_tensors()}, self.mesh, checked=True)
            self.step, self.tokens, saved_stages = state["step"], state["tokens"], state["stages"]
            self.saved_step = self.step
            self.optimizer.set_step_count(self.step)
            self._say(f"resumed from {found} at step {self.step}")
        elif c.load is not None:
            self._load_weights(c.load)
            self.optimizer = Optimizer(named_parameters(self.model), self.config.optim, self.mesh)
        self.stages = plan_stages(self.config, saved_stages)

    def _check_same_data(self, before: Config) -> None:
        for name, then, now in (
            ("data.seq_len", before.data.seq_len, self.config.data.seq_len),
            ("train.global_batch_size", before.train.global_batch_size, self.config.train.global_batch_size),
        ):
            if then != now:
                raise ConfigError(
                    f"{name}={now}, but {self.run_dir} was started with {then}: keep {then}, or start a new run_dir "
                    "with checkpoint.load"
                )

    def _load_weights(self, source: str) -> None:
        if hf.is_hf_folder(Path(source)):
            hf.load_weights(Path(source), self._weights(), self.mesh)
        else:
            native.load_tensors(folders.resolve(source), self._weights(), self.mesh)
        self._say(f"initial weights from {source}")

    def save(self) -> None:
        """Write a checkpoint of the current step unless there is one."""
        if self.saved_step == self.step:
            return
        tokenizer = self.config.data.tokenizer
        self.save_wait_s += self.saver.save(
            self.step,
            {**self._weights(), **self.optimizer.state_tensors()},
            config=self.config,
            state={
                "tokens": self.tokens,
                "consumed_samples": self.step * self.config.train.global_batch_size,
                "stages": self.stages,
                "skipped_batches": [],
            },
            tokenizer=Path(tokenizer) if tokenizer else None,
        )
        self.saved_step = self.step

    # ---- the run ----

    def run(self) -> None:
        """Train to the last step, or until asked to stop."""
        if self.step >= self.total_steps:
            self._say(f"the run already has {self.step} of {self.total_steps} steps: nothing to do")
            return
        self._announce()
        signals = Signals()
        metrics = self._open_metrics() if self.first_rank else None
        peak = self.config.log.peak_tflops or measure_gemm_tflops(self.device, self.dtype)
        bar = ProgressBar(
            "train", total=self.total_steps, unit="steps", enabled=self.first_rank and sys.stderr.isatty()
        )
        loader = training_loader(
            self.config, self.samples, self.mesh, start_sample=self.step * self.config.train.global_batch_size
        )
        batches = iter(loader)
        try:
            with bar:
                bar.advance(self.step)
                while self.step < self.total_steps:
                    row = self._one_step(batches, peak)
                    if metrics is not None:
                        metrics.write(row)
                        bar.advance(1, postfix=f"loss {row['loss']:.4f}")
                        self._print_row(row)
                    if self._save_if_due(signals.agree(self.mesh.world, self.device, failed=self.saver.failed)):
                        self.saver.wait()
                        self._say(f"stopped at step {self.step} as asked; the same command goes on from here")
                        break
            self.saver.wait()
        except BaseException:
            self.saver.abandon()
            raise
        finally:
            signals.restore()
            if metrics is not None:
                metrics.close()

    def _save_if_due(self, asked: Asked) -> bool:
        """Save when the schedule, the end of the run or a signal asks for it; True means stop now."""
        if asked.failed:
            self.saver.wait()
        every = self.config.checkpoint.every
        if asked.save or self.step == self.total_steps or (every is not None and self.step % every == 0):
            self.save()
        return asked.stop

    def _one_step(self, batches: Any, peak_tflops: float) -> dict[str, Any]:
        start = time.perf_counter()
        micro_batches: list[MicroBatch] = next(batches)
        data_wait_s = time.perf_counter() - start
        loss, grad_norm, lr = self.update(micro_batches)
        self.step += 1
        seq_len, samples = self.config.data.seq_len, self.config.train.global_batch_size
        self.tokens += seq_len * samples
        row: dict[str, Any] = {"step": self.step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens": self.tokens}
        every = self.config.train.eval_every
        step_s = time.perf_counter() - start
        if self.validation is not None and (self.step == self.total_steps or self.step % (every or 1) == 0):
            row["valid_loss"] = self.evaluate(self.validation)
        worst = torch.tensor([step_s, data_wait_s, peak_memory_gib(self.device)], dtype=torch.float64)
        worst = self.mesh.world.all_reduce(worst.to(self.device), "max")
        row["save_wait_s"], self.save_wait_s = self.save_wait_s, 0.0
        row["step_s"], row["data_wait_s"], row["mem_gib"] = worst.tolist()
        row["tokens_per_s"] = seq_len * samples / row["step_s"]
        flops = flops_per_token(self.config.model, self.parameters, seq_len) * row["tokens_per_s"]
        row["mfu"] = flops / (peak_tflops * 1e12 * self.mesh.world.size)
        return row

    def update(self, micro_batches: list[MicroBatch]) -> tuple[float, float, float]:
        """One optimizer update; returns the global loss, the gradient norm before clipping, and the learning rate."""
        self.model.train()
        count = max(self.model.lm_head.begin_step(mb.labels.to(self.device) for mb in micro_batches), 1)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for mb in micro_batches:
            loss_sum, _ = self._loss(mb)
            (loss_sum / count).backward()
            self.optimizer.fold_gradients()
            total += loss_sum.detach()
        grad_norm = self.optimizer.reduce_gradients()
        loss = float(self.mesh.dp.all_reduce(total)) / count
        if not math.isfinite(loss) or not math.isfinite(float(grad_norm)):
            raise Failure(
                f"step {self.step + 1}: loss {loss}, gradient norm {float(grad_norm)}: not finite. Lower optim.lr or "
                "look at the data of this step; the newest checkpoint is from before it"
            )
        lr = lr_at(self.step, self.config.optim, self.total_steps)
        self.optimizer.step(lr=lr, grad_norm=grad_norm)
        return loss, float(grad_norm), lr

    def _loss(self, mb: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        documents = None
        if mb.cu_seqlens is not None and mb.max_seqlen is not None:
            documents = Documents(mb.cu_seqlens.to(self.device), mb.max_seqlen)
        return self.model.loss(mb.tokens.to(self.device), mb.labels.to(self.device), documents)

    @torch.no_grad()
    def evaluate(self, loader: BatchLoader) -> float:
        """Mean token loss over the evaluation samples, the same on every rank."""
        self.model.eval()
        micro_batches = next(iter(loader))
        count = self.model.lm_head.begin_step(mb.labels.to(self.device) for mb in micro_batches)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for mb in micro_batches:
            total += self._loss(mb)[0]
        return float(self.mesh.dp.all_reduce(total)) / max(count, 1)

    # ---- telling ----

    def _open_metrics(self) -> MetricsLog:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        settings = self.config.model_dump(mode="json")
        write_text(self.run_dir / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
        return MetricsLog(self.run_dir, self.config.log, first_step=self.step + 1, settings=settings)

    def _announce(self) -> None:
        t = self.config.train
        self._say(
            f"{self.parameters:,} parameters, mesh {self.mesh.describe()}, {t.precision} on {self.device.type}, "
            f"{self.total_steps} steps of {t.global_batch_size} × {self.config.data.seq_len} tokens; MFU counts "
            f"{MFU_CONVENTION}"
        )
        self._say(K.chosen(self.device.type))

    def _print_row(self, row: dict[str, Any]) -> None:
        if row["step"] % self.config.log.every and "valid_loss" not in row:
            return
        tail = f"  valid_loss {row['valid_loss']:.4f}" if "valid_loss" in row else ""
        print(
            f"step {row['step']}/{self.total_steps}  loss {row['loss']:.4f}  grad_norm {row['grad_norm']:.3f}  "
            f"lr {row['lr']:.2e}  {row['tokens_per_s']:.0f} tokens/s  mfu {row['mfu']:.1%}  "
            f"{row['mem_gib']:.2f} GiB{tail}",
            flush=True,
        )

    def _say(self, text: str) -> None:
        if self.first_rank:
            print(text, flush=True)
