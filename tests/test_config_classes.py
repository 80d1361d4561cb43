"""The class head in the configuration: what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from opencoder.config import load_config, validate
from opencoder.errors import ConfigError

pytestmark = pytest.mark.fast

BASE = """
run_dir: r
model: {preset: demo, head: {kind: class, classes: 1003, dim: 32}}
data: {kind: classification, blend: [{prefix: d}], seq_len: 64}
train: {steps: 100}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ([], 1),
        ([], 8),
        (["model.head.selection=knn", "model.head.rho=1", "model.head.neighbours=1003"], 4),
        (["model.head.class_group=tp", "parallel.tp=2"], 4),
        (["model.head.class_group=world"], 2),
        (["data.validation=e", "train.eval_every=10"], 1),
        (["parallel.sharded_optimizer=true"], 2),
        (
            [
                "model={layers: 2, hidden_size: 8, encoder: {input: features, width: 5}, head: {kind: class, classes: 4}}"
            ],
            4,
        ),
    ],
)
def test_what_goes_together(config_file: Path, overrides: list[str], world_size: int) -> None:
    validate(load_config(config_file, [*overrides, "train.global_batch_size=8"]), world_size)


@pytest.mark.parametrize(
    ("overrides", "world_size", "says"),
    [
        # K > N, rho <= 0, tied embeddings with lazy rows, sparse exchange of W
        (["model.head.selection=knn", "model.head.neighbours=1004"], 1, "model.head.neighbours=1004 is more than"),
        (["model.head.rho=0"], 1, "`model.head.rho`=0: Input should be greater than 0"),
        (["model.head.rho=-0.1"], 1, "`model.head.rho`=-0.1: Input should be greater than 0"),
        (["model.head.rho=1.5"], 1, "`model.head.rho`=1.5: Input should be less than or equal to 1"),
        (["model.tie_embeddings=true"], 1, "model.tie_embeddings=true does not go with model.head.kind=class"),
        (["model.tie_embeddings=true"], 1, "updated row by row (row_update=lazy)"),
        (["model.head.grad_compression=topk"], 1, "a row of the class matrix belongs to one rank, so that its gradient is not"),
        # the rest
        (["model.head.uniform_mix=1"], 1, "less than 1"),
        (["model.head.classes=null"], 1, "kind: class needs `classes`"),
        (["model.head.classes=3"], 4, "model.head.classes=3 cannot be split over the 4 ranks"),
        (["model.head.kind=vocab"], 1, "classes, dim: for kind class alone"),
        (["model.head={kind: vocab}"], 1, "data.kind=classification goes with model.head.kind=class"),
        (["data.kind=lm"], 1, "set data.kind=classification, not lm"),
        (["parallel.pp=2"], 2, "parallel.pp=2 does not go with model.head.kind=class"),
        (["parallel.cp=2"], 2, "parallel.cp=2 does not go with model.head.kind=class"),
        (["parallel.tp=2"], 2, "set model.head.class_group=tp"),
        (["data.blend=[]"], 1, "give one {prefix}, not 0"),
        (["data.blend=[{prefix: a}, {prefix: b}]"], 1, "give one {prefix}, not 2"),
        (["data.split='9,1,0'"], 1, "data.split=9,1,0 does not go with"),
        (["train.z_loss=1e-4"], 1, "train.z_loss=0.0001 does not go with"),
        (["train.eval_every=5"], 1, "data.validation and train.eval_every go together"),
        (["data.validation=e"], 1, "data.validation and train.eval_every go together"),
        (["model.encoder.input=features"], 1, "`width` is needed with input: features"),
        (["model.encoder.width=5"], 1, "`width` is needed with input: features"),
        (["model.encoder={input: features, width: 5}", "train.recompute=full"], 1, "train.recompute does not go with"),
    ],
)  # fmt: skip
def test_53_settings_that_cannot_be_are_refused(
    config_file: Path, overrides: list[str], world_size: int, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(load_config(config_file, [*overrides, "train.global_batch_size=8"]), world_size)
    assert says in str(caught.value)
