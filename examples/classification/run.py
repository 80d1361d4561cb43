"""Classes from real Python code, learnt with full, random and KNN softmax: one command, from source files to a report.

    python examples/classification/run.py --output DIR [--input PATH…] [--task functions calls] [--steps N]

extract → tokenizer → crops → datasets → `opencoder train` once for each method → DIR/report.html, report.md, plot.png. Every stage
runs the command that a user would run, and leaves a marker: an interrupted run goes on where it stopped."""

from __future__ import annotations

import base64
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from opencoder.console import Parser, run
from opencoder.errors import Failure, UserError
from opencoder.files import write_json, write_text

HERE = Path(__file__).parent
VOCABULARY, TOKENS, DIM, BATCH = 4096, 32, 64, 512
OPTIM: dict[str, Any] = {
    "lr": 2e-4, "min_lr": 2e-5, "warmup_steps": 4, "schedule": "cosine", "weight_decay": 0.0, "clip_norm": None, "momentum": 0.0,
    "groups": [{"match": "lm_head.*", "lr_scale": 5e4}],
}  # fmt: skip
"""A class is seen a few times in all, so its row must come near its samples in one update: plain SGD (`optimizer: sgd` of the head),
whose gradient is divided by the batch, at a rate of that order. The encoder must stay about what it was meanwhile: it moves slowly."""
METHODS: dict[str, dict[str, Any]] = {
    "full": {"selection": "full"},
    "random": {"selection": "random", "rho": 0.1},
    "random, corrected": {"selection": "random", "rho": 0.1, "tail_correction": True},
    "knn": {"selection": "knn", "rho": 0.1, "neighbours": 24, "uniform_mix": 0.2},
    "knn, corrected": {"selection": "knn", "rho": 0.1, "neighbours": 24, "uniform_mix": 0.2, "tail_correction": True},
}
TASKS = {"functions": "Which function is this crop from?", "calls": "What is called here?"}


def config_of(folder: Path, task: str, method: str, *, classes: int, steps: int, run_dir: Path) -> dict[str, Any]:
    """The configuration of one training run."""
    how = {"kind": "class", "classes": classes, "variant": "cosine", "scale": 20.0, "optimizer": "sgd"}
    head: dict[str, Any] = how | METHODS[method]
    if head["selection"] == "knn":
        head["neighbours"] = min(head["neighbours"], classes)
        # A graph of 100,000 classes takes as long as dozens of steps: made four times, not whenever a probe asks for it.
        head["rebuild"] = {"first_step": steps // 8, "every": steps // 4, "background": False, "probe_recall": 0.0}
    held_out = json.loads((folder / "held_out.classification.json").read_text())["samples"]
    return {
        "run_dir": str(run_dir),
        "model": {
            "layers": 1, "hidden_size": DIM, "heads": 2, "ffn_size": 2 * DIM, "vocab_size": VOCABULARY, "max_seq_len": TOKENS,
            "head": head,
        },
        "data": {
            "kind": "classification", "blend": [{"prefix": str(folder / "train")}], "validation": str(folder / "held_out"),
            "seq_len": TOKENS,
        },
        "train": {
            "steps": steps, "global_batch_size": BATCH, "micro_batch_size": BATCH, "eval_every": steps,
            "eval_samples": min(20_480, held_out), "device": "cpu",
        },
        "optim": OPTIM,
        "log": {"every": max(1, steps // 20), "tensorboard": False},
    }  # fmt: skip


class Example:
    """The stages in `root`, each done once."""

    def __init__(self, args: Any) -> None:
        self.args, self.root = args, args.output
        self.facts: dict[str, Any] = {}

    def once(self, name: str, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `stage` returned, now or when it was done before, with its seconds."""
        marker = self.root / "state" / f"{name.replace(', ', '-')}.json"
        if not marker.is_file():
            print(f"== {name}", flush=True)
            start = time.monotonic()
            facts = stage()
            write_json(marker, {**facts, "seconds": round(time.monotonic() - start, 1)})
        found: dict[str, Any] = json.loads(marker.read_text())
        print(f"== {name}: {found['seconds']} s", flush=True)
        return found

    def run(self) -> dict[str, Any]:
        """All stages; what the report tells."""
        results: dict[str, Any] = {"tasks": {}}
        results["settings"] = self.once("settings", self.settings)
        if {k: v for k, v in results["settings"].items() if k != "seconds"} != self.settings():
            raise UserError(f"{self.root} holds a run with other settings: remove it, or choose another --output")
        results["extract"] = self.once("extract", self.extract)
        results["tokenizer"] = self.once("tokenizer", self.tokenizer)
        for task in self.args.task:
            data = self.once(f"{task} data", lambda task=task: self.dataset(task))
            runs = {m: self.once(f"{task} {m}", lambda task=task, m=m: self.train(task, m)) for m in self.args.methods}
            results["tasks"][task] = {"data": data, "runs": runs}
        return results

    def settings(self) -> dict[str, Any]:
        a = self.args
        return {"classes": a.classes, "steps": a.steps, "input": [str(p) for p in a.input or []]}

    def extract(self) -> dict[str, Any]:
        inputs = ["--input", *map(str, self.args.input)] if self.args.input else []
        target = self.root / "extracted"
        _python(HERE / "extract.py", "--output", target, "--classes", self.args.classes, *inputs)
        facts: dict[str, Any] = json.loads((target / "facts.json").read_text())
        return facts

    def tokenizer(self) -> dict[str, Any]:
        texts = self.root / "extracted" / "functions.parquet"
        _opencoder("train-tokenizer", "--input", texts, "--output", self.root / "tokenizer", "--vocab-size", VOCABULARY)
        return {"entries": VOCABULARY}

    def dataset(self, task: str) -> dict[str, Any]:
        folder, extracted = self.root / task, self.root / "extracted"
        tokenizer = self.root / "tokenizer"
        how = ["--task", task, "--extracted", extracted, "--tokenizer", tokenizer, "--output", folder]
        _python(HERE / "crops.py", *how, "--tokens", TOKENS)
        facts = json.loads((extracted / "facts.json").read_text())
        classes = facts["function classes" if task == "functions" else "callee classes"]
        counts = {"classes": classes}
        for side in ("train", "held_out"):
            how = ["--input", folder / f"{side}.parquet", "--output-prefix", folder / side, "--classes", classes]
            _opencoder("write-classification", *how, "--vocab-size", VOCABULARY)
            counts[side] = json.loads((folder / f"{side}.classification.json").read_text())["samples"]
        return counts

    def train(self, task: str, method: str) -> dict[str, Any]:
        folder = self.root / task
        name = method.replace(", ", "-")
        classes = json.loads((folder / "train.classification.json").read_text())["classes"]
        run_dir = self.root / "runs" / f"{task}-{name}"
        tree = config_of(folder, task, method, classes=classes, steps=self.args.steps, run_dir=run_dir)
        config = folder / f"{name}.yaml"
        write_text(config, yaml.safe_dump(tree, sort_keys=False))
        start = time.monotonic()
        _opencoder("train", config)
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return {**measured(rows), "wall_s": round(time.monotonic() - start, 1)}


def measured(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the metrics of a run: accuracy at its end, median step, highest memory, and the last of what tells of the selection."""
    found: dict[str, Any] = {
        "step_ms": 1e3 * statistics.median(row["step_s"] for row in rows[len(rows) // 4 :]),
        "mem_gib": max(row["mem_gib"] for row in rows),
        "losses": [[row["step"], row["loss"]] for row in rows],
        "load": os.getloadavg()[0],
    }
    for key in ("accuracy", "accuracy_top5", "eps", "coverage", "active_per_label", "probe_recall"):
        values = [row[key] for row in rows if row.get(key) is not None]
        found[key] = values[-1] if values else None
    if found["accuracy"] is None:
        raise Failure("the run was not evaluated: metrics.jsonl has no accuracy")
    return found


def _python(script: Path, *args: object) -> None:
    _call([sys.executable, str(script), *map(str, args)])


def _opencoder(*args: object) -> None:
    _call([sys.executable, "-m", "opencoder.tools.cli", *map(str, args)])


def _call(argv: list[str]) -> None:
    done = subprocess.run(argv, check=False)
    if done.returncode:
        raise Failure(f"`{' '.join(argv[1:])}` ended with status {done.returncode}; what it said stands above")


def table(results: dict[str, Any], task: str) -> str:
    """Markdown table of the runs of a task."""
    lines = [
        "| method | top-1 | top-5 | step ms | memory GiB | missing mass | coverage | run s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, r in results["tasks"][task]["runs"].items():
        eps, coverage = (("-" if r[k] is None else f"{r[k]:.3f}") for k in ("eps", "coverage"))
        lines.append(
            f"| {method} | {r['accuracy']:.4f} | {r['accuracy_top5']:.4f} | {r['step_ms']:.0f} | {r['mem_gib']:.2f} | {eps} | "
            f"{coverage} | {r['wall_s']:.0f} |"
        )
    return "\n".join(lines)


def write_plot(results: dict[str, Any], path: Path) -> None:
    """Loss, accuracy, step time and memory of each method; a row for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = results["tasks"]
    figure, axes = plt.subplots(len(tasks), 4, figsize=(15, 3.6 * len(tasks)), squeeze=False, layout="constrained")
    for row, (task, found) in zip(axes, tasks.items(), strict=True):
        runs = found["runs"]
        colours = {method: f"C{list(METHODS).index(method)}" for method in runs}
        for method, r in runs.items():
            steps, losses = zip(*r["losses"], strict=True)
            row[0].plot(steps, losses, label=method, color=colours[method], linewidth=1)
        row[0].set(
            title=f"{task}: {found['data']['classes']:,} classes", xlabel="step", ylabel="loss over scored classes"
        )
        row[0].legend()
        bars = {"held-out top-1": "accuracy", "ms a step": "step_ms", "peak memory, GiB": "mem_gib"}
        for ax, (title, key) in zip(row[1:], bars.items(), strict=True):
            made = ax.bar(list(runs), [r[key] for r in runs.values()], color=list(colours.values()))
            ax.bar_label(made, fmt="%.0f" if key == "step_ms" else "%.3g")
            ax.set(title=title)
            ax.margins(y=0.15)
            ax.tick_params(axis="x", rotation=15 if len(runs) > 3 else 0)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(results: dict[str, Any], root: Path) -> None:
    """report.json, plot.png, report.md and report.html."""
    from jinja2 import Environment

    write_json(root / "report.json", results)
    write_plot(results, root / "plot.png")
    facts = {k: v for k, v in results["extract"].items() if k != "seconds"}
    texts = [f"{name}: {value:,}" for name, value in facts.items()]
    parts = ["# Classes from real Python code", "", "Found: " + "; ".join(texts) + ".", ""]
    for task, found in results["tasks"].items():
        data = found["data"]
        parts += [
            f"## {TASKS[task]}",
            f"{data['classes']:,} classes, {data['train']:,} samples for training, {data['held_out']:,} held out; "
            f"{results['settings']['steps']} steps of {BATCH}.",
            "",
            table(results, task),
            "",
        ]
    parts += ["![loss, accuracy, step time, memory](plot.png)", ""]
    write_text(root / "report.md", "\n".join(parts))
    image = base64.b64encode((root / "plot.png").read_bytes()).decode()
    tables = {}
    for task in results["tasks"]:
        head, _, *rows = [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in table(results, task).splitlines()
        ]
        tables[task] = [head, *rows]
    page = Environment(autoescape=True).from_string(PAGE)
    write_text(
        root / "report.html", page.render(facts=texts, tasks=results["tasks"], titles=TASKS, tables=tables, image=image)
    )


PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Classes from code</title>
<style>body{font:16px sans-serif;max-width:70em;margin:1em auto;padding:0 1em}td,th{padding:.2em .8em;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}tr:nth-child(even){background:#8881}div{overflow-x:auto}</style>
<h1>Classes from real Python code</h1><p>{{ facts | join("; ") }}.</p>
{% for task, found in tasks.items() %}<h2>{{ titles[task] }}</h2>
<p>{{ "{:,}".format(found.data.classes) }} classes, {{ "{:,}".format(found.data.train) }} samples for training,
{{ "{:,}".format(found.data.held_out) }} held out.</p><div><table>
{% for row in tables[task] %}{% set cell = "th" if loop.first else "td" %}<tr>
{% for value in row %}<{{ cell }}>{{ value }}</{{ cell }}>{% endfor %}</tr>{% endfor %}</table></div>{% endfor %}
<p><img alt="loss, accuracy, step time and memory of each method" src="data:image/png;base64,{{ image }}"></p>
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done yet; print the tables and the report's path."""
    parser = Parser("classification: run.py", "Full, random and KNN softmax on classes from real Python code.")
    parser.add_argument("--output", type=Path, required=True, help="folder of everything the example makes")
    parser.add_argument(
        "--input", nargs="*", type=Path, help="Python code (default: what this interpreter has installed)"
    )
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS), help="which classes")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=["full", "random", "knn, corrected"], help="runs"
    )
    parser.add_argument("--classes", type=int, default=100_000, help="functions to learn; 0: all that are found")
    parser.add_argument("--steps", type=int, default=480, help="steps of each run")
    args = parser.parse_args(argv)
    if args.steps < 20:
        raise UserError(f"--steps {args.steps}: at least 20, so that there is a warm-up and a graph")
    start = time.monotonic()
    results = Example(args).run()
    write_report(results, args.output)
    for task in results["tasks"]:
        print(f"\n{TASKS[task]}\n{table(results, task)}")
    print(f"\n{args.output / 'report.html'}; {time.monotonic() - start:.0f} s now")
    return 0


if __name__ == "__main__":
    run(main)
