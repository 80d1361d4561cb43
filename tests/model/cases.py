"""Small models and batches shared by the tests of model, checkpoint and training."""

from __future__ import annotations

from typing import Any

import torch

from opencoder.config import ModelConfig

SMALL: dict[str, Any] = {
    "layers": 2, "hidden_size": 64, "heads": 4, "kv_heads": 2, "ffn_size": 96, "vocab_size": 250, "max_seq_len": 64,
}  # fmt: skip
FULL: dict[str, Any] = {
    "layers": 8, "hidden_size": 256, "heads": 8, "kv_heads": 4, "ffn_size": 688, "vocab_size": 1000, "max_seq_len": 64,
}  # fmt: skip


def model_config(base: dict[str, Any] = SMALL, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({**base, **changes})


def batch(vocab: int, samples: int, length: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels (samples, length) whose share of masked labels differs from sample to sample."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (samples, length + 1), generator=generator)
    labels = ids[:, 1:].clone()
    for i in range(samples):
        share = 0.1 + 0.8 * i / max(samples - 1, 1)
        labels[i, torch.rand(length, generator=generator) < share] = -100
    return ids[:, :-1].contiguous(), labels
