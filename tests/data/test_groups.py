"""The source and language of every label, out of PREFIX.docs.parquet."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opencoder.data import groups
from opencoder.data.cache import IndexCache
from opencoder.data.groups import read_languages
from opencoder.data.indexed import IndexedDataset, IndexedWriter
from opencoder.data.lm import build_lm_dataset
from opencoder.data.loader import BatchLoader
from opencoder.errors import DataError

pytestmark = pytest.mark.fast


def write(prefix: Path, documents: dict[str, list[list[int]]]) -> str:
    """Documents by language, "" for none; the languages take turns."""
    languages = []
    with IndexedWriter(prefix, np.uint16) as writer:
        for turn in range(max(map(len, documents.values()))):
            for language, texts in documents.items():
                if turn < len(texts):
                    writer.add_document(texts[turn])
                    languages.append(language)
    pq.write_table(pa.table({"language": languages}), f"{prefix}.docs.parquet")
    return str(prefix)


def texts(first: int, count: int) -> list[list[int]]:
    """Documents of tokens from [first, first + 50) alone."""
    return [[first + (7 * i + j) % 50 for j in range(5 + 3 * i)] for i in range(count)]


def blend(tmp_path: Path) -> list[tuple[str, float]]:
    """Two datasets; what a token is from can be told by its number: 0 a python, 50 a rust, 100 b rust, 150 b without."""
    a = write(tmp_path / "a", {"python": texts(0, 12), "rust": texts(50, 9)})
    b = write(tmp_path / "b", {"rust": texts(100, 9), "": texts(150, 12)})
    return [(a, 2.0), (b, 1.0)]


@pytest.mark.parametrize("cached", [False, True])
def test_every_label_has_its_source_and_language(tmp_path: Path, cached: bool) -> None:
    members = blend(tmp_path)
    for _ in range(1 + cached):  # the second time from the cache
        cache = IndexCache() if cached else None
        data = build_lm_dataset(members, num_samples=30, seq_len=16, seed=1, cache=cache, groups=True)
        assert data.group_names is not None
        assert data.group_names.sources == [prefix for prefix, _ in members]
        assert data.group_names.languages == ["python", "rust"]
        truth = np.array([[0, 2], [0, 3], [1, 3], [1, -1]])
        for i in range(30):
            assert np.array_equal(data[i].groups, truth[data[i].labels // 50])
            assert np.array_equal(data.bounds(i), data[i].cu_seqlens)
    if cached:
        assert list(Path(f"{members[0][0]}.cache").glob("*-codes.npy"))


def test_the_languages_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = IndexedDataset(write(tmp_path / "a", {"python": texts(0, 3)}))
    assert read_languages(data, IndexCache()) is not None
    monkeypatch.setattr(groups, "_read", None)
    found = read_languages(IndexedDataset(tmp_path / "a"), IndexCache())
    assert found is not None
    assert (found.names, found.codes.tolist()) == (["python"], [0, 0, 0])


def test_what_is_not_known_is_no_language(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", {"": texts(0, 3)})
    assert read_languages(IndexedDataset(prefix)) is None
    pq.write_table(pa.table({"id": ["x"] * 3}), f"{prefix}.docs.parquet")
    assert read_languages(IndexedDataset(prefix)) is None
    Path(f"{prefix}.docs.parquet").unlink()
    assert read_languages(IndexedDataset(prefix)) is None
    data = build_lm_dataset([(prefix, 1.0)], num_samples=1, seq_len=8, seed=1, groups=True)
    assert data[0].groups is not None
    assert data[0].groups.tolist() == [[0, -1]] * 8


def test_a_document_of_several_sequences_has_one_language(tmp_path: Path) -> None:
    data = IndexedDataset(write(tmp_path / "a", {"python": texts(0, 2), "rust": texts(0, 1)}))
    data.document_indices = np.array([0, 2, 3])
    pq.write_table(pa.table({"language": ["go", "c"]}), tmp_path / "a.docs.parquet")
    found = read_languages(data)
    assert found is not None
    assert [found.names[code] for code in found.codes] == ["go", "go", "c"]


def test_rows_that_are_not_the_documents_are_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", {"python": texts(0, 3)})
    pq.write_table(pa.table({"language": ["python"] * 4}), f"{prefix}.docs.parquet")
    with pytest.raises(DataError, match="describes 4 documents, the dataset beside it has 3"):
        read_languages(IndexedDataset(prefix))
    Path(f"{prefix}.docs.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="damaged"):
        read_languages(IndexedDataset(prefix))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_without_embedding_and_head_reads_bounds_alone(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = build_lm_dataset(blend(tmp_path), num_samples=8, seq_len=16, seed=1, groups=True)
    options = {"global_batch_size": 4, "micro_batch_size": 2, "document_mask": True, "workers": workers}
    truth = list(BatchLoader(data, **options))

    def no_reading(*_: object) -> None:
        raise AssertionError("tokens were read")

    monkeypatch.setattr(IndexedDataset, "get", no_reading)
    found = list(BatchLoader(data, **options, text=False))
    assert len(found) == len(truth) == 2
    for ours, theirs in zip(chain.from_iterable(found), chain.from_iterable(truth), strict=True):
        assert ours.tokens.shape == ours.labels.shape == theirs.labels.shape
        assert (ours.tokens == -100).all()
        assert (ours.labels == -100).all()
        assert ours.cu_seqlens.tolist() == theirs.cu_seqlens.tolist()
        assert (ours.max_seqlen, ours.groups) == (theirs.max_seqlen, None)
        assert theirs.groups is not None
