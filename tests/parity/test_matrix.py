"""Every layout equals one process, in fp64: loss, gradient norm, clip factor, every parameter gradient and every updated
weight, with loss masks that differ between ranks and micro-batches. What runs is the trainer's own step."""

from __future__ import annotations

import pytest
import torch

from tests.harness import run_cases
from tests.model.cases import SMALL
from tests.parity.cases import CASES, SAMPLES, Case
from tests.parity.update import TOLERANCE, Outcome, errors, one_update, run_all, worst


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, float]]:
    return run_all(CASES)


@pytest.mark.parametrize("name", CASES)
def test_layout_equals_one_process(name: str, table: dict[str, dict[str, float]]) -> None:
    found = table[name]
    head = "embed_tokens" if CASES[name].base.get("tie_embeddings") else "lm_head"
    assert {"loss", "norm", "clip", "targets", "evaluation"} <= set(found)
    assert any(key.startswith("gradient ") and head in key for key in found)
    assert {key: error for key, error in found.items() if error > TOLERANCE} == {}


def test_the_case_clips_and_masks_unevenly() -> None:
    truth = run_cases(one_update, 1, {"one": (Case(1, SMALL, SAMPLES),)})["one"][0]
    assert 0 < truth.numbers["clip"] < 1
    assert 0 < truth.numbers["targets"] < SAMPLES * 64


def test_fp32_layouts_differ_by_no_more_than_fp32_noise() -> None:
    case = Case(4, SMALL, 2, {"tp": 2})
    truth = run_cases(one_update, 1, {"fp64": (case.truth,), "fp32": (case.truth, torch.float32)})
    noise = errors(truth["fp32"][0], truth["fp64"][0])
    found = worst(run_cases(one_update, 4, {"": (case, torch.float32)})[""], truth["fp64"][0])
    floor = max(noise.values())
    assert {key: e for key, e in found.items() if e > 4 * max(noise[key], floor)} == {}


@pytest.mark.fast
def test_errors_see_a_wrong_number_a_wrong_tensor_and_nan() -> None:
    part = {"w": (slice(0, 2),)}
    truth = Outcome({"loss": 2.0}, {"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([1.0, 0.0])}, part)
    other = Outcome({"loss": 2.2}, {"w": torch.tensor([3.0, 9.0])}, {"w": torch.tensor([1.0, float("nan")])}, part)
    assert worst([truth], truth) == {"loss": 0.0, "gradient w": 0.0, "weight w": 0.0}
    found = worst([truth, other], truth)
    assert found["loss"] == pytest.approx(0.1)
    assert found["gradient w"] == pytest.approx(1.0)
    assert found["weight w"] == float("inf")
    with pytest.raises(AssertionError, match="no rank holds"):
        worst([Outcome({"loss": 2.0}, {}, {}, {})], truth)
