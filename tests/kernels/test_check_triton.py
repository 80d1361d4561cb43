"""Triton kernels compiled for GPUs that are not here, and a checker that does reject."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from opencoder.errors import Failure, UserError
from opencoder.tools import check_triton

CODE = check_triton.Code(registers=40, shared=8, stack=0, spills=0, wide_loads=99, tensor_cores=9)
# The presets' shapes in their type; `opencoder check-triton` and the slow test compile all.
PRESETS = (
    " 2240 bf16",
    " 4096 bf16",
    "D=128 bf16",
    "D=160 bf16",
    " 96640 bf16",
    "swiglu",
    "rotary",
    "adamw",
    "squares",
)


def variant(name: str, arch: int = 90) -> Any:
    (found,) = [v for _, v in check_triton.variants([arch], name) if v.name == name]
    return found


def problems_of_all(archs: list[int], names: tuple[str, ...] = ("",)) -> tuple[int, dict[str, list[str]]]:
    wanted = [(arch, v) for arch, v in check_triton.variants(archs) if any(name in v.name for name in names)]
    codes = check_triton.compiled_apart(wanted, os.cpu_count() or 1)
    found = {
        f"{v.name} sm_{arch}": check_triton.problems(v, code, arch)
        for (arch, v), code in zip(wanted, codes, strict=True)
    }
    return len(wanted), {name: problems for name, problems in found.items() if problems}


def test_variants_of_the_presets_are_within_limits() -> None:
    number, problems = problems_of_all([80, 90], PRESETS)
    assert number > 100
    assert problems == {}


@pytest.mark.slow
def test_all_variants_are_within_limits() -> None:
    number, problems = problems_of_all([80, 90, 100])
    assert number > 500
    assert problems == {}


def test_a_spilling_kernel_is_rejected() -> None:
    # One warp for a row of 8192 values: 256 values for each thread do not fit in registers.
    spilling = variant("rms_norm backward 8192 bf16 residual")._replace(warps=1)
    found = check_triton.problems(spilling, check_triton.compiled(spilling, 90), 90)
    assert any("spills" in p or "stack" in p for p in found), found


def test_narrow_loads_are_rejected() -> None:
    v = variant("rms_norm forward 4096 bf16")
    (found,) = check_triton.problems(v, check_triton.compiled(v, 90, aligned=False), 90)
    assert found == "0 128-bit loads instead of 4"


def test_products_without_hoppers_instruction_are_rejected() -> None:
    v = variant("attention dq D=128 fp32 window softcap")  # tiles of 16 rows, in tf32: Ampere's instruction
    assert check_triton.problems(v._replace(tensor_cores=True), check_triton.compiled(v, 90), 90) == ["no HGMMA"]


@pytest.mark.fast
def test_each_limit_is_named() -> None:
    code = check_triton.Code(255, 200_000, 8, 3, 0, 0)
    v = variant("attention forward D=128 bf16")
    assert check_triton.problems(v, code, 80) == [
        "stack of 8 bytes",
        "3 spills",
        "200000 bytes of shared memory, sm_80 has 166912",
        "0 128-bit loads instead of 8",
        "no HMMA",
    ]
    assert check_triton.problems(v, code._replace(stack=0, spills=0, wide_loads=8), 90) == ["no HGMMA"]
    assert check_triton.problems(v, "the compiler crashed", 90) == ["the compiler crashed"]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "expected"),
    [("forward 4096 bf16", 4), ("forward 4096 fp32", 8), ("forward 128 fp32", 2), ("forward 128 bf16", 0),
     ("forward 2240 fp32 residual", 9), ("backward 2240 bf16 residual fp32 weight", 6)],
)  # fmt: skip
def test_how_many_wide_loads_are_asked_for(name: str, expected: int) -> None:
    assert variant(f"rms_norm {name}").wide_loads == expected


@pytest.mark.fast
def test_wrong_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--arch 75 is not known; allowed: 80, 90, 100"):
        check_triton.main(["--arch", "75"])
    with pytest.raises(UserError, match="--kernel nothing: no variant"):
        check_triton.main(["--kernel", "nothing"])
    with pytest.raises(UserError, match="--workers 0; it must be positive"):
        check_triton.main(["--workers", "0"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="unset TRITON_INTERPRET"):
        check_triton.main([])


def test_a_crash_of_the_compiler_and_a_refusal_are_rows_of_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def compiled(v: Any, arch: int) -> check_triton.Code:
        if v.name == "squares bf16":
            os._exit(7)  # what a crash looks like from outside
        if v.name == "squares fp32":
            raise ValueError("no such\ninstruction")
        return CODE

    monkeypatch.setattr(check_triton, "compiled", compiled)
    with pytest.raises(Failure, match=r"2 limits broken, the first: squares bf16 sm_90: the compiler crashed"):
        check_triton.main(["--kernel", "s", "--arch", "90", "--json", str(tmp_path / "numbers.json")])
    text = capsys.readouterr().out
    assert "the compiler crashed (status 7)" in text
    assert "does not compile: ValueError: no such instruction" in text
    rows = json.loads((tmp_path / "numbers.json").read_text())
    assert sum(row["problems"] == [] for row in rows) == len(rows) - 2
    assert rows[0] == {"kernel": rows[0]["kernel"], "arch": 90, **CODE._asdict(), "problems": []}
