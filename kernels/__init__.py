"""Kernels of OpenCoder: one plain function per operator, implementations behind it.

    from opencoder import kernels as K
    y = K.rms_norm(x, weight, eps=1e-5)

This folder is also reachable as a top-level `kernels` when the working directory is a clone, and `kernels` is the name
of an unrelated package that transformers probes for. Names are therefore handed on only under the real name."""

if __name__ == "opencoder.kernels":
    from ._dispatch import UnsupportedKernel, chosen, explain, use
    from .attention import attention, attention_backward
    from .classes import (
        FAR,
        NOBODY,
        merge_nearest,
        nearest_ids,
        nearest_keys,
        nearest_scores,
        neighbour_priority,
        random_keys,
        smallest_keys,
    )
    from .cross_entropy import ce_grad, ce_stats, cross_entropy
    from .elementwise import rotary, swiglu
    from .linear_cross_entropy import linear_cross_entropy
    from .optimizer import adamw_step, grad_norm, sgd_rows_step
    from .rms_norm import rms_norm

    __all__ = [
        "FAR",
        "NOBODY",
        "UnsupportedKernel",
        "adamw_step",
        "attention",
        "attention_backward",
        "ce_grad",
        "ce_stats",
        "chosen",
        "cross_entropy",
        "explain",
        "grad_norm",
        "linear_cross_entropy",
        "merge_nearest",
        "nearest_ids",
        "nearest_keys",
        "nearest_scores",
        "neighbour_priority",
        "random_keys",
        "rms_norm",
        "rotary",
        "sgd_rows_step",
        "smallest_keys",
        "swiglu",
        "use",
    ]
