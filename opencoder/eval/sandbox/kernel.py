"""Linux system calls that Python 3.11 has no name for, by ctypes. Standard library only: the zygote imports this.

Each raises OSError with the name of the call, so that a refusal says which step the machine does not permit."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
OWN_WORLD = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
"""Mounts, host name, System V IPC, processes and network of its own."""
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE = 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 38, 22, 24
SECCOMP_MODE_FILTER = 2
_NUMBERS = {
    "x86_64": {"clone": 56, "pivot_root": 155, "capset": 126, "mount_setattr": 442},
    "aarch64": {"clone": 220, "pivot_root": 41, "capset": 91, "mount_setattr": 442},
}
MACHINE = platform.machine()
# PyDLL keeps the interpreter's lock during the call: after `clone` the child must own it.
_libc = ctypes.PyDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def supported() -> bool:
    """Whether the numbers of the system calls are known here (Linux on x86-64 or 64-bit ARM)."""
    return platform.system() == "Linux" and MACHINE in _NUMBERS


def syscall(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char]) -> int:
    """A system call by name; integers are passed as long."""
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(_libc.syscall(ctypes.c_long(_NUMBERS[MACHINE][name]), *wide), name)


def clone(flags: int) -> int:
    """Like os.fork, into new namespaces: 0 in the child. The caller must have one thread."""
    return syscall("clone", flags | signal.SIGCHLD, 0, 0, 0, 0)


def unshare(flags: int) -> None:
    """Move this process into new namespaces (its children, for the pid namespace)."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    arguments = (source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), data.encode() or None)
    _check(_libc.mount(*arguments), f"mount {kind or 'bind'} on {target}")


def make_read_only(target: str) -> None:
    """`target` and every mount below it: no writing, no set-uid programs, no devices (mount_setattr, Linux 5.12)."""
    attributes = struct.pack("=QQQQ", 1 | 2 | 4, 0, 0, 0)  # MOUNT_ATTR_RDONLY | NOSUID | NODEV
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    syscall("mount_setattr", -100, target.encode(), 0x8000, buffer, len(attributes))  # AT_FDCWD, AT_RECURSIVE


def enter_root(root: str) -> None:
    """Make the mount `root` the root of the file system and drop the old one."""
    os.chdir(root)
    syscall("pivot_root", b".", b".")
    _check(_libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")


def prctl(option: int, *values: int) -> None:
    """prctl(2) with integer arguments."""
    padded = [*values, 0, 0, 0, 0][:4]
    _check(_libc.prctl(option, *map(ctypes.c_ulong, padded)), f"prctl {option}")


def drop_capabilities() -> None:
    """No capability left, none to be had again."""
    for number in range(64):
        try:
            prctl(PR_CAPBSET_DROP, number)
        except OSError:
            break  # EINVAL past the last one; EPERM where there is none to drop
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
    data = ctypes.create_string_buffer(bytes(24), 24)
    syscall("capset", header, data)


def install_seccomp(program: bytes) -> None:
    """Install a filter (8 bytes per instruction) for this process and its children; needs no_new_privs."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    code = ctypes.create_string_buffer(program, len(program))
    filled = Program(len(program) // 8, ctypes.addressof(code))
    _check(
        _libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(filled), 0, 0), "prctl seccomp"
    )


def write_maps(pid: int, inside: int, outside_uid: int, outside_gid: int, *, deny_groups: bool) -> None:
    """Give the user namespace of process `pid` one user and one group, `inside`, which are `outside_…` here."""
    folder = Path("/proc") / str(pid)
    if deny_groups:
        (folder / "setgroups").write_text("deny")
    (folder / "uid_map").write_text(f"{inside} {outside_uid} 1")
    (folder / "gid_map").write_text(f"{inside} {outside_gid} 1")
