"""The page docs/rules.md, made from rules.yaml and the list of differences."""

from __future__ import annotations

from .rules import CODE_TABLES, TEXT_TABLES, Rule, groups_of, load_rules
from .signals.differences import DIFFERENCES, EFFECTS, VERDICTS
from .signals.languages import c_family, csharp, go, html, java, javascript, python

_HEAD = """# Signals and rules

Made by `python -m opencoder.corpus.rules > docs/rules.md` from `opencoder/corpus/rules.yaml`, the only place that knows
thresholds; edit that file, not this page.

`compute-signals` gives each file the signals of its group: prose has `qsc_doc_…`; code and data have `qsc_code_…` and, in
eight languages, `qsc_code<language>_…`. A rule compares a signal with the threshold of the file's table, and any hit
drops the file. A signal without a value never drops. Prose has the table `text_zh` if it is Chinese, else `text_en`. Code
and data of shell, sql, python, cpp, c, csharp, go, html, java and javascript have their own; all other data has `data`, all
other code `others`. Files of unknown and of excluded types are dropped before.

Normalised words: control characters deleted, punctuation turned into spaces, lower case, NFKC; then runs of word
characters or of other symbols. A code line is a line of the text without comments that is not blank."""


_COMPAT = """`compute-signals --compat` reproduces the published filter: on 2,764 real files in 33 languages all of 77,173 values are
equal within 1e-6, so no signal is below 99.9 %, and all verdicts agree, the rules with a draw aside
(`python -m tests.corpus.oracle`). The default mode differs on purpose:"""


def conditions_of(rule: Rule, group: str) -> str:
    """When the rule drops, e.g. "< 50 · data: < 50 or > 5000 · html: off"; a dash if it never does."""
    tables = [t for t in (*TEXT_TABLES, *CODE_TABLES) if group in groups_of(t)]
    by_table = {table: " or ".join(rule.conditions(table)) or "off" for table in tables}
    usual = max(dict.fromkeys(by_table.values()), key=list(by_table.values()).count)
    if set(by_table.values()) == {"off"}:
        return "–"
    if len(tables) == len(TEXT_TABLES) and len(set(by_table.values())) > 1:
        return " · ".join(f"{table}: {text}" for table, text in by_table.items())
    parts = [f"{table}: {text}" for table, text in by_table.items() if text != usual]
    if usual == "off" and len(parts) == 1:
        return parts[0]
    chance = f", in {rule.probability:.0%} of the files" if rule.probability < 1 else ""
    return " · ".join([usual, *parts]) + chance


def _section(title: str, group: str) -> list[str]:
    lines = [f"## {title}", "", "| signal | quantity | unit | dropped if | |", "|---|---|---|---|---|"]
    for rule in load_rules():
        if group in rule.groups:
            cells = (f"`{rule.published(group)}`", rule.quantity, rule.unit, conditions_of(rule, group), rule.doc)
            lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def page() -> str:
    """The whole page."""
    lines = [_HEAD, "", *_section("Prose", "doc"), *_section("Code and data", "code")]
    groups = dict.fromkeys(group for rule in load_rules() for group in rule.groups)
    for group in [g for g in groups if g not in ("doc", "code")]:
        lines += _section(group.capitalize(), group)
    lines += ["## Differences from the published filter", ""]
    lines += [_COMPAT, ""]
    lines += ["| touches | published | default mode |", "|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in difference) + " |" for difference in DIFFERENCES]
    for module in (python, c_family, csharp, go, html, java, javascript):
        title, _, rest = (module.__doc__ or "").strip().partition("\n")
        lines += ["", f"### {title.rstrip('.')}", "", rest.strip()]
    lines += ["", "## Effect of the differences", ""]
    lines += ["On 2,764 real files in 33 languages (`python -m tests.corpus.oracle --default`):", ""]
    lines += [f"- {what}: {count}" for what, count in VERDICTS.items()]
    lines += ["", "| signal | files whose value differs | files whose hit differs |", "|---|---|---|"]
    lines += [f"| `{name}` | {values} | {hits} |" for name, (values, hits) in EFFECTS.items()]
    return "\n".join(lines) + "\n"
