"""The harness of parallel tests: several cases in one set of processes, and a failure that is named."""

from __future__ import annotations

import os

import pytest

from tests.harness import RankError, run_cases


def who(rank: int, world: int, value: int) -> tuple[int, int, int]:
    if value < 0 and rank == 1:
        raise ValueError(f"value {value}")
    return os.getpid(), rank, value


def test_cases_share_their_processes() -> None:
    found = run_cases(who, 2, {"a": (1,), "b": (2,)})
    assert [[rest for _, *rest in ranks] for ranks in found.values()] == [[[0, 1], [1, 1]], [[0, 2], [1, 2]]]
    assert [pid for pid, *_ in found["a"]] == [pid for pid, *_ in found["b"]]


def test_the_case_that_fails_is_named() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1:.*value -1.*in case 'bad'"):
        run_cases(who, 2, {"good": (1,), "bad": (-1,), "later": (2,)})
