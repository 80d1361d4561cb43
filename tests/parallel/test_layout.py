"""Cutting a model into stages: the busiest rank has the least possible, against all cuts there are."""

from __future__ import annotations

from itertools import product

import pytest

from opencoder.config import PRESETS, Config, ModelConfig, ParallelConfig
from opencoder.parallel.layout import balanced_layout, cut, stage_ranks
from opencoder.train.estimate import describe, estimate
from opencoder.train.pipeline_runner import head_cost, parts_of

pytestmark = pytest.mark.fast


def test_stages_go_round_the_ranks_or_down_and_up() -> None:
    assert stage_ranks("1f1b", 3) == [0, 1, 2]
    assert stage_ranks("interleaved", 2, 3) == [0, 1, 0, 1, 0, 1]
    assert stage_ranks("zb", 2, 2) == [0, 1, 0, 1]
    assert stage_ranks("zbv", 4, 2) == [0, 1, 2, 3, 3, 2, 1, 0]


def busiest(layout: tuple[int, ...] | list[int], ranks: list[int], head: float) -> float:
    load = [0.0] * (max(ranks) + 1)
    for stage, layers in enumerate(layout):
        load[ranks[stage]] += layers + (head if stage == len(layout) - 1 else 0)
    return max(load)


@pytest.mark.parametrize("head", [0.0, 0.7, 2.3, 9.0])
@pytest.mark.parametrize(
    ("layers", "ranks"),
    [
        (8, stage_ranks("1f1b", 2)),
        (7, stage_ranks("1f1b", 3)),
        (9, stage_ranks("interleaved", 2, 2)),
        (7, stage_ranks("zbv", 2, 2)),
        (6, stage_ranks("zbv", 3, 2)),
        (2, stage_ranks("zb", 2, 2)),
    ],
)
def test_no_other_cut_relieves_the_busiest_rank(layers: int, ranks: list[int], head: float) -> None:
    found = balanced_layout(layers, ranks, head_cost=head)
    assert sum(found) == layers
    inner = len(ranks) - 2
    others = [
        (first, *middle, layers - first - sum(middle))
        for first in range(layers + 1)
        for middle in product(range(1, layers + 1), repeat=inner)
        if first + sum(middle) <= layers
    ]
    assert tuple(found) in others
    assert busiest(found, ranks, head) == min(busiest(other, ranks, head) for other in others)


def test_layers_spread_over_the_stages_of_a_rank_too() -> None:
    assert balanced_layout(8, stage_ranks("interleaved", 2, 2)) == [2, 2, 2, 2]
    assert balanced_layout(9, stage_ranks("1f1b", 2)) == [4, 5]  # the first stage holds more micro-batches in flight


def test_the_head_takes_the_place_of_layers() -> None:
    model = ModelConfig.model_validate({"preset": "opencoder-1.5b"})
    # 96,640·2240 = 216 M parameters of the head; 4·2240·2240 + 3·2240·6144 = 61.4 M and 14·160·4096 = 9.2 M in a layer
    assert head_cost(model, 4096) == pytest.approx(216.5 / (61.4 + 9.2), rel=1e-3)
    layers = [len(part.layers) for part in parts_of(model, ParallelConfig(pp=4), seq_len=4096)]
    assert layers == [7, 7, 7, 3]  # the last rank has 3 + 3.07
    assert sum(layers) == PRESETS["opencoder-1.5b"]["layers"]


def test_parts_hold_every_layer_once_and_the_ends() -> None:
    model = ModelConfig.model_validate({"preset": "demo"})
    parts = parts_of(model, ParallelConfig(pp=3, layout=[0, 3, 1]), seq_len=64)
    assert [part.layers for part in parts] == [range(0), range(3), range(3, 4)] == cut([0, 3, 1])
    assert [(part.first, part.last) for part in parts] == [(True, False), (False, False), (False, True)]


def test_a_dry_run_tells_the_fullest_rank() -> None:
    tree = {"run_dir": "r", "model": {"preset": "demo", "layers": 6}, "train": {"steps": 1}}
    whole = estimate(Config.model_validate(tree), 2)
    parallel = {
        "pp": 2,
        "virtual_stages": 2,
        "schedule": "zbv",
        "layout": [1, 1, 3, 1],
    }  # rank 0: 1 + 1, rank 1: 1 + 3 layers
    cut = estimate(Config.model_validate({**tree, "parallel": parallel}), 2)
    layer = 2 * 256 * 32 * (8 + 4) + 3 * 256 * 688 + 2 * 256
    ends = 2 * 8192 * 256 + 256
    assert [rank.parameters for rank in whole.ranks] == [whole.total_parameters] == [cut.total_parameters]
    assert whole.total_parameters == ends + 6 * layer
    assert [rank.parameters for rank in cut.ranks] == [ends + 2 * layer, 4 * layer]
    assert cut.largest.rank == 0
    assert cut.peak == max(rank.peak.total for rank in cut.ranks)
    text = describe(Config.model_validate({**tree, "parallel": parallel}), 2)
    assert "zbv, layers by stage: 1 on rank 0, 1 on rank 1, 3 on rank 1, 1 on rank 0" in text


def test_too_few_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="1 layers are too few for 4 stages"):
        balanced_layout(1, stage_ranks("1f1b", 4))
