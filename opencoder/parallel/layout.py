"""How a model is cut into the stages of a pipeline, and which rank runs which stage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

Schedule = Literal["1f1b", "interleaved", "zb", "zbv"]


def stage_ranks(schedule: Schedule, pp: int, virtual_stages: int = 1) -> list[int]:
    """Pipeline rank of each of the pp·virtual_stages stages.

    Stages go round the ranks; under `zbv` down and up again in a V, so that the first and the last are on rank 0."""
    ranks = [stage % pp for stage in range(pp * virtual_stages)]
    return ranks[:pp] + ranks[:pp][::-1] if schedule == "zbv" else ranks


def cut(layout: Sequence[int]) -> list[range]:
    """Layers per stage → numbers of the layers of each stage."""
    return [range(begin, end) for begin, end in pairwise(accumulate(layout, initial=0))]


def balanced_layout(layers: int, ranks: Sequence[int], *, head_cost: float = 0.0) -> list[int]:
    """Layers per stage so that the busiest rank has the least work possible, and within that no stage stands out.

    `ranks`: of each stage. `head_cost`: work of the norm and head on the last stage, in layers; the embedding on the first
    is free. Only the first and the last stage may be left without a layer. Where several stages would do, the later one
    takes the layer: earlier ones hold more micro-batches in flight. Raises ValueError if there are too few layers."""
    stages = len(ranks)
    layout = [0 if stage in (0, stages - 1) else 1 for stage in range(stages)]
    if layers < sum(layout):
        raise ValueError(f"{layers} layers are too few for {stages} stages: all but the first and the last need one")
    stage_load = [float(n) for n in layout]
    stage_load[-1] += head_cost
    rank_load = [0.0] * (max(ranks) + 1)
    for stage, rank in enumerate(ranks):
        rank_load[rank] += stage_load[stage]
    for _ in range(
        layers - sum(layout)
    ):  # unit jobs, each to the least loaded: the largest load stays the least possible
        chosen = min(range(stages), key=lambda stage: (rank_load[ranks[stage]], stage_load[stage], -stage))
        layout[chosen] += 1
        stage_load[chosen] += 1
        rank_load[ranks[chosen]] += 1
    return layout
