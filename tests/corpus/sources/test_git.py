"""Git repositories: HEAD's files without a checkout, from every form of store, and what is corrupt by its id."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest

from opencoder.corpus.sources.items import repository_facts

from .reading import by_path, fates, items, read

pytestmark = [pytest.mark.fast, pytest.mark.skipif(shutil.which("git") is None, reason="needs the command git")]
CODE = "print('hello')\n"
TIME = 1_600_000_000


def git(folder: Path, *arguments: str, stdin: bytes | None = None) -> str:
    who = {"NAME": "A", "EMAIL": "a@example.org", "DATE": f"{TIME} +0200"}
    env = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()}
    env |= {"PATH": os.environ["PATH"], "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(["git", *arguments], cwd=folder, env=env, input=stdin, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def repository(path: Path, files: dict[str, str | bytes], *options: str) -> Path:
    path.mkdir(parents=True)
    git(path, "init", "-q", *options)
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    git(path, "add", "-A")
    git(path, "commit", "-q", "-m", "all")
    return path


FILES: dict[str, str | bytes] = {"a.py": CODE, "d/b.py": CODE * 2, "d/e/c.py": CODE * 3, "é.py": CODE * 4}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return repository(tmp_path / "proj", FILES)


def test_files_at_head_are_read_with_repository_time_and_blob(work: Path) -> None:
    (work / "a.py").write_text("changed, not committed")
    (work / "new.py").write_text("not committed")
    found = by_path(read(work))
    assert {path: record.text for path, record in found.items()} == {n: str(d) for n, d in FILES.items()}
    record = found["d/b.py"]
    assert (record.repo, record.commit_time, record.source) == ("proj", TIME, "proj")
    assert record.blob_id == git(work, "rev-parse", "HEAD:d/b.py")
    assert record.id == hashlib.sha256((CODE * 2).encode()).hexdigest()


def test_without_git_data_the_files_that_lie_there_are_read(work: Path) -> None:
    (work / "new.py").write_text(CODE)
    assert set(by_path(read(work, "read.git=false"))) == {*FILES, "new.py"}


@pytest.mark.parametrize(
    "form", ["bare", "packed", "pack-refs", "detached", "alternates", "worktree", "sha256", "shallow"]
)
def test_every_form_of_store_gives_the_same_files(form: str, work: Path, tmp_path: Path) -> None:
    target = tmp_path / "other"
    if form == "bare":
        git(tmp_path, "clone", "-q", "--bare", str(work), str(target))
    elif form == "packed":
        git(work, "gc", "-q")
        target = work
    elif form == "pack-refs":
        git(work, "pack-refs", "--all", "--prune")
        target = work
    elif form == "detached":
        git(work, "checkout", "-q", "--detach")
        target = work
    elif form == "alternates":
        git(tmp_path, "clone", "-q", "--shared", "--bare", str(work), str(target))
    elif form == "worktree":
        git(work, "worktree", "add", "-q", str(target))
    elif form == "sha256":
        target = repository(tmp_path / "sha256", FILES, "--object-format=sha256")
    else:
        git(tmp_path, "clone", "-q", "--depth=1", f"file://{work}", str(target))
    found = by_path(read(target))
    assert {path: record.text for path, record in found.items()} == {n: str(d) for n, d in FILES.items()}
    assert len(str(found["a.py"].blob_id)) == (64 if form == "sha256" else 40)


def test_repositories_inside_a_folder_and_plain_files_beside_them(tmp_path: Path) -> None:
    repository(tmp_path / "in" / "owner" / "one", {"a.py": CODE})
    repository(tmp_path / "in" / "two", {"a.py": CODE * 2})
    git(tmp_path, "clone", "-q", "--bare", str(tmp_path / "in" / "two"), str(tmp_path / "in" / "bare.git"))
    (tmp_path / "in" / "plain.py").write_text(CODE)
    found = by_path(read(tmp_path / "in"))
    assert {path: record.repo for path, record in found.items()} == {
        "owner/one/a.py": "owner/one",
        "two/a.py": "two",
        "bare/a.py": "bare",
        "plain.py": None,
    }


def test_links_and_submodules_are_dropped_by_name(work: Path) -> None:
    (work / "link.py").symlink_to("/etc/passwd")
    git(work, "add", "-A")
    commit = git(work, "rev-parse", "HEAD")
    git(work, "update-index", "--add", "--cacheinfo", f"160000,{commit},sub")
    git(work, "commit", "-q", "-m", "more")
    found = by_path(read(work))
    assert (found["link.py"].status, found["link.py"].reason) == ("dropped", "link")
    assert (found["sub"].status, found["sub"].reason) == ("dropped", "submodule")
    assert commit in str(found["sub"].threshold)
    assert "root:" not in "".join(record.text or "" for record in found.values())
    assert sum(record.status == "kept" for record in found.values()) == len(FILES)


def test_lfs_pointers_are_recognised(tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"
    (record,) = read(repository(tmp_path / "proj", {"model.py": pointer}))
    assert (record.status, record.reason, record.value) == ("dropped", "lfs_pointer", 123456)


def loose(repo: Path, oid: str) -> Path:
    path = repo / ".git" / "objects" / oid[:2] / oid[2:]
    path.chmod(0o644)
    return path


DAMAGES = {
    "removed": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "noise": lambda path: path.write_bytes(random.Random(1).randbytes(60)),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:14] + b"\xff\xff" + path.read_bytes()[16:]),
    "other content": lambda path: path.write_bytes(zlib.compress(b"blob 3\0x=1")),
    "other kind": lambda path: path.write_bytes(zlib.compress(b"tree 0\0")),
    "wrong size": lambda path: path.write_bytes(zlib.compress(b"blob 900\0x=1")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_corrupt_file_is_reported_by_its_id_and_the_others_are_read(damage: str, work: Path) -> None:
    oid = git(work, "rev-parse", "HEAD:d/b.py")
    DAMAGES[damage](loose(work, oid))
    found = by_path(read(work))
    assert set(found) == set(FILES)
    assert found["d/b.py"].status == "failed"
    assert oid in str(found["d/b.py"].reason)
    assert {path for path, record in found.items() if record.status == "kept"} == set(FILES) - {"d/b.py"}


@pytest.mark.parametrize("damage", ["removed", "noise", "other content"])
def test_a_corrupt_folder_is_reported_and_the_others_are_read(damage: str, work: Path) -> None:
    oid = git(work, "rev-parse", "HEAD:d")
    DAMAGES[damage](loose(work, oid))
    found = by_path(read(work))
    assert set(found) == {"a.py", "é.py", "d"}
    assert found["d"].status == "failed"
    assert oid in str(found["d"].reason)


def test_a_corrupt_pack_fails_what_it_holds_and_nothing_hangs(tmp_path: Path) -> None:
    draw = random.Random(0)
    work = repository(tmp_path / "proj", {f"{i:03}.py": draw.randbytes(600).hex() for i in range(300)})
    git(work, "gc", "-q")
    (pack,) = (work / ".git" / "objects" / "pack").glob("*.pack")
    data = bytearray(pack.read_bytes())
    for at in range(len(data) // 2, len(data) // 2 + 4000):
        data[at] ^= 0x55
    pack.chmod(0o644)
    pack.write_bytes(data)
    records = read(work)
    statuses = [record.status for record in records]
    assert len(records) == 300
    assert 1 <= statuses.count("failed") < 60
    assert all(
        record.blob_id in str(record.reason) for record in records if record.status == "failed" and record.blob_id
    )


@pytest.mark.parametrize("fault", ["no commit", "corrupt commit", "no HEAD"])
def test_a_repository_without_a_readable_head_is_failed(fault: str, work: Path, tmp_path: Path) -> None:
    if fault == "no commit":
        work = tmp_path / "new"
        work.mkdir()
        git(work, "init", "-q")
    elif fault == "corrupt commit":
        loose(work, git(work, "rev-parse", "HEAD")).write_bytes(b"x")
    else:
        (work / ".git" / "HEAD").unlink()
    (record,) = read(work)
    assert record.status == "failed"
    assert "HEAD" in str(record.reason)


@pytest.mark.parametrize("leftover", ["empty folder", "file that points nowhere"])
def test_what_is_left_of_git_data_in_a_package_makes_no_repository(leftover: str, tmp_path: Path) -> None:
    (tmp_path / "in" / "pkg").mkdir(parents=True)
    (tmp_path / "in" / "pkg" / "a.py").write_text(CODE)
    if leftover == "empty folder":
        (tmp_path / "in" / "pkg" / ".git").mkdir()
    else:
        (tmp_path / "in" / "pkg" / ".git").write_text("gitdir: ../../.git/modules/pkg\n")
    assert fates(read(tmp_path / "in")) == {"pkg/a.py": ("kept", None)}


def test_large_repositories_are_read_in_parts_with_the_same_result(tmp_path: Path) -> None:
    work = repository(tmp_path / "proj", {f"{i}.py": f"x = {i}\n" * 400 for i in range(50)})
    git(work, "gc", "-q")
    parts = items(work, "read.split_bytes=1000")
    assert len(parts) > 2
    assert read(work, "read.split_bytes=1000") == read(work)


def test_a_file_above_the_size_cap_is_hashed_and_dropped(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    found = by_path(read(repository(tmp_path / "proj", {"a.py": CODE, "big.py": data}), "max_bytes=1000000"))
    assert (found["big.py"].reason, found["big.py"].id) == ("size", hashlib.sha256(data).hexdigest())
    assert found["a.py"].status == "kept"


def test_trees_that_stand_for_endless_files_are_given_up(tmp_path: Path) -> None:
    """Each level holds the one below ten times: 10^12 files from 13 objects."""
    work = repository(tmp_path / "proj", {"a.py": CODE})
    inner = git(work, "rev-parse", "HEAD^{tree}")
    for _ in range(12):
        lines = "".join(f"040000 tree {inner}\td{n}\n" for n in range(10))
        inner = git(work, "mktree", stdin=lines.encode())
    commit = git(work, "commit-tree", "-m", "bomb", inner)
    git(work, "update-ref", "HEAD", commit)
    (record,) = read(work, "read.archive.max_members=20000")
    assert record.status == "failed"
    assert "more than 20,000 members" in str(record.reason)


def test_nothing_that_the_repository_configures_is_run(work: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (work / ".git" / "info").mkdir(exist_ok=True)
    (work / ".git" / "info" / "attributes").write_text("* filter=evil diff=evil\n")
    for key in ("core.fsmonitor", "core.pager", "core.sshCommand", "filter.evil.smudge", "diff.evil.textconv"):
        git(work, "config", key, f"touch {mark}; cat")
    # A partial clone whose missing objects would be fetched through a command.
    git(work, "config", "extensions.partialClone", "origin")
    git(work, "config", "remote.origin.url", f"ext::sh -c 'touch% {mark}'")
    git(work, "config", "remote.origin.promisor", "true")
    git(work, "config", "protocol.ext.allow", "always")
    git(work, "config", "core.repositoryFormatVersion", "1")
    loose(work, git(work, "rev-parse", "HEAD:a.py")).unlink()
    found = by_path(read(work))
    assert found["a.py"].status == "failed"
    assert found["d/b.py"].status == "kept"
    assert not mark.exists()


def test_repositories_of_another_owner_are_read(work: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs to give files away, as root may")
    for folder, _, names in os.walk(work):
        for name in (folder, *(os.path.join(folder, n) for n in names)):
            os.chown(name, 12345, 12345)
    assert set(fates(read(work))) == set(FILES)


def test_a_new_commit_is_seen_by_the_item(work: Path) -> None:
    before = items(work)
    assert items(work) == before
    (work / "a.py").write_text("x = 1\n")
    git(work, "commit", "-q", "-a", "-m", "more")
    assert items(work)[0].mtime_ns != before[0].mtime_ns
    git(work, "pack-refs", "--all", "--prune")
    assert repository_facts(str(work / ".git"))[1] != before[0].mtime_ns


def test_without_the_command_git_the_failure_says_what_to_do(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    (record,) = read(work)
    assert "install git" in str(record.reason)
