"""Cases: an operator on one shape with all contenders. Each contender is a function of the case's tensors; outputs and,
where gradients are asked for, those too are held against fp64 before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from opencoder import kernels as K

from . import eager, peers

Function = Callable[..., Any]
OURS = "ours"


class Case(NamedTuple):
    """One row of the table."""

    operator: str
    shape: str
    dtype: torch.dtype
    backward: bool
    """Forward and backward; the inputs that require it get gradients."""
    inputs: Callable[[torch.device], list[torch.Tensor]]
    """Draws the tensors that are differentiated."""
    contenders: dict[str, Function]
    """Name → function of the inputs; the first is ours."""
    truth: Function
    """The same in plain torch, run in fp64."""
    size_bytes: int
    """Of the largest tensor: the size class."""
    traffic: int = 0
    """Bytes that must move, for operators bound by memory."""
    flops: int = 0
    """Floating-point operations, for those bound by products."""
    memory: bool = False
    """Measure the peak too."""
    tolerance: float = 2e-5
    """Relative error allowed, of outputs and gradients."""

    @property
    def name(self) -> str:
        """Unique."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.operator} {self.shape} {kind} {'fwd+bwd' if self.backward else 'forward'}"


def draw(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal values."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)


def _bytes(*elements: int, dtype: torch.dtype) -> int:
    return sum(elements) * dtype.itemsize


# ---- operators ----


def rms_norm(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, *, wide_weight: bool = False
) -> Iterator[Case]:
    """add + RMSNorm, the trainer's form; and without the addition on GPUs, where peers publish that."""
    weight_type = torch.float32 if wide_weight else dtype
    label = f"{rows}x{width}{' fp32 weight' if wide_weight else ''}"

    def inputs(where: torch.device, residual: bool) -> list[torch.Tensor]:
        x = draw(rows, width, dtype=dtype, device=where)
        w = 1 + draw(width, dtype=weight_type, device=where, seed=1, scale=0.1)
        return [x, w, draw(rows, width, dtype=dtype, device=where, seed=2)] if residual else [x, w]

    for residual in (True, False) if device.type == "cuda" else (True,):
        operator = "add+rms_norm" if residual else "rms_norm"
        contenders: dict[str, Function] = {
            OURS: lambda x, w, r=None: K.rms_norm(x, w, eps=eager.EPS, residual=r),
            "eager": eager.rms_norm,
            "compile": peers.compiled(eager.rms_norm),
            "F.rms_norm": eager.functional_rms_norm,
            **peers.rms_norm(residual, device, dtype, weight_type),
        }
        n = rows * width
        for backward in (False, True):
            passes = (4 if residual else 2) + ((4 if residual else 3) if backward else 0)
            yield Case(
                operator, label, dtype, backward, partial(inputs, residual=residual), contenders, eager.rms_norm,
                _bytes(n, dtype=dtype), traffic=_bytes(passes * n, dtype=dtype), tolerance=_tolerance(dtype),
            )  # fmt: skip


def swiglu(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """silu(gate) · up."""

    def inputs(where: torch.device) -> list[torch.Tensor]:
        return [draw(rows, width, dtype=dtype, device=where, seed=i) for i in range(2)]

    contenders = {
        OURS: K.swiglu, "eager": eager.swiglu, "compile": peers.compiled(eager.swiglu), **peers.swiglu(device),
    }  # fmt: skip
    for backward in (False, True):
        traffic = _bytes((8 if backward else 3) * rows * width, dtype=dtype)
        yield Case(
            "swiglu", f"{rows}x{width}", dtype, backward, inputs, contenders, eager.swiglu,
            _bytes(rows * width, dtype=dtype), traffic=traffic, tolerance=_tolerance(dtype),
        )  # fmt: skip


def rotary(
    b: int, s: int, heads: int, kv_heads: int, d: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """q and k in one pass; and in place, which only ours offers."""
    angles = torch.outer(torch.arange(s, device=device).float(), 10_000 ** -torch.linspace(0, 1, d // 2, device=device))
    cos, sin = angles.cos(), angles.sin()

    def inputs(where: torch.device) -> list[torch.Tensor]:
        return [draw(b, s, h, d, dtype=dtype, device=where, seed=h) for h in (heads, kv_heads)]

    full = torch.cat([cos, cos], -1)[:, None], torch.cat([sin, sin], -1)[:, None]
    hf = partial(eager.rotary, cos=full[0].to(dtype), sin=full[1].to(dtype))
    wide = partial(eager.rotary, cos=full[0].double(), sin=full[1].double())
    contenders: dict[str, Function] = {
        OURS: lambda q, k: K.rotary(q, k, cos, sin),
        "ours in place": lambda q, k: K.rotary(q, k, cos, sin, inplace=True),
        "eager": hf,
        "compile": peers.compiled(hf),
    }
    n = b * s * (heads + kv_heads) * d
    for backward in (False, True):
        taking_part = {name: f for name, f in contenders.items() if not backward or "in place" not in name}
        yield Case(
            "rotary", f"{b}x{s} {heads}/{kv_heads}x{d}", dtype, backward, inputs, taking_part, wide,
            _bytes(n, dtype=dtype), traffic=_bytes((4 if backward else 2) * n, dtype=dtype), tolerance=_tolerance(dtype),
        )  # fmt: skip


def cross_entropy(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Mean loss of whole logits."""
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(0)).to(device)

    def inputs(where: torch.device) -> list[torch.Tensor]:
        return [draw(rows, vocab, dtype=dtype, device=where, scale=3.0)]

    plain = partial(eager.cross_entropy, targets=targets)
    contenders: dict[str, Function] = {
        OURS: lambda x: K.cross_entropy(x, targets),
        "eager": plain,
        "compile": peers.compiled(plain),
        **peers.cross_entropy(targets, device),
    }
    n = rows * vocab
    for backward in (False, True):
        yield Case(
            "cross_entropy", f"{rows}x{vocab}", dtype, backward, inputs, contenders, plain, _bytes(n, dtype=dtype),
            traffic=_bytes((3 if backward else 1) * n, dtype=dtype), memory=backward, tolerance=_tolerance(dtype),
        )  # fmt: skip


def linear_cross_entropy(
    tokens: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """Loss and gradients of the output layer."""
    targets = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(0)).to(device)

    def inputs(where: torch.device) -> list[torch.Tensor]:
        x = draw(tokens, width, dtype=dtype, device=where)
        return [x, draw(vocab, width, dtype=dtype, device=where, seed=1, scale=width**-0.5)]

    plain = partial(eager.linear_cross_entropy, targets=targets)
    contenders: dict[str, Function] = {
        OURS: lambda x, w: K.linear_cross_entropy(x, w, targets),
        "eager": plain,
        **peers.linear_cross_entropy(targets, device),
    }
    truth = partial(eager.linear_cross_entropy_in_parts, targets=targets)
    yield Case(
        "linear_cross_entropy", f"{tokens}x{width}x{vocab}", dtype, True, inputs, contenders, truth,
        _bytes(vocab * width, dtype=dtype), flops=6 * tokens * width * vocab, memory=True, tolerance=_tolerance(dtype),
    )  # fmt: skip


def packed_attention(
    lengths: Sequence[int], heads: int, kv_heads: int, d: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """Causal documents in one row of tokens, beside one dense mask and a loop over documents."""
    tokens = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(device)

    def inputs(where: torch.device) -> list[torch.Tensor]:
        return [
            draw(tokens, h, d, dtype=dtype, device=where, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads))
        ]

    packed = partial(K.attention, cu_seqlens=bounds, max_seqlen=max(lengths))
    dense = partial(eager.masked_attention, mask=eager.document_mask(bounds))
    contenders: dict[str, Function] = {
        OURS: packed,
        "dense mask": dense,
        "SDPA per document": partial(packed, impl="torch"),
        **peers.packed_attention(bounds, max(lengths), device, dtype),
    }
    if device.type == "cuda":
        contenders["ours triton"] = partial(packed, impl="triton")
    pairs = sum(n * n for n in lengths) // 2
    named = f"{len(lengths)} x {lengths[0]}" if len(set(lengths)) == 1 else f"{len(lengths)} mixed of {tokens}"
    for backward in (False, True):
        flops = 4 * pairs * heads * d * (7 if backward else 2) // 2
        yield Case(
            "packed attention", f"{named} {heads}/{kv_heads}x{d}", dtype, backward, inputs, contenders, dense,
            _bytes(tokens * heads * d, dtype=dtype), flops=flops, memory=backward, tolerance=_tolerance(dtype),
        )  # fmt: skip


def dense_attention(
    b: int,
    s: int,
    heads: int,
    kv_heads: int,
    d: int,
    dtype: torch.dtype,
    device: torch.device,
    window: int | None = None,
) -> Iterator[Case]:
    """Causal, with or without a window."""

    def inputs(where: torch.device) -> list[torch.Tensor]:
        return [draw(b, s, h, d, dtype=dtype, device=where, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads))]

    masked = partial(eager.dense_attention, window=window)
    contenders: dict[str, Function] = {OURS: partial(K.attention, window=window)}
    if device.type == "cuda":
        contenders["ours triton"] = partial(K.attention, window=window, impl="triton")
    contenders |= peers.dense_attention(window, device, dtype)
    seen = s if window is None else min(s, window + 1)
    pairs = seen * (seen + 1) // 2 + (s - seen) * seen
    for backward in (False, True):
        flops = 4 * b * pairs * heads * d * (7 if backward else 2) // 2
        label = f"{b}x{s} {heads}/{kv_heads}x{d}{'' if window is None else f' window {window}'}"
        yield Case(
            "attention", label, dtype, backward, inputs, contenders, masked, _bytes(b * s * heads * d, dtype=dtype),
            flops=flops, tolerance=_tolerance(dtype),
        )  # fmt: skip


def adamw(sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """One update with a clip factor; 16-bit parameters have fp32 masters. Inputs are updated in place, so errors are not
    looked at here but in the tests."""
    n = sum(sizes)
    state = peers.AdamWState(sizes, dtype, device)
    contenders: dict[str, Function] = {OURS: state.ours, **state.peers()}
    yield Case(
        "adamw + clip", f"{len(sizes)} tensors, {n / 1e6:.0f}M", dtype, False, lambda where: [], contenders, state.nothing,
        _bytes(n, dtype=dtype), traffic=28 * n,
    )  # fmt: skip


def grad_norm(sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """The 2-norm of a list."""
    tensors = [draw(size, dtype=dtype, device=device, seed=i) for i, size in enumerate(sizes)]
    contenders: dict[str, Function] = {
        OURS: lambda: K.grad_norm(tensors),
        "get_total_norm": lambda: torch.nn.utils.get_total_norm(tensors),
    }
    truth = lambda: torch.cat([t.double().flatten() for t in tensors]).norm()  # noqa: E731
    n = sum(sizes)
    yield Case(
        "grad_norm", f"{len(sizes)} tensors, {n / 1e6:.0f}M", dtype, False, lambda where: [], contenders, truth,
        _bytes(n, dtype=dtype), traffic=_bytes(n, dtype=dtype), tolerance=1e-3,
    )  # fmt: skip


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]


# ---- lists ----


def cpu_cases(device: torch.device) -> Iterator[Case]:
    """2 cores, fp32: 1, 8, 16 and 128 MB tensors, the presets at a laptop's token counts."""
    f32 = torch.float32
    for rows, width in ((256, 1024), (2048, 1024), (4096, 1024), (32768, 1024), (1024, 2240), (1024, 4096)):
        yield from rms_norm(rows, width, f32, device)
    for rows, width in ((256, 1024), (2048, 1024), (4096, 1024), (32768, 1024), (512, 6144), (256, 14336)):
        yield from swiglu(rows, width, f32, device)
    for b, s, heads, kv_heads, d in ((1, 512, 4, 4, 64), (1, 2048, 8, 8, 64), (4, 1024, 8, 4, 64), (16, 2048, 8, 8, 64),
                                     (1, 1024, 14, 14, 160), (1, 512, 32, 8, 128)):  # fmt: skip
        yield from rotary(b, s, heads, kv_heads, d, f32, device)
    for rows, vocab in ((512, 8192), (128, 32000), (64, 96640), (384, 96640)):
        yield from cross_entropy(rows, vocab, f32, device)
    yield from linear_cross_entropy(4096, 512, 96640, f32, device)
    for lengths in ([128] * 8, [32] * 32, [512, 17, 256, 100, 1, 138]):
        yield from packed_attention(lengths, 8, 8, 64, f32, device)
    yield from packed_attention([128] * 8, 14, 14, 160, f32, device)
    for b, s, heads, kv_heads, d in ((1, 1024, 8, 8, 64), (4, 1024, 8, 4, 64), (1, 1024, 14, 14, 160)):
        yield from dense_attention(b, s, heads, kv_heads, d, f32, device)
    sizes = [1 << 22] * 7 + [512] * 100
    yield from adamw(sizes, f32, device)
    yield from adamw(sizes, torch.bfloat16, device)
    yield from grad_norm(sizes, f32, device)


def gpu_cases(device: torch.device) -> Iterator[Case]:
    """One GPU, bf16: the two presets and the shapes that peers publish."""
    bf16 = torch.bfloat16
    for rows, width in ((16384, 1024), (16384, 2240), (16384, 4096), (16384, 8192), (4096, 16384)):
        yield from rms_norm(rows, width, bf16, device)
    yield from rms_norm(16384, 4096, bf16, device, wide_weight=True)
    for rows, width in ((16384, 6144), (16384, 14336), (8192, 32768)):
        yield from swiglu(rows, width, bf16, device)
    for b, s, heads, kv_heads, d in ((4, 4096, 14, 14, 160), (2, 8192, 32, 8, 128)):
        yield from rotary(b, s, heads, kv_heads, d, bf16, device)
    for rows, vocab in ((8192, 32000), (8192, 96640), (8192, 131072)):
        yield from cross_entropy(rows, vocab, bf16, device)
    yield from linear_cross_entropy(16384, 2240, 96640, bf16, device)
    yield from linear_cross_entropy(16384, 4096, 128256, bf16, device)
    for d, heads in ((64, 32), (128, 16), (160, 14)):
        for s in (4096, 8192, 16384):
            yield from dense_attention(16384 // s, s, heads, heads, d, bf16, device)
    yield from dense_attention(2, 8192, 32, 8, 128, bf16, device, window=1024)
    yield from packed_attention([512] * 16, 14, 14, 160, bf16, device)
    yield from packed_attention([4096, 100, 1, 2000, 700, 1295], 32, 8, 128, bf16, device)
    sizes = [1 << 22] * 200 + [4096] * 300
    yield from adamw(sizes, bf16, device)
    yield from adamw(sizes, torch.float32, device)
    yield from grad_norm(sizes, bf16, device)


def all_cases(device: torch.device) -> Iterator[Case]:
    """Those of the device."""
    torch.manual_seed(0)
    return gpu_cases(device) if device.type == "cuda" else cpu_cases(device)
