"""Personal data: precision and recall on the labelled cases; spans; hostile texts; both searches for anchors."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencoder.corpus.transform import anchors, pii, secrets
from opencoder.corpus.transform.spans import KINDS, PiiSpan
from opencoder.native import text_engine
from opencoder.tools.bench_hostile import PRIVATE, Hostile
from tests.corpus.hostile import each
from tests.corpus.pii_cases import FILE, cases, score

pytestmark = pytest.mark.fast


def test_the_set_is_large_and_a_third_is_held_out() -> None:
    groups, splits = Counter(c.group for c in cases()), Counter(c.split for c in cases())
    assert len(cases()) >= 300
    assert sum(n for group, n in groups.items() if group.endswith("-neg") or group == "none") >= 250
    assert abs(splits["held"] / len(cases()) - 1 / 3) < 0.01
    text = FILE.read_text(encoding="utf-8")
    assert not any(secrets.looks_like_key(w) and w.startswith(("ghp_", "AKIA", "sk_live_")) for w in text.split('"'))


@pytest.mark.parametrize(
    ("kind", "precision", "recall"),
    [
        ("email", 0.97, 0.97),
        ("ip_address", 0.97, 0.97),
        ("key", 0.95, 0.95),
        ("password", 0.95, 0.92),
        ("name", 0.95, 0.88),
    ],
)
def test_precision_and_recall_on_the_held_third(kind: str, precision: float, recall: float) -> None:
    held = score(kind, "held")
    assert held.right + held.missed >= 15, "too few labels to say anything"
    assert held.precision >= precision, held
    assert held.recall >= recall, held
    assert held.exact >= 0.9 * held.right, held


def test_placeholders_counts_and_spans() -> None:
    text = 'host = "91.198.174.12"  # ask ann.b@quiet.org\npassword = "s3cr3t!x"\n'
    clean, spans = pii.redact(text, "python")
    assert clean == 'host = "<ip_address>"  # ask <email>\npassword = "<password>"\n'
    assert [(text[s.start : s.end], s.kind) for s in spans] == [
        ("91.198.174.12", "ip_address"),
        ("ann.b@quiet.org", "email"),
        ("s3cr3t!x", "password"),
    ]
    assert pii.counts(spans) == {"ip_address": 1, "email": 1, "password": 1}


def test_kinds_can_be_left_out() -> None:
    text = "# Author: Ada Quill <ada@quill.org>\n"
    assert pii.redact(text, "python", ["email"])[0] == "# Author: Ada Quill <<email>>\n"
    assert pii.redact(text, "python", ["name"])[0] == "# Author: <name> <ada@quill.org>\n"
    assert pii.redact(text, "python", [])[0] == text
    url = "https://ci:c1Build77@git.corp.net/r.git"
    assert pii.redact(url, "text", ["email"])[0] == url


def test_where_two_overlap_the_graver_kind_wins() -> None:
    text = 'url = "https://bob:k3ep@way@host.org/"\npassword = "ann@quiet.org1"\n'
    spans = pii.find_pii(text, "python")
    assert all(a.end <= b.start for a, b in pairwise(spans))
    assert PiiSpan(text.index("ann@"), text.index("ann@") + 14, "password") in spans


@pytest.mark.parametrize(
    ("language", "text", "clean"),
    [
        ("java", " * @author Bob", " * @author <name>"),
        ("java", " * @author 张三", " * @author <name>"),
        ("c", "/* Author: JOHN Q. ROE */", "/* Author: <name> */"),
        ("c", " * John Roe <john@roe.solar>", " * <name> <<email>>"),
        ("python", 'password = "hunter2"', 'password = "<password>"'),
        ("yaml", "password: password123", "password: <password>"),
        ("python", 'key = "AKIA" "x" + "AKIA' + "1234567890ABCDEF" + '"', 'key = "AKIA" "x" + "<key>"'),
        ("python", 'api_key = "abcdefghijklmnop1234567890"', 'api_key = "<key>"'),
        ("python", 'SERVER_IP = "23.45.67.89"', 'SERVER_IP = "<ip_address>"'),
        ("text", '23.45.67.89 - - [10/Oct/2020] "GET"', '<ip_address> - - [10/Oct/2020] "GET"'),
        ("c", "// (chris at kohl-soft dot com)", "// (<email>)"),
        ("go", 'dsn := "root:my5qlDsn@tcp(10.0.0.2:3306)/db"', 'dsn := "root:<password>@tcp(10.0.0.2:3306)/db"'),
    ],
)
def test_single_finds(language: str, text: str, clean: str) -> None:
    assert pii.redact(text, language)[0] == clean


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("python", 'KEY_USAGE = ObjectIdentifier("2.5.29.15")'),
        ("python", "    # 7:d=2 hl=2 l= 3 prim: OBJECT :1.3.101.110"),
        ("markdown", "* [`70d1f32f56`](https://forge.org/commit/70d1f32f56) - **deps**: update V8 to 9.4.146.19"),
        ("html", '<path d="c0 1.52-.87 2.83-2.12 3.51.98.32 2.03.5 3.11.5z"/>'),
        ("xslt", "<!-- 4.4.3.17 forall 4.4.3.18 exists -->"),
        ("cpp", "// for n == max() (see 27.6.1.3) we are at risk"),
        ("python", "argv = ['./argv0', '-c', 'pass', 'arg1']"),
        ("python", "('http', 'joe', 'password', 'proxy.host.org:3128')"),
        ("python", 'print(f"password={password!r}")'),
        ("python", "git = 'git://[path-to-repo[:][ref@]path/to/file'"),
        ("yaml", "- 'github://org:repo@sha/precip/catalog.yml'"),
        ("html", "&lt;protocol&gt;://[&lt;user&gt;[:&lt;password&gt;]@]&lt;hostname&gt;"),
        ("vim script", 'syn match rebolURL "ftp://\\(\\k\\+:\\k\\+@\\)"'),
        ("python", '@return: the object identified by "name".'),
        ("python", 'verify_token="eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9..."'),
        ("python", 'DocTest("foo-bar@baz.py")'),
        ("python", '"foo-bär@baz.org"'),
        ("python", "assertBadPart('3ffe::')"),
        ("c", " * Copyright (c) 2001-2002 Silicon Graphics, Inc."),
        ("python", "# by the @authors tag."),
        ("python", 'KEY = b"sk-ssh-ed25519@openssh.com"'),
        ("json", '"AWS::ApiGateway::ApiKey": "48205d4ffd7feba3"'),
        ("json", '"ARN": "arn:aws:secretsmanager:us-west-2:123456789012:secret:MyTestSecret-a1b2c3"'),
        ("json", '"NextToken": "VyeUFjY291bnRQZXJtaXNzaW9ucyI6ZmFsc2V9"'),
        ("json", '"ClientToken": "20999d87-e304-4725-ad84-832dcbfd7fc5"'),
        ("javascript", '"traceID": "19fd8c8a33975a23"'),
    ],
)
def test_seen_in_real_code_and_wrong_once(language: str, text: str) -> None:
    assert pii.find_pii(text, language) == []


def test_text_without_any_stays_the_same_object_or_equal() -> None:
    text = "def f(x):\n    return x + 1\n"
    assert pii.redact(text, "python") == (text, [])
    assert pii.redact("", "python") == ("", [])


def test_redacting_twice_changes_nothing_more() -> None:
    for case in cases():
        once, _ = pii.redact(case.text, case.language)
        assert pii.redact(once, case.language)[0] == once, case.id


def test_both_searches_find_the_same_anchors() -> None:
    if text_engine() is None:
        pytest.skip("the C++ text engine was not built")
    draw = random.Random(5)
    letters = "@.:1239afsk©(c)CsSé\u4e00\U0001f600 Ppw-_tokenAUTHORx/"
    texts = [case.text for case in cases()] + [
        "".join(draw.choices(letters, k=draw.randint(0, 16))) for _ in range(5000)
    ]
    texts += [text + "\u4e00" for text in texts[:400]] + ["\U0001f600" + text for text in texts[:400]]
    for text in texts:
        assert anchors.anchors(text) == anchors.anchors_in_python(text), text


@given(st.text(alphabet="@.:/-_ \"'<>()=passwordtokenABC123éauthor\n", max_size=200))
def test_any_text_gives_ordered_spans(text: str) -> None:
    position = 0
    for span in pii.find_pii(text, "shell"):
        assert position <= span.start < span.end <= len(text)
        assert span.kind in KINDS
        position = span.end


@each(PRIVATE)
def test_texts_made_to_be_slow_hold_the_same_at_any_length(hostile: Hostile) -> None:
    """Nothing, but for one address or password that all of it begins with, and for the users that curl is given."""
    for characters in (2_000, 20_000, 200_000):
        text = hostile.of(characters)
        users = text.count("curl -u a:") - 1  # the last has no password behind it
        expected = {"2001:": 1, "password=": 1, "curl -u a:": users}.get(hostile.piece, 0) if not hostile.before else 0
        assert len(pii.find_pii(text, "shell")) == expected, characters
