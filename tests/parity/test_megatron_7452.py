"""The silent errors of NVIDIA/Megatron-LM#7452 (found there by fuzzing combinations of parallelisms), and of the issues around
it, one test for each that this code could have.

| there | here |
|---|---|
| 1 label smoothing over a split vocabulary | refused; the z-loss, which is offered, equals that of the whole vocabulary |
| 2 whole logits taken for a shard: the loss is too large by log(tp) | the head hands on its own rows alone; both kinds of head |
| 3 a loss per token divided by each rank's own count | unequal counts over dp, cp and micro-batches |
| 4, 6, 7 recompute, gather or scatter over another tp group than the model's | groups that are not ranks 0 to tp − 1 |
| 8 a split parameter left out of the clipping norm (PR#5916, ROCm/TransformerEngine PR#715: counted too often) | each alone |
| 9 context parallelism divides by the rank's count (PR#7513) | one target in all, cp 2 and 4 |
| 10 a count summed in place is then taken for the rank's own (PR#7481) | sums leave alone what they were made of |
| masked tokens are counted (PR#7481) | N is the unmasked targets |
| evaluation is a mean of means (PR#7513) | unequal masks over batches and ranks |
| #1764 a rank without targets gives NaN | over dp, cp and pp, and a batch without any |

Not here because there is no such part: multi-token prediction (3, 4, 5 and 6 there; its norm and its roll of labels at the seams of
context parallelism), LLaVA's second model (7), learnable attention sinks (8: any split parameter stands for them), mixture of
experts (10 and the auxiliary losses)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from opencoder import kernels as K
from opencoder.config import OptimConfig, ParallelConfig
from opencoder.model.decoder import named_parameters
from opencoder.model.initialise import build_model
from opencoder.optim.optimizer import ReplicatedOptimizer
from opencoder.parallel.collectives import copy_to_group, gather_tokens, reduce_from_group, scatter_tokens
from opencoder.parallel.cross_entropy import vocab_parallel_cross_entropy
from opencoder.parallel.gradients import global_grad_norm
from opencoder.parallel.mesh import create_mesh, kv_replicas_of
from opencoder.parallel.placement import placement_of
from tests.harness import run_cases, run_ranks
from tests.model.cases import SMALL, model_config
from tests.parity.cases import LENGTH, SAMPLES, Case, micro_batches
from tests.parity.update import CPU, TOLERANCE, build, run_all

ONE = ((40,),)
"""A single target: most ranks and micro-batches have none."""
UNEQUAL = (tuple(range(1, 60)), (5,), (), (9, 33), tuple(range(2, 30)), (), (17,), (3, 4, 50))
"""62 of the first four samples, 32 of the rest; per sample from 0 to 59."""
SP = {"tp": 2, "sequence_parallel": True}
CASES: dict[str, Case] = {
    "unequal micro-batches": Case(1, SMALL, 1, targets=UNEQUAL),
    "unequal dp2": Case(2, SMALL, 4, targets=UNEQUAL),
    "unequal dp2 sharded": Case(2, SMALL, 1, {"sharded_optimizer": True}, targets=UNEQUAL),
    "unequal cp2": Case(2, SMALL, 2, {"cp": 2}, targets=UNEQUAL),
    "unequal pp2": Case(2, SMALL, 2, {"pp": 2}, targets=UNEQUAL),
    "one dp2": Case(2, SMALL, 4, targets=ONE),
    "one pp2": Case(2, SMALL, 2, {"pp": 2}, targets=ONE),
    "one cp2": Case(2, SMALL, 8, {"cp": 2}, targets=ONE),
    "one cp2 ulysses": Case(2, SMALL, 8, {"cp": 2, "context_attention": "ulysses"}, targets=ONE),
    "one cp4": Case(4, SMALL, 8, {"cp": 4}, targets=ONE),
    "group recompute all": Case(4, SMALL, 4, SP, documents=True, recompute="full"),
    "group recompute attention": Case(4, SMALL, 4, {**SP, "overlap": False}, recompute="attention"),
    "group recompute pp2": Case(4, SMALL, 2, {"pp": 2, **SP}, recompute="full"),
}


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, float]]:
    """Layout → error of every quantity against one process."""
    return run_all(CASES)


def wrong(table: dict[str, dict[str, float]], layout: str) -> list[str]:
    """What is not as in one process."""
    return [key for key, error in table[layout].items() if not error <= TOLERANCE]


# ---- 1, 2: the loss over a split vocabulary ----

T, M, V = 12, 16, 24


def head_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden state (T, M), output matrix (V, M), targets (T,) of which one is masked."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, M, generator=generator, dtype=torch.float64) for n in (T, V))
    targets = torch.randint(0, V, (T,), generator=generator)
    return hidden, weight, targets.index_fill(0, torch.tensor(3), -100)


def z_loss_of_shards(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token losses and the gradient of this rank's logits, with a z-loss."""
    hidden, weight, targets = head_inputs()
    logits = (hidden @ weight.chunk(world)[rank].T).requires_grad_()
    group = create_mesh(tp=world).tp
    losses = vocab_parallel_cross_entropy(logits, targets, vocab_start=rank * V // world, group=group, z_loss=0.1)
    return losses.tokens.detach(), torch.autograd.grad(losses.total, logits)[0]


def test_1_options_that_need_all_logits_are_refused_or_right() -> None:
    hidden, weight, targets = head_inputs()
    with pytest.raises(ValueError, match="a shard of the vocabulary does not know the mean of all logits"):
        K.linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1, combine=lambda *statistics: statistics[:2])
    logits = (hidden @ weight.T).requires_grad_()
    losses = F.cross_entropy(logits, targets, reduction="none")
    total = losses.sum() + 0.1 * (logits.logsumexp(1) ** 2)[targets != -100].sum()
    expected = torch.autograd.grad(total, logits)[0].chunk(2, 1)
    for (found, gradient), part in zip(run_ranks(z_loss_of_shards, 2), expected, strict=True):
        assert torch.allclose(found, losses, rtol=1e-12, atol=1e-14)
        assert torch.allclose(gradient, part, rtol=1e-12, atol=1e-14)


def loss_and_logits(rank: int, world: int, schedule: str) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The loss of the model, its logits on this rank, and the labels."""
    parallel = ParallelConfig.model_validate({"tp": world, "schedule": schedule})
    mesh = create_mesh(tp=world)
    model = build_model(model_config(SMALL), mesh, dtype=torch.float64, device=CPU, seed=3, parallel=parallel)
    (mb,) = micro_batches(Case(1, SMALL, SAMPLES), 250, 0, 1)
    with torch.no_grad():
        return float(model.loss(mb.tokens, mb.labels)[0]), model(mb.tokens), mb.labels


@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
def test_2_the_loss_has_no_log_tp_too_many(schedule: str) -> None:
    found = run_ranks(loss_and_logits, 2, schedule)
    logits = torch.cat([part for _, part, _ in found], 2)
    assert logits.shape[2] == 256  # each rank had its half, not the whole
    expected = float(F.cross_entropy(logits.flatten(0, 1), found[0][2].flatten(), reduction="sum"))
    assert [loss for loss, _, _ in found] == pytest.approx([expected] * 2, rel=1e-13)


# ---- 3, 9, 1764, evaluation: who counts the targets ----


@pytest.mark.parametrize("layout", [name for name in CASES if name.startswith("unequal")])
def test_3_a_token_weighs_the_same_on_every_rank_and_in_every_micro_batch(layout: str, table: Any) -> None:
    assert wrong(table, layout) == []


@pytest.mark.parametrize("layout", [name for name in CASES if name.startswith("one cp")])
def test_9_one_target_over_cp_has_its_whole_gradient(layout: str, table: Any) -> None:
    assert wrong(table, layout) == []


@pytest.mark.parametrize("layout", ["one dp2", "one pp2"])
def test_1764_ranks_and_micro_batches_without_targets_are_finite(layout: str, table: Any) -> None:
    assert wrong(table, layout) == []


def update_without_targets(rank: int, world: int, parallel: dict[str, Any]) -> tuple[list[float], float]:
    """Loss, norm, number of targets and evaluation of a batch without any; the largest gradient."""
    case = Case(world, SMALL, 2, parallel, targets=())
    settings = OptimConfig(betas=(0.0, 0.0))
    config, mesh, _, optimizer, step = build(case, settings)
    batch = micro_batches(case, config.vocab_size, mesh.dp.rank, mesh.dp.size)
    result = step.update(batch, lr=1e-3)
    moments = [part[0] for key, part in optimizer.state_tensors().items() if "exp_avg." in key]
    numbers = [result.loss, result.grad_norm, result.targets, step.evaluate([batch])]
    return [float(x) for x in numbers], max(float(m.abs().max()) for m in moments if m.numel())


def test_1764_a_batch_without_targets_changes_nothing() -> None:
    cases = {str(parallel): (parallel,) for parallel in ({}, {"cp": 2}, {"pp": 2}, {"sharded_optimizer": True})}
    for name, ranks in run_cases(update_without_targets, 2, cases).items():
        assert ranks == [([0.0, 0.0, 1.0, 0.0], 0.0)] * 2, name


def evaluations(rank: int, world: int, parallel: dict[str, Any]) -> list[float]:
    """The mean loss over batches with 59 targets, 1, none, and 35."""
    case = Case(world, SMALL, 1, parallel, targets=UNEQUAL)
    config, mesh, _, _, step = build(case, OptimConfig())
    batch = micro_batches(case, config.vocab_size, mesh.dp.rank, mesh.dp.size)
    cuts = [0, 1, 2, 3, SAMPLES] if mesh.dp.size == 1 else [0, 1, 3, 4]
    return [float(step.evaluate([batch[a:b] for a, b in pairwise(cuts)]))]


def test_evaluation_is_a_mean_over_tokens() -> None:
    truth = run_ranks(evaluations, 1, {})[0]
    cases = {str(parallel): (parallel,) for parallel in ({}, {"cp": 2}, {"pp": 2}, {"tp": 2})}
    for name, ranks in run_cases(evaluations, 2, cases).items():
        assert ranks == [pytest.approx(truth, rel=1e-13)] * 2, name


def test_masked_tokens_are_not_counted() -> None:
    total = sum(len(positions) for positions in UNEQUAL)
    found = run_cases(counted, 2, {"dp": ({},), "cp": ({"cp": 2},), "pp": ({"pp": 2},)})
    assert found == dict.fromkeys(found, [total] * 2)


def counted(rank: int, world: int, parallel: dict[str, Any]) -> int:
    case = Case(world, SMALL, 2, parallel, targets=UNEQUAL)
    config, mesh, _, _, step = build(case, OptimConfig())
    return int(step.update(micro_batches(case, config.vocab_size, mesh.dp.rank, mesh.dp.size), lr=1e-3).targets)


# ---- 4, 6, 7: the groups of gather, scatter and recompute ----


@pytest.mark.parametrize("layout", [name for name in CASES if name.startswith("group")])
def test_4_recompute_over_groups_that_do_not_begin_at_rank_0(layout: str, table: Any) -> None:
    assert wrong(table, layout) == []


def through_own_group(rank: int, world: int) -> tuple[list[int], list[int]]:
    """Each data-parallel rank has a sample of its own, split over tp: what comes back, gathered, then scattered."""
    mesh = create_mesh(tp=2)
    sample = torch.arange(4.0) + 10 * mesh.dp.rank
    mine = sample.chunk(2)[mesh.tp.rank].view(1, 2, 1)
    whole = gather_tokens(mine, mesh.tp)
    back = scatter_tokens(whole / 2, mesh.tp)
    return whole.flatten().int().tolist(), back.flatten().int().tolist()


def test_6_and_7_gather_and_scatter_stay_within_their_group() -> None:
    a, b = [0, 1, 2, 3], [10, 11, 12, 13]
    assert run_ranks(through_own_group, 4) == [(a, a[:2]), (a, a[2:]), (b, b[:2]), (b, b[2:])]


# ---- 8: the clipping norm ----


def norms_of_each(rank: int, world: int, parallel: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """Key → norm when its gradient is 1 and all others 0, and its number of values in the whole model."""
    config, tp = model_config(SMALL), parallel["tp"]
    mesh = create_mesh(tp=tp, kv_replicas=kv_replicas_of(config.kv_heads, tp))
    settings = ParallelConfig.model_validate(parallel)
    model = build_model(config, mesh, dtype=torch.float64, device=CPU, seed=3, parallel=settings)
    optimizer = ReplicatedOptimizer(named_parameters(model), OptimConfig(), mesh)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    found = {}
    for key, p in named_parameters(model).items():
        assert isinstance(p.grad, torch.Tensor)
        p.grad.fill_(1.0)
        norm = global_grad_norm(optimizer.gradients(), mesh)
        p.grad.zero_()
        found[key] = float(norm), math.prod(placement_of(p).global_shape)
    return found


def test_8_every_parameter_counts_once_in_the_clipping_norm() -> None:
    cases: dict[str, tuple[Any, ...]] = {"tp2-dp2-sp": (SP,), "tp4-kv2": ({"tp": 4},)}
    for name, ranks in run_cases(norms_of_each, 4, cases).items():
        for found in ranks:
            assert len(found) == 21
            for key, (norm, values) in found.items():
                assert norm == pytest.approx(math.sqrt(values), rel=1e-12), (name, key)


# ---- 10: sums in place ----


def left_alone(rank: int, world: int) -> list[bool]:
    """Whether sums over the ranks left what they were made of, this rank's own, as it was."""
    tp = create_mesh(tp=world).tp
    own = torch.full((2, 3), float(1 + rank), dtype=torch.float64)
    x, gradient = own.clone().requires_grad_(), own.clone()
    torch.autograd.grad(copy_to_group(x, tp), x, gradient)
    reduced = own.clone()
    summed = reduce_from_group(reduced, tp)
    hidden, weight, targets = head_inputs()
    logits = (hidden @ weight.chunk(world)[rank].T).requires_grad_()
    before, kept = logits.detach().clone(), targets.clone()
    vocab_parallel_cross_entropy(logits, targets, vocab_start=rank * V // world, group=tp).total.backward()
    case = Case(world, SMALL, 4, targets=UNEQUAL)
    config, mesh, model, _, step = build(case, OptimConfig())
    batch = micro_batches(case, config.vocab_size, mesh.dp.rank, mesh.dp.size)
    (mb,) = batch
    step.update(batch, lr=1e-3)
    tokens = model.lm_head.loss(torch.zeros(4, LENGTH, 64, dtype=torch.float64), mb.labels)[1]["tokens"]
    own_targets = sum(len(at) for at in UNEQUAL[4 * rank : 4 * rank + 4])
    return [
        torch.equal(gradient, own),
        torch.equal(reduced, own) and torch.equal(summed, torch.full_like(own, 3.0)),
        torch.equal(logits.detach(), before) and torch.equal(targets, kept),
        int(tokens) == int((mb.labels != -100).sum()) == own_targets,
    ]


def test_10_a_sum_over_the_ranks_leaves_the_own_share_alone() -> None:
    assert run_ranks(left_alone, 2) == [[True] * 4] * 2
