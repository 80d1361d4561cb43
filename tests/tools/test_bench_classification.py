"""Synthetic classes, and `opencoder bench-classification` on a small scale."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from opencoder.errors import ConfigError
from opencoder.model.classes.partition import Partition
from opencoder.parallel.mesh import SINGLE, Mesh
from opencoder.tools import bench_classification
from opencoder.tools.class_bench import simulate
from opencoder.tools.class_bench.partial_fc import PartialFC
from opencoder.tools.class_bench.steps import missing_mass, siblings_graph
from opencoder.tools.class_bench.synthetic import Siblings, normals


def test_normals_follow_from_the_id_alone_and_are_normal() -> None:
    ids = np.arange(100_000)
    drawn = normals(ids, 7, stream=0, seed=3)
    some = np.array([99_999, 5, 70_000])
    assert np.array_equal(normals(some, 7, stream=0, seed=3), drawn[some])
    assert abs(drawn.mean()) < 0.005
    assert abs(drawn.std() - 1) < 0.005
    assert abs((drawn**4).mean() - 3) < 0.05
    assert np.abs(np.corrcoef(drawn.T) - np.eye(7)).max() < 0.015
    assert not np.array_equal(normals(some, 7, stream=1, seed=3), drawn[some])
    assert not np.array_equal(normals(some, 7, stream=0, seed=4), drawn[some])


@pytest.mark.parametrize("classes", [10**5, 10**7, 10**8])
def test_siblings_are_near_and_samples_nearest_their_class(classes: int) -> None:
    made = Siblings(classes, 64, seed=1)
    features, labels = made.samples(np.arange(512))
    assert labels.min() >= 0
    assert labels.max() < classes
    own = made.centres(labels)
    first = labels // 20 * 20
    siblings = np.stack([made.centres(first + i) for i in range(20)], 1)
    strangers = made.centres((labels + classes // 2) % classes)
    assert np.allclose(np.linalg.norm(own, axis=1), 1, atol=1e-5)
    cosines = np.einsum("nd,ngd->ng", own, siblings)
    cosines[np.arange(512), labels - first] = np.nan
    assert 0.5 < np.nanmean(cosines) < 0.8
    assert abs((own * strangers).sum(1).mean()) < 0.02
    best = np.einsum("nd,ngd->ng", features, siblings).argmax(1)
    assert (best == labels - first).mean() > 0.9


def test_zipf_labels_fall_as_one_over_rank() -> None:
    labels = Siblings(1000, 4, zipf=True).labels(np.arange(200_000))
    counts = np.sort(np.bincount(labels, minlength=1000))[::-1]
    assert (counts > 0).all()
    assert counts[0] / counts[9] == pytest.approx(np.log(2) / np.log(11 / 10), rel=0.1)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="noise=-1 at least 0"):
        Siblings(10, 4, noise=-1)


def test_the_peer_is_softmax_over_its_rows_and_sgd() -> None:
    """One rank, all rows scored: torch's own cross entropy and SGD with momentum, for two steps."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=draw)
    truth = weight.clone().double().requires_grad_()
    optimizer = torch.optim.SGD([truth], lr=0.1, momentum=0.9)
    peer = PartialFC(weight, Partition(50, 1), SINGLE, rho=1.0, lr=0.1, momentum=0.9)
    for _ in range(2):
        x, labels = torch.randn(16, 8, generator=draw), torch.randint(50, (16,), generator=draw)
        mine, own = x.clone().requires_grad_(), x.double().requires_grad_()
        loss = torch.nn.functional.cross_entropy(own @ truth.t(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert peer.step(mine, labels).item() == pytest.approx(loss.item(), abs=1e-5)
        assert torch.allclose(mine.grad.double(), own.grad, atol=1e-6)
        assert torch.allclose(peer.weight.double(), truth, atol=1e-5)


def test_the_peer_scores_its_labels_and_a_share_of_the_rest() -> None:
    peer = PartialFC(torch.randn(1000, 4), Partition(1000, 1), SINGLE, rho=0.1, lr=0.1, momentum=0.9)
    before = peer.weight.clone()
    labels = torch.tensor([7, 999, 7])
    peer.step(torch.randn(3, 4, requires_grad=True), labels)
    assert peer.scored.numel() == 100
    assert {7, 999} <= set(peer.scored.tolist())
    others = torch.ones(1000, dtype=torch.bool)
    others[peer.scored] = False
    assert torch.equal(peer.weight[others], before[others])


@pytest.mark.parametrize("classes", [40, 47])
def test_known_lists_hold_the_siblings(classes: int) -> None:
    made = Siblings(classes, 8, group=10)
    lists = siblings_graph(made, Partition(classes, 1), SINGLE)
    assert torch.equal(lists[:, 0], torch.arange(classes, dtype=torch.int32))
    assert all(len(set(row)) == 10 and min(row) >= 0 and max(row) < classes for row in lists.tolist())
    assert set(lists[12].tolist()) == set(range(10, 20))


def test_missing_mass_is_what_softmax_gives_the_others() -> None:
    weight, x, scored = torch.randn(30, 6), torch.randn(5, 6), torch.tensor([0, 3, 29])
    probabilities = (x @ weight.t()).softmax(1)
    assert missing_mass(weight, x, scored, SINGLE) == pytest.approx(1 - probabilities[:, scored].sum(1).mean().item())
    assert missing_mass(weight, x, None, SINGLE) == pytest.approx(0)


def test_the_simulated_rank_holds_its_share_alone() -> None:
    settings = {
        "classes": 256_000,
        "ranks": 64,
        "dim": 32,
        "batch": 128,
        "rho": 0.1,
        "neighbours": 16,
        "rounds": 1,
        "threads": 1,
    }
    found = simulate.one_rank(Mesh(), settings)
    assert (found["rows"], found["scored"]) == (4000, 400)
    assert (found["offsets"], found["edges"]) == (256_001, 64_000)
    assert found["kind"] == "simulated"
    columns = simulate.made_up_columns(Partition(256_000, 64), 4000, 16)
    assert columns.offsets[-1] == columns.ids.numel() == 64_000
    assert (columns.offsets.diff() >= 0).all()


def test_steps_and_graph_on_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [
        "--classes",
        "2000",
        "--graph-classes",
        "1003",
        "--dim",
        "16",
        "--batch",
        "16",
        "--ranks",
        "2",
        "--rounds",
        "1",
    ]
    lists = ["--neighbours", "8", "--graph-neighbours", "8"]
    files = ["--json", str(tmp_path / "n.json"), "--plot", str(tmp_path / "n.png")]
    assert bench_classification.main(["--only", "steps", "graph", *sizes, *lists, *files]) == 0
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert numbers["graph"]["recall"] == 1.0
    assert numbers["steps"]["scored"] == {"full": 2000, "random": 200, "knn": 200, "peer": 200}
    mass = numbers["steps"]["missing_mass"]
    assert mass["full"] == pytest.approx(0, abs=1e-9)
    assert 0 < mass["knn"] < mass["random"]
    assert (tmp_path / "n.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "selection:" in out
    assert "recall 1.000000" in out


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="--batch must be a multiple of --ranks"):
        bench_classification.main(["--batch", "10", "--ranks", "4"])
