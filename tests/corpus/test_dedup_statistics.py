"""What LSH finds against what the S-curve says, on pairs of exactly known similarity; and sizes that must not hurt."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest

from opencoder.corpus import dedup, minhash
from opencoder.native import text_engine

needs_engine = pytest.mark.skipif(text_engine() is None, reason="without the C++ text engine this takes minutes")
UNION = 200
"""Distinct words of a pair: similarities are multiples of 1/200."""
PAIRS = 800


def pairs_of(similarity: float, draw: random.Random) -> list[str]:
    """Texts 2i and 2i+1 of PAIRS pairs whose sets of words have exactly this similarity."""
    shared = round(similarity * UNION)
    texts = []
    for _ in range(PAIRS):
        words = [f"{draw.getrandbits(48):x}" for _ in range(UNION)]
        cut = draw.randint(shared, UNION)  # the words beyond `shared` belong to one of the two
        texts += [" ".join(words[:cut]), " ".join(words[:shared] + words[cut:])]
    return texts


def found_pairs(texts: list[str], recipe: dedup.Recipe, check_jaccard: float | None = None) -> list[tuple[int, int]]:
    numbers = np.arange(len(texts), dtype=np.int64)
    forest = dedup.near_duplicates([dedup.Batch(numbers, lambda: texts)], recipe, check_jaccard=check_jaccard)
    return [(a, b) for a, b in forest.tolist()]


@needs_engine
@pytest.mark.parametrize("scheme", minhash.SCHEMES)
@pytest.mark.parametrize("preset", ["opencoder", "bigcode", "datatrove"])
def test_recall_and_precision_follow_the_s_curve(preset: str, scheme: str) -> None:
    bands, rows, _ = dedup.PRESETS[preset]
    recipe = dedup.Recipe(bands, rows, ngram=1, scheme=scheme, seed=1)
    goal = 0.98 if preset == "opencoder" else 0.8
    # Some fifty of the figures below are neither 0 nor 1: chance alone takes one of them beyond 3σ for one seed in eight.
    draw = random.Random(f"{preset}, {scheme}")
    similarities = [0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 1.0]
    counts, expected = [], []
    for similarity in similarities:
        found = found_pairs(pairs_of(similarity, draw), recipe)
        assert all(b == a + 1 and a % 2 == 0 for a, b in found), "texts of other pairs were joined"
        p = dedup.candidate_probability(similarity, bands, rows)
        sigma = np.sqrt(PAIRS * p * (1 - p))
        assert abs(len(found) - PAIRS * p) <= 3 * sigma + 1e-9, (similarity, len(found) / PAIRS, p)
        counts.append(len(found))
        expected.append(p)
    # Precision: of all pairs found, those of the goal's similarity or more. Its spread comes from binomial draws.
    good = np.array(similarities) >= goal
    drawn = np.random.default_rng(0).binomial(PAIRS, expected, (4000, len(expected)))
    precision = drawn[:, good].sum(1) / drawn.sum(1)
    assert abs(np.array(counts)[good].sum() / sum(counts) - precision.mean()) <= 3 * precision.std()


@needs_engine
@pytest.mark.parametrize("least", [0.8, 0.9])
def test_no_false_merge_after_the_jaccard_check(least: float) -> None:
    draw = random.Random(7)
    texts = [
        text for similarity in (0.7, 0.75, 0.795, 0.8, 0.85, 0.895, 0.9, 0.95) for text in pairs_of(similarity, draw)
    ]
    recipe = dedup.Recipe(14, 8, ngram=1)
    plain, checked = set(found_pairs(texts, recipe)), set(found_pairs(texts, recipe, least))
    truth = {pair: dedup.jaccard(texts[pair[0]], texts[pair[1]], 1) for pair in plain}
    assert checked == {pair for pair, similarity in truth.items() if similarity >= least}
    assert len(plain) > 1.3 * len(checked) > 1000


@needs_engine
@pytest.mark.parametrize("count", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_very_many_identical_files(count: int) -> None:
    """n − 1 edges, not n²."""
    keys = np.broadcast_to(dedup.full_keys(["some words that all of them have"], dedup.Recipe(16, 128)), (count, 16))
    found = dedup.forest_of_keys(keys)
    assert (found == np.stack([np.zeros(count - 1, np.int64), np.arange(1, count)], 1)).all()
    paths = pa.array([f"{i:07d}" for i in range(count)])
    same = pa.array(["ab" * 32]).take(pa.array(np.zeros(count, np.int64)))
    none = pa.nulls(count, pa.int64())
    table = pa.table({"id": same, "path": paths, "key": paths, "stars": none, "commit_time": none})
    assert set(dedup.exact_duplicates(table).values()) == {0}
    assert len(dedup.forest_of_keys(dedup.id_keys(table["id"]))) == count - 1


@needs_engine
def test_a_hundred_thousand_tiny_documents() -> None:
    texts = [f"{i} {i + 1}" if i % 3 else "" for i in range(100_000)]
    texts[50_002] = texts[50_000]
    assert found_pairs(texts, dedup.Recipe(16, 128)) == [(50_000, 50_002)]


@needs_engine
@pytest.mark.parametrize("count", [1_000_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_a_document_of_very_many_tokens(count: int) -> None:
    long = " ".join(map(str, range(count)))
    texts = ["x y z", long, long + " tail"]
    assert found_pairs(texts, dedup.Recipe(16, 128, scheme="fast")) == [(1, 2)]
