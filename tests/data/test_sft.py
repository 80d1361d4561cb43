"""Packing: every conversation whole, each a document, in an order of the seed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from opencoder.data.cache import IndexCache
from opencoder.data.loader import BatchLoader, MicroBatch
from opencoder.data.sft import Packing, SftBlend, build_sft_dataset
from opencoder.data.sft_files import SftData, SftWriter, mask_path
from opencoder.data.sft_packing import best_fit, efficiency, pack_rows
from opencoder.data.verify import verify_dataset
from opencoder.errors import DataError, VerificationError
from tests.posttrain.cases import conversations, conversations_in, labels_of, write

pytestmark = pytest.mark.fast
SEQ_LEN = 48


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sft") / "a", conversations(101))


def dataset(*blend: tuple[Path, float], rows: int = 60, **options: object) -> SftBlend:
    packing = Packing(**{k: options.pop(k) for k in ("pack", "window", "epochs") if k in options})  # type: ignore[arg-type]
    given = [(str(prefix), weight) for prefix, weight in blend]
    return build_sft_dataset(given, num_rows=rows, seq_len=SEQ_LEN, seed=7, packing=packing, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("pack", "window"), [(True, 1000), (True, 10), (False, 1000)])
def test_an_epoch_holds_every_conversation_once_and_whole(prefix: Path, pack: bool, window: int) -> None:
    rows = dataset((prefix, 1.0), rows=120, epochs=2, pack=pack, window=window)
    first, both = rows.members[0].rows.epochs.tolist()
    for begin, end in ((0, first), (first, both)):
        found = [each for i in range(begin, end) for each in conversations_in(rows[i])]
        assert sorted(found) == sorted(labels_of(pair) for pair in conversations(101))
    for i in range(both, 120):  # what is left is empty
        assert (rows[i].labels == -100).all()
        assert rows[i].cu_seqlens.tolist() == [0, SEQ_LEN]


def test_bounds_positions_and_padding(prefix: Path) -> None:
    rows = dataset((prefix, 1.0), groups=True)
    assert rows.group_names is not None
    padded = 0
    for i in range(len(rows)):
        sample, member = rows[i], rows.members[0]
        lengths = member.lengths[member.conversations(i)].tolist()
        expected = [0, *np.cumsum(lengths).tolist()]
        used = expected[-1]
        padded += SEQ_LEN - used
        assert sample.cu_seqlens.tolist() == expected + ([SEQ_LEN] if used < SEQ_LEN else [])
        assert (sample.labels[used:] == -100).all()
        assert sample.groups is not None
        assert (sample.groups[:used, 0] == 0).all()
        assert (sample.groups[used:] == -1).all()
        assert np.array_equal(sample.cu_seqlens, rows.bounds(i))
    assert padded


def batches(rows: SftBlend, *, dp: int, micro: int, start: int = 0, workers: int = 0) -> list[list[MicroBatch]]:
    """For each update the micro-batches of all ranks in the order of the global batch."""
    ranks = []
    for rank in range(dp):
        loader = BatchLoader(
            rows, global_batch_size=8, micro_batch_size=micro, dp_rank=rank, dp_size=dp, start_sample=start,
            document_mask=True, workers=workers,
        )  # fmt: skip
        ranks.append(list(loader))
    return [[mb for group in zip(*step, strict=True) for mb in group] for step in zip(*ranks, strict=True)]


def flat(steps: list[list[MicroBatch]]) -> list[torch.Tensor]:
    return [torch.cat([torch.stack([mb.tokens, mb.labels]).transpose(0, 1) for mb in step]) for step in steps]


def test_the_order_depends_on_neither_ranks_nor_workers_nor_the_start(prefix: Path) -> None:
    rows = dataset((prefix, 1.0))
    expected = flat(batches(rows, dp=1, micro=8))
    assert len(expected) == 7
    for layout in ({"dp": 2, "micro": 2}, {"dp": 1, "micro": 2, "workers": 2}, {"dp": 4, "micro": 1}):
        found = flat(batches(dataset((prefix, 1.0)), **layout))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), layout
    resumed = flat(batches(rows, dp=2, micro=4, start=24))
    assert all(torch.equal(a, b) for a, b in zip(resumed, expected[3:], strict=True))


def test_the_cache_gives_the_same_rows_and_another_seed_others(prefix: Path, tmp_path: Path) -> None:
    expected = dataset((prefix, 1.0)).members[0].rows
    for _ in range(2):
        cached = dataset((prefix, 1.0), cache=IndexCache(tmp_path)).members[0].rows
        assert all(np.array_equal(a, b) for a, b in zip(cached, expected, strict=True))
    assert len(list(tmp_path.glob("*.npy"))) == 3
    lengths = SftData(prefix).positions
    a, b = (pack_rows(lengths, SEQ_LEN, seed=seed, window=1000, epochs=1) for seed in (0, 1))
    assert not np.array_equal(a.items, b.items)


def test_blends_keep_their_shares(prefix: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "b", conversations(30, seed=1))
    rows = dataset((prefix, 3.0), (other, 1.0), rows=80)
    assert rows.rows_of(80) == [60, 20]
    assert rows.rows_of(8) == [6, 2]
    epochs = dataset((prefix, 1.0), (other, 1.0), rows=100, epochs=1)
    found = [each for i in range(100) for each in conversations_in(epochs[i])]
    assert sorted(found) == sorted(labels_of(p) for p in [*conversations(101), *conversations(30, seed=1)])


def test_parts_of_a_split_share_no_conversation(prefix: Path) -> None:
    train, valid = (dataset((prefix, 1.0), rows=60, epochs=1, split="80,20,0", part=part) for part in (0, 1))
    found = [each for rows in (train, valid) for i in range(60) for each in conversations_in(rows[i])]
    assert sorted(found) == sorted(labels_of(pair) for pair in conversations(101))
    assert sum(len(conversations_in(valid[i])) for i in range(60)) == 20


def test_a_log_normal_mix_fills_98_percent_of_the_rows() -> None:
    """Median 350 tokens, σ 0.9, cut at the row: as tuning sets of questions and answers have it."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(350), 0.9, 20_000), 16, 4096).astype(np.int32)
    rows = pack_rows(lengths, 4096, seed=0, window=16384, epochs=1)
    assert efficiency(lengths, rows, 4096) > 0.98
    sums = np.add.reduceat(lengths[rows.items], rows.bounds[:-1])
    assert sums.max() <= 4096
    assert sorted(rows.items.tolist()) == list(range(20_000))


def test_best_fit_takes_the_fullest_row_with_room() -> None:
    assert best_fit(np.array([5, 9, 1, 3, 10, 2]), 10) == [[4], [1, 2], [0, 3, 5]]


def test_conversations_longer_than_a_row_are_named(prefix: Path) -> None:
    with pytest.raises(DataError, match=r"conversations are longer than data.seq_len=20.*set data.seq_len=39"):
        build_sft_dataset([(str(prefix), 1.0)], num_rows=4, seq_len=20, seed=0, packing=Packing())


def test_damaged_datasets_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "c", conversations(5))
    whole = mask_path(path).read_bytes()
    mask_path(path).write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"c.mask has \d+ bytes, .* truncated"):
        SftData(path)
    mask_path(path).unlink()
    with pytest.raises(DataError, match="preprocess-sft"):
        SftData(path)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), SftWriter(tmp_path / "d", np.uint16) as writer:
        writer.add([1, 2], [True])
    assert list(tmp_path.iterdir()) == []


def test_verification_looks_at_the_mask(tmp_path: Path) -> None:
    path = write(tmp_path / "e", conversations(5))
    assert verify_dataset(path)["documents"] == 5
    whole = mask_path(path).read_bytes()
    mask_path(path).write_bytes(whole[:7] + b"\x02" + whole[8:])
    with pytest.raises(VerificationError, match="byte 7 is 2"):
        verify_dataset(path)
    mask_path(path).write_bytes(whole[:-1])
    with pytest.raises(VerificationError, match="truncated"):
        verify_dataset(path)
    write(path, [([1], [False])])
    with pytest.raises(VerificationError, match="conversation 0 has fewer than 2 tokens"):
        verify_dataset(path)
