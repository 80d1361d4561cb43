"""Nearest rows and the choice of active ones: every implementation against the definition, and that against brute force."""

from __future__ import annotations

import pytest
import torch

from opencoder import kernels as K
from opencoder.kernels._library import CPP_MISSING, INTERPRETED

from .matrix import DEVICE, draw, each


def random_integers(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


# ---- nearest rows ----


def found_by(
    impl: str, queries: torch.Tensor, rows: torch.Tensor, kept: int, tile: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Keys of the nearest rows of `queries`, which are the first of the rows, tile by tile."""
    best = torch.full((queries.shape[0], kept), K.NOBODY, device=DEVICE)
    ids = torch.arange(queries.shape[0], device=DEVICE) + 1000
    for at in range(0, rows.shape[0], tile):
        part = rows[at : at + tile]
        products = queries.to(dtype) @ part.to(dtype).t()
        slack = 1e-5 if dtype == torch.float32 else 0.3
        K.merge_nearest(best, products, queries, part, ids, 1000 + at, slack=slack, candidates=2 * kept, impl=impl)
    return best


@each("merge_nearest")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kept", "tile", "width"), [(1, 300, 3), (9, 77, 20), (40, 7, 33)])
def test_nearest_rows_are_those_of_brute_force(impl: str, dtype: torch.dtype, kept: int, tile: int, width: int) -> None:
    rows = torch.nn.functional.normalize(draw(507, width).float(), dim=1)
    queries = rows[:13].contiguous()
    best = found_by(impl, queries, rows, kept, tile, dtype)
    scores = queries.double() @ rows.double().t()
    scores[:, :13].fill_diagonal_(-torch.inf)
    truth = scores.topk(kept, dim=1)
    assert torch.equal(K.nearest_ids(best), (truth.indices + 1000).int())
    assert torch.allclose(K.nearest_scores(best).double(), truth.values, rtol=0, atol=1e-7)


@each("merge_nearest")
def test_of_equal_rows_the_smaller_ids_stay_and_missing_ones_are_told(impl: str) -> None:
    rows = torch.ones(6, 4, device=DEVICE) / 2
    best = found_by(impl, rows[:2].contiguous(), rows, 3, tile=6 if impl == "torch" else 4)
    if impl != "torch":  # which of equal products it looks at is torch.topk's choice
        assert K.nearest_ids(best).tolist() == [[1001, 1002, 1003], [1000, 1002, 1003]]
    few = found_by(impl, rows[:1].contiguous(), rows[:3], 4, tile=3)
    assert K.nearest_ids(few)[0, :2].tolist() == [1001, 1002]
    assert K.nearest_scores(few).tolist() == [[1, 1, -torch.inf, -torch.inf]]
    assert (few[0, 2:] == K.NOBODY).all()


def test_keys_are_in_the_order_of_scores_then_of_ids() -> None:
    scores = torch.tensor([3.0, 0.0, -0.0, 1e-40, -1e-40, -2.0, 3.0, -torch.inf])
    keys = K.nearest_keys(scores, torch.arange(8))
    assert keys.sort(descending=True).indices.tolist() == [0, 6, 3, 1, 2, 4, 5, 7]
    assert torch.equal(K.nearest_scores(keys), scores)
    assert torch.equal(K.nearest_ids(keys), torch.arange(8, dtype=torch.int32))


# ---- priorities ----


def lists(classes: int, rows: int, longest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lengths = random_integers(longest + 1, classes)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    edges = int(offsets[-1])
    return offsets, random_integers(rows, edges, seed=1).int(), random_integers(90, edges, seed=2).int()


@each("neighbour_priority")
@pytest.mark.parametrize("offset_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("position_type", [torch.int16, torch.int32])
def test_priority_is_the_best_place_in_any_list(
    impl: str, offset_type: torch.dtype, position_type: torch.dtype
) -> None:
    offsets, ids, positions = lists(60, 40, 7)
    labels = torch.tensor([0, 3, 17, 59])
    priority, count = K.neighbour_priority(
        labels.to(DEVICE),
        offsets.to(DEVICE, offset_type),
        ids.to(DEVICE),
        positions.to(DEVICE, position_type),
        40,
        impl=impl,
    )
    places: dict[int, list[int]] = {}
    for label in labels.tolist():
        for edge in range(int(offsets[label]), int(offsets[label + 1])):
            places.setdefault(int(ids[edge]), []).append(int(positions[edge]))
    assert priority.tolist() == [min(places.get(row, [K.FAR])) for row in range(40)]
    assert count.tolist() == [len(places.get(row, [])) for row in range(40)]
    assert priority.dtype == count.dtype == torch.int32


@each("neighbour_priority")
def test_no_labels_and_empty_lists(impl: str) -> None:
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    offsets = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    for labels in (none.long(), torch.tensor([0, 2], device=DEVICE)):
        priority, count = K.neighbour_priority(labels, offsets, none, none, 3, impl=impl)
        assert priority.tolist() == [K.FAR] * 3
        assert count.tolist() == [0] * 3


# ---- the choice ----


def priorities(rows: int, seed: int) -> torch.Tensor:
    """A third nobody's neighbour, the others tied a lot, a few labels."""
    priority = random_integers(12, rows, seed=seed).int() - 1
    priority[random_integers(3, rows, seed=seed + 1) == 0] = K.FAR
    return priority.to(DEVICE)


@each("smallest_keys")
@pytest.mark.parametrize("rows", [1, 50, 5003])
def test_the_best_priorities_are_taken_and_the_rest_at_random(impl: str, rows: int) -> None:
    priority = priorities(rows, rows)
    wanted = [(p, i) for i, p in enumerate(priority.tolist()) if p != K.FAR]
    for count in {0, 1, rows // 3, rows}:
        for hard in {0, count // 2, count}:
            found, chosen = K.smallest_keys(priority, count, hard, seed=2**63 + count, impl=impl)
            assert found.dtype == torch.int64
            assert (found.diff() > 0).all()
            assert found.numel() == count
            assert sorted(found[chosen].tolist()) == sorted(i for _, i in sorted(wanted)[:hard])
            expected = K.smallest_keys(priority, count, hard, seed=2**63 + count, impl="reference")
            assert torch.equal(found, expected[0])
            assert torch.equal(chosen, expected[1])


@pytest.mark.skipif(CPP_MISSING is not None or INTERPRETED, reason="for the C++ operators")
def test_what_the_operators_would_read_beside_their_tensors_is_told() -> None:
    numbers = torch.arange(4, dtype=torch.int32)
    for wrong in (-2, 2**26):
        with pytest.raises(
            RuntimeError, match=rf"priorities lie in \[{min(wrong, -1)}, .*allowed: from -1 to 67108863"
        ):
            K.smallest_keys(torch.tensor([wrong, 0], dtype=torch.int32), 1, 1, seed=0, impl="cpp")
    for label, offsets, rows, message in (
        (3, numbers, 4, "label 3 of 3 lists"),
        (-1, numbers, 4, "label -1 of 3 lists"),
        (2, numbers + 3, 9, r"list 2 lies in \[5, 6\) of 4 ids"),
        (2, numbers, 2, "id 2 of 2 rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            K.neighbour_priority(torch.tensor([label]), offsets, numbers, numbers, rows, impl="cpp")


@each("smallest_keys")
def test_random_rows_depend_on_the_seed_alone_and_are_no_pattern(impl: str) -> None:
    nobody = torch.full((10_000,), K.FAR, dtype=torch.int32, device=DEVICE)
    a, b = (K.smallest_keys(nobody, 1000, 0, seed=seed, impl=impl)[0] for seed in (1, 2))
    assert torch.equal(a, K.smallest_keys(nobody, 1000, 0, seed=1, impl=impl)[0])
    shared = len(set(a.tolist()) & set(b.tolist()))
    assert 50 < shared < 150  # 100 expected, standard deviation 9
    assert 4300 < a.double().mean() < 5700


def test_random_numbers_are_those_of_splitmix64() -> None:
    """First outputs for seed 1234567, as published with the generator's reference code."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    seed = torch.arange(4)
    assert K.random_keys(seed, 1234567).tolist() == [number >> 32 for number in published]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: K.smallest_keys(torch.zeros(3, dtype=torch.int32), 4, 0, seed=0), r"count=4 ≤ 3 rows must hold"),
        (lambda: K.smallest_keys(torch.zeros(3), 1, 0, seed=0), r"priority must be 1-D int32, got torch.float32"),
        (
            lambda: K.neighbour_priority(*(torch.zeros(2, dtype=torch.int32),) * 4, 3),
            r"labels must be 1-D torch.int64, got torch.int32",
        ),
        (
            lambda: K.merge_nearest(
                torch.zeros(2, 3, dtype=torch.int64),
                *(torch.zeros(2, 2),) * 3,
                torch.zeros(1, dtype=torch.int64),
                0,
                slack=0,
                candidates=1,
            ),
            r"do not fit: got \[\(2, 2\), \(2, 2\), \(2, 2\), \(2, 3\), \(1,\)\]",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_told(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
