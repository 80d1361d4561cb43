"""The best classes of each sample over all ranks, in an order that does not depend on how the classes are split."""

from __future__ import annotations

import torch

from opencoder.parallel.group import Group

from .scored import ScoredRows
from .softmax import Groups, products
from .variants import Variant

_LOW = 0xFFFFFFFF
_SIGN = 0x7FFFFFFF


def keys_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Logits and class ids, of shapes that fit → int64 keys: the larger, the better; of equal logits (as fp32) the smaller id is
    the better. An order of integers, as torch's topk leaves open which of equal values it keeps."""
    bits = (logits.float() + 0.0).view(torch.int32).long()  # −0 becomes 0
    ordered = torch.where(bits < 0, bits ^ _SIGN, bits)  # of negative numbers the larger bits are the smaller number
    return (ordered << 32) | (_LOW - ids)


def values_and_ids(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the keys were made of: fp32 and int64."""
    ordered = (keys >> 32).int()
    bits = torch.where(ordered < 0, ordered ^ _SIGN, ordered)
    return bits.view(torch.float32), _LOW - (keys & _LOW)


@torch.no_grad()
def best_classes(
    features: torch.Tensor, rows: ScoredRows, ids: torch.Tensor, groups: Groups, variant: Variant, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """features (b, D) of each rank, of length 1 where the variant has cosines → the k largest logits (b, k), fp32, without
    margins, and their class ids, the same on ranks with the same samples. `ids` (N_r,): the class of each local row. k is at most
    the number of all classes."""
    x = groups.samples.all_gather(features)
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    x = x.to(dtype)
    best = ids.new_empty(x.shape[0], 0)
    for begin, end in rows.chunks(x.shape[0]):
        z = torch.empty(end - begin, x.shape[0], dtype=dtype, device=x.device)
        products(rows.rows(begin, end, dtype), x, variant.factor, z)
        best = _with(best, z, ids[begin:end], k)
    found = _of_all(best, groups.classes, k)
    b, rank = features.shape[0], groups.samples.rank
    return values_and_ids(found[rank * b : (rank + 1) * b])


def _with(best: torch.Tensor, z: torch.Tensor, ids: torch.Tensor, k: int) -> torch.Tensor:
    """The k best keys (B, up to k), falling, of `best` and of the logits z (c, B) of the classes `ids` (c,)."""
    if best.shape[1] < k or z.device.type != "cpu":
        keys = torch.cat([best, keys_of(z.t(), ids)], 1)
        return keys.topk(min(k, keys.shape[1]), 1).values
    # Few samples find a better class in a later chunk; a CPU can look without anyone waiting. A NaN counts as better.
    least, _ = values_and_ids(best[:, -1])
    some = (~(z.amax(0).float() < least)).nonzero()[:, 0]
    if some.numel():
        keys = torch.cat([best[some], keys_of(z[:, some].t(), ids)], 1)
        best[some] = keys.topk(k, 1).values
    return best


def _of_all(best: torch.Tensor, group: Group, k: int) -> torch.Tensor:
    """(B, k or, of a rank with fewer rows, less) of each rank → the k best of all (B, k)."""
    missing = best.new_full((best.shape[0], k - best.shape[1]), torch.iinfo(torch.int64).min)
    own = torch.cat([best, missing], 1)
    found = group.all_gather(own).view(group.size, *own.shape)
    return found.transpose(0, 1).flatten(1).topk(k, 1).values
