"""One benchmark, one model: generate (or resume), score, sum up, write."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opencoder import __version__
from opencoder.console import ProgressBar
from opencoder.errors import DataError, Failure, UserError
from opencoder.files import atomic_open, write_json

from .generation import Backend, Sampling, Text, TextFile, fingerprint
from .passk import mean_pass_at_k
from .report import write_page
from .sandbox.limits import Limits
from .sandbox.pool import Outcome, Sandbox
from .score import score
from .task import OwnTests, Task, UnitTests


@dataclass(frozen=True)
class Settings:
    """What is asked of a run besides the model and the tasks."""

    benchmark: str
    sampling: Sampling
    ks: tuple[int, ...] = (1,)
    workers: int = 2
    """Programs scored at once."""
    concurrency: int = 1
    """Tasks generated at once: more than one for servers."""
    limits: Limits | None = None
    """None: those that suit each way of scoring."""

    def check(self) -> None:
        """Raises UserError for what cannot be."""
        self.sampling.check()
        too_large = [k for k in self.ks if not 1 <= k <= self.sampling.samples]
        if too_large or not self.ks:
            raise UserError(
                f"pass@{too_large[0] if too_large else '?'} needs that many samples, but --samples is {self.sampling.samples}: "
                "draw more, or ask for a smaller --k"
            )


def evaluate(
    tasks: Sequence[Task], backend: Backend, sandbox: Sandbox, settings: Settings, output: str | Path
) -> dict[str, Any]:
    """Evaluate into the folder `output`; returns what stands in its `summary.json`.

    Raises Failure if samples could not be generated: the run has no score then, and the same call goes on where it stopped."""
    settings.check()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    _check_same_run(output / "run.json", fingerprint(settings.benchmark, tasks, settings.sampling, backend.name))
    file = TextFile(output / "generations.jsonl")
    try:
        generate(tasks, backend, settings, file)
    finally:
        file.close()
    missing = {task.id: len(file.missing(task, settings.sampling.samples)) for task in tasks}
    lacking = sum(missing.values())
    if lacking:
        first = next(task for task, count in missing.items() if count)
        raise Failure(
            f"{lacking} samples could not be generated ({first} and others; {_counted(backend.failures)}): no score; run the same "
            f"command again to go on. {output / 'generations.jsonl'} keeps what there is"
        )
    texts = [[file.texts[task.id, sample] for sample in range(settings.sampling.samples)] for task in tasks]
    return score_texts(tasks, texts, sandbox, settings, output, backend.name, backend.failures)


def _check_same_run(path: Path, wanted: dict[str, Any]) -> None:
    if path.exists():
        found = json.loads(path.read_text())
        different = [key for key in wanted if found.get(key) != wanted[key]]
        if different:
            raise UserError(
                f"{path.parent} holds a run with another {different[0]} ({found.get(different[0])}, now {wanted[different[0]]}): "
                "choose another --output, or remove that folder"
            )
    write_json(path, wanted)


def generate(tasks: Sequence[Task], backend: Backend, settings: Settings, file: TextFile) -> None:
    """Fill `file` with the texts that it lacks."""
    todo = [(task, file.missing(task, settings.sampling.samples)) for task in tasks]
    todo = [(task, samples) for task, samples in todo if samples]
    with (
        ProgressBar("generate", total=len(todo), unit="tasks") as bar,
        ThreadPoolExecutor(max(1, settings.concurrency)) as threads,
    ):
        work = [threads.submit(backend.generate, task, samples, settings.sampling) for task, samples in todo]
        try:
            for done in as_completed(work):  # written at once, whatever is still on its way
                file.add(done.result())
                bar.advance(postfix=_counted(backend.failures))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _counted(failures: dict[str, int]) -> str:
    return ", ".join(f"{count} × {kind}" for kind, count in sorted(failures.items()))


def score_texts(
    tasks: Sequence[Task], texts: Sequence[Sequence[Text]], sandbox: Sandbox, settings: Settings, output: Path, name: str,
    failures: dict[str, int],
) -> dict[str, Any]:  # fmt: skip
    """Score texts (a list for each task) and write `verdicts.jsonl`, `summary.json` and `report.html`."""
    rows = _score(tasks, texts, sandbox, settings)
    verdicts = {task.id: [row["status"] == "passed" for row in rows if row["task"] == task.id] for task in tasks}
    summary = {
        "benchmark": settings.benchmark,
        "model": name,
        "mode": settings.sampling.mode,
        "tasks": len(tasks),
        "samples": len(rows),
        "pass": {f"pass@{k}": float(mean_pass_at_k([t.id for t in tasks], verdicts, k)) for k in settings.ks},
        "statuses": dict(Counter(row["status"] for row in rows)),
        "kinds": dict(Counter(row["kind"] for row in rows if row["kind"])),
        "cut_by_token_limit": sum(row["finish"] == "length" for row in rows),
        "prompt_too_long": sum(row["finish"] == "prompt too long" for row in rows),
        "generation_failures": dict(failures),
        "guarantee": guarantee(tasks),
        "sandbox": sandbox.describe(),
        "temperature": settings.sampling.temperature,
        "timings": {
            "programs_cpu_s": sum(row["cpu_s"] for row in rows),
            "programs_wall_s": sum(row["wall_s"] for row in rows),
        },
        "version": __version__,
        "python": platform.python_version(),
    }
    with atomic_open(output / "verdicts.jsonl") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    write_json(output / "summary.json", summary)
    write_page(output / "report.html", summary, tasks, rows)
    return summary


def _score(
    tasks: Sequence[Task], texts: Sequence[Sequence[Text]], sandbox: Sandbox, settings: Settings
) -> list[dict[str, Any]]:
    work = [(task, text) for task, some in zip(tasks, texts, strict=True) for text in some]

    def one(item: tuple[Task, Text]) -> dict[str, Any]:
        task, text = item
        program = task.program(text.text, settings.sampling.mode)
        return _row(task, text, program, score(task, program, sandbox, settings.limits))

    rows = []
    with ProgressBar("score", total=len(work), unit="programs") as bar, ThreadPoolExecutor(settings.workers) as threads:
        for row in threads.map(one, work):
            rows.append(row)
            bar.advance()
    return rows


def _row(task: Task, text: Text, program: str, outcome: Outcome) -> dict[str, Any]:
    return {
        "task": task.id, "sample": text.sample, "status": outcome.status, "kind": outcome.kind, "detail": outcome.detail,
        "finish": text.finish, "cpu_s": outcome.cpu_s, "wall_s": outcome.wall_s, "program": program,
        "sha256": hashlib.sha256(program.encode("utf-8", "surrogatepass")).hexdigest(), **task.facts,
    }  # fmt: skip


def guarantee(tasks: Sequence[Task]) -> str:
    """How far the verdicts of these tasks can be trusted against programs that want to deceive."""
    if any(isinstance(task.scoring, UnitTests | OwnTests) for task in tasks):
        return (
            "tests in the program's own process: holds against early exits, printed marks and patched assertions, not against a "
            "program written to deceive this harness"
        )
    return "tests outside of the program's process: a program passes only by returning values that satisfy them"


def score_file(
    tasks: Sequence[Task], texts: Sequence[Text], sandbox: Sandbox, settings: Settings, output: str | Path, name: str
) -> dict[str, Any]:
    """Score texts that were made elsewhere. Every task needs the same number of them, in the settings' `samples`."""
    settings.check()
    known = {task.id for task in tasks}
    strange = sorted({text.task for text in texts} - known)
    if strange:
        raise DataError(f"texts for tasks that the benchmark does not have: {', '.join(strange[:5])}")
    by_task = [[text for text in texts if text.task == task.id] for task in tasks]
    short = [t.id for t, some in zip(tasks, by_task, strict=True) if len(some) != settings.sampling.samples]
    if short:
        raise DataError(
            f"{len(short)} tasks do not have {settings.sampling.samples} texts each ({', '.join(short[:5])}): a task left out would "
            "raise the mean; add them, with empty texts if the model gave none, or set --samples"
        )
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    return score_texts(tasks, by_task, sandbox, settings, output, name, {})
