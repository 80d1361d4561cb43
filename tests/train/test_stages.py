"""Stages of the data: planned once, kept on resume, changed only where nothing has been read yet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opencoder.config import Config, load_config, validate
from opencoder.data.fim import Fim, FimIds
from opencoder.data.indexed import IndexedWriter
from opencoder.errors import ConfigError
from opencoder.model.decoder import named_parameters
from opencoder.model.initialise import build_model
from opencoder.optim.optimizer import ReplicatedOptimizer
from opencoder.parallel.mesh import Mesh
from opencoder.train.data import TrainingData, plan_stages, validation_loader
from opencoder.train.estimate import describe
from opencoder.train.stages import Settings, Source, Stage, consumed_samples, from_records, plan
from opencoder.train.step import TrainStep

pytestmark = pytest.mark.fast

A = Settings((Source("a", 1.0, "hash of a"),), 32, 8, "1,0,0", False, None, 100)
B = replace(A, blend=(Source("b", 1.0, "hash of b"),), seq_len=64, global_batch_size=4)


def shape(stages: list[Stage]) -> list[tuple[int, int, int, int, str]]:
    return [(s.first_step, s.end, s.num_samples, s.seed, s.settings.blend[0].prefix) for s in stages]


def test_a_new_run() -> None:
    assert shape(plan({0: A}, 10)) == [(0, 10, 80, 100, "a")]
    assert shape(plan({0: A, 6: B}, 10)) == [(0, 6, 48, 100, "a"), (6, 10, 16, 101, "b")]


def test_a_resumed_run_keeps_its_plan() -> None:
    for asked in ({0: A}, {0: A, 6: B}):
        stages = plan(asked, 10)
        for step in range(11):
            assert plan(asked, 10, saved=stages, step=step) == stages


def test_a_longer_run_gets_a_further_stage() -> None:
    saved = plan({0: A}, 10)
    for step in (3, 10):
        assert shape(plan({0: A}, 15, saved=saved, step=step)) == [(0, 10, 80, 100, "a"), (10, 15, 40, 101, "a")]


def test_a_shorter_run_made_longer_again_uses_its_samples_up() -> None:
    short = plan({0: A}, 5, saved=plan({0: A}, 10), step=3)
    assert shape(short) == [(0, 5, 80, 100, "a")]
    assert shape(plan({0: A}, 12, saved=short, step=5)) == [(0, 10, 80, 100, "a"), (10, 12, 16, 101, "a")]


def test_a_stage_decided_on_later_ends_the_one_before() -> None:
    """Annealing: the stable stage's index stays that of its full length."""
    saved = plan({0: A}, 10)
    for step in (3, 6):
        assert shape(plan({0: A, 6: B}, 10, saved=saved, step=step)) == [(0, 6, 80, 100, "a"), (6, 10, 16, 101, "b")]


def test_what_has_not_begun_may_change() -> None:
    saved = plan({0: A, 6: B}, 10)
    assert shape(plan({0: A, 8: B}, 10, saved=saved, step=6))[0] == (0, 6, 48, 100, "a")
    assert plan({0: A, 8: B}, 10, saved=saved, step=6)[-1].first_step == 8
    assert shape(plan({0: A}, 6, saved=saved, step=6)) == [(0, 6, 48, 100, "a")]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seq_len": 16}, "data.seq_len=16, but the stage of the data from step 0 was started with 32"),
        ({"global_batch_size": 2}, "train.global_batch_size=2"),
        ({"split": "9,1,0"}, "data.split=9,1,0"),
        ({"document_mask": True}, "data.document_mask=True"),
        ({"data_seed": 1}, "data.seed=1"),
        ({"fim": Fim(0.5, 0.5, 16, FimIds(1, 2, 3), 0, 100)}, "data.fim="),
        ({"blend": (Source("a", 2.0, "hash of a"),)}, r"data.blend=\[\('a', 2.0\)\]"),
        ({"blend": (*A.blend, *B.blend)}, "data.blend="),
        ({"blend": (Source("a", 1.0, "another hash"),)}, "dataset a is not the one"),
    ],
)
def test_what_has_begun_may_not(change: dict[str, Any], says: str) -> None:
    saved = plan({0: A}, 10)
    with pytest.raises(ConfigError, match=says):
        plan({0: replace(A, **change)}, 10, saved=saved, step=1)
    later = plan({0: A, 4: replace(A, **change)}, 10, saved=saved, step=4)
    assert [stage.first_step for stage in later] == [0, 4]
    with pytest.raises(ConfigError, match=says):
        plan({0: A, 4: replace(A, **change)}, 10, saved=saved, step=5)


def test_a_dataset_may_move() -> None:
    moved = replace(A, blend=(Source("elsewhere/a", 1.0, "hash of a"),))
    assert shape(plan({0: moved}, 10, saved=plan({0: A}, 10), step=5)) == [(0, 10, 80, 100, "a")]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (A, [(0, 8, 80, 100, "a")]),
        (B, [(0, 4, 80, 100, "a"), (4, 8, 16, 101, "b")]),
    ],
)
def test_a_fork_keeps_the_past_and_reads_what_it_is_told_to(asked: Settings, expected: list[Any]) -> None:
    forked = plan({0: asked}, 8, saved=plan({0: A}, 10), step=4, fork=True)
    assert shape(forked) == expected
    saved = from_records(json.loads(json.dumps([stage.record() for stage in forked])), lambda: A)
    for step in range(4, 9):
        assert plan({0: asked}, 8, saved=saved, step=step) == forked
    other = replace(asked, split="9,1,0")
    assert plan({0: other}, 8, saved=saved, step=4)[-1].settings == other  # nothing of its own was read yet
    with pytest.raises(ConfigError, match=r"data\.split"):
        plan({0: other}, 8, saved=saved, step=5)


def test_records_read_back() -> None:
    fim = Fim(0.5, 0.25, 16, FimIds(1, 2, 3), 0, 100)
    stages = plan({0: replace(A, fim=fim), 6: B}, 10)
    text = json.dumps([stage.record() for stage in stages])
    assert from_records(json.loads(text), lambda: A) == stages


def test_records_of_earlier_versions_read_back() -> None:
    old = [{"num_samples": 80, "seed": 100}, {"num_samples": 40, "seed": 101}]
    assert from_records(old, lambda: A) == plan({0: A}, 15, saved=plan({0: A}, 10), step=10)


def test_consumed_samples() -> None:
    stages = plan({0: A, 6: B}, 10)
    assert [consumed_samples(stages, step) for step in (0, 3, 6, 7, 10)] == [0, 24, 48, 52, 64]


# ---- with files ----


def test_evaluation_in_parts_is_the_mean_over_all_tokens(folder: Path) -> None:
    """Every time on the same samples, each batch with its own number of unmasked targets."""
    asked = config(folder, split="50,50,0")
    asked = asked.model_copy(update={"train": asked.train.model_copy(update={"eval_every": 1, "eval_samples": 6})})
    loader = validation_loader(asked, Mesh())
    assert loader is not None
    steps = list(loader)
    assert [len(step) for step in steps] == [1, 1, 1]
    for n, (mb,) in enumerate(steps):
        mb.labels[:, : 3 * n] = -100
    model = build_model(asked.model, Mesh(), dtype=torch.float64, device=torch.device("cpu"), seed=1)
    optimizer = ReplicatedOptimizer(named_parameters(model), asked.optim, Mesh())
    step = TrainStep(model, optimizer, Mesh(), device=torch.device("cpu"))
    tokens, labels = (torch.cat([getattr(mb, name) for (mb,) in steps]) for name in ("tokens", "labels"))
    with torch.no_grad():
        whole = model.loss(tokens, labels, None)[0] / (labels >= 0).sum()
    assert abs(float(step.evaluate(steps)) / float(whole) - 1) < 1e-12
    first, second = (torch.cat([mb.tokens for step in loader for mb in step]) for _ in range(2))
    assert torch.equal(first, second)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n, name in enumerate("ab"):
        with IndexedWriter(tmp_path / name, np.int32) as writer:
            for j in range(50):
                writer.add_document([100 * n + j] * 20)
    return tmp_path


def config(folder: Path, **data: Any) -> Config:
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"layers": 1, "hidden_size": 8, "heads": 1, "ffn_size": 8, "vocab_size": 256, "max_seq_len": 64},
        "data": {"blend": [{"prefix": str(folder / "a")}], "seq_len": 16, **data},
        "train": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2},
    }
    return Config.model_validate(tree)


def steps_of(asked: Config, step: int = 0, mesh: Mesh | None = None) -> list[list[list[list[int]]]]:
    stages = plan_stages(asked)
    batches = TrainingData(asked, stages, mesh or Mesh(), step=step).batches(step)
    return [[mb.tokens.tolist() for mb in micro_batches] for _, micro_batches in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_switch_comes_at_its_step_and_any_step_can_be_the_first(folder: Path, workers: int) -> None:
    switch = {"from_step": 6, "seq_len": 32, "global_batch_size": 4, "micro_batch_size": 1}
    blend = [{"prefix": str(folder / "a"), "weight": 1}, {"prefix": str(folder / "b"), "weight": 3}]
    asked = config(folder, stages=[{**switch, "blend": blend}], workers=workers)
    whole = steps_of(asked)
    assert [np.shape(step) for step in whole] == [(4, 2, 16)] * 6 + [(4, 1, 32)] * 4
    assert np.max(whole[:6][0]) < 100 <= np.max([np.max(step) for step in whole[6:]])
    for first in (0, 1, 5, 6, 7, 10):
        assert steps_of(asked, first) == whole[first:]


def test_the_achieved_blend_is_told(folder: Path) -> None:
    blend = [{"prefix": str(folder / "a"), "weight": 1}, {"prefix": str(folder / "b"), "weight": 3}]
    asked = config(folder, blend=blend)
    stages = plan_stages(asked)
    data = TrainingData(asked, stages, Mesh(), step=0)
    tokens = np.concatenate([mb.tokens.numpy().ravel() for _, step in data.batches(0) for mb in step])
    account = data.account(stages[0], 10)
    assert [source["achieved"] for source in account["sources"]] == [(tokens < 100).mean(), (tokens >= 100).mean()]
    for told in (data.describe(stages[0]), data.describe_end(stages[0])):
        assert f"{folder / 'b'} 75.000% of 75.000%" in told
    assert f"read {tokens.size:,} tokens" in data.describe_end(stages[0])


@pytest.mark.parametrize("step", [3, 6, 8, 10])
def test_what_each_stage_has_read_is_accounted_for_and_outlives_it(folder: Path, step: int) -> None:
    names = [str(folder / name) for name in "ab"]
    asked = config(
        folder,
        blend=[{"prefix": names[0], "weight": 2}, {"prefix": names[1], "weight": 1}],
        stages=[{"from_step": 6, "seq_len": 32, "blend": [{"prefix": names[1]}]}],
    )
    stages = plan_stages(asked)
    earlier = TrainingData(asked, stages, Mesh(), step=0).accounts(6, [])
    found = TrainingData(asked, stages, Mesh(), step=min(step, 9)).accounts(step, earlier)
    batches = zip(range(step), TrainingData(asked, stages, Mesh(), step=0).batches(0), strict=False)
    read = [(stage, np.concatenate([mb.tokens.numpy().ravel() for mb in mbs])) for _, (stage, mbs) in batches]
    assert len(read) == step
    assert [each["steps"] for each in found] == [min(step, 6), step - 6][: 1 + (step > 6)]
    for each, stage in zip(found, stages, strict=False):
        tokens = np.concatenate([x for of, x in read if of is stage or of == stage])
        counts = [int((tokens < 100).sum()), int((tokens >= 100).sum())]
        told = {source["prefix"]: source for source in each["sources"]}
        assert [told[name]["tokens"] if name in told else 0 for name in names] == counts
        assert sum(source["asked"] for source in each["sources"]) == 1


def test_fill_in_the_middle_reaches_training_alone(folder: Path) -> None:
    fim = {"rate": 1, "min_tokens": 4, "ids": [253, 254, 255]}
    plain, turned = steps_of(config(folder)), steps_of(config(folder, fim=fim))
    assert np.shape(plain) == np.shape(turned)
    assert np.max(plain) < 100
    assert np.isin(turned, [253, 254, 255]).sum() > 100
    asked = config(folder, fim=fim, split="50,50,0")
    asked = asked.model_copy(update={"train": asked.train.model_copy(update={"eval_every": 1})})
    loader = validation_loader(asked, Mesh())
    assert loader is not None
    assert max(int(mb.tokens.max()) for step in loader for mb in step) < 100


def test_a_rewritten_dataset_is_noticed(folder: Path) -> None:
    asked = config(folder)
    records = json.loads(json.dumps([stage.record() for stage in plan_stages(asked)]))
    plan_stages(asked, records, step=3, before=asked)
    with IndexedWriter(folder / "a", np.int32) as writer:
        for j in range(50):
            writer.add_document([j] * 19 + [7])  # the same lengths
    with pytest.raises(ConfigError, match="is not the one that the stage of the data"):
        plan_stages(asked, records, step=3, before=asked)


def test_the_8b_example_has_both_its_phases() -> None:
    asked = load_config(Path(__file__).parents[2] / "examples" / "opencoder-8b.yaml")
    validate(asked, 64)
    text = describe(asked, 64)
    assert "130000 steps × 2048 samples × 4096 tokens = 1,090,519,040,000 tokens" in text
    assert "181900 steps × 1024 samples × 8192 tokens = 1,525,887,795,200 tokens" in text
