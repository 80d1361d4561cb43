"""The OpenCoder decoder: a Llama-shaped transformer in plain modules, tensor-parallel through its layers alone.

With sequence parallelism the hidden state between attention and MLP, and between parts of the model, is (B, S/tp, M): see
parallel/collectives.py. Shapes below are those without it.

B batch, S sequence, M width, H query heads, G key/value heads, D head dim, F inner width, V vocabulary; /tp: this
rank's share. Modules carry the names of the Hugging Face checkpoint, so parameter names are checkpoint keys
(`key_of`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from opencoder import kernels as K
from opencoder.config import ModelConfig, ParallelConfig, RecomputeConfig
from opencoder.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, columns
from opencoder.parallel.mesh import SINGLE, Group, Mesh, kv_replicas_of
from opencoder.parallel.placement import at_both_ends, place, placement_of, replicated

from .attend import Context, Documents, Rope, attend, context_of, positions_of
from .heads import VocabHead
from .recompute import modules_of, recomputed, run, run_on_made

__all__ = ["Decoder", "Documents", "Part", "key_of", "named_parameters", "parameter_count", "rotary_table"]


class Part(NamedTuple):
    """The piece of the model that one module holds: a stage of a pipeline, or all of it."""

    layers: range
    """Numbers of its layers in the whole model."""
    first: bool
    """Starts with the embedding: takes ids, not a hidden state."""
    last: bool
    """Holds the last norm and the head."""


class How(NamedTuple):
    """How the layers work over the tensor-parallel ranks."""

    tokens_split: bool
    """Between them each rank has a part of the tokens (sequence parallelism)."""
    overlap: bool
    """Their backward pass communicates while it computes."""


class RMSNorm(nn.Module):
    """(…, M) → (…, M); with `residual`, adds first and returns the sum too."""

    def __init__(self, width: int, eps: float, *, tokens_split: bool = False) -> None:
        """`tokens_split`: this rank sees a part of the tokens only, so that its gradient is a part of the sum."""
        super().__init__()
        self.eps = eps
        self.weight = place(nn.Parameter(torch.empty(width)), replicated((width,), tokens_split=tokens_split))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return K.rms_norm(x, self.weight, eps=self.eps), x
        return K.rms_norm(x, self.weight, eps=self.eps, residual=residual)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, mesh: Mesh, how: How) -> None:
        super().__init__()
        self.head_dim, self.how = config.head_dim, how
        width, queries, keys = config.hidden_size, config.heads * config.head_dim, config.kv_heads * config.head_dim
        split: dict[str, Any] = {"tp": mesh.tp, "tokens_split": how.tokens_split}
        # Fewer key/value heads than ranks: neighbours hold the same one, each for the query heads it has.
        shards = config.kv_heads if kv_replicas_of(config.kv_heads, mesh.tp.size) > 1 else None
        self.q_proj = ColumnParallelLinear(width, queries, **split)
        self.k_proj = ColumnParallelLinear(width, keys, **split, shards=shards)
        self.v_proj = ColumnParallelLinear(width, keys, **split, shards=shards)
        self.o_proj = RowParallelLinear(queries, width, **split)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        q, k, v = columns(x, self.q_proj, self.k_proj, self.v_proj, overlap=self.how.overlap)
        b, s, _ = q.shape
        q = q.view(b, s, -1, self.head_dim)  # (B, S, H/tp·D) -> (B, S, H/tp, D)
        k = k.view(b, s, -1, self.head_dim)
        v = v.view(b, s, -1, self.head_dim)
        q, k = K.rotary(q, k, context.rope.cos, context.rope.sin)
        return self.o_proj(attend(q, k, v, context).reshape(b, s, -1))


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)). The product in the brackets is not kept for the backward pass but made again: gate and up
    are kept in any case, and it is a third of what the layer would keep."""

    def __init__(self, config: ModelConfig, mesh: Mesh, how: How, *, keep_product: bool) -> None:
        """`keep_product` where the whole block is recomputed anyway."""
        super().__init__()
        self.how, self.keep_product = how, keep_product
        width, inner = config.hidden_size, config.ffn_size
        split: dict[str, Any] = {"tp": mesh.tp, "tokens_split": how.tokens_split}
        self.gate_proj = ColumnParallelLinear(width, inner, **split)
        self.up_proj = ColumnParallelLinear(width, inner, **split)
        self.down_proj = RowParallelLinear(inner, width, **split)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = columns(x, self.gate_proj, self.up_proj, overlap=self.how.overlap)
        product = K.swiglu(gate, up)
        if self.keep_product:
            return self.down_proj(product)
        with recomputed(product, K.swiglu, gate, up):
            return self.down_proj(product)


class Block(nn.Module):
    """One layer, pre-norm. Takes and gives (update, residual): the addition is fused into the next norm."""

    def __init__(self, config: ModelConfig, mesh: Mesh, how: How, *, recompute: frozenset[str] = frozenset()) -> None:
        """`recompute`: which of its modules run again in the backward pass, "full" for all of it."""
        super().__init__()
        # A layer that runs again whole keeps nothing between: to make norms again there would keep their sums.
        self.recompute = recompute - {"norm"} if "full" in recompute else recompute
        width, eps = config.hidden_size, config.norm_eps
        self.input_layernorm = RMSNorm(width, eps, tokens_split=how.tokens_split)
        self.self_attn = Attention(config, mesh, how)
        self.post_attention_layernorm = RMSNorm(width, eps, tokens_split=how.tokens_split)
        self.mlp = MLP(config, mesh, how, keep_product=bool(recompute & {"full", "mlp"}))

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # What a call takes is free once a name here stands for something else, so no name outlives its use.
        x, residual, make = self._normed(self.input_layernorm, x, residual)
        x = self._run(self.self_attn, "attention", make, x, context)
        x, residual, make = self._normed(self.post_attention_layernorm, x, residual)
        return self._run(self.mlp, "mlp", make, x), residual

    def _normed(
        self, norm: RMSNorm, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, Callable[[], torch.Tensor] | None]:
        """The norm of x + residual, that sum, and what makes the norm again where it is not to be kept."""
        if "norm" not in self.recompute:
            return *norm(x, residual), None
        if residual is not None and x.element_size() < 4:
            # What is made again is the norm of the sum as it is kept, so the first must be that too, not of the sum unrounded.
            x, residual = x + residual, None
        y, total = norm(x, residual)
        kept = total.detach()
        return y, total, lambda: norm(kept)[0]

    def _run(
        self, module: nn.Module, name: str, make: Callable[[], torch.Tensor] | None, x: torch.Tensor, *args: Context
    ) -> torch.Tensor:
        again = name in self.recompute
        if make is None:
            return run(module, x, *args, again=again)
        return run_on_made(module, x, *args, make=make, again=again)


class Decoder(nn.Module):
    """Embedding, blocks, norm and head, or the `part` of them that a pipeline stage holds. Build it under
    `torch.device("meta")` to look at sizes without memory.

    Layers carry their number in the whole model, so parameters have the same keys in every cut. What a part does not hold
    (`embed_tokens`, `norm`, `lm_head`) is no attribute of it. Where embedding and head are tied, the last part too holds
    `embed_tokens`, for its matrix."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh | None = None,
        *,
        recompute: str | RecomputeConfig = "none",
        part: Part | None = None,
        parallel: ParallelConfig | None = None,
        z_loss: float = 0.0,
    ) -> None:
        """`part` None: the whole model. Sizes come from `mesh`; `parallel` says how the layers work over it, None: as by
        default."""
        super().__init__()
        mesh, parallel = mesh or Mesh(), parallel or ParallelConfig()
        replicas = kv_replicas_of(config.kv_heads, mesh.tp.size)
        if mesh.kv.size != replicas:
            raise ValueError(
                f"{config.kv_heads} key/value heads over tp {mesh.tp.size} stand on {replicas} ranks each, but the mesh was made "
                f"with kv_replicas={mesh.kv.size}"
            )
        split_backward = parallel.schedule in ("zb", "zbv")
        overlap = not split_backward if parallel.overlap is None else parallel.overlap
        tokens_split = parallel.sequence_parallel and mesh.tp.size > 1
        how = How(tokens_split, overlap)
        self.tokens_split_over = mesh.tp.size if tokens_split else 1
        """Ranks that share the tokens of a hidden state."""
        self.config, self.cp, self.context_attention = config, mesh.cp, parallel.context_attention
        self.part = part = part or Part(range(config.layers), first=True, last=True)
        if part.first or (part.last and config.tie_embeddings):
            self.embed_tokens = VocabParallelEmbedding(
                config.padded_vocab_size, config.hidden_size, tp=mesh.tp, tokens_split=tokens_split
            )
        if config.tie_embeddings and part.first != part.last and parallel.schedule != "zbv":
            # The ends are on two ranks. Under zbv they are on one, which ties them (train/pipeline_runner.py).
            place(self.embed_tokens.weight, at_both_ends(placement_of(self.embed_tokens.weight)))
        again = {i: modules_of(recompute, i) for i in part.layers}
        self.again = {str(i): "full" in modules for i, modules in again.items()}
        self.layers = nn.ModuleDict({str(i): Block(config, mesh, how, recompute=again[i]) for i in part.layers})
        if part.last:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps, tokens_split=tokens_split)
            tied = self.embed_tokens.weight if config.tie_embeddings else None
            self.lm_head = VocabHead(
                config, mesh, weight=tied, split_backward=split_backward, tokens_split=tokens_split, z_loss=z_loss
            )

    def hidden(
        self, x: torch.Tensor, documents: Documents | None = None, *, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, S) ids, or the hidden state (B, S, M) of the part before → (B, S, M): after the last norm, or for the next part."""
        b, s = x.shape[:2]
        if not self.part.first:
            s *= self.tokens_split_over
        rope = rotary_table(self.config, (b, s), documents, positions=positions, cp=self.cp, device=x.device)
        context = context_of(rope, documents, s, self.cp, self.context_attention)
        if self.part.first:
            x = self.embed_tokens(x)
        residual: torch.Tensor | None = None
        for number, block in self.layers.items():
            x, residual = run(block, x, residual, context, again=self.again[number])
        if self.part.last:
            return self.norm(x, residual)[0]
        return x if residual is None else x + residual  # one tensor, not two, goes to the next part

    def loss(
        self,
        x: torch.Tensor,
        targets: torch.Tensor,
        documents: Documents | None = None,
        *,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sum of token losses over this rank's samples, 0-dim, and statistics; targets (B, S), −100 = masked."""
        return self.lm_head.loss(self.hidden(x, documents, positions=positions), targets)

    def forward(
        self, x: torch.Tensor, documents: Documents | None = None, *, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, S) ids → logits (B, S, V/tp)."""
        return self.lm_head.logits(self.hidden(x, documents, positions=positions))


def rotary_table(
    config: ModelConfig,
    shape: tuple[int, int],
    documents: Documents | None = None,
    *,
    positions: torch.Tensor | None = None,
    cp: Group = SINGLE,
    device: torch.device | None = None,
) -> Rope:
    """Angles p·theta^(−2i/D) in fp32, as in the Hugging Face implementation, for a batch of `shape` (B, S).

    `positions` (S,) or (B, S) say where a token stands in its document; None: as they follow, or as `cp` cuts the samples,
    restarting with each document."""
    d = config.head_dim
    if positions is None:
        positions = positions_of(shape, documents, cp, device=device)
    exponents = torch.arange(0, d, 2, dtype=torch.float32, device=device) / d
    angles = positions[..., None].float() * (1.0 / config.rope_theta**exponents)
    return Rope(angles.cos(), angles.sin())


def key_of(name: str) -> str:
    """The checkpoint key of a parameter name: the name it has in a Hugging Face Llama checkpoint. An encoder's trunk has the keys
    of a decoder's layers."""
    return name if name.startswith("lm_head.") else f"model.{name.removeprefix('trunk.')}"


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Checkpoint key → parameter, each parameter once (a tied head is the embedding's)."""
    return {key_of(name): parameter for name, parameter in model.named_parameters()}


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the whole model, padded vocabulary included."""
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config).parameters())
