"""The training command: resume, signals, kills, metrics, and what it refuses to start with."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from opencoder.checkpoint import folders, native
from opencoder.config import load_config
from opencoder.data.indexed import IndexedWriter
from opencoder.optim.schedule import lr_at
from opencoder.train.metrics import read_rows

TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "--shutdown-timeout",
    "60",
]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "d"
    draw = np.random.default_rng(0)
    with IndexedWriter(path, np.uint16) as writer:
        for _ in range(200):
            start = int(draw.integers(0, 200))
            writer.add_document(((start + np.arange(int(draw.integers(5, 60)))) % 250).tolist())
    return path


def config(tmp_path: Path, prefix: Path, name: str = "run", **sections: Any) -> Path:
    tree: dict[str, Any] = {
        "run_dir": str(tmp_path / name),
        "model": {
            "layers": 2,
            "hidden_size": 64,
            "heads": 4,
            "kv_heads": 2,
            "ffn_size": 96,
            "vocab_size": 250,
            "max_seq_len": 64,
        },
        "data": {"blend": [{"prefix": str(prefix)}], "seq_len": 32, "split": "90,10,0"},
        "train": {"steps": 12, "global_batch_size": 8, "micro_batch_size": 2, "threads": 1},
        "optim": {"lr": 3e-3, "warmup_steps": 2, "decay_steps": 4},
        "checkpoint": {"every": 4},
        "log": {"tensorboard": False},
    }
    for section, keys in sections.items():
        tree[section] = tree.get(section, {}) | keys
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(path: Path, *overrides: str, ranks: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    launcher = TORCHRUN if ranks == 2 else [sys.executable]
    done = subprocess.run(
        [*launcher, "-m", "opencoder.train", str(path), *overrides],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def losses(run: Path) -> list[float]:
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Path:
    """A run of 12 steps without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    train(config(folder, prefix, train={"eval_every": 6, "eval_samples": 8}, log={"tensorboard": True}))
    return folder / "run"


def test_metrics_hold_what_is_promised(whole: Path) -> None:
    rows = read_rows(whole / "metrics.jsonl")
    names = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "mem_gib", "data_wait_s", "step_s"}
    assert all(names <= set(row) for row in rows)
    assert [row["tokens"] for row in rows] == [8 * 32 * row["step"] for row in rows]
    assert abs(rows[0]["loss"] / math.log(256) - 1) < 0.05
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [row["step"] for row in rows if "valid_loss" in row] == [6, 12]
    assert rows[-1]["lr"] == pytest.approx(1e-5)
    assert rows[1]["lr"] == pytest.approx(3e-3)
    assert list((whole / "tb").iterdir())
    assert yaml.safe_load((whole / "config.yaml").read_text())["model"]["padded_vocab_size"] == 256
    assert (whole / "checkpoints" / "latest").read_text() == "step_00000012\n"


def same_checkpoints(a: Path, b: Path) -> bool:
    """Tensor by tensor, weights and optimizer state."""
    import torch

    tensors = []
    for run in (a, b):
        folder = folders.resolve(run)
        import torch.distributed.checkpoint as dcp

        metadata = dcp.FileSystemReader(folder / "tensors").read_metadata().state_dict_metadata
        whole = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in metadata.items()}  # type: ignore[union-attr]
        native.load_whole(folder, whole)
        tensors.append(whole)
    assert tensors[0].keys() == tensors[1].keys()
    return all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])


def test_stopped_by_sigterm_and_resumed_equals_an_undisturbed_run(tmp_path: Path, prefix: Path, whole: Path) -> None:
    path = config(tmp_path, prefix, train={"eval_every": 6, "eval_samples": 8})
    process = subprocess.Popen([sys.executable, "-m", "opencoder.train", str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 0
    assert "as asked; the same command goes on from here" in rest
    stopped_at = int(folders.resolve(tmp_path / "run").name.removeprefix("step_"))
    assert 5 <= stopped_at < 12
    assert f"at step {stopped_at}" in train(path).stdout
    assert losses(tmp_path / "run") == losses(whole)
    assert same_checkpoints(tmp_path / "run", whole)
    assert "nothing to do" in train(path).stdout


def test_two_processes_stopped_by_sigterm_save_and_resume(tmp_path: Path, prefix: Path, whole: Path) -> None:
    path = config(tmp_path, prefix)
    command = [*TORCHRUN, "-m", "opencoder.train", str(path), "parallel.tp=2", "train.steps=12"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)  # to torchrun, which hands it on to the workers
            break
    process.stdout.read()
    assert process.wait() == 1  # torchrun's own status
    assert 3 <= int(folders.resolve(tmp_path / "run").name.removeprefix("step_")) < 12
    train(path, "parallel.tp=2", ranks=2)
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-5)


def test_two_processes_that_save_in_the_background_stop_with_a_whole_checkpoint(
    tmp_path: Path, prefix: Path, whole: Path
) -> None:
    path = config(tmp_path, prefix, checkpoint={"every": 1, "async_save": True, "keep": 2}, parallel={"tp": 2})
    process = subprocess.Popen(
        [*TORCHRUN, "-m", "opencoder.train", str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5/"):
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    process.wait()
    assert all(folders.problem_of(folder) is None for folder in folders.list_checkpoints(tmp_path / "run"))
    stopped_at = folders.step_of(folders.resolve(tmp_path / "run"))
    assert 5 <= stopped_at < 12
    assert f"at step {stopped_at}" in train(path, ranks=2).stdout
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-5)
    assert len(folders.list_checkpoints(tmp_path / "run")) == 2
    assert all(row["save_wait_s"] >= 0 for row in read_rows(tmp_path / "run" / "metrics.jsonl"))


FULL_ON_ONE_RANK = """
import os, resource, runpy, signal, sys
if os.environ["RANK"] == "RANK_TO_FAIL":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    from opencoder.checkpoint import native
    write, files = native.write_parts, resource.getrlimit(resource.RLIMIT_FSIZE)
    def limited(folder, *args):
        if "step_00000008" in str(folder):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, files[1]))
        return write(folder, *args)
    native.write_parts = limited
sys.argv[0] = "train"
runpy.run_module("opencoder.train", run_name="__main__")
"""


@pytest.mark.parametrize(("rank", "in_background"), [(0, False), (1, False), (1, True)])
def test_a_disk_full_on_one_rank_ends_all_with_one_line(
    rank: int, in_background: bool, tmp_path: Path, prefix: Path
) -> None:
    """No file of that rank may grow beyond 4 KB from step 8 on."""
    path = config(tmp_path, prefix, train={"steps": 500}, checkpoint={"async_save": in_background})
    script = tmp_path / "train.py"
    script.write_text(FULL_ON_ONE_RANK.replace("RANK_TO_FAIL", str(rank)))
    start = time.monotonic()
    done = subprocess.run([*TORCHRUN, str(script), str(path)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert time.monotonic() - start < 60
    (line,) = [line for line in done.stderr.splitlines() if line.startswith(("failed:", "error:"))]
    assert "checkpoint of step 8 could not be written" in line
    assert f"rank {rank}: [Errno 27] File too large" in line
    assert folders.resolve(tmp_path / "run").name == "step_00000004"
    assert ("step 9/" in done.stdout) == in_background


def test_sigusr1_saves_and_goes_on(tmp_path: Path, prefix: Path) -> None:
    path = config(tmp_path, prefix, checkpoint={"every": None})
    process = subprocess.Popen([sys.executable, "-m", "opencoder.train", str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGUSR1)
            break
    process.stdout.read()
    assert process.wait() == 0
    saved = [int(p.name.removeprefix("step_")) for p in folders.list_checkpoints(tmp_path / "run")]
    assert len(saved) == 2
    assert 3 <= saved[0] < 12
    assert saved[1] == 12


@pytest.mark.parametrize("part", ["tensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("in_background", [False, True])
def test_killed_while_saving_and_started_again_equals_an_undisturbed_run(
    in_background: bool, part: str, tmp_path: Path, prefix: Path, whole: Path
) -> None:
    """kill -9 as soon as `part` of the second checkpoint exists in its temporary folder."""
    path = config(tmp_path, prefix, train={"eval_every": 6, "eval_samples": 8}, checkpoint={"every": 1})
    asynchronous = f"checkpoint.async_save={str(in_background).lower()}"
    process = subprocess.Popen(
        [sys.executable, "-m", "opencoder.train", str(path), asynchronous], stdout=subprocess.DEVNULL
    )
    target = tmp_path / "run" / "checkpoints" / ".step_00000002.tmp" / part
    final = tmp_path / "run" / "checkpoints" / "step_00000003"
    while process.poll() is None and not target.exists() and not final.exists():
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    train(path, asynchronous)
    assert losses(tmp_path / "run") == losses(whole)
    assert same_checkpoints(tmp_path / "run", whole)
    assert not list((tmp_path / "run" / "checkpoints").glob(".step_*"))


def test_resuming_at_another_layout_goes_on_with_the_same_data(tmp_path: Path, prefix: Path, whole: Path) -> None:
    path = config(tmp_path, prefix)
    stop = train(path, "optim.decay_steps=4", "train.steps=12", "checkpoint.every=6", ranks=2)  # dp 2
    assert "dp = 2" in stop.stdout
    found = losses(tmp_path / "run")
    assert found == pytest.approx(losses(whole), rel=1e-5)


def test_a_sharded_optimizer_trains_and_one_process_goes_on_from_it(tmp_path: Path, prefix: Path, whole: Path) -> None:
    path = config(tmp_path, prefix, checkpoint={"every": 4, "async_save": True})
    train(path, "parallel.sharded_optimizer=true", ranks=2)
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-5)
    for step in (8, 12):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08}")
    assert "at step 4" in train(path).stdout
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-5)


def test_a_longer_run_keeps_the_order_of_the_first_stage(tmp_path: Path, prefix: Path) -> None:
    path = config(tmp_path, prefix, optim={"schedule": "constant", "warmup_steps": 0, "decay_steps": 0})
    train(path, "train.steps=6")
    train(path, "train.steps=9")
    state = native.read_state(folders.resolve(tmp_path / "run"))
    assert [stage["num_samples"] for stage in state["stages"]] == [48, 24]
    assert len(losses(tmp_path / "run")) == 9


def test_stages_switch_and_resume_as_one_run(tmp_path: Path, prefix: Path) -> None:
    """Another blend, length and batch from step 6 on; gone on with from the step before the switch, and from the switch."""
    switch = {"from_step": 6, "seq_len": 16, "global_batch_size": 4, "blend": [{"prefix": str(prefix)}] * 2}
    data = {"fim": {"rate": 0.5, "min_tokens": 4, "ids": [247, 248, 249]}, "stages": [switch]}
    path = config(tmp_path, prefix, data=data, train={"steps": 9}, checkpoint={"every": 1})
    train(path)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["tokens"] for row in rows] == [256 * n for n in range(1, 7)] + [6 * 256 + 64 * n for n in range(1, 4)]
    state = native.read_state(folders.resolve(tmp_path / "run"))
    assert state["consumed_samples"] == 6 * 8 + 3 * 4
    assert [(stage["first_step"], stage["steps"]) for stage in state["stages"]] == [(0, 6), (6, 3)]
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "run", whole)
    for step in (6, 5):
        checkpoints = tmp_path / "run" / "checkpoints"
        for later in range(step + 1, 10):
            shutil.rmtree(checkpoints / f"step_{later:08d}")
        (checkpoints / "latest").write_text(f"step_{step:08d}\n")
        assert f"resumed from {checkpoints / f'step_{step:08d}'}" in train(path).stdout
        assert same_checkpoints(tmp_path / "run", whole)
        assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.parametrize("layout", ["parallel.pp=2", "parallel.cp=2", "parallel.tp=1"])
def test_stages_switch_at_any_layout(tmp_path: Path, prefix: Path, layout: str) -> None:
    """Also the evaluation, which keeps its samples."""
    switch = {"from_step": 2, "seq_len": 16, "global_batch_size": 4, "micro_batch_size": 1}
    data = {"stages": [switch], "document_mask": True}
    found = []
    for name, ranks in (("one", 1), ("two", 2)):
        path = config(tmp_path, prefix, name=name, data=data, train={"steps": 4, "precision": "fp64", "device": "cpu"})
        settings = ["train.eval_every=2", "train.eval_samples=8", "optim.decay_steps=0"]
        train(path, *settings, *([layout] if ranks == 2 else []), ranks=ranks)
        rows = read_rows(tmp_path / name / "metrics.jsonl")
        found.append([row[key] for row in rows for key in ("loss", "grad_norm", "tokens", "valid_loss") if key in row])
    assert len(found[0]) == 4 * 3 + 2
    assert found[1] == pytest.approx(found[0], rel=1e-9)


def test_weights_can_start_another_run(tmp_path: Path, prefix: Path, whole: Path) -> None:
    path = config(tmp_path, prefix, name="tuned", checkpoint={"load": str(whole)})
    train(path, "train.steps=2", "optim.decay_steps=0", "optim.warmup_steps=0")
    assert losses(tmp_path / "tuned")[0] < losses(whole)[0] - 0.1


def test_a_seed_checkpoint_starts_any_layout(tmp_path: Path, prefix: Path, whole: Path) -> None:
    path = config(tmp_path, prefix, train={"eval_every": 6, "eval_samples": 8})
    assert "checkpoint of step 0" in train(path, "checkpoint.seed=true", "checkpoint.async_save=true").stdout
    (seed,) = folders.list_checkpoints(tmp_path / "run")
    assert seed.name == "step_00000000"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    shutil.copytree(tmp_path / "run", tmp_path / "two")
    assert "at step 0" in train(path).stdout
    assert losses(tmp_path / "run") == losses(whole)
    assert same_checkpoints(tmp_path / "run", whole)
    train(path, f"run_dir={tmp_path / 'two'}", "parallel.tp=2", ranks=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), rel=1e-5)
    assert "is at step 12: choose an empty run_dir" in refused(path, "checkpoint.seed=true")


def test_a_fork_goes_on_with_the_whole_state_and_a_schedule_of_its_own(tmp_path: Path, prefix: Path) -> None:
    trunk = config(tmp_path, prefix, name="trunk", checkpoint={"every": 6}, train={"steps": 18})
    train(trunk)
    rows = read_rows(tmp_path / "trunk" / "metrics.jsonl")
    source = tmp_path / "trunk" / "checkpoints" / "step_00000006"
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "trunk").rglob("*")}
    same = config(tmp_path, prefix, name="same", checkpoint={"fork": str(source)}, train={"steps": 18})
    assert f"forked from {source} at step 6" in train(same).stdout
    found = read_rows(tmp_path / "same" / "metrics.jsonl")
    assert [(r["step"], r["loss"], r["lr"], r["tokens"]) for r in found] == [
        (r["step"], r["loss"], r["lr"], r["tokens"]) for r in rows[6:]
    ]
    assert same_checkpoints(tmp_path / "same", tmp_path / "trunk")
    # Decaying at once: the learning rates are those of a run that was planned to end at step 10.
    early = config(tmp_path, prefix, name="early", checkpoint={"fork": str(source)}, train={"steps": 10})
    train(early)
    found = read_rows(tmp_path / "early" / "metrics.jsonl")
    assert found[0]["loss"] == rows[6]["loss"]
    planned = load_config(early)
    assert [row["lr"] for row in found] == [lr_at(step, planned.optim, 10) for step in range(6, 10)]
    assert found[-1]["lr"] < found[0]["lr"]
    assert "nothing to do" in train(early).stdout  # the same command resumes the fork
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "trunk").rglob("*")}
    assert "did not begin with it" in refused(trunk, f"checkpoint.fork={source}")


def test_16_bit_training_learns_and_resumes(tmp_path: Path, prefix: Path, whole: Path) -> None:
    path = config(tmp_path, prefix, train={"precision": "bf16"})
    train(path)
    found = losses(tmp_path / "run")
    assert found == pytest.approx(losses(whole), rel=0.03)


def test_document_mask_trains(tmp_path: Path, prefix: Path) -> None:
    path = config(tmp_path, prefix, data={"document_mask": True, "workers": 1})
    train(path, "train.steps=4", "optim.decay_steps=0", "train.recompute=full")
    assert len(losses(tmp_path / "run")) == 4


# ---- refused ----


def refused(path: Path, *overrides: str) -> str:
    done = train(path, *overrides, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_what_cannot_start_is_refused_in_one_line(tmp_path: Path, prefix: Path) -> None:
    path = config(tmp_path, prefix)
    for overrides, says in [
        (["optim.lrr=1"], "did you mean `lr`"),
        (["parallel.tp=2"], "not a multiple of tp·pp·cp"),
        (["parallel.tp=3"], "model.heads=4 cannot be split over parallel.tp=3: set parallel.tp to one of [1, 2, 4]"),
        (["data.blend.0.prefix=/absent/d"], "/absent/d.bin does not exist"),
        (["data.tokenizer=/absent"], "holds no tokenizer.json"),
        (["data.blend=[]"], "data.blend is empty"),
        (["checkpoint.load=/absent"], "no checkpoint"),
    ]:
        assert says in refused(path, *overrides)


def test_a_cut_dataset_is_refused(tmp_path: Path, prefix: Path) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"d{suffix}").write_bytes(Path(f"{prefix}{suffix}").read_bytes())
    os.truncate(tmp_path / "d.bin", 1000)
    assert "truncated or another file" in refused(config(tmp_path, tmp_path / "d"))


def test_dataset_and_tokenizer_must_agree_with_the_model(tmp_path: Path, prefix: Path) -> None:
    from opencoder.data import tokenizer as tok

    for suffix in (".bin", ".idx"):
        (tmp_path / f"d{suffix}").write_bytes(Path(f"{prefix}{suffix}").read_bytes())
    facts = {"vocab_size": 999, "tokenizer_hash": "0" * 64, "eod_id": 7}
    (tmp_path / "d.json").write_text(json.dumps(facts))
    path = config(tmp_path, tmp_path / "d")
    assert "vocabulary of 999, model.vocab_size=250 is smaller" in refused(path)
    tok.save(tok.train(["x = 1\n" * 9], vocab_size=280), tmp_path / "tokenizer")
    use = f"data.tokenizer={tmp_path / 'tokenizer'}"
    assert "model.vocab_size=250 is smaller than the tokenizer" in refused(path, use)
    text = refused(path, use, "model.vocab_size=1000")
    assert re.search(r"tokenizer hash of data\.tokenizer=.* is [0-9a-f]{64}, of dataset .* 0{64}", text)


def test_a_checkpoint_without_a_shard_is_refused_by_name(tmp_path: Path, prefix: Path) -> None:
    path = config(tmp_path, prefix)
    train(path, "train.steps=4", "optim.decay_steps=0")
    shard = next((folders.resolve(tmp_path / "run") / "tensors").glob("*.distcp"))
    shard.unlink()
    assert f"lacks tensors/{shard.name}" in refused(path, "train.steps=8", "optim.decay_steps=0")


def test_a_damaged_checkpoint_leads_back_to_the_one_before(tmp_path: Path, prefix: Path, whole: Path) -> None:
    path = config(tmp_path, prefix, train={"eval_every": 6, "eval_samples": 8})
    train(path)
    shard = next((folders.resolve(tmp_path / "run") / "tensors").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    again = train(path)
    (line,) = [line for line in again.stderr.splitlines() if "WARNING" in line]
    assert f"tensors/{shard.name} has CRC-32" in line
    assert line.endswith("Going back to step_00000008")
    assert losses(tmp_path / "run") == losses(whole)
    assert same_checkpoints(tmp_path / "run", whole)


def test_another_sequence_length_is_not_a_resume(tmp_path: Path, prefix: Path) -> None:
    path = config(tmp_path, prefix)
    train(path, "train.steps=4", "optim.decay_steps=0")
    assert "started with 32" in refused(path, "data.seq_len=16", "train.steps=8", "optim.decay_steps=0")
    assert "checkpoint.resume=never" in refused(path, "checkpoint.resume=never")


def test_dry_run_prints_sizes_without_building(tmp_path: Path, prefix: Path) -> None:
    path = config(tmp_path, prefix)
    done = subprocess.run(
        [sys.executable, "-m", "opencoder.train", str(path), "--dry-run", "--world-size", "64", "model.preset=opencoder-8b",
         "model.layers=32", "model.hidden_size=4096", "model.heads=32", "model.kv_heads=8", "model.ffn_size=14336",
         "model.vocab_size=96640", "model.max_seq_len=8192", "parallel.tp=2", "train.global_batch_size=64", "optim.lr=3e-4"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "world 64 = tp 2 × pp 1 × cp 1 × dp 32" in done.stdout
    assert "7,771,262,976 in the model" in done.stdout
    assert "estimated peak" in done.stdout
    assert not (tmp_path / "run").exists()
