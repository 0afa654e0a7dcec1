"""A model folder: ``model.safetensors`` and ``model.json``, verified before anything is built.

``model.json`` is the commit record. New weights are first written beside the old ones; replacing
the record makes the folder the new model, and only then do the weights take their name. A crash
at any point leaves the old model or the new one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attar.models.adapters import merged
from attar.models.build import Family, construct, known_families
from attar.models.changed import builders, foreign, on_meta, skeleton
from attar.models.faces import has_unsaved_buffers
from attar.models.language import files_of
from attar.models.quantized import packed_away
from attar.models.record import (
    RECORD,
    WEIGHTS,
    Record,
    describe,
    model_folder,
    printable,
    read_record,
)
from attar.models.state import (
    aliases_of,
    check_apart,
    fill,
    plain_state,
    shape_differences,
    shapes_of,
    tie,
)
from attar.models.weights import damage, header, header_of, read, safetensors_file, to_bytes
from attar.runtime import DataError, UsageError, suggest, write_atomic

PENDING = f"{WEIGHTS}.new"
FOREIGN = ("config.json", "preprocessor_config.json")
_OF_TRANSFORMERS = {"language_model", "text_classifier", "text_encoder", "transformers"}


def save(module: nn.Module, folder: str | Path, *, extra: dict[str, Any] | None = None) -> None:
    """Write *module* into *folder*, from where `load` brings it back with the same bits.

    ``model.safetensors`` holds parameters and persistent buffers on the CPU, in their own types,
    tied tensors once; ``model.json`` holds how to build the module, the names and shapes, the
    SHA-256 of the weights, and *extra* (JSON values such as class names). A model that is in
    *folder* already is replaced; a crash leaves the old one or the new one. A model of
    transformers gets ``config.json`` (for images ``preprocessor_config.json`` too), so that
    ``from_pretrained`` of its class there reads the same folder. Adapters of peft are merged into
    a copy, and that is what is saved (`merged`).

    Errors: tensors that are not plain and dense, or that overlap without being the same; extra
    that is not JSON; a module that `build` made and that was changed since, so that `load` could
    not build it (UsageError). Nothing is written then.
    """
    module = merged(getattr(module, "_orig_mod", module))  # what torch.compile wrapped
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: is a file, but a model is saved into a folder; choose another")
    state = plain_state(module)
    aliases = aliases_of(state)
    stored = {name: tensor for name, tensor in state.items() if name not in aliases}
    check_apart(stored)
    family, options = _build_record(module, state)
    weights = to_bytes(stored)
    record = describe(
        family=family,
        options=options,
        parameters=_count(state, stored) + packed_away(module),
        weights={
            "file": WEIGHTS,
            "bytes": len(weights),
            "sha256": hashlib.sha256(weights).hexdigest(),
        },
        tensors=header_of(weights),
        aliases=aliases,
        extra={} if extra is None else extra,
    )
    _settle(target)
    write_atomic(target / PENDING, weights)
    _write_beside(module, target)
    write_atomic(target / RECORD, record)
    os.replace(target / PENDING, target / WEIGHTS)


def _write_beside(module: nn.Module, folder: Path) -> None:
    """Files by which another library reads the folder too; attar reads none of them."""
    files = files_of(module)
    for name, content in files.items():
        write_atomic(folder / name, content)
    if _holds_transformers(folder):
        for name in set(FOREIGN) - files.keys():  # they described the model that is replaced
            (folder / name).unlink(missing_ok=True)


def _holds_transformers(folder: Path) -> bool:
    try:
        return read_record(folder).family in _OF_TRANSFORMERS
    except (DataError, FileNotFoundError):
        return False


def load(
    folder: str | Path,
    *,
    into: nn.Module | None = None,
    families: Mapping[str, Family] | None = None,
) -> nn.Module:
    """The model that `save` wrote into *folder*, in eval mode, on the CPU.

    Args:
        folder: holds ``model.json`` and ``model.safetensors``.
        into: a module of your own to fill instead of building one. It keeps its devices and takes
            the types and ties of the file; nothing is changed before all checks have passed.
        families: functions outside this room by name, for models that were built by one.

    The checksum of both files, names, shapes and types are verified before memory is taken for
    the weights. A model of this room's families draws nothing from the random generator.

    Errors: no model there, damage, other names or shapes (listed), an unknown family (DataError).
    """
    path = model_folder(Path(folder))
    record = read_record(path)
    weights = _verified(path, record)
    if header(weights) != record.tensors:
        raise DataError(f"{weights}: its tensors are not those that {path / RECORD} lists")
    module = _rebuilt(path, record, families) if into is None else into
    state = plain_state(module)
    _check_fit(weights, state, record, packed_away(module))
    tensors = read(weights)
    tensors |= {alias: tensors[name] for alias, name in record.aliases.items()}
    fill(module, tensors, weights, adopt=True)
    tie(module, record.aliases)
    return module.eval()


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Fill *module* from a ``.safetensors`` file whose names and shapes are exactly its own.

    Of tied tensors the file may hold one. The module keeps its types: a float16 file fills a
    float32 module, but a cast that would lose bits is refused, and so is a parameter that is not
    finite. Nothing is changed before all checks have passed.

    Errors: another kind of file, a damaged one, missing or unexpected names, other shapes or
    wider types (DataError).
    """
    file = safetensors_file(Path(path))
    state = plain_state(module)
    shapes = {name: info.shape for name, info in header(file).items()}
    absent = _held_elsewhere(state, shapes)
    shapes |= {name: shapes[partner] for name, partner in absent.items()}
    _refuse(file, shape_differences(shapes_of(state), shapes))
    tensors = read(file)
    tensors |= {name: tensors[partner] for name, partner in absent.items()}
    _check_values(file, state, tensors)
    fill(module, tensors, file, adopt=False)


def read_extra(folder: str | Path) -> dict[str, Any]:
    """The ``extra`` that `save` was given for the model in *folder*."""
    return read_record(model_folder(Path(folder))).extra


def _build_record(
    module: nn.Module, state: Mapping[str, Tensor]
) -> tuple[str | None, dict[str, Any]]:
    built = getattr(module, "attar_build", None)
    if built is None:
        built = foreign(module) or {"family": None, "options": {}}
        return built["family"], built["options"]
    family, options = built["family"], built["options"]
    if family in builders() and on_meta(family, options):
        again = skeleton(built)
        changed = shape_differences(shapes_of(again.state_dict()), shapes_of(state))
        if changed:
            raise UsageError(
                f"the module is not what {family} builds with its options any more ({changed}); "
                "correct module.attar_build, or delete it and use load(folder, into=module)"
            )
    return family, options


def _rebuilt(path: Path, record: Record, more: Mapping[str, Family] | None) -> nn.Module:
    known = known_families(more) | builders()
    if record.family is None:
        raise DataError(
            f"{path}: the model was not made by attar.models.build, so its file does not say how "
            "to build it; pass the module to fill, load(folder, into=module)"
        )
    if record.family not in known:
        name = record.family[:80]
        raise DataError(
            f"{path / RECORD}: family {name!r} is none of attar's, so it came "
            f"from a plugin; pass load(folder, families={{name: function}}), or "
            f"{suggest(name, known)}"
        )
    try:
        return _constructed(path, record, known[record.family])
    except UsageError as error:
        raise DataError(f"{path / RECORD}: {printable(str(error))}") from error


def _constructed(path: Path, record: Record, function: Family) -> nn.Module:
    """A module of uninitialised or random weights, checked before a family of ours takes memory."""
    name = str(record.family)
    if name not in builders() or not on_meta(name, record.options):
        with torch.random.fork_rng(devices=[]):
            return construct(function, name, record.options)
    try:
        with torch.device("meta"):
            module = construct(function, name, record.options)
    except (OverflowError, RuntimeError, TypeError):
        raise UsageError(f"the options of {name} ask for a tensor beyond any memory") from None
    _refuse(path / RECORD, shape_differences(shapes_of(module.state_dict()), record.shapes()))
    if has_unsaved_buffers(module):  # no file fills them: only the constructor can
        with torch.random.fork_rng(devices=[]):
            return construct(function, name, record.options)
    return module.to_empty(device="cpu")


def _check_fit(weights: Path, state: Mapping[str, Tensor], record: Record, packed: int) -> None:
    _refuse(weights, shape_differences(shapes_of(state), record.shapes()))
    parameters = _count(state, record.tensors) + packed
    if parameters != record.parameters:
        raise DataError(
            f"{weights.parent / RECORD}: lists {record.parameters} parameters, but the "
            f"module has {parameters}, so one takes for a buffer what is trained in the other"
        )
    for alias, name in record.aliases.items():
        if isinstance(state[alias], nn.Parameter) != isinstance(state[name], nn.Parameter):
            raise DataError(
                f"{weights.parent / RECORD}: ties '{alias}' and '{name}', but only "
                "one of them is a parameter of the module"
            )


def _refuse(path: Path, differences: str) -> None:
    if differences:
        raise DataError(f"{path}: does not fit the module: {differences}")


def _count(state: Mapping[str, Tensor], names: Iterable[str]) -> int:
    return sum(state[name].numel() for name in names if isinstance(state[name], nn.Parameter))


def _held_elsewhere(state: Mapping[str, Tensor], held: Iterable[str]) -> dict[str, str]:
    """Names of *state* that are not in *held*, but another name of the same tensor is."""
    aliases = aliases_of(state)
    present = {aliases.get(name, name): name for name in held}
    absent = {name: aliases.get(name, name) for name in state.keys() - set(held)}
    return {name: present[first] for name, first in absent.items() if first in present}


def _settle(folder: Path) -> None:
    """Finish a save that a crash stopped after its commit, before its weights are written over."""
    if not (folder / PENDING).is_file() or not (folder / RECORD).is_file():
        return
    try:
        record = read_record(folder)
    except DataError:
        return  # a broken record names no weights worth keeping
    if damage(folder / PENDING, record.weights) is None:
        os.replace(folder / PENDING, folder / WEIGHTS)


def _verified(folder: Path, record: Record) -> Path:
    """The weights file whose content the record names."""
    harm = damage(folder / WEIGHTS, record.weights)
    if harm is None:
        return folder / WEIGHTS
    if damage(folder / PENDING, record.weights) is None:
        return folder / PENDING
    raise DataError(f"{folder / WEIGHTS}: {harm}; use another copy, or train the model again")


def _check_values(path: Path, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        own = state[name].dtype
        if not _holds(own, tensor.dtype):
            raise DataError(
                f"{path}: '{name}' is {tensor.dtype}, which {own} of the module cannot hold "
                f"exactly; call module.to({tensor.dtype}) first"
            )
        if isinstance(state[name], nn.Parameter) and not _is_finite(tensor):
            raise DataError(f"{path}: '{name}' holds NaN or infinity; use another file")


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of *narrow* is one of *wide*."""
    if wide == narrow or not (wide.is_floating_point and narrow.is_floating_point):
        return wide == narrow
    own, other = torch.finfo(wide), torch.finfo(narrow)
    return own.eps <= other.eps and own.max >= other.max


def _is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; torch cannot ask that of an 8-bit float."""
    return bool((tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all())
