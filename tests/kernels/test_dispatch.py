"""Choice of implementation: by argument, context, environment, and what is said about it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opencoder import kernels as K
from opencoder.kernels import _dispatch
from opencoder.kernels._library import CPP_MISSING

pytestmark = pytest.mark.fast
BEST = "torch" if CPP_MISSING else "cpp"  # what `auto` runs for plain attention here
X, W = torch.ones(2, 8), torch.ones(8)
Q = torch.ones(1, 4, 2, 8)


def runs(text: str) -> str:
    (line,) = [line for line in text.splitlines() if "<- runs" in line]
    return line.split(":")[0].strip()


def test_contexts_nest_and_end() -> None:
    usual = runs(K.explain("attention", Q, Q, Q))
    with K.use(attention="reference"):
        assert runs(K.explain("attention", Q, Q, Q)) == "reference"
        with K.use(attention="torch", rms_norm="reference"):
            assert runs(K.explain("attention", Q, Q, Q)) == "torch"
            assert runs(K.explain("rms_norm", X, W, eps=1e-5)) == "reference"
        assert runs(K.explain("attention", Q, Q, Q)) == "reference"
    assert runs(K.explain("attention", Q, Q, Q)) == usual == BEST


def test_a_context_ends_with_an_error_and_auto_undoes_an_outer_one() -> None:
    with pytest.raises(RuntimeError), K.use(attention="reference"):
        raise RuntimeError
    assert runs(K.explain("attention", Q, Q, Q)) == BEST
    with K.use(attention="reference"), K.use(attention="auto"):
        assert runs(K.explain("attention", Q, Q, Q)) == BEST
        assert f" attention={BEST} " in K.chosen()


def test_the_choice_is_what_runs() -> None:
    # SDPA cannot serve a window, so that a choice of it is visible as a refusal.
    with K.use(attention="torch"), pytest.raises(K.UnsupportedKernel, match=r"implementations that can: .*reference"):
        K.attention(Q, Q, Q, window=2)
    with K.use(attention="torch"):
        K.attention(Q, Q, Q, window=2, impl="reference")  # the argument wins


def test_explain_gives_a_reason_for_each() -> None:
    text = K.explain("attention", Q, Q, Q, window=2)
    assert "torch: SDPA has no sliding window" in text
    assert runs(text) == ("reference" if CPP_MISSING else "cpp")


def test_unknown_names_are_refused_with_the_near_one() -> None:
    with pytest.raises(K.UnsupportedKernel, match="did you mean `rms_norm`"), K.use(rmsnorm="cpp"):
        pass
    with pytest.raises(
        K.UnsupportedKernel,
        match=r"attention has no implementation `flash`; it has \['auto', 'cpp', .*'reference', 'torch'",
    ):
        K.attention(Q, Q, Q, impl="flash")
    with pytest.raises(K.UnsupportedKernel, match="explain: attention has no implementation `flash`"):
        K.explain("attention", Q, Q, Q, impl="flash")
    with pytest.raises(K.UnsupportedKernel, match="no operator `softmax`"):
        K.explain("softmax", X)


def environment(value: str, code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OPENCODER_KERNELS": value}
    program = f"import torch\nfrom opencoder import kernels as K\n{code}"
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)


def test_environment_chooses_and_the_context_wins() -> None:
    done = environment("attention=reference", "print(K.chosen())\nwith K.use(attention='torch'): print(K.chosen())")
    first, second = done.stdout.splitlines()
    assert "attention=reference" in first
    assert "attention=torch" in second
    everywhere = environment("reference", "print(K.chosen())").stdout
    assert everywhere.count("=reference") == everywhere.count("=")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("atention=torch", "OPENCODER_KERNELS=atention=torch: no operator `atention` (did you mean `attention`?)"),
        ("flash", "OPENCODER_KERNELS=flash: no operator has an implementation `flash`"),
        ("swiglu=torch", "swiglu has no implementation `torch`; it has ['auto', 'cpp', "),
    ],
)
def test_a_wrong_environment_is_refused(monkeypatch: pytest.MonkeyPatch, value: str, says: str) -> None:
    monkeypatch.setenv("OPENCODER_KERNELS", value)
    with pytest.raises(K.UnsupportedKernel) as caught:
        K.swiglu(torch.ones(1), torch.ones(1))
    assert says in str(caught.value)


def test_an_empty_environment_chooses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = K.chosen()
    monkeypatch.setenv("OPENCODER_KERNELS", " , ")
    assert K.chosen() == usual


def test_a_named_kernel_for_another_device_says_why() -> None:
    with pytest.raises(K.UnsupportedKernel, match=r"rms_norm\[triton\]: .*implementations that can: "):
        K.rms_norm(X, W, eps=1e-5, impl="triton")


def test_chosen_names_every_operator_once() -> None:
    line = K.chosen()
    assert "\n" not in line
    for operator in ("rms_norm", "rotary", "swiglu", "attention", "cross_entropy", "ce_stats", "ce_grad"):
        assert line.count(f" {operator}=") == 1


def test_chosen_leaves_out_what_is_not_installed() -> None:
    """The line goes into run records: it must not name an implementation that cannot run."""
    code = "from opencoder import kernels as K\nprint(K.chosen())"
    env = {**os.environ, "OPENCODER_NO_EXT": "1"}
    env.pop("OPENCODER_KERNELS", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert " rms_norm=reference " in done.stdout


CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("architecture", "options", "first"),
    [
        ("sm_90", {}, ("torch", "flash_attn", "triton")),
        ("sm_80", {}, ("flash_attn", "torch", "triton")),
        ("sm_90", {"cu_seqlens": torch.tensor([0, 4])}, ("flash_attn", "triton", "torch")),
        ("sm_80", {"cu_seqlens": torch.tensor([0, 4])}, ("flash_attn", "triton", "torch")),
    ],
)
def test_the_order_depends_on_architecture_and_kind_of_call(
    monkeypatch: pytest.MonkeyPatch, architecture: str, options: dict[str, torch.Tensor], first: tuple[str, ...]
) -> None:
    monkeypatch.setattr(_dispatch, "_architecture", lambda device: architecture)
    assert _dispatch.order_of("attention", CUDA, Q, Q, Q, **options)[:3] == first


def test_every_order_ends_with_the_reference_and_names_what_is_registered() -> None:
    for operator, orders in _dispatch.ORDER.items():
        assert {"cpu", "cuda"} <= set(orders)
        for names in orders.values():
            assert names[-1] == "reference"
            assert set(names) <= set(_dispatch._REGISTRY[operator])


def test_a_device_without_a_list_runs_the_reference() -> None:
    assert _dispatch.order_of("swiglu", torch.device("meta"), X, X) == ("reference",)


def test_the_documented_table_is_the_registry() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    table = docs.split("## Implementations")[1].split("\n- ")[0]
    rows = {cells[0].strip(" `"): cells for line in table.splitlines() if len(cells := line.strip("|").split("|")) == 8}
    for operator, implementations in _dispatch._REGISTRY.items():
        _, reference, cpp, triton, torch_, others, cpu, gpu = (cell.strip() for cell in rows[operator])
        own = {"reference": reference, "cpp": cpp, "triton": triton, "torch": torch_}
        named = {name for name, cell in own.items() if cell} | {n.strip(" `") for n in others.split(",") if n}
        assert named == set(implementations), operator
        assert cpu == ", ".join(_dispatch.ORDER[operator]["cpu"]), operator
        assert gpu.split(";")[0] == ", ".join(_dispatch.ORDER[operator]["cuda"]), operator
