"""Ranks started again agree on a fresh prefix in a store that still holds what dead ones left."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from opencoder.errors import Failure
from opencoder.parallel.meeting import agree_on_prefix, store_of_torchrun

pytestmark = pytest.mark.fast


def meet(store: HashStore, ranks: list[int], size: int, timeout_s: float = 20) -> list[str]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda rank: agree_on_prefix(store, rank, size, timeout_s=timeout_s), ranks))


def test_every_generation_has_a_name_of_its_own() -> None:
    store = HashStore()
    names = [meet(store, [0, 1, 2], 3), meet(store, [2, 1, 0], 3), meet(store, [1, 0], 2)]
    assert [len(set(of_one)) for of_one in names] == [1, 1, 1]
    assert len({of_one[0] for of_one in names}) == 3


def test_a_word_of_a_dead_rank_does_not_count() -> None:
    store = HashStore()
    meet(store, [0, 1, 2], 3)
    with pytest.raises(Failure, match=r"of 3 ranks, \[2\] did not come within 1 s"):
        meet(store, [0, 1], 3, timeout_s=1)


def test_a_dead_rank_0_does_not_answer() -> None:
    store = HashStore()
    meet(store, [0, 1], 2)
    with pytest.raises(Failure, match="rank 0 did not answer within 1 s"):
        meet(store, [1], 2, timeout_s=1)


def test_without_a_store_of_the_agent_torch_finds_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "False"):
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        if value:
            monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", value)
        assert store_of_torchrun(timeout_s=1) is None
