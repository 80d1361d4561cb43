"""Signals of single programming languages, under their published names.

Where the default mode differs from the published filter (compat mode), the module's docstring has a table. All regular
expressions of the published filter are hand-written scanners in csrc/text here: the same counts, in linear time."""

from __future__ import annotations

from ..document import Signal
from . import c_family, csharp, go, html, java, javascript, python

LANGUAGE_SIGNALS: dict[str, dict[str, Signal]] = {
    "python": python.SIGNALS,
    "c": c_family.C_SIGNALS,
    "cpp": c_family.CPP_SIGNALS,
    "csharp": csharp.SIGNALS,
    "go": go.SIGNALS,
    "html": html.SIGNALS,
    "java": java.SIGNALS,
    "javascript": javascript.SIGNALS,
}
"""Language → published name → function."""
