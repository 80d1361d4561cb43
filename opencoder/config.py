"""The configuration tree: what can be set, what it means, and every rule between fields.

`load_config(file, overrides)` reads YAML, applies dotted overrides (`optim.lr=1e-4`) and checks types;
`validate(config, world_size)` checks what fields ask of each other. A part of the program
gets its branch, never the root."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from .config_loading import Branch, parse_tree, read_tree
from .corpus_config import CorpusConfig
from .errors import ConfigError

VOCAB_MULTIPLE = 128
"""`padded_vocab_size` defaults to the next multiple of this: the same number at any tensor-parallel size."""

PRESETS: dict[str, dict[str, Any]] = {
    # Shapes of the published models (arXiv:2411.04905, table of architectures; config.json of the releases).
    "opencoder-1.5b": dict(layers=24, hidden_size=2240, heads=14, kv_heads=14, head_dim=160, ffn_size=6144,
                           vocab_size=96640, rope_theta=1e4, max_seq_len=4096),
    "opencoder-8b": dict(layers=32, hidden_size=4096, heads=32, kv_heads=8, head_dim=128, ffn_size=14336,
                         vocab_size=96640, rope_theta=5e5, max_seq_len=8192),
    # Small ones of our own: the demo's, and two that train on one machine.
    "demo": dict(layers=4, hidden_size=256, heads=8, kv_heads=4, head_dim=32, ffn_size=688, vocab_size=8192,
                 rope_theta=1e4, max_seq_len=256),
    "opencoder-30m": dict(layers=8, hidden_size=512, heads=8, kv_heads=4, head_dim=64, ffn_size=1376,
                          vocab_size=32000, rope_theta=1e4, max_seq_len=1024),
    "opencoder-150m": dict(layers=12, hidden_size=768, heads=12, kv_heads=12, head_dim=64, ffn_size=2048,
                           vocab_size=96640, rope_theta=1e4, max_seq_len=2048),
}  # fmt: skip


class HeadConfig(Branch):
    """The output layer."""

    kind: Literal["vocab", "class"] = "vocab"
    """vocab: next-token prediction, vocabulary split over tp. class: large label space (not available yet)."""
    chunk_tokens: int = Field(512, ge=1)
    """Tokens whose logits exist at one time; the loss and its gradient are worked out chunk by chunk."""


class ModelConfig(Branch):
    """The decoder. `preset` fills the fields; keys given explicitly win."""

    preset: str | None = None
    """One of the presets in opencoder/config.py."""
    layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    """Width M of the residual stream."""
    heads: int = Field(ge=1)
    """Query heads H."""
    kv_heads: int = Field(ge=1)
    """Key/value heads G; default: heads."""
    head_dim: int = Field(ge=2)
    """Width D of one head, independent of hidden_size / heads; default: hidden_size / heads."""
    ffn_size: int = Field(ge=1)
    """Inner width F of the SwiGLU."""
    vocab_size: int = Field(ge=2)
    """Ids the tokenizer can produce, special tokens included."""
    padded_vocab_size: int = Field(ge=2)
    """Rows V of the embedding and the head; default: vocab_size rounded up to a multiple of 128."""
    rope_theta: float = Field(1e4, gt=0)
    norm_eps: float = Field(1e-5, gt=0)
    tie_embeddings: bool = False
    """Use the embedding matrix as the output matrix too."""
    max_seq_len: int = Field(4096, ge=1)
    """Longest sequence the model is meant for (exported as max_position_embeddings)."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the normal initialisation of every matrix."""
    head: HeadConfig = HeadConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """Apply the preset, then the defaults that are worked out from other fields."""
        if not isinstance(given, dict):
            return given
        preset = given.get("preset")
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"preset {preset!r} does not exist; presets: {', '.join(PRESETS)}")
        merged = {**PRESETS.get(preset or "", {}), **{k: v for k, v in given.items() if v is not None}}
        hidden, heads, vocab = (merged.get(k) for k in ("hidden_size", "heads", "vocab_size"))
        if heads is not None:
            merged.setdefault("kv_heads", heads)
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0:
            merged.setdefault("head_dim", hidden // heads)
        if isinstance(vocab, int):
            merged.setdefault("padded_vocab_size", -(-vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE)
        return merged


class ParallelConfig(Branch):
    """How the work is split. dp = world size / (tp·pp·cp) follows and is printed; it is never a key."""

    tp: int = Field(1, ge=1)
    """Tensor parallel size."""
    pp: int = Field(1, ge=1)
    """Pipeline parallel size."""
    cp: int = Field(1, ge=1)
    """Context parallel size."""
    sequence_parallel: bool = False
    """Split the sequence between the tensor-parallel regions."""
    virtual_stages: int = Field(1, ge=1)
    """Model chunks per pipeline rank."""
    schedule: Literal["1f1b", "interleaved", "zb", "zbv"] = "1f1b"
    layout: list[int] | None = None
    """Layers per pipeline stage; default: balanced."""
    sharded_optimizer: bool = False
    """Split the optimizer state over the data-parallel ranks (ZeRO-1)."""
    grad_compression: Literal["none"] = "none"


class BlendEntry(Branch):
    """One dataset of a blend."""

    prefix: str
    """PREFIX of PREFIX.bin and PREFIX.idx."""
    weight: float = Field(1.0, gt=0)
    """Share of the samples, relative to the other entries."""


class DataConfig(Branch):
    """What the model reads."""

    kind: Literal["lm", "sft", "classification"] = "lm"
    tokenizer: str | None = None
    """Folder of an HF tokenizer; copied into every checkpoint and checked against dataset and model."""
    blend: list[BlendEntry] = []
    seq_len: int = Field(1024, ge=1)
    """Tokens per sample."""
    split: str = "1,0,0"
    """Relative shares of training, validation and test documents."""
    seed: int = 1234
    document_mask: bool = False
    """Attention stays within a document, and positions restart with each."""
    fim: dict[str, Any] | None = None
    """Fill-in-the-middle at load (not available yet; `preprocess --fim-rate` does it beforehand)."""
    stages: list[dict[str, Any]] = []
    """Changes of blend, seq_len or batch size at given steps (not available yet)."""
    workers: int = Field(0, ge=0)
    """Loader processes per rank; 0 reads in the training process."""


class TrainConfig(Branch):
    """How long and how."""

    steps: int | None = Field(None, ge=1)
    """Optimizer updates in the whole run."""
    samples: int | None = Field(None, ge=1)
    """Or: samples in the whole run, a multiple of global_batch_size."""
    global_batch_size: int = Field(8, ge=1)
    """Samples per optimizer update, over all ranks."""
    micro_batch_size: int = Field(1, ge=1)
    """Samples per forward pass on one rank."""
    precision: Literal["fp64", "fp32", "bf16"] = "fp32"
    """Type of weights and activations; bf16 keeps fp32 master weights in the optimizer."""
    seed: int = 1234
    recompute: Literal["none", "full"] = "none"
    """full: keep only the input of each layer for backward and work out the rest again."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False
    """Ask torch for deterministic algorithms and fail where there is none."""
    threads: int | None = Field(None, ge=1)
    """CPU threads per process; default: cores / processes on this machine."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations on the validation split; also done after the last step. None: never."""
    eval_samples: int = Field(64, ge=1)
    """Samples per evaluation."""

    def total_steps(self) -> int:
        """Optimizer updates in the run, from `steps` or `samples` (`validate` has checked that one is set)."""
        if self.steps is not None:
            return self.steps
        assert self.samples is not None
        return self.samples // self.global_batch_size


class OptimConfig(Branch):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(1e-5, ge=0)
    """Learning rate at the end of the decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled; not applied to norms and biases."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """For sgd."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest global gradient norm; None: no clipping."""
    schedule: Literal["wsd", "cosine", "constant", "fccs"] = "wsd"
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up."""
    decay_steps: int = Field(0, ge=0)
    """wsd: length of the tail at the end of the run. cosine: always up to the end of the run."""
    decay_shape: Literal["exponential", "exponential_megatron", "linear", "cosine", "minus_sqrt"] = "exponential"


class CheckpointConfig(Branch):
    """Saving and resuming."""

    every: int | None = Field(None, ge=1)
    """Steps between checkpoints; one is always saved after the last step."""
    keep: int | None = Field(None, ge=1)
    """Newest checkpoints kept; None: all."""
    async_save: bool = False
    """Save in the background: training waits for a copy in host memory (as large as a rank's share), not for the disk."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint in run_dir if there is one."""
    load: str | None = None
    """Checkpoint, run or Hugging Face folder to take the initial weights from (weights only)."""


class LogConfig(Branch):
    """What is told while training."""

    every: int = Field(1, ge=1)
    """Steps between console lines and TensorBoard points; metrics.jsonl has every step."""
    tensorboard: bool = True
    wandb: bool = False
    """Needs the extra `wandb`."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak rate of one device for MFU; None: the GEMM rate measured at start."""


class Config(Branch):
    """The root of a training run's configuration."""

    run_dir: str
    """Folder of the run: config, metrics, checkpoints."""
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The training configuration in the YAML file `path` with dotted overrides applied. Raises ConfigError."""
    return parse_tree(Config, read_tree(path, overrides or []))


def load_corpus_config(path: str | Path | None = None, overrides: list[str] | None = None) -> CorpusConfig:
    """The configuration of `build-corpus`; without a file, the defaults with overrides applied. Raises ConfigError."""
    return parse_tree(CorpusConfig, read_tree(path, overrides or []))


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


def validate(config: Config, world_size: int) -> None:
    """Every rule between fields, for a job of `world_size` processes. Raises ConfigError (value, limit, remedy)."""
    _check_available(config)
    _check_model(config)
    _check_batches(config, data_parallel_size(config, world_size))
    _check_schedule(config)


def _check_available(config: Config) -> None:
    """Refuse what the tree can say but this version cannot do, so that no key is silently without effect."""
    p, d = config.parallel, config.data
    missing = {
        f"parallel.pp={p.pp}": p.pp > 1,
        f"parallel.cp={p.cp}": p.cp > 1,
        "parallel.sequence_parallel=true": p.sequence_parallel,
        f"parallel.virtual_stages={p.virtual_stages}": p.virtual_stages > 1,
        f"parallel.schedule={p.schedule}": p.schedule != "1f1b",
        "parallel.layout": p.layout is not None,
        "parallel.sharded_optimizer=true": p.sharded_optimizer,
        f"model.head.kind={config.model.head.kind}": config.model.head.kind != "vocab",
        f"data.kind={d.kind}": d.kind != "lm",
        "data.fim": d.fim is not None,
        "data.stages": bool(d.stages),
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
    for name in ("heads", "kv_heads", "ffn_size", "padded_vocab_size"):
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
    if config.data.seq_len > m.max_seq_len:
        raise ConfigError(
            f"data.seq_len={config.data.seq_len} is longer than model.max_seq_len={m.max_seq_len}: "
            "shorten data.seq_len or raise model.max_seq_len"
        )


def _check_batches(config: Config, dp: int) -> None:
    t = config.train
    if t.global_batch_size % (t.micro_batch_size * dp):
        raise ConfigError(
            f"train.global_batch_size={t.global_batch_size} is not a multiple of micro_batch_size·dp = "
            f"{t.micro_batch_size}·{dp} = {t.micro_batch_size * dp}: set it to a multiple of that"
        )
    if (t.steps is None) == (t.samples is None):
        raise ConfigError("set exactly one of train.steps and train.samples")
    if t.samples is not None and t.samples % t.global_batch_size:
        raise ConfigError(
            f"train.samples={t.samples} is not a multiple of train.global_batch_size={t.global_batch_size}"
        )
    if t.device == "cuda" and t.precision == "fp64":
        raise ConfigError("train.precision=fp64 is for CPU parity runs: set train.device=cpu")


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
