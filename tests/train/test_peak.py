"""The rate that MFU is a share of."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from opencoder.train import metrics

pytestmark = pytest.mark.fast


def test_the_first_product_is_not_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes: on a GPU longer than all of PEAK_S."""
    calls: list[float] = []
    product = torch.mm

    def cold_at_first(*args: Any) -> torch.Tensor:
        calls.append(0.0)
        if len(calls) == 1:
            time.sleep(2 * metrics.PEAK_S)
        return product(*args)

    monkeypatch.setattr(torch, "mm", cold_at_first)
    found = metrics.measure_gemm_tflops(torch.device("cpu"), torch.float32)
    assert len(calls) >= metrics.PEAK_ROUNDS
    assert found > 2 * 1024**3 / (2 * metrics.PEAK_S) / 1e12
