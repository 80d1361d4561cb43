"""Adapters of other packages: the signatures they publish, and with a stand-in module the mapping of layout, scale, window,
causal mask and log-sum-exp. No GPU and none of the packages is needed; what is not there is skipped by name."""

from __future__ import annotations

import ast
import importlib.machinery
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from opencoder import kernels as K
from opencoder.kernels import _dispatch
from opencoder.kernels.adapters import apex, flash_attn, liger, probe

from .matrix import error
from .test_attention import plain_attention
from .test_rms_norm import plain_norm

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="not about Triton"),
]
SDISTS = Path(sys.prefix) / "sdists"  # `make setup-dev` puts them there


# ---- what the packages publish ----


def parameters_in(source: str, name: str) -> tuple[list[str], list[str]]:
    """Parameters, and those without a default, of a function or of a class's forward (without its context) in a source
    text, which is not run: it would want a GPU build."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            (forward,) = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "forward"]
            names, needed = parameters_in(ast.unparse(forward), "forward")
            return names[1:], needed[1:]
        if isinstance(node, ast.FunctionDef) and node.name == name:
            names = [a.arg for a in node.args.args]
            return names, names[: len(names) - len(node.args.defaults)]
    raise AssertionError(f"no {name} in the source")


def test_flash_attn_publishes_the_signatures_the_adapter_calls() -> None:
    found = sorted(SDISTS.glob("flash_attn-2*.tar.gz"))
    if not found:
        pytest.skip(f"no source of flash-attn in {SDISTS}; `make setup-dev` downloads it")
    with tarfile.open(found[-1]) as archive:
        (member,) = [m for m in archive.getmembers() if m.name.endswith("flash_attn/flash_attn_interface.py")
                     and "hopper" not in m.name]  # fmt: skip
        file = archive.extractfile(member)
        assert file is not None
        source = file.read().decode()
    for symbol in (flash_attn.DENSE, flash_attn.PACKED):
        names, needed = parameters_in(source, symbol.name)
        assert symbol.misfit(names, needed) is None


def test_liger_publishes_the_signatures_the_adapter_calls() -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    assert liger.PACKAGE.missing() is None
    assert set(liger.PACKAGE.found().functions) == {"LigerRMSNormFunction", "LigerFusedAddRMSNormFunction"}


def test_apex_publishes_the_signature_the_adapter_calls() -> None:
    source = Path(os.environ.get("APEX_SOURCE", "nowhere")) / "apex/normalization/fused_layer_norm.py"
    if not source.exists():
        pytest.skip("NVIDIA apex is on no package index: set APEX_SOURCE to a checkout of its repository")
    names, needed = parameters_in(source.read_text(), apex.RMS_NORM.name)
    assert apex.RMS_NORM.misfit(names, needed) is None


PUBLISHED = ["q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes",
             "deterministic", "return_attn_probs"]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "needed", "says"),
    [
        (PUBLISHED, PUBLISHED[:3], None),
        (["query", *PUBLISHED[1:]], PUBLISHED[:3], "takes (query, k, v"),
        (["k", "q", *PUBLISHED[2:]], PUBLISHED[:3], "expected first"),
        ([n for n in PUBLISHED if n != "softcap"], PUBLISHED[:3], "has no parameter softcap"),
        ([*PUBLISHED, "num_splits"], [*PUBLISHED[:3], "num_splits"], "needs num_splits too"),
    ],
)
def test_drift_of_a_signature_is_told(names: list[str], needed: list[str], says: str | None) -> None:
    reason = flash_attn.DENSE.misfit(names, needed)
    assert reason is None if says is None else says in (reason or "")


# ---- what is found ----


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **contents: Any) -> None:
    """A module of that dotted name, and packages on the way to it."""
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        name = ".".join(parts[:i])
        made = ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        made.__path__ = []
        monkeypatch.setitem(sys.modules, name, made)
    for key, value in contents.items():
        setattr(sys.modules[module], key, value)


def test_another_package_of_the_name_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "apex.pyramid")
    missing = probe.find("apex", (apex.RMS_NORM,), how="get the real one").missing
    assert missing is not None
    assert "a package `apex` is installed but apex.normalization.fused_layer_norm.fused_rms_norm_affine" in missing
    assert missing.endswith("get the real one")


def test_a_library_for_another_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name == "flash_attn_func":
                raise ImportError("undefined symbol: _ZN3c104cuda9SetDeviceEi")
            raise AttributeError(name)

    stand_in(monkeypatch, "flash_attn.flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", Broken("flash_attn.flash_attn_interface"))
    missing = probe.find("flash_attn", (flash_attn.DENSE,), how="reinstall it").missing
    assert missing is not None
    assert "undefined symbol" in missing


def test_apex_without_its_extension_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    function = lambda input, weight, normalized_shape, eps=1e-6, memory_efficient=False: input  # noqa: E731
    stand_in(monkeypatch, "apex.normalization.fused_layer_norm", fused_rms_norm_affine=function)
    missing = apex._find().missing
    assert missing is not None
    assert "apex is installed without its extension fused_layer_norm_cuda" in missing
    stand_in(monkeypatch, "fused_layer_norm_cuda")
    assert apex._find().missing is None


# ---- what is refused ----


def tensor(*shape: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, requires_grad: bool = False) -> Any:
    """What the checks look at, on a device that is not here."""
    return SimpleNamespace(shape=shape, device=torch.device(device), dtype=dtype, requires_grad=requires_grad)


@pytest.mark.parametrize(
    ("q", "return_lse", "says"),
    [
        (tensor(1, 4, 2, 64), False, None),
        (tensor(1, 4, 2, 64), True, None),
        (tensor(1, 4, 2, 64, device="cpu"), False, "flash-attn is for cuda, the tensors are on cpu"),
        (tensor(1, 4, 2, 64, dtype=torch.float32), False, "takes fp16 and bf16, not torch.float32"),
        (tensor(1, 4, 2, 320), False, "head_dim=320"),
        (tensor(1, 4, 2, 60), False, "head_dim=60"),
        (tensor(1, 4, 2, 64, requires_grad=True), True, "no gradient of the log-sum-exp"),
    ],
)
def test_flash_attn_refuses_what_it_cannot_do(
    monkeypatch: pytest.MonkeyPatch, q: Any, return_lse: bool, says: str | None
) -> None:
    monkeypatch.setattr(flash_attn.PACKAGE, "_found", probe.Found({}, None))
    reason = flash_attn.unsupported(q, q, q, return_lse=return_lse)
    assert reason is None if says is None else says in (reason or "")


def test_norms_refuse_what_they_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apex.PACKAGE, "_found", probe.Found({}, None))
    monkeypatch.setattr(liger.PACKAGE, "_found", probe.Found({}, None))
    x, w = tensor(2, 8), tensor(8)
    assert apex.unsupported(x, w, None) is None
    assert apex.unsupported(x, w, x) == "apex has no fused residual addition"
    assert (
        apex.unsupported(x, tensor(8, dtype=torch.float32), None) == "apex would give torch.float32, the weight's type"
    )
    assert apex.unsupported(tensor(2, 8, device="cpu"), w, None) == "apex is for cuda, the tensors are on cpu"
    assert liger.unsupported(x) is None
    assert liger.unsupported(tensor(2, 8, device="cpu")) == "Liger is for cuda, the tensors are on cpu"
    assert liger.unsupported(tensor(2, 8, dtype=torch.float64)) == "Liger computes in fp32"
    assert "Liger takes at most 65536" in str(liger.unsupported(tensor(2, 70000)))


def test_a_named_adapter_that_is_not_there_says_how_to_get_it() -> None:
    if flash_attn.PACKAGE.missing() is None:
        pytest.skip("flash-attn is installed")
    q = torch.ones(1, 4, 2, 16)
    with pytest.raises(K.UnsupportedKernel, match=r"attention\[flash_attn\]: flash_attn is not installed: pip install"):
        K.attention(q, q, q, impl="flash_attn")


# ---- the mapping ----


def allow(monkeypatch: pytest.MonkeyPatch, operator: str, name: str) -> None:
    """Let the implementation run on a CPU, where the stand-in is."""
    implementation = _dispatch._REGISTRY[operator][name]._replace(supports=lambda *args, **kwargs: None)
    monkeypatch.setitem(_dispatch._REGISTRY[operator], name, implementation)


def flash_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, window: tuple[int, int], softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """flash-attn 2's published conventions for q (S,H,D), k, v (Sk,G,D), a query at a time: causal and window aligned
    bottom-right, −1 unbounded, 0.0 no softcap, +inf the log-sum-exp of a row without keys. lse (H,S)."""
    (sq, heads, _), sk = q.shape, k.shape[0]
    out, lse = torch.zeros_like(q), torch.full((heads, sq), torch.inf, dtype=q.dtype)
    for i in range(sq):
        at = i + sk - sq
        low = 0 if window[0] < 0 else max(0, at - window[0])
        high = sk if window[1] < 0 else min(sk, at + window[1] + 1)
        high = min(high, at + 1) if causal else high
        for h in range(heads if high > low else 0):
            g = h // (heads // k.shape[1])
            scores = k[low:high, g] @ q[i, h] * scale
            scores = scores if softcap == 0.0 else softcap * torch.tanh(scores / softcap)
            lse[h, i] = scores.logsumexp(0)
            out[i, h] = scores.softmax(0) @ v[low:high, g]
    return out, lse


@pytest.fixture
def flash_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_func(
        q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
        deterministic: bool = False, return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        assert softmax_scale is not None
        parts = [flash_one(*one, softmax_scale, causal, window_size, softcap) for one in zip(q, k, v, strict=True)]
        out, lse = (torch.stack(p) for p in zip(*parts, strict=True))
        return (out, lse, None) if return_attn_probs else out

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
        dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
        deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
    ) -> Any:  # fmt: skip
        assert softmax_scale is not None
        assert isinstance(max_seqlen_q, int)
        assert isinstance(max_seqlen_k, int)
        assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
        assert max_seqlen_k >= int(cu_seqlens_k.diff().max())
        lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        documents = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
        parts = [flash_one(*one, softmax_scale, causal, window_size, softcap) for one in documents]
        out, lse = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts], 1)
        return (out, lse, None) if return_attn_probs else out

    functions: dict[str, Callable[..., Any]] = {
        "flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func,
    }  # fmt: skip
    stand_in(monkeypatch, "flash_attn.flash_attn_interface", **functions)
    found = probe.find("flash_attn", (flash_attn.DENSE, flash_attn.PACKED), how="")
    assert found.missing is None
    monkeypatch.setattr(flash_attn.PACKAGE, "_found", found)
    allow(monkeypatch, "attention", "flash_attn")


CASES: list[dict[str, Any]] = [
    {}, {"causal": False}, {"window": 3}, {"window": (2, 1), "causal": False}, {"window": (2, 1)}, {"softcap": 1.5},
    {"scale": 0.3}, {"window": (None, 2), "causal": False}, {"window": (3, None), "causal": False}, {"window": 0},
]  # fmt: skip


@pytest.mark.usefixtures("flash_stand_in")
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("lengths", [(7, 7), (5, 9), (9, 5)], ids=str)
def test_flash_attn_is_called_so_that_it_means_the_same(options: dict[str, Any], lengths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, lengths[0], 4, 8), torch.randn(2, lengths[1], 2, 8), torch.randn(2, lengths[1], 2, 8)
    q, k, v = q.double(), k.double(), v.double()
    with torch.no_grad():
        out, lse = K.attention(q, k, v, return_lse=True, impl="flash_attn", **options)
        truth, truth_lse = K.attention(q, k, v, return_lse=True, impl="reference", **options)
    assert error(out, truth) <= 1e-12
    assert torch.equal(lse.isinf(), truth_lse.isinf())
    assert torch.equal(lse[lse.isinf()], truth_lse[lse.isinf()])  # −inf, not flash-attn's +inf
    assert torch.allclose(lse, truth_lse, rtol=1e-12)
    assert error(out, plain_attention(q, k, v, **options)[0]) <= 1e-12
    q.requires_grad_()  # an output alone may be differentiated
    assert error(K.attention(q, k, v, impl="flash_attn", **options), truth) <= 1e-12


@pytest.mark.usefixtures("flash_stand_in")
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("own_keys", [False, True])
@pytest.mark.parametrize("longest", [None, 6])
def test_flash_attn_gets_documents_so_that_they_mean_the_same(
    options: dict[str, Any], own_keys: bool, longest: int | None
) -> None:
    torch.manual_seed(0)
    bounds = {"cu_seqlens": torch.tensor([0, 1, 1, 7, 12], dtype=torch.int32), "max_seqlen": longest}
    if own_keys:
        bounds["cu_seqlens_k"] = torch.tensor([0, 3, 4, 8, 9], dtype=torch.int32)
    tokens = 9 if own_keys else 12
    q, k, v = (torch.randn(n, h, 8).double() for n, h in ((12, 4), (tokens, 2), (tokens, 2)))
    out, lse = K.attention(q, k, v, return_lse=True, impl="flash_attn", **bounds, **options)
    truth, truth_lse = K.attention(q, k, v, return_lse=True, impl="reference", **bounds, **options)
    assert error(out, truth) <= 1e-12
    assert torch.allclose(lse, truth_lse, rtol=1e-12)


def test_apex_is_called_so_that_it_means_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused_rms_norm_affine(
        input: torch.Tensor,
        weight: torch.Tensor,
        normalized_shape: Any,
        eps: float = 1e-6,
        memory_efficient: bool = False,
    ) -> torch.Tensor:
        assert tuple(normalized_shape) == input.shape[-1:]
        return torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)

    stand_in(monkeypatch, "apex.normalization.fused_layer_norm", fused_rms_norm_affine=fused_rms_norm_affine)
    stand_in(monkeypatch, "fused_layer_norm_cuda")
    monkeypatch.setattr(apex.PACKAGE, "_found", apex._find())
    allow(monkeypatch, "rms_norm", "apex")
    x, w = torch.randn(3, 5, 8).double(), torch.randn(8).double()
    assert error(K.rms_norm(x, w, eps=1e-2, impl="apex"), K.rms_norm(x, w, eps=1e-2, impl="reference")) <= 1e-12


def test_liger_is_called_so_that_it_means_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class LigerRMSNormFunction(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, X: Any, W: Any, eps: float, offset: float = 0.0, casting_mode: str = "llama",
            in_place: bool = True, row_mode: Any = None,
        ) -> Any:  # fmt: skip
            assert (offset, casting_mode, in_place) == (0.0, "gemma", False)
            return plain_norm_with(X, W, eps)

    class LigerFusedAddRMSNormFunction(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, X: Any, R: Any, W: Any, eps: float, offset: float = 0.0, casting_mode: str = "llama",
            in_place: bool = False,
        ) -> Any:  # fmt: skip
            assert (offset, casting_mode, in_place) == (0.0, "gemma", False)
            return plain_norm_with(X + R, W, eps), X + R

    def plain_norm_with(t: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        return t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + eps) * w

    stand_in(monkeypatch, "liger_kernel.ops.rms_norm", LigerRMSNormFunction=LigerRMSNormFunction)
    stand_in(
        monkeypatch, "liger_kernel.ops.fused_add_rms_norm", LigerFusedAddRMSNormFunction=LigerFusedAddRMSNormFunction
    )
    found = probe.find("liger_kernel", (liger.RMS_NORM, liger.ADD_RMS_NORM), how="")
    assert found.missing is None
    monkeypatch.setattr(liger.PACKAGE, "_found", found)
    allow(monkeypatch, "rms_norm", "liger")
    x, w, r = torch.randn(3, 8).double(), torch.randn(8).double(), torch.randn(3, 8).double()
    assert error(K.rms_norm(x, w, eps=1e-5, impl="liger"), plain_norm(x, w)) <= 1e-12
    found, truth = K.rms_norm(x, w, eps=1e-5, residual=r, impl="liger"), plain_norm(x, w, r)
    assert all(error(a, b) <= 1e-12 for a, b in zip(found, truth, strict=True))
