"""Documents with columns (jsonl lines, parquet rows) to records: which column is which.

The names are those of build-corpus itself, The Stack v1 and v2, and RefineCode; docs/sources.md has the table. Where
several are present, the first in the list that is not null counts."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

from opencoder.corpus_config import CorpusConfig
from opencoder.errors import DataError

from .items import Item
from .record import Record, judge_bytes, printable

TEXT = ("text", "content")
PATH = ("path", "max_stars_repo_path", "sub_path", "file_path", "file_name")
REPO = ("repo", "repo_name", "max_stars_repo_name")
STARS = ("stars", "star_events_count", "max_stars_count")
TIME = ("commit_time", "committer_date", "revision_date", "visit_date")
LICENCE = ("licence", "license", "licenses", "detected_licenses", "max_stars_repo_licenses", "gha_license_id")
LICENCE_TYPE = ("licence_type", "license_type")
BLOB = ("blob_id", "hexsha")
LANGUAGE = ("program_lang", "language", "lang")
FILES = "files"
"""A list of files in one row: The Stack v2's lists for training are grouped by repository."""
COLUMNS = frozenset((*TEXT, *PATH, *REPO, *STARS, *TIME, *LICENCE, *LICENCE_TYPE, *BLOB, *LANGUAGE, FILES))


def check_names(where: str, names: list[str]) -> None:
    """Raise DataError if no column holds text."""
    if {*TEXT, FILES} & set(names):
        return
    hint = "rename one"
    if {"blob_id", "content_id"} & set(names):
        hint = (
            "these are ids of contents; fetch the contents first (Software Heritage keeps them by blob_id) and put them in "
            "`content`"
        )
    raise DataError(f"{where} has no column `text` or `content`; it has {', '.join(names)}: {hint}")


def documents(item: Item, name: str, row: dict[str, Any], config: CorpusConfig) -> Iterator[Record]:
    """The record of a row, or those of the files in its list. `name` stands for a path that is not given."""
    files = row.get(FILES)
    if files is None or _first(row, TEXT) is not None:
        yield document(item, name, row, config)
        return
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        yield Record(name, item.source).fail(f"`{FILES}` is a {type(files).__name__}, not a list of files")
        return
    shared = {key: value for key, value in row.items() if key != FILES}
    for number, file in enumerate(files):
        known = {key: value for key, value in file.items() if value is not None}
        yield document(item, f"{name}.{number}", shared | known, config)


def document(item: Item, name: str, row: dict[str, Any], config: CorpusConfig) -> Record:
    """The record of one document; one with a field that cannot be what it says is failed."""
    path = _first(row, PATH)
    record = Record(name if path is None else printable(str(path)), item.source)
    try:
        record.repo = _string(row, REPO) or item.repo_of(record.path, config.read)
        record.stars, record.commit_time = _whole_number(row, STARS), _time(row)
        record.licence = _string(row, LICENCE)
        record.licence_type, record.blob_id = _string(row, LICENCE_TYPE), _string(row, BLOB)
        record.language = _string(row, LANGUAGE)
    except ValueError as error:
        return record.fail(f"document {name}: {error}")
    text = _first(row, TEXT)
    if isinstance(text, bytes):
        return judge_bytes(record, text, config)
    if not isinstance(text, str):
        return record.fail(f"document {name}: the text is {type(text).__name__}, not a string")
    try:
        return judge_bytes(record, text.encode("utf-8"), config, text)
    except UnicodeEncodeError:  # half of a surrogate pair: judged, and dropped, as bytes that are not UTF-8
        return judge_bytes(record, text.encode("utf-8", "surrogatepass"), config)


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        if (value := row.get(name)) is not None:
            return value
    return None


def _string(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """A string, or the strings of a list joined by commas; an empty one is no value."""
    value = _first(row, names)
    if isinstance(value, (list, tuple)):
        value = ",".join(str(part) for part in value if part is not None)
    return printable(str(value)) if value not in (None, "") else None


def _whole_number(row: dict[str, Any], names: tuple[str, ...]) -> int | None:
    value = _first(row, names)
    if value is None or value == "":
        return None
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"`{next(n for n in names if row.get(n) is not None)}` is {value!r:.80}, not a number"
        ) from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{number:.3e} stars are not a number of 64 bits")
    return number


def _time(row: dict[str, Any]) -> int | None:
    """Unix seconds from a number, a datetime or an ISO 8601 string; a time without a zone is UTC."""
    value = _first(row, TIME)
    if value is None or value == "":
        return None
    try:
        if isinstance(value, str) and not value.lstrip("-").isdigit():
            value = datetime.datetime.fromisoformat(value)
        if isinstance(value, datetime.datetime):
            zone = value.tzinfo or datetime.UTC
            return int(value.replace(tzinfo=zone).timestamp())
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"the commit time is {value!r:.80}: give Unix seconds or ISO 8601") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError("the commit time is not a number of 64 bits")
    return number
