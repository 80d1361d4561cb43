"""Repositories and chunks as units of dedup."""

from __future__ import annotations

import random
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opencoder.corpus import dedup

pytestmark = pytest.mark.fast


@given(st.text("ab_ \n\t.(é中", max_size=300), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_chunks_cover_their_text_with_the_tokens_promised(text: str, tokens: int) -> None:
    found = dedup.chunks(text, tokens)
    assert "".join(found) == text
    counts = [len(re.findall(r"\w+|[^\w\s]", chunk)) for chunk in found]
    assert all(count == tokens for count in counts[:-1])
    assert counts[-1] <= tokens
    assert counts[-1] > 0 or len(found) == 1


def test_a_chunk_must_hold_a_token() -> None:
    with pytest.raises(ValueError, match="tokens=0 must be at least 1"):
        dedup.chunks("a", 0)
    assert dedup.chunk_name("a/b.py", 12) == "a/b.py#000012"


ROWS = [  # repo, path, id, stars, commit time
    ("big/one", "b.py", "id2", 3, 10),
    ("fork/one", "a.py", "id1", 1, 99),
    (None, "lone.py", "id1", None, None),
    ("big/one", "a.py", "id1", 3, 20),
    ("fork/one", "b.py", "id2", None, 5),
    ("other", "a.py", "id1", 3, 30),
    (None, "b.py", "id2", None, None),
]


def table(rows: list[tuple[str | None, str, str, int | None, int | None]]) -> pa.Table:
    names = ("repo", "path", "id", "stars", "commit_time")
    types = {"stars": pa.int64(), "commit_time": pa.int64()}
    columns = {n: pa.array([row[i] for row in rows], types.get(n, pa.string())) for i, n in enumerate(names)}
    return pa.table({**columns, "key": pa.array(["source"] * len(rows))})


@pytest.mark.parametrize("seed", range(4))
def test_equal_repositories_are_dropped_as_a_whole(seed: int) -> None:
    order = random.Random(seed).sample(range(len(ROWS)), len(ROWS))
    units = dedup.repositories(table([ROWS[i] for i in order]))
    assert sorted(units.table["path"].to_pylist()) == ["b.py", "big/one", "fork/one", "lone.py", "other"]
    facts = {row["path"]: row for row in units.table.to_pylist()}
    assert (facts["big/one"]["stars"], facts["big/one"]["commit_time"]) == (3, 20)
    assert (facts["fork/one"]["stars"], facts["fork/one"]["commit_time"]) == (1, 99)
    assert facts["lone.py"]["stars"] is None
    dropped = units.spread(dedup.exact_duplicates(units.table))
    found = {order[row]: order[kept] for row, kept in dropped.items()}
    # big/one has more stars than its fork; `other` and lone.py are the same file, b.py is like no whole repository
    assert found == {1: 3, 4: 3, 2: 5}


def test_files_of_a_repository_come_in_the_order_of_their_paths() -> None:
    units = dedup.repositories(table(ROWS))
    names = [units.table["path"][i].as_py() for i in range(len(units.rows))]
    assert [ROWS[r][1] for r in units.rows[names.index("big/one")]] == ["a.py", "b.py"]
    assert dedup.repository_text(["one", "two"]) == "one\ntwo"


def test_no_files_are_no_repositories() -> None:
    units = dedup.repositories(table([]))
    assert len(units.table) == 0
    assert units.rows == []
    assert units.spread({}) == {}


def test_near_copies_of_a_repository_are_found_though_their_files_are_cut_differently() -> None:
    words = [f"w{i}" for i in range(400)]
    files = [" ".join(words[a : a + 100]) for a in range(0, 400, 100)]
    halves = [" ".join(words[a : a + 200]) for a in range(0, 400, 200)]
    texts = [dedup.repository_text(files), dedup.repository_text(halves), dedup.repository_text(files[:2])]
    batch = dedup.Batch(np.arange(3), lambda: texts)
    assert dedup.near_duplicates([batch], dedup.Recipe(16, 128)).tolist() == [[0, 1]]


def test_copied_chunks_are_found_within_other_files() -> None:
    draw = random.Random(0)
    shared = " ".join(f"s{i}" for i in range(50)) + " "
    texts = [shared + " ".join(f"w{draw.getrandbits(40)}" for _ in range(75)) for _ in range(2)]
    parts = [chunk for text in texts for chunk in dedup.chunks(text, 50)]
    assert len(parts) == 6
    batch = dedup.Batch(np.arange(6), lambda: parts)
    assert dedup.near_duplicates([batch], dedup.Recipe(16, 128)).tolist() == [[0, 3]]
