"""The decoder: sizes, documents, and independence of how a batch is cut."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from opencoder.config import PRESETS, RecomputeConfig
from opencoder.model.decoder import Decoder, Documents, Part, named_parameters, parameter_count
from opencoder.model.initialise import build_model
from opencoder.model.recompute import modules_of
from opencoder.parallel.mesh import Mesh, pretend_mesh
from opencoder.parallel.placement import placement_of

from .cases import batch, model_config

pytestmark = pytest.mark.fast
CPU = torch.device("cpu")


def small(dtype: torch.dtype = torch.float64, **changes: object) -> Decoder:
    return build_model(model_config(**changes), Mesh(), dtype=dtype, device=CPU, seed=1)


@pytest.mark.parametrize(("preset", "count"), [("opencoder-1.5b", 1_905_650_880), ("opencoder-8b", 7_771_262_976)])
def test_published_models_have_their_published_size(preset: str, count: int) -> None:
    assert parameter_count(model_config({}, preset=preset)) == count


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds(preset: str) -> None:
    assert parameter_count(model_config({}, preset=preset)) > 0


def test_parameters_carry_hugging_face_names_and_placements() -> None:
    names = named_parameters(small())
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(names)
    assert "model.layers.1.self_attn.q_proj.weight" in names
    for parameter in names.values():
        assert placement_of(parameter).global_shape == tuple(parameter.shape)


def test_loss_equals_cross_entropy_of_the_logits_and_so_do_gradients() -> None:
    model = small(head={"chunk_tokens": 7})  # a chunk that does not divide the tokens
    tokens, labels = batch(250, 3, 20)
    total, stats = model.loss(tokens, labels)
    total.backward()
    ours = {k: p.grad.clone() for k, p in named_parameters(model).items()}
    model.zero_grad()
    logits = model(tokens)
    truth = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    truth.backward()
    assert torch.allclose(total, truth, rtol=1e-13)
    assert int(stats["tokens"]) == int((labels >= 0).sum())
    for key, p in named_parameters(model).items():
        assert (ours[key] - p.grad).norm() <= 1e-12 * p.grad.norm(), key


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    tokens, labels = batch(250, 2, 32)
    total, stats = small(torch.float32).loss(tokens, labels)
    assert abs(total.item() / int(stats["tokens"]) / math.log(256) - 1) < 0.05


def test_documents_do_not_see_one_another() -> None:
    model = small()
    tokens, _ = batch(250, 2, 16)
    documents = Documents(torch.tensor([0, 5, 16, 20, 32], dtype=torch.int32), 12)
    packed = model(tokens, documents).flatten(0, 1)
    alone = torch.cat([model(tokens.flatten()[a:b][None])[0] for a, b in ((0, 5), (5, 16), (16, 20), (20, 32))])
    assert torch.allclose(packed, alone, rtol=1e-11, atol=1e-12)
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 250
    assert torch.equal(model(changed, documents).flatten(0, 1)[5:], packed[5:])


@pytest.mark.parametrize(
    ("setting", "layers"),
    [
        ("none", ["", "", "", ""]),
        ("mlp", ["mlp"] * 4),
        (RecomputeConfig(modules=["mlp", "attention"], layers=1), ["attention mlp", "", "", ""]),
        (RecomputeConfig(modules=["full"], layers=[1, 3]), ["", "full", "", "full"]),
    ],
)
def test_layers_that_run_again(setting: str | RecomputeConfig, layers: list[str]) -> None:
    assert [" ".join(sorted(modules_of(setting, i))) for i in range(4)] == layers


@pytest.mark.parametrize("documents", [None, Documents(torch.tensor([0, 5, 16, 20, 32], dtype=torch.int32), 12)])
def test_parts_in_a_row_are_the_whole_model(documents: Documents | None) -> None:
    tokens, labels = batch(250, 2, 16)
    whole = build_model(model_config(layers=5), Mesh(), dtype=torch.float64, device=CPU, seed=1)
    cuts = [Part(range(0), True, False), Part(range(3), False, False), Part(range(3, 5), False, True)]
    parts = [
        build_model(model_config(layers=5), Mesh(), dtype=torch.float64, device=CPU, seed=1, part=cut) for cut in cuts
    ]
    x = tokens
    for stage in parts[:-1]:
        x = stage.hidden(x, documents)
    total = parts[-1].loss(x, labels, documents)[0]
    total.backward()
    truth = whole.loss(tokens, labels, documents)[0]
    truth.backward()
    assert torch.allclose(total, truth, rtol=1e-13)
    found = {key: p for stage in parts for key, p in named_parameters(stage).items()}
    assert found.keys() == named_parameters(whole).keys()
    for key, p in named_parameters(whole).items():
        assert torch.equal(p, found[key]), key
        assert (found[key].grad - p.grad).norm() <= 1e-12 * p.grad.norm(), key


def test_both_ends_of_a_tied_model_begin_with_the_same_matrix() -> None:
    config = model_config(tie_embeddings=True)
    ends = [Part(range(1), True, False), Part(range(1, 2), False, True)]
    first, last = (build_model(config, Mesh(), dtype=torch.float64, device=CPU, seed=1, part=part) for part in ends)
    key = "model.embed_tokens.weight"
    assert torch.equal(named_parameters(first)[key], named_parameters(last)[key])
    assert "lm_head.weight" not in named_parameters(last)
    assert last.lm_head.weight is last.embed_tokens.weight
    for model, axes in (
        (first, ("dp", "cp", "embed")),
        (last, ("dp", "cp", "embed")),
        (small(tie_embeddings=True), ("dp", "cp")),
    ):
        assert placement_of(named_parameters(model)[key]).grad_sum_axes == axes


def test_a_mesh_that_does_not_share_key_value_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 key/value heads over tp 4 stand on 2 ranks each, but .* kv_replicas=1"):
        Decoder(model_config(), pretend_mesh(world_size=4, tp=4))


def test_given_positions_are_used() -> None:
    model, (tokens, _) = small(), batch(250, 2, 16)
    usual = model(tokens)
    assert torch.equal(model(tokens, positions=torch.arange(16)), usual)
    assert torch.allclose(
        model(tokens, positions=torch.arange(16) + 7), usual, atol=1e-5
    )  # rotary is relative; its table fp32
    order = torch.arange(16).flip(0)
    assert not torch.allclose(model(tokens, positions=order), usual, atol=1e-3)
    documents = Documents(torch.tensor([0, 5, 16, 20, 32], dtype=torch.int32), 12)
    positions = torch.cat([torch.arange(n) for n in (5, 11, 4, 12)]).view(2, 16)
    assert torch.equal(model(tokens, documents, positions=positions), model(tokens, documents))


def test_tied_head_is_the_embedding() -> None:
    model = small(tie_embeddings=True)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert "lm_head.weight" not in named_parameters(model)
    tokens, labels = batch(250, 2, 16)
    model.loss(tokens, labels)[0].backward()
    assert model.embed_tokens.weight.grad is not None


def test_same_seed_same_weights_other_seed_other_weights() -> None:
    a, b = small(), small()
    c = build_model(model_config(), Mesh(), dtype=torch.float64, device=CPU, seed=2)
    for key, p in named_parameters(a).items():
        assert torch.equal(p, named_parameters(b)[key])
        assert p.dim() == 1 or not torch.equal(p, named_parameters(c)[key])


def test_depth_scaling_makes_the_matrices_into_the_residual_stream_smaller() -> None:
    for key, p in named_parameters(small(layers=8, init="depth_scaled")).items():
        if p.dim() > 1:
            scaled = "o_proj" in key or "down_proj" in key
            assert float(p.detach().std() / (0.02 / 4 if scaled else 0.02)) == pytest.approx(1, abs=0.05), key
