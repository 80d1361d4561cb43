"""Attention's bad input, and what a named implementation refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opencoder import kernels as K

pytestmark = pytest.mark.fast

Q, KEY, V = torch.ones(1, 4, 4, 8).double(), torch.ones(1, 4, 2, 8).double(), torch.ones(1, 4, 2, 8).double()


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
        ((Q[..., :0], KEY[..., :0], V[..., :0]), {}, "head_dim is 0; it must be at least 1"),
        ((Q[:, :, :0], KEY[:, :, :0], V[:, :, :0]), {}, "0 query heads must be a multiple of 0"),
        ((Q, KEY.to("meta"), V), {}, "tensors on different devices: q on cpu, k on meta, v on cpu"),
        ((Q, KEY, V), {"scale": float("nan")}, "scale=nan; it must be finite"),
        (
            (Q[0], KEY[0], V[0]),
            {"cu_seqlens": torch.tensor([0, 4]).int().to("meta"), "max_seqlen": 4},
            "q on cpu, cu_seqlens on meta",
        ),
        (
            (Q[0], KEY[0], V[0]),
            {"cu_seqlens": torch.tensor([0, 4]).int(), "max_seqlen": torch.tensor(4)},
            r"max_seqlen=tensor\(4\); it must be an int of the host",
        ),
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
    assert K.attention(q, k, v, **bounds).shape == q.shape


def test_bad_input_of_backward_is_named() -> None:
    out, lse = K.attention(Q, KEY, V, return_lse=True)
    with pytest.raises(
        ValueError, match=r"dout must be torch.float64 \(1, 4, 4, 8\), got torch.float64 \(1, 3, 4, 8\)"
    ):
        K.attention_backward(out[:, :3], Q, KEY, V, out, lse)
    with pytest.raises(ValueError, match=r"lse must be torch.float64 \(1, 4, 4\), got torch.float64 \(1, 4\)"):
        K.attention_backward(out, Q, KEY, V, out, lse[..., 0])
    with pytest.raises(ValueError, match=r"out must be torch.float64 \(1, 4, 4, 8\), got torch.float32"):
        K.attention_backward(out, Q, KEY, V, out.float(), lse)
    with pytest.raises(ValueError, match="different devices: q on cpu, dout on meta"):
        K.attention_backward(out.to("meta"), Q, KEY, V, out, lse)


def test_explain_takes_the_public_arguments() -> None:
    bounds = torch.tensor([0, 4]).int()
    with K.use(attention="torch"):
        text = K.explain("attention", Q[0], KEY[0], V[0], cu_seqlens=bounds, max_seqlen=4)
    assert "torch: can serve  <- runs" in text
