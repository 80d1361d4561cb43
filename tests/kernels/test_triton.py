"""The Triton kernels in Triton's interpreter: the whole matrix and the registration tests, in a process of their own, as
TRITON_INTERPRET must be set before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
HERE = Path(__file__).parent


@pytest.mark.parametrize("file", ["test_matrix.py", "test_registration.py"])
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
def test_in_the_interpreter(file: str) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OPENCODER_TEST_DEVICE": "cpu"}
    argv = [sys.executable, "-m", "pytest", str(HERE / file), "-x", "-p", "no:cacheprovider", "-m", "not slow"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
