"""Fixtures of all tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def same_default_dtype() -> Iterator[None]:
    """Work meant for ranks sets torch's default dtype; run in the process of the tests it must not outlive its test."""
    before = sys.modules["torch"].get_default_dtype() if "torch" in sys.modules else None
    yield
    if "torch" in sys.modules:
        import torch

        torch.set_default_dtype(before or torch.float32)
