"""Fetching sources from a mirror and an index, here folders and a server of this process."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from opencoder.errors import DataError, UserError
from tools import fetch_sources
from tools.fetch_sources import Source, chosen, fetch, main, unpack


def archive(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("pkg/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return data.getvalue()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    root = tmp_path / "www"
    root.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", root
        httpd.shutdown()


def test_both_kinds_are_fetched_verified_and_unpacked(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, root = server
    data = archive({"pkg/a.py": b"print(1)\n", "../evil.py": b"", "/abs.py": b""})
    (root / "pool").mkdir()
    (root / "pool" / "one.tar.gz").write_bytes(data)
    (root / "two").mkdir()
    (root / "two" / "index.html").write_text(
        json.dumps({"files": [{"filename": "two-1.tar.gz", "url": "../f.tar.gz"}]})
    )
    (root / "f.tar.gz").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    wrong = Source("debian", "three", "pool/one.tar.gz", "0" * 64)
    sources = [Source("debian", "one", "pool/one.tar.gz", digest), Source("pypi", "two", "two-1.tar.gz", digest)]
    monkeypatch.setenv("DEBIAN_MIRROR", url)
    monkeypatch.setenv("PIP_INDEX_URL", url)
    monkeypatch.setattr(fetch_sources, "chosen", lambda only: [wrong, *sources])
    with pytest.raises(DataError, match=r"1 of 3 sources are missing. three: .* has SHA-256 .*, not 000"):
        main(["--output", str(tmp_path / "out")])
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out" / "sources").rglob("*.py"))
    assert found == ["sources/one/pkg/a.py", "sources/two/pkg/a.py"]
    assert not list((tmp_path / "out").rglob("*link*"))
    assert "2 files" in capsys.readouterr().out
    for file in (root / "pool" / "one.tar.gz", root / "f.tar.gz"):
        file.unlink()
    monkeypatch.setattr(fetch_sources, "chosen", lambda only: sources)
    assert main(["--output", str(tmp_path / "out")]) == 0  # nothing is fetched again


def test_what_cannot_be_had_says_so(server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEBIAN_MIRROR", server[0])
    monkeypatch.setenv("PIP_INDEX_URL", server[0])
    with pytest.raises(DataError, match=r"cannot be fetched .*404"):
        fetch(Source("debian", "a", "pool/none.tar.gz", "0" * 64), tmp_path / "none.tar.gz")
    with pytest.raises(DataError, match="gives no list of files in JSON"):
        fetch(Source("pypi", "a", "a-1.tar.gz", "0" * 64), tmp_path / "none.tar.gz")
    assert not list(tmp_path.glob("*none*"))


def test_an_interrupted_unpacking_begins_again(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(archive({"pkg/a.py": b"1\n"}))
    (tmp_path / ".a.tmp").mkdir()
    (tmp_path / ".a.tmp" / "half.py").write_text("")
    unpack(tmp_path / "a.tar.gz", tmp_path / "a")
    assert [p.name for p in (tmp_path / "a").rglob("*.py")] == ["a.py"]


def test_the_list_has_what_it_says() -> None:
    sources = chosen([])
    assert len(sources) >= 15
    assert all(len(s.sha256) == 64 and s.kind in ("debian", "pypi") for s in sources)
    assert len({s.name for s in sources}) == len(sources)
    assert [s.name for s in chosen(["numpy"])] == ["numpy"]
    with pytest.raises(UserError, match=r"--only nmpy: no such source; there are .*numpy"):
        chosen(["nmpy"])
