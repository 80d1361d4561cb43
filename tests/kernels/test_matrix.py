"""Every operator, every implementation of ours, every type, over awkward shapes, against an fp64 truth written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from opencoder import kernels as K

from .matrix import DEVICE, DTYPES, GRADIENT, INTERPRETED, assert_accepted, draw, error, evaluate, implementations

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def each(operator: str) -> Any:
    return pytest.mark.parametrize("impl", implementations(operator))


# ---- RMSNorm ----

EPS = 1e-5


def plain_norm(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor | None = None) -> Any:
    t = x if r is None else x + r
    y = t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + EPS) * w
    return y if r is None else (y, t)


@each("rms_norm")
@dtypes
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 8), (5, 41), (2, 7, 128), (19, 760), (3, 1128), (2, 4096)])
def test_rms_norm(impl: str, dtype: torch.dtype, with_residual: bool, shape: tuple[int, ...]) -> None:
    inputs = [draw(*shape), 1 + 0.1 * draw(shape[-1], seed=1), draw(*shape, seed=2) if with_residual else None]
    inputs = [None if x is None else x.to(dtype) for x in inputs]

    def ours(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor | None) -> Any:
        return K.rms_norm(x, w, eps=EPS, residual=r, impl=impl)

    truth = evaluate(plain_norm, [None if x is None else x.double() for x in inputs])
    # The gradient of a row of one value is 0 but for eps.
    assert_accepted(evaluate(ours, inputs), evaluate(plain_norm, inputs), truth, dtype, floor=0.1)


@each("rms_norm")
def test_rms_norm_in_scale(impl: str) -> None:
    x, w = draw(4, 64, dtype=torch.float32), draw(64, seed=1, dtype=torch.float32)
    for factor in (1e-4, 30.0, 1e4):
        y, truth = K.rms_norm(x * factor, w, eps=EPS, impl=impl), plain_norm((x * factor).double(), w.double())
        assert error(y, truth) <= 2e-6


# ---- rotary ----


def plain_rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    cos, sin = (t.to(q.dtype)[..., None, :] for t in (cos, sin))
    half = cos.shape[-1]

    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    return turn(q), turn(k)


@each("rotary")
@dtypes
@pytest.mark.parametrize(
    ("shape", "heads", "rotated"),
    [((2, 5, 4, 16), 2, 16), ((1, 1, 1, 80), 1, 80), ((1, 3, 14, 160), 14, 160), ((2, 4, 6, 96), 3, 64), ((1, 7, 3, 20), 3, 6)],
)  # fmt: skip
@pytest.mark.parametrize("per_batch", [False, True])
def test_rotary(
    impl: str, dtype: torch.dtype, shape: tuple[int, ...], heads: int, rotated: int, per_batch: bool
) -> None:
    b, s, _, d = shape
    angles = draw(*((b, s) if per_batch else (s,)), rotated // 2, seed=5).float() * 100
    cos, sin = angles.cos(), angles.sin()
    inputs = [draw(*shape, dtype=dtype), draw(b, s, heads, d, seed=1, dtype=dtype)]
    truth = evaluate(lambda q, k: plain_rotary(q, k, cos.double(), sin.double()), [x.double() for x in inputs])
    mine = evaluate(lambda q, k: K.rotary(q, k, cos, sin, impl=impl), inputs)
    assert_accepted(mine, evaluate(lambda q, k: plain_rotary(q, k, cos, sin), inputs), truth, dtype)
    q, k = (x.clone() for x in inputs)
    returned = K.rotary(q, k, cos, sin, inplace=True, impl=impl)
    assert returned[0] is q
    assert returned[1] is k
    assert torch.equal(q, mine["y0"])
    assert torch.equal(k, mine["y1"])


# ---- SwiGLU ----


def plain_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


@each("swiglu")
@dtypes
@pytest.mark.parametrize("shape", [(0, 8), (1,), (3, 41), (2, 3, 1000), (1, 2049)])
@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_swiglu(impl: str, dtype: torch.dtype, shape: tuple[int, ...], factor: float) -> None:
    inputs = [(draw(*shape) * factor).to(dtype), draw(*shape, seed=1, dtype=dtype)]
    truth = evaluate(plain_swiglu, [x.double() for x in inputs])
    mine = evaluate(lambda gate, up: K.swiglu(gate, up, impl=impl), inputs)
    assert_accepted(mine, evaluate(plain_swiglu, inputs), truth, dtype)


@each("swiglu")
def test_swiglu_far_out(impl: str) -> None:
    gate = torch.tensor([-torch.inf, -1e4, -200.0, -90.0, 90.0, 200.0, 1e4, torch.nan], device=DEVICE)
    out = K.swiglu(gate, torch.ones_like(gate), impl=impl)
    assert out[1:4].abs().max() <= 1e-35
    assert torch.equal(out[4:7], gate[4:7])
    assert out[7].isnan()


# ---- cross entropy ----


def targets_for(rows: int, classes: int) -> torch.Tensor:
    """Some ignored, the last class among them."""
    targets = torch.arange(rows) * 7 % classes
    targets[1::4] = -100
    if rows:
        targets[0] = classes - 1
    return targets.to(DEVICE)


def plain_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, z_loss: float = 0.0, softcap: float | None = None, **options: Any
) -> torch.Tensor:
    x = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(x, targets, **options)
    if z_loss:
        extra = z_loss * x.logsumexp(-1).square() * (targets != -100)
        loss = loss + {"none": extra, "sum": extra.sum()}.get(
            options["reduction"], extra.sum() / (targets != -100).sum()
        )
    return loss


OPTIONS: list[dict[str, Any]] = [
    {"reduction": "mean"},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "z_loss": 1e-2},
    {"reduction": "mean", "softcap": 5.0, "z_loss": 1e-3, "label_smoothing": 0.2},
]


@each("cross_entropy")
@dtypes
@pytest.mark.parametrize(("rows", "classes"), [(0, 11), (1, 11), (7, 1000), (2, 50257), (9, 4097)])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o))
def test_cross_entropy(impl: str, dtype: torch.dtype, rows: int, classes: int, options: dict[str, Any]) -> None:
    if not rows and options["reduction"] == "mean":
        pytest.skip("the mean of no rows")
    logits, targets = (draw(rows, classes) * 3).to(dtype), targets_for(rows, classes)
    truth = evaluate(lambda x: plain_cross_entropy(x, targets, **options), [logits.double()])
    plain = evaluate(lambda x: plain_cross_entropy(x, targets, **options), [logits])
    mine = evaluate(lambda x: K.cross_entropy(x, targets, impl=impl, **options), [logits])
    losses = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}
    assert_accepted(mine, plain, truth, dtype, forward_caps=losses)


@each("cross_entropy")
def test_cross_entropy_with_a_large_common_offset_and_extreme_rows(impl: str) -> None:
    logits, targets = draw(6, 100, dtype=torch.float32), torch.tensor([5, 3, -100, 99, 0, 1], device=DEVICE)
    shifted = K.cross_entropy(logits + 1e4, targets, reduction="none", impl=impl)
    truth = F.cross_entropy((logits + 1e4).double(), targets, reduction="none")
    assert error(shifted, truth) <= 1e-3  # the spacing of fp32 at 1e4
    logits[0, 5] = 1e4  # certain: no loss
    logits[2] = torch.inf  # ignored, so it may hold anything
    logits[3, :99] = -torch.inf
    logits[4, 7] = torch.nan
    logits = logits.requires_grad_()
    losses = K.cross_entropy(logits, targets, reduction="none", impl=impl)
    losses.nan_to_num().sum().backward()
    assert losses.isnan().tolist() == [False, False, False, False, True, False]
    assert losses[[0, 2, 3]].tolist() == [0.0, 0.0, 0.0]
    assert not logits.grad[[0, 1, 2, 3, 5]].isnan().any()
    assert torch.equal(logits.grad[2], torch.zeros_like(logits.grad[2]))


@each("ce_grad")
@dtypes
@pytest.mark.parametrize("shards", [1, 3])
def test_halves_of_a_split_vocabulary(impl: str, dtype: torch.dtype, shards: int) -> None:
    logits, targets, scale = (draw(9, 120) * 3).to(dtype), targets_for(9, 120), draw(9, seed=3)
    wide = logits.double().clone().requires_grad_()
    losses = F.cross_entropy(wide, targets, reduction="none") + 1e-2 * wide.logsumexp(-1) ** 2 * (targets != -100)
    (truth,) = torch.autograd.grad((losses * scale).sum(), wide)
    parts, width = [p.clone() for p in logits.chunk(shards, 1)], 120 // shards
    stats = [K.ce_stats(p, targets, i * width, impl=impl) for i, p in enumerate(parts)]
    highest = torch.stack([s[0] for s in stats]).amax(0)
    lse = highest + sum(s[1] * (s[0] - highest).exp() for s in stats).log()
    live = targets != -100
    found = (lse - sum(s[2] for s in stats) + 1e-2 * lse**2)[live]
    assert error(found, losses[live]) <= (1e-12 if dtype == torch.float64 else 1e-6)
    for in_place in (False, True):
        options = {"z_loss": 1e-2, "impl": impl}
        grads = [
            K.ce_grad(p, targets, lse, scale, i * width, out=p if in_place else None, **options)
            for i, p in enumerate(parts)
        ]
        assert error(torch.cat(grads, 1), truth) <= GRADIENT[dtype]


# ---- linear cross entropy ----


@each("linear_cross_entropy")
@dtypes
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("rows", "chunk"), [(1, 64), (50, 16), (33, 33)])
def test_linear_cross_entropy(impl: str, dtype: torch.dtype, reduction: str, rows: int, chunk: int) -> None:
    inputs = [draw(rows, 24, dtype=dtype), (draw(300, 24, seed=1) / 4).to(dtype)]
    targets = targets_for(rows, 300)

    def plain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return plain_cross_entropy(x @ w.t(), targets, reduction=reduction, z_loss=1e-3)

    def ours(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return K.linear_cross_entropy(
            x, w, targets, reduction=reduction, z_loss=1e-3, chunk_tokens=chunk, impl=impl
        ).to(x.dtype if reduction == "none" else torch.float64)

    truth = evaluate(plain, [x.double() for x in inputs])
    losses = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
    assert_accepted(evaluate(ours, inputs), evaluate(plain, inputs), truth, dtype, forward_caps=losses)


# ---- attention ----


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


ATTENTION_CAPS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
SHAPES = [  # B, Sq, Sk, H, G, D
    (2, 17, 17, 4, 2, 16), (1, 65, 65, 14, 14, 160), (1, 15, 100, 8, 2, 80), (1, 100, 15, 2, 1, 96), (1, 1, 65, 8, 1, 64),
    (1, 129, 129, 7, 1, 32), (2, 33, 64, 4, 4, 128), (1, 16, 16, 2, 2, 256),
]  # fmt: skip
if INTERPRETED:  # milliseconds a tile: fewer and smaller, the same branches
    SHAPES = [(2, 17, 17, 4, 2, 16), (1, 20, 20, 2, 2, 160), (1, 15, 40, 4, 2, 80), (1, 40, 15, 2, 1, 96)]
MASKS: list[dict[str, Any]] = [
    {}, {"causal": False}, {"window": 0}, {"window": 3}, {"window": (20, 5), "causal": False}, {"softcap": 1.5},
    {"window": 64, "softcap": 2.0, "scale": 0.3}, {"window": 10**6},
]  # fmt: skip


@each("attention")
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
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
def test_packed_documents_equal_each_alone(impl: str, lengths: list[int], options: dict[str, Any]) -> None:
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


# ---- AdamW and the gradient norm ----


def plain_adamw(
    p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: int, clip: float
) -> tuple[torch.Tensor, ...]:
    g = g * clip
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    p = p - 1e-2 * 0.1 * p - 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    return p, m, v


@each("adamw_step")
@dtypes
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("wide_grads", [False, True])
def test_adamw(impl: str, dtype: torch.dtype, clip: float | None, wide_grads: bool) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = dtype != wide
    if impl == "torch" and (clip is not None or narrow):
        pytest.skip("refused, which test_dispatch.py looks at")
    shapes = [(3, 5), (1,), (0,), (70, 500), (33000,)]
    params = [draw(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
    masters = [p.to(wide) for p in params] if narrow else None
    states = [[torch.zeros_like(p, dtype=wide) for p in params] for _ in range(2)]
    truth = [(p.double().clone(), *(torch.zeros_like(p).double() for _ in range(2))) for p in params]
    for step in (1, 2, 3):
        grads = [draw(*s, seed=10 * step + i).to(wide if wide_grads else dtype) for i, s in enumerate(shapes)]
        kept = [g.clone() for g in grads]
        coefficient = torch.tensor(clip, device=DEVICE) if clip and step == 2 else clip
        K.adamw_step(
            params, grads, *states, masters, step=step, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
            clip_coef=coefficient, impl=impl,
        )  # fmt: skip
        # The state is compared where it is kept: the fp32 rounding of a 0-dim clip counts as input.
        factor = 1.0 if clip is None else float(coefficient)
        truth = [plain_adamw(p, g.double(), m, v, step, factor) for (p, m, v), g in zip(truth, kept, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True)), "gradients are not to be changed"
    for i, (p, m, v) in enumerate(truth):
        for mine, true in ((masters or params)[i], p), (states[0][i], m), (states[1][i], v):
            assert error(mine, true) <= (1e-12 if wide == torch.float64 else 1e-6)
        if masters is not None:
            assert torch.equal(params[i], masters[i].to(dtype))


@each("grad_norm")
@dtypes
def test_grad_norm(impl: str, dtype: torch.dtype) -> None:
    tensors = [draw(*s, seed=i, dtype=dtype) for i, s in enumerate([(3, 5), (1,), (0,), (300, 500), (7, 33000)])]
    truth = torch.cat([t.double().flatten() for t in tensors]).norm()
    norm = K.grad_norm(tensors, impl=impl)
    assert norm.shape == ()
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # torch sums a long fp32 tensor with an error of its own.
    assert error(norm, truth) <= (1e-12 if dtype == torch.float64 else 1e-5 if impl == "torch" else 1e-6)
    tensors[3].view(-1)[77] = torch.nan
    assert K.grad_norm(tensors, impl=impl).isnan()
