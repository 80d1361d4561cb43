"""The optimizer against torch's own, with clipping, decay groups, master weights and a resumed step count."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opencoder.config import OptimConfig
from opencoder.errors import ConfigError
from opencoder.optim.optimizer import ReplicatedOptimizer
from opencoder.optim.update import check_groups
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.placement import place, replicated

pytestmark = pytest.mark.fast


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.layers.0.mlp.up_proj.weight": (6, 4), "model.norm.weight": (4,)}
    return {
        key: place(nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)), replicated(shape))
        for key, shape in shapes.items()
    }  # fmt: skip


def gradient_of(p: torch.Tensor, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + p.numel())
    return torch.randn(p.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_equals_torch(name: str, clip_norm: float | None) -> None:
    config = OptimConfig(name=name, clip_norm=clip_norm, weight_decay=0.1, betas=(0.9, 0.95), momentum=0.9)
    mine, theirs = parameters(torch.float64), parameters(torch.float64)
    optimizer = ReplicatedOptimizer(mine, config, Mesh())
    matrix, norm = theirs.values()
    groups = [{"params": [matrix], "weight_decay": 0.1}, {"params": [norm], "weight_decay": 0.0}]
    peer = (
        torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=config.eps)
        if name == "adamw"
        else torch.optim.SGD(groups, momentum=0.9)
    )
    for step in range(1, 4):
        for p in (*mine.values(), *theirs.values()):
            p.grad = gradient_of(p, step)
        total = torch.nn.utils.clip_grad_norm_([matrix, norm], clip_norm or 1e9)
        found = optimizer.finish_reduction()
        assert torch.allclose(found, total, rtol=1e-12)
        clip = optimizer.step(lr=0.01 * step)
        assert float(clip) == (1.0 if clip_norm is None else pytest.approx(clip_norm / (float(total) + 1e-6)))
        for group in peer.param_groups:
            group["lr"] = 0.01 * step
        peer.step()
    for a, b in zip(mine.values(), theirs.values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
        assert a.grad is None


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_16_bit_parameters_follow_their_fp32_masters(name: str) -> None:
    config = OptimConfig(name=name, clip_norm=None, weight_decay=0.0)
    narrow = parameters(torch.bfloat16)
    wide = {key: place(nn.Parameter(p.detach().float()), replicated(p.shape)) for key, p in narrow.items()}
    optimizers = [ReplicatedOptimizer(ps, config, Mesh()) for ps in (narrow, wide)]
    for step in range(1, 4):
        for ps, optimizer in zip((narrow, wide), optimizers, strict=True):
            for p in ps.values():
                p.grad = gradient_of(p, step).bfloat16().to(p.dtype)
            optimizer.fold_gradients()
            optimizer.finish_reduction()
            optimizer.step(lr=1e-4)
    for key, p in narrow.items():
        assert torch.equal(optimizers[0].masters[key], wide[key])
        assert torch.equal(p, wide[key].bfloat16())


GROUPS = [
    {"match": "*.up_proj.*", "lr_scale": 0.5, "weight_decay": 0.0},
    {"match": "*.mlp.*", "lr_scale": 3.0},
    {"match": "*norm.weight", "weight_decay": 0.3},
]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_groups_equal_those_of_torch(name: str) -> None:
    config = OptimConfig(name=name, clip_norm=None, weight_decay=0.1, momentum=0.9, groups=GROUPS)
    mine, theirs = parameters(torch.float64), parameters(torch.float64)
    optimizer = ReplicatedOptimizer(mine, config, Mesh())
    matrix, norm = theirs.values()
    groups = [
        {"params": [matrix], "lr": 0.005, "weight_decay": 0.0},  # the first match counts
        {"params": [norm], "lr": 0.01, "weight_decay": 0.3},
    ]
    peer = (
        torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)
        if name == "adamw"
        else torch.optim.SGD(groups, momentum=0.9)
    )
    for step in range(1, 4):
        for p in (*mine.values(), *theirs.values()):
            p.grad = gradient_of(p, step)
        optimizer.finish_reduction()
        optimizer.step(lr=0.01)
        peer.step()
    for a, b in zip(mine.values(), theirs.values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (["*.mpl.*"], r"optim.groups.0: match='\*.mpl.\*' matches no parameter"),
        (
            ["*.mlp.*", "*.up_proj.*"],
            r"optim.groups.1: all that match='\*.up_proj.\*' matches belongs to a group before it",
        ),
    ],
)
def test_a_group_without_effect_is_refused(patterns: list[str], says: str) -> None:
    config = OptimConfig(groups=[{"match": pattern} for pattern in patterns])
    with pytest.raises(ConfigError, match=says):
        check_groups(config, parameters(torch.float32))
    check_groups(OptimConfig(groups=GROUPS[:1] + GROUPS[2:]), parameters(torch.float32))


def test_a_restored_step_count_and_state_go_on_like_an_unbroken_run() -> None:
    config = OptimConfig(clip_norm=None)
    whole, part, rest = (parameters(torch.float64) for _ in range(3))
    runs = [ReplicatedOptimizer(ps, config, Mesh()) for ps in (whole, part, rest)]

    def update(ps: dict[str, nn.Parameter], optimizer: ReplicatedOptimizer, step: int) -> None:
        for p in ps.values():
            p.grad = gradient_of(p, step)
        optimizer.finish_reduction()
        optimizer.step(lr=1e-2)

    for step in (1, 2, 3):
        update(whole, runs[0], step)
    for step in (1, 2):
        update(part, runs[1], step)
    for key, (tensor, _) in runs[1].state_tensors().items():
        runs[2].state_tensors()[key][0].copy_(tensor)
    for key, p in part.items():
        rest[key].data.copy_(p.data)
    runs[2].set_step_count(2)
    update(rest, runs[2], 3)
    assert all(torch.equal(rest[key], whole[key]) for key in whole)


def test_a_parameter_without_a_gradient_is_a_defect() -> None:
    with pytest.raises(RuntimeError, match=r"no gradient for model.layers.0.mlp.up_proj.weight"):
        ReplicatedOptimizer(parameters(torch.float32), OptimConfig(), Mesh()).finish_reduction()


def test_a_step_needs_the_reduction_before_it() -> None:
    with pytest.raises(RuntimeError, match=r"step\(\) before finish_reduction\(\)"):
        ReplicatedOptimizer(parameters(torch.float32), OptimConfig(), Mesh()).step(lr=1e-2)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_skipped_step_leaves_weights_and_state(name: str, dtype: torch.dtype) -> None:
    ps = parameters(dtype)
    optimizer = ReplicatedOptimizer(ps, OptimConfig(name=name), Mesh())

    def update(step: int, poison: float, skip: bool) -> None:
        for p in ps.values():
            p.grad = gradient_of(p, step).to(dtype) * poison
        optimizer.fold_gradients()
        optimizer.finish_reduction()
        optimizer.step(lr=1e-2, skip=torch.tensor(skip))

    def everything() -> list[torch.Tensor]:
        tensors = [*ps.values(), *(t for t, _ in optimizer.state_tensors().values())]
        return [t.detach().clone() for t in tensors]

    update(1, 1.0, False)
    before = everything()
    update(2, float("nan"), True)
    assert all(torch.equal(a, b) for a, b in zip(everything(), before, strict=True))
    assert optimizer.steps == 2
    assert all(m.grad is None for m in optimizer.masters.values())
    update(3, 1.0, False)
    assert not any(torch.equal(a, b) for a, b in zip(everything(), before, strict=True))


def test_masters_follow_loaded_weights() -> None:
    ps = parameters(torch.bfloat16)
    optimizer = ReplicatedOptimizer(ps, OptimConfig(), Mesh())
    for p in ps.values():
        p.data.fill_(0.5)
    optimizer.weights_changed()
    assert all((master == 0.5).all() for master in optimizer.masters.values())


def test_gradients_of_some_parameters_are_folded_alone() -> None:
    ps = parameters(torch.bfloat16)
    optimizer = ReplicatedOptimizer(ps, OptimConfig(), Mesh())
    for p in ps.values():
        p.grad = torch.ones_like(p)
    matrix, norm = ps
    optimizer.fold_gradients([norm])
    assert optimizer.masters[norm].grad is not None
    assert optimizer.masters[matrix].grad is None
    assert ps[matrix].grad is not None
