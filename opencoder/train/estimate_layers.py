"""What the modules of a stage hold while one micro-batch goes through: tensor by tensor, as the code makes them.

B samples, S/cp tokens of each here, M width, q = H/tp·D and k = G/tp·D numbers of queries and keys of a token, F/tp inner width,
V/tp rows of the vocabulary. All sizes are bytes on one rank unless said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from opencoder.config import Config
from opencoder.model.decoder import Part
from opencoder.model.recompute import modules_of
from opencoder.parallel.ulysses import key_heads_for

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2}


class Step(NamedTuple):
    """A moment of a module's backward pass."""

    live: int
    """What is held of the module and for it, beside gradients of weights."""
    made: int = 0
    """Gradients of its weights that are ready."""
    making: int = 0
    """Gradients of its weights that are being worked out."""


@dataclass(frozen=True)
class Module:
    """One module of a stage."""

    weights: int
    """Of its parameters, in their own type."""
    kept: int
    """From forward to backward."""
    forward: int
    """The most at a time in forward, with what is kept."""
    backward: tuple[Step, ...]
    """In their order; the last frees everything."""
    held: int = 0
    """Gradients that a zero-bubble schedule holds from the backward of inputs to that of weights."""
    dropped: int = 0
    """Of what is kept, freed after the backward of inputs already."""
    head: bool = False


@dataclass(frozen=True)
class Sizes:
    """Tensors of one micro-batch."""

    tokens: int
    """Number: B·S/cp."""
    width: int
    """Bytes of one number."""
    wide: int
    """Bytes of one number of statistics, main gradients and optimizer state."""
    tp: int
    cp: int
    split: bool
    """Sequence parallelism: `hidden` is a share of `whole`."""
    overlap: bool
    """The backward of column-parallel layers holds its collective."""
    zero_bubble: bool
    cpu: bool
    """On CPUs, with gloo: a reduce-scatter is an exchange into a buffer of its own, added up here."""
    ring: bool
    hidden: int
    """(B, S/cp, M), under sequence parallelism (B, S/cp/tp, M)."""
    whole: int
    """(B, S/cp, M)."""
    queries: int
    keys: int
    """Keys, or values."""
    exchanged_keys: int
    """The same in attention by exchange, with the copies that it needs."""
    inner: int
    rstd: int
    lse: int
    angles: int
    """Cosines and sines of the rotary embedding."""

    @property
    def scatter(self) -> int:
        """Beside input and output of a reduce-scatter of `whole`: on gloo what came from the others, and the sum in the making."""
        return self.whole + self.hidden * max(1, 4 // self.width) if self.cpu else 0


def sizes_of(config: Config, *, micro_batch: int, seq_len: int, cpu: bool) -> Sizes:
    """For micro-batches of `micro_batch` samples of `seq_len` tokens."""
    m, p = config.model, config.parallel
    width = BYTES[config.train.precision]
    wide = max(width, 4)
    tokens = micro_batch * seq_len // p.cp
    heads, kv_heads = m.heads // p.tp, max(m.kv_heads // p.tp, 1)
    exchange = p.cp > 1 and p.context_attention == "ulysses"
    split = p.sequence_parallel and p.tp > 1
    whole = tokens * m.hidden_size * width
    hidden = whole // p.tp if split else whole
    zero_bubble = p.pp > 1 and p.schedule in ("zb", "zbv")
    return Sizes(
        tokens=tokens,
        width=width,
        wide=wide,
        tp=p.tp,
        cp=p.cp,
        split=split,
        overlap=p.tp > 1 and (not zero_bubble if p.overlap is None else p.overlap),
        zero_bubble=zero_bubble,
        cpu=cpu,
        ring=p.cp > 1 and not exchange,
        hidden=hidden,
        whole=whole,
        queries=tokens * heads * m.head_dim * width,
        keys=tokens * kv_heads * m.head_dim * width,
        exchanged_keys=tokens * (key_heads_for(kv_heads, p.cp) if exchange else kv_heads) * m.head_dim * width,
        inner=tokens * m.ffn_size // p.tp * width,
        rstd=tokens // (p.tp if split else 1) * wide,
        lse=tokens * heads * wide,
        angles=(tokens if config.data.document_mask else seq_len // p.cp) * m.head_dim * 4,
    )


# ---- a layer ----


def layer(config: Config, s: Sizes, number: int, *, first: bool) -> Module:
    """Layer `number`; `first` of its stage, so that there is no residual beside its input."""
    again = modules_of(config.train.recompute, number)
    m = config.model
    mlp = m.hidden_size * m.ffn_size // s.tp * s.width  # of one matrix
    query = m.hidden_size * m.heads // s.tp * m.head_dim * s.width
    key = m.hidden_size * max(m.kv_heads // s.tp, 1) * m.head_dim * s.width
    weights = 3 * mlp + 2 * query + 2 * key + 2 * m.hidden_size * s.width
    # A norm keeps its input and gives an output that the matrices keep: under overlap this rank's share of it, else all.
    normed = s.hidden if s.overlap else s.whole
    remade = normed if "norm" in again and "full" not in again else 0
    norm = s.hidden + s.rstd + normed - remade
    attention, whole_attention = _attention_kept(s), "attention" not in again
    inputs = 0
    if "full" in again:
        inputs = kept = s.hidden * (1 if first else 2)
    else:
        kept = 2 * norm + (attention if whole_attention else 0) + (0 if "mlp" in again else 2 * s.inner)
    beside = inputs + norm + remade + (attention if whole_attention else 0)
    steps = (
        *_mlp_backward(s, beside + norm, mlp),
        *_attention_backward(s, inputs + norm + remade, attention, 3 * mlp, query, key),
    )
    # product of gate and up, output of the last matrix, and its sum over the ranks
    summing = s.whole + (s.hidden + s.scatter if s.split else s.whole) if s.tp > 1 else s.whole
    running = inputs + norm + 3 * s.inner + summing if "full" in again else kept + s.inner + summing
    running += remade
    if "mlp" in again:
        running += 2 * s.inner
    held = 4 * s.hidden + 2 * s.inner + s.queries + 2 * s.keys + (2 * s.whole if s.split else 0)
    return Module(weights, kept, running, steps, held)


def _attention_kept(s: Sizes) -> int:
    if s.cp > 1 and not s.ring:  # whole samples of few heads, their output, and that output spread over the ranks again
        return s.queries + 2 * s.exchanged_keys + 2 * s.queries + s.lse
    return 2 * s.queries + 2 * s.keys + s.lse  # q and k turned, v, output


def _mlp_backward(s: Sizes, base: int, matrix: int) -> Iterator[Step]:
    """`base`: kept of the layer beside gate and up. The gradient of the residual is there all the time, and in the beginning the
    same tensor as that of the output."""
    gate_up, base = 2 * s.inner, base + s.hidden
    gathered = s.whole if s.split else 0
    yield Step(base + gate_up + gathered + 2 * s.inner, 0, matrix)  # the product made again, and its gradient
    yield Step(base + gate_up + 3 * s.inner, matrix)  # its gradient, those of gate and up
    yield from _columns_backward(s, base, [s.inner, s.inner], matrix, [matrix, matrix])
    yield Step(base + 2 * s.hidden, 3 * matrix)  # norm


def _attention_backward(s: Sizes, base: int, kept: int, made: int, query: int, key: int) -> Iterator[Step]:
    gathered, base = s.whole if s.split else 0, base + s.hidden
    yield Step(base + kept + gathered + s.queries, made, query)
    grads = s.queries + 2 * s.keys
    wide = s.wide // s.width
    if s.ring:
        # keys and values at hand and coming; their gradients at hand and coming; dq summed, and of this piece; all in a wide type
        working = s.queries * wide + 4 * s.keys + 4 * s.keys * wide + grads
    elif s.cp > 1:  # copies in one piece, and gradients before and after the exchange
        working = s.queries + 3 * (s.queries + 2 * s.exchanged_keys)
    else:
        working = grads
    yield Step(base + kept + s.queries + working, made + query)
    yield Step(base + grads + s.queries + s.keys, made + query)  # turned back
    yield from _columns_backward(s, base, [s.queries, s.keys, s.keys], made + query, [query, key, key])
    yield Step(base + 2 * s.hidden, made + 2 * query + 2 * key)


def _columns_backward(s: Sizes, base: int, grads: list[int], made: int, matrices: list[int]) -> Iterator[Step]:
    """Products of one input: `grads` of the outputs are taken from the last to the first."""
    if s.overlap:
        gathered = s.whole + s.scatter if s.split else 0
        yield Step(base + sum(grads) + s.whole + gathered, made, sum(matrices))
        return
    for i in range(len(grads) - 1, -1, -1):
        sums = s.whole if i < len(grads) - 1 else 0
        yield Step(base + sum(grads[: i + 1]) + s.whole + sums, made, matrices[i])
        made += matrices[i]
    if s.tp > 1:
        yield Step(base + s.whole + (s.scatter + s.hidden if s.split else s.whole), made)


# ---- the two ends, and what stands between stages ----


def embedding(config: Config, s: Sizes) -> Module:
    """Its output is kept by the first layer."""
    weights = config.model.padded_vocab_size // s.tp * config.model.hidden_size * s.width
    ids = s.tokens * 8
    out = s.whole * (3 if s.tp > 1 else 1)  # rows, those of other ranks masked, their sum
    step = Step(s.hidden + ids + (s.whole * 2 if s.tp > 1 else 0), 0, weights)
    return Module(weights, ids, out + ids, (step,))


def head(config: Config, s: Sizes) -> Module:
    """Last norm, output matrix and loss."""
    m = config.model
    rows = m.padded_vocab_size // s.tp
    numbers = rows * m.hidden_size
    weights = numbers * s.width
    norm = s.hidden + s.rstd
    leaving = (s.scatter + s.hidden if s.split else s.whole) if s.tp > 1 else 0
    loss = s.tokens * (s.wide + 8)
    if s.zero_bubble:  # all logits, and in the backward pass as many gradients
        logits = s.tokens * rows * s.width
        kept = norm + s.whole + logits + loss
        steps: tuple[Step, ...] = (
            Step(kept + logits),
            Step(norm + s.whole + logits + s.whole, 0, weights),
            Step(norm + s.whole + leaving + s.hidden, weights),
        )
        return Module(weights, kept, kept + loss, steps, logits + s.hidden, logits, head=True)
    chunk = min(m.head.chunk_tokens, s.tokens) * rows
    # Worked out in forward: the gradients of the hidden state and, in a wide type, of the matrix.
    one_op = s.tp == 1 and not config.train.z_loss
    kept = norm + s.whole * (2 if one_op else 1) + numbers * s.wide + loss
    widened = 4 * chunk if s.cpu and s.width < 4 else 0  # the CPU has no product of 16-bit tensors with a wide result
    # Under sequence parallelism the hidden state is there as this rank's share and gathered.
    forward = kept + (0 if one_op else s.whole) + (s.hidden if s.split else 0) + chunk * s.width + widened
    steps = (
        Step(kept, 0, weights if s.width < s.wide else 0),
        Step(norm + s.whole + leaving + s.hidden, weights),
    )
    return Module(weights, kept, forward, steps, head=True)


def modules_of_stage(config: Config, s: Sizes, part: Part) -> list[Module]:
    """In the order of the forward pass."""
    found = [embedding(config, s)] if part.first else []
    found += [layer(config, s, number, first=number == part.layers.start) for number in part.layers]
    if part.last:
        return [*found, head(config, s)]
    # The sum of update and residual goes to the next stage, and is kept until its gradient comes.
    return [*found, Module(0, s.hidden, 2 * s.hidden, (Step(2 * s.hidden),))]
