"""Git repositories: the files of the HEAD commit, straight from the object store, without a checkout.

Objects come from `git cat-file --batch`: git itself knows every form of store (loose, packs of all versions, alternates,
SHA-256), unpacks at C speed and is where repositories are; the pure-Python readers are an order slower and lag behind the
formats. The walk through the trees is ours, so that a tree or file that is corrupt is reported by its id and all others
are read. Nothing that a repository configures is run: no filters, hooks, pagers or helpers, and no fetching of what is
missing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from opencoder.corpus_config import CorpusConfig

from .items import Item, repository_facts
from .limits import LimitError, Meter, judge_stream, member_record
from .record import Record, judge_link

TREE, LINK, SUBMODULE = "40000", "120000", "160000"
LINK_BYTES = 4096
TREE_BYTES = 64 << 20
"""A tree object larger than this (about a million entries in one folder) is not read."""
FAR = 16 << 20
"""Of an object that nobody wants, more bytes than this are not read to come to the next: git is started again."""


class Entry(NamedTuple):
    """One line of a tree."""

    mode: str
    path: str
    oid: str


class ObjectError(Exception):
    """An object cannot be read; the text begins with its id."""


class Missing(ObjectError):
    """Git says that it has no such object, or none that it can open; it goes on with the next."""


def read_git(item: Item, config: CorpusConfig) -> Iterator[Record]:
    """A record for each file, link and submodule at HEAD (of those of the item's part)."""
    whole = Record(item.path, item.source)
    if shutil.which("git") is None:
        yield whole.fail(
            "the command `git` is needed to read a repository: install git, or set read.git=false to read the files that "
            "lie there"
        )
        return
    meter = Meter(config.read.archive, lambda: max(item.size, repository_facts(item.file)[0]))
    with tempfile.TemporaryDirectory() as home, Store(item.file, home) as store:
        try:
            tree, time = _head(store)
            entries, failures = _walk(tree, store, meter)
        except (ObjectError, LimitError) as error:
            hint = "; read.git=false reads the files that lie there" if os.path.basename(item.file) == ".git" else ""
            yield whole.fail(f"{error}{hint}")
            return
        if item.part == 0:
            for path, reason in failures:
                yield _record(item, path, time, config).fail(reason)
        mine = entries[len(entries) * item.part // item.parts : len(entries) * (item.part + 1) // item.parts]
        try:
            yield from _files(item, mine, time, store, meter, config)
        except LimitError as error:
            yield whole.fail(f"given up: {error}")


def _record(item: Item, path: str, time: int | None, config: CorpusConfig) -> Record:
    record = member_record(item, path, config)
    record.commit_time = time
    record.repo = item.path
    return record


def _files(
    item: Item, entries: list[Entry], time: int | None, store: Store, meter: Meter, config: CorpusConfig
) -> Iterator[Record]:
    blobs = [entry for entry in entries if entry.mode != SUBMODULE]
    answers = store.objects([entry.oid for entry in blobs])
    for entry in entries:
        record = _record(item, entry.path, time, config)
        record.blob_id = entry.oid
        if entry.mode == SUBMODULE:
            if record.status != "failed":
                record.drop("read", "submodule", None, f"commit {entry.oid} of another repository; not followed")
            yield record
            continue
        answer = next(answers)
        try:
            yield _judge(record, entry, answer, meter, config)
        except ObjectError as error:
            yield record.fail(str(error))


def _judge(record: Record, entry: Entry, answer: Body | ObjectError, meter: Meter, config: CorpusConfig) -> Record:
    if isinstance(answer, ObjectError):
        raise answer
    if answer.kind != "blob":
        raise ObjectError(f"object {entry.oid} is a {answer.kind}, not a blob")
    if record.status == "failed":  # an unsafe name
        return record
    if entry.mode == LINK:
        target = answer.read(min(answer.size, LINK_BYTES))
        if answer.size <= LINK_BYTES:
            answer.verify()
        return judge_link(record, target.decode("utf-8", "surrogateescape"))
    if (refusal := meter.refusal(answer.size)) is not None:
        return record.fail(refusal)

    def take(size: int) -> bytes:
        meter.add(size)
        return answer.read(size)

    judge_stream(record, answer.size, take, config)
    answer.verify()
    return record


# ---- commits and trees ----


def _head(store: Store) -> tuple[str, int | None]:
    """(tree, committer's time) of the HEAD commit."""
    try:
        oid, data = store.whole("HEAD^{commit}", "commit")
    except ObjectError as error:
        raise ObjectError(f"HEAD names no commit that can be read: {error}") from None
    head = data.split(b"\n\n", 1)[0]
    tree = re.search(rb"^tree ([0-9a-f]{40,64})$", head, re.M)
    time = re.search(rb"^committer .*> (-?\d{1,18}) [+-]\d{4}$", head, re.M)
    if tree is None:
        raise ObjectError(f"commit {oid} names no tree")
    return tree[1].decode(), int(time[1]) if time else None


def _walk(root: str, store: Store, meter: Meter) -> tuple[list[Entry], list[tuple[str, str]]]:
    """(everything but folders in git's order, (path, reason) of each folder that cannot be read)."""
    entries: list[Entry] = []
    failures: list[tuple[str, str]] = []
    waiting = [Entry(TREE, "", root)]
    while waiting:
        entry = waiting.pop()
        if entry.mode != TREE:
            entries.append(entry)
            continue
        try:
            found = list(_lines(store.whole(entry.oid, "tree")[1], entry))
        except ObjectError as error:
            failures.append((entry.path.rstrip("/") or ".", f"the files of this folder are not known: {error}"))
            continue
        for _ in found:  # counted before they are kept: equal trees inside each other can stand for any number of files
            meter.member()
        waiting.extend(reversed(found))
    return entries, failures


def _lines(data: bytes, tree: Entry) -> Iterator[Entry]:
    """The entries of a tree object: MODE, blank, name, NUL, binary id."""
    width = len(tree.oid) // 2
    at = 0
    while at < len(data):
        end = data.find(b"\0", at)
        mode, blank, name = data[at:end].partition(b" ")
        if end < 0 or not blank or not name or end + 1 + width > len(data):
            raise ObjectError(f"tree {tree.oid} is damaged")
        kind = mode.decode("latin-1").lstrip("0")
        path = tree.path + name.decode("utf-8", "surrogateescape")
        yield Entry(kind, path + "/" if kind == TREE else path, data[end + 1 : end + 1 + width].hex())
        at = end + 1 + width


# ---- the object store ----


class Store:
    """The objects of a repository, through `git cat-file --batch`."""

    def __init__(self, git_dir: str, home: str) -> None:
        self._git_dir = git_dir
        self._home = home
        self._errors: IO[bytes] = tempfile.TemporaryFile(dir=home)  # noqa: SIM115  closed in __exit__
        self._process: subprocess.Popen[bytes] | None = None
        # A configuration of our own, so that neither the user's nor the system's plays a part. `safe.directory` lets
        # repositories of other owners be read: git refuses them because commands that they configure might be run, and
        # cat-file runs none but the fetching that is forbidden here.
        Path(home, ".gitconfig").write_text("[safe]\n\tdirectory = *\n[core]\n\tbigFileThreshold = 16m\n")
        self._env = {
            "PATH": os.environ.get("PATH", os.defpath), "HOME": home, "LC_ALL": "C", "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_NO_REPLACE_OBJECTS": "1", "GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none",
            "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0",
        }  # fmt: skip

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop(self._process)
        self._errors.close()

    def whole(self, name: str, kind: str) -> tuple[str, bytes]:
        """(id, content) of a commit or tree, verified. Raises ObjectError.

        Not for blobs: of a blob whose header states too large a size git gives fewer bytes than it announces and goes on
        waiting for the next name."""
        if self._process is None or self._process.poll() is not None:
            self._stop(self._process)
            self._process = self._start(subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{name}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the answer, which does not come, will say so
        try:
            body = self._answer(self._process, name)
            if body.kind != kind or body.size > TREE_BYTES:
                raise ObjectError(f"object {name} is a {body.kind} of {body.size:,} bytes, not a {kind}")
            data = body.read(body.size)
            body.verify()
        except Missing:
            raise
        except ObjectError:
            self._stop(self._process)
            self._process = None
            raise
        return body.oid, data

    def objects(self, oids: list[str]) -> Iterator[Body | ObjectError]:
        """The objects of these ids in order. A body can be read until the next is asked for.

        The ids come from a file, so git ends after the last, and reading an answer that is too short ends too."""
        done = 0
        while done < len(oids):
            with tempfile.TemporaryFile(dir=self._home) as names:
                names.write("".join(f"{oid}\n" for oid in oids[done:]).encode())
                names.seek(0)
                process = self._start(names)
            try:
                sound = True
                while sound and done < len(oids):
                    try:
                        body = self._answer(process, oids[done])
                        yield body
                        sound = body.finish()
                    except Missing as error:
                        yield error
                    except ObjectError as error:
                        sound = False
                        yield error
                    done += 1
            finally:
                self._stop(process)

    def _answer(self, process: subprocess.Popen[bytes], name: str) -> Body:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        if len(words) == 3 and words[2].isdigit():
            return Body(process.stdout, words[0].decode(), words[1].decode(), int(words[2]))
        if len(words) == 2 and words[1] == b"missing":
            raise Missing(f"object {name} is missing or corrupt{self._said()}")
        process.kill()
        process.wait()
        raise ObjectError(f"object {name} is corrupt{self._said()}")

    def _start(self, names: IO[bytes] | int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["git", f"--git-dir={self._git_dir}", "cat-file", "--batch"],
            env=self._env, stdin=names, stdout=subprocess.PIPE, stderr=self._errors, bufsize=1 << 18,
        )  # fmt: skip

    def _stop(self, process: subprocess.Popen[bytes] | None) -> None:
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stdin):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()

    def _said(self) -> str:
        """What git has written to its error stream since last asked."""
        self._errors.seek(0)
        text = " ".join(self._errors.read(4096).decode("utf-8", "replace").split())
        self._errors.seek(0)
        self._errors.truncate()
        return f": {text[:300]}" if text else ""


class Body:
    """An object in the pipe; its bytes are checked against its id."""

    def __init__(self, pipe: IO[bytes], oid: str, kind: str, size: int) -> None:
        self._pipe, self.oid, self.kind, self.size = pipe, oid, kind, size
        self._left = size
        name = "sha1" if len(oid) == 40 else "sha256"
        self._digest = hashlib.new(name, f"{kind} {size}\0".encode(), usedforsecurity=False)
        self._ended = False

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises ObjectError if git gives up in the middle."""
        data = self._pipe.read(size)
        self._left -= len(data)
        self._digest.update(data)
        if len(data) != size:
            raise ObjectError(f"object {self.oid} is corrupt: {self._left:,} of its {self.size:,} bytes are missing")
        return data

    def verify(self) -> None:
        """Raises ObjectError if the bytes read are not the whole of what the id says."""
        if not self._ended:
            self._ended = True
            self._pipe.read(1)  # a newline follows
        if self._left or self._digest.hexdigest() != self.oid:
            raise ObjectError(f"object {self.oid} is corrupt: its content does not belong to its id")

    def finish(self) -> bool:
        """Pass over what has not been read. False if what follows in the pipe cannot be trusted, or is too far off."""
        try:
            while self._left:
                if self._left > FAR:
                    return False
                self.read(min(self._left, 1 << 20))
            self.verify()
        except ObjectError:
            return False
        return True
