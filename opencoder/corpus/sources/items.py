"""From inputs to items: every file, container and repository that is to be read, in a fixed order."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from opencoder.corpus_config import CorpusConfig, ReadConfig
from opencoder.errors import DataError

from .. import json_lines
from .opening import base_name, is_url, list_remote, local_path
from .record import printable

Kind = Literal["file", "jsonl", "parquet", "tar", "zip", "git", "unreadable"]

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "jsonl": json_lines.SUFFIXES,
    "parquet": (".parquet",),
    "tar": (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tar.zst", ".tzst", ".crate"),
    "zip": (".zip", ".whl"),
}
SPLIT_KINDS = ("jsonl", "parquet", "zip", "git")


@dataclass(frozen=True, slots=True)
class Item:
    """One unit of reading: a file, or a container or a part of one."""

    file: str
    """Path or URL to open."""
    path: str
    """Relative to its input, or the file's name; valid Unicode."""
    source: str
    """Name of the input."""
    container: bool
    """Whether it holds documents of its own."""
    size: int
    """Bytes to read; of a part, its share."""
    mtime_ns: int
    """Modification time. Of a repository or a remote object: 63 bits of a hash of its version."""
    kind: Kind = "file"
    part: int = 0
    parts: int = 1
    """The item is number `part` of `parts` consecutive parts of its file."""
    prefix: str = ""
    """What stands before the names of members: '' where the container is itself the input."""
    problem: str | None = None
    """Why it cannot be read, for kind `unreadable`."""

    def plain(self) -> dict[str, object]:
        """What `Item(**plain)` needs: fields that have their default are left out, for there may be millions of items."""
        return {name: value for name in _FIELDS if (value := getattr(self, name)) != _DEFAULTS.get(name, _NONE)}

    @property
    def packed(self) -> bool:
        """Whether it holds more text than its size says."""
        return self.kind in ("tar", "zip", "git") or (self.kind == "jsonl" and not self.file.endswith(".jsonl"))

    def repo_of(self, path: str, read: ReadConfig) -> str | None:
        """The repository of a path by `read.repo_depth`."""
        folders = path.split("/")[:-1]
        return "/".join(folders[: read.repo_depth]) if 0 < read.repo_depth <= len(folders) else None


_NONE = object()
_FIELDS = [field.name for field in fields(Item)]
_DEFAULTS = {field.name: field.default for field in fields(Item) if field.default is not MISSING}


def find_items(inputs: list[str], config: CorpusConfig) -> list[Item]:
    """Every file, container and repository of the inputs, sorted by source and path, large ones in parts.

    Raises DataError for an input that does not exist. Links to files are followed, links to folders are not, so no loop
    can arise. A folder that cannot be listed is an item of kind `unreadable`."""
    items: list[Item] = []
    for name in sorted(set(inputs)):
        if is_url(name) and not name.startswith("file://"):
            items += _remote(name, config.read)
        else:
            items += _local(local_path(name), name, config.read)
    items.sort(key=lambda item: (item.source, item.path, item.file))
    return [part for item in items for part in _parts(item, config.read.split_bytes)]


def kind_of(name: str) -> Kind:
    """What a file is by its suffix: a container or a plain file."""
    lower = name.lower()
    return next((kind for kind, suffixes in SUFFIXES.items() if lower.endswith(suffixes)), "file")


def _local(name: str, given: str, read: ReadConfig) -> Iterator[Item]:
    root = Path(name)
    if root.is_dir():
        source = printable(root.resolve().name)
        try:
            names = set(os.listdir(name))
        except OSError as error:
            raise DataError(f"--input {given} cannot be listed: {error.strerror or error}") from error
        git_dir = _git_dir(name, names) if read.git else None
        if git_dir is not None:
            yield _repository(git_dir, source, source, "")
        else:
            yield from _walk(name, "", source, read)
    elif os.path.lexists(root):
        file_name = printable(root.name)
        kind = kind_of(root.name)
        yield _item(name, file_name, file_name, kind, kind != "file", "")
    else:
        raise DataError(f"--input {given} does not exist")


def _walk(folder: str, relative: str, source: str, read: ReadConfig) -> Iterator[Item]:
    """The items below a folder, without recursion, so that no depth of folders is too much."""
    waiting = [(folder, relative)]
    while waiting:
        folder, relative = waiting.pop()
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            shown = printable(relative.rstrip("/"))
            problem = f"the folder cannot be listed: {error.strerror or error}"
            yield Item(folder, shown, source, False, 0, 0, "unreadable", problem=problem)
            continue
        git_dir = _git_dir(folder, {entry.name for entry in entries}) if read.git and relative else None
        if git_dir is not None:
            path = printable(relative.rstrip("/"))
            yield _repository(git_dir, path, source, f"{path}/")
            continue
        for entry in entries:
            path = relative + entry.name
            if entry.name == ".git":
                continue  # git's own data, or the name of the place where it lies
            if entry.is_dir(follow_symlinks=False):
                waiting.append((entry.path, f"{path}/"))
            elif not (entry.is_symlink() and os.path.isdir(entry.path)):  # False too for a loop of links
                kind = kind_of(entry.name) if read.containers else "file"
                shown = printable(path)
                yield _item(entry.path, shown, source, kind, kind != "file", f"{shown}/")


def _item(file: str, path: str, source: str, kind: Kind, container: bool, prefix: str) -> Item:
    try:
        status = os.stat(file)
        size, mtime = status.st_size, status.st_mtime_ns
    except OSError:  # a broken link or a loop of links: reading it will say so
        size, mtime = 0, 0
    return Item(file, path, source, container, size, mtime, kind, prefix=prefix if container else "")


def _remote(url: str, read: ReadConfig) -> Iterator[Item]:
    source = printable(base_name(url))
    for found in list_remote(url):
        path = printable(found.path or source)
        itself = not found.path
        kind = kind_of(found.url) if itself or read.containers else "file"
        prefix = "" if itself or kind == "file" else f"{path}/"
        yield Item(found.url, path, source, kind != "file", found.size, found.version, kind, prefix=prefix)


def _parts(item: Item, split_bytes: int) -> list[Item]:
    count = -(-item.size // split_bytes)
    whole = item.kind == "jsonl" and item.packed
    if item.kind not in SPLIT_KINDS or whole or count < 2:
        return [item]
    return [replace(item, part=n, parts=count, size=item.size // count) for n in range(count)]


# ---- repositories ----


def _git_dir(folder: str, names: set[str]) -> str | None:
    """Where a folder's git data lies, if it is a repository: working tree or bare. An empty `.git` or one that points
    nowhere, as unpacked packages have them, makes none."""
    if ".git" in names:
        git_dir = os.path.join(folder, ".git")
        common = _common_dir(_follow_gitfile(git_dir))
        return git_dir if os.path.isdir(os.path.join(common, "objects")) else None
    if {"HEAD", "objects"} <= names and names & {"refs", "packed-refs", "reftable"}:
        return folder
    return None


def _repository(git_dir: str, path: str, source: str, prefix: str) -> Item:
    path = path.removesuffix(".git") or path
    prefix = f"{path}/" if prefix else ""
    size, version = repository_facts(git_dir)
    return Item(git_dir, path, source, True, size, version, "git", prefix=prefix)


def repository_facts(git_dir: str) -> tuple[int, int]:
    """(bytes of packs, hash of what HEAD points to), from plain files: a process for each of many repositories would take
    milliseconds each. The hash may differ for an equal HEAD (references packed anew), never the other way."""
    git_dir = _follow_gitfile(git_dir)
    common = _common_dir(git_dir)
    head = _text(os.path.join(git_dir, "HEAD")) or ""
    facts: list[object] = [head]
    if found := re.match(r"ref: (\S+)", head):
        facts.append(_text(os.path.join(common, found[1])))
    for name in ("packed-refs", "reftable/tables.list"):
        facts.append(_stamp(os.path.join(common, name)))
    size = 0
    packs = os.path.join(common, "objects", "pack")
    if os.path.isdir(packs):
        size = sum(entry.stat().st_size for entry in os.scandir(packs) if entry.name.endswith(".pack"))
    return size, int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:8], "big") >> 1


def _follow_gitfile(git_dir: str) -> str:
    """`.git` may be a file that names the place (submodules, further working trees)."""
    text = _text(git_dir) if os.path.isfile(git_dir) else None
    if text is not None and text.startswith("gitdir:"):
        return os.path.join(os.path.dirname(git_dir), text.removeprefix("gitdir:").strip())
    return git_dir


def _common_dir(git_dir: str) -> str:
    """Where objects and references lie: elsewhere for a further working tree of a repository."""
    text = _text(os.path.join(git_dir, "commondir"))
    return git_dir if text is None else os.path.join(git_dir, text.strip())


def _text(file: str) -> str | None:
    try:
        with open(file, encoding="utf-8", errors="replace") as opened:
            return opened.read(4096)
    except OSError:
        return None


def _stamp(file: str) -> tuple[int, int] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
