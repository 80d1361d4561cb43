"""Rules between fields for what is not the training of a language model on text: classification, and tuning on conversations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    from .config import Config


def check_classes(config: Config, world_size: int) -> None:
    """The class head, and the data and layouts that go with it."""
    m, d, p = config.model, config.data, config.parallel
    if m.head.kind == "vocab":
        only = {
            f"data.kind={d.kind}": d.kind == "classification",
            f"data.validation={d.validation}": d.validation is not None,
            "model.encoder": m.encoder != type(m.encoder)(),
        }
        for key, asked in only.items():
            if asked:
                raise ConfigError(f"{key} goes with model.head.kind=class: set that too, or remove the key")
        return
    if d.kind != "classification":
        raise ConfigError(
            f"model.head.kind=class learns from labelled samples: set data.kind=classification, not {d.kind}"
        )
    features = m.encoder.input == "features"
    refused = {
        f"parallel.pp={p.pp}": (p.pp > 1, "the class head needs all of the model on each rank"),
        f"parallel.cp={p.cp}": (p.cp > 1, "samples of one label are not cut over ranks"),
        "parallel.sequence_parallel=true": (p.sequence_parallel, "samples of one label are not cut over ranks"),
        f"parallel.tp={p.tp}": (
            p.tp > 1 and m.head.class_group != "tp",
            "with tensor parallelism the class matrix is split over tp: set model.head.class_group=tp",
        ),
        "model.tie_embeddings=true": (
            m.tie_embeddings,
            f"rows of the class matrix are classes, not tokens, and are updated row by row (row_update={m.head.row_update})",
        ),
        "data.fim": (d.fim is not None, "samples have labels, not targets"),
        "data.document_mask=true": (d.document_mask, "a sample is one text"),
        f"data.split={d.split}": (d.split != "1,0,0", "a dataset is read whole: name another in data.validation"),
        f"train.z_loss={config.train.z_loss}": (config.train.z_loss > 0, "it is for vocabularies"),
        "train.recompute": (
            features and bool(config.train.recompute.modules),
            "an encoder of features recomputes nothing",
        ),
    }
    for key, (asked, why) in refused.items():
        if asked:
            raise ConfigError(f"{key} does not go with model.head.kind=class: {why}; set it to its default otherwise")
    _check_count(config, world_size)
    for blend in (d.blend, *(stage.blend for stage in d.stages if stage.blend is not None)):
        if len(blend) != 1:
            raise ConfigError(
                f"data.kind=classification reads one dataset at a time: give one {{prefix}}, not {len(blend)}"
            )
    if (config.train.eval_every is None) != (d.validation is None):
        raise ConfigError("data.validation and train.eval_every go together: set both, or none")


def _check_count(config: Config, world_size: int) -> None:
    head, p = config.model.head, config.parallel
    assert head.classes is not None
    ranks = {"tp": p.tp, "dp_cp": world_size // (p.tp * p.pp), "world": world_size}[head.class_group]
    if ranks > head.classes:
        raise ConfigError(
            f"model.head.classes={head.classes} cannot be split over the {ranks} ranks of model.head.class_group="
            f"{head.class_group}: each needs one at least; start fewer processes, or choose a smaller group"
        )
    if head.selection == "knn" and head.neighbours > head.classes:
        raise ConfigError(
            f"model.head.neighbours={head.neighbours} is more than model.head.classes={head.classes}: set it to at most that"
        )


def check_sft(config: Config) -> None:
    d = config.data
    if d.kind != "sft":
        if d.sft != type(d.sft)():
            raise ConfigError("data.sft goes with data.kind=sft: set that too, or remove the key")
        return
    if not d.document_mask:
        raise ConfigError("data.document_mask=false would let packed conversations see one another: remove the key")
    if d.fim is not None:
        raise ConfigError("data.fim is for text, not for conversations: remove it, or set data.kind=lm")
    if d.stages and d.sft.batch_conversations is not None:
        raise ConfigError(
            "data.sft.batch_conversations is for the whole run: with data.stages set global_batch_size instead"
        )
    if d.sft.epochs is None:
        return
    if d.stages:
        raise ConfigError("data.sft.epochs counts the whole run: with data.stages set train.steps instead")
    if len({entry.weight for entry in d.blend}) > 1:
        raise ConfigError(
            "data.sft.epochs learns every conversation equally often, and data.blend has different weights: leave them out, or set "
            "train.steps instead of data.sft.epochs"
        )
