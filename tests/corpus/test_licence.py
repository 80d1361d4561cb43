"""Licences by tag, by words, by licence file; the allow-list; and the licence texts of a Debian system where there is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from opencoder.corpus.transform.licence import (
    Licence,
    RepositoryLicences,
    _rules,
    check_allow_list,
    is_allowed,
    is_licence_file,
    known_licences,
    licence_of,
    licences_in,
)
from opencoder.errors import ConfigError
from opencoder.tools.bench_hostile import LICENCES, Hostile

from .hostile import each

pytestmark = pytest.mark.fast

MIT = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy\n * of this software and associated "
    'documentation files (the "Software"), to deal\n * in the Software without restriction, including without limitation the rights'
)
BSD = "Redistribution and use in source and binary forms, with or without\nmodification, are permitted provided that"
GPL = "This program is free software; you can redistribute it and/or modify it under the terms of the GNU General Public License"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (MIT, ["MIT"]),
        ("# Licensed under the MIT license", ["MIT"]),
        ("(c) 2011 A | MIT License", ["MIT"]),
        (f"{MIT}. Except as contained in this notice, the name of X shall not be used", ["X11"]),
        (f"{MIT}. The Software shall be used for Good, not Evil.", ["JSON"]),
        (BSD, ["BSD-2-Clause"]),
        (f"{BSD} … Neither the name of X … may be used to endorse or promote products derived from", ["BSD-3-Clause"]),
        (f"{BSD} … All advertising materials mentioning features … endorse or promote products derived", ["BSD-4-Clause"]),
        ("a BSD-style license that can be found in the LICENSE file", ["BSD-3-Clause"]),
        ('Licensed under the Apache License, Version 2.0 (the "License")', ["Apache-2.0"]),
        ("http://www.apache.org/licenses/LICENSE-2.0", ["Apache-2.0"]),
        ("subject to the terms of the Mozilla\n// Public License v. 2.0.", ["MPL-2.0"]),
        ("the Mozilla Public License Version 1.1 (the", ["MPL-1.1"]),
        (f"{GPL} version 2 as published by the Free Software Foundation", ["GPL-2.0-only"]),
        (f"{GPL} as published by the Free Software Foundation; either version 2 of the License, or (at your option) any later version.",
         ["GPL-2.0-or-later"]),
        (f"{GPL} as published by the Free Software Foundation, either version 3 of the License, or (at your option) any later version.",
         ["GPL-3.0-or-later"]),
        ("under the terms of version 2 of the GNU General Public License as published by", ["GPL-2.0-only"]),
        (f"{GPL}.", ["GPL-1.0-or-later"]),
        ("the GNU Lesser General Public License as published by the FSF; version 2.1 of the License", ["LGPL-2.1-only"]),
        ("GNU Library General Public License … version 2 of the License, or (at your option) any later version", ["LGPL-2.0-or-later"]),
        ("GNU Affero General Public License as published by …, either version 3 of the License, or (at your option) any later version",
         ["AGPL-3.0-or-later"]),
        ("licensed under the GPLv3+ … gpl v3 or later", ["GPL-3.0-or-later"]),
        ("Permission to use, copy, modify, and/or distribute this software for any\npurpose with or without fee is hereby granted, "
         "provided that",
         ["ISC"]),
        ("Permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is hereby granted. "
         "THE", ["0BSD"]),
        ("This is free and unencumbered software released into the public domain.", ["Unlicense"]),
        ("Distributed under the Boost Software License, Version 1.0.", ["BSL-1.0"]),
        ("CC0 1.0 Universal", ["CC0-1.0"]),
        ("This file is in the public domain.", ["LicenseRef-public-domain"]),
        ("under the same terms as Perl itself", ["Artistic-1.0-Perl", "GPL-1.0-or-later"]),
        ("Use of this source is governed by The Artistic License 2.0", ["Artistic-2.0"]),
        ("Python Software Foundation License Version 2", ["PSF-2.0"]),
        ("Eclipse Public License v1.0", ["EPL-1.0"]),
        ("You may use it as you like.", []),
        ("This function parses the licence number of a car.", []),
        ("", []),
    ],
)  # fmt: skip
def test_by_words(text: str, ids: list[str]) -> None:
    assert licences_in(text) == ids


@pytest.mark.parametrize(
    ("file", "identity"),
    [
        ("Apache-2.0", "Apache-2.0"),
        ("Artistic", "Artistic-1.0-Perl"),
        ("BSD", "BSD-3-Clause"),
        ("CC0-1.0", "CC0-1.0"),
        ("GFDL-1.2", "GFDL-1.2"),
        ("GFDL-1.3", "GFDL-1.3"),
        ("GPL-1", "GPL-1.0"),
        ("GPL-2", "GPL-2.0"),
        ("GPL-3", "GPL-3.0"),
        ("LGPL-2", "LGPL-2.0"),
        ("LGPL-2.1", "LGPL-2.1"),
        ("LGPL-3", "LGPL-3.0"),
        ("MPL-1.1", "MPL-1.1"),
        ("MPL-2.0", "MPL-2.0"),
    ],
)
def test_texts_of_a_debian_system(file: str, identity: str) -> None:
    path = Path("/usr/share/common-licenses") / file
    if not path.is_file():
        pytest.skip(f"{path} is not there: no Debian system")
    assert licences_in(path.read_text(encoding="utf-8", errors="replace")) == [identity]


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        ("LICENSE", True),
        ("a/b/LICENCE.txt", True),
        ("COPYING.LIB", True),
        ("LICENSE-MIT", True),
        ("license.md", True),
        ("UNLICENSE", True),
        ("COPYRIGHT", True),
        ("src/license.py", False),
        ("licenses.json", False),
        ("relicense.sh", False),
        ("LICENSES/index.html", False),
    ],
)
def test_licence_files_by_name(path: str, is_one: bool) -> None:
    assert is_licence_file(path) == is_one


def test_the_nearest_licence_file_counts() -> None:
    repository = RepositoryLicences(
        [
            ("LICENSE-MIT", MIT),
            ("LICENSE-APACHE", "Apache License Version 2.0"),
            ("vendor/z/COPYING", f"{GPL}, version 2 of the License"),
            ("vendor/y/LICENSE", "no licence that is known"),
            ("src/licence.py", MIT),
        ]
    )
    assert repository.of("src/a/b.c") == "Apache-2.0 OR MIT"
    assert repository.of("vendor/z/src/x.c") == "GPL-2.0-only"
    assert repository.of("vendor/y/x.c") == "Apache-2.0 OR MIT"
    assert RepositoryLicences([]).of("a.c") is None


def test_the_nearest_evidence_counts() -> None:
    assert licence_of(["MIT"], ["GPL-2.0-only"], given="BSD-2-Clause", file="ISC") == Licence("MIT", "spdx")
    assert licence_of(["MIT OR ISC", "Zlib"], []) == Licence("(MIT OR ISC) AND Zlib", "spdx")
    linux = "(GPL-2.0 WITH Linux-syscall-note) OR MIT"
    assert licence_of([linux], []) == licence_of([f"({linux})"], []) == Licence(linux, "spdx")
    assert licence_of(["(GPL-2.0-only) OR (MIT)"], []).expression == "(GPL-2.0-only) OR (MIT)"
    assert licence_of([linux, "(Zlib OR ISC)"], []).expression == f"({linux}) AND (Zlib OR ISC)"
    assert licence_of([], ["MIT", "Zlib"], given="BSD-2-Clause") == Licence("MIT AND Zlib", "notice")
    assert licence_of([], [], given="BSD-2-Clause", file="ISC") == Licence("BSD-2-Clause", "given")
    assert licence_of([], [], file="ISC") == Licence("ISC", "file")
    assert licence_of([], []) == Licence(None, "none")


@pytest.mark.parametrize(
    ("expression", "allow", "allowed"),
    [
        ("MIT", ["MIT"], True),
        ("mit", ["MIT"], True),
        ("GPL-3.0-only", ["permissive"], False),
        ("MIT OR GPL-3.0-only", ["permissive"], True),
        ("MIT AND GPL-3.0-only", ["permissive"], False),
        ("(MIT OR GPL-3.0-only) AND Apache-2.0", ["permissive"], True),
        ("MIT,Apache-2.0", ["permissive"], True),
        ("MIT,GPL-3.0-only", ["permissive"], False),
        ("Apache-2.0 WITH LLVM-exception", ["Apache-2.0"], True),
        ("GPL-2.0-or-later", ["GPL-2.0"], True),
        ("GPL-2.0+", ["GPL-2.0"], True),
        ("MIT MIT", ["MIT"], False),
        ("(MIT", ["MIT"], False),
        ("AND", ["MIT"], False),
        ("anything", [], True),
    ],
)
def test_allow_list(expression: str, allow: list[str], allowed: bool) -> None:
    assert is_allowed(Licence(expression, "given"), allow) == allowed


def test_unknown_licences_follow_the_option() -> None:
    nothing = Licence(None, "none")
    assert is_allowed(nothing, ["MIT"])
    assert not is_allowed(nothing, ["MIT"], unknown="drop")
    assert is_allowed(nothing, [], unknown="drop")


def test_a_wrong_entry_names_the_nearest() -> None:
    check_allow_list(["permissive", "MIT", "LicenseRef-mine"])
    with pytest.raises(ConfigError, match=r"Apache2\.0.*did you mean `Apache-2\.0`"):
        check_allow_list(["Apache2.0"])


def test_every_rule_is_written_as_it_is_compared() -> None:
    assert len(known_licences()) > 60
    for rule in _rules():
        for phrase in (*rule.all, *rule.any, *rule.none):
            words = re.findall("[a-z0-9]+", phrase)
            assert words, rule.id
            assert phrase.strip() == " ".join(words), (rule.id, phrase)


@each(LICENCES)
def test_texts_made_to_be_slow_name_what_short_ones_do(hostile: Hostile) -> None:
    named = ["GPL-1.0-or-later"] if hostile.piece == "gnu public license " else []
    for characters in (400, 400_000):
        assert licences_in(hostile.of(characters)) == named
        assert not is_allowed(Licence(hostile.of(characters)[:2000], "given"), ["MIT"])
