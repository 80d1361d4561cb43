"""Checkpoints of a class head load on other rank counts, and evaluation over all classes is exact there (tests 48 and 49)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opencoder.checkpoint import native
from opencoder.config import Config
from opencoder.data.classification import ClassificationDataset
from opencoder.errors import ConfigError
from opencoder.model.decoder import named_parameters
from opencoder.model.initialise import build_model
from opencoder.parallel.mesh import Mesh
from opencoder.train.class_loop import ClassTrainer
from opencoder.train.class_step import inputs_of
from opencoder.train.metrics import read_rows
from opencoder.train.state import tensors_of, weights_of
from tests.harness import run_ranks
from tests.train.class_cases import CLASSES, run, trainer_of, tree, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classes")
    write(path)
    return path


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, Any]:
    """A run of six steps on four ranks, its classes 26, 26, 26 and 25."""
    given = tree(folder, "at-4", head={"selection": "random", "rho": 0.5}, train={"precision": "fp32"})
    run_ranks(run, 4, given)
    return given


def all_logits(rank: int, world: int, given: dict[str, Any]) -> torch.Tensor:
    """(8, classes) of the run's newest state, of the first samples of the dataset: this rank's rows, gathered."""
    trainer = trainer_of(given, world)
    assert trainer.state.step == 6
    return logits_of(trainer, given)


def logits_of(trainer: ClassTrainer, given: dict[str, Any]) -> torch.Tensor:
    model = trainer.model.eval()
    dataset = ClassificationDataset(given["data"]["blend"][0]["prefix"])
    tokens = torch.zeros(8, 8, dtype=torch.int64)
    lengths = torch.zeros(8, dtype=torch.int64)
    for i in range(8):
        ids = torch.from_numpy(dataset.get(i).astype("int64"))[:8]
        tokens[i, : len(ids)], lengths[i] = ids, len(ids)
    with torch.no_grad():
        features = model.features(tokens, lengths)
        values, classes = model.topk(features, CLASSES)
    return torch.full((8, CLASSES), float("nan")).scatter_(1, classes, values)


def test_48_logits_are_identical_on_other_rank_counts_and_training_goes_on(
    saved: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    (at_4, *others) = run_ranks(all_logits, 4, saved)
    assert not at_4.isnan().any()
    assert all(torch.equal(at_4, other) for other in others)
    rows = read_rows(Path(saved["run_dir"]) / "metrics.jsonl")
    for world in (2, 3):
        found = run_ranks(all_logits, world, saved)
        assert all(torch.equal(at_4, logits) for logits in found), world
        # the batch of 24 divides by 2·world
        longer = {**saved, "run_dir": str(tmp_path / str(world)), "checkpoint": {"fork": saved["run_dir"]}}
        longer["train"] = {**saved["train"], "steps": 10}
        run_ranks(run, world, longer)
        after = read_rows(tmp_path / str(world) / "metrics.jsonl")
        assert [row["step"] for row in after] == list(range(7, 11))
        assert after[-1]["loss"] < rows[0]["loss"]


def test_every_rank_holds_its_rows_of_weights_and_state(saved: dict[str, Any]) -> None:
    """Tensor by tensor: what four ranks saved is what one rank reads and three ranks read, the optimizer's rows too."""
    (one,) = run_ranks(everything, 1, saved)
    assert {"lm_head.weight", "optim.exp_avg.lm_head.weight", "optim.exp_avg_sq.lm_head.weight"} <= set(one)
    assert one["lm_head.weight"][1].shape == (CLASSES, 16)
    assert float(one["optim.exp_avg.lm_head.weight"][1].abs().min(1).values.max()) > 0
    for world in (2, 3):
        for parts in run_ranks(everything, world, saved):
            for key, (where, part) in parts.items():
                assert torch.equal(part, one[key][1][where]), (world, key)


def everything(rank: int, world: int, given: dict[str, Any]) -> dict[str, tuple[Any, torch.Tensor]]:
    trainer = trainer_of(given, world)
    found = tensors_of(trainer.model, trainer.optimizer)
    return {key: (part[1].slice_of(trainer.mesh), part[0].detach().clone()) for key, part in found.items()}


@pytest.mark.parametrize(("key", "value"), [("classes", CLASSES + 1), ("dim", 15)])
def test_another_class_count_is_refused(saved: dict[str, Any], key: str, value: int, tmp_path: Path) -> None:
    then = saved["model"]["head"][key]
    other = {**saved, "model": {**saved["model"], "head": {**saved["model"]["head"], key: value}}}
    for given in (other, {**other, "run_dir": str(tmp_path / "fork"), "checkpoint": {"fork": saved["run_dir"]}}):
        with pytest.raises(ConfigError, match=f"model.head.{key}={value}, but checkpoint .* was written with {then}"):
            trainer_of(given)


def test_weights_of_another_run_come_with_the_order_of_its_classes(saved: dict[str, Any], tmp_path: Path) -> None:
    (there,) = run_ranks(all_logits, 1, saved)
    given = {**saved, "run_dir": str(tmp_path / "r"), "checkpoint": {"load": saved["run_dir"]}}
    given["train"] = {**saved["train"], "seed": 7}
    trainer = trainer_of(given)
    assert trainer.state.step == 0
    assert trainer.model.order == trainer_of(saved).model.order
    assert torch.equal(logits_of(trainer, given), there)


def test_an_encoder_begins_with_the_layers_of_a_language_model(folder: Path, tmp_path: Path) -> None:
    given = tree(folder, str(tmp_path / "r"), train={"precision": "fp32"})
    lm = Config.model_validate({"run_dir": str(tmp_path / "lm"), "model": {**given["model"], "head": {}}})
    decoder = build_model(lm.model, Mesh(), dtype=torch.float32, device=torch.device("cpu"), seed=5)
    native.save(Path(lm.run_dir), 1, weights_of(decoder), Mesh(), config=lm, state={"tokens": 0})
    given["checkpoint"] = {"load": lm.run_dir}
    model = trainer_of(given).model
    taken, expected = named_parameters(model), named_parameters(decoder)
    for key in expected.keys() - {"lm_head.weight"}:
        assert torch.equal(taken[key], expected[key]), key


# ---- top-1 and top-5 ----


def counted(rank: int, world: int, given: dict[str, Any], ties: bool) -> tuple[Any, Any, Any]:
    """The evaluation of the ranks, and the same from logits of all classes gathered on one."""
    trainer = trainer_of(given, world)
    model, head = trainer.model, trainer.model.lm_head
    with torch.no_grad():
        if ties:  # five rows each are the same: only the smallest of them can be first
            ids = torch.arange(head.first, head.first + len(head.weight))
            generator = torch.Generator().manual_seed(0)
            classes = ids if model.order is None else model.order.labels_of(ids)
            head.weight.copy_(torch.randn(CLASSES // 5 + 1, 16, generator=generator).double()[classes // 5])
    assert trainer.validation is not None
    trainer.evaluate(trainer.validation)
    model.eval()
    whole = head.groups.classes.gather_objects(head.weight.detach())
    matrix = torch.cat(whole)
    if model.order is not None:
        matrix = matrix[model.order.rows_of(torch.arange(CLASSES))]
    first = five = n = 0
    loss = 0.0
    with torch.no_grad():
        for batch in trainer.validation:
            for mb in batch:
                inputs, labels, lengths = inputs_of(mb, torch.device("cpu"))
                logits = model.features(inputs, lengths) @ matrix.T
                for row, y in zip(logits, labels.tolist(), strict=True):
                    if y == -100:
                        continue
                    better = (row > row[y]) | ((row == row[y]) & (torch.arange(CLASSES) < y))
                    first, five, n = first + int(better.sum() == 0), five + int(better.sum() < 5), n + 1
                    loss -= float(row.log_softmax(0)[y])
    totals = torch.tensor([loss, first, five, n], dtype=torch.float64)
    trainer.mesh.group(("dp", "cp")).all_reduce(totals)
    return trainer.evaluation, (totals[:3] / totals[3]).tolist(), int(totals[3])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("world", "tp", "permute"), [(1, 1, True), (2, 1, False), (4, 1, True), (4, 2, True)])
def test_49_top1_and_top5_equal_a_gathered_reference(
    world: int, tp: int, permute: bool, ties: bool, folder: Path, tmp_path: Path
) -> None:
    head = {"permute": permute, "class_group": "tp" if tp > 1 else "dp_cp"}
    given = tree(folder, str(tmp_path / "r"), features=True, head=head, parallel={"tp": tp})
    given["data"]["validation"] = str(folder / "features")
    given["train"] |= {"eval_every": 1000, "eval_samples": 101}
    for evaluation, (loss, first, five), samples in run_ranks(counted, world, given, ties):
        assert samples == 101
        assert evaluation.loss == pytest.approx(loss, rel=1e-9)
        assert (evaluation.top1, evaluation.top5) == (first, five)
        assert 0 < five < 1
