"""Indices and files against the golden vectors of Megatron's own code, for C++ and for the Python fallback."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from opencoder.data import index as module
from opencoder.data.gpt import GPTDataset, split_bounds
from opencoder.data.index import build_blending_indices, build_exhaustive_blending_indices, build_sample_index
from opencoder.data.indexed import IndexedDataset, IndexedWriter
from opencoder.errors import DataError
from opencoder.native import text_engine

pytestmark = pytest.mark.fast


@pytest.fixture(params=["cpp", "python"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpp" and text_engine() is None:
        pytest.skip("the C++ text engine was not built")
    if request.param == "python":
        monkeypatch.setattr(module, "text_engine", lambda: None)
    return str(request.param)


SIZES = np.array([5, 3, 9, 2, 6], np.int32)
DOCUMENTS = np.array([2, 0, 4, 1, 3], np.int32)


@pytest.mark.parametrize(
    ("extra", "golden"),
    [
        (1, [[0, 0], [0, 4], [0, 8], [1, 3], [2, 2], [3, 0], [4, 1]]),
        (0, [[0, 0], [0, 4], [0, 8], [1, 3], [2, 2], [2, 6], [4, 1]]),
    ],
)
def test_sample_index_golden(engine: str, extra: int, golden: list[list[int]]) -> None:
    found = build_sample_index(SIZES, DOCUMENTS, seq_len=4, num_samples=6, extra=extra)
    assert found.dtype == np.int32
    assert found.tolist() == golden


def test_blending_golden(engine: str) -> None:
    dataset, sample = build_blending_indices(np.array([0.5, 0.25, 0.25]), 10)
    assert dataset.tolist() == [0, 1, 2, 0, 0, 1, 2, 0, 0, 1]
    assert sample.tolist() == [0, 0, 0, 1, 2, 1, 1, 3, 4, 2]
    dataset, sample = build_exhaustive_blending_indices(np.array([3, 5, 2]))
    assert dataset.tolist() == [1, 0, 2, 1, 0, 1, 2, 1, 0, 1]
    assert sample.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4]


def walk(sizes: list[int], documents: list[int], seq_len: int, samples: int, extra: int) -> list[list[int]]:
    """The walk of the format's description, token counts only: an independent reference."""
    rows, position, offset = [[0, 0]], 0, 0
    for _ in range(samples):
        need = seq_len + extra
        while True:
            available = sizes[documents[position]] - offset
            need -= available
            if need <= 0:
                offset += need + available - extra
                break
            if position == len(documents) - 1:
                offset = sizes[documents[position]] - extra
                break
            position, offset = position + 1, 0
        rows.append([position, offset])
    return rows


def test_sample_index_equals_the_walk_on_random_input(engine: str) -> None:
    draw = random.Random(0)
    for _ in range(300):
        sizes = [draw.choice([0, 1, 2, 3, 7, 20]) for _ in range(draw.randint(1, 12))]
        documents = [draw.randrange(len(sizes)) for _ in range(draw.randint(1, 20))]
        total, extra, seq_len = sum(sizes[d] for d in documents), draw.choice([0, 1]), draw.randint(1, 9)
        if total <= extra or sizes[documents[-1]] == 0:
            continue
        samples = (total - extra) // seq_len + draw.choice([0, 1]) * bool((total - extra) % seq_len)
        if samples == 0:
            continue
        found = build_sample_index(
            np.array(sizes, np.int32), np.array(documents, np.int32), seq_len=seq_len, num_samples=samples, extra=extra
        )
        assert found.tolist() == walk(sizes, documents, seq_len, samples, extra)


def test_too_few_tokens_are_refused(engine: str) -> None:
    with pytest.raises(ValueError, match="fewer tokens than the samples need"):
        build_sample_index(SIZES, DOCUMENTS, seq_len=4, num_samples=9)


GOLDEN_IDX = bytes.fromhex(
    "4d4d49444944580000" "0100000000000000" "08" "0200000000000000" "0300000000000000"
    "03000000" "02000000" "0000000000000000" "0600000000000000"
    "0000000000000000" "0100000000000000" "0200000000000000"
)  # fmt: skip


def write(prefix: Path, documents: list[list[int]], dtype: type[np.generic] = np.uint16) -> IndexedDataset:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return IndexedDataset(prefix)


def test_files_are_megatrons_byte_for_byte(tmp_path: Path) -> None:
    data = write(tmp_path / "d", [[1, 2, 3], [4, 5]])
    assert (tmp_path / "d.idx").read_bytes() == GOLDEN_IDX
    assert (tmp_path / "d.bin").read_bytes() == np.array([1, 2, 3, 4, 5], "<u2").tobytes()
    assert [data[0].tolist(), data[1].tolist(), data.get(0, 1, 1).tolist()] == [[1, 2, 3], [4, 5], [2]]
    with pytest.raises(IndexError, match="which has 2 tokens"):
        data.get(1, 1, 2)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="invalid literal"), IndexedWriter(tmp_path / "d", np.int32) as writer:
        writer.add_document(["not a number"])  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == []


def stream(data: GPTDataset) -> list[list[int]]:
    return [[*sample.tokens.tolist(), int(sample.labels[-1])] for sample in (data[i] for i in range(len(data)))]


def test_shuffles_follow_the_format(tmp_path: Path) -> None:
    # RandomState(1234): documents of two epochs [0..4, 0..4], then six samples.
    random_state = np.random.RandomState(1234)
    documents = np.tile(np.arange(5, dtype=np.int32), 2)
    random_state.shuffle(documents)
    assert documents.tolist() == [2, 2, 4, 1, 0, 3, 4, 0, 1, 3]
    samples = np.arange(6, dtype=np.uint32)
    random_state.shuffle(samples)
    assert samples.tolist() == [5, 0, 3, 4, 2, 1]


def test_samples_are_slices_of_the_shuffled_documents(tmp_path: Path) -> None:
    lengths = [5, 3, 9, 0, 2, 6]
    documents = [[100 * i + j for j in range(n)] for i, n in enumerate(lengths)]
    data = GPTDataset(write(tmp_path / "d", documents), seq_len=4, num_samples=20, seed=7)
    flat = [token for d in data.document_index for token in documents[d]]
    found = stream(data)
    assert len(found) >= 20
    for i, k in enumerate(data.shuffle_index):
        assert found[i] == flat[4 * int(k) : 4 * int(k) + 5]
    for i in range(len(data)):
        tokens, bounds = data[i].tokens, data[i].cu_seqlens
        assert bounds[0] == 0
        assert bounds[-1] == 4
        assert data.bounds(i).tolist() == bounds.tolist()
        starts = [j for j in range(1, 4) if tokens[j] // 100 != tokens[j - 1] // 100 or tokens[j] != tokens[j - 1] + 1]
        assert bounds[1:-1].tolist() == starts


def test_order_depends_on_seed_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "d", [[i] * (3 + i % 5) for i in range(50)])
    a, b, c = (stream(GPTDataset(source, seq_len=6, num_samples=60, seed=s)) for s in (1, 1, 2))
    assert a == b
    assert a != c


def test_separate_last_epoch_stays_at_the_end(tmp_path: Path) -> None:
    source = write(tmp_path / "d", [[i] * 10 for i in range(20)])  # 200 tokens an epoch, 20 samples of 10
    data = GPTDataset(source, seq_len=10, num_samples=22, seed=3)
    assert sorted(data.document_index[:20].tolist()) == list(range(20))
    assert max(data.shuffle_index[:19].tolist()) == 18


def test_too_little_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hold 3 tokens, a sample needs 9"):
        GPTDataset(write(tmp_path / "d", [[1, 2, 3]]), seq_len=8, num_samples=1, seed=0)


def test_split_bounds() -> None:
    assert split_bounds("95,5,0", 100) == [(0, 95), (95, 100), (100, 100)]
    with pytest.raises(DataError, match="must be numbers"):
        split_bounds("a,b", 10)


def test_indices_equal_the_separate_shuffles(tmp_path: Path) -> None:
    """Shuffling parts of one array in place gives what the format's description does with joined arrays."""
    source = write(tmp_path / "d", [[i] * 10 for i in range(20)])
    data = GPTDataset(source, seq_len=10, num_samples=42, seed=3, begin=2, end=18)  # 160 tokens an epoch: 3 epochs
    random_state = np.random.RandomState(3)
    before, last = np.tile(np.arange(2, 18, dtype=np.int32), 2), np.arange(2, 18, dtype=np.int32)
    random_state.shuffle(before)
    random_state.shuffle(last)
    assert data.document_index.tolist() == [*before.tolist(), *last.tolist()]
    early, late = np.arange(31, dtype=np.uint32), np.arange(31, 47, dtype=np.uint32)
    random_state.shuffle(early)
    random_state.shuffle(late)
    assert data.shuffle_index.tolist() == [*early.tolist(), *late.tolist()]
