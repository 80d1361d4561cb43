"""Native checkpoints: any layout to any other, damage named, a failed save leaves the older one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from opencoder.checkpoint import folders, native
from opencoder.config import Config, OptimConfig
from opencoder.errors import DataError, Failure
from opencoder.model.decoder import named_parameters
from opencoder.model.initialise import build_model
from opencoder.optim.optimizer import ReplicatedOptimizer
from opencoder.parallel.mesh import create_mesh, kv_replicas_of
from opencoder.parallel.placement import placement_of
from tests.harness import RankError, run_ranks
from tests.model.cases import SMALL, batch, model_config

STATE = {"tokens": 0, "consumed_samples": 0, "stages": [], "skipped_batches": []}


def build(tp: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any, Any]:
    config = model_config(SMALL)
    mesh = create_mesh(tp=tp, kv_replicas=kv_replicas_of(config.kv_heads, tp))
    model = build_model(config, mesh, dtype=dtype, device=torch.device("cpu"), seed=seed)
    optimizer = ReplicatedOptimizer(named_parameters(model), OptimConfig(), mesh)
    weights = {k: (p, placement_of(p)) for k, p in named_parameters(model).items()}
    return mesh, model, optimizer, weights


def train_and_save(rank: int, world: int, tp: int, folder: str, dtype: torch.dtype = torch.float32) -> None:
    mesh, model, optimizer, weights = build(tp, 1, dtype)
    tokens, labels = batch(250, 4, 32)
    model.loss(tokens, labels)[0].div(100).backward()
    optimizer.fold_gradients()
    optimizer.finish_reduction()
    optimizer.step(lr=1e-2)
    config = Config.model_validate({"run_dir": folder, "model": model.config.model_dump()})
    native.save(Path(folder), 1, {**weights, **optimizer.state_tensors()}, mesh, config=config, state=STATE)


def load_whole(rank: int, world: int, tp: int, folder: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Everything in the checkpoint as loaded at this layout, with where each part belongs."""
    mesh, _, optimizer, weights = build(tp, 2, dtype)
    tensors = {**weights, **optimizer.state_tensors()}
    native.load_tensors(folders.resolve(folder), tensors, mesh)
    return {key: (t.detach().clone(), p.slice_of(mesh)) for key, (t, p) in tensors.items()}


@pytest.mark.parametrize(
    ("saved_at", "loaded_at"),
    [((1, 1), (2, 2)), ((2, 2), (1, 1)), ((4, 2), (2, 1)), ((4, 4), (2, 2)), ((1, 1), (4, 4))],
)
def test_weights_and_optimizer_state_load_at_another_layout(
    saved_at: tuple[int, int], loaded_at: tuple[int, int], tmp_path: Path
) -> None:
    run_ranks(train_and_save, saved_at[0], saved_at[1], str(tmp_path))
    truth = run_ranks(load_whole, 1, 1, str(tmp_path))[0]
    fresh = {k: p for k, (p, _) in build(1, 2)[3].items()}
    assert any(not torch.equal(truth[k][0], fresh[k]) for k in fresh), "loading must have changed something"
    assert any(key.startswith("optim.exp_avg.") and truth[key][0].abs().sum() > 0 for key in truth)
    for result in run_ranks(load_whole, loaded_at[0], loaded_at[1], str(tmp_path)):
        for key, (part, where) in result.items():
            assert torch.equal(part, truth[key][0][where]), key


def test_master_weights_of_16_bit_training_are_saved(tmp_path: Path) -> None:
    run_ranks(train_and_save, 1, 1, str(tmp_path), torch.bfloat16)
    loaded = run_ranks(load_whole, 2, 2, str(tmp_path), torch.bfloat16)[0]
    key = "model.layers.0.mlp.up_proj.weight"
    master, weight = loaded[f"optim.master.{key}"][0], loaded[key][0]
    assert master.dtype == torch.float32
    assert torch.equal(master.bfloat16(), weight)
    assert not torch.equal(master, weight.float())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    train_and_save(0, 1, 1, str(tmp_path))
    return folders.resolve(tmp_path)


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    shard = next((checkpoint / "tensors").glob("*.distcp"))
    shard.unlink()
    with pytest.raises(DataError, match=f"lacks tensors/{shard.name}"):
        load_whole(0, 1, 1, str(checkpoint))


def test_a_cut_shard_is_named(checkpoint: Path) -> None:
    shard = next((checkpoint / "tensors").glob("*.distcp"))
    os.truncate(shard, 1000)
    with pytest.raises(DataError, match="has 1000 bytes instead of"):
        load_whole(0, 1, 1, str(checkpoint))


def test_another_model_is_refused(checkpoint: Path) -> None:
    mesh, _, _, weights = build(1, 1)
    parameter, placement = weights.pop("model.norm.weight")
    with pytest.raises(DataError, match="has no tensor another"):
        native.load_tensors(checkpoint, {"another": (parameter, placement)}, mesh)


def test_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no checkpoint and no run folder"):
        folders.resolve(tmp_path)


def test_leftovers_of_a_kill_are_cleared_and_old_checkpoints_dropped(tmp_path: Path) -> None:
    train_and_save(0, 1, 1, str(tmp_path))
    leftover = tmp_path / "checkpoints" / ".step_00000002.tmp"
    shutil.copytree(folders.resolve(tmp_path), leftover)
    mesh, model, _, weights = build(1, 1)
    config = Config.model_validate({"run_dir": str(tmp_path), "model": model.config.model_dump()})
    native.save(tmp_path, 2, weights, mesh, config=config, state=STATE, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name != "latest"] == ["step_00000002"]
    assert folders.resolve(tmp_path).name == "step_00000002"


def save_with_a_full_disk(rank: int, world: int, folder: str) -> None:
    """Stands for a full disk: no file of this process may grow beyond 4 KB, so writing a shard fails with an error."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    mesh, model, _, weights = build(world, 4)
    config = Config.model_validate({"run_dir": folder, "model": model.config.model_dump()})
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    native.save(Path(folder), 2, weights, mesh, config=config, state=STATE)


@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_while_saving_leaves_the_previous_checkpoint(world: int, tmp_path: Path) -> None:
    run_ranks(train_and_save, world, world, str(tmp_path))
    before = run_ranks(load_whole, 1, 1, str(tmp_path))[0]
    with pytest.raises(RankError, match="could not be written") as caught:
        run_ranks(save_with_a_full_disk, world, str(tmp_path))
    assert Failure.__name__ in str(caught.value)
    assert folders.resolve(tmp_path).name == "step_00000001"
    after = run_ranks(load_whole, 1, 1, str(tmp_path))[0]
    assert all(torch.equal(before[key][0], after[key][0]) for key in before)
