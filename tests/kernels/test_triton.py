"""The Triton kernels in Triton's interpreter: the operators' tests in processes of their own, as TRITON_INTERPRET must be
set before triton is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opencoder.kernels._dispatch import _REGISTRY

pytest.importorskip("triton", reason="triton is not installed")
HERE = Path(__file__).parent
# file -> which of its tests: those with an implementation as a parameter, or all.
FILES = {
    "test_rms_norm.py": "triton",
    "test_elementwise.py": "triton",
    "test_cross_entropy.py": "triton",
    "test_linear_cross_entropy.py": "triton",
    "test_attention.py": "triton",
    "test_optimizer.py": "triton",
    "test_registration.py": "",
    "test_offsets.py": "",
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
def test_in_the_interpreter(file: str) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OPENCODER_TEST_DEVICE": "cpu"}
    argv = [sys.executable, "-m", "pytest", str(HERE / file), "-x", "-p", "no:cacheprovider", "-m", "not slow"]
    done = subprocess.run(
        [*argv, "-k", FILES[file]], env=env, capture_output=True, text=True, check=False, cwd=HERE.parents[1]
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_every_file_with_an_implementation_as_parameter_is_interpreted() -> None:
    operators = {
        f.name: set(re.findall(r'^@each\("(\w+)"', f.read_text(), re.MULTILINE)) for f in HERE.glob("test_*.py")
    }
    with_triton = {name for name, implementations in _REGISTRY.items() if "triton" in implementations}
    assert "rms_norm" in with_triton
    assert {file for file, names in operators.items() if names & with_triton} <= set(FILES)
