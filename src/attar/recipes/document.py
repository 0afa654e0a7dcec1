"""A YAML file as plain values, each with its place, and nothing a file could hide in it.

YAML 1.2 by a safe loader. Refused, each with its line and column: duplicate keys, tags,
anchors, aliases, several documents, more than 1 MiB, more than 32 levels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, DocumentStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from attar.runtime import PreflightError

MOST_BYTES = 1 << 20
MOST_LEVELS = 32

Path_ = tuple[str | int, ...]


@dataclass
class Document:
    """Values and where each stands: ``places`` of values, ``keys`` of their keys."""

    name: str
    value: Any
    places: dict[Path_, str] = field(default_factory=dict)
    keys: dict[Path_, str] = field(default_factory=dict)

    def at(self, path: Path_, *, key: bool = False) -> str:
        """The place of a value (or its key), or of the nearest thing around it."""
        table = self.keys if key else self.places
        while path and path not in table:
            path, table = path[:-1], self.places
        return table.get(path, self.name)


def read(path: str | Path) -> Document:
    """Read a recipe file."""
    file = Path(path)
    if file.is_dir():
        raise PreflightError(f"{file}: is a folder; name the recipe file in it")
    try:
        with file.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise PreflightError(f"{file}: there is no such file") from None
    if len(data) > MOST_BYTES:
        raise PreflightError(f"{file}: is larger than 1 MiB, which no recipe needs")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PreflightError(f"{file}: is not UTF-8 text (byte {error.start})") from None
    return parse(text, str(file))


def parse(text: str, name: str = "recipe") -> Document:
    """Read recipe text.

    >>> document = parse("task: {name: regression}\\nseeds: 3")
    >>> document.value["seeds"], document.at(("seeds",))
    (3, 'recipe:2:8')
    """
    try:
        _refuse_tricks(text, name)
        node = _yaml().compose(text)
        document = Document(name, None)
        if node is None:
            raise PreflightError(
                f"{name}: is empty; a recipe starts with task, data, teacher, student"
            )
        document.value = _build(node, (), document)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise PreflightError(f"{where}: {error.problem or 'is not YAML'}") from None
    except YAMLError as error:
        raise PreflightError(f"{name}: is not YAML: {str(error).splitlines()[0]}") from None
    return document


def set_value(document: Document, override: str) -> None:
    """Apply one ``path.to.key=value`` from the command line; tables on the way are made."""
    where = f"override '{override}'"
    path_text, sign, value_text = override.partition("=")
    if not sign or not path_text:
        raise PreflightError(f"{where}: write PATH=VALUE, such as stages.0.epochs=5")
    path: Path_ = tuple(
        int(p) if p.isascii() and p.isdigit() else p for p in path_text.strip().split(".")
    )
    changed = parse(value_text or "null", where)
    holder = _holder(document, path, where)
    fits = (isinstance(holder, dict) and isinstance(path[-1], str)) or (
        isinstance(holder, list) and isinstance(path[-1], int) and path[-1] < len(holder)
    )
    if not fits:
        raise PreflightError(f"{where}: the recipe has nowhere to put '{path_text}'")
    holder[path[-1]] = changed.value
    for table in (document.places, document.keys):
        for old in [p for p in table if p[: len(path)] == path]:
            del table[old]
    document.places[path] = document.keys[path] = where


def _holder(document: Document, path: Path_, where: str) -> Any:
    """The table or list around *path*.

    A bare name on the way becomes a table with that name, and what is not there an empty table:
    what is missing in it, or has no place there, is said by who knows what a recipe holds.
    """
    value = document.value
    for index, step in enumerate(path[:-1]):
        try:
            if isinstance(value, dict) and value.get(step) is None and isinstance(step, str):
                value[step] = {}
                at = path[: index + 1]
                document.places[at] = document.keys[at] = where
            if isinstance(value[step], str):
                value[step] = {"name": value[step]}
            value = value[step]
        except (KeyError, IndexError, TypeError):
            reached = ".".join(map(str, path[: index + 1]))
            raise PreflightError(f"{where}: the recipe has no '{reached}'") from None
    return value


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)


def _refuse_tricks(text: str, name: str) -> None:
    level = documents = 0
    for event in _yaml().parse(text):
        mark = event.start_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}"
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
            raise PreflightError(f"{where}: anchors (&) and aliases (*) are not allowed")
        if getattr(event, "tag", None):
            raise PreflightError(f"{where}: tags (!) are not allowed; a recipe is plain data")
        documents += isinstance(event, DocumentStartEvent)
        if documents > 1:
            raise PreflightError(f"{where}: a recipe is one document, without another ---")
        kind = type(event).__name__
        level += kind.endswith(("SequenceStartEvent", "MappingStartEvent"))
        level -= kind.endswith(("SequenceEndEvent", "MappingEndEvent"))
        if level > MOST_LEVELS:
            raise PreflightError(f"{where}: is nested deeper than {MOST_LEVELS} levels")


def _build(node: Node, path: Path_, document: Document) -> Any:
    document.places[path] = _place(node, document)
    if isinstance(node, MappingNode):
        return _build_mapping(node, path, document)
    if isinstance(node, SequenceNode):
        return [_build(item, (*path, i), document) for i, item in enumerate(node.value)]
    return _scalar(node)


def _build_mapping(node: MappingNode, path: Path_, document: Document) -> dict[str, Any]:
    built: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = _place(key_node, document)
        plain = isinstance(key_node, ScalarNode) and key_node.value != "<<"
        key = _scalar(key_node) if plain else None
        if not isinstance(key, str):
            raise PreflightError(f"{where}: a key must be a plain word")
        if key in built:
            raise PreflightError(f"{where}: the key '{key}' stands here a second time")
        document.keys[(*path, key)] = where
        built[key] = _build(value_node, (*path, key), document)
    return built


def _scalar(node: Node) -> Any:
    try:
        return _yaml().constructor.construct_object(node, deep=True)
    except ValueError as error:  # an impossible date, a number of thousands of digits
        raise YAMLError(f"'{node.value[:40]}' is no value ({error})") from None


def _place(node: Node, document: Document) -> str:
    return f"{document.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
