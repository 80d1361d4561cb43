"""The memory of each dedup task against the formulas of docs/dedup.md, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from opencoder.corpus import dedup
from opencoder.native import text_engine

MEASURE = """
import json
import os
import sys
import numpy as np
from opencoder.corpus import dedup, minhash
from opencoder.corpus.dedup import groups
minhash._engine()

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

def entries(kind, m, keys):
    made = np.zeros(m, kind)
    made["key"] = np.random.default_rng(0).integers(1, 1 << 64, m, np.uint64)
    made["key"][: m - keys] = made["key"][m - keys :][: m - keys]
    made["document"] = np.arange(m)
    return made

text = " ".join(f"word{i % 100000}_{i}" for i in range(1_000_000))

for name, setup in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        exec(setup)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak so far
        before = status("VmRSS")
        answer = task()
        print(json.dumps([name, status("VmHWM") - before]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, name
"""
"""Prints name and bytes of each task, run in a process of its own that is forked when all is imported."""
M = 2_000_000
TOKENS = 1_000_000
LENGTH = len(" ".join(f"word{i % 100000}_{i}" for i in range(TOKENS)))
HASHED = LENGTH + 24 * TOKENS
SLACK = 8_000_000
"""Small objects, the permutations, the allocator's rounding."""

TASKS = {
    "first, affine32": ("task = lambda: dedup.first_keys([text], dedup.Recipe(16, 128))", HASHED),
    "first, fast": ("task = lambda: dedup.first_keys([text], dedup.Recipe(16, 128, scheme='fast'))", HASHED),
    "full, legacy": ("task = lambda: dedup.full_keys([text], dedup.Recipe(4, 128, scheme='legacy'))", HASHED + 16 * TOKENS),
    "full, fast": ("task = lambda: dedup.full_keys([text], dedup.Recipe(4, 128, scheme='fast'))", HASHED + 16 * TOKENS),
    "partition": (f"e = entries(groups.ENTRY, {M}, {M}); task = lambda: dedup.partition(e, 16)", 36 * M),
    "shared": (f"e = entries(groups.FIRST_ENTRY, {M}, {M // 2}); task = lambda: dedup.shared(e)", 36 * M),
    "forest": (f"e = entries(groups.ENTRY, {M}, {M // 2}); task = lambda: dedup.forest_of(e)", 120 * M),
    "forest of one bucket": (f"e = entries(groups.ENTRY, {M}, {M}); e['key'] = 7; task = lambda: dedup.forest_of(e)", 120 * M),
    "merge": (
        f"f = [np.stack([np.arange({M // 2}), np.arange({M // 2}) + {M} * (1 + i)], 1) for i in range(2)]\n"
        "task = lambda: dedup.merge_forests(f)",
        130 * M,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> dict[str, int]:
    """Bytes that each task takes at its peak."""
    tasks = json.dumps({name: task for name, (task, _) in TASKS.items()})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tasks], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.skipif(text_engine() is None, reason="the C++ text engine was not built")
@pytest.mark.parametrize("name", TASKS)
def test_memory_stays_below_its_formula(name: str, measured: dict[str, int]) -> None:
    formula = TASKS[name][1]
    assert measured[name] <= formula + SLACK, f"{measured[name] / 1e6:.0f} MB"
    assert measured[name] >= formula / 4, f"{measured[name] / 1e6:.0f} MB: the formula says too much to be of use"


def test_the_document_names_the_true_probabilities() -> None:
    text = (Path(__file__).parents[2] / "docs" / "dedup.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| 0.")]
    assert len(rows) == 10
    for j, *found in rows:
        shapes = [(bands, rows_) for bands, rows_, _ in dedup.PRESETS.values()]
        assert found == [f"{dedup.candidate_probability(float(j), *shape):.4f}" for shape in shapes]
