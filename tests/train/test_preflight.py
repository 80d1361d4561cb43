"""The looks before the first step: one rank reads, all hear, one line tells; and what they warn of."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from opencoder.config import Config
from opencoder.errors import ConfigError, UserError
from opencoder.parallel.group import Group
from opencoder.parallel.mesh import Mesh, create_mesh
from opencoder.train import preflight
from tests.harness import run_cases, run_ranks
from tests.model.cases import SMALL, model_config

CPU = torch.device("cpu")


def settings(run_dir: Path, **train: Any) -> Config:
    tree = {"run_dir": str(run_dir), "model": model_config(SMALL).model_dump(), "train": {"steps": 1, **train}}
    return Config.model_validate(tree)


def refused_inputs(rank: int, world: int, folder: str) -> tuple[int, str, bool]:
    """How often this rank read them, what it raised, and whether it leaves the telling to another."""
    reads = []

    def check(config: Config) -> None:
        reads.append(config)
        raise ConfigError("the dataset is another")

    preflight.check_inputs = check
    with pytest.raises(UserError) as raised:
        preflight.preflight(settings(Path(folder)), create_mesh(), CPU, say=lambda text: None)
    return len(reads), str(raised.value), raised.value.told_elsewhere


def other_run_dir(rank: int, world: int, folder: str) -> tuple[str, bool, int]:
    preflight.SEEN_WITHIN_S = 0.2
    mesh = create_mesh()
    preflight.check_run_dir(Path(folder) / "shared", mesh)
    with pytest.raises(ConfigError) as raised:
        preflight.check_run_dir(Path(folder) / f"of_rank_{rank}", mesh)
    mesh.world.barrier()
    return str(raised.value), raised.value.told_elsewhere, len(list(Path(folder).rglob(".preflight-*")))


def bandwidth(rank: int, world: int, folder: str) -> Any:
    """What is said with the key and without it; the rate where rank 1 takes 20 ms for each message."""
    said: list[str] = []
    preflight.check_inputs = lambda config: None
    for asked in (True, False):
        preflight.preflight(settings(Path(folder), bandwidth_check=asked), create_mesh(tp=2), CPU, say=said.append)
    reduce = Group.all_reduce

    def slow(self: Group, x: torch.Tensor, *args: Any) -> torch.Tensor:
        if rank == 1 and x.numel() > 1:
            time.sleep(0.02)
        return reduce(self, x, *args)

    Group.all_reduce = slow  # type: ignore[method-assign]
    return said, preflight.measure_bandwidth(create_mesh(tp=2), CPU)


def test_two_ranks_look_together(tmp_path: Path) -> None:
    work = {"inputs": refused_inputs, "run_dir": other_run_dir, "bandwidth": bandwidth}
    found = run_cases(_one_of, 2, {name: (name, str(tmp_path / name)) for name in work})
    assert found["inputs"] == [(1, "the dataset is another", False), (0, "the dataset is another", True)]

    for rank, (text, told_elsewhere, left) in enumerate(found["run_dir"]):
        assert text.startswith(
            f"run_dir={tmp_path}/run_dir/of_rank_{rank} is another folder on ranks [1] than on rank 0"
        )
        assert told_elsewhere == (rank == 1)
        assert left == 0, "the file is taken away again"

    (said, rates), (other_said, other_rates) = found["bandwidth"]
    assert said == other_said
    (line,) = said
    assert line.startswith("all-reduce: tp ")
    assert line.endswith((" GB/s (4096 KiB)", " GB/s (256 KiB)"))
    assert rates == other_rates
    size, rate = rates["tp"]
    assert size == preflight.SMALL_BYTES, "a slow network gets no large message"
    assert 0 < rate <= size / 0.02 / 1e9


def _one_of(rank: int, world: int, name: str, folder: str) -> Any:
    work: dict[str, Any] = {"inputs": refused_inputs, "run_dir": other_run_dir, "bandwidth": bandwidth}
    return work[name](rank, world, folder)


def on_machines(rank: int, world: int) -> list[list[str]]:
    """Warnings where machines have 2 processes each, and where the first has 3 of the 4."""
    found = []
    for per_machine in (2, 3):
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, lines=lines: lines.append(record.getMessage())  # type: ignore[method-assign]
        preflight.log.addHandler(handler)
        preflight.check_nodes(create_mesh(tp=2), local_rank=rank % per_machine)
        preflight.log.removeHandler(handler)
        found.append(lines)
    return found


def test_tensor_parallelism_between_machines_is_warned_of_once() -> None:
    first, *others = run_ranks(on_machines, 4)
    assert others == [[[], []]] * 3
    assert first[0] == []
    (line,) = first[1]
    assert line.startswith("WARNING: parallel.tp=2 spans machines, with up to 3 processes on each")


@pytest.mark.fast
def test_one_process_is_not_asked_of_others(tmp_path: Path) -> None:
    preflight.check_run_dir(tmp_path / "run", Mesh())
    preflight.check_nodes(Mesh(), local_rank=0)
    assert preflight.measure_bandwidth(Mesh(), CPU) == {}
    assert not (tmp_path / "run").exists()
