"""`opencoder evaluate`: benchmarks, held-out loss, and a watcher for the checkpoints of a run."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opencoder.console import Parser, run
from opencoder.errors import UserError

if TYPE_CHECKING:
    from opencoder.eval.run import Settings
    from opencoder.eval.task import Task


def parser() -> Parser:
    """The options."""
    p = Parser("evaluate", "Evaluate a model on benchmarks of code, in a sandbox.")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--model", help="native checkpoint, run folder, or Hugging Face folder")
    source.add_argument("--server", help="address of a server that speaks OpenAI's protocol, up to and including /v1")
    source.add_argument("--generations", help="score this jsonl file of texts made elsewhere (task, text)")
    source.add_argument("--canonical", action="store_true", help="score the benchmark's own solutions: all should pass")
    source.add_argument("--watch", help="evaluate each checkpoint of this run folder as it appears")
    p.add_argument("--benchmark", nargs="+", default=[], metavar="NAME[=FILE]", help="humaneval, humaneval+, mbpp, mbpp-sanitized, "
                   "mbpp+, bigcodebench, livecodebench, multipl-e; all but the first need a file")  # fmt: skip
    p.add_argument(
        "--heldout", nargs="+", default=[], metavar="PREFIX", help="loss and bits per byte on these .bin/.idx datasets"
    )
    p.add_argument("--output", required=True, help="folder for the results; a run that was cut off there is resumed")
    p.add_argument(
        "--mode", default="completion", choices=["completion", "chat"], help="go on with the prompt, or answer it"
    )
    p.add_argument("--samples", type=int, default=1, help="texts for each task")
    p.add_argument("--k", type=int, nargs="+", default=[1], help="pass@k for these k")
    p.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    p.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total share")
    p.add_argument("--max-new-tokens", type=int, default=1024, help="tokens of a text at most")
    p.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    p.add_argument("--limit", type=int, help="only so many tasks, the first ones (not the benchmark's score)")
    p.add_argument("--from-date", help="livecodebench: problems from this day on (YYYY-MM-DD)")
    p.add_argument("--until-date", help="livecodebench: problems before this day (YYYY-MM-DD)")
    model = p.add_argument_group("model")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda")
    model.add_argument(
        "--dtype", default="auto", choices=["auto", "fp64", "fp32", "bf16"], help="auto: as it was saved"
    )
    model.add_argument(
        "--batch-size", type=int, default=8, help="samples of a task (and windows of held-out text) at once"
    )
    model.add_argument("--served-model", default="default", help="name of the model on the server")
    model.add_argument("--concurrency", type=int, default=8, help="requests to the server at once")
    model.add_argument("--timeout", type=float, default=600.0, help="seconds for one request")
    model.add_argument("--retries", type=int, default=5, help="further tries of a request that fails")
    model.add_argument("--key-variable", help="environment variable that holds the server's key")
    box = p.add_argument_group("sandbox")
    box.add_argument(
        "--sandbox", default="namespaces", choices=["namespaces", "rlimits"], help="rlimits: the weaker mode"
    )
    box.add_argument("--python", help="interpreter of Python programs (default: this one)")
    box.add_argument(
        "--packages", nargs="+", default=[], help="installed packages that programs and tests may import, or all"
    )
    box.add_argument("--workers", type=int, default=os.cpu_count() or 2, help="programs at once")
    box.add_argument("--time-limit", type=float, help="seconds of a program, instead of the benchmark's own limits")
    watch = p.add_argument_group("watch")
    watch.add_argument("--interval", type=float, default=30.0, help="seconds between two looks at the run folder")
    watch.add_argument("--until-step", type=int, help="end after the checkpoint of this step")
    watch.add_argument("--once", action="store_true", help="evaluate what is there and end")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and print a line for each score."""
    args = parser().parse_args(argv)
    if not args.benchmark and not args.heldout:
        raise UserError("nothing to evaluate: give --benchmark, --heldout, or both")
    if not (args.model or args.server or args.generations or args.canonical or args.watch):
        raise UserError("no model: give --model, --server, --generations, --canonical or --watch")
    if args.heldout and not (args.model or args.watch):
        raise UserError("--heldout needs --model or --watch: a loss cannot be had from a server or a file")
    suites = [(name, load_tasks(name, args)) for name in args.benchmark]
    if args.watch:
        from opencoder.eval.watch import watch

        return watch(
            args.watch, args.output, lambda folder, output: evaluate(args, suites, output, folder),
            interval_s=args.interval, until_step=args.until_step, once=args.once,
        )  # fmt: skip
    evaluate(args, suites, Path(args.output), args.model)
    return 0


def load_tasks(text: str, args: argparse.Namespace) -> list[Task]:
    """The tasks of NAME[=FILE], within the window of dates."""
    from opencoder.eval import benchmarks

    name, _, path = text.partition("=")
    tasks = benchmarks.load(name, path or None)
    if args.from_date or args.until_date:
        if name != "livecodebench":
            raise UserError(f"--from-date and --until-date are for livecodebench; {name} has no dates")
        start, end = args.from_date or "", args.until_date or "9999"
        tasks = [task for task in tasks if start <= task.facts.get("contest_date", "") < end]
        if not tasks:
            raise UserError(f"no problem of {path} lies from {start or 'the first'} until {end}")
    tasks = tasks[: args.limit]
    needed = {library for task in tasks for library in task.facts.get("libraries", "").split(", ") if library}
    missing = missing_packages(needed, args.packages)
    if missing:
        raise UserError(
            f"the programs of {name} need {', '.join(missing)}, which the sandbox would not show: install them and give "
            "--packages all (or their names, with those that they need)"
        )
    return tasks


def missing_packages(needed: set[str], shown: Sequence[str]) -> list[str]:
    """Those of `needed` that are neither in the standard library nor shown to programs."""
    outside = sorted(needed - sys.stdlib_module_names)
    if list(shown) == ["all"]:
        return [name for name in outside if importlib.util.find_spec(name) is None]
    return [name for name in outside if name not in shown]


def evaluate(
    args: argparse.Namespace, suites: list[tuple[str, list[Task]]], output: Path, model: Any
) -> dict[str, Any]:
    """Everything asked for, of one model. Returns the summaries by name."""
    found: dict[str, Any] = {}
    backend: Any = make_backend(args, model)
    if suites:
        from opencoder.eval.languages import toolchain_folders
        from opencoder.eval.sandbox.pool import Sandbox

        options = {"interpreter": args.python} if args.python else {}
        languages = {task.language for _, tasks in suites for task in tasks}
        folders = toolchain_folders() if languages & {"rust", "go"} else ()
        with Sandbox(args.sandbox, packages=args.packages, folders=folders, **options) as sandbox:
            for text, tasks in suites:
                name = text.partition("=")[0]
                summary = one_benchmark(args, name, tasks, backend, sandbox, output / name)
                scores = "  ".join(f"{k} {100 * v:.1f} %" for k, v in summary["pass"].items())
                print(f"{name}: {scores}  ({summary['tasks']} tasks, {output / name / 'report.html'})")
                if lost := summary["statuses"].get("unscorable", 0):
                    print(
                        f"{name}: {lost} samples could not be scored and count as not passed; verdicts.jsonl says why"
                    )
                found[name] = summary
    for prefix in args.heldout:
        from opencoder.eval.heldout import evaluate_dataset, show

        result = evaluate_dataset(backend, prefix, batch_size=args.batch_size)
        found[f"heldout {Path(prefix).name}"] = result
        print(show(prefix, result))
    if args.heldout:
        from opencoder.files import write_json

        write_json(output / "heldout.json", {k: v for k, v in found.items() if k.startswith("heldout ")})
    return found


def one_benchmark(
    args: argparse.Namespace, name: str, tasks: list[Task], backend: Any, sandbox: Any, output: Path
) -> dict[str, Any]:
    """One benchmark of one model, from whichever source of texts."""
    from opencoder.eval import run as running
    from opencoder.eval.generation import Text, read_texts

    settings = make_settings(args, name)
    if args.generations:
        return running.score_file(
            tasks, read_texts(Path(args.generations)), sandbox, settings, output, args.generations
        )
    if args.canonical:
        without = [task.id for task in tasks if not task.solution]
        if without:
            raise UserError(f"{name} has no solutions of its own ({without[0]}): --canonical cannot check it")
        texts = [Text(task.id, 0, task.solution, "stop") for task in tasks]
        return running.score_file(tasks, texts, sandbox, settings, output, "the benchmark's own solutions")
    return running.evaluate(tasks, backend, sandbox, settings, output)


def make_settings(args: argparse.Namespace, name: str) -> Settings:
    """The settings of a run."""
    from opencoder.eval.generation import Sampling
    from opencoder.eval.run import Settings
    from opencoder.eval.sandbox.limits import Limits

    if args.canonical and (args.mode == "chat" or args.samples != 1):
        raise UserError("--canonical scores one completion for each task: leave out --mode chat and --samples")
    sampling = Sampling(args.mode, args.samples, args.temperature, args.top_p, args.max_new_tokens, args.seed)
    if args.generations and args.samples > 1 and args.temperature == 0:  # made elsewhere: not ours to refuse
        sampling = Sampling(args.mode, args.samples, 1.0, args.top_p, args.max_new_tokens, args.seed)
    limits = None
    if args.time_limit is not None:
        if args.time_limit <= 0:
            raise UserError(f"--time-limit {args.time_limit} must be above 0 seconds")
        limits = Limits(wall_s=args.time_limit, cpu_s=max(1, round(args.time_limit)))
    return Settings(name, sampling, tuple(args.k), args.workers, args.concurrency if args.server else 1, limits)


def make_backend(args: argparse.Namespace, model: Any) -> Any:
    """The source of texts, None where they come from a file."""
    if args.server:
        from opencoder.eval.server import Server

        key = ""
        if args.key_variable:
            key = os.environ.get(args.key_variable, "")
            if not key:
                raise UserError(f"the environment variable {args.key_variable} (--key-variable) is not set")
        return Server(args.server, args.served_model, key=key, timeout_s=args.timeout, retries=args.retries)
    if model:
        from opencoder.eval.local import Local

        return Local(model, device=args.device, dtype=args.dtype, batch_size=args.batch_size)
    return None


if __name__ == "__main__":
    run(main)
