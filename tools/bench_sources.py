"""`opencoder bench-sources`: reading speed of every source form, beside the plain loop that a script would have.

The Python standard library's source, packed in each form into a temporary folder. Both sides read, hash (SHA-256) and
decode every file; ours also judges it. CPU time of the process and its children (git), the best of several rounds."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from opencoder.console import Parser, ProgressBar, run
from opencoder.errors import Failure
from opencoder.files import write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = Parser("bench-sources", "Reading speed per core of folders, archives, repositories and containers.")
    parser.add_argument("--megabytes", type=float, default=30.0, help="source text to use")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each; the best counts")
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        sides = pack(Path(folder), args.megabytes)
        rates: dict[str, dict[str, float]] = {}
        with ProgressBar("bench", total=args.rounds * len(sides), unit="rounds") as bar:
            for _ in range(args.rounds):
                for name, (path, plain) in sides.items():
                    row = rates.setdefault(name, {"ours": 0.0, "plain": 0.0})
                    # One after the other in each round, so that both meet the same load of the machine.
                    row["ours"] = max(row["ours"], rate(lambda path=path: ours(path)))  # type: ignore[misc]
                    row["plain"] = max(row["plain"], rate(lambda path=path, plain=plain: hashed(plain(path))))  # type: ignore[misc]
                    bar.advance()
    print("MB of text per second of CPU time, one process")
    for name, row in rates.items():
        print(f"{name:<12}{row['ours']:>8.1f}   plain loop {row['plain']:>7.1f}   {row['ours'] / row['plain']:.2f}×")
    if args.json:
        write_json(args.json, {"megabytes": args.megabytes, "mb_per_s": rates})
    return 0


def rate(side: Callable[[], int]) -> float:
    """MB per second of CPU time."""

    def spent() -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    start, clock = spent(), time.process_time()
    size = side()
    # os.times has the children but ticks in hundredths of a second; process_time is finer for what is ours.
    children = (spent() - start) - (time.process_time() - clock)
    return size / 1e6 / (time.process_time() - clock + max(0.0, children))


def ours(path: Path) -> int:
    """Bytes of the records of a source. Raises Failure if one could not be read."""
    from opencoder.config import load_corpus_config
    from opencoder.corpus.read import find_items, read_item

    config = load_corpus_config()
    size = 0
    for item in find_items([str(path)], config):
        for record in read_item(item, config):
            if record.status == "failed":
                raise Failure(f"{path.name}: {record.path} {record.reason}")
            size += record.size_bytes
    return size


def hashed(contents: Iterator[bytes]) -> int:
    """Hash and decode each content; bytes in all."""
    size = 0
    for data in contents:
        hashlib.sha256(data).hexdigest()
        data.decode("utf-8", "replace")
        size += len(data)
    return size


def pack(root: Path, megabytes: float) -> dict[str, tuple[Path, Callable[[Path], Iterator[bytes]]]]:
    """name → (source, its plain loop)."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    folder = root / "files"
    files = _copy(folder, megabytes)
    tar = root / "a.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(folder, "files")
    packed = tar.read_bytes()
    subprocess.run(["gzip", "-k", str(tar)], check=True)
    (root / "a.tar.zst").write_bytes(zstandard.compress(packed))
    (root / "a.tar.xz").write_bytes(lzma.compress(packed, preset=1))
    with zipfile.ZipFile(root / "a.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        for file in files:
            zipped.write(file, file.relative_to(folder))
    rows = [{"path": str(f.relative_to(folder)), "text": f.read_text("utf-8", "replace")} for f in files]
    (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), root / "a.parquet", row_group_size=500)
    forms: dict[str, Callable[[Path], Iterator[bytes]]] = {
        "files": plain_folder, "a.tar": plain_tar, "a.tar.gz": plain_tar, "a.tar.zst": plain_zst, "a.tar.xz": plain_tar,
        "a.zip": plain_zip, "a.jsonl": plain_jsonl, "a.parquet": plain_parquet,
    }  # fmt: skip
    sides = {name: (root / name, plain) for name, plain in forms.items()}
    if shutil.which("git"):
        shutil.copytree(folder, root / "repository")
        for words in ("init -q", "add -A", "-c user.name=a -c user.email=a@example.org commit -q -m all", "gc -q"):
            subprocess.run(["git", *words.split()], cwd=root / "repository", check=True)
        sides["repository"] = (root / "repository", plain_git)
    return sides


def _copy(folder: Path, megabytes: float) -> list[Path]:
    """Source files of the standard library, in order of path, up to the size asked for."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files, size = [], 0
    for path in sorted(library.rglob("*.py")):
        if "site-packages" in path.parts or size >= megabytes * 1e6:
            continue
        target = folder / path.relative_to(library)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        files.append(target)
        size += path.stat().st_size
    return files


# ---- the plain loops ----


def plain_folder(path: Path) -> Iterator[bytes]:
    """Every file below a folder."""
    for folder, _, names in os.walk(path):
        for name in names:
            yield Path(folder, name).read_bytes()


def plain_tar(path: Path, stream: Any = None) -> Iterator[bytes]:
    """Every file of a tar archive, as a stream."""
    with tarfile.open(path if stream is None else None, "r|*", fileobj=stream) as archive:
        for info in archive:
            if info.isreg() and (file := archive.extractfile(info)) is not None:
                yield file.read()


def plain_zst(path: Path) -> Iterator[bytes]:
    """The same of one packed with zstd."""
    import zstandard

    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        yield from plain_tar(path, stream)


def plain_git(path: Path) -> Iterator[bytes]:
    """Every file at HEAD, through `git archive`."""
    with subprocess.Popen(["git", "archive", "HEAD"], cwd=path, stdout=subprocess.PIPE) as process:
        yield from plain_tar(path, process.stdout)


def plain_zip(path: Path) -> Iterator[bytes]:
    """Every member of a zip archive."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            yield archive.read(info)


def plain_jsonl(path: Path) -> Iterator[bytes]:
    """Every text of a jsonl file."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"].encode()


def plain_parquet(path: Path) -> Iterator[bytes]:
    """Every text of a parquet file."""
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(path).iter_batches(batch_size=64, columns=["text"], use_threads=False):
        for text in batch["text"].to_pylist():
            yield text.encode()


if __name__ == "__main__":
    run(main)
