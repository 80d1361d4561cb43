"""Damage is found on load, by whichever rank reads the file, and a run goes back to its newest intact checkpoint."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from pathlib import Path

import pytest

from opencoder.checkpoint import folders, native
from opencoder.errors import DataError
from opencoder.parallel.mesh import create_mesh
from tests.checkpoint.test_native import build, train_and_save
from tests.harness import run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, written by two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(train_and_save, 2, 2, str(folder))
    return folder


@pytest.fixture
def run(tmp_path: Path, saved: Path) -> Path:
    """A run with the checkpoints of steps 1, 2 and 3."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    first = folders.resolve(tmp_path)
    for step in (2, 3):
        shutil.copytree(first, first.with_name(folders.step_name(step)))
    (tmp_path / "checkpoints" / "latest").write_text("step_00000003\n")
    return tmp_path


def flip(file: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def file_of(run: Path, step: int, name: str) -> Path:
    return run / "checkpoints" / folders.step_name(step) / name


def newest(rank: int, world: int, run: str) -> str | None:
    try:
        found = folders.newest_intact(Path(run), create_mesh(tp=world).world)
    except DataError as error:
        return f"{error.told_elsewhere} {error}"
    return found.name if found else None


def test_the_manifest_holds_size_and_crc_of_every_file(run: Path) -> None:
    folder = folders.resolve(run)
    manifest = folders.read_manifest(folder)
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest) == files
    assert {"tensors/__0_0.distcp", "tensors/__1_0.distcp", "tensors/.metadata", "config.yaml"} <= files
    for name, facts in manifest.items():
        data = (folder / name).read_bytes()
        assert facts == (len(data), f"{zlib.crc32(data):08x}"), name


@pytest.mark.parametrize("name", ["tensors/__0_0.distcp", "tensors/__1_0.distcp", "state.json", "tensors/.metadata"])
def test_a_flipped_bit_is_found_and_named(run: Path, name: str) -> None:
    flip(file_of(run, 3, name))
    mesh, _, _, weights = build(1, 1)
    with pytest.raises(DataError, match=f"{name} has CRC-32 .*bytes in it have changed"):
        native.load_tensors(folders.resolve(run), weights, mesh)


@pytest.mark.parametrize("name", ["tensors/__0_0.distcp", "tensors/__1_0.distcp", "config.yaml"])
def test_a_run_goes_back_to_its_newest_intact_checkpoint(
    run: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    flip(file_of(run, 3, name))
    assert run_ranks(newest, 2, str(run)) == ["step_00000002", "step_00000002"]
    with caplog.at_level(logging.WARNING):
        assert folders.newest_intact(run) == run / "checkpoints" / "step_00000002"
    (line,) = caplog.messages
    assert f"step_00000003: {name} has CRC-32" in line
    assert line.endswith("Going back to step_00000002")


def test_latest_that_points_at_nothing_is_told(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoints" / "latest").write_text("step_00000009\n")
    for found in (folders.resolve(run), folders.newest_intact(run)):
        assert found is not None
        assert found.name == "step_00000003"
    assert all("step_00000009" in line and "Going back to step_00000003" in line for line in caplog.messages)
    assert len(caplog.messages) == 2


def test_only_damaged_checkpoints_are_an_error_on_all_ranks(run: Path) -> None:
    for step in (1, 2, 3):
        flip(file_of(run, step, "tensors/__1_0.distcp"))
    answers = run_ranks(newest, 2, str(run))
    assert [a.split(" ", 1)[0] for a in answers] == ["False", "True"]
    assert "step_00000003: tensors/__1_0.distcp has CRC-32" in answers[0]
    assert "none of the 3 checkpoints there is intact" in answers[0]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert run_ranks(newest, 2, str(tmp_path)) == [None, None]


def test_manifests_of_earlier_versions_are_read(run: Path) -> None:
    manifest = file_of(run, 3, "manifest.json")
    sizes = {name: size for name, (size, _) in folders.read_manifest(manifest.parent).items()}
    manifest.write_text(json.dumps({"format": 1, "files": sizes}))
    assert folders.problem_of(manifest.parent) is None
    os.truncate(manifest.parent / "state.json", 5)
    assert "state.json has 5 bytes instead of" in (folders.problem_of(manifest.parent) or "")
    manifest.write_text(json.dumps({"format": 3, "files": {}}))
    assert "has format 3; this version reads 1 and 2" in (folders.problem_of(manifest.parent) or "")
