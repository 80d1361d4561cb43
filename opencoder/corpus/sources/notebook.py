"""Jupyter notebooks as text of markdown, code and result cells.

RefineCode reads notebooks in "a structured form" whose template is not published. Ours is Markdown, which needs no
special tokens and says the language of each cell: a markdown cell stands as it is, a code cell in a fence with the
kernel's language, its results in a fence named `output`. A fence is longer than any run of backticks inside it, so the
cells can be found again. Formats: nbformat 3 and 4 (https://nbformat.readthedocs.io)."""

from __future__ import annotations

import json
import re
from typing import Any

_FENCE = re.compile(r"`+")
_ESCAPES = re.compile(r"\x1b\[[0-9;]{0,32}[A-Za-z]")
"""Colours in tracebacks."""
CUT = "\n[output cut]"


class NotebookError(ValueError):
    """A file that is not a notebook, with the reason."""


def to_text(data: bytes, *, max_output_chars: int) -> str:
    """The cells of a notebook, separated by blank lines, '' if all are empty. Raises NotebookError.

    Of results, streams, text/plain forms and the name and value of errors are kept, `max_output_chars` per cell; images,
    HTML and widgets are left out, and so are raw cells and attachments."""
    try:
        tree = json.loads(data)
    except RecursionError:
        raise NotebookError("the JSON is nested too deeply") from None
    except ValueError as error:
        raise NotebookError(f"not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise NotebookError(f"a JSON {type(tree).__name__} at the top, not an object")
    language = _language(tree)
    parts: list[str] = []
    for number, cell in enumerate(_cells(tree)):
        if not isinstance(cell, dict):
            raise NotebookError(f"cell {number} is a {type(cell).__name__}, not an object")
        parts += _cell(cell, number, language, max_output_chars)
    return "\n\n".join(parts) + "\n" if parts else ""


def _cells(tree: dict[str, Any]) -> list[Any]:
    cells = tree.get("cells")
    if cells is None and isinstance(tree.get("worksheets"), list):  # nbformat 3
        sheets = [sheet.get("cells") for sheet in tree["worksheets"] if isinstance(sheet, dict)]
        cells = [cell for sheet in sheets if isinstance(sheet, list) for cell in sheet]
    if not isinstance(cells, list):
        raise NotebookError("no list `cells` (nbformat 4) or `worksheets` (nbformat 3)")
    return cells


def _language(tree: dict[str, Any]) -> str:
    metadata = tree.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    for key, name in (("language_info", "name"), ("kernelspec", "language")):
        branch = metadata.get(key)
        found = branch.get(name) if isinstance(branch, dict) else None
        if isinstance(found, str) and re.fullmatch(r"[\w+#.-]{1,40}", found):
            return found.lower()
    return "python"  # the default of notebooks without kernel metadata


def _cell(cell: dict[str, Any], number: int, language: str, limit: int) -> list[str]:
    kind = cell.get("cell_type")
    source = _joined(cell.get("source", cell.get("input", "")), f"cell {number}").strip("\n")
    if kind == "heading" and source:  # nbformat 3
        level = cell.get("level")
        return ["#" * (level if isinstance(level, int) and 1 <= level <= 6 else 1) + " " + source]
    if kind in ("markdown", "html"):
        return [source] if source.strip() else []
    if kind == "raw":
        return []
    if kind != "code":
        raise NotebookError(f"cell {number} is of type {kind!r}, not code, markdown or raw")
    own = cell.get("language")
    parts = [_fenced(source, own if isinstance(own, str) and own.isalnum() else language)] if source.strip() else []
    outputs = cell.get("outputs", [])
    if not isinstance(outputs, list):
        raise NotebookError(f"cell {number}: `outputs` is a {type(outputs).__name__}, not a list")
    result = "".join(_output(output, number) for output in outputs) if limit else ""
    result = _ESCAPES.sub("", result).strip("\n")
    if len(result) > limit:
        result = result[:limit] + CUT
    return [*parts, _fenced(result, "output")] if result.strip() else parts


def _output(output: Any, number: int) -> str:
    """The text of one result, ending in a newline; '' for what has none."""
    where = f"a result of cell {number}"
    if not isinstance(output, dict):
        raise NotebookError(f"{where} is a {type(output).__name__}, not an object")
    kind = output.get("output_type")
    if kind == "stream":
        return _joined(output.get("text", ""), where)
    if kind in ("error", "pyerr"):
        return f"{output.get('ename', 'Error')}: {output.get('evalue', '')}\n"
    data = output.get("data", output)  # nbformat 3 has the forms beside output_type
    plain = data.get("text/plain", data.get("text", "")) if isinstance(data, dict) else ""
    text = _joined(plain, where)
    return text if not text or text.endswith("\n") else text + "\n"


def _joined(source: Any, where: str) -> str:
    """Notebooks hold text as a string or as a list of lines."""
    if isinstance(source, list) and all(isinstance(line, str) for line in source):
        source = "".join(source)
    if not isinstance(source, str):
        raise NotebookError(f"the text of {where} is a {type(source).__name__}, not a string or a list of lines")
    try:
        source.encode()
    except UnicodeEncodeError:
        raise NotebookError(f"the text of {where} holds half of a surrogate pair") from None
    return source


def _fenced(text: str, name: str) -> str:
    longest = max((len(run) for run in _FENCE.findall(text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{name}\n{text}\n{fence}"
