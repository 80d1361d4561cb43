"""The licence search against the machine-readable copyright files of a Debian system: maintainers' own labels, not ours.

Source of the form: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from opencoder.corpus.transform.licence import licences_in

DOC = Path("/usr/share/doc")
STANZA = re.compile(r"^License:[ \t]*(\S[^\n]*)\n((?:[ \t]+\S?[^\n]*\n?)+)", re.MULTILINE)
DEBIAN_TAIL = re.compile(r"On Debian|The complete text of|A copy of the|common-licenses")
"""Where the licence ends and Debian's own pointer to its text begins."""
NAMES = {
    "expat": "MIT", "mit": "MIT", "bsd-2-clause": "BSD-2-Clause", "bsd-3-clause": "BSD-3-Clause", "bsd-4-clause": "BSD-4-Clause",
    "isc": "ISC", "apache-2.0": "Apache-2.0", "zlib": "Zlib", "mpl-2.0": "MPL-2.0", "mpl-1.1": "MPL-1.1", "cc0-1.0": "CC0-1.0",
    "unlicense": "Unlicense", "boost-1.0": "BSL-1.0", "bsl-1.0": "BSL-1.0", "psf-2": "PSF-2.0", "artistic": "Artistic-1.0-Perl",
    "artistic-2.0": "Artistic-2.0", "x11": "X11", "openssl": "OpenSSL", "public-domain": "LicenseRef-public-domain", "0bsd": "0BSD",
    "wtfpl": "WTFPL", "epl-1.0": "EPL-1.0", "afl-2.1": "AFL-2.1", "postgresql": "PostgreSQL", "cc-by-4.0": "CC-BY-4.0",
    "cc-by-sa-3.0": "CC-BY-SA-3.0", "cc-by-3.0": "CC-BY-3.0", "ofl-1.1": "OFL-1.1", "curl": "curl", "ruby": "Ruby", "vim": "Vim",
    **{f"{f}-{v}{plus}": f"{f.upper()}-{v if '.' in v else v + '.0'}-{'or-later' if plus else 'only'}"
       for f in ("gpl", "lgpl", "agpl") for v in ("1", "2", "2.0", "2.1", "3", "3.0") for plus in ("", "+")},
}  # fmt: skip


def labelled_texts() -> Iterator[tuple[str, str]]:
    """(SPDX id, text) of each different licence paragraph with a name that we know and more than a pointer for a text."""
    seen = set()
    for file in sorted(DOC.glob("*/copyright")):
        content = file.read_text(encoding="utf-8", errors="replace")
        if "copyright-format/1.0" not in content[:400]:
            continue
        for paragraph in re.split(r"\n\s*\n(?=\S)", content):
            found = STANZA.search(paragraph)
            name = found[1].strip().lower() if found else ""
            if found is None or name not in NAMES:
                continue
            text = " ".join(DEBIAN_TAIL.split(found[2])[0].split())
            if len(text.split()) >= 12 and (name, text) not in seen:
                seen.add((name, text))
                yield NAMES[name], text


def test_labels_of_debian_maintainers(capsys: pytest.CaptureFixture[str]) -> None:
    """At least 85 % equal. Of the rest most labels are loose: `MIT` for any short permissive text, `GPL-2` for "or later"."""
    pairs = list(labelled_texts())
    if len(pairs) < 100:
        pytest.skip(f"only {len(pairs)} labelled licence texts under {DOC}: not a Debian system with documentation")
    equal = sum(licences_in(text) == [identity] for identity, text in pairs)
    with capsys.disabled():
        print(
            f"\n{equal} of {len(pairs)} Debian licence texts named as their maintainers do ({equal / len(pairs):.1%})"
        )
    assert equal / len(pairs) >= 0.85
