"""From YAML and dotted overrides to a typed tree, with errors that name the key and what is allowed."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ConfigError, nearest

Tree = TypeVar("Tree", bound=BaseModel)


class Branch(BaseModel):
    """A branch of the tree: frozen, unknown keys refused, documented by the string under each field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


def read_tree(path: str | Path | None, overrides: list[str]) -> dict[str, Any]:
    """The YAML mapping in `path` (None: empty) with `a.b=value` overrides applied; values are parsed as YAML."""
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(
                f"configuration {path} cannot be read ({error.strerror}): give the path of a YAML file"
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"configuration {path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"configuration {path} must hold a mapping of keys, not a {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override `{override}` is not of the form key=value, for example optim.lr=1e-4")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"override `{override}`: the value is not valid YAML: {error}") from error
    *parents, last = key.split(".")
    node: Any = tree
    for name in parents:
        node = _child(node, name, key)
    if isinstance(node, list):
        node[_list_index(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"override `{key}`: the part before `.{last}` is a value, not a branch")


def _child(node: Any, name: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, name, key)]
    if not isinstance(node, dict):
        raise ConfigError(f"override `{key}`: `{name}` lies below a value, not a branch")
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _list_index(items: list[Any], name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(items):
        raise ConfigError(f"override `{key}`: `{name}` is not an index below {len(items)}")
    return int(name)


def parse_tree(kind: type[Tree], tree: dict[str, Any]) -> Tree:
    """`tree` as a `kind`. Raises one ConfigError that lists every fault."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(kind, fault) for fault in error.errors())) from None


def _describe(kind: type[BaseModel], fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        branch = _branch_at(kind, fault["loc"][:-1])
        names = list(branch.model_fields) if branch else []
        where = ".".join(str(part) for part in fault["loc"][:-1]) or "the top level"
        return f"unknown key `{path}`{nearest(str(fault['loc'][-1]), names)}; keys of {where}: {', '.join(names)}"
    if fault["type"] == "missing":
        hint = " (or choose model.preset)" if path.startswith("model.") else ""
        return f"`{path}` is missing: set it{hint}"
    return f"`{path}`={fault['input']!r}: {fault['msg'].removeprefix('Value error, ')}"


def _branch_at(kind: type[BaseModel], path: tuple[str | int, ...]) -> type[BaseModel] | None:
    """The model class that holds the keys under `path` (list indices included), or None."""
    branch: type[BaseModel] | None = kind
    for part in path:
        if isinstance(part, int):
            continue
        if branch is None or part not in branch.model_fields:
            return None
        branch = _model_in(branch.model_fields[part].annotation)
    return branch


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        if (found := _model_in(inner)) is not None:
            return found
    return None
