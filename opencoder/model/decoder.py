"""The OpenCoder decoder: a Llama-shaped transformer in plain modules, tensor-parallel through its layers alone.

B batch, S sequence, M width, H query heads, G key/value heads, D head dim, F inner width, V vocabulary; /tp: this
rank's share. Modules carry the names of the Hugging Face checkpoint, so parameter names are checkpoint keys
(`key_of`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from opencoder import kernels as K
from opencoder.config import ModelConfig
from opencoder.parallel.collectives import copy_to_group
from opencoder.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.placement import place, replicated

from .heads import VocabHead
from .recompute import recomputed


class Documents(NamedTuple):
    """Document bounds of a batch whose B·S tokens are seen as one packed row."""

    cu_seqlens: torch.Tensor
    """(documents + 1,) int32, from 0 to B·S; no document crosses a sample's end."""
    max_seqlen: int
    """Longest document, in tokens."""


class Rope(NamedTuple):
    """Cosines and sines of the rotary embedding, fp32, (S, D/2) or (B, S, D/2)."""

    cos: torch.Tensor
    sin: torch.Tensor


class RMSNorm(nn.Module):
    """(…, M) → (…, M); with `residual`, adds first and returns the sum too."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = place(nn.Parameter(torch.empty(width)), replicated((width,)))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return K.rms_norm(x, self.weight, eps=self.eps), x
        return K.rms_norm(x, self.weight, eps=self.eps, residual=residual)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        self.head_dim, self.tp = config.head_dim, mesh.tp
        width, d = config.hidden_size, config.head_dim
        self.q_proj = ColumnParallelLinear(width, config.heads * d, tp=mesh.tp, copy_input=False)
        self.k_proj = ColumnParallelLinear(width, config.kv_heads * d, tp=mesh.tp, copy_input=False)
        self.v_proj = ColumnParallelLinear(width, config.kv_heads * d, tp=mesh.tp, copy_input=False)
        self.o_proj = RowParallelLinear(config.heads * d, width, tp=mesh.tp)

    def forward(self, x: torch.Tensor, rope: Rope, documents: Documents | None) -> torch.Tensor:
        b, s, _ = x.shape
        x = copy_to_group(x, self.tp)  # once for the three projections: one all-reduce in backward
        q = self.q_proj(x).view(b, s, -1, self.head_dim)  # (B, S, M) -> (B, S, H/tp, D)
        k = self.k_proj(x).view(b, s, -1, self.head_dim)
        v = self.v_proj(x).view(b, s, -1, self.head_dim)
        q, k = K.rotary(q, k, rope.cos, rope.sin)
        if documents is None:
            out = K.attention(q, k, v, causal=True)
        else:  # (B, S, H, D) -> (B·S, H, D), packed
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
            out = K.attention(q, k, v, cu_seqlens=documents.cu_seqlens, max_seqlen=documents.max_seqlen)
        return self.o_proj(out.reshape(b, s, -1))


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)). The product in the brackets is not kept for the backward pass but made again: gate and up
    are kept in any case, and it is a third of what the layer would keep."""

    def __init__(self, config: ModelConfig, mesh: Mesh, *, keep_product: bool) -> None:
        """`keep_product` where the whole block is recomputed anyway."""
        super().__init__()
        self.tp, self.keep_product = mesh.tp, keep_product
        self.gate_proj = ColumnParallelLinear(config.hidden_size, config.ffn_size, tp=mesh.tp, copy_input=False)
        self.up_proj = ColumnParallelLinear(config.hidden_size, config.ffn_size, tp=mesh.tp, copy_input=False)
        self.down_proj = RowParallelLinear(config.ffn_size, config.hidden_size, tp=mesh.tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = copy_to_group(x, self.tp)
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = K.swiglu(gate, up)
        if self.keep_product:
            return self.down_proj(product)
        with recomputed(product, K.swiglu, gate, up):
            return self.down_proj(product)


class Block(nn.Module):
    """One layer, pre-norm. Takes and gives (update, residual): the addition is fused into the next norm."""

    def __init__(self, config: ModelConfig, mesh: Mesh, *, recompute: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, mesh)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, mesh, keep_product=recompute == "full")

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, rope: Rope, documents: Documents | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(x, rope, documents), residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    """Embedding, blocks, norm and head. Build it under `torch.device("meta")` to look at sizes without memory."""

    def __init__(self, config: ModelConfig, mesh: Mesh | None = None, *, recompute: str = "none") -> None:
        super().__init__()
        mesh = mesh or Mesh()
        self.config, self.recompute = config, recompute
        self.embed_tokens = VocabParallelEmbedding(config.padded_vocab_size, config.hidden_size, tp=mesh.tp)
        self.layers = nn.ModuleList(Block(config, mesh, recompute=recompute) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        tied = self.embed_tokens.weight if config.tie_embeddings else None
        self.lm_head = VocabHead(config, mesh, weight=tied)

    def hidden(self, tokens: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
        """(B, S) ids → (B, S, M) after the last norm."""
        x: torch.Tensor = self.embed_tokens(tokens)
        residual: torch.Tensor | None = None
        rope = rotary_table(self.config, tokens, documents)
        for block in self.layers:
            if self.recompute == "full" and torch.is_grad_enabled():
                x, residual = checkpoint(block, x, residual, rope, documents, use_reentrant=False)
            else:
                x, residual = block(x, residual, rope, documents)
        return self.norm(x, residual)[0]

    def loss(
        self, tokens: torch.Tensor, targets: torch.Tensor, documents: Documents | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sum of token losses over this rank's samples, 0-dim, and statistics; targets (B, S), −100 = masked."""
        return self.lm_head.loss(self.hidden(tokens, documents), targets)

    def forward(self, tokens: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
        """(B, S) ids → logits (B, S, V/tp)."""
        return self.lm_head.logits(self.hidden(tokens, documents))


def rotary_table(config: ModelConfig, tokens: torch.Tensor, documents: Documents | None = None) -> Rope:
    """Angles p·theta^(−2i/D) in fp32, as in the Hugging Face implementation; positions restart with each document."""
    b, s = tokens.shape
    d, device = config.head_dim, tokens.device
    if documents is None:
        positions = torch.arange(s, device=device)
    else:
        at = torch.arange(b * s, device=device)
        starts = documents.cu_seqlens.long()
        document = torch.searchsorted(starts, at, right=True) - 1
        positions = (at - starts[document]).view(b, s)
    exponents = torch.arange(0, d, 2, dtype=torch.float32, device=device) / d
    angles = positions[..., None].float() * (1.0 / config.rope_theta**exponents)
    return Rope(angles.cos(), angles.sin())


def key_of(name: str) -> str:
    """The checkpoint key of a parameter name: the name it has in a Hugging Face Llama checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Checkpoint key → parameter, each parameter once (a tied head is the embedding's)."""
    return {key_of(name): parameter for name, parameter in model.named_parameters()}


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the whole model, padded vocabulary included."""
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config).parameters())
