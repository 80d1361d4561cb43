"""Tensors of more than 2³¹ values. On a CPU by arithmetic: memory is reserved but only a few rows of it are touched, and in
the interpreter programs far down the grid are run alone. On a GPU one real case for each kind of kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from opencoder import kernels as K

from .matrix import DEVICE, INTERPRETED, draw, error

LIMIT = 2**31
ROW = 1 << 15  # a row of logits
interpreted = pytest.mark.skipif(not INTERPRETED, reason="about Triton's interpreter; test_triton.py runs it there")
on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU with 40 GB; set OPENCODER_TEST_DEVICE=cuda")
native = pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="about the C++ kernels")


@pytest.fixture
def start_program(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it with n: from then on program 0 of a launch believes to be the last of n + 1."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    plain = type(builder).set_grid_idx

    def start(first: int) -> None:
        def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
            self.set_grid_dim(x + first + 1, y + 1, z + 1)
            plain(self, x + first, y, z)

        monkeypatch.setattr(type(builder), "set_grid_idx", set_grid_idx)

    return start


def far(rows: int, width: int) -> torch.Tensor:
    """(rows, width) in fp16, of more than 2³¹ values, not touched: it takes addresses, not memory."""
    assert rows * width > LIMIT
    return torch.empty(rows, width, dtype=torch.float16)


@interpreted
def test_rms_norm_and_cross_entropy_rows(start_program: Callable[[int], None]) -> None:
    from opencoder.kernels.triton_kernels import cross_entropy, rms_norm

    rows = LIMIT // 4096 + 2
    x, y, rstd = far(rows, 4096), far(rows, 4096), torch.empty(rows)
    weight = torch.ones(4096).half()
    x[-1] = draw(4096).half()
    start_program(rows - 1)
    constants = {"WIDTH": 4096, "BLOCK": 4096, "REAL": torch_to_triton(torch.float32)}
    rms_norm.forward_kernel[(1,)](x, x, weight, y, y, rstd, 1e-5, 4096, HAS_RESIDUAL=False, **constants)
    assert error(y[-1], K.rms_norm(x[-1], weight, eps=1e-5, impl="reference")) <= 1e-3
    dx, parts = far(rows, 4096), torch.empty(rows, 4096)
    rms_norm.backward_kernel[(1,)](y, y, x, weight, rstd, dx, parts, rows, 4096, HAS_DTOTAL=False, **constants)
    leaf = x[-1].double().requires_grad_()
    K.rms_norm(leaf, weight.double(), eps=1e-5, impl="reference").backward(y[-1].double())
    assert error(dx[-1], leaf.grad) <= 1e-3
    loss, lse, targets = torch.empty(rows), torch.empty(rows), torch.zeros(rows, dtype=torch.int32)
    cross_entropy.forward_kernel[(1,)](
        x, targets, loss, lse, 4096, -100, 0.0, 0.0, 1.0, V=4096, BLOCK=4096, SOFTCAP=False,
        REAL=torch_to_triton(torch.float32),
    )  # fmt: skip
    assert error(lse[-1], x[-1].double().logsumexp(0)) <= 1e-6
    cross_entropy.backward_kernel[(1,)](
        torch.ones(rows), x, targets, lse, dx, 4096, 0, -100, 0.0, 0.0, 1.0, V=4096, BLOCK=4096, SOFTCAP=False,
        REAL=torch_to_triton(torch.float32),
    )  # fmt: skip
    truth = x[-1].double().softmax(0)
    truth[0] -= 1
    assert error(dx[-1], truth) <= 1e-3


def torch_to_triton(dtype: torch.dtype) -> Any:
    """Triton's name of an arithmetic type."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float64: tl.float64}[dtype]


@interpreted
def test_elements(start_program: Callable[[int], None]) -> None:
    from opencoder.kernels.triton_kernels import elementwise

    size = LIMIT + 4096
    gate, up, out = (torch.empty(size, dtype=torch.float16) for _ in range(3))
    gate[-2048:], up[-2048:] = draw(2048).half(), draw(2048, seed=1).half()
    start_program(size // 2048 - 1)
    real = torch_to_triton(torch.float32)
    elementwise.swiglu_forward_kernel[(1,)](gate, up, out, size, BLOCK=2048, REAL=real)
    assert error(out[-2048:], K.swiglu(gate[-2048:], up[-2048:], impl="reference")) <= 2e-3
    elementwise.swiglu_backward_kernel[(1,)](out, gate, up, gate, up, size, BLOCK=2048, REAL=real)
    assert gate[-2048:].isfinite().all()


@interpreted
def test_tokens_of_rotary(start_program: Callable[[int], None]) -> None:
    from opencoder.kernels.triton_kernels import elementwise

    tokens = LIMIT // (4 * 128) + 2
    q, k = torch.empty(1, tokens, 4, 128, dtype=torch.float16), torch.zeros(1, tokens, 1, 128, dtype=torch.float16)
    q[0, -1] = draw(4, 128).half()
    angles = torch.linspace(0, 3, 64)[None]
    truth, _ = K.rotary(q[:, -1:].clone(), k[:, -1:], angles.cos(), angles.sin(), impl="reference")
    start_program(tokens - 1)
    elementwise.rotary_kernel[(1,)](
        q, k, q, k, angles.cos(), angles.sin(), 1, 1.0, REAL=torch_to_triton(torch.float32),
        **elementwise._rotary_constants(4, 1, 128, 64, copy_rest=False),
    )  # fmt: skip
    assert error(q[:, -1:], truth) <= 1e-3


@interpreted
def test_tokens_of_attention() -> None:
    """One short document behind a gap: its tokens' offsets are beyond 2³¹, the grid is small."""
    from opencoder.kernels.triton_kernels import attention

    begin = LIMIT // (4 * 64) + 1
    q, k, v, dout = (torch.empty(begin + 5, h, 64, dtype=torch.float16) for h in (4, 4, 4, 4))
    for i, t in enumerate((q, k, v, dout)):
        t[begin:] = draw(5, 4, 64, seed=i).half()
    bounds = torch.tensor([begin, begin + 5], dtype=torch.int32)
    rest = (bounds, bounds, 5, True, -1, -1, 0.0, 0.125)
    out, lse = attention.forward(q, k, v, *rest)
    truth, truth_lse = K.attention(*(t[None, begin:] for t in (q, k, v)), return_lse=True, impl="reference")
    assert error(out[begin:], truth[0]) <= 1e-3
    assert error(lse[:, begin:], truth_lse[0]) <= 1e-5
    found = attention.backward(dout, q, k, v, out, lse, None, *rest)
    arguments = (t[None, begin:] for t in (dout, q, k, v))
    expected = K.attention_backward(*arguments, truth, truth_lse, impl="reference")
    assert all(error(a[begin:], b[0]) <= 2e-3 for a, b in zip(found, expected, strict=True))


@interpreted
def test_chunks_of_the_optimizer() -> None:
    """Chunk n of a tensor lies n · chunk values on: a tensor of addresses alone, of which one chunk is run."""
    from opencoder.kernels.triton_kernels import optimizer

    chunk = 1024
    index = LIMIT // chunk + 1
    x = torch.empty((index + 1) * chunk, dtype=torch.float16)
    x[-chunk:] = 2.0
    table = torch.tensor([x.data_ptr(), x.numel(), 0, index], dtype=torch.int64)
    sums = torch.empty(1, dtype=torch.float64)
    optimizer.squares_kernel[(1,)](
        *table.split(1), sums, KIND=optimizer.TYPES[torch.float16], ALIGNED=True, CHUNK=chunk, BLOCK=chunk
    )
    assert sums.item() == 4.0 * chunk


@native
def test_cpp_reads_logits_beyond_two_to_the_31() -> None:
    logits = far(LIMIT // ROW + 1, ROW)  # untouched memory reads as zeros, at no cost
    logits[-1] = draw(ROW).half()
    targets = torch.full((logits.shape[0],), -1)
    targets[-1] = ROW - 1
    highest, sum_exp, target = K.ce_stats(logits, targets, 0, impl="cpp")
    assert error(highest[-1] + sum_exp[-1].log(), logits[-1].double().logsumexp(0)) <= 1e-6
    assert target[-1] == logits[-1, -1]
    assert target[:-1].count_nonzero() == 0


@pytest.mark.gpu
@on_gpu
def test_real_tensors_on_a_gpu() -> None:
    rows = LIMIT // 4096 + 2
    x = torch.zeros(rows, 4096, dtype=torch.bfloat16, device="cuda")
    x[-1] = draw(4096).bfloat16()
    weight = torch.ones(4096, dtype=torch.bfloat16, device="cuda")
    truth = x[-1:].clone()
    assert error(K.rms_norm(x, weight, eps=1e-5)[-1], K.rms_norm(truth, weight, eps=1e-5, impl="reference")[0]) <= 3e-3
    assert error(K.swiglu(x, x)[-1], K.swiglu(truth, truth, impl="reference")[0]) <= 5e-3
    targets = torch.zeros(rows, dtype=torch.int64, device="cuda")
    loss = K.cross_entropy(x, targets, reduction="none")
    assert error(loss[-1:], K.cross_entropy(truth, targets[:1], reduction="none", impl="reference")) <= 1e-5
    assert error(loss[:1], torch.tensor([4096.0], device="cuda").log()) <= 1e-6
