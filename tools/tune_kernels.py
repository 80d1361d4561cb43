"""`opencoder tune-kernels`: find launch settings for the table in kernels/triton_kernels/configs.py.

Candidates that spill, want more shared memory than the chip has or read in small pieces are dropped by compiling them,
which needs no GPU. On a GPU the rest are timed and the best printed as rows of the table; elsewhere what is left is
listed. Nothing is tuned while a model runs: the table is data, and a change of it is a commit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from opencoder.console import Parser, ProgressBar, run
from opencoder.errors import UserError
from opencoder.files import write_json
from opencoder.tools import check_triton


class Task(NamedTuple):
    """One row of the table to fill."""

    kernel: str
    size: int
    """Shape class: row width, head dim; 0 where there is one class."""
    module: str
    variants: tuple[str, ...]
    """Names of the variants that must be within limits, as check-triton knows them."""
    candidates: tuple[dict[str, int], ...]
    """Fields of a Launch to try."""


def _grid(**values: Sequence[int]) -> tuple[dict[str, int], ...]:
    return tuple(dict(zip(values, row, strict=True)) for row in itertools.product(*values.values()))


TILES = _grid(block=(32, 64, 128), block_n=(32, 64, 128), warps=(4, 8), stages=(1, 2, 3))
TASKS: tuple[Task, ...] = (
    *(
        Task(f"rms_norm {way}", width, "rms_norm", (f"rms_norm {way} {width} bf16 residual",),
             _grid(block=(width,), warps=(1, 2, 4, 8, 16, 32), programs=(0,) if way == "forward" else (132, 264, 528, 1056, 2112)))
        for way in ("forward", "backward") for width in (1024, 4096, 8192)
    ),
    *(
        Task(f"swiglu {way}", 0, "elementwise", (f"swiglu {way} bf16",), _grid(block=(1024, 2048, 4096), warps=(4, 8)))
        for way in ("forward", "backward")
    ),
    Task("rotary", 0, "elementwise", ("rotary 14/14x160 bf16", "rotary 32/8x128 bf16"), _grid(block=(0,), warps=(1, 2, 4, 8))),
    Task("cross_entropy", 96640, "cross_entropy", ("cross_entropy forward 96640 bf16", "cross_entropy backward 96640 bf16"),
         _grid(block=(2048, 4096, 8192, 16384), warps=(4, 8, 16, 32))),
    Task("adamw", 0, "optimizer", ("adamw bf16 grad bf16 master",),
         _grid(block=(512, 1024, 2048), warps=(4, 8), chunk=(16384, 32768, 65536))),
    Task("squares", 0, "optimizer", ("squares bf16",), _grid(block=(1024, 2048), warps=(4, 8), chunk=(16384, 32768, 65536))),
    *(
        Task(f"attention {way}", d, "attention", (f"attention {way} D={d} bf16", f"attention {way} D={d} bf16 window softcap"), TILES)
        for way in ("forward", "dq", "dkdv") for d in (64, 128, 160, 256)
    ),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Try the candidates and print rows."""
    parser = Parser("tune-kernels", "Find launch settings of the Triton kernels for one architecture.")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this, e.g. 'attention dq'")
    parser.add_argument("--size", type=int, help="only this shape class (row width, head dim)")
    parser.add_argument("--arch", type=int, help="compute capability to compile for (default: the GPU's)")
    parser.add_argument("--compile-only", action="store_true", help="list what is within limits, on any machine")
    parser.add_argument("--workers", type=int, default=8, help="candidates compiled at a time")
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args(argv)
    tasks = [t for t in TASKS if args.kernel in t.kernel and args.size in (None, t.size)]
    if not tasks:
        raise UserError(
            f"--kernel {args.kernel} --size {args.size}: no such task; kernels: {', '.join(dict.fromkeys(t.kernel for t in TASKS))}"
        )

    import torch

    measured = torch.cuda.is_available() and not args.compile_only
    if not measured and args.arch is None:
        raise UserError(
            "no CUDA device to measure on: give --arch 80, 90 or 100 with --compile-only to see what would fit"
        )
    arch = args.arch or 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    if arch not in check_triton.SHARED_LIMIT:
        raise UserError(f"--arch {arch} is not known; allowed: {', '.join(map(str, check_triton.SHARED_LIMIT))}")
    report: list[dict[str, Any]] = []
    for task in tasks:
        fitting = within_limits(task, arch, args.workers)
        print(
            f"{task.kernel}, size {task.size or 'any'}, sm_{arch}: {len(fitting)} of {len(task.candidates)} within limits"
        )
        rows = timed(task, fitting, arch) if measured else [(launch, None) for launch in fitting]
        for launch, milliseconds in rows[:5] if measured else rows:
            took = "" if milliseconds is None else f"{milliseconds:.4f} ms  "
            print(f"    {took}({task.size or 'ANY'}, {launch!r}),")
        report += [
            {"kernel": task.kernel, "size": task.size, "arch": arch, **launch._asdict(), "ms": ms}
            for launch, ms in rows
        ]
    if args.json:
        write_json(args.json, report)
    return 0


@contextmanager
def settings(task: Task, arch: int, launch: Any) -> Iterator[None]:
    """The table as if it had only this row for 16-bit values of the task's kernel."""
    from opencoder.kernels.triton_kernels import configs

    key = (task.kernel, arch, 2)
    before = configs.TABLE.get(key)
    configs.TABLE[key] = ((configs.ANY, launch),)
    configs.settings.cache_clear()
    try:
        yield
    finally:
        configs.TABLE.pop(key) if before is None else configs.TABLE.update({key: before})
        configs.settings.cache_clear()


def within_limits(task: Task, arch: int, workers: int) -> list[Any]:
    """The candidates that compile to code without stack, spills and narrow loads."""
    import importlib

    from opencoder.kernels.triton_kernels.configs import Launch

    kernels = importlib.import_module(f"opencoder.kernels.triton_kernels.{task.module}")
    launches = [Launch(**fields) for fields in task.candidates]
    wanted, owners = [], []
    for launch in launches:
        with settings(task, arch, launch):
            # A candidate may have so many warps that a thread has less than 16 bytes to load: only spills count here.
            found = [v._replace(wide_loads=0) for v in kernels.variants(arch) if v.name in task.variants]
        assert len(found) == len(task.variants), (task.variants, [v.name for v in found])
        wanted += [(arch, v) for v in found]
        owners += [launch] * len(found)
    bad = set()
    with ProgressBar(task.kernel, total=len(wanted), unit="compiled") as bar:
        for (_, variant), launch, code in zip(
            wanted, owners, check_triton.compiled_apart(wanted, workers), strict=True
        ):
            if check_triton.problems(variant, code, arch):
                bad.add(launch)
            bar.advance()
    return [launch for launch in launches if launch not in bad]


def timed(task: Task, launches: Sequence[Any], arch: int) -> list[tuple[Any, float]]:
    """(settings, median milliseconds), fastest first."""
    from triton.testing import do_bench

    work = workload(task)
    rows = []
    with ProgressBar(task.kernel, total=len(launches), unit="timed") as bar:
        for launch in launches:
            with settings(task, arch, launch):
                rows.append((launch, float(do_bench(work, quantiles=[0.5]))))
            bar.advance()
    return sorted(rows, key=lambda row: row[1])


def workload(task: Task) -> Callable[[], Any]:
    """A call of the task's kernel on a large problem of its shape class, in bf16 on the GPU."""
    import torch

    from opencoder.kernels.triton_kernels import attention, cross_entropy, elementwise, optimizer, rms_norm

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    if task.module == "rms_norm":
        x, r, w = draw(1 << 26 >> (task.size.bit_length() - 1), task.size), None, draw(task.size)
        r = torch.randn_like(x)
        if task.kernel.endswith("forward"):
            return partial(rms_norm.forward, x, r, w, 1e-5)
        rstd = torch.rand(x.shape[0], device="cuda")
        return partial(rms_norm.backward, r, x, x, w, rstd)
    if task.kernel.startswith("swiglu"):
        x = draw(16384, 6144)
        return (
            partial(elementwise.swiglu_fwd, x, x)
            if "forward" in task.kernel
            else partial(elementwise.swiglu_bwd, x, x, x)
        )
    if task.kernel == "rotary":
        angles = torch.rand(4096, 80, device="cuda")
        return partial(elementwise.rotary, draw(4, 4096, 14, 160), draw(4, 4096, 14, 160), angles, angles, False)
    if task.kernel == "cross_entropy":
        logits, targets = draw(8192, task.size), torch.zeros(8192, dtype=torch.int64, device="cuda")

        def loss_and_gradient() -> None:
            loss, lse = cross_entropy.ce_forward(logits, targets, -100, 0.0, 0.0, None)
            cross_entropy.ce_backward(loss, logits, targets, lse, 0, -100, 0.0, 0.0, None, out=None)

        return loss_and_gradient
    if task.module == "optimizer":
        params = [draw(1 << 22) for _ in range(100)]
        if task.kernel == "squares":
            return partial(optimizer.square_sum, params)
        first, second, masters = ([p.float() for p in params] for _ in range(3))
        control = torch.tensor([1.0, 0.0], dtype=torch.float64, device="cuda")
        numbers = (1e-4, 0.9, 0.95, 1e-8, 0.1, 10)
        return partial(optimizer.adamw_step, params, params, first, second, masters, control, *numbers)
    q, k, v, dout = (draw(2, 8192, 16, task.size) for _ in range(4))
    rest = (None, None, 0, True, -1, -1, 0.0, task.size**-0.5)
    if task.kernel == "attention forward":
        return partial(attention.forward, q, k, v, *rest)
    out, lse = attention.forward(q, k, v, *rest)
    # Both backward kernels run; only one has the candidate's settings, so the difference between candidates is its own.
    return partial(attention.backward, dout, q, k, v, out, lse, None, *rest)


if __name__ == "__main__":
    run(main)
