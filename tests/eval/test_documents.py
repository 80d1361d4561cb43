"""The commands in docs/evaluation.md exist with their options; those of the original tool's documents no longer did."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from opencoder.tools.evaluate import parser

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
COMMANDS = re.findall(r"^opencoder evaluate (.*)$", PAGE, re.MULTILINE)


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_documents_exist(command: str) -> None:
    parser().parse_args(shlex.split(command))


def test_every_test_named_on_the_page_exists() -> None:
    names = set(re.findall(r"`(test_\w+)`", PAGE))
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert names
    assert [name for name in sorted(names) if f"def {name}(" not in sources] == []


def test_every_option_named_on_the_page_exists() -> None:
    options = set(re.findall(r"`(--[\w-]+)", PAGE))
    known = set(parser().format_help().replace(",", " ").split())
    assert sorted(options - known) == []
