"""Triton kernels compiled for sm_80 and sm_90 without a GPU, and a checker that does reject."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from opencoder.errors import Failure
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
        "no 128-bit loads",
    ]


def test_a_broken_limit_ends_the_command_with_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_triton, "problems", lambda variant, code: ["broken on purpose"])
    monkeypatch.setattr(check_triton, "compiled", lambda variant: check_triton.Code(1, 1, 0, 0, 1))
    with pytest.raises(Failure, match="broken on purpose"):
        check_triton.main(["--quick"])
