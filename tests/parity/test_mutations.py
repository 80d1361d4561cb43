"""Deliberate faults are noticed: the matrix proves something."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.cases import CASES
from tests.parity.faults import FAULTS
from tests.parity.mutations import CONTROL, Verdict, run_faults, survivors
from tests.parity.patches import Patches

QUICK = [
    "gradients are averaged over dp",
    "targets are counted by each rank alone",
    "loss: every rank has a maximum of its own",
    "gradients of norms are not summed over tp",
    "ring: the last hop of the key and value gradients is left out",
    "torch divides gradients by the number of micro-batches",
    "key/value heads: every copy counts in the norm",
    "updated weights are not sent",
]
"""At least one for each axis. All of them run as `slow`, and by `python -m tests.parity.mutations`."""


def test_a_fault_of_each_axis_is_noticed() -> None:
    assert survivors(run_faults(QUICK, control=False)) == []


@pytest.mark.slow
def test_all_faults_are_noticed() -> None:
    assert len(FAULTS) >= 20
    assert {fault.layout for fault in FAULTS.values()} <= set(CASES)
    assert survivors(run_faults(list(FAULTS))) == []


@pytest.mark.fast
def test_what_is_not_noticed_not_reached_or_wrong_without_a_fault_is_told() -> None:
    wrong = {"norm": 0.5}
    verdicts = {
        (CONTROL, "dp2"): Verdict(False, {}, 1.0),
        (CONTROL, "tp2"): Verdict(False, wrong, 1.0),
        ("seen", "dp2"): Verdict(True, wrong, 1.0),
        ("unseen", "dp2"): Verdict(True, {}, 1.0),
        ("elsewhere", "dp2"): Verdict(False, wrong, 1.0),
        ("old", "dp2"): Verdict(False, {}, 1.0, raised="AttributeError: gone"),
    }
    assert survivors(verdicts) == [
        "tp2 fails without a fault: ['norm']",
        "unseen: not noticed at dp2",
        "elsewhere: never reached at dp2",
        "old: raised at dp2: AttributeError: gone",
    ]


@pytest.mark.fast
def test_a_patch_counts_its_calls_and_keeps_static_methods() -> None:
    class Owner:
        @staticmethod
        def twice(x: int) -> int:
            return 2 * x

        def thrice(self, x: int) -> int:
            return 3 * x

    def one_more(original: Any) -> Any:
        return lambda *args: original(*args) + 1

    patches = Patches()
    patches.replace(Owner, "twice", one_more)
    patches.replace(Owner, "thrice", one_more)
    assert patches.reached == 0
    assert (Owner.twice(1), Owner().twice(1), Owner().thrice(1)) == (3, 3, 4)
    assert patches.reached == 3
