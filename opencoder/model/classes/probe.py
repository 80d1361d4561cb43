"""How good a step's selection is, measured now and then on a few samples: what the softmax loses by the classes it leaves out."""

from __future__ import annotations

import torch

from opencoder.parallel.cross_entropy import IGNORE

from .selection import Selection
from .softmax import Scoring, missing_mass

EVERY = 20
"""Steps between two measurements. One costs a product of the probe samples with all rows."""
SAMPLES = 16
"""Of all ranks together, at least one of each."""


class Probe:
    """Missing mass eps (sheet 2.7) and coverage (2.5) of the last step that was measured; equal on ranks with the same samples."""

    def __init__(self) -> None:
        self.eps: torch.Tensor | None = None
        """Mean missing mass, 0-dim."""
        self.edges: torch.Tensor | None = None
        """Edges from the step's labels to candidates of all ranks: kept ones, and all."""

    @torch.no_grad()
    def measure(
        self, features: torch.Tensor, labels: torch.Tensor, first: int, scoring: Scoring, selection: Selection
    ) -> None:
        """features (b, D), as logits are made of them, and labels (b,) of this rank; `first`: its first class. Called by all ranks."""
        samples, classes = scoring.groups.samples, scoring.groups.classes
        n = min(features.shape[0], -(-SAMPLES // samples.size))
        x, y = samples.all_gather(features.detach()[:n]), samples.all_gather(labels[:n])
        eps = missing_mass(x, y, y - first, scoring)
        valid = y != IGNORE
        self.eps = (eps * valid).sum() / valid.sum()  # NaN where the samples measured are all ignored: nothing is known
        counts = torch.tensor([selection.kept, selection.candidates], dtype=torch.float64, device=x.device)
        self.edges = classes.all_reduce(counts)

    def values(self) -> dict[str, float]:
        """`eps`, `coverage`; what is not known is left out. Waits for the device."""
        found = {}
        if self.eps is not None and not self.eps.isnan():
            found["eps"] = float(self.eps)
        if self.edges is not None and float(self.edges[1]):
            found["coverage"] = float(self.edges[0] / self.edges[1])
        return found
