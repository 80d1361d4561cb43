"""Datasets of labelled samples: written, read back, their order, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opencoder.data import tokenizer as tok
from opencoder.data.classification import ClassificationDataset, Collate, Evaluated, Shuffled, description_file
from opencoder.data.classification_input import Asked, column_of, write_dataset
from opencoder.data.classification_writer import ClassificationWriter
from opencoder.data.loader import BatchLoader
from opencoder.errors import DataError, UserError
from opencoder.tools.write_classification import main

pytestmark = pytest.mark.fast


def ragged(n: int = 50, *, classes: int = 7, longest: int = 9) -> tuple[list[Any], Any]:
    """Samples of different lengths, and labels."""
    r = np.random.default_rng(0)
    return [r.integers(0, 100, r.integers(1, longest + 1)) for _ in range(n)], r.integers(0, classes, n)


def written(prefix: Path, samples: Any, labels: Any, **settings: Any) -> ClassificationDataset:
    """A dataset of two blocks."""
    kind = "features" if "width" in settings else "tokens"
    with ClassificationWriter(prefix, kind, **settings) as writer:
        for part in (slice(0, 20), slice(20, None)):
            (writer.add_features if kind == "features" else writer.add_tokens)(samples[part], labels[part])
    return ClassificationDataset(prefix)


def test_samples_of_any_length_come_back(tmp_path: Path) -> None:
    samples, labels = ragged()
    dataset = written(tmp_path / "d", samples, labels, vocab_size=100)
    assert (len(dataset), dataset.classes, dataset.longest) == (50, 7, 9)
    assert dataset.inputs.dtype == np.uint16
    for i, sample in enumerate(samples):
        assert np.array_equal(dataset.get(i), sample), i
    assert np.array_equal(dataset.labels, labels)


def test_samples_of_one_length_need_no_offsets(tmp_path: Path) -> None:
    samples = np.arange(400).reshape(50, 8)
    dataset = written(tmp_path / "d", samples, np.arange(50) % 7)
    assert not (tmp_path / "d.offsets.npy").exists()
    assert dataset.facts["vocab_size"] == 400
    assert np.array_equal(np.stack([dataset.get(i) for i in range(50)]), samples)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_features_come_back(dtype: Any, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    dataset = written(tmp_path / "d", rows, np.arange(50), width=6, dtype=dtype)
    assert np.array_equal(np.load(tmp_path / "d.features.npy"), rows.astype(dtype))
    assert np.array_equal(np.stack([dataset.get(i) for i in range(50)]), rows.astype(dtype))


def test_every_epoch_has_each_sample_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    samples, labels = ragged()
    dataset = written(tmp_path / "d", samples, labels)
    shuffled = Shuffled(dataset, 3)
    epochs = [[shuffled.number(50 * epoch + i) for i in range(50)] for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [Shuffled(dataset, 3).number(50 + i) for i in range(50)] == epochs[1]
    assert [Shuffled(dataset, 4).number(i) for i in range(50)] != epochs[0]


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_a_position_holds_the_same_sample_at_any_dp(dp: int, tmp_path: Path) -> None:
    samples, labels = ragged()
    dataset = written(tmp_path / "d", samples, labels)
    steps = []
    for rank in range(dp):
        loader = BatchLoader(
            Shuffled(dataset, 3),
            global_batch_size=8,
            micro_batch_size=2,
            dp_rank=rank,
            dp_size=dp,
            start_sample=40,
            end_sample=64,
            collate=Collate(dataset, 6),
        )
        steps.append([(mb.tokens, mb.labels, mb.lengths) for micro_batches in loader for mb in micro_batches])
    found = [each for pass_ in zip(*steps, strict=True) for each in pass_]  # micro-batch m of rank 0, of rank 1, …
    order = [Shuffled(dataset, 3).number(position) for position in range(40, 64)]
    at = 0
    for tokens, labels_, lengths in found:
        assert tokens.shape == (2, 6)
        assert lengths is not None
        for row in range(2):
            cut = samples[order[at]][:6]
            assert tokens[row].tolist() == [*cut.tolist(), *[0] * (6 - len(cut))]
            assert (int(labels_[row]), int(lengths[row])) == (labels[order[at]], len(cut))
            at += 1
    assert at == 24


def test_an_evaluation_masks_what_fills_its_last_batch(tmp_path: Path) -> None:
    samples, labels = ragged()
    dataset = written(tmp_path / "d", samples, labels)
    evaluated = Evaluated(Shuffled(dataset, 0), 10)
    found = [evaluated[i] for i in range(12)]
    assert sorted(s.label for s in found[:10]) == sorted(labels[[Shuffled(dataset, 0).number(i) for i in range(10)]])
    assert [s.label for s in found[10:]] == [-100, -100]
    assert Collate(dataset, 9)(found).labels[10:].tolist() == [-100, -100]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("labels", "classes", "text"),
    [
        ([0, 1, -1], None, "sample 2 has label -1, allowed are 0 and more"),
        ([0, 7, 1], 7, "sample 1 has label 7, allowed are 0 to 6"),
        ([0, -100, 1], 7, "sample 1 has label -100"),
        ([0.0, 1.0, 2.0], 7, "must be whole numbers"),
        ([0, 1], 7, r"3 samples from 0 on have labels of shape \(2,\)"),
    ],
)
def test_labels_at_fault_are_named(labels: list[Any], classes: int | None, text: str, tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=text),
        ClassificationWriter(tmp_path / "d", "tokens", classes=classes) as writer,
    ):
        writer.add_tokens([[1], [2], [3]], labels)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        ([[1], [], [2]], "sample 1 has no tokens"),
        ([[1], [2, 3], [4, -2]], "sample 2 has the token -2, allowed are 0 to 9"),
        ([[1], [2, 10], [4]], "sample 1 has the token 10, allowed are 0 to 9"),
    ],
)
def test_tokens_at_fault_are_named(samples: list[list[int]], text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=text), ClassificationWriter(tmp_path / "d", "tokens", vocab_size=10) as writer:
        writer.add_tokens(samples, [0, 1, 2])


def test_features_that_are_not_finite_are_named(tmp_path: Path) -> None:
    rows = np.ones((5, 2), np.float32)
    rows[3, 1] = 1e6  # no number of float16
    with (
        pytest.raises(DataError, match="sample 3 has features that are not finite as float16"),
        ClassificationWriter(tmp_path / "d", "features", width=2, dtype="float16") as writer,
    ):
        writer.add_features(rows, np.arange(5))
    rows[3, 1] = 1
    written(tmp_path / "d", rows, np.arange(5), width=2)
    raw = np.load(tmp_path / "d.features.npy", mmap_mode="r+")
    raw[2, 0] = np.nan
    raw.flush()
    dataset = ClassificationDataset(tmp_path / "d")
    with pytest.raises(DataError, match="sample 2 has features that are not finite"):
        Collate(dataset, 1)([Shuffled(dataset, 0)[i] for i in range(5)])


def test_a_label_changed_on_disk_is_named(tmp_path: Path) -> None:
    dataset = written(tmp_path / "d", *ragged())
    np.load(tmp_path / "d.labels.npy", mmap_mode="r+")[4] = 7
    shuffled = Shuffled(ClassificationDataset(tmp_path / "d"), 0)
    with pytest.raises(DataError, match="sample 4 has label 7, allowed are 0 to 6"):
        Collate(dataset, 9)([shuffled[i] for i in range(50)])


def test_an_id_beyond_the_models_vocabulary_is_named(tmp_path: Path) -> None:
    dataset = written(tmp_path / "d", [[1], [5, 30]], np.arange(2))
    with pytest.raises(DataError, match=r"sample 1 has the token 30, and model.vocab_size is 30"):
        Collate(dataset, 9, vocab_size=30)([Shuffled(dataset, 0)[i] for i in range(2)])


def test_files_of_two_datasets_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "d", *ragged())
    written(tmp_path / "e", *ragged(40))
    (tmp_path / "e.labels.npy").replace(tmp_path / "d.labels.npy")
    with pytest.raises(DataError, match=r"d.labels.npy has shape \(40,\)"):
        ClassificationDataset(tmp_path / "d")
    (tmp_path / "d.labels.npy").write_bytes((tmp_path / "d.labels.npy").read_bytes()[:-8])
    with pytest.raises(DataError, match="it is truncated"):
        ClassificationDataset(tmp_path / "d")
    (tmp_path / "d.labels.npy").unlink()
    with pytest.raises(DataError, match=r"d.labels.npy does not exist"):
        ClassificationDataset(tmp_path / "d")
    with pytest.raises(DataError, match="give PREFIX of a dataset"):
        ClassificationDataset(tmp_path / "absent")


def test_another_dataset_under_the_name_is_noticed(tmp_path: Path) -> None:
    samples, labels = ragged()
    first = written(tmp_path / "d", samples, labels).identity
    assert written(tmp_path / "e", samples, labels).identity == first
    assert written(tmp_path / "e", samples, labels[::-1].copy()).identity != first


def test_a_failed_rewrite_leaves_the_old_dataset(tmp_path: Path) -> None:
    samples, labels = ragged()
    written(tmp_path / "d", samples, labels)
    with pytest.raises(DataError), ClassificationWriter(tmp_path / "d", "tokens") as writer:
        writer.add_tokens([[1]], [-1])
    assert len(ClassificationDataset(tmp_path / "d")) == 50
    assert not list(tmp_path.glob(".*"))


# ---- the tool ----


def inputs(tmp_path: Path, kind: str) -> Path:
    """The samples of `ragged`, in a file of that kind."""
    samples, labels = ragged()
    if kind == "parquet":
        pq.write_table(pa.table({"tokens": [s.tolist() for s in samples], "label": labels}), tmp_path / "d.parquet")
        return tmp_path / "d.parquet"
    if kind == "npz":
        offsets = np.concatenate([[0], np.cumsum([len(s) for s in samples])])
        np.savez(tmp_path / "d.npz", tokens=np.concatenate(samples), offsets=offsets, label=labels)
        return tmp_path / "d.npz"
    rows = [{"tokens": s.tolist(), "label": int(y)} for s, y in zip(samples, labels, strict=True)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "d.jsonl"


@pytest.mark.parametrize("kind", ["parquet", "npz", "jsonl"])
def test_the_tool_writes_what_each_kind_of_file_holds(kind: str, tmp_path: Path, capsys: Any) -> None:
    file = inputs(tmp_path, kind)
    assert main(["--input", str(file), "--output-prefix", str(tmp_path / "out"), "--classes", "9"]) == 0
    text = capsys.readouterr().out
    assert "50 samples, 9 classes" in text
    assert "warning: 2 classes have no sample (the first are 7, 8)" in text
    samples, labels = ragged()
    dataset = ClassificationDataset(tmp_path / "out")
    assert all(np.array_equal(dataset.get(i), s) for i, s in enumerate(samples))
    assert np.array_equal(dataset.labels, labels)


def test_texts_are_tokenised_and_cut(tmp_path: Path) -> None:
    texts = ["def f(x):\n    return x\n", "x = 1\n"]
    tok.save(tok.train(texts, vocab_size=300), tmp_path / "tokenizer")
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"text": text, "label": i}) + "\n" for i, text in enumerate(texts)))
    asked = ["--input", str(file), "--output-prefix", str(tmp_path / "out"), "--seq-len", "4"]
    assert main([*asked, "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    loaded = tok.load(tmp_path / "tokenizer")
    dataset = ClassificationDataset(tmp_path / "out")
    assert dataset.facts["tokenizer_hash"] == loaded.hash
    assert [dataset.get(i).tolist() for i in (0, 1)] == [loaded.tokenizer.encode(text).ids[:4] for text in texts]
    with pytest.raises(UserError, match="samples that are texts need --tokenizer"):
        main(asked)


def test_features_of_a_parquet_file(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    for name, column in (
        ("list", pa.array(rows.tolist())),
        ("fixed", pa.FixedSizeListArray.from_arrays(rows.ravel(), 4)),
    ):
        file = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"features": column, "label": np.arange(30)}), file)
        assert column_of(file) == "features"
        write_dataset(Asked([file], "features"), str(tmp_path / name))
        assert np.array_equal(np.load(tmp_path / f"{name}.features.npy"), rows)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"tokens": [1], "label": "x"}, "d.jsonl:2 must hold `tokens`, and a whole number under `label`"),
        ({"tokens": [1], "label": -3}, "in the block from .*d.jsonl.*: sample 1 has label -3"),
        ({"tokens": [1.5], "label": 0}, "in the block from .*d.jsonl: tokens of the samples from 0 on are float64"),
        ({"tokens": 3, "label": 0}, "in the block from .*d.jsonl"),
    ],
)
def test_rows_at_fault_are_named(row: Any, text: str, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"tokens": [1], "label": 0}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=text):
        write_dataset(Asked([file], "tokens"), str(tmp_path / "out"))
    assert not description_file(tmp_path / "out").exists()


def test_features_that_are_no_lists_are_named(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"features": 3, "label": 0}\n')
    with pytest.raises(DataError, match=r"in the block from .*d.jsonl"):
        write_dataset(Asked([file], "features"), str(tmp_path / "out"))


def test_a_file_with_texts_and_tokens_asks_which(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"tokens": [1], "text": "a", "label": 0}\n')
    with pytest.raises(DataError, match="exactly one of tokens, text, features must be there: say which with --column"):
        column_of(file)
