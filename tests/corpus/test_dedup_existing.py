"""Dedup against corpora that exist already, from their texts and from stored keys."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opencoder.config import load_corpus_config
from opencoder.corpus import dedup
from opencoder.corpus.build import build_corpus
from opencoder.corpus.dedup import existing
from opencoder.errors import ConfigError, DataError

pytestmark = pytest.mark.fast
RECIPE = dedup.Recipe(16, 32, ngram=2)


def text(seed: int, change: int | None = None) -> str:
    words = [f"word{random.Random(seed * 1000 + i).randrange(9999)}" for i in range(200)]
    if change is not None:
        words[change] = "changed"
    return " ".join(words)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A corpus of eight files, built by build-corpus."""
    source = tmp_path / "source"
    source.mkdir()
    for seed in range(8):
        (source / f"f{seed}.py").write_text(text(seed))
    config = load_corpus_config(None, ["rules.enabled=false", "dedup.preset=bigcode"])
    build_corpus([str(source)], tmp_path / "corpus", config)
    return tmp_path / "corpus"


def store(corpus: Path) -> None:
    batches = [pq.read_table(part) for part in sorted((corpus / "clean").glob("*.parquet"))]
    given = [(batch["id"].to_pylist(), batch["text"]) for batch in batches]
    dedup.write_signatures(corpus / existing.SIGNATURES, given, RECIPE)


@pytest.mark.parametrize("stored", [False, True])
def test_a_file_near_to_an_existing_one_is_dropped_for_it(corpus: Path, stored: bool) -> None:
    if stored:
        store(corpus)
    known = dedup.read_existing([corpus], RECIPE)
    assert sorted(known.paths) == [f"f{seed}.py" for seed in range(8)]
    new = [text(3, change=150), text(100), text(5, change=10), text(100, change=0), text(101)]
    numbers = np.arange(8, 8 + len(new))
    forest = dedup.near_duplicates([*known.batches, dedup.Batch(numbers, lambda: new)], RECIPE)
    matches = {new: known.paths[old] for new, old in known.matches(forest).items()}
    assert matches == {8: "f3.py", 10: "f5.py"}
    assert [9, 11] in forest.tolist()  # new files are compared with one another as well


def test_stored_keys_equal_recomputed_ones(corpus: Path) -> None:
    store(corpus)
    ids, first, full = dedup.read_signatures(corpus / existing.SIGNATURES, RECIPE)
    known = dedup.read_existing([corpus], RECIPE)
    assert ids == known.ids
    for batch in known.batches:
        assert (batch.first == dedup.first_keys(batch.get(), RECIPE)).all()
        assert (batch.full == dedup.full_keys(batch.get(), RECIPE)).all()
    assert len(full) == len(first) == 8


def test_the_same_bytes_are_found_by_id(corpus: Path) -> None:
    known = dedup.read_existing([corpus, corpus], None)
    assert known.exact(["0" * 64, known.ids[2], known.ids[9]]) == {1: 2, 2: 1}
    assert known.batches == []


def test_signatures_of_other_settings_are_refused_with_both_values(corpus: Path) -> None:
    store(corpus)
    for other, message in (
        (RECIPE._replace(scheme="legacy"), "scheme is affine32 there and legacy here"),
        (RECIPE._replace(seed=7), "seed is 1 there and 7 here"),
        (RECIPE._replace(bands=4, rows=128), "bands is 16 there and 4 here; rows is 32 there and 128 here"),
        (RECIPE._replace(ngram=5), "ngram is 2 there and 5 here"),
    ):
        with pytest.raises(ConfigError, match=message):
            dedup.read_existing([corpus], other)


def test_what_is_no_corpus_or_no_signature_file_is_named(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no finished corpus"):
        dedup.read_existing([tmp_path / "nothing"], RECIPE)
    file = corpus / existing.SIGNATURES
    file.write_bytes(b"PAR1 this is not parquet PAR1")
    with pytest.raises(DataError, match="is not a signature file"):
        dedup.read_existing([corpus], RECIPE)
    pq.write_table(pa.table({"id": ["a"]}), file)
    with pytest.raises(DataError, match="is not a signature file"):
        dedup.read_existing([corpus], RECIPE)
    dedup.write_signatures(file, [(["a"], ["some text"])], RECIPE)
    with pytest.raises(DataError, match="is not of the files in"):
        dedup.read_existing([corpus], RECIPE)
