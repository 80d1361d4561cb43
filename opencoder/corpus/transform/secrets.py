"""Keys and passwords: by the published form of a token, by the name of what is assigned, in URLs and on command lines.

A key must look drawn at random; a password must not look like a word, a label, a template or a reference. What is only a
placeholder (`changeme`, `<your key>`, `${PASSWORD}`) tells nobody anything and stays."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from .anchors import KEY_PREFIXES
from .data import unquoted_languages, words
from .spans import Kind, PiiSpan

UNQUOTED = unquoted_languages()
_DUMMY = words("dummy_passwords")

_PREFIXES = {prefix: re.compile(pattern) for prefix, pattern in KEY_PREFIXES.items()}
_EXAMPLE = re.compile(r"EXAMPLE|[xX]{6}|0{10}")
"""Tokens of documentation."""
_PEM = re.compile(r"-----BEGIN ((?:[A-Z0-9]{1,12} ){0,3})PRIVATE KEY(?: BLOCK)?-----")
_PEM_MAX = 20_000
_WEBHOOK = re.compile(r"hooks\.slack\.com/services/(T[A-Z0-9]{6,12}/B[A-Z0-9]{6,12}/[A-Za-z0-9]{20,28})")
_TELEGRAM = re.compile(r":AA[\w-]{33}(?![\w-])")
_HEADER = re.compile(
    r"authorization[\"'\]]{0,2}[ \t]*[:=,][ \t]*[\"'`]?[ \t]*(?:bearer|basic|token|bot)[ \t]+([A-Za-z0-9._~+/=-]{16,2000})",
    re.IGNORECASE,
)
_URL_PASSWORD = re.compile(r"://[^\s:/@\"'<>?#]{0,80}:([^\s@/\"'<>]{1,120})@([\w.-]{0,100})")
_DSN_PASSWORD = re.compile(r"[\w.-]{1,40}:([^\s@\"'`/:]{3,80})$")
_CURL = re.compile(r"curl [^\n]{0,200}?(?:-u|--user)[ =][\"']?[\w.-]{1,60}:([^\s\"'@]{3,80})")
_SQL_PASSWORD = re.compile(r"identified by[ \t]+(?:password[ \t]+)?(['\"])([^'\"\n]{3,100})\1", re.IGNORECASE)


def prefixed_at(text: str, at: int, prefix: str) -> Iterator[PiiSpan]:
    """A token with a published prefix."""
    found = _PREFIXES[prefix].match(text, at)
    if found and not _EXAMPLE.search(found[0]):
        yield PiiSpan(at, found.end(), "key")


def private_key_at(text: str, at: int) -> Iterator[PiiSpan]:
    """A private key block, from its first dash to its last. One whose end is missing is a key to the end of its lines."""
    head = _PEM.match(text, at)
    if head is None:
        return
    closing = f"-----END {head[1]}PRIVATE KEY"
    end = text.find(closing, head.end(), head.end() + _PEM_MAX)
    if end < 0:
        return  # the name of the block, not a block
    body = text[head.end() : end]
    stop = text.find("-----", end + len(closing))
    if len(re.findall(r"[A-Za-z0-9+/=]", body)) >= 40 and 0 <= stop <= end + len(closing) + 8:
        yield PiiSpan(at, stop + 5, "key")


def telegram_at(text: str, at: int) -> Iterator[PiiSpan]:
    """`123456789:AA…`, the token of a bot."""
    found = _TELEGRAM.match(text, at)
    digits = re.search(r"(?<!\d)\d{8,10}$", text[max(0, at - 11) : at])
    if found and digits:
        yield PiiSpan(at - len(digits[0]), found.end(), "key")


def webhook_at(text: str, at: int) -> Iterator[PiiSpan]:
    """The secret path of a Slack webhook."""
    found = _WEBHOOK.match(text, at)
    if found:
        yield PiiSpan(found.start(1), found.end(1), "key")


def authorization_at(text: str, at: int) -> Iterator[PiiSpan]:
    """The credentials of an HTTP Authorization header."""
    found = _HEADER.match(text, at)
    if found and looks_random(found[1]):
        yield PiiSpan(found.start(1), found.end(1), "key")


# ---- passwords in URLs and commands ----


def url_password_at(text: str, at: int) -> Iterator[PiiSpan]:
    """`scheme://user:password@host`."""
    found = _URL_PASSWORD.match(text, at)
    if found and _is_url_password(found[1]) and "example" not in found[2].split("."):
        yield PiiSpan(found.start(1), found.end(1), "password")


def _is_url_password(value: str) -> bool:
    """Short words are parts of addresses of another kind (`github://org:repo@ref`)."""
    return not is_placeholder(value) and not (value.isalpha() and len(value) < 8) and "[" not in value


def dsn_password_at(text: str, at: int) -> Iterator[PiiSpan]:
    """`user:password@tcp(host)`, the form of Go's MySQL driver; `at` is the `@`."""
    found = _DSN_PASSWORD.search(text[max(0, at - 121) : at])
    if found and not is_placeholder(found[1]):
        yield PiiSpan(at - len(found[1]), at, "password")


def curl_password_at(text: str, at: int) -> Iterator[PiiSpan]:
    """`curl -u user:password`."""
    found = _CURL.match(text, at)
    if found and not is_placeholder(found[1]):
        yield PiiSpan(found.start(1), found.end(1), "password")


def sql_password_at(text: str, at: int) -> Iterator[PiiSpan]:
    """`IDENTIFIED BY 'password'`."""
    found = _SQL_PASSWORD.match(text, at)
    if found and looks_like_password(
        found[2], strict=not text.startswith("IDENTIFIED", at)
    ):  # `identified by "name"` is prose
        yield PiiSpan(found.start(2), found.end(2), "password")


# ---- assignments ----

_PASSWORD_NAME = re.compile(
    r"(?:^|[\W_]|(?-i:(?<=[a-z0-9])(?=P))|db|pg|ftp|smtp|user|root|admin|my|ssh|mysql)(?:passw(?:or)?d|passphrase|passwort|pass|pwd|psw)\d?$",
    re.IGNORECASE,
)
_KEY_NAME = re.compile(
    r"(?:secret(?:[_-]?(?:access|api))?(?:[_-]?key)?(?:[_-]?base)?|(?:api|access|auth|app|private|encryption|signing|subscription|account|master)[_-]?key|"
    r"(?:api|app|consumer|client)?[_-]?secret|token)\d?$",
    re.IGNORECASE,
)
_CANDIDATE = re.compile(r"[\w-]{2,24}[\"'\])]{0,3}[ \t]*(?:[=:,(>!]|[\"']| -p |[ \t])")
"""What must follow at the least; most places of these words in code end here."""
_PASSING_TOKEN = re.compile(
    r"(?:next|page|paging|continuation|idempotency|request|start(?:ing)?|change|update|resume|sync|lock|cancel(?:lation)?)[_-]?token$",
    re.IGNORECASE,
)
"""Marks of a place in a list or of one request: random, but worth nothing."""
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_NO_OPERATOR = ("sql", "plpgsql", "plsql", "dockerfile", "tcl")
"""Languages that put the value right behind the name."""
_LEFT_OF_NAME = re.compile(r"[\w.$-]{0,60}$")
_RIGHT_OF_NAME = re.compile(r"[\w-]{0,24}")
_OPERATOR = re.compile(
    r"(?P<closing>[\"']?[\])]?[\"']?)(?:[ \t]*:[ \t]*(?:Optional\[)?(?:str|bytes|String|string|SecretStr)\]?(?=[ \t]*=))?"
    r"(?P<operator>[ \t]*(?:=>|:=|={1,3}|!==?|:|,)[ \t]*|\((?=[\"'])|[ \t]+(?=[\"'])|>(?=[^\s<])|[\"'][ \t]+value=(?=[\"']))"
)
_QUOTED = re.compile(
    r"(?:base64:)?(?P<prefix>[bruLfF@$]{0,2})(?P<quote>[\"'`]|\\\")(?P<scheme>base64:)?(?P<value>[^\"'`\n]{1,400}?|[^\"\n]{1,400}?)(?P=quote)"
)
_BARE = re.compile(r"(?:base64:)?(?P<value>[^\s\"'`;,<>&()\[\]]{3,400})")
_XML_VALUE = re.compile(r"(?P<value>[^\s<>]{3,200})</")


def password_at(text: str, at: int, language: str) -> Iterator[PiiSpan]:
    """A value assigned to something whose name ends in a word for password; `at` is inside that name."""
    if _CANDIDATE.match(text, at) is None:
        return
    if text.startswith("pass -p ", at):
        yield from _flag_value(text, at + len("pass -p "))
        return
    named = _name_around(text, at)
    if named is not None and _PASSWORD_NAME.search(named[0]):
        yield from _value_of(text, *named, language, "password")


def key_at(text: str, at: int, language: str) -> Iterator[PiiSpan]:
    """A random value assigned to something whose name ends in a word for a secret key; `at` is inside that name."""
    if _CANDIDATE.match(text, at) is None:
        return
    named = _name_around(text, at)
    if named is None or not _KEY_NAME.search(named[0]) or _PASSING_TOKEN.search(named[0]):
        return
    if text[named[1] - 1 : named[1]] == ":" and not named[0].startswith("_auth"):
        return  # AWS::ApiGateway::ApiKey is a type
    for span in _value_of(text, *named, language, "key"):
        if not (named[0].lower().endswith("token") and _UUID.fullmatch(text, span.start, span.end)):
            yield span


def _name_around(text: str, at: int) -> tuple[str, int, int] | None:
    left = _LEFT_OF_NAME.search(text[max(0, at - 60) : at])
    right = _RIGHT_OF_NAME.match(text, at)
    assert left is not None
    assert right is not None
    start, end = at - len(left[0]), right.end()
    return (text[start:end], start, end) if end > start else None


def _value_of(text: str, name: str, start: int, end: int, language: str, kind: Kind) -> Iterator[PiiSpan]:
    """The value behind the name that spans start:end. A key's name decides how random its value must look, a password's
    operator whether mere letters are enough."""
    operator = _OPERATOR.match(text, end)
    flag = text[max(0, start - 2) : start] == "--" or name.startswith("--")
    if operator is None:
        if (flag or language == "dockerfile") and text[end : end + 1] == " ":
            yield from _bare(text, end + 1, kind)
        return
    sign, position = operator["operator"].strip(" \t\"'"), operator.end()
    quoted_name = operator["closing"][:1] in ("'", '"')
    if quoted := _QUOTED.match(text, position):
        if sign == "," and (not quoted_name or text[start - 2 : start - 1] != "("):
            return  # the next argument of a call, the next item of a list; but put("password", "…")
        if sign == "" and kind == "password" and language not in _NO_OPERATOR:
            return
        if ("{" in quoted["value"] and "f" in quoted["prefix"].lower()) or "$" in quoted["prefix"]:
            return  # f"{password}", $"{password}"
        letters = not quoted_name and sign in ("=", ":=", "==", "===", "(")
        # `token` is a parser's word as often as a service's.
        strict = not letters if kind == "password" else name.lower().rstrip("0123456789").endswith("token")
        yield from _accepted(quoted, kind, strict)
    elif sign == ">":
        if value := _XML_VALUE.match(text, position):
            yield from _accepted(value, kind, True)
    elif sign in ("=", ":", "==") and not quoted_name:
        in_string = text[start - 1 : start] in (";", "?", "&", '"', "'") and sign == "="
        npm = name.startswith("_auth") or ":_auth" in name  # .npmrc
        attached = sign == ":" and not text[position - 1 : position].isspace()  # host:path, arn:…:secret:name
        if (language in UNQUOTED or flag or in_string or npm) and not attached:
            yield from _bare(text, position, kind)


def _accepted(found: re.Match[str], kind: Kind, strict: bool) -> Iterator[PiiSpan]:
    value = found["value"]
    if looks_like_key(value, strict=strict) if kind == "key" else looks_like_password(value, strict=strict):
        yield PiiSpan(found.start("value"), found.end("value"), kind)


def _bare(text: str, position: int, kind: Kind) -> Iterator[PiiSpan]:
    if found := _BARE.match(text, position):
        yield from _accepted(found, kind, True)


def _flag_value(text: str, position: int) -> Iterator[PiiSpan]:
    quoted = _QUOTED.match(text, position)
    if quoted and not is_placeholder(quoted["value"]):
        yield PiiSpan(quoted.start("value"), quoted.end("value"), "password")
    elif quoted is None:
        yield from _bare(text, position, "password")


# ---- what a value looks like ----

_TEMPLATE = re.compile(
    r"\$\{|\{\{|&lt;|\{%|<[\w ./-]{0,60}>?|%\(|%[sdv]\b|#\{|\$\(|^\$[A-Za-z_]\w*$|^%\w+%$|^@[\w.]+@?$|^\{[^{}]*\}$|^:\w+$|"
    r"\(\?|\[[aA0]-|\\[A-Za-z+(]|\.\*|^!\w+|^\*+$|^\.{2,}$|^-+$"
)
_REFERENCE = re.compile(
    r"https?:|\b[a-z]{2,12}://|^\.{0,2}/|/[\w-]+/|^[#.][A-Za-z][\w-]*$|^\w+\(.{0,40}\)?;?$|^[a-z_]+(?:\.[A-Za-z_]+)+$|^[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+$|"
    r"^(?:required|nullable|sometimes|string|min|max|confirmed|exclude)\b[|:]|"
    r"\.(?:txt|json|yml|yaml|xml|key|pem|file|conf|cfg|py|js|ts|php|html|bak\d?)$|"
    r"^[\w.]*\[.{1,40}\]$|^self\.|^this\."
)
_PASSWORD_ITSELF = re.compile(r"[A-Za-z_ .-]*pass(?:wor[dt]|wd|phrase|code)?s?[A-Za-z_ .-]*\d?", re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z]+(?:[_ .:-][A-Za-z]+)+\d?")
_SPECIAL = re.compile(r"[!@#$%^&*+=?~]")


MAX_PASSWORD = 100
"""Characters; what is longer is no password, whatever it is."""


def is_placeholder(value: str) -> bool:
    """Whether a value stands for a password rather than being one: empty, a template, a dummy word, one repeated sign."""
    bare = value.strip().lower()
    return (
        len(bare) < 3
        or bare in _DUMMY
        or bare.strip("-_@ ") in _DUMMY
        or len(set(bare)) <= 2
        or not value.isascii()
        or _TEMPLATE.search(value) is not None
        or _PASSWORD_ITSELF.fullmatch(value) is not None
    )


def looks_like_password(value: str, *, strict: bool) -> bool:
    """Whether a quoted or bare value is a password. `strict`: mere letters are not enough (a label, a type, a field)."""
    if (
        len(value) > MAX_PASSWORD
        or is_placeholder(value)
        or re.search(r"\s", value)
        or _REFERENCE.search(value)
        or _WORDS.fullmatch(value)
    ):
        return False
    if value.isdigit():
        return len(value) >= 4
    if value.isalpha():
        return not strict and len(value) >= 8 and value.islower()
    letters, digits = any(c.isalpha() for c in value), any(c.isdigit() for c in value)
    return letters and (digits or _SPECIAL.search(value) is not None)


_KEY_VALUE = re.compile(r"[A-Za-z0-9_\-+/=.!@#$%^&*|:~?,()]{16,400}")
_KEY_PLACEHOLDER = re.compile(
    r"your|\.\.\.|example|xxxx|changeme|change[_-]me|placeholder|insert|replace|dummy|sample|redacted|secret[_-]?key|<|>|\$\{|\{\{|\$\(",
    re.IGNORECASE,
)


def looks_like_key(value: str, *, strict: bool = True) -> bool:
    """Whether a value is a key: 16 or more characters without blanks, drawn at random by the look of it, no placeholder.
    Not `strict`: 20 letters and digits without a separator are enough (`abcdefghij0123456789`)."""
    if (
        _KEY_VALUE.fullmatch(value) is None
        or _KEY_PLACEHOLDER.search(value)
        or _TEMPLATE.search(value)
        or _REFERENCE.search(value)
    ):
        return False
    plain = len(value) >= 20 and value.isalnum() and not value.isalpha() and not value.isdigit()
    return looks_random(value) or (plain and not strict)


def looks_random(value: str) -> bool:
    """Whether letters and digits alternate as in a random string. Identifiers, paths and sentences change between them a few
    times at most; a random base-62 string of n characters does so about 0.27·n times, a hexadecimal one 0.47·n times."""
    changes = sum(a.isdigit() != b.isdigit() and a.isalnum() and b.isalnum() for a, b in pairwise(value))
    return changes >= max(3, len(value) // 10) and len(set(value)) >= 8
