"""A short run at some layouts has the losses of one process, step by step."""

from __future__ import annotations

import math

import pytest

from tests.parity.steps import LAYOUTS, STEPS, run_steps
from tests.parity.update import TOLERANCE


def check(names: list[str]) -> None:
    losses, errors = run_steps({name: LAYOUTS[name] for name in names})
    assert len(losses) == STEPS
    assert losses[-1] < 0.8 * losses[0]  # it learns, so an update that goes wrong is seen later
    assert list(errors) == names
    for name, (loss, norm) in errors.items():
        worst = max(e if math.isfinite(e) else math.inf for e in (*loss, *norm))
        assert worst <= TOLERANCE, (name, loss, norm)


def test_20_losses_equal_those_of_one_process() -> None:
    check(["pp2-zbv", "dp2-sharded"])


@pytest.mark.slow
def test_20_losses_equal_those_of_one_process_at_every_layout() -> None:
    check(list(LAYOUTS))
