"""AdamW and the sum of squares over lists of tensors in Triton: one launch for each combination of types, whatever the
number of tensors.

The kernels find their tensors through a table of addresses on the device. Tensors are cut in chunks, so that large and
small ones keep all processors busy; sums are taken per chunk and then in a fixed order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from .configs import Launch, settings
from .launching import Variant, capability, on_device, options, real_of, wide_loads

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _pointer(table_ptr, tensor, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table_ptr + tensor).to(tl.pointer_type(KIND))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(pointer, at, size, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer + at, mask=at < size, other=0.0)
    return tl.load(pointer + at)


@triton.jit
def _store(pointer, at, size, values, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + at, values, mask=at < size)
    else:
        tl.store(pointer + at, values)


@triton.jit
def _update(
    param, grad, exp_avg, exp_avg_sq, master, at, size, clip, beta1, beta2, eps, decay, step_size, inverse_root,
    PARAM: tl.constexpr, REAL: tl.constexpr, HAS_MASTER: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    g = _load(grad, at, size, MASKED).to(REAL) * clip
    m = _load(exp_avg, at, size, MASKED)
    v = _load(exp_avg_sq, at, size, MASKED)
    p = _load(master, at, size, MASKED)
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    p = p * decay - step_size * m / (tl.sqrt(v) * inverse_root + eps)
    _store(exp_avg, at, size, m, MASKED)
    _store(exp_avg_sq, at, size, v, MASKED)
    _store(master, at, size, p, MASKED)
    if HAS_MASTER:
        _store(param, at, size, p.to(PARAM), MASKED)


@triton.jit
def adamw_kernel(
    params_ptr, grads_ptr, exp_avgs_ptr, exp_avg_sqs_ptr, masters_ptr, sizes_ptr, chunk_tensor_ptr, chunk_index_ptr,
    control_ptr, settings_ptr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, REAL: tl.constexpr, HAS_MASTER: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor = tl.load(chunk_tensor_ptr + program)
    begin = tl.load(chunk_index_ptr + program).to(tl.int64) * CHUNK
    # A step that is to be skipped has no elements: nothing is read or written.
    size = tl.where(tl.load(control_ptr + 1) != 0.0, 0, tl.load(sizes_ptr + tensor))
    param = _pointer(params_ptr, tensor, PARAM, ALIGNED)
    grad = _pointer(grads_ptr, tensor, GRAD, ALIGNED)
    exp_avg = _pointer(exp_avgs_ptr, tensor, REAL, ALIGNED)
    exp_avg_sq = _pointer(exp_avg_sqs_ptr, tensor, REAL, ALIGNED)
    master = param
    if HAS_MASTER:
        master = _pointer(masters_ptr, tensor, REAL, ALIGNED)
    clip = tl.load(control_ptr).to(REAL)
    beta1, beta2 = tl.load(settings_ptr).to(REAL), tl.load(settings_ptr + 1).to(REAL)
    eps, decay = tl.load(settings_ptr + 2).to(REAL), tl.load(settings_ptr + 3).to(REAL)
    step_size, inverse_root = tl.load(settings_ptr + 4).to(REAL), tl.load(settings_ptr + 5).to(REAL)
    # A whole chunk needs no mask: with one, the compiler could not tell that 16 bytes lie within.
    if begin + CHUNK <= size:
        for offset in range(0, CHUNK, BLOCK):
            at = begin + offset + tl.arange(0, BLOCK)
            _update(param, grad, exp_avg, exp_avg_sq, master, at, size, clip, beta1, beta2, eps, decay, step_size,
                    inverse_root, PARAM, REAL, HAS_MASTER, False)  # fmt: skip
    else:
        for offset in range(0, CHUNK, BLOCK):
            at = begin + offset + tl.arange(0, BLOCK)
            _update(param, grad, exp_avg, exp_avg_sq, master, at, size, clip, beta1, beta2, eps, decay, step_size,
                    inverse_root, PARAM, REAL, HAS_MASTER, True)  # fmt: skip


@triton.jit
def squares_kernel(
    tensors_ptr, sizes_ptr, chunk_tensor_ptr, chunk_index_ptr, sums_ptr,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor = tl.load(chunk_tensor_ptr + program)
    begin = tl.load(chunk_index_ptr + program).to(tl.int64) * CHUNK
    size = tl.load(sizes_ptr + tensor)
    x_ptr = _pointer(tensors_ptr, tensor, KIND, ALIGNED)
    total = tl.zeros((BLOCK,), dtype=tl.float64)  # the square of a large fp32 gradient would overflow
    if begin + CHUNK <= size:
        for offset in range(0, CHUNK, BLOCK):
            x = _load(x_ptr, begin + offset + tl.arange(0, BLOCK), size, False).to(tl.float64)
            total += x * x
    else:
        for offset in range(0, CHUNK, BLOCK):
            x = _load(x_ptr, begin + offset + tl.arange(0, BLOCK), size, True).to(tl.float64)
            total += x * x
    tl.store(sums_ptr + program, tl.sum(total, 0))


def _launch(kernel: str, element_size: int, arch: int) -> Launch:
    found = settings(kernel, 0, element_size=element_size, capability=arch)
    assert found is not None
    return found


class _Table:
    """Addresses, sizes and chunks of lists of tensors, in one copy to the device."""

    def __init__(self, lists: Sequence[Sequence[torch.Tensor]], chunk: int) -> None:
        first = lists[0]
        sizes = [t.numel() for t in first]
        chunks = [(i, c) for i, n in enumerate(sizes) for c in range(triton.cdiv(n, chunk))]
        addresses = [[t.data_ptr() for t in tensors] for tensors in lists]
        self.aligned = all(a % 16 == 0 for row in addresses for a in row)
        self.chunks = len(chunks)
        flat = [*(a for row in addresses for a in row), *sizes, *(i for i, _ in chunks), *(c for _, c in chunks)]
        table = torch.tensor(flat, dtype=torch.int64).to(first[0].device, non_blocking=True)
        lengths = [len(first)] * (len(lists) + 1) + [self.chunks] * 2
        *self.addresses, self.sizes, self.chunk_tensor, self.chunk_index = table.split(lengths)


def adamw_step(
    params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor], masters: Sequence[torch.Tensor], control: torch.Tensor, lr: float, beta1: float,
    beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    """One update in place; `control` is (clip factor, not 0 to skip the step), fp64 on the device; `masters` may be empty."""
    root = (1.0 - beta2**step) ** -0.5
    values = [beta1, beta2, eps, 1.0 - lr * weight_decay, lr / (1.0 - beta1**step), root]
    settings = torch.tensor(values, dtype=torch.float64).to(params[0].device, non_blocking=True)
    groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = defaultdict(list)
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if p.numel():
            groups[p.dtype, g.dtype].append(i)
    for (kind, grad_kind), members in groups.items():
        lists = [[tensors[i] for i in members] for tensors in (params, grads, exp_avgs, exp_avg_sqs, masters or params)]
        launch = _launch("adamw", kind.itemsize, capability(params[0]))
        table = _Table(lists, launch.chunk)
        with on_device(params[0]):
            adamw_kernel[(table.chunks,)](
                *table.addresses, table.sizes, table.chunk_tensor, table.chunk_index, control, settings,
                PARAM=TYPES[kind], GRAD=TYPES[grad_kind], REAL=real_of(lists[0][0])[1], HAS_MASTER=bool(masters),
                ALIGNED=table.aligned, CHUNK=launch.chunk, BLOCK=launch.block, **options(launch),
            )  # fmt: skip


def square_sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of squares of all values, 0-dim fp64."""
    groups: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
    for t in tensors:
        if t.numel():
            groups[t.dtype].append(t.contiguous())
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    for kind, members in groups.items():
        launch = _launch("squares", kind.itemsize, capability(total))
        table = _Table([members], launch.chunk)
        sums = torch.empty(table.chunks, dtype=torch.float64, device=total.device)
        with on_device(total):
            squares_kernel[(table.chunks,)](
                *table.addresses, table.sizes, table.chunk_tensor, table.chunk_index, sums,
                KIND=TYPES[kind], ALIGNED=table.aligned, CHUNK=launch.chunk, BLOCK=launch.block, **options(launch),
            )  # fmt: skip
        total = total + sums.sum()
    return total


def variants(arch: int) -> Iterator[Variant]:
    """What is compiled without a GPU."""
    tables = ("params_ptr", "grads_ptr", "exp_avgs_ptr", "exp_avg_sqs_ptr", "masters_ptr", "sizes_ptr",
              "chunk_tensor_ptr", "chunk_index_ptr")  # fmt: skip
    signature = dict.fromkeys(tables, "*i64") | {"control_ptr": "*fp64", "settings_ptr": "*fp64"}
    for kind, grad, master in (
        (tl.bfloat16, tl.bfloat16, True),
        (tl.bfloat16, tl.float32, True),
        (tl.float32, tl.float32, False),
    ):
        launch = _launch("adamw", kind.primitive_bitwidth // 8, arch)
        constants = {"CHUNK": launch.chunk, "BLOCK": launch.block, "ALIGNED": True}
        constants |= {"PARAM": kind, "GRAD": grad, "REAL": tl.float32, "HAS_MASTER": master}
        label = f"adamw {kind} grad {grad}{' master' if master else ''}"
        loads = 3 * wide_loads(launch.block, 4, launch.warps)
        yield Variant(label, adamw_kernel, signature, constants, launch.warps, launch.stages, wide_loads=loads)
    names = ("tensors_ptr", "sizes_ptr", "chunk_tensor_ptr", "chunk_index_ptr")
    for kind, size in ((tl.bfloat16, 2), (tl.float32, 4)):
        launch = _launch("squares", size, arch)
        signature = dict.fromkeys(names, "*i64") | {"sums_ptr": "*fp64"}
        constants = {"CHUNK": launch.chunk, "BLOCK": launch.block, "ALIGNED": True, "KIND": kind}
        loads = wide_loads(launch.block, size, launch.warps)
        yield Variant(f"squares {kind}", squares_kernel, signature, constants, launch.warps, launch.stages, loads)
