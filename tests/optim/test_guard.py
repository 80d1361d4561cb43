"""The guard against the same rule in plain numbers, without a look from the host."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opencoder.optim.guard import Guard
from opencoder.parallel.mesh import SINGLE, create_mesh
from tests.harness import run_ranks

NAN, INF = float("nan"), float("inf")


def guard(window: int = 8, sigma: float = 6.0) -> Guard:
    return Guard(window=window, sigma=sigma, world=SINGLE, device=torch.device("cpu"))


def ask(g: Guard, loss: float, norm: float = 1.0) -> bool:
    return bool(g(torch.tensor(loss, dtype=torch.float64), torch.tensor(norm, dtype=torch.float64)))


def noise(n: int, seed: int = 0) -> list[float]:
    return (2 + 0.1 * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).tolist()


@pytest.mark.fast
def test_equals_the_rule_in_plain_numbers() -> None:
    g, losses, norms, skipped = guard(8, 2.0), [], [], []  # 2 sigma: some of plain noise is above
    for loss, norm in zip(noise(200), noise(200, 1), strict=True):
        found = ask(g, loss, norm)
        expected = False
        if len(losses) >= 4:
            expected = any(
                value > statistics.mean(seen[-8:]) + 2 * statistics.stdev(seen[-8:])
                for value, seen in ((loss, losses), (norm, norms))
            )
        assert found == expected
        skipped.append(found)
        if not found:
            losses.append(loss)
            norms.append(norm)
    assert 5 < sum(skipped) < 100


@pytest.mark.fast
@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (INF, 1.0), (2.0, NAN), (2.0, INF), (-INF, 1.0)])
def test_what_is_not_finite_is_skipped_from_the_first_step_and_forgotten(loss: float, norm: float) -> None:
    g = guard()
    assert ask(g, loss, norm)
    assert not any(ask(g, value) for value in noise(20))
    assert ask(g, loss, norm)
    assert not ask(g, 2.0)


@pytest.mark.fast
def test_spikes_of_loss_and_of_norm_are_skipped() -> None:
    g = guard()
    assert not ask(g, 50.0), "there is nothing to compare with yet"
    g = guard()
    assert not any(ask(g, value, value) for value in noise(8))
    assert ask(g, 10.0, 2.0)
    assert ask(g, 2.0, 10.0)
    assert not ask(g, 2.0, 2.0)
    assert not ask(g, 0.1, 0.1), "a fall does no harm"


@pytest.mark.fast
def test_rounding_of_a_loss_that_stands_still_is_no_spike() -> None:
    g = guard()
    assert not any(ask(g, 1.0) for _ in range(8))
    assert not ask(g, 1.0 + 1e-7)
    assert ask(g, 1.1)


@pytest.mark.fast
@pytest.mark.parametrize("before", [3, 21])
def test_a_restored_guard_decides_the_same(before: int) -> None:
    whole, first, second = guard(8, 2.0), guard(8, 2.0), guard(8, 2.0)
    values = noise(60)
    for value in values[:before]:
        assert ask(whole, value) == ask(first, value)
    second.load(json.loads(json.dumps(first.state())))
    assert [ask(second, v) for v in values[before:]] == [ask(whole, v) for v in values[before:]]


@pytest.mark.fast
def test_a_shorter_window_takes_the_newest() -> None:
    g, short = guard(8), guard(4)
    for value in range(1, 6):
        ask(g, float(value))
    short.load(g.state())
    assert short.state()["losses"] == [2.0, 3.0, 4.0, 5.0]


class NoLook(TorchDispatchMode):
    """Fails where a value is brought to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "the host waited for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.fast
def test_the_host_does_not_look() -> None:
    g = guard()
    with NoLook():
        for value in (2.0, 2.1, NAN):
            skip = g(torch.tensor(value), torch.tensor(1.0))
    assert bool(skip)
    with pytest.raises(AssertionError, match="waited"), NoLook():
        float(torch.tensor(1.0) + 1)


def disagreeing(rank: int, world: int) -> tuple[bool, int]:
    g = Guard(window=8, sigma=6.0, world=create_mesh().world, device=torch.device("cpu"))
    return ask(g, math.nan if rank else 2.0), len(g.state()["losses"])


def test_ranks_decide_together() -> None:
    assert run_ranks(disagreeing, 2) == [(True, 0), (True, 0)]
