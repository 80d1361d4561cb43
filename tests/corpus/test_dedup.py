"""Groups and the keep rule, against brute force, in any order."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pyarrow as pa
import pytest

from opencoder.corpus import dedup, minhash
from opencoder.corpus_config import DedupConfig
from opencoder.errors import ConfigError, DataError

pytestmark = pytest.mark.fast


def table(rows: list[tuple[str, int | None, int | None, str]]) -> pa.Table:
    names = ("id", "stars", "commit_time", "path")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    types = {"stars": pa.int64(), "commit_time": pa.int64()}
    arrays = {n: pa.array(v, types.get(n, pa.string())) for n, v in columns.items()}
    return pa.table({**arrays, "key": pa.array([row[3] for row in rows])})


def test_keep_rule_is_stars_then_latest_commit_then_path() -> None:
    def kept(*rows: tuple[int | None, int | None, str]) -> str:
        found = dedup.exact_duplicates(table([("x", *row) for row in rows]))
        assert len(found) == len(rows) - 1
        (best,) = set(found.values())
        return rows[best][2]

    assert kept((1, 9, "a"), (5, 1, "b"), (None, 99, "c")) == "b"
    assert kept((5, 1, "a"), (5, 7, "b"), (5, None, "c")) == "b"
    assert kept((5, 7, "b/x"), (5, 7, "a/x")) == "a/x"
    assert kept((None, None, "b"), (0, None, "c")) == "c"


def test_singletons_are_kept() -> None:
    assert dedup.exact_duplicates(table([("x", 1, 1, "a"), ("y", 1, 1, "b")])) == {}
    assert dedup.exact_duplicates(table([])) == {}


@pytest.mark.parametrize("seed", range(5))
def test_exact_groups_do_not_depend_on_the_order_of_rows(seed: int) -> None:
    draw = random.Random(seed)
    rows = [
        (
            hashlib.sha256(bytes([draw.randrange(6)])).hexdigest(),
            draw.choice([None, 0, 5]),
            draw.choice([None, 1, 2]),
            f"p{i:03d}",
        )
        for i in range(50)
    ]
    best = {
        each: min((r for r in rows if r[0] == each), key=lambda r: (-(r[1] or 0) if r[1] is not None else 1,
                                                                     -r[2] if r[2] is not None else 1, r[3]))[3]
        for each in {r[0] for r in rows}
    }  # fmt: skip
    order = draw.sample(rows, len(rows))
    found = {order[a][3]: order[b][3] for a, b in dedup.exact_duplicates(table(order)).items()}
    assert found == {r[3]: best[r[0]] for r in rows if r[3] != best[r[0]]}
    # The same through 128-bit keys and forests, as the parts of a large corpus go.
    numbers, keys = dedup.ranks(table(order)), dedup.id_keys(table(order)["id"])
    parts = dedup.partition(dedup.full_entries(keys, numbers), 3)
    forest = dedup.merge_forests([dedup.forest_of(part) for part in parts])
    by_number = {int(number): row[3] for number, row in zip(numbers, order, strict=True)}
    assert {by_number[b]: by_number[a] for a, b in forest.tolist()} == found


def test_an_id_that_is_no_digest_is_named() -> None:
    for wrong in ("x", None, "z" * 64):
        with pytest.raises(DataError, match=f"id {wrong!r} is not a SHA-256 digest"):
            dedup.id_keys(pa.array(["0" * 64, wrong]))


def test_recipe_of_a_configuration() -> None:
    assert dedup.recipe_of(DedupConfig()) == dedup.Recipe(16, 128, 5, "affine32", 1)
    custom = DedupConfig(preset="custom", bands=3, rows=7, ngram=2, scheme="fast", seed=4)
    assert dedup.recipe_of(custom) == dedup.Recipe(3, 7, 2, "fast", 4)
    assert not dedup.recipe_of(DedupConfig(preset="datatrove")).progressive
    with pytest.raises(ConfigError, match=r"preset=custom needs dedup\.bands and dedup\.rows"):
        dedup.recipe_of(DedupConfig(preset="custom", bands=3))
    with pytest.raises(ConfigError, match=r"belong to dedup\.preset=custom, not to bigcode"):
        dedup.recipe_of(DedupConfig(preset="bigcode", rows=3))


def near_copies(seed: int) -> list[str]:
    draw = random.Random(seed)
    texts = []
    for _ in range(12):
        words = [f"v{draw.randrange(10_000)}" for _ in range(120)]
        texts.append(" ".join(words))
        for _ in range(draw.randrange(3)):
            changed = list(words)
            changed[draw.randrange(len(words))] = "changed"
            texts.append(" ".join(changed))
    return [*texts, "", "  ", "!!!"]


def brute_force(signatures: np.ndarray, bands: int, rows: int) -> list[set[int]]:
    """Components of all pairs that agree in a band, by repeated merging."""
    groups = [{i} for i in range(len(signatures))]
    for i in range(len(signatures)):
        for j in range(i):
            same = any(
                (signatures[i, b * rows : (b + 1) * rows] == signatures[j, b * rows : (b + 1) * rows]).all()
                for b in range(bands)
            )
            if same and (signatures[i] != minhash.EMPTY).any():
                a, b = next(g for g in groups if i in g), next(g for g in groups if j in g)
                if a is not b:
                    a |= b
                    groups.remove(b)
    return groups


@pytest.mark.parametrize("seed", [0, 1])
def test_fuzzy_groups_equal_brute_force_in_any_order(seed: int) -> None:
    texts = near_copies(seed)
    bands, rows = 10, 8
    rows_of = [(str(i), None, None, f"p{i:03d}") for i in range(len(texts))]
    signatures = minhash.signatures(texts, num_perm=80, ngram=5, scheme="affine32", seed=1)
    truth = {min(f"p{i:03d}" for i in g): {f"p{i:03d}" for i in g} for g in brute_force(signatures, bands, rows)}
    assert any(len(g) > 1 for g in truth.values())
    for order in (list(range(len(texts))), random.Random(seed).sample(range(len(texts)), len(texts))):
        found = dedup.fuzzy_duplicates(signatures[order], table([rows_of[i] for i in order]), bands=bands, rows=rows)
        pairs = {f"p{order[a]:03d}": f"p{order[b]:03d}" for a, b in found.items()}
        assert pairs == {p: keep for keep, group in truth.items() for p in group if p != keep}


def test_texts_without_tokens_are_never_clustered() -> None:
    signatures = minhash.signatures(["", "!!", "..."], num_perm=32, ngram=5)
    assert len(dedup.lsh_edges(signatures, 4, 8)) == 0


def test_probabilities_of_the_presets() -> None:
    # corpus figures: J at which each preset finds a pair with the probability given
    for preset, j, p in [
        ("opencoder", 0.95, 0.022),
        ("opencoder", 0.99, 0.994),
        ("bigcode", 0.8, 0.94),
        ("datatrove", 0.8, 0.92),
    ]:
        bands, rows, _ = dedup.PRESETS[preset]
        assert dedup.candidate_probability(j, bands, rows) == pytest.approx(p, abs=0.006)
    assert dedup.threshold(16, 128) == pytest.approx(0.979, abs=0.001)


def test_jaccard_of_shingle_sets() -> None:
    assert dedup.jaccard("a b c d", "a b c d", 2) == 1.0
    assert dedup.jaccard("a b c", "a b d", 2) == pytest.approx(1 / 3)
    assert dedup.jaccard("", "", 5) == 1.0


def test_too_few_permutations_are_told() -> None:
    with pytest.raises(ValueError, match="need 40 permutations, got 32"):
        dedup.lsh_edges(np.zeros((2, 32), np.uint32), 5, 8)
