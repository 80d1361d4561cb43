"""The C++ operators (csrc/ops), loaded with torch.ops.load_library, and the schemas of all registered operators."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger("opencoder")

LIBRARY = torch.library.Library("opencoder", "DEF")
LIBRARY.define("rms_norm_fwd(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)")
LIBRARY.define(
    "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor total, Tensor rstd)"
)
LIBRARY.define(
    "rms_norm_bwd(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dweight)"
)


@cache
def cpp_missing() -> str | None:
    """None once the C++ operators are loaded, else why they are not; said once in the log."""
    if os.environ.get("OPENCODER_NO_EXT") == "1":
        return "OPENCODER_NO_EXT=1"
    here = Path(__file__).resolve().parent.parent
    # In a clone this file lies in kernels/ beside opencoder/, in a wheel in opencoder/kernels/.
    found = [*here.glob("_ops*.so"), *(here / "opencoder").glob("_ops*.so")]
    reason = "the C++ operators were not built"
    if found:
        try:
            torch.ops.load_library(str(found[0]))
            return None
        except OSError as error:
            reason = f"{found[0].name} does not load: {error}"
    log.warning(
        "%s: reference implementations are used. To build them, install a C++20 compiler (Debian: apt-get install g++) "
        "and run `pip install --no-build-isolation -e .`",
        reason,
    )
    return reason
