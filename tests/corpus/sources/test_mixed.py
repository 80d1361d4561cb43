"""All forms in one build: every record has one fate, whatever the order, the parts and the workers."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from opencoder.config import load_corpus_config
from opencoder.corpus.build import build_corpus

from .test_documents import jsonl, parquet
from .test_git import repository
from .test_notebook import EXAMPLE
from .test_tar import member, tar
from .test_zip import pack

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs the command git")
SETTINGS = ("rules.enabled=false", "dedup.fuzzy=false")


def code(n: int) -> str:
    return "".join(f"name_{n}_{line} = {line}\n" for line in range(30))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("in")
    (root / "folder").mkdir()
    (root / "folder" / "a.py").write_text(code(0))
    (root / "folder" / "b.ipynb").write_bytes(EXAMPLE)
    (root / "t.tar.gz").write_bytes(gzip.compress(tar(member("p/a.py", code(1).encode()), member("../x.py"))))
    pack(root / "z.zip", {f"p/{n}.py": code(n) for n in (2, 3)})
    repository(root / "repo", {"a.py": code(4), "copy.py": code(1)})
    jsonl(root / "j.jsonl", [{"text": code(n), "path": f"j/{n}.py", "stars": 5} for n in range(5, 25)])
    parquet(root / "p.parquet", [{"content": code(n), "path": f"q/{n}.py"} for n in range(25, 45)], row_group_size=5)
    return [str(root / n) for n in ("folder", "t.tar.gz", "z.zip", "repo", "j.jsonl", "p.parquet")]


def rows(output: Path, stage: str) -> list[dict[str, Any]]:
    return [row for part in sorted((output / stage).glob("*.parquet")) for row in pq.read_table(part).to_pylist()]


def test_a_build_of_every_form(inputs: list[str], tmp_path: Path) -> None:
    report = build_corpus(inputs, tmp_path / "out", load_corpus_config(None, list(SETTINGS)))
    kept = {row["path"] for row in rows(tmp_path / "out", "clean")}
    # The copy of p/a.py in the repository is dropped or kept by the rule of the least path among equals, or latest commit.
    assert kept == {
        "a.py", "b.ipynb", "copy.py", *(f"p/{n}.py" for n in (2, 3)),
        *(f"j/{n}.py" for n in range(5, 25)), *(f"q/{n}.py" for n in range(25, 45)),
    }  # fmt: skip
    assert [(row["path"], row["reason"]) for row in rows(tmp_path / "out", "dropped")] == [
        ("p/a.py", "exact_duplicate")
    ]
    (failed,) = rows(tmp_path / "out", "failed")
    assert failed["path"] == "../x.py"
    assert report["counts"] == {"in": 48, "kept": 46, "dropped": 1, "failed": 1}


def test_order_parts_and_workers_make_no_difference(inputs: list[str], tmp_path: Path) -> None:
    fates = []
    for number, (order, workers, split) in enumerate([(inputs, 1, 10**9), (inputs[::-1], 2, 1200)]):
        out = tmp_path / str(number)
        build_corpus(order, out, load_corpus_config(None, [*SETTINGS, f"read.split_bytes={split}"]), workers=workers)
        fates.append(
            {
                stage: sorted((r["path"], r["id"] or "") for r in rows(out, stage))
                for stage in ("clean", "dropped", "failed")
            }
        )
    assert fates[0] == fates[1]
