"""examples/classification: what is masked and renamed, what is held out, and that the same files give the same sets."""

from __future__ import annotations

import ast
import email
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from opencoder.config import load_config, validate
from opencoder.data import tokenizer as tok
from opencoder.data.classification import ClassificationDataset
from opencoder.errors import DataError
from opencoder.tools.class_bench.synthetic import Siblings

FOLDER = Path(__file__).parents[2] / "examples" / "classification"
sys.path.insert(0, str(FOLDER))
import crops  # noqa: E402
import extract  # noqa: E402
import functions  # noqa: E402
import run as example  # noqa: E402
import synthetic  # noqa: E402

SOURCE = '''
import os
LIMIT = 3

class Box:
    def area(self, width, height=LIMIT):
        """The area of the box."""
        global COUNT
        COUNT = width  # not a local
        try:
            total = [w * height for w in os.scandir(width)]
        except ValueError as failure:
            return self.area(str(failure))
        def inner(depth):
            return depth + total
        return inner(area_of(total), "area")
'''


def test_names_are_masked_and_locals_renamed() -> None:
    (function,), sites = functions.read_file(SOURCE.encode())
    assert (function.name, function.line) == ("area", 6)
    assert not re.search(r"\b(area|width|height|total|failure|depth|w)\b", function.text)
    assert "The area" not in function.text
    assert "COUNT = v" in function.text
    assert "self.FUNC(" in function.text
    assert "area_of(" in function.text
    assert "os.scandir(" in function.text
    ast.parse(function.text)
    assert {f"v{i}" for i in range(function.locals)} <= set(re.findall(r"\bv\d+\b", function.text))
    assert [s.name for s in sites] == ["scandir", "area", "str", "inner", "area_of"]


def test_functions_that_differ_in_names_alone_are_one_class() -> None:
    lines = ["def {0}({1}, other):", "    {1} = {1} + other", "    if {1} > 3:", "        return {0}({1} - 1, other)"]
    text = "\n".join(
        [*lines, "    print('something longer than what is said of small numbers', {1})", "    return {1} * other", ""]
    )
    (one,), _ = functions.read_file(text.format("first", "value").encode())
    (two,), _ = functions.read_file(text.format("second", "number").encode())
    assert one.key == two.key
    (other,), _ = functions.read_file(text.format("first", "value").replace("3", "4").encode())
    assert other.key != one.key


def test_a_site_hides_its_name_and_nothing_else() -> None:
    source = b"x = '\xc3\xa9'; open_all(load(1)); y.load(2)\nreload(3)\n"
    _, sites = functions.read_file(source)
    load = [s for s in sites if s.name == "load"]
    before, after = functions.site_text(source, load[0])
    assert before == "x = 'é'; open_all("
    assert after == "(1)); y.CALLEE(2)\nreload(3)\n"
    assert len(functions.sites_of(ast.parse(source), source, per_name=1)) == 3


@pytest.mark.parametrize("bad", [b"def f(:\n", b"\xff\xfe", b"x = 1\0"])
def test_what_is_no_python_gives_nothing(bad: bytes) -> None:
    assert functions.read_file(bad) == ([], [])


def test_renumbering_keeps_which_local_is_which() -> None:
    text = "v0 + v1 * v0 - v11"
    new = crops.renumbered(text, 12, random.Random(5))
    a, b, c, d = re.findall(r"v\d+", new)
    assert a == c
    assert len({a, b, d}) == 3


def test_the_held_out_crop_begins_where_no_other_does() -> None:
    text = "\n".join(f"line_{i}()" for i in range(5))
    for seed in range(20):
        held_out, train = crops.crops_of(text, 0, crops=6, tokens=32, draw=random.Random(seed))
        assert held_out.split("\n")[0] not in {crop.split("\n")[0] for crop in train}


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """Forty files that call `shared` and define functions of their own."""
    for i in range(40):
        lines = [f"def make_{i}(value):", f"    result = shared(value, {i})", "    result = shared(result, value)"]
        body = "\n".join(
            [
                *lines,
                f"    label = 'a text that makes the function long {i}'",
                f"    return other_{i}(result)",
                "",
            ]
        )
        path = tmp_path / "code" / f"m{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(body)
    return tmp_path / "code"


def test_any_number_of_workers_gives_the_same_and_files_are_held_out(code: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        facts = extract.extract([code], tmp_path / str(workers), classes=30, callee_sites=5, workers=workers)
        assert facts["function classes"] == 30
        assert facts["callee classes"] == 1
    for name in ("functions", "callees", "sites"):
        one, two = (pq.read_table(tmp_path / w / f"{name}.parquet") for w in ("1", "2"))
        assert one.equals(two), name
    files = [extract.Source("", f"code/m{i}.py") for i in range(40)]
    held_out = sum(map(extract.is_held_out, files))
    sites = pq.read_table(tmp_path / "1" / "sites.parquet").to_pydict()
    assert 0 < held_out < 20
    assert sum(sites["held_out"]) == 2  # of a class at most two, and at most 24 for training
    assert len(sites["held_out"]) == 2 + 24
    assert not any("shared" in before + after for before, after in zip(sites["before"], sites["after"], strict=True))


def test_crops_are_written_with_their_labels(code: Path, tmp_path: Path) -> None:
    extract.extract([code], tmp_path, classes=0, callee_sites=5, workers=1)
    texts = pq.read_table(tmp_path / "functions.parquet")["text"].to_pylist()
    tokenizer = tok.train(texts, vocab_size=400)
    assert crops.write("functions", tmp_path, tokenizer, tmp_path, crops=3, tokens=24, seed=1) == (120, 40)
    train, held_out = (pq.read_table(tmp_path / f"{side}.parquet").to_pydict() for side in ("train", "held_out"))
    assert held_out["label"] == list(range(40))
    assert train["label"] == [i for i in range(40) for _ in range(3)]
    assert max(map(len, train["tokens"])) <= 24
    assert crops.write("calls", tmp_path, tokenizer, tmp_path / "calls", crops=3, tokens=24, seed=1) == (24, 2)
    (text,) = {
        tokenizer.decode(t) for t in pq.read_table(tmp_path / "calls" / "held_out.parquet")["tokens"].to_pylist()[:1]
    }
    assert "CALLEE" in text


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent does not exist"):
        extract.sources([tmp_path / "absent"])
    with pytest.raises(DataError, match=r"no \.py file"):
        extract.sources([tmp_path])


def test_synthetic_sets_are_what_the_generator_says_and_fit_their_configuration(tmp_path: Path) -> None:
    sizes = ["--classes", "300", "--dim", "8", "--samples", "1000", "--held-out", "50"]
    assert synthetic.main(["--output", str(tmp_path), *sizes]) == 0
    train, held_out = (ClassificationDataset(tmp_path / side) for side in ("train", "held_out"))
    features, labels = Siblings(300, 8).samples(np.arange(1000))
    assert np.array_equal(train.labels, labels)
    assert np.abs(train.inputs - features).max() < 2e-3  # float16
    assert len(held_out) == 50
    assert not np.array_equal(held_out.inputs, train.inputs[:50])
    validate(load_config(tmp_path / "classes.yaml", []), 1)


def test_a_small_run_learns_to_know_functions_again(tmp_path: Path) -> None:
    output, package = tmp_path / "out", str(Path(email.__file__).parent)
    how = ["--output", output, "--input", package, "--task", "functions", "--methods", "full", "--steps", "20"]
    run = [sys.executable, FOLDER / "run.py", *how, "--classes", "150"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((output / "report.json").read_text())["tasks"].values()
    assert found["data"]["classes"] == 150
    assert found["runs"]["full"]["accuracy"] > 20 / 150, "twenty times what guessing gives"
    assert {"plot.png", "report.html", "report.md"} <= {path.name for path in output.iterdir()}
    results = json.loads((output / "report.json").read_text())
    results["tasks"]["calls"] = found
    example.write_report(results, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert [page.count(text) for text in ("<table>", "<tr>", "<td>full", "---")] == [2, 4, 2, 0]
    again = subprocess.run(run, capture_output=True, text=True, check=False, timeout=300)
    assert again.returncode == 0
    assert "step 1/" not in again.stdout, "what is done is not done again"
