"""The MinHash and dedup rows of `opencoder bench-corpus`: each a rate beside datasketch's, results compared in the same run.

Rates are megabytes of UTF-8 per second of processor time (this process, one thread), so that other work on the machine
counts as little as can be."""

from __future__ import annotations

import random
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from opencoder.console import ProgressBar
from opencoder.errors import Failure

NGRAM = 5
CHANGED = 0.05
"""Share of files that get a near-duplicate: one line changed. With their originals, 10 % of files are in a pair."""


def source_texts(megabytes: float) -> list[str]:
    """Distinct files of the standard library, in order of path, up to the size asked for."""
    texts: dict[str, None] = {}
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text not in texts:
            texts[text] = None
            size += len(text)
        if size >= megabytes * 1e6:
            break
    return list(texts)


def with_near_duplicates(texts: list[str]) -> list[str]:
    """The texts and, for every twentieth, one with a line changed."""
    draw = random.Random(0)
    changed = []
    for text in draw.sample(texts, round(CHANGED * len(texts))):
        lines = text.split("\n")
        lines[draw.randrange(len(lines))] = f"changed = {draw.randrange(1000)}"
        changed.append("\n".join(lines))
    return [*texts, *changed]


def megabytes_of(texts: list[str]) -> float:
    """Their size in UTF-8."""
    return sum(len(text.encode("utf-8", "replace")) for text in texts) / 1e6


def best_rates(sides: dict[str, tuple[float, Callable[[], Any]]], rounds: int, title: str) -> dict[str, float]:
    """MB/s of each side (name → megabytes, function), the best of `rounds`; the sides alternate."""
    best = dict.fromkeys(sides, float("inf"))
    with ProgressBar(title, total=rounds * len(sides), unit="runs") as bar:
        for _ in range(rounds):
            for name, (_, side) in sides.items():
                start = time.process_time()
                side()
                best[name] = min(best[name], time.process_time() - start)
                bar.advance()
    return {name: megabytes / best[name] for name, (megabytes, _) in sides.items()}


def minhash_rates(megabytes: float, num_perm: int, rounds: int) -> dict[str, float]:
    """Text to signature, MB/s. Raises Failure if a signature differs from datasketch's."""
    from opencoder.corpus import minhash

    texts = source_texts(megabytes)
    size = megabytes_of(texts)
    prepared = [list(minhash.shingles(text, NGRAM)) for text in texts]

    def ours(scheme: str) -> Any:
        return minhash.signatures(texts, num_perm=num_perm, ngram=NGRAM, scheme=scheme)

    def shingling(scheme: str) -> Any:
        return datasketch_signatures([list(minhash.shingles(text, NGRAM)) for text in texts], num_perm, scheme)

    sides: dict[str, tuple[float, Callable[[], Any]]] = {}
    for scheme in minhash.SCHEMES:
        sides[f"ours {scheme}"] = size, partial(ours, scheme)
    for scheme in ("affine32", "legacy"):
        sides[f"datasketch {scheme}"] = size, partial(shingling, scheme)
        sides[f"datasketch {scheme}, shingles given"] = size, partial(datasketch_signatures, prepared, num_perm, scheme)
        if ours(scheme).tolist() != datasketch_signatures(prepared, num_perm, scheme):
            raise Failure(f"{scheme}: our signatures differ from datasketch's")
    return best_rates(sides, rounds, "minhash")


def dedup_rates(megabytes: float, peer_megabytes: float, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """(MB/s of text to groups at 16 × 128, facts of the set). datasketch gets the first `peer_megabytes` alone, being
    slow. Raises Failure if the groups of any two ways differ."""
    import numpy as np
    import pyarrow as pa

    from opencoder.corpus import dedup, minhash

    texts = with_near_duplicates(source_texts(megabytes))
    column = pa.array(texts, pa.large_string())
    numbers = np.arange(len(texts))
    few = with_near_duplicates(source_texts(peer_megabytes))

    def ours(scheme: str, progressive: bool) -> Any:
        recipe = dedup.Recipe(16, 128, NGRAM, scheme)
        return dedup.near_duplicates([dedup.Batch(numbers, lambda: column)], recipe, progressive=progressive)

    sides: dict[str, tuple[float, Callable[[], Any]]] = {}
    for scheme in minhash.SCHEMES:
        plain, progressive = ours(scheme, False), ours(scheme, True)
        if plain.tolist() != progressive.tolist():
            raise Failure(f"{scheme}: the progressive way finds other groups than the plain way")
        sides[f"groups, ours {scheme}"] = megabytes_of(texts), partial(ours, scheme, True)
    sides["groups, ours affine32, not progressive"] = megabytes_of(texts), partial(ours, "affine32", False)
    batch = dedup.Batch(np.arange(len(few)), lambda: few)
    if datasketch_groups(few) != dedup.near_duplicates([batch], dedup.Recipe(16, 128, NGRAM)).tolist():
        raise Failure("our groups differ from those of datasketch's MinHashLSH")
    sides["groups, datasketch affine32"] = megabytes_of(few), partial(datasketch_groups, few)
    members = len(np.unique(ours("affine32", True)))
    facts = {"files": len(texts), "megabytes": megabytes_of(texts), "share_in_groups": members / len(texts)}
    return best_rates(sides, rounds, "dedup"), facts


def datasketch_signatures(shingles: list[list[bytes]], num_perm: int, scheme: str) -> list[list[int]]:
    """Signatures by datasketch, as lists."""
    return [datasketch_minhash(items, num_perm, scheme).hashvalues.tolist() for items in shingles]


def datasketch_minhash(items: list[bytes], num_perm: int, scheme: str) -> Any:
    """datasketch's sketch of a set."""
    from datasketch import MinHash

    sketch = MinHash(num_perm=num_perm, seed=1, scheme=scheme)
    if items:
        sketch.update_batch(items)
    return sketch


def datasketch_groups(texts: list[str]) -> list[list[int]]:
    """The forest of near-duplicates by datasketch's MinHash and MinHashLSH, 16 × 128."""
    import numpy as np
    from datasketch import MinHashLSH

    from opencoder.corpus import dedup, minhash

    lsh, edges = MinHashLSH(num_perm=2048, params=(16, 128)), []
    for number, text in enumerate(texts):
        items = list(minhash.shingles(text, NGRAM))
        if not items:
            continue
        sketch = datasketch_minhash(items, 2048, "affine32")
        edges += [(number, other) for other in lsh.query(sketch)]
        lsh.insert(number, sketch)
    found: list[list[int]] = dedup.forest(np.array(edges, np.int64).reshape(-1, 2)).tolist()
    return found
