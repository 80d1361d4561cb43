"""Corpora that exist already, as dedup reads them, and their stored keys. What a build does with them: test_build_stages."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opencoder.corpus import dedup
from opencoder.errors import ConfigError, DataError

pytestmark = pytest.mark.fast
RECIPE = dedup.Recipe(16, 32, ngram=2)
FILES = 8


def text(seed: int) -> str:
    return " ".join(f"word{random.Random(seed * 1000 + i).randrange(9999)}" for i in range(200))


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """The parts of a clean/ folder."""
    (tmp_path / "clean").mkdir()
    made = []
    for name, seeds in (("a", range(3)), ("b", range(3, FILES))):
        made.append(tmp_path / "clean" / f"{name}.parquet")
        table = {"id": [f"id{n}" for n in seeds], "path": [f"f{n}.py" for n in seeds], "text": [text(n) for n in seeds]}
        pq.write_table(pa.table(table), made[-1])
    return made


def store(parts: list[Path]) -> Path:
    """Stored keys of all parts."""
    tables = [pq.read_table(part) for part in parts]
    file = parts[0].parents[1] / dedup.SIGNATURES
    dedup.write_signatures(file, [(table["id"].to_pylist(), table["text"]) for table in tables], RECIPE)
    return file


def test_files_are_numbered_over_all_parts(parts: list[Path]) -> None:
    known = dedup.read_existing(parts)
    assert known.paths.to_pylist() == [f"f{n}.py" for n in range(FILES)]
    assert known.ids.to_pylist() == [f"id{n}" for n in range(FILES)]
    assert known.starts.tolist() == [0, 3, FILES]
    nothing = dedup.read_existing([])
    assert (nothing.ids.to_pylist(), nothing.starts.tolist()) == ([], [0])


def test_stored_keys_equal_recomputed_ones(parts: list[Path]) -> None:
    ids, first, full = dedup.read_signatures(store(parts), RECIPE)
    texts = [text(n) for n in range(FILES)]
    assert ids == dedup.read_existing(parts).ids.to_pylist()
    assert (first == dedup.first_keys(texts, RECIPE)).all()
    assert (full == dedup.full_keys(texts, RECIPE)).all()


def test_signatures_of_other_settings_are_refused_with_both_values(parts: list[Path]) -> None:
    file = store(parts)
    dedup.check_signatures(file, RECIPE)
    for other, message in (
        (RECIPE._replace(scheme="legacy"), "scheme is affine32 there and legacy here"),
        (RECIPE._replace(seed=7), "seed is 1 there and 7 here"),
        (RECIPE._replace(bands=4, rows=128), "bands is 16 there and 4 here; rows is 32 there and 128 here"),
        (RECIPE._replace(ngram=5), "ngram is 2 there and 5 here"),
    ):
        for read in (dedup.check_signatures, dedup.read_signatures):
            with pytest.raises(ConfigError, match=message):
                read(file, other)


def test_what_is_no_signature_file_or_one_of_other_files_is_named(parts: list[Path]) -> None:
    file = store(parts)
    file.write_bytes(b"PAR1 this is not parquet PAR1")
    with pytest.raises(DataError, match="is not a signature file"):
        dedup.check_signatures(file, RECIPE)
    pq.write_table(pa.table({"id": ["a"]}), file)
    with pytest.raises(DataError, match="is not a signature file"):
        dedup.check_signatures(file, RECIPE)
    store(parts[:1])
    with pytest.raises(DataError, match="is not of the files in"):
        dedup.check_signatures(file, RECIPE)
