"""The steps of fuzzy dedup: the progressive way finds what the plain way finds, whatever the order and the partitions."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opencoder.corpus import dedup, minhash
from opencoder.corpus.dedup import groups

pytestmark = pytest.mark.fast


def planted(draw: random.Random, documents: int, length: int) -> list[str]:
    """Random texts, some of them copies of earlier ones with a few words changed, some without a word."""
    texts: list[str] = []
    for _ in range(documents):
        if texts and draw.random() < 0.5:
            words = draw.choice(texts).split()
            for _ in range(draw.randrange(4)):
                if words:
                    words[draw.randrange(len(words))] = f"n{draw.randrange(99)}"
        else:
            words = [f"w{draw.randrange(5000)}" for _ in range(draw.randrange(length))]
        texts.append(" ".join(words))
    return texts


def in_batches(texts: list[str], numbers: np.ndarray, size: int) -> list[dedup.Batch]:
    cuts = range(0, len(texts), size)
    return [dedup.Batch(numbers[i : i + size], lambda i=i: texts[i : i + size]) for i in cuts]


def brute_force(texts: list[str], recipe: dedup.Recipe) -> list[list[int]]:
    """Canonical forest of all pairs that agree in a band of their signatures, by repeated relabelling."""
    found = minhash.signatures(
        texts, num_perm=recipe.bands * recipe.rows, ngram=recipe.ngram, scheme=recipe.scheme, seed=recipe.seed
    ).reshape(len(texts), recipe.bands, recipe.rows)
    label = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            alike = (found[i] == found[j]).all(axis=1).any() and (found[i] != minhash.EMPTY).any()
            if alike and label[i] != label[j]:
                low, high = sorted((label[i], label[j]))
                label = [low if x == high else x for x in label]
    return [[root, i] for i, root in enumerate(label) if root != i]


@given(
    seed=st.integers(0, 10**6),
    recipe=st.sampled_from([(4, 16), (3, 20), (7, 17), (2, 64)]),
    scheme=st.sampled_from(minhash.SCHEMES),
    size=st.integers(1, 40),
    partitions=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_progressive_equals_plain_equals_brute_force(
    seed: int, recipe: tuple[int, int], scheme: str, size: int, partitions: int
) -> None:
    draw = random.Random(seed)
    texts = planted(draw, 40, 60)
    made = dedup.Recipe(*recipe, ngram=2, scheme=scheme, seed=3)
    numbers = np.arange(len(texts), dtype=np.int64)
    truth = brute_force(texts, made)
    order = draw.sample(range(len(texts)), len(texts))
    shuffled = [texts[i] for i in order]
    for progressive in (False, True):
        found = dedup.near_duplicates(
            in_batches(shuffled, numbers[order], size), made, progressive=progressive, partitions=partitions
        )
        assert found.tolist() == truth


def test_planted_sets_have_groups_and_loners() -> None:
    """The property above is not about nothing."""
    texts = planted(random.Random(1), 200, 60)
    found = brute_force(texts, dedup.Recipe(4, 16, 2))
    assert 20 < len(found) < 150


def test_first_pass_drops_out_most_loners() -> None:
    texts = [" ".join(f"w{100 * i + j}" for j in range(60)) for i in range(50)]
    recipe = dedup.Recipe(16, 128)
    keys = dedup.first_keys([*texts, texts[7]], recipe)
    found = groups.shared(groups.first_entries(keys, np.arange(51)))
    assert set(found["document"].tolist()) == {7, 50}
    assert dedup.wanted([found], np.array([50, 3, 7]), 16).all(axis=1).tolist() == [True, False, True]


def test_keys_are_the_same_from_texts_and_from_signatures(engine: str) -> None:
    texts = ["", "one", *planted(random.Random(2), 12, 40)]
    for scheme in minhash.SCHEMES:
        recipe = dedup.Recipe(5, 18, ngram=3, scheme=scheme, seed=9)
        signatures = minhash.signatures(texts, num_perm=90, ngram=3, scheme=scheme, seed=9)
        full = dedup.full_keys(texts, recipe)
        assert (full == dedup.band_keys(signatures, 5, 18)).all()
        assert not full[0]["a"].any()
        assert full[1:]["a"][[bool(t) for t in texts[1:]]].all()
        first = signatures.reshape(-1, 5, 18)[:, :, :8].reshape(-1, 40)
        assert (dedup.first_keys(texts, recipe) == dedup.band_keys(first, 5, 8)["a"]).all()


def test_keys_have_known_values(engine: str) -> None:
    """They are stored in files: a change of their values needs a new version there."""
    full = dedup.full_keys(["a b c d e f"], dedup.Recipe(2, 16))
    assert [f"{a:016x}{b:016x}" for a, b in full[0].tolist()] == KNOWN
    fast = dedup.first_keys(["a b c d e f, longer_than_eight_bytes"], dedup.Recipe(2, 16, scheme="fast"))
    assert [f"{a:016x}" for a in fast[0].tolist()] == KNOWN_FAST


KNOWN = ["c39719f7f181bc822768b5824bbeaf59", "bcf43f0e1f83bcac26065eaba441f97f"]
KNOWN_FAST = ["f44516b84cae0af6", "b59604686a87c5ca"]


def test_bands_that_are_not_wanted_have_no_key(engine: str) -> None:
    texts = planted(random.Random(3), 9, 40)
    recipe = dedup.Recipe(6, 16, ngram=2)
    every = dedup.full_keys(texts, recipe)
    mask = np.random.default_rng(0).random((9, 6)) < 0.5
    assert (dedup.full_keys(texts, recipe, mask) == np.where(mask, every, np.zeros_like(every))).all()


def test_arrow_columns_and_threads_change_nothing() -> None:
    texts = planted(random.Random(4), 60, 80)
    recipe = dedup.Recipe(16, 128)
    truth = dedup.full_keys(texts, recipe)
    assert (dedup.full_keys(pa.chunked_array([texts[:7], texts[7:]]), recipe) == truth).all()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: dedup.full_keys(texts, recipe), range(8)):
            assert (found == truth).all()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60), st.integers(1, 6), st.randoms())
@settings(max_examples=100, deadline=None)
def test_forests_merge_to_the_same_in_any_order(edges: list[tuple[int, int]], parts: int, draw: random.Random) -> None:
    table = np.array(edges, np.int64).reshape(-1, 2)
    truth = dedup.forest(table)
    for root, member in truth.tolist():
        assert root < member
    assert sorted(truth[:, 1].tolist()) == truth[:, 1].tolist()
    shuffled = table[draw.sample(range(len(table)), len(table))]
    pieces = [dedup.forest(shuffled[i::parts]) for i in range(parts)]
    assert dedup.merge_forests(pieces).tolist() == truth.tolist()
    assert dedup.merge_forests([dedup.merge_forests(pieces[:2]), *pieces[2:], truth]).tolist() == truth.tolist()
    labels = dedup.labels_of(truth, np.arange(31))
    component = dedup.components(31, table) if len(table) else np.arange(31)
    assert len(set(zip(labels.tolist(), component.tolist(), strict=True))) == len(set(labels.tolist()))


def test_more_forests_than_the_fan_in_merge() -> None:
    chain = [np.array([[i, i + 1]]) for i in range(100)]
    assert dedup.merge_forests(chain).tolist() == [[0, i] for i in range(1, 101)]
    assert dedup.merge_forests([]).shape == (0, 2)


def test_partitions_keep_equal_keys_together_and_lose_nothing() -> None:
    keys = np.random.default_rng(1).integers(1, 1 << 64, (500, 4), np.uint64)
    keys[250:] = keys[:250]
    entries = groups.first_entries(keys, np.arange(500))
    parts = groups.partition(entries, 7)
    assert sum(map(len, parts)) == 2000
    assert all(len(part) > 200 for part in parts)
    assert sum(len(groups.shared(part)) for part in parts) == 2000
    with pytest.raises(ValueError, match="partitions=0: allowed are 1 to 65536"):
        groups.partition(entries, 0)


def test_keys_that_differ_in_their_second_half_alone_are_told_apart() -> None:
    entries = np.zeros(6, groups.ENTRY)
    entries["key"], entries["rest"], entries["document"] = 5, [1, 2, 1, 3, 2, 4], [10, 11, 12, 13, 14, 15]
    assert groups.forest_of(entries).tolist() == [[10, 12], [11, 14]]
    assert sorted(groups.shared(entries)["document"].tolist()) == [10, 11, 12, 14]
