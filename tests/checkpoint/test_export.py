"""Export and import of large models: from the master weights, in bounded memory, on several ranks."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from opencoder.checkpoint import folders, hf, hf_export, native
from opencoder.parallel.mesh import create_mesh
from tests.checkpoint.test_hf import model_of, saved
from tests.checkpoint.test_native import train_and_save
from tests.harness import run_ranks
from tests.train.test_run import TORCHRUN


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: t for file in sorted(folder.glob("*.safetensors")) for key, t in load_file(file).items()}


@pytest.fixture(scope="module")
def bf16_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained a step in bf16 at tp 2, with fp32 master weights."""
    folder = tmp_path_factory.mktemp("bf16")
    run_ranks(train_and_save, 2, 2, str(folder), torch.bfloat16)
    return folder


@pytest.mark.parametrize(
    ("dtype", "prefix"), [("fp32", "optim.master."), ("fp16", "optim.master."), (None, ""), ("bf16", "")]
)
def test_another_type_is_made_from_the_master_weights(
    dtype: str | None, prefix: str, bf16_run: Path, tmp_path: Path
) -> None:
    found = weights(hf_export.export(bf16_run, tmp_path / "hf", dtype=dtype))
    target = hf_export.DTYPES[dtype or "bf16"]
    checkpoint = folders.resolve(bf16_run)
    for key, tensor in found.items():
        truth = {prefix + key: torch.empty(tensor.shape, dtype=torch.float32 if prefix else torch.bfloat16)}
        native.load_whole(checkpoint, truth)
        assert tensor.dtype == target
        assert torch.equal(tensor, truth[prefix + key].to(target)), key
    if prefix:
        assert any(not torch.equal(t, t.bfloat16().to(target)) for t in found.values()), "masters must differ"


def test_each_process_writes_its_share_and_the_bytes_are_the_same(bf16_run: Path, tmp_path: Path) -> None:
    options = ["--from", "native", "--to", "hf", "--input", str(bf16_run), "--dtype", "fp32", "--output"]
    module = "opencoder.tools.convert_checkpoint"
    one = subprocess.run([sys.executable, "-m", module, *options, str(tmp_path / "one")], text=True, check=False)
    two = subprocess.run(
        [*TORCHRUN, "-m", module, *options, str(tmp_path / "two")], capture_output=True, text=True, check=False
    )
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert two.stdout == f"wrote {tmp_path / 'two'}\n"
    digests = [
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    ]
    assert digests[0] == digests[1]


def write_files(rank: int, world: int, run: str, output: str) -> list[str]:
    """The files that this rank opened for writing."""
    opened: list[str] = []
    write = hf_export.write_header

    def noted(file: Any, *args: Any) -> None:
        opened.append(Path(file.name).name)
        write(file, *args)

    hf_export.write_header = noted
    hf_export.export(run, output, shard_bytes=40_000, world=create_mesh(tp=world).world)
    return opened


def test_files_are_shared_out(bf16_run: Path, tmp_path: Path) -> None:
    one, two = run_ranks(write_files, 2, str(bf16_run), str(tmp_path / "hf"))
    everything = {p.name for p in (tmp_path / "hf").glob("*.safetensors")}
    assert set(one) | set(two) == everything
    assert not set(one) & set(two)
    assert abs(len(one) - len(two)) <= 1
    assert len(everything) > 2


def anonymous_kib() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0])


MIB = 2**20


def save_large(rank: int, world: int, run: str) -> None:
    """384 MiB of fp32 in tensors of 32 and 8 MiB."""
    saved(model_of(LARGE, torch.float32), Path(run))


LARGE = {"hidden_size": 1024, "heads": 8, "kv_heads": 8, "head_dim": 128, "ffn_size": 2048, "vocab_size": 8192,
         "padded_vocab_size": 8192, "layers": 8}  # fmt: skip


def convert_large(rank: int, world: int, run: str, output: str) -> tuple[int, int]:
    """(peak of anonymous memory above the start in bytes, bytes of the largest file), seen after every tensor."""
    peak = start = anonymous_kib()
    tensor = hf_export._Plan._tensor

    def watched(*args: Any) -> Any:
        nonlocal peak
        found = tensor(*args)
        peak = max(peak, anonymous_kib())
        return found

    hf_export._Plan._tensor = watched  # type: ignore[method-assign]
    folder = hf_export.export(run, output, dtype="bf16")
    return (peak - start) * 1024, max(p.stat().st_size for p in folder.iterdir())


def test_memory_of_an_export_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    run_ranks(save_large, 1, str(tmp_path / "run"))
    ((extra, largest),) = run_ranks(convert_large, 1, str(tmp_path / "run"), str(tmp_path / "hf"))
    assert largest > 150 * MIB, "the case must have a large file"
    assert extra < 4 * 32 * MIB, f"{extra / MIB:.0f} MiB"
    assert extra < 1.3 * largest


def test_an_import_holds_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hf_export.export(saved(model_of({}, torch.float32), tmp_path / "run"), tmp_path / "hf", shard_bytes=40_000)
    alive: list[Any] = []
    most = 0
    read = hf._Reader.tensor

    def watched(self: Any, *args: Any) -> torch.Tensor:
        nonlocal most
        gc.collect()
        most = max(most, 1 + sum(ref() is not None for ref in alive))
        tensor = read(self, *args)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(hf._Reader, "tensor", watched)
    back = hf.import_(folder, tmp_path / "native")
    assert len(alive) == len(weights(folder))
    assert most <= 2
    for key, truth in weights(folder).items():
        found = {key: torch.zeros_like(truth)}
        native.load_whole(back, found)
        assert torch.equal(found[key], truth), key


def test_the_header_is_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.arange(5, dtype=torch.float32)}
    with open(tmp_path / "x.safetensors", "wb") as file:
        hf_export.write_header(file, {k: tuple(t.shape) for k, t in tensors.items()}, torch.float32)
        for tensor in tensors.values():
            file.write(tensor.numpy().tobytes())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert list(file.keys()) == ["a", "b"]
        assert all(torch.equal(file.get_tensor(k), t) for k, t in tensors.items())
    assert os.path.getsize(tmp_path / "x.safetensors") % 4 == 0
