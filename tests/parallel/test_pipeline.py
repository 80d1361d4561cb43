"""Pipelines: what a stage is told and when, evaluation, 16-bit gradients, and runs that go on at another cut. That a step
equals one process stands in tests/parity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from opencoder.config import Config, OptimConfig, ParallelConfig
from opencoder.data.indexed import IndexedWriter
from opencoder.data.loader import MicroBatch
from opencoder.model.decoder import Decoder, Part, named_parameters
from opencoder.model.initialise import build_model
from opencoder.optim.optimizer import ReplicatedOptimizer
from opencoder.parallel.layout import stage_ranks
from opencoder.parallel.mesh import Mesh, create_mesh
from opencoder.parallel.pipeline import Pipeline, Shapes, Work, order_of_work
from opencoder.train.loop import Trainer
from opencoder.train.metrics import read_rows
from opencoder.train.pipeline_runner import Chunks, PipelineRunner, build_chunks, parts_of
from opencoder.train.step import TrainStep, inputs_of
from tests.harness import run_cases, run_ranks
from tests.model.cases import SMALL, model_config
from tests.parity.cases import Case, micro_batches

CPU = torch.device("cpu")
SCHEDULES: dict[str, dict[str, Any]] = {
    "1f1b": {"schedule": "1f1b"},
    "interleaved": {"schedule": "interleaved", "virtual_stages": 2},
    "zb": {"schedule": "zb", "virtual_stages": 2},
    "zb-one-stage": {"schedule": "zb"},
    "zbv": {"schedule": "zbv", "virtual_stages": 2},
}
WIDTH, ROWS = 8, 3


class Piece(nn.Module):
    """A stage that counts its forward passes; the last one gives a loss against `target`."""

    def __init__(self, number: int, last: bool) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
        self.last, self.passes, self.on_forward = last, 0, lambda: None

    def forward(self, x: torch.Tensor, *, target: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        self.on_forward()
        y = x + self.linear(x).tanh()
        return ((y - target) ** 2).sum() if self.last else y


class Alive:
    """Counts what has run forward and not backward."""

    now = most = 0

    def more(self) -> None:
        self.now += 1
        self.most = max(self.most, self.now)

    def fewer(self) -> None:
        self.now -= 1


def pieces_through(rank: int, world: int, kind: dict[str, Any], n: int, steps: int) -> dict[str, Any]:
    """Errors of the gradients, and what the stages were told, stage by stage in order."""
    pp = create_mesh(pp=world).pp
    ranks = stage_ranks(kind["schedule"], world, kind.get("virtual_stages", 1))
    pieces = [Piece(i, i == len(ranks) - 1) for i in range(len(ranks))]
    own = {i: piece for i, piece in enumerate(pieces) if ranks[i] == rank}
    told: list[tuple[str, int]] = []
    alive = Alive()
    for piece in own.values():
        piece.on_forward = alive.more

    def accumulated(stage: int) -> None:
        told.append(("accumulated", stage))
        alive.fewer()

    like = torch.empty(ROWS, WIDTH, dtype=torch.float64, device="meta")
    pipeline = Pipeline(
        own,
        ranks,
        Shapes(like, like.clone()),
        n,
        schedule=kind["schedule"],
        pp=pp,
        device=CPU,
        accumulated=accumulated,
        complete=lambda stage: told.append(("complete", stage)),
    )
    generator = torch.Generator().manual_seed(0)
    xs, ys = (torch.randn(n, ROWS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    for _ in range(steps):
        told.clear()
        for piece in own.values():
            piece.zero_grad()
            piece.passes = 0
        pipeline.run(list(xs), [{"target": y} for y in ys])
    held = [
        info.buffer
        for stage in pipeline.stages
        for infos in (*stage.args_recv_info.values(), *stage.grad_recv_info.values())
        for info in infos
        if info.buffer is not None
    ]
    truth = [Piece(i, i == len(ranks) - 1) for i in range(len(ranks))]
    for x, y in zip(xs, ys, strict=True):
        for piece in truth:
            x = piece(x, target=y)
        x.backward()
    errors = {}
    for i, piece in own.items():
        ours, theirs = piece.linear.weight.grad, truth[i].linear.weight.grad
        assert isinstance(ours, torch.Tensor)
        assert isinstance(theirs, torch.Tensor)
        errors[i] = float((ours - theirs).norm() / theirs.norm())
    return {
        "errors": errors,
        "told": told,
        "passes": {i: p.passes for i, p in own.items()},
        "held": len(held),
        "alive": alive.most,
    }


def most_alive(work: list[Work]) -> int:
    """The most micro-batches, each in its stage, that have run forward and whose gradients are not all there yet."""
    alive = most = 0
    for _, kind, _ in work:
        alive += {"F": 1, "B": -1, "I": 0, "W": -1}[kind]
        most = max(most, alive)
    return most


def test_what_a_rank_holds_in_flight_is_as_foretold() -> None:
    cases = {f"{name} {n}": (kind, n, 1) for name, kind in SCHEDULES.items() for n in (4, 9)}
    found = run_cases(pieces_through, 3, cases)
    foretold = {
        name: [most_alive(work) for work in order_of_work(kind["schedule"], 3, kind.get("virtual_stages", 1), n)]
        for name, (kind, n, _) in cases.items()
    }
    assert {name: [each["alive"] for each in ranks] for name, ranks in found.items()} == foretold


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_stage_runs_each_micro_batch_once_and_says_when_it_is_done(name: str) -> None:
    kind, n = SCHEDULES[name], 4
    stages = 2 * kind.get("virtual_stages", 1)
    found = run_ranks(pieces_through, 2, kind, n, 2)
    assert sorted(i for each in found for i in each["errors"]) == list(range(stages))
    for each in found:
        assert max(each["errors"].values()) < 1e-14
        # torch would run micro-batch 0 once more to learn shapes that it is not told
        assert each["passes"] == dict.fromkeys(each["errors"], n)
        assert each["held"] == 0
        for stage in each["errors"]:
            assert [what for what, i in each["told"] if i == stage] == ["accumulated"] * n + ["complete"]


# ---- the model ----

MODEL = model_config({**SMALL, "layers": 4})


def builder(mesh: Mesh, parallel: ParallelConfig, dtype: torch.dtype, recompute: str) -> Callable[..., Decoder]:
    def build(part: Part | None = None) -> Decoder:
        return build_model(
            MODEL, mesh, dtype=dtype, device=CPU, seed=3, recompute=recompute, part=part, parallel=parallel
        )

    return build


def batches() -> list[MicroBatch]:
    return micro_batches(Case(1, SMALL, 2, documents=True), MODEL.vocab_size, 0, 1)


def model_through(rank: int, world: int, settings: dict[str, Any], what: str, recompute: str = "none") -> Any:
    """One update in bf16 (its gradients), or evaluations between updates, or the initial weights: of the stages of this rank."""
    parallel = ParallelConfig.model_validate(settings)
    mesh = create_mesh(pp=parallel.pp)
    build = builder(mesh, parallel, torch.bfloat16 if what == "bf16" else torch.float64, recompute)
    model = build() if parallel.pp == 1 else build_chunks(MODEL, parallel, mesh, seq_len=64, build=build)
    if what == "weights":
        return {key: p.detach().clone() for key, p in named_parameters(model).items()}
    optimizer = ReplicatedOptimizer(named_parameters(model), OptimConfig(betas=(0.0, 0.0), clip_norm=None), mesh)
    runner = None
    if isinstance(model, Chunks):
        runner = PipelineRunner(model, optimizer, mesh, parallel, device=CPU, recompute=recompute != "none")
    step = TrainStep(model, optimizer, mesh, device=CPU, runner=runner)
    if what == "bf16":
        step.update(batches(), lr=1e-3)
        return {key: state["exp_avg"] for key, state in optimizer.state.items()}
    losses = [step.evaluate([batches()[:1]])]  # fewer micro-batches than stages
    for _ in range(2):
        losses += [step.update(batches(), lr=1e-2).loss, step.evaluate([batches()[:3]]), step.evaluate([batches()])]
    return [float(loss) for loss in losses]


def bf16_gradients(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Those of the same stages one after another in this process, each micro-batch's added in fp32."""
    parallel = ParallelConfig.model_validate(settings)
    build = builder(Mesh(), parallel, torch.bfloat16, "none")
    stages = [build(part) for part in parts_of(MODEL, parallel, seq_len=64)]
    parameters = {key: p for stage in stages for key, p in named_parameters(stage).items()}
    total = {key: torch.zeros_like(p, dtype=torch.float32) for key, p in parameters.items()}
    count = torch.stack([(mb.labels != -100).sum() for mb in batches()]).sum()
    for mb in batches():
        x, labels, documents = inputs_of(mb, CPU)
        for stage in stages[:-1]:
            x = stage.hidden(x, documents)
        (stages[-1].loss(x, labels, documents)[0] / count).backward()
        for key, p in parameters.items():
            assert isinstance(p.grad, torch.Tensor), key
            total[key] += p.grad
            p.grad = None
    return total


def joined(found: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Of all ranks; no key may be on two of them."""
    assert len({key for each in found for key in each}) == sum(len(each) for each in found)
    return {key: tensor for each in found for key, tensor in each.items()}


def unequal(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> set[str]:
    assert found.keys() == truth.keys()
    return {key for key in truth if not torch.equal(found[key], truth[key])}


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return run_cases(model_through, 1, {what: ({}, what) for what in ("weights", "evaluation")})


@pytest.mark.parametrize("name", SCHEDULES)
def test_stages_together_are_the_model_of_one_process(name: str, single: dict[str, Any]) -> None:
    parallel = {"pp": 2, **SCHEDULES[name]}
    cases: dict[str, tuple[Any, ...]] = {what: (parallel, what) for what in ("weights", "bf16", "evaluation")}
    found = run_cases(model_through, 2, cases | {"recompute": (parallel, "bf16", "full")})

    weights = joined(found["weights"])
    assert unequal(weights, single["weights"][0]) == set()
    matrices = [p for key, p in weights.items() if key.endswith("q_proj.weight")]
    assert len(matrices) == MODEL.layers
    assert not any(torch.equal(a, b) for i, a in enumerate(matrices) for b in matrices[:i])

    truth = bf16_gradients(parallel)
    assert unequal(joined(found["bf16"]), truth) == set()
    assert unequal(joined(found["recompute"]), truth) == set()

    for losses in found["evaluation"]:
        assert losses == pytest.approx(single["evaluation"][0], rel=1e-12)


# ---- whole runs ----


def train(rank: int, world: int, tree: dict[str, Any], until: int) -> None:
    """The run of `tree`, or its continuation, up to step `until`."""
    config = Config.model_validate(tree)
    trainer = Trainer(config, create_mesh(pp=config.parallel.pp), CPU)
    trainer.total_steps = until
    trainer.run()


def test_a_run_goes_on_with_other_stages_and_with_none(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "d", np.uint16) as writer:
        for i in range(60):
            writer.add_document([(3 * i + j) % 250 for j in range(20 + i % 30)])
    tree: dict[str, Any] = {
        "model": {**SMALL, "layers": 4},
        "data": {
            "blend": [{"prefix": str(tmp_path / "d")}],
            "seq_len": 32,
            "document_mask": True,
            "split": "80,20,0",
        },
        "train": {
            "steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp64", "eval_every": 1,
            "eval_samples": 6, "device": "cpu",
        },
        "optim": {"lr": 1e-3, "schedule": "constant"},
        "log": {"tensorboard": False, "peak_tflops": 1.0},
    }  # fmt: skip
    whole, cut = ({**tree, "run_dir": str(tmp_path / name)} for name in ("whole", "cut"))
    run_ranks(train, 1, whole, 4)
    zbv = {"pp": 2, "virtual_stages": 2, "schedule": "zbv"}
    pieces: list[dict[str, Any]] = [{"pp": 2}, {"pp": 1}, {**zbv, "layout": [1, 1, 2, 0]}, {"pp": 2, "layout": [3, 1]}]
    for step, parallel in enumerate(pieces, 1):
        run_ranks(train, parallel["pp"], {**cut, "parallel": parallel}, step)
    rows, truth = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("cut", "whole"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm", "valid_loss"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in truth], rel=1e-9), name
    # the utilisation counts the whole model, whatever a rank holds of it
    flops = [row["mfu"] / row["tokens_per_s"] * parallel["pp"] for row, parallel in zip(rows, pieces, strict=True)]
    assert flops == pytest.approx([truth[0]["mfu"] / truth[0]["tokens_per_s"]] * 4)
