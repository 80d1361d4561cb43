"""Runs on conversations: epochs, resume, layouts, starting weights, losses and shares by source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from opencoder.checkpoint import folders, hf_export
from opencoder.config import Config, validate
from opencoder.data import tokenizer as tok
from opencoder.data.sft import Packing, build_sft_dataset
from opencoder.errors import ConfigError
from opencoder.parallel.mesh import Mesh, create_mesh
from opencoder.train.data import TrainingData, plan_stages, validation_loader
from opencoder.train.loop import Trainer
from opencoder.train.metrics import read_rows
from opencoder.train.sft_data import resolved, rows_for
from opencoder.train.stages import from_records
from tests.harness import run_cases
from tests.model.cases import SMALL
from tests.posttrain.cases import conversations, write

CPU = torch.device("cpu")
SEQ_LEN = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sft-run")
    write(path / "a", conversations(90))
    write(path / "b", conversations(40, seed=1))
    return path


def tree(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "run_dir": str(folder / name),
        "model": SMALL,
        "data": {
            "kind": "sft",
            "blend": [{"prefix": str(folder / "a")}, {"prefix": str(folder / "b")}],
            "seq_len": SEQ_LEN,
            "split": "90,10,0",
            "sft": {"epochs": 2},
        },
        "train": {"global_batch_size": 16, "micro_batch_size": 4, "precision": "fp64", "device": "cpu", "threads": 1},
        "optim": {"lr": 1e-3, "min_lr": 0, "schedule": "cosine", "warmup_steps": 1},
        "checkpoint": {"every": 2},
        "log": {"tensorboard": False, "peak_tflops": 1.0},
    }
    for section, keys in sections.items():
        found[section] = found.get(section, {}) | keys
    return found


def run(rank: int, world: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    config = resolved(Config.model_validate(settings), world)
    validate(config, world)
    p = config.parallel
    Trainer(config, create_mesh(tp=p.tp, pp=p.pp, cp=p.cp), CPU).run()
    return read_rows(Path(config.run_dir) / "metrics.jsonl")


def test_epochs_resume_layouts_and_weights(folder: Path) -> None:
    """One process trains two epochs; it goes on from a checkpoint at another layout; native and exported weights start others."""
    (whole,) = run_cases(run, 1, {"": (tree(folder, "whole", train={"eval_every": 100, "eval_samples": 8}),)})[""]
    state = json.loads((folders.resolve(folder / "whole") / "state.json").read_text())
    (stage,) = state["blends"]
    assert [source["conversations"] for source in stage["sources"]] == [2 * 81, 2 * 36]
    assert sum(source["achieved"] for source in stage["sources"]) == pytest.approx(1)
    assert all(source["achieved"] == pytest.approx(source["asked"]) for source in stage["sources"])
    assert stage["packing_efficiency"] > 0.9
    assert from_records(state["stages"], pytest.fail)[0].settings.sft == Packing(epochs=2)
    assert set(whole[0]["loss_by_source"]) == {str(folder / "a"), str(folder / "b")}
    assert "valid_loss" in whole[-1]
    steps = len(whole)
    assert steps >= 3

    for layout, parallel in {"tp2": {"tp": 2}, "dp2": {}, "pp2": {"pp": 2}}.items():
        copy = folder / layout
        shutil.copytree(folder / "whole", copy)
        for checkpoint in (copy / "checkpoints").glob("step_*"):
            if checkpoint.name != "step_00000002":
                shutil.rmtree(checkpoint)
        (copy / "checkpoints" / "latest").write_text("step_00000002\n")
        settings = tree(folder, layout, parallel=parallel)
        (resumed, _) = run_cases(run, 2, {layout: (settings,)})[layout]
        assert [row["step"] for row in resumed] == list(range(1, steps + 1))
        for ours, theirs in zip(resumed[2:], whole[2:], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-11), layout


def test_weights_start_a_run_at_another_layout(folder: Path, tokenizer: Path) -> None:
    """Those of a checkpoint of one process, native and exported; the exported one ends its answers with their turn."""
    optim = {"lr": 0.1, "warmup_steps": 0, "schedule": "constant"}
    short: dict[str, Any] = {
        "train": {"steps": 1},
        "data": {"sft": {}, "tokenizer": str(tokenizer)},
        "model": {"vocab_size": 400},
        "optim": optim,
    }
    (base,) = run_cases(run, 1, {"": (tree(folder, "base", **short),)})[""]
    hf_export.export(folder / "base", folder / "hf")
    loaded = tok.load(tokenizer)
    generation = json.loads((folder / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [loaded.eod_id, loaded.im_end_id]
    cases = {
        name: (
            tree(folder, f"from-{name}", **short | {"checkpoint": {"load": str(folder / source)}}, parallel={"tp": 2}),
        )
        for name, source in (("native", "base"), ("hf", "hf"))
    }
    found = run_cases(run, 2, cases)
    for name, (rows, _) in found.items():
        assert abs(rows[0]["loss"] - base[0]["loss"]) > 1e-3, name
    losses = [rows[0]["loss"] for rows, _ in found.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # the export has its own precision


def test_the_last_update_takes_what_is_left_and_a_contradiction_is_refused(folder: Path) -> None:
    settings = tree(folder, "x")
    config = resolved(Config.model_validate(settings), 1)
    rows = build_sft_dataset(
        [(str(folder / name), 1.0) for name in "ab"], num_rows=0, seq_len=SEQ_LEN, seed=config.data.seed,
        packing=Packing(epochs=2), split="90,10,0",
    )  # fmt: skip
    assert config.train.steps == -(-sum(len(member) for member in rows.members) // 16)
    for change, says in (
        ({"train": {"steps": 3}}, r"takes \d+ steps, and train.steps=3"),
        ({"train": {"samples": 32}}, "both say how long"),
        ({"data": {"blend": []}}, "data.blend is empty"),
        ({"data": {"blend": [{"prefix": "a", "weight": 2}, {"prefix": "b"}]}}, "has different weights"),
        ({"data": {"stages": [{"from_step": 1}]}}, "with data.stages set train.steps instead"),
    ):
        with pytest.raises(ConfigError, match=says):
            resolved(Config.model_validate(tree(folder, "x", **change)), 1)
    staged = tree(
        folder, "x", data={"stages": [{"from_step": 1}], "sft": {"batch_conversations": 16}}, train={"steps": 4}
    )
    with pytest.raises(ConfigError, match=r"with data\.stages set global_batch_size"):
        resolved(Config.model_validate(staged), 1)
    plain = Config.model_validate(tree(folder, "x", data={"sft": {}}, train={"steps": 3}))
    assert resolved(plain, 1) is plain


def test_a_begun_run_keeps_its_packing(folder: Path) -> None:
    config = Config.model_validate(tree(folder, "x", data={"sft": {}}, train={"steps": 4}))
    records = [json.loads(json.dumps(stage.record())) for stage in plan_stages(config)]
    changed = Config.model_validate(tree(folder, "x", data={"sft": {"pack": False}}, train={"steps": 4}))
    assert plan_stages(config, records, step=2) == plan_stages(config)
    with pytest.raises(ConfigError, match=r"data\.sft="):
        plan_stages(changed, records, step=2)


def test_evaluation_reads_every_held_out_conversation_at_most_once(folder: Path) -> None:
    config = Config.model_validate(tree(folder, "x", train={"steps": 4, "eval_every": 1, "eval_samples": 40}))
    loader = validation_loader(config, Mesh())
    assert loader is not None
    read = sum(int((mb.labels >= 0).sum()) for step in loader for mb in step)
    held_out = [*conversations(90)[81:], *conversations(40, seed=1)[36:]]
    assert read == sum(sum(mask[1:]) for _, mask in held_out)


@pytest.mark.parametrize("epochs", [None, 2])
def test_a_batch_counted_in_conversations(folder: Path, epochs: int | None) -> None:
    """The batch is set so that an update has about so many; a run that was written down so is read again."""
    sizes: dict[str, Any] = {
        "data": {"sft": {"epochs": epochs, "batch_conversations": 60}},
        "train": {"micro_batch_size": 1},
    }
    given = tree(folder, "x", **sizes)
    del given["train"]["global_batch_size"]
    given["train"]["steps"] = None if epochs else 4
    config = resolved(Config.model_validate(given), 1)
    validate(config, 1)
    stage = plan_stages(config)[0]
    (account,) = [TrainingData(config, [stage], Mesh(), step=0).account(stage, stage.end)]
    conversations_read = sum(source["conversations"] for source in account["sources"])
    rows = sum(source["rows"] for source in account["sources"])
    assert conversations_read / rows * config.train.global_batch_size == pytest.approx(60, rel=0.1)
    assert resolved(config, 1) == config
    with pytest.raises(
        ConfigError, match=r"takes 13 samples, no multiple of micro_batch_size·dp = 4: .*global_batch_size=12 instead"
    ):
        resolved(Config.model_validate(given | {"train": given["train"] | {"micro_batch_size": 4}}), 1)
    given["train"]["global_batch_size"] = 2
    with pytest.raises(ConfigError, match=r"batch_conversations=60 takes \d+ samples, and train.global_batch_size=2"):
        resolved(Config.model_validate(given), 1)


def test_rows_of_a_batch_divide_by_ranks() -> None:
    assert [rows_for(n, 4.0) for n in (1, 4, 60, 4096, 4100)] == [1, 1, 15, 1024, 1024]
    assert rows_for(4096, 10.3) == 384
    assert all(abs(rows_for(n, 1.0) / n - 1) <= 0.05 for n in range(1, 2000))


def test_stages_of_one_run_change_datasets_and_length(folder: Path) -> None:
    """data.stages as for text: from step 2 on the other dataset, in longer rows."""
    stages = [{"from_step": 2, "blend": [{"prefix": str(folder / "b")}], "seq_len": 60, "global_batch_size": 4}]
    data = {"blend": [{"prefix": str(folder / "a")}], "sft": {}, "stages": stages}
    config = resolved(Config.model_validate(tree(folder, "x", data=data, train={"steps": 4})), 1)
    validate(config, 1)
    planned = plan_stages(config)
    training = TrainingData(config, planned, Mesh(), step=0)
    shapes = [[tuple(mb.tokens.shape) for mb in step] for _, step in training.batches(0)]
    assert shapes == [[(4, 48)] * 4] * 2 + [[(4, 60)]] * 2
    sources = [training.account(stage, 4)["sources"] for stage in planned]
    assert [[Path(source["prefix"]).name for source in each] for each in sources] == [["a"], ["b"]]
    assert [each[0]["rows"] for each in sources] == [32, 8]
