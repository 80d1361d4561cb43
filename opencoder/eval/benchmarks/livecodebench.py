"""LiveCodeBench, code generation: contest problems, either a program that reads and writes text or a method of `Solution`."""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

from opencoder.errors import DataError

from ..task import Judge, Task, TextCases, need
from . import files

PRELUDE = (
    "import sys, os, re, math, random, string, json, copy, heapq, bisect, itertools, functools, collections, operator, datetime, io\n"
    "from collections import *\nfrom heapq import *\nfrom bisect import *\nfrom itertools import *\nfrom functools import *\n"
    "from math import *\nfrom typing import *\nfrom copy import *\nfrom string import *\nfrom operator import *\n"
    "from datetime import *\npow = __builtins__['pow'] if isinstance(__builtins__, dict) else __builtins__.pow\n"
    "sys.setrecursionlimit(50000)\n"
)
"""What contest sites import for their users. `pow` stays the builtin one, which takes a modulus."""
ASK = (
    "You will be given a question (problem specification) and will generate a correct Python program that matches the specification "
    "and passes all tests.\n\n### Question:\n{content}\n\n### Format: {form}\n```python\n{starter}\n```\n\n"
    "### Answer: (use the provided format with backticks)\n\n"
)
METHOD = "You will use the following starter code to write the solution to the problem and enclose your code within delimiters."
TEXT = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample inputs). Enclose "
    "your code within delimiters as follows."
)


def load(path: str | Path | None) -> list[Task]:
    """All problems of a file; `contest_date` and `difficulty` are among their facts."""
    return [_task(where, row) for where, row in files.rows(str(path))]


def _task(where: str, row: dict[str, Any]) -> Task:
    tests = [*_tests(row, "public_test_cases", where), *_tests(row, "private_test_cases", where)]
    if not tests:
        raise DataError(f"{where} has no test cases")
    starter = row.get("starter_code") or ""
    content = need(row, "question_content", str, where)
    if tests[0].get("testtype") == "functional":
        name = json.loads(need(row, "metadata", str, where)).get("func_name", "")
        if not name:
            raise DataError(f"{where}: `metadata` names no `func_name`, which a problem with starter code needs")
        cases = [
            [[json.loads(line) for line in t["input"].split("\n") if line], json.loads(t["output"])] for t in tests
        ]
        job = {"mode": "cases", "entry_point": f"Solution.{name}", "cases": json.dumps(cases), "tolerance": 0.0}
        scoring: Judge | TextCases = Judge(job)
    else:
        scoring = TextCases([(t["input"], t["output"]) for t in tests])
    ask = ASK.format(content=content, form=METHOD if starter else TEXT, starter=starter or "# YOUR CODE HERE")
    facts = {name: str(row[name]) for name in ("contest_date", "difficulty", "platform") if row.get(name)}
    return Task(
        str(need(row, "question_id", str, where)), ask + "```python\n", scoring, instruction=ask, stops=("\n```",),
        prefix=PRELUDE, prompt_is_code=False, facts=facts,
    )  # fmt: skip


def _tests(row: dict[str, Any], name: str, where: str) -> list[dict[str, str]]:
    """Test cases as JSON text, or, as the private ones are released, base64 of zlib of a pickle of JSON text."""
    text = need(row, name, str, where)
    try:
        try:
            cases = json.loads(text)
        except ValueError:
            cases = json.loads(_Text(io.BytesIO(zlib.decompress(base64.b64decode(text, validate=True)))).load())
    except (ValueError, TypeError, binascii.Error, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise DataError(f"{where}: `{name}` is neither JSON nor its packed form: {error}") from error
    if not isinstance(cases, list) or not all(isinstance(c, dict) and {"input", "output"} <= c.keys() for c in cases):
        raise DataError(f"{where}: `{name}` is no list of cases with `input` and `output`")
    return cases


class _Text(pickle.Unpickler):
    """Reads pickles of builtin values only: a file of tasks must not run code here."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}; only text is allowed")
