"""A model with one label for each sample: layers, one feature of a sample, and a head over the classes.

B samples, S tokens, M width of the layers, W numbers that come in, D width of a feature and of a class."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from opencoder.config import ModelConfig, OptimConfig, ParallelConfig, RecomputeConfig
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.placement import place, placement_of, replicated

from .attend import Documents
from .classes.head import ClassHead
from .classes.permutation import Permutation
from .decoder import MLP, Decoder, How, Part, RMSNorm
from .initialise import initialise

HEAD_KEY = "lm_head.weight"
"""Checkpoint key of the class matrix."""
PROJECTION_KEY = "model.projection.weight"


class TokenTrunk(Decoder):
    """Embedding and blocks of the decoder: (B, S) ids → (B, S, M) before the last norm. Its parameters have the keys that they have
    in a decoder."""

    def __init__(
        self, config: ModelConfig, mesh: Mesh, *, recompute: str | RecomputeConfig, parallel: ParallelConfig
    ) -> None:
        part = Part(range(config.layers), first=True, last=False)
        super().__init__(config, mesh, recompute=recompute, part=part, parallel=parallel)

    def forward(
        self, x: torch.Tensor, documents: Documents | None = None, *, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.hidden(x, documents, positions=positions)


class FeatureBlock(nn.Module):
    """(B, S, M) → (B, S, M): x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, mesh: Mesh, how: How) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, mesh, how, keep_product=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update: torch.Tensor = self.mlp(self.norm(x)[0])
        return x + update


class FeatureTrunk(nn.Module):
    """(B, W) numbers → (B, M) before the last norm."""

    def __init__(self, config: ModelConfig, mesh: Mesh, *, overlap: bool) -> None:
        super().__init__()
        assert config.encoder.width is not None
        self.input = _whole_linear(config.encoder.width, config.hidden_size)
        how = How(tokens_split=False, overlap=overlap)
        self.layers = nn.ModuleDict({str(i): FeatureBlock(config, mesh, how) for i in range(config.layers)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.input(x.to(self.input.weight.dtype))[:, None]  # the layers are those of texts: one token each
        for block in self.layers.values():
            x = block(x)
        return x[:, 0]


def _whole_linear(d_in: int, d_out: int) -> nn.Linear:
    """The same on all ranks."""
    linear = nn.Linear(d_in, d_out, bias=False)
    linear.weight = place(nn.Parameter(linear.weight.detach()), replicated((d_out, d_in)))
    return linear


class FeatureModel(nn.Module):
    """From samples to features: an encoder without its head."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh | None = None,
        *,
        recompute: str | RecomputeConfig = "none",
        parallel: ParallelConfig | None = None,
    ) -> None:
        super().__init__()
        mesh, parallel = mesh or Mesh(), parallel or ParallelConfig()
        self.config = config
        self.trunk: TokenTrunk | FeatureTrunk
        if config.encoder.input == "tokens":
            self.trunk = TokenTrunk(config, mesh, recompute=recompute, parallel=parallel)
        else:
            self.trunk = FeatureTrunk(config, mesh, overlap=parallel.overlap is not False)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.dim = config.head.dim or config.hidden_size
        """Width D of a feature."""
        self.projection = _whole_linear(config.hidden_size, self.dim) if config.head.dim is not None else None

    def features(self, inputs: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Ids (B, S) of which the first `lengths` (B,) of each sample count, None: all; or numbers (B, W). → (B, D).

        What is beyond a sample's length changes nothing: attention is causal, and it is not pooled."""
        hidden = self.norm(self.trunk(inputs))[0]
        if hidden.dim() == 3:
            hidden = pooled(hidden, lengths, self.config.encoder.pool)
        return hidden if self.projection is None else self.projection(hidden)


class Encoder(FeatureModel):
    """`features` of samples, and the loss of their labels. Build it under `torch.device("meta")` to look at sizes."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh | None = None,
        *,
        optim: OptimConfig,
        seed: int = 0,
        recompute: str | RecomputeConfig = "none",
        parallel: ParallelConfig | None = None,
    ) -> None:
        """`optim`: for the rows of the class matrix, which the head updates itself; `seed`: of the classes that it draws and of
        their order."""
        super().__init__(config, mesh, recompute=recompute, parallel=parallel)
        head = config.head
        self.lm_head = ClassHead(head, mesh or Mesh(), dim=self.dim, optim=optim, key=HEAD_KEY, seed=seed)
        assert head.classes is not None
        self.order = Permutation(head.classes, seed) if head.permute else None
        """From classes to rows of the class matrix; None: they are the same. Kept in checkpoints."""

    def begin_step(self, labels_of_all_micro_batches: Iterable[torch.Tensor]) -> torch.Tensor:
        """What ClassHead.begin_step says, with class numbers as labels."""
        return self.lm_head.begin_step(self._rows_of(labels) for labels in labels_of_all_micro_batches)

    def loss(
        self, inputs: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sum of the losses of this rank's samples, 0-dim, and statistics; labels (B,), −100 = ignored."""
        return self.loss_of_features(self.features(inputs, lengths), labels)

    def loss_of_features(
        self, features: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The same from features (B, D)."""
        return self.lm_head.loss(features, self._rows_of(labels))

    def topk(self, features: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """features (B, D) → the k largest logits over all classes (B, k), fp32, and their classes; of equal ones the smaller class
        comes first. Called by all ranks."""
        return self.lm_head.logits_topk(features, k, class_of=self.order.labels_of if self.order is not None else None)

    def _rows_of(self, labels: torch.Tensor) -> torch.Tensor:
        return labels if self.order is None else self.order.rows_of(labels)


def pooled(hidden: torch.Tensor, lengths: torch.Tensor | None, pool: str) -> torch.Tensor:
    """(B, S, M) → (B, M): the mean over the first `lengths` (B,) tokens, None: all, or the last of them. Sums are fp32 or wider."""
    b, s, _ = hidden.shape
    if lengths is None:
        lengths = torch.full((b,), s, device=hidden.device)
    if pool == "last":
        return hidden[torch.arange(b, device=hidden.device), lengths - 1]
    here = torch.arange(s, device=hidden.device) < lengths[:, None]  # (B, S)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weights = here.to(wide) / lengths[:, None]
    return torch.einsum("bs,bsm->bm", weights, hidden.to(wide)).to(hidden.dtype)


def build_encoder(
    config: ModelConfig,
    mesh: Mesh,
    *,
    optim: OptimConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    recompute: str | RecomputeConfig = "none",
    parallel: ParallelConfig | None = None,
) -> Encoder:
    """This rank's shards of the encoder and its rows of the class matrix, with their initial weights: the same at any layout."""
    with torch.device("meta"):
        model = Encoder(config, mesh, optim=optim, seed=seed, recompute=recompute, parallel=parallel)
    placements = {name: placement_of(p) for name, p in model.named_parameters()}
    model = model.to(dtype).to_empty(device=device)
    for name, parameter in model.named_parameters():
        place(parameter, placements[name])
    initialise(model, mesh, config, seed=seed)
    return model
