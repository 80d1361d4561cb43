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
    parser.add_argument("--large-megabytes", type=float, default=400.0, help="text for gigatoken, if it is installed")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each; the best counts")
    parser.add_argument("--vocab-size", type=int, default=8192, help="vocabulary of the tokenizer trained for this")
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"docs": prepare(folder, args.megabytes, args.vocab_size)}
        if importlib.util.find_spec("gigatoken") is not None:
            sizes["large"] = write_documents(folder / "large.jsonl", args.large_megabytes)
        sides = make_sides(folder, args.workers, large="large" in sizes)
        best = dict.fromkeys(sides, float("inf"))
        for _ in range(args.rounds):
            for side, (_, work) in sides.items():
                start = time.perf_counter()
                work()
                best[side] = min(best[side], time.perf_counter() - start)
        check_equal(folder)
    rates = {side: sizes[source] / best[side] for side, (source, _) in sides.items()}
    print(f"{args.workers} workers, vocabulary {args.vocab_size}; equal ids")
    for side, rate in rates.items():
        print(f"{side:<24}{sizes[sides[side][0]]:>8.1f} MB {rate:>9.2f} MB/s{rate / rates['loop']:>9.2f}× the loop")
    if "large" not in sizes:
        print("gigatoken: not installed, not measured")
    if args.json:
        write_json(args.json, {"megabytes": sizes, "mb_per_s": rates})
    return 0


def check_equal(folder: Path) -> None:
    """Every dataset of the same documents must hold the loop's ids."""
    expected = (folder / "loop.bin").read_bytes()
    for file in folder.glob("docs-*.bin"):
        if file.read_bytes() != expected:
            raise Failure(f"{file.name} differs from the ids of the loop")


def prepare(folder: Path, megabytes: float, vocab_size: int) -> float:
    """FOLDER/docs.jsonl and a tokenizer trained on part of it; the size in MB."""
    from opencoder.data import tokenizer as tok

    size = write_documents(folder / "docs.jsonl", megabytes)
    with open(folder / "docs.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(300), file, strict=False)]
    tok.save(tok.train(texts, vocab_size=vocab_size), folder / "tokenizer")
    return size


def write_documents(target: Path, megabytes: float) -> float:
    """Python sources of the interpreter and the installed packages, no file twice, up to the size asked for; MB."""
    size, seen = 0, set()
    roots = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"])
    with open(target, "w", encoding="utf-8") as file:
        for path in (p for root in roots for p in sorted(Path(root).rglob("*.py"))):
            text = path.read_text(encoding="utf-8", errors="replace")
            if hash(text) in seen:
                continue
            seen.add(hash(text))
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
            if size >= megabytes * 1e6:
                break
    return size / 1e6


def make_sides(folder: Path, workers: int, *, large: bool) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Name → (documents it reads, one whole run). gigatoken reads more text: on little it would measure start-up."""
    from opencoder.data.preprocess import Job, preprocess

    def ours(source: str, backend: str) -> Callable[[], Any]:
        job = Job((str(folder / f"{source}.jsonl"),), str(folder / "tokenizer"))
        prefix = folder / f"{source}-{backend}"
        return lambda: preprocess(job, prefix, workers=workers, backend=backend, overwrite=True)

    sides = {"loop": ("docs", lambda: loop(folder)), "ours, tokenizers": ("docs", ours("docs", "tokenizers"))}
    if large:
        sides["ours, gigatoken, small"] = ("docs", ours("docs", "gigatoken"))
        sides["ours, gigatoken"] = ("large", ours("large", "gigatoken"))
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
