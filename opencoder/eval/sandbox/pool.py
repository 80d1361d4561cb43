"""The caller's side of the sandbox: starts zygotes, asks them for runs, carries verdicts.

`Sandbox.judge` runs a program against a test: two processes in two sandboxes, the program in one and the test in the other, with
nothing between them but plain values. `Sandbox.execute` runs commands (compilers, programs that read and write text)."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import selectors
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from opencoder.errors import Failure, UserError

from . import frames, kernel
from .limits import Limits
from .root import ANSWERS
from .zygote import ENVIRONMENT, NOBODY

Isolation = Literal["namespaces", "rlimits"]
ISOLATIONS: tuple[Isolation, ...] = ("namespaces", "rlimits")
ALL_PACKAGES = "all"
"""Instead of names: everything that is installed here but ANSWERS."""
START_S = 60.0
"""Seconds that a zygote may take to start on a busy machine."""
GRACE_S = 20.0
"""Seconds after a run's own limit before a zygote that says nothing counts as broken."""
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); from opencoder.eval.sandbox.zygote import main; "
    "sys.path.pop(0); main(int(sys.argv[2]), sys.path)"
)


class SandboxError(Failure):
    """The sandbox itself failed: says nothing about the program."""


@dataclass(frozen=True)
class Ended:
    """How a process tree ended."""

    codes: list[int] = field(default_factory=list)
    """Exit code of each step that ran; −n is signal n."""
    killed: str = ""
    """Why the sandbox killed it: `wall time`, `stopped`, `output`; empty if it ended by itself."""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    memory_kib: int = 0
    """Largest resident set of one of its processes."""


@dataclass(frozen=True)
class Outcome:
    """The verdict of `judge`."""

    status: Literal["passed", "failed", "unscorable"]
    """`unscorable`: the harness could not carry the test; never counted as the program's fault in silence."""
    kind: str
    """The exception's class, `program gone`, `wall time`, `cpu time`…; empty if passed."""
    detail: str
    cpu_s: float
    """CPU seconds of the program's processes."""
    wall_s: float


@dataclass(frozen=True)
class Execution:
    """Result of `execute`."""

    ended: Ended
    stdout: bytes
    stderr: bytes

    @property
    def ok(self) -> bool:
        """Whether every step ended by itself with code 0."""
        return not self.ended.killed and bool(self.ended.codes) and not any(self.ended.codes)


class Zygote:
    """A warm interpreter in the sandbox, and the runs it has in hand. Thread-safe."""

    def __init__(
        self,
        isolation: Isolation,
        *,
        interpreter: str = sys.executable,
        packages: Sequence[str] = (),
        folders: Sequence[str] = (),
        preload: Sequence[str] = (),
    ) -> None:
        self._isolation = isolation
        self._root = tempfile.mkdtemp(prefix="opencoder-sandbox-")
        os.chmod(self._root, 0o755)
        self._link, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        home = str(Path(__file__).parents[3])
        command = [interpreter, "-I", "-S", "-c", _BOOT, home, str(other.fileno())]
        # No variable of the caller's: programs are forks, and could read the keys in them from /proc/self/environ.
        self._process = subprocess.Popen(
            command, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL, start_new_session=True, env=ENVIRONMENT
        )
        other.close()
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Ended]] = {}
        self._number = 0
        self.nobody = False
        self._send({
            "isolation": isolation, "root": self._root, "folders": look_at(interpreter)[1] + list(folders),
            "packages": package_folders(packages), "preload": list(preload),
        })  # fmt: skip
        self._await_ready()
        threading.Thread(target=self._listen, daemon=True, name="sandbox").start()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._link.send(json.dumps(message).encode())
        except OSError as error:
            raise SandboxError(f"the sandbox's zygote is gone: {error}") from error

    def _await_ready(self) -> None:
        self._link.settimeout(START_S)
        try:
            answer = json.loads(self._link.recv(65536) or b'{"error": "it ended at once"}')
        except OSError as error:
            answer = {"error": str(error)}
        self._link.settimeout(None)
        if "error" in answer:
            self.close()
            raise SandboxError(f"the sandbox does not start: {answer['error']}")
        self.nobody = answer["nobody"]

    def spawn(self, kind: str, limits: Limits, fds: Sequence[int]) -> tuple[int, Future[Ended]]:
        """Start a process tree that gets `fds`. Returns its number and how it will have ended."""
        future: Future[Ended] = Future()
        with self._lock:
            self._number += 1
            number = self._number
            self._waiting[number] = future
        folder = Path(self._root) / str(number)
        if self._isolation == "rlimits":  # there is no private /tmp there
            folder.mkdir()
            if self.nobody:
                os.chown(folder, NOBODY, NOBODY)
            future.add_done_callback(lambda _: shutil.rmtree(folder, ignore_errors=True))
        request = {"do": "run", "run": number, "kind": kind, "limits": limits.to_json(), "folder": str(folder)}
        try:
            socket.send_fds(self._link, [json.dumps(request).encode()], list(fds))
        except OSError as error:
            raise SandboxError(f"the sandbox's zygote is gone: {error}") from error
        return number, future

    def stop(self, number: int) -> None:
        """Kill a run; nothing happens if it has ended."""
        self._send({"do": "stop", "run": number})

    def _listen(self) -> None:
        while True:
            try:
                data = self._link.recv(65536)
            except OSError:
                data = b""
            if not data:
                break
            message = json.loads(data)
            with self._lock:
                future = self._waiting.pop(message.pop("run"))
            if message.get("error") or message.pop("broken", False):
                future.set_exception(
                    SandboxError(f"a program could not be started: {message.get('error') or message['killed']}")
                )
            else:
                future.set_result(Ended(**message))
        with self._lock:
            left, self._waiting = list(self._waiting.values()), {}
        for future in left:
            future.set_exception(SandboxError("the sandbox's zygote ended"))

    def close(self) -> None:
        """End the zygote and everything in it."""
        with contextlib.suppress(OSError):  # it may have gone already
            self._link.shutdown(socket.SHUT_RDWR)
        self._link.close()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._root, ignore_errors=True)


@functools.cache
def look_at(interpreter: str) -> tuple[str, list[str]]:
    """The real path of an interpreter, and the folders it needs if not below /usr. Raises UserError if it does not run."""
    code = "import os, sys; print(os.path.realpath(sys.executable), sys.base_prefix, sys.base_exec_prefix, sep='\\n')"
    try:
        asked = [interpreter, "-I", "-S", "-c", code]
        answer = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=START_S).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"interpreter {interpreter} does not run ({error}): give the path of a Python 3.11 or newer"
        ) from error
    path, *folders = answer.strip().split("\n")
    return path, [folder for folder in sorted(set(folders)) if not folder.startswith("/usr")]


def package_folders(names: Sequence[str]) -> dict[str, str]:
    """Folder (or file) of each package, with the shared libraries that its wheel put beside it; of ["all"] the folder of them all.
    Raises UserError for one that is not installed."""
    if list(names) == [ALL_PACKAGES]:
        return {"": sysconfig.get_path("purelib")}
    found: dict[str, str] = {}
    for name in names:
        if name in ANSWERS:
            raise UserError(f"package {name} holds answers to benchmarks: it cannot be shown to programs")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise UserError(f"package {name} for the sandbox is not installed here: pip install it, or leave it out")
        path = Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)
        found[path.name] = str(path)
        libraries = path.with_name(f"{name}.libs")
        if libraries.is_dir():
            found[libraries.name] = str(libraries)
    return found


class Sandbox:
    """Runs programs. Use as a context manager, or call `close`. Thread-safe.

    `isolation="namespaces"` is the sandbox; `"rlimits"` is the weaker mode (docs/evaluation.md says what it does not hold back).
    `interpreter` runs the Python programs and tests (3.11 or newer; the standard library is all it needs).
    `packages` are importable by programs, and by tests; everything else that is installed stays hidden."""

    def __init__(
        self,
        isolation: Isolation = "namespaces",
        *,
        interpreter: str = sys.executable,
        packages: Sequence[str] = (),
        folders: Sequence[str] = (),
    ) -> None:
        if isolation not in ISOLATIONS:
            raise UserError(f"sandbox {isolation!r}: allowed are {', '.join(ISOLATIONS)}")
        if not kernel.supported():
            raise UserError("the sandbox needs Linux on x86-64 or 64-bit ARM: evaluate there")
        self.isolation = isolation
        if isolation == "rlimits":
            # An ordinary user's programs are that user there: they must not write into this process, which has the verdicts.
            kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        shown = package_folders(packages).values()
        self.package_path = ["/packages"] if isolation == "namespaces" else sorted({str(Path(p).parent) for p in shown})
        """Where programs that `execute` starts find the packages."""
        self.python = look_at(interpreter)[0]
        """The interpreter as programs see it, for `execute`."""
        try:
            self._programs = Zygote(isolation, interpreter=interpreter, packages=packages, folders=folders)
        except SandboxError as error:
            raise UserError(_refusal(isolation, error)) from error
        # Tests run in a process tree of another zygote: no program is ever a copy of a process that has seen a test.
        preload = [name for name in packages if name == "numpy"]
        try:
            self._tests = Zygote(isolation, interpreter=interpreter, packages=packages, preload=preload)
        except BaseException:
            self._programs.close()
            raise

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything in the sandbox."""
        self._programs.close()
        self._tests.close()

    def describe(self) -> str:
        """One line: what confines programs here, and what does not."""
        parts = ["user, mount, pid, net, ipc, uts namespaces"] if self.isolation == "namespaces" else ["process group"]
        parts += [
            "rlimits",
            "no new privileges",
            "seccomp",
            "user nobody" if self._programs.nobody else "the caller's user",
        ]
        weak = "WEAKER MODE, asked for by name: " if self.isolation == "rlimits" else ""
        return weak + ", ".join(parts)

    def judge(self, job: dict[str, Any], limits: Limits) -> Outcome:
        """Run `job["source"]` against a test (the job's fields are those of `checker.run`). Raises SandboxError."""
        started = time.monotonic()
        mine, control = socket.socketpair()
        program_end, test_end = socket.socketpair()
        try:
            number, program = self._programs.spawn("serve", limits, [program_end.fileno()])
            # The test outlives the program, so that it can say what it was doing; its own loops are bounded too.
            longer = Limits(wall_s=limits.wall_s + 2, cpu_s=limits.cpu_s + 2, memory_mib=max(2048, limits.memory_mib))
            _, test = self._tests.spawn("check", longer, [control.fileno(), test_end.fileno()])
        finally:
            for end in (control, program_end, test_end):
                end.close()
        answer: dict[str, Any] = {"outcome": "failed", "kind": "test gone", "detail": "the test did not end in time"}
        with mine:
            mine.settimeout(longer.wall_s + GRACE_S)
            try:
                frames.send(mine, job)
                answer = frames.receive(mine)
            except frames.ChannelError:
                pass  # how both sides ended says why
        wall_s = time.monotonic() - started
        self._programs.stop(number)
        ended, test_ended = _await(program, longer), _await(test, longer)
        kind = answer["kind"]
        if kind in ("program gone", "test gone"):
            kind = _why(ended) or (_why(test_ended) if kind == "test gone" else "") or kind
        return Outcome(answer["outcome"], kind, answer["detail"], ended.cpu_s, wall_s)

    def execute(
        self,
        steps: Sequence[Sequence[str]],
        *,
        files: dict[str, str],
        stdin: bytes = b"",
        limits: Limits,
        remove: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> Execution:
        """Write `files` into the private folder, run `steps` there one after another up to the first that fails, with `stdin` for
        the last one; `remove` files before the last. Output of earlier steps counts as stderr. Raises SandboxError."""
        mine, body = socket.socketpair()
        pipes = [os.pipe() for _ in range(3)]
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1]]
        try:
            number, future = self._programs.spawn("exec", limits, [body.fileno(), *theirs])
        finally:
            body.close()
            for fd in theirs:
                os.close(fd)
        with mine:
            message = {"files": files, "steps": [list(step) for step in steps], "remove": list(remove)}
            with contextlib.suppress(frames.ChannelError):  # its end says why
                frames.send(mine, {**message, "environment": environment or {}})
            too_much, outputs = _exchange(pipes[0][1], stdin, [pipes[1][0], pipes[2][0]], limits)
        if too_much:
            self._programs.stop(number)
        ended = _await(future, limits)
        if too_much:
            ended = Ended(ended.codes, "output", ended.cpu_s, ended.wall_s, ended.memory_kib)
        return Execution(ended, outputs[0], outputs[1])


def _await(future: Future[Ended], limits: Limits) -> Ended:
    """How a tree ended, which the zygote sees to in time. Raises SandboxError if it does not."""
    try:
        return future.result(limits.wall_s + GRACE_S)
    except TimeoutError as error:
        raise SandboxError(f"the sandbox's zygote says nothing for {limits.wall_s + GRACE_S:.0f} s") from error


def _why(ended: Ended) -> str:
    """What the end of a tree says by itself."""
    if ended.killed and ended.killed != "stopped":
        return ended.killed
    code = ended.codes[-1] if ended.codes else 0
    if code in (-24, -9):  # SIGXCPU, and SIGKILL one second later
        return "cpu time"
    return f"signal {-code}" if code < 0 else ""


def _exchange(stdin: int, data: bytes, outputs: list[int], limits: Limits) -> tuple[bool, list[bytes]]:
    """Feed `data`, read both outputs until they close or one grows too long. Closes the descriptors."""
    kept = {fd: bytearray() for fd in outputs}
    view = memoryview(data)
    deadline = time.monotonic() + limits.wall_s + GRACE_S
    too_much = False
    with selectors.DefaultSelector() as selector:
        for fd in (stdin, *outputs):
            os.set_blocking(fd, False)
            selector.register(fd, selectors.EVENT_WRITE if fd == stdin else selectors.EVENT_READ)
        left = set(outputs)
        while left and not too_much and time.monotonic() < deadline:
            for key, _ in selector.select(1.0):
                fd = key.fd
                if fd == stdin:
                    view = _feed(fd, view)
                    if not view:
                        selector.unregister(fd)
                        os.close(fd)
                        stdin = -1
                    continue
                part = os.read(fd, 65536)
                kept[fd] += part
                if not part:
                    left.discard(fd)
                    selector.unregister(fd)
                too_much = too_much or len(kept[fd]) > limits.output_kib * 1024
    for fd in (stdin, *outputs):
        if fd >= 0:
            os.close(fd)
    return too_much, [bytes(kept[fd]) for fd in outputs]


def _feed(fd: int, view: memoryview) -> memoryview:
    try:
        return view[os.write(fd, view[:65536]) :] if view else view
    except BrokenPipeError:
        return view[:0]


def _refusal(isolation: str, error: Exception) -> str:
    advice = (
        "; in a container start it with --cap-add SYS_ADMIN or --security-opt seccomp=unconfined, on a host allow user namespaces "
        "(sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0), or ask for the weaker mode by "
        "name: --sandbox rlimits"
    )
    return f"{error}{advice if isolation == 'namespaces' else ''}"
