"""What parallel/pipeline.py takes from the inside of torch.distributed.pipelining is as it was when it was written for torch
2.13: a new torch that changes it must fail here and not in a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.stage import _RecvInfo

pytestmark = pytest.mark.fast


def names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


STEP = ["self", "arg_mbs", "kwarg_mbs", "target_mbs", "losses", "return_outputs", "loss_kwargs"]


@pytest.mark.parametrize(
    "schedule", ["Schedule1F1B", "ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble", "ScheduleZBVZeroBubble"]
)
def test_a_schedule_takes_lists_of_micro_batches(schedule: str) -> None:
    kind = getattr(schedules, schedule)
    assert names(kind._step_microbatches) == STEP
    assert {"n_microbatches", "loss_fn", "scale_grads"} <= set(names(kind.__init__))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("perform_reduce_grad", ["self", "grad_scale_factor"]),
        ("forward_one_chunk", ["self", "fwd_chunk_id", "args", "kwargs", "save_forward_output"]),
        ("backward_one_chunk", ["self", "bwd_chunk_id", "loss", "full_backward", "last_backward"]),
        ("backward_weight_one_chunk", ["self", "bwd_chunk_id", "last_backward"]),
        ("get_fwd_recv_ops", ["self", "fwd_chunk_id"]),
        ("get_bwd_recv_ops", ["self", "bwd_chunk_id"]),
        ("_setup_forward_recv_info", ["self", "num_microbatches", "has_backward"]),
        ("_create_grad_recv_info", ["self", "act_send_info"]),
        ("clear_runtime_states", ["self"]),
    ],
)
def test_a_stage_has_the_methods_that_ours_extends(method: str, parameters: list[str]) -> None:
    assert names(getattr(PipelineStage, method)) == parameters


def test_what_a_schedule_without_backward_is_made_of() -> None:
    assert names(schedules._add_send_recv) == ["compute_actions", "stage_to_rank", "num_stages"]
    assert schedules._Action._fields[:3] == ("stage_index", "computation_type", "microbatch_index")
    assert schedules._PipelineScheduleRuntime._step_microbatches.__qualname__.startswith("_PipelineScheduleRuntime")
    assert {"input_name", "source", "buffer", "tensor_meta", "is_root_arg"} <= set(names(_RecvInfo.__init__))
