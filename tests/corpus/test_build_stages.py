"""What the single stages of a build do to a corpus: existing corpora, levels, licences, personal data, benchmarks, budgets; and
what a later build does again."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from opencoder.config import load_corpus_config
from opencoder.corpus.build import build_corpus
from opencoder.errors import ConfigError, DataError, UserError

from .test_build import build, by_path, good, rows
from .test_licence import MIT

NOTICE = "# Copyright (c) 2019 Jane Doe\n# SPDX-License-Identifier: MIT\n\n"


def sources(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def paths(output: Path, stage: str = "clean") -> set[str]:
    return {row["path"] for row in rows(output, stage)}


# ---- dedup ----


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("preset", ["opencoder", "bigcode"])
def test_an_existing_corpus_comes_first(stored: bool, preset: str, tmp_path: Path) -> None:
    old = sources(tmp_path / "old", {"a.py": good(1), "b.py": good(2), "c.py": good(3)})
    new = sources(tmp_path / "new", {"copy.py": good(1), "near.py": good(2) + "# other\n", "own.py": good(4)})
    options = (f"dedup.preset={preset}",)
    build([old], tmp_path / "first", *options, f"dedup.store_signatures={str(stored).lower()}")
    assert (tmp_path / "first" / "signatures.parquet").is_file() == stored
    build([new], tmp_path / "second", *options, f"dedup.against=['{tmp_path / 'first'}']")
    assert paths(tmp_path / "second") == {"own.py"}
    dropped = by_path(tmp_path / "second")
    assert (dropped["copy.py"]["stage"], dropped["copy.py"]["kept_path"]) == ("exact_dedup", "a.py")
    assert (dropped["near.py"]["stage"], dropped["near.py"]["kept_path"]) == ("fuzzy_dedup", "b.py")
    assert dropped["near.py"]["value"] > 0.9


def test_stored_keys_are_used_and_those_of_another_recipe_refused(tmp_path: Path) -> None:
    old = sources(tmp_path / "old", {"a.py": NOTICE * 40 + good(1)})  # mostly header, which the transform takes out
    build([old], tmp_path / "first", "dedup.preset=bigcode", "dedup.store_signatures=true")
    new = sources(tmp_path / "new", {"near.py": NOTICE * 40 + good(1) + "# other\n"})
    against = f"dedup.against=['{tmp_path / 'first'}']"
    build([new], tmp_path / "second", "dedup.preset=bigcode", against)
    assert by_path(tmp_path / "second")["near.py"]["stage"] == "fuzzy_dedup"
    with pytest.raises(ConfigError, match="use the same dedup settings"):
        build([new], tmp_path / "third", "dedup.preset=datatrove", against)


def test_a_folder_that_holds_no_corpus_is_refused(tmp_path: Path) -> None:
    root = sources(tmp_path / "src", {"a.py": good(1)})
    with pytest.raises(DataError, match="holds no finished corpus"):
        build([root], tmp_path / "out", f"dedup.against=['{root}']")


def test_repositories_are_kept_or_dropped_as_a_whole(tmp_path: Path) -> None:
    one = {f"one/{n}.py": good(n) for n in range(3)}
    two = {f"two/{n}.py": good(n) + ("# a fork\n" if n == 2 else "") for n in range(3)}
    root = sources(tmp_path / "src", one | two | {"three/0.py": good(0), "three/x.py": good(9)})
    options = ("dedup.preset=bigcode", "read.repo_depth=1")
    build([root], tmp_path / "repository", *options, "dedup.level=repository")
    assert paths(tmp_path / "repository") == {*one, "three/0.py", "three/x.py"}
    assert {r["stage"] for r in rows(tmp_path / "repository", "dropped")} == {"fuzzy_dedup"}
    build([root], tmp_path / "file", *options)
    assert paths(tmp_path / "file") == {*one, "three/x.py"}


def test_chunks_are_documents_of_their_own(tmp_path: Path) -> None:
    text = good(1) + good(2)
    root = sources(tmp_path / "src", {"a.py": text, "b.py": good(1) + good(3)})
    build(
        [root],
        tmp_path / "out",
        "dedup.level=chunk",
        "dedup.chunk_tokens=200",
        "rules.enabled=false",
        "dedup.fuzzy=false",
    )
    clean = sorted(rows(tmp_path / "out", "clean"), key=lambda row: row["path"])
    assert "".join(row["text"] for row in clean if row["path"].startswith("a.py#")) == text
    shared = {row["path"] for row in rows(tmp_path / "out", "dropped")}
    assert shared
    assert all(path.startswith("b.py#") for path in shared)


def test_signatures_of_the_corpus_that_was_there_before_go(tmp_path: Path) -> None:
    root = sources(tmp_path / "src", {"a.py": good(1)})
    build([root], tmp_path / "out", "dedup.store_signatures=true")
    assert (tmp_path / "out" / "signatures.parquet").is_file()
    (root / "a.py").write_text(good(2))
    build([root], tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "signatures.parquet").exists()


def test_the_jaccard_check_keeps_what_only_looks_alike(tmp_path: Path) -> None:
    root = sources(tmp_path / "src", {"a.py": good(1), "b.py": good(1) + "# other words here\n"})
    options = ("dedup.preset=bigcode", "transform.enabled=false")
    build([root], tmp_path / "loose", *options)
    (row,) = rows(tmp_path / "loose", "dropped")
    build([root], tmp_path / "strict", *options, f"dedup.check_jaccard={row['value'] + 1e-4}")
    assert paths(tmp_path / "strict") == {"a.py", "b.py"}


# ---- transform, benchmarks, budgets ----


def test_headers_and_personal_data_go_and_the_licence_stays_known(tmp_path: Path) -> None:
    files = {
        "repo/LICENSE": "Permission is hereby granted, free of charge, to any person obtaining a copy\n",
        "own.py": NOTICE + good(1),
        "mail.py": good(2) + 'ADMIN = "jane.doe@gmail.com"\n',
    }
    root = sources(tmp_path / "src", files)
    report = build([root], tmp_path / "out")
    clean = {row["path"]: row for row in rows(tmp_path / "out", "clean")}
    assert clean["own.py"]["text"] == good(1)
    assert (clean["own.py"]["licence"], clean["own.py"]["licence_source"]) == ("MIT", "spdx")
    assert clean["mail.py"]["text"].endswith('ADMIN = "<email>"\n')
    spans = json.loads(clean["mail.py"]["transform"])["pii"]
    assert files["mail.py"][slice(*spans[0][:2])] == "jane.doe@gmail.com"
    assert report["transform"]["pii"] == {"email": 1}
    assert report["transform"]["with_header"] == 1


def test_the_report_shows_no_personal_data_that_the_corpus_does_not_hold(tmp_path: Path) -> None:
    mail = 'ADMIN = "jane.doe@gmail.com"\n'
    files = {"a.py": mail + good(1), "copy.py": mail + good(1), "near.py": mail + good(1) + "# other\n", "bad.py": mail}
    root = sources(tmp_path / "src", files)
    build([root], tmp_path / "out", "dedup.preset=bigcode")
    dropped = {row["path"]: row for row in rows(tmp_path / "out", "dropped")}
    assert {name: row["stage"] for name, row in dropped.items()} == {
        "copy.py": "exact_dedup", "near.py": "fuzzy_dedup", "bad.py": "rules",
    }  # fmt: skip
    assert all(row["excerpt"].startswith('ADMIN = "<email>"') for row in dropped.values())
    for file in ("report.json", "report.html"):
        assert "jane.doe" not in (tmp_path / "out" / file).read_text()
    build([root], tmp_path / "raw", "dedup.preset=bigcode", "transform.enabled=false")
    assert "jane.doe" in (tmp_path / "raw" / "report.json").read_text()


def test_licence_files_without_a_language_speak_for_their_folder(tmp_path: Path) -> None:
    """LICENSE-MIT and COPYING.LIB have no known language: they are dropped, and their licence is known all the same."""
    root = sources(tmp_path / "src", {"repo/LICENSE-MIT": MIT, "repo/own.py": good(1), "own.py": good(2)})
    report = build([root], tmp_path / "out")
    clean = {row["path"]: (row["licence"], row["licence_source"]) for row in rows(tmp_path / "out", "clean")}
    assert clean == {"repo/own.py": ("MIT", "file"), "own.py": (None, "none")}
    assert report["by_reason"]["language: unknown_language"] == 1


def test_small_archives_share_a_task(tmp_path: Path) -> None:
    root = tmp_path / "src"
    root.mkdir()
    for n in range(40):
        with zipfile.ZipFile(root / f"{n:02d}.zip", "w") as file:
            file.writestr("main.py", good(n))
    build([root], tmp_path / "out", "read.containers=true", keep_work=True)
    assert len(paths(tmp_path / "out")) == 40
    assert len(list((tmp_path / "out" / "work" / "read").glob("*.task.json"))) == 1
    build([root], tmp_path / "small", "read.containers=true", "shard_bytes=30000", keep_work=True)
    assert len(list((tmp_path / "small" / "work" / "read").glob("*.task.json"))) > 5
    assert paths(tmp_path / "small") == paths(tmp_path / "out")


def test_a_licence_that_is_not_allowed_is_dropped(tmp_path: Path) -> None:
    gpl = "# SPDX-License-Identifier: GPL-3.0-only\n\n" + good(2)
    root = sources(tmp_path / "src", {"mit.py": NOTICE + good(1), "gpl.py": gpl, "none.py": good(3)})
    build([root], tmp_path / "out", "transform.licences=[permissive]", "transform.unknown_licence=drop")
    assert paths(tmp_path / "out") == {"mit.py"}
    dropped = by_path(tmp_path / "out")
    assert dropped["gpl.py"]["reason"] == "licence"
    assert "GPL-3.0-only is not among permissive" in dropped["gpl.py"]["threshold"]
    with pytest.raises(ConfigError, match="MTI"):
        build([root], tmp_path / "wrong", "transform.licences=[MTI]")


def test_benchmark_tasks_are_dropped_or_reported(tmp_path: Path) -> None:
    prompt = "def add_all_numbers(values):\n    '''Add all the numbers of a list and give back the sum.'''\n"
    task = {"task_id": "t/1", "prompt": prompt, "canonical_solution": "    return sum(values)\n"}
    task["entry_point"] = "add_all_numbers"
    benchmark = tmp_path / "bench.jsonl"
    benchmark.write_text(json.dumps(task) + "\n")
    leak = good(1) + task["prompt"] + task["canonical_solution"]
    root = sources(tmp_path / "src", {"leak.py": leak, "fine.py": good(2)})
    report = build([root], tmp_path / "drop", f"decontaminate.against=['{benchmark}']")
    assert paths(tmp_path / "drop") == {"fine.py"}
    assert by_path(tmp_path / "drop")["leak.py"]["stage"] == "decontaminate"
    assert {(m["path"], m["task"]) for m in report["matches"]} == {("leak.py", "t/1")}
    build([root], tmp_path / "report", f"decontaminate.against=['{benchmark}']", "decontaminate.action=report")
    assert paths(tmp_path / "report") == {"leak.py", "fine.py"}


def test_a_language_is_cut_to_its_budget(tmp_path: Path) -> None:
    root = sources(tmp_path / "src", {f"{n:03d}.py": good(n) for n in range(60)})
    options = ("sample.budgets={python: {ratio: 0.5}}", "dedup.fuzzy=false")
    build([root], tmp_path / "out", *options)
    kept = len(paths(tmp_path / "out"))
    assert 20 <= kept <= 40
    assert {row["stage"] for row in rows(tmp_path / "out", "dropped")} == {"sample"}
    build([root], tmp_path / "again", *options, "shard_bytes=30000", workers=2)
    assert paths(tmp_path / "again") == paths(tmp_path / "out")
    with pytest.raises(ConfigError, match="pyhton"):
        build([root], tmp_path / "wrong", "sample.budgets={pyhton: {ratio: 0.5}}")


# ---- later builds ----


def done_stages(output: Path, before: dict[str, int]) -> set[str]:
    """Tasks whose manifest is newer than before."""
    found = {str(p.relative_to(output / "work")): p.stat().st_mtime_ns for p in (output / "work").rglob("*.task.json")}
    return {name.removesuffix(".task.json") for name, time in found.items() if before.get(name) != time}


def test_with_the_work_kept_only_what_changed_is_done_again(tmp_path: Path) -> None:
    root = sources(tmp_path / "src", {f"f{n:02d}.py": good(n) for n in range(30)})
    output, options = tmp_path / "out", ("shard_bytes=15000",)
    build([root], output, *options, keep_work=True)
    before = {str(p.relative_to(output / "work")): p.stat().st_mtime_ns for p in (output / "work").rglob("*.task.json")}
    assert len([name for name in before if name.startswith("read/")]) > 2
    changed = root / "f00.py"
    changed.write_text(good(0).replace("compute", "combine"))  # of the same length
    os.utime(changed, ns=(1, 1))
    build([root], output, *options, keep_work=True)
    again = done_stages(output, before)
    assert {name for name in again if name.startswith("read/")} == {"read/000000"}
    build([root], tmp_path / "fresh", *options)
    assert {r["id"] for r in rows(output, "clean")} == {r["id"] for r in rows(tmp_path / "fresh", "clean")}


def test_verify_finds_a_source_that_changed_without_a_trace(tmp_path: Path) -> None:
    root = sources(tmp_path / "src", {f"f{n}.py": good(n) for n in range(5)})
    output, path = tmp_path / "out", root / "f0.py"
    build([root], output, keep_work=True)
    status = path.stat()
    path.write_text(good(0).replace("compute", "combine"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    build([root], output, keep_work=True)
    assert any("compute" in row["text"] for row in rows(output, "clean") if row["path"] == "f0.py")
    build([root], output, keep_work=True, verify=True)
    assert all("combine" in row["text"] for row in rows(output, "clean") if row["path"] == "f0.py")


def test_the_executor_is_no_parameter_of_the_corpus(tmp_path: Path) -> None:
    root = sources(tmp_path / "src", {"a.py": good(1)})
    report = build([root], tmp_path / "out", "engine.retries=0")
    again = build_corpus([str(root)], tmp_path / "out", load_corpus_config(None, ["engine.retries=5"]))
    assert again["timings"] == report["timings"]
    for verify in (False, True):
        with pytest.raises(UserError, match="other parameters"):
            build([root], tmp_path / "out", "dedup.ngram=3", verify=verify)
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_the_report_shows_each_near_duplicate_beside_its_own_text(tmp_path: Path) -> None:
    # Two that are equally far from the file that is kept.
    texts = {"a.py": good(1), "b.py": "# first words\n" + good(1), "c.py": "# other words\n" + good(1)}
    root = sources(tmp_path / "src", texts)
    report = build([root], tmp_path / "out", "dedup.preset=bigcode")
    shown = {row["path"]: row["excerpt"] for row in report["clusters"]["examples"]}
    assert shown == {name: texts[name][:1500] for name in ("b.py", "c.py")}


def test_work_goes_when_it_is_not_kept(tmp_path: Path) -> None:
    root = sources(tmp_path / "src", {"a.py": good(1)})
    build([root], tmp_path / "out")
    assert not (tmp_path / "out" / "work").exists()
    assert pq.read_table(tmp_path / "out" / "clusters.parquet").num_rows == 0


def columns_of(output: Path) -> dict[str, Any]:
    return {stage: pq.read_schema(next((output / stage).glob("*.parquet"))).names for stage in ("clean", "dropped")}


def test_columns_of_the_contract_are_there(tmp_path: Path) -> None:
    root = sources(tmp_path / "src", {"a.py": good(1), "b.py": ""})
    build([root], tmp_path / "out")
    found = columns_of(tmp_path / "out")
    assert {"id", "path", "repo", "language", "doc_type", "text", "size_bytes", "licence"} <= set(found["clean"])
    assert {"id", "path", "language", "stage", "reason", "value", "threshold"} <= set(found["dropped"])
