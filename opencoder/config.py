"""The configuration tree: what can be set and what it means. The rules between fields stand in config_rules.py.

`load_config(file, overrides)` reads YAML, applies dotted overrides (`optim.lr=1e-4`) and checks types;
`validate(config, world_size)` checks what fields ask of each other. A part of the program
gets its branch, never the root."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .config_loading import Branch, parse_tree, read_tree
from .config_rules import data_parallel_size, divisors, validate
from .corpus_config import CorpusConfig

__all__ = ["PRESETS", "Config", "data_parallel_size", "divisors", "load_config", "load_corpus_config", "validate"]

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


class RebuildConfig(Branch):
    """When the graph of neighbouring classes is made anew."""

    first_step: int | None = Field(None, ge=0)
    """Step after which the first one is made; until then the negatives are random. None: optim.warmup_steps."""
    every: int | None = Field(None, ge=1)
    """Steps between two; None: one pass over the training samples."""
    probe_recall: float = Field(0.8, ge=0, le=1)
    """Made earlier where the recall of the graph on a thousand rows, against the weights as they are, is below this."""
    max_age: int | None = Field(None, ge=1)
    """Steps after which a run with an older graph ends; None: no limit."""
    background: bool = True
    """Made beside training, from a copy of the class matrix, and taken up by all ranks in one step. False: training waits; only then
    do a run and one that was interrupted equal each other bit by bit."""
    products: Literal["fp32", "fp16", "bf16"] | None = None
    """Type of the products that choose candidates; cosines of these are worked out in fp32. None: fp16 on a GPU, fp32 on a CPU."""


class HeadConfig(Branch):
    """The output layer. All but `kind` and `chunk_tokens` is for kind class."""

    kind: Literal["vocab", "class"] = "vocab"
    """vocab: next-token prediction, vocabulary split over tp. class: a label for each sample, of very many."""
    chunk_tokens: int = Field(512, ge=1)
    """Tokens whose logits exist at one time; the loss and its gradient are worked out chunk by chunk."""
    classes: int | None = Field(None, ge=2)
    """Rows N of the class matrix, which is split over ranks."""
    dim: int | None = Field(None, ge=1)
    """Width D of a row and of a feature; None: model.hidden_size, and no projection."""
    class_group: Literal["tp", "dp_cp", "world"] = "dp_cp"
    """Ranks that share the class matrix; the others hold copies of it."""
    variant: Literal["plain", "cosine", "arcface", "cosface"] = "plain"
    """Logits: x·w; scale·cos(x, w); with an angular margin (arXiv:1801.07698), or a cosine margin (arXiv:1801.09414), for the
    target."""
    scale: float = Field(30.0, gt=0)
    """Of cosines."""
    margin: float = Field(0.5, ge=0)
    """Of arcface (radians) and cosface (cosine)."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    selection: Literal["full", "random", "knn"] = "full"
    """Classes that a step scores: all, a random share, or the nearest of its labels and a random share."""
    rho: float = Field(0.1, gt=0, le=1)
    """Share of each rank's classes that a step scores, unless it has more labels than that."""
    neighbours: int = Field(100, ge=1)
    """Length K of the list of nearest classes of each class, itself included."""
    candidate_ratio: float | None = Field(None, ge=1)
    """Candidates K' kept of products in half precision before the ranking in fp32, over K; None: 1.25 in fp16, 1.5 in bf16, 1 in
    fp32."""
    uniform_mix: float = Field(0.2, ge=0, lt=1)
    """Share of the scored classes that stays random."""
    tail_correction: bool = False
    """Weight the random classes for those that are not scored, so that the sum over all is estimated without bias."""
    permute: bool = True
    """Spread neighbouring class numbers over the ranks, once, at the start."""
    rebuild: RebuildConfig = RebuildConfig()
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """Of the class matrix, with the rate, momentum, betas, eps and decay of `optim`."""
    row_update: Literal["lazy", "dense_equivalent"] = "lazy"
    """lazy: a step touches scored rows alone. dense_equivalent: the others decay and move by momentum too."""
    state_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of optimizer state, and of master rows where weights are shorter."""

    @model_validator(mode="before")
    @classmethod
    def _no_exchange(cls, given: Any) -> Any:
        asked = [key for key in ("grad_exchange", "grad_compression") if isinstance(given, dict) and key in given]
        if asked:
            raise ValueError(
                f"{asked[0]}: a row of the class matrix belongs to one rank, so that its gradient is not exchanged and cannot be made "
                "sparse on the way; remove the key (parallel.grad_compression is for the other parameters)"
            )
        return given

    @model_validator(mode="after")
    def _fits_its_kind(self) -> HeadConfig:
        if self.kind == "class" and self.classes is None:
            raise ValueError("kind: class needs `classes`, the number of them")
        defaults = type(self).model_fields
        others = [
            key
            for key in defaults
            if getattr(self, key) != defaults[key].default and key not in ("kind", "chunk_tokens")
        ]
        if self.kind == "vocab" and others:
            raise ValueError(f"{', '.join(others)}: for kind class alone; set kind: class, or remove what is for it")
        return self


class EncoderConfig(Branch):
    """What makes a feature of a sample, for head kind class."""

    input: Literal["tokens", "features"] = "tokens"
    """tokens: the decoder's layers, and one feature of the hidden states of a sample. features: numbers come in, and as many layers of
    gated units follow, with no attention; of the model's sizes, hidden_size, ffn_size and layers count."""
    width: int | None = Field(None, ge=1)
    """Numbers of a sample, for input: features."""
    pool: Literal["mean", "last"] = "mean"
    """Hidden state that stands for a sample: the mean over its tokens, or that of the last one."""

    @model_validator(mode="after")
    def _fits_its_input(self) -> EncoderConfig:
        if (self.input == "features") != (self.width is not None):
            raise ValueError("`width` is needed with input: features, and only there")
        return self


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
    init: Literal["normal", "depth_scaled"] = "normal"
    """depth_scaled: the matrices that write into the residual stream (o_proj, down_proj) start smaller by √(2·layers)."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the normal initialisation of every matrix."""
    head: HeadConfig = HeadConfig()
    encoder: EncoderConfig = EncoderConfig()
    """For head kind class."""

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
        hidden, encoder = merged.get("hidden_size"), merged.get("encoder")
        if isinstance(encoder, dict) and encoder.get("input") == "features":  # no attention, no ids
            merged = {"heads": 1, "head_dim": 2, "vocab_size": 2, **merged}
            if isinstance(hidden, int):
                merged.setdefault("ffn_size", 4 * hidden)
        heads, vocab = merged.get("heads"), merged.get("vocab_size")
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
    """Split the tokens over tp between the tensor-parallel regions: each rank norms and keeps its share of them."""
    context_attention: Literal["ring", "ulysses"] = "ring"
    """How attention reaches the other parts of a sequence under cp: keys and values travel round a ring, or tokens are exchanged for
    heads, which needs heads/tp to be a multiple of cp and kv_heads/tp a multiple or a divisor of it."""
    overlap: bool | None = None
    """Sum the gradients of hidden states over tp while those of the weights are worked out; None: where the schedule allows it
    (not under zb and zbv)."""
    virtual_stages: int = Field(1, ge=1)
    """Model chunks per pipeline rank."""
    schedule: Literal["1f1b", "interleaved", "zb", "zbv"] = "1f1b"
    """Order of the micro-batches in a pipeline, and which stages are on a rank: interleaved takes virtual_stages of 2 or more, zb
    (interleaved zero-bubble) 1 or 2, zbv (zero-bubble in a V) 2. zb and zbv keep all logits of a micro-batch, not a chunk of them."""
    layout: list[int] | None = None
    """Layers of each of the pp·virtual_stages stages; None: balanced, with the head counted as the layers it costs."""
    sharded_optimizer: bool = False
    """Split the optimizer state over the data-parallel ranks (ZeRO-1)."""
    grad_compression: Literal["none"] = "none"


class BlendEntry(Branch):
    """One dataset of a blend."""

    prefix: str
    """PREFIX of PREFIX.bin and PREFIX.idx."""
    weight: float = Field(1.0, gt=0)
    """Share of the samples, relative to the other entries."""


class DataStage(Branch):
    """What changes at a given step of the run; None: as in the stage before."""

    from_step: int = Field(ge=0)
    """First optimizer update of the stage, from 0."""
    blend: list[BlendEntry] | None = None
    seq_len: int | None = Field(None, ge=1)
    global_batch_size: int | None = Field(None, ge=1)
    micro_batch_size: int | None = Field(None, ge=1)


class FimConfig(Branch):
    """Fill-in-the-middle at load, on the pieces of documents within a sample, at token borders, keeping their length."""

    rate: float = Field(0.5, ge=0, le=1)
    """Share of the pieces that are turned."""
    spm_rate: float = Field(0.5, ge=0, le=1)
    """Share of those that are written suffix first."""
    min_tokens: int = Field(16, ge=4)
    """Shorter pieces are left alone."""
    ids: tuple[int, int, int] | None = None
    """Prefix, middle and suffix sentinel; None: those of data.tokenizer."""


class DataConfig(Branch):
    """What the model reads."""

    kind: Literal["lm", "sft", "classification"] = "lm"
    """classification: one dataset of `opencoder write-classification` in `blend`, for model.head.kind: class."""
    tokenizer: str | None = None
    """Folder of an HF tokenizer; copied into every checkpoint and checked against dataset and model."""
    blend: list[BlendEntry] = []
    seq_len: int = Field(1024, ge=1)
    """Tokens per sample."""
    validation: str | None = None
    """For kind classification: PREFIX of the dataset that is evaluated; None: no evaluation."""
    split: str = "1,0,0"
    """Relative shares of training, validation and test documents."""
    seed: int = 1234
    document_mask: bool = False
    """Attention stays within a document, and positions restart with each."""
    fim: FimConfig | None = None
    """Fill-in-the-middle while training, not in evaluation; `preprocess --fim-rate` does it beforehand, by characters."""
    stages: list[DataStage] = []
    """Changes of blend, seq_len or batch size at given steps. Evaluation keeps data.blend and data.seq_len."""
    cache_dir: str | None = None
    """Folder for sample indices, shared by all ranks and runs; None: PREFIX.cache beside each dataset."""
    workers: int = Field(0, ge=0)
    """Loader processes per rank; 0 reads in the training process."""


class RecomputeConfig(Branch):
    """Which modules of which layers are run again in the backward pass, their inputs alone being kept. A name alone stands for
    that module in all layers, `none` for no module."""

    modules: list[Literal["full", "attention", "mlp", "norm"]] = []
    layers: list[int] | int | None = None
    """Numbers of the layers, from 0; or how many, from the first; None: all."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        return {"modules": [] if given == "none" else [given]} if isinstance(given, str) else given

    def __str__(self) -> str:
        where = "" if self.layers is None else f" of layers {self.layers}"
        return ("+".join(self.modules) or "none") + where


class SkipConfig(Branch):
    """Updates that are left out because loss or gradient norm is not finite or far off."""

    sigma: float = Field(6.0, gt=0)
    """Standard deviations above the mean of the window."""
    window: int = Field(128, ge=2)
    """Updates looked back; until half of them are made, only what is not finite is left out."""
    stop_after: int = Field(5, ge=1)
    """Steps skipped in a row that end the run, or rewind it. A step that is left out beforehand is not counted."""
    on_stop: Literal["stop", "rewind"] = "stop"
    """rewind: go back to the newest checkpoint from before them and leave their batches out. Later checkpoints are removed."""
    rewind_before: int = Field(0, ge=0)
    """Steps before them that a rewind leaves out too. At 0 a rewind mends damaged state, and nothing that an update did."""
    max_rewinds: int = Field(3, ge=0)
    """Rewinds in a whole run; after them, too many skipped steps end it."""
    steps: list[Annotated[int, Field(ge=1)]] = []
    """Steps, from 1, whose batches are left out without a look at them: no update, no loss."""


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
    recompute: RecomputeConfig = RecomputeConfig()
    """none; full: keep only the input of each layer for backward and work out the rest again; attention or mlp: the same for that
    module alone; norm: make the results of norms again; {modules: […], layers: …}: for some layers. Changes no bit, but that in
    bf16 norm takes the norms of rounded sums."""
    z_loss: float = Field(0.0, ge=0)
    """Weight of the squared log-sum-exp of the logits in what is minimised; the loss that is told stays the cross entropy."""
    skip: SkipConfig | None = None
    """Leave out updates that would do harm, and write their batches to RUN/skipped; None: a loss or norm that is not finite
    ends the run."""
    timeout_s: float = Field(600.0, gt=0)
    """Seconds that a rank may wait in a collective. Then the ranks that are behind are named, and all end. Longer than the slowest
    save, evaluation and read of a checkpoint."""
    bandwidth_check: bool = True
    """Measure at start what an all-reduce over each axis reaches (less than two seconds), and print it."""
    memory_check: Literal["off", "warn", "refuse"] = "warn"
    """What to do before the start when the estimate of `--dry-run` exceeds the memory that is free."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False
    """The same bits every time on the same layout and machine: torch's deterministic algorithms, an error where an operator has
    none, and a fixed workspace for cuBLAS (CUBLAS_WORKSPACE_CONFIG=:4096:8). With or without it seeds are fixed and our kernels
    add nothing atomically; what NCCL does is not tested."""
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


class ParameterGroup(Branch):
    """Parameters that are updated with settings of their own."""

    match: str
    """Pattern over checkpoint keys, with * and ?; the first group that matches counts."""
    lr_scale: float = Field(1.0, ge=0)
    """Times the schedule's rate."""
    weight_decay: float | None = Field(None, ge=0)
    """None: optim.weight_decay, or 0 for norms and biases."""


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
    groups: list[ParameterGroup] = []
    """Settings for some of the parameters."""


class CheckpointConfig(Branch):
    """Saving and resuming."""

    every: int | None = Field(None, ge=1)
    """Steps between checkpoints; one is always saved after the last step."""
    keep: int | None = Field(None, ge=1)
    """Newest checkpoints kept; None: all."""
    keep_every: int | None = Field(None, ge=1)
    """Checkpoints of steps divisible by this are never dropped."""
    async_save: bool = False
    """Save in the background: the next update waits for a copy in host memory (as large as a rank's share), nothing for the disk."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint in run_dir if there is one."""
    load: str | None = None
    """Checkpoint, run or Hugging Face folder to take the initial weights from (weights only). An encoder takes the layers of a
    language model, or all of another encoder."""
    fork: str | None = None
    """Checkpoint or run folder to go on from in a new run_dir: weights, optimizer state and position, with this configuration's
    schedule."""
    seed: bool = False
    """Write the checkpoint of step 0, from which any layout starts, and end."""
    check_replicas: bool = True
    """Compare before every save what several ranks hold alike, bit by bit, and end the run if it differs. Costs a hash of a rank's
    share, in the background with async_save."""


class LogConfig(Branch):
    """What is told while training."""

    every: int = Field(1, ge=1)
    """Steps between console lines and TensorBoard points, and between losses by source and language; metrics.jsonl has every step."""
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
