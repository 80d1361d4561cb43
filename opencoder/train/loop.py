"""The training loop: the same for one process and many."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from opencoder import kernels as K
from opencoder.checkpoint.parts import Tensors
from opencoder.checkpoint.saver import Saver
from opencoder.config import Config
from opencoder.data.loader import BatchLoader, MicroBatch
from opencoder.errors import ConfigError
from opencoder.model.decoder import Decoder, Part, named_parameters, parameter_count
from opencoder.model.initialise import build_model
from opencoder.model.recompute import OPERATORS
from opencoder.optim.base import Optimizer
from opencoder.optim.build import build_optimizer
from opencoder.optim.schedule import lr_at
from opencoder.parallel.mesh import Mesh

from .class_data import ClassData
from .data import TrainingData, validation_loader
from .environment import DTYPES
from .late import LAG, Late, on_device
from .metrics import MFU_CONVENTION, peak_memory_gib
from .pipeline_runner import Chunks, PipelineRunner, build_chunks, models_of
from .preflight import preflight
from .report import Report
from .rewind import rewind
from .signals import Asked, Signals
from .skipping import Skipping
from .stages import Stage
from .state import restore, tensors_of
from .step import Runner, TrainStep
from .telling import Done, Teller

log = logging.getLogger("opencoder")


class Trainer:
    """One run on this rank: builds or resumes it, steps, saves, evaluates."""

    model: nn.Module

    def __init__(self, config: Config, mesh: Mesh, device: torch.device) -> None:
        self.config, self.mesh, self.device = config, mesh, device
        self.run_dir = Path(config.run_dir)
        self.first_rank = mesh.world.rank == 0
        preflight(config, mesh, device, say=self._say)
        self.dtype = DTYPES[config.train.precision]
        t = config.train
        self.model = self._build()
        self.optimizer: Optimizer = self._build_optimizer()
        self.saver = Saver(self.run_dir, config.checkpoint, mesh, timeout_s=t.timeout_s, say=self._say)
        self.save_wait_s = 0.0
        """Seconds that training has waited for checkpoints since the last row of metrics."""
        self.state = restore(config, self.model, self.optimizer, mesh, say=self._say)
        self.skipping = Skipping(config, self.state, mesh, device) if t.skip is not None else None
        self.lag = LAG[device.type]
        self.train_step = TrainStep(
            self.model, self.optimizer, mesh, device=device, runner=self._build_runner(), guard=self._before_update
        )
        self.total_steps = t.total_steps()
        self.stage: Stage | None = None
        self.data = self._open_data()
        self.validation = self._open_validation()
        self.parameters = self._count_parameters()

    # What ClassTrainer has of its own (class_loop.py).

    def _build(self) -> nn.Module:
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

    def _build_optimizer(self) -> Optimizer:
        c = self.config
        assert isinstance(self.model, Decoder | Chunks), type(self.model)
        modules, sharded = models_of(self.model), c.parallel.sharded_optimizer
        return build_optimizer(named_parameters(self.model), c.optim, self.mesh, sharded=sharded, modules=modules)

    def _build_runner(self) -> Runner | None:
        """None: micro-batches one after another through the whole model."""
        if not isinstance(self.model, Chunks):
            return None
        c = self.config
        again = bool(set(c.train.recompute.modules) - OPERATORS)
        return PipelineRunner(self.model, self.optimizer, self.mesh, c.parallel, device=self.device, recompute=again)

    def _open_validation(self) -> BatchLoader | None:
        return validation_loader(self.config, self.mesh, pin_memory=self.device.type == "cuda")

    def _count_parameters(self) -> int:
        return parameter_count(self.config.model)

    def _tensors(self) -> Tensors:
        """What a checkpoint holds."""
        return tensors_of(self.model, self.optimizer)

    def _open_data(self) -> TrainingData | ClassData:
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
            self._tensors(),
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
        teller = Teller(self.config, self.mesh, self.device, report, self.skipping, late=self.lag > 0, dtype=self.dtype)
        batches = self.data.batches(self.state.step)
        unread: deque[Done] = deque()
        try:
            while self.state.step < self.total_steps:
                unread.append(self._one_step(batches, unread, signals, report))
                asked = Asked()
                # The numbers of a step are read `lag` steps later; before a save or a stop all of them, for they may forbid it.
                while len(unread) > (0 if asked or self._is_due() else self.lag):
                    done = unread.popleft()
                    asked = asked.merged(teller.tell(done))
                    if self.skipping is not None and self.skipping.must_rewind(done.step):
                        unread.clear()
                        self._go_back(self.skipping, done.step)
                        report.go_back(self.state.step)
                        batches = self.data.batches(self.state.step)
                if self._save_if_due(asked):
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

    def _is_due(self) -> bool:
        """Whether the schedule, or the end of the run, asks for a checkpoint of the current step."""
        step, every = self.state.step, self.config.checkpoint.every
        return step == self.total_steps or (every is not None and step % every == 0)

    def _save_if_due(self, asked: Asked) -> bool:
        """Save when the schedule, the end of the run or a signal asks for it; True means stop now."""
        if asked.failed:
            self.saver.wait()
        if asked.save or asked.stop or self._is_due():
            self.save()
        return asked.stop

    def _go_back(self, skipping: Skipping, at: int) -> None:
        """To the newest checkpoint from before the row of skipped steps that ends with `at`."""
        self.saver.wait()
        self.state.step = at
        rewind(self.config, self.state, self.model, self.optimizer, skipping.guard, self.mesh)
        self.data, self.stage = self._open_data(), None
        self._say(
            f"rewound from step {at} to the checkpoint of step {self.state.step}; left out from now on: steps "
            f"{', '.join(map(str, self.state.left_out))}"
        )

    def _one_step(
        self,
        batches: Iterator[tuple[Stage, list[MicroBatch]]],
        unread: Iterable[Done],
        signals: Signals,
        report: Report,
    ) -> Done:
        """Do the next step, or on a GPU queue it. `unread`: those before it whose numbers are not read yet."""
        start = time.perf_counter()
        stage, micro_batches = next(batches)
        data_wait_s = time.perf_counter() - start
        if stage is not self.stage:
            self.stage = stage
            self._say(self.data.describe(stage))
        state, records = self.state, self.mesh.records
        records.step = step = state.step + 1
        done = Done(step, stage, start, lr=lr_at(state.step, self.config.optim, self.total_steps))
        numbers: dict[str, torch.Tensor] = {}
        blocked_before_s = records.blocked_s
        if state.leaves_out(step):
            self.optimizer.set_step_count(step)  # the optimizer counts it, as it counts a skipped one
            done.left_out = True
        else:
            numbers = self._update(done, micro_batches)
            state.tokens += stage.settings.seq_len * stage.settings.global_batch_size
        state.step, done.tokens = step, state.tokens
        self._say_end(stage)
        step_s, mem_gib = time.perf_counter() - start, peak_memory_gib(self.device)
        blocked_s = records.blocked_s - blocked_before_s
        if not done.left_out:
            busy_s = step_s - blocked_s
            ranks = report.straggler.add(step, busy_s=busy_s, data_wait_s=data_wait_s, mem_gib=mem_gib)
            numbers |= {} if ranks is None else {"ranks": ranks}
        worst = [step_s, data_wait_s, mem_gib, blocked_s, *signals.take(failed=self.saver.failed)]
        numbers["worst"] = self.mesh.world.all_reduce(on_device(worst, self.device), "max")
        done.numbers = Late(numbers)
        done.valid = self._evaluated([*unread, done])
        if not done.left_out:  # whose row has no room for them: the next one tells
            done.comm_bytes = records.take().bytes
            done.save_wait_s, self.save_wait_s = self.save_wait_s, 0.0
        return done

    def _update(self, done: Done, micro_batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
        """The update of the step; returns its numbers, on the device."""
        if done.step % self.config.log.every == 0:
            done.groups = self.data.group_names(done.stage)
        guard = self.skipping.guard if self.skipping is not None else None
        done.compared_with = guard.snapshot() if guard is not None and self.lag else None
        groups = len(done.groups) if done.groups is not None else 0
        result = self.train_step.update(micro_batches, lr=done.lr, groups=groups)
        found = {"loss": result.loss, "grad_norm": result.grad_norm, "skip": result.skip, "by_group": result.by_group}
        if self.config.train.z_loss:
            found["z_loss"] = result.z_loss
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _before_update(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor | None:
        """Gradients are there, weights are about to change: a save that still copies them comes first."""
        self.save_wait_s += self.saver.wait_staged()
        return self.skipping.guard(loss, grad_norm) if self.skipping is not None else None

    def _evaluated(self, begun: Iterable[Done]) -> dict[str, float]:
        """The loss on the validation samples, if it is time for it. `begun`: steps whose numbers are not read yet."""
        step, every = self.state.step, self.config.train.eval_every
        if self.validation is None or (step < self.total_steps and step % (every or 1)):
            return {}
        for done in begun:
            done.numbers.wait()  # the time that the evaluation takes is not theirs
        return {"valid_loss": self.evaluate(self.validation)}

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
