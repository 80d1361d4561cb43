"""Checkpoints through torch.distributed.checkpoint: one folder per step, every tensor under its global, unfused shape.

RUN/checkpoints/step_00000100/   config.yaml  state.json  manifest.json  tokenizer/  tensors/
RUN/checkpoints/latest           text file with the folder's name, replaced atomically

A folder appears under its final name only when all ranks have written and synced all of it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml

from opencoder.config import Config
from opencoder.config_loading import parse_tree
from opencoder.errors import DataError, Failure
from opencoder.files import FileFacts, replace_directory, write_json, write_text
from opencoder.parallel.mesh import Group, Mesh

from .folders import checking_files, drop_old, read_json, step_name, write_manifest
from .parts import GlobalPart, Tensors, global_part
from .reading import TensorReader
from .storage import TensorWriter
from .together import together

FORMAT = 1
FREE_SPACE = "free disk space and start the same command again; it resumes from the newest earlier checkpoint, which is untouched"


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
    keep_every: int | None = None,
) -> Path:
    """Write the checkpoint of `step` from all ranks; returns its folder. Raises Failure, on all ranks alike;
    older ones stay untouched."""
    folder = run_dir / "checkpoints" / step_name(step)
    temporary = folder.with_name(f".{folder.name}.tmp")
    world = mesh.world
    first = world.rank == 0
    what = f"checkpoint of step {step} could not be written under {folder.parent}"
    try:
        with together(world, what, FREE_SPACE):
            parts = {key: global_part(part, mesh) for key, part in tensors.items()}
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        with together(world, what, FREE_SPACE):
            written = write_parts(temporary / "tensors", parts, world)
        sums = {f"tensors/{name}": facts for part in world.gather_objects(written) for name, facts in part.items()}
        with together(world, what, FREE_SPACE):
            if first:
                write_text(temporary / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
                write_json(temporary / "state.json", {"format": FORMAT, "step": step, **state})
                if tokenizer is not None:
                    shutil.copytree(tokenizer, temporary / "tokenizer")
                finish(temporary, folder, sums)
                write_text(folder.parent / "latest", folder.name + "\n")
    except Failure:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    with together(world, f"old checkpoints under {folder.parent} could not be removed", "look at its permissions"):
        if first:
            drop_old(run_dir, keep, keep_every)
    return folder


def finish(temporary: Path, folder: Path, known: dict[str, FileFacts]) -> None:
    """Add the manifest (sums of the files in `known` are not worked out again) and give the folder its final name."""
    write_manifest(temporary, known)
    replace_directory(temporary, folder)


def write_parts(folder: Path, parts: Mapping[str, GlobalPart], world: Group) -> dict[str, FileFacts]:
    """Write `parts` from all ranks; boxes that several hold are written once. Returns this rank's files.

    An error on one rank is raised on all as torch's CheckpointException; what may fail on one rank alone comes before."""
    writer = TensorWriter(folder)
    with _single_process_is_meant():
        dcp.save(dict(parts), storage_writer=writer, process_group=world.process_group, no_dist=world.size == 1)
    return writer.written


def read_config(folder: Path) -> Config:
    """The resolved configuration the checkpoint was written with."""
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"checkpoint {folder} has no readable config.yaml ({error.strerror})") from error
    return parse_tree(Config, tree)


def read_state(folder: Path) -> dict[str, Any]:
    """The position of the run: step, samples and tokens consumed, data stages."""
    state = read_json(folder / "state.json")
    if state.get("format") != FORMAT:
        raise DataError(f"checkpoint {folder} has format {state.get('format')}; this version reads format {FORMAT}")
    return state


def load_tensors(folder: Path, tensors: Tensors, mesh: Mesh, *, checked: bool = False) -> None:
    """Fill `tensors` in place from a checkpoint written at any layout. Raises DataError naming what does not fit.

    Every byte is compared with the manifest meanwhile, unless the caller has `checked` it: a DataError also says that what
    was filled in is worth nothing."""
    if checked:
        _fill(folder, tensors, mesh)
        return
    with checking_files(folder, mesh.world):
        _fill(folder, tensors, mesh)


def _fill(folder: Path, tensors: Tensors, mesh: Mesh) -> None:
    mine = _misfit(folder, tensors)
    if problem := next((p for p in mesh.world.gather_objects(mine) if p is not None), None):
        raise DataError(problem)  # on all ranks: those of another pipeline stage ask for other tensors
    state = {key: global_part(part, mesh) for key, part in tensors.items()}
    with _single_process_is_meant():
        dcp.load(state, storage_reader=TensorReader(folder / "tensors"), no_dist=mesh.world.size == 1)


def _misfit(folder: Path, tensors: Tensors) -> str | None:
    """What this rank asks for and the checkpoint does not have, or None."""
    saved = dcp.FileSystemReader(folder / "tensors").read_metadata().state_dict_metadata
    for key, part in tensors.items():
        placement = part[1]
        if key not in saved:
            return f"checkpoint {folder} has no tensor {key}: it was written by another model or optimizer"
        shape = tuple(getattr(saved[key], "size", ()))
        if shape != placement.global_shape:
            return (
                f"checkpoint {folder}: {key} has shape {shape}, the model asks for {placement.global_shape}: use the "
                "model configuration the checkpoint was written with"
            )
    return None


def saved_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Global shape and type of every tensor of a checkpoint."""
    metadata: dict[str, Any] = dcp.FileSystemReader(folder / "tensors").read_metadata().state_dict_metadata
    return {key: (tuple(m.size), m.properties.dtype) for key, m in metadata.items() if hasattr(m, "properties")}


def load_whole(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill whole tensors in place, in this process alone."""
    with _single_process_is_meant():
        dcp.load(tensors, storage_reader=TensorReader(folder / "tensors"), no_dist=True)


@contextmanager
def _single_process_is_meant() -> Iterator[None]:
    """Without torch's remark that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
