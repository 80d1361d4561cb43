"""Training: set-up, the loop, metrics, faults. Entry: `python -m opencoder.train`."""
