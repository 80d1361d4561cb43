"""Backends that turn texts into ids: HF `tokenizers`, or gigatoken where it is installed and gives the same ids."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opencoder.errors import UserError

from .tokenizer import LoadedTokenizer

log = logging.getLogger("opencoder")

Encoder = Callable[[list[str], Any], list[NDArray[Any]]]
"""texts, integer type → ids of each text."""

RENEW_AFTER_CHARACTERS = 2_000_000_000
"""gigatoken's cache of pieces only grows (its issue 36), so its object is made anew after this much text."""
PROBE = [
    "def main(argv: list[str]) -> int:\n    return sum(int(a) for a in argv[1:])\n",
    "x = 1234567 + 0x1F  # ünïcödé — 日本語\t\n\n\n  indented\r\nit's",
    "<|im_start|>user\nhello<|im_end|>\n",
    "",
]


def make_encoder(folder: str | Path, loaded: LoadedTokenizer, backend: str) -> Encoder:
    """`backend` is "tokenizers", "gigatoken", or "auto": gigatoken if it is there and agrees on PROBE, else tokenizers."""
    if backend == "tokenizers":
        return _hf_encoder(loaded)
    try:
        gigatoken = importlib.import_module("gigatoken")
    except ImportError:
        if backend == "gigatoken":
            raise UserError("--backend gigatoken needs the package: pip install 'opencoder[gigatoken]'") from None
        return _hf_encoder(loaded)
    encoder = _Gigatoken(gigatoken, Path(folder) / "tokenizer.json")
    expected, found = _hf_encoder(loaded)(PROBE, np.int64), encoder(PROBE, np.int64)
    if all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True)):
        return encoder
    if backend == "gigatoken":
        raise UserError(
            "--backend gigatoken gives other ids than HF tokenizers for this tokenizer: use --backend tokenizers"
        )
    log.warning("gigatoken gives other ids than HF tokenizers for this tokenizer; the latter is used")
    return _hf_encoder(loaded)


def _hf_encoder(loaded: LoadedTokenizer) -> Encoder:
    def encode(texts: list[str], dtype: Any) -> list[NDArray[Any]]:
        encoded = loaded.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, dtype) for e in encoded]

    return encode


class _Gigatoken:
    """An Encoder over gigatoken."""

    def __init__(self, module: Any, file: Path) -> None:
        self._module, self._file = module, file
        self._awkward = importlib.import_module("awkward")  # comes with gigatoken, whose results are its arrays
        self._renew()

    def _renew(self) -> None:
        self._tokenizer = self._module.Tokenizer(str(self._file))
        self._characters = 0

    def __call__(self, texts: list[str], dtype: Any) -> list[NDArray[Any]]:
        self._characters += sum(map(len, texts))
        if self._characters > RENEW_AFTER_CHARACTERS:
            self._renew()
        rows = self._tokenizer.encode_batch(texts, parallel=False)
        flat = self._awkward.to_numpy(self._awkward.flatten(rows)).astype(dtype)
        ends = np.cumsum(self._awkward.to_numpy(self._awkward.num(rows)))
        return np.split(flat, ends[:-1]) if texts else []
