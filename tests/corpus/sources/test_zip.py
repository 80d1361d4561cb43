"""Zip archives and wheels: encrypted, damaged and hostile ones among them."""

from __future__ import annotations

import hashlib
import io
import stat
import struct
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .reading import by_path, fates, items, read

pytestmark = pytest.mark.fast
CODE = "print('hello')\n"


def pack(path: Path, members: dict[str, str | bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_members_are_read(method: int, tmp_path: Path) -> None:
    members: dict[str, str | bytes] = {"p/": "", "p/a.py": CODE, "p/empty.py": "", "p/big.py": "x = 1\n" * 90_000}
    found = by_path(read(pack(tmp_path / "a.zip", members, method), "max_bytes=500000"))
    assert set(found) == {"p/a.py", "p/empty.py", "p/big.py"}
    assert found["p/a.py"].text == CODE
    assert found["p/empty.py"].reason == "empty"
    assert (found["p/big.py"].reason, found["p/big.py"].size_bytes) == ("size", 540_000)
    assert found["p/big.py"].id == hashlib.sha256(b"x = 1\n" * 90_000).hexdigest()


def test_wheels_are_archives(tmp_path: Path) -> None:
    assert list(fates(read(pack(tmp_path / "p-1-py3-none-any.whl", {"p/a.py": CODE})))) == ["p/a.py"]


@pytest.mark.parametrize("name", ["../up.py", "/abs.py", "a/../../up.py", "..\\up.py", "C:\\x.py"])
def test_names_that_lead_out_are_failed_by_name(name: str, tmp_path: Path) -> None:
    found = fates(read(pack(tmp_path / "a.zip", {name: CODE, "ok.py": CODE})))
    assert found.pop("ok.py") == ("kept", None)
    ((path, (status, reason)),) = found.items()
    assert (path, status) == (name, "failed")
    assert "it was not read" in str(reason)


def test_links_are_not_followed(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link.py")
    info.create_system = 3
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    (record,) = read(path)
    assert (record.status, record.reason, record.text) == ("dropped", "link", None)
    assert "/etc/passwd" in str(record.threshold)


def set_flag(path: Path, name: str, *, flag: int | None = None, method: int | None = None) -> None:
    """Change a member's flags or method in both of its headers."""
    data = bytearray(path.read_bytes())
    for signature, offset, name_at in ((b"PK\x03\x04", 6, 30), (b"PK\x01\x02", 8, 46)):
        at = -1
        while (at := data.find(signature, at + 1)) >= 0:
            if data[at + name_at : at + name_at + len(name)] == name.encode():
                if flag is not None:
                    data[at + offset] |= flag
                if method is not None:
                    struct.pack_into("<H", data, at + offset + 2, method)
    path.write_bytes(data)


def test_encrypted_and_foreign_members_are_failed_by_name(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"a.py": CODE, "secret.py": CODE, "lzma.py": CODE, "z.py": CODE})
    set_flag(path, "secret.py", flag=1)
    set_flag(path, "lzma.py", method=zipfile.ZIP_LZMA)
    found = fates(read(path))
    assert found["a.py"] == found["z.py"] == ("kept", None)
    assert "encrypted" in str(found["secret.py"][1])
    assert "compression method 14" in str(found["lzma.py"][1])


def test_a_member_with_a_wrong_checksum_is_failed_and_the_others_are_read(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"a.py": CODE, "b.py": CODE * 2, "c.py": CODE}, zipfile.ZIP_STORED)
    data = path.read_bytes()
    path.write_bytes(data.replace((CODE * 2).encode(), (CODE + CODE.upper()).encode()))
    found = fates(read(path))
    assert found["a.py"] == found["c.py"] == ("kept", None)
    assert found["b.py"][0] == "failed"
    assert "CRC" in str(found["b.py"][1])


def test_a_bomb_is_not_unpacked_and_its_neighbours_are_read(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"a.py": CODE, "zeros.py": bytes(150_000_000), "b.py": CODE})
    found = fates(read(path))
    assert found["a.py"] == found["b.py"] == ("kept", None)
    assert found["zeros.py"][0] == "failed"
    assert "read.archive.max_ratio" in str(found["zeros.py"][1])


def test_many_members_of_moderate_size_are_given_up_together(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {f"{i}.py": bytes(5_000_000) for i in range(30)})
    found = fates(read(path))
    assert found["a.zip"][0] == "failed"
    assert "read.archive.max_ratio" in str(found["a.zip"][1])
    assert len(found) < 20


def overlapping(path: Path, copies: int) -> None:
    """An archive whose table names one packed member many times."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.py", CODE * 1000)
        (info,) = archive.infolist()
        for _ in range(copies - 1):
            archive.filelist.append(info)
    path.write_bytes(out.getvalue())


def test_members_that_share_packed_bytes_are_refused(tmp_path: Path) -> None:
    overlapping(tmp_path / "a.zip", 50)
    (record,) = read(tmp_path / "a.zip")
    assert record.status == "failed"
    assert "members overlap" in str(record.reason)


def test_the_number_of_members_is_limited_before_the_table_is_read(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {f"{i}.py": CODE for i in range(12)})
    (record,) = read(path, "read.archive.max_members=10")
    assert "12 members, more than 10 (read.archive.max_members)" in str(record.reason)


def test_the_number_of_members_of_a_large_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)  # from here on the count is in a record of zip64
    path = pack(tmp_path / "a.zip", {f"{i}.py": CODE for i in range(12)})
    assert b"PK\x06\x06" in path.read_bytes()
    assert set(fates(read(path)).values()) == {("kept", None)}


def test_a_table_shorter_than_it_says_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {f"{i}.py": CODE for i in range(12)})
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    (length,) = struct.unpack_from("<L", data, end + 12)
    struct.pack_into("<L", data, end + 12, length // 2)
    path.write_bytes(data)
    (record,) = read(path)
    assert record.status == "failed"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_damage_ends_in_all_records_or_a_failure(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = pack(Path(folder) / "a.zip", {f"d/{i}.py": f"x = {i}\n" * (20 + i) for i in range(5)})
        content = bytearray(path.read_bytes())
        for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
            content[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        records = read(path)
    assert sum(r.status != "failed" for r in records) == 5 or any(r.status == "failed" for r in records)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_archive_is_failed(keep: float, tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {f"{i}.py": CODE for i in range(12)})
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    (record,) = read(path)
    assert record.status == "failed"
    assert "damaged or truncated" in str(record.reason)


def test_large_archives_are_read_in_parts_with_the_same_result(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {f"{i}.py": f"x = {i}\n" * 50 for i in range(40)}, zipfile.ZIP_STORED)
    parts = items(path, "read.split_bytes=3000")
    assert len(parts) > 3
    assert [i.part for i in parts] == list(range(len(parts)))
    assert read(path, "read.split_bytes=3000") == read(path)
