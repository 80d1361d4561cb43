"""Every rule between fields of the training configuration; `validate` is the only entry.

One function for each part of the program. The tree itself stands in config.py, which hands `validate` on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .config_rules_kinds import check_classes, check_sft
from .errors import ConfigError

if TYPE_CHECKING:
    from .config import BlendEntry, Config


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def data_parallel_size(config: Config, world_size: int) -> int:
    """dp = world_size / (tp·pp·cp); ConfigError if that is not whole."""
    p = config.parallel
    per_replica = p.tp * p.pp * p.cp
    if world_size % per_replica:
        raise ConfigError(
            f"world size {world_size} is not a multiple of tp·pp·cp = {p.tp}·{p.pp}·{p.cp} = {per_replica}: "
            f"start a multiple of {per_replica} processes or change parallel.tp, pp, cp"
        )
    return world_size // per_replica


class Phase(NamedTuple):
    """Steps of a run that data.stages leaves alike."""

    first_step: int
    steps: int
    blend: list[BlendEntry]
    seq_len: int
    global_batch_size: int
    micro_batch_size: int


def phases(config: Config) -> list[Phase]:
    """What each step of the run reads, in order: data and train as they stand, changed by one stage after another."""
    data, train = config.data, config.train
    now = Phase(0, 0, data.blend, data.seq_len, train.global_batch_size, train.micro_batch_size)
    found = [now]
    for stage in data.stages:
        changes = stage.model_dump(exclude_none=True, exclude={"from_step", "blend"})
        now = now._replace(first_step=stage.from_step, blend=stage.blend or now.blend, **changes)
        found.append(now)
    ends = [phase.first_step for phase in found[1:]] + [train.total_steps()]
    cut = (phase._replace(steps=end - phase.first_step) for phase, end in zip(found, ends, strict=True))
    return [phase for phase in cut if phase.steps > 0]


def validate(config: Config, world_size: int) -> None:
    """Every rule between fields, for a job of `world_size` processes. Raises ConfigError (value, limit, remedy)."""
    _check_available(config)
    check_classes(config, world_size)
    _check_model(config)
    _check_length(config)
    _check_stages(config, data_parallel_size(config, world_size))
    _check_fim(config)
    check_sft(config)
    _check_tensor_parallel(config)
    _check_context(config)
    _check_recompute(config)
    _check_pipeline(config, data_parallel_size(config, world_size))
    _check_schedule(config)
    _check_checkpoint(config)
    _check_rewind(config)


def _check_available(config: Config) -> None:
    """Refuse what the tree can say but this version cannot do, so that no key is silently without effect."""
    missing = {
        f"optim.name={config.optim.name}": config.optim.name == "lars",
        f"optim.schedule={config.optim.schedule}": config.optim.schedule == "fccs",
    }
    for key, asked in missing.items():
        if asked:
            raise ConfigError(f"{key} is not available in this version: remove the key or set it to its default")


def _check_model(config: Config) -> None:
    m, tp = config.model, config.parallel.tp
    if m.heads % m.kv_heads:
        raise ConfigError(f"model.kv_heads={m.kv_heads} must divide model.heads={m.heads}: one of {divisors(m.heads)}")
    if m.head_dim % 2:
        raise ConfigError(f"model.head_dim={m.head_dim} must be even: rotary embedding turns pairs")
    features = m.encoder.input == "features"  # neither attention nor embedding
    for name in ("ffn_size",) if features else ("heads", "ffn_size", "padded_vocab_size"):
        size = getattr(m, name)
        if size % tp:
            allowed = [d for d in divisors(size) if d <= 64]
            raise ConfigError(
                f"model.{name}={size} cannot be split over parallel.tp={tp}: set parallel.tp to one of {allowed}"
            )
    if m.padded_vocab_size < m.vocab_size:
        raise ConfigError(
            f"model.padded_vocab_size={m.padded_vocab_size} is less than model.vocab_size={m.vocab_size}: "
            "raise it or leave it out"
        )


def _check_tensor_parallel(config: Config) -> None:
    p, kv_heads = config.parallel, config.model.kv_heads
    if kv_heads % p.tp and p.tp % kv_heads:
        allowed = [n for n in divisors(config.model.heads) if n <= 64 and (kv_heads % n == 0 or n % kv_heads == 0)]
        raise ConfigError(
            f"model.kv_heads={kv_heads} cannot be split over parallel.tp={p.tp}, nor shared by the ranks: set parallel.tp to one of "
            f"{allowed}"
        )
    if p.overlap and p.schedule in ("zb", "zbv"):
        raise ConfigError(
            f"parallel.overlap=true with parallel.schedule={p.schedule}: a zero-bubble schedule splits the backward pass that overlap "
            "keeps together; remove the key, or choose 1f1b or interleaved"
        )
    if not p.sequence_parallel:
        return
    if p.tp == 1:
        raise ConfigError(
            "parallel.sequence_parallel=true splits tokens over the ranks of tp, but parallel.tp=1: raise parallel.tp or remove "
            "the key"
        )
    for phase in phases(config):
        if phase.seq_len % (p.cp * p.tp):
            raise ConfigError(
                f"seq_len={phase.seq_len} of the data from step {phase.first_step} on cannot be split over cp·tp = {p.cp}·{p.tp} "
                f"under parallel.sequence_parallel: set it to a multiple of {p.cp * p.tp}"
            )


def _check_recompute(config: Config) -> None:
    chosen, layers = config.train.recompute.layers, config.model.layers
    highest = chosen - 1 if isinstance(chosen, int) else max(chosen or [0])
    if highest >= layers or (not isinstance(chosen, int) and min(chosen or [0]) < 0):
        raise ConfigError(
            f"train.recompute.layers={chosen} names a layer that is not there: the model has {layers}, numbered from 0"
        )
    if chosen is not None and not config.train.recompute.modules:
        raise ConfigError(
            f"train.recompute.layers={chosen} without modules is without effect: add modules: [full], or some of "
            "attention, mlp and norm"
        )


def _check_context(config: Config) -> None:
    """Each sample is cut in 2·cp chunks, in every stage of the data; heads are spread over cp if attention exchanges them."""
    p, d = config.parallel, config.data
    cp = p.cp
    lengths = {"data.seq_len": d.seq_len}
    lengths |= {f"data.stages.{i}.seq_len": s.seq_len for i, s in enumerate(d.stages) if s.seq_len is not None}
    for key, length in lengths.items():
        if cp > 1 and length % (2 * cp):
            below = length - length % (2 * cp)
            raise ConfigError(
                f"{key}={length} cannot be cut in 2·cp chunks with parallel.cp={cp}: set it to a multiple of {2 * cp}, "
                f"such as {below or 2 * cp}"
            )
    if p.context_attention != "ulysses":
        return
    if cp == 1:
        raise ConfigError(
            "parallel.context_attention=ulysses says how attention works over cp, but parallel.cp=1: raise parallel.cp or remove "
            "the key"
        )
    heads, kv_heads = config.model.heads // p.tp, max(config.model.kv_heads // p.tp, 1)
    fitting = [n for n in divisors(heads) if kv_heads % n == 0 or n % kv_heads == 0]
    if cp not in fitting:
        raise ConfigError(
            f"parallel.context_attention=ulysses cannot spread {heads} query and {kv_heads} key/value heads of each tp rank over "
            f"parallel.cp={cp}: set parallel.cp to one of {fitting} or parallel.context_attention=ring"
        )


def _check_length(config: Config) -> None:
    t = config.train
    if (t.steps is None) == (t.samples is None):
        raise ConfigError("set exactly one of train.steps and train.samples")
    if t.samples is not None and t.samples % t.global_batch_size:
        raise ConfigError(
            f"train.samples={t.samples} is not a multiple of train.global_batch_size={t.global_batch_size}"
        )
    if t.device == "cuda" and t.precision == "fp64":
        raise ConfigError("train.precision=fp64 is for CPU parity runs: set train.device=cpu")


def _check_stages(config: Config, dp: int) -> None:
    """Every stage, not only the first: a run must not stop at step 130,000 for a batch that does not divide."""
    stages, steps = config.data.stages, config.train.total_steps()
    if stages and config.train.samples is not None:
        raise ConfigError("train.samples goes with one batch size: with data.stages set train.steps instead")
    for n, stage in enumerate(stages):
        name = f"data.stages.{n}"
        if n and stage.from_step <= stages[n - 1].from_step:
            raise ConfigError(
                f"{name}.from_step={stage.from_step} is not after the stage before it, which begins at "
                f"{stages[n - 1].from_step}: give the stages in ascending order"
            )
        if stage.from_step >= steps:
            raise ConfigError(f"{name}.from_step={stage.from_step} is beyond the run's {steps} steps: lengthen the run")
        if stage.blend is not None and not stage.blend:
            raise ConfigError(f"{name}.blend is empty: give at least one {{prefix, weight}}, or leave the key out")
    for phase in phases(config):
        where = f"data from step {phase.first_step}"
        if phase.seq_len > config.model.max_seq_len:
            raise ConfigError(
                f"{where} on has seq_len={phase.seq_len}, longer than model.max_seq_len={config.model.max_seq_len}: "
                "shorten seq_len or raise model.max_seq_len"
            )
        per_pass = phase.micro_batch_size * dp
        if phase.global_batch_size % per_pass:
            raise ConfigError(
                f"{where} on has global_batch_size={phase.global_batch_size}, not a multiple of micro_batch_size·dp = "
                f"{phase.micro_batch_size}·{dp} = {per_pass}: set it to a multiple of that"
            )


def _check_fim(config: Config) -> None:
    fim = config.data.fim
    if fim is None:
        return
    if fim.ids is None and config.data.tokenizer is None:
        raise ConfigError("data.fim needs to know its sentinels: set data.tokenizer, or data.fim.ids")
    vocabulary = config.model.vocab_size
    if fim.ids is not None and (len(set(fim.ids)) < 3 or not all(0 <= i < vocabulary for i in fim.ids)):
        raise ConfigError(
            f"data.fim.ids={list(fim.ids)} must be three different ids below model.vocab_size={vocabulary}"
        )


def _check_pipeline(config: Config, dp: int) -> None:
    p, m = config.parallel, config.model
    stages = p.pp * p.virtual_stages
    if p.pp == 1:
        for key, asked in {
            f"schedule={p.schedule}": p.schedule != "1f1b",
            f"virtual_stages={p.virtual_stages}": p.virtual_stages > 1,
            "layout": p.layout is not None,
        }.items():
            if asked:
                raise ConfigError(f"parallel.{key} is for pipelines, and parallel.pp=1: set pp above 1 or leave it out")
        return
    stages_per_rank = {"1f1b": (1, 1), "interleaved": (2, m.layers + 2), "zb": (1, 2), "zbv": (2, 2)}
    least, most = stages_per_rank[p.schedule]
    if not least <= p.virtual_stages <= most:
        allowed = str(least) if least == most else f"{least} to {most}" if p.schedule == "zb" else f"{least} or more"
        raise ConfigError(
            f"parallel.virtual_stages={p.virtual_stages} is not for parallel.schedule={p.schedule}, which takes {allowed}: "
            "set it so, or choose schedule 1f1b (1), interleaved (2 or more), zb (1 to 2) or zbv (2)"
        )
    if m.head.kind != "vocab":
        raise ConfigError(f"model.head.kind={m.head.kind} needs parallel.pp=1, not {p.pp}")
    if m.layers < stages - 2:
        raise ConfigError(
            f"model.layers={m.layers} are too few for {stages} stages (parallel.pp·virtual_stages), of which all but the "
            f"first and the last hold a layer: at most {m.layers + 2} stages"
        )
    _check_layout(p.layout, m.layers, stages)
    for phase in phases(config):
        _check_micro_batches(config, phase, dp)


def _check_layout(layout: list[int] | None, layers: int, stages: int) -> None:
    if layout is None:
        return
    if len(layout) != stages or sum(layout) != layers or min(layout) < 0:
        raise ConfigError(
            f"parallel.layout={layout} must hold {stages} numbers (pp·virtual_stages) with the sum model.layers={layers}, "
            f"and holds {len(layout)} with the sum {sum(layout)}: set it so, or leave it out for a balanced one"
        )
    if 0 in layout[1:-1]:
        raise ConfigError(
            f"parallel.layout={layout} leaves stage {layout.index(0, 1)} without a layer: only the first stage, which has "
            "the embedding, and the last, which has the head, may have none"
        )


def _check_micro_batches(config: Config, phase: Phase, dp: int) -> None:
    """What torch's schedules ask of the number of micro-batches on each rank."""
    p, per_pass = config.parallel, phase.micro_batch_size * dp
    n = phase.global_batch_size // per_pass
    have = f"data from step {phase.first_step} on: global_batch_size/(micro_batch_size·dp) = {n} micro-batches"
    if p.schedule == "1f1b" and n < p.pp:
        raise ConfigError(
            f"{have} are fewer than parallel.pp={p.pp} stages: raise global_batch_size to at least "
            f"{p.pp * per_pass} or lower micro_batch_size"
        )
    rounds = max(1, n // p.pp)
    if p.schedule in ("interleaved", "zb") and n % rounds:
        below, above = n // p.pp * p.pp * per_pass, -(-n // p.pp) * p.pp * per_pass
        raise ConfigError(
            f"{have} cannot be dealt in {rounds} equal rounds as parallel.schedule={p.schedule} does with "
            f"parallel.pp={p.pp}: set global_batch_size to {below} or {above}"
        )


def _check_schedule(config: Config) -> None:
    o, steps = config.optim, config.train.total_steps()
    if o.schedule == "wsd" and o.warmup_steps + o.decay_steps > steps:
        raise ConfigError(
            f"optim.warmup_steps={o.warmup_steps} + optim.decay_steps={o.decay_steps} exceed the run's {steps} steps: "
            "shorten one of them or lengthen the run"
        )
    if o.warmup_steps >= steps and o.warmup_steps > 0:
        raise ConfigError(f"optim.warmup_steps={o.warmup_steps} must be less than the run's {steps} steps")
    if o.min_lr > o.lr:
        raise ConfigError(f"optim.min_lr={o.min_lr} is above optim.lr={o.lr}: lower it")
    if o.schedule == "wsd" and o.decay_steps and o.decay_shape == "exponential" and o.min_lr == 0:
        raise ConfigError(
            "optim.decay_shape=exponential needs optim.min_lr > 0: lr = peak·(min/peak)^r never reaches 0"
        )


def _check_checkpoint(config: Config) -> None:
    c = config.checkpoint
    if c.fork is not None and c.load is not None:
        raise ConfigError(
            "checkpoint.fork and checkpoint.load are both set: fork goes on with optimizer state and position, load takes "
            "weights alone; remove one"
        )


def _check_rewind(config: Config) -> None:
    skip, c = config.train.skip, config.checkpoint
    if skip is None or skip.on_stop != "rewind":
        return
    if c.every is None:
        raise ConfigError("train.skip.on_stop=rewind needs checkpoints to go back to: set checkpoint.every")
    back = skip.stop_after + skip.rewind_before
    if c.keep is not None and (c.keep - 1) * c.every < back - 1:
        raise ConfigError(
            f"checkpoint.keep={c.keep} with checkpoint.every={c.every} does not reach back the {back} steps that train.skip may "
            f"rewind (stop_after + rewind_before): set checkpoint.keep to at least {-(-(back - 1) // c.every) + 1}"
        )
