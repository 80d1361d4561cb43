"""A checkpoint with a class head as a folder to search in (class_folder.py), block of rows after block: memory does not grow with the
number of classes.

    export.json                            what the folder holds
    config.yaml                            configuration of the model
    encoder.safetensors                    the encoder, under its checkpoint keys
    classes-00001-of-00003.safetensors     rows of the class matrix as trained, under HEAD_KEY; classes.safetensors if it is one
    classes.index.json                     which classes each of these holds
    classes.f32                            (N, D) float32, row after row, in the order of class numbers: as logits take them, so
                                           of length 1 where those are cosines
    tokenizer/                             if the checkpoint carries one

N classes, D width."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from opencoder.config import Config
from opencoder.console import ProgressBar
from opencoder.errors import DataError, UserError
from opencoder.files import replace_directory, temporary_name, write_json, write_text
from opencoder.model.classes.partition import Partition
from opencoder.model.classes.permutation import Permutation
from opencoder.model.classes.variants import Variant, directions
from opencoder.model.decoder import named_parameters
from opencoder.model.encoder import HEAD_KEY, FeatureModel
from opencoder.parallel.mesh import Group, Mesh
from opencoder.parallel.placement import Placement, placement_of

from . import folders, native

FORMAT = 1
SHARD_BYTES = 1 << 30
"""Largest safetensors file of the class matrix, which is in memory while it is written."""
DESCRIPTION, MATRIX = "export.json", "classes.f32"


def export_classes(source: str | Path, output: str | Path, *, shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Write the checkpoint `source` (or a run's latest) as folder `output`; returns its description. Raises UserError, DataError."""
    folder, output = folders.resolve(source), Path(output)
    config = native.read_config(folder)
    if config.model.head.kind != "class":
        raise UserError(f"{folder} has no class head: export it with `opencoder convert --from native --to hf`")
    if output.exists() and any(output.iterdir()) and not (output / DESCRIPTION).is_file():
        raise DataError(f"--output {output} exists and is no export: choose a new or empty folder")
    folders.check_files(folder)
    temporary = temporary_name(output)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        facts = _write(folder, config, temporary, shard_bytes)
        replace_directory(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return facts


def _write(folder: Path, config: Config, output: Path, shard_bytes: int) -> dict[str, Any]:
    saved = native.saved_tensors(folder)
    if HEAD_KEY not in saved:
        raise DataError(f"checkpoint {folder} has no tensor {HEAD_KEY}: its config.yaml describes another model")
    (classes, dim), dtype = saved[HEAD_KEY]
    _write_encoder(folder, config, output, {key: dtype for key, (_, dtype) in saved.items()})
    state = native.read_state(folder)
    order = state.get("head", {}).get("order")
    stored = torch.float32 if dtype == torch.float64 else dtype
    shards = Partition(classes, min(classes, -(-classes * dim * stored.itemsize // shard_bytes)))
    matrix = np.memmap(output / MATRIX, np.float32, "w+", shape=(classes, dim))
    index = []
    with ProgressBar("export", total=2 * shards.parts, unit="blocks") as bar:
        for first, rows in _blocks(folder, shards, (classes, dim), dtype):
            numbers = torch.arange(first, first + len(rows))
            if order is not None:
                numbers = Permutation(**order).labels_of(numbers)
            matrix[numbers.numpy()] = rows.float().numpy()
            bar.advance()
        for shard in range(shards.parts):
            name = "classes.safetensors"
            if shards.parts > 1:
                name = f"classes-{shard + 1:05d}-of-{shards.parts:05d}.safetensors"
            here = slice(shards.start(shard), shards.start(shard + 1))
            rows = torch.from_numpy(np.array(matrix[here]))
            _save({HEAD_KEY: rows.to(stored)}, output / name)
            index.append({"file": name, "first": here.start, "classes": len(rows)})
            matrix[here] = _as_scored(rows, config).numpy()
            bar.advance()
    matrix.flush()
    write_json(output / "classes.index.json", {"key": HEAD_KEY, "files": index})
    write_text(output / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    if (folder / "tokenizer").is_dir():
        shutil.copytree(folder / "tokenizer", output / "tokenizer")
    head = config.model.head
    cosine = Variant(head.variant).cosine
    facts = {
        "format": FORMAT,
        "classes": classes,
        "dim": dim,
        "matrix": {
            "file": MATRIX,
            "dtype": "float32",
            "order": "row-major",
            "unit_rows": cosine,
            "metric": "inner product",
        },
        "scale": head.scale if cosine else 1.0,
        "step": state["step"],
    }
    write_json(output / DESCRIPTION, facts)
    return facts


def _write_encoder(folder: Path, config: Config, output: Path, types: dict[str, torch.dtype]) -> None:
    with torch.device("meta"):
        shapes = {key: placement_of(p).global_shape for key, p in named_parameters(FeatureModel(config.model)).items()}
    if absent := [key for key in shapes if key not in types]:
        raise DataError(f"checkpoint {folder} has no tensor {absent[0]}: its config.yaml describes another model")
    tensors = {key: torch.empty(shape, dtype=types[key]) for key, shape in shapes.items()}
    native.load_whole(folder, tensors)
    _save(tensors, output / "encoder.safetensors")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(mode)  # save_file lets nobody else read it


def _blocks(
    folder: Path, shards: Partition, shape: tuple[int, int], dtype: torch.dtype
) -> Iterator[tuple[int, torch.Tensor]]:
    """Number of the first row, and the rows, of each part."""
    for shard in range(shards.parts):
        rows = torch.empty(shards.size(shard), shape[1], dtype=dtype)
        # A rank of as many as there are shards would hold just these rows.
        mesh = Mesh(dp_cp=Group(shards.parts, shard, name="dp_cp"))
        native.load_tensors(folder, {HEAD_KEY: (rows, Placement(shape, 0, "dp_cp", (), ()))}, mesh, checked=True)
        yield shards.start(shard), rows


def _as_scored(rows: torch.Tensor, config: Config) -> torch.Tensor:
    """fp32, of length 1 where logits are cosines."""
    rows = rows.float()
    return (directions(rows) if Variant(config.model.head.variant).cosine else rows).contiguous()


def map_matrix(folder: Path, facts: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """classes.f32 (N, D), mapped. Raises DataError if it is not whole."""
    path, shape = folder / MATRIX, (facts["classes"], facts["dim"])
    expected = shape[0] * shape[1] * 4
    found = path.stat().st_size if path.is_file() else 0
    if found != expected:
        raise DataError(f"{path} has {found} bytes, {DESCRIPTION} asks for {expected}: copy it again")
    return np.memmap(path, np.float32, "r", shape=shape)
