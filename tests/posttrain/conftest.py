"""A small tokenizer with the chat template."""

from __future__ import annotations

from pathlib import Path

import pytest

from opencoder.data import tokenizer as tok


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "tokenizer"
    texts = ["def add(a, b):\n    return a + b\n\n\nWrite a function.\nuser assistant system, please\n" * 50]
    tok.save(tok.train(texts, vocab_size=400), folder)
    return folder
