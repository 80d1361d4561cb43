"""Blends and batches: the global order is the same for any number of ranks and workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opencoder.data.indexed import IndexedWriter
from opencoder.data.lm import build_lm_dataset
from opencoder.data.loader import BatchLoader
from opencoder.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    for i, name in enumerate("ab"):
        with IndexedWriter(folder / name, np.int32) as writer:
            for j in range(40):
                writer.add_document([1000 * i + j] * (5 + j % 7))
    return [str(folder / name) for name in "ab"]


def rows(loader: BatchLoader) -> list[torch.Tensor]:
    return [torch.cat([mb.tokens for mb in step]) for step in loader]


def test_blend_follows_its_weights(prefixes: list[str]) -> None:
    data = build_lm_dataset([(prefixes[0], 3.0), (prefixes[1], 1.0)], num_samples=80, seq_len=8, seed=1)
    assert len(data) == 80
    from_b = sum(int(data[i].tokens[0] >= 1000) for i in range(80))
    assert from_b == 20


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_order_is_the_same_for_any_ranks_and_workers(prefixes: list[str], dp: int, workers: int) -> None:
    data = build_lm_dataset([(prefixes[0], 1.0)], num_samples=40, seq_len=8, seed=1)
    truth = [torch.from_numpy(np.stack([data[i].tokens for i in range(s, s + 8)])) for s in range(0, len(data) - 7, 8)]
    options = {"global_batch_size": 8, "micro_batch_size": 2, "dp_size": dp, "workers": workers}
    steps = list(zip(*[rows(BatchLoader(data, dp_rank=r, **options)) for r in range(dp)], strict=True))
    for step, expected in zip(steps, truth, strict=True):
        passes = [part.view(-1, 2, 8) for part in step]  # (micro-batches, 2, 8) of each rank
        assert torch.equal(torch.cat([p[m] for m in range(len(passes[0])) for p in passes]), expected)


def test_starting_later_goes_on_in_the_same_order(prefixes: list[str]) -> None:
    data = build_lm_dataset([(prefixes[0], 1.0)], num_samples=40, seq_len=8, seed=1)
    options = {"global_batch_size": 8, "micro_batch_size": 4}
    whole = rows(BatchLoader(data, **options))
    later = rows(BatchLoader(data, start_sample=16, **options))
    assert len(later) == len(whole) - 2
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], later, strict=True))


def test_iterating_again_gives_the_same_batches_up_to_the_end_asked_for(prefixes: list[str]) -> None:
    data = build_lm_dataset([(prefixes[0], 1.0)], num_samples=24, seq_len=8, seed=1)
    assert len(data) >= 32
    loader = BatchLoader(data, global_batch_size=4, micro_batch_size=2, start_sample=8, end_sample=24)
    first, second = rows(loader), rows(loader)
    assert len(first) == len(second) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_document_bounds_are_chained(prefixes: list[str]) -> None:
    data = build_lm_dataset([(prefixes[0], 1.0)], num_samples=8, seq_len=16, seed=1)
    (step,) = list(BatchLoader(data, global_batch_size=len(data), micro_batch_size=len(data), document_mask=True))
    (mb,) = step
    flat = mb.tokens.flatten()
    starts = [0] + [i for i in range(1, len(flat)) if i % 16 == 0 or flat[i] != flat[i - 1]]
    assert mb.cu_seqlens is not None
    assert mb.cu_seqlens.tolist() == [*starts, len(flat)]
    assert mb.max_seqlen == int(np.diff(mb.cu_seqlens.numpy()).max())


def test_batches_that_do_not_divide_are_refused(prefixes: list[str]) -> None:
    data = build_lm_dataset([(prefixes[0], 1.0)], num_samples=8, seq_len=8, seed=1)
    with pytest.raises(ConfigError, match="multiple of 6"):
        BatchLoader(data, global_batch_size=8, micro_batch_size=3, dp_size=2)


def test_an_empty_part_of_the_split_is_told(prefixes: list[str]) -> None:
    with pytest.raises(DataError, match="leaves no validation documents"):
        build_lm_dataset([(prefixes[0], 1.0)], num_samples=8, seq_len=8, seed=1, part=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU copies from pinned memory")
def test_batches_for_a_gpu_lie_in_pinned_memory(prefixes: list[str]) -> None:
    data = build_lm_dataset([(prefixes[0], 1.0)], num_samples=8, seq_len=8, seed=1, groups=True)
    options = {"global_batch_size": 4, "micro_batch_size": 2, "document_mask": True, "pin_memory": True}
    for mb in next(iter(BatchLoader(data, **options))):
        for tensor in (mb.tokens, mb.labels, mb.cu_seqlens, mb.groups):
            assert tensor is not None
            assert tensor.is_pinned()
