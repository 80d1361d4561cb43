"""Checkpoints through torch.distributed.checkpoint: one folder per step, every tensor under its global, unfused shape.

RUN/checkpoints/step_00000100/   config.yaml  state.json  manifest.json  tokenizer/  tensors/
RUN/checkpoints/latest           text file with the folder's name, replaced atomically

A folder appears under its final name only when all ranks have written and synced all of it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.api import CheckpointException

from opencoder.config import Config
from opencoder.config_loading import parse_tree
from opencoder.errors import DataError, Failure
from opencoder.files import replace_directory, write_json, write_text
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.placement import Placement

from .parts import as_global

Tensors = Mapping[str, tuple[torch.Tensor, Placement]]
"""Checkpoint key → (this rank's part, where it lives in the global tensor)."""

FORMAT = 1


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def save(
    run_dir: Path,
    step: int,
    tensors: Tensors,
    mesh: Mesh,
    *,
    config: Config,
    state: dict[str, Any],
    tokenizer: Path | None = None,
    keep: int | None = None,
) -> Path:
    """Write the checkpoint of `step` from all ranks; returns its folder. Raises Failure; older ones stay untouched."""
    folder = run_dir / "checkpoints" / step_name(step)
    temporary = folder.with_name(f".{folder.name}.tmp")
    first = mesh.world.rank == 0
    try:
        if first:
            clear_leftovers(run_dir)
            temporary.mkdir(parents=True)
        mesh.world.barrier()
        write_tensors(temporary / "tensors", tensors, mesh)
        if first:
            write_text(temporary / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
            write_json(temporary / "state.json", {"format": FORMAT, "step": step, **state})
            if tokenizer is not None:
                shutil.copytree(tokenizer, temporary / "tokenizer")
            finish(temporary, folder)
            write_text(folder.parent / "latest", folder.name + "\n")
    except (OSError, CheckpointException) as error:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise Failure(
            f"checkpoint of step {step} could not be written under {folder.parent} ({_cause(error)}): free disk space "
            "and start the same command again; it resumes from the newest earlier checkpoint, which is untouched"
        ) from error
    if first and keep is not None:
        for old in list_checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    mesh.world.barrier()
    return folder


def finish(temporary: Path, folder: Path) -> None:
    """Add the manifest of file sizes and give the folder its final name."""
    files = {str(p.relative_to(temporary)): p.stat().st_size for p in sorted(temporary.rglob("*")) if p.is_file()}
    write_json(temporary / "manifest.json", {"format": FORMAT, "files": files})
    replace_directory(temporary, folder)


def write_tensors(folder: Path, tensors: Tensors, mesh: Mesh) -> None:
    """Write `tensors` from all ranks; parts equal on several ranks are written once."""
    state = {key: as_global(local, placement, mesh) for key, (local, placement) in tensors.items()}
    with _single_process_is_meant():
        dcp.save(state, checkpoint_id=folder, no_dist=mesh.device_mesh is None)


def _cause(error: BaseException) -> str:
    """The first underlying message of a checkpoint error, which wraps one exception per rank."""
    if isinstance(error, CheckpointException):
        for rank, (inner, _) in error.failures.items():
            return f"rank {rank}: {inner}"
    return str(error)


def clear_leftovers(run_dir: Path) -> None:
    """Remove half-written checkpoints of a run that was killed."""
    for leftover in (run_dir / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(leftover)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(p for p in (run_dir / "checkpoints").glob("step_*") if p.is_dir())


def resolve(path: str | Path) -> Path:
    """The checkpoint folder meant by a checkpoint or run folder (its latest). Raises DataError if there is none."""
    folder = Path(path)
    if (folder / "state.json").is_file():
        return folder
    latest = folder / "checkpoints" / "latest"
    if latest.is_file():
        return latest.parent / latest.read_text(encoding="utf-8").strip()
    if found := list_checkpoints(folder):
        return found[-1]
    raise DataError(f"{folder} is no checkpoint and no run folder with one: give RUN or RUN/checkpoints/step_…")


def newest(run_dir: Path) -> Path | None:
    """The run's latest checkpoint, or None if it has none."""
    has_any = (run_dir / "checkpoints" / "latest").is_file() or list_checkpoints(run_dir)
    return resolve(run_dir) if has_any else None


def check_files(folder: Path) -> None:
    """Compare the folder with its manifest. Raises DataError naming the first file that is missing or cut short."""
    manifest = _read_json(folder / "manifest.json")
    for name, size in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise DataError(f"checkpoint {folder} lacks {name}: copy it back or use an earlier checkpoint")
        if file.stat().st_size != size:
            raise DataError(
                f"checkpoint {folder}: {name} has {file.stat().st_size} bytes instead of {size}: copy it again or use "
                "an earlier checkpoint"
            )


def read_config(folder: Path) -> Config:
    """The resolved configuration the checkpoint was written with."""
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"checkpoint {folder} has no readable config.yaml ({error.strerror})") from error
    return parse_tree(Config, tree)


def read_state(folder: Path) -> dict[str, Any]:
    """The position of the run: step, samples and tokens consumed, data stages."""
    state = _read_json(folder / "state.json")
    if state.get("format") != FORMAT:
        raise DataError(f"checkpoint {folder} has format {state.get('format')}; this version reads format {FORMAT}")
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): the checkpoint is incomplete, use another one") from error
    return value


def load_tensors(folder: Path, tensors: Tensors, mesh: Mesh) -> None:
    """Fill `tensors` in place from a checkpoint written at any layout. Raises DataError naming what does not fit."""
    check_files(folder)
    saved = dcp.FileSystemReader(folder / "tensors").read_metadata().state_dict_metadata
    for key, (_, placement) in tensors.items():
        if key not in saved:
            raise DataError(f"checkpoint {folder} has no tensor {key}: it was written by another model or optimizer")
        shape = tuple(getattr(saved[key], "size", ()))
        if shape != placement.global_shape:
            raise DataError(
                f"checkpoint {folder}: {key} has shape {shape}, the model asks for {placement.global_shape}: use the "
                "model configuration the checkpoint was written with"
            )
    state = {key: as_global(local.detach(), placement, mesh) for key, (local, placement) in tensors.items()}
    with _single_process_is_meant():
        dcp.load(state, checkpoint_id=folder / "tensors", no_dist=not dist.is_initialized())


def load_whole(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill whole tensors in place, in this process alone."""
    with _single_process_is_meant():
        dcp.load(tensors, checkpoint_id=folder / "tensors", no_dist=True)


@contextmanager
def _single_process_is_meant() -> Iterator[None]:
    """Without torch's remark that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
