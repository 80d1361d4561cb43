"""The sharded optimizer against the unsharded one through the trainer's own step: values, memory, collectives, overlap,
checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opencoder.checkpoint import native
from opencoder.checkpoint.parts import global_part
from opencoder.config import Config, OptimConfig
from opencoder.model.decoder import Decoder, named_parameters
from opencoder.model.initialise import build_model
from opencoder.optim.base import Optimizer
from opencoder.optim.build import build_optimizer
from opencoder.optim.sharded import ShardedOptimizer
from opencoder.parallel import gradients
from opencoder.parallel.mesh import Mesh, create_mesh
from opencoder.parallel.placement import placement_of
from opencoder.train.step import TrainStep
from tests.harness import run_cases, run_ranks
from tests.model.cases import SMALL, model_config
from tests.parity.cases import Case, micro_batches

CPU = torch.device("cpu")
SETTINGS = OptimConfig(clip_norm=0.1, weight_decay=0.1)
BATCH = Case(1, SMALL, micro_batch=1)


def build(
    tp: int, sharded: bool, dtype: torch.dtype, config: OptimConfig = SETTINGS
) -> tuple[Mesh, Decoder, Optimizer, TrainStep]:
    gradients.BUCKET_BYTES = 40_000 if dtype == torch.float64 else 20_000  # several buckets
    mesh = create_mesh(tp=tp)
    model = build_model(model_config(SMALL), mesh, dtype=dtype, device=CPU, seed=3)
    optimizer = build_optimizer(named_parameters(model), config, mesh, sharded=sharded, modules=[model])
    return mesh, model, optimizer, TrainStep(model, optimizer, mesh, device=CPU)


def updates(step: TrainStep, first: int, last: int) -> list[float]:
    """Updates `first` … `last` − 1; their gradient norms."""
    mesh = step.mesh
    batch = micro_batches(BATCH, 250, mesh.dp.rank, mesh.dp.size)
    norms = []
    for i in range(first, last):
        mesh.records.step = i + 1
        turned = [mb._replace(tokens=mb.tokens.roll(i, 1), labels=mb.labels.roll(i, 1)) for mb in batch]
        norms.append(float(step.update(turned, lr=1e-2).grad_norm))
    return norms


def parts(mesh: Mesh, model: Decoder, optimizer: Optimizer) -> dict[str, list[tuple[tuple[int, ...], torch.Tensor]]]:
    """Weights and state: key → (offsets in the whole tensor, values)."""
    tensors = {**optimizer.state_tensors(), **{k: (p, placement_of(p)) for k, p in named_parameters(model).items()}}
    return {k: [(at, t.clone()) for at, t in global_part(part, mesh).boxes.items()] for k, part in tensors.items()}


def trained(rank: int, world: int, tp: int, sharded: bool, dtype: torch.dtype, config: OptimConfig) -> Any:
    mesh, model, optimizer, step = build(tp, sharded, dtype, config)
    return updates(step, 0, 5), parts(mesh, model, optimizer)


def whole(results: list[Any]) -> dict[str, torch.Tensor]:
    """The global tensors, put together from all ranks. Every element must be on some rank."""
    found: dict[str, torch.Tensor] = {}
    for _, one in results:
        for key, boxes in one.items():
            for at, values in boxes:
                shape = [a + n for a, n in zip(at, values.shape, strict=True)]
                if key not in found or any(a > b for a, b in zip(shape, found[key].shape, strict=True)):
                    old = found.get(key)
                    size = shape if old is None else [max(a, b) for a, b in zip(shape, old.shape, strict=True)]
                    found[key] = torch.full(size, float("nan"), dtype=values.dtype)
                    if old is not None:
                        found[key][tuple(slice(0, n) for n in old.shape)] = old
                found[key][tuple(slice(a, a + n) for a, n in zip(at, values.shape, strict=True))] = values
    assert not any(t.isnan().any() for t in found.values())
    return found


@pytest.mark.parametrize(("world", "tp"), [(2, 1), (4, 1), (4, 2)], ids=["dp2", "dp4", "dp2-tp2"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_five_steps_equal_the_unsharded_optimizer(world: int, tp: int, name: str) -> None:
    groups = [{"match": "*.mlp.*", "lr_scale": 0.5, "weight_decay": 0.3}]
    config = OptimConfig(name=name, clip_norm=0.1, weight_decay=0.1, groups=groups)
    found = run_cases(trained, world, {str(sharded): (tp, sharded, torch.float64, config) for sharded in (False, True)})
    truth = whole(found["False"])
    ours = whole(found["True"])
    assert ours.keys() == truth.keys()
    for key, tensor in truth.items():
        assert (ours[key] - tensor).norm() <= 1e-13 * tensor.norm(), key
    for norms, _ in found["True"]:
        assert norms == pytest.approx(found["False"][0][0], rel=1e-13)
        assert norms == found["True"][0][0]


def test_16_bit_weights_follow_sharded_masters_bit_by_bit() -> None:
    config = OptimConfig(clip_norm=None)
    cases = {str(sharded): (1, sharded, torch.bfloat16, config) for sharded in (False, True)}
    found = run_cases(trained, 2, cases)
    truth, ours = whole(found["False"]), whole(found["True"])
    assert any(key.startswith("optim.master.") for key in ours)
    assert all(torch.equal(ours[key], tensor) for key, tensor in truth.items())


def twice(rank: int, world: int) -> bool:
    a, b = (trained(rank, world, 1, True, torch.float32, SETTINGS) for _ in range(2))
    return a[0] == b[0] and all(
        torch.equal(x, y) for k in a[1] for (_, x), (_, y) in zip(a[1][k], b[1][k], strict=True)
    )


def test_two_runs_have_the_same_bits() -> None:
    assert all(run_ranks(twice, 4))


def communicated(rank: int, world: int) -> dict[str, int]:
    _, _, optimizer, step = build(1, True, torch.float64)
    updates(step, 0, 2)
    optimizer.wait_weights()
    assert isinstance(optimizer, ShardedOptimizer)
    counts = {"buckets": len(optimizer.buckets.buckets)}
    for record in step.mesh.records.recent():
        if record.step == 2:
            counts[record.operation] = counts.get(record.operation, 0) + 1
    return counts


def test_four_micro_batches_cost_one_reduction_of_each_bucket() -> None:
    for found in run_ranks(communicated, 2):  # 8 samples: 4 micro-batches on each of 2 ranks
        assert found["buckets"] > 3
        assert found["reduce_scatter"] == found["all_gather"] == found["buckets"]
        assert found["all_reduce"] == 3, "the number of targets, the norm, the loss"


def held(rank: int, world: int, dtype: torch.dtype) -> dict[str, int]:
    _, model, optimizer, step = build(1, True, dtype)
    updates(step, 0, 1)
    assert isinstance(optimizer, ShardedOptimizer)
    tensors = [*model.parameters(), *optimizer._gradients.values()]
    for piece in optimizer.pieces.values():
        tensors += [piece.master, *piece.state.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "said": optimizer.state_bytes(),
        "measured": sum(storages.values()),
    }


@pytest.mark.parametrize(
    ("dtype", "weights", "main", "shared"),
    [(torch.bfloat16, 2, 4, 12), (torch.float32, 4, 4, 8), (torch.float64, 8, 8, 16)],
    ids=["bf16", "fp32", "fp64"],
)
def test_memory_is_that_of_the_formula(dtype: torch.dtype, weights: int, main: int, shared: int) -> None:
    for found in run_ranks(held, 4, dtype):
        formula = found["parameters"] * (weights + main + shared / 4)
        assert found["said"] == found["measured"]
        assert found["said"] == pytest.approx(formula, rel=0.05)


def overlapped(rank: int, world: int) -> dict[str, Any]:
    mesh, model, optimizer, _ = build(1, True, torch.float32)
    assert isinstance(optimizer, ShardedOptimizer)
    seen: dict[str, Any] = {"buckets": len(optimizer.buckets.buckets)}
    tokens, labels = (getattr(micro_batches(BATCH, 250, rank, world)[0], name) for name in ("tokens", "labels"))

    def count(operation: str, *, finished: bool | None = None) -> int:
        records = [r for r in mesh.records.recent() if r.operation == operation]
        return sum(finished is None or (r.finished is not None) == finished for r in records)

    def note(_: torch.Tensor) -> None:
        seen.setdefault("started before the embedding's gradient", []).append(count("reduce_scatter"))

    model.embed_tokens.weight.register_hook(note)
    for last in (False, True):
        if last:
            optimizer.last_backward()
        model.loss(tokens, labels)[0].backward()
        seen.setdefault("started after backward", []).append(count("reduce_scatter"))
    optimizer.finish_reduction()
    optimizer.step(lr=1e-2)
    with torch.no_grad():
        seen["gathers after the step"] = count("all_gather", finished=False), count("all_gather")
        model.embed_tokens(tokens)
        seen["finished after the embedding"] = count("all_gather", finished=True)
        model.loss(tokens, labels)
        seen["finished after the forward pass"] = count("all_gather", finished=True)
    return seen


def test_communication_runs_beside_backward_and_forward() -> None:
    for seen in run_ranks(overlapped, 2):
        buckets = seen["buckets"]
        assert seen["started after backward"] == [0, buckets]
        before, during = seen["started before the embedding's gradient"]
        assert before == 0
        assert 0 < during < buckets
        # Of four that may be under way, none was waited for by step().
        assert seen["gathers after the step"] == (buckets, buckets)
        assert seen["finished after the embedding"] == 1
        assert seen["finished after the forward pass"] == buckets


def stale(rank: int, world: int) -> str:
    _, model, optimizer, step = build(1, True, torch.float32)
    updates(step, 0, 1)
    model.norm._forward_pre_hooks.clear()  # as if another module read these weights
    with pytest.raises(RuntimeError, match="may have been stale") as error:
        updates(step, 1, 2)
    optimizer.wait_weights()
    return str(error.value)


def test_weights_that_were_not_waited_for_are_noticed() -> None:
    assert all("model.norm.weight" in text or "lm_head.weight" in text for text in run_ranks(stale, 2))


# ---- checkpoints ----


def saved_after_two(rank: int, world: int, sharded: bool, dtype: torch.dtype, folder: str) -> None:
    mesh, model, optimizer, step = build(1, sharded, dtype)
    updates(step, 0, 2)
    config = Config.model_validate({"run_dir": folder, "model": model.config.model_dump()})
    weights = {k: (p, placement_of(p)) for k, p in named_parameters(model).items()}
    native.save(Path(folder), 2, {**weights, **optimizer.state_tensors()}, mesh, config=config, state={"tokens": 0})


def resumed(rank: int, world: int, sharded: bool, dtype: torch.dtype, folder: str, steps: int) -> Any:
    mesh, model, optimizer, step = build(1, sharded, dtype)
    weights = {k: (p, placement_of(p)) for k, p in named_parameters(model).items()}
    tensors = {**weights, **optimizer.state_tensors()}
    native.load_tensors(Path(folder) / "checkpoints" / "step_00000002", tensors, mesh)
    optimizer.set_step_count(2)
    return updates(step, 2, 2 + steps), parts(mesh, model, optimizer)


def unbroken(rank: int, world: int, dtype: torch.dtype) -> Any:
    mesh, model, optimizer, step = build(1, False, dtype)
    return updates(step, 0, 4), parts(mesh, model, optimizer)


@pytest.mark.parametrize(
    ("saved_at", "resumed_at"),
    [((4, True), (2, True)), ((2, True), (4, True)), ((2, True), (1, False)), ((2, False), (2, True))],
    ids=["dp4-to-dp2", "dp2-to-dp4", "to-unsharded", "from-unsharded"],
)
def test_a_checkpoint_goes_on_at_another_sharding(
    saved_at: tuple[int, bool], resumed_at: tuple[int, bool], tmp_path: Path
) -> None:
    truth = whole(run_ranks(unbroken, 1, torch.float64))
    run_ranks(saved_after_two, saved_at[0], saved_at[1], torch.float64, str(tmp_path))
    found = whole(run_ranks(resumed, resumed_at[0], resumed_at[1], torch.float64, str(tmp_path), 2))
    assert found.keys() == truth.keys()
    for key, tensor in truth.items():
        assert (found[key] - tensor).norm() <= 1e-12 * tensor.norm(), key


def test_16_bit_state_is_the_same_bits_at_any_sharding(tmp_path: Path) -> None:
    run_ranks(saved_after_two, 4, True, torch.bfloat16, str(tmp_path))
    truth = whole(run_ranks(resumed, 1, False, torch.bfloat16, str(tmp_path), 0))
    found = whole(run_ranks(resumed, 2, True, torch.bfloat16, str(tmp_path), 0))
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in truth.items())
