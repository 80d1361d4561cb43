"""The training loop: the same for one process and many."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opencoder import kernels as K
from opencoder.checkpoint.saver import Saver
from opencoder.config import Config
from opencoder.data.loader import BatchLoader, MicroBatch
from opencoder.errors import ConfigError, Failure
from opencoder.model.decoder import Decoder, Part, named_parameters, parameter_count
from opencoder.model.initialise import build_model
from opencoder.model.recompute import OPERATORS
from opencoder.optim.base import Optimizer
from opencoder.optim.build import build_optimizer
from opencoder.optim.schedule import lr_at
from opencoder.parallel.mesh import Mesh

from .data import TrainingData, validation_loader
from .environment import DTYPES
from .metrics import MFU_CONVENTION, flops_per_token, losses_by_group, measure_gemm_tflops, peak_memory_gib
from .pipeline_runner import Chunks, PipelineRunner, build_chunks, models_of
from .preflight import preflight
from .report import Report
from .rewind import rewind
from .signals import Asked, Signals
from .skipping import Skipping
from .stages import Stage
from .state import restore, tensors_of
from .step import Guard, TrainStep

log = logging.getLogger("opencoder")


class Trainer:
    """One run on this rank: builds or resumes it, steps, saves, evaluates."""

    def __init__(self, config: Config, mesh: Mesh, device: torch.device) -> None:
        self.config, self.mesh, self.device = config, mesh, device
        self.run_dir = Path(config.run_dir)
        self.first_rank = mesh.world.rank == 0
        preflight(config, mesh, device, say=self._say)
        self.dtype = DTYPES[config.train.precision]
        t = config.train
        self.model = self._build()
        self.optimizer: Optimizer = build_optimizer(
            named_parameters(self.model),
            config.optim,
            mesh,
            sharded=config.parallel.sharded_optimizer,
            modules=models_of(self.model),
        )
        self.saver = Saver(self.run_dir, config.checkpoint, mesh, timeout_s=t.timeout_s, say=self._say)
        self.save_wait_s = 0.0
        """Seconds that training has waited for checkpoints since the last row of metrics."""
        self.state = restore(config, self.model, self.optimizer, mesh, say=self._say)
        self.skipping = Skipping(config, self.state, mesh, device) if t.skip is not None else None
        check: Guard = self._stop_if_not_finite if self.skipping is None else self.skipping.guard
        runner = None
        if isinstance(self.model, Chunks):
            again = bool(set(t.recompute.modules) - OPERATORS)
            runner = PipelineRunner(self.model, self.optimizer, mesh, config.parallel, device=device, recompute=again)
        guard = partial(self._before_update, check)
        self.train_step = TrainStep(self.model, self.optimizer, mesh, device=device, runner=runner, guard=guard)
        self.total_steps = t.total_steps()
        self.stage: Stage | None = None
        self.data = self._open_data()
        self.validation = validation_loader(config, mesh, pin_memory=device.type == "cuda")
        self.parameters = parameter_count(config.model)

    def _build(self) -> Decoder | Chunks:
        """The model, or the stages of it that this rank holds."""
        c = self.config

        def build(part: Part | None = None) -> Decoder:
            return build_model(
                c.model,
                self.mesh,
                dtype=self.dtype,
                device=self.device,
                seed=c.train.seed,
                recompute=c.train.recompute,
                part=part,
                parallel=c.parallel,
                z_loss=c.train.z_loss,
            )

        if self.mesh.pp.size == 1:
            return build()
        return build_chunks(c.model, c.parallel, self.mesh, seq_len=c.data.seq_len, build=build)

    def _open_data(self) -> TrainingData:
        """What is to be read from the step where the run stands."""
        state, pin_memory = self.state, self.device.type == "cuda"
        return TrainingData(self.config, state.stages, self.mesh, step=state.step, pin_memory=pin_memory)

    def save(self) -> None:
        """Write a checkpoint of the current step unless there is one."""
        state = self.state
        if state.saved_step == state.step:
            return
        if self.skipping is not None:
            state.guard = self.skipping.guard.state()
        state.blends = self.data.accounts(state.step, state.blends)
        tokenizer = self.config.data.tokenizer
        self.save_wait_s += self.saver.save(
            state.step,
            tensors_of(self.model, self.optimizer),
            config=self.config,
            state=state.for_checkpoint(),
            tokenizer=Path(tokenizer) if tokenizer else None,
        )
        state.saved_step = state.step

    # ---- the run ----

    def run(self) -> None:
        """Train to the last step, or until asked to stop; with `checkpoint.seed`, save step 0 and no more."""
        if self.config.checkpoint.seed:
            self._save_seed()
            return
        if self.state.step >= self.total_steps:
            self._say(f"the run already has {self.state.step} of {self.total_steps} steps: nothing to do")
            return
        self._announce()
        signals = Signals()
        report = Report(self.config, self.mesh, self.device, step=self.state.step)
        peak = self.config.log.peak_tflops or measure_gemm_tflops(self.device, self.dtype)
        batches = self.data.batches(self.state.step)
        try:
            while self.state.step < self.total_steps:
                report.step(self._one_step(batches, peak, report))
                if self.skipping is not None and self.skipping.must_rewind():
                    self._go_back(self.skipping)
                    report.go_back(self.state.step)
                    batches = self.data.batches(self.state.step)
                if self._save_if_due(signals.agree(self.mesh.world, self.device, failed=self.saver.failed)):
                    self.saver.wait()
                    self._say(f"stopped at step {self.state.step} as asked; the same command goes on from here")
                    break
            self.saver.wait()
        except BaseException:
            self.saver.abandon()
            raise
        finally:
            signals.restore()
            report.close()

    def _save_seed(self) -> None:
        """Initial weights depend on no layout, nor does what is made of them here."""
        if self.state.step > 0:
            raise ConfigError(
                f"checkpoint.seed=true, but {self.run_dir} is at step {self.state.step}: choose an empty run_dir, or remove "
                "checkpoint.seed to go on"
            )
        self.save()
        self.saver.wait()
        self._say("the checkpoint of step 0 is there; without checkpoint.seed, the same command trains from it")

    def _save_if_due(self, asked: Asked) -> bool:
        """Save when the schedule, the end of the run or a signal asks for it; True means stop now."""
        if asked.failed:
            self.saver.wait()
        every = self.config.checkpoint.every
        if asked.save or self.state.step == self.total_steps or (every is not None and self.state.step % every == 0):
            self.save()
        return asked.stop

    def _go_back(self, skipping: Skipping) -> None:
        """To the newest checkpoint from before a row of skipped steps."""
        self.saver.wait()
        at = self.state.step
        rewind(self.config, self.state, self.model, self.optimizer, skipping.guard, self.mesh)
        self.data, self.stage = self._open_data(), None
        self._say(
            f"rewound from step {at} to the checkpoint of step {self.state.step}; left out from now on: steps "
            f"{', '.join(map(str, self.state.left_out))}"
        )

    def _one_step(
        self, batches: Iterator[tuple[Stage, list[MicroBatch]]], peak_tflops: float, report: Report
    ) -> dict[str, Any]:
        """Do the next step; returns its row of metrics, the same on every rank."""
        start = time.perf_counter()
        stage, micro_batches = next(batches)
        data_wait_s = time.perf_counter() - start
        state = self.state
        if stage is not self.stage:
            self.stage = stage
            self._say(self.data.describe(stage))
        records = self.mesh.records
        records.step = state.step + 1
        lr = lr_at(state.step, self.config.optim, self.total_steps)
        if state.leaves_out(state.step + 1):
            return self._leave_out(stage, lr)
        groups = self.data.group_names(stage) if (state.step + 1) % self.config.log.every == 0 else None
        blocked_before_s = records.blocked_s
        result = self.train_step.update(micro_batches, lr=lr, groups=len(groups) if groups is not None else 0)
        state.step += 1
        seq_len, samples = stage.settings.seq_len, stage.settings.global_batch_size
        state.tokens += seq_len * samples
        row: dict[str, Any] = {"step": state.step, "loss": float(result.loss), "grad_norm": float(result.grad_norm)}
        row |= {"lr": lr, "tokens": state.tokens}
        if self.config.train.z_loss and result.z_loss is not None:
            row["z_loss"] = float(result.z_loss)
        if groups is not None and result.by_group is not None:
            row |= losses_by_group(result.by_group, groups)
        if self.skipping is not None:
            row["skipped"] = self.skipping.note(result)
        self._say_end(stage)
        step_s = time.perf_counter() - start
        mem_gib, busy_s = peak_memory_gib(self.device), step_s - (records.blocked_s - blocked_before_s)
        report.straggler.add(state.step, busy_s=busy_s, data_wait_s=data_wait_s, mem_gib=mem_gib)
        row |= self._evaluated()
        communicated = records.take()
        worst = torch.tensor([step_s, data_wait_s, mem_gib, communicated.blocked_s], dtype=torch.float64)
        worst = self.mesh.world.all_reduce(worst.to(self.device), "max")
        row["save_wait_s"], self.save_wait_s = self.save_wait_s, 0.0
        row["step_s"], row["data_wait_s"], row["mem_gib"], blocked_s = worst.tolist()
        row |= {"comm_bytes": communicated.bytes, "comm_wait_s": blocked_s if self.device.type == "cpu" else None}
        row["tokens_per_s"] = seq_len * samples / row["step_s"]
        flops = flops_per_token(self.config.model, self.parameters, seq_len) * row["tokens_per_s"]
        row["mfu"] = flops / (peak_tflops * 1e12 * self.mesh.world.size)
        return row

    def _before_update(self, guard: Guard, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor | None:
        """Gradients are there, weights are about to change: a save that still copies them comes first."""
        self.save_wait_s += self.saver.wait_staged()
        return guard(loss, grad_norm)

    def _leave_out(self, stage: Stage, lr: float) -> dict[str, Any]:
        """A step without an update: its batch is passed by. The optimizer counts it, as it counts a skipped one."""
        state = self.state
        state.step += 1
        self.optimizer.set_step_count(state.step)
        self._say_end(stage)
        row = {"step": state.step, "loss": None, "grad_norm": None, "lr": lr, "tokens": state.tokens}
        return {**row, "skipped": True, "left_out": True, **self._evaluated()}

    def _evaluated(self) -> dict[str, float]:
        """The loss on the validation samples, if it is time for it."""
        step, every = self.state.step, self.config.train.eval_every
        if self.validation is None or (step < self.total_steps and step % (every or 1)):
            return {}
        return {"valid_loss": self.evaluate(self.validation)}

    def _stop_if_not_finite(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise Failure(
                f"step {self.state.step + 1}: loss {float(loss)}, gradient norm {float(grad_norm)}: not finite. Lower "
                "optim.lr or look at the data of this step; the newest checkpoint is from before it"
            )

    def evaluate(self, loader: BatchLoader) -> float:
        """Mean token loss over the evaluation samples, the same on every rank."""
        return float(self.train_step.evaluate(loader))

    # ---- telling ----

    def _announce(self) -> None:
        t = self.config.train
        self._say(
            f"{self.parameters:,} parameters, mesh {self.mesh.describe()}, {t.precision} on {self.device.type}, "
            f"{self.total_steps} steps; MFU counts {MFU_CONVENTION}"
        )
        self._say(K.chosen(self.device.type))

    def _say_end(self, stage: Stage) -> None:
        if self.state.step == stage.end:
            self._say(self.data.describe_end(stage))

    def _say(self, text: str) -> None:
        if self.first_rank:
            print(text, flush=True)
