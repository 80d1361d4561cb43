"""`opencoder bench-preprocess`: documents to .bin/.idx beside a one-process loop over HF `tokenizers`.

The peer does the least a user would write: read the file, encode each text, append eos, write the ids. Sides alternate;
the best of each counts; the ids are compared."""

from __future__ import annotations

import importlib.util
import json
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opencoder.console import Parser, run
from opencoder.errors import Failure
from opencoder.files import write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = Parser("bench-preprocess", "Tokenising speed beside a loop over HF tokenizers.")
    parser.add_argument("--workers", type=int, default=2, help="processes of our side")
    parser.add_argument("--megabytes", type=float, default=20.0, help="text to tokenise")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each; the best counts")
    parser.add_argument("--vocab-size", type=int, default=8192, help="vocabulary of the tokenizer trained for this")
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        megabytes = prepare(folder, args.megabytes, args.vocab_size)
        sides = make_sides(folder, args.workers)
        best = dict.fromkeys(sides, float("inf"))
        for _ in range(args.rounds):
            for side, work in sides.items():
                start = time.perf_counter()
                work()
                best[side] = min(best[side], time.perf_counter() - start)
        expected = (folder / "loop.bin").read_bytes()
        for file in folder.glob("ours-*.bin"):
            if file.read_bytes() != expected:
                raise Failure(f"{file.name} differs from the ids of the loop")
    print(f"{megabytes:.1f} MB of text, {args.workers} workers, vocabulary {args.vocab_size}; equal ids")
    for side, seconds in best.items():
        print(f"{side:<24}{megabytes / seconds:>9.2f} MB/s{best['loop'] / seconds:>9.2f}× the loop")
    if "gigatoken" not in " ".join(sides):
        print("gigatoken: not installed, not measured")
    if args.json:
        write_json(args.json, {"megabytes": megabytes, "mb_per_s": {s: megabytes / t for s, t in best.items()}})
    return 0


def prepare(folder: Path, megabytes: float, vocab_size: int) -> float:
    """A jsonl file of standard-library sources and a tokenizer trained on part of them; the size in MB."""
    from opencoder.data import tokenizer as tok

    size, texts = 0, []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(texts[-1].encode())
        if size >= megabytes * 1e6:
            break
    with open(folder / "docs.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    tok.save(tok.train(texts[:300], vocab_size=vocab_size), folder / "tokenizer")
    return size / 1e6


def make_sides(folder: Path, workers: int) -> dict[str, Callable[[], Any]]:
    """Name → one whole run."""
    from opencoder.data.preprocess import Job, preprocess

    job = Job((str(folder / "docs.jsonl"),), str(folder / "tokenizer"))

    def ours(backend: str) -> Callable[[], Any]:
        return lambda: preprocess(job, folder / f"ours-{backend}", workers=workers, backend=backend, overwrite=True)

    sides: dict[str, Callable[[], Any]] = {"loop": lambda: loop(folder), "ours, tokenizers": ours("tokenizers")}
    if importlib.util.find_spec("gigatoken") is not None:
        sides["ours, gigatoken"] = ours("gigatoken")
    return sides


def loop(folder: Path) -> None:
    """The peer: one process, HF tokenizers, one text at a time."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|endoftext|>")
    with open(folder / "docs.jsonl", encoding="utf-8") as source, open(folder / "loop.bin", "wb") as target:
        for line in source:
            ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
            target.write(np.array([*ids, eos], np.uint16).tobytes())


if __name__ == "__main__":
    run(main)
