"""Tar archives: what is read, what is refused, and that nothing is lost in silence."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import sysconfig
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from .reading import by_path, fates, read

pytestmark = pytest.mark.fast
CODE = b"print('hello')\n"


def member(name: str, data: bytes = CODE, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tar(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "a.tar": bytes,
    "a.tar.gz": gzip.compress,
    "a.tgz": gzip.compress,
    "a.tar.xz": lzma.compress,
    "a.tar.bz2": bz2.compress,
    "a.tar.zst": zstandard.compress,
}


@pytest.mark.parametrize("name", PACKERS)
def test_members_of_every_packing_are_read(name: str, tmp_path: Path) -> None:
    big = b"x = 1\n" * 200_000
    content = tar(
        member("p", b"", type=tarfile.DIRTYPE), member("p/a.py"), member("./p/big.py", big), member("p/empty.py", b"")
    )
    found = by_path(read(write(tmp_path / name, PACKERS[name](content))))
    assert set(found) == {"p/a.py", "p/big.py", "p/empty.py"}
    assert found["p/a.py"].text == CODE.decode()
    assert found["p/a.py"].id == hashlib.sha256(CODE).hexdigest()
    assert found["p/big.py"].text == big.decode()
    assert (found["p/empty.py"].status, found["p/empty.py"].reason) == ("dropped", "empty")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_every_format(form: int, tmp_path: Path) -> None:
    names = ["d/" * 60 + "a.py" if form != tarfile.USTAR_FORMAT else "d/" * 40 + "a.py", "é.py"]
    content = tar(*(member(n) for n in names), form=form)
    assert set(fates(read(write(tmp_path / "a.tar", content)))) == set(names)


@pytest.mark.parametrize("name", ["../up.py", "a/../../up.py", "/etc/abs.py", "C:/drive.py", "a\\..\\..\\up.py"])
def test_names_that_lead_out_are_failed_by_name(name: str, tmp_path: Path) -> None:
    found = fates(read(write(tmp_path / "a.tar", tar(member(name), member("ok.py")))))
    assert found.pop("ok.py") == ("kept", None)
    ((path, (status, reason)),) = found.items()
    assert path == name
    assert status == "failed"
    assert "it was not read" in str(reason)


def test_links_are_dropped_and_special_files_failed(tmp_path: Path) -> None:
    outside = write(tmp_path / "secret.py", b"password = 1\n")
    content = tar(
        member("link.py", b"", type=tarfile.SYMTYPE, linkname=str(outside)),
        member("a.py"),
        member("hard.py", b"", type=tarfile.LNKTYPE, linkname="a.py"),
        member("pipe.py", b"", type=tarfile.FIFOTYPE),
        member("zero.py", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        member("b.py"),
    )
    records = read(write(tmp_path / "a.tar", content))
    assert fates(records) == {
        "link.py": ("dropped", "link"),
        "a.py": ("kept", None),
        "hard.py": ("dropped", "link"),
        "pipe.py": ("failed", "not a regular file"),
        "zero.py": ("failed", "not a regular file"),
        "b.py": ("kept", None),
    }
    assert "secret.py" in str(by_path(records)["link.py"].threshold)
    assert not any("password" in (record.text or "") for record in records)


def test_a_member_above_the_size_cap_is_hashed_and_dropped(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    found = by_path(read(write(tmp_path / "a.tar", tar(member("big.py", data), member("b.py"))), "max_bytes=1000000"))
    assert found["big.py"].reason == "size"
    assert found["big.py"].id == hashlib.sha256(data).hexdigest()
    assert found["b.py"].status == "kept"


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.xz", "a.tar.bz2", "a.tar.zst"])
def test_a_bomb_is_given_up_with_the_limit_named(name: str, tmp_path: Path) -> None:
    bomb = tar(member("a.py"), member("zeros.py", bytes(100_000_000)), member("b.py"))
    path = write(tmp_path / name, PACKERS[name](bomb))
    assert path.stat().st_size < 250_000
    found = fates(read(path))
    assert found.pop("a.py") == ("kept", None)
    ((where, (status, reason)),) = found.items()
    assert (where, status) == (name, "failed")
    assert "read.archive.max_ratio" in str(reason)


def test_limits_on_members_and_on_total_size(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", tar(*(member(f"{i}.py") for i in range(20))))
    few = fates(read(path, "read.archive.max_members=5"))
    assert [p for p, (status, _) in few.items() if status == "kept"] == [f"{i}.py" for i in range(5)]
    assert "max_members" in str(few["a.tar"][1])
    assert "max_total_bytes" in str(fates(read(path, "read.archive.max_total_bytes=8000"))["a.tar"][1])
    large = fates(read(path, "read.archive.max_member_bytes=3"))
    assert set(large.values()) == {
        ("failed", "a member of 15 bytes is not unpacked: more than 3 (read.archive.max_member_bytes)")
    }


def test_an_extended_header_of_any_size_is_not_read_into_memory(tmp_path: Path) -> None:
    head = tarfile.TarInfo("x")
    head.type, head.size = tarfile.XHDTYPE, 10**12
    found = fates(read(write(tmp_path / "a.tar", tar(member("a.py"))[:1024] + head.tobuf(tarfile.GNU_FORMAT))))
    assert found["a.py"] == ("kept", None)
    assert "an extended header of 1,000,000,000,000 bytes" in str(found["a.tar"][1])


def test_sparse_members_are_refused_and_the_rest_is_read(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    with open(root / "a_sparse.py", "wb") as file:
        file.truncate(50_000_000)
        file.seek(50_000_000)
        file.write(CODE)
    (root / "b.py").write_bytes(CODE)
    for form in ("gnu", "pax"):
        path = tmp_path / f"{form}.tar"
        done = os.spawnlp(
            os.P_WAIT, "tar", "tar", "-S", f"--format={form}", "-cf", str(path), "-C", str(root), "a_sparse.py", "b.py"
        )
        if done != 0:
            pytest.skip("needs GNU tar")
        statuses = [(r.status, r.reason) for r in read(path)]
        assert statuses == [("failed", "a sparse file; pack it without holes"), ("kept", None)], form


@pytest.mark.parametrize("name", PACKERS)
def test_a_truncated_archive_gives_what_is_before_and_a_failure(name: str, tmp_path: Path) -> None:
    content = tar(*(member(f"{i:03}.py", os.urandom(2000).hex().encode()) for i in range(300)))
    packed = PACKERS[name](content)
    found = fates(read(write(tmp_path / name, packed[: len(packed) * 2 // 3])))
    status, reason = found.pop(name)
    assert status == "failed"
    assert "damaged or truncated after" in str(reason)
    assert set(found.values()) <= {("kept", None)}
    assert list(found) == [f"{i:03}.py" for i in range(len(found))]
    if name not in ("a.tar.xz", "a.tar.bz2"):  # their blocks are large: one holds all of it
        assert len(found) > 100


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    content = bytearray(tar(*(member(f"{i}.py") for i in range(4))))
    content[2 * 1024 + 5] ^= 0xFF  # the name in the third header
    found = fates(read(write(tmp_path / "a.tar", bytes(content))))
    assert set(found) == {"0.py", "1.py", "a.tar"}
    assert "after 1.py: a header is damaged" in str(found["a.tar"][1])


def test_archives_joined_end_to_end_are_told(tmp_path: Path) -> None:
    found = fates(read(write(tmp_path / "a.tar", tar(member("a.py")) + tar(member("b.py")))))
    assert found["a.py"] == ("kept", None)
    assert "follow the end mark" in str(found["a.tar"][1])


def test_in_folders_archives_are_taken_apart_only_if_asked(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "a.tar.gz", gzip.compress(tar(member("p/a.py"))))
    assert list(fates(read(tmp_path))) == ["sub/a.tar.gz"]
    assert fates(read(tmp_path, "read.containers=true")) == {"sub/a.tar.gz/p/a.py": ("kept", None)}


def test_a_pipe_named_like_an_archive_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    ((status, reason),) = fates(read(tmp_path, "read.containers=true")).values()
    assert (status, "not a regular file" in str(reason)) == ("failed", True)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_ends_in_records_or_one_failure(data: st.DataObject) -> None:
    """Flipped bytes anywhere: every member is there, or a failure tells that something is wrong."""
    import tempfile

    content = bytearray(tar(*(member(f"{i}.py", b"y" * 700) for i in range(5))))
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] ^= data.draw(st.integers(1, 255))
    with tempfile.TemporaryDirectory() as folder:
        records = read(write(Path(folder) / "a.tar", bytes(content)))
    assert len([r for r in records if r.status != "failed"]) == 5 or any(r.status == "failed" for r in records)


def test_cpythons_own_collection_of_odd_members(tmp_path: Path) -> None:
    """Members of many tar programs; one record for each that `tarfile` knows."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / "test"
    found = [path for name in ("testtar.tar", "archivetestdata/testtar.tar") if (path := folder / name).is_file()]
    if not found:
        pytest.skip("this Python comes without its tests")
    with tarfile.open(found[0]) as archive:
        names = [info.name for info in archive if not info.isdir()]
    records = read(found[0])
    assert len(records) == len(names)
    assert [r.path.split("/")[-1] for r in records if r.path.isascii() and "\\x" not in r.path] == [
        name.strip("/").split("/")[-1] for name in names if name.isascii()
    ]
