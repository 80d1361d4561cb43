"""Triton kernels: CUDA through the JIT, any device through the interpreter, and compile-only without a GPU."""
