"""The zygote: a small warm interpreter inside the sandbox that forks one process tree per program.

It starts as the caller, makes namespaces and the file system, and then serves requests over a socket. It never sees a program or a
test: those go through a channel of each run straight to the process concerned, so that no process inherits the memory of another's.
Standard library only; started by `pool.py` with `python -I -S`."""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import time
import traceback
from typing import Any, NoReturn

from . import candidate, checker, frames, kernel, root, seccomp
from .limits import MIB, Limits

INSIDE = 1000
"""The user and group that programs are in their own user namespace."""
NOBODY = 65534
"""What they are outside, where the zygote may choose: it is root."""
LOOK_S = 0.1
"""Seconds between two looks at the memory of what runs."""
PRELOAD = (
    "abc", "argparse", "array", "base64", "bisect", "calendar", "cmath", "collections", "copy", "csv", "dataclasses", "datetime",
    "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "inspect", "io", "itertools", "json", "math", "numbers",
    "operator", "random", "re", "statistics", "string", "struct", "subprocess", "tempfile", "textwrap", "threading", "time", "types",
    "typing", "unicodedata", "unittest", "uuid",
)  # fmt: skip
"""Imported before the first fork: a program's import of them costs nothing."""
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLBACKEND": "Agg",
}  # fmt: skip


class Zygote:
    """State of the serving process."""

    def __init__(self, link: socket.socket, setup: dict[str, Any]) -> None:
        self.link = link
        self.namespaces: bool = setup["isolation"] == "namespaces"
        self.privileged = os.geteuid() == 0 and not setup.get("in_user_namespace", False)
        self.filter = b""
        self.runs: dict[int, Run] = {}
        """By the pidfd of the tree's first process."""

    def loop(self) -> None:
        """Serve until the caller closes the link."""
        while True:
            now = time.monotonic()
            nearest = min((min(run.deadline, now + LOOK_S) for run in self.runs.values()), default=now + 60)
            watched = [self.link.fileno(), *self.runs]
            ready, _, _ = select.select(watched, [], [], max(0.0, nearest - now))
            for fd in ready:
                if fd in self.runs:
                    self._ended(self.runs.pop(fd))
            for run in list(self.runs.values()):
                if run.deadline <= time.monotonic():
                    run.kill("wall time")
                elif time.monotonic() >= run.look and not run.killed:  # most programs end before the first look
                    run.look = time.monotonic() + LOOK_S
                    if tree_memory_kib(run.pid) > run.memory_kib:
                        run.kill("memory")
            if self.link.fileno() in ready and not self._request():
                return

    def _request(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self.link, 65536, 8)
        if not data:
            return False
        request = json.loads(data)
        if request["do"] == "stop":
            for run in self.runs.values():
                if run.number == request["run"]:
                    run.kill("stopped")
            return True
        try:
            run = self._start(request, fds)
            self.runs[run.pidfd] = run
        except OSError as error:
            self._tell({"run": request["run"], "error": str(error)})
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _tell(self, message: dict[str, Any]) -> None:
        self.link.send(json.dumps(message).encode())

    def _start(self, request: dict[str, Any], fds: list[int]) -> Run:
        limits = Limits(**request["limits"])
        status_read, status_write = os.pipe()
        go_read, go_write = os.pipe()
        flags = kernel.OWN_WORLD | kernel.CLONE_NEWUSER
        try:
            pid = kernel.clone(flags) if self.namespaces else os.fork()
        except OSError:
            for fd in (status_read, status_write, go_read, go_write):
                os.close(fd)
            raise
        if pid == 0:
            _first_process(self, request, limits, fds, status_write, go_read)
        os.close(status_write)
        os.close(go_read)
        try:
            if self.namespaces:
                outside = NOBODY if self.privileged else 0
                kernel.write_maps(pid, INSIDE, outside, outside, deny_groups=False)
            os.write(go_write, b"g")
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(status_read)
            raise
        finally:
            os.close(go_write)
        return Run(request["run"], pid, os.pidfd_open(pid), status_read, limits, not self.namespaces)

    def _ended(self, run: Run) -> None:
        _, _, usage = os.wait4(run.pid, 0)
        os.close(run.pidfd)
        if run.grouped:
            run.kill_group()
        data = os.read(run.status, 4096)
        os.close(run.status)
        told = json.loads(data) if data.endswith(b"}") else {}
        reason = run.killed or told.get("error", "")
        self._tell({
            "run": run.number, "codes": told.get("codes", []), "killed": reason, "broken": "error" in told,
            "cpu_s": usage.ru_utime + usage.ru_stime, "wall_s": time.monotonic() - run.started, "memory_kib": usage.ru_maxrss,
        })  # fmt: skip


class Run:
    """One process tree."""

    def __init__(self, number: int, pid: int, pidfd: int, status: int, limits: Limits, grouped: bool) -> None:
        self.number, self.pid, self.pidfd, self.status, self.grouped = number, pid, pidfd, status, grouped
        self.started = time.monotonic()
        self.deadline = self.started + limits.wall_s
        self.look = self.started + LOOK_S
        self.memory_kib = limits.tree_memory_mib * 1024
        self.killed = ""

    def kill(self, reason: str) -> None:
        """Kill the first process; with a pid namespace of its own the kernel then kills all others in it."""
        self.killed = self.killed or reason
        self.deadline = float("inf")
        if self.grouped:
            self.kill_group()
        os.kill(self.pid, signal.SIGKILL)

    def kill_group(self) -> None:
        """Kill the process group (the weaker mode: what left the group survives)."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def tree_memory_kib(first: int) -> int:
    """Resident memory of a process and all below it that is theirs alone; those that end meanwhile count nothing."""
    total, stack = 0, [first]
    while stack:
        pid = stack.pop()
        try:
            with open(f"/proc/{pid}/statm") as file:
                _, resident, shared, *_ = map(int, file.read().split())
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/children") as file:
                    stack += map(int, file.read().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += (resident - shared) * (resource.getpagesize() // 1024)
    return total


def _first_process(
    zygote: Zygote, request: dict[str, Any], limits: Limits, fds: list[int], status: int, go: int
) -> NoReturn:
    """The first process of a tree: confines itself, forks the program, waits for it, tells how it ended. Never returns."""
    report: dict[str, Any] = {}
    try:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.read(go, 1) != b"g":
            os._exit(1)
        zygote.link.close()
        _close_all_but({0, 1, 2, status, *fds})
        confine(zygote, limits)
        if not zygote.namespaces:  # no private /tmp there
            os.chdir(request["folder"])
        report["codes"] = _run_program(request["kind"], limits, fds, status)
    except BaseException as error:
        report["error"] = f"{type(error).__name__}: {error}"
        if not isinstance(error, OSError):
            report["error"] += traceback.format_exc()[-1500:]
    os.write(status, json.dumps(report).encode()[:4000])
    os._exit(0)


def _close_all_but(keep: set[int]) -> None:
    last = -1
    for fd in [*sorted(keep), 1 << 20]:
        if last + 1 < fd:  # an empty range at 0 would be taken for all (close_range(0, -1))
            os.closerange(last + 1, fd)
        last = fd


def confine(zygote: Zygote, limits: Limits) -> None:
    """User, mounts, capabilities, system calls of the tree; the first process cannot be traced by the others."""
    if zygote.namespaces:
        if zygote.privileged:
            os.setgroups([])
        os.setresgid(INSIDE, INSIDE, INSIDE)
        os.setresuid(INSIDE, INSIDE, INSIDE)
        flags = kernel.MS_NOSUID | kernel.MS_NODEV
        size = limits.disk_mib * MIB
        kernel.mount("tmpfs", "/tmp", "tmpfs", flags, f"size={size},nr_inodes=4096,mode=1777")
        kernel.mount("tmpfs", "/dev/shm", "tmpfs", flags, f"size={size // 4},nr_inodes=256,mode=1777")
        kernel.mount("proc", "/proc", "proc", flags | kernel.MS_NOEXEC)
        os.chdir("/tmp")
    else:
        os.setsid()
        if zygote.privileged:
            become_nobody()
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if zygote.namespaces:
        kernel.drop_capabilities()
    if zygote.filter:
        kernel.install_seccomp(zygote.filter)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)


def become_nobody() -> None:
    """Give up root for good."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def check_library() -> None:
    """Raises OSError unless nobody can import from the standard library: in the weaker mode root's programs run so, and an import
    that fails would count against them."""
    pid = os.fork()
    if pid == 0:
        become_nobody()
        os._exit(0 if os.access(os.__file__, os.R_OK) else 1)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        raise OSError(
            errno.EACCES,
            f"{os.__file__} is closed to the user that programs run as: choose an interpreter outside private folders",
        )


def _run_program(kind: str, limits: Limits, fds: list[int], status: int) -> list[int]:
    """Exit codes as os.waitstatus_to_exitcode has them: of the interpreter, or of each step up to the first that fails."""
    if kind != "exec":
        return [_fork_and_wait(lambda: _interpret(kind, fds), limits, status, hidden=kind == "check")]
    channel = socket.socket(fileno=fds[0])
    body = frames.receive(channel)
    channel.close()
    for name, text in body["files"].items():
        with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
    codes: list[int] = []
    for number, argv in enumerate(body["steps"]):
        last = number == len(body["steps"]) - 1
        if last:
            for name in body.get("remove", []):
                os.unlink(name)
        environment = {**ENVIRONMENT, **body.get("environment", {})}
        stdio = tuple(fds[1:4]) if last else (-1, fds[3], fds[3])
        codes.append(_fork_and_wait(lambda a=argv, e=environment, s=stdio: _execute(a, e, s), limits, status))
        if codes[-1] != 0:
            break
    return codes


def _fork_and_wait(child: Any, limits: Limits, status: int, *, hidden: bool = False) -> int:
    """`hidden`: nobody of the same user may look into the process (in the weaker mode programs and tests share one)."""
    pid = os.fork()
    if pid == 0:
        try:
            os.close(status)
            kernel.prctl(kernel.PR_SET_DUMPABLE, 0 if hidden else 1)
            limits.apply()
            child()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(120)
    while True:  # as the first process of its namespace it reaps orphans too
        ended, code = os.waitpid(-1, 0)
        if ended == pid:
            return os.waitstatus_to_exitcode(code)


def _stdio(fds: tuple[int, ...]) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for target, fd in enumerate(fds):
        os.dup2(null if fd < 0 else fd, target)
    os.closerange(3, 1 << 16)


def _interpret(kind: str, fds: list[int]) -> None:
    channels = [socket.socket(fileno=fd) for fd in fds]
    null = os.open("/dev/null", os.O_RDWR)
    for target in range(3):
        os.dup2(null, target)
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    if kind == "serve":
        candidate.serve(channels[0])
    else:
        checker.run(channels[0], channels[1])
    os._exit(0)


def _execute(argv: list[str], environment: dict[str, str], fds: tuple[int, ...]) -> None:
    _stdio(fds)
    try:
        os.execvpe(argv[0], argv, environment)
    except OSError as error:
        os.write(2, f"{argv[0]}: {error.strerror}\n".encode())
        os._exit(127 if error.errno == errno.ENOENT else 126)


def enter(setup: dict[str, Any], link: socket.socket) -> None:
    """Make the outer namespaces and the root. Returns in the process that shall serve; the other one waits for it."""
    if setup["isolation"] != "namespaces":
        return
    if os.geteuid() != 0:
        uid, gid = os.geteuid(), os.getegid()
        kernel.unshare(kernel.CLONE_NEWUSER)
        kernel.write_maps(os.getpid(), 0, uid, gid, deny_groups=True)
        setup["in_user_namespace"] = True
    kernel.unshare(kernel.OWN_WORLD)
    if os.fork() != 0:
        link.close()
        os.wait()
        os._exit(0)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    root.build(setup["root"], setup["folders"], setup["packages"])


def main(fd: int, path: list[str]) -> None:
    """Entry of the process: reads its setup from the link, answers {"ready", "nobody"} or {"error"}, serves."""
    link = socket.socket(fileno=fd)
    setup = json.loads(link.recv(65536))
    if setup["isolation"] != "namespaces":
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # as the caller: see Sandbox
    try:
        enter(setup, link)
        zygote = Zygote(link, setup)
        if not zygote.namespaces and zygote.privileged:
            check_library()
        zygote.filter = seccomp.program(kernel.MACHINE, shared=not zygote.namespaces)
        path += ["/packages"] if zygote.namespaces else sorted({os.path.dirname(p) for p in setup["packages"].values()})
        for name in (*PRELOAD, *setup["preload"]):
            importlib.import_module(name)
        gc.collect()
        gc.freeze()
    except OSError as error:
        link.send(json.dumps({"error": str(error)}).encode())
        os._exit(1)
    link.send(json.dumps({"ready": True, "nobody": zygote.privileged}).encode())
    zygote.loop()
