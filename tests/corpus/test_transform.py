"""The whole step on one text: order of its parts, offsets and options."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from opencoder.config import load_corpus_config
from opencoder.corpus.transform import transform
from opencoder.corpus.transform.licence import Licence
from opencoder.corpus.transform.notice import Copyright
from opencoder.corpus.transform.pii import PLACEHOLDERS
from opencoder.corpus_config import TransformConfig
from opencoder.errors import ConfigError
from opencoder.tools.bench_hostile import MIXED

pytestmark = pytest.mark.fast

TEXT = """#!/usr/bin/env python
# Copyright (c) 2011 Ada Quill <ada@quill.org>
# SPDX-License-Identifier: MIT

# Maintainer: Bo Reed <bo@reed.org>
HOST = "91.198.174.12"
"""


def test_header_pii_and_licence_together() -> None:
    done = transform(TEXT, language="python", path="a/b.py", config=TransformConfig())
    assert done.text == '#!/usr/bin/env python\n\n# Maintainer: <name> <<email>>\nHOST = "<ip_address>"\n'
    assert done.licence == Licence("MIT", "spdx")
    assert done.header.copyrights == (Copyright("2011", "Ada Quill"),)
    assert [TEXT[a:b] for a, b in done.header.removed] == [TEXT[22 : TEXT.index("\n\n") + 1]]
    assert [TEXT[s.start : s.end] for s in done.pii] == ["Bo Reed", "bo@reed.org", "91.198.174.12"]
    assert done.pii_counts == {"name": 1, "email": 1, "ip_address": 1}
    assert done.changed


def test_headers_left_have_their_names_replaced() -> None:
    done = transform(TEXT, language="python", path="b.py", config=TransformConfig(headers=False))
    assert done.text.startswith("#!/usr/bin/env python\n# Copyright (c) 2011 <name> <<email>>\n# SPDX")
    assert done.header.removed == ()
    assert done.header.spdx == ("MIT",)
    assert done.licence.expression == "MIT"


def test_pii_left_out() -> None:
    done = transform(TEXT, language="python", path="b.py", config=TransformConfig(headers=False, pii=()))
    assert done.text == TEXT
    assert not done.changed


def test_text_and_record_give_the_result_again() -> None:
    """Offsets are of the text as given: cutting and replacing there is all that was done."""
    done = transform(TEXT, language="python", path="b.py", config=TransformConfig())
    text = TEXT
    edits = [(s.start, s.end, PLACEHOLDERS[s.kind]) for s in done.pii] + [(a, b, "") for a, b in done.header.removed]
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    assert text == done.text
    record = json.loads(json.dumps(done.record()))
    assert record["licence"] == "MIT"
    assert record["licence_source"] == "spdx"
    assert record["copyrights"] == [["2011", "Ada Quill"]]
    assert [TEXT[start:end] for start, end, kind in record["pii"] if kind == "email"] == ["bo@reed.org"]


def test_a_licence_file_keeps_its_notice() -> None:
    text = "MIT License\n\nCopyright (c) 2011 Ada Quill\n"
    done = transform(text, language="text", path="x/LICENSE", config=TransformConfig())
    assert done.text == "MIT License\n\nCopyright (c) 2011 <name>\n"
    assert done.licence == Licence("MIT", "notice")


def test_a_tag_in_code_counts() -> None:
    text = 'pragma = "x"\n# SPDX-License-Identifier: ISC\n'
    assert transform(text, language="python", path="a.py", config=TransformConfig()).licence == Licence("ISC", "spdx")


def test_configuration() -> None:
    config = load_corpus_config(
        None, ["transform.headers=false", "transform.pii=[email,key]", "transform.licences=[permissive]"]
    )
    assert config.transform == TransformConfig(headers=False, pii=("email", "key"), licences=("permissive",))
    with pytest.raises(ConfigError, match="phone"):
        load_corpus_config(None, ["transform.pii=[phone]"])
    with pytest.raises(ValidationError):
        TransformConfig(licence=())  # type: ignore[call-arg]


def test_a_long_text_gives_what_its_lines_give() -> None:
    (hostile,) = MIXED
    line = "x = {'password': '<password>', 'ip': '10.0.0.1'}  # <email>\n"
    for characters in (600, 60_000):
        text = hostile.of(characters)
        done = transform(text, language="python", path="a.py", config=TransformConfig())
        assert done.text == line * text.count("\n", len(hostile.before))
        assert done.header.copyrights == (Copyright("2011", "Ada Quill"),)
