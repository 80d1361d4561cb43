"""Crops of the extracted functions or calls as token ids with labels: PARQUET/train.parquet and PARQUET/held_out.parquet, which
`opencoder write-classification` takes.

    python examples/classification/crops.py --task functions --extracted DIR --tokenizer DIR --output DIR [--tokens 32] [--crops 4]

A crop of a function begins at a random line, and its locals are numbered anew at random, so that no two crops of it need have a
name in common. One more crop for each function, from a line where no other begins if there is one, is held out. A crop of a call
is what stands around it. The same seed gives the same crops."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from functions import CALLEE, LOCAL

from opencoder.console import Parser, ProgressBar, run
from opencoder.data import tokenizer as tok
from opencoder.errors import UserError
from opencoder.files import atomic_path

SCHEMA = pa.schema([("tokens", pa.list_(pa.int32())), ("label", pa.int64())])
NAMES = 32
"""New numbers of locals are drawn from so many, or as many as there are."""
CHARACTERS = 8
"""Read for each token wanted: more than code has, so that crops are full."""
BLOCK = 4096

Crop = tuple[bool, str, int]
"""Held out, text, label."""


def renumbered(text: str, count: int, draw: random.Random) -> str:
    """v0 … v(count − 1) get other numbers."""
    new = draw.sample(range(max(count, NAMES)), count)
    return LOCAL.sub(lambda m: f"v{new[int(m[1])]}" if int(m[1]) < count else m[0], text)


def crops_of(text: str, local_names: int, *, crops: int, tokens: int, draw: random.Random) -> tuple[str, list[str]]:
    """(held out, for training): begins at random lines, no training crop where the held-out one does if there is another line."""
    lines = text.split("\n")
    starts = range(max(1, len(lines) - 2))
    held_out = draw.choice(starts)
    others = [s for s in starts if s != held_out] or [held_out]

    def crop(start: int) -> str:
        return renumbered("\n".join(lines[start:])[: tokens * CHARACTERS], local_names, draw)

    return crop(held_out), [crop(draw.choice(others)) for _ in range(crops)]


def function_crops(file: Path, *, crops: int, tokens: int, seed: int) -> Iterator[Crop]:
    """All crops of functions.parquet, whose row numbers are the labels."""
    label = 0
    for batch in pq.ParquetFile(file).iter_batches(BLOCK, columns=["text", "locals"]):
        for text, local_names in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            draw = random.Random(f"{seed} {label}")
            held_out, train = crops_of(text, local_names, crops=crops, tokens=tokens, draw=draw)
            yield True, held_out, label
            yield from ((False, crop, label) for crop in train)
            label += 1


def call_ids(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], tokens: int) -> list[list[int]]:
    """(before, after) → ids around the masked name, two thirds of them before it."""
    mask = tokenizer.encode(CALLEE).ids
    left = (tokens - len(mask)) * 2 // 3
    right = tokens - len(mask) - left
    befores, afters = (tokenizer.encode_batch(list(some)) for some in zip(*texts, strict=True))
    return [b.ids[-left:] + mask + a.ids[:right] for b, a in zip(befores, afters, strict=True)]


def blocks(task: str, extracted: Path, tokenizer: Tokenizer, *, crops: int, tokens: int, seed: int) -> Iterator[list]:
    """Lists of (held out, ids, label)."""
    if task == "calls":
        for batch in pq.ParquetFile(extracted / "sites.parquet").iter_batches(BLOCK):
            labels, held_out, before, after = (column.to_pylist() for column in batch.columns)
            ids = call_ids(tokenizer, list(zip(before, after, strict=True)), tokens)
            yield list(zip(held_out, ids, labels, strict=True))
        return
    block: list[Crop] = []
    for crop in function_crops(extracted / "functions.parquet", crops=crops, tokens=tokens, seed=seed):
        block.append(crop)
        if len(block) == BLOCK:
            yield _encoded(block, tokenizer, tokens)
            block = []
    if block:
        yield _encoded(block, tokenizer, tokens)


def _encoded(block: list[Crop], tokenizer: Tokenizer, tokens: int) -> list[tuple[bool, list[int], int]]:
    ids = tokenizer.encode_batch([text for _, text, _ in block])
    return [(held_out, i.ids[:tokens], label) for (held_out, _, label), i in zip(block, ids, strict=True)]


def write(task: str, extracted: Path, tokenizer: Tokenizer, output: Path, **how: int) -> tuple[int, int]:
    """Both files; samples for training and held out."""
    counts = [0, 0]
    with (
        atomic_path(output / "train.parquet") as train,
        atomic_path(output / "held_out.parquet") as held_out,
        pq.ParquetWriter(train, SCHEMA) as to_train,
        pq.ParquetWriter(held_out, SCHEMA) as to_held_out,
        ProgressBar("crops", unit="samples") as bar,
    ):
        for block in blocks(task, extracted, tokenizer, **how):
            for side, writer in enumerate((to_train, to_held_out)):
                some = [(ids, label) for held, ids, label in block if held == bool(side)]
                if some:
                    columns = [pa.array(c, f.type) for c, f in zip(zip(*some, strict=True), SCHEMA, strict=True)]
                    writer.write_table(pa.table(columns, SCHEMA))
                counts[side] += len(some)
            bar.advance(len(block))
    return counts[0], counts[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the crops and print how many there are."""
    parser = Parser("classification: crops.py", "Token ids with labels from extracted functions or calls.")
    parser.add_argument("--task", choices=("functions", "calls"), default="functions", help="which classes")
    parser.add_argument("--extracted", type=Path, required=True, help="folder that extract.py wrote")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokens", type=int, default=32, help="longest crop")
    parser.add_argument("--crops", type=int, default=4, help="of each function, for training")
    parser.add_argument("--seed", type=int, default=1, help="of places and names")
    args = parser.parse_args(argv)
    if args.tokens < 16 or args.crops < 1:
        raise UserError(f"--tokens {args.tokens} --crops {args.crops}: at least 16 tokens and one crop")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer = tok.load(args.tokenizer).tokenizer
    train, held_out = write(
        args.task, args.extracted, tokenizer, args.output, crops=args.crops, tokens=args.tokens, seed=args.seed
    )
    print(f"{args.output}: {train:,} samples for training, {held_out:,} held out")
    return 0


if __name__ == "__main__":
    run(main)
