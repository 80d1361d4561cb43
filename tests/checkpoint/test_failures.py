"""Saving goes wrong on one rank: every rank hears of it at once, in the same words, and the older checkpoint stays."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from opencoder.checkpoint import folders, native
from opencoder.config import Config
from opencoder.errors import Failure, UserError
from tests.checkpoint.test_native import STATE, build, train_and_save
from tests.harness import RankError, run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, written by two ranks, and a tokenizer folder."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(train_and_save, 2, 2, str(folder))
    (folder / "tok").mkdir()
    return folder


@pytest.fixture
def run(tmp_path: Path, saved: Path) -> Path:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def defect(*_: Any, **__: Any) -> None:
    raise KeyError("a defect")


def break_rank(kind: str) -> None:
    """Makes this process fail at one place of a save."""
    if kind == "shard":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        return
    target, name = {
        "folder": (Path, "mkdir"),
        "manifest": (native, "finish"),
        "old ones": (native, "drop_old"),
        "tokenizer": (native.shutil, "copytree"),  # type: ignore[attr-defined]
        "defect": (native, "write_text"),
        "part": (native, "global_part"),
    }[kind]
    setattr(target, name, defect if kind in ("defect", "part") else full_disk)


def save_on(rank: int, world: int, folder: str, broken_rank: int, kind: str) -> tuple[str, str, bool, float]:
    mesh, model, _, weights = build(world, 4)
    config = Config.model_validate({"run_dir": folder, "model": model.config.model_dump()})
    mesh.world.barrier()
    if rank == broken_rank:
        break_rank(kind)
    start = time.monotonic()
    try:
        native.save(Path(folder), 2, weights, mesh, config=config, state=STATE, tokenizer=Path(folder) / "tok", keep=1)
    except (Failure, UserError) as error:
        return type(error).__name__, str(error), error.told_elsewhere, time.monotonic() - start
    return "no error", "", False, time.monotonic() - start


@pytest.mark.parametrize(
    ("kind", "rank"), [("shard", 0), ("shard", 1), ("folder", 0), ("manifest", 0), ("tokenizer", 0), ("old ones", 0)]
)
def test_what_fails_on_one_rank_fails_on_all_with_the_same_words(kind: str, rank: int, run: Path) -> None:
    found = run_ranks(save_on, 2, str(run), rank, kind)
    assert {name for name, *_ in found} == {"Failure"}
    assert found[0][1] == found[1][1]
    assert f"rank {rank}: " in found[0][1]
    assert "could not be removed" in found[0][1] if kind == "old ones" else "could not be written" in found[0][1]
    assert [told_elsewhere for _, _, told_elsewhere, _ in found] == [False, True]
    assert all(seconds < 20 for *_, seconds in found)
    kept = "step_00000002" if kind == "old ones" else "step_00000001"
    assert folders.resolve(run).name == kept
    assert folders.problem_of(folders.resolve(run)) is None
    assert not list((run / "checkpoints").glob(".step_*"))


@pytest.mark.parametrize(("kind", "rank"), [("defect", 0), ("part", 1)])
def test_a_defect_keeps_its_traceback_and_stops_the_other_ranks(kind: str, rank: int, run: Path) -> None:
    with pytest.raises(RankError, match="a defect") as caught:
        run_ranks(save_on, 2, str(run), rank, kind, timeout_s=30)
    assert f"rank {rank}:" in str(caught.value)
    assert "KeyError" in str(caught.value)


def die_in(rank: int, world: int, folder: str, call: int) -> None:
    """Retention of three checkpoints to one, killed at the `call`-th file that is unlinked."""
    calls = iter(range(1000))
    unlink = os.unlink

    def deadly(*args: Any, **kwargs: Any) -> None:
        if next(calls) == call:
            os._exit(9)
        unlink(*args, **kwargs)

    os.unlink = deadly
    folders.drop_old(Path(folder), 1)


@pytest.mark.parametrize("call", [0, 1, 4])
def test_killed_while_removing_old_ones_leaves_no_half_checkpoint(call: int, run: Path) -> None:
    first = folders.resolve(run)
    for step in (2, 3):
        shutil.copytree(first, first.with_name(folders.step_name(step)))
    with pytest.raises(RankError, match="exit code 9"):
        run_ranks(die_in, 1, str(run), call)
    left = folders.list_checkpoints(run)
    assert len(left) in (1, 2)
    assert all(folders.problem_of(folder) is None for folder in left)
    folders.clear_leftovers(run)
    folders.drop_old(run, 1)
    assert [p.name for p in first.parent.iterdir() if p.name != "latest"] == ["step_00000003"]


def test_a_checkpoint_moved_aside_and_not_replaced_comes_back(run: Path) -> None:
    folder = folders.resolve(run)
    folder.rename(folder.with_name(f".{folder.name}.old"))
    folders.clear_leftovers(run)
    assert folders.problem_of(folder) is None


def test_every_nth_checkpoint_is_never_dropped(run: Path) -> None:
    first = folders.resolve(run)
    for step in range(2, 8):
        shutil.copytree(first, first.with_name(folders.step_name(step)))
    (first.with_name(folders.step_name(5)) / "state.json").unlink()  # damaged: told about, not counted, not removed
    folders.drop_old(run, 2, 3)
    assert [folders.step_of(p) for p in folders.list_checkpoints(run)] == [3, 5, 6, 7]
