"""The labelled cases beside detect-secrets, the table of docs/transform.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from opencoder.corpus.transform import pii
from tests.corpus.pii_cases import Score, cases

SUFFIXES = {
    "python": ".py", "javascript": ".js", "java": ".java", "c": ".c", "cpp": ".cpp", "csharp": ".cs", "go": ".go", "php": ".php",
    "ruby": ".rb", "perl": ".pl", "yaml": ".yaml", "json": ".json", "xml": ".xml", "ini": ".ini", "shell": ".sh", "sql": ".sql",
    "rust": ".rs",
}  # fmt: skip
"""detect-secrets looks for quotes by the kind of file."""


def detect_secrets_kinds(text: str, file: Path) -> set[str]:
    """What detect-secrets with its default settings finds: `secret` (it does not tell keys from passwords), `ip_address`.

    Its plugin for IPv4 is asked directly: the default filters take every string without a letter for no secret."""
    from detect_secrets import SecretsCollection
    from detect_secrets.plugins.ip_public import IPPublicDetector
    from detect_secrets.settings import default_settings

    file.write_text(text + "\n", encoding="utf-8")
    with default_settings():
        collection = SecretsCollection()
        collection.scan_file(str(file))
    found = {"secret" for _, secret in collection if secret.type != IPPublicDetector.secret_type}
    return found | ({"ip_address"} if any(True for _ in IPPublicDetector().analyze_string(text)) else set())


def by_case(split: str | None, folder: Path) -> dict[str, dict[str, Score]]:
    """Tool → `secret` (keys and passwords) and `ip_address` (IPv4) → cases with a label of it in which the tool finds any
    (right) or none (missed), and cases without in which it does (false)."""
    table = {tool: {what: [0, 0, 0] for what in ("secret", "ip_address")} for tool in ("opencoder", "detect-secrets")}
    for case in cases():
        if split not in (None, case.split) or any(
            ":" in case.text[s.start : s.end] for s in case.spans if s.kind == "ip_address"
        ):
            continue  # detect-secrets has no IPv6
        truth, ours = (
            {"secret" if s.kind in ("key", "password") else s.kind for s in spans}
            for spans in (case.spans, pii.find_pii(case.text, case.language))
        )
        theirs = detect_secrets_kinds(case.text, folder / f"case{SUFFIXES.get(case.language, '.txt')}")
        for tool, found in (("opencoder", ours), ("detect-secrets", theirs)):
            for what, counts in table[tool].items():
                counts[0] += what in found and what in truth
                counts[1] += what in found and what not in truth
                counts[2] += what not in found and what in truth
    return {tool: {what: Score(*counts, 0) for what, counts in row.items()} for tool, row in table.items()}


def test_beside_detect_secrets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("detect_secrets", reason="detect-secrets is not installed (requirements-dev.txt)")
    with capsys.disabled():
        print("\n                         keys+passwords    IPv4              (cases; P precision, R recall)")
        for split in ("tune", "held"):
            table = by_case(split, tmp_path)
            for tool, row in table.items():
                print(f"{split} {tool:16}" + "".join(f"   P {s.precision:.3f} R {s.recall:.3f}" for s in row.values()))
    for what in ("secret", "ip_address"):
        ours, theirs = table["opencoder"][what], table["detect-secrets"][what]
        assert ours.precision >= theirs.precision
        assert ours.recall >= theirs.recall
