"""Compile the Triton kernels for GPUs that are not here and look at the machine code: registers, stack, spills, shared
memory, whether contiguous rows are read 128 bits at a time, and whether attention uses the tensor cores' own
instruction on sm_90. Exit status 1 if a variant breaks a limit.

The checks and what each is worth: a spilling kernel can show few registers, so STACK and local loads are what is tested;
the compiler accepts more shared memory than a chip has, so the limit is tested here."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from opencoder.console import Parser, run
from opencoder.errors import Failure, UserError
from opencoder.files import write_json

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one block can have."""
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""The widest matrix instruction for 16-bit types."""
MODULES = ("rms_norm", "elementwise", "cross_entropy", "optimizer", "attention")


class Code(NamedTuple):
    """What the machine code says."""

    registers: int
    shared: int
    stack: int
    spills: int
    """Loads and stores of thread-local memory."""
    wide_loads: int
    """128-bit loads from global memory, those straight to shared memory included."""
    tensor_cores: int
    """Matrix instructions of the architecture's own kind."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and print the table."""
    parser = Parser("check-triton", "Compile the Triton kernels for GPUs without one and check the machine code.")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities: 80, 90, 100")
    parser.add_argument("--kernel", default="", help="only variants whose name contains this")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="variants compiled at a time")
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args(argv)
    if unknown := [a for a in args.arch if a not in SHARED_LIMIT]:
        raise UserError(f"--arch {unknown[0]} is not known; allowed: {', '.join(map(str, SHARED_LIMIT))}")
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}; it must be positive")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise UserError("check-triton needs triton: pip install triton==3.8.0") from error
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("check-triton compiles; unset TRITON_INTERPRET, with which Triton only interprets")
    wanted = list(variants(args.arch, args.kernel))
    if not wanted:
        raise UserError(f"--kernel {args.kernel}: no variant's name contains it")
    print(
        f"{'kernel':<46}{'sm':>4}{'regs':>6}{'shared':>8}{'stack':>6}{'spills':>7}{'128-bit':>8}{'wanted':>7}{'MMA':>5}"
    )
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for (arch, variant), code in zip(wanted, compiled_apart(wanted, args.workers), strict=True):
        found = problems(variant, code, arch)
        faults += [f"{variant.name} sm_{arch}: {problem}" for problem in found]
        numbers = {} if isinstance(code, str) else code._asdict()
        rows.append({"kernel": variant.name, "arch": arch, **numbers, "problems": found})
        print(row_of(variant, arch, code, found), flush=True)
    if args.json:
        write_json(args.json, rows)
    if faults:
        raise Failure(f"{len(faults)} limits broken, the first: {faults[0]}")
    print(f"{len(rows)} variants within limits")
    return 0


def row_of(variant: Any, arch: int, code: Code | str, found: Sequence[str]) -> str:
    """A line of the table."""
    numbers = f"{'-':>44}"
    if not isinstance(code, str):
        numbers = f"{code.registers:>6}{code.shared:>8}{code.stack:>6}{code.spills:>7}{code.wide_loads:>8}"
        numbers += f"{variant.wide_loads:>7}{code.tensor_cores:>5}"
    return f"{variant.name:<46}{arch:>4}{numbers}  {'; '.join(found)}".rstrip()


def variants(archs: Sequence[int], name: str = "") -> Iterator[tuple[int, Any]]:
    """(compute capability, what is compiled): each kernel module knows its own shape classes."""
    import importlib

    for module in MODULES:
        kernels = importlib.import_module(f"opencoder.kernels.triton_kernels.{module}")
        for arch in archs:
            yield from ((arch, v) for v in kernels.variants(arch) if name in v.name)


def compiled_apart(wanted: Sequence[tuple[int, Any]], workers: int) -> Iterator[Code | str]:
    """Each variant compiled in a process of its own, `workers` at a time: a crash of the compiler, which has been seen, is
    then one row's problem. Yields in order; a text says why there is no code."""
    waiting = list(enumerate(wanted))[::-1]
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    done: dict[int, Code | str] = {}
    context = multiprocessing.get_context("fork")  # the kernels need not be imported again
    for i in range(len(wanted)):
        while i not in done:
            while waiting and len(running) < workers:
                number, (arch, variant) = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_send_code, args=(theirs, variant, arch))
                process.start()
                theirs.close()
                running[ours] = number, process
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                finished, child = running.pop(pipe)
                try:
                    done[finished] = pipe.recv()
                except EOFError:
                    child.join()
                    done[finished] = f"the compiler crashed (status {child.exitcode})"
                child.join()
        yield done.pop(i)


def _send_code(pipe: Connection, variant: Any, arch: int) -> None:
    try:
        pipe.send(compiled(variant, arch))
    except Exception as error:  # the compiler raises many types; the text goes into the table and fails the command
        pipe.send(f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def compiled(variant: Any, arch: int, *, aligned: bool = True) -> Code:
    """Compile one variant to a cubin and read it. Without `aligned` the compiler may not assume pointers to be multiples
    of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = variant.signature | dict.fromkeys(variant.constants, "constexpr")
    kinds = {name: kinds[name] for name in variant.kernel.arg_names}
    # The JIT would find every pointer of a torch tensor aligned to 16 bytes; here it has to be said.
    known = [i for i, kind in enumerate(kinds.values()) if kind.endswith(":16") or (aligned and kind.startswith("*"))]
    signature = {name: kind.removesuffix(":16") for name, kind in kinds.items()}
    attributes = {(i,): [["tt.divisibility", 16]] for i in known}
    source = ASTSource(variant.kernel, signature, constexprs=variant.constants, attrs=attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    with tempfile.TemporaryDirectory() as cache:
        before = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        finally:
            os.environ.pop("TRITON_CACHE_DIR") if before is None else os.environ.update(TRITON_CACHE_DIR=before)
        file = Path(cache) / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        return read_code(file, int(binary.metadata.shared), arch)


def read_code(cubin: Path, shared: int, arch: int) -> Code:
    """Resource usage and instructions of a cubin, by the tools in triton's wheel."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    usage = subprocess.run(
        [tools / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    text = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    spills = len(re.findall(r"\b(?:LDL|STL)\b", text))
    wide = len(re.findall(r"\bLDG(?:STS)?\.E(?:\.\w+)*\.128\b", text))
    matrix = len(re.findall(rf"\b{MATRIX_INSTRUCTION[arch]}\b", text))
    return Code(numbers["REG"], shared, numbers["STACK"], spills, wide, matrix)


def problems(variant: Any, code: Code | str, arch: int) -> list[str]:
    """The limits a variant breaks."""
    if isinstance(code, str):
        return [code]
    found = []
    if code.stack:
        found.append(f"stack of {code.stack} bytes")
    if code.spills:
        found.append(f"{code.spills} spills")
    if code.shared > SHARED_LIMIT[arch]:
        found.append(f"{code.shared} bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}")
    if code.wide_loads < variant.wide_loads:
        found.append(f"{code.wide_loads} 128-bit loads instead of {variant.wide_loads}")
    if variant.tensor_cores and not code.tensor_cores:
        found.append(f"no {MATRIX_INSTRUCTION[arch]}")
    return found


if __name__ == "__main__":
    run(main)
