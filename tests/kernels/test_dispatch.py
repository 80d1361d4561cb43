"""Choice of implementation: by argument, context, environment, and what is said about it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from opencoder import kernels as K

pytestmark = pytest.mark.fast
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
    assert runs(K.explain("attention", Q, Q, Q)) == usual == "torch"


def test_explain_gives_a_reason_for_each() -> None:
    text = K.explain("attention", Q, Q, Q, window=2)
    assert "torch: SDPA has no sliding window" in text
    assert runs(text) == "reference"


def test_unknown_names_are_refused_with_the_near_one() -> None:
    with pytest.raises(K.UnsupportedKernel, match="did you mean `rms_norm`"), K.use(rmsnorm="cpp"):
        pass
    with pytest.raises(
        K.UnsupportedKernel, match=r"attention has no implementation `flash`; it has \['auto', 'reference', 'torch'\]"
    ):
        K.attention(Q, Q, Q, impl="flash")
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
    done = environment("atention=torch", "K.swiglu(torch.ones(1), torch.ones(1))")
    assert "OPENCODER_KERNELS=atention=torch: no operator `atention` (did you mean `attention`?)" in done.stderr


def test_a_named_kernel_for_another_device_says_why() -> None:
    with pytest.raises(K.UnsupportedKernel, match=r"rms_norm\[triton\]: .*implementations that can: "):
        K.rms_norm(X, W, eps=1e-5, impl="triton")


def test_chosen_names_every_operator_once() -> None:
    line = K.chosen()
    assert "\n" not in line
    for operator in ("rms_norm", "rotary", "swiglu", "attention", "cross_entropy", "ce_stats", "ce_grad"):
        assert line.count(f" {operator}=") == 1
