"""How much memory a process uses, has used at most, and may use."""

from __future__ import annotations

import os
from pathlib import Path

DRIVER_RESERVE = 512 << 20
"""Bytes left to the driver and the system when the default limit of a worker is worked out."""
SHARE = 0.9
"""Share of the memory available that workers may take together."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


def rss_of(pid: int | str = "self") -> int:
    """Resident bytes of a process; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def reset_peak() -> bool:
    """Start measuring this process's peak anew. False where the kernel does not allow it: the peak is then that of the
    whole life of the process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> int:
    """Largest resident bytes of this process since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no VmHWM")


def available_memory() -> int:
    """Bytes that new processes may use: what the machine has to give, or what the control group still allows if less."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) << 10
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            most = Path(limit).read_text().strip()
            now = int(Path(used).read_text())
        except OSError:
            continue
        if most.isdigit():
            available = min(available, max(0, int(most) - now))
    return available


def default_limit(workers: int) -> int:
    """Bytes each of `workers` processes may use: (0.9 · available − 512 MiB) / workers, at least 256 MiB."""
    return max(256 << 20, int(SHARE * available_memory() - DRIVER_RESERVE) // workers)
