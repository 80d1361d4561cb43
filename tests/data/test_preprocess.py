"""Tokenizer, preprocessing and verification: round trips, resume after a kill, and bad input."""

from __future__ import annotations

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from opencoder.data import tokenizer as tok
from opencoder.data.documents import find_files, read_documents
from opencoder.data.indexed import IndexedDataset
from opencoder.data.preprocess import Job, preprocess
from opencoder.data.verify import verify_dataset
from opencoder.errors import DataError, UserError, VerificationError

TEXTS = [
    Path(__file__).read_text(),
    "x = 1\n" * 50,
    "",
    "ünïcödé — 日本語 \U0001f600\r\n\t  tabs",
    *(f"def f{i}():\n    return {i} * 1234567\n" for i in range(300)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tok")
    tok.save(tok.train(TEXTS, vocab_size=500), folder / "tokenizer")
    table = pa.table({"text": TEXTS, "language": ["python"] * len(TEXTS), "path": [f"p{i}" for i in range(len(TEXTS))]})
    pq.write_table(table, folder / "docs.parquet", row_group_size=50)
    return folder


def job(folder: Path, **options: Any) -> Job:
    return Job((str(folder / "docs.parquet"),), str(folder / "tokenizer"), **options)


def test_tokenizer_round_trip_size_and_special_tokens(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    assert len(tokenizer) == 500
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.bos_token == "<|im_start|>"
    for special in tok.SPECIAL:
        assert len(tokenizer(special, add_special_tokens=False)["input_ids"]) == 1
    assert max(len(d) for d in tokenizer.tokenize("x = 123456789") if d.isdigit()) <= 3
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|im_start|>system\nYou are OpenCoder, created by OpenCoder Team.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_training_is_repeatable_and_a_tiny_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    tok.save(tok.train(TEXTS, vocab_size=500), tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / "tokenizer" / name).read_bytes()
    with pytest.raises(UserError, match="need 265"):
        tok.train(TEXTS, vocab_size=200)


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Path:
    preprocess(job(folder), folder / "data" / "d", workers=2)
    return folder / "data" / "d"


def test_documents_come_back_in_order_with_eod(folder: Path, dataset: Path) -> None:
    from tokenizers import Tokenizer

    data = IndexedDataset(dataset)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    facts = json.loads(Path(f"{dataset}.json").read_text())
    assert len(data) == len(TEXTS) == facts["documents"]
    assert facts["empty_documents"] == 1
    for i, text in enumerate(TEXTS):
        ids = data[i].tolist()
        assert ids[-1] == facts["eod_id"] == tokenizer.token_to_id("<|endoftext|>")
        assert tokenizer.decode(ids[:-1], skip_special_tokens=False) == text
    docs = pq.read_table(f"{dataset}.docs.parquet")
    assert docs.column_names == ["id", "source", "language"]
    assert docs["source"].to_pylist() == [f"p{i}" for i in range(len(TEXTS))]
    assert verify_dataset(dataset)["tokens"] == facts["tokens"]


def files_of(prefix: Path) -> dict[str, bytes]:
    found = {s: Path(f"{prefix}{s}").read_bytes() for s in (".bin", ".idx", ".docs.parquet")}
    facts = json.loads(Path(f"{prefix}.json").read_text())
    facts.pop("timings")
    return {**found, ".json": json.dumps(facts).encode()}


def test_result_is_the_same_for_any_number_of_workers(folder: Path, dataset: Path, tmp_path: Path) -> None:
    preprocess(job(folder), tmp_path / "d", workers=1)
    assert files_of(tmp_path / "d") == files_of(dataset)


def test_a_finished_dataset_is_kept_and_other_parameters_are_refused(folder: Path, dataset: Path) -> None:
    before = Path(f"{dataset}.bin").stat().st_mtime_ns
    preprocess(job(folder), dataset)
    assert Path(f"{dataset}.bin").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="is from another job"):
        preprocess(job(folder, append_eod=False), dataset)


def test_killed_and_started_again_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"value_{i} = {i}\n" * 30}) for i in range(4000)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "opencoder.tools.preprocess_data", "--input", str(tmp_path / "docs.jsonl"),
               "--tokenizer", str(folder / "tokenizer"), "--workers", "2", "--output-prefix"]  # fmt: skip
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    process = subprocess.Popen([*command, str(tmp_path / "cut")], start_new_session=True)
    parts = Path(f"{tmp_path / 'cut'}.parts")
    while process.poll() is None and len(list(parts.glob("0*.json"))) < 2:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the case must be killed in the middle"
    assert not Path(f"{tmp_path / 'cut'}.json").exists()
    subprocess.run([*command, str(tmp_path / "cut")], check=True, capture_output=True)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert not parts.exists()


def test_fim_keeps_every_character_and_depends_on_the_document_alone(folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    preprocess(job(folder, fim_rate=1.0), tmp_path / "a", workers=2)
    preprocess(job(folder, fim_rate=1.0), tmp_path / "b", workers=1)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    data, orders = IndexedDataset(tmp_path / "a"), set()
    suffix_first: list[bool] = []
    p, m, s = (tokenizer.token_to_id(t) for t in (tok.FIM_PREFIX, tok.FIM_MIDDLE, tok.FIM_SUFFIX))
    for i, text in enumerate(TEXTS):
        ids = data[i].tolist()[:-1]
        if len(text) < 3:
            continue
        at = sorted((ids.index(x), x) for x in (p, m, s))
        orders.add(tuple(x for _, x in at))
        pieces = {x: ids[a + 1 : b] for (a, x), b in zip(at, [*(a for a, _ in at[1:]), len(ids)], strict=True)}
        prefix, middle, suffix = (tokenizer.decode(pieces[x], skip_special_tokens=False) for x in (p, m, s))
        # After the middle sentinel stands the middle, or prefix and middle where the suffix comes first.
        assert prefix + middle + suffix == text
        suffix_first.append(not prefix and len(middle) > 0)
    assert orders == {(p, s, m)}
    assert 0.3 < sum(suffix_first) / len(suffix_first) < 0.7


# ---- bad input ----


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.jsonl.zst", "d.parquet"])
def test_formats_give_the_same_documents_and_truncation_is_told(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    payload = "".join(json.dumps({"text": f"{i} " + os.urandom(40).hex()}) + "\n" for i in range(2000)).encode()
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(payload))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.compress(payload))
    elif name.endswith(".parquet"):
        pq.write_table(pa.table({"text": [json.loads(line)["text"] for line in payload.splitlines()]}), path)
    else:
        path.write_bytes(payload)
    assert [int(d.text.split()[0]) for d in read_documents(path)] == list(range(2000))
    os.truncate(path, path.stat().st_size * 2 // 3)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        list(read_documents(path))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "a"}\nnot json\n', r":2 is not JSON|:2 is not a JSON document"),
        ('{"text": "a"}\n{"body": "b"}\n', r":2 has no text under `text`; it has body"),
        ('{"text": "a"}\n[1]\n', r":2 has no text"),
        ('{"text": 3}\n', r":1 has no text"),
    ],
)
def test_bad_lines_are_named(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(DataError, match=says):
        list(read_documents(tmp_path / "d.jsonl"))


def test_bytes_that_are_not_utf8_and_missing_columns_are_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl:1"):
        list(read_documents(tmp_path / "d.jsonl"))
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match="no column `text`; it has body"):
        list(read_documents(tmp_path / "d.parquet"))
    with pytest.raises(DataError, match="does not exist"):
        find_files([tmp_path / "absent"])


def damage(prefix: Path, suffix: str, at: int, value: bytes) -> None:
    with open(f"{prefix}{suffix}", "r+b") as file:
        file.seek(at)
        file.write(value)


def copied(dataset: Path, tmp_path: Path) -> Path:
    for suffix in (".bin", ".idx", ".json", ".docs.parquet"):
        (tmp_path / f"d{suffix}").write_bytes(Path(f"{dataset}{suffix}").read_bytes())
    return tmp_path / "d"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda p: os.truncate(f"{p}.bin", 100), "its index asks for"),
        (lambda p: os.truncate(f"{p}.idx", 100), "wrong size"),
        (lambda p: os.truncate(f"{p}.idx", 20), "truncated"),
        (lambda p: damage(p, ".idx", 0, b"XX"), "bad magic"),
        (lambda p: damage(p, ".idx", 9, struct.pack("<Q", 2)), "version 2"),
        (lambda p: damage(p, ".idx", 17, b"\x63"), "type code 99"),
        (lambda p: damage(p, ".idx", 34 + 12 * len(TEXTS) + 8, struct.pack("<q", 999)), "must rise"),
        (lambda p: damage(p, ".idx", 34 + 4 * len(TEXTS) + 8, struct.pack("<q", 2)), "points to byte 2"),
        (lambda p: damage(p, ".bin", 10, struct.pack("<H", 60000)), "token 5 is 60000, beyond the vocabulary of 500"),
        (lambda p: Path(f"{p}.bin").unlink(), "does not exist"),
        (lambda p: pq.write_table(pa.table({"id": ["a"]}), f"{p}.docs.parquet"), "describes 1 documents"),
    ],
)
def test_verify_names_the_fault(dataset: Path, tmp_path: Path, fault: Any, says: str) -> None:
    prefix = copied(dataset, tmp_path)
    verify_dataset(prefix)
    fault(prefix)
    with pytest.raises(VerificationError, match=says):
        verify_dataset(prefix)


def test_commands_exit_as_promised(dataset: Path, tmp_path: Path) -> None:
    prefix = copied(dataset, tmp_path)
    command = [sys.executable, "-m", "opencoder.tools.cli", "verify-dataset"]
    assert subprocess.run([*command, str(prefix)], capture_output=True, check=False).returncode == 0
    np.zeros(1, np.uint16).tofile(f"{prefix}.bin")
    done = subprocess.run([*command, str(prefix)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
