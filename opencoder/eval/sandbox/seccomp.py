"""The seccomp filter: system calls that a program under test has no use for and that reach beyond its namespaces.

A denied call fails with EPERM (clone3 with ENOSYS, for which libc has another way), so that an honest program gets an
ordinary error. Filters are classic BPF, assembled here: 8 bytes per instruction, no library needed."""

from __future__ import annotations

import errno
import struct

LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
KILL, ALLOW, ERROR = 0x80000000, 0x7FFF0000, 0x00050000
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000
"""Numbers from here on are those of the x32 interface, a second way to each call."""
NEW_NAMESPACES = 0x7E020080
"""All CLONE_NEW… flags."""
DENIED: dict[str, tuple[int, int]] = {
    # name: number on x86-64, on 64-bit ARM
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "move_mount": (429, 429),
    "open_tree": (428, 428), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268), "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264), "fanotify_init": (300, 262), "quotactl": (179, 60), "swapon": (167, 224),
    "swapoff": (168, 225), "acct": (163, 89), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "reboot": (169, 142), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "syslog": (103, 116), "sethostname": (170, 161), "setdomainname": (171, 162),
    # memory outside RLIMIT_AS and RLIMIT_FSIZE, and outside the private folders
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
}  # fmt: skip
ALONE: dict[str, tuple[int, int]] = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
}  # fmt: skip
"""Denied besides where programs share their process numbers and network with everybody (the weaker mode)."""
CLONE, CLONE3, SOCKET = (56, 220), (435, 435), (41, 198)
FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6: others (AF_VSOCK, which no network namespace confines, AF_NETLINK, AF_PACKET) are denied."""


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def program(machine: str, *, shared: bool = False) -> bytes:
    """The filter for a machine named as by platform.machine(); KeyError if its call numbers are not known here. `shared`: there are
    no namespaces, so no signals may be sent and no sockets but local ones made."""
    denied, families = ({**DENIED, **ALONE}, FAMILIES[:1]) if shared else (DENIED, FAMILIES)
    arm = 1 if machine == "aarch64" else 0
    deny, missing = _op(RETURN, ERROR | errno.EPERM), _op(RETURN, ERROR | errno.ENOSYS)
    code = [_op(LOAD, 4), _op(JUMP_EQUAL, AUDIT[machine], 1), _op(RETURN, KILL), _op(LOAD, 0)]
    if not arm:
        code += [_op(JUMP_GREATER_EQUAL, X32, 0, 1), missing]
    for numbers in denied.values():
        code += [_op(JUMP_EQUAL, numbers[arm], 0, 1), deny]
    code += [_op(JUMP_EQUAL, CLONE3[arm], 0, 1), missing]
    # clone: only its first argument's low half, the flags, is looked at (offset 16)
    code += [_op(JUMP_EQUAL, CLONE[arm], 0, 4), _op(LOAD, 16), _op(JUMP_SET, NEW_NAMESPACES, 0, 1), deny]
    code += [_op(RETURN, ALLOW)]
    code += [_op(JUMP_EQUAL, SOCKET[arm], 0, len(families) + 2), _op(LOAD, 16)]
    code += [_op(JUMP_EQUAL, family, len(families) - i) for i, family in enumerate(families)]
    code += [deny, _op(RETURN, ALLOW)]
    return b"".join(code)
