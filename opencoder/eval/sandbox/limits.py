"""What one program may use. Standard library only: the zygote imports this."""

from __future__ import annotations

import resource
from dataclasses import asdict, dataclass
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Limits of one program; those the kernel keeps per process are named so."""

    wall_s: float = 10.0
    """Seconds from start to being killed with everything it started."""
    cpu_s: int = 5
    """Seconds of CPU time of each process."""
    memory_mib: int = 1024
    """Address space of each process."""
    tree_memory_mib: int = 2048
    """Resident memory of all processes together, looked at every tenth of a second."""
    processes: int = 16
    """Processes and threads at once."""
    file_mib: int = 16
    """Size of one file."""
    disk_mib: int = 64
    """The private /tmp, which lives in memory."""
    open_files: int = 64
    """File descriptors of each process."""
    output_kib: int = 1024
    """Bytes of standard output and of standard error that are kept; a program that writes more is killed."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def apply(self) -> None:
        """Bind this process and its children to them (soft and hard)."""
        wanted = {
            resource.RLIMIT_CPU: self.cpu_s,
            resource.RLIMIT_AS: self.memory_mib * MIB,
            resource.RLIMIT_FSIZE: self.file_mib * MIB,
            resource.RLIMIT_NOFILE: self.open_files,
            resource.RLIMIT_NPROC: self.processes,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
        }
        for kind, value in wanted.items():
            _, hard = resource.getrlimit(kind)
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            # One second between the soft CPU limit, a SIGXCPU that says why, and the hard one, which cannot be caught.
            resource.setrlimit(kind, (value, value + 1 if kind == resource.RLIMIT_CPU else value))
