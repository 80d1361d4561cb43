"""Leading copyright comments: every comment syntax, what may stand before, what must stay, and what is kept of the facts."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencoder.corpus.language import tables
from opencoder.corpus.transform import comments
from opencoder.corpus.transform.header import find_header
from opencoder.corpus.transform.notice import Copyright, copyrights, spdx_ids
from opencoder.tools.bench_hostile import HEADER_LANGUAGES, HEADERS, Hostile

from .hostile import each

pytestmark = pytest.mark.fast

NOTICE = [
    "Copyright (c) 2012-2014, 2019 Jane Q. Example <jane@site.example>",
    "",
    "Licensed under the Apache License, Version 2.0 (the License);",
    "you may not use this file except in compliance with the License.",
    "SPDX-License-Identifier: Apache-2.0",
]
CODE = "x0 = f(1)\n\n\ny = x0\n"
LISTED = sorted(language for language, kind in tables().doc_types.items() if kind != "excluded")


def commented(lines: list[str], opening: str, closing: str) -> str:
    if not closing:
        return "".join(f"{opening} {line}".rstrip() + "\n" for line in lines)
    body = "\n".join(lines)
    return f"{opening}\n{body}{closing}\n" if closing.startswith("\n") else f"{opening}\n{body}\n{closing}\n"


def every_syntax() -> list[tuple[str, str, str]]:
    found = []
    for language in LISTED:
        syntax = comments.syntax_of(language)
        found += [(language, marker, "") for marker in syntax.line]
        found += [(language, a, b) for a, b in syntax.block]
        found += [(language, quote, quote) for quote in syntax.string]
    return found


def test_every_language_has_its_syntax() -> None:
    unknown = comments.syntax_of("unknown")
    for language in LISTED:
        assert language in comments.named_languages() or comments.syntax_of(language) is not unknown, language
    assert comments.named_languages() <= set(LISTED)
    assert len(every_syntax()) > 900


def test_the_table_names_those_alone_for_whom_the_lexers_table_does_not_hold() -> None:
    named = comments.named_languages()
    assert [language for language in named if comments.lexed_syntax(language) == comments.syntax_of(language)] == []
    assert comments.syntax_of("java") is comments.syntax_of("javascript")  # one by its markers, the other by name
    assert comments.syntax_of("xquery").block == (("(:", ":)"),)  # markers that no family has


def test_every_syntax_of_every_language() -> None:
    """The notice goes, the rest stays byte for byte; and a comment without a notice stays whole."""
    for language, opening, closing in every_syntax():
        # Where a parenthesis ends the comment, the notice has none.
        notice = [re.sub(r"\(c\) |[()]", "", line) for line in NOTICE] if closing == ")" else NOTICE
        text = commented(notice, opening, closing) + CODE
        header = find_header(text, language)
        assert header.strip(text) == CODE, (language, opening, closing)
        assert header.spdx == ("Apache-2.0",), (language, opening, closing)
        assert header.copyrights == (Copyright("2012-2014,2019", "Jane Q. Example"),), (language, opening)
        plain = commented(["Counts the words of a text,", "", "one line at a time."], opening, closing) + CODE
        assert find_header(plain, language).removed == (), (language, opening, closing)


@pytest.mark.parametrize(
    ("language", "before", "opening", "closing"),
    [
        ("shell", "#!/bin/sh\n", "#", ""),
        ("shell", "#!/usr/bin/env bash\n\n", "#", ""),
        ("python", "#!/usr/bin/python3\n# -*- coding: utf-8 -*-\n", "#", ""),
        ("python", "# -*- coding: latin-1 -*-\n", '"""', '"""'),
        ("python", "#!/usr/bin/env python\n", "'''", "'''"),
        ("ruby", "# frozen_string_literal: true\n\n", "#", ""),
        ("ruby", "#!/usr/bin/ruby\n# encoding: utf-8\n", "=begin", "\n=end"),
        ("php", "<?php\n", "/*", "*/"),
        ("php", "<?php\n\ndeclare(strict_types=1);\n\n", "/**", "*/"),
        ("php", "#!/usr/bin/php\n<?php\n", "//", ""),
        ("php", "<?php\n", "#", ""),
        ("xml", '<?xml version="1.0" encoding="UTF-8"?>\n', "<!--", "-->"),
        ("html", "<!DOCTYPE html>\n", "<!--", "-->"),
        ("go", "//go:build linux\n// +build linux\n\n", "//", ""),
        ("javascript", "#!/usr/bin/env node\n'use strict';\n\n", "/*", "*/"),
        ("typescript", "// @ts-check\n", "//", ""),
        ("css", '@charset "utf-8";\n', "/*!", "*/"),
        ("cpp", "#pragma once\n\n", "//", ""),
        ("c", "#ifndef A_H\n#define A_H\n\n", "/*", "*/"),
        ("batchfile", "@echo off\r\n", "REM", ""),
        ("haskell", "{-# LANGUAGE GADTs #-}\n", "{-", "-}"),
        ("emacs lisp", ";;; a.el -*- lexical-binding: t; -*-\n", ";;", ""),
        ("common lisp", "(in-package :cl-user)\n", ";;;", ""),
        ("tcl", "#!/usr/bin/tclsh\n", "#", ""),
        ("perl", "#!/usr/bin/perl -w\n", "#", ""),
        ("vue", "<template>\n", "<!--", "-->"),
        ("csharp", "\ufeff", "//", ""),
    ],
)
def test_what_stands_before_stays(language: str, before: str, opening: str, closing: str) -> None:
    text = before + commented(NOTICE, opening, closing) + CODE
    header = find_header(text, language)
    assert header.removed
    assert header.strip(text) == before + CODE


def test_several_in_a_row_go_and_others_between_stay() -> None:
    mine, theirs = commented(NOTICE, "/*", "*/"), "// Portions (c) 1998 Somebody Else\n"
    documentation = "/* Reads the table of contents of an archive. */\n"
    text = mine + "\n" + theirs + documentation + CODE
    header = find_header(text, "c")
    assert header.strip(text) == documentation + CODE
    assert [c.years for c in header.copyrights] == ["2012-2014,2019", "1998"]


def test_a_notice_behind_the_first_statement_stays() -> None:
    text = "int a;\n" + commented(NOTICE, "/*", "*/")
    assert find_header(text, "c").removed == ()


def test_documentation_in_the_same_comment_stays() -> None:
    lines = [
        "/* Hash tables that grow by incremental rehashing: each call moves one bucket,",
        " * so that no single insertion pays for the whole table at once.",
        " *",
        " * Copyright (c) 2006 Somebody",
        " * All rights reserved.",
        " *",
        " * Keys are compared by the function that the caller hands over, never by address.",
        " */",
    ]
    text = "\n".join([*lines, CODE])
    header = find_header(text, "c")
    assert header.strip(text) == "\n".join([*lines[:3], *lines[6:], CODE])


def test_documentation_that_follows_without_a_blank_line_stays() -> None:
    text = (
        "# Copyright 2020 The Frobnicator Authors\n# This module turns every event of the queue into one record of the log\n"
        f"# and keeps their order across restarts.\n{CODE}"
    )
    assert find_header(text, "python").strip(text) == text.split("\n", 1)[1]


def test_a_header_drawn_as_a_box_goes() -> None:
    box = """(**************************************************)
(*                                                *)
(*                     OCaml                      *)
(*                                                *)
(*   Copyright 1996 Institut Quelconque.          *)
(*                                                *)
(*   All rights reserved.  This file is given     *)
(*   under the terms of the GNU Lesser General    *)
(*   Public License version 2.1.                  *)
(*                                                *)
(**************************************************)
"""
    header = find_header(box + "\n" + CODE, "ocaml")
    assert header.strip(box + "\n" + CODE) == CODE
    assert header.licences == ("LGPL-2.1-only",)
    c = "/*================*/\n/* Copyright 2001 */\n/* Acme GmbH      */\n/*================*/\n"
    assert find_header(c + CODE, "c").strip(c + CODE) == CODE
    documented = "/* Reads the table of contents of an archive and hands each entry on to its caller. */\n"
    two = f"/* Copyright 2020 A. All rights reserved. */\n{documented}"
    assert find_header(two + CODE, "c").strip(two + CODE) == documented + CODE


def test_terms_that_go_on_behind_a_blank_line_go() -> None:
    text = (
        "# Copyright 2001 A\n# Redistribution and use in source and binary forms are permitted.\n\n"
        "# THIS SOFTWARE COMES AS IS, WITHOUT ANY WARRANTY.\n\n# Counts words.\n"
    )
    assert find_header(text + CODE, "python").strip(text + CODE) == "# Counts words.\n" + CODE


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("haskell", "{- Copyright 2001 A {- inner -} still -}\n"),
        ("ocaml", "(* Copyright 2001 A (* inner *) still *)\n"),
        ("common lisp", "#| Copyright 2001 A #| inner |# still |#\n"),
        ("d", "/+ Copyright 2001 A /+ inner +/ still +/\n"),
        ("julia", "#= Copyright 2001 A #= inner =# still =#\n"),
    ],
)
def test_comments_that_hold_comments(language: str, text: str) -> None:
    assert find_header(text + CODE, language).strip(text + CODE) == CODE


def test_a_title_goes_with_its_notice() -> None:
    text = "/*\n * queue.c - a queue\n *\n * Copyright (C) 2001 Somebody\n */\n" + CODE
    assert find_header(text, "c").strip(text) == CODE


def test_the_sentence_of_a_doc_string_stays() -> None:
    title = "\n    a.console\n\n    Colours for the terminal.\n\n"
    notice = "    :copyright: Copyright 2006 by A.\n    :license: BSD.\n"
    text = f'"""{title}{notice}"""\n\n{CODE}'
    assert find_header(text, "python").strip(text) == f'"""{title}"""\n\n{CODE}'


def test_the_mark_of_generated_code_stays() -> None:
    text = "// Code generated by protoc. DO NOT EDIT.\n//\n// Copyright 2020 Somebody\n" + CODE
    assert find_header(text, "go").strip(text) == "// Code generated by protoc. DO NOT EDIT.\n//\n" + CODE


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/*! q 1.2 | (c) 2011 Somebody | MIT License */!function(){}();\n", "!function(){}();\n"),
        ("/* Copyright 2001 A */ int a;\n", "int a;\n"),
        ("/* Copyright 2001 A */\r\n\r\nint a;\r\n", "int a;\r\n"),
        ("/* Copyright 2001 A */", ""),
        ("// Copyright 2001 A", ""),
        ("    // Copyright 2001 A\n    int a;\n", "    int a;\n"),
        ("#!/bin/x\n\n// Copyright 2001 A\n\nint a;\n", "#!/bin/x\n\nint a;\n"),
        ("#!/bin/x\n// Copyright 2001 A\n\nint a;\n", "#!/bin/x\n\nint a;\n"),
        ("/* Copyright 2001 A, never closed\nint a;\n", "/* Copyright 2001 A, never closed\nint a;\n"),
        ("int a; // Copyright 2001 A\n", "int a; // Copyright 2001 A\n"),
    ],
)
def test_edges(text: str, left: str) -> None:
    assert find_header(text, "c").strip(text) == left


def test_a_string_that_is_used_is_no_comment() -> None:
    text = '"""Copyright 2001 A, {}""".format(x)\n'
    assert find_header(text, "python").removed == ()


@pytest.mark.parametrize(
    "line",
    [
        "Parses copyright notices out of binary files",
        "Keeps the licences of a pool and hands them out",
        "Checks that the user has permission to write",
        "a) first, b) second, (c) third",
    ],
)
def test_comments_about_the_subject_stay(line: str) -> None:
    text = f"// {line}.\n{CODE}"
    assert find_header(text, "c").removed == ()


def test_facts_of_a_notice() -> None:
    text = """
    Copyright (C) 1999-2003, 2005 by Ingrid Solheim <i@s.example>
    (c) 2012 Acme Widgets, Inc. All rights reserved.
    Copyright Aleksey Gurt 2000-2004.
    Copyright 2018-present The Q Authors
    © 2016 Vicente J. Botas
    The above copyright notice must be kept.
    SPDX-License-Identifier: (MIT OR Apache-2.0) AND BSD-3-Clause */
    """
    assert copyrights(text) == [
        Copyright("1999-2003,2005", "Ingrid Solheim"),
        Copyright("2012", "Acme Widgets, Inc"),
        Copyright("2000-2004", "Aleksey Gurt"),
        Copyright("2018-present", "The Q Authors"),
        Copyright("2016", "Vicente J. Botas"),
    ]
    assert spdx_ids(text) == ["(MIT OR Apache-2.0) AND BSD-3-Clause"]


@given(st.text(alphabet="/*#-<!> \n\"'(c)Copyright2019;%{}", max_size=300), st.sampled_from(LISTED))
def test_what_is_removed_are_ordered_spans(text: str, language: str) -> None:
    position = 0
    for start, end in find_header(text, language).removed:
        assert position <= start < end <= len(text)
        position = end


@each(HEADERS)
@pytest.mark.parametrize("language", HEADER_LANGUAGES)
def test_texts_made_to_be_slow_hold_no_header(hostile: Hostile, language: str) -> None:
    """But for the one that is a notice of many lines, as long as it ends within the limit."""
    for characters in (20_000, 300_000):
        ends = hostile.end == "*/" and characters < comments.MAX_LEADING and language in ("c", "unknown")
        text = hostile.of(characters)
        assert find_header(text, language).removed == (((0, len(text)),) if ends else ()), characters


def test_a_comment_that_ends_beyond_the_limit_is_none() -> None:
    end = comments.MAX_LEADING
    for length, found in ((end, True), (end + 1, False)):
        text = "/* Copyright 2001 A ".ljust(length - 2) + "*/"
        assert bool(find_header(text + "\nint a;\n", "c").removed) == found, length
