"""The training data of a run: stages of samples, each with an index built from its own number of samples.

The number is written into the checkpoint and used again on resume: an index built from another number would be another
order. A run that is made longer gets a further stage."""

from __future__ import annotations

import os
from bisect import bisect_right
from itertools import accumulate
from typing import Any, Protocol

from opencoder.config import Config, DataConfig
from opencoder.data.cache import IndexCache
from opencoder.data.lm import Sample, build_lm_dataset
from opencoder.data.loader import BatchLoader
from opencoder.errors import ConfigError
from opencoder.parallel.mesh import Mesh

TRAIN, VALID = 0, 1
"""Parts of `data.split`."""


class Samples(Protocol):
    """Random access to samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Stages:
    """Datasets one after another."""

    def __init__(self, parts: list[Samples], sizes: list[int]) -> None:
        self.parts, self.ends = parts, list(accumulate(sizes))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        part = bisect_right(self.ends, index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]


def plan_stages(config: Config, saved: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The stages of a run: those of the checkpoint it resumes from, and a further one for samples beyond them."""
    wanted = config.train.total_steps() * config.train.global_batch_size
    stages = [dict(stage) for stage in saved or []]
    have = sum(stage["num_samples"] for stage in stages)
    if wanted > have:
        stages.append({"num_samples": wanted - have, "seed": config.data.seed + len(stages)})
    return stages


def training_samples(config: DataConfig, stages: list[dict[str, Any]]) -> Stages:
    """The samples of all stages. Raises ConfigError if there is nothing to read."""
    parts: list[Samples] = [_dataset(config, stage["num_samples"], stage["seed"], TRAIN) for stage in stages]
    return Stages(parts, [stage["num_samples"] for stage in stages])


def _dataset(config: DataConfig, num_samples: int, seed: int, part: int) -> Samples:
    if not config.blend:
        raise ConfigError("data.blend is empty: give at least one {prefix, weight}")
    blend = [(entry.prefix, entry.weight) for entry in config.blend]
    dataset: Samples = build_lm_dataset(
        blend,
        num_samples=num_samples,
        seq_len=config.seq_len,
        seed=seed,
        split=config.split,
        part=part,
        cache=_index_cache(),
    )
    return dataset


def _index_cache() -> IndexCache:
    """The cache as the ranks of this machine share it."""
    local = (os.environ.get(name) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    rank, ranks = (int(value) if value else default for value, default in zip(local, (0, 1), strict=True))
    return IndexCache(rank=rank, ranks=ranks)


def training_loader(config: Config, samples: Samples, mesh: Mesh, *, start_sample: int) -> BatchLoader:
    """Batches of one optimizer step each, from `start_sample` on; this rank's share."""
    return BatchLoader(
        samples,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
        start_sample=start_sample,
        document_mask=config.data.document_mask,
        workers=config.data.workers,
    )


def validation_loader(config: Config, mesh: Mesh) -> BatchLoader | None:
    """One batch with all evaluation samples, or None if the configuration asks for no evaluation."""
    if config.train.eval_every is None:
        return None
    per_pass = config.train.micro_batch_size * mesh.dp.size
    size = -(-config.train.eval_samples // per_pass) * per_pass
    return BatchLoader(
        _dataset(config.data, size, config.data.seed, VALID),
        global_batch_size=size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
        document_mask=config.data.document_mask,
    )
