"""The configurations in examples/corpus can be loaded, and the arms of an ablation differ in what they ablate only."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from opencoder.config import load_corpus_config
from opencoder.corpus import sample

pytestmark = pytest.mark.fast
FOLDER = Path(__file__).parents[2] / "examples" / "corpus"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_load(path: Path) -> None:
    sample.check(load_corpus_config(path))


def tree(name: str) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return found


def test_arms_differ_in_what_they_ablate_only() -> None:
    file, repository, stars = (tree(f"ablation-{name}") for name in ("file-level", "repository-level", "stars"))
    assert repository["read"].pop("repo_depth") == 2
    assert (file["dedup"].pop("level"), repository["dedup"].pop("level")) == ("file", "repository")
    assert stars["read"].pop("min_stars") == 5
    assert file == repository == stars


def test_refinecode_is_the_default() -> None:
    written = load_corpus_config(FOLDER / "refinecode.yaml")
    assert written == load_corpus_config(None, ["read.containers=true"])
