"""Notebooks: the template, both formats, and broken ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opencoder.corpus.sources.notebook import NotebookError, to_text

from .reading import read

pytestmark = pytest.mark.fast


def cell(kind: str, source: Any, outputs: list[Any] | None = None) -> dict[str, Any]:
    return {"cell_type": kind, "source": source, "metadata": {}} | (
        {"outputs": outputs or []} if kind == "code" else {}
    )


def notebook(*cells: Any, **metadata: Any) -> bytes:
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": cells}).encode()


EXAMPLE = notebook(
    cell("markdown", ["# Title\n", "text"]),
    cell(
        "code",
        ["x = 1\n", "x"],
        [
            {"output_type": "stream", "name": "stdout", "text": ["one\n"]},
            {"output_type": "execute_result", "data": {"text/plain": ["1"], "image/png": "iVBORw0"}},
            {"output_type": "error", "ename": "ValueError", "evalue": "bad \x1b[31mred\x1b[0m", "traceback": ["..."]},
        ],
    ),
    cell("raw", "left out"),
    cell("code", "   \n"),
    cell("code", "y = 2"),
    language_info={"name": "python"},
)
TEXT = """# Title
text

```python
x = 1
x
```

```output
one
1
ValueError: bad red
```

```python
y = 2
```
"""


def test_template() -> None:
    assert to_text(EXAMPLE, max_output_chars=1000) == TEXT


def test_outputs_are_cut_and_may_be_left_out() -> None:
    assert "```output\none\n1\n[output cut]\n```" in to_text(EXAMPLE, max_output_chars=5)
    assert "output" not in to_text(EXAMPLE, max_output_chars=0)


def test_fences_are_longer_than_those_inside() -> None:
    text = to_text(notebook(cell("code", "s = '''\n```\n'''")), max_output_chars=10)
    assert text == "````python\ns = '''\n```\n'''\n````\n"


def test_the_kernel_names_the_fence() -> None:
    for metadata in ({"language_info": {"name": "R"}}, {"kernelspec": {"language": "r", "name": "ir"}}):
        assert to_text(notebook(cell("code", "x <- 1"), **metadata), max_output_chars=10).startswith("```r\n")
    evil = notebook(cell("code", "x"), language_info={"name": "a\n```"})
    assert to_text(evil, max_output_chars=10).startswith("```python\n")


def test_format_3() -> None:
    sheet = {
        "cells": [
            {"cell_type": "heading", "level": 2, "source": ["Part"]},
            {"cell_type": "code", "language": "python", "input": ["print 1"],
             "outputs": [{"output_type": "stream", "text": "1\n"}, {"output_type": "pyout", "text": ["2"]}]},
        ]
    }  # fmt: skip
    data = json.dumps({"nbformat": 3, "metadata": {}, "worksheets": [sheet]}).encode()
    assert to_text(data, max_output_chars=10) == "## Part\n\n```python\nprint 1\n```\n\n```output\n1\n2\n```\n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[1]", "a JSON list at the top"),
        (b"{}", "no list `cells`"),
        (b'{"cells": {}}', "no list `cells`"),
        (b'{"cells": [1]}', "cell 0 is a int"),
        (b'{"cells": [{"cell_type": "code", "source": 5}]}', "the text of cell 0 is a int"),
        (b'{"cells": [{"cell_type": "poem", "source": ""}]}', "cell 0 is of type 'poem'"),
        (b'{"cells": [{"cell_type": "code", "source": "", "outputs": 1}]}', "`outputs` is a int"),
        (b'{"cells": [{"cell_type": "code", "source": "", "outputs": [1]}]}', "a result of cell 0 is a int"),
        (b'{"cells": [{"cell_type": "code", "source": "\\ud800"}]}', "half of a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_notebook_is_failed_with_the_reason(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.ipynb").write_bytes(data)
    (record,) = read(tmp_path / "a.ipynb")
    assert record.status == "failed"
    assert reason in str(record.reason)


def test_the_record_keeps_the_hash_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.ipynb").write_bytes(EXAMPLE)
    (record,) = read(tmp_path / "a.ipynb")
    assert (record.status, record.text, record.id) == ("kept", TEXT, hashlib.sha256(EXAMPLE).hexdigest())
    assert (record.language, record.doc_type, record.size_bytes) == ("jupyter notebook", "code", len(EXAMPLE))
    (record,) = read(tmp_path / "a.ipynb", "read.notebooks.structured=false")
    assert record.reason == "excluded_type"
    (tmp_path / "a.ipynb").write_bytes(notebook())
    (record,) = read(tmp_path / "a.ipynb")
    assert (record.status, record.reason) == ("dropped", "empty")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["cells", "cell_type", "source", "outputs", "output_type", "data", "text", "metadata", "worksheets",
                         "language_info", "name", "text/plain", "input", "level"]),
        inner | st.sampled_from(["code", "markdown", "stream", "heading", "error"]), max_size=5),
    max_leaves=30,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(JSON)
def test_any_json_is_text_or_a_reason(tree: Any) -> None:
    with contextlib.suppress(NotebookError):
        to_text(json.dumps(tree).encode(), max_output_chars=20).encode()
