"""Loads the C++ text engine, or says once what is missing and how to get it."""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache
from types import ModuleType

log = logging.getLogger("opencoder")


@cache
def text_engine() -> ModuleType | None:
    """`opencoder._text` (csrc/text), or None where it was not built or OPENCODER_NO_EXT=1; callers then use numpy."""
    if os.environ.get("OPENCODER_NO_EXT") == "1":
        return None
    try:
        return importlib.import_module("opencoder._text")
    except ImportError as error:
        log.warning(
            "the C++ text engine is not available (%s): slower Python versions are used. To build it, install a C++20 "
            "compiler (Debian: apt-get install g++) and run `pip install --no-build-isolation -e .`",
            error,
        )
        return None
