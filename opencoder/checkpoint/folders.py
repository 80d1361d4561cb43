"""The checkpoint folders of a run: their names, which one is meant, whether one is intact, and which may go.

A manifest lists every file of a checkpoint with its size and CRC-32 (sizes alone in those of earlier versions)."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from opencoder.errors import DataError
from opencoder.files import FileFacts, facts_of, remove_directory, write_json
from opencoder.parallel.mesh import SINGLE, Group

from .together import together

MANIFEST_FORMAT = 2
log = logging.getLogger("opencoder")


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step that a folder is named after."""
    return int(folder.name.removeprefix("step_"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run under their final names, oldest first."""
    return sorted(p for p in (run_dir / "checkpoints").glob("step_*") if p.is_dir() and p.name[5:].isdigit())


def candidates(run_dir: Path) -> list[Path]:
    """Checkpoints in the order in which they are tried: the one `latest` names, then the others, newest first."""
    found = list_checkpoints(run_dir)[::-1]
    latest = run_dir / "checkpoints" / "latest"
    if latest.is_file():
        named = latest.parent / latest.read_text(encoding="utf-8").strip()
        found = [named] + [folder for folder in found if folder != named]
    return found


def resolve(path: str | Path) -> Path:
    """The checkpoint folder meant by a checkpoint or run folder (its latest, or the newest whole one if that is damaged,
    which is told). Raises DataError if there is none; checksums are compared when it is loaded."""
    folder = Path(path)
    if (folder / "state.json").is_file():
        return folder
    found = candidates(folder)
    if not found:
        raise DataError(f"{folder} is no checkpoint and no run folder with one: give RUN or RUN/checkpoints/step_…")
    chosen, problems = _first_without_problem(found, size_problem)
    _tell(chosen, problems)
    return chosen


def newest_intact(run_dir: Path, world: Group = SINGLE, *, before: int | None = None) -> Path | None:
    """The checkpoint to resume from, the same on all ranks: the newest whose every byte is as it was written, or None if
    the run has none at all (with `before`: none of an earlier step). Going back to an older one is told in one line;
    DataError if none is intact.

    What a kill left of a save is removed: call it before the run saves anything."""
    found: list[Path] = []
    with together(world, f"{run_dir}/checkpoints cannot be read", "look at its permissions"):
        if world.rank == 0:
            clear_leftovers(run_dir)
            found = candidates(run_dir)
    found = [folder for folder in world.gather_objects(found)[0] if before is None or step_of(folder) < before]
    if not found:
        return None
    try:
        chosen, problems = _first_without_problem(found, lambda folder: problem_of(folder, world))
    except DataError as error:
        error.told_elsewhere = world.rank != 0
        raise
    if world.rank == 0:
        _tell(chosen, problems)
    return chosen


def _first_without_problem(found: list[Path], look: Any) -> tuple[Path, list[str]]:
    problems: list[str] = []
    for folder in found:
        problem = look(folder)
        if problem is None:
            return folder, problems
        problems.append(problem)
    others = f" (none of the {len(found)} checkpoints there is intact)" if len(found) > 1 else ""
    raise DataError(problems[0] + others)


def _tell(chosen: Path, problems: list[str]) -> None:
    if problems:
        log.warning("WARNING: %s. Going back to %s", "; ".join(problems), chosen.name)


# ---- integrity ----


def write_manifest(folder: Path, known: dict[str, FileFacts]) -> None:
    """Write manifest.json over all files of `folder`; those in `known` (by relative name) are not read again."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = (known[name] if name in known else facts_of(path))._asdict()
    write_json(folder / "manifest.json", {"format": MANIFEST_FORMAT, "files": files})


def read_manifest(folder: Path) -> dict[str, tuple[int, str | None]]:
    """File → (bytes, CRC-32 or None where an earlier version wrote none). Raises DataError."""
    manifest = read_json(folder / "manifest.json")
    if manifest.get("format") not in (1, MANIFEST_FORMAT):
        raise DataError(
            f"{folder}/manifest.json has format {manifest.get('format')}; this version reads 1 and {MANIFEST_FORMAT}"
        )
    return {
        name: (facts, None) if isinstance(facts, int) else (facts["bytes"], facts["crc32"])
        for name, facts in manifest["files"].items()
    }


def size_problem(folder: Path) -> str | None:
    """What a look at the files' sizes says against the checkpoint, or None."""
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return str(error)
    for name, (size, _) in manifest.items():
        file = folder / name
        if not file.is_file():
            return f"checkpoint {folder} lacks {name}: copy it back or use an earlier checkpoint"
        if (found := file.stat().st_size) != size:
            return (
                f"checkpoint {folder}: {name} has {found} bytes instead of {size}: copy it again or use an earlier "
                "checkpoint"
            )
    return None


def problem_of(folder: Path, world: Group = SINGLE) -> str | None:
    """What speaks against the checkpoint, or None; the same answer on all ranks, which read its files in turn."""
    mine = size_problem(folder)
    if mine is None:
        try:
            mine = _sum_problem(folder, world)
        except OSError as error:
            mine = f"checkpoint {folder}: {error}"
    return next((problem for problem in world.gather_objects(mine) if problem is not None), None)


def _sum_problem(folder: Path, world: Group) -> str | None:
    for i, (name, (_, crc32)) in enumerate(sorted(read_manifest(folder).items())):
        if crc32 is None or i % world.size != world.rank:
            continue
        if (found := facts_of(folder / name).crc32) != crc32:
            return (
                f"checkpoint {folder}: {name} has CRC-32 {found} instead of {crc32}, so bytes in it have changed: copy it "
                "again or use an earlier checkpoint"
            )
    return None


def check_files(folder: Path, world: Group = SINGLE) -> None:
    """Compare every byte with the manifest. Raises DataError, on all ranks alike, naming the first file that differs."""
    if problem := problem_of(folder, world):
        _raise_on_all(problem, world)


@contextmanager
def checking_files(folder: Path, world: Group = SINGLE) -> Iterator[None]:
    """The same beside what the block reads of them: a thread of each rank takes its share of the files. All ranks leave the
    block before any error is raised; a file that differs is the error, whatever the block made of it."""
    sizes = next((p for p in world.gather_objects(size_problem(folder)) if p is not None), None)
    if sizes is not None:
        _raise_on_all(sizes, world)
    with ThreadPoolExecutor(1, "verify") as pool:
        job = pool.submit(_sum_problem, folder, world)
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught
        try:
            mine = job.result()
        except OSError as unreadable:
            mine = f"checkpoint {folder}: {unreadable}"
    problem = next((p for p in world.gather_objects(mine) if p is not None), None)
    if problem is not None:
        _raise_on_all(problem, world)
    if error is not None:
        raise error


def _raise_on_all(problem: str, world: Group) -> NoReturn:
    error = DataError(problem)
    error.told_elsewhere = world.rank != 0
    raise error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint. Raises DataError."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): the checkpoint is incomplete, use another one") from error
    return value


# ---- what may go ----


def clear_leftovers(run_dir: Path) -> None:
    """Remove what a killed run left half-written or half-removed. Only before this run saves: it would take its own."""
    for leftover in (run_dir / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(leftover)
    for leftover in (run_dir / "checkpoints").glob(".step_*.old"):
        target = leftover.with_name(leftover.name.removeprefix(".").removesuffix(".old"))
        if not target.exists() and size_problem(leftover) is None:
            leftover.rename(target)  # killed between two renames: it is whole, so it stays
        else:
            shutil.rmtree(leftover)


def drop_old(run_dir: Path, keep: int | None, keep_every: int | None = None) -> None:
    """Remove whole checkpoints older than the newest `keep`; those of a step that is a multiple of `keep_every` stay.

    Damaged ones neither count nor go: they were told about, and are the user's to look at."""
    if keep is None:
        return
    whole = [folder for folder in list_checkpoints(run_dir) if size_problem(folder) is None]
    for folder in whole[:-keep]:
        if keep_every is None or step_of(folder) % keep_every:
            remove_directory(folder)
