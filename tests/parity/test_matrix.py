"""Every layout equals one process, in fp64: loss, gradient norm, clip factor, every parameter gradient and every updated
weight, with loss masks that differ between ranks and micro-batches. What runs is the trainer's own step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opencoder.checkpoint import folders, native
from tests.harness import run_cases, run_ranks
from tests.model.cases import SMALL
from tests.parity.cases import CASES, SAMPLES, Case, product_of_axes
from tests.parity.update import TOLERANCE, Outcome, errors, one_update, run_all, save_update, worst


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, float]]:
    return run_all(CASES)


@pytest.mark.parametrize("name", CASES)
def test_layout_equals_one_process(name: str, table: dict[str, dict[str, float]]) -> None:
    found = table[name]
    head = "embed_tokens" if CASES[name].base.get("tie_embeddings") else "lm_head"
    assert {"loss", "norm", "clip", "targets", "evaluation"} <= set(found)
    assert any(key.startswith("gradient ") and head in key for key in found)
    assert {key: error for key, error in found.items() if not error <= TOLERANCE} == {}


@pytest.mark.slow
def test_every_combination_of_axes_and_schedules_equals_one_process() -> None:
    cases = product_of_axes()
    assert len(cases) == 7 + 4 + 4 * (7 + 3)  # without a pipeline, of these with tp once more, and the same with one
    for name, found in run_all(cases).items():
        assert {key: error for key, error in found.items() if not error <= TOLERANCE} == {}, name


@pytest.mark.parametrize("name", ["tp4-kv2", "dp2-tp2-sharded-sp", "pp2-dp2-sharded-zbv", "cp2-dp2", "tp2-tied"])
def test_gradients_and_weights_that_a_checkpoint_holds_equal_those_of_one_process(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    truth = run_ranks(one_update, 1, case.truth)[0]
    run_ranks(save_update, case.world, case, str(tmp_path))
    expected = truth.weights | {f"optim.exp_avg.{key}": gradient for key, gradient in truth.gradients.items()}
    found = {key: torch.full_like(tensor, float("nan")) for key, tensor in expected.items()}
    native.load_whole(folders.resolve(tmp_path), found)
    apart = {key: float((found[key] - tensor).norm() / tensor.norm()) for key, tensor in expected.items()}
    assert {key: error for key, error in apart.items() if not error <= TOLERANCE} == {}


def test_the_case_clips_and_masks_unevenly() -> None:
    truth = run_cases(one_update, 1, {"one": (Case(1, SMALL, SAMPLES),)})["one"][0]
    assert 0 < truth.numbers["clip"] < 1
    assert 0 < truth.numbers["targets"] < SAMPLES * 64


def test_fp32_tensors_differ_by_no_more_than_their_own_fp32_noise() -> None:
    layouts = {
        "tp2-dp2": Case(4, SMALL, 2, {"tp": 2}),
        "tp2-cp2-sp": Case(4, SMALL, 2, {"tp": 2, "cp": 2, "sequence_parallel": True}),
        "pp2-dp2-sharded": Case(4, SMALL, 2, {"pp": 2, "sharded_optimizer": True}),
    }
    truth = layouts["tp2-dp2"].truth
    one = run_cases(one_update, 1, {"fp64": (truth,), "fp32": (truth, torch.float32)})
    noise = errors(one["fp32"][0], one["fp64"][0])
    # A tensor has many roundings, a number may be right by luck: it has at least one.
    bars = {key: 4 * (e if " " in key else max(e, 2**-24)) for key, e in noise.items()}
    found = run_cases(one_update, 4, {name: (case, torch.float32) for name, case in layouts.items()})
    for name, ranks in found.items():
        assert {key: e for key, e in worst(ranks, one["fp64"][0]).items() if not e <= bars[key]} == {}, name


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
