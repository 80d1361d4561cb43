"""The stages of a run's data: which steps read which datasets, in samples of which length, how many at a time.

A stage's order of samples depends on the number of samples its index was built for. So that number is written into the
checkpoint with everything else the order depends on, and used again on resume; what a begun stage was made from cannot be
changed. A stage may end before its samples are used up (a change of plan, a shorter run), and what lies beyond them is a
further stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from opencoder.config import BlendEntry, Config
from opencoder.config_rules import phases
from opencoder.data.fim import Fim, FimIds
from opencoder.errors import ConfigError

Identity = Callable[[str], str]
"""PREFIX → a hash of the dataset there."""


@dataclass(frozen=True)
class Source:
    """One dataset of a stage's blend."""

    prefix: str
    weight: float
    identity: str
    """Hash of the dataset."""


@dataclass(frozen=True)
class Settings:
    """What the order and content of a stage's samples depend on, beside their number."""

    blend: tuple[Source, ...]
    seq_len: int
    global_batch_size: int
    split: str
    document_mask: bool
    fim: Fim | None
    """Its seed is that of the data; a stage replaces it by its own."""
    data_seed: int


@dataclass(frozen=True)
class Stage:
    """Steps [first_step, first_step + steps) of the run."""

    first_step: int
    steps: int
    num_samples: int
    """What the index is built for: at least steps · global_batch_size."""
    seed: int
    """Of the shuffles."""
    settings: Settings
    own_from: int = 0
    """Steps before this one were another run's (`checkpoint.fork`): what is configured here does not speak of them."""

    @property
    def end(self) -> int:
        """The step after its last."""
        return self.first_step + self.steps

    def record(self) -> dict[str, Any]:
        """As the checkpoint's state.json holds it."""
        return asdict(self)


def asked_settings(config: Config, identity: Identity, fim: Fim | None) -> dict[int, Settings]:
    """First step → settings, as the configuration asks. `fim`: what data.fim comes to, its seed left out of account."""
    data = config.data
    known: dict[str, str] = {}

    def source(entry: BlendEntry) -> Source:
        if entry.prefix not in known:
            known[entry.prefix] = identity(entry.prefix)
        return Source(entry.prefix, entry.weight, known[entry.prefix])

    asked = {}
    for phase in phases(config):
        if not phase.blend:
            raise ConfigError("data.blend is empty: give at least one {prefix, weight}")
        asked[phase.first_step] = Settings(
            blend=tuple(source(entry) for entry in phase.blend),
            seq_len=phase.seq_len,
            global_batch_size=phase.global_batch_size,
            split=data.split,
            document_mask=data.document_mask,
            fim=fim,
            data_seed=data.seed,
        )
    return asked


def plan(
    asked: dict[int, Settings],
    total_steps: int,
    *,
    saved: Sequence[Stage] = (),
    step: int = 0,
    fork: bool = False,
) -> list[Stage]:
    """The stages of a run of `total_steps`, of which `step` are done with the stages `saved`.

    Raises ConfigError if `asked` contradicts what was done; with `fork` that is another run's past and stands as it is."""
    begun = [stage for stage in saved if stage.first_step < step]
    spans = list(pairwise([*sorted(asked), total_steps]))
    stages: list[Stage] = []
    for n, stage in enumerate(begun):
        latest = n + 1 == len(begun)
        end = step if latest else begun[n + 1].first_step
        own_from = step if fork else stage.own_from
        for first, last in spans:
            if max(first, stage.first_step, own_from) < min(last, end):
                _check_same(stage, asked[first])
        if latest:  # it goes on until its samples are used up or something else is asked for
            capacity = stage.first_step + stage.num_samples // stage.settings.global_batch_size
            changes = [max(a, step) for a, b in spans if b > step and not _same(asked[a], stage.settings)]
            end = max(step, min(capacity, total_steps, *changes))
        stages.append(replace(stage, steps=end - stage.first_step, own_from=own_from))
    at = stages[-1].end if stages else 0
    for first, last in spans:
        start = max(first, at)
        if start < last:
            settings = asked[first]
            samples = (last - start) * settings.global_batch_size
            stages.append(Stage(start, last - start, samples, settings.data_seed + len(stages), settings))
    return stages


def consumed_samples(stages: Sequence[Stage], step: int) -> int:
    """Samples in the first `step` updates."""
    return sum(
        (min(stage.end, step) - stage.first_step) * stage.settings.global_batch_size
        for stage in stages
        if stage.first_step < step
    )


def micro_batch_size_at(config: Config, step: int) -> int:
    """That of update `step`; no part of a stage, as the order of samples does not depend on it."""
    return next(phase.micro_batch_size for phase in reversed(phases(config)) if phase.first_step <= step)


def _same(a: Settings, b: Settings) -> bool:
    """Whether samples are the same: a dataset may have moved."""
    return _comparable(a) == _comparable(b)


def _comparable(settings: Settings) -> Settings:
    return replace(settings, blend=tuple(replace(source, prefix="") for source in settings.blend))


KEYS = {
    "seq_len": "data.seq_len",
    "global_batch_size": "train.global_batch_size",
    "split": "data.split",
    "document_mask": "data.document_mask",
    "fim": "data.fim",
    "data_seed": "data.seed",
}


def _check_same(begun: Stage, asked: Settings) -> None:
    then = begun.settings
    advice = (
        f"but the stage of the data from step {begun.first_step} was started with {{}}: keep that, change it from a "
        "later step on with data.stages, or start a new run_dir with checkpoint.load"
    )
    for name, key in KEYS.items():
        if getattr(then, name) != getattr(asked, name):
            raise ConfigError(f"{key}={getattr(asked, name)}, {advice.format(getattr(then, name))}")
    blends = [[(source.prefix, source.weight) for source in settings.blend] for settings in (asked, then)]
    if [source.weight for source in asked.blend] != [source.weight for source in then.blend]:
        raise ConfigError(f"data.blend={blends[0]}, {advice.format(blends[1])}")
    for new, old in zip(asked.blend, then.blend, strict=True):
        if new.identity != old.identity:
            raise ConfigError(
                f"dataset {new.prefix} is not the one that the stage of the data that began at step {begun.first_step} "
                f"reads (hash {new.identity[:12]}, then {old.identity[:12]} at {old.prefix}): put that one back, name "
                "another from a later step on with data.stages, or start a new run_dir with checkpoint.load"
            )


def from_records(records: Sequence[dict[str, Any]], before: Callable[[], Settings]) -> list[Stage]:
    """Stages out of a checkpoint. Those of versions that wrote the numbers alone are completed from `before`, the
    settings of the checkpoint's own configuration."""
    stages: list[Stage] = []
    for record in records:
        if "settings" not in record:
            settings = before()
            at, n = stages[-1].end if stages else 0, record["num_samples"]
            stages.append(Stage(at, n // settings.global_batch_size, n, record["seed"], settings))
            continue
        fields = dict(record["settings"])
        fields["blend"] = tuple(Source(**source) for source in fields["blend"])
        if fields["fim"] is not None:
            fields["fim"] = Fim(**{**fields["fim"], "ids": FimIds(*fields["fim"]["ids"])})
        stages.append(Stage(**{**record, "settings": Settings(**fields)}))
    return stages
