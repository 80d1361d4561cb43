"""`opencoder fetch-sources`: real code to measure the corpus pipeline on, fetched by name and checksum and unpacked.

What is fetched stands in tools/fetch_sources.yaml. Debian's archives come from $DEBIAN_MIRROR, else from the mirror that
apt uses on this machine; PyPI's from $PIP_INDEX_URL, else from pip's index (its simple API in JSON, PEP 691). Archives that
are there and have the right checksum are not fetched again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin

import yaml

from opencoder.console import Parser, ProgressBar, run
from opencoder.errors import DataError, UserError
from opencoder.files import atomic_path, sha256_of

TIMEOUT_S = 60.0
BLOCK = 1 << 20


class Source(NamedTuple):
    """One archive."""

    kind: str
    """debian or pypi."""
    name: str
    path: str
    """In the mirror's tree; of an sdist the file's name."""
    sha256: str

    @property
    def file(self) -> str:
        """Its name on this machine."""
        return self.path.rsplit("/", 1)[-1]


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch, verify and unpack."""
    parser = Parser("fetch-sources", "Fetch real code from Debian and PyPI by name and checksum, and unpack it.")
    parser.add_argument("--output", required=True, help="folder; archives/ and sources/ are made in it")
    parser.add_argument("--only", action="append", default=[], help="name of a source; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    args = parser.parse_args(argv)
    sources = chosen(args.only)
    if args.list:
        print("\n".join(f"{source.kind:<7} {source.name:<14} {source.file}" for source in sources))
        return 0
    output = Path(args.output)
    failed: list[str] = []
    with ProgressBar("fetch", total=len(sources), unit="archives") as bar:
        for source in sources:
            try:
                fetch(source, output / "archives" / source.file)
                unpack(output / "archives" / source.file, output / "sources" / source.name)
            except DataError as error:  # the others are worth having all the same
                failed.append(str(error))
            bar.advance()
    files = [p for p in (output / "sources").rglob("*") if p.is_file()]
    size = sum(p.stat().st_size for p in files)
    print(f"{len(files):,} files, {size / 1e6:,.0f} MB in {output / 'sources'}")
    if failed:
        raise DataError(f"{len(failed)} of {len(sources)} sources are missing. " + "; ".join(failed))
    return 0


def chosen(only: Sequence[str]) -> list[Source]:
    """The sources of the list, or those named. Raises UserError for a name that it does not have."""
    data = yaml.safe_load((Path(__file__).parent / "fetch_sources.yaml").read_text(encoding="utf-8"))
    found = [Source(kind, **entry) for kind, entries in data.items() for entry in entries]
    names = {source.name for source in found}
    if unknown := sorted(set(only) - names):
        raise UserError(f"--only {unknown[0]}: no such source; there are {', '.join(sorted(names))}")
    return [source for source in found if not only or source.name in only]


def fetch(source: Source, target: Path) -> None:
    """Download an archive unless it is there. Raises DataError if it is not what the list says, or cannot be had."""
    if target.is_file() and sha256_of(target) == source.sha256:
        return
    url = debian_url(source.path) if source.kind == "debian" else sdist_url(source)
    with atomic_path(target) as temporary:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer, open(temporary, "wb") as file:
                shutil.copyfileobj(answer, file, BLOCK)
        except (OSError, urllib.error.URLError) as error:
            raise DataError(f"{source.name}: {url} cannot be fetched ({error}): try again, or another mirror") from None
        if (found := sha256_of(temporary)) != source.sha256:
            raise DataError(f"{source.name}: {url} has SHA-256 {found}, not {source.sha256}: it is not used")


def debian_url(path: str) -> str:
    """Where a file of Debian's tree can be had."""
    mirror = os.environ.get("DEBIAN_MIRROR") or _mirror_of_apt()
    if mirror is None:
        raise UserError("no Debian mirror is known: set DEBIAN_MIRROR to one, the folder that holds pool/")
    return f"{mirror.rstrip('/')}/{path}"


def _mirror_of_apt() -> str | None:
    folder = Path("/etc/apt")
    for file in [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]:
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        for line in text.splitlines():
            found = re.match(r"(?:URIs:|deb(?:-src)?(?: \[[^]]*\])?) *(https?://\S+/debian/?)(?:\s|$)", line)
            if found:
                return found[1]
    return None


def sdist_url(source: Source) -> str:
    """Where the index says that an sdist lies."""
    page = f"{_pip_index().rstrip('/')}/{source.name}/"
    request = urllib.request.Request(page, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            files = json.load(answer)["files"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{source.name}: {page} gives no list of files in JSON ({error}): set PIP_INDEX_URL") from None
    for entry in files:
        if entry["filename"] == source.file:
            return urljoin(page, entry["url"])
    raise DataError(f"{source.name}: the index at {page} has no {source.file}")


def _pip_index() -> str:
    """PIP_INDEX_URL, what pip is configured to use, or its default."""
    if given := os.environ.get("PIP_INDEX_URL"):
        return given
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    configured = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    if configured:
        return configured
    from pip._internal.models.index import PyPI

    return PyPI.simple_url


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive's regular files, once. Links, devices and what would land outside are left out."""
    if folder.is_dir():
        return
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    how: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11 has it from 3.11.4 on
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isreg() and not member.name.startswith("/") and ".." not in member.name.split("/"):
                tar.extract(member, temporary, **how)
    os.rename(temporary, folder)


if __name__ == "__main__":
    run(main)
