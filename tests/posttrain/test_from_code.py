"""Conversations out of real code: what is taken, what is not, and the same every time."""

from __future__ import annotations

import ast
import json
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from opencoder.errors import UserError
from opencoder.posttrain.conversations import Conversation, parse
from opencoder.posttrain.from_code import Limits, functions, is_held_out, make_sets, python_files
from opencoder.tools.make_sft import main

pytestmark = pytest.mark.fast

SOURCE = '''
import unittest

@cache
def area(width, height):
    """Return the area of a rectangle.

    Both sides are in metres.
    """
    # a comment stays
    product = width * height
    return product


class Shape:
    def scaled(self, by):
        """Give the shape times a factor of its own."""
        copy = Shape()
        copy.size = self.size * by
        return copy

    def odd(self, by):
        """Cannot be moved to the margin."""
# a comment at the margin
        copy = self.scaled(by)
        return copy

    def __repr__(self):
        """Say in words what this shape is."""
        text = "shape"
        text += "!"
        return text


class TestShape(unittest.TestCase):
    def helper(self):
        """Make a shape for the tests below here."""
        a = 1
        b = 2
        return a + b


def test_area():
    """The area of a rectangle is a product."""
    a = 1
    b = 2
    assert area(a, b) == 2


def without(a):
    b = a
    c = b
    return c


def short(a):
    """Too short."""
    b = a
    return b


def shown(a):
    """Adds one to its only argument.

    >>> shown(1)
    2
    """
    b = a + 1
    return b


def one_line(a):
    """Adds two to its only argument."""; return a + 2


def tiny(a):
    """Adds three to its only argument."""
    return a + 3
'''


def found(tmp_path: Path, text: str = SOURCE) -> tuple[list[str], Counter[str]]:
    counts: Counter[str] = Counter()
    (tmp_path / "m.py").write_text(text)
    return [f.name for f in functions("m.py", tmp_path / "m.py", Limits(), counts)], counts


def test_which_functions_are_taken(tmp_path: Path) -> None:
    names, counts = found(tmp_path)
    assert names == ["area", "scaled"]
    left_out = (
        "tests_and_special_methods",
        "without_docstring",
        "docstring_too_short",
        "with_doctest",
        "on_one_line",
        "too_few_or_many_lines",
        "not_parseable_alone",
    )
    assert [counts[reason] for reason in left_out] == [2, 1, 1, 1, 1, 1, 1]
    assert found(tmp_path, "def f(:\n")[1]["files_not_parseable"] == 1


def test_questions_and_answers(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(SOURCE)
    sets, _ = make_sets([tmp_path], Limits())
    part = ".held-out" if is_held_out("m.py") else ""
    write, *_ = sets["practical" + part]
    question, answer = (turn["content"] for turn in write["messages"])
    assert "Both sides are in metres." in question
    assert "@cache\ndef area(width, height):" in question
    code = answer.removeprefix("```python\n").removesuffix("\n```")
    assert (
        code
        == "@cache\ndef area(width, height):\n    # a comment stays\n    product = width * height\n    return product"
    )
    explain, complete, name = (row["messages"] for row in sets["broad" + part][:3])
    assert explain[1]["content"] == "Return the area of a rectangle."
    assert "Return the area" not in explain[0]["content"]
    begun, rest = (turn["content"].split("```python\n")[1].removesuffix("\n```") for turn in complete)
    assert f"{begun}\n{rest}" == code
    assert name[1]["content"] == "`area`"
    assert "area" not in name[0]["content"]


def test_tests_and_installed_packages_are_passed_over(tmp_path: Path) -> None:
    for name in ("a.py", "test/b.py", "tests.py", "c_test.py", "site-packages/d.py", "latest.py", "idle_test/e.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(SOURCE)
    assert [name for name, _ in python_files([tmp_path])] == ["a.py", "latest.py"]
    with pytest.raises(UserError, match="does not exist"):
        python_files([tmp_path / "absent"])
    (tmp_path / "x").mkdir()
    (tmp_path / "test").rename(tmp_path / "x" / "tests")
    with pytest.raises(UserError, match="no Python file"):
        python_files([tmp_path / "x"])


def test_sets_of_the_standard_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that the preprocessing takes, code that parses, no file on both sides, the same bytes twice."""
    source = Path(sysconfig.get_paths()["stdlib"]) / "email"
    for output in ("one", "two"):
        assert main(["--input", str(source), "--output", str(tmp_path / output)]) == 0
    sides = {}
    for name in ("broad", "practical", "broad.held-out", "practical.held-out"):
        one, two = ((tmp_path / output / f"{name}.jsonl").read_bytes() for output in ("one", "two"))
        assert one == two
        rows = [json.loads(line) for line in one.splitlines()]
        assert all(isinstance(parse(row, "x"), Conversation) for row in rows)
        sides[name] = {row["source"] for row in rows}
        if name.startswith("practical"):
            assert rows
            for row in rows:
                ast.parse(row["messages"][1]["content"].removeprefix("```python\n").removesuffix("\n```"))
    assert sides["practical"].isdisjoint(sides["broad.held-out"] | sides["practical.held-out"])
    assert "functions" in capsys.readouterr().out
