"""Hugging Face exchange: round trips bit by bit, logits against transformers, ids checked against each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from opencoder.checkpoint import folders, hf, native
from opencoder.config import Config
from opencoder.errors import DataError
from opencoder.model.decoder import Decoder, named_parameters
from opencoder.model.initialise import build_model
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.placement import placement_of
from tests.model.cases import SMALL, model_config

CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "14 heads of 160": {"hidden_size": 70, "heads": 14, "kv_heads": 14, "head_dim": 160},
    "head_dim free of width": {"hidden_size": 48, "heads": 6, "kv_heads": 3, "head_dim": 20},
    "padded vocabulary": {"vocab_size": 131, "padded_vocab_size": 256},
    "tied": {"tie_embeddings": True},
    "theta 5e5": {"rope_theta": 5e5, "norm_eps": 1e-6},
}


def model_of(changes: dict[str, Any], dtype: torch.dtype) -> Decoder:
    model = build_model(model_config(SMALL, **changes), Mesh(), dtype=dtype, device=torch.device("cpu"), seed=5)
    with torch.no_grad():
        for p in model.parameters():  # larger weights than the initial ones: a wrong rotary or norm then shows
            p.mul_(1 + 0.5 * torch.rand(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p.dtype))
            if p.dim() == 2:
                p.mul_(4)
    return model


def tensors_of(model: Decoder) -> dict[str, Any]:
    return {k: (p.detach(), placement_of(p)) for k, p in named_parameters(model).items()}


def saved(model: Decoder, run_dir: Path) -> Path:
    config = Config.model_validate({"run_dir": str(run_dir), "model": model.config.model_dump()})
    state = {"tokens": 0, "consumed_samples": 0, "stages": [], "skipped_batches": []}
    return native.save(run_dir, 1, tensors_of(model), Mesh(), config=config, state=state)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for dtype in (torch.float64, torch.float32):
        ours = model_of(CASES[case], dtype)
        folder = hf.export(saved(ours, tmp_path / str(dtype)), tmp_path / f"hf-{dtype}")
        theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)
        ids = torch.randint(0, ours.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            a, b = ours(ids), theirs(ids).logits
        assert a.shape == b.shape
        assert b.std() > 0.1, "the case says nothing if all logits are alike"
        if dtype == torch.float64:
            kl = F.kl_div(F.log_softmax(a, -1), F.log_softmax(b, -1), log_target=True, reduction="none").sum(-1)
            assert kl.abs().max() <= 1e-12
        else:
            assert (a - b).abs().max() <= 1e-4


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_to_hf_to_native_is_bitwise_equal(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(CASES[case], dtype)
    folder = hf.export(saved(model, tmp_path / "run"), tmp_path / "hf", shard_bytes=40_000)
    assert len(list(folder.glob("*.safetensors"))) > 1, "the case must be sharded"
    back = folders.resolve(hf.import_(folder, tmp_path / "native"))
    again = build_model(native.read_config(back).model, Mesh(), dtype=dtype, device=torch.device("cpu"), seed=9)
    native.load_tensors(back, tensors_of(again), Mesh())
    for key, p in named_parameters(model).items():
        assert torch.equal(p, named_parameters(again)[key]), key


def test_weights_made_by_transformers_are_read(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, rope_theta=2e4, bos_token_id=None, eos_token_id=None)  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    folder = hf.import_(tmp_path / "hf", tmp_path / "native")
    model = build_model(
        native.read_config(folder).model, Mesh(), dtype=torch.float32, device=torch.device("cpu"), seed=0
    )
    native.load_tensors(folder, tensors_of(model), Mesh())
    ids = torch.arange(24).view(1, -1)
    with torch.no_grad():
        assert (model(ids) - theirs(ids).logits).abs().max() <= 1e-4
        assert (hf.to_transformers(folder)(ids).logits - theirs(ids).logits).abs().max() <= 1e-5


def exported(tmp_path: Path) -> Path:
    return hf.export(saved(model_of({}, torch.float32), tmp_path / "run"), tmp_path / "hf")


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_disagreeing_ids_are_refused_with_both_values(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    edit(folder / "config.json", eos_token_id=2)
    edit(folder / "generation_config.json", eos_token_id=96539)
    with pytest.raises(
        DataError, match=r"eos_token_id is \[2\] in config.json but \[96539\] in generation_config.json"
    ):
        hf.import_(folder, tmp_path / "native")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope type='llama3'"),
        ({"intermediate_size": 128}, "has shape"),
        ({"num_hidden_layers": 3}, "has no tensor"),
        ({"num_hidden_layers": 1}, "no place for"),
    ],
)
def test_what_cannot_be_read_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = exported(tmp_path)
    edit(folder / "config.json", **changes)
    with pytest.raises(DataError, match=says):
        hf.import_(folder, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(DataError, match="is damaged"):
        hf.import_(folder, tmp_path / "native")
    weights.unlink()
    with pytest.raises(DataError, match=r"lacks model\.safetensors"):
        hf.import_(folder, tmp_path / "native")


def test_export_does_not_replace_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="is no checkpoint"):
        exported(tmp_path)
