"""KNN softmax in a run: the graph is made when asked, told of, saved, and the same after a resume and on other rank counts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opencoder.errors import Failure
from opencoder.model.classes.graph import build_graph
from opencoder.model.classes.permutation import Permutation
from opencoder.model.decoder import named_parameters
from opencoder.parallel.placement import placement_of
from opencoder.train.class_graph import KEY
from opencoder.train.metrics import read_rows
from tests.harness import run_ranks
from tests.train.class_cases import CLASSES, run, trainer_of, tree, whole, write

NEIGHBOURS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classes")
    write(path)
    return path


def knn(folder: Path, run_dir: Path, *, background: bool = False, **sections: Any) -> dict[str, Any]:
    """First graph after two steps, the next three later."""
    rebuild = {"first_step": 2, "every": 3, "probe_recall": 0, "background": background, **sections.pop("rebuild", {})}
    head = {"selection": "knn", "rho": 0.3, "neighbours": NEIGHBOURS, "rebuild": rebuild}
    return tree(folder, str(run_dir), features=True, head=head, **sections)


def rows_of(given: dict[str, Any]) -> list[dict[str, Any]]:
    return read_rows(Path(given["run_dir"]) / "metrics.jsonl")


@pytest.mark.parametrize("background", [False, True])
def test_52_metrics_tell_of_selection_and_graph(background: bool, folder: Path, tmp_path: Path) -> None:
    given = knn(folder, tmp_path / "r", background=background, train={"steps": 24})
    run_ranks(run, 2, given)
    rows = rows_of(given)
    assert all(0 < row["eps"] < 1 for row in rows)
    scored = sum(-(-n * 3 // 10) for n in (52, 51))  # of both ranks, unless a rank has more labels
    assert all(scored / 24 <= row["active_per_label"] <= CLASSES for row in rows)
    ages = [row.get("graph_age") for row in rows]
    if background:  # the step in which it is taken up is the threads' matter
        assert ages[:2] == [None, None]
        assert ages[-1] is not None
    else:
        assert ages == [None, None, *[1.0, 2.0, 3.0] * 8][:24]
    assert 0 < rows[-1]["coverage"] <= 1
    state = json.loads((tmp_path / "r" / "checkpoints" / "step_00000024" / "state.json").read_text())
    assert state["head"]["graph_step"] == 24 - rows[-1]["graph_age"]
    assert state["head"]["order"] == {"classes": CLASSES, "seed": 1234}


def test_a_probe_is_told_of_and_a_low_recall_makes_a_graph_early(folder: Path, tmp_path: Path) -> None:
    given = knn(folder, tmp_path / "r", rebuild={"every": 20, "probe_recall": 1.0}, train={"steps": 12})
    given["optim"] |= {"lr": 0.3, "clip_norm": 10.0}
    run(0, 1, given)
    rows = rows_of(given)
    assert max(row.get("graph_age") or 0 for row in rows) < 10
    given = knn(folder, tmp_path / "s", rebuild={"every": 20}, train={"steps": 12})
    run(0, 1, given)
    rows = rows_of(given)
    assert rows[-1]["graph_age"] == 10
    assert 0 < rows[-1]["probe_recall"] <= 1


def test_a_resumed_run_equals_an_undisturbed_one_with_its_graph(folder: Path, tmp_path: Path) -> None:
    truth = run(0, 1, knn(folder, tmp_path / "whole", train={"steps": 8}))
    half = knn(folder, tmp_path / "half", train={"steps": 4})  # the graph of step 2 is in use until step 5
    run(0, 1, half)
    half["train"]["steps"] = 8
    found = run(0, 1, half)
    assert [row.get("graph_age") for row in rows_of(half)] == [None, None, 1, 2, 3, 1, 2, 3]
    for key, (_, value) in found.items():
        assert torch.equal(value, truth[key][1]), key


def lists_of(rank: int, world: int, given: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    trainer = trainer_of(given, world)
    assert trainer.graph is not None
    (key,) = (found := trainer.graph.tensors())
    assert key == KEY
    assert trainer.model.lm_head.columns is trainer.graph.keeper.columns is not None
    return found[key][1].slice_of(trainer.mesh), found[key][0]


def test_the_graph_loads_on_other_rank_counts(folder: Path, tmp_path: Path) -> None:
    given = knn(folder, tmp_path / "r", train={"steps": 4})
    run_ranks(run, 4, given)
    (at_1,) = run_ranks(lists_of, 1, given)
    assert at_1[1].shape == (CLASSES, NEIGHBOURS)
    assert at_1[1][:, 0].tolist() == list(range(CLASSES))
    for world in (2, 3):
        for where, lists in run_ranks(lists_of, world, given):
            assert torch.equal(lists, at_1[1][where]), world
    other = {**given, "model": {**given["model"], "head": {**given["model"]["head"], "neighbours": 4}}}
    trainer = trainer_of(other)
    assert trainer.graph is not None
    assert trainer.graph.tensors() == {}  # of another K: made anew when it is time


def test_the_graph_is_that_of_the_weights_it_was_made_of(folder: Path, tmp_path: Path) -> None:
    given = knn(folder, tmp_path / "r", train={"steps": 2})
    weight = whole(run_ranks(run, 2, given))["lm_head.weight"]
    given["train"]["steps"] = 3
    run_ranks(run, 2, given)
    trainer = trainer_of(given)
    assert trainer.graph is not None
    head = trainer.model.lm_head
    expected = build_graph(weight, head.partition, head.groups.classes, neighbours=NEIGHBOURS)
    assert torch.equal(trainer.graph.tensors()[KEY][0], expected)


def test_a_graph_older_than_allowed_ends_the_run(folder: Path, tmp_path: Path) -> None:
    given = knn(folder, tmp_path / "r", rebuild={"every": 100, "max_age": 3}, train={"steps": 12})
    with pytest.raises(Failure, match="the graph of classes is 4 steps behind at step 6"):
        run(0, 1, given)


def damaged_once(rank: int, world: int, given: dict[str, Any]) -> dict[str, tuple[Any, torch.Tensor]]:
    """A run in which a row of the class matrix, and the order of classes, are damaged before step 5."""
    trainer = trainer_of(given, world)
    update, damaged = trainer._update, []

    def damaging(done: Any, micro_batches: Any) -> Any:
        if done.step == 5 and not damaged:
            damaged.append(done.step)
            trainer.model.order = Permutation(CLASSES, 99)
            with torch.no_grad():
                trainer.model.lm_head.weight[3] = float("nan")
        return update(done, micro_batches)

    trainer._update = damaging  # type: ignore[method-assign]
    trainer.run()
    assert damaged
    assert trainer.state.rewinds == 1
    return {
        key: (placement_of(p).slice_of(trainer.mesh), p.detach().clone())
        for key, p in named_parameters(trainer.model).items()
    }


def test_a_run_that_goes_back_takes_up_rows_order_and_graph_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    skip = {"stop_after": 1, "on_stop": "rewind"}
    sections: dict[str, Any] = {
        "checkpoint": {"every": 2},
        "rebuild": {"every": 100},
    }  # neither made nor probed meanwhile
    truth = run(
        0, 1, knn(folder, tmp_path / "s", train={"steps": 8, "skip": {"steps": [5]}}, **copy.deepcopy(sections))
    )
    found = damaged_once(0, 1, knn(folder, tmp_path / "r", train={"steps": 8, "skip": skip}, **sections))
    for key, (_, value) in found.items():
        assert torch.equal(value, truth[key][1]), key
