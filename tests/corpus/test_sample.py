"""Sampling: budgets are kept, and the choice depends on the records alone."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opencoder.config import load_corpus_config
from opencoder.corpus import sample
from opencoder.corpus_config import SampleConfig
from opencoder.errors import ConfigError

pytestmark = pytest.mark.fast


def record_id(n: int) -> str:
    return hashlib.sha256(str(n).encode()).hexdigest()


def table(sizes: list[int], languages: list[str | None], start: int = 0) -> pa.Table:
    ids = [record_id(start + n) for n in range(len(sizes))]
    return pa.table(
        {"id": ids, "language": pa.array(languages, pa.string()), "size_bytes": pa.array(sizes, pa.int64())}
    )


def with_budget(**budgets: dict[str, float]) -> SampleConfig:
    return SampleConfig.model_validate({"budgets": budgets})


def kept_bytes(rows: pa.Table, decisions: list[sample.Decision], language: str) -> int:
    dropped = {d.row for d in decisions}
    return sum(
        size
        for n, (size, name) in enumerate(zip(rows["size_bytes"].to_pylist(), rows["language"].to_pylist(), strict=True))
        if name == language and n not in dropped
    )


def test_a_budget_is_filled_and_not_exceeded() -> None:
    draw = random.Random(0)
    sizes = [draw.randint(100, 10_000) for _ in range(20_000)]
    rows = table(sizes, ["java"] * 20_000)
    decisions = sample.sample(rows, with_budget(java={"max_bytes": 30_000_000}))
    left = kept_bytes(rows, decisions, "java")
    assert 30_000_000 - 2 * 10_000 - 30_000_000 / 60_000 < left <= 30_000_000
    assert all(d.stage == "sample" and d.reason == "over_budget" and d.value >= 0 for d in decisions)
    assert "java is cut to 30,000,000 bytes" in decisions[0].threshold


def test_the_sample_is_not_biased_by_size_or_name() -> None:
    draw = random.Random(1)
    sizes = [draw.choice([100, 10_000]) for _ in range(40_000)]
    rows = table(sizes, ["java"] * 40_000)
    dropped = {d.row for d in sample.sample(rows, with_budget(java={"ratio": 0.3}))}
    for size in (100, 10_000):
        share = np.mean([n not in dropped for n, s in enumerate(sizes) if s == size])
        assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 20_000) ** 0.5 + 1e-3


def test_languages_without_a_budget_or_within_it_are_kept_whole() -> None:
    rows = table([1000] * 40, ["python"] * 20 + ["java"] * 10 + [None] * 10)
    assert sample.sample(rows, with_budget(java={"max_bytes": 10_000})) == []
    assert len(sample.sample(rows, with_budget(java={"max_bytes": 0}))) == 10
    assert sample.sample(rows, with_budget(java={"ratio": 1.0})) == []
    assert sample.sample(rows, SampleConfig(enabled=False, budgets={})) == []


def test_tokens_are_counted_or_estimated() -> None:
    rows = table([4000] * 1000, ["java"] * 1000)
    estimated = sample.sample(rows, with_budget(java={"max_tokens": 300_000}))
    assert 690 <= len(estimated) <= 710  # 1000 tokens each
    counted = rows.append_column("tokens", pa.array([600] * 1000))
    assert 490 <= len(sample.sample(counted, with_budget(java={"max_tokens": 300_000}))) <= 510


def test_shards_with_and_without_counts_are_not_mixed() -> None:
    rows = table([4000], ["java"])
    config = with_budget(java={"max_tokens": 1})
    parts = [sample.totals(rows, config), sample.totals(rows.append_column("tokens", pa.array([600])), config)]
    with pytest.raises(ValueError, match="counted in some shards only"):
        sample.merge(parts)


def test_defaults_are_refinecodes_and_leave_a_small_corpus_alone() -> None:
    config = load_corpus_config().sample
    assert {name: b.max_bytes for name, b in config.budgets.items()} == {"java": 200 * 10**9, "html": 64 * 10**9}
    assert sample.sample(table([10**6] * 10, ["java"] * 10), config) == []
    # The paper's case: 449 GB of Java to 200, 474 GB of HTML to 64.
    parts = {
        "java": sample.Totals(np.full(sample.BINS, 449e9 / sample.BINS), 1, False),
        "html": sample.Totals(np.full(sample.BINS, 474e9 / sample.BINS), 1, False),
    }
    cuts = sample.cuts(parts, config)
    assert cuts["java"].place == pytest.approx(200 / 449, abs=2 / sample.BINS)
    assert cuts["html"].place == pytest.approx(64 / 474, abs=2 / sample.BINS)
    assert cuts["java"].kept <= 200e9


SIZES = st.lists(st.tuples(st.integers(0, 5000), st.sampled_from(["java", "html", "python"])), min_size=1, max_size=80)


@settings(max_examples=150, deadline=None)
@given(SIZES, st.randoms(use_true_random=False), st.integers(1, 6), st.integers(0, 50_000), st.integers(0, 2**70))
def test_the_choice_is_independent_of_order_and_shards(
    records: list[tuple[int, str]], draw: random.Random, shards: int, budget: int, seed: int
) -> None:
    config = SampleConfig.model_validate(
        {
            "seed": seed,
            "budgets": {"java": {"max_bytes": budget}, "html": {"ratio": 0.5}, "python": {"max_tokens": 999}},
            "bytes_per_token": 3.7,
        }
    )
    rows = table([size for size, _ in records], [name for _, name in records])
    whole = {rows["id"][d.row].as_py(): d[1:] for d in sample.sample(rows, config)}

    order = list(range(len(records)))
    draw.shuffle(order)
    cut_at = sorted(draw.randrange(len(order) + 1) for _ in range(shards - 1))
    parts = [
        rows.take(pa.array(order[a:b], pa.int64())) for a, b in zip([0, *cut_at], [*cut_at, len(order)], strict=True)
    ]
    cuts = sample.cuts(sample.merge(sample.totals(part, config) for part in parts), config)
    split = {part["id"][d.row].as_py(): d[1:] for part in parts for d in sample.decide(part, cuts, config)}
    assert split == whole
    assert kept_bytes(rows, sample.sample(rows, config), "java") <= budget


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 50_000), st.integers(0, 50_000))
def test_a_smaller_budget_keeps_a_part_of_what_a_larger_one_keeps(
    records: list[tuple[int, str]], a: int, b: int
) -> None:
    rows = table([size for size, _ in records], [name for _, name in records])
    small, large = (
        {d.row for d in sample.sample(rows, with_budget(java={"max_bytes": budget}))} for budget in sorted((a, b))
    )
    assert large <= small


def test_another_seed_draws_another_sample() -> None:
    ids = [record_id(n) for n in range(1000)]
    a, b = sample.places(ids, 1), sample.places(ids, 2)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.1
    assert abs(a.mean() - 0.5) < 0.04
    assert ((a >= 0) & (a < 1)).all()


@pytest.mark.parametrize("ids", [["abc"], ["z" * 64], [""]])
def test_ids_that_are_no_hashes_are_refused(ids: list[str]) -> None:
    with pytest.raises(ValueError, match="SHA-256"):
        sample.places(ids, 1)


def test_a_language_that_does_not_exist_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"sample\.budgets\.jave: no such language \(did you mean `java`\?\)"):
        sample.check(load_corpus_config(None, ["sample.budgets={jave: {max_bytes: 1}}"]))
    sample.check(load_corpus_config())


@pytest.mark.parametrize("budget", ["{}", "{max_bytes: 1, ratio: 0.5}"])
def test_a_budget_is_exactly_one_amount(budget: str) -> None:
    with pytest.raises(ConfigError, match="exactly one of"):
        load_corpus_config(None, [f"sample.budgets={{java: {budget}}}"])
