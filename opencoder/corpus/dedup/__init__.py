"""Exact and near-duplicate removal: groups, and which member of each group is kept.

The steps, each a pure function of arrays that a task can run on a part of the corpus:

1. `first_keys(texts, recipe)` per shard, `first_entries`, `partition`: the keys of 8 rows of each band of all documents.
2. `shared` per partition: the entries that have company. A document alone in every band is finished.
3. `wanted` and `full_keys(texts, recipe, wanted)` per shard, `full_entries`, `partition`: whole bands, only where needed.
4. `forest_of` (or `checked_forest`) per partition: the groups as a forest.
5. `merge_forests`, in a tree; with documents numbered by `ranks`, its rows are (kept, dropped).

`near_duplicates` runs them in one process; `tasks.fuzzy_steps` lists them as tasks over files. Where
`recipe.progressive` is false, steps 1 and 2 are left out and 3 takes all.

Memory of a task, in bytes. B bands, n documents of a batch, T their text, L the longest of them, t its tokens and s its
shingles (about L/9 each for code), m entries of a partition; tests/corpus/test_dedup_memory.py measures them:
  first_keys     T + 8·B·n + L + 24·t
  full_keys      T + 16·B·n + L + 24·t + 16·s
  partition      24·m + 36·m       (entries; order, parts)
  shared         18·m + 36·m
  forest_of      24·m + 120·m
  merge_forests  130·(rows of FAN_IN forests)
  checked_forest forest_of + the texts of 1024 pairs and about 40 bytes per distinct shingle of them"""

from __future__ import annotations

from . import tasks
from .curve import FIRST_ROWS, PRESETS, Recipe, candidate_probability, recipe_of, s_curve, threshold
from .existing import SIGNATURES, Existing, check_signatures, read_existing, read_signatures, write_signatures
from .groups import (
    components,
    edges_of_keys,
    first_entries,
    forest,
    forest_of,
    forest_of_keys,
    full_entries,
    labels_of,
    merge_forests,
    partition,
    shared,
    stars,
    wanted,
)
from .keep import (
    dropped,
    exact_duplicates,
    exact_kept,
    fuzzy_duplicates,
    fuzzy_duplicates_of_keys,
    id_keys,
    kept_rows,
    ranks,
)
from .keys import KEY, band_keys, first_keys, full_keys
from .levels import CHUNK_TOKENS, Units, chunk_name, chunks, repositories, repository_text
from .run import Batch, lsh_edges, near_duplicates
from .verify import checked_forest, jaccard, jaccard_of_pairs, similarity_of

__all__ = [
    "CHUNK_TOKENS", "FIRST_ROWS", "KEY", "PRESETS", "SIGNATURES", "Batch", "Existing", "Recipe", "Units", "band_keys",
    "candidate_probability", "check_signatures", "checked_forest", "chunk_name", "chunks", "components", "dropped", "edges_of_keys",
    "exact_duplicates", "exact_kept", "first_entries", "first_keys", "forest", "forest_of", "forest_of_keys", "full_entries",
    "full_keys", "fuzzy_duplicates", "fuzzy_duplicates_of_keys", "id_keys", "jaccard", "jaccard_of_pairs", "kept_rows",
    "labels_of", "lsh_edges", "merge_forests", "near_duplicates", "partition", "ranks", "read_existing",
    "read_signatures", "recipe_of", "repositories", "repository_text", "s_curve", "shared", "similarity_of", "stars",
    "tasks", "threshold", "wanted", "write_signatures",
]  # fmt: skip
