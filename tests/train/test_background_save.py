"""A copy that takes its time: what a background save writes is the state of its step all the same."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from opencoder.checkpoint import folders, native
from opencoder.checkpoint.saver import Saver
from opencoder.train.__main__ import main
from opencoder.train.metrics import read_rows
from tests.train.test_run import config, prefix  # noqa: F401  a fixture

SLOW_S = 0.2


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = folders.list_checkpoints(run)[step - 1] / "tensors"
    metadata = native.dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    whole = {key: torch.empty(facts.size, dtype=facts.properties.dtype) for key, facts in metadata.items()}  # type: ignore[union-attr]
    native.load_whole(folder.parent, whole)
    return whole


@pytest.mark.parametrize("sharded", [False, True])
def test_an_update_waits_for_the_copy_of_the_state_before_it(
    tmp_path: Path,
    prefix: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    sharded: bool,
) -> None:
    keys = {"train": {"steps": 3}, "optim": {"decay_steps": 1, "warmup_steps": 0}}
    keys["parallel"] = {"sharded_optimizer": sharded}  # type: ignore[dict-item]
    truth = config(tmp_path, prefix, "truth", checkpoint={"every": 1}, **keys)
    ours = config(tmp_path, prefix, "ours", checkpoint={"every": 1, "async_save": True}, **keys)
    main([str(truth)])
    copied: list[float] = []
    stage = Saver._stage

    def slow_stage(self: Saver, tensors: Any) -> Any:
        time.sleep(SLOW_S)
        copied.append(time.perf_counter())
        return stage(self, tensors)

    monkeypatch.setattr(Saver, "_stage", slow_stage)
    main([str(ours)])
    assert len(copied) == 3
    for step in (1, 2, 3):
        expected, found = saved(tmp_path / "truth", step), saved(tmp_path / "ours", step)
        assert expected.keys() == found.keys()
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    waits = [row["save_wait_s"] for row in read_rows(tmp_path / "ours" / "metrics.jsonl")]
    assert waits[0] < 0.01  # nothing is under way
    assert all(wait > 0.01 for wait in waits[1:])
