"""Which tasks a corpus build has, and which files each reads: opencoder.corpus.build explains the order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opencoder.corpus_config import CorpusConfig
from opencoder.errors import DataError

from . import dedup
from .decontaminate import benchmark_files
from .engine import Input, Task, read_manifest
from .read import Item

SAMPLE = "sample/all.json"
_HERE = "opencoder.corpus.stages"
BYTES_PER_FILE = 4000
"""A low guess, for the number of partitions."""
PARTITION_ENTRIES = 8_000_000
"""Keys of a partition, about: 0.4 GB of first entries and 1.2 GB of full ones in memory."""


def tasks(shards: Sequence[Sequence[Item]], config: CorpusConfig, *, bytes_in: int) -> list[Task]:
    """All tasks of a build over shards of items."""
    plain = config.model_dump(mode="json")
    del plain["engine"], plain["samples_per_rule"]
    numbers = range(len(shards))
    found = [_read(n, items, plain) for n, items in enumerate(shards)]
    texts = [Input(f"read/{n:06d}.parquet") for n in numbers]
    metas = [Input(f"read/{n:06d}.meta.parquet") for n in numbers]
    known = known_corpora(config)
    outputs = (*(f"{n:06d}.parquet" for n in numbers), *_numbered(len(shards), known))
    inputs = (*metas, *_parts(known))
    parameters = {"shards": len(shards), "known_parts": [len(one.parts) for one in known], "config": plain}
    found.append(Task("exact/all", f"{_HERE}.duplicates:exact", outputs, inputs, parameters))
    inputs = tuple(Input(f"read/{n:06d}.licences.json") for n in numbers)
    found.append(Task("licences/all", f"{_HERE}.licences:licences", tuple(f"{n:06d}.json" for n in numbers), inputs))
    found += _near(texts, metas, config, plain, bytes_in)
    benchmarks = tuple(Input(str(path.absolute())) for path in benchmark_files(config.decontaminate))
    copies, near = ([Input(f"{name}/all.{n:06d}.parquet") for n in numbers] for name in ("exact", "groups"))
    for n in numbers:
        inputs = (texts[n], copies[n], near[n], Input(f"licences/all.{n:06d}.json"), *benchmarks)
        found.append(Task(f"judge/{n:06d}", f"{_HERE}.judging:judge", ("parquet",), inputs, {"config": plain}))
    judged = [Input(f"judge/{n:06d}.parquet") for n in numbers]
    found.append(Task("sample/all", f"{_HERE}.output:sample", ("json",), tuple(_unverified(judged)), {"config": plain}))
    suffixes = ("clean.parquet", "dropped.parquet", "failed.parquet", "counts.json")
    whole = plain | {"samples_per_rule": config.samples_per_rule}
    for n in numbers:
        inputs = (texts[n], copies[n], near[n], judged[n], Input(SAMPLE))
        found.append(Task(f"output/{n:06d}", f"{_HERE}.output:output", suffixes, inputs, {"config": whole}))
    return found


def _read(number: int, items: Sequence[Item], plain: dict[str, Any]) -> Task:
    """Plain files are inputs by size and time; of repositories and remote objects the items hold the version. What says it is
    empty need not be: devices and files of /proc are left to the reader, which reports them."""
    files = {item.file for item in items if item.size and item.kind != "git" and os.path.isfile(item.file)}
    inputs = tuple(Input(os.path.abspath(file), by="stat") for file in sorted(files))
    parameters = {"items": [item.plain() for item in items], "config": plain}
    return Task(
        f"read/{number:06d}", f"{_HERE}.reading:read", ("parquet", "meta.parquet", "licences.json"), inputs, parameters
    )


def _unverified(inputs: Sequence[Input]) -> list[Input]:
    """For tasks that read a part of each file: hashing all of it would cost more than the task."""
    return [Input(one.path, verify=False) for one in inputs]


class Known(NamedTuple):
    """Files of a corpus to dedup against that go through the tasks together."""

    keys: Path
    """Where their keys come from: a part of clean/, or the stored signatures of all parts."""
    parts: list[Path]


def known_corpora(config: CorpusConfig) -> list[Known]:
    """The corpora of `dedup.against`: with stored signatures whole, else part by part. True similarities need the texts.

    Raises DataError for a folder that holds no finished corpus."""
    found = []
    for folder in (Path(name).absolute() for name in config.dedup.against):
        parts = sorted((folder / "clean").glob("*.parquet"))
        if not parts or not (folder / "manifest.json").is_file():
            raise DataError(
                f"dedup.against: {folder} holds no finished corpus: give the output folder of a build-corpus run"
            )
        stored = folder / dedup.SIGNATURES
        if stored.is_file() and config.dedup.fuzzy and config.dedup.check_jaccard is None:
            found.append(Known(stored, parts))
        else:
            found += [Known(part, [part]) for part in parts]
    return found


def _parts(known: Sequence[Known]) -> list[Input]:
    return [Input(str(part)) for one in known for part in one.parts]


def partitions_of(bytes_in: int, bands: int) -> int:
    """Parts of the keys, so that each fits in a worker."""
    return min(1 << 12, 1 + bytes_in // BYTES_PER_FILE * bands // PARTITION_ENTRIES)


def _near(
    texts: list[Input], metas: list[Input], config: CorpusConfig, plain: dict[str, Any], bytes_in: int
) -> list[Task]:
    """The tasks that end in `groups`."""
    shards, module = range(len(texts)), f"{_HERE}.duplicates"
    outputs = tuple(f"{n:06d}.parquet" for n in shards)
    own_numbers = [Input(f"exact/all.{n:06d}.npy") for n in shards]
    if not config.dedup.fuzzy:
        return [Task("groups/all", f"{module}:no_groups", outputs)]
    if config.dedup.level == "repository":
        inputs = (*own_numbers, *metas, *_unverified(texts))
        parameters = {"shards": len(texts), "config": plain}
        return [Task("groups/all", f"{module}:repository_groups", outputs, inputs, parameters)]
    recipe = dedup.recipe_of(config.dedup)
    known = known_corpora(config)
    numbers = [f"exact/all.{name}" for name in _numbered(len(texts), known)]
    sources = list(zip([*(one.path for one in texts), *(str(one.keys) for one in known)], numbers, strict=True))
    steps = dedup.tasks.fuzzy_steps(
        sources, recipe, partitions=partitions_of(bytes_in, recipe.bands), check_jaccard=config.dedup.check_jaccard
    )
    found = []
    for step in steps:
        inputs = (*map(Input, step.inputs), *_unverified([Input(path) for path in step.ranged]))
        found.append(Task(step.name, step.function, step.outputs, inputs, step.parameters))
    (forest,) = steps[-1].files()
    inputs = (Input(forest), *own_numbers, *metas, *_unverified(_parts(known)))
    return [*found, Task("groups/all", f"{module}:groups", outputs, inputs, {"shards": len(texts)})]


def _numbered(shards: int, known: Sequence[Known]) -> list[str]:
    """Suffixes of the files of numbers: of each shard, and of each entry of the known corpora."""
    return [*(f"{n:06d}.npy" for n in range(shards)), *(f"known-{k:06d}.npy" for k in range(len(known)))]


def stage_seconds(work: Path, plan: Sequence[Task]) -> dict[str, float]:
    """Seconds of work of each stage, over all workers, as the manifests have them."""
    seconds: dict[str, float] = {}
    for task in plan:
        manifest = read_manifest(work, task.name)
        stage = task.name.partition("/")[0]
        seconds[stage] = seconds.get(stage, 0.0) + (manifest["measured"]["wall_s"] if manifest else 0.0)
    return seconds
