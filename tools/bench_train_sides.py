"""The sides of bench-train: each is a process, or the ranks of a layout, that takes a training step when asked."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

SHAPE: dict[str, Any] = {
    "layers": 8, "hidden_size": 512, "heads": 8, "kv_heads": 4, "ffn_size": 1376, "vocab_size": 96640, "max_seq_len": 1024,
}  # fmt: skip
BATCH, LENGTH = 4, 1024
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "dp2": {},
    "dp2-sharded": {"sharded_optimizer": True},
}
"""Name → keys of `parallel`; each runs as two processes that share the threads of the side it is compared with."""


class Built(NamedTuple):
    """A side that is ready to train."""

    step: Callable[[], float | None]
    parameters: int
    """Of the whole model."""
    more: Callable[[], dict[str, Any]] = dict
    """Further facts, asked for at the end."""


def serve(name: str, threads: int) -> int:
    """Be one side: answer `step` with seconds and `finish` with facts."""
    import torch

    from opencoder.config import ModelConfig
    from opencoder.train.metrics import flops_per_token, measure_gemm_tflops

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH + 1))
    config = ModelConfig.model_validate(SHAPE)
    make: dict[str, Callable[..., Built]] = {
        "ours": _ours,
        "transformers": _transformers,
        "compiled": partial(_transformers, compiled=True),
        "floor": _floor,
        **{layout: partial(_layout, keys=keys) for layout, keys in LAYOUTS.items()},
    }
    step, parameters, more = make[name](config, ids)
    first_loss = None
    for line in sys.stdin:
        if line.strip() == "finish":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            gemm = measure_gemm_tflops(torch.device("cpu"), torch.float32)
            flops = flops_per_token(config, parameters, LENGTH)
            facts = {
                "peak_gib": peak,
                "gemm_tflops": gemm,
                "flops_per_token": flops,
                "first_loss": first_loss,
                **more(),
            }
            print(json.dumps(facts), flush=True)
            return 0
        start = time.perf_counter()
        loss = step()
        print(json.dumps(time.perf_counter() - start), flush=True)
        first_loss = loss if first_loss is None else first_loss
    return 1


def _ours(config: Any, ids: Any) -> Built:
    import torch

    from opencoder.config import OptimConfig
    from opencoder.model.decoder import named_parameters
    from opencoder.model.initialise import build_model
    from opencoder.optim.optimizer import ReplicatedOptimizer
    from opencoder.parallel.mesh import Mesh

    model = build_model(config, Mesh(), dtype=torch.float32, device=torch.device("cpu"), seed=0)
    optimizer = ReplicatedOptimizer(named_parameters(model), OptimConfig(clip_norm=1.0), Mesh())
    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> float:
        count = model.lm_head.begin_step([labels])
        loss, _ = model.loss(tokens, labels)
        (loss / count).backward()
        optimizer.fold_gradients()
        optimizer.finish_reduction()
        optimizer.step(lr=3e-4)
        return float(loss.detach() / count)

    return Built(step, sum(p.numel() for p in model.parameters()))


def _layout(config: Any, ids: Any, keys: dict[str, Any]) -> Built:
    """This rank of a layout: the trainer's own step on the same global batch."""
    import torch

    from opencoder.config import OptimConfig, ParallelConfig
    from opencoder.data.loader import MicroBatch
    from opencoder.model.decoder import named_parameters, parameter_count
    from opencoder.model.initialise import build_model
    from opencoder.optim.build import build_optimizer
    from opencoder.parallel.group import start_processes
    from opencoder.parallel.mesh import create_mesh
    from opencoder.train.step import TrainStep

    start_processes("cpu", timeout_s=600)
    parallel = ParallelConfig.model_validate(keys)
    mesh, device = create_mesh(tp=parallel.tp), torch.device("cpu")
    model = build_model(config, mesh, dtype=torch.float32, device=device, seed=0, parallel=parallel)
    optimizer = build_optimizer(
        named_parameters(model),
        OptimConfig(clip_norm=1.0),
        mesh,
        sharded=parallel.sharded_optimizer,
        modules=[model],
    )
    train = TrainStep(model, optimizer, mesh, device=device)
    mine = ids.chunk(mesh.dp.size)[mesh.dp.rank]
    batch = [MicroBatch(mine[:, :-1].contiguous(), mine[:, 1:].contiguous(), None, None)]
    communicated: list[tuple[float, float, int]] = []

    def step() -> float:
        start = time.perf_counter()
        loss = float(train.update(batch, lr=3e-4).loss)
        totals = mesh.records.take()
        communicated.append((totals.blocked_s, time.perf_counter() - start, totals.bytes))
        return loss

    def more() -> dict[str, Any]:
        timed = communicated[1:]  # the first step warms up
        local = sum(p.numel() for p in model.parameters())
        shards = mesh.dp.size if parallel.sharded_optimizer else 1
        return {
            "exposed": sum(c[0] for c in timed) / sum(c[1] for c in timed),
            "bytes": timed[-1][2],
            "state_bytes": optimizer.state_bytes(),
            "state_formula": 4 * local * (2 + 2 / shards),  # weights and gradients; two moments
        }

    return Built(step, parameter_count(config), more)


def _transformers(config: Any, ids: Any, compiled: bool = False) -> Built:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from opencoder.checkpoint.hf_config import hf_config

    settings = {**hf_config(config, torch.float32, None), "attn_implementation": "sdpa"}
    model = LlamaForCausalLM(LlamaConfig(**settings)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    forward = torch.compile(model) if compiled else model

    def step() -> float:
        loss = forward(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return Built(step, sum(p.numel() for p in model.parameters()))


def _floor(config: Any, ids: Any) -> Built:
    """What no implementation of the step can leave out: three products for each matrix, attention, the update."""
    import torch
    import torch.nn.functional as F

    tokens, width, ffn, d = BATCH * LENGTH, config.hidden_size, config.ffn_size, config.head_dim
    queries, keys = config.heads * d, config.kv_heads * d
    shapes = [
        (queries, width),
        (keys, width),
        (keys, width),
        (width, queries),
        (ffn, width),
        (ffn, width),
        (width, ffn),
    ]
    matrices = [torch.randn(rows, columns) for rows, columns in shapes]
    activations = {n: torch.randn(tokens, n) for n in {n for shape in shapes for n in shape}}
    results = {n: torch.empty(tokens, n) for n in activations}
    gradients = {shape: torch.empty(shape) for shape in shapes}
    chunk = config.head.chunk_tokens
    head, d_head = torch.randn(config.padded_vocab_size, width), torch.zeros(config.padded_vocab_size, width)
    logits, hidden = torch.empty(chunk, config.padded_vocab_size), activations[width]
    q = torch.randn(BATCH, config.heads, LENGTH, d, requires_grad=True)
    k, v = (torch.randn(BATCH, config.kv_heads, LENGTH, d, requires_grad=True) for _ in range(2))
    d_out = torch.randn(BATCH, config.heads, LENGTH, d)
    sizes = [(config.padded_vocab_size, width)] * 2 + [shape for _ in range(config.layers) for shape in shapes]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in sizes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float | None:
        for _ in range(config.layers):
            for matrix in matrices:
                rows, columns = matrix.shape
                torch.mm(activations[columns], matrix.t(), out=results[rows])
                torch.mm(activations[rows], matrix, out=results[columns])
                torch.mm(activations[rows].t(), activations[columns], out=gradients[rows, columns])
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            torch.autograd.grad(out, (q, k, v), d_out)
        for part in hidden.split(chunk):
            torch.mm(part, head.t(), out=logits)
            torch.mm(logits, head, out=results[width][: len(part)])
            d_head.addmm_(logits.t(), part)
        optimizer.step()
        return None

    return Built(step, sum(p.numel() for p in parameters))
