"""Opening what an input names: a local path, or a URL that fsspec has a driver for."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import Any, BinaryIO, NamedTuple

import fsspec

from opencoder.errors import DataError


class Remote(NamedTuple):
    """One object behind a URL."""

    url: str
    path: str
    """Relative to the URL that was listed; '' for the object itself."""
    size: int
    version: int
    """63 bits of a hash of what the store says of it (ETag, times…); differs when the object is replaced."""


def is_url(name: str) -> bool:
    """Whether an input is a URL; `file://` counts as one."""
    return "://" in name


def local_path(name: str) -> str:
    """A `file://` URL as a path; anything else as it is."""
    if name.startswith("file://"):
        path = name.removeprefix("file://")
        if not path.startswith("/"):
            raise DataError(f"--input {name}: write file:///absolute/path")
        return path
    return name


def open_binary(file: str) -> BinaryIO:
    """Open a path or URL for reading bytes. Raises OSError, also for what is no regular file."""
    if is_url(file):
        system, path = fsspec.core.url_to_fs(file)  # not fsspec.open, which takes `*` and `[` in a name for patterns
        opened: BinaryIO = system.open(path, "rb")
        return opened
    fd = open_regular(file)
    return open(fd, "rb")


class NotRegularError(OSError):
    """A folder, pipe, device or socket."""


def open_regular(file: str) -> int:
    """The descriptor of a regular file, opened for reading. Raises OSError, NotRegularError among them."""
    # Without O_NONBLOCK, opening a named pipe would wait for a writer.
    fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotRegularError("not a regular file")
    return fd


def list_remote(url: str) -> list[Remote]:
    """The objects behind a URL, in order. Raises DataError for an unknown protocol, a missing driver or an empty place."""
    if "::" in url:
        raise DataError(
            f"--input {url}: chained URLs are not read, because they pass by the limits on archives: name one"
        )
    try:
        system, root = fsspec.core.url_to_fs(url)
        found: dict[str, dict[str, Any]]
        # Asked for first: where there are no folders (http), listing what is a file gives nothing.
        found = {root: system.info(root)} if system.isfile(root) else system.find(root, detail=True)
    except ImportError as error:
        raise DataError(f"--input {url}: {error}") from error
    except (ValueError, OSError) as error:
        raise DataError(f"--input {url} cannot be listed: {error}") from error
    if not found:
        raise DataError(f"--input {url} does not exist or is empty")
    base = root.rstrip("/")
    remotes = []
    for name, facts in sorted(found.items()):
        relative = "" if name == base else name.removeprefix(base).lstrip("/")
        known = sorted((k, str(v)) for k, v in facts.items() if k != "name" and isinstance(v, (str, int, float)))
        known += [(k, str(facts[k])) for k in ("created", "mtime", "LastModified", "last_modified") if k in facts]
        version = int.from_bytes(hashlib.sha256(repr(known).encode()).digest()[:8], "big") >> 1
        remotes.append(Remote(system.unstrip_protocol(name), relative, int(facts.get("size") or 0), version))
    return remotes


def base_name(url: str) -> str:
    """The last part of a URL's path."""
    return os.path.basename(url.rstrip("/")) or url.split("://", 1)[0]
