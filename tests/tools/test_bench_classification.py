"""Synthetic classes, and `opencoder bench-classification` on a small scale."""

from __future__ import annotations

import numpy as np
import pytest

from opencoder.errors import ConfigError
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
