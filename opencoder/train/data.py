"""The training data of a run: its stages (stages.py) opened, and batches from any step on."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from opencoder.config import Config
from opencoder.data import tokenizer as tok
from opencoder.data.cache import IndexCache
from opencoder.data.fim import Fim, FimIds
from opencoder.data.gpt import GPTDataset
from opencoder.data.groups import GroupNames
from opencoder.data.indexed import IndexedDataset
from opencoder.data.lm import BlendedDataset, build_lm_dataset
from opencoder.data.loader import BatchLoader, MicroBatch
from opencoder.data.sft import SftBlend
from opencoder.data.sft_files import SftData
from opencoder.errors import ConfigError
from opencoder.parallel.layout import stage_ranks
from opencoder.parallel.mesh import Mesh

from .class_data import class_settings
from .sft_data import open_sft, sft_account, sft_validation
from .stages import Settings, Stage, asked_settings, from_records, micro_batch_size_at, plan

TRAIN, VALID = 0, 1
"""Parts of `data.split`."""


def plan_stages(
    config: Config,
    records: Sequence[dict[str, Any]] = (),
    *,
    step: int = 0,
    before: Config | None = None,
    fork: bool = False,
) -> list[Stage]:
    """The stages of a run. `records` and `before`: stages and configuration of the checkpoint it goes on from at `step`.

    `fork`: the checkpoint is another run's. Raises ConfigError if the configuration contradicts what this run has read."""

    def settings_before() -> Settings:
        assert before is not None
        return _asked(before)[0]

    saved = from_records(records, settings_before)
    return plan(_asked(config), config.train.total_steps(), saved=saved, step=step, fork=fork)


def _asked(config: Config) -> dict[int, Settings]:
    if config.data.kind == "classification":
        return class_settings(config)
    if config.data.kind == "sft":
        return asked_settings(config, lambda prefix: SftData(prefix).identity, None)
    return asked_settings(config, lambda prefix: IndexedDataset(prefix).identity, _fim(config))


def _fim(config: Config) -> Fim | None:
    """data.fim with its sentinels. Raises ConfigError if the tokenizer has none."""
    fim, folder = config.data.fim, config.data.tokenizer
    if fim is None:
        return None
    loaded = tok.load(folder) if folder is not None else None
    ids = fim.ids or (loaded.fim_ids if loaded is not None else None)
    if ids is None:
        names = ", ".join((tok.FIM_PREFIX, tok.FIM_MIDDLE, tok.FIM_SUFFIX))
        raise ConfigError(
            f"data.fim: the tokenizer {folder} does not have {names}: give data.fim.ids, or drop data.fim"
        )
    eod = loaded.eod_id if loaded is not None else None
    return Fim(fim.rate, fim.spm_rate, fim.min_tokens, FimIds(*ids), eod, config.data.seed)


class TrainingData:
    """The datasets of all stages that are not over at `step`; their indices are made or found here."""

    def __init__(
        self, config: Config, stages: Sequence[Stage], mesh: Mesh, *, step: int, pin_memory: bool = False
    ) -> None:
        """`pin_memory`: batches lie in memory that a GPU can copy from on its own."""
        self.config, self.mesh, self.pin_memory = config, mesh, pin_memory
        self.stages = [stage for stage in stages if stage.end > step]
        cache = _index_cache(config.data.cache_dir)
        self.datasets = [_dataset(stage.settings, stage.num_samples, stage.seed, TRAIN, cache) for stage in self.stages]

    def batches(self, step: int) -> Iterator[tuple[Stage, list[MicroBatch]]]:
        """This rank's micro-batches of update `step` (from 0) and of every one after it, with the stage each belongs to."""
        for stage, dataset in zip(self.stages, self.datasets, strict=True):
            first = max(step, stage.first_step)
            loader = BatchLoader(
                dataset,
                global_batch_size=stage.settings.global_batch_size,
                micro_batch_size=micro_batch_size_at(self.config, first),
                dp_rank=self.mesh.dp.rank,
                dp_size=self.mesh.dp.size,
                start_sample=(first - stage.first_step) * stage.settings.global_batch_size,
                end_sample=stage.steps * stage.settings.global_batch_size,
                document_mask=stage.settings.document_mask,
                workers=self.config.data.workers,
                text=_needs_text(self.config, self.mesh),
                pin_memory=self.pin_memory,
            )
            for micro_batches in loader:
                yield stage, micro_batches

    def group_names(self, stage: Stage) -> GroupNames:
        """The groups that the losses of the stage can be told by."""
        names = self.datasets[self.stages.index(stage)].group_names
        assert names is not None
        return names

    def account(self, stage: Stage, step: int) -> dict[str, Any]:
        """What the stage reads up to `step`: of each dataset of its blend the tokens, and their share as asked and achieved."""
        dataset, settings = self.datasets[self.stages.index(stage)], stage.settings
        steps = min(step, stage.end) - stage.first_step
        samples = steps * settings.global_batch_size
        if isinstance(dataset, SftBlend):
            return {"first_step": stage.first_step, "steps": steps, **sft_account(dataset, settings, samples)}
        counts = [samples]
        if not isinstance(dataset, GPTDataset):
            counts = np.bincount(dataset.member[:samples], minlength=len(settings.blend)).tolist()
        total = sum(source.weight for source in settings.blend)
        sources = [
            {
                "prefix": source.prefix,
                "tokens": n * settings.seq_len,
                "asked": source.weight / total,
                "achieved": n / samples,
            }
            for source, n in zip(settings.blend, counts, strict=True)
        ]
        return {"first_step": stage.first_step, "steps": steps, "sources": sources}

    def accounts(self, step: int, earlier: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of all stages begun before `step`; of the ones that are not open here as they stand in `earlier`."""
        begun = [stage for stage in self.stages if stage.first_step < step]
        first = min((stage.first_step for stage in self.stages), default=step)
        return [each for each in earlier if each["first_step"] < first] + [self.account(stage, step) for stage in begun]

    def describe(self, stage: Stage) -> str:
        """One line before the stage: steps, shape, and the blend as asked and as it will be."""
        settings = stage.settings
        return (
            f"data: steps {stage.first_step + 1} to {stage.end}, {settings.global_batch_size} × {settings.seq_len} "
            f"tokens, achieved of asked: {_blend_text(self.account(stage, stage.end))}"
        )

    def describe_end(self, stage: Stage) -> str:
        """One line after it: what was read."""
        account = self.account(stage, stage.end)
        tokens = sum(source["tokens"] for source in account["sources"])
        return (
            f"data: steps {stage.first_step + 1} to {stage.end} read {tokens:,} tokens, achieved of asked: "
            f"{_blend_text(account)}"
        )


def _blend_text(account: dict[str, Any]) -> str:
    shares = ", ".join(
        f"{source['prefix']} {source['achieved']:.3%} of {source['asked']:.3%}" for source in account["sources"]
    )
    packing = account.get("packing_efficiency")
    return shares if packing is None else f"{shares}; {packing:.2%} of the places hold a conversation"


def _needs_text(config: Config, mesh: Mesh) -> bool:
    """Whether this rank has the embedding or the head; one between them needs the bounds of documents alone."""
    ranks = stage_ranks(config.parallel.schedule, mesh.pp.size, config.parallel.virtual_stages)
    return mesh.pp.rank in (ranks[0], ranks[-1])


def _dataset(
    settings: Settings, num_samples: int, seed: int, part: int, cache: IndexCache
) -> GPTDataset | BlendedDataset | SftBlend:
    if settings.sft is not None:
        return open_sft(settings, num_samples, seed, cache)
    return build_lm_dataset(
        [(source.prefix, source.weight) for source in settings.blend],
        num_samples=num_samples,
        seq_len=settings.seq_len,
        seed=seed,
        split=settings.split,
        part=part,
        cache=cache,
        fim=replace(settings.fim, seed=seed) if settings.fim is not None and part == TRAIN else None,
        groups=part == TRAIN,
    )


def _index_cache(folder: str | None) -> IndexCache:
    """The cache as the ranks of this machine share it."""
    local = (os.environ.get(name) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    rank, ranks = (int(value) if value else default for value, default in zip(local, (0, 1), strict=True))
    return IndexCache(folder, rank=rank, ranks=ranks)


def validation_loader(config: Config, mesh: Mesh, *, pin_memory: bool = False) -> BatchLoader | None:
    """The evaluation samples, a few micro-batches at a time: one on each rank, or as many as fill a pipeline, if that
    comes out even. None if the configuration asks for no evaluation."""
    if config.train.eval_every is None:
        return None
    per_pass = config.train.micro_batch_size * mesh.dp.size
    size = -(-config.train.eval_samples // per_pass) * per_pass
    data = config.data
    if not data.blend:
        raise ConfigError("data.blend is empty: give at least one {prefix, weight}")
    cache = _index_cache(data.cache_dir)
    dataset: Any = sft_validation(config, size, cache)
    if dataset is None:
        dataset = build_lm_dataset(
            [(entry.prefix, entry.weight) for entry in data.blend],
            num_samples=size,
            seq_len=data.seq_len,
            seed=data.seed,
            split=data.split,
            part=VALID,
            cache=cache,
        )
    return BatchLoader(
        dataset,
        global_batch_size=per_pass * math.gcd(size // per_pass, mesh.pp.size),
        end_sample=size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
        document_mask=data.document_mask,
        text=_needs_text(config, mesh),
        pin_memory=pin_memory,
    )
