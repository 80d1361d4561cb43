"""The direction of imports: csrc <- kernels <- opencoder <- tools, and the order of rooms inside opencoder."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parents[1]

# A room may import the rooms of lower rank, never one of its own rank or above.
RANK = {
    "errors": 0, "files": 0, "compressed": 0, "native": 0, "config_loading": 1, "console": 1, "config_rules_kinds": 1,
    "corpus_config": 2, "config_rules": 2, "config": 3, "kernels": 0, "corpus": 4, "data": 4, "parallel": 4, "model": 5,
    "optim": 6, "checkpoint": 7, "train": 8, "posttrain": 9, "eval": 9, "tools": 10,
}  # fmt: skip


def imported_modules(file: Path, package: str) -> set[str]:
    """Absolute dotted names of everything `file` (a module of `package`) imports when it runs: not for its types alone."""
    names: set[str] = set()
    tree = ast.parse(file.read_text())
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names.update(f"{base}.{alias.name}" for alias in node.names)
            names.add(base)
    return names


def rooms_of(names: set[str]) -> set[str]:
    return {parts[1] for n in names if len(parts := n.split(".")) > 1 and parts[0] == "opencoder" and parts[1] in RANK}


def modules() -> list[tuple[str, Path]]:
    found = []
    for folder, prefix in ((ROOT / "opencoder", ""), (ROOT / "kernels", "kernels"), (ROOT / "tools", "tools")):
        for file in sorted(folder.rglob("*.py")):
            relative = file.relative_to(folder)
            if prefix == "" and relative.parts[0] in ("kernels", "tools"):
                continue  # the symlinks
            room = prefix or relative.parts[0].removesuffix(".py")
            package = ".".join(["opencoder", *([prefix] if prefix else []), *relative.parts[:-1]])
            found.append((room, file, package))
    return found


@pytest.mark.parametrize(("room", "file", "package"), modules(), ids=lambda v: v.name if isinstance(v, Path) else None)
def test_imports_point_down(room: str, file: Path, package: str) -> None:
    if room == "__init__":
        return
    for other in rooms_of(imported_modules(file, package)) - {room}:
        assert RANK[other] < RANK[room], f"{file.relative_to(ROOT)} ({room}) imports {other}"


def test_every_room_has_a_rank() -> None:
    rooms = {p.name.removesuffix(".py") for p in (ROOT / "opencoder").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert rooms - {"__init__", "__pycache__"} <= set(RANK)


def test_an_arrow_the_other_way_is_seen(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from ..train import loop\nfrom opencoder.tools.cli import main\n")
    assert rooms_of(imported_modules(bad, "opencoder.corpus")) == {"train", "tools"}


def test_kernels_know_nothing_of_the_rest() -> None:
    for room, file, package in modules():
        if room == "kernels":
            assert rooms_of(imported_modules(file, package)) <= {"kernels"}, file


# Who may call torch.distributed: one file for collectives, one for how ranks find each other, one for torch's pipeline schedules,
# checkpoints for torch's own format.
DISTRIBUTED = {
    "opencoder/parallel/group.py",
    "opencoder/parallel/meeting.py",
    "opencoder/parallel/pipeline.py",
    "opencoder/checkpoint/parts.py",
    "opencoder/checkpoint/reading.py",
    "opencoder/checkpoint/saver.py",
    "opencoder/checkpoint/storage.py",
    "opencoder/checkpoint/together.py",
    "opencoder/checkpoint/native.py",
    "opencoder/checkpoint/hf.py",
    "opencoder/checkpoint/hf_export.py",
}


def uses_distributed(file: Path) -> bool:
    """Whether it imports torch.distributed or a part of it, or reaches it as an attribute of torch."""
    tree = ast.parse(file.read_text())
    imported = any(name.startswith("torch.distributed") for name in imported_modules(file, "opencoder"))
    reached = any(
        isinstance(n, ast.Attribute) and n.attr == "distributed" and getattr(n.value, "id", "") == "torch"
        for n in ast.walk(tree)
    )
    return imported or reached


def test_only_groups_and_checkpoints_call_torch_distributed() -> None:
    found = {str(file.relative_to(ROOT)) for _, file, _ in modules() if uses_distributed(file)}
    assert found == DISTRIBUTED


@pytest.mark.parametrize(
    "line",
    ["import torch.distributed as dist", "from torch import distributed", "import torch\ntorch.distributed.barrier()"],
)
def test_a_call_around_the_groups_is_seen(tmp_path: Path, line: str) -> None:
    (tmp_path / "bad.py").write_text(line + "\n")
    assert uses_distributed(tmp_path / "bad.py")
