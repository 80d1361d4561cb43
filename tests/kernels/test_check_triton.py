"""Triton kernels compiled for sm_80 and sm_90 without a GPU, and a checker that does reject."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from opencoder.errors import Failure, UserError
from opencoder.tools import check_triton


@pytest.mark.parametrize("variant", check_triton.variants([80, 90], quick=True), ids=str)
def test_variants_of_the_presets_are_within_limits(variant: check_triton.Variant) -> None:
    code = check_triton.compiled(variant)
    assert check_triton.problems(variant, code) == []
    assert code.registers > 0


def test_a_spilling_kernel_is_rejected() -> None:
    # One warp for a row of 8192 values: 256 values for each thread do not fit in registers.
    variant = check_triton.Variant("backward", 8192, "bf16", True, 90)
    found = check_triton.problems(variant, check_triton.compiled(variant, warps=1))
    assert any("spills" in p or "stack" in p for p in found), found


def test_each_limit_is_named() -> None:
    variant = check_triton.Variant("forward", 4096, "bf16", False, 80)
    found = check_triton.problems(variant, check_triton.Code(255, 200_000, 8, 3, 0))
    assert found == [
        "stack of 8 bytes",
        "3 spills",
        "200000 bytes of shared memory, sm_80 has 166912",
        "0 128-bit loads instead of 4",
    ]


def test_narrow_loads_are_rejected() -> None:
    variant = check_triton.Variant("forward", 4096, "bf16", False, 90)
    (found,) = check_triton.problems(variant, check_triton.compiled(variant, aligned=False))
    assert found == "0 128-bit loads instead of 4"


@pytest.mark.parametrize(
    ("width", "dtype", "expected"),
    [(4096, "bf16", 4), (4096, "fp32", 8), (128, "fp32", 2), (128, "bf16", 0), (2241, "bf16", 0), (2240, "fp32", 6)],
)
def test_how_many_wide_loads_are_asked_for(width: int, dtype: str, expected: int) -> None:
    assert check_triton.expected_wide_loads(check_triton.Variant("forward", width, dtype, False, 90)) == expected


def test_wrong_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--arch 75 is not known; allowed: 80, 90, 100"):
        check_triton.main(["--arch", "75"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="unset TRITON_INTERPRET"):
        check_triton.main(["--quick"])


def test_the_numbers_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_triton, "compiled", lambda variant: check_triton.Code(40, 8, 0, 0, 99))
    assert check_triton.main(["--quick", "--arch", "90", "--json", str(tmp_path / "numbers.json")]) == 0
    rows = json.loads((tmp_path / "numbers.json").read_text())
    assert len(rows) == 8
    assert rows[0]["registers"] == 40
    assert rows[0]["problems"] == []


def test_a_broken_limit_ends_the_command_with_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_triton, "problems", lambda variant, code: ["broken on purpose"])
    monkeypatch.setattr(check_triton, "compiled", lambda variant: check_triton.Code(1, 1, 0, 0, 1))
    with pytest.raises(Failure, match="broken on purpose"):
        check_triton.main(["--quick"])
