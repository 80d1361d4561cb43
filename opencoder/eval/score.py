"""Verdicts: each way of scoring (`task.Scoring`) by means of the sandbox."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from pathlib import Path

from . import languages
from .sandbox.limits import Limits
from .sandbox.pool import Execution, Outcome, Sandbox
from .task import Judge, OwnTests, Task, TextCases, UnitTests

RUNNER = Path(__file__).parent / "sandbox" / "unit_tests.py"
UNIT_TEST_LIMITS = Limits(
    wall_s=60, cpu_s=30, memory_mib=8192, tree_memory_mib=8192, processes=64, file_mib=256, disk_mib=512, open_files=512
)
"""BigCodeBench loads scientific packages."""


def score(task: Task, source: str, sandbox: Sandbox, limits: Limits | None = None) -> Outcome:
    """The verdict on one program. `limits` default to those that suit the way of scoring. Raises SandboxError if the sandbox fails:
    that is never a verdict."""
    scoring = task.scoring
    if isinstance(scoring, Judge):
        return sandbox.judge({**scoring.job, "source": source}, _scaled(limits or Limits(), task))
    if isinstance(scoring, TextCases):
        return _text_cases(task, scoring, source, sandbox, _scaled(limits or Limits(), task))
    if isinstance(scoring, UnitTests):
        return _unit_tests(scoring, source, sandbox, _scaled(limits or UNIT_TEST_LIMITS, task))
    return _own_tests(scoring, source, sandbox, limits)


def score_all(
    programs: Iterable[tuple[Task, str]], sandbox: Sandbox, *, workers: int, limits: Limits | None = None
) -> Iterator[Outcome]:
    """Verdicts in the order of `programs`, several at a time."""
    with ThreadPoolExecutor(workers) as threads:
        yield from threads.map(lambda p: score(p[0], p[1], sandbox, limits), programs)


def _scaled(limits: Limits, task: Task) -> Limits:
    factor = task.time_scale
    return replace(limits, wall_s=limits.wall_s * factor, cpu_s=max(1, round(limits.cpu_s * factor)))


def _failure(done: Execution) -> tuple[str, str]:
    """Kind and detail of an execution that did not end well."""
    code = done.ended.codes[-1] if done.ended.codes else 0
    kind = done.ended.killed or ("cpu time" if code in (-24, -9) else f"signal {-code}" if code < 0 else f"exit {code}")
    return kind, done.stderr[-1000:].decode("utf-8", "replace")


def _text_cases(task: Task, scoring: TextCases, source: str, sandbox: Sandbox, limits: Limits) -> Outcome:
    cpu = wall = 0.0
    for number, (given, expected) in enumerate(scoring.cases):
        done = sandbox.execute(
            [[sandbox.python, "-I", "-S", "main.py"]], files={"main.py": source}, stdin=given.encode(), limits=limits
        )
        cpu, wall = cpu + done.ended.cpu_s, wall + done.ended.wall_s
        if not done.ok:
            kind, detail = _failure(done)
            return Outcome("failed", kind, f"case {number}: {detail}", cpu, wall)
        if not same_text(done.stdout.decode("utf-8", "replace"), expected):
            shown = done.stdout[:200].decode("utf-8", "replace")
            return Outcome("failed", "output", f"case {number}: {shown!r} for {expected[:200]!r}", cpu, wall)
    return Outcome("passed", "", "", cpu, wall)


def same_text(found: str, expected: str) -> bool:
    """LiveCodeBench's rule: equal line by line without surrounding white space, or as decimal numbers where all words of a line are."""
    left, right = ([line.strip() for line in text.strip().split("\n")] for text in (found, expected))
    return len(left) == len(right) and all(a == b or _same_numbers(a, b) for a, b in zip(left, right, strict=True))


def _same_numbers(found: str, expected: str) -> bool:
    try:
        return [Decimal(word) for word in found.split()] == [Decimal(word) for word in expected.split()]
    except InvalidOperation:
        return False


def _unit_tests(scoring: UnitTests, source: str, sandbox: Sandbox, limits: Limits) -> Outcome:
    """unittest in the program's process, with tests among the real ones that must fail: who patches assertions, fails."""
    nonce = secrets.token_hex(8)
    canaries = {f"test_{secrets.token_hex(6)}": how for how in ("equal", "true", "raise")}
    job = {"source": source, "test": scoring.test, "nonce": nonce, "canaries": canaries, "path": sandbox.package_path}
    files = {"run.py": RUNNER.read_text(encoding="utf-8"), "job.json": json.dumps(job)}
    done = sandbox.execute([[sandbox.python, "-I", "run.py"]], files=files, limits=limits)
    ended = done.ended
    result: dict[str, str] | None = None
    for line in done.stdout.decode("utf-8", "replace").split("\n"):
        if line.startswith(nonce):
            result = json.loads(line[len(nonce) :])
    if result is None:
        kind, detail = _failure(done)
        return Outcome("failed", "no report" if kind == "exit 0" else kind, detail, ended.cpu_s, ended.wall_s)
    if any(result.pop(name, "") != "failed" for name in canaries):
        return Outcome("failed", "forged", "a test that must fail did not", ended.cpu_s, ended.wall_s)
    wrong = {name: text for name, text in result.items() if text != "passed"}
    if wrong or not result:
        first = next(iter(wrong.items()), ("no test", "ran"))
        return Outcome("failed", "tests", f"{first[0]}: {first[1]}"[:2000], ended.cpu_s, ended.wall_s)
    return Outcome("passed", "", "", ended.cpu_s, ended.wall_s)


def _own_tests(scoring: OwnTests, source: str, sandbox: Sandbox, limits: Limits | None) -> Outcome:
    """Exit code 0 with the test, another one with the test that must fail: an early `exit(0)` gives 0 twice."""
    language = languages.LANGUAGES[scoring.language]

    def run(text: str) -> Execution:
        return sandbox.execute(
            language.steps,
            files={language.file: text},
            limits=limits or language.limits,
            remove=language.remove,
            environment=languages.environment(),
        )

    done = run(source + "\n" + scoring.test)
    cpu, wall = done.ended.cpu_s, done.ended.wall_s
    if not done.ok:
        kind, detail = _failure(done)
        if len(done.ended.codes) < len(language.steps) and not done.ended.killed:
            kind = "does not compile"
        return Outcome("failed", kind, detail, cpu, wall)
    spoilt = run(source + "\n" + language.spoil(scoring.test))
    cpu, wall = cpu + spoilt.ended.cpu_s, wall + spoilt.ended.wall_s
    if spoilt.ok:
        return Outcome("failed", "forged", "it passes a test that must fail", cpu, wall)
    return Outcome("passed", "", "", cpu, wall)
