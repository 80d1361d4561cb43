"""What a task is: a pure function by its name, parameters, input files and code, and the manifest that says it is done.

A task named `read/000017` with outputs `parquet` and `keys.npy` owns FOLDER/read/000017.parquet, FOLDER/read/000017.keys.npy
and, written last, the manifest FOLDER/read/000017.task.json. The manifest holds the task's key, the SHA-256 of everything
that the result may depend on, and the size and SHA-256 of each output."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal, cast

from opencoder import __version__
from opencoder.errors import DataError, Failure
from opencoder.files import sha256_of

FORMAT = 1
"""Version of manifests and keys; another number makes every task run again."""
MANIFEST = "task.json"
FAILED = "failed.json"
_NAME = re.compile(r"[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*")
_SUFFIX = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_CODE_SUFFIXES = (".py", ".so", ".json", ".yaml", ".txt", ".j2")


class DamagedFile(Failure):
    """A file that is not what its manifest says. `path` names it."""

    def __init__(self, path: str | Path, why: str) -> None:
        super().__init__(path, why)
        self.path = str(path)

    def __str__(self) -> str:
        return f"{self.args[0]} is damaged ({self.args[1]}): remove it and start again, and it is made anew"


@dataclass(frozen=True)
class Input:
    """One file that a task reads."""

    path: str
    """Relative to the folder (an output of another task, as a rule) or absolute (a source)."""
    by: Literal["content", "stat"] = "content"
    """What stands for the file in the task's key. content: its SHA-256 (of an output of another task, the one in the
    manifest). stat: size and modification time, so that a source of which nothing changed is not read again."""
    verify: bool = True
    """content: hash the file before the function is called. stat: hash it afterwards, for a later run with `verify`. False
    for files of which a task reads only parts that it checks itself."""


@dataclass(frozen=True)
class Task:
    """A call `function(inputs, outputs, **parameters)`, where inputs and outputs are lists of pathlib.Path.

    The function must be pure: the bytes of its outputs depend on the inputs' paths and content and on the parameters
    alone. The output paths it is given lie in a scratch folder of its own, which it may use for other files too. It may
    return something small that JSON can hold; it is kept in the manifest under `result`."""

    name: str
    """Path without suffix below the folder: letters, digits, `_`, `-` and `/`."""
    function: str
    """`module:function`, importable wherever the task runs."""
    outputs: tuple[str, ...]
    """Suffixes of the files it writes, at least one, without the leading dot."""
    inputs: tuple[Input, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """What JSON can hold, no more: the function gets what comes back from JSON."""
    memory: int | None = None
    """Peak resident bytes that the author of the function promises; asked of Ray, and compared with what was measured."""
    code: str | None = None
    """Version of the code; None: worked out from the sources of the function's package, see `code_version`."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"task name {self.name!r}: allowed are letters, digits, _ and -, in parts joined by /")
        if not _FUNCTION.fullmatch(self.function):
            raise ValueError(f"task {self.name}: function {self.function!r} must be written module:function")
        if not self.outputs or len(set(self.outputs)) < len(self.outputs):
            raise ValueError(f"task {self.name}: outputs {self.outputs} must be at least one suffix, each given once")
        for suffix in self.outputs:
            if not _SUFFIX.fullmatch(suffix) or suffix in (MANIFEST, FAILED):
                raise ValueError(f"task {self.name}: {suffix!r} cannot be the suffix of an output")
        try:
            plain = json.loads(json.dumps(dict(self.parameters), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"task {self.name}: parameters must be plain JSON: {error}") from error
        if plain != self.parameters:
            raise ValueError(
                f"task {self.name}: parameters change on the way through JSON (a tuple, or a key not a string)"
            )

    def output_paths(self) -> list[str]:
        """Its outputs, relative to the folder."""
        return [f"{self.name}.{suffix}" for suffix in self.outputs]

    def to_json(self) -> dict[str, Any]:
        """A plain mapping; `from_json` makes the task again."""
        return asdict(self)

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> Task:
        """The task that `to_json` was called on."""
        inputs = tuple(Input(**one) for one in plain["inputs"])
        return Task(**{**plain, "inputs": inputs, "outputs": tuple(plain["outputs"])})


# ---- key ----


def resolve(function: str) -> Callable[..., Any]:
    """The function named `module:function`. Raises ValueError with the reason if there is none."""
    module, _, name = function.partition(":")
    found = getattr(importlib.import_module(module), name, None)
    if not callable(found):
        raise ValueError(f"module {module} has no function {name}")
    return cast(Callable[..., Any], found)


@cache
def code_version(function: str) -> str:
    """Version of the code behind a function: SHA-256 over the source and data files of the package its module lies in,
    for ours also over those directly in opencoder/ (the compiled engine among them), after the version of opencoder.

    Versions of Python and of libraries are not part of it: who changes them and wants everything made anew says so by
    another folder."""
    module = function.partition(":")[0]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"task function {function}: there is no module {module}")
    files = [Path(spec.origin)]
    if "." in module:
        files = [p for p in Path(spec.origin).parent.rglob("*") if p.suffix in _CODE_SUFFIXES]
    if module.startswith("opencoder."):
        ours = Path(__file__).parents[2]
        files += [p for p in ours.iterdir() if p.suffix in _CODE_SUFFIXES and not p.name.startswith("_ops.")]
    digest = hashlib.sha256()
    for file in sorted({f for f in files if f.is_file()}):
        digest.update(f"{file.name}\0{sha256_of(file)}\n".encode())
    return f"{__version__}+{digest.hexdigest()[:16]}"


def task_key(task: Task, digests: Sequence[str], code: str) -> str:
    """SHA-256 (hex) of all that the outputs may depend on."""
    facts = {
        "format": FORMAT,
        "function": task.function,
        "code": code,
        "parameters": dict(task.parameters),
        "inputs": [[one.path, digest] for one, digest in zip(task.inputs, digests, strict=True)],
        "outputs": list(task.outputs),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def stat_digest(path: str | Path) -> str:
    """What stands for a file in a key by="stat"."""
    status = os.stat(path)
    return f"stat:{status.st_size}:{status.st_mtime_ns}"


# ---- manifest ----


def manifest_path(folder: Path, name: str) -> Path:
    """Where a task's manifest lies."""
    return folder / f"{name}.{MANIFEST}"


def failure_path(folder: Path, name: str) -> Path:
    """Where a task that failed says so; gone once it is started again."""
    return folder / f"{name}.{FAILED}"


def read_manifest(folder: Path, name: str) -> dict[str, Any] | None:
    """A task's manifest, or None if there is none that can be read."""
    try:
        found = json.loads(manifest_path(folder, name).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def write_manifest(folder: Path, task: Task, facts: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Write the manifest, the last step of a task. Everything measured stands under `measured`; the rest is repeatable."""
    manifest = {"format": FORMAT, "name": task.name, "function": task.function, **facts}
    temporary = scratch / MANIFEST
    temporary.write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
    os.replace(temporary, manifest_path(folder, task.name))
    return manifest


@cache
def boot_id() -> str:
    """Names the time since this machine was started; '' where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def is_done(folder: Path, task: Task, key: str, *, verify: bool = False) -> dict[str, Any] | None:
    """The manifest of a task that need not run: same key, and every output there with size and modification time as
    recorded; with `verify`, or if this machine was started anew since, also with the recorded SHA-256. `verify` compares
    the content of inputs known by size and time, too. Else None."""
    manifest = read_manifest(folder, task.name)
    if manifest is None or manifest["key"] != key:
        return None
    hashed = [one for one in manifest["inputs"] if "sha256" in one] if verify else []
    if any(sha256_of(folder / one["path"]) != one["sha256"] for one in hashed):
        return None
    if manifest["measured"]["host"] == socket.gethostname() and manifest["measured"]["boot"] != boot_id():
        verify = True
    for path in task.output_paths():
        try:
            status = os.stat(folder / path)
        except OSError:
            return None
        recorded = manifest["outputs"][path]
        if status.st_size != recorded["size"] or status.st_mtime_ns != manifest["measured"]["mtime_ns"][path]:
            return None
        if verify and sha256_of(folder / path) != recorded["sha256"]:
            return None
    return manifest


def recorded_output(path: str | Path) -> dict[str, Any]:
    """{size, sha256} of an output of a task, from the manifest beside it. Raises DamagedFile where there is none."""
    path = Path(path)
    manifest = read_manifest(path.parent, path.name.partition(".")[0])
    found = None
    if manifest is not None:
        found = next((facts for name, facts in manifest["outputs"].items() if Path(name).name == path.name), None)
    if found is None:
        raise DamagedFile(path, "no manifest beside it names it")
    return cast(dict[str, Any], found)


def verified_path(path: str | Path) -> Path:
    """`path`, an output of a task, after its size and SHA-256 were compared with its manifest. Raises DamagedFile."""
    recorded = recorded_output(path)
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise DamagedFile(path, "it is missing") from None
    if size != recorded["size"]:
        raise DamagedFile(path, f"{size} bytes, {recorded['size']} when it was written")
    if (found := sha256_of(path)) != recorded["sha256"]:
        raise DamagedFile(path, f"SHA-256 {found[:16]}…, {recorded['sha256'][:16]}… when it was written")
    return Path(path)


def open_verified(path: str | Path) -> IO[bytes]:
    """An output of a task opened for reading bytes, after `verified_path`. Tasks need not call it for their inputs: the
    engine has verified those."""
    return open(verified_path(path), "rb")


def check_names(tasks: Sequence[Task]) -> None:
    """Raise DataError if two tasks have one name, or one writes what belongs to another."""
    owners: dict[str, str] = {}
    for task in tasks:
        for path in [f"{task.name}.{MANIFEST}", *task.output_paths()]:
            if path in owners:
                raise DataError(f"two tasks write {path}: give each task a name of its own")
            owners[path] = task.name
