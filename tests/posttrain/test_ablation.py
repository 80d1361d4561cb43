"""The staging ablation: what it measures, and the whole of it on a tiny model (slow)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from opencoder.errors import DataError
from opencoder.model.initialise import build_model
from opencoder.parallel.mesh import Mesh
from opencoder.posttrain.ablation import ARMS, Ablation, Setting, answer_loss, evenly
from tests.model.cases import model_config
from tests.posttrain.cases import conversations, labels_of, write

CPU = torch.device("cpu")


def test_answer_loss_is_the_mean_over_the_targets_of_every_conversation(tmp_path: Path) -> None:
    pairs = conversations(23)
    write(tmp_path / "a", pairs)
    model = build_model(model_config(), Mesh(), dtype=torch.float64, device=CPU, seed=1)
    total, count = 0.0, 0
    for pair in pairs:
        inputs, labels = (torch.tensor(part)[None] for part in labels_of(pair))
        total += float(cross_entropy(model(inputs)[0], labels[0], ignore_index=-100, reduction="sum").detach())
        count += int((labels >= 0).sum())
    assert answer_loss(model, str(tmp_path / "a"), seq_len=48) == pytest.approx(total / count, rel=1e-12)


def test_rows_are_chosen_evenly() -> None:
    rows = [{"n": i} for i in range(10)]
    assert [row["n"] for row in evenly(rows, 4)] == [0, 2, 5, 7]
    assert evenly(rows, 20) == rows


@pytest.mark.slow
def test_the_whole_ablation(tmp_path: Path, tokenizer: Path) -> None:
    """Every arm is trained on and learns; a second call trains nothing; another setting is refused."""
    model = tmp_path / "base"
    config = {
        "run_dir": str(model),
        "model": {"layers": 2, "hidden_size": 64, "heads": 4, "ffn_size": 96, "vocab_size": 400, "max_seq_len": 256},
        "data": {"tokenizer": str(tokenizer), "blend": [{"prefix": str(tmp_path / "d")}], "kind": "sft", "seq_len": 64},
        "train": {"steps": 2, "threads": 1},
        "checkpoint": {"seed": True},
    }
    write(tmp_path / "d", conversations(40))
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    subprocess.run([sys.executable, "-m", "opencoder.train", str(tmp_path / "c.yaml")], check=True)
    source = str(Path(json.__file__).parents[1] / "email")
    setting = Setting(
        str(model), (source,), broad=48, practical=24, held_out=8, epochs=2, seq_len=512, batch=4, lr=3e-3, threads=1
    )
    result = Ablation(setting, tmp_path / "out").run()
    losses = result["held_out_answer_loss"]
    assert list(losses) == list(ARMS)
    for arm in ARMS[1:]:
        assert all(losses[arm][kind] < losses["before"][kind] - 0.1 for kind in ("broad", "practical"))
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 10_000
    assert Ablation(setting, tmp_path / "out").run()["held_out_answer_loss"] == losses
    with pytest.raises(DataError, match="another setting"):
        Ablation(Setting(str(model), (source,), broad=61), tmp_path / "out").run()
