"""Attention: every implementation against an fp64 truth, and the truth against a loop over single queries; packed
documents; backward from parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opencoder import kernels as K

from .matrix import DEVICE, GRADIENT, INTERPRETED, assert_accepted, draw, dtypes, each, error, evaluate, implementations

pytestmark = pytest.mark.fast


def plain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    window: Any = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores whole, masked, softmaxed; out and lse, rows without keys 0 and 0."""
    sq, sk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (scale or q.shape[-1] ** -0.5)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    left, right = window if isinstance(window, tuple) else (window, None)
    distance = torch.arange(sk)[None] - torch.arange(sq)[:, None] - (sk - sq)
    seen = (distance <= 0) if causal else torch.ones(sq, sk, dtype=torch.bool)
    seen = seen if left is None else seen & (distance >= -left)
    seen = (seen if right is None else seen & (distance <= right)).to(q.device)
    empty = ~seen.any(-1)
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(empty[:, None], 0)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    return out.masked_fill(empty[:, None, None], 0), scores.logsumexp(-1).masked_fill(empty, 0)


def naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    window: Any = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query and one head at a time, over the list of keys it may see; out and lse, rows without keys 0 and 0."""
    q, k, v = q.double(), k.double(), v.double()
    left, right = window if isinstance(window, tuple) else (window, None)
    (b, sq, h, d), sk, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    out, lse = torch.zeros(b, sq, h, d, dtype=torch.float64), torch.zeros(b, h, sq, dtype=torch.float64)
    for i in range(sq):
        at = i + sk - sq  # bottom-right
        seen = [
            j
            for j in range(sk)
            if (not causal or j <= at) and (left is None or j >= at - left) and (right is None or j <= at + right)
        ]
        for head in range(h if seen else 0):
            scores = (q[:, i, head, None] * k[:, seen, head // group]).sum(-1) * (scale or d**-0.5)
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            lse[:, head, i] = scores.logsumexp(-1)
            out[:, i, head] = (scores.softmax(-1)[..., None] * v[:, seen, head // group]).sum(1)
    return out, lse


@pytest.mark.skipif(INTERPRETED, reason="not about Triton")
@pytest.mark.parametrize("options", [
    {}, {"causal": False}, {"window": 3}, {"window": (2, 1), "causal": False}, {"window": 0}, {"softcap": 1.5}, {"scale": 0.3},
    {"window": 4, "softcap": 2.0}, {"window": (None, 2), "causal": False}, {"window": (0, 0), "causal": False}, {"window": 100},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("lengths", [(11, 11), (5, 12), (12, 5)], ids=str)
def test_the_truth_equals_a_loop_over_queries(options: dict[str, Any], lengths: tuple[int, int]) -> None:
    q, k, v = (draw(2, n, h, 16, seed=h).cpu() for n, h in ((lengths[0], 4), (lengths[1], 2), (lengths[1], 2)))
    for mine, true in zip(plain_attention(q, k, v, **options), naive(q, k, v, **options), strict=True):
        assert torch.allclose(mine, true, rtol=1e-10, atol=1e-12)


ATTENTION_CAPS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
MATRIX = [  # B, Sq, Sk, H, G, D
    (2, 17, 17, 4, 2, 16), (1, 65, 65, 14, 14, 160), (1, 15, 100, 8, 2, 80), (1, 100, 15, 2, 1, 96), (1, 1, 65, 8, 1, 64),
    (1, 129, 129, 7, 1, 32), (2, 33, 64, 32, 8, 128), (1, 16, 16, 2, 2, 256), (1, 70, 70, 2, 1, 192), (1, 0, 5, 2, 1, 16),
]  # fmt: skip
if INTERPRETED:  # milliseconds a tile: fewer and smaller, the same branches
    MATRIX = [(2, 17, 17, 4, 2, 16), (1, 20, 20, 2, 2, 160), (1, 15, 40, 4, 2, 80), (1, 40, 15, 2, 1, 96)]
MASKS: list[dict[str, Any]] = [
    {}, {"causal": False}, {"window": 0}, {"window": 3}, {"window": (20, 5), "causal": False}, {"softcap": 1.5},
    {"window": 64, "softcap": 2.0, "scale": 0.3}, {"window": 10**6},
]  # fmt: skip


@each("attention")
@dtypes
@pytest.mark.parametrize("shape", MATRIX, ids=str)
@pytest.mark.parametrize("options", MASKS, ids=str)
def test_attention(impl: str, dtype: torch.dtype, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    b, sq, sk, h, g, d = shape
    inputs = [
        draw(b, sq, h, d, dtype=dtype),
        draw(b, sk, g, d, seed=1, dtype=dtype),
        draw(b, sk, g, d, seed=2, dtype=dtype),
    ]

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out, lse = K.attention(q, k, v, return_lse=True, impl=impl, **options)
        return out, torch.where(lse.isinf(), 0, lse).to(out.dtype)

    if impl == "torch":  # SDPA: no log-sum-exp, and not every mask
        try:
            mine = evaluate(lambda q, k, v: K.attention(q, k, v, impl=impl, **options), inputs)
        except K.UnsupportedKernel:
            pytest.skip("refused, which test_dispatch.py looks at")
        plain = lambda q, k, v: plain_attention(q, k, v, **options)[0]  # noqa: E731
    else:
        mine, plain = evaluate(ours, inputs), lambda q, k, v: plain_attention(q, k, v, **options)
    truth = evaluate(plain, [x.double() for x in inputs])
    floor = 3.0 if options.get("window") == 0 else 0.1  # a query with one key has no gradient but rounding
    assert_accepted(mine, evaluate(plain, inputs), truth, dtype, forward_caps=ATTENTION_CAPS, floor=floor)


PACKINGS = {
    "mixed": [1, 0, 7, 12, 1, 70], "of one token": [1] * 12, "one": [33], "with a long one": [3, 130, 2],
    "and an empty end": [5, 6, 0, 0],
}  # fmt: skip


@each("attention")
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("options", [{}, {"window": 4}], ids=str)
def test_packed_documents_equal_plain_attention_of_each(impl: str, lengths: list[int], options: dict[str, Any]) -> None:
    if impl == "torch" and options:
        pytest.skip("SDPA has no window")
    total = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    inputs = [draw(total, h, 32, seed=h, dtype=torch.float32) for h in (4, 2, 2)]

    def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return K.attention(q, k, v, cu_seqlens=bounds, max_seqlen=max(lengths), impl=impl, **options)

    def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = [t.split(lengths) for t in (q, k, v)]
        return torch.cat(
            [plain_attention(*(p[None] for p in one), **options)[0][0] for one in zip(*parts, strict=True)]
        )

    truth = evaluate(alone, [x.double() for x in inputs])
    floor = 3.0 if max(lengths) == 1 else 0.1
    mine = evaluate(packed, inputs)
    plain = evaluate(alone, inputs)
    assert_accepted(mine, plain, truth, torch.float32, forward_caps=ATTENTION_CAPS, floor=floor)


@each("attention")
def test_gradients_stay_within_their_document(impl: str) -> None:
    bounds = torch.tensor([0, 1, 1, 8, 20, 21], dtype=torch.int32, device=DEVICE)
    q, k, v = (draw(21, h, 16, seed=h).requires_grad_() for h in (4, 2, 2))
    out = K.attention(q, k, v, cu_seqlens=bounds, max_seqlen=12, impl=impl)
    for grad in torch.autograd.grad(out[8:20].pow(2).sum(), (q, k, v)):
        assert torch.equal(grad[:8], torch.zeros_like(grad[:8]))
        assert torch.equal(grad[20:], torch.zeros_like(grad[20:]))
        assert bool(grad[8:20].any())


@each("attention")
def test_no_tokens_at_all(impl: str) -> None:
    q, k = torch.zeros(0, 4, 16, requires_grad=True, device=DEVICE), torch.zeros(0, 2, 16, device=DEVICE)
    bounds = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    out = K.attention(q, k, k, cu_seqlens=bounds, max_seqlen=0, impl=impl)
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 4, 16)


@each("attention")
def test_a_document_without_keys_gives_zero(impl: str) -> None:
    q, k = draw(3, 2, 16, seed=1).requires_grad_(), draw(2, 2, 16, seed=2).requires_grad_()
    bounds = [torch.tensor(b, dtype=torch.int32, device=DEVICE) for b in ([0, 2, 3], [0, 2, 2])]
    options = {"cu_seqlens": bounds[0], "cu_seqlens_k": bounds[1], "max_seqlen": 2, "causal": False}
    out = K.attention(q, k, k, impl=impl, **options)
    out.sum().backward()
    assert torch.equal(out[2], torch.zeros_like(out[2]))
    assert all(bool(t.grad.isfinite().all()) for t in (q, k))


@each("attention")
def test_packed_keys_with_bounds_of_their_own(impl: str) -> None:
    if impl == "torch":
        pytest.skip("SDPA aligns the causal mask otherwise; refused, which test_attention_input.py looks at")
    q, k, v = draw(5, 2, 16, seed=1), draw(9, 2, 16, seed=2), draw(9, 2, 16, seed=3)
    bounds = [torch.tensor(b, dtype=torch.int32, device=DEVICE) for b in ([0, 2, 5], [0, 6, 9])]
    options = {"cu_seqlens": bounds[0], "cu_seqlens_k": bounds[1], "max_seqlen": 6}
    out, lse = K.attention(q, k, v, return_lse=True, impl=impl, **options)
    for rows, keys in ((slice(0, 2), slice(0, 6)), (slice(2, 5), slice(6, 9))):
        truth, truth_lse = plain_attention(q[None, rows], k[None, keys], v[None, keys])
        assert torch.allclose(out[rows], truth[0], rtol=1e-10)
        assert torch.allclose(lse[:, rows], truth_lse[0], rtol=1e-10)


@each("attention")
@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
def test_two_thousand_documents(impl: str) -> None:
    lengths = [1 + i % 3 for i in range(2000)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    q, k, v = (draw(sum(lengths), h, 16, seed=h) for h in (2, 1, 1))
    out = K.attention(q, k, v, cu_seqlens=bounds, max_seqlen=3, impl=impl)
    at = torch.arange(sum(lengths), device=DEVICE)
    document = torch.searchsorted(bounds.long(), at, right=True)
    seen = (document[:, None] == document[None]) & (at[:, None] >= at[None])
    scores = torch.einsum("qhd,khd->hqk", q, k.expand(-1, 2, -1)) / 4
    truth = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v.expand(-1, 2, -1))
    assert error(out, truth) <= 1e-12


@each("attention")
def test_rows_that_see_nothing_are_zero_and_pass_no_gradient(impl: str) -> None:
    if impl == "torch":
        pytest.skip("SDPA aligns the causal mask otherwise")
    # Causal, more queries than keys: the first 3 see none.
    q, k, v = (draw(1, n, 2, 16, seed=n).requires_grad_() for n in (6, 3, 3))
    out, lse = K.attention(q, k, v, return_lse=True, impl=impl)
    assert torch.equal(out[0, :3], torch.zeros_like(out[0, :3]))
    assert (lse[0, :, :3] == -torch.inf).all()
    out.sum().backward()
    assert torch.equal(q.grad[0, :3], torch.zeros_like(q[0, :3]))
    assert all(bool(t.grad.isfinite().all()) for t in (q, k, v))


@each("attention")
def test_a_change_in_one_document_leaves_the_others_bitwise(impl: str) -> None:
    bounds = torch.tensor([0, 9, 40, 57], dtype=torch.int32, device=DEVICE)
    inputs = [draw(57, h, 32, seed=h, dtype=torch.float32) for h in (4, 2, 2)]
    function = lambda q, k, v: K.attention(q, k, v, cu_seqlens=bounds, max_seqlen=31, impl=impl)  # noqa: E731
    before = evaluate(function, inputs)
    for x in inputs:
        x[10:38] = torch.nan
    after = evaluate(function, inputs)
    for name in before:
        assert torch.equal(before[name][:9], after[name][:9])
        assert torch.equal(before[name][40:], after[name][40:])
        assert after[name][10:38].isnan().any()


@pytest.mark.parametrize("impl", implementations("attention_backward"))
@dtypes
def test_attention_backward_from_a_larger_set_of_keys(impl: str, dtype: torch.dtype) -> None:
    """What ring attention does: each rank's keys with the output and log-sum-exp over all."""
    q, k, v = (draw(1, 40, h, 32, seed=h, dtype=dtype) for h in (4, 2, 2))
    dout = draw(1, 40, 4, 32, seed=9, dtype=dtype)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = plain_attention(*wide, causal=False)
    truth = torch.autograd.grad(out, wide, dout.double())
    halves = [
        K.attention_backward(
            dout, q, k[:, at], v[:, at], out.to(dtype), lse.to(torch.float64 if dtype == torch.float64 else torch.float32),
            causal=False, impl=impl,
        )
        for at in (slice(0, 16), slice(16, 40))
    ]  # fmt: skip
    found = (
        sum(h[0].double() for h in halves),
        torch.cat([h[1] for h in halves], 1),
        torch.cat([h[2] for h in halves], 1),
    )
    for mine, true in zip(found, truth, strict=True):
        assert error(mine, true) <= GRADIENT[dtype]


@each("attention_backward")
@pytest.mark.parametrize("options", [
    {}, {"causal": False}, {"window": 3}, {"softcap": 1.5}, {"window": (2, 1), "causal": False, "scale": 0.3},
    {"packed": True}, {"packed": True, "window": 2}, {"packed": True, "softcap": 1.5, "window": 4},
], ids=str)  # fmt: skip
def test_backward_equals_autograd(impl: str, options: dict[str, Any]) -> None:
    options = dict(options)
    tensors = [draw(1, 21, h, 16, seed=h) for h in (4, 2, 2)]
    if options.pop("packed", False):
        tensors = [t[0] for t in tensors]
        bounds = torch.tensor([0, 1, 1, 8, 20, 21], dtype=torch.int32, device=DEVICE)
        options |= {"cu_seqlens": bounds, "max_seqlen": 12}
    q, k, v = (t.requires_grad_() for t in tensors)
    out, lse = K.attention(q, k, v, return_lse=True, impl="reference", **options)
    upstream = draw(*out.shape, seed=9)
    truth = torch.autograd.grad(out, (q, k, v), upstream)
    found = K.attention_backward(upstream, q, k, v, out, lse, impl=impl, **options)
    assert all(error(a, b) <= 1e-12 for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.skipif(INTERPRETED, reason="not about Triton, whose is in test_registration.py")
def test_gradcheck(impl: str) -> None:
    q, k, v = (draw(1, 4, h, 4, seed=h).requires_grad_() for h in (2, 1, 1))
    assert torch.autograd.gradcheck(lambda q, k, v: K.attention(q, k, v, impl=impl), (q, k, v))
