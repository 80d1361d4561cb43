"""The model in stages over pipeline ranks, and the runner that takes micro-batches through them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from opencoder.config import ModelConfig, ParallelConfig
from opencoder.data.loader import MicroBatch
from opencoder.model.decoder import Decoder, Documents, Part, named_parameters
from opencoder.optim.base import Optimizer
from opencoder.parallel.layout import balanced_layout, cut, stage_ranks
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.pipeline import Pipeline, Shapes
from opencoder.parallel.placement import placement_of

from .step import groups_of, inputs_of
from .totals import Totals


def parts_of(model: ModelConfig, parallel: ParallelConfig, *, seq_len: int) -> list[Part]:
    """The part of the model that each stage holds, by `parallel.layout` or balanced for sequences of `seq_len`."""
    layout = parallel.layout
    if layout is None:
        ranks = stage_ranks(parallel.schedule, parallel.pp, parallel.virtual_stages)
        layout = balanced_layout(model.layers, ranks, head_cost=head_cost(model, seq_len))
    last = len(layout) - 1
    return [Part(layers, stage == 0, stage == last) for stage, layers in enumerate(cut(layout))]


def head_cost(model: ModelConfig, seq_len: int) -> float:
    """Work of the head in units of one layer's: parameters touched by a token, and attention to half a sequence."""
    m = model.hidden_size
    projections = 2 * m * model.head_dim * (model.heads + model.kv_heads) + 3 * m * model.ffn_size
    attention = model.heads * model.head_dim * seq_len
    return model.padded_vocab_size * m / (projections + attention)


class Chunks(nn.Module):
    """The stages of one rank. Parameters have the names that they have in the whole model."""

    def __init__(self, stages: Mapping[int, Decoder]) -> None:
        """Number of a stage → its part of the model, ascending."""
        super().__init__()
        self.stages = dict(stages)
        for number, part in stages.items():
            self.add_module(f"stage_{number}", part)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        seen: set[nn.Parameter] = set()  # a tied matrix may stand in two stages
        for part in self.stages.values():
            for name, parameter in part.named_parameters(prefix, recurse, remove_duplicate):
                if parameter not in seen or not remove_duplicate:
                    seen.add(parameter)
                    yield name, parameter


def models_of(model: nn.Module) -> list[nn.Module]:
    """The modules that micro-batches go through on this rank: its stages, or the model."""
    return list(model.stages.values()) if isinstance(model, Chunks) else [model]


def build_chunks(
    model: ModelConfig, parallel: ParallelConfig, mesh: Mesh, *, seq_len: int, build: Callable[[Part], Decoder]
) -> Chunks:
    """The stages of this rank; `build` makes one part of the model."""
    ranks = stage_ranks(parallel.schedule, mesh.pp.size, parallel.virtual_stages)
    parts = parts_of(model, parallel, seq_len=seq_len)
    stages = {stage: build(part) for stage, part in enumerate(parts) if ranks[stage] == mesh.pp.rank}
    first, last = stages.get(0), stages.get(len(parts) - 1)
    if model.tie_embeddings and first is not None and last is not None:  # both ends here: one matrix
        last.embed_tokens = first.embed_tokens
        last.lm_head.weight = first.embed_tokens.weight
    return Chunks(stages)


class PipelineRunner:
    """Takes micro-batches through the stages of all pipeline ranks (train/step.py: Runner)."""

    def __init__(
        self,
        model: Chunks,
        optimizer: Optimizer,
        mesh: Mesh,
        parallel: ParallelConfig,
        *,
        device: torch.device,
        recompute: bool = False,
    ) -> None:
        """`recompute`: some of the model runs again in the backward pass."""
        self.model, self.optimizer, self.mesh, self.device = model, optimizer, mesh, device
        self.schedule, self.recompute = parallel.schedule, recompute
        self.ranks = stage_ranks(parallel.schedule, mesh.pp.size, parallel.virtual_stages)
        self.last = model.stages[max(model.stages)]
        """The one of this rank that may have the head."""
        self.modules = {number: _Stage(part) for number, part in model.stages.items()}
        self.keys = {number: list(named_parameters(part)) for number, part in model.stages.items()}
        held = Counter(key for keys in self.keys.values() for key in keys)
        tied = {key for key, p in named_parameters(model).items() if "embed" in placement_of(p).grad_sum_axes}
        tied |= {key for key, n in held.items() if n > 1}
        # A tied matrix is complete only when both ends are done, and reduced when the schedule is over.
        self.complete_keys = {stage: [key for key in keys if key not in tied] for stage, keys in self.keys.items()}
        self.dtype = next(model.parameters()).dtype
        self._pipelines: dict[bool, tuple[tuple[int, torch.Size], Pipeline]] = {}
        """Of training and of evaluation: number and shape of the micro-batches it was made for, and the pipeline."""

    def begin_step(self, targets_of_all_micro_batches: Iterable[torch.Tensor]) -> torch.Tensor:
        """The head's own, told to all: the ranks before it need not know the targets."""
        if self.last.part.last:
            count = self.last.lm_head.begin_step(targets_of_all_micro_batches)
        else:
            count = torch.zeros((), dtype=torch.int64, device=self.device)
        return self.mesh.pp.broadcast(count, source=self.ranks[-1])

    def run(self, micro_batches: Sequence[MicroBatch], count: torch.Tensor, *, groups: int = 0) -> Totals:
        """Forward and backward of all. Gradients are folded after each, and their reduction starts when a stage is done."""
        return self._through(micro_batches, count, Totals(self.device, groups), train=True)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Totals:
        """Forward alone."""
        return self._through(micro_batches, torch.ones((), device=self.device), Totals(self.device), train=False)

    def _through(
        self, micro_batches: Sequence[MicroBatch], count: torch.Tensor, totals: Totals, *, train: bool
    ) -> Totals:
        inputs = [inputs_of(mb, self.device) for mb in micro_batches]
        shared = {"count": count, "totals": totals}
        keywords = [{"targets": labels, "documents": documents, **shared} for _, labels, documents in inputs]
        if totals.groups and self.last.part.last:
            for keyword, mb in zip(keywords, micro_batches, strict=True):
                keyword["groups"] = groups_of(mb, self.device)
        self._pipeline([tokens for tokens, _, _ in inputs], train=train).run([x for x, _, _ in inputs], keywords)
        self.mesh.pp.broadcast(totals.values, source=self.ranks[-1])
        return totals

    def _pipeline(self, tokens: Sequence[torch.Tensor], *, train: bool) -> Pipeline:
        """The last one made, if number and shape of the micro-batches are those of the last step."""
        shapes = {x.shape for x in tokens}
        if len(shapes) > 1:
            raise ValueError(f"the micro-batches of a step must have one shape, not {sorted(map(tuple, shapes))}")
        kind = len(tokens), tokens[0].shape
        found = self._pipelines.get(train)
        if found is None or found[0] != kind:
            part = next(iter(self.model.stages.values()))
            b, s = tokens[0].shape
            hidden = (b, s // part.tokens_split_over, part.config.hidden_size)
            meta = Shapes(
                torch.empty_like(tokens[0], device="meta"), torch.empty(hidden, dtype=self.dtype, device="meta")
            )
            made = Pipeline(
                self.modules,
                self.ranks,
                meta,
                len(tokens),
                schedule=self.schedule if train else None,
                pp=self.mesh.pp,
                device=self.device,
                accumulated=lambda stage: self.optimizer.fold_gradients(self.keys[stage]),
                complete=lambda stage: self.optimizer.start_reduction(self.complete_keys[stage]),
                split_backward=not self.recompute,
            )
            self._pipelines[train] = found = kind, made
        return found[1]


class _Stage(nn.Module):
    """A part of the model as a stage: one tensor in, one out."""

    def __init__(self, part: Decoder) -> None:
        super().__init__()
        self.part = part

    def forward(
        self,
        x: torch.Tensor,
        *,
        targets: torch.Tensor,
        documents: Documents | None,
        count: torch.Tensor,
        totals: Totals,
        groups: torch.Tensor | None = None,
    ) -> Any:
        """ids or hidden state → hidden state (B, S, M), or at the end the sum of token losses / `count`, which is added to
        `totals`."""
        if not self.part.part.last:
            return self.part.hidden(x, documents)
        loss_sum, statistics = self.part.loss(x, targets, documents)
        totals.add(loss_sum, statistics, targets, groups)
        return loss_sum / count
