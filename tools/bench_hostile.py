"""Texts made to be slow, and how the time of everything that reads texts grows with their length: by 4 from a quarter of the text
to the whole where it is linear, by 16 where it is quadratic. One process, one thread, CPU time, the best of each.

The tables are those of the tests, which look at the results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from opencoder.console import Parser, ProgressBar, run
from opencoder.files import write_json

PARTS = 4
"""The growth is that from one part of the text to the whole."""


class Hostile(NamedTuple):
    """A text of any length: `before`, `piece` again and again, `after` as often, `end`."""

    piece: str
    before: str = ""
    after: str = ""
    end: str = ""

    def of(self, characters: int) -> str:
        """The text with about so many characters."""
        times = max(1, characters // len(self.piece + self.after))
        return self.before + self.piece * times + self.after * times + self.end

    @property
    def name(self) -> str:
        """How it begins and goes on."""
        return repr(self.before + self.piece + "…" + self.after + self.end)


def pieces(*texts: str) -> tuple[Hostile, ...]:
    """Texts of one piece each."""
    return tuple(map(Hostile, texts))


COUNTED = (
    *pieces("'", "\"'", "'''a", "(http://", "<", "='a'+", "= ", "'a' + ", "aa bb ", "0x", "assert", "a b c d e f g h i j ", ".", "ss"),
    Hostile("\\u", "\\u00e9" * 7),
    Hostile(" ", "AB", end="CD"),
)  # fmt: skip
"""For counts over characters, words, strings, code lines and prose."""
HEADERS = (
    *pieces("/*", "// copyright ", "//\n", "// (c) \n", "// vim:"),
    Hostile("-*-", "#!"),
    Hostile("copyright ", '"""'),
    Hostile(" ", "<!--"),
    Hostile("@", "// "),
    Hostile("(*", after="*)"),
    Hostile("\n * ", "/* copyright 2001 ", end="*/"),
)
"""For the search of leading comments; HEADER_LANGUAGES have their markers."""
HEADER_LANGUAGES = ("c", "python", "html", "ocaml", "unknown")
LICENCES = pieces("gnu public license ", "version ", "gpl v", "( ")
PRIVATE = (
    *pieces("a@", "a@b.", "1.2.3.4.", "1.1.1.1 ", "2001:", "password=", "pass", "token: ", "secret_", "://a:b",
            "-----BEGIN RSA PRIVATE KEY-----\n", "copyright (c) ", "author: ", "eyJ", " at x dot y", "authorization: bearer ",
            "curl -u a:", "(c)", "created by "),
    Hostile("x", "password='"),
    Hostile("a", "://"),
    Hostile("A", "-----BEGIN RSA PRIVATE KEY-----\n"),
    Hostile("Aa ", "author: "),
    Hostile("a", "eyJ"),
)  # fmt: skip
"""For the search of personal data and secrets."""
OPENINGS = pieces(
    '"', "'", "/*", "#", "`", "{", '"""', "\\", "\n", "<", "<!--", "`${", "/", "(", "[", "<?", "<?php ", "class A:", "<script>",
    'R"a(', '@"', "#if 0\n", 'f"{', "f\"{'", 'r#"', "=/[", "a:", "a ", "#include </*", "<![CDATA[", "<a b='", "<<A\n", "--[==[",
    "{-", "=begin\n", '"\\', '"$a[', "é",
)  # fmt: skip
"""For lexers; FAMILIES have a language for each kind of table."""
FAMILIES = (
    "c",
    "cpp",
    "python",
    "javascript",
    "html",
    "ruby",
    "perl",
    "shell",
    "rust",
    "php",
    "csharp",
    "lua",
    "haskell",
)
DECLARATIONS = pieces(
    "public ", "static ", "int ", "f(", ")", "(", "return ", "return\n", 'return "', "main(", "#include <", "class A:", "class ",
    "import ", "import (", "func ", "func (a b) ", "type a struct {", "int a, ", "int a = ", "= ", ";", "\n", " ", "\t\n", "a *",
    "using ", "throws a, ", "<", "<a ", "<a b='", "<!--", "<![CDATA[", "<?", "</", "&#", "&a", "é",
)  # fmt: skip
"""For what counts declarations, and the visible text of HTML."""
MIXED = (Hostile("x = {'password': 'qW9#zzLp', 'ip': '10.0.0.1'}  # a@b.org\n", "# Copyright (c) 2011 Ada Quill\n\n"),)
"""For the transform as a whole."""

Reader = Callable[[str], Any]


def counters() -> dict[str, Reader]:
    """Counts over any text."""
    from opencoder.corpus.signals import characters, code_text, prose, strings, words

    functions = (
        characters.count_characters, words.count_words, strings.count_strings, strings.count_encoded,
        strings.hex_word_characters, code_text.count_code_lines, prose.count_prose,
    )  # fmt: skip
    return {function.__name__: function for function in functions}


def lexers() -> dict[str, Reader]:
    """Every lexer of compat mode, and of the default mode one for each kind of table."""
    from opencoder.corpus import lexing

    compat = {f"{name}, compat": partial(lexing.split, language=name, compat=True) for name in sorted(lexing.RELEASED)}
    return {**compat, **{name: partial(lexing.split, language=name) for name in FAMILIES}}


def scanners() -> dict[str, Reader]:
    """What counts declarations in default mode, and the visible text of HTML."""
    from opencoder.corpus.signals.languages.html import _parser
    from opencoder.corpus.signals.languages.scanning import engine

    def scanner(name: str, *mode: bool) -> Reader:
        return lambda text: getattr(engine(), name)(text, *mode)

    found = {name: scanner(name, True) for name in ("scan_c", "scan_java", "scan_csharp", "scan_python")}
    return {**found, "scan_go": scanner("scan_go"), "visible characters": lambda text: _parser().length(text)}


def transforms() -> dict[str, tuple[Reader, Sequence[Hostile]]]:
    """The parts of the transform and the whole, each with its texts."""
    from opencoder.corpus.transform import transform
    from opencoder.corpus.transform.header import find_header
    from opencoder.corpus.transform.licence import licences_in
    from opencoder.corpus.transform.pii import find_pii
    from opencoder.corpus_config import TransformConfig

    whole = partial(transform, language="python", path="a.py", config=TransformConfig())
    headers = {f"find_header, {name}": (partial(find_header, language=name), HEADERS) for name in HEADER_LANGUAGES}
    return {
        **headers,
        "licences_in": (licences_in, LICENCES),
        "find_pii": (partial(find_pii, language="shell"), PRIVATE),
        "transform": (whole, MIXED),
    }


def subjects() -> dict[str, tuple[Reader, Sequence[Hostile]]]:
    """Name → function of a text, texts made to be slow for it."""
    from opencoder.native import text_engine

    found: dict[str, tuple[Reader, Sequence[Hostile]]] = {
        name: (function, COUNTED) for name, function in counters().items()
    }
    found |= transforms()
    if text_engine() is not None:
        found |= {name: (function, OPENINGS) for name, function in lexers().items()}
        found |= {name: (function, DECLARATIONS) for name, function in scanners().items()}
    return found


def seconds(function: Reader, text: str, rounds: int) -> float:
    """CPU time of one call, the best of `rounds`."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        function(text)
        best = min(best, time.process_time() - start)
    return best


def measure(characters: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each subject and text: name, text, millions_per_s (of characters), growth."""
    chosen = subjects()
    with ProgressBar("hostile texts", total=sum(len(texts) for _, texts in chosen.values()), unit="texts") as bar:
        for name, (function, texts) in chosen.items():
            for text in texts:
                part = seconds(function, text.of(characters // PARTS), rounds)
                whole = seconds(function, text.of(characters), rounds)
                rate = characters / 1e6 / max(whole, 1e-9)
                yield {"name": name, "text": text.name, "millions_per_s": rate, "growth": whole / max(part, 1e-9)}
                bar.advance()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print, for each subject, its slowest text."""
    parser = Parser(
        "bench-hostile", "Time against length for texts made to be slow; the slowest of each reader is shown."
    )
    parser.add_argument("--characters", type=int, default=200_000, help="length of the texts")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each; the best counts")
    parser.add_argument("--json", help="file for the numbers of all texts")
    args = parser.parse_args(argv)
    rows = list(measure(args.characters, args.rounds))
    for name in dict.fromkeys(row["name"] for row in rows):
        row = min((row for row in rows if row["name"] == name), key=lambda row: float(row["millions_per_s"]))
        print(f"{name:<24}{row['millions_per_s']:>9.2f} million/s   growth {row['growth']:>6.1f}   {row['text'][:60]}")
    if args.json:
        write_json(args.json, {"characters": args.characters, "rows": rows})
    return 0


if __name__ == "__main__":
    run(main)
