"""Fill-in-the-middle while reading: lengths, targets and document bounds stay, the parts join to the text again."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from opencoder.data.fim import Fim, FimIds
from opencoder.data.gpt import GPTDataset
from opencoder.data.indexed import IndexedDataset, IndexedWriter
from opencoder.data.loader import BatchLoader

pytestmark = pytest.mark.fast

PREFIX, MIDDLE, SUFFIX, EOD = 9001, 9002, 9003, 9000
FIM = Fim(rate=1.0, spm_rate=0.5, min_tokens=4, ids=FimIds(PREFIX, MIDDLE, SUFFIX), eod=EOD, seed=5)


def parts(piece: list[int]) -> tuple[str, list[int], list[int], list[int]]:
    """Order, prefix, middle and suffix of a rearranged piece without EOD. In SPM the border between prefix and middle is
    not marked: all of it is given as middle."""
    assert piece[0] == PREFIX
    s, m = piece.index(SUFFIX), piece.index(MIDDLE)
    assert s < m
    if s == 1:
        return "SPM", [], piece[m + 1 :], piece[2:m]
    return "PSM", piece[1:s], piece[m + 1 :], piece[s + 1 : m]


@pytest.mark.parametrize("n", [4, 5, 30])
@pytest.mark.parametrize("ends", [True, False])
def test_parts_join_to_the_text_less_three_tokens(n: int, ends: bool) -> None:
    text = np.arange(n, dtype=np.int64)
    piece = np.append(text, EOD) if ends else text
    orders: Counter[str] = Counter()
    for slot in range(300):
        found = FIM.apply(piece, slot=slot, offset=0, ends_document=ends).tolist()
        assert len(found) == len(piece)
        if ends:
            assert found.pop() == EOD
        order, prefix, middle, suffix = parts(found)
        assert prefix + middle + suffix == text[:-3].tolist()
        if order == "PSM":
            assert middle
        orders[order] += 1
    if n == 30:  # in short ones the prefix is often empty, and then the two orders are the same
        assert 110 < orders["SPM"] < 210


def test_every_pair_of_borders_is_equally_likely() -> None:
    text = np.arange(6, dtype=np.int64)  # 3 remain: 4 borders, 6 pairs
    psm = replace(FIM, spm_rate=0.0)
    seen: Counter[tuple[int, int]] = Counter()
    for slot in range(6000):
        _, prefix, middle, _ = parts(psm.apply(text, slot=slot, offset=0, ends_document=False).tolist())
        seen[len(prefix), len(prefix) + len(middle)] += 1
    assert set(seen) == {(a, b) for a in range(4) for b in range(a + 1, 4)}
    assert all(850 < count < 1150 for count in seen.values()), seen  # 1000 ± 5 standard deviations of 29


def test_an_end_token_inside_a_document_is_text() -> None:
    piece = np.array([1, 2, 3, 4, 5, EOD], np.int64)
    found = replace(FIM, spm_rate=0.0).apply(piece, slot=0, offset=0, ends_document=False).tolist()
    assert EOD not in found  # one of the last three, not kept for the end


@pytest.mark.parametrize(
    "piece", [[1, 2, 3], [1, 2, 3, EOD], [1, 2, PREFIX, 4, 5, 6], [1, 2, 3, 4, MIDDLE, EOD], [1, 2, 3, 4, 5, SUFFIX]]
)
def test_short_pieces_and_those_made_before_are_left(piece: list[int]) -> None:
    for slot in range(20):
        assert FIM.apply(np.array(piece), slot=slot, offset=0, ends_document=True).tolist() == piece


def test_min_tokens() -> None:
    piece = np.arange(9)
    assert replace(FIM, min_tokens=10).apply(piece, slot=0, offset=0, ends_document=False).tolist() == piece.tolist()


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_the_rate_is_kept(rate: float) -> None:
    fim, piece = replace(FIM, rate=rate), np.arange(12)
    n = sum(PREFIX in fim.apply(piece, slot=slot, offset=slot % 7, ends_document=False) for slot in range(3000))
    assert abs(n - 3000 * rate) <= 5 * (3000 * rate * (1 - rate)) ** 0.5


def test_the_draw_depends_on_seed_slot_and_offset() -> None:
    piece = np.arange(2000)
    keys = [(5, 1, 2), (6, 1, 2), (5, 2, 2), (5, 1, 3), (5, 1, 2)]
    found = [replace(FIM, seed=s).apply(piece, slot=p, offset=o, ends_document=False).tolist() for s, p, o in keys]
    assert found[0] == found[4]
    assert len({tuple(x) for x in found}) == 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    prefix: Path = tmp_path_factory.mktemp("data") / "d"
    draw = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in range(40):
            n = int(draw.integers(0, 30))
            writer.add_document([100 * document + i for i in range(n)] + [EOD])
    return IndexedDataset(prefix)


def test_samples_keep_their_bounds_and_the_pieces_their_places(source: IndexedDataset) -> None:
    plain = GPTDataset(source, seq_len=16, num_samples=60, seed=1)
    fim = GPTDataset(source, seq_len=16, num_samples=60, seed=1, fim=FIM)
    changed = 0
    for i in range(60):
        a, b = plain[i], fim[i]
        assert np.array_equal(a.cu_seqlens, b.cu_seqlens)
        whole_a, whole_b = (np.append(x.tokens, x.labels[-1]) for x in (a, b))
        assert np.array_equal(b.tokens[1:], b.labels[:-1])
        assert len(whole_a) == len(whole_b) == 17
        changed += int((whole_a != whole_b).any())
        for lo, hi in zip(b.cu_seqlens[:-1], b.cu_seqlens[1:], strict=True):
            hi = hi + 1 if hi == 16 and whole_a[15] != EOD and whole_a[16] == whole_a[15] + 1 else hi
            before, after = whole_a[lo:hi].tolist(), whole_b[lo:hi].tolist()
            if before[-1] == EOD:
                assert after[-1] == EOD
                before, after = before[:-1], after[:-1]
            if len(before) >= 4:
                _, prefix, middle, suffix = parts(after)
                assert prefix + middle + suffix == before[:-3]
            else:
                assert after == before
    assert changed > 50


def stream(loader: BatchLoader) -> list[NDArray[np.int64]]:
    return [np.concatenate([mb.tokens.numpy() for mb in step]) for step in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_at_any_worker_count_and_start(source: IndexedDataset, workers: int) -> None:
    def make() -> GPTDataset:
        return GPTDataset(source, seq_len=16, num_samples=40, seed=1, fim=replace(FIM, rate=0.5))

    data = make()
    truth = [np.stack([data[i].tokens for i in range(s, s + 8)]) for s in range(0, len(data) - 7, 8)]
    for start in (0, 16):
        loader = BatchLoader(make(), global_batch_size=8, micro_batch_size=4, start_sample=start, workers=workers)
        for found, expected in zip(stream(loader), truth[start // 8 :], strict=True):
            assert np.array_equal(found, expected)


class Recorder(Fim):
    """Leaves pieces as they are and notes what it was given."""

    def apply(self, piece: NDArray[np.int64], *, slot: int, offset: int, ends_document: bool) -> NDArray[np.int64]:
        seen.append((piece.tolist(), slot, offset, ends_document))
        return piece


seen: list[tuple[list[int], int, int, bool]] = []


def test_a_piece_is_named_by_its_place_in_the_data(source: IndexedDataset) -> None:
    data = GPTDataset(source, seq_len=16, num_samples=60, seed=1, fim=Recorder(1.0, 0.5, 4, FIM.ids, EOD, 5))
    seen.clear()
    for i in range(len(data)):
        _ = data[i]
    assert len(seen) > 100
    for piece, slot, offset, ends in seen:
        document = source[int(data.document_index[slot])].tolist()
        assert piece == document[offset : offset + len(piece)]
        assert ends == (offset + len(piece) == len(document))
    places = [(slot, offset) for piece, slot, offset, _ in seen if len(piece) > 1]  # one token: the next sample's first
    assert len(set(places)) == len(places)
