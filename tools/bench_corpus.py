"""`opencoder bench-corpus`: MinHash, text to signature, beside datasketch, on the Python standard library's source.

One process, one thread; the sides alternate and the best of each counts. datasketch's time is given with and without
its shingling, which it leaves to Python."""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from opencoder.console import Parser, ProgressBar, run
from opencoder.errors import Failure
from opencoder.files import write_json

NGRAM = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = Parser("bench-corpus", "MinHash speed per core beside datasketch 2.")
    parser.add_argument("--num-perm", type=int, default=2048, help="slots of a signature")
    parser.add_argument("--megabytes", type=float, default=2.0, help="text to use")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each; the best counts")
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args(argv)

    from opencoder.corpus import minhash
    from opencoder.native import text_engine

    texts = source_texts(args.megabytes)
    megabytes = sum(len(t.encode()) for t in texts) / 1e6
    prepared = [list(minhash.shingles(t, NGRAM)) for t in texts]

    def ours(scheme: str) -> Any:
        return minhash.signatures(texts, num_perm=args.num_perm, ngram=NGRAM, scheme=scheme)

    def shingling(scheme: str) -> Any:
        return datasketch_signatures([list(minhash.shingles(t, NGRAM)) for t in texts], args.num_perm, scheme)

    def given(scheme: str) -> Any:
        return datasketch_signatures(prepared, args.num_perm, scheme)

    sides: dict[str, Callable[[], Any]] = {f"ours {s}": partial(ours, s) for s in minhash.SCHEMES}
    for scheme in ("affine32", "legacy"):
        sides[f"datasketch {scheme}"] = partial(shingling, scheme)
        sides[f"datasketch {scheme}, shingles given"] = partial(given, scheme)
    for scheme in ("affine32", "legacy"):
        if sides[f"ours {scheme}"]().tolist() != sides[f"datasketch {scheme}, shingles given"]():
            raise Failure(f"{scheme}: our signatures differ from datasketch's")
    best = dict.fromkeys(sides, float("inf"))
    with ProgressBar("bench", total=args.rounds * len(sides), unit="runs") as bar:
        for _ in range(args.rounds):
            for name, side in sides.items():
                start = time.perf_counter()
                side()
                best[name] = min(best[name], time.perf_counter() - start)
                bar.advance()
    rates = {name: megabytes / seconds for name, seconds in best.items()}
    engine = "C++" if text_engine() is not None else "no C++ engine: datasketch and Python"
    print(
        f"{megabytes:.1f} MB in {len(texts)} files, {args.num_perm} slots, {NGRAM}-grams, one core ({engine}); equal signatures"
    )
    for name, rate in rates.items():
        peer = rates.get(name.replace("ours", "datasketch"))
        ratio = f"{rate / peer:>8.1f}× datasketch" if peer and name.startswith("ours") else ""
        print(f"{name:<38}{rate:>9.2f} MB/s{ratio}")
    if args.json:
        write_json(args.json, {"megabytes": megabytes, "num_perm": args.num_perm, "mb_per_s": rates})
    return 0


def source_texts(megabytes: float) -> list[str]:
    """Files of the standard library, in order of path, up to the size asked for."""
    texts: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(texts[-1])
        if size >= megabytes * 1e6:
            break
    return texts


def datasketch_signatures(shingles: list[list[bytes]], num_perm: int, scheme: str) -> list[list[int]]:
    """Signatures by datasketch, as lists."""
    from datasketch import MinHash

    rows = []
    for items in shingles:
        sketch = MinHash(num_perm=num_perm, seed=1, scheme=scheme)
        if items:
            sketch.update_batch(items)
        rows.append(sketch.hashvalues.tolist())
    return rows


if __name__ == "__main__":
    run(main)
