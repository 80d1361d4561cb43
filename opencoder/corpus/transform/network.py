"""E-mail and IP addresses: from an anchor to a span, or to nothing where it is a version, a package or a reserved name."""

from __future__ import annotations

import bisect
import ipaddress
import re
from collections.abc import Iterator

from .data import words
from .spans import PiiSpan, line_of

_TLDS = words("country_domains") | words("generic_domains")
_RESERVED = words("reserved_domains")
_REMOTE_USERS = words("remote_users")
_KEPT = sorted(
    (int(net[0]), int(net[-1]))
    for net in (ipaddress.ip_network(name) for name in words("kept_networks") | words("kept_addresses"))
    if net.version == 4
)
_KEPT_V6 = [ipaddress.IPv6Network(name) for name in words("kept_networks") | words("kept_addresses") if ":" in name]
_FIRST = [first for first, _ in _KEPT]

_PROTOCOL_DOMAINS = words("protocol_domains")
_FILE_SUFFIXES = words("file_suffixes")
_LOCAL = re.compile(r"[A-Za-z0-9_%+](?:[A-Za-z0-9_.%+-]{0,63})$")
_DOMAIN = re.compile(r"[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}")
_USER_INFO = re.compile(r"://[^/\s\"'<>]{0,120}$")
_LEFT_OF_AT_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{1,63} ?$")
_RIGHT_OF_AT_WORD = re.compile(
    r" ?[A-Za-z0-9-]{1,63}(?: ?(?:\.|[(\[]dot[)\]]| dot ) ?[A-Za-z0-9-]{2,63}){1,4}", re.IGNORECASE
)
_DOT_WORD = re.compile(r" ?(?:[(\[]dot[)\]]| dot ) ?", re.IGNORECASE)


def email_at(text: str, at: int) -> Iterator[PiiSpan]:
    """The address around the `@` at offset `at`."""
    left_end = at - 1 if text[at - 1] == "\\" else at  # Perl escapes the sign in strings
    left = _LOCAL.search(text[max(0, left_end - 64) : left_end])
    right = _DOMAIN.match(text, at + 1)
    if left is None or right is None:
        return
    start, end = left_end - len(left[0]), right.end()
    domain = text[at + 1 : end].rstrip("-").lower()
    end = at + 1 + len(domain)
    addressed = (text[start - 1 : start] == "<" and text[end : end + 1] == ">") or text[
        max(0, start - 7) : start
    ] == "mailto:"
    if (
        not _public_domain(domain, any_end=addressed)
        or text[end : end + 1] in ("(", "_", "@")
        or text[end : end + 2].strip() == "="
    ):
        return  # x@w.to(device) is a product of matrices, a@b.cc = … an assignment
    local = left[0]
    if domain in _PROTOCOL_DOMAINS and "-" in local:
        return
    if local.lower() in _REMOTE_USERS and text[end : end + 1] in (":", "/", " ", '"', "'", ""):
        return
    before = text[max(0, start - 130) : start]
    if before[-1:].isalnum():
        return  # the local part goes on with a letter outside ASCII
    if _USER_INFO.search(before.rpartition("\n")[2]) or (
        before.endswith(("/", "$", "{", "}")) and not before.endswith("//")
    ):
        return  # user information of a URL (secrets.py), a package path, a template
    if local.startswith("%") and len(local) <= 2:
        return
    yield PiiSpan(start, end, "email")


def _public_domain(domain: str, *, any_end: bool = False) -> bool:
    """Whether mail could reach a host of this name; `any_end`: under a top-level domain that is not in the lists, too."""
    labels = domain.split(".")
    if len(labels) == 2 and labels[1] in _FILE_SUFFIXES:
        return False
    known = labels[-1] in _TLDS or (any_end and labels[-1].isalpha() and len(labels[-1]) > 2)
    if not known or any(label.startswith("-") or label.endswith("-") for label in labels):
        return False
    if labels[0].isdigit() and labels[1][:1].isdigit():
        return False  # package@1.2.3-next.dev
    return labels[-1] not in _RESERVED and "example" not in labels


def email_at_word(text: str, at: int, word: str) -> Iterator[PiiSpan]:
    """An address that hides its sign: `name (at) host (dot) org`."""
    left = _LEFT_OF_AT_WORD.search(text[max(0, at - 66) : at])
    right = _RIGHT_OF_AT_WORD.match(text, at + len(word))
    if left is None or right is None or left[0].endswith("  "):
        return
    if _public_domain(_DOT_WORD.sub(".", right[0]).strip().lower()):
        yield PiiSpan(at - len(left[0]), right.end(), "email")


_SPELT_LEFT = re.compile(r"([A-Za-z0-9][\w.+-]{0,63}) at ([A-Za-z0-9-]{1,63})$", re.IGNORECASE)
_SPELT_RIGHT = re.compile(r"(?: dot [A-Za-z0-9-]{2,63}){1,4}", re.IGNORECASE)


def email_at_dot(text: str, at: int) -> Iterator[PiiSpan]:
    """An address in words: `name at host dot org`; `at` is before the first `dot`."""
    left, right = _SPELT_LEFT.search(text[max(0, at - 132) : at]), _SPELT_RIGHT.match(text, at)
    if left and right and _public_domain((left[2] + _DOT_WORD.sub(".", right[0])).lower()):
        yield PiiSpan(at - len(left[0]), right.end(), "email")


# ---- IP ----

_QUAD = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}")
_V6 = re.compile(r"[0-9a-fA-F]{4}(?::[0-9a-fA-F]{0,4}){2,7}")
_VERSION = re.compile(
    r"version|\bvers?\b|release|revision|firmware|section|chapter|§|clause|figure|\btable\b|\bupgrad|\boid\b|\bdriver\b|\bbuild\b|\brfc|\bsec\.|assembly\w*\(",
    re.IGNORECASE,
)
_OID = re.compile(r"\boid\b|_oid\b|object_?identifier", re.IGNORECASE)
_COMPARED = re.compile(r"[=<>~!^]= ?$|[<>~^] ?$")
_NETWORK = re.compile(
    r"(?:\b|_)ip(?:v4)?s?(?:\b|_)|addr|\burl|proxy|nameserver|\bntp|endpoint|cidr|subnet|\ballow|\bdeny|\bnode\b|cluster|"
    r"\bhosts?\b|host(?:name)?\b|server|\bssh\b|\bscp\b|\bping\b|\bdns\b|\bclient|remote|gateway|\bpeer|connect|listen|\bbind|\bport\b",
    re.IGNORECASE,
)
_PORT = re.compile(r"[\"']?:\d{2,5}\b|[\"'],? *\d{2,5}\)|/(?:8|16|24|2[5-9]|3[0-2])\b")
_REMOTE_COMMAND = re.compile(r"\b(?:ssh|scp|sftp|rsync|mosh|ftp|mysql|ping|telnet|vnc|rdp)\b|://")


def _leads_nowhere(numbers: list[int]) -> bool:
    """Whether an IPv4 address is in one of the networks of pii.yaml that are kept (they do not overlap)."""
    address = numbers[0] << 24 | numbers[1] << 16 | numbers[2] << 8 | numbers[3]
    place = bisect.bisect_right(_FIRST, address) - 1
    return place >= 0 and address <= _KEPT[place][1]


def _is_network(left: str, right: str) -> bool:
    """Whether an address is likely between these two parts of its line: a URL, a port, a word of networks close before."""
    if right.startswith(" - - ["):
        return True  # the log of a web server
    return left.endswith(("://", "@")) or _PORT.match(right) is not None or _NETWORK.search(left[-40:]) is not None


def ipv4_at(text: str, start: int) -> Iterator[PiiSpan]:
    """The address whose first digit is at `start`."""
    found = _QUAD.match(text, start)
    assert found is not None
    end = found.end()
    after, before = text[end : end + 2], text[max(0, start - 2) : start]
    if after[:1].isalnum() or after[:1] == "_" or (after[:1] in (".", "-", "+") and after[1:2].isalnum()):
        return
    parts = found[0].split(".")
    if any(int(p) > 255 or (p[0] == "0" and len(p) > 1) for p in parts):
        return
    numbers = [int(p) for p in parts]
    # x.y.0.0 names no host; all below 16 or all equal is made up, or a version.
    if numbers[2:] == [0, 0] or max(numbers) < 16 or len(set(numbers)) == 1 or _leads_nowhere(numbers):
        return
    left, right = line_of(text, start, end)
    in_network = _is_network(left, right)
    # First below 32: a section, an object identifier, a version, unless it stands in the company of hosts and ports; one in
    # eight real addresses has such a start.
    if _OID.search(left) or (numbers[0] < 32 and not in_network):
        return
    if before[-1:] in ("-", "~", "^") or _COMPARED.search(left) or (before[-1:] == "/" and before[:1].isalnum()):
        return  # tool-1.2.3.4, >= 1.2.3.4, agent/1.2.3.4
    if before[-1:] == "@" and after[:1] != ":" and _REMOTE_COMMAND.search(left) is None:
        return  # package@1.2.3.4
    if (_VERSION.search(left) or _VERSION.search(right)) and not in_network:
        return
    yield PiiSpan(start, end, "ip_address")


def ipv6_at(text: str, start: int) -> Iterator[PiiSpan]:
    """The global address whose first digit is at `start`."""
    found = _V6.match(text, start)
    if found is None:
        return
    given = found[0]
    if given.endswith(":") and not given.endswith("::"):
        given = given[:-1]
    end = start + len(given)
    if given.endswith("::") and given.count(":") <= 3:
        return  # the prefix of a network, shorter than a site's
    if text[end : end + 1].isalnum() or text[end : end + 1] == "_":
        return
    try:
        address = ipaddress.IPv6Address(given)
    except ipaddress.AddressValueError:
        return  # a time, a hash in groups
    if not any(address in network for network in _KEPT_V6):
        yield PiiSpan(start, end, "ip_address")
