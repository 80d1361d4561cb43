"""Speed of telling comments from code, per language and mode, beside Pygments; of the scanners that count in code; and of the
parsers that some signals need. One process, one thread; the sides alternate and the best of each counts."""

from __future__ import annotations

import ast
import sysconfig
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from opencoder.console import Parser, run
from opencoder.files import write_json
from opencoder.tools.bench_signals import read_files

PYGMENTS_CHARACTERS = 300_000
"""Pygments gets the first files of a language up to this length."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = Parser("bench-lexing", "Speed of the lexers beside Pygments, of the scanners and of the parsers.")
    parser.add_argument("--input", nargs="+", help="folders or files; default: the standard library")
    parser.add_argument("--megabytes", type=float, default=20.0, help="text to use")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each; the best counts")
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args(argv)
    texts: dict[str, list[str]] = defaultdict(list)
    for file in read_files(args.input or [sysconfig.get_paths()["stdlib"]], args.megabytes):
        texts[file.language].append(file.text)
    rows = [row for language in sorted(texts) for row in measure(language, texts[language], args.rounds)]
    for row in rows:
        print(f"{row['language']:<16}{row['side']:<28}{row['megabytes']:>9.2f} MB{row['mb_per_s']:>9.1f} MB/s")
    if args.json:
        write_json(args.json, {"rows": rows})
    return 0


def sides(language: str) -> dict[str, Callable[[str], Any]]:
    """What is measured for a language: name → function of a text."""
    from opencoder.corpus import lexing
    from opencoder.corpus.signals.languages import html, javascript
    from opencoder.native import text_engine

    engine: Any = text_engine()
    found: dict[str, Callable[[str], Any]] = {"lexer": partial(lexing.split, language=language)}
    if language in lexing.RELEASED:
        found["lexer, compat"] = partial(lexing.split, language=language, compat=True)
    if lexing._pygments_lexer(language) is not None:
        found["Pygments"] = lambda text: sum(1 for _ in lexing._pygments_lexer(language).get_tokens(text))
    scanner = {"c": "scan_c", "cpp": "scan_c", "java": "scan_java", "csharp": "scan_csharp", "python": "scan_python"}
    if language in scanner:
        scan = getattr(engine, scanner[language])
        found["scanner"] = lambda text: scan(text, True)
    elif language == "go":
        found["scanner"] = engine.scan_go
    elif language == "html":
        found["visible text"] = html._parser().length
    if language == "python":
        found["ast.parse"] = parse_python
    elif language == "javascript":
        found["tree-sitter + query"] = javascript._tree_sitter_declarations
        found["esprima, compat"] = javascript._esprima_declarations
    return found


def parse_python(text: str) -> None:
    """ast.parse alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text)
        except (SyntaxError, ValueError):
            return  # the time of a refusal counts as well


def measure(language: str, texts: list[str], rounds: int) -> list[dict[str, Any]]:
    """Rows of one language: language, side, megabytes, mb_per_s of CPU time."""
    few: list[str] = []
    length = 0
    for text in texts:
        if few and length + len(text) > PYGMENTS_CHARACTERS:
            break
        few.append(text)
        length += len(text)
    slow = ("Pygments", "esprima, compat")
    best: dict[str, float] = {}
    functions = sides(language)
    for turn in range(rounds):
        for side, function in functions.items():
            if side in slow and turn > 0:
                continue  # seconds long: once
            start = time.process_time()
            for text in few if side in slow else texts:
                function(text)
            best[side] = min(best.get(side, float("inf")), time.process_time() - start)
    rows = []
    for side, seconds in best.items():
        megabytes = sum(len(t.encode("utf-8", "surrogatepass")) for t in (few if side in slow else texts)) / 1e6
        rows.append(
            {"language": language, "side": side, "megabytes": megabytes, "mb_per_s": megabytes / max(seconds, 1e-9)}
        )
    return rows


if __name__ == "__main__":
    run(main)
