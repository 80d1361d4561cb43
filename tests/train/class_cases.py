"""Small runs with a class head, for tests: data, configuration, and a run over the ranks of the harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from opencoder.config import Config, validate
from opencoder.data.classification_writer import ClassificationWriter
from opencoder.model.decoder import named_parameters
from opencoder.parallel.mesh import create_mesh
from opencoder.parallel.placement import placement_of
from opencoder.train.class_loop import ClassTrainer

CLASSES = 103
MODEL = {
    "layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "ffn_size": 48, "vocab_size": 60, "max_seq_len": 16,
    "head": {"kind": "class", "classes": CLASSES, "dim": 16},
}  # fmt: skip
FEATURES = {
    "layers": 1, "hidden_size": 32, "encoder": {"input": "features", "width": 12},
    "head": {"kind": "class", "classes": CLASSES, "dim": 16},
}  # fmt: skip


def write(folder: Path) -> None:
    """`train` and `valid` of tokens, `features` and `features_valid`: every class twice, and once to be evaluated."""
    r = np.random.default_rng(0)
    for name, times in (("train", 2), ("valid", 1)):
        labels = np.tile(np.arange(CLASSES), times)
        # The first two tokens tell the class.
        samples = [np.array([y % 50, 50 + y // 50, *r.integers(0, 50, r.integers(1, 9))]) for y in labels]
        with ClassificationWriter(folder / name, "tokens", vocab_size=60) as writer:
            writer.add_tokens(samples, labels)
    centres = r.standard_normal((CLASSES, 12)).astype(np.float32)
    for name, times in (("features", 2), ("features_valid", 1)):
        labels = np.tile(np.arange(CLASSES), times)
        rows = centres[labels] + 0.1 * r.standard_normal((len(labels), 12)).astype(np.float32)
        with ClassificationWriter(folder / name, "features", width=12) as writer:
            writer.add_features(rows, labels)


def tree(folder: Path, run: str = "run", *, features: bool = False, **sections: Any) -> dict[str, Any]:
    """A configuration; `sections` are merged into its branches, `head` into model.head."""
    head = sections.pop("head", {})
    model = FEATURES if features else MODEL
    name = "features" if features else "train"
    found: dict[str, Any] = {
        "run_dir": str(folder / run),
        "model": {**model, "head": {**model["head"], **head}},  # type: ignore[dict-item]
        "data": {"kind": "classification", "blend": [{"prefix": str(folder / name)}], "seq_len": 8},
        "train": {
            "steps": 6, "global_batch_size": 24, "micro_batch_size": 2, "precision": "fp64", "memory_check": "off",
            "bandwidth_check": False,
        },
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "weight_decay": 0.1, "clip_norm": 0.1},
        "log": {"tensorboard": False, "peak_tflops": 1.0},
    }  # fmt: skip
    for section, keys in sections.items():
        found[section] = found.get(section, {}) | keys
    return found


def evaluated(folder: Path, *, features: bool = False) -> dict[str, Any]:
    """Sections that ask for an evaluation at the end."""
    name = "features_valid" if features else "valid"
    return {"data": {"validation": str(folder / name)}, "train": {"eval_every": 1000, "eval_samples": 1000}}


def trainer_of(given: dict[str, Any], world: int = 1) -> ClassTrainer:
    """On this rank of the harness."""
    config = Config.model_validate(given)
    validate(config, world)
    return ClassTrainer(config, create_mesh(tp=config.parallel.tp), torch.device("cpu"))


def run(rank: int, world: int, given: dict[str, Any]) -> dict[str, tuple[Any, torch.Tensor]]:
    """Train to the end; key → where this rank's part stands in the whole parameter, and the part."""
    trainer = trainer_of(given, world)
    trainer.run()
    mesh = trainer.mesh
    return {
        key: (placement_of(p).slice_of(mesh), p.detach().clone()) for key, p in named_parameters(trainer.model).items()
    }


def whole(ranks: list[dict[str, tuple[Any, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """The parameters put together from the parts of all ranks."""
    found = {}
    for key in ranks[0]:
        shape = [max(parts[key][0][d].stop for parts in ranks) for d in range(ranks[0][key][1].dim())]
        full = torch.full(shape, float("nan"), dtype=ranks[0][key][1].dtype)
        for parts in ranks:
            full[parts[key][0]] = parts[key][1]
        found[key] = full
    return found
