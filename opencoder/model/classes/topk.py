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
        keys = torch.cat([best, keys_of(z.t(), ids[begin:end])], 1)
        best = keys.topk(min(k, keys.shape[1]), 1).values
    found = _of_all(best, groups.classes, k)
    b, rank = features.shape[0], groups.samples.rank
    return values_and_ids(found[rank * b : (rank + 1) * b])


def _of_all(best: torch.Tensor, group: Group, k: int) -> torch.Tensor:
    """(B, k or, of a rank with fewer rows, less) of each rank → the k best of all (B, k)."""
    missing = best.new_full((best.shape[0], k - best.shape[1]), torch.iinfo(torch.int64).min)
    own = torch.cat([best, missing], 1)
    found = group.all_gather(own).view(group.size, *own.shape)
    return found.transpose(0, 1).flatten(1).topk(k, 1).values
