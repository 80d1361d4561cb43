"""What is looked at before the first step, by one rank where one can tell for all; the others learn its verdict, and one line
tells it.

Tokenizer, dataset and model must agree: most silent failures of released models were here (an eos id of 2 beside one of
96,539; a tokenizer with more entries than the model has rows)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opencoder.checkpoint.together import together
from opencoder.config import Config
from opencoder.errors import ConfigError, DataError
from opencoder.model.decoder import Decoder, named_parameters
from opencoder.model.encoder import Encoder
from opencoder.optim.update import check_groups
from opencoder.parallel.mesh import AXES, Mesh

from .class_data import check_class_inputs

log = logging.getLogger("opencoder")
SMALL_BYTES, LARGE_BYTES = 2**18, 2**22
"""Messages of the measurement of bandwidth."""
FAST_S = 0.01
"""A small message that takes longer is all that is sent: the whole measurement is to take less than two seconds."""
SEEN_WITHIN_S = 10.0
"""A network file system may show a new file to other hosts late."""


def preflight(config: Config, mesh: Mesh, device: torch.device, *, say: Callable[[str], None]) -> None:
    """Every look, in order. Raises UserError, on all ranks alike."""
    with together(mesh.world, "the inputs of the run cannot be read", "look at their permissions"):
        if mesh.world.rank == 0:
            check_inputs(config)
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is not None:  # else nothing tells which ranks share a machine
        check_nodes(mesh, local_rank=int(local_rank))
    check_run_dir(Path(config.run_dir), mesh)
    if config.train.bandwidth_check and mesh.world.size > 1:
        say(describe_bandwidth(measure_bandwidth(mesh, device)))


def check_nodes(mesh: Mesh, *, local_rank: int) -> None:
    """Warn of tensor parallelism between machines; `local_rank` counts the processes of this one."""
    first = mesh.world.rank - local_rank  # of this machine's ranks: names the machine
    firsts = mesh.world.gather_objects(first)
    spanning = any(len({firsts[rank] for rank in ranks}) > 1 for ranks in mesh.world.gather_objects(mesh.tp.ranks))
    if spanning and mesh.world.rank == 0:
        log.warning(
            "WARNING: parallel.tp=%d spans machines, with up to %d processes on each: every layer sends over the network; "
            "set parallel.tp to a divisor of the processes on a machine",
            mesh.tp.size, max(firsts.count(first) for first in firsts),
        )  # fmt: skip


def check_run_dir(run_dir: Path, mesh: Mesh) -> None:
    """Every rank must see the same folder: rank 0 puts a file there, the others look for it. Raises ConfigError."""
    world = mesh.world
    if world.size == 1:
        return
    token = world.gather_objects(secrets.token_hex(8))[0]
    file = run_dir / f".preflight-{token}"
    with together(world, f"run_dir={run_dir} cannot be written", "look at its permissions and free space"):
        if world.rank == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            file.touch()
    seen = world.gather_objects(_appears(file))
    if world.rank == 0:
        file.unlink()
    if not all(seen):
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        error = ConfigError(
            f"run_dir={run_dir} is another folder on ranks {blind} than on rank 0: set it to a folder on a file system that "
            "all machines share"
        )
        error.told_elsewhere = world.rank != 0
        raise error


def _appears(file: Path) -> bool:
    end = time.monotonic() + SEEN_WITHIN_S
    while not file.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def measure_bandwidth(mesh: Mesh, device: torch.device) -> dict[str, tuple[int, float]]:
    """Axis → (bytes, GB/s) of an all-reduce over it, bytes of the message / seconds, where all groups of the axis send at one
    time and the slowest counts; for axes longer than 1. The same on all ranks."""
    found = {}
    for name in AXES:
        if mesh.axis(name).size > 1:
            seconds, size = _all_reduce_s(mesh, name, device, SMALL_BYTES), SMALL_BYTES
            if seconds < FAST_S:
                seconds, size = _all_reduce_s(mesh, name, device, LARGE_BYTES), LARGE_BYTES
            found[name] = size, size / seconds / 1e9
    return found


def _all_reduce_s(mesh: Mesh, axis: str, device: torch.device, size: int) -> float:
    """Seconds of the better of two, after one that is not counted; the most of any rank."""
    message = torch.zeros(size // 4, device=device)
    best = float("inf")
    for repeat in range(3):
        mesh.world.barrier()
        start = time.perf_counter()
        mesh.axis(axis).all_reduce(message)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat:
            best = min(best, time.perf_counter() - start)
    return float(mesh.world.all_reduce(torch.tensor(best, dtype=torch.float64, device=device), "max"))


def describe_bandwidth(found: dict[str, tuple[int, float]]) -> str:
    """One line."""
    return "all-reduce: " + ", ".join(
        f"{axis} {rate:.2f} GB/s ({size >> 10} KiB)" for axis, (size, rate) in found.items()
    )


def check_inputs(config: Config) -> None:
    """Compare the tokenizer folder, every dataset's PREFIX.json, optim.groups and the model. Raises ConfigError or
    DataError."""
    if config.optim.groups:
        with torch.device("meta"):
            check_groups(config.optim, keys_of_model(config))
    tokenizer = _tokenizer_facts(config.data.tokenizer) if config.data.tokenizer else None
    if tokenizer and tokenizer["size"] > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer {config.data.tokenizer} with "
            f"{tokenizer['size']} entries: set model.vocab_size={tokenizer['size']}"
        )
    if config.data.kind == "classification":
        check_class_inputs(config, tokenizer["hash"] if tokenizer else None)
        return
    blends = [config.data.blend, *(stage.blend or [] for stage in config.data.stages)]
    for prefix in dict.fromkeys(entry.prefix for blend in blends for entry in blend):
        _check_dataset(prefix, config, tokenizer)


def keys_of_model(config: Config) -> list[str]:
    """Checkpoint keys of its parameters. Call it under `torch.device("meta")`."""
    if config.model.head.kind == "class":
        return list(named_parameters(Encoder(config.model, optim=config.optim)))
    return list(named_parameters(Decoder(config.model)))


def _check_dataset(prefix: str, config: Config, tokenizer: dict[str, Any] | None) -> None:
    for suffix in (".bin", ".idx"):
        if not Path(prefix + suffix).is_file():
            raise DataError(f"dataset {prefix}{suffix} does not exist: make it with `opencoder preprocess`")
    described = Path(prefix + ".json")
    if not described.is_file():
        return  # written by another tool, for example Megatron-LM: there is nothing to compare
    facts = json.loads(described.read_text(encoding="utf-8"))
    size = facts.get("vocab_size")
    if size is not None and size > config.model.vocab_size:
        raise ConfigError(
            f"dataset {prefix} was made with a vocabulary of {size}, model.vocab_size={config.model.vocab_size} is "
            f"smaller: set model.vocab_size={size}"
        )
    if tokenizer is None:
        return
    for name, ours, theirs in (
        ("tokenizer hash", tokenizer["hash"], facts.get("tokenizer_hash")),
        ("eod id", tokenizer["eos_id"], facts.get("eod_id")),
    ):
        if theirs is not None and ours != theirs:
            raise ConfigError(
                f"{name} of data.tokenizer={config.data.tokenizer} is {ours}, of dataset {prefix} {theirs}: use the "
                "tokenizer the dataset was made with, or make the dataset again"
            )


def _tokenizer_facts(folder: str) -> dict[str, Any]:
    """Size, hash of tokenizer.json and eos id of an HF tokenizer folder."""
    from transformers import AutoTokenizer

    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"data.tokenizer={folder} holds no tokenizer.json: give a folder made by `train-tokenizer`")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"size": len(tokenizer), "hash": digest, "eos_id": tokenizer.eos_token_id}
