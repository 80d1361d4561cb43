"""Every benchmark from a small file in its released form: loaded, asked, scored; the solution passes, a wrong or forging one fails."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opencoder.errors import DataError, UserError
from opencoder.eval import benchmarks, languages
from opencoder.eval.sandbox.pool import Sandbox
from opencoder.eval.score import same_text, score
from opencoder.eval.task import Task

ADD = {
    "task_id": "HumanEval/900",
    "prompt": 'def add(a, b):\n    """ Add. """\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
}
MBPP_TESTS = ["assert add(1, 2) == 3", "assert math.isclose(add(0.1, 0.2), 0.3)"]
PLUS_TEST = """
def assertion(out, exp, atol):
    assert out == exp
inputs = [[1, (2, 3)], [4, (5,)]]
results = [6, 9]
for i, (inp, exp) in enumerate(zip(inputs, results)):
    assertion(total(*inp), exp, 0)
"""
UNIT = """
import unittest
from unittest.mock import patch
class TestCases(unittest.TestCase):
    def test_value(self):
        self.assertEqual(task_func(2), 4)
    @patch('__test__.limit', 3)
    def test_patched(self):
        self.assertEqual(task_func(5), 3)
"""
COMPLETE = 'limit = 100\ndef task_func(x):\n    """ Twice x, at most limit. """\n'
FILES: dict[str, list[dict[str, Any]]] = {
    "humaneval": [{**ADD, "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n"}],
    "humaneval+": [{**ADD, "base_input": [[1, 2]], "plus_input": [[3, 4], [0.1, 0.2]], "atol": 0}],
    "mbpp": [
        *({"task_id": n, "text": f"Task {n}.", "code": "def g(x):\r\n    return x",
            "test_list": ["assert g(1) == 1"]} for n in (2, 3, 4)),
        {"task_id": 11, "text": "Add.", "code": "def add(a, b):\n    return a + b",
            "test_setup_code": "import math", "test_list": MBPP_TESTS},
        {"task_id": 600, "text": "Not of the test split.", "code": "def h(x):\n    return x", "test_list": ["assert h(1) == 1"]},
    ],
    "mbpp-sanitized": [
        {"task_id": 601, "prompt": "Sum of a pair.",
            "code": "class Pair(object):\n    def __init__(self, a, b):\n        self.a, self.b = a, b\n"
            "def both(p):\n    return p.a + p.b",
            "test_imports": [], "test_list": ["assert both(Pair(1, 2)) == 3"]},
    ],
    "mbpp+": [
        {"task_id": 5, "prompt": "Sum.", "code": "def total(a, b):\n    return a + sum(b)", "test_imports": [],
            "test_list": ["assert total(1, (2, 3)) == 6"], "test": PLUS_TEST},
    ],
    "bigcodebench": [
        {"task_id": "BigCodeBench/0", "complete_prompt": COMPLETE, "instruct_prompt": "Write task_func.",
            "canonical_solution": "    return min(2 * x, limit)\n", "test": UNIT, "entry_point": "task_func",
            "libs": "['unittest']"},
    ],
    "livecodebench": [
        {
            "question_id": "abc1", "question_content": "Print the sum.", "starter_code": "",
                "contest_date": "2024-01-01T00:00:00", "difficulty": "easy", "metadata": "{}",
            "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
            "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(json.dumps([{"input": "5 6\n",
                "output": "11.0\n", "testtype": "stdin"}])))).decode(),
        },
        {
            "question_id": "1234", "question_content": "Add.",
                "starter_code": "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n",
                "metadata": '{"func_name": "add"}',
            "public_test_cases": json.dumps([{"input": "1\n[2, 3]", "output": "6", "testtype": "functional"}]),
                "private_test_cases": "[]",
        },
    ],
    "multipl-e": [
        {"name": "HumanEval_900_add", "language": "sh", "prompt": "#!/bin/bash\n# Add.\nadd() {\n",
            "tests": "}\n\ncandidate() {\n    add \"$@\"\n}\n\n"
            "set -e\nrun_test() {\n    [[ $(candidate \"2\" \"3\") = \"5\" ]]\n}\n\nrun_test",
            "stop_tokens": ["\n}"]},
    ],
}  # fmt: skip
# benchmark → for each task: a completion that is right, an answer that is right, and programs that are wrong or forge
RIGHT: dict[str, list[tuple[str, str]]] = {
    "humaneval": [("    return a + b\n\ndef more():\n", "Here:\n```python\ndef add(a, b):\n    return a + b\n```\n")],
    "humaneval+": [("    return a + b\n", "```\ndef add(a, b): return a + b\n```")],
    "mbpp": [("def add(a, b):\n    return a + b\n[DONE]\nnoise", "```python\ndef add(a, b):\n    return a + b\n```")],
    "mbpp-sanitized": [(FILES["mbpp-sanitized"][0]["code"] + '\n"""\nnoise',
        f"```python\n{FILES['mbpp-sanitized'][0]['code']}\n```")],
    "mbpp+": [("def total(a, b):\n    return a + sum(b)\nprint(1)", "```python\ndef total(a, b):\n    return a + sum(b)\n```")],
    "bigcodebench": [
        ("    return min(2 * x, limit)\n", "```python\nlimit = 100\ndef task_func(x):\n    return min(2 * x, limit)\n```")
    ],
    "livecodebench": [
        ("print(sum(map(int, input().split())))\n```\nnoise", "```python\nprint(sum(map(int, input().split())))\n```"),
        ("class Solution:\n    def add(self, a, b: List[int]):\n        return a + sum(b)\n```",
            "```python\nclass Solution:\n    def add(self, a, b):\n        return a + sum(b)\n```"),
    ],
    "multipl-e": [("    echo $(($1 + $2))\n}\necho", "```bash\nadd() {\n    echo $(($1 + $2))\n}\n```")],
}  # fmt: skip
WRONG = {
    "bigcodebench": [
        "    return x\n",
        "    import os; os._exit(0)\n",
        "    return x\nimport unittest\n"
        "for n in ('assertEqual', 'assertTrue', 'run'): setattr(unittest.TestCase, n, lambda *a: None)\n",
        "    return x\nimport unittest\nunittest.TestCase.assertEqual = lambda *a: None\n",
        "    return x\nimport unittest\nunittest.TestResult.addFailure = unittest.TestResult.addSuccess\n",
        "    return Equal()\nclass Equal:\n    __eq__ = lambda s, o: True\n    __ne__ = lambda s, o: False\n" + "raise SystemExit(0)\n",
    ],
    "livecodebench": ["print(3)\n```", "class Solution:\n    def add(self, a, b): return 5\n```"],
    "multipl-e": ["    echo 4", "    exit 0", "    echo 5; }\nexit 0\nfoo() {\n"],
}  # fmt: skip
UNCUT = ("bigcodebench", "multipl-e")


def written(folder: Path, name: str, rows: list[dict[str, Any]] | None = None) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (FILES[name] if rows is None else rows)))
    return path


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    try:
        made = Sandbox(folders=languages.toolchain_folders())
    except UserError as error:
        pytest.skip(f"no namespaces on this machine: {error}")
    with made:
        yield made


def test_the_table_covers_every_benchmark() -> None:
    """The original tool had benchmarks that could not be built or reached."""
    assert set(FILES) == set(RIGHT) == set(benchmarks.BENCHMARKS)


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_right_programs_pass_and_wrong_ones_fail(tmp_path: Path, sandbox: Sandbox, name: str) -> None:
    tasks = benchmarks.load(name, written(tmp_path, name))
    assert len(tasks) == len(RIGHT[name])
    for task, (completion, answer) in zip(tasks, RIGHT[name], strict=True):
        for mode, text in (("completion", completion), ("chat", answer)):
            assert task.question(mode)  # type: ignore[arg-type]
            outcome = score(task, task.program(text, mode), sandbox)  # type: ignore[arg-type]
            assert outcome.status == "passed", (mode, outcome)
        for text in ("", "    return None\n", *WRONG.get(name, [])):
            # As they are: stops would cut off what a program does besides.
            whole = task.prompt + text if name in UNCUT else task.program(text, "completion")
            outcome = score(task, whole, sandbox)
            assert outcome.status == "failed", (text, outcome)


def test_mbpp_takes_the_test_split_behind_three_examples(tmp_path: Path) -> None:
    (task,) = benchmarks.load("mbpp", written(tmp_path, "mbpp"))
    assert task.id == "Mbpp/11"
    assert task.prompt.count("[BEGIN]") == 4
    assert task.prompt.count("[DONE]") == 3
    with pytest.raises(DataError, match=r"lacks tasks \[2, 3, 4\]"):
        benchmarks.load("mbpp", written(tmp_path, "mbpp", FILES["mbpp"][3:]))


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("humaneval", "prompt"),
        ("humaneval+", "canonical_solution"),
        ("mbpp", "text"),
        ("mbpp+", "test_list"),
        ("bigcodebench", "instruct_prompt"),
        ("livecodebench", "private_test_cases"),
        ("multipl-e", "stop_tokens"),
    ],
)
def test_a_missing_field_is_named_with_its_line(tmp_path: Path, name: str, field: str) -> None:
    rows = [{k: v for k, v in row.items() if k != field} for row in FILES[name]]
    with pytest.raises(DataError, match=f"line 1.*`{field}`"):
        benchmarks.load(name, written(tmp_path, name, rows))


def test_files_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean `mbpp\+`"):
        benchmarks.load("mbpp++")
    with pytest.raises(UserError, match="needs its file"):
        benchmarks.load("mbpp")
    with pytest.raises(UserError, match="does not exist"):
        benchmarks.load("mbpp", tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="twice"):
        benchmarks.load("humaneval", written(tmp_path, "humaneval", FILES["humaneval"] * 2))
    with pytest.raises(DataError, match="no task"):
        benchmarks.load("humaneval", written(tmp_path, "humaneval", []))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"task_id": \n')
    with pytest.raises(DataError, match="line 1 is not JSON"):
        benchmarks.load("humaneval", bad)


def test_a_task_file_cannot_run_code_here(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "touched"), "w"))

    packed = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    rows = [{**FILES["livecodebench"][0], "private_test_cases": packed}]
    with pytest.raises(DataError, match="only text is allowed"):
        benchmarks.load("livecodebench", written(tmp_path, "livecodebench", rows))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [("3\n", "3", True), ("3.0", "3", True), ("1 2\n3", "1 2\n3\n", True),
     ("1\n2", "1 2", False), ("a", "b", False), ("NO", "no", False)],
)  # fmt: skip
def test_texts_are_compared_by_line_and_number(found: str, expected: str, same: bool) -> None:
    assert same_text(found, expected) is same


ADD_IN = {
    "js": (
        "function add(a, b){\n",
        "  return a + b;\n}\n",
        "const assert = require('node:assert');\n\n\nfunction test() {\n  let candidate = add;\n"
        "  assert.deepEqual(candidate(2, 3),5);\n}\n\ntest();",
        ["  return 4;\n}\n", "  process.exit(0);\n}\n", "  return 4;\n}\nprocess.exit(0);\n",
         "  return 4;\n}\nrequire('node:assert').deepEqual = () => {};\n"],
    ),
    "cpp": (
        "#include <assert.h>\n#include <cstdlib>\nlong add(long a, long b) {\n",
        "  return a + b;\n",
        "}\nint main() {\n    auto candidate = add;\n    assert(candidate((2), (3)) == (5));\n}\n",
        ["  return 4;\n", "  exit(0);\n", "  return 4;\n}\n#undef assert\n#define assert(x)\nvoid other() {\n", "  return 4\n"],
    ),
    "java": (
        "class Problem {\n    public static long add(long a, long b) {\n",
        "        return a + b;\n",
        "    }\n    public static void main(String[] args) {\n    assert(add((2l), (3l)) == (5l));\n    }\n\n}\n",
        ["        return 4;\n", "        System.exit(0); return 4;\n"],
    ),
    "rs": (
        "fn add(a: isize, b: isize) -> isize {\n",
        "    a + b\n",
        "}\n\nfn main() {\n    let candidate = add;\n    assert_eq!(candidate(2, 3), 5);\n}\n",
        ["    4\n", "    std::process::exit(0)\n"],
    ),
    "go_test.go": (
        'package add_test\n\nimport (\n    "testing"\n    "fmt"\n)\n\nfunc add(a int, b int) int {\n',
        "    return a + b\n}\n",
        'func TestAdd(t *testing.T) {\n  if fmt.Sprintf("%v", add(2, 3)) != "5" {\n    t.Errorf("wrong")\n  }\n}\n',
        ["    return 4\n}\n"],
    ),
    "sh": (
        "#!/bin/bash\n# $1 and $2 are integers\nadd() {\n",
        "    echo $(($1 + $2))\n",
        '}\n\ncandidate() {\n    add "$@"\n}\n\nset -e\nrun_test() {\n    [[ $(candidate "2" "3") = "5" ]]\n}\n\nrun_test',
        ["    echo 4\n", "    exit 0\n", "    echo 4\n}\nexit 0\nother() {\n", "    echo 4\n}\nexec true\nother() {\n"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "java" else ()) for n in ADD_IN])
def test_other_languages(tmp_path: Path, sandbox: Sandbox, name: str) -> None:
    if reason := languages.missing(languages.MULTIPL_E[name]):
        pytest.skip(reason)
    prompt, right, tests, wrong = ADD_IN[name]
    row = {"name": "add", "language": name, "prompt": prompt, "tests": tests, "stop_tokens": []}
    (task,) = benchmarks.load("multipl-e", written(tmp_path, "multipl-e", [row]))
    assert isinstance(task, Task)
    outcome = score(task, task.program(right, "completion"), sandbox)
    assert outcome.status == "passed", outcome
    closing = {"cpp": "}", "rs": "}", "sh": "}", "java": "    }\n}"}.get(name, "")
    outcome = score(task, task.program(f"```\n{prompt}{right}{closing}\n```", "chat"), sandbox)
    assert outcome.status == "passed", outcome
    for text in wrong:
        outcome = score(task, task.program(text, "completion"), sandbox)
        assert outcome.status == "failed", (text, outcome)


def test_java_without_the_tuples_it_imports_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := languages.missing("java"):
        pytest.skip(reason)
    monkeypatch.setattr(benchmarks.multipl_e, "TUPLES", str(tmp_path / "absent.jar"))
    row = {"name": "a", "language": "java", "prompt": "import org.javatuples.*;\n", "tests": "}}", "stop_tokens": []}
    with pytest.raises(UserError, match="install libjavatuples-java"):
        benchmarks.load("multipl-e", written(tmp_path, "multipl-e", [row]))


def test_a_function_named_like_a_builtin_is_the_programs_and_no_other_is(tmp_path: Path, sandbox: Sandbox) -> None:
    """MBPP has a task whose function is called `sum`; a program that defines `set` or `math` must not pass by it."""
    row = {"task_id": 1, "prompt": "Sum.", "code": "def sum(a, b):\n    return a + b", "test_imports": []}
    rows = [
        {**row, "test_list": ["assert sum(10, 15) == 25"]},
        {**row, "task_id": 2, "test_list": ["assert set([sum(1, 2)]) == set([3])"]},
        {**row, "task_id": 3, "test_list": ["assert math.isclose(sum(1, 2), 3)"]},
    ]
    tasks = benchmarks.load("mbpp-sanitized", written(tmp_path, "mbpp-sanitized", rows))
    assert [score(task, row["code"], sandbox).status for task in tasks] == ["passed"] * 3
    forged = "def sum(a, b):\n    return 0\ndef set(x):\n    return 1\nclass math:\n    isclose = staticmethod(lambda a, b: True)\n"
    assert [score(task, forged, sandbox).status for task in tasks] == ["failed"] * 3


def test_a_language_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="no bash on this machine"):
        benchmarks.load("multipl-e", written(tmp_path, "multipl-e"))
