"""Compile the Triton kernels for GPUs that are not here and look at the machine code: registers, stack, spills, shared
memory, and whether contiguous rows are read 128 bits at a time. Exit status 1 if a variant breaks a limit.

The checks and what each is worth: a spilling kernel can show few registers, so STACK and local loads are what is tested;
the compiler accepts more shared memory than a chip has, so the limit is tested here."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opencoder.console import Parser, run
from opencoder.errors import Failure, UserError
from opencoder.files import write_json

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one block can have."""
WIDTHS = (128, 1024, 2240, 4096, 8192)
"""Row widths: the presets' among them."""
TYPES = {"fp32": ("*fp32", 4), "bf16": ("*bf16", 2), "fp16": ("*fp16", 2)}


class Variant(NamedTuple):
    """One kernel for one shape class."""

    kernel: str
    width: int
    dtype: str
    residual: bool
    arch: int


class Code(NamedTuple):
    """What the machine code says."""

    registers: int
    shared: int
    stack: int
    spills: int
    """Loads and stores of thread-local memory."""
    wide_loads: int
    """128-bit loads from global memory."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and print the table."""
    parser = Parser("check-triton", "Compile the Triton kernels for GPUs without one and check the machine code.")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities, e.g. 80 90")
    parser.add_argument("--quick", action="store_true", help="a few variants only")
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args(argv)
    if unknown := [a for a in args.arch if a not in SHARED_LIMIT]:
        raise UserError(f"--arch {unknown[0]} is not known; allowed: {', '.join(map(str, SHARED_LIMIT))}")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise UserError("check-triton needs triton: pip install triton==3.8.0") from error
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("check-triton compiles; unset TRITON_INTERPRET, with which Triton only interprets")
    print(
        f"{'kernel':<10}{'width':>6} {'type':<5}{'residual':<9}{'sm':>4}{'regs':>6}{'shared':>8}{'stack':>6}{'spills':>7}{'LDG.128':>8}"
    )
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for variant in variants(args.arch, quick=args.quick):
        code = compiled(variant)
        found = problems(variant, code)
        faults += found
        rows.append({**variant._asdict(), **code._asdict(), "problems": found})
        v, c = variant, code
        print(
            f"{v.kernel:<10}{v.width:>6} {v.dtype:<5}{'yes' if v.residual else 'no':<9}{v.arch:>4}{c.registers:>6}{c.shared:>8}"
            f"{c.stack:>6}{c.spills:>7}{c.wide_loads:>8}  {'; '.join(found)}"
        )
    if args.json:
        write_json(args.json, rows)
    if faults:
        raise Failure(f"{len(faults)} limits broken, the first: {faults[0]}")
    print(f"{len(rows)} variants within limits")
    return 0


def variants(archs: Sequence[int], *, quick: bool = False) -> Iterator[Variant]:
    """What is compiled."""
    widths, types = ((2240, 4096), ("bf16",)) if quick else (WIDTHS, tuple(TYPES))
    for kernel, width, dtype, residual, arch in itertools.product(
        ("forward", "backward"), widths, types, (False, True), archs
    ):
        yield Variant(kernel, width, dtype, residual, arch)


def compiled(variant: Variant, *, warps: int | None = None, aligned: bool = True) -> Code:
    """Compile one variant to a cubin and read it; `warps` overrides the table of configs.py, and without `aligned` the
    compiler may not assume pointers to be multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from opencoder.kernels.triton_kernels import rms_norm
    from opencoder.kernels.triton_kernels.configs import launch

    settings = launch(variant.width, 4096)
    pointer = TYPES[variant.dtype][0]
    if variant.kernel == "forward":
        function, flag = rms_norm.forward_kernel, "HAS_RESIDUAL"
        kinds = {"x_ptr": pointer, "residual_ptr": pointer, "weight_ptr": pointer, "y_ptr": pointer, "total_ptr": pointer,
                 "rstd_ptr": "*fp32", "eps": "fp32"}  # fmt: skip
    else:
        function, flag = rms_norm.backward_kernel, "HAS_DTOTAL"
        kinds = {"dy_ptr": pointer, "dtotal_ptr": pointer, "x_ptr": pointer, "weight_ptr": pointer, "rstd_ptr": "*fp32",
                 "dx_ptr": pointer, "parts_ptr": "*fp32", "rows": "i32"}  # fmt: skip
    constants: dict[str, Any] = {
        "WIDTH": variant.width,
        "BLOCK": settings.block,
        flag: variant.residual,
        "REAL": triton.language.float32,
    }
    signature = {**kinds, **dict.fromkeys(constants, "constexpr")}
    # The JIT would find every pointer of a torch tensor aligned to 16 bytes; here it has to be said.
    pointers = [i for i, kind in enumerate(kinds.values()) if kind.startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers} if aligned else {}
    source = ASTSource(function, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps or settings.warps, "enable_fp_fusion": True}
    with tempfile.TemporaryDirectory() as cache:
        before = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            binary = triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options=options)
        finally:
            os.environ.pop("TRITON_CACHE_DIR") if before is None else os.environ.update(TRITON_CACHE_DIR=before)
        file = Path(cache) / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        return read_code(file, int(binary.metadata.shared))


def read_code(cubin: Path, shared: int) -> Code:
    """Resource usage and instructions of a cubin, by the tools in triton's wheel."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    usage = subprocess.run(
        [tools / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    text = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    spills = len(re.findall(r"\b(?:LDL|STL)\b", text))
    wide = len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128\b", text))
    return Code(numbers["REG"], shared, numbers["STACK"], spills, wide)


def problems(variant: Variant, code: Code) -> list[str]:
    """The limits a variant breaks."""
    found = []
    if code.stack:
        found.append(f"stack of {code.stack} bytes")
    if code.spills:
        found.append(f"{code.spills} spills")
    if code.shared > SHARED_LIMIT[variant.arch]:
        found.append(f"{code.shared} bytes of shared memory, sm_{variant.arch} has {SHARED_LIMIT[variant.arch]}")
    if code.wide_loads < (expected := expected_wide_loads(variant)):
        found.append(f"{code.wide_loads} 128-bit loads instead of {expected}")
    return found


def expected_wide_loads(variant: Variant) -> int:
    """128-bit loads of a kernel that reads its rows in nothing narrower; 0 where 16 bytes do not divide a row, or the
    row is too short to give each thread 16."""
    from opencoder.kernels.triton_kernels.configs import launch

    settings, size = launch(variant.width, 4096), TYPES[variant.dtype][1]
    values_at_once = 32 * settings.warps * 16 // size
    if variant.width * size % 16 or settings.block < values_at_once:
        return 0
    tensors = (2 if variant.kernel == "forward" else 3) + variant.residual  # x, weight; dy, x, weight
    return tensors * -(-variant.width // values_at_once)


if __name__ == "__main__":
    run(main)
