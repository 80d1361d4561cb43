"""Output heads. A head owns the output matrix, the loss, and what the trainer must know of both.

T tokens, M width, V vocabulary; /tp: this rank's share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from opencoder.config import ModelConfig
from opencoder.parallel.collectives import enter_split
from opencoder.parallel.cross_entropy import (
    IGNORE,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.placement import place, sharded


class VocabHead(nn.Module):
    """Next-token prediction over a vocabulary split over tp. It updates no parameters itself."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        weight: nn.Parameter | None = None,
        split_backward: bool = False,
        tokens_split: bool = False,
        z_loss: float = 0.0,
    ) -> None:
        """`weight` is the embedding's parameter when the two are tied. `tokens_split`: as in parallel/layers.py,
        `z_loss` as in parallel/cross_entropy.py.
        `split_backward`: the gradients of hidden state and weight may be asked for one after the other, as zero-bubble schedules
        do; all logits of a micro-batch are then kept until both are there."""
        super().__init__()
        self.mesh, self.chunk_tokens = mesh, config.head.chunk_tokens
        self.split_backward, self.tokens_split, self.z_loss = split_backward, tokens_split, z_loss
        vocab, width = config.padded_vocab_size, config.hidden_size
        rows = vocab // mesh.tp.size
        self.vocab_start = mesh.tp.rank * rows
        if weight is None:
            weight = place(nn.Parameter(torch.empty(rows, width)), sharded((vocab, width), 0))
        self.weight = weight

    def begin_step(self, targets_of_all_micro_batches: Iterable[torch.Tensor]) -> torch.Tensor:
        """Unmasked targets of the step over all data-parallel ranks, 0-dim: the N that every loss of the step is divided by.

        Called by all ranks that hold the head, once a step, before the first micro-batch."""
        counts = [(targets != IGNORE).sum() for targets in targets_of_all_micro_batches]
        return self.mesh.group(("dp", "cp")).all_reduce(torch.stack(counts).sum())

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """hidden (B, S, M), with split tokens (B, S/tp, M), targets (B, S) → sum of token losses over this rank's samples
        (0-dim), statistics without gradients: `tokens`, unmasked ones; `token_losses` (B·S,), 0 where masked; `z_loss`,
        what the z-loss adds over all tokens. The sum is without it, its gradient is not."""
        x = enter_split(hidden, self.mesh.tp, tokens_split=self.tokens_split).flatten(0, 1)
        flat = targets.reshape(-1)
        start, tp, z_loss = self.vocab_start, self.mesh.tp, self.z_loss
        if self.split_backward:  # the fused loss works both gradients out at once, and once only
            logits = F.linear(x, self.weight)
            losses = vocab_parallel_cross_entropy(logits, flat, vocab_start=start, group=tp, z_loss=z_loss)
        else:
            losses = vocab_parallel_linear_cross_entropy(
                x, self.weight, flat, vocab_start=start, group=tp, chunk_tokens=self.chunk_tokens, z_loss=z_loss
            )
        statistics = {"tokens": (flat != IGNORE).sum(), "token_losses": losses.tokens.detach(), "z_loss": losses.z_loss}
        return losses.total, statistics

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, S, M), with split tokens (B, S/tp, M) → (B, S, V/tp)."""
        return F.linear(enter_split(hidden, self.mesh.tp, tokens_split=self.tokens_split), self.weight)

    def grad_sq_norm(self) -> torch.Tensor:
        """Squared gradient norm of the parameters the head owns: none, so 0."""
        return torch.zeros((), dtype=torch.float64, device=self.weight.device)

    def owned_parameters(self) -> list[nn.Parameter]:
        """Parameters the head updates itself (excluded from the optimizer and from gradient reduction): none."""
        return []

    def apply_gradients(self, lr: float, clip_coef: float) -> None:
        """Update the owned parameters: none."""
