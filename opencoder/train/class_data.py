"""The data of a run with labelled samples (data.kind: classification): what train/data.py is to text.

The position is the number of samples consumed, over all stages: a longer run, other batch sizes or another number of ranks go on
in the same order, epoch after epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from opencoder.config import Config
from opencoder.data.classification import ClassificationDataset, Collate, Evaluated, Shuffled
from opencoder.data.loader import BatchLoader, MicroBatch
from opencoder.errors import ConfigError
from opencoder.parallel.mesh import Mesh

from .stages import Settings, Stage, asked_settings, consumed_samples, micro_batch_size_at


def class_settings(config: Config) -> dict[int, Settings]:
    """First step → settings, as the configuration asks. `seq_len` is what a sample counts in tokens: those that are taken of the
    longest, or 1 where it is features."""
    known: dict[str, ClassificationDataset] = {}

    def identity(prefix: str) -> str:
        known[prefix] = ClassificationDataset(prefix)
        return known[prefix].identity

    asked = asked_settings(config, identity, None)
    for step, settings in asked.items():
        dataset = known[settings.blend[0].prefix]
        taken = min(settings.seq_len, dataset.longest) if dataset.kind == "tokens" else 1
        asked[step] = replace(settings, seq_len=taken)
    return asked


def check_class_inputs(config: Config, tokenizer_hash: str | None) -> None:
    """Compare every dataset with the model and the tokenizer. Raises ConfigError or DataError."""
    data = config.data
    prefixes = [entry.prefix for blend in (data.blend, *(s.blend or [] for s in data.stages)) for entry in blend]
    for prefix in dict.fromkeys([*prefixes, *([data.validation] if data.validation else [])]):
        _check_dataset(prefix, config, tokenizer_hash)


def _check_dataset(prefix: str, config: Config, tokenizer_hash: str | None) -> None:
    dataset, model = ClassificationDataset(prefix), config.model
    head = model.head
    assert head.classes is not None
    if dataset.classes > head.classes:
        raise ConfigError(
            f"dataset {prefix} has {dataset.classes} classes, model.head.classes={head.classes}: set it to {dataset.classes}"
        )
    if dataset.kind != model.encoder.input:
        raise ConfigError(
            f"dataset {prefix} holds {dataset.kind}, and model.encoder.input={model.encoder.input}: set it to {dataset.kind}"
        )
    if dataset.kind == "features":
        if dataset.longest != model.encoder.width:
            raise ConfigError(
                f"dataset {prefix} has features of width {dataset.longest}, model.encoder.width={model.encoder.width}: set it to "
                f"{dataset.longest}"
            )
        return
    if dataset.facts["vocab_size"] > model.vocab_size:
        raise ConfigError(
            f"dataset {prefix} was made with a vocabulary of {dataset.facts['vocab_size']}, model.vocab_size={model.vocab_size} is "
            f"smaller: set model.vocab_size={dataset.facts['vocab_size']}"
        )
    theirs = dataset.facts.get("tokenizer_hash")
    if tokenizer_hash is not None and theirs is not None and tokenizer_hash != theirs:
        raise ConfigError(
            f"tokenizer hash of data.tokenizer={config.data.tokenizer} is {tokenizer_hash}, of dataset {prefix} {theirs}: use the "
            "tokenizer the dataset was made with, or make the dataset again"
        )


class ClassData:
    """The datasets of all stages that are not over at `step`; what its methods promise stands in data.TrainingData."""

    def __init__(
        self, config: Config, stages: Sequence[Stage], mesh: Mesh, *, step: int, pin_memory: bool = False
    ) -> None:
        self.config, self.mesh, self.pin_memory = config, mesh, pin_memory
        self.all_stages = stages
        self.stages = [stage for stage in stages if stage.end > step]
        self.datasets = {
            prefix: ClassificationDataset(prefix)
            for prefix in dict.fromkeys(stage.settings.blend[0].prefix for stage in self.stages)
        }

    def batches(self, step: int) -> Iterator[tuple[Stage, list[MicroBatch]]]:
        """This rank's micro-batches of update `step` (from 0) and of every one after it, with the stage each belongs to."""
        for stage in self.stages:
            first, settings = max(step, stage.first_step), stage.settings
            dataset = self.datasets[settings.blend[0].prefix]
            start = consumed_samples(self.all_stages, first)
            loader = BatchLoader(
                Shuffled(dataset, settings.data_seed),
                global_batch_size=settings.global_batch_size,
                micro_batch_size=micro_batch_size_at(self.config, first),
                dp_rank=self.mesh.dp.rank,
                dp_size=self.mesh.dp.size,
                start_sample=start,
                end_sample=start + (stage.end - first) * settings.global_batch_size,
                workers=self.config.data.workers,
                pin_memory=self.pin_memory,
                collate=Collate(dataset, settings.seq_len, vocab_size=_vocabulary(self.config)),
            )
            for micro_batches in loader:
                yield stage, micro_batches

    def group_names(self, stage: Stage) -> None:
        """Losses are not told by groups of the data."""
        return None

    def account(self, stage: Stage, step: int) -> dict[str, Any]:
        """What the stage reads up to `step`: samples, and passes over its dataset."""
        settings = stage.settings
        prefix, steps = settings.blend[0].prefix, min(step, stage.end) - stage.first_step
        samples = steps * settings.global_batch_size
        source = {"prefix": prefix, "samples": samples, "epochs": samples / len(self.datasets[prefix])}
        return {"first_step": stage.first_step, "steps": steps, "sources": [source]}

    def accounts(self, step: int, earlier: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of all stages begun before `step`; of the ones that are not open here as they stand in `earlier`."""
        begun = [stage for stage in self.stages if stage.first_step < step]
        first = min((stage.first_step for stage in self.stages), default=step)
        return [each for each in earlier if each["first_step"] < first] + [self.account(stage, step) for stage in begun]

    def describe(self, stage: Stage) -> str:
        """One line before the stage."""
        dataset = self.datasets[stage.settings.blend[0].prefix]
        empty = dataset.facts["classes_without_samples"]
        return (
            f"data: steps {stage.first_step + 1} to {stage.end}, {stage.settings.global_batch_size} samples each of {dataset.prefix}: "
            f"{len(dataset):,} samples of {dataset.classes:,} classes"
            + (f", {empty:,} of which have none" if empty else "")
        )

    def describe_end(self, stage: Stage) -> str:
        """One line after it: what was read."""
        (source,) = self.account(stage, stage.end)["sources"]
        return f"data: steps {stage.first_step + 1} to {stage.end} read {source['samples']:,} samples, {source['epochs']:.2f} epochs"


def _vocabulary(config: Config) -> int | None:
    return config.model.vocab_size if config.model.encoder.input == "tokens" else None


def class_validation_loader(config: Config, mesh: Mesh, *, pin_memory: bool = False) -> BatchLoader | None:
    """`train.eval_samples` samples of data.validation, or all there are, each once; None if there is no evaluation. Ranks have equal
    numbers of micro-batches, the last filled with masked samples."""
    prefix, t = config.data.validation, config.train
    if prefix is None:
        return None
    dataset = ClassificationDataset(prefix)
    samples = min(t.eval_samples, len(dataset))
    per_pass = t.micro_batch_size * mesh.dp.size
    return BatchLoader(
        Evaluated(Shuffled(dataset, config.data.seed), samples),
        global_batch_size=per_pass,
        end_sample=-(-samples // per_pass) * per_pass,
        micro_batch_size=t.micro_batch_size,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
        pin_memory=pin_memory,
        collate=Collate(dataset, config.data.seq_len, vocab_size=_vocabulary(config)),
    )
