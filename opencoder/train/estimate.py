"""What a layout asks of each rank, worked out without running it (`train --dry-run`).

Counted are tensors, one by one: estimate_layers.py has those of a micro-batch, estimate_memory.py puts them in the order of the
schedule, estimate_rank.py does so for a rank, estimate_traffic.py has what is sent. Not counted: the interpreter with its libraries,
buffers of communication libraries, and what the allocator holds beyond its tensors. `opencoder bench-estimate` compares with real
steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opencoder import kernels as K
from opencoder.config import Config, data_parallel_size
from opencoder.config_rules import Phase, phases
from opencoder.model.decoder import Decoder, Part, named_parameters
from opencoder.optim.update import check_groups
from opencoder.parallel.layout import stage_ranks
from opencoder.parallel.mesh import kv_replicas_of, pretend_mesh
from opencoder.parallel.pipeline import Work, order_of_work
from opencoder.parallel.placement import placement_of

from .estimate_classes import describe_classes, estimate_class_rank
from .estimate_layers import sizes_of
from .estimate_rank import RankEstimate, estimate_rank
from .pipeline_runner import parts_of

GIB = 2**30
AXES = {
    "tp": "tensor-parallel", "kv": "key/value heads", "cp": "context-parallel", "data": "data-parallel (dp · cp)", "pp": "pipeline",
}  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Bytes unless said."""

    total_parameters: int
    """Number, whole model."""
    ranks: list[RankEstimate]

    @property
    def largest(self) -> RankEstimate:
        """The pipeline rank that holds most at its peak."""
        return max(self.ranks, key=lambda rank: rank.peak.total)

    @property
    def peak(self) -> int:
        """Of that rank."""
        return self.largest.peak.total


def estimate(config: Config, world_size: int, *, cuda: bool | None = None) -> Estimate:
    """Sizes on a rank of `world_size` in the stage of the data with the largest micro-batches.

    `cuda`: on GPUs, or on CPUs, where a reduce-scatter needs a buffer; None: as train.device says, for auto as this machine is.
    The model is built on the meta device: no memory is taken."""
    p, m = config.parallel, config.model
    cpu = not (on_cuda(config) if cuda is None else cuda)
    if m.head.kind == "class":
        total, rank = estimate_class_rank(config, world_size, largest_phase(config), cpu=cpu)
        return Estimate(total, [rank])
    mesh = pretend_mesh(world_size=world_size, tp=p.tp, pp=p.pp, cp=p.cp, kv_replicas=kv_replicas_of(m.kv_heads, p.tp))
    phase = largest_phase(config)
    s = sizes_of(config, micro_batch=phase.micro_batch_size, seq_len=phase.seq_len, cpu=cpu)
    micro_batches = _micro_batches(config, world_size, phase)
    with torch.device("meta"):
        whole = Decoder(m, mesh, parallel=p)
    check_groups(config.optim, named_parameters(whole))
    total = sum(torch.Size(placement_of(q).global_shape).numel() for q in whole.parameters())
    parts = parts_of(m, p, seq_len=config.data.seq_len) if p.pp > 1 else [Part(range(m.layers), True, True)]
    owners = stage_ranks(p.schedule, p.pp, p.virtual_stages) if p.pp > 1 else [0]
    orders = (
        order_of_work(p.schedule, p.pp, p.virtual_stages, micro_batches)
        if p.pp > 1
        else [[Work(0, kind, i) for i in range(micro_batches) for kind in ("F", "B")]]
    )
    return Estimate(
        total,
        [
            estimate_rank(config, mesh, s, parts, owners, rank, order, micro_batches)
            for rank, order in enumerate(orders)
        ],
    )


def on_cuda(config: Config) -> bool:
    """Whether a run on this machine, or as train.device says, uses GPUs."""
    return config.train.device == "cuda" or (config.train.device == "auto" and torch.cuda.is_available())


def largest_phase(config: Config) -> Phase:
    """The phase of the run with the largest micro-batches."""
    return max(phases(config), key=lambda phase: phase.micro_batch_size * phase.seq_len)


def _micro_batches(config: Config, world_size: int, phase: Phase) -> int:
    """Of each rank in a step."""
    return phase.global_batch_size // (phase.micro_batch_size * data_parallel_size(config, world_size))


def describe(config: Config, world_size: int) -> str:
    """The text of `train --dry-run`."""
    e = estimate(config, world_size)
    p, t, phase = config.parallel, config.train, largest_phase(config)
    dp = data_parallel_size(config, world_size)
    rank, peak = e.largest, e.largest.peak
    if config.model.head.kind == "class":
        *lines, kernels = describe_classes(config, world_size, e.total_parameters, rank, phase, cpu=not on_cuda(config))
        return "\n".join([*lines, *_traffic_lines(rank), kernels])

    def row(name: str, size: int, note: str = "") -> str:
        return f"{name:<18}{size / GIB:9.3f} GiB{'  ' + note if note else ''}"

    sharding = f", split over {dp * p.cp} ranks" if p.sharded_optimizer else ""
    batch = f"{_micro_batches(config, world_size, phase)} micro-batches of {phase.micro_batch_size} × {phase.seq_len}"
    logits = "gradients worked out in forward, logits of 1 chunk"
    lines = [
        f"world {world_size} = tp {p.tp} × pp {p.pp} × cp {p.cp} × dp {dp}, {'GPUs' if on_cuda(config) else 'CPUs'}",
        *_pipeline_lines(config, e),
        f"parameters        {e.total_parameters:,} in the model, {rank.parameters:,} per rank",
        row("weights", peak.weights, t.precision),
        row("optimizer state", peak.optimizer, config.optim.name + sharding),
        "most of the step, per rank:",
        row("gradients", rank.most("gradients"), "with those just made"),
        row("activations", rank.most("activations"), f"{batch}, recompute {t.recompute}"),
        row("head", rank.most("head"), "all logits of a micro-batch" if p.schedule in ("zb", "zbv") else logits),
        row("working set", rank.most("working"), "what the layer at hand needs beside, made again or to be given back"),
        row("buckets", rank.most("buckets"), "copies of gradients while they are summed"),
        row("estimated peak", peak.total, f"per rank, in the {peak.what}"),
        *_traffic_lines(rank),
        *(
            f"{'run' if n == 0 else '':<18}{part.steps} steps × {part.global_batch_size} samples × {part.seq_len} tokens "
            f"= {part.steps * part.global_batch_size * part.seq_len:,} tokens"
            for n, part in enumerate(phases(config))
        ),
        K.chosen(),
    ]
    return "\n".join(lines)


def _pipeline_lines(config: Config, e: Estimate) -> list[str]:
    p = config.parallel
    if p.pp == 1:
        return []
    layers = [len(part.layers) for part in parts_of(config.model, p, seq_len=config.data.seq_len)]
    owners = stage_ranks(p.schedule, p.pp, p.virtual_stages)
    stages = ", ".join(f"{n} on rank {rank}" for n, rank in zip(layers, owners, strict=True))
    peaks = ", ".join(f"{rank.peak.total / GIB:.3f}" for rank in e.ranks)
    return [
        f"pipeline          {p.schedule}, layers by stage: {stages}",
        f"peak by rank      {peaks} GiB; below, pipeline rank {e.largest.rank}, which holds most",
    ]


def _traffic_lines(rank: RankEstimate) -> list[str]:
    if not rank.transfers:
        return ["communication     none"]
    lines = ["sent in a step, per rank:"]
    for axis, name in AXES.items():
        of_axis = [transfer for transfer in rank.transfers if transfer.axis == axis]
        if of_axis:
            operations = ", ".join(f"{transfer.operation} {transfer.sent / GIB:.3f}" for transfer in of_axis)
            lines.append(f"{name:<24}{sum(transfer.sent for transfer in of_axis) / GIB:9.3f} GiB  {operations}")
    return lines
