"""Text of strangers on a page: what cannot be seen is named, and where two texts differ is marked."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import NamedTuple

import regex
from markupsafe import Markup, escape

# Controls, format characters (bidirectional overrides, zero width), line and paragraph separators, lone surrogates: they
# vanish, move what stands beside them, or end the page for some readers.
_UNSEEN = regex.compile(r"[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]")
_TOKENS = regex.compile(r"\w+|\s+|[^\w\s]")
_LINES = regex.compile(r"[^\n]*\n|[^\n]+")
_CONTROLS = (
    "NUL", "SOH", "STX", "ETX", "EOT", "ENQ", "ACK", "BEL", "BS", "HT", "LF", "VT", "FF", "CR", "SO", "SI", "DLE", "DC1",
    "DC2", "DC3", "DC4", "NAK", "SYN", "ETB", "CAN", "EM", "SUB", "ESC", "FS", "GS", "RS", "US",
)  # fmt: skip
"""Names of U+0000 to U+001F. Not the pictures ␀ to ␟: few fixed-width fonts have them."""
MIN_RATIO = 0.5
"""Blocks of lines less similar than this are marked whole: common brackets in unlike text say nothing."""


def visible(text: str, *, lines: bool = False) -> Markup:
    """HTML of a text in which every character is seen: a control by its name (NUL), others as U+202E. With `lines`, line
    feeds and tabs stay what they are; without, a name may be broken after _ and /."""
    parts, begin = [], 0
    for found in _UNSEEN.finditer(text):
        if lines and found[0] in "\n\t":
            continue
        parts += [_plain(text[begin : found.start()], lines), _named(found[0])]
        begin = found.end()
    return Markup("").join([*parts, _plain(text[begin:], lines)])


def _plain(text: str, lines: bool) -> Markup:
    html = escape(text)
    return html if lines else html.replace("_", Markup("_<wbr>")).replace("/", Markup("/<wbr>"))


def _named(character: str) -> Markup:
    code = ord(character)
    name = _CONTROLS[code] if code < len(_CONTROLS) else f"U+{code:04X}"
    return Markup('<span class="unseen" title="U+{:04X}">{}</span>').format(code, name)


class Piece(NamedTuple):
    """A stretch of two texts, one of which may be empty there."""

    same: bool
    left: str
    right: str


class Pair(NamedTuple):
    """Two texts as HTML in which differences are marked."""

    left: Markup
    right: Markup
    differences: int


def marked_pair(left: str, right: str, *, cut: int | None = None) -> Pair:
    """Compare by lines, and lines that changed by words. Two texts of `cut` characters go on after it: what only one of them
    still shows at the end is no difference."""
    pieces = list(_compared(_LINES.findall(left), _LINES.findall(right)))
    last = pieces[-1] if pieces else None
    if last and cut is not None and len(left) >= cut and len(right) >= cut:
        short, long = sorted((last.left, last.right), key=len)
        if long.startswith(short):
            pieces[-1] = Piece(True, last.left, last.right)
    fine = [small for piece in pieces for small in ([piece] if piece.same else _words(piece))]
    return Pair(
        Markup("").join(_marked(piece.left, piece.same) for piece in fine),
        Markup("").join(_marked(piece.right, piece.same) for piece in fine),
        sum(not piece.same for piece in fine),
    )


def _marked(text: str, same: bool) -> Markup:
    shown = visible(text, lines=True)
    return shown if same or not text else Markup("<mark>{}</mark>").format(shown)


def _words(piece: Piece) -> list[Piece]:
    left, right = _TOKENS.findall(piece.left), _TOKENS.findall(piece.right)
    pieces = list(_compared(left, right))
    shared = sum(len(small.left) for small in pieces if small.same)
    return pieces if 2 * shared >= MIN_RATIO * (len(piece.left) + len(piece.right)) else [piece]


def _compared(left: list[str], right: list[str]) -> Iterator[Piece]:
    for tag, a, b, c, d in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        yield Piece(tag == "equal", "".join(left[a:b]), "".join(right[c:d]))
