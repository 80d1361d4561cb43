"""Kernels of OpenCoder; import them as `from opencoder import kernels as K`.

This folder is also reachable as a top-level `kernels` when the working directory is a clone, and `kernels` is the name
of an unrelated package that transformers probes for. Names are therefore handed on only under the real name."""

if __name__ == "opencoder.kernels":
    pass
