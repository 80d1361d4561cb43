"""The data of a run on conversations (data.kind: sft), as far as it differs from that of text; train/data.py calls it."""

from __future__ import annotations

from typing import Any

from opencoder.config import Config
from opencoder.config_rules import data_parallel_size, validate
from opencoder.data.cache import IndexCache
from opencoder.data.sft import Packing, SftBlend, build_sft_dataset
from opencoder.errors import ConfigError

from .stages import Settings

TRAIN, VALID = 0, 1


def resolved(config: Config, world_size: int) -> Config:
    """The configuration with what data.sft says of the run's length and batch as train.steps and train.global_batch_size; one that says
    nothing of them, itself. With epochs the last update takes the rows that are left.

    Raises ConfigError for what contradicts, DataError for bad data."""
    data, train = config.data, config.train
    epochs, batch = data.sft.epochs, data.sft.batch_conversations
    if data.kind != "sft" or (epochs is None and batch is None):
        return config
    if epochs is not None and train.samples is not None:
        raise ConfigError("data.sft.epochs and train.samples both say how long the run is: remove one")
    if not data.blend:
        raise ConfigError("data.blend is empty: give at least one {prefix, weight}")
    # The rules that need no numbers, before the datasets are read.
    placeholder: dict[str, Any] = {"steps": train.steps or 2**31} if epochs is not None else {}
    if batch is not None:
        placeholder["global_batch_size"] = _placeholder_batch(config, world_size)
    validate(config.model_copy(update={"train": train.model_copy(update=placeholder)}), world_size)
    dataset = _whole_epochs(config, epochs or 1)
    found: dict[str, Any] = {}
    size = train.global_batch_size
    if batch is not None:
        found["global_batch_size"] = size = rows_for(batch, _conversations_per_row(dataset, config))
        if "global_batch_size" in train.model_fields_set and train.global_batch_size != size:
            raise ConfigError(
                f"data.sft.batch_conversations={batch} takes {size} samples, and train.global_batch_size={train.global_batch_size}: "
                "remove one of them"
            )
        per_pass = train.micro_batch_size * data_parallel_size(config, world_size)
        if size % per_pass:
            below = size - size % per_pass
            raise ConfigError(
                f"data.sft.batch_conversations={batch} takes {size} samples, no multiple of micro_batch_size·dp = {per_pass}: lower "
                f"train.micro_batch_size, or set train.global_batch_size={below or per_pass} instead"
            )
    if epochs is not None:
        found["steps"] = steps = -(-sum(len(member) for member in dataset.members) // size)
        if train.steps is not None and train.steps != steps:
            raise ConfigError(
                f"data.sft.epochs={epochs} takes {steps} steps, and train.steps={train.steps}: remove one of them"
            )
    return config.model_copy(update={"train": train.model_copy(update=found)})


def _placeholder_batch(config: Config, world_size: int) -> int:
    """A batch that no rule has anything against."""
    return config.train.micro_batch_size * data_parallel_size(config, world_size) * config.parallel.pp


def _whole_epochs(config: Config, epochs: int) -> SftBlend:
    data = config.data
    return build_sft_dataset(
        [(entry.prefix, entry.weight) for entry in data.blend],
        num_rows=0,
        seq_len=data.seq_len,
        seed=data.seed,
        packing=Packing(data.sft.pack, data.sft.window, epochs),
        split=data.split,
        cache=IndexCache(data.cache_dir),
    )


def _conversations_per_row(dataset: SftBlend, config: Config) -> float:
    """Over all rows of an epoch; where datasets are read by weight, of their rows in these shares."""
    means = [len(member.rows.items) / len(member) for member in dataset.members]
    weights = [float(entry.weight) for entry in config.data.blend]
    if config.data.sft.epochs is not None:
        weights = [float(len(member)) for member in dataset.members]
    return sum(mean * weight for mean, weight in zip(means, weights, strict=True)) / sum(weights)


def rows_for(conversations: int, per_row: float) -> int:
    """Rows that hold about so many conversations: at least one, a multiple of the largest power of two that keeps within 5 %."""
    rows = max(1, round(conversations / per_row))
    unit = 1
    while 2 * unit <= rows / 10:
        unit *= 2
    return round(rows / unit) * unit


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
