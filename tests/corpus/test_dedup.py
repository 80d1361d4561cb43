"""Groups and the keep rule, against brute force, in any order."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest

from opencoder.corpus import dedup, minhash

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
