"""Signals of HTML: how much of a page is visible text.

The text is that of BeautifulSoup over Python's html.parser, whose rules csrc/text/html_text.cpp follows, in both modes:
C parsers such as lexbor build the tree that HTML 5 prescribes and keep white space, and give other numbers. `cate_ast` is
false only for pages that html.parser refuses (an unknown marked section, `<![…`)."""

from __future__ import annotations

from functools import cache, lru_cache
from html.entities import html5
from typing import Any

from ..document import Document, Signal, Value
from .scanning import engine


@cache
def _parser() -> Any:
    # Names without their semicolon; where both forms exist they mean the same.
    return engine().HtmlText({name.removesuffix(";"): character for name, character in html5.items()})


@lru_cache(maxsize=1)
def visible_characters(text: str) -> int | None:
    """Characters of the visible text of a page; None if it cannot be parsed."""
    length: int | None = _parser().length(text)
    return length


def _text_share(d: Document) -> Value:
    length = visible_characters(d.text)
    return None if length is None or not d.text else length / len(d.text)


SIGNALS: dict[str, Signal] = {
    "qsc_codehtml_cate_ast": lambda d: visible_characters(d.text) is not None,
    "qsc_codehtml_frac_words_text": _text_share,
    "qsc_codehtml_num_chars_text": lambda d: visible_characters(d.text),
}
