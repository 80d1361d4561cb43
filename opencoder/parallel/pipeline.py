"""Stages of a pipeline under the schedules of torch.distributed.pipelining, fed with lists of micro-batches.

What must hold, found by experiment on the pinned torch (design §4.6; tests/parallel/test_torch_guard.py):
- `step()` would cut every tensor it is given into equal pieces, document bounds too: `_step_microbatches` is called instead.
- Head, loss and the division by N are inside the last stage, and the schedule's loss function hands its result on: under
  zero-bubble a head outside of the stage gets no gradient.
- Under zero-bubble no post-accumulate hook fires. What is to happen to gradients happens in methods of `Stage`.
- All shapes are told beforehand: otherwise torch runs micro-batch 0 once more at the start to learn them.

It knows no model: a stage is a module that takes one tensor and gives one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    FULL_BACKWARD,
    _Action,
    _add_send_recv,
    _PipelineScheduleRuntime,
)
from torch.distributed.pipelining.stage import _RecvInfo

from .group import Group
from .layout import Schedule, stage_ranks
from .transfers import BACKWARD, Transfers, communication_error
from .transfers import FORWARD as FORWARD_PASS

_SCHEDULES: dict[Schedule, Callable[..., Any]] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zb": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
# On any exception it prints the whole schedule, which says nothing to who looks for the cause.
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)
_KINDS: dict[Any, Literal["F", "B", "I", "W"]] = {
    FORWARD: "F",
    FULL_BACKWARD: "B",
    BACKWARD_INPUT: "I",
    BACKWARD_WEIGHT: "W",
}
Call = Callable[[int], None]
"""Is told the number of a stage."""


class Shapes(NamedTuple):
    """What travels through the pipeline for one micro-batch, as tensors on the meta device."""

    first: torch.Tensor
    """Input of the first stage."""
    between: torch.Tensor
    """Output of each stage but the last, which gives a 0-dim loss of the same type."""


class Work(NamedTuple):
    """What a rank does at one time."""

    stage: int
    kind: Literal["F", "B", "I", "W"]
    """Forward; backward; backward of inputs; backward of weights."""
    micro_batch: int


class Stage(PipelineStage):
    """One stage. `accumulated` is called after each micro-batch's weight gradients, `complete` once after the last."""

    def __init__(
        self,
        module: nn.Module,
        index: int,
        num_stages: int,
        shapes: Shapes,
        *,
        pp: Group,
        device: torch.device,
        accumulated: Call,
        complete: Call,
        split_backward: bool,
        transfers: Transfers,
    ) -> None:
        between = shapes.between.requires_grad_()
        last = index == num_stages - 1
        super().__init__(
            module,
            index,
            num_stages,
            device,
            input_args=shapes.first if index == 0 else between,
            output_args=between.new_empty(()).requires_grad_() if last else between,
            group=pp.process_group,
            # Where a schedule asks for the gradients of input and weights one after the other, torch leaves it to this builder: all
            # of them come at the first call, and nothing is left to do at the second.
            dw_builder=None if split_backward else lambda: _nothing,
        )
        self._accumulated, self._complete, self._transfers = accumulated, complete, transfers

    # ---- buffers: torch makes one for every micro-batch of a step and keeps them all; here they live while in use ----

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(num_microbatches, has_backward)
        for infos in self.args_recv_info.values():
            _drop(infos)

    def _create_grad_recv_info(self, act_send_info: dict[int, Any]) -> tuple[_RecvInfo, ...]:
        infos = super()._create_grad_recv_info(act_send_info)
        _drop(infos)
        return infos

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        self._make_room(self.args_recv_info[fwd_chunk_id])
        operations = super().get_fwd_recv_ops(fwd_chunk_id)
        self._transfers.receive((self.stage_index, FORWARD_PASS, fwd_chunk_id), operations)
        return operations

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        if self.has_backward and not self.is_last:
            self._make_room(self.grad_recv_info[bwd_chunk_id])
        operations = super().get_bwd_recv_ops(bwd_chunk_id)
        self._transfers.receive((self.stage_index, BACKWARD, bwd_chunk_id), operations)
        return operations

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        operations = super().get_fwd_send_ops(fwd_chunk_id)
        self._transfers.send(operations)
        return operations

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        operations = super().get_bwd_send_ops(bwd_chunk_id)
        self._transfers.send(operations)
        return operations

    def _make_room(self, infos: Sequence[_RecvInfo]) -> None:
        for info in infos:
            if not info.is_root_arg and info.tensor_meta is not None:
                meta = info.tensor_meta
                info.buffer = torch.empty(meta.shape, dtype=meta.dtype, device=self.device)

    # ---- what happens to gradients ----

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self._transfers.compute((self.stage_index, FORWARD_PASS, fwd_chunk_id)):
            result = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _drop(self.args_recv_info[fwd_chunk_id])  # the graph holds it as long as it is needed
        return result

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        with self._transfers.compute((self.stage_index, BACKWARD, bwd_chunk_id)):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
            if self.has_backward and not self.is_last:
                _drop(self.grad_recv_info[bwd_chunk_id])
            if self.has_backward and (full_backward or self.dw_builder is not None):
                self._accumulated(self.stage_index)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        with self._transfers.compute():
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
            if self.has_backward and self.dw_builder is None:
                self._accumulated(self.stage_index)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        with self._transfers.compute():
            super().perform_reduce_grad(grad_scale_factor)
            self._complete(self.stage_index)


def _drop(infos: Sequence[_RecvInfo]) -> None:
    for info in infos:
        info.buffer = None


def _ignore(stage: int) -> None:
    pass


def _nothing() -> None:
    pass


class Pipeline:
    """The stages of this rank, for steps of `num_micro_batches` micro-batches of one shape. Another number or shape needs
    another pipeline."""

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        ranks: Sequence[int],
        shapes: Shapes,
        num_micro_batches: int,
        *,
        schedule: Schedule | None,
        pp: Group,
        device: torch.device,
        accumulated: Call = _ignore,
        complete: Call = _ignore,
        split_backward: bool = True,
    ) -> None:
        """`modules`: number of a stage → module, for the stages of this rank, ascending; `ranks` of all stages.
        `schedule` None: forward alone. `split_backward` False: a zero-bubble schedule works out the gradients of weights
        together with those of inputs. Modules that run again in the backward pass need that: torch would run them again for
        every weight, and torch.utils.checkpoint refuses it. Raises ValueError for a number of micro-batches that the
        schedule cannot serve."""
        self.size = num_micro_batches
        self.train = schedule is not None
        self.transfers = Transfers(pp)
        self.stages = [
            Stage(
                module,
                index,
                len(ranks),
                shapes,
                pp=pp,
                device=device,
                accumulated=accumulated,
                complete=complete,
                split_backward=split_backward,
                transfers=self.transfers,
            )
            for index, module in modules.items()
        ]
        if schedule is None:
            self.schedule = _forward_only(self.stages, ranks, num_micro_batches)
            return
        self.schedule = _SCHEDULES[schedule](
            self.stages[0] if schedule == "1f1b" else self.stages,
            n_microbatches=num_micro_batches,
            loss_fn=lambda loss, _: loss,
            scale_grads=False,
        )

    def run(self, inputs: Sequence[torch.Tensor], keywords: Sequence[dict[str, Any]]) -> None:
        """Take all micro-batches through: `inputs` to the first stage, `keywords` to each. Raises CommunicationError if
        another rank is gone or does not come in time."""
        for stage in self.stages:
            stage.clear_runtime_states()
            stage.has_backward = self.train
        first, last = self.stages[0].is_first, self.stages[-1].is_last
        self.transfers.begin()
        try:
            self.schedule._step_microbatches(
                [(x,) if first else () for x in inputs],
                list(keywords),
                [None] * self.size if last and self.train else None,
                return_outputs=False,
            )
        except RuntimeError as error:  # torch wraps what a stage raises into another
            if (found := communication_error(error, self.transfers)) is not None:
                self.transfers.pp.records.wait(None)
                raise found from error
            raise
        self.transfers.end()


def _forward_only(stages: list[Stage], ranks: Sequence[int], num_micro_batches: int) -> Any:
    """A schedule without backward for stages on any ranks: pp micro-batches at a time through each stage of a rank."""
    pp = max(ranks) + 1
    rounds = [range(begin, min(begin + pp, num_micro_batches)) for begin in range(0, num_micro_batches, pp)]
    order = {
        rank: [
            _Action(stage, FORWARD, micro_batch)
            for micro_batches in rounds
            for stage, owner in enumerate(ranks)
            if owner == rank
            for micro_batch in micro_batches
        ]
        for rank in range(pp)
    }
    runtime = _PipelineScheduleRuntime(stages, num_micro_batches)
    runtime.pipeline_order_with_comms = _add_send_recv(order, lambda stage: ranks[stage], len(ranks))
    for stage in stages:
        stage.stage_index_to_group_rank = dict(enumerate(ranks))
    return runtime


def order_of_work(schedule: Schedule, pp: int, virtual_stages: int, num_micro_batches: int) -> list[list[Work]]:
    """For each rank of a pipeline what it does, in its order: torch's own, without starting anything."""
    n = num_micro_batches
    if schedule == "1f1b":
        found = []
        for stage in range(pp):
            ahead = min(n, pp - stage)
            work = [Work(stage, "F", i) for i in range(ahead)]
            for i in range(n):
                work.append(Work(stage, "B", i))
                work += [Work(stage, "F", i + ahead)] if i + ahead < n else []
            found.append(work)
        return found
    bare: Any = object.__new__(_SCHEDULES[schedule])  # type: ignore[arg-type]
    bare.pp_group_size, bare.n_local_stages, bare._n_microbatches = pp, virtual_stages, n
    bare.num_stages = len(stage_ranks(schedule, pp, virtual_stages))
    bare.microbatches_per_round = n // max(1, n // pp)
    return [
        [
            Work(action.stage_index, _KINDS[action.computation_type], action.microbatch_index)
            for action in bare._calculate_single_rank_operations(rank)
            if action is not None
        ]
        for rank in range(pp)
    ]
