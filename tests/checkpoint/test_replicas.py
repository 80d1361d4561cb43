"""A tensor that differs between ranks that must hold the same is found before it is saved, and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opencoder.checkpoint import folders
from opencoder.checkpoint.parts import Tensors
from opencoder.checkpoint.replicas import check_replicas
from opencoder.checkpoint.saver import Saver
from opencoder.config import CheckpointConfig, Config, ModelConfig, OptimConfig, ParallelConfig
from opencoder.errors import Failure
from opencoder.model.decoder import Decoder, Part, named_parameters
from opencoder.model.initialise import build_model
from opencoder.optim.build import build_optimizer
from opencoder.parallel.mesh import Mesh, create_mesh, kv_replicas_of
from opencoder.train.pipeline_runner import build_chunks
from opencoder.train.state import tensors_of
from tests.checkpoint.test_native import STATE
from tests.harness import run_cases
from tests.model.cases import model_config

NORM, Q, K = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
EMBED = "model.embed_tokens.weight"


def state_of(parallel: dict[str, Any]) -> tuple[Mesh, Tensors, ModelConfig]:
    p = ParallelConfig.model_validate(parallel)
    config = model_config(tie_embeddings=p.pp > 1)
    mesh = create_mesh(tp=p.tp, pp=p.pp, kv_replicas=kv_replicas_of(config.kv_heads, p.tp))

    def build(part: Part | None = None) -> Decoder:
        return build_model(config, mesh, dtype=torch.float32, device=torch.device("cpu"), seed=1, part=part, parallel=p)

    model = build_chunks(config, p, mesh, seq_len=32, build=build) if p.pp > 1 else build()
    optimizer = build_optimizer(named_parameters(model), OptimConfig(), mesh, sharded=p.sharded_optimizer)
    return mesh, tensors_of(model, optimizer), config


def change(tensors: Tensors, key: str) -> None:
    """One number by the least that can be."""
    flat = tensors[key][0].detach().view(-1)
    flat[-1:] = torch.nextafter(flat[-1:], flat.new_full((1,), 9.0))


def told(call: Callable[[], object]) -> tuple[str, bool]:
    try:
        call()
    except Failure as error:
        return str(error), error.told_elsewhere
    return "", False


def planted(rank: int, world: int, parallel: dict[str, Any], key: str | None, where: int) -> tuple[str, bool]:
    mesh, tensors, _ = state_of(parallel)
    if key is not None and rank == where:
        change(tensors, key)
    return told(lambda: check_replicas(tensors, mesh))


SHARDED = {"tp": 2, "sharded_optimizer": True}
DIFFERENT: dict[str, tuple[dict[str, Any], str, int, str]] = {
    "everywhere": ({"tp": 2}, NORM, 3, "ranks 0, 1, 2 and rank 3"),
    "over dp": ({"tp": 2}, Q, 1, "rank 1 and rank 3"),
    "over kv": ({"tp": 4}, K, 2, "rank 2 and rank 3"),
    "state": ({"tp": 2}, f"optim.exp_avg.{Q}", 2, "rank 0 and rank 2"),
    "sharded state": (SHARDED, f"optim.exp_avg.{NORM}", 0, "rank 0 and rank 1"),
    "both ends": ({"pp": 2}, EMBED, 3, "ranks 0, 1, 2 and rank 3"),
}


def test_a_difference_is_found_named_and_told_once() -> None:
    cases: dict[str, tuple[Any, ...]] = {name: case[:3] for name, case in DIFFERENT.items()}
    alike: dict[str, tuple[Any, ...]] = {
        f"alike {i}": (p, None, 0) for i, p in enumerate(({"tp": 4}, SHARDED, {"pp": 2}))
    }
    nobody = {"nobody else's": (SHARDED, f"optim.exp_avg.{Q}", 1)}
    found = run_cases(planted, 4, {**cases, **alike, **nobody})
    for name, (_, key, _, sides) in DIFFERENT.items():
        texts = {text for text, _ in found[name]}
        assert len(texts) == 1, name
        assert f"{key} differs between {sides}, which must hold the same: " in texts.pop(), name
        assert [elsewhere for _, elsewhere in found[name]] == [False, True, True, True]
    for name in (*alike, *nobody):
        assert found[name] == [("", False)] * 4, name


def save(rank: int, world: int, folder: str, settings: dict[str, Any]) -> str:
    mesh, tensors, model = state_of({})
    if rank == 1:
        change(tensors, NORM)
        change(tensors, Q)
    saver = Saver(Path(folder), CheckpointConfig.model_validate(settings), mesh, timeout_s=60)
    config = Config.model_validate({"run_dir": folder, "model": model.model_dump()})

    def whole() -> None:
        saver.save(1, tensors, config=config, state=STATE)
        saver.wait()

    return told(whole)[0]


def test_a_save_that_finds_one_writes_nothing_and_one_that_does_not_look_writes(tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = {
        "now": {},
        "background": {"async_save": True},
        "blind": {"check_replicas": False},
    }
    found = run_cases(save, 2, {name: (str(tmp_path / name), keys) for name, keys in settings.items()})
    for name in ("now", "background"):
        for text in found[name]:
            assert f"{Q} differs between rank 0 and rank 1, which must hold the same, and 1 more: " in text
        assert folders.list_checkpoints(tmp_path / name) == []
    assert found["blind"] == ["", ""]
    assert len(folders.list_checkpoints(tmp_path / "blind")) == 1
