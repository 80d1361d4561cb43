"""Quality signals: numbers about one document under the names of the published filter (opc_data_filtering).

Each signal stands alone: one that fails is None with its error recorded, and the others are computed all the same; in
compat mode the later signals of its group are missing too, as in the published filter. Fractions are rounded to 8
decimals. What a signal means and when it drops a document stands in rules.yaml (docs/rules.md)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from . import general
from .document import Document, Signal, Value
from .languages import LANGUAGE_SIGNALS
from .natural_language import detect_natural_language

__all__ = [
    "LANGUAGE_SIGNALS",
    "Computed",
    "Document",
    "Signal",
    "Value",
    "compute_document",
    "groups",
    "make_document",
]

DECIMALS = 8


class Computed(NamedTuple):
    """The signals of one document."""

    values: dict[str, Value]
    """By published name; None where a signal has no value."""
    errors: dict[str, str]
    """Of the signals that failed, by published name."""


@cache
def groups(doc_type: str, language: str) -> tuple[Mapping[str, Signal], ...]:
    """The groups of signals of a document, published name → function: prose has one; code and data have the general one and,
    in some languages, their own. Raises KeyError for another doc type."""
    if doc_type == "text":
        return ({f"qsc_doc_{name}": function for name, function in general.TEXT.items()},)
    if doc_type not in ("code", "data"):
        raise KeyError(f"doc type {doc_type!r} has no signals; those with signals: code, data, text")
    own = LANGUAGE_SIGNALS.get(language, {})
    common = {f"qsc_code_{name}": function for name, function in general.CODE.items()}
    return (common, own) if own else (common,)


def make_document(
    text: str,
    *,
    size_bytes: int,
    doc_type: str,
    language: str = "unknown",
    path: str = "",
    natural_language: str | None = None,
    compat: bool = False,
) -> Document:
    """A Document of decoded text. Without `natural_language`, prose is looked at for Chinese and all else is English; compat
    mode takes everything for English."""
    # The published filter reads files in text mode: every kind of line end is one newline.
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    file_name = path.replace("\\", "/").rsplit("/", 1)[-1]
    stem, extension = os.path.splitext(file_name)
    if compat:
        natural_language = "en"
    elif natural_language is None:
        natural_language = detect_natural_language(text) if doc_type == "text" else "en"
    return Document(
        text,
        size_bytes,
        file_name=stem if compat else file_name,
        extension=extension[1:],
        language=language,
        doc_type=doc_type,
        natural_language=natural_language,
        compat=compat,
    )


def compute_document(document: Document) -> Computed:
    """All signals of a document."""
    result = Computed({}, {})
    for group in groups(document.doc_type, document.language):
        for name, function in group.items():
            try:
                value = function(document)
            except Exception as error:  # isolation is the contract: the error is recorded, the signal is None
                result.values[name], result.errors[name] = None, f"{type(error).__name__}: {error}"
                if document.compat:
                    break
                continue
            result.values[name] = round(value, DECIMALS) if isinstance(value, float) else value
    return result
