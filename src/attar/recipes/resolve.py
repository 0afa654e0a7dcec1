"""Turns plain values into typed ones; the typed signatures are the schema.

One rule: a string, or a table with ``name``, where a type names a room, is that public name of
the room, and the table's other keys are its options. What is wrong is said with its place and
the nearest name that would be right.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Callable as AbcCallable
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from attar.recipes.document import Document, Path_
from attar.recipes.rooms import SAID, SUPPLIED, Room
from attar.runtime import PreflightError, suggest

STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)
NAME_KEYS = {"stages": "do"}  # a stage is a sentence: do: distill


class Resolver:
    """Resolves the values of one document against rooms.

    ``full`` is the document's value with every default that was left out written in: what the
    run keeps, and a recipe by itself.
    """

    def __init__(self, document: Document, rooms: dict[str, Room]) -> None:
        self.document = document
        self.rooms = rooms
        self.full = copy.deepcopy(document.value)

    def fail(self, path: Path_, message: str, *, key: bool = False) -> PreflightError:
        """The error that says *message* at the place of *path*."""
        return PreflightError(f"{self.document.at(path, key=key)}: {message}")

    def value(self, raw: Any, hint: Any, path: Path_) -> Any:
        """*raw* as a value of the type *hint*."""
        room = _room(hint)
        if room is not None:
            return self.choice(raw, room, path)
        inner = _unmarked(hint)
        if get_origin(inner) in (Union, types.UnionType):
            return self._union(raw, hint, inner, path)
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            return self.table(raw, inner, path)
        item = _item(inner)
        if item is not None and _structured(item):
            return [self.value(r, item, (*path, i)) for i, r in enumerate(self._list(raw, path))]
        return self._leaf(raw, hint, path)

    def choice(self, raw: Any, room: str, path: Path_) -> Any:
        """A member of *room*, with its options bound; ``room.NAME`` has only that one."""
        room, _, fixed = room.partition(".")
        if fixed:
            return self._bound(raw, self.rooms[room][fixed], room, path, ())
        word = NAME_KEYS.get(room, "name")
        name = raw.get(word) if isinstance(raw, dict) else raw
        if not isinstance(name, str):
            raise self.fail(path, f"expected {_named(raw, room, word)}")
        place = (*path, word) if isinstance(raw, dict) else path
        member = self._member(name, room, place)
        given = {k: v for k, v in raw.items() if k != word} if isinstance(raw, dict) else {}
        return self._bound(given, member, room, path, (word,))

    def _bound(
        self,
        given: Any,
        member: Callable[..., Any],
        room: str,
        path: Path_,
        spared: Sequence[str],
    ) -> Callable[..., Any]:
        if not isinstance(given, dict):
            raise self.fail(path, f"expected a table of options, not {given!r}")
        said = SAID.get(getattr(member, "__name__", ""), {}) if room == "stages" else {}
        supplied = SUPPLIED[room].difference(said)
        options = self.options(given, member, path, supplied=supplied, spared=spared, said=said)
        return partial(member, **options) if options else member

    def table(self, raw: Any, kind: type, path: Path_) -> Any:
        """An instance of the dataclass *kind*."""
        if not isinstance(raw, dict):
            word = "nothing" if raw is None else repr(raw)
            hint = _first_key(raw, kind)
            raise self.fail(path, f"expected a table of keys and values, not {word}{hint}")
        options = self.options(raw, kind, path)
        try:
            return kind(**options)
        except PreflightError:
            raise
        except ValueError as error:
            raise self.fail(path, str(error)) from None

    def options(
        self,
        given: dict[str, Any],
        member: Callable[..., Any],
        path: Path_,
        *,
        supplied: frozenset[str] = frozenset(),
        spared: Sequence[str] = (),
        said: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """The options of *member* that *given* writes, each as its signature's type.

        Args:
            said: types of what may be written, though a stage would supply it otherwise.
        """
        parameters = inspect.signature(member).parameters
        hints = {**_hints(member), **said}
        writable = {
            name: parameter
            for name, parameter in parameters.items()
            if name not in supplied
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        }
        for name in said.keys() - writable.keys():  # the recipe's own word, no option of a member
            writable[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
        for name in given:
            if name in supplied:
                raise self.fail(
                    (*path, name), f"'{name}' is supplied and cannot be written here", key=True
                )
            if name not in writable:
                known = [*writable, *spared]
                raise self.fail(
                    (*path, name), f"there is no '{name}' here; {suggest(name, known)}", key=True
                )
        needed = [n for n, p in writable.items() if p.default is p.empty and n not in said]
        missing = [name for name in needed if name not in given]
        if missing:
            names = " and ".join(f"'{name}'" for name in missing)
            raise self.fail(path, f"{names} {'is' if len(missing) == 1 else 'are'} missing here")
        self._write_defaults(path, writable, given)
        moving = supplied == SUPPLIED["losses"]  # any number that a loss takes may be a schedule
        return {
            name: self.choice(raw, "schedules", (*path, name))
            if moving and isinstance(raw, dict) and _takes_numbers([hints.get(name)])
            else self.value(raw, hints.get(name, Any), (*path, name))
            for name, raw in given.items()
        }

    def _member(self, name: str, room: str, path: Path_) -> Callable[..., Any]:
        folded = {_folded(known): member for known, member in self.rooms[room].items()}
        member = folded.get(_folded(name))
        if member is None:
            raise self.fail(
                path,
                f"there is no '{name}' in {room}; {suggest(name, map(shown, self.rooms[room]))}",
            )
        return member

    def _union(self, raw: Any, hint: Any, inner: Any, path: Path_) -> Any:
        members = [m for m in get_args(inner) if not _is_function(m)]
        if raw is None and type(None) in members:
            return None
        members = [m for m in members if m is not type(None)]
        if bool in members and not isinstance(raw, dict):  # yes, or a table of how
            return self._leaf(raw, bool, path)
        numbers = [m for m in members if _unmarked(m) in (int, float)]
        if numbers and not isinstance(raw, str | dict):  # a weight, or the name of its schedule
            return self._leaf(raw, functools.reduce(operator.or_, numbers), path, _rule(hint))
        lists = [m for m in members if _structured(_item(_unmarked(m)))]
        if lists and isinstance(raw, list):  # several of what may stand alone
            return self.value(raw, lists[0], path)
        # What is no name or table is one of the plain members, where there are any; beside a name
        # or a table, a union's other members are objects that only Python can give.
        plain = [m for m in members if not _structured(m)]
        structured = [m for m in members if _structured(m)]
        written = structured if isinstance(raw, str | dict) or not _takes_numbers(plain) else plain
        written = written or members
        if len(written) == 1:
            return self.value(raw, written[0], path)
        return self._leaf(raw, functools.reduce(operator.or_, members), path)

    def _list(self, raw: Any, path: Path_) -> list[Any]:
        if not isinstance(raw, list):
            raise self.fail(path, f"expected a list, not {raw!r}")
        return raw

    def _leaf(self, raw: Any, hint: Any, path: Path_, rule: str | None = None) -> Any:
        # A YAML list is what a recipe writes for a tuple; everything else stays strict.
        given = tuple(raw) if isinstance(raw, list) and _is_tuple(hint) else raw
        try:
            return TypeAdapter(hint, config=STRICT).validate_python(given)
        except ValidationError as error:
            first = error.errors()[0]
            said = first["msg"].replace("Input should be", "it must be")
            said = said.replace("a valid tuple", "a list, such as [32]")
            said = said.replace(
                "'str' instances are not allowed as a Sequence value", f"it must be a list: [{raw}]"
            )
            name = next((str(p) for p in reversed(path) if isinstance(p, str)), "value")
            raise self.fail(path, f"{name} is {raw!r}: {rule or said}") from None

    def _write_defaults(
        self, path: Path_, writable: dict[str, inspect.Parameter], given: dict[str, Any]
    ) -> None:
        steps = ("recipe", *path)
        holder: Any = {"recipe": self.full}
        for step in steps[:-1]:
            holder = holder[step]
        if isinstance(holder[steps[-1]], str):
            holder[steps[-1]] = {"name": holder[steps[-1]]}
        table = holder[steps[-1]]
        for name, parameter in writable.items():
            if name not in given and parameter.default is not parameter.empty:
                known, written = spelt(parameter.default)
                if known:
                    table[name] = written


def _named(raw: Any, room: str, word: str) -> str:
    """What a member of *room* is written as, with the options that were given without a name."""
    wanted = f"a name of {room}, or a table with '{word}'"
    if not isinstance(raw, dict) or not raw or word in raw:
        return wanted
    options = ", ".join(f"{key}: ..." for key in raw)
    return f"{wanted}: {{{word}: NAME, {options}}}; attar list {room} shows the names"


def _first_key(raw: Any, kind: type) -> str:
    """What to write instead of a bare name, where it is the one thing that the table must have."""
    needed = [f.name for f in dataclasses.fields(kind) if _is_required(f)]
    if not isinstance(raw, str) or len(needed) != 1:
        return ""
    return f"; write {{{needed[0]}: {raw}}}"


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _room(hint: Any) -> str | None:
    return _marked(hint, "room:")


def _rule(hint: Any) -> str | None:
    """What a value of several types must be, in words, where its type says so."""
    return _marked(hint, "rule:")


def _marked(hint: Any, start: str) -> str | None:
    marks = (mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, str))
    return next((mark.removeprefix(start) for mark in marks if mark.startswith(start)), None)


def _item(hint: Any) -> Any:
    """The type of a sequence's items, None for anything else."""
    arguments = get_args(hint)
    if get_origin(hint) in (Sequence, list) and arguments:
        return arguments[0]
    return None


def _takes_numbers(hints: Sequence[Any]) -> bool:
    plain = (get_args(hint)[0] if get_origin(hint) is Annotated else hint for hint in hints)
    return any(hint in (float, int) for hint in plain)


def _structured(hint: Any) -> bool:
    inner = _unmarked(hint)
    if get_origin(inner) in (Union, types.UnionType):
        return any(map(_structured, get_args(inner)))
    return _room(hint) is not None or dataclasses.is_dataclass(inner)


def _unmarked(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _is_function(hint: Any) -> bool:
    return get_origin(hint) is AbcCallable or hint is AbcCallable


def _is_tuple(hint: Any) -> bool:
    inner = _unmarked(hint)
    return get_origin(inner) is tuple


def _hints(member: Callable[..., Any]) -> dict[str, Any]:
    signature = getattr(member, "__signature__", None)
    if signature is not None:
        return {name: p.annotation for name, p in signature.parameters.items()}
    target = member
    if inspect.isclass(member) and not dataclasses.is_dataclass(member):
        target = member.__init__
    try:
        return get_type_hints(target, include_extras=True)
    except (NameError, TypeError):
        return {}


def _folded(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def shown(name: str) -> str:
    """A name as recipes write it: ImageClassification is image-classification.

    >>> shown("ImageClassification"), shown("kl_divergence")
    ('image-classification', 'kl_divergence')
    """
    if name == name.lower():
        return name
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")


def spelt(value: Any) -> tuple[bool, Any]:
    """A default as a recipe would write it; (False, None) where none can."""
    if value is None or isinstance(value, bool | int | float | str):
        return True, value
    if isinstance(value, tuple | list):
        items = [spelt(item) for item in value]
        return all(known for known, _ in items), [spelt for _, spelt in items]
    function = value.func if isinstance(value, partial) else value
    if not inspect.isfunction(function):
        return False, None
    options = {
        name: parameter.default
        for name, parameter in inspect.signature(value).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    return True, {"name": function.__name__} | {k: spelt(v)[1] for k, v in options.items()}
