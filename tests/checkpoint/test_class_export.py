"""A class head's checkpoint as a folder to search in: what stands there, and that retrieval finds what evaluation ranks first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opencoder.checkpoint import hf_export
from opencoder.checkpoint.class_export import export_classes
from opencoder.checkpoint.class_folder import ClassFolder
from opencoder.data import tokenizer as tok
from opencoder.data.classification import ClassificationDataset
from opencoder.data.classification_writer import ClassificationWriter
from opencoder.errors import DataError, UserError
from opencoder.tools.export_classes import main as export_main
from opencoder.tools.retrieve import main
from tests.harness import run_ranks
from tests.train.class_cases import CLASSES, run, trainer_of, tree, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classes")
    write(path)
    return path


def trained(folder: Path, name: str, variant: str, *, ranks: int, features: bool) -> dict[str, Any]:
    given = tree(folder, name, features=features, head={"variant": variant}, train={"precision": "fp32", "steps": 2})
    run_ranks(run, ranks, given)
    return given


@pytest.mark.parametrize(("variant", "ranks", "features"), [("plain", 3, False), ("cosface", 2, True)])
def test_what_is_found_is_what_the_run_ranks_first(
    variant: str, ranks: int, features: bool, folder: Path, tmp_path: Path
) -> None:
    given = trained(folder, f"run-{variant}", variant, ranks=ranks, features=features)
    facts = export_classes(given["run_dir"], tmp_path / "out", shard_bytes=40 * 16 * 4)
    assert (facts["classes"], facts["dim"], facts["step"]) == (CLASSES, 16, 2)
    trainer = trainer_of(given)
    model = trainer.model.eval()
    order = trainer.model.order
    assert order is not None
    weight = model.lm_head.weight.detach()[order.rows_of(torch.arange(CLASSES))]
    # the shards hold the rows as trained, in order; the mapped file holds them as logits take them
    index = json.loads((tmp_path / "out" / "classes.index.json").read_text())["files"]
    assert [(each["first"], each["classes"]) for each in index] == [(0, 35), (35, 34), (69, 34)]
    rows = torch.cat([load_file(tmp_path / "out" / each["file"])["lm_head.weight"] for each in index])
    assert torch.equal(rows, weight)
    matrix = torch.from_numpy(np.fromfile(tmp_path / "out" / "classes.f32", np.float32).reshape(CLASSES, 16))
    expected = weight if variant == "plain" else torch.nn.functional.normalize(weight, dim=1)
    assert torch.allclose(matrix, expected, rtol=1e-6, atol=0)

    found = ClassFolder(tmp_path / "out")
    dataset = ClassificationDataset(given["data"]["blend"][0]["prefix"])
    if features:
        samples = np.stack([dataset.get(i) for i in range(9)])
        queries, inputs, lengths = found.features_of_numbers(samples), torch.from_numpy(samples), None
    else:
        ids = [dataset.get(i).tolist()[:8] for i in range(9)]
        queries = found.features_of_tokens(ids)
        lengths = torch.tensor([len(each) for each in ids])
        inputs = torch.tensor([each + [0] * (8 - len(each)) for each in ids])
    with torch.no_grad():
        logits, classes = model.topk(model.features(inputs, lengths), 7)
    values, got = found.search(queries, 7)
    assert torch.equal(got, classes)
    assert torch.allclose(values, logits, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def numbers(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a model that takes features."""
    given = trained(folder, "run-numbers", "plain", ranks=1, features=True)
    output = tmp_path_factory.mktemp("numbers") / "out"
    assert export_main(["--input", given["run_dir"], "--output", str(output)]) == 0
    return output


def test_a_search_in_blocks_equals_one_in_all_and_ties_go_to_the_smaller_class(
    numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ClassFolder(numbers)
    found.rows = np.repeat(found.rows[:21], 5, 0)[:CLASSES]  # rows 5i to 5i + 4 are the same
    queries = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    values, classes = found.search(queries, 12)
    logits = queries @ torch.from_numpy(found.rows).T
    for row in range(4):
        order = sorted(range(CLASSES), key=lambda c: (-round(float(logits[row, c]), 5), c))
        assert classes[row].tolist() == order[:12]
    monkeypatch.setattr("opencoder.checkpoint.class_folder.BLOCK_BYTES", 7 * 4 * (16 + 12))
    again = found.search(queries, 12)
    assert torch.equal(again[1], classes)
    assert torch.allclose(again[0], values)


def test_faiss_finds_the_same(numbers: Path) -> None:
    pytest.importorskip("faiss")
    found = ClassFolder(numbers)
    queries = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = found.search(queries, 5), found.search(queries, 5, backend="faiss")
    assert torch.equal(ours[1], theirs[1])
    assert torch.allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


def test_the_command_prints_classes_and_their_names(numbers: Path, tmp_path: Path, capsys: Any) -> None:
    np.save(tmp_path / "q.npy", np.ones((2, 12), np.float32))
    (tmp_path / "names").write_text("".join(f"f{i}\n" for i in range(CLASSES)))
    asked = ["--model", str(numbers), "--features", str(tmp_path / "q.npy"), "--names", str(tmp_path / "names")]
    assert main([*asked, "--top", "3", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["query"] for row in rows] == [1, 2]
    assert rows[0]["classes"] == rows[1]["classes"]
    assert rows[0]["names"] == [f"f{c}" for c in rows[0]["classes"]]
    assert rows[0]["logits"] == sorted(rows[0]["logits"], reverse=True)
    assert main([*asked, "--top", "1"]) == 0
    assert f"query 1    1  class {rows[0]['classes'][0]}  logit" in capsys.readouterr().out


def test_texts_are_asked_for_through_the_tokenizer_of_the_run(tmp_path: Path, capsys: Any) -> None:
    texts = [f"def f{i}(x):\n    return x + {i}\n" for i in range(8)]
    tok.save(tok.train(texts, vocab_size=300), tmp_path / "tokenizer")
    loaded = tok.load(tmp_path / "tokenizer")
    with ClassificationWriter(tmp_path / "train", "tokens", vocab_size=loaded.size) as writer:
        writer.add_tokens([loaded.tokenizer.encode(text).ids for text in texts], np.arange(8))
    given = tree(tmp_path, "r", head={"classes": 8}, train={"precision": "fp32", "steps": 30, "global_batch_size": 8})
    given["model"] |= {"vocab_size": loaded.size, "max_seq_len": 64}
    given["data"] |= {"seq_len": 32, "tokenizer": str(tmp_path / "tokenizer")}
    given["optim"]["clip_norm"] = 1.0
    run(0, 1, given)
    assert export_main(["--input", given["run_dir"], "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["--model", str(tmp_path / "out"), "--query", *texts, "--top", "1", "--json"]) == 0
    found = [json.loads(line)["classes"][0] for line in capsys.readouterr().out.splitlines()]
    assert found == list(range(8))


# ---- what is refused ----


def test_queries_that_do_not_fit_are_refused(numbers: Path, tmp_path: Path) -> None:
    found = ClassFolder(numbers)
    with pytest.raises(UserError, match="the model takes features, not tokens"):
        found.features_of_tokens([[1]])
    with pytest.raises(UserError, match=r"the queries have shape \(2, 11\), the model takes rows of 12"):
        found.features_of_numbers(np.ones((2, 11)))
    with pytest.raises(UserError, match="not finite"):
        found.features_of_numbers(np.full((1, 12), np.nan))
    with pytest.raises(UserError, match="--top 104: the model has 103 classes"):
        found.search(torch.zeros(1, 16), CLASSES + 1)
    with pytest.raises(UserError, match="exactly one of"):
        main(["--model", str(numbers)])
    (tmp_path / "names").write_text("a\n")
    with pytest.raises(UserError, match="has 1 lines, the model 103 classes"):
        main(["--model", str(numbers), "--query", "x", "--names", str(tmp_path / "names")])


def test_a_damaged_export_is_refused(numbers: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no export.json"):
        ClassFolder(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(numbers, copy)
    (copy / "classes.f32").write_bytes((numbers / "classes.f32").read_bytes()[:-4])
    with pytest.raises(DataError, match=r"classes.f32 has 6588 bytes, export.json asks for 6592"):
        ClassFolder(copy)


def test_another_folder_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    given = trained(folder, "run-foreign", "plain", ranks=1, features=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(DataError, match="exists and is no export"):
        export_classes(given["run_dir"], tmp_path / "out")
    with pytest.raises(DataError, match="use `opencoder export-classes`"):
        hf_export.export(given["run_dir"], tmp_path / "hf")
