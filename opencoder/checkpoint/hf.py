"""Exchange with Hugging Face: Llama-shaped checkpoints in both directions, tensor by tensor and bit by bit.

Parameter names, shapes and the rotary convention (half-split pairs) are the same on both sides, so nothing is permuted;
the padded rows of the vocabulary travel too, as in the published OpenCoder models (96,640 rows, 96,541 tokens)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file

from opencoder.config import Config, ModelConfig
from opencoder.config_loading import parse_tree
from opencoder.console import ProgressBar
from opencoder.errors import DataError
from opencoder.files import replace_directory, temporary_name, write_json, write_text
from opencoder.model.decoder import Decoder, named_parameters
from opencoder.parallel.mesh import SINGLE, Mesh
from opencoder.parallel.placement import placement_of, replicated

from . import folders, native
from .hf_config import check_ids, hf_config, model_config, tokenizer_ids
from .parts import Part, Tensors, global_part

SHARD_BYTES = 5_000_000_000
"""Largest safetensors file of an export."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def is_hf_folder(folder: Path) -> bool:
    """Whether `folder` looks like a Hugging Face model."""
    return (folder / "config.json").is_file()


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Checkpoint key → global shape of every tensor of the model."""
    with torch.device("meta"):
        model = Decoder(config)
    return {key: placement_of(p).global_shape for key, p in named_parameters(model).items()}


# ---- native → HF ----


def export(source: str | Path, output: str | Path, *, dtype: str | None = None, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write the native checkpoint `source` (or a run's latest) as a Hugging Face folder; returns `output`.

    `dtype` one of DTYPES, None keeps the saved type. Memory: one shard."""
    folder = folders.resolve(source)
    folders.check_files(folder)
    config = native.read_config(folder).model
    output = Path(output)
    _refuse_foreign(output)
    temporary = temporary_name(output)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    saved = _write_shards(folder, temporary, config, dtype, shard_bytes)
    tokenizer = folder / "tokenizer"
    ids = tokenizer_ids(tokenizer) if tokenizer.is_dir() else None
    if ids is not None:
        for file in sorted(tokenizer.iterdir()):
            shutil.copy2(file, temporary / file.name)
    write_json(temporary / "config.json", hf_config(config, saved, ids))
    write_json(temporary / "generation_config.json", {"_from_model_config": False, **(ids.as_dict() if ids else {})})
    check_ids(temporary)
    replace_directory(temporary, output)
    return output


def _refuse_foreign(output: Path) -> None:
    """An existing folder is replaced only if it is a model that we may have written."""
    if output.exists() and any(output.iterdir()) and not is_hf_folder(output) and not (output / "state.json").is_file():
        raise DataError(f"--output {output} exists and is no checkpoint: choose a new or empty folder")


def _write_shards(folder: Path, output: Path, config: ModelConfig, dtype: str | None, shard_bytes: int) -> torch.dtype:
    metadata: dict[str, Any] = dcp.FileSystemReader(folder / "tensors").read_metadata().state_dict_metadata
    expected = shapes(config)
    if absent := [key for key in expected if key not in metadata]:
        raise DataError(f"checkpoint {folder} has no tensor {absent[0]}: its config.yaml describes another model")
    saved_type: torch.dtype = metadata[next(iter(expected))].properties.dtype
    target = DTYPES[dtype] if dtype else saved_type
    groups = list(_groups(expected, target.itemsize, shard_bytes))
    weight_map: dict[str, str] = {}
    with ProgressBar("export", total=len(groups), unit="files") as bar:
        for i, keys in enumerate(groups):
            tensors = {key: torch.empty(expected[key], dtype=saved_type) for key in keys}
            native.load_whole(folder, tensors)
            name = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
            save_file({k: t.to(target) for k, t in tensors.items()}, output / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(keys, name))
            bar.advance()
    if len(groups) > 1:
        total = sum(torch.Size(s).numel() for s in expected.values()) * target.itemsize
        write_json(
            output / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return target


def _groups(expected: dict[str, tuple[int, ...]], itemsize: int, shard_bytes: int) -> Iterator[list[str]]:
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


def to_transformers(source: str | Path) -> Any:
    """A native checkpoint as a transformers LlamaForCausalLM in memory, for generation and comparison."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = folders.resolve(source)
    config = native.read_config(folder).model
    folders.check_files(folder)
    metadata: dict[str, Any] = dcp.FileSystemReader(folder / "tensors").read_metadata().state_dict_metadata
    expected = shapes(config)
    dtype = metadata[next(iter(expected))].properties.dtype
    tensors = {key: torch.empty(shape, dtype=dtype) for key, shape in expected.items()}
    native.load_whole(folder, tensors)
    ids = tokenizer_ids(folder / "tokenizer") if (folder / "tokenizer").is_dir() else None
    model: Any = LlamaForCausalLM(LlamaConfig(**hf_config(config, dtype, ids)))
    model = model.to(dtype)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or [key for key in missing if not (config.tie_embeddings and key == "lm_head.weight")]:
        raise DataError(f"checkpoint {folder} does not fit transformers: missing {missing}, unexpected {unexpected}")
    return model.eval()


# ---- HF → native ----


def import_(source: str | Path, output: str | Path) -> Path:
    """Write the Hugging Face folder `source` as a native checkpoint folder (weights only, step 0); returns `output`."""
    folder, output = Path(source), Path(output)
    config = read_model_config(folder)
    check_ids(folder)
    _refuse_foreign(output)
    temporary = temporary_name(output)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors: dict[str, Part] = {}
    with _Reader(folder) as reader:
        reader.refuse_unknown(set(shapes(config)), tied=config.tie_embeddings)
        for key, shape in shapes(config).items():
            tensors[key] = (reader.tensor(key, shape), replicated(shape))
    written = native.write_parts(temporary / "tensors", {k: global_part(p, Mesh()) for k, p in tensors.items()}, SINGLE)
    tree = {"run_dir": str(output), "model": config.model_dump(), "data": {"seq_len": min(config.max_seq_len, 1024)}}
    write_text(temporary / "config.yaml", json.dumps(parse_tree(Config, tree).model_dump(mode="json"), indent=2))
    write_json(
        temporary / "state.json",
        {"format": native.FORMAT, "step": 0, "tokens": 0, "consumed_samples": 0, "stages": [], "skipped_batches": []},
    )
    if (folder / "tokenizer.json").is_file():
        (temporary / "tokenizer").mkdir()
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copy2(folder / name, temporary / "tokenizer" / name)
    native.finish(temporary, output, {f"tensors/{name}": facts for name, facts in written.items()})
    return output


def read_model_config(folder: Path) -> ModelConfig:
    """The model configuration of a Hugging Face folder. Raises DataError for what our decoder cannot express."""
    file = folder / "config.json"
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}): give a Hugging Face model folder") from error
    ids = tokenizer_ids(folder) if (folder / "tokenizer.json").is_file() else None
    return model_config(described, file, ids.size if ids else None)


def load_weights(folder: Path, tensors: Tensors, mesh: Mesh) -> None:
    """Fill this rank's parts of `tensors` from a Hugging Face folder, reading only the slices it holds."""
    with _Reader(folder) as reader, torch.no_grad():
        for key, part in tensors.items():
            local, placement = part[:2]
            local.copy_(reader.tensor(key, placement.global_shape, placement.slice_of(mesh)))


class _Reader:
    """Tensors of a folder of safetensors files, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = ExitStack()
        self.files: dict[str, Any] = {}

    def __enter__(self) -> _Reader:
        index = self.folder / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            file = self.folder / name
            if not file.is_file():
                raise DataError(f"{self.folder} lacks {name}: only safetensors files are read; copy it there")
            try:
                opened = self.stack.enter_context(safe_open(file, framework="pt"))
            except Exception as error:  # safetensors raises its own untyped error for a damaged header or a cut file
                raise DataError(f"{file} is damaged ({error}): copy it again") from error
            self.files.update(dict.fromkeys(opened.keys(), opened))
        return self

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    def refuse_unknown(self, known: set[str], *, tied: bool) -> None:
        """Raise DataError for a tensor that would be lost (rotary buffers of old exports are recomputed anyway)."""
        ignorable = {"lm_head.weight"} if tied else set()
        unknown = [k for k in self.files if k not in known | ignorable and not k.endswith("rotary_emb.inv_freq")]
        if unknown:
            raise DataError(f"{self.folder} holds {unknown[0]}, which this model has no place for: not a Llama shape")

    def tensor(self, key: str, shape: tuple[int, ...], part: tuple[slice, ...] | None = None) -> torch.Tensor:
        """`key`, which must have the global `shape`, or the `part` of it."""
        if key not in self.files:
            raise DataError(f"{self.folder} has no tensor {key}")
        view = self.files[key].get_slice(key)
        if tuple(view.get_shape()) != shape:
            raise DataError(f"{self.folder}: {key} has shape {tuple(view.get_shape())}, config.json says {shape}")
        tensor: torch.Tensor = view[part if part is not None else tuple(slice(0, n) for n in shape)]
        return tensor
