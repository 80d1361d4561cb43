"""Conversations in files to a dataset: forms, bad rows, lengths."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opencoder.data import tokenizer as tok
from opencoder.data.sft_files import SftData
from opencoder.errors import DataError
from opencoder.posttrain.chat import ChatEncoder, Message
from opencoder.posttrain.preprocess import Job, preprocess_sft

pytestmark = pytest.mark.fast


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def talk(*contents: str, **more: Any) -> dict[str, Any]:
    return {"messages": [turn(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)], **more}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def made(
    tmp_path: Path, tokenizer: Path, *rows: Any, workers: int = 1, **options: Any
) -> tuple[dict[str, Any], SftData]:
    path = write_jsonl(tmp_path / "in.jsonl", list(rows))
    facts = preprocess_sft(Job((str(path),), str(tokenizer), **options), tmp_path / "out", workers=workers)
    return facts, SftData(tmp_path / "out")


BAD = {
    "broken_line": (b'{"messages": [', r"in.jsonl:2: is not JSON"),
    "no_conversation": ({"text": "x"}, "neither `messages` nor `instruction` and `output`; it has text"),
    "unknown_role": (
        {"messages": [turn("human", "a"), turn("assistant", "b")]},
        "role 'human'; allowed are system, user",
    ),
    "empty_message": (talk("a", " \n"), r"message 1 \(assistant\) is empty"),
    "no_text": ({"messages": [turn("user", ["a"]), turn("assistant", "b")]}, "is a list, not a text"),
    "system_not_first": (
        {"messages": [turn("user", "a"), turn("system", "s"), turn("assistant", "b")]},
        "only come first",
    ),
    "no_answer": (talk("a"), "no assistant message answers"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_are_counted_and_named(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    row, says = BAD[kind]
    facts, data = made(tmp_path, tokenizer, talk("a", "b"), row, talk("c", "d"))
    assert facts["problems"] == {k: int(k == kind) for k in BAD}
    assert len(data) == 2
    (told,) = facts["problems_told"][kind]
    assert told.startswith(f"{tmp_path}/in.jsonl:2: ")
    with pytest.raises(DataError, match=says):
        made(tmp_path, tokenizer, talk("a", "b"), row, strict=True)


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path, tokenizer: Path) -> None:
    facts, _ = made(tmp_path, tokenizer, talk("a", "b"), b'{"instruction": "\\ud800", "output": "x"}')
    assert facts["problems"]["no_text"] == 1


def test_forms_give_the_same_ids(tmp_path: Path, tokenizer: Path) -> None:
    pairs = [{"instruction": "a", "input": "in", "output": "b", "system": "s"}, {"instruction": "c", "output": "d"}]
    messages = [
        {"messages": [turn("system", "s"), turn("user", "a\n\nin"), turn("assistant", "b")]},
        {"messages": [turn("user", "c"), turn("assistant", "d")]},
    ]
    jsonl = [write_jsonl(tmp_path / name, rows) for name, rows in (("a.jsonl", pairs), ("b.jsonl.gz", messages))]
    for name, rows in (("c.parquet", pairs), ("d.parquet", messages)):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    found = []
    for path in (*jsonl, tmp_path / "c.parquet", tmp_path / "d.parquet"):
        preprocess_sft(Job((str(path),), str(tokenizer)), tmp_path / "out")
        data = SftData(tmp_path / "out")
        found.append((data.indexed.tokens.tolist(), data.mask.tolist()))
    assert found == found[:1] * 4


def test_a_long_conversation_is_cut_after_an_answer_or_dropped(tmp_path: Path, tokenizer: Path) -> None:
    encoder = ChatEncoder(tok.load(tokenizer))
    row = talk("one", "two", "three", "four", "five", "six " * 100)
    two_answers = encoder.encode([Message(**each) for each in row["messages"][:4]])
    n = len(two_answers.ids)
    for learn, targets in (("all", two_answers.learned), ("last", None)):
        facts, data = made(tmp_path, tokenizer, row, seq_len=n - 1, learn=learn)
        assert facts["longer_than_context"] == {"long": 1, "cut": 1, "dropped": 0}
        ids, mask = data.conversation(0)
        assert ids.tolist() == two_answers.ids
        if targets is not None:
            assert mask.tolist() == [int(each) for each in targets]
        assert mask.sum() > 0
    facts, data = made(tmp_path, tokenizer, row, seq_len=n - 2)
    assert len(data.conversation(0)[0]) < n - 1
    facts, data = made(tmp_path, tokenizer, row, talk("a", "b"), seq_len=n, on_long="drop")
    assert facts["longer_than_context"] == {"long": 1, "cut": 0, "dropped": 1}
    assert len(data) == 1
    with pytest.raises(DataError, match="can be learned from: too long 1"):
        made(tmp_path, tokenizer, row, seq_len=10)


def test_turns_after_the_last_answer_and_blank_lines_before_one_go(tmp_path: Path, tokenizer: Path) -> None:
    facts, data = made(tmp_path, tokenizer, talk("a", "\n \n  b", "c"))
    expected = ChatEncoder(tok.load(tokenizer)).encode([Message("user", "a"), Message("assistant", "  b")])
    assert data.conversation(0)[0].tolist() == expected.ids
    assert facts["turns_and_blank_lines_trimmed"] == 2
