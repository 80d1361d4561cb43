"""The exact Jaccard check: the same numbers as sets in Python, and only edges that reach the threshold."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opencoder.corpus import dedup, minhash
from opencoder.corpus.dedup import groups, verify
from opencoder.native import text_engine

pytestmark = pytest.mark.fast
needs_engine = pytest.mark.skipif(text_engine() is None, reason="the C++ text engine was not built")


@given(st.lists(st.text("ab \nİ.", max_size=60), min_size=2, max_size=6), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_true_similarities_equal_those_of_python_sets(texts: list[str], ngram: int) -> None:
    pairs = np.array([(x, y) for x in range(len(texts)) for y in range(len(texts))], np.int64)
    found = dedup.jaccard_of_pairs(texts, pairs, ngram)
    assert found.tolist() == [dedup.jaccard(texts[x], texts[y], ngram) for x, y in pairs.tolist()]


def test_true_similarities_without_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minhash, "_engine", lambda: None)
    found = dedup.jaccard_of_pairs(["a b c", "a b d", ""], np.array([[0, 1], [2, 2], [0, 2]]), 2)
    assert found.tolist() == [1 / 3, 1.0, 0.0]


@needs_engine
def test_many_distinct_shingles_grow_the_tables() -> None:
    long = " ".join(map(str, range(20_000)))
    found = dedup.jaccard_of_pairs([long, long + " more", long[5:]], np.array([[0, 1], [0, 2]]), 5)
    assert found.tolist() == [19_996 / 19_997, dedup.jaccard(long, long[5:], 5)]


def test_a_short_text_has_nothing_in_common_with_a_longer_one() -> None:
    assert dedup.jaccard_of_pairs(["a b", "a b c", "a b"], np.array([[0, 1], [0, 2]]), 3).tolist() == [0.0, 1.0]


def entries_of(sets: list[list[int]]) -> np.ndarray:
    """One bucket per list of documents."""
    rows = [(bucket + 1, 0, document) for bucket, documents in enumerate(sets) for document in documents]
    return np.array(rows, groups.ENTRY)


def test_those_who_fail_against_the_leader_get_a_leader_of_their_own() -> None:
    alike = {(1, 3), (2, 4), (0, 9)}
    asked: list[tuple[int, int]] = []

    def similarity(pairs: np.ndarray) -> np.ndarray:
        asked.extend(map(tuple, pairs.tolist()))
        return np.array([0.9 if tuple(pair) in alike else 0.1 for pair in pairs.tolist()])

    found = dedup.checked_forest(entries_of([[0, 1, 2, 3, 4], [9, 0]]), similarity, 0.9)
    assert found.tolist() == [[1, 3], [2, 4], [0, 9]]
    assert (0, 0) not in asked
    assert len(asked) == len(set(asked)) == 4 + 3 + 1 + 1
    assert dedup.checked_forest(entries_of([[0, 1, 2, 3, 4], [9, 0]]), similarity, 0.91).tolist() == []


def test_leaders_of_a_bucket_are_limited() -> None:
    """A bucket of k documents of which none are alike costs ROUNDS·k comparisons, not k²."""
    asked = 0

    def similarity(pairs: np.ndarray) -> np.ndarray:
        nonlocal asked
        asked += len(pairs)
        return np.zeros(len(pairs))

    assert len(dedup.checked_forest(entries_of([list(range(5000))]), similarity, 0.5)) == 0
    assert asked <= verify.ROUNDS * 5000


@pytest.mark.parametrize("seed", range(5))
def test_checked_groups_do_not_depend_on_order_or_partitions(seed: int) -> None:
    draw = random.Random(seed)
    base = [f"w{i}" for i in range(60)]
    texts = []
    for _ in range(60):
        words = list(base)
        for _ in range(draw.randrange(25)):
            words[draw.randrange(60)] = f"x{draw.randrange(1000)}"
        texts.append(" ".join(words))
    recipe = dedup.Recipe(8, 4, ngram=1)
    answers = []
    for partitions, size in ((1, 60), (5, 7), (64, 1)):
        order = np.array(draw.sample(range(60), 60))
        batches = [
            dedup.Batch(order[i : i + size], lambda part=order[i : i + size]: [texts[n] for n in part])
            for i in range(0, 60, size)
        ]
        answers.append(dedup.near_duplicates(batches, recipe, check_jaccard=0.6, partitions=partitions).tolist())
    assert answers[0] == answers[1] == answers[2]
    assert 3 < len(answers[0]) < 60
