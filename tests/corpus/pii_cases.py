"""The labelled cases of data/pii.jsonl: made up, no real person, address in use or secret among them.

A case's text marks what must be found as ⟦kind|value⟧ (kind `ip` for IP addresses). The sign ¦ stands inside tokens so that no
scanner of repositories takes them for real; loading removes it. `split` is `tune` or `held`: the rules
were never adjusted to the held third."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from opencoder.corpus.transform.pii import find_pii
from opencoder.corpus.transform.spans import PiiSpan

FILE = Path(__file__).parent / "data" / "pii.jsonl"
_MARK = re.compile(r"⟦(email|ip|key|password|name)\|(.*?)⟧", re.DOTALL)


class Case(NamedTuple):
    id: int
    group: str
    language: str
    split: str
    text: str
    spans: list[PiiSpan]


@cache
def cases() -> list[Case]:
    found = []
    for line in FILE.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text, spans, position = "", [], 0
        marked = row["text"].replace("¦", "")
        for mark in _MARK.finditer(marked):
            text += marked[position : mark.start()]
            kind = "ip_address" if mark[1] == "ip" else mark[1]
            spans.append(PiiSpan(len(text), len(text) + len(mark[2]), kind))  # type: ignore[arg-type]
            text += mark[2]
            position = mark.end()
        found.append(Case(row["id"], row["group"], row["language"], row["split"], text + marked[position:], spans))
    return found


class Score(NamedTuple):
    right: int
    """Spans found that a label of the same kind overlaps."""
    false: int
    missed: int
    exact: int
    """Of the right ones, those with the labelled bounds."""

    @property
    def precision(self) -> float:
        return self.right / max(1, self.right + self.false)

    @property
    def recall(self) -> float:
        return self.right / max(1, self.right + self.missed)


def score(kind: str, split: str | None) -> Score:
    """Spans of one kind over the cases of a split (None: all)."""
    right = false = missed = exact = 0
    for case in cases():
        if split not in (None, case.split):
            continue
        found = [s for s in find_pii(case.text, case.language) if s.kind == kind]
        truth = [s for s in case.spans if s.kind == kind]
        hits = [s for s in found if any(s.start < t.end and t.start < s.end for t in truth)]
        right += len(hits)
        false += len(found) - len(hits)
        missed += sum(not any(s.start < t.end and t.start < s.end for s in found) for t in truth)
        exact += len(set(hits) & set(truth))
    return Score(right, false, missed, exact)
