"""`opencoder bench-export`: a native checkpoint of a model's shape to a Hugging Face folder, its time and its memory.

The checkpoint holds bf16 weights of normal noise and, with `--masters`, their fp32 masters, so that another type is made from
those. The export runs in a process of its own: what it takes beyond what the imports took is its memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opencoder.console import Parser, run

GOAL_S = 180.0
GOAL_MEMORY = 1.3
"""Peak beyond the imports, over the size of the largest file."""
EXPORT = """
import json, sys, time
from opencoder.checkpoint.hf_export import export
def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
source, target, dtype, shard = sys.argv[1:]
before, start = status("VmRSS"), time.perf_counter()
export(source, target, dtype=dtype, shard_bytes=int(shard))
print(json.dumps({"seconds": time.perf_counter() - start, "extra_bytes": status("VmHWM") - before}))
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the checkpoint, export it, print a table."""
    parser = Parser("bench-export", "Time and memory of an export to Hugging Face format.")
    parser.add_argument("--folder", default="/tmp/bench-export", help="on the disk to measure; made and removed")
    parser.add_argument("--preset", default="opencoder-1.5b", help="shape of the model")
    parser.add_argument("--layers", type=int, help="layers, if not the preset's")
    parser.add_argument(
        "--dtype", default="bf16", choices=("bf16", "fp32", "fp16"), help="type of the exported weights"
    )
    parser.add_argument("--masters", action="store_true", help="with fp32 masters, as a bf16 run has them")
    parser.add_argument("--shard-mb", type=int, default=5000, help="largest file of the export")
    args = parser.parse_args(argv)
    folder = Path(args.folder)
    folder.mkdir(parents=True)
    try:
        found = measure(folder, args.preset, args.layers, args.dtype, args.masters, args.shard_mb * 10**6)
    finally:
        shutil.rmtree(folder)
    print(table(found))
    return 0


def measure(
    folder: Path, preset: str, layers: int | None, dtype: str, masters: bool, shard_bytes: int
) -> dict[str, Any]:
    """Seconds, bytes beyond the imports, and sizes of the exported files."""
    model = {"preset": preset} | ({"layers": layers} if layers else {})
    checkpoint(folder / "run", model, masters)
    argv = [sys.executable, "-c", EXPORT, str(folder / "run"), str(folder / "hf"), dtype, str(shard_bytes)]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
    sizes = [file.stat().st_size for file in (folder / "hf").glob("*.safetensors")]
    return {**json.loads(done.stdout), "bytes": sum(sizes), "largest": max(sizes), "files": len(sizes)}


def checkpoint(run_dir: Path, model: dict[str, Any], masters: bool) -> None:
    """The newest checkpoint of `run_dir`."""
    import torch

    from opencoder.checkpoint import native
    from opencoder.checkpoint.hf_export import shapes
    from opencoder.config import Config
    from opencoder.parallel.mesh import Mesh
    from opencoder.parallel.placement import replicated

    config = Config.model_validate({"run_dir": str(run_dir), "model": model})
    tensors = {}
    for key, shape in shapes(config.model).items():
        whole = torch.randn(shape) * 0.02
        tensors[key] = (whole.bfloat16(), replicated(shape))
        if masters:
            tensors[f"optim.master.{key}"] = (whole, replicated(shape))
    state = {"tokens": 0, "consumed_samples": 0, "stages": [], "skipped_batches": []}
    native.save(run_dir, 1, tensors, Mesh(), config=config, state=state)


def table(found: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    extra, largest, seconds = found["extra_bytes"], found["largest"], found["seconds"]
    time_met = "met" if seconds <= GOAL_S else "short"
    memory_met = "met" if extra <= GOAL_MEMORY * largest else "short"
    return "\n".join(
        [
            f"| export of {found['bytes'] / 1e9:.2f} GB in {found['files']} files | measured | goal | |",
            "|---|---|---|---|",
            f"| seconds | {seconds:.1f} | ≤ {GOAL_S:.0f} | {time_met} |",
            f"| memory beyond the imports | {extra / 1e9:.2f} GB | ≤ {GOAL_MEMORY} × {largest / 1e9:.2f} GB, the largest "
            f"file | {memory_met} |",
        ]
    )


if __name__ == "__main__":
    run(main)
