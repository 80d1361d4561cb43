"""Samples cut over cp: which rank holds which tokens, and attention over the cut against plain attention with a mask, in fp64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from opencoder.config import OptimConfig, ParallelConfig
from opencoder.data.loader import MicroBatch
from opencoder.model.attend import ContextAttention, Documents, Rope, attend, context_of, positions_of
from opencoder.model.decoder import named_parameters
from opencoder.model.initialise import build_model
from opencoder.optim.optimizer import ReplicatedOptimizer
from opencoder.parallel.context import split_sequence, token_numbers
from opencoder.parallel.mesh import Group, create_mesh
from opencoder.parallel.ulysses import heads_for_tokens
from opencoder.train.step import TrainStep
from tests.harness import run_cases
from tests.model.cases import SMALL, batch, model_config

CPU = torch.device("cpu")
SAMPLES, LENGTH = 2, 32
CHUNKS = {2: [(0, 3), (1, 2)], 4: [(0, 7), (1, 6), (2, 5), (3, 4)]}
"""cp → the chunks of each rank: what the split must be, written down."""


class Case(NamedTuple):
    """Heads, and where documents begin inside each sample (None: no document mask)."""

    heads: int = 4
    kv_heads: int = 4
    begins: tuple[tuple[int, ...], ...] | None = None
    dtype: torch.dtype = torch.float64
    kind: ContextAttention = "ring"

    @property
    def bounds(self) -> list[int]:
        """Of the whole batch seen as one row."""
        begins = self.begins or ((), ())
        return sorted({i * LENGTH + at for i, inner in enumerate(begins) for at in (0, *inner, LENGTH)})

    @property
    def documents(self) -> Documents | None:
        if self.begins is None:
            return None
        longest = max(b - a for a, b in pairwise(self.bounds))
        return Documents(torch.tensor(self.bounds, dtype=torch.int32), longest)


SEAMS = tuple(range(4, LENGTH, 4))  # every border of a chunk at cp 4, and so at cp 2
CASES = {
    "dense": Case(),
    "grouped heads": Case(8, 2),
    "one document": Case(8, 2, ((), ())),
    "bounds on seams": Case(8, 2, (SEAMS, (8, 16, 24))),
    "bounds before seams": Case(8, 2, (tuple(i - 1 for i in SEAMS), (7, 15, 23))),
    "bounds after seams": Case(8, 2, (tuple(i + 1 for i in SEAMS), (9, 17, 25))),
    "one token each": Case(4, 2, (tuple(range(1, LENGTH)), (31,))),
    "long and short": Case(4, 2, ((1, 30), (3, 13, 14))),
    "fp32": Case(8, 2, ((5, 20), (16,)), torch.float32),
    "bf16": Case(8, 2, ((5, 20), (16,)), torch.bfloat16),
}
CASES |= {f"{name}, exchanged": case._replace(kind="ulysses") for name, case in CASES.items()}
CASES["as many key heads as ranks or more, exchanged"] = Case(8, 4, ((5, 20), (16,)), kind="ulysses")


def tensors(case: Case) -> tuple[torch.Tensor, ...]:
    """q, k, v and the gradient of the output, of whole samples. Large scores, so that the pieces weigh very differently."""
    generator = torch.Generator().manual_seed(0)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    drawn = [torch.randn(SAMPLES, LENGTH, n, 16, dtype=torch.float64, generator=generator) for n in heads]
    return tuple((t * scale).to(case.dtype) for t, scale in zip(drawn, (4, 1, 1, 1), strict=True))


def plain_attention(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output, dq, dk, dv by torch's attention with a mask, whole."""
    q, k, v, dout = (t.to(dtype).transpose(1, 2) for t in tensors(case))
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    at = torch.arange(SAMPLES * LENGTH)
    document = torch.bucketize(at, torch.tensor(case.bounds), right=True).view(SAMPLES, 1, LENGTH)
    mask = (document[..., None] == document[..., None, :]) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    out = F.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True)
    return [t.transpose(1, 2).detach() for t in (out, *torch.autograd.grad(out, inputs, dout))]


def cut_attention(rank: int, world: int, case: Case) -> list[torch.Tensor]:
    """The same of this rank's tokens."""
    cp = create_mesh(cp=world).cp
    q, k, v, dout = (split_sequence(t, cp) for t in tensors(case))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    rope = Rope(q, q)  # plays no part in attend
    out = attend(*inputs, context_of(rope, case.documents, LENGTH // world, cp, case.kind))
    return [t.detach() for t in (out, *torch.autograd.grad(out, inputs, dout))]


def joined(parts: list[torch.Tensor], cp: int) -> torch.Tensor:
    """The whole samples from what each rank holds of them."""
    halves = {n: half for part, numbers in zip(parts, CHUNKS[cp], strict=True)
              for n, half in zip(numbers, part.chunk(2, 1), strict=True)}  # fmt: skip
    return torch.cat([halves[n] for n in range(2 * cp)], 1)


@pytest.fixture(scope="module", params=[2, 4])
def cut(request: pytest.FixtureRequest) -> dict[str, list[torch.Tensor]]:
    """Case → output, dq, dk, dv, joined."""
    cp: int = request.param
    found = run_cases(cut_attention, cp, {name: (case,) for name, case in CASES.items()})
    return {name: [joined(list(parts), cp) for parts in zip(*ranks, strict=True)] for name, ranks in found.items()}


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", CASES)
def test_attention_over_cut_samples_equals_plain_attention(name: str, cut: dict[str, list[torch.Tensor]]) -> None:
    case = CASES[name]
    truth = plain_attention(case, torch.float64)
    # Not exact in fp64 either: the sum over keys has another order. Narrow types: at most twice plain torch's error.
    plain = plain_attention(case, case.dtype)
    for what, ours, theirs, true in zip(("out", "dq", "dk", "dv"), cut[name], plain, truth, strict=True):
        assert ours.dtype == case.dtype
        bar = 1e-12 if case.dtype == torch.float64 else 2 * error(theirs, true)
        assert error(ours, true) <= bar, what


@pytest.mark.fast
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_token_has_one_rank_with_its_own_label_and_position(size: int) -> None:
    case = Case(begins=((5, 16), (8,)))
    tokens = torch.arange(SAMPLES * LENGTH).view(SAMPLES, LENGTH)
    labels = tokens + 1  # the next token, across a seam too
    groups = [Group(size, rank) for rank in range(size)]
    if size > 1:
        assert torch.equal(joined([split_sequence(tokens, cp) for cp in groups], size), tokens)
    starts = torch.tensor(case.bounds)
    for cp in groups:
        mine = split_sequence(tokens, cp)
        assert torch.equal(split_sequence(labels, cp), mine + 1)
        assert torch.equal(token_numbers(LENGTH // size, cp).expand_as(mine), mine % LENGTH)
        expected = mine - starts[torch.bucketize(mine, starts, right=True) - 1]
        assert torch.equal(positions_of((SAMPLES, LENGTH // size), case.documents, cp), expected)


@pytest.mark.fast
def test_samples_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ValueError, match="samples of 30 tokens cannot be cut in 2·cp = 4 chunks"):
        split_sequence(torch.zeros(1, 30), Group(2))


@pytest.mark.fast
def test_heads_that_cannot_be_spread_are_refused() -> None:
    q, k = torch.zeros(1, 8, 6, 4), torch.zeros(1, 8, 3, 4)
    with pytest.raises(ValueError, match="6 query heads cannot be spread over cp=4: take a multiple"):
        heads_for_tokens(q, k, k, Group(4))
    with pytest.raises(ValueError, match="3 key/value heads cannot be spread over cp=2"):
        heads_for_tokens(q, k, k, Group(2))


# ---- the trainer's own step ----

TARGETS = {
    "one in the first chunk": [[3], []],
    "one in the last chunk": [[], [LENGTH - 1]],
    "the last token of every chunk": [[*range(3, LENGTH, 4)], [*range(3, LENGTH, 4)]],
    "many in one sample, few in the other": [[*range(LENGTH)], [9]],
    "none": [[], []],
}
"""Unmasked labels of the two samples. With cp 4 a chunk is 4 tokens: most of these leave ranks without any target."""


def one_step(rank: int, world: int, targets: list[list[int]], kind: ContextAttention) -> dict[str, torch.Tensor]:
    """Evaluation before, then one update with a sample to a micro-batch: losses, counts and every gradient."""
    parallel = ParallelConfig(cp=world, context_attention=kind)
    mesh = create_mesh(cp=world)
    model = build_model(model_config(SMALL), mesh, dtype=torch.float64, device=CPU, seed=3, parallel=parallel)
    settings = OptimConfig(clip_norm=None, betas=(0.0, 0.0), eps=1.0)  # AdamW's first moment is the gradient itself
    optimizer = ReplicatedOptimizer(named_parameters(model), settings, mesh)
    tokens, labels = batch(SMALL["vocab_size"], SAMPLES, LENGTH)
    labels = torch.where(labels == -100, 7, labels)
    kept = torch.zeros_like(labels, dtype=torch.bool)
    for sample, at in enumerate(targets):
        kept[sample, at] = True
    bounds = torch.tensor([0, 5, 16, LENGTH], dtype=torch.int32)
    batches = [
        MicroBatch(tokens[i : i + 1], labels[i : i + 1].masked_fill(~kept[i : i + 1], -100), bounds, 16)
        for i in range(SAMPLES)
    ]
    step = TrainStep(model, optimizer, mesh, device=CPU)
    before = step.evaluate([batches])
    result = step.update(batches, lr=1e-3)
    gradients = {key: state[0] for key, state in optimizer.state_tensors().items() if "exp_avg." in key}
    assert len(gradients) == len(named_parameters(model))
    return {"evaluated": before, "loss": result.loss, "norm": result.grad_norm, "targets": result.targets, **gradients}


@pytest.fixture(scope="module")
def stepped() -> dict[int, dict[str, list[dict[str, torch.Tensor]]]]:
    """cp → case → what each rank found."""
    cases = {f"{name}, {kind}": (targets, kind) for name, targets in TARGETS.items() for kind in ("ring", "ulysses")}
    return {cp: run_cases(one_step, cp, cases) for cp in (1, 2, 4)}


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("cp", [2, 4])
def test_few_targets_count_as_in_one_process(cp: int, name: str, kind: str, stepped: dict[int, Any]) -> None:
    truth = stepped[1][f"{name}, {kind}"][0]
    assert truth["targets"] == max(sum(len(at) for at in TARGETS[name]), 1)
    for found in stepped[cp][f"{name}, {kind}"]:
        assert found.keys() == truth.keys()
        for what, tensor in found.items():
            assert float((tensor - truth[what]).double().norm()) <= 1e-11 * float(truth[what].double().norm()), (
                what
            )  # a NaN is not


# ---- schedules that split the backward pass ----


def split_backward(rank: int, world: int, kind: ContextAttention) -> tuple[list[int], float]:
    """Collectives of: forward, whole backward; forward, backward to the inputs, backward to the weights. And how far apart
    the gradients of both are."""
    mesh = create_mesh(cp=world)
    torch.manual_seed(0)
    project, back = torch.nn.Linear(32, 6 * 16, dtype=torch.float64), torch.nn.Linear(64, 32, dtype=torch.float64)
    weights = [*project.parameters(), *back.parameters()]
    x = split_sequence(torch.randn(1, LENGTH, 32, dtype=torch.float64), mesh.cp).requires_grad_()

    def forward() -> torch.Tensor:
        q, k, v = project(x).unflatten(2, (6, 16)).split([4, 1, 1], 2)
        context = context_of(Rope(q, q), None, LENGTH // world, mesh.cp, kind)
        return back(attend(q, k, v, context).flatten(2)) * 2  # a view could not leave a stage

    counts = []
    mesh.records.take()
    out = forward()
    counts.append(mesh.records.take().collectives)
    truth = torch.autograd.grad(out, [x, *weights], torch.ones_like(out))
    counts.append(mesh.records.take().collectives)
    out = forward()
    counts.append(mesh.records.take().collectives)
    (dx,), groups = stage_backward_input([out], [torch.ones_like(out)], [x], iter(weights))
    counts.append(mesh.records.take().collectives)
    stage_backward_weight(iter(weights), groups)
    counts.append(mesh.records.take().collectives)
    return counts, max(error(a, b) for a, b in zip([dx, *(w.grad for w in weights)], truth, strict=True))


def test_a_split_backward_pass_communicates_once() -> None:
    found = run_cases(split_backward, 2, {"ring": ("ring",), "ulysses": ("ulysses",)})
    # Ring of 2: one hop of keys and values forward; backward that again, and two of their gradients.
    for kind, expected in (("ring", [1, 3, 1, 3, 0]), ("ulysses", [2, 2, 2, 2, 0])):
        for counts, apart in found[kind]:
            assert counts == expected
            assert apart < 1e-14
