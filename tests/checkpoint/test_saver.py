"""Saving in the background: what is written is what was there when it began, and training's own collectives go on."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from opencoder.checkpoint import folders, native
from opencoder.checkpoint.saver import Saver
from opencoder.config import CheckpointConfig, Config
from opencoder.errors import Failure
from tests.checkpoint.test_native import STATE, build
from tests.harness import RankError, run_ranks

gate = threading.Event()


def slow_writes(monkey: Any = native) -> None:
    """Background saves wait for `gate` before they write tensors."""
    write = native.write_parts

    def gated(*args: Any, **kwargs: Any) -> Any:
        if not gate.wait(30):
            raise OSError(errno.ETIMEDOUT, "the test forgot the gate")
        return write(*args, **kwargs)

    monkey.write_parts = gated


def saver_of(folder: str, world: int, *, async_save: bool = True) -> tuple[Any, Any, Any, Saver, Config]:
    mesh, model, optimizer, weights = build(world, 4)
    config = Config.model_validate({"run_dir": folder, "model": model.config.model_dump()})
    saver = Saver(Path(folder), CheckpointConfig(async_save=async_save, keep=1), mesh, timeout_s=60)
    return mesh, {**weights, **optimizer.state_tensors()}, weights, saver, config


def train_on_while_saving(rank: int, world: int, folder: str) -> tuple[bool, bool, float]:
    mesh, tensors, weights, saver, config = saver_of(folder, world)
    slow_writes()
    before = {key: part[0].detach().clone() for key, part in tensors.items()}
    state = {**STATE, "stages": []}
    waited = saver.save(1, tensors, config=config, state=state)
    state["stages"].append("of a later step")
    waited += saver.wait_staged()
    sums = []
    for i in range(50):  # training's own collectives, while the save has some under way too
        if i == 10:
            gate.set()
        sums.append(float(mesh.world.all_reduce(torch.tensor(float(i + rank)))))
        with torch.no_grad():
            for parameter, _ in weights.values():
                parameter.add_(1)
    saver.wait()
    right = sums == [float(world * i + sum(range(world))) for i in range(50)]
    native.load_tensors(folders.resolve(folder), tensors, mesh)
    same = all(torch.equal(part[0], before[key]) for key, part in tensors.items())
    return right, same and native.read_state(folders.resolve(folder))["stages"] == [], waited


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_saved_is_what_was_there_when_the_save_began(world: int, tmp_path: Path) -> None:
    for sums_right, saved_right, waited in run_ranks(train_on_while_saving, world, str(tmp_path)):
        assert sums_right
        assert saved_right
        assert waited < 5, "the save must not wait for the gate"


def fail_on_rank_1(rank: int, world: int, folder: str) -> tuple[list[bool], str, bool]:
    _, tensors, _, saver, config = saver_of(folder, world)
    saver.save(1, tensors, config=config, state=STATE)
    saver.wait()
    if rank == 1:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    saver.save(2, tensors, config=config, state=STATE)
    deadline = time.monotonic() + 20
    while not saver.failed and time.monotonic() < deadline:
        time.sleep(0.01)
    knew = saver.failed
    try:
        saver.save(3, tensors, config=config, state=STATE)  # tells of the one before
    except Failure as error:
        return [knew, not saver.failed], str(error), error.told_elsewhere
    return [knew], "no error", False


def test_a_failure_in_the_background_comes_out_on_all_ranks(tmp_path: Path) -> None:
    found = run_ranks(fail_on_rank_1, 2, str(tmp_path))
    assert all(flags == [True, True] for flags, *_ in found)
    assert found[0][1] == found[1][1]
    assert "checkpoint of step 2 could not be written" in found[0][1]
    assert "rank 1: [Errno 27]" in found[0][1]
    assert [told for *_, told in found] == [False, True]
    assert folders.resolve(tmp_path).name == "step_00000001"


def fail_with_a_defect(rank: int, world: int, folder: str) -> None:
    _, tensors, _, saver, config = saver_of(folder, world)
    saver.save(1, tensors, config=config, state={**STATE, "stages": {1j}})
    saver.wait()


def test_a_defect_in_the_background_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="not JSON serializable"):
        run_ranks(fail_with_a_defect, 2, str(tmp_path), timeout_s=40)


def abandon(rank: int, world: int, folder: str) -> list[str]:
    import opencoder.checkpoint.saver as module

    module.ABANDON_S = 1
    _, tensors, _, saver, config = saver_of(folder, world)
    said: list[str] = []
    saver.say = said.append
    slow_writes()
    saver.save(1, tensors, config=config, state=STATE)
    saver.abandon()
    gate.set()
    saver.wait()
    return said


def test_a_run_that_ends_with_an_error_does_not_wait_for_ever(tmp_path: Path) -> None:
    (said,) = run_ranks(abandon, 1, str(tmp_path))
    assert "still being written after 1 s" in said[0]
    assert "saved" in said[1]
