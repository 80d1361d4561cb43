"""Fuzzy dedup as tasks over files finds what it finds in memory, whatever the shards and partitions."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opencoder.corpus import dedup
from opencoder.corpus.dedup import tasks
from opencoder.errors import DataError
from tests.corpus.test_dedup_groups import planted

pytestmark = pytest.mark.fast


def write_shards(folder: Path, texts: list[str], numbers: np.ndarray, size: int) -> list[tuple[str, str]]:
    shards = []
    for k, start in enumerate(range(0, len(texts), size)):
        part = slice(start, start + size)
        pq.write_table(pa.table({"text": pa.array(texts[part], pa.large_string())}), folder / f"{k}.parquet")
        np.save(folder / f"{k}.npy", numbers[part])
        shards.append((f"{k}.parquet", f"{k}.npy"))
    return shards


def run(steps: list[tasks.Step], folder: Path) -> np.ndarray:
    """Run the steps in order; the answer of the last."""
    for step in steps:
        module, function = step.function.split(":")
        assert json.loads(json.dumps(step.parameters)) == step.parameters
        inputs = [folder / file for file in (*step.inputs, *step.ranged)]
        outputs = [folder / file for file in step.files()]
        outputs[0].parent.mkdir(parents=True, exist_ok=True)
        getattr(importlib.import_module(module), function)(inputs, outputs, **step.parameters)
    return np.load(folder / steps[-1].files()[0])


@pytest.mark.parametrize("check", [None, 0.7])
@pytest.mark.parametrize("shape", [(4, 32), (9, 3)], ids=["progressive", "plain"])
@pytest.mark.parametrize(("size", "partitions"), [(100, 1), (17, 5), (3, 12)])
def test_tasks_equal_the_way_in_memory(
    tmp_path: Path, size: int, partitions: int, shape: tuple[int, int], check: float | None
) -> None:
    draw = random.Random(11)
    texts = planted(draw, 100, 60)
    recipe = dedup.Recipe(*shape, ngram=2)
    numbers = np.array(draw.sample(range(100), 100), np.int64)
    numbers[numbers % 10 == 3] = -1  # rows that something else has dropped
    some = np.flatnonzero(numbers >= 0)
    batch = dedup.Batch(numbers[some], lambda: [texts[i] for i in some])
    truth = dedup.near_duplicates([batch], recipe, check_jaccard=check)
    assert 5 < len(truth) < 90
    shards = write_shards(tmp_path, texts, numbers, size)
    steps = tasks.fuzzy_steps(shards, recipe, partitions=partitions, check_jaccard=check)
    assert run(steps, tmp_path).tolist() == truth.tolist()
    assert any("first" in step.name for step in steps) == recipe.progressive


@pytest.mark.parametrize("shape", [(4, 32), (9, 3)], ids=["progressive", "plain"])
def test_stored_signatures_stand_for_texts(tmp_path: Path, shape: tuple[int, int]) -> None:
    texts = planted(random.Random(2), 60, 60)
    recipe = dedup.Recipe(*shape, ngram=2)
    numbers = np.arange(60)
    numbers[5] = -1
    shards = write_shards(tmp_path, texts, numbers, 30)
    truth = run(tasks.fuzzy_steps(shards, recipe, partitions=2), tmp_path)
    ids = [f"id{i}" for i in range(30)]
    dedup.write_signatures(tmp_path / "signatures.parquet", [(ids[:20], texts[:20]), (ids[20:], texts[20:30])], recipe)
    stored = [("signatures.parquet", "0.npy"), shards[1]]
    assert run(tasks.fuzzy_steps(stored, recipe, partitions=2, prefix="again"), tmp_path).tolist() == truth.tolist()
    assert len(truth) > 5
    with pytest.raises(DataError, match="holds keys, no texts"):
        run(tasks.fuzzy_steps(stored, recipe, partitions=2, check_jaccard=0.5, prefix="more"), tmp_path)


def test_tasks_write_the_same_bytes_again(tmp_path: Path) -> None:
    texts = planted(random.Random(5), 30, 40)
    shards = write_shards(tmp_path, texts, np.arange(30), 8)
    steps = tasks.fuzzy_steps(shards, dedup.Recipe(4, 16, ngram=2), partitions=3)
    contents = []
    for _ in range(2):
        run(steps, tmp_path)
        contents.append([(tmp_path / file).read_bytes() for step in steps for file in step.files()])
    assert contents[0] == contents[1]


def test_nothing_at_all(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, ["", "a b c"], np.array([-1, -1]), 1)
    for given in (shards, shards[:1], []):
        steps = tasks.fuzzy_steps(given, dedup.Recipe(4, 16), partitions=2)
        assert run(steps, tmp_path).shape == (0, 2)


def test_forests_merge_in_a_tree(tmp_path: Path) -> None:
    steps = tasks.fuzzy_steps([("0.parquet", "0.npy")], dedup.Recipe(2, 4), partitions=300)
    merges = [step for step in steps if "merge" in step.name]
    assert [len(step.inputs) for step in merges] == [16] * 18 + [12] + [16, 3] + [2]


def test_a_damaged_bucket_is_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, planted(random.Random(5), 30, 40), np.arange(30), 10)
    steps = tasks.fuzzy_steps(shards, dedup.Recipe(4, 16, ngram=2), partitions=1)
    run(steps, tmp_path)
    file = tmp_path / "fuzzy" / "first" / "000001.entries.npy"
    whole = file.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-30], whole[:20], b""):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"000001\.entries\.npy is damaged \(bucket 0\)"):
            run([step for step in steps if "shared" in step.name], tmp_path)
