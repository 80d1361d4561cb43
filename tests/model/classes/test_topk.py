"""The best classes chunk by chunk against all logits sorted at once: ties, an order of classes, NaN, few rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opencoder.model.classes import scored
from opencoder.model.classes.scored import ScoredRows
from opencoder.model.classes.softmax import Groups
from opencoder.model.classes.topk import best_classes
from opencoder.model.classes.variants import Variant


@pytest.mark.parametrize("k", [1, 5, 300, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_change_nothing(k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scored.CHUNK_ELEMENTS, "cpu", 1)  # chunks of LEAST_ROWS
    draw = torch.Generator().manual_seed(0)
    weight = torch.randint(-2, 3, (2000, 6), generator=draw).to(dtype)  # whole numbers: many classes tie
    x = torch.randint(-2, 3, (40, 6), generator=draw).to(dtype)
    ids = torch.randperm(2000, generator=draw)
    values, classes = best_classes(x, ScoredRows(weight), ids, Groups(), Variant("plain", 1.0, 0.0), k)
    for sample, logits in enumerate((x @ weight.t()).float()):
        order = np.lexsort((ids.numpy(), -logits.numpy()))[:k]
        assert torch.equal(classes[sample], ids[order])
        assert torch.equal(values[sample], logits[order])


def test_a_sample_that_is_not_a_number_does_not_touch_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scored.CHUNK_ELEMENTS, "cpu", 1)
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(1000, 4, generator=draw), torch.randn(3, 4, generator=draw)
    how = (ScoredRows(weight), torch.arange(1000), Groups(), Variant("plain", 1.0, 0.0), 5)
    usual = best_classes(x, *how)[1]
    x[1] = torch.nan
    values, classes = best_classes(x, *how)
    assert torch.equal(classes[[0, 2]], usual[[0, 2]])
    assert values[1].isnan().all()
