"""Training on two hosts: two network namespaces of one machine joined by a veth pair, each with a torchrun of its own.

    python -m tests.train.two_hosts --transcript FILE [CASE …]

Each case trains undisturbed, then again with every process of node 1 killed (-9) in the middle and node 1 started anew, and
compares the metrics of the two bit by bit. Needs root and `ip netns`; takes everything down again."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from opencoder.data.indexed import IndexedWriter
from opencoder.train.metrics import read_rows

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "examples" / "launch" / "torchrun.sh"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
STEPS = 16
KILL_AT = 6
EXACT = ("step", "loss", "grad_norm", "lr", "tokens")
"""Columns of the metrics that must not differ; the others are times."""


class Case(NamedTuple):
    """Processes on each node, and how the model is laid out over both."""

    processes: int
    overrides: tuple[str, ...] = ()


CASES = {
    "dp": Case(1),
    "pp": Case(1, ("parallel.pp=2",)),
    "tp-dp": Case(2, ("parallel.tp=2", "parallel.sharded_optimizer=true")),
}


def missing() -> str | None:
    """Why this cannot run here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "needs the command ip (iproute2)"
    probe = f"octest{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"ip netns add: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


def _pids(namespace: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True)
    return [int(pid) for pid in done.stdout.split()]


def kill_all(namespace: str) -> int:
    """SIGKILL to every process in the namespace, until there is none; how many there were at first."""
    first = pids = _pids(namespace)
    while pids:
        for pid in pids:
            with suppress(ProcessLookupError):  # ended by itself
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        pids = _pids(namespace)
    return len(first)


@contextmanager
def two_namespaces() -> Iterator[tuple[str, str]]:
    """Names of two namespaces that reach each other at ADDRESSES; gone at the end, with what runs in them."""
    names = (f"oc{os.getpid()}n0", f"oc{os.getpid()}n1")
    made = []
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            made.append(name)
        subprocess.run(
            [
                "ip",
                "link",
                "add",
                "veth0",
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                "veth1",
                "netns",
                names[1],
            ],
            check=True,
        )
        for i, name in enumerate(names):
            for command in (
                f"addr add {ADDRESSES[i]}/24 dev veth{i}",
                f"link set veth{i} up",
                "link set lo up",
            ):
                subprocess.run(["ip", "-netns", name, *command.split()], check=True)
        yield names
    finally:
        for name in made:
            kill_all(name)
            subprocess.run(["ip", "netns", "delete", name], check=True)


class Node:
    """The launch script on one of the two hosts; its output goes line by line to `heard` from a thread."""

    def __init__(self, namespace: str, index: int, case: Case, config: Path, heard: Callable[[str], None]) -> None:
        variables = {
            "NNODES": "2",
            "NPROC_PER_NODE": str(case.processes),
            "RDZV_ENDPOINT": f"{ADDRESSES[0]}:29500",
            "LOCAL_ADDR": ADDRESSES[index],
            "GLOO_SOCKET_IFNAME": f"veth{index}",
            "JOIN_TIMEOUT_S": "120",
            "CHECK": "0",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
        }
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, str(LAUNCHER), str(config), *case.overrides],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, args=(index, heard), daemon=True)
        self._reader.start()

    def _read(self, index: int, heard: Callable[[str], None]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            heard(f"node {index} | {line.rstrip()}")

    def wait(self, timeout_s: float) -> int:
        """Exit status, once all of its output has been heard."""
        status = self.process.wait(timeout_s)
        self._reader.join(10)
        return status


def make_config(folder: Path, run: str) -> Path:
    """A tiny training with a checkpoint every 4 steps, in the shared FOLDER."""
    prefix = folder / "data"
    if not prefix.with_suffix(".bin").is_file():
        draw = np.random.default_rng(0)
        with IndexedWriter(prefix, np.uint16) as writer:
            for _ in range(200):
                first = int(draw.integers(0, 200))
                writer.add_document(((first + np.arange(int(draw.integers(5, 60)))) % 250).tolist())
    model = dict(layers=2, hidden_size=64, heads=4, kv_heads=2, ffn_size=96, vocab_size=250, max_seq_len=64)
    tree: dict[str, Any] = {
        "run_dir": str(folder / run),
        "model": model,
        "data": {"blend": [{"prefix": str(prefix)}], "seq_len": 32},
        "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "threads": 1},
        "optim": {"lr": 3e-3, "warmup_steps": 2, "decay_steps": 4},
        "checkpoint": {"every": 4},
        "log": {"tensorboard": False, "every": 1},
    }
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(
    names: tuple[str, str], case: Case, config: Path, say: Callable[[str], None], *, kill: bool, timeout_s: float = 300
) -> None:
    """One training on both nodes; with `kill`, node 1 is lost at step KILL_AT and comes back. Raises RuntimeError."""
    reached, resumed = threading.Event(), threading.Event()

    def heard(line: str) -> None:
        say(line)
        # Rank 0, which tells of the steps, is on node 0: nodes are ranked by address.
        if line.startswith(f"node 0 | step {KILL_AT}/"):
            reached.set()
        if line.startswith("node 0 | resumed from"):
            resumed.set()

    nodes = [Node(name, i, case, config, heard) for i, name in enumerate(names)]
    if kill:
        if not reached.wait(timeout_s):
            raise RuntimeError(f"step {KILL_AT} was not reached within {timeout_s} s")
        say(f"node 1 | ---- kill -9 of all its {kill_all(names[1])} processes ----")
        nodes[1].wait(timeout_s)
        time.sleep(2)
        say("node 1 | ---- started again ----")
        nodes[1] = Node(names[1], 1, case, config, heard)
    statuses = [node.wait(timeout_s) for node in nodes]
    if statuses != [0, 0]:
        raise RuntimeError(f"exit statuses {statuses}, not 0")
    if resumed.is_set() != kill:
        raise RuntimeError(f"resumed from a checkpoint: {resumed.is_set()}, although killed: {kill}")


def exact_rows(run: Path) -> list[list[Any]]:
    """What must be equal bit by bit, for each step."""
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), [row["step"] for row in rows]
    return [[row[key] for key in EXACT] for row in rows]


def run_case(name: str, folder: Path, say: Callable[[str], None]) -> None:
    """Both trainings of a case. Raises AssertionError if they differ, RuntimeError if one does not end well."""
    case = CASES[name]
    layout = " ".join(case.overrides) or "data parallel"
    say(f"==== {name}: 2 nodes × {case.processes} processes, {layout} ====")
    with two_namespaces() as names:
        for run, kill in (("undisturbed", False), ("killed", True)):
            say(f"---- {run} ----")
            start = time.monotonic()
            train(names, case, make_config(folder, f"{name}-{run}"), say, kill=kill)
            say(f"---- {run}: {time.monotonic() - start:.0f} s ----")
    expected, found = (exact_rows(folder / f"{name}-{run}") for run in ("undisturbed", "killed"))
    assert found == expected, (found, expected)
    say(f"{name}: {', '.join(EXACT)} of all {STEPS} steps equal bit by bit; last loss {found[-1][1]!r}")


def shorten(line: str, folder: Path) -> str | None:
    """A line of the transcript without this machine's paths; None for those that say nothing of the run."""
    line = re.sub(r"/\S*/lib/python[\d.]+/site-packages/|/\S*/third_party/", "", line)
    line = line.replace(f"{folder}/", "").replace(str(ROOT) + "/", "").replace(sys.executable, "python")
    return None if re.search(r"\[rank\d+\]:(   |Traceback)|^node \d \| (kernels on|\[W.* socket\.cpp)", line) else line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases and print, or write, what the nodes said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(CASES)} (default: all)")
    parser.add_argument("--transcript", type=Path, help="file for what the nodes say, beside the terminal")
    args = parser.parse_args(argv)
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if reason := missing():
        parser.error(reason)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it is cleaned up after
    start, lines = time.monotonic(), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def say(text: str) -> None:
            line = shorten(text, folder)
            if line is not None:
                lines.append(f"{time.monotonic() - start:6.1f} {line}")
                print(lines[-1], flush=True)

        try:
            for name in args.cases or CASES:
                run_case(name, folder, say)
        finally:
            if args.transcript:
                args.transcript.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
