"""Attention: reference and SDPA against a loop over single queries in fp64; packed documents; backward; bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opencoder import kernels as K

pytestmark = pytest.mark.fast


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(
    b: int, sq: int, sk: int, h: int, g: int, d: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    return (
        draw(b, sq, h, d, seed=1, dtype=dtype),
        draw(b, sk, g, d, seed=2, dtype=dtype),
        draw(b, sk, g, d, seed=3, dtype=dtype),
    )


def naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    left: int | None = None,
    right: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query and one head at a time, over the list of keys it may see."""
    q, k, v = q.double(), k.double(), v.double()
    (b, sq, h, d), sk, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    out, lse = torch.zeros(b, sq, h, d, dtype=torch.float64), torch.full((b, h, sq), -torch.inf, dtype=torch.float64)
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


SHAPES = [
    (2, 17, 17, 4, 2, 16),
    (1, 9, 9, 14, 14, 160),
    (1, 8, 8, 32, 8, 80),
    (1, 5, 12, 2, 1, 16),
    (1, 12, 5, 2, 2, 16),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_reference_equals_the_loop(shape: tuple[int, ...], causal: bool) -> None:
    q, k, v = qkv(*shape)
    truth, truth_lse = naive(q, k, v, causal=causal)
    out, lse = K.attention(q, k, v, causal=causal, return_lse=True, impl="reference")
    assert torch.allclose(out, truth, rtol=1e-10, atol=1e-12)
    assert torch.allclose(lse, truth_lse, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [
    {"window": 3}, {"window": (2, 1), "causal": False}, {"window": 0}, {"softcap": 1.5}, {"scale": 0.3}, {"window": 4, "softcap": 2.0},
    {"window": (None, 2), "causal": False}, {"window": (0, 0), "causal": False}, {"window": 100},
])  # fmt: skip
def test_window_softcap_and_scale(options: dict[str, Any]) -> None:
    q, k, v = qkv(1, 11, 11, 4, 2, 16)
    window = options.get("window")
    left, right = window if isinstance(window, tuple) else (window, None)
    plain = {name: value for name, value in options.items() if name != "window"}
    truth, _ = naive(q, k, v, left=left, right=right, **plain)
    assert torch.allclose(K.attention(q, k, v, impl="reference", **options), truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sdpa_errs_no_more_than_plain_torch_in_the_same_type(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = qkv(*shape, dtype=dtype)
    truth, _ = naive(q, k, v)
    cap = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    wide_k, wide_v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2).transpose(1, 2) for t in (k, v))
    scores = (q.transpose(1, 2) @ wide_k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    plain = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ wide_v).transpose(1, 2)
    error = lambda x: float((x.double() - truth).norm() / truth.norm())  # noqa: E731
    assert error(K.attention(q, k, v, impl="torch")) <= min(2 * error(plain) + cap / 10, cap)


@pytest.mark.parametrize("shape", [*SHAPES[:3], (1, 5, 12, 2, 1, 16), (1, 12, 5, 4, 2, 16)])
def test_sdpa_without_a_mask_equals_the_loop(shape: tuple[int, ...]) -> None:
    q, k, v = qkv(*shape)
    truth, _ = naive(q, k, v, causal=False)
    assert torch.allclose(K.attention(q, k, v, causal=False, impl="torch"), truth, rtol=1e-10, atol=1e-12)
    scaled, _ = naive(q, k, v, causal=False, scale=0.7)
    assert torch.allclose(K.attention(q, k, v, causal=False, scale=0.7, impl="torch"), scaled, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_both_implementations_in_each_type(dtype: torch.dtype) -> None:
    tensors, upstream = qkv(2, 33, 33, 4, 2, 16, dtype=dtype), draw(2, 33, 4, 16, seed=9, dtype=dtype)
    cap = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]

    def gradients(impl: str, wide: bool = False) -> tuple[torch.Tensor, ...]:
        q, k, v = ((t.double() if wide else t.clone()).requires_grad_() for t in tensors)
        out = K.attention(q, k, v, impl=impl)
        return torch.autograd.grad(out, (q, k, v), upstream.to(out.dtype))

    truth = gradients("reference", wide=True)
    for impl in ("reference", "torch"):
        for mine, true in zip(gradients(impl), truth, strict=True):
            assert mine.dtype == dtype
            assert (mine.double() - true).norm() <= cap * true.norm()


BOUNDS = torch.tensor([0, 1, 1, 8, 20, 21], dtype=torch.int32)  # a single token, an empty document, longer ones


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_packed_documents_equal_each_alone(impl: str) -> None:
    q, k, v = (t[0] for t in qkv(1, 21, 21, 4, 2, 16))
    out = K.attention(q, k, v, cu_seqlens=BOUNDS, max_seqlen=12, impl=impl)
    for a, b in ((0, 1), (1, 8), (8, 20), (20, 21)):
        truth, _ = naive(q[None, a:b], k[None, a:b], v[None, a:b])
        assert torch.allclose(out[a:b], truth[0], rtol=1e-10, atol=1e-12)
    other = k.clone()
    other[3] += 1.0
    changed = K.attention(q, other, v, cu_seqlens=BOUNDS, max_seqlen=12, impl=impl)
    assert torch.equal(changed[8:], out[8:])
    assert not torch.equal(changed[1:8], out[1:8])


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradients_stay_within_their_document(impl: str) -> None:
    q, k, v = (t[0].requires_grad_() for t in qkv(1, 21, 21, 4, 2, 16))
    out = K.attention(q, k, v, cu_seqlens=BOUNDS, impl=impl)
    for grad in torch.autograd.grad(out[8:20].pow(2).sum(), (q, k, v)):
        assert torch.equal(grad[:8], torch.zeros_like(grad[:8]))
        assert torch.equal(grad[20:], torch.zeros_like(grad[20:]))
        assert bool(grad[8:20].any())


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_no_tokens_at_all(impl: str) -> None:
    q, k = torch.zeros(0, 4, 8, requires_grad=True), torch.zeros(0, 2, 8)
    out = K.attention(q, k, k, cu_seqlens=torch.zeros(3, dtype=torch.int32), impl=impl)
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 4, 8)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_a_document_without_keys_gives_zero(impl: str) -> None:
    q, k = draw(3, 2, 8, seed=1).requires_grad_(), draw(2, 2, 8, seed=2).requires_grad_()
    bounds = {"cu_seqlens": torch.tensor([0, 2, 3]).int(), "cu_seqlens_k": torch.tensor([0, 2, 2]).int()}
    out = K.attention(q, k, k, causal=False, impl=impl, **bounds)
    out.sum().backward()
    assert torch.equal(out[2], torch.zeros(2, 8, dtype=torch.float64))
    assert all(bool(t.grad.isfinite().all()) for t in (q, k))


def test_packed_keys_with_bounds_of_their_own() -> None:
    q, k, v = draw(5, 2, 8, seed=1), draw(9, 2, 8, seed=2), draw(9, 2, 8, seed=3)
    bounds = {
        "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 6, 9], dtype=torch.int32),
    }
    out, lse = K.attention(q, k, v, return_lse=True, **bounds)
    first, first_lse = naive(q[None, :2], k[None, :6], v[None, :6])
    assert torch.allclose(out[:2], first[0], rtol=1e-10)
    assert torch.allclose(lse[:, :2], first_lse[0], rtol=1e-10)


def test_rows_that_see_nothing_are_zero_and_pass_no_gradient() -> None:
    q, k, v = (
        t.requires_grad_() for t in qkv(1, 6, 3, 2, 2, 8)
    )  # causal, more queries than keys: the first 3 see none
    out, lse = K.attention(q, k, v, return_lse=True)
    assert torch.equal(out[0, :3], torch.zeros(3, 2, 8, dtype=torch.float64))
    assert (lse[0, :, :3] == -torch.inf).all()
    out.sum().backward()
    assert torch.equal(q.grad[0, :3], torch.zeros(3, 2, 8, dtype=torch.float64))
    assert all(bool(t.grad.isfinite().all()) for t in (q, k, v))
    with torch.no_grad():
        found = K.attention_backward(torch.ones_like(out), q, k, v, out, lse)
    for mine, t in zip(found, (q, k, v), strict=True):
        assert torch.allclose(mine, t.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [
    {}, {"causal": False}, {"window": 3}, {"softcap": 1.5}, {"window": (2, 1), "causal": False, "scale": 0.3},
    {"packed": True}, {"packed": True, "window": 2}, {"packed": True, "softcap": 1.5, "window": 4},
])  # fmt: skip
def test_backward_equals_autograd_of_the_reference(options: dict[str, Any]) -> None:
    options = dict(options)
    tensors = qkv(1, 21, 21, 4, 2, 16)
    if options.pop("packed", False):
        tensors = tuple(t[0] for t in tensors)
        options["cu_seqlens"] = BOUNDS
    q, k, v = (t.requires_grad_() for t in tensors)
    out, lse = K.attention(q, k, v, return_lse=True, impl="reference", **options)
    upstream = draw(*out.shape, seed=9)
    truth = torch.autograd.grad(out, (q, k, v), upstream)
    with torch.no_grad():
        found = K.attention_backward(upstream, q, k, v, out, lse, **options)
    for a, b in zip(found, truth, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def test_backward_from_a_larger_set_of_keys() -> None:
    """What ring attention needs: the keys' gradients part by part, from the whole's output and log-sum-exp."""
    q, k, v = qkv(1, 8, 8, 4, 2, 16)
    out, lse = K.attention(q, k, v, causal=False, return_lse=True)
    upstream = draw(*out.shape, seed=9)
    whole = K.attention_backward(upstream, q, k, v, out, lse, causal=False)
    parts = [
        K.attention_backward(upstream, q, k[:, a:b], v[:, a:b], out, lse, causal=False) for a, b in ((0, 3), (3, 8))
    ]
    assert torch.allclose(parts[0][0] + parts[1][0], whole[0], rtol=1e-10, atol=1e-13)
    for i in (1, 2):
        assert torch.allclose(torch.cat([p[i] for p in parts], 1), whole[i], rtol=1e-10, atol=1e-13)


def test_gradcheck_of_both_implementations() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(1, 4, 4, 2, 1, 4))
    for impl in ("reference", "torch"):
        assert torch.autograd.gradcheck(lambda q, k, v, i=impl: K.attention(q, k, v, impl=i), (q, k, v))


Q, KEY, V = qkv(1, 4, 4, 4, 2, 8)


@pytest.mark.parametrize(
    ("args", "options", "says"),
    [
        ((Q[0], KEY[0], V[0]), {}, r"must be \(B,S,H,D\)"),
        ((Q, KEY, V[:, :2]), {}, "with k and v alike"),
        ((Q, KEY.float(), V), {}, "types differ"),
        ((Q[:, :, :3], KEY, V), {}, "3 query heads must be a multiple of 2"),
        ((Q.expand(2, -1, -1, -1), KEY, V), {}, "different batch sizes"),
        ((Q, KEY, V), {"window": -1}, "window left=-1"),
        ((Q, KEY, V), {"window": (0, -2)}, "window right=-2"),
        ((Q, KEY, V), {"window": 1.5}, "window left=1.5; allowed: an integer"),
        ((Q, KEY, V), {"window": (1, 2, 3)}, "it must be a number"),
        ((Q, KEY, V), {"softcap": 0.0}, "softcap=0.0"),
        ((Q.int(), KEY, V), {}, "q is torch.int32; allowed"),
        ((Q[0], KEY[0], V[0]), {"cu_seqlens": torch.tensor([0, 4])}, "must be 1-D int32"),
        (
            (Q[0], KEY[0], V[0]),
            {"cu_seqlens": torch.tensor([0, 3, 2, 4], dtype=torch.int32)},
            "must rise from 0 to the 4",
        ),
        ((Q[0], KEY[0], V[0]), {"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, "must rise from 0 to the 4"),
        (
            (Q[0], KEY[0], V[0]),
            {"cu_seqlens": torch.tensor([0, 1, 4], dtype=torch.int32), "max_seqlen": 2},
            "max_seqlen=2, but cu_seqlens holds a document of 3 tokens",
        ),
        (
            (Q[0], KEY[0], V[0]),
            {"cu_seqlens": torch.tensor([0, 4]).int(), "cu_seqlens_k": torch.tensor([0, 1, 4]).int()},
            "different numbers of documents",
        ),
        ((Q, KEY, V), {"cu_seqlens_k": torch.tensor([0, 4], dtype=torch.int32)}, "without cu_seqlens"),
    ],
)
def test_bad_input_is_named(args: tuple[torch.Tensor, ...], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        K.attention(*args, **options)


@pytest.mark.parametrize("options", [{"window": 3}, {"softcap": 2.0}, {"return_lse": True}])
def test_a_named_implementation_that_cannot_serve_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(K.UnsupportedKernel, match=r"attention\[torch\]: .*; implementations that can: reference"):
        K.attention(Q, KEY, V, impl="torch", **options)


@pytest.mark.parametrize("packed", [False, True])
def test_sdpa_is_refused_where_its_causal_mask_is_aligned_otherwise(packed: bool) -> None:
    q, k, v = Q[:, :3], KEY, V
    bounds = {"cu_seqlens": torch.tensor([0, 3]).int(), "cu_seqlens_k": torch.tensor([0, 4]).int()} if packed else {}
    q, k, v = (t[0] for t in (q, k, v)) if packed else (q, k, v)
    with pytest.raises(K.UnsupportedKernel, match="aligns the causal mask top-left"):
        K.attention(q, k, v, impl="torch", **bounds)
    truth, _ = naive(Q[:, :3], KEY, V)
    assert torch.allclose(K.attention(q, k, v, **bounds).view_as(truth), truth, rtol=1e-10, atol=1e-12)


def test_bad_input_of_backward_is_named() -> None:
    out, lse = K.attention(Q, KEY, V, return_lse=True)
    with pytest.raises(ValueError, match=r"attention_backward: dout must be \(1, 4, 4, 8\), got \(1, 3, 4, 8\)"):
        K.attention_backward(out[:, :3], Q, KEY, V, out, lse)
    with pytest.raises(ValueError, match=r"lse must be \(1, 4, 4\), got \(1, 4\)"):
        K.attention_backward(out, Q, KEY, V, out, lse[..., 0])


def test_explain_takes_the_public_arguments() -> None:
    bounds = torch.tensor([0, 4]).int()
    with K.use(attention="torch"):
        text = K.explain("attention", Q[0], KEY[0], V[0], cu_seqlens=bounds, max_seqlen=4)
    assert "torch: can serve  <- runs" in text
