"""What a run with a class head asks of each rank, worked out without running it (`train --dry-run`).

Counted are the class matrix, its state, the gradient of its scored rows, the logits of a micro-batch, gathered features, the
graph, and of the encoder weights, gradients, state and what is kept for the backward pass. Not counted: copies for a moment, the
build of a graph (a copy of the rank's rows and blocks of products), and what estimate.py leaves out.

N classes, N_r here; m scored rows; D width; B samples of a micro-batch over the ranks that share features."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opencoder import kernels as K
from opencoder.config import Config, data_parallel_size
from opencoder.config_rules import Phase, phases
from opencoder.model.classes.rows import STATE_NAMES as ROW_STATES
from opencoder.model.classes.selection import quota_of
from opencoder.model.decoder import Part, named_parameters
from opencoder.model.encoder import HEAD_KEY, Encoder
from opencoder.optim.update import STATE_NAMES, check_groups
from opencoder.parallel.mesh import Mesh, pretend_mesh

from .estimate_layers import BYTES, Sizes, modules_of_stage, sizes_of
from .estimate_memory import Moment
from .estimate_rank import RankEstimate
from .estimate_traffic import Transfer

GIB = 2**30
OFFSETS_32 = 2**31
"""Edges from which on the graph's offsets take 8 bytes."""


@dataclass(frozen=True)
class HeadSizes:
    """Of the rank with the most classes. Bytes unless said."""

    rows: int
    """Number."""
    scored: int
    """Number, unless a step has more labels there."""
    weight: int
    state: int
    gradient: int
    """Of the scored rows."""
    features: int
    """Gathered, and as much for their gradient."""
    logits: int
    graph: int
    selection: int

    @property
    def step(self) -> int:
        """What a step holds beside weight, state and the gradient."""
        return self.features + self.logits + self.graph + self.selection


def head_sizes(config: Config, mesh: Mesh, *, micro_batch: int) -> HeadSizes:
    """`micro_batch`: samples of a forward pass on one rank."""
    head = config.model.head
    assert head.classes is not None
    width, wide = BYTES[config.train.precision], max(BYTES[config.train.precision], 4)
    dim = head.dim or config.model.hidden_size
    ranks = mesh.axis(head.class_group).size
    rows = -(-head.classes // ranks)
    scored = rows if head.selection == "full" else quota_of(head.rho, rows)
    samples = micro_batch * (1 if head.class_group == "tp" else mesh.dp_cp.size)
    state_width = wide if head.state_dtype == "fp32" else 2
    states = len(ROW_STATES[head.optimizer]) * state_width
    if width < 4 and head.state_dtype == "fp32":
        states += 4  # master rows
    graph = 0
    if head.selection == "knn":
        edges = head.classes * head.neighbours // ranks
        graph = edges * (4 + (2 if head.neighbours < 2**15 else 4))
        graph += (head.classes + 1) * (4 if edges < OFFSETS_32 else 8)
    return HeadSizes(
        rows=rows,
        scored=scored,
        weight=rows * dim * width,
        state=rows * dim * states,
        gradient=scored * dim * wide,
        features=2 * samples * dim * width,
        logits=samples * scored * wide,
        graph=graph,
        selection=0 if head.selection == "full" else rows * 8,
    )


def estimate_class_rank(config: Config, world_size: int, phase: Phase, *, cpu: bool) -> tuple[int, RankEstimate]:
    """Parameters of the whole model, and what a rank holds at most: in the backward pass of a micro-batch, or in the update."""
    p, m = config.parallel, config.model
    mesh = pretend_mesh(world_size=world_size, tp=p.tp)
    with torch.device("meta"):
        parameters = named_parameters(Encoder(m, mesh, optim=config.optim, parallel=p))
        whole = sum(q.numel() for q in Encoder(m, optim=config.optim).parameters())
    check_groups(config.optim, parameters)
    backbone = sum(q.numel() for key, q in parameters.items() if key != HEAD_KEY)
    s = sizes_of(config, micro_batch=phase.micro_batch_size, seq_len=phase.seq_len, cpu=cpu)
    head = head_sizes(config, mesh, micro_batch=phase.micro_batch_size)
    data = mesh.dp_cp.size
    states = len(STATE_NAMES[config.optim.name]) * s.wide + (s.wide if s.width < s.wide else 0)
    optimizer = backbone * states // (data if p.sharded_optimizer else 1) + head.state
    weights, gradients = backbone * s.width + head.weight, backbone * s.wide + head.gradient
    kept, working = _trunk(config, s, phase.micro_batch_size)
    moments = [
        Moment("backward of a micro-batch", weights, optimizer, gradients, kept, head.step, working, 0, 0),
        Moment("the update", weights, optimizer, gradients, 0, head.graph, 0, 0, 0),
    ]
    numbers = backbone + parameters[HEAD_KEY].numel()
    return whole, RankEstimate(0, numbers, moments, _transfers(config, mesh, phase, backbone, s, head))


def _trunk(config: Config, s: Sizes, samples: int) -> tuple[int, int]:
    """Kept of the layers from forward to backward, and the most that one of them needs beside in backward."""
    m = config.model
    if m.encoder.input == "tokens":
        modules = modules_of_stage(config, s, Part(range(m.layers), first=True, last=False))
        most = max(step.live - module.kept for module in modules for step in module.backward)
        return sum(module.kept for module in modules), max(most, 0)
    # Of each layer the sum before it, its norm, gate and up.
    layer = samples * (2 * m.hidden_size + 2 * m.ffn_size // s.tp) * s.width
    return m.layers * layer, layer


def _transfers(config: Config, mesh: Mesh, phase: Phase, backbone: int, s: Sizes, head: HeadSizes) -> list[Transfer]:
    """Over the data axes; what the layers of a tensor-parallel trunk send comes beside."""
    data, b = mesh.dp_cp.size, phase.micro_batch_size
    n = phase.global_batch_size // (b * data)
    found = []
    if config.parallel.sharded_optimizer:
        found += [("data", "reduce_scatter", backbone * s.wide), ("data", "all_gather", backbone * s.width // data)]
    else:
        found.append(("data", "all_reduce", backbone * s.wide))
    if config.model.head.class_group == "tp":
        found.append(("data", "all_reduce", head.gradient))
        own = head.features // 2
        found += [("tp", "all_reduce", n * (own + 3 * b * s.wide))]
    else:
        gathered = head.features // 2
        found += [
            ("data", "all_gather", n * gathered // data),
            ("data", "reduce_scatter", n * gathered),
            ("data", "all_reduce", n * 3 * b * data * s.wide),
        ]
    sizes = {"data": data, "tp": mesh.tp.size}
    summed: dict[tuple[str, str], int] = {}
    for axis, operation, size in found:
        summed[axis, operation] = summed.get((axis, operation), 0) + size
    return [Transfer(axis, op, size, sizes[axis]) for (axis, op), size in summed.items() if sizes[axis] > 1]


def describe_classes(
    config: Config, world_size: int, total: int, rank: RankEstimate, phase: Phase, *, cpu: bool
) -> list[str]:
    """The lines of `train --dry-run`, without traffic."""
    p, m, dp = config.parallel, config.model, data_parallel_size(config, world_size)
    head = head_sizes(config, pretend_mesh(world_size=world_size, tp=p.tp), micro_batch=phase.micro_batch_size)
    micro_batches = phase.global_batch_size // (phase.micro_batch_size * dp)
    dim = m.head.dim or m.hidden_size

    def row(name: str, size: int, note: str = "") -> str:
        return f"{name:<18}{size / GIB:9.3f} GiB{'  ' + note if note else ''}"

    lines = [
        f"world {world_size} = tp {p.tp} × dp {dp}, {'CPUs' if cpu else 'GPUs'}; classes over {m.head.class_group}",
        f"parameters        {total:,} in the model, {rank.parameters:,} per rank",
        f"classes           {m.head.classes:,} × {dim}, {head.rows:,} per rank, {head.scored:,} scored in a step",
        row("encoder weights", rank.peak.weights - head.weight, config.train.precision),
        row("encoder state", rank.peak.optimizer - head.state, config.optim.name),
        row("class matrix", head.weight, f"{config.train.precision}, per rank"),
        row("its state", head.state, f"{m.head.optimizer}, {m.head.state_dtype}"),
        "most of the step, per rank:",
        row("gradients", rank.most("gradients"), f"{head.gradient / GIB:.3f} GiB of scored rows"),
        row("activations", rank.most("activations"), f"{micro_batches} micro-batches of {phase.micro_batch_size}"),
        row("logits", head.logits, "of a micro-batch of all ranks over the scored rows here"),
        row("features", head.features, "gathered, and their gradient"),
    ]
    if m.head.selection != "full":
        lines.append(row("selection", head.graph + head.selection, f"{m.head.selection}, graph included"))
    lines.append(row("estimated peak", rank.peak.total, f"per rank, in the {rank.peak.what}"))
    lines += [
        f"{'run' if n == 0 else '':<18}{part.steps} steps × {part.global_batch_size} samples "
        f"= {part.steps * part.global_batch_size:,} samples"
        for n, part in enumerate(phases(config))
    ]
    return [*lines, K.chosen()]
