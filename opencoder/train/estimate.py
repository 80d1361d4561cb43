"""What a layout asks of each rank, worked out without running it (`train --dry-run`).

Activations are those kept for backward, counted tensor by tensor; allocator slack and temporary buffers beyond the
logits of one chunk are not counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opencoder import kernels as K
from opencoder.config import Config, data_parallel_size
from opencoder.config_rules import phases
from opencoder.model.decoder import Decoder, named_parameters
from opencoder.model.recompute import modules_of
from opencoder.optim.update import check_groups
from opencoder.parallel.layout import chunks_in_flight, stage_ranks
from opencoder.parallel.mesh import Mesh, kv_replicas_of, pretend_mesh
from opencoder.parallel.placement import placement_of
from opencoder.parallel.ulysses import key_heads_for

from .pipeline_runner import parts_of

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Estimate:
    """Bytes unless said."""

    total_parameters: int
    """Number, whole model."""
    rank_parameters: int
    """Number, this rank."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    data_parallel_traffic: int
    """Sent by each rank per step, over dp and cp together: the sum of gradients."""
    tensor_parallel_traffic: int
    """Sent by each rank per step."""
    context_parallel_traffic: int
    """Sent by each rank per step, in attention."""

    @property
    def peak(self) -> int:
        """Everything together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def estimate(config: Config, world_size: int) -> Estimate:
    """Sizes on a rank of `world_size` in the stage of the data with the largest micro-batches; with pipelines each on the
    rank where it is largest.

    The model is built on the meta device: no memory is taken."""
    p, t, m = config.parallel, config.train, config.model
    replicas = kv_replicas_of(m.kv_heads, p.tp)
    mesh = pretend_mesh(world_size=world_size, tp=p.tp, pp=p.pp, cp=p.cp, kv_replicas=replicas)
    with torch.device("meta"):
        model = Decoder(m, mesh)
    check_groups(config.optim, named_parameters(model))
    parameters = list(model.parameters())
    total = sum(torch.Size(placement_of(q).global_shape).numel() for q in parameters)
    mine = _largest_rank(config, mesh)
    width = BYTES[t.precision]
    wide = max(width, 4)
    states = 2 if config.optim.name == "adamw" else 1
    master = wide if width < 4 else 0
    largest = max(phases(config), key=lambda phase: phase.micro_batch_size * phase.seq_len)
    tokens = largest.micro_batch_size * largest.seq_len // p.cp
    rows = m.padded_vocab_size // p.tp
    replicas = mesh.dp.size * mesh.cp.size
    sharded = p.sharded_optimizer
    micro_batches = largest.global_batch_size // (largest.micro_batch_size * data_parallel_size(config, world_size))
    return Estimate(
        total_parameters=total,
        rank_parameters=mine,
        weights=mine * width,
        gradients=mine * wide,
        optimizer=mine * (states * wide + master) // (replicas if sharded else 1),
        activations=int(_activations(config, mesh, tokens, width) * _share_in_flight(config, micro_batches)),
        logits=(tokens if _whole_logits(config) else min(m.head.chunk_tokens, tokens)) * rows * width,
        # sharded: gradients to their owners, weights back, each half of a ring all-reduce
        data_parallel_traffic=_ring(mine * (wide + width) // 2 if sharded else mine * wide, replicas),
        tensor_parallel_traffic=micro_batches * _tensor_parallel_bytes(config, mesh, tokens, width),
        context_parallel_traffic=micro_batches * _context_parallel_bytes(config, mesh, tokens, width),
    )


def _largest_rank(config: Config, mesh: Mesh) -> int:
    """Parameters of the pipeline rank that holds most of them."""
    p = config.parallel
    held = [0] * p.pp
    ranks = stage_ranks(p.schedule, p.pp, p.virtual_stages)
    parts = parts_of(config.model, p, seq_len=config.data.seq_len) if p.pp > 1 else [None]
    for rank, part in zip(ranks, parts, strict=True):
        with torch.device("meta"):
            held[rank] += sum(q.numel() for q in Decoder(config.model, mesh, part=part).parameters())
    if p.pp > 1 and config.model.tie_embeddings and ranks[0] == ranks[-1]:  # both ends here: one matrix
        held[ranks[0]] -= config.model.padded_vocab_size // p.tp * config.model.hidden_size
    return max(held)


def _share_in_flight(config: Config, micro_batches: int) -> float:
    """Activations of the pipeline rank that holds most, over those of one micro-batch in the whole model."""
    p = config.parallel
    if p.pp == 1:
        return 1.0
    ranks = stage_ranks(p.schedule, p.pp, p.virtual_stages)
    chunks = chunks_in_flight(p.schedule, p.pp, p.virtual_stages, micro_batches)
    layers = [len(part.layers) for part in parts_of(config.model, p, seq_len=config.data.seq_len)]
    # as if the chunks were spread evenly over the stages of the rank
    held = [chunks[r] * sum(n for n, rank in zip(layers, ranks, strict=True) if rank == r) for r in range(p.pp)]
    return max(held) / p.virtual_stages / config.model.layers


def _whole_logits(config: Config) -> bool:
    return config.parallel.schedule in ("zb", "zbv")


def _ring(size: int, ranks: int) -> int:
    """Bytes a rank sends in a ring all-reduce of `size` bytes."""
    return 2 * size * (ranks - 1) // ranks


def _activations(config: Config, mesh: Mesh, tokens: int, width: int) -> int:
    """What all layers keep, and what the largest of those that run again makes anew while it does."""
    everything = _kept_per_token(config, mesh, frozenset())
    kept = [_kept_per_token(config, mesh, modules_of(config.train.recompute, i)) for i in range(config.model.layers)]
    return int(tokens * width * (sum(kept) + everything - min(kept)))


def _kept_per_token(config: Config, mesh: Mesh, again: frozenset[str]) -> float:
    """Numbers that a layer keeps of each token when the modules `again` are run again."""
    m, tp = config.model, mesh.tp.size
    share = tp if config.parallel.sequence_parallel else 1
    if "full" in again:
        return 2 * m.hidden_size / share
    # input, sum, output of two norms: the outputs are whole even under sequence parallelism, as they are gathered
    kept = (4 / share + 2) * m.hidden_size
    if "attention" not in again:  # q, k (before and after rotary), v, output
        kept += 3 * (m.heads + max(m.kv_heads, tp)) * m.head_dim / tp
    if "mlp" not in again:  # gate, up
        kept += 2 * m.ffn_size / tp
    return kept


def _tensor_parallel_bytes(config: Config, mesh: Mesh, tokens: int, width: int) -> int:
    """Per micro-batch: two all-reduces forward and two backward in each layer, one each for embedding and head."""
    per_reduce = _ring(tokens * config.model.hidden_size * width, mesh.tp.size)
    return (4 * config.model.layers + 2) * per_reduce


def _context_parallel_bytes(config: Config, mesh: Mesh, tokens: int, width: int) -> int:
    """Per micro-batch. Ring: in each layer keys and values go round in forward and in backward, and their gradients, in fp32 or
    wider, round and home. Exchange: q, k, v and the output once in forward and once in backward."""
    m, tp, cp = config.model, mesh.tp.size, mesh.cp.size
    if cp == 1:
        return 0
    passes = 3 if {"full", "attention"} & set(config.train.recompute.modules) else 2
    kv_heads = max(m.kv_heads // tp, 1)
    if config.parallel.context_attention == "ring":
        per_head = (cp - 1) * passes * width + cp * max(width, 4)
        return m.layers * 2 * tokens * kv_heads * m.head_dim * per_head
    heads = 2 * m.heads // tp + 2 * key_heads_for(kv_heads, cp)
    return m.layers * passes * tokens * heads * m.head_dim * width * (cp - 1) // cp


def _pipeline_lines(config: Config) -> list[str]:
    p = config.parallel
    if p.pp == 1:
        return []
    layers = [len(part.layers) for part in parts_of(config.model, p, seq_len=config.data.seq_len)]
    ranks = stage_ranks(p.schedule, p.pp, p.virtual_stages)
    stages = ", ".join(f"{n} on rank {rank}" for n, rank in zip(layers, ranks, strict=True))
    return [
        f"pipeline          {p.schedule}, layers by stage: {stages}; below, each size is of the rank where it is largest"
    ]


def describe(config: Config, world_size: int) -> str:
    """The text of `train --dry-run`."""
    e = estimate(config, world_size)
    p = config.parallel
    dp = data_parallel_size(config, world_size)
    parts = phases(config)
    largest = max(parts, key=lambda phase: phase.micro_batch_size * phase.seq_len)
    gib = 2**30
    at_a_time = "a whole micro-batch" if _whole_logits(config) else f"{config.model.head.chunk_tokens} tokens"
    lines = [
        f"world {world_size} = tp {p.tp} × pp {p.pp} × cp {p.cp} × dp {dp}",
        *_pipeline_lines(config),
        f"parameters        {e.total_parameters:,} in the model, {e.rank_parameters:,} per rank",
        f"weights           {e.weights / gib:.3f} GiB per rank ({config.train.precision})",
        f"gradients         {e.gradients / gib:.3f} GiB",
        f"optimizer state   {e.optimizer / gib:.3f} GiB ({config.optim.name}"
        + (f", split over {dp * p.cp} ranks)" if p.sharded_optimizer else ")"),
        f"activations       {e.activations / gib:.3f} GiB (micro-batch {largest.micro_batch_size} × "
        f"{largest.seq_len}, recompute {config.train.recompute})",
        f"logits            {e.logits / gib:.3f} GiB ({at_a_time} at a time)",
        f"estimated peak    {e.peak / gib:.3f} GiB per rank",
        f"communication     {e.data_parallel_traffic / gib:.3f} GiB data-parallel, "
        f"{e.tensor_parallel_traffic / gib:.3f} GiB tensor-parallel, "
        f"{e.context_parallel_traffic / gib:.3f} GiB context-parallel, sent per rank and step",
        *(
            f"{'run' if n == 0 else '':<18}{phase.steps} steps × {phase.global_batch_size} samples × {phase.seq_len} tokens "
            f"= {phase.steps * phase.global_batch_size * phase.seq_len:,} tokens"
            for n, phase in enumerate(parts)
        ),
        K.chosen(),
    ]
    return "\n".join(lines)
