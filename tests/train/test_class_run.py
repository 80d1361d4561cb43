"""Training with a class head: the same at any layout, one clip factor and skip for backbone and class matrix, resumed and evaluated."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opencoder.data.classification import ClassificationDataset, Shuffled
from opencoder.errors import ConfigError, DataError
from opencoder.model.decoder import named_parameters
from opencoder.model.encoder import HEAD_KEY
from opencoder.train.__main__ import main
from opencoder.train.metrics import read_rows
from tests.harness import run_cases, run_ranks
from tests.train.class_cases import CLASSES, evaluated, run, trainer_of, tree, whole, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classes")
    write(path)
    return path


def rows_of(given: dict[str, Any]) -> list[dict[str, Any]]:
    return read_rows(Path(given["run_dir"]) / "metrics.jsonl")


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp 2": (2, {}),
    "dp 4, world": (4, {"head": {"class_group": "world"}}),
    "dp 2, sharded": (2, {"parallel": {"sharded_optimizer": True}}),
    "tp 2": (2, {"parallel": {"tp": 2}, "head": {"class_group": "tp"}}),
    "tp 2, dp 2": (4, {"parallel": {"tp": 2}, "head": {"class_group": "tp"}}),
    "dp 2, copies": (2, {"head": {"class_group": "tp"}}),
}


@pytest.mark.parametrize("features", [False, True])
def test_every_layout_equals_one_process(features: bool, folder: Path, tmp_path: Path) -> None:
    one = tree(folder, str(tmp_path / "one"), features=features)
    truth = whole(run_ranks(run, 1, one))
    expected = [(row["loss"], row["grad_norm"]) for row in rows_of(one)]
    assert expected[-1][0] < expected[0][0]
    assert max(norm for _, norm in expected) > 0.2  # so that clipping counts, by the norm of all
    layouts = LAYOUTS if features else {name: LAYOUTS[name] for name in ("dp 2, sharded", "tp 2, dp 2")}
    for world in (2, 4):
        cases = {
            n: tree(folder, str(tmp_path / n), features=features, **c) for n, (w, c) in layouts.items() if w == world
        }
        for name, ranks in run_cases(run, world, {n: (c,) for n, c in cases.items()}).items():
            for row, (loss, norm) in zip(rows_of(cases[name]), expected, strict=True):
                assert row["loss"] == pytest.approx(loss, rel=1e-10), name
                assert row["grad_norm"] == pytest.approx(norm, rel=1e-10), name
            for key, value in whole(ranks).items():
                assert float((value - truth[key]).norm() / truth[key].norm()) < 1e-9, (name, key)


def test_a_run_equals_plain_torch(folder: Path, tmp_path: Path) -> None:
    """Loss over whole logits, one clip by torch over all parameters, torch's AdamW."""
    given = tree(folder, str(tmp_path / "r"), features=True)
    ours = run(0, 1, given)
    model = trainer_of({**given, "run_dir": str(tmp_path / "s")}).model
    assert model.order is not None
    parameters = named_parameters(model)
    decayed = [p for p in parameters.values() if p.dim() > 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in parameters.values() if p.dim() == 1]}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    dataset = ClassificationDataset(folder / "features")
    shuffled = Shuffled(dataset, 1234)
    for step, row in enumerate(rows_of(given)):
        numbers = [shuffled.number(24 * step + i) for i in range(24)]
        inputs = torch.from_numpy(np.stack([dataset.get(n) for n in numbers]))
        labels = model.order.rows_of(torch.from_numpy(dataset.labels[numbers]))
        loss = torch.nn.functional.cross_entropy(model.features(inputs) @ model.lm_head.weight.T, labels)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.1)
        optimizer.step()
        assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-10)
        assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-10)
        assert norm > 0.1
    for key, (_, value) in ours.items():
        assert float((value - parameters[key]).norm() / parameters[key].norm()) < 1e-9, key


@pytest.mark.parametrize("selection", ["full", "random"])
def test_a_resumed_run_equals_an_undisturbed_one(selection: str, folder: Path, tmp_path: Path) -> None:
    head = {"selection": selection, "rho": 0.3}
    truth = run(0, 1, tree(folder, str(tmp_path / "whole"), head=head))
    half = tree(folder, str(tmp_path / "half"), head=head, train={"steps": 3})
    run(0, 1, half)
    half["train"]["steps"] = 6
    found = run(0, 1, half)
    assert [row["step"] for row in rows_of(half)] == list(range(1, 7))
    for key, (_, value) in found.items():
        assert torch.equal(value, truth[key][1]), key


def step_without_update(rank: int, world: int, given: dict[str, Any]) -> bool:
    """Whether a skipped step leaves every parameter and every state alone, and another does not."""
    trainer = trainer_of(given, world)
    _, micro_batches = next(trainer.data.batches(0))

    def tensors() -> dict[str, torch.Tensor]:
        from opencoder.train.state import tensors_of

        return {key: part[0].detach().clone() for key, part in tensors_of(trainer.model, trainer.optimizer).items()}

    before = tensors()
    trainer.train_step.guard = lambda *_: torch.tensor(True)
    trainer.train_step.update(micro_batches, lr=0.1)
    after = tensors()
    assert all(torch.equal(before[key], after[key]) for key in before)
    trainer.train_step.guard = None
    trainer.train_step.update(micro_batches, lr=0.1)
    return all(not torch.equal(before[key], tensor) for key, tensor in tensors().items())


def test_a_skipped_step_changes_neither_backbone_nor_class_matrix(folder: Path, tmp_path: Path) -> None:
    assert all(run_ranks(step_without_update, 2, tree(folder, str(tmp_path / "r"))))


def test_an_evaluation_counts_each_sample_once(folder: Path, tmp_path: Path) -> None:
    """103 samples in passes of 4: one is masked."""
    found = {}
    for world in (1, 2):
        given = tree(folder, str(tmp_path / str(world)), features=True, **evaluated(folder, features=True))
        given["train"] |= {"steps": 30, "eval_every": 30, "precision": "fp64"}
        given["optim"] |= {"lr": 0.03}
        run_ranks(run, world, given)
        found[world] = [
            {k: v for k, v in row.items() if k in ("valid_loss", "accuracy", "accuracy_top5")} for row in rows_of(given)
        ]
        assert [bool(row) for row in found[world]] == [False] * 29 + [True]
    for name, value in found[1][-1].items():
        assert found[2][-1][name] == pytest.approx(value, rel=1e-9)
    last = found[1][-1]
    assert 0.3 < last["accuracy"] < 0.8
    assert last["accuracy"] * CLASSES == pytest.approx(round(last["accuracy"] * CLASSES), abs=1e-9)
    assert last["accuracy"] <= last["accuracy_top5"] <= 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"head": {"classes": CLASSES - 1}},
            f"has {CLASSES} classes, model.head.classes={CLASSES - 1}: set it to {CLASSES}",
        ),
        ({"model": {"vocab_size": 59}}, "was made with a vocabulary of 60, model.vocab_size=59 is smaller"),
        (
            {"data": {"blend": [{"prefix": "features"}]}},
            "holds features, and model.encoder.input=tokens: set it to features",
        ),
        ({"data": {"blend": [{"prefix": "absent"}]}}, "absent.classification.json does not exist"),
    ],
)
def test_a_dataset_that_does_not_fit_is_refused(
    change: dict[str, Any], says: str, folder: Path, tmp_path: Path
) -> None:
    given = tree(folder, str(tmp_path / "r"), **{k: v for k, v in change.items() if k != "model"})
    given["model"] |= change.get("model", {})
    for entry in given["data"]["blend"]:
        entry["prefix"] = str(folder / entry["prefix"])
    with pytest.raises((ConfigError, DataError), match=says):
        trainer_of(given)


def test_a_width_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    given = tree(folder, str(tmp_path / "r"), features=True)
    given["model"]["encoder"] = {"input": "features", "width": 11}
    with pytest.raises(ConfigError, match=r"features of width 12, model.encoder.width=11: set it to 12"):
        trainer_of(given)


def test_the_position_goes_on_through_a_longer_run(folder: Path, tmp_path: Path) -> None:
    given = tree(folder, str(tmp_path / "r"), features=True, train={"steps": 2})
    run(0, 1, given)
    state = json.loads((tmp_path / "r" / "checkpoints" / "step_00000002" / "state.json").read_text())
    assert state["consumed_samples"] == 48
    assert state["blends"][0]["sources"][0]["samples"] == 48
    given["train"]["steps"] = 12
    longer = trainer_of(given)
    got = [mb for _, micro_batches in longer.data.batches(longer.state.step) for mb in micro_batches]
    once = trainer_of(tree(folder, str(tmp_path / "s"), features=True, train={"steps": 12}))
    expected = [mb for _, micro_batches in once.data.batches(2) for mb in micro_batches]
    assert len(got) == len(expected) == 120
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(got, expected, strict=True))


def test_the_commands_train_and_estimate(folder: Path, tmp_path: Path, capsys: Any) -> None:
    given = tree(folder, str(tmp_path / "r"), features=True, **evaluated(folder, features=True))
    given["train"] |= {"steps": 2, "global_batch_size": 24, "micro_batch_size": 2, "memory_check": "refuse"}
    (tmp_path / "c.yaml").write_text(json.dumps(given))
    command = [sys.executable, "-m", "opencoder.train", str(tmp_path / "c.yaml")]
    told = subprocess.run([*command, "data.workers=1"], capture_output=True, text=True, check=True, timeout=300).stdout
    assert re.search(r"step 2/2 .* valid_loss \d\.\d+  accuracy \d+\.\d+%", told)
    assert main([str(tmp_path / "c.yaml"), "--dry-run", "--world-size", "4"]) == 0
    assert f"classes           {CLASSES} × 16, 26 per rank, 26 scored in a step" in capsys.readouterr().out


def test_the_class_matrix_has_the_settings_of_its_group(folder: Path, tmp_path: Path) -> None:
    frozen = {"groups": [{"match": "lm_head.*", "lr_scale": 0.0, "weight_decay": 0.0}]}
    given = tree(folder, str(tmp_path / "r"), features=True, optim=frozen)
    trainer = trainer_of(given)
    before = {key: p.detach().clone() for key, p in named_parameters(trainer.model).items()}
    trainer.run()
    moved = {key for key, p in named_parameters(trainer.model).items() if not torch.equal(p, before[key])}
    assert moved == set(before) - {HEAD_KEY}
    assert trainer.model.lm_head.optimizer.optim.weight_decay == 0.0
