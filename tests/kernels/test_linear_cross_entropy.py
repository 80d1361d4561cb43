"""Linear cross entropy: logits in chunks against logits whole; a split vocabulary; memory; bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opencoder import kernels as K

from .matrix import DEVICE, INTERPRETED, assert_accepted, draw, dtypes, each, error, evaluate
from .test_cross_entropy import plain_cross_entropy, targets_for

pytestmark = pytest.mark.fast


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


OPTIONS: list[dict[str, Any]] = [
    {"label_smoothing": 0.1}, {"softcap": 3.0, "z_loss": 1e-2}, {"ignore_index": 7}, {"softcap": 5.0, "label_smoothing": 0.2},
]  # fmt: skip


@each("linear_cross_entropy")
@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_options_are_those_of_cross_entropy(impl: str, options: dict[str, Any], reduction: str) -> None:
    inputs, targets = [draw(50, 24), draw(60, 24, seed=1)], targets_for(50, 60).clamp_min(0)
    targets = targets if "ignore_index" in options else targets_for(50, 60)

    def ours(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return K.linear_cross_entropy(x, w, targets, reduction=reduction, chunk_tokens=16, impl=impl, **options)

    def whole(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return K.cross_entropy(x @ w.t(), targets, reduction=reduction, impl="reference", **options)

    mine, truth = evaluate(ours, inputs), evaluate(whole, inputs)
    assert all(error(mine[name], truth[name]) <= 1e-12 for name in truth)


@each("linear_cross_entropy")
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_split_vocabulary_gives_the_whole_ones_loss_and_gradients(
    impl: str, reduction: str, softcap: float | None
) -> None:
    if impl == "reference":
        pytest.skip("the reference knows whole vocabularies only; refused below")
    x, weight, targets, shards = draw(20, 24), draw(60, 24, seed=1), targets_for(20, 60), 3
    options: dict[str, Any] = {
        "z_loss": 1e-2,
        "softcap": softcap,
        "reduction": reduction,
        "chunk_tokens": 8,
        "impl": impl,
    }
    truth = evaluate(lambda x, w: K.linear_cross_entropy(x, w, targets, **options), [x, weight])
    # What the collective would see: every shard's statistics of a chunk, worked out here from whole logits.
    logits = x @ weight.t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    at = iter(list(range(0, 20, 8)) * 2 * shards)

    def combine(
        highest: torch.Tensor, sum_exp: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = slice(start := next(at), start + 8)
        live = targets[rows].clamp_min(0)
        assert (highest <= logits[rows].amax(1) + 1e-12).all()
        return logits[rows].logsumexp(1), logits[rows].gather(1, live[:, None])[:, 0] * (targets[rows] != -100)

    parts = []
    for i, shard in enumerate(weight.chunk(shards)):
        call = lambda x, w, i=i: K.linear_cross_entropy(x, w, targets, vocab_start=20 * i, combine=combine, **options)  # noqa: E731
        parts.append(evaluate(call, [x, shard]))
    assert all(error(part["y0"], truth["y0"]) <= 1e-12 for part in parts)
    assert error(sum(part["d0"] for part in parts), truth["d0"]) <= 1e-12
    assert error(torch.cat([part["d1"] for part in parts]), truth["d1"]) <= 1e-12


@each("linear_cross_entropy")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_token_losses_are_what_is_reduced(impl: str, reduction: str, trained: bool, split: bool) -> None:
    if impl == "reference" and split:
        pytest.skip("the reference knows whole vocabularies only; refused below")
    x, weight = (draw(*s, seed=i).requires_grad_(trained) for i, s in enumerate([(20, 24), (60, 24)]))
    targets = targets_for(20, 60)
    options: dict[str, Any] = {"z_loss": 1e-2, "reduction": reduction, "chunk_tokens": 8, "impl": impl}
    if split:  # one shard that is the whole vocabulary
        options["combine"] = lambda highest, sum_exp, target: (highest + sum_exp.log(), target)
    loss, tokens = K.linear_cross_entropy(x, weight, targets, return_token_losses=True, **options)
    logits = x.detach() @ weight.detach().t()
    truth = plain_cross_entropy(logits, targets, reduction="none", z_loss=1e-2)
    assert tokens.shape == (20,)
    assert (tokens[targets == -100] == 0).all()
    assert error(tokens, truth) <= 1e-12
    assert not tokens.requires_grad
    alone = K.linear_cross_entropy(x, weight, targets, **options)
    assert torch.equal(loss, alone)
    assert loss.requires_grad == trained
    if trained:
        kept = tokens.clone()
        pairs = zip(*(torch.autograd.grad(y.sum(), (x, weight)) for y in (loss, alone)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert torch.equal(tokens, kept), "the backward pass must leave them"


@each("linear_cross_entropy")
def test_a_frozen_input_gets_no_gradient_and_costs_no_product(impl: str) -> None:
    x, weight, targets = draw(20, 8), draw(30, 8, seed=1), targets_for(20, 30)
    both = evaluate(lambda x, w: K.linear_cross_entropy(x, w, targets, impl=impl), [x, weight])
    for i, frozen in ((0, weight), (1, x)):
        leaf = (x, weight)[i].clone().requires_grad_()
        pair = (leaf, frozen) if i == 0 else (frozen, leaf)
        K.linear_cross_entropy(*pair, targets, impl=impl).backward()
        assert error(leaf.grad, both[f"d{i}"]) <= 1e-12
    assert not K.linear_cross_entropy(x, weight, targets, impl=impl).requires_grad


@each("linear_cross_entropy")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no bf16; the sum is the same code")
def test_dw_of_16_bit_inputs_is_summed_in_fp32(impl: str) -> None:
    """A sum of halves in bf16, one at a time, would stop growing at 128."""
    x = torch.ones(512, 4, device=DEVICE).bfloat16()
    weight = torch.zeros(2, 4, device=DEVICE).bfloat16().requires_grad_()
    targets = torch.zeros(512, dtype=torch.int64, device=DEVICE)
    K.linear_cross_entropy(x, weight, targets, reduction="sum", chunk_tokens=1, impl=impl).backward()
    assert torch.equal(weight.grad, torch.tensor([[-256.0] * 4, [256.0] * 4], device=DEVICE).bfloat16())


@each("linear_cross_entropy")
def test_a_second_backward_is_refused(impl: str) -> None:
    if impl == "reference":
        pytest.skip("plain torch: may be differentiated again")
    x, weight = draw(20, 8).requires_grad_(), draw(30, 8, seed=1).requires_grad_()
    loss = 2 * K.linear_cross_entropy(x, weight, targets_for(20, 30), impl=impl)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


X, W, T = torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("args", "options", "says"),
    [
        ((X[0], W, T), {}, r"x must be \(T, M\) and weight \(V, M\), got \(3,\)"),
        ((X, W[:, :2], T), {}, r"got \(2, 3\) and \(5, 2\)"),
        ((X, W.double(), T), {}, "types differ"),
        ((X, W, T[:1]), {}, r"targets must be \(2,\)"),
        ((X, W, T + 1), {}, r"targets lie in \[1, 5\]; allowed: \[0, 5\)"),
        ((X, W[:0], T), {}, r"weight is \(0, 3\); V and M must be at least 1"),
        ((X[:, :0], W[:, :0], T), {}, r"weight is \(5, 0\); V and M must be at least 1"),
        ((X, W, T), {"vocab_start": -5, "combine": max}, "vocab_start=-5; it must be at least 0"),
        ((X, W, T), {"reduction": "max"}, "reduction='max'"),
        ((X, W, T), {"chunk_tokens": 0}, "chunk_tokens=0; it must be positive"),
        ((X, W, T), {"softcap": -1.0}, "softcap=-1.0; it must be positive"),
        ((X, W, T), {"label_smoothing": 0.1, "combine": max}, "label_smoothing=0.1 with `combine`"),
    ],
)
def test_bad_input_is_named(args: tuple[torch.Tensor, ...], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        K.linear_cross_entropy(*args, **options)


def test_the_reference_refuses_a_part_of_a_vocabulary() -> None:
    with pytest.raises(K.UnsupportedKernel, match=r"\[reference\]: the reference knows whole vocabularies only"):
        K.linear_cross_entropy(X, W, T, combine=lambda *stats: stats[:2], impl="reference")
