"""A native checkpoint as a Hugging Face folder: tensor by tensor, so memory does not depend on the model's or a file's size.

Run on several ranks, each writes its share of the files."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp

from opencoder.config import ModelConfig
from opencoder.console import ProgressBar
from opencoder.errors import DataError
from opencoder.files import replace_directory, temporary_name, write_json
from opencoder.model.decoder import Decoder, named_parameters
from opencoder.parallel.group import SINGLE, Group
from opencoder.parallel.placement import placement_of

from . import folders, native
from .hf_config import check_ids, hf_config, tokenizer_ids
from .together import together

SHARD_BYTES = 5_000_000_000
"""Largest safetensors file of an export."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Checkpoint key → global shape of every tensor of the model. Raises DataError for one with a class head."""
    if config.head.kind == "class":
        raise DataError(
            "a model with a class head is no causal language model: use `opencoder export-classes`, then `retrieve`"
        )
    with torch.device("meta"):
        model = Decoder(config)
    return {key: placement_of(p).global_shape for key, p in named_parameters(model).items()}


def export(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    world: Group = SINGLE,
) -> Path:
    """Write the native checkpoint `source` (or a run's latest) as a Hugging Face folder; returns `output`.

    `dtype` one of DTYPES, None keeps the type of the weights. Another type is made from the optimizer's fp32 master
    weights where the checkpoint has them. Memory: a few times the largest tensor. Raises DataError, Failure."""
    output = Path(output)
    temporary = temporary_name(output)
    first = world.rank == 0
    what, remedy = f"{output} could not be written", "free disk space and start again"
    with together(world, what, remedy):
        folder = folders.resolve(source)
    folders.check_files(folder, world)
    with together(world, what, remedy):
        config = native.read_config(folder).model
        plan = _Plan(folder, config, dtype, shard_bytes)
        if first:
            refuse_foreign(output)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    with together(world, what, remedy):
        plan.write(temporary, world)
    with together(world, what, remedy):
        if first:
            _write_rest(folder, temporary, config, plan)
            replace_directory(temporary, output)
    return output


def refuse_foreign(output: Path) -> None:
    """An existing folder is replaced only if it is a model that we may have written."""
    known = (output / "config.json").is_file() or (output / "state.json").is_file()
    if output.exists() and any(output.iterdir()) and not known:
        raise DataError(f"--output {output} exists and is no checkpoint: choose a new or empty folder")


def _write_rest(folder: Path, output: Path, config: ModelConfig, plan: _Plan) -> None:
    tokenizer = folder / "tokenizer"
    ids = tokenizer_ids(tokenizer) if tokenizer.is_dir() else None
    if ids is not None:
        for file in sorted(tokenizer.iterdir()):
            shutil.copy2(file, output / file.name)
    write_json(output / "config.json", hf_config(config, plan.target, ids))
    write_json(output / "generation_config.json", {"_from_model_config": False, **(ids.as_dict() if ids else {})})
    if len(plan.groups) > 1:
        total = sum(torch.Size(s).numel() for s in plan.shapes.values()) * plan.target.itemsize
        names = {key: plan.name(i) for i, keys in enumerate(plan.groups) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": names}
        write_json(output / "model.safetensors.index.json", index)
    check_ids(output)


class _Plan:
    """Which tensor is read from where and goes into which file, the same on all ranks."""

    def __init__(self, folder: Path, config: ModelConfig, dtype: str | None, shard_bytes: int) -> None:
        metadata: dict[str, Any] = dcp.FileSystemReader(folder / "tensors").read_metadata().state_dict_metadata
        self.folder, self.shapes = folder, shapes(config)
        if absent := [key for key in self.shapes if key not in metadata]:
            raise DataError(f"checkpoint {folder} has no tensor {absent[0]}: its config.yaml describes another model")
        self.saved = {key: m.properties.dtype for key, m in metadata.items() if hasattr(m, "properties")}
        self.target = DTYPES[dtype] if dtype else self.saved[next(iter(self.shapes))]
        self.groups = list(_groups(self.shapes, self.target.itemsize, shard_bytes))

    def name(self, i: int) -> str:
        """File name of group `i`."""
        n = len(self.groups)
        return f"model-{i + 1:05d}-of-{n:05d}.safetensors" if n > 1 else "model.safetensors"

    def write(self, output: Path, world: Group) -> None:
        """Write this rank's files into `output`."""
        with ProgressBar("export", total=len(self.groups), unit="files", enabled=world.rank == 0) as bar:
            for i, keys in enumerate(self.groups):
                if i % world.size == world.rank:
                    with open(output / self.name(i), "wb") as file:
                        write_header(file, {key: self.shapes[key] for key in keys}, self.target)
                        for key in keys:
                            file.write(self._tensor(key).view(torch.uint8).numpy().data)
                bar.advance()

    def _tensor(self, key: str) -> torch.Tensor:
        """(n,) elements of `key` in the target type."""
        master = f"optim.master.{key}"
        source = master if self.saved[key] != self.target and master in self.saved else key
        found = torch.empty(self.shapes[key], dtype=self.saved[source])
        native.load_whole(self.folder, {source: found})
        return found.to(self.target).flatten()


def write_header(file: IO[bytes], tensors: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """The head of a safetensors file whose `tensors` follow in this order, all of type `dtype`.

    (The library's own writer takes all tensors of a file at once, and copies them.)
    Format: https://huggingface.co/docs/safetensors/index#format"""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape in tensors.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[key] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def _groups(expected: dict[str, tuple[int, ...]], itemsize: int, shard_bytes: int) -> Iterator[Sequence[str]]:
    group: list[str] = []
    size = 0
    for key, shape in expected.items():
        n = torch.Size(shape).numel() * itemsize
        if group and size + n > shard_bytes:
            yield group
            group, size = [], 0
        group.append(key)
        size += n
    yield group
