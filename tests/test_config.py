"""The configuration tree: types, near names, presets and the rules between fields."""

from __future__ import annotations

from pathlib import Path

import pytest

from opencoder.config import Config, load_config, load_corpus_config, validate
from opencoder.config_rules import _check_tensor_parallel
from opencoder.errors import ConfigError

pytestmark = pytest.mark.fast

BASE = "run_dir: r\nmodel: {preset: demo}\ntrain: {steps: 100}\n"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(BASE)
    return path


def refused(path: Path, *overrides: str, world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(load_config(path, list(overrides)), world_size)
    return str(caught.value)


def test_overrides_reach_every_depth(config_file: Path) -> None:
    config = load_config(config_file, ["optim.lr=1e-4", "model.head.chunk_tokens=64", "data.blend=[{prefix: a}]"])
    assert (config.optim.lr, config.model.head.chunk_tokens) == (1e-4, 64)
    assert load_config(config_file, ["data.blend=[{prefix: a}]", "data.blend.0.weight=3"]).data.blend[0].weight == 3


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lrr=1", "did you mean `lr`"),
        ("modle.layers=2", "did you mean `model`"),
        ("data.blend=[{prefx: a}]", "did you mean `prefix`"),
        ("model.preset=opencoder-2b", "opencoder-1.5b"),
        ("train.steps=many", "valid integer"),
        ("train.precision=fp8", "fp32"),
        ("steps", "key=value"),
        ("train.recompute=ful", "full"),
        ("train.recompute={modles: [mlp]}", "did you mean `modules`"),
        ("data.fim={rate: 2}", "less than or equal to 1"),
        ("data.stages=[{blend: []}]", "`data.stages.0.from_step` is missing"),
        ("optim.groups=[{lr_scale: 2}]", "`optim.groups.0.match` is missing"),
        ("parallel.tp=0", "greater than or equal to 1"),
    ],
)
def test_wrong_keys_and_values_are_named(config_file: Path, override: str, says: str) -> None:
    assert says in refused(config_file, override)


@pytest.mark.parametrize(
    ("overrides", "world_size", "says"),
    [
        (["model.preset=opencoder-1.5b", "parallel.tp=4"], 4, "model.heads=14 cannot be split over parallel.tp=4"),
        (["model.preset=opencoder-1.5b", "parallel.tp=4"], 4, "[1, 2, 7, 14]"),
        (["parallel.tp=2"], 3, "not a multiple of tp·pp·cp"),
        (["train.global_batch_size=6"], 4, "set it to a multiple"),
        (["train.samples=100"], 1, "exactly one of"),
        (["train.steps=null", "train.samples=100"], 1, "not a multiple of train.global_batch_size=8"),
        (["model.kv_heads=3"], 1, "must divide model.heads=8"),
        (
            ["model.heads=12", "model.head_dim=32", "model.kv_heads=6", "parallel.tp=4"],
            4,
            "model.kv_heads=6 cannot be split over parallel.tp=4, nor shared by the ranks: set parallel.tp to one of [1, 2, 3, 6, 12]",
        ),
        (["model.padded_vocab_size=100"], 1, "less than model.vocab_size=8192"),
        (["data.seq_len=5000"], 1, "longer than model.max_seq_len"),
        (["optim.warmup_steps=60", "optim.decay_steps=60"], 1, "exceed the run's 100 steps"),
        (["optim.min_lr=1"], 1, "above optim.lr"),
        (["model.head_dim=33"], 1, "must be even"),
        (["parallel.sequence_parallel=true"], 1, "raise parallel.tp or remove"),
        (["parallel.sequence_parallel=true", "parallel.tp=2", "data.seq_len=255"], 2, "set it to a multiple of 2"),
        (["parallel.layout=[2,2]"], 1, "parallel.layout is for pipelines, and parallel.pp=1"),
        (["parallel.pp=8"], 8, "model.layers=4 are too few for 8 stages"),
        (["parallel.pp=8"], 8, "at most 6 stages"),
        (["parallel.pp=2", "parallel.layout=[3,2]"], 2, "holds 2 with the sum 5"),
        (["parallel.pp=2", "parallel.layout=[1,2,1]"], 2, "must hold 2 numbers"),
        (["parallel.pp=2", "parallel.layout=[5,-1]"], 2, "must hold 2 numbers"),
        (["parallel.pp=3", "parallel.layout=[2,0,2]"], 3, "leaves stage 1 without a layer"),
        (["parallel.schedule=zbv"], 1, "parallel.schedule=zbv is for pipelines"),
        (["parallel.pp=2", "parallel.virtual_stages=2"], 2, "not for parallel.schedule=1f1b, which takes 1:"),
        (["parallel.pp=2", "parallel.schedule=interleaved"], 2, "schedule=interleaved, which takes 2 or more"),
        (["parallel.pp=2", "parallel.schedule=zb", "parallel.virtual_stages=3"], 2, "schedule=zb, which takes 1 to 2"),
        (["parallel.pp=2", "parallel.schedule=zbv"], 2, "parallel.schedule=zbv, which takes 2:"),
        (
            ["parallel.pp=2", "parallel.schedule=zb", "train.global_batch_size=7"],
            2,
            "= 7 micro-batches cannot be dealt in 3 equal rounds as parallel.schedule=zb does with parallel.pp=2: set "
            "global_batch_size to 6 or 8",
        ),
        (["parallel.pp=4", "train.global_batch_size=6", "train.micro_batch_size=2"], 4, "to at least 8"),
        (["data.sft.epochs=2"], 1, "data.sft goes with data.kind=sft"),
        (["data.fim={rate: 0.3}"], 1, "set data.tokenizer, or data.fim.ids"),
        (["data.fim={ids: [1, 2, 8192]}"], 1, "three different ids below model.vocab_size=8192"),
        (["data.fim={ids: [1, 2, 2]}"], 1, "three different ids below model.vocab_size=8192"),
        (["data.stages=[{from_step: 10, global_batch_size: 9}]"], 2, "data from step 10 on has global_batch_size=9"),
        (["data.stages=[{from_step: 10, micro_batch_size: 3}]"], 1, "micro_batch_size·dp = 3·1 = 3"),
        (["data.stages=[{from_step: 10, seq_len: 257}]"], 1, "seq_len=257, longer than model.max_seq_len=256"),
        (["data.stages=[{from_step: 10}, {from_step: 10}]"], 1, "data.stages.1.from_step=10 is not after"),
        (["data.stages=[{from_step: 100}]"], 1, "beyond the run's 100 steps"),
        (["data.stages=[{from_step: 10, blend: []}]"], 1, "data.stages.0.blend is empty"),
        (["data.stages=[{from_step: 1}]", "train.steps=null", "train.samples=800"], 1, "set train.steps instead"),
        (["parallel.context_attention=ulysses"], 1, "but parallel.cp=1: raise parallel.cp or remove the key"),
        (
            ["parallel.context_attention=ulysses", "parallel.cp=4", "parallel.tp=4"],
            16,
            "cannot spread 2 query and 1 key/value heads of each tp rank over parallel.cp=4: set parallel.cp to one of [1, 2]",
        ),
        (
            ["parallel.cp=3"],
            3,
            "data.seq_len=128 cannot be cut in 2·cp chunks with parallel.cp=3: set it to a multiple of 6",
        ),
        (["train.skip={on_stop: rewind}"], 1, "needs checkpoints to go back to: set checkpoint.every"),
        (
            ["train.skip={on_stop: rewind}", "checkpoint.every=2", "checkpoint.keep=2"],
            1,
            "the 5 steps that train.skip may rewind (stop_after + rewind_before): set checkpoint.keep to at least 3",
        ),
        (
            ["train.recompute={modules: [mlp], layers: 9}"],
            1,
            "layers=9 names a layer that is not there: the model has 4",
        ),
        (["train.recompute={modules: [mlp], layers: [1, 8]}"], 1, "layers=[1, 8] names a layer that is not there"),
        (["train.recompute={layers: 2}"], 1, "without modules is without effect"),
        (["checkpoint.fork=r", "checkpoint.load=r"], 1, "checkpoint.fork and checkpoint.load are both set"),
    ],
)
def test_rules_between_fields(config_file: Path, overrides: list[str], world_size: int, says: str) -> None:
    assert says in refused(config_file, "data.seq_len=128", *overrides, world_size=world_size)


def test_preset_fills_and_explicit_keys_win(config_file: Path) -> None:
    model = load_config(config_file, ["model.preset=opencoder-8b", "model.layers=2"]).model
    assert (model.layers, model.hidden_size, model.kv_heads, model.rope_theta) == (2, 4096, 8, 5e5)


@pytest.mark.parametrize("schedule", ["zb", "zbv"])
def test_overlap_is_refused_where_the_backward_pass_is_split(config_file: Path, schedule: str) -> None:
    config = load_config(config_file, ["parallel.overlap=true", f"parallel.schedule={schedule}"])
    with pytest.raises(ConfigError, match=f"schedule={schedule}: a zero-bubble schedule splits"):
        _check_tensor_parallel(config)


def test_recompute_is_a_name_or_a_branch(config_file: Path) -> None:
    says = {
        text: str(load_config(config_file, [f"train.recompute={text}"]).train.recompute)
        for text in ("none", "full", "{modules: [mlp, norm], layers: 2}")
    }
    assert list(says.values()) == ["none", "full", "mlp+norm of layers 2"]
    assert str(load_config(config_file).train.recompute) == "none"


def test_padded_vocabulary_is_explicit_and_free_of_tp(config_file: Path) -> None:
    sizes = {
        load_config(config_file, ["model.vocab_size=8100", f"parallel.tp={tp}"]).model.padded_vocab_size
        for tp in (1, 2, 8)
    }
    assert sizes == {8192}


def test_missing_fields_are_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: r\nmodel: {hidden_size: 64}\n")
    text = refused(path)
    assert "`model.layers` is missing" in text
    assert "model.preset" in text


def test_resolved_configuration_reads_back_equal(config_file: Path) -> None:
    config = load_config(config_file, ["optim.betas=[0.9, 0.99]"])
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_unreadable_and_malformed_files(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path / "absent.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1\n")
    assert "not valid YAML" in refused(bad)
    bad.write_text("- 1\n")
    assert "mapping" in refused(bad)


def test_corpus_configuration(tmp_path: Path) -> None:
    assert load_corpus_config(None, ["dedup.preset=bigcode"]).dedup.preset == "bigcode"
    with pytest.raises(ConfigError, match="did you mean `dedup`"):
        load_corpus_config(None, ["dedupe.preset=bigcode"])
