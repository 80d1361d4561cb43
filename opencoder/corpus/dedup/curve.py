"""Bands and rows of locality-sensitive hashing: the presets, and which similarity each of them finds."""

from __future__ import annotations

from typing import NamedTuple

from opencoder.corpus_config import DedupConfig
from opencoder.errors import ConfigError

PRESETS: dict[str, tuple[int, int, int]] = {"opencoder": (16, 128, 5), "bigcode": (25, 10, 5), "datatrove": (14, 8, 5)}
"""name → bands, rows per band, tokens per shingle (arXiv:2411.04905; bigcode-dataset; datatrove)."""

FIRST_ROWS = 8
"""Rows of each band that all documents get in the first pass of the progressive way."""


class Recipe(NamedTuple):
    """All that decides a document's band keys, beside its text. Keys of two recipes cannot be compared."""

    bands: int
    rows: int
    ngram: int = 5
    scheme: str = "affine32"
    seed: int = 1

    @property
    def progressive(self) -> bool:
        """Whether a first pass over FIRST_ROWS rows saves work: not where a band is hardly longer than that."""
        return self.rows >= 2 * FIRST_ROWS


def recipe_of(config: DedupConfig) -> Recipe:
    """The recipe of a configuration. Raises ConfigError where preset, bands and rows do not fit together."""
    given = config.bands, config.rows
    if config.preset != "custom":
        if given != (None, None):
            raise ConfigError(f"dedup.bands and dedup.rows belong to dedup.preset=custom, not to {config.preset}")
        bands, rows, _ = PRESETS[config.preset]
        return Recipe(bands, rows, config.ngram, config.scheme, config.seed)
    if config.bands is None or config.rows is None:
        raise ConfigError("dedup.preset=custom needs dedup.bands and dedup.rows")
    return Recipe(config.bands, config.rows, config.ngram, config.scheme, config.seed)


def candidate_probability(jaccard: float, bands: int, rows: int) -> float:
    """Chance that two texts of this similarity agree in at least one band: 1 − (1 − J^rows)^bands."""
    return 1.0 - (1.0 - jaccard**rows) ** bands


def s_curve(bands: int, rows: int) -> list[tuple[float, float]]:
    """(J, probability of being found) from 0.5 to 1."""
    return [(j / 100, candidate_probability(j / 100, bands, rows)) for j in range(50, 101)]


def threshold(bands: int, rows: int) -> float:
    """The similarity at which the S-curve is steep, about (1/bands)^(1/rows)."""
    return float((1 / bands) ** (1 / rows))
