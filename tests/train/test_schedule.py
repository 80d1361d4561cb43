"""Learning-rate schedules at the steps that matter."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from opencoder.config import OptimConfig
from opencoder.optim.schedule import lr_at

pytestmark = pytest.mark.fast


def rates(total: int, **options: object) -> list[float]:
    config = OptimConfig.model_validate({"lr": 1.0, "min_lr": 0.01, "warmup_steps": 4, "decay_steps": 10, **options})
    return [lr_at(s, config, total) for s in range(total)]


def test_wsd_warms_up_stays_and_ends_at_the_minimum() -> None:
    lr = rates(30)
    assert lr[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(lr[4:20]) == {1.0}
    assert lr[-1] == pytest.approx(0.01)
    assert all(a > b for a, b in pairwise(lr[19:]))


@pytest.mark.parametrize(
    ("shape", "half"),
    [
        ("exponential", math.sqrt(0.01)),
        ("exponential_megatron", 0.01 + 0.99 * (2 * 0.5**0.5 - 1)),
        ("linear", 0.01 + 0.99 * 0.5),
        ("cosine", 0.01 + 0.99 * 0.5),
        ("minus_sqrt", 0.01 + 0.99 * (1 - math.sqrt(0.5))),
    ],
)
def test_decay_shapes_half_way(shape: str, half: float) -> None:
    lr = rates(30, decay_shape=shape)
    assert lr[24] == pytest.approx(half)
    assert lr[-1] == pytest.approx(0.01)


def test_cosine_and_constant() -> None:
    lr = rates(24, schedule="cosine", decay_steps=0)
    assert lr[3] == 1.0
    assert lr[13] == pytest.approx(0.01 + 0.99 * 0.5)
    assert lr[-1] == pytest.approx(0.01)
    assert set(rates(24, schedule="constant")[4:]) == {1.0}


def test_steps_outside_the_run_are_refused() -> None:
    with pytest.raises(ValueError, match="step=30 is outside"):
        lr_at(30, OptimConfig(), 30)
