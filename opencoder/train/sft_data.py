"""The data of a run on conversations (data.kind: sft), as far as it differs from that of text; train/data.py calls it."""

from __future__ import annotations

from typing import Any

from opencoder.config import Config
from opencoder.config_rules import validate
from opencoder.data.cache import IndexCache
from opencoder.data.sft import Packing, SftBlend, build_sft_dataset
from opencoder.errors import ConfigError

from .stages import Settings

TRAIN, VALID = 0, 1


def with_steps(config: Config, world_size: int) -> Config:
    """The configuration with data.sft.epochs as train.steps: of a run that has none, itself.

    The last update takes the rows that are left. Raises ConfigError for what contradicts, DataError for bad data."""
    data, train = config.data, config.train
    if data.kind != "sft" or data.sft.epochs is None:
        return config
    if train.samples is not None:
        raise ConfigError("data.sft.epochs and train.samples both say how long the run is: remove one")
    if not data.blend:
        raise ConfigError("data.blend is empty: give at least one {prefix, weight}")
    given = train.steps
    validate(config.model_copy(update={"train": train.model_copy(update={"steps": given or 2**31})}), world_size)
    blend = [(entry.prefix, entry.weight) for entry in data.blend]
    options: dict[str, Any] = {"split": data.split, "cache": IndexCache(data.cache_dir)}
    packing = Packing(**data.sft.model_dump())
    dataset = build_sft_dataset(blend, num_rows=0, seq_len=data.seq_len, seed=data.seed, packing=packing, **options)
    steps = -(-sum(len(member) for member in dataset.members) // train.global_batch_size)
    if given is not None and given != steps:
        raise ConfigError(
            f"data.sft.epochs={data.sft.epochs} takes {steps} steps, and train.steps={given}: remove one of them"
        )
    return config.model_copy(update={"train": train.model_copy(update={"steps": steps})})


def open_sft(settings: Settings, num_samples: int, seed: int, cache: IndexCache) -> SftBlend:
    """The rows of a stage."""
    assert settings.sft is not None
    return build_sft_dataset(
        [(source.prefix, source.weight) for source in settings.blend],
        num_rows=num_samples,
        seq_len=settings.seq_len,
        seed=seed,
        packing=settings.sft,
        split=settings.split,
        cache=cache,
        groups=True,
    )


def sft_validation(config: Config, size: int, cache: IndexCache) -> SftBlend | None:
    """`size` rows of the validation part, which holds every conversation of it at most once; None for other data."""
    data = config.data
    if data.kind != "sft":
        return None
    return build_sft_dataset(
        [(entry.prefix, entry.weight) for entry in data.blend],
        num_rows=size,
        seq_len=data.seq_len,
        seed=data.seed,
        packing=Packing(data.sft.pack, data.sft.window, epochs=1),
        split=data.split,
        part=VALID,
        cache=cache,
    )


def sft_account(dataset: SftBlend, settings: Settings, samples: int) -> dict[str, Any]:
    """What the first `samples` rows read of each dataset: rows, conversations, tokens without padding, and its share of the rows as
    asked and achieved; and the share of all places that holds a conversation."""
    sources: list[dict[str, Any]] = []
    rows = dataset.rows_of(samples)
    for source, member, share, n in zip(settings.blend, dataset.members, dataset.shares, rows, strict=True):
        conversations, tokens = member.read(n)
        numbers = {"rows": n, "conversations": conversations, "tokens": tokens}
        sources.append({"prefix": source.prefix, **numbers, "asked": share, "achieved": n / max(sum(rows), 1)})
    tokens = sum(source["tokens"] for source in sources)
    return {"sources": sources, "packing_efficiency": tokens / max(sum(rows) * settings.seq_len, 1)}
