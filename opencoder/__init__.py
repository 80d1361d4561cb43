"""OpenCoder: from raw source files to a trained code language model, on a laptop or a cluster."""

__version__ = "0.1.0"
