"""The example configurations of the two stages say what docs/posttraining.md says of them, and are valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from opencoder.config import load_config, validate

pytestmark = pytest.mark.fast
FOLDER = Path(__file__).parents[2] / "examples" / "posttraining"


@pytest.mark.parametrize(("name", "epochs", "batch", "lr"), [("stage1", 1, 4096, 2e-5), ("stage2", 3, 512, 5e-5)])
def test_stages_are_the_published_ones(name: str, epochs: int, batch: int, lr: float) -> None:
    config = load_config(FOLDER / f"{name}.yaml", ["train.steps=1000"])  # as data.sft.epochs comes to with data
    validate(config, 8)
    assert (config.data.kind, config.data.sft.epochs, config.train.global_batch_size) == ("sft", epochs, batch)
    assert (config.optim.schedule, config.optim.lr, config.optim.warmup_steps) == ("cosine", lr, 100)
    assert config.checkpoint.load is not None


def test_the_demo_is_tuned_at_the_size_of_its_model() -> None:
    config = load_config(FOLDER / "demo.yaml", ["train.steps=100"])
    validate(config, 1)
    assert (config.model.hidden_size, config.model.max_seq_len, config.checkpoint.load) == (256, 512, "demo/hf")
