"""The string that names a tensor in one pass of a model.

``output:NAME``, ``feature:PATH`` (what a module returns), ``input:PATH`` (what it is given),
each with ``@K`` for its K-th call in the pass and ``[KEY]`` for one part of a tuple or mapping.
``param:PATH`` is a parameter itself, or with ``*`` a tuple of all that match. ``grad:OF/WRT`` is
the gradient of OF (the task's ``loss``, the logit of the teacher's ``top`` class, or ``probe``, the
output along a random unit vector, the same for both) with respect to WRT: ``inputs``,
``embeddings``, or what the module of that path returns.
On the teacher's side ``self:ADDRESS`` is the student's own signal of the same pass, detached.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from attar.runtime import UsageError, suggest

KINDS = ("output", "feature", "input", "param", "grad")
OF = ("loss", "top", "probe")
INPUTS, EMBEDDINGS = "inputs", "embeddings"
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
    if form["kind"] == "grad":
        _check_gradient(text, form["path"])
    key = form["key"]
    return Address(
        text,
        form["kind"],
        form["path"],
        call=int(form["call"]) if form["call"] else None,
        key=int(key) if key and key.isdigit() else key,
        own=bool(form["own"]),
    )


def _check_gradient(text: str, path: str) -> None:
    of, slash, wrt = path.partition("/")
    if of not in OF or not (slash and wrt):
        raise UsageError(
            f"'{text}': write grad:OF/WRT, with OF one of {', '.join(OF)} and WRT inputs, "
            "embeddings or the path of a module, such as grad:probe/inputs"
        )


def module_at(model: nn.Module, address: Address, whose: str = "model") -> nn.Module:
    """The submodule that an address names; a mistyped path lists the nearest names."""
    gradient = address.kind == "grad"
    path = address.path.partition("/")[2] if gradient else address.path
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in model.named_modules() if name]
        said = suggest(path, [INPUTS, EMBEDDINGS, *names] if gradient else names)
        if said.startswith("choose"):  # nothing is near: the parts one level down say most
            said = suggest("", [name for name, _ in model.named_children()])
        hint = " (a term without teacher: takes the student's address)" * (whose == "teacher")
        raise UsageError(
            f"'{address.text}': the {whose} has no module '{path}'; {said}{hint}"
        ) from None


def parameters_at(
    model: nn.Module, address: Address, whose: str = "model"
) -> Tensor | tuple[Tensor, ...]:
    """The parameter that an address names; a tuple, in the model's order, of those of a pattern."""
    named = dict(model.named_parameters())
    if "*" in address.path:
        found = tuple(p for name, p in named.items() if fnmatchcase(name, address.path))
        if found:
            return found
    elif address.path in named:
        return named[address.path]
    raise UsageError(
        f"'{address.text}': the {whose} has no parameter '{address.path}'; "
        f"{suggest(address.path, named)}"
    )
