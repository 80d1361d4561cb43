"""Losses by source and by language, and what the z-loss adds, at every layout those of one process that looks at whole
logits. What a label is from can be told by its number there (tests/data/test_groups.py)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from opencoder.config import Config
from opencoder.data.indexed import IndexedDataset
from opencoder.model.initialise import build_model
from opencoder.parallel.mesh import Mesh, create_mesh
from opencoder.train.data import TrainingData, plan_stages
from opencoder.train.loop import Trainer
from opencoder.train.metrics import MetricsLog, read_rows
from opencoder.train.step import inputs_of
from tests.data.test_groups import blend
from tests.harness import run_cases
from tests.model.cases import SMALL

CPU = torch.device("cpu")
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"tp": 2, "sequence_parallel": True},
    "cp2": {"cp": 2},
    "pp2": {"pp": 2},
    "pp2-zb": {"pp": 2, "schedule": "zb"},
    "pp2-zbv": {"pp": 2, "virtual_stages": 2, "schedule": "zbv"},
}


def tree(folder: Path) -> dict[str, Any]:
    return {
        "run_dir": str(folder / "run"),
        "model": SMALL,
        "data": {
            "blend": [{"prefix": prefix, "weight": weight} for prefix, weight in blend(folder)],
            "seq_len": 32, "document_mask": True,
        },
        "train": {
            "steps": 2, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp64", "z_loss": 1e-3,
            "device": "cpu",
        },
        "optim": {"lr": 1e-200, "min_lr": 0, "schedule": "constant"},  # the weights stay what they are
        "log": {"every": 2, "tensorboard": False, "peak_tflops": 1.0},
    }  # fmt: skip


def trained(rank: int, world: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    config = Config.model_validate(settings)
    p = config.parallel
    mesh = create_mesh(tp=p.tp, pp=p.pp, cp=p.cp)
    if 0 < mesh.pp.rank < mesh.pp.size - 1:
        IndexedDataset.get = no_tokens  # type: ignore[method-assign]
    Trainer(config, mesh, CPU).run()
    return read_rows(Path(config.run_dir) / "metrics.jsonl")


def no_tokens(*_: Any) -> Any:
    raise AssertionError("a rank between the ends of the pipeline reads tokens")


def expected(settings: dict[str, Any]) -> dict[str, Any]:
    """Of step 2, from whole logits."""
    config = Config.model_validate(settings)
    model = build_model(config.model, Mesh(), dtype=torch.float64, device=CPU, seed=config.train.seed)
    _, step = next(TrainingData(config, plan_stages(config), Mesh(), step=1).batches(1))
    a, b = (entry.prefix for entry in config.data.blend)
    kinds = [(a, "python"), (a, "rust"), (b, "rust"), (b, None)]
    by_source, by_language = defaultdict(list), defaultdict(list)
    z = []
    for mb in step:
        tokens, labels, documents = inputs_of(mb, CPU)
        logits = model(tokens, documents).flatten(0, 1)
        z += (1e-3 * logits.logsumexp(-1) ** 2).tolist()
        losses = F.cross_entropy(logits, labels.flatten(), reduction="none").tolist()
        for label, loss in zip(labels.flatten().tolist(), losses, strict=True):
            source, language = kinds[label // 50]
            by_source[source].append(loss)
            if language is not None:
                by_language[language].append(loss)
    means = [{name: sum(each) / len(each) for name, each in found.items()} for found in (by_source, by_language)]
    return {"loss_by_source": means[0], "loss_by_language": means[1], "z_loss": sum(z) / len(z)}


def test_losses_by_group_are_those_of_whole_logits_at_every_layout(tmp_path: Path) -> None:
    settings = tree(tmp_path)
    truth = expected(settings)
    assert set(truth["loss_by_language"]) == {"python", "rust"}
    found = run_cases(trained, 1, {"one": (settings,)})
    cases = {n: ({**settings, "run_dir": str(tmp_path / n), "parallel": p},) for n, p in LAYOUTS.items()}
    found |= run_cases(trained, 2, cases)
    found |= run_cases(trained, 4, {"pp4": ({**settings, "run_dir": str(tmp_path / "pp4"), "parallel": {"pp": 4}},)})
    for name, ranks in found.items():
        first, second = ranks[0]
        assert not {"loss_by_source", "loss_by_language"} & set(first), "only every log.every steps"
        assert first["z_loss"] > 0
        for key, value in truth.items():
            assert second[key] == pytest.approx(value, rel=1e-11), (name, key)


def test_without_languages_the_key_is_absent_and_without_z_loss_too(tmp_path: Path) -> None:
    settings = tree(tmp_path)
    settings["train"]["z_loss"] = 0.0
    for entry in settings["data"]["blend"]:
        Path(f"{entry['prefix']}.docs.parquet").unlink()
    Trainer(Config.model_validate(settings), Mesh(), CPU).run()
    row = read_rows(tmp_path / "run" / "metrics.jsonl")[1]
    assert "loss_by_language" not in row
    assert "z_loss" not in row
    assert len(row["loss_by_source"]) == 2


def test_a_loss_of_a_group_that_is_not_finite_is_null(tmp_path: Path) -> None:
    config = Config.model_validate({**tree(tmp_path), "log": {"tensorboard": True}}).log
    log = MetricsLog(tmp_path, config, first_step=1, settings={})
    log.write({"step": 1, "loss_by_source": {"a": float("nan"), "b": 1.0}})
    log.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss_by_source": {"a": None, "b": 1.0}}]
