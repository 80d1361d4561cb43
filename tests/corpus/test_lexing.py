"""Comments and code: cases with known answers for each family of languages, Pygments as the truth of compat mode, and texts
made to be slow."""

from __future__ import annotations

import random
from typing import Any

import pytest

from opencoder.corpus import lexing
from opencoder.corpus.language import tables
from opencoder.corpus.lexing import Split, comment_spans, leading_comment, split
from opencoder.native import text_engine
from opencoder.tools.bench_hostile import OPENINGS, lexers

from . import oracle_files
from .hostile import grows_evenly

pytestmark = pytest.mark.skipif(text_engine() is None, reason="needs the text engine")


def comments(text: str, language: str) -> list[str]:
    return [text[span.begin : span.end] for span in comment_spans(text, language)]


# (language, text, comments)
CASES: list[tuple[str, str, list[str]]] = [
    (
        "c",
        'int a; // one\nchar *s = "// no /* no */"; /* two\n*/ char c = \'"\'; // three',
        ["// one", "/* two\n*/", "// three"],
    ),
    ("c", '#define URL "http://x" // why\nint a = b /c; // d', ["// why", "// d"]),
    ("c", "// goes \\\non\nint x;", ["// goes \\\non"]),
    ("cpp", 'auto s = R"x(// no )" )x"; // yes', ["// yes"]),
    ("cpp", "int n = 1'000; // yes", ["// yes"]),
    ("java", 'String s = """\n// no\n"""; // yes', ["// yes"]),
    ("csharp", 'var s = @"c:\\"; // yes\nvar t = "a\\"// no"; /* b */', ["// yes", "/* b */"]),
    ("go", "var s = `\n// no\n` // yes\nvar r = '\"' // too", ["// yes", "// too"]),
    ("rust", '/* a /* b */ c */ fn f<\'a>() { r#"// no "x" "#; b\'"\'; } // yes', ["/* a /* b */ c */", "// yes"]),
    ("swift", "/* a /* b */ c */ let x = 1", ["/* a /* b */ c */"]),
    ("kotlin", 'val s = "${f("x")} // no" // yes\nval t = """\n// no\n"""', ["// yes"]),
    ("scala", "/* a /* b */ c */ val x = 'x' // yes", ["/* a /* b */ c */", "// yes"]),
    ("d", 'string s = "// no"; // yes', ["// yes"]),
    ("haskell", 'f x\' = "-- no" -- yes\n{- a {- b -} c -}', ["-- yes", "{- a {- b -} c -}"]),
    ("python", 's = "# no" # yes\nt = f"{a["#"]}" # too\n', ["# yes", "# too"]),
    ("python", 'def f():\n    """Doc # inside."""\n    g(\n"""no""")\n', ['"""Doc # inside."""']),
    (
        "javascript",
        "a = b / c; // one\nr = /[/]\\/\\/ no/g; // two\nt = `// no ${x /* yes */} `",
        ["// one", "// two", "/* yes */"],
    ),
    ("javascript", "x = {a: {b: 1}}; y = `${ {a: 1}.a } // no`; // yes", ["// yes"]),
    ("javascript", "#!/usr/bin/env node\nreturn /\\/*/.test(a) // yes", ["#!/usr/bin/env node", "// yes"]),
    ("typescript", "const a: RegExp = /\\/\\//; // yes", ["// yes"]),
    (
        "html",
        "<p title='<!-- no -->'>a</p><!-- yes --><script>x = '//no' // too\n</script>",
        ["<!-- yes -->", "// too"],
    ),
    ("html", "<style>a { /* yes */ }</style> /* no */", ["/* yes */"]),
    ("xml", "<a><![CDATA[<!-- no -->]]><!-- yes --></a>", ["<!-- yes -->"]),
    ("css", 'a { content: "/* no */" } /* yes */', ["/* yes */"]),
    ("scss", "a { // yes\n}", ["// yes"]),
    ("php", "no // no\n<?php $a = '# no'; # yes\n$s = <<<EOT\n// no\nEOT;\n// too\n?> // no", ["# yes", "// too"]),
    (
        "ruby",
        '=begin\nyes\n=end\ns = "#{a} # no" # too\nt = <<~EOS\n  # no\nEOS\nr = /#/\n# end',
        ["=begin\nyes\n=end", "# too", "# end"],
    ),
    ("perl", "=pod\n\nyes\n\n=cut\n$n = $#a; # too\nprint <<EOT;\n# no\nEOT\n", ["=pod\n\nyes\n\n=cut", "# too"]),
    (
        "shell",
        "#!/bin/sh\necho a#no ${#b} '# no' \\# no # yes\ncat <<-EOF\n# no\n\tEOF\n# too",
        ["#!/bin/sh", "# yes", "# too"],
    ),
    ("powershell", "<# yes\n#>\n$a = '# no' # too", ["<# yes\n#>", "# too"]),
    ("sql", "select '-- no' -- yes\n/* too */ from t", ["-- yes", "/* too */"]),
    ("lua", "s = [==[\n-- no\n]==] -- yes\n--[[ too\n]] x = 1", ["-- yes", "--[[ too\n]]"]),
    ("common lisp", '(a "; no" #\\; b) ; yes\n#| too #| deep |# |#', ["; yes", "#| too #| deep |# |#"]),
    ("assembly", "mov a, b ; yes\n/* too */", ["; yes", "/* too */"]),
    ("ini", "[a]\n# yes\nb = 1", ["# yes"]),
    ("erlang", 'f() -> "% no". % yes', ["% yes"]),
    ("prolog", "a :- b. % yes\n/* too */", ["% yes", "/* too */"]),
    ("vim script", '" yes\nlet a = "no"', ['" yes']),
    ("vba", "REM yes\na = \"it's\" ' too", ["REM yes", "' too"]),
    ("batchfile", "@echo off\nrem yes\n:: too\necho remark", ["rem yes", ":: too"]),
    ("pascal", "begin { yes } (* too *) s := '{ no }'; // three", ["{ yes }", "(* too *)", "// three"]),
    ("fortran", "C yes\n      call c ! too\n* three", ["C yes", "! too", "* three"]),
    ("ocaml", 'let s = "(* no *)" (* yes (* deep *) *)', ["(* yes (* deep *) *)"]),
    ("groovy", "def s = '''\n// no\n''' // yes", ["// yes"]),
    ("yaml", 'a: "# no" # yes\nb: c#no', ["# yes"]),
    ("dockerfile", "# yes\nRUN echo '# no'", ["# yes"]),
    ("twig", "{# yes #}{{ a }}", ["{# yes #}"]),
    ("f#", 'let s = "// no" // yes\n(* too (* deep *) *)', ["// yes", "(* too (* deep *) *)"]),
    ("modula-3", "VAR s := SET OF {1, 2}; (* yes *)", ["(* yes *)"]),
    ("antlr", "INT : [0-9]+ ; // yes\nCOMMENT : '//' ~[\\n]* ; /* too */", ["// yes", "/* too */"]),
    ("protocol buffer text format", 'url: "http://a" # yes\n# too', ["# yes", "# too"]),
    ("fennel", '(local a "; no") ; yes\n(# 1)', ["; yes"]),
    ("smt", '(assert (= "#" a)) ; yes', ["; yes"]),
    ("roc", 'a = "# no" # yes\nb = 6 // 2', ["# yes"]),
    ("soong", 'cc_library { name: "a//b" } // yes', ["// yes"]),
    ("hcl", 'a = "${f("#")} # no" # yes\nb = 1 // too\n/* three */', ["# yes", "// too", "/* three */"]),
    ("nix", "a = ''\n  # no\n''; # yes\n/* too */", ["# yes", "/* too */"]),
    ("yaml", "#=====\na: 1\n#=====\nb: 2", ["#=====", "#====="]),
    ("julia", "#= yes #= deep =# =#\nx = 'a' # too", ["#= yes #= deep =# =#", "# too"]),
    ("nim", 'let s = "# no" # yes\n#[ too\n]#', ["# yes", "#[ too\n]#"]),
    ("coffeescript", "###\nyes\n###\na = 1 # too", ["###\nyes\n###", "# too"]),
    ("tex", "\\includegraphics{/usr/*} 5\\% of a % yes\nb", ["% yes"]),
    ("matlab", "a = b ./ c; % yes\n%{\ntoo\n%}", ["% yes", "%{\ntoo\n%}"]),
    ("prolog", "a('% no') :- b. % yes\n/* too */", ["% yes", "/* too */"]),
    ("lean", "def a := 1 -- yes\n/- too /- deep -/ -/", ["-- yes", "/- too /- deep -/ -/"]),
    ("haskell", "f = a /- b\ng = c -/ d -- yes", ["-- yes"]),
    ("scheme", '(list a/* "; no") ; yes', ["; yes"]),
    ("ini", "; yes\na = b;c\n# too", ["; yes", "# too"]),
    ("alloy", "sig A {} // yes\n-- too\n/* three */", ["// yes", "-- too", "/* three */"]),
    ("mercury", ":- pred a. % yes", ["% yes"]),
    ("plantuml", "' yes\nA -> B : it's\n/' too '/", ["' yes", "/' too '/"]),
    ("autoit", "$a = '; no' ; yes\n#cs\ntoo\n#ce", ["; yes", "#cs\ntoo\n#ce"]),
    ("stata", "* yes\ndisplay 2 * 3 // too", ["* yes", "// too"]),
    ("rexx", "say 'a -- no' -- yes\n/* too /* deep */ */", ["-- yes", "/* too /* deep */ */"]),
    ("lolcode", "HAI\nBTW yes\nOBTW too\nTLDR\nKTHXBYE", ["BTW yes", "OBTW too\nTLDR"]),
    ("asn.1", "A ::= INTEGER -- yes", ["-- yes"]),
]


@pytest.mark.fast
@pytest.mark.parametrize(("language", "text", "expected"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_comments_of_a_language(language: str, text: str, expected: list[str]) -> None:
    assert comments(text, language) == expected


@pytest.mark.fast
def test_split_gives_whole_lines_of_comments_to_one_side() -> None:
    text = "int a; // x\n/* b */\n  // c\nint b; /* d */ int e;\n"
    assert split(text, "c") == Split("int a; \nint b;  int e;\n", "// x\n/* b */\n// c\n/* d */\n")
    assert split("a = 1\n", "brainfuck") == Split("a = 1\n", "")


@pytest.mark.fast
def test_neither_part_is_longer_than_the_text() -> None:
    for language, text, expected in CASES:
        code, found = split(text, language)
        assert len(code) + sum(map(len, expected)) <= len(text)
        assert len(found) <= len(text)


@pytest.mark.fast
def test_every_table_entry_names_a_language_and_makes_a_lexer() -> None:
    languages = tables().doc_types
    for language in lexing.syntax_table():
        assert language in languages
        assert lexing._table_lexer(language) is not None
    assert len(lexing.syntax_table()) > 550


@pytest.mark.fast
def test_wide_characters_keep_their_positions() -> None:
    for letter in ("é", "漢", "𝔘"):
        text = f'"{letter} // no" // {letter}!\nx'
        assert comments(text, "c") == [f"// {letter}!"]
        assert split(text, "c", compat=True) == Split(f'"{letter} // no" x\n', f"// {letter}!\n")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("c", "/* Copyright\n * x */\n#include <a.h>\n", "/* Copyright\n * x */"),
        ("c", "// a\n// b\n\n// c\nint x;", "// a\n// b"),
        ("c", "int x; // a", None),
        ("python", "#!/usr/bin/python\n# -*- coding: utf-8 -*-\n# Copyright\n# x\nimport a", "# Copyright\n# x"),
        ("python", '"""Copyright"""\n', None),
        ("shell", "#!/bin/sh\n\n# a\n# b\nls", "# a\n# b"),
        ("xml", '<?xml version="1.0"?>\n<!-- a -->\n<b/>', "<!-- a -->"),
        ("html", "<!DOCTYPE html>\n<!-- a\n-->\n<html>", "<!-- a\n-->"),
        ("php", "<?php\n/** a */\nf();", "/** a */"),
        ("haskell", "{- a -}\nmodule M where", "{- a -}"),
        ("java", "\ufeff/* a */ package b;", "/* a */"),
        ("brainfuck", "# a", None),
    ],
)
def test_leading_comment(language: str, text: str, expected: str | None) -> None:
    found = leading_comment(text, language)
    assert (text[slice(*found)] if found else None) == expected


@pytest.mark.fast
def test_leading_comment_longer_than_the_part_looked_at_first() -> None:
    header = "/*" + "x\n" * lexing.HEADER_CHARACTERS + "*/"
    assert leading_comment(header + "\nint a;", "c") == (0, len(header))


# Compat ------------------------------------------------------------------------------------------------------------------


def by_pygments(text: str, language: str) -> Split:
    from pygments.lexers import get_lexer_by_name

    kinds = lexing._comment_types()
    parts: tuple[list[str], list[str]] = ([], [])
    for kind, token in get_lexer_by_name(language).get_tokens(text):
        parts[kind in kinds].append(token)
    return Split("".join(parts[0]), "".join(parts[1]))


QUIRKS: list[tuple[str, str]] = [
    ("c", '#define URL "http://x"\nint a;'),
    ("c", "#if 0\n/* hidden */\n#if 1\n#endif\n#else\n// seen\n#endif\n"),
    ("c", '#include <a.h> // b\n#include "c.h" /* d\n*/\n'),
    ("c", "/* never closed"),
    ("cpp", "auto s = R\"(// no)\"; auto n = 0x1'F'F; // x"),
    ("python", 'x = f"{a["b"]}" # c\n"""d"""\nf(\n"""e""")\ng = "never closed # f\n# h'),
    ("python", 'f"{x!r:>{w}} {{ # no" # yes'),
    ("java", 'class /* a */ B { module = "x // "; } // c'),
    ("csharp", '[A("//")]\n#region // a\nvar s = $@"// no"; // b'),
    ("go", "/* a */ s := `//` + '\\'' // b"),
    ("javascript", "a /b/ c // d\n/x/ // e\n`${ {a:1} } // f`"),
    ("typescript", "a: /x/; b = c ? d : e // f\nprivate /x//y"),
    ("html", "<script>// a\n</script ><style>/* b */</style><a b=>c<!-- d"),
    ("rust", '//! a\n/// b\n//// c\n/** d */ #[e = "//"] \'f\' \'g: r#"//"#'),
    ("php", "<?php /**/ /** a */ $b =// c\n'd'; \"{$e['//']}\" ?> // f"),
    ("sql", "/* a /* b */ c */ 'it''s -- no' -- d"),
    ("json", '{"a": "// no", // b\n"c": /* d */ 1}'),
    ("css", "a { /* code for the filter */ }"),
    ("xml", "<a b = 'c > d'><!-- e --></a>"),
]


@pytest.mark.fast
@pytest.mark.parametrize(("language", "text"), QUIRKS, ids=[f"{q[0]}-{i}" for i, q in enumerate(QUIRKS)])
def test_compat_repeats_the_quirks_of_pygments(language: str, text: str) -> None:
    assert split(text, language, compat=True) == by_pygments(text, language)


@pytest.mark.fast
@pytest.mark.parametrize("language", sorted(lexing.RELEASED))
def test_compat_of_short_and_odd_texts(language: str) -> None:
    for text in ("", "\n", "\n\n x \n\n", "\ufeffa", "a\r\nb\r", "\0", "é\u2028\x85x"):
        assert split(text, language, compat=True) == by_pygments(text, language)


@pytest.mark.fast
def test_compat_without_a_lexer_scans_lines() -> None:
    text = "a\n# b\nc\n/* d */\ne\n"
    assert split(text, "batchfile", compat=True) == Split("a\ne\n", "# b\nc\n/* d */\n")
    text = "use x;\n=head1 y\nz\n=cut\n# c\n$d # e\n"
    assert split(text, "perl", compat=True) == Split("use x;\n$d # e\n", "=head1 y\nz\n=cut\n# c\n")


@pytest.mark.fast
def test_compat_of_other_languages_is_pygments_itself() -> None:
    text = "x = 1 # a\n=begin\nb\n=end\n"
    assert split(text, "ruby", compat=True) == by_pygments(text, "ruby")


@oracle_files.needs_oracle
@pytest.mark.parametrize("language", sorted(set(lexing.RELEASED) - {"sage", "starlark"}))
def test_compat_equals_pygments_on_real_files(language: str) -> None:
    # As they are, and damaged: what follows an unclosed string or comment must be the same, too.
    generator = random.Random(language)
    files = generator.sample(oracle_files.files(language), min(25, len(oracle_files.files(language))))
    texts = [text for _, text in files if len(text) < 40_000]
    damaged = []
    for text in texts:
        at, length = generator.randrange(len(text) + 1), generator.randrange(60)
        damaged.append(text[:at] + text[at + length :])
    equal = [split(text, language, compat=True) == by_pygments(text, language) for text in texts + damaged]
    print(f"{language}: {sum(equal)} of {len(equal)} texts equal")
    assert sum(equal) >= 0.99 * len(equal) - 1


# Texts made to be slow ---------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("language", sorted(lexing.RELEASED))
def test_compat_of_texts_full_of_openings_is_what_pygments_says(language: str) -> None:
    for hostile in OPENINGS:
        text = hostile.of(400)
        assert split(text, language, compat=True) == by_pygments(text, language), hostile


@pytest.mark.parametrize(("name", "function"), lexers().items(), ids=lexers())
def test_texts_full_of_openings_are_split_evenly_at_any_length(name: str, function: Any) -> None:
    def lengths(text: str) -> tuple[int, int]:
        code, found = function(text)
        if name.endswith("compat"):
            assert len(code) + len(found) == len(lexing._as_pygments_reads(text)), name
        return len(code), len(found)

    for hostile in OPENINGS:
        assert grows_evenly(lengths, hostile), hostile


@pytest.mark.fast
def test_random_texts_do_not_break_a_lexer() -> None:
    generator = random.Random(7)
    pieces = [
        *(hostile.piece for hostile in OPENINGS),
        "*/",
        "-->",
        "\x00",
        "\ud800",
        "漢",
        "𝔘",
        "end",
        "EOT",
        "0x",
        "?>",
        "</script>",
    ]
    for _ in range(60):
        text = "".join(generator.choices(pieces, k=generator.randrange(400)))
        for name, function in lexers().items():
            code, found = function(text)
            if not name.endswith("compat"):
                assert max(len(code), len(found)) <= len(text)


@pytest.mark.fast
def test_nesting_of_a_hundred_thousand_levels() -> None:
    for language, opening in (("rust", "/*"), ("haskell", "{-"), ("python", "["), ("javascript", "`${"), ("php", "${")):
        split(opening * 100_000, language)
        if language in lexing.RELEASED:
            split(opening * 100_000, language, compat=True)
