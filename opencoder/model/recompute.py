"""Trading memory for work: modules run again in the backward pass, and single operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from opencoder.config import RecomputeConfig

MODULES = ("full", "attention", "mlp", "norm")
"""Parts of a layer that can be run again: the whole of it, or one of its modules."""
OPERATORS = frozenset({"norm"})
"""Those that are one operator, made again when its result is asked for: no module runs again in the backward pass."""


def modules_of(recompute: str | RecomputeConfig, layer: int) -> frozenset[str]:
    """Which of `MODULES` layer number `layer` runs again under the setting `train.recompute`."""
    recompute = RecomputeConfig.model_validate(recompute)
    if unknown := set(recompute.modules) - set(MODULES):
        raise ValueError(f"recompute={sorted(unknown)[0]}: a layer can run again {', '.join(MODULES)}")
    chosen = recompute.layers
    if chosen is not None and layer not in (range(chosen) if isinstance(chosen, int) else chosen):
        return frozenset()
    return frozenset(recompute.modules)


def run(module: nn.Module, *args: Any, again: bool) -> Any:
    """module(*args). With `again` only `args` are kept for the backward pass, which runs the module a second time."""
    if again and torch.is_grad_enabled():
        return checkpoint(module, *args, use_reentrant=False)
    return module(*args)


def run_on_made(module: nn.Module, x: torch.Tensor, *args: Any, make: Callable[[], torch.Tensor], again: bool) -> Any:
    """module(x, *args), where x = make(), bit by bit, which is not kept for the backward pass. `again` as in `run`."""
    if not torch.is_grad_enabled():
        return module(x, *args)
    if not again:
        with recomputed(x, make):
            return module(x, *args)
    given = [x]  # to the first pass; no later one, and no closure, holds it

    def whole() -> Any:
        if given:
            return module(given.pop(), *args)
        with torch.no_grad():  # what is saved in here must be what was saved in the first pass
            made = make()
        return module(made.requires_grad_(), *args)

    del x
    return checkpoint(whole, use_reentrant=False)


@contextmanager
def recomputed(result: torch.Tensor, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Iterator[None]:
    """Within the block, what autograd would save of `result` = function(*inputs) is not kept but worked out again in the
    backward pass, bit by bit the same, once for all that saved it. Worth it where `inputs` are saved anyway and `function`
    is cheap."""
    if not torch.is_grad_enabled():
        yield
        return
    start, size = result.data_ptr(), result.numel()
    kept = [x.detach() for x in inputs]
    savers = 0
    made: list[torch.Tensor] = []
    """The result made again, and once more for each saver that is still to ask for it."""

    def pack(saved: torch.Tensor) -> torch.Tensor | torch.Size:
        nonlocal savers
        if saved.data_ptr() != start or saved.numel() != size:
            return saved
        savers += 1
        return saved.shape

    def unpack(packed: torch.Tensor | torch.Size) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        if not made:
            with torch.no_grad():
                made.extend([function(*kept)] * savers)
        return made.pop().view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
