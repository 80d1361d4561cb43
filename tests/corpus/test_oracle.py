"""Compat mode against the published filter on its 2,764 files; every signal that this version has is compared."""

from __future__ import annotations

import json

import pytest

from opencoder.corpus.language import tables
from opencoder.corpus.signals import LANGUAGE_SIGNALS, general
from opencoder.corpus.signals.differences import EFFECTS, VERDICTS

from . import oracle, oracle_files

pytestmark = oracle_files.needs_oracle


@pytest.fixture(scope="module")
def agreement() -> oracle.Agreement:
    found = oracle.run(workers=2)
    print(oracle.report(found))
    return found


def test_every_signal_is_compared(agreement: oracle.Agreement) -> None:
    general_names = {f"qsc_doc_{n}" for n in general.TEXT} | {f"qsc_code_{n}" for n in general.CODE}
    assert set(agreement.files) == general_names | {n for group in LANGUAGE_SIGNALS.values() for n in group}
    assert sum(agreement.files.values()) > 69_000


def test_signals_equal_the_published_ones(agreement: oracle.Agreement) -> None:
    for name, files in agreement.files.items():
        wrong = agreement.wrong[name]
        assert len(wrong) <= max(3, 0.03 * files), (name, len(wrong), files, wrong[:3])
    pairs, off = sum(agreement.files.values()), sum(map(len, agreement.wrong.values()))
    assert off <= 0.005 * pairs, oracle.report(agreement)


def test_verdicts_equal_the_published_ones(agreement: oracle.Agreement) -> None:
    assert agreement.verdicts == 2764
    assert len(agreement.wrong_verdicts) <= 0.005 * agreement.verdicts, agreement.wrong_verdicts[:10]


def test_languages_equal_the_published_ones(agreement: oracle.Agreement) -> None:
    assert agreement.languages == []


def test_language_tables_hold_the_published_decisions() -> None:
    truth = json.loads(oracle_files.path_of("languages.json").read_text(encoding="utf-8"))
    assert tables().extensions == truth["extensions"]
    assert tables().filenames == truth["filenames"]
    assert tables().doc_types == truth["doc_types"]
    reachable = {*truth["extensions"].values(), *truth["filenames"].values()}
    assert len(reachable) == 644
    assert sum(tables().doc_types[language] == "excluded" for language in reachable) == 34


@pytest.mark.slow
def test_the_page_tells_the_measured_effect_of_the_differences() -> None:
    assert oracle.effects() == (EFFECTS, VERDICTS)
