"""`opencoder bench-train`: a training step beside transformers' LlamaForCausalLM, eager and compiled, same shape, batch and
optimizer; and beside the floor: nothing but the step's matrix products, attention and AdamW, into buffers that are reused.

Each side is a process of its own that takes a step when asked, so they alternate and no one's memory counts for another.
Reported: best step of each, tokens/s, ratios, peak resident memory, and model FLOP/s as a share of the GEMM rate measured
in the same process. All have the same allocator settings, which are printed."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from opencoder.console import Parser, ProgressBar, run
from opencoder.files import write_json

SHAPE: dict[str, Any] = {
    "layers": 8, "hidden_size": 512, "heads": 8, "kv_heads": 4, "ffn_size": 1376, "vocab_size": 96640, "max_seq_len": 1024,
}  # fmt: skip
BATCH, LENGTH = 4, 1024
SIDES = ("ours", "transformers", "compiled", "floor")
GOALS = {"transformers": 1.5, "compiled": 1.3, "floor": 0.85}
"""Speed of ours over each."""
MEMORY_GOAL = 0.4
"""Peak of ours over that of eager transformers, at most."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run both sides and print the table."""
    parser = Parser("bench-train", "Training speed and peak memory beside transformers, fp32 on CPU.")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side; the best counts")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each side")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--without", nargs="*", default=[], choices=SIDES[1:], help="sides to leave out")
    parser.add_argument("--side", choices=SIDES, help="(internal) be one side")
    args = parser.parse_args(argv)
    if args.side:
        return serve(args.side, args.threads)
    sides = {name: Side(name, args.threads) for name in SIDES if name not in args.without}
    times: dict[str, list[float]] = {name: [] for name in sides}
    with ProgressBar("bench", total=(args.steps + 1) * len(sides), unit="steps") as bar:
        for round_ in range(args.steps + 1):  # the first round warms up, and compiles
            for name, side in sides.items():
                seconds = side.step()
                if round_:
                    times[name].append(seconds)
                bar.advance(postfix=name)
    facts = {
        name: {**side.finish(), "step_s": min(times[name]), "all_step_s": times[name]} for name, side in sides.items()
    }
    for fact in facts.values():
        fact["tokens_per_s"] = BATCH * LENGTH / fact["step_s"]
        fact["gemm_share"] = fact["flops_per_token"] * fact["tokens_per_s"] / (fact["gemm_tflops"] * 1e12)
    ours = facts["ours"]
    others = {name: fact for name, fact in facts.items() if name != "ours"}
    result = {
        "shape": {**SHAPE, "batch": BATCH, "length": LENGTH, "threads": args.threads},
        "malloc": {k: v for k, v in os.environ.items() if k.startswith(("MALLOC_", "GLIBC_TUNABLES"))},
        **facts,
        "speed_ratios": {name: ours["tokens_per_s"] / fact["tokens_per_s"] for name, fact in others.items()},
        "memory_ratios": {name: ours["peak_gib"] / fact["peak_gib"] for name, fact in others.items()},
    }
    print(table(result))
    if args.json:
        write_json(args.json, result)
    return 0


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"malloc: {result['malloc'] or 'default'}"]
    lines.append(f"{'':<14}{'best step s':>12}{'tokens/s':>10}{'peak GiB':>10}{'of GEMM rate':>14}  loss of step 1")
    for name in (n for n in SIDES if n in result):
        f = result[name]
        loss = "-" if f["first_loss"] is None else f"{f['first_loss']:.4f}"
        lines.append(
            f"{name:<14}{f['step_s']:>12.2f}{f['tokens_per_s']:>10.0f}{f['peak_gib']:>10.2f}{f['gemm_share']:>14.1%}  {loss}"
        )
    for name, ratio in result["speed_ratios"].items():
        met = "met" if ratio >= GOALS[name] else "short"
        lines.append(f"ours / {name}: {ratio:.2f}x tokens/s (goal {GOALS[name]:.2f}x, {met})")
    if "transformers" in result["memory_ratios"]:
        ratio = result["memory_ratios"]["transformers"]
        met = "met" if ratio <= MEMORY_GOAL else "short"
        lines.append(f"ours / transformers: {ratio:.2f}x peak memory (goal at most {MEMORY_GOAL:.2f}x, {met})")
    return "\n".join(lines)


class Side:
    """One side's process, driven over its standard input."""

    def __init__(self, name: str, threads: int) -> None:
        argv = [sys.executable, str(Path(__file__).resolve()), "--side", name, "--threads", str(threads)]
        # One BLAS thread pool setting and allocator for both; transformers must not look for a hub.
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def _ask(self, what: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a side of the benchmark ended with status {self.process.wait()}")
        return json.loads(answer)

    def step(self) -> float:
        """Seconds of one training step."""
        return float(self._ask("step"))

    def finish(self) -> dict[str, Any]:
        """Facts of the side; its process ends."""
        facts: dict[str, Any] = self._ask("finish")
        self.process.wait()
        return facts


def serve(name: str, threads: int) -> int:
    """Be one side: answer `step` with seconds and `finish` with facts."""
    import torch

    from opencoder.config import ModelConfig
    from opencoder.train.metrics import flops_per_token, measure_gemm_tflops

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH + 1))
    config = ModelConfig.model_validate(SHAPE)
    make: dict[str, Callable[..., Any]] = {
        "ours": _ours,
        "transformers": _transformers,
        "compiled": partial(_transformers, compiled=True),
        "floor": _floor,
    }
    step, parameters = make[name](config, ids)
    first_loss = None
    for line in sys.stdin:
        if line.strip() == "finish":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            gemm = measure_gemm_tflops(torch.device("cpu"), torch.float32)
            flops = flops_per_token(config, parameters, LENGTH)
            facts = {"peak_gib": peak, "gemm_tflops": gemm, "flops_per_token": flops, "first_loss": first_loss}
            print(json.dumps(facts), flush=True)
            return 0
        start = time.perf_counter()
        loss = step()
        print(json.dumps(time.perf_counter() - start), flush=True)
        first_loss = loss if first_loss is None else first_loss
    return 1


def _ours(config: Any, ids: Any) -> tuple[Callable[[], float], int]:
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

    return step, sum(p.numel() for p in model.parameters())


def _transformers(config: Any, ids: Any, compiled: bool = False) -> tuple[Callable[[], float], int]:
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

    return step, sum(p.numel() for p in model.parameters())


def _floor(config: Any, ids: Any) -> tuple[Callable[[], None], int]:
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

    def step() -> None:
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

    return step, sum(p.numel() for p in parameters)


if __name__ == "__main__":
    run(main)
