"""The string that names a tensor in one pass of a model.

``output:NAME``, ``feature:PATH`` (what a module returns), ``input:PATH`` (what it is given),
each with ``@K`` for its K-th call in the pass and ``[KEY]`` for one part of a tuple or mapping.
On the teacher's side ``self:ADDRESS`` is the student's own signal of the same pass, detached.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from attar.runtime import UsageError, suggest

KINDS = ("output", "feature", "input")
_FORM = re.compile(
    r"(?P<own>self:)?(?P<kind>\w+):(?P<path>[^@\[\]]*)(@(?P<call>\d+))?(\[(?P<key>[^\]]+)\])?"
)


@dataclass(frozen=True)
class Address:
    """A parsed address; ``text`` is what the user wrote."""

    text: str
    kind: str
    path: str
    call: int | None = None
    key: int | str | None = None
    own: bool = False


def parse(text: str) -> Address:
    """Read an address.

    >>> parse("feature:encoder.layers.3@1[0]")
    Address(text='feature:encoder.layers.3@1[0]', kind='feature', path='encoder.layers.3', \
call=1, key=0, own=False)
    """
    form = _FORM.fullmatch(text)
    if form is None:
        raise UsageError(
            f"'{text}' is not the address of a signal; write output:NAME, feature:PATH or "
            "input:PATH, such as feature:stage3"
        )
    if form["kind"] not in KINDS:
        raise UsageError(
            f"'{text}': there is no kind of signal '{form['kind']}'; {suggest(form['kind'], KINDS)}"
        )
    key = form["key"]
    return Address(
        text,
        form["kind"],
        form["path"],
        call=int(form["call"]) if form["call"] else None,
        key=int(key) if key and key.isdigit() else key,
        own=bool(form["own"]),
    )


def module_at(model: nn.Module, address: Address, whose: str = "model") -> nn.Module:
    """The submodule that an address names; a mistyped path lists the nearest names."""
    try:
        return model.get_submodule(address.path)
    except AttributeError:
        names = [name for name, _ in model.named_modules() if name]
        said = suggest(address.path, names)
        if said.startswith("choose"):  # nothing is near: the parts one level down say most
            said = suggest("", [name for name, _ in model.named_children()])
        hint = " (a term without teacher: takes the student's address)" * (whose == "teacher")
        raise UsageError(
            f"'{address.text}': the {whose} has no module '{address.path}'; {said}{hint}"
        ) from None
