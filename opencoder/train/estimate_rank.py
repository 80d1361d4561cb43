"""The estimate of one pipeline rank: its stages, its way through a step, and what it sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opencoder.config import Config
from opencoder.model.decoder import Decoder, Part, named_parameters
from opencoder.optim.update import STATE_NAMES
from opencoder.parallel import gradients as _gradients
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.pipeline import Work

from .estimate_layers import Module, Sizes, modules_of_stage
from .estimate_memory import Moment, Walk
from .estimate_traffic import Gradients, Transfer, transfers


@dataclass(frozen=True)
class RankEstimate:
    """One pipeline rank; ranks that differ in tp, dp or cp alone hold as much."""

    rank: int
    parameters: int
    """Number."""
    moments: list[Moment]
    """Of a step, in their order."""
    transfers: list[Transfer]
    """Of a step."""

    @property
    def peak(self) -> Moment:
        """When it holds most."""
        return max(self.moments, key=lambda moment: moment.total)

    def most(self, part: str) -> int:
        """The largest value of a part of a Moment over the step."""
        return max(getattr(moment, part) for moment in self.moments)


def estimate_rank(
    config: Config,
    mesh: Mesh,
    s: Sizes,
    parts: Sequence[Part],
    owners: Sequence[int],
    rank: int,
    order: list[Work],
    n: int,
) -> RankEstimate:
    """Of pipeline rank `rank`: `parts` of the model and their `owners` are those of all stages; it does `order` with `n`
    micro-batches of sizes `s`."""
    p = config.parallel
    mine = {stage: part for stage, part in enumerate(parts) if owners[stage] == rank}
    parameters: dict[str, torch.nn.Parameter] = {}
    for part in mine.values():
        with torch.device("meta"):
            parameters |= named_parameters(Decoder(config.model, mesh, part=part, parallel=p))
    numbers = sum(q.numel() for q in parameters.values())
    data = mesh.dp_cp.size
    stages = {stage: _modules(config, s, part, owners, stage) for stage, part in mine.items()}
    states = len(STATE_NAMES[config.optim.name]) * s.wide + (s.wide if s.width < s.wide else 0)
    walk = Walk(
        s,
        stages,
        numbers * s.width,
        numbers * states // (data if p.sharded_optimizer else 1),
        p.sharded_optimizer,
        _buckets(list(parameters.values()), s, data) if p.sharded_optimizer else (),
    )
    recompute = bool(config.train.recompute.modules)
    walk.run(order, split=not recompute)
    walk.update(*_update(config, parameters, s, data))
    one_dimensional = sum(q.numel() for q in parameters.values() if q.dim() == 1)
    keys = sum(q.numel() for key, q in parameters.items() if key.endswith(("k_proj.weight", "v_proj.weight")))
    borders = sum(
        0 <= other < len(owners) and owners[other] != rank for stage in mine for other in (stage - 1, stage + 1)
    )
    sent = transfers(
        config, s, list(mine.values()), n, data=data, kv=mesh.kv.size,
        gradients=Gradients(numbers, one_dimensional, keys), boundaries=borders,
    )  # fmt: skip
    return RankEstimate(rank, numbers, walk.moments, sent)


def _modules(config: Config, s: Sizes, part: Part, owners: Sequence[int], stage: int) -> list[Module]:
    modules = modules_of_stage(config, s, part)
    if not part.last and owners[stage] == owners[stage + 1]:
        return modules[:-1]  # what it gives is the next stage's input, which that counts
    return modules


def _buckets(parameters: Sequence[torch.nn.Parameter], s: Sizes, data: int) -> list[tuple[int, int]]:
    """(weights, room while they are reduced) of each bucket of the sharded optimizer, in the order of backward: on gloo, what came
    from the other ranks."""
    found: list[int] = []
    for parameter in reversed(parameters):
        if not found or (found[-1] + parameter.numel()) * s.wide > _gradients.BUCKET_BYTES:
            found.append(0)
        found[-1] += parameter.numel()
    return [(numbers * s.width, numbers * s.wide if s.cpu and data > 1 else 0) for numbers in found]


def _update(config: Config, parameters: dict[str, torch.nn.Parameter], s: Sizes, data: int) -> tuple[int, int]:
    """Copies of gradients while they are summed, and what the update needs beside its state."""
    sizes = [parameter.numel() * s.wide for parameter in parameters.values()]
    copies = 0
    if config.parallel.sharded_optimizer:
        rooms = [room for _, room in _buckets(list(parameters.values()), s, data)]
        copies = (
            sum(rooms[-_gradients.IN_FLIGHT :]) + max(rooms) // data
        )  # the last ones, and the sum of one in the making
    elif data > 1 or s.split:
        small = sum(size for size in sizes if size < _gradients.ALONE_BYTES)
        copies = min(small, _gradients.IN_FLIGHT * _gradients.BUCKET_BYTES)
    # SGD keeps what it had where a step may be skipped
    before = 2 * sum(sizes) if config.optim.name == "sgd" and config.train.skip is not None else 0
    return copies, before
