"""Signals of JavaScript, on a syntax tree.

| signal | compat (published filter) | default |
|---|---|---|
| all | esprima 4.0.1's tree | tree-sitter-javascript's: modern syntax and JSX parse |
| frac_lines_func_ratio, score_lines_no_logic | arrow functions in variables are variables; so are async ones | functions |

esprima 4.0.1 refuses optional chaining, class fields, for-await, `??=`, catch without a binding, `#!` lines and JSX.
Default mode parses at 5–9 MB/s. Compat mode runs esprima itself (0.7 MB/s): no faster parser rejects the same files. Above
`MAX_CHARACTERS`, or when parsing takes more than `MAX_SECONDS` (unclosed regular expressions take quadratic time), the
default mode gives up: the signals have no value, and the error says so."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, NamedTuple

from ..document import Document, Signal, Value, share
from .scanning import counted_once, engine, share_of_lines

MAX_CHARACTERS = 3_000_000
"""Larger files are dropped for their size anyway."""
MAX_SECONDS = 5.0
"""Of CPU time, for one file; at the limit of size, ordinary files take half a second."""
_CHUNK = 65536  # bytes handed to the parser at a time
RELEASED_RECURSION_LIMIT = 10_000
"""What the published filter sets."""

_VARIABLE_NAME = re.compile(r"^[a-z\$][a-zA-Z0-9]*$")
_FUNCTION_NAME = re.compile(r"^[a-zA-Z\$][a-zA-Z0-9]*$")
_CLASS_NAME = re.compile(r"^[A-Z][a-zA-Z0-9]*$")
_SIMPLE = frozenset({"Literal", "Identifier", "UnaryExpression"})


@dataclass
class Declarations:
    """What a file declares."""

    variables: list[str] = field(default_factory=list)
    simple_variables: int = 0
    """Without value, or with a literal, identifier or unary value."""
    functions: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    imports: int = 0
    simple_returns: int = 0
    """Of nothing or of such a value."""
    statements: int = 0
    """At top level."""


# Compat: esprima ---------------------------------------------------------------------------------------------------------


def _esprima(text: str) -> Any:
    """The published filter's tree: module mode if the text contains import or export, else or failing that script mode.
    None if neither parses. Raises RecursionError as the published filter does; the signal then has no value."""
    import esprima

    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, RELEASED_RECURSION_LIMIT))
    try:
        if "import" in text or "export" in text:
            try:
                return esprima.parseModule(text)
            except esprima.Error:
                pass
        try:
            return esprima.parseScript(text)
        except esprima.Error:
            return None
    finally:
        sys.setrecursionlimit(before)


def _nodes(tree: Any, node_type: type) -> Iterator[Any]:
    """Every node of an esprima tree."""
    pending = [tree]
    while pending:
        node = pending.pop()
        yield node
        for value in vars(node).values():
            if isinstance(value, node_type):
                pending.append(value)
            elif isinstance(value, list):
                pending.extend(item for item in value if isinstance(item, node_type))


def _exported_name(left: Any) -> str | None:
    """The x of module.exports.x, the target of an assignment."""
    if left.type != "MemberExpression" or left.object.type != "MemberExpression":
        return None
    if left.object.object.name != "module" or left.object.property.name != "exports":
        return None
    name: str | None = left.property.name
    return name


def _count_assignment(node: Any, found: Declarations) -> None:
    name = _exported_name(node.left)
    if not name:
        return
    if node.right.type in ("FunctionExpression", "ArrowFunctionExpression"):
        found.functions.append(name)
    else:
        found.variables.append(name)
        found.simple_variables += node.right.type in _SIMPLE


def _esprima_declarations(text: str) -> Declarations | None:
    import esprima

    tree = _esprima(text)
    if tree is None:
        return None
    nodes = esprima.nodes
    found = Declarations(statements=len(tree.body))
    for node in _nodes(tree, nodes.Node):
        kind = node.type
        if kind == "VariableDeclaration":
            for declarator in node.declarations:
                name, init = declarator.id.name, declarator.init
                if isinstance(init, nodes.FunctionExpression):  # not the async ones, which have a class of their own
                    if name:
                        found.functions.append(name)
                    continue
                if name:
                    found.variables.append(name)
                found.simple_variables += init is None or init.type in _SIMPLE
        elif kind == "FunctionDeclaration":
            if node.id and node.id.name:
                found.functions.append(node.id.name)
        elif kind == "AssignmentExpression":
            _count_assignment(node, found)
        elif kind == "ClassDeclaration":
            if node.id and node.id.name:
                found.classes.append(node.id.name)
        elif kind == "ImportDeclaration":
            found.imports += 1
        elif kind == "ReturnStatement":
            found.simple_returns += node.argument is None or node.argument.type in _SIMPLE
    return found


# Default: tree-sitter ----------------------------------------------------------------------------------------------------

_QUERY = """
(variable_declarator) @variable
[(function_declaration) (generator_function_declaration)] @function
(class_declaration) @class
(import_statement) @import
(return_statement) @return
(assignment_expression
  left: (member_expression object: (member_expression object: (identifier) @module property: (property_identifier) @exports)
         property: (property_identifier) @name)
  (#eq? @module "module") (#eq? @exports "exports")) @export
"""
_FUNCTION_VALUES = frozenset({"function_expression", "generator_function", "arrow_function"})
_SIMPLE_VALUES = frozenset(
    {"number", "string", "regex", "true", "false", "null", "undefined", "identifier", "unary_expression"}
)


@cache
def _tree_sitter() -> tuple[Any, Any]:
    """Parser and query of tree-sitter-javascript."""
    import tree_sitter
    import tree_sitter_javascript

    language = tree_sitter.Language(tree_sitter_javascript.language())
    return tree_sitter.Parser(language), tree_sitter.Query(language, _QUERY)


def _parse(parser: Any, source: bytes) -> Any:
    """The tree of a text; TimeoutError after MAX_SECONDS. The limit needs the reading form of `parse`."""
    end = time.thread_time() + MAX_SECONDS
    try:
        return parser.parse(
            lambda offset, _: source[offset : offset + _CHUNK], progress_callback=lambda _, __: time.thread_time() > end
        )
    except ValueError as error:
        parser.reset()  # or it would go on with this text
        raise TimeoutError(f"parsing took more than {MAX_SECONDS} s of CPU time") from error


def _text(node: Any) -> str:
    return str(node.text.decode("utf-8", "replace"))


def _is_simple(value: Any) -> bool:
    return value is None or value.type in _SIMPLE_VALUES


def _count_value(name: str, value: Any, found: Declarations) -> None:
    if value is not None and value.type in _FUNCTION_VALUES:
        found.functions.append(name)
    else:
        if name:
            found.variables.append(name)
        found.simple_variables += _is_simple(value)


def _tree_sitter_declarations(text: str) -> Declarations | None:
    import tree_sitter

    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"a file of {len(text)} characters is not parsed; the limit is {MAX_CHARACTERS}")
    parser, query = _tree_sitter()
    root = _parse(parser, text.encode("utf-8", "surrogatepass")).root_node
    if root.has_error:
        return None
    captures = tree_sitter.QueryCursor(query).captures(root)
    ignored = ("comment", "hash_bang_line", "html_comment", "empty_statement")
    found = Declarations(statements=sum(child.type not in ignored for child in root.named_children))
    for node in captures.get("variable", []):
        target = node.child_by_field_name("name")
        name = _text(target) if target is not None and target.type == "identifier" else ""
        _count_value(name, node.child_by_field_name("value"), found)
    for node in captures.get("export", []):
        target = node.child_by_field_name("left")  # the query asks for a member expression
        name = _text(target.child_by_field_name("property")) if target is not None else ""
        _count_value(name, node.child_by_field_name("right"), found)
    for key, names in (("function", found.functions), ("class", found.classes)):
        for node in captures.get(key, []):
            target = node.child_by_field_name("name")
            if target is not None:
                names.append(_text(target))
    found.imports = len(captures.get("import", []))
    for node in captures.get("return", []):
        values = [child for child in node.named_children if child.type != "comment"]
        found.simple_returns += _is_simple(values[0] if values else None)
    return found


# Signals -----------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _outcome(text: str, compat: bool) -> Declarations | Exception | None:
    """A failure is kept as well: it can be what took long, and every signal asks."""
    try:
        return _esprima_declarations(text) if compat else _tree_sitter_declarations(text)
    except Exception as error:  # raised by `declarations`
        return error


def declarations(text: str, compat: bool) -> Declarations | None:
    """What a file declares; None if it does not parse. Raises what kept the parser from telling: ValueError or TimeoutError in
    default mode, whatever esprima stumbles over in compat mode."""
    found = _outcome(text, compat)
    if isinstance(found, Exception):
        raise found
    return found


class LogCounts(NamedTuple):
    """Counts over the lines of the code."""

    lines: int
    logs: int
    """Lines with console.log."""


_lines = counted_once(lambda code, strict: LogCounts(*engine().scan_lines(code, "console.log")))


def _of_lines(count: Callable[[Declarations], int]) -> Signal:
    """A signal: a count over the number of code lines."""

    def signal(d: Document) -> Value:
        lines = _lines(d).lines
        if lines == 0:
            return None
        found = declarations(d.text, d.compat)
        return None if found is None else share(count(found), lines)

    return signal


def _well_named(names: Callable[[Declarations], list[str]], pattern: re.Pattern[str]) -> Signal:
    """A signal: the share of names that fit a pattern."""

    def signal(d: Document) -> Value:
        found = declarations(d.text, d.compat)
        if found is None:
            return None
        return share(sum(pattern.match(name) is not None for name in names(found)), len(names(found)))

    return signal


def _parses(d: Document) -> Value:
    return declarations(d.text, d.compat) is not None


def _no_variable(d: Document) -> Value:
    found = declarations(d.text, d.compat)
    return None if found is None else not found.variables


SIGNALS: dict[str, Signal] = {
    "qsc_codejavascript_cate_ast": _parses,
    "qsc_codejavascript_cate_var_zero": _no_variable,
    "qsc_codejavascript_frac_lines_func_ratio": _of_lines(lambda f: len(f.functions)),
    "qsc_codejavascript_num_statement_line": _of_lines(lambda f: f.statements),
    "qsc_codejavascript_score_lines_no_logic": _of_lines(
        lambda f: len(f.functions) + f.imports + f.simple_variables + f.simple_returns + len(f.classes)
    ),
    "qsc_codejavascript_frac_words_legal_var_name": _well_named(lambda f: f.variables, _VARIABLE_NAME),
    "qsc_codejavascript_frac_words_legal_func_name": _well_named(lambda f: f.functions, _FUNCTION_NAME),
    "qsc_codejavascript_frac_words_legal_class_name": _well_named(lambda f: f.classes, _CLASS_NAME),
    "qsc_codejavascript_frac_lines_print": share_of_lines(_lines, lambda n: n.logs),
}
