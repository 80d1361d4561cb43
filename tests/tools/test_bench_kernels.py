"""The kernel benchmark as a tool: it compares before it times, names what is wrong, judges goals, draws. No time is tested."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from opencoder.errors import UserError
from opencoder.tools import bench_kernels, tune_kernels
from opencoder.tools.kernel_bench import eager
from opencoder.tools.kernel_bench.cases import Case, all_cases
from opencoder.tools.kernel_bench.goals import goals_of
from opencoder.tools.kernel_bench.measure import peak_extra, quantiles
from opencoder.tools.kernel_bench.prepared import Prepared

CPU = torch.device("cpu")


def case(**contenders: Any) -> Case:
    def inputs(device: torch.device) -> list[torch.Tensor]:
        return [torch.linspace(1, 2, 64, device=device)]

    return Case("square", "64", torch.float32, True, inputs, contenders, lambda x: x * x, 256, traffic=1024)


def test_wrong_results_and_failures_are_named_and_not_timed() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel\nimage")

    prepared = Prepared(
        case(
            ours=lambda x: x * x,
            value=lambda x: x * x + 1e-3,
            gradient=lambda x: (x * x).detach() + x - x.detach(),
            nan=lambda x: x * x * torch.nan,
            absent=fails,
        ),
        CPU,
    )
    wrong = prepared.wrong()
    assert set(wrong) == {"value", "gradient", "nan", "absent"}
    assert wrong["value"].startswith("error ")
    assert wrong["absent"] == "RuntimeError: no kernel image"


def test_the_first_cpu_rows_are_right_and_are_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--device", "cpu", "--only", "swiglu 256x1024", "--rounds", "1", "--no-compile", "--default-malloc"]
    argv += ["--json", str(tmp_path / "rows.json"), "--plots", str(tmp_path / "plots")]
    assert bench_kernels.main(argv) == 0
    result = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in result["rows"]] == [
        "swiglu 256x1024 float32 forward",
        "swiglu 256x1024 float32 fwd+bwd",
    ]
    for row in result["rows"]:
        assert row["wrong"] == {}
        assert set(row["contenders"]) == {"ours", "eager"}
        ours = row["contenders"]["ours"]
        assert ours["best_ms"] <= ours["q50_ms"]
        assert math.isclose(ours["rate"], row["work"] / ours["best_ms"] * 1e3, rel_tol=1e-9)
        assert math.isclose(ours["share_of_limit"], ours["rate"] / row["limit_rate"], rel_tol=1e-9)
        assert row["goals"] == []  # 1 MB rows are reported only
    assert {"device", "torch", "triton", "date", "command", "malloc", "kernels"} <= set(result["environment"])
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["swiglu_forward.png", "swiglu_fwd-bwd.png"]
    text = capsys.readouterr().out
    assert "of copy" in text
    assert "0 of 0 goals met" in text


def test_every_operator_of_the_issue_has_a_row_and_each_name_is_one() -> None:
    names = [c.name for c in all_cases(CPU)]
    assert len(names) == len(set(names))
    operators = {c.operator for c in all_cases(CPU)}
    assert operators >= {
        "add+rms_norm", "swiglu", "rotary", "cross_entropy", "linear_cross_entropy", "packed attention", "attention",
        "adamw + clip", "grad_norm",
    }  # fmt: skip


def test_goals_hold_for_rows_of_their_size() -> None:
    found = {c.name: goals_of(c, "cpu") for c in all_cases(CPU)}
    assert found["swiglu 256x1024 float32 forward"] == []
    assert [g.at_least for g in found["swiglu 2048x1024 float32 forward"]] == [1.9, 1.0]
    assert [g.at_least for g in found["swiglu 32768x1024 float32 forward"]] == pytest.approx([1.14, 0.6])
    assert found["swiglu 32768x1024 float32 fwd+bwd"] == []
    assert {g.row for g in found["rotary 4x1024 8/4x64 float32 forward"]} == {"ours", "ours in place"}
    assert found["cross_entropy 128x32000 float32 fwd+bwd"] == []
    assert [g.contender for g in found["linear_cross_entropy 4096x512x96640 float32 fwd+bwd"]] == [
        "eager",
        "F.linear_cross_entropy",
        "eager",
    ]


def test_goals_are_judged_by_the_best_times_and_against_the_limit() -> None:
    from opencoder.tools.kernel_bench.goals import Goal

    row = {"name": "n", "limit": "copy", "contenders": {
        "ours": {"best_ms": 2.0, "share_of_limit": 0.7}, "eager": {"best_ms": 5.0, "share_of_limit": 0.28},
    }}  # fmt: skip
    judged = bench_kernels.judge(Goal("x", False, "eager", 2.6), row)
    assert judged is not None
    assert (judged["ratio"], judged["met"]) == (2.5, False)
    judged = bench_kernels.judge(Goal("x", False, "copy", 0.7), row)
    assert judged is not None
    assert judged["met"]
    assert bench_kernels.judge(Goal("x", False, "liger", 1.0), row) is None
    row["contenders"]["ours"]["peak_bytes"], row["contenders"]["eager"]["peak_bytes"] = 10, 30
    judged = bench_kernels.judge(Goal("x", False, "eager", 4.0, peak=True), row)
    assert judged is not None
    assert (judged["ratio"], judged["met"]) == (3.0, False)


def test_the_truth_in_parts_is_the_plain_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 8, generator=generator).double().requires_grad_() for n in (1100, 30))
    targets = torch.randint(0, 30, (1100,), generator=generator)
    for a, b in zip(
        torch.autograd.grad(eager.linear_cross_entropy(x, w, targets=targets), (x, w)),
        torch.autograd.grad(eager.linear_cross_entropy_in_parts(x, w, targets=targets), (x, w)),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kept", [0, 256 << 20], ids=["tidy", "allocator keeps freed memory"])
def test_peak_memory_counts_what_is_needed_beyond_what_is_there(kept: int) -> None:
    size = 64 << 20
    there = torch.ones(size // 4)
    block = 16 << 10  # small enough to come from the heap, which is not given back below what still stands on it
    heap = [bytearray(block) for _ in range(kept // block)]
    stands = heap[-1:]
    del heap

    def run() -> None:
        torch.ones(size // 4).add_(1.0)

    assert 0.9 * size <= peak_extra(run, CPU) <= 1.3 * size
    assert there.numel()
    assert len(stands) <= 1


def test_quantiles() -> None:
    times = quantiles([float(i) for i in range(11)])
    assert times == (0.0, 2.0, 5.0, 8.0)
    assert quantiles([3.0]) == (3.0,) * 4


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--only", "no such case"], "no case's name contains it"),
        (["--rounds", "0"], "--rounds 0"),
        (["--device", "cuda"], "torch sees no CUDA device"),
    ],
)
def test_wrong_use_is_told(argv: list[str], says: str) -> None:
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UserError, match=says):
        bench_kernels.main([*argv, "--default-malloc"])


# ---- tuner ----


def test_the_tuner_drops_what_spills_and_puts_the_table_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from opencoder.kernels.triton_kernels import configs

    before = dict(configs.TABLE)
    argv = ["--arch", "90", "--compile-only", "--kernel", "rms_norm forward", "--size", "8192", "--workers", "2"]
    assert tune_kernels.main([*argv, "--json", str(tmp_path / "rows.json")]) == 0
    assert before == configs.TABLE
    rows = json.loads((tmp_path / "rows.json").read_text())
    warps = {row["warps"] for row in rows}
    assert 16 in warps
    assert 1 not in warps  # 256 values for each thread do not fit in registers
    assert f"{len(rows)} of 6 within limits" in capsys.readouterr().out


def test_wrong_use_of_the_tuner_is_told() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    with pytest.raises(UserError, match="no such task; kernels: rms_norm forward"):
        tune_kernels.main(["--kernel", "softmax"])
    with pytest.raises(UserError, match="--arch 75 is not known"):
        tune_kernels.main(["--arch", "75", "--compile-only"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device to measure on"):
            tune_kernels.main([])
