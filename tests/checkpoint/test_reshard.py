"""Every weight, master and optimizer state loads bit by bit at another layout: tp, pp under every schedule, cp, dp, the sharded
optimizer on and off, uneven stages, shared key/value heads."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from tests.parity.reshard import LAYOUTS, run_pairs

SMALL_ONES = [name for name, case in LAYOUTS.items() if case.world <= 4]


def test_each_layout_loads_what_the_one_before_saved() -> None:
    chain = [*SMALL_ONES, SMALL_ONES[0]]
    found = run_pairs(pairwise(chain))
    assert len(found) == 2 * len(SMALL_ONES) >= 20
    assert {pair: wrong for pair, wrong in found.items() if wrong} == {}


@pytest.mark.slow
def test_all_pairs() -> None:
    found = run_pairs(product(LAYOUTS, LAYOUTS))
    assert len(found) == len(LAYOUTS) * (len(LAYOUTS) + 1)
    assert {pair: wrong for pair, wrong in found.items() if wrong} == {}
