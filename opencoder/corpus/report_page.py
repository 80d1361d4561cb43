"""report.html and timings.html: pages that need neither network nor script, for a phone and for a desk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from . import dedup
from .report_text import marked_pair, visible
from .stages.near import PAIR_CHARS

STAGES = {
    "failed": "could not be opened or taken apart",
    "read": "empty, too large, not text, or of a repository with few stars",
    "language": "of no known language, or of a type that is left out",
    "exact_dedup": "same bytes as another file",
    "fuzzy_dedup": "near-duplicate of another file",
    "transform": "licence not on the list, or nothing left without its header",
    "rules": "hit by a quality rule",
    "decontaminate": "holds a benchmark task",
    "sample": "over the budget of its language",
}
TASKS = {
    "read": "read, decode, tell the language",
    "exact": "exact copies, numbers of the others",
    "licences": "licences of folders",
    "fuzzy": "MinHash, band keys, groups",
    "groups": "what each group keeps, true similarities",
    "judge": "transform, signals, rules, benchmarks",
    "sample": "budgets of languages",
    "output": "write the parts",
}
ROWS = 20
"""Rows of a table in sight; the others are folded in below."""
CURVE_BOX = (310.0, 150.0)
"""Width and height of the S-curve's plot in units of its SVG."""


def report(result: Mapping[str, Any]) -> str:
    """report.html of a report. It does not depend on `timings`."""
    recipe = result["dedup"]
    return _environment().get_template("report.html.j2").render(
        **result,
        stages=STAGES,
        shown=ROWS,
        stage_cells={row["language"]: _by_stage(row) for row in result["by_language"]},
        languages_of=_languages_of(result["by_language"]),
        rules={f"rules: {row['rule']}": row for row in result["by_rule"]},
        kept_tables=[group["table"] for group in result["kept_by_table"]],
        sizes={kind: size_classes(result["clusters"][kind]["sizes"]) for kind in ("exact", "fuzzy")},
        pairs=[marked_pair(row["excerpt"], row["kept_excerpt"], cut=PAIR_CHARS) for row in result["clusters"]["examples"]],
        excerpt_chars=PAIR_CHARS,
        curve=curve(recipe["bands"], recipe["rows"]),
    )  # fmt: skip


def timings(seconds: Mapping[str, float]) -> str:
    """timings.html: `timings` of the report, which stands apart because it differs from run to run."""
    whole = {"total", "tasks", "cpu", "peak_worker_bytes", "peak_driver_bytes"}
    known = [*TASKS, *(name for name in seconds if name not in TASKS)]
    stages = {name: seconds[name] for name in known if name in seconds and name not in whole}
    return (
        _environment()
        .get_template("timings.html.j2")
        .render(whole={k: seconds[k] for k in whole}, stages=stages, labels=TASKS)
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        size=human_size,
        count=lambda n: f"{n:,}",
        percent=human_share,
        number=human_number,
        duration=human_duration,
        inline=visible,
        text=lambda text: visible(text, lines=True),
    )
    environment.globals.update(bar=bar)
    return environment


# ---- numbers ----


def human_size(n: float) -> str:
    """12,345,678 → 12.3 MB, with a space that does not break. SI units."""
    if n < 1000:
        return f"{n:.0f}\u00a0B"
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        n /= 1000
        if n < 999.95 or unit == "PB":  # 999.95 would be rounded to 1000.0
            return f"{n:,.1f}\u00a0{unit}"
    raise AssertionError(n)


def human_share(share: float) -> str:
    """0.1234 → 12.3%; neither all nor nothing is claimed of what is only nearly so."""
    if 0 < share < 0.001:
        return "<\u00a00.1%"
    if 0.999 < share < 1:
        return ">\u00a099.9%"
    return f"{share:.1%}"


def human_duration(seconds: float) -> str:
    """0.715 → 0.7 s, 203.6 → 3 min 24 s, 9000 → 2 h 30 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def human_number(x: float) -> str:
    """1234567.0 → 1,234,567; 0.123456 → 0.1235."""
    return f"{x:,.0f}" if float(x).is_integer() else f"{x:,.4g}"


def bar(whole: float, kept: float, gone: float = 0) -> Markup:
    """Shares of `whole` as a bar. The numbers stand beside it, so it is nothing to read aloud."""
    shares = [100 * part / whole if whole else 0 for part in (kept, gone)]
    return Markup(
        '<div class="bar" aria-hidden="true"><i style="width:{:.2f}%"></i><i class="gone" style="width:{:.2f}%"></i></div>'
    ).format(*shares)


# ---- tables ----


def _by_stage(row: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """stage → files and bytes of a language that it drops."""
    files, volume = Counter[str](), Counter[str]()
    for reason, cell in row["dropped"].items():
        stage = reason.partition(": ")[0]
        files[stage] += cell["files"]
        volume[stage] += cell["bytes"]
    found = {stage: (n, volume[stage]) for stage, n in files.items()}
    return found | {"failed": (row["failed"], row["failed_bytes"])}


def _languages_of(by_language: list[dict[str, Any]]) -> dict[str, list[tuple[str, int]]]:
    """reason → languages and files, the most files first."""
    found: dict[str, list[tuple[str, int]]] = {}
    for row in by_language:
        for reason, cell in row["dropped"].items():
            found.setdefault(reason, []).append((row["language"], cell["files"]))
    return {reason: sorted(rows, key=lambda r: (-r[1], r[0])) for reason, rows in found.items()}


class SizeClass(NamedTuple):
    """Clusters of about one size, the file that is kept included."""

    label: str
    clusters: int
    files: int


def size_classes(sizes: Mapping[str, int]) -> list[SizeClass]:
    """Clusters by size: 2, 3, 4, 5–8, 9–16 and so on, each class with its clusters and their files."""
    found: dict[tuple[int, int], list[int]] = {}
    for size, n in ((int(k), v) for k, v in sizes.items()):
        top = 1 << (size - 1).bit_length()
        bounds = (size, size) if size <= 4 else (top // 2 + 1, top)
        row = found.setdefault(bounds, [0, 0])
        row[0] += n
        row[1] += n * size
    return [SizeClass(f"{a:,}" if a == b else f"{a:,}–{b:,}", *row) for (a, b), row in sorted(found.items())]


# ---- the S-curve ----


class Curve(NamedTuple):
    """The S-curve for an SVG plot of CURVE_BOX."""

    points: str
    start: float
    """Similarity at the left edge; 1 is at the right one."""
    ticks: list[tuple[float, str]]
    """x and label."""
    found: list[tuple[str, float]]
    """Chance and the similarity at which pairs have it."""
    threshold_x: float


def curve(bands: int, rows: int) -> Curve:
    """Chance that a pair is found, by its Jaccard similarity; the plot begins where the chance begins to be seen."""
    start = max(s for s in (0.0, 0.5, 0.8, 0.9) if s == 0 or dedup.candidate_probability(s, bands, rows) < 0.03)
    width, height = CURVE_BOX
    steps = 200
    values = [start + (1 - start) * i / steps for i in range(steps + 1)]
    chances = [dedup.candidate_probability(j, bands, rows) for j in values]
    points = " ".join(f"{width * i / steps:.1f},{height * (1 - p):.1f}" for i, p in enumerate(chances))
    ticks = [(width * k / 5, f"{start + (1 - start) * k / 5:.3g}") for k in range(6)]
    found = [(f"{p:.0%}", (1 - (1 - p) ** (1 / bands)) ** (1 / rows)) for p in (0.05, 0.5, 0.95)]
    at = (dedup.threshold(bands, rows) - start) / (1 - start)
    return Curve(points, start, ticks, found, width * at)
