"""The estimate of `train --dry-run` against real steps: the peak of live tensors, and the bytes that Group has counted."""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from opencoder.config import Config, validate
from opencoder.errors import ConfigError
from opencoder.parallel.mesh import Mesh, create_mesh, kv_replicas_of
from opencoder.tools.bench_estimate import (
    LAYOUTS,
    Layout,
    TensorPeak,
    measure,
    take_steps,
    tree_of,
    within_goals,
    write_dataset,
)
from opencoder.train import memory_check
from opencoder.train.estimate import estimate
from tests.harness import run_ranks

MODEL: dict[str, Any] = {
    "hidden_size": 256, "heads": 4, "kv_heads": 2, "ffn_size": 704, "vocab_size": 8192, "max_seq_len": 1024,
    "head": {"chunk_tokens": 128},
}  # fmt: skip
RECOMPUTED = {modules: {"recompute": modules} for modules in ("full", "attention", "mlp")}
PAIRS: dict[str, dict[str, Any]] = {
    "tp2-sp-full": {"parallel": {"tp": 2, "sequence_parallel": True}, "train": RECOMPUTED["full"]},
    "tp2-kv1-no-overlap": {
        "parallel": {"tp": 2, "overlap": False},
        "train": RECOMPUTED["mlp"],
        "model": {**MODEL, "kv_heads": 1},
    },
    "cp2": {"parallel": {"cp": 2}, "train": RECOMPUTED["attention"]},
    "cp2-ulysses": {"parallel": {"cp": 2, "context_attention": "ulysses"}},
    "dp2-sharded": {"parallel": {"sharded_optimizer": True}},
    "pp2": {"parallel": {"pp": 2}},
    "pp2-zb": {"parallel": {"pp": 2, "schedule": "zb"}, "model": {**MODEL, "vocab_size": 512}, "seq_len": 1024},
    "pp2-zbv": {"parallel": {"pp": 2, "schedule": "zbv", "virtual_stages": 2}},
}
"""Layouts of two processes."""
MORE_PAIRS: dict[str, dict[str, Any]] = {
    "tp2": {"parallel": {"tp": 2}},
    "tp2-sp": {"parallel": {"tp": 2, "sequence_parallel": True}},
    "tp2-sp-no-overlap": {"parallel": {"tp": 2, "sequence_parallel": True, "overlap": False}},
    "dp2-bf16": {"train": {"precision": "bf16"}},
    "pp2-interleaved-full": {
        "parallel": {"pp": 2, "schedule": "interleaved", "virtual_stages": 2},
        "train": RECOMPUTED["full"],
    },
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data"
    write_dataset(path, 20_000, 512)
    return path


def observe(rank: int, world: int, tree: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Peak of live tensor bytes of the updates, and bytes handed over in the last."""
    config = Config.model_validate(tree)
    p = config.parallel
    mesh = create_mesh(tp=p.tp, pp=p.pp, cp=p.cp, kv_replicas=kv_replicas_of(config.model.kv_heads, p.tp))
    with TensorPeak() as tensors:
        sent = take_steps(config, mesh, torch.device("cpu"))
    handed_over: dict[str, int] = defaultdict(int)
    for key, size in sent.items():
        group, _, operation = key.rpartition(" ")
        if operation != "receive":  # the other side's send
            handed_over["pp send" if operation == "send" else f"{group} {operation}"] += size
    return tensors.bytes, dict(handed_over)


@pytest.mark.parametrize("name", [*PAIRS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_PAIRS)])
def test_peak_and_traffic_are_as_foretold(tmp_path: Path, prefix: Path, name: str) -> None:
    tree = tree_of(Layout(2, 4, 3, **{"model": MODEL, "seq_len": 256, **(PAIRS | MORE_PAIRS)[name]}), tmp_path)
    tree["data"]["blend"] = [{"prefix": str(prefix)}]
    config = Config.model_validate(tree)
    validate(config, 2)
    foretold = estimate(config, 2, cuda=False)
    found = run_ranks(observe, 2, tree)
    assert max(peak for peak, _ in found) > 50e6
    ours = [foretold.ranks[rank if config.parallel.pp > 1 else 0] for rank in range(2)]
    shares = [one.peak.total / peak for one, (peak, _) in zip(ours, found, strict=True)]
    assert all(0.94 <= share <= 1.06 for share in shares), (shares, [one.peak for one in ours])
    for rank, (_, sent) in enumerate(found):
        expected: dict[str, int] = defaultdict(int)
        for axis, operation, size, _ in ours[rank].transfers:
            of_data = "cp" if config.parallel.cp > 1 else "dp"
            expected[f"{of_data if axis == 'data' else axis} {operation}"] += size
        for key in expected.keys() | sent.keys():
            # Beside tensors of the model: the count of targets, the loss, what the z-loss adds, the norm.
            assert 0 <= sent.get(key, 0) - expected[key] <= 24, (key, sent, dict(expected))


@pytest.mark.fast
def test_the_peak_counts_what_other_threads_free() -> None:
    """As gloo's do, which often hold the last reference to what was sent."""
    kept = [torch.ones(1 << 20)]
    with TensorPeak() as tensors:
        for _ in range(4):
            kept[0] = torch.ones(1 << 19)
            thread = threading.Thread(target=kept.clear)
            thread.start()
            thread.join()
            kept.append(torch.ones(1 << 18))
    assert tensors.bytes == 3 << 20  # the first 4 MiB were there before, and are not of the block
    with TensorPeak() as tensors:
        kept.clear()
    assert tensors.bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_peak_of_a_gib_is_as_foretold(name: str) -> None:
    row = measure(LAYOUTS[name])
    assert row["tensors"] >= 1e9
    assert within_goals(row), row


def test_more_of_anything_takes_more() -> None:
    def peak(**sections: Any) -> int:
        tree = tree_of(Layout(8, 8, 8, model=MODEL, seq_len=512), Path("unused"))
        for section, keys in sections.items():
            tree[section] = tree[section] | keys
        config = Config.model_validate(tree)
        validate(config, 8)
        return estimate(config, 8, cuda=True).peak

    plain = peak()
    assert peak(parallel={"sharded_optimizer": True}) < plain < peak(train={"micro_batch_size": 2})
    by_mode = [peak(train={"micro_batch_size": 8, "recompute": mode}) for mode in ("none", "attention", "mlp", "full")]
    assert by_mode == sorted(by_mode, reverse=True)
    assert len(set(by_mode)) == 4


# ---- train.memory_check ----


def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int | None, setting: str) -> None:
    monkeypatch.setattr(memory_check, "free_memory", lambda device: free)
    config = Config.model_validate(tree_of(Layout(1, 4, 3, model=MODEL, train={"memory_check": setting}), tmp_path))
    memory_check.check_memory(config, Mesh(), torch.device("cpu"))


def test_too_little_memory_is_told_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"estimated peak is 0\.\d\d GiB, 0\.02 GiB are free"):
        checked(tmp_path, monkeypatch, 20 << 20, "refuse")
    assert capsys.readouterr().out == ""
    checked(tmp_path, monkeypatch, 20 << 20, "warn")
    assert "warning: rank 0: the estimated peak" in capsys.readouterr().out
    for free, setting in ((20 << 20, "off"), (1 << 40, "refuse"), (None, "refuse")):
        checked(tmp_path, monkeypatch, free, setting)
        assert capsys.readouterr().out == ""


def test_free_memory_is_what_the_control_group_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  4000 kB\n")
    monkeypatch.setattr(memory_check, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory_check, "CGROUP", tmp_path)
    cpu = torch.device("cpu")
    assert memory_check.free_memory(cpu) == 4000 * 1024
    for name, text in (("max", "max\n"), ("current", "3000000\n"), ("stat", "anon 2000000\ninactive_file 500000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory_check.free_memory(cpu) == 4000 * 1024
    (tmp_path / "memory.max").write_text("5000000\n")
    assert memory_check.free_memory(cpu) == 2500000
    for name in ("meminfo", "memory.max"):
        (tmp_path / name).unlink()
    assert memory_check.free_memory(cpu) is None
