"""The file ``model.json``: what a model folder says about its weights, and how it is checked."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from attar.runtime import DataError, UsageError

RECORD = "model.json"
WEIGHTS: Final = "model.safetensors"
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
WEIGHT_FILES = PICKLES | {".safetensors"}
CONFIG: Final = "config.json"  # of a folder that transformers saved
FORMAT: Final = "attar-model/1"
LIMIT = 1 << 20  # bytes

Natural = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TensorInfo(_Strict):
    """Type (safetensors' name for it) and shape of one stored tensor."""

    dtype: str
    shape: list[Natural]


class WeightsFile(_Strict):
    """The weights file beside the record."""

    file: Literal["model.safetensors"] = WEIGHTS
    bytes: Natural
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Record(_Strict):
    """``model.json``, without its checksum."""

    format: Literal["attar-model/1"] = FORMAT
    family: str | None
    options: dict[str, JsonValue]
    parameters: Natural
    weights: WeightsFile
    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    extra: dict[str, JsonValue]

    def shapes(self) -> dict[str, list[int]]:
        """The shape of every name in the state dict, tied ones included."""
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        return shapes | {alias: shapes[name] for alias, name in self.aliases.items()}


def encode(record: Record) -> bytes:
    """The one spelling of *record*, with the checksum of the rest as its last entry."""
    body = record.model_dump()
    digest = hashlib.sha256(_text(body).encode()).hexdigest()
    return _text({**body, "checksum": digest}).encode()


def describe(**fields: Any) -> bytes:
    """The content of a record of *fields*; a UsageError where it could not be read again."""
    try:
        # Through JSON, so that tuples and the like become what a reader will find.
        record = Record.model_validate(json.loads(_text({**fields, "format": FORMAT})))
        data = encode(record)
    except ValidationError as error:
        raise UsageError(f"the model cannot be described in {RECORD}: {_first(error)}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"extra must hold only JSON values ({error}); convert them") from None
    if len(data) > LIMIT:
        raise UsageError(
            f"{RECORD} would have {len(data)} bytes, and at most {LIMIT} are read; make extra "
            "smaller, or give mean and std fewer columns"
        )
    return data


def read_record(folder: Path) -> Record:
    """The record of the model in *folder*; a DataError for one that `encode` did not write."""
    path = folder / RECORD
    with path.open("rb") as file:
        data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise DataError(f"{path}: longer than {LIMIT} bytes, so not a file that attar wrote")
    record = _parse(path, data)
    _check_aliases(path, record)
    return record


def _parse(path: Path, data: bytes) -> Record:
    try:
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError("no table")
        _check_format(path, value.get("format"))
        value.pop("checksum", None)
        record = Record.model_validate(value)
        intact = encode(record) == data
    except DataError:
        raise
    except ValidationError as error:
        raise DataError(f"{path}: {_first(error)}; use another copy") from None
    except ValueError:
        raise DataError(f"{path}: not a JSON table, so it is damaged; use another copy") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply to be a file that attar wrote") from None
    if not intact:
        raise DataError(
            f"{path}: its checksum does not fit, so it was edited or damaged; use another copy, "
            "or save the model again"
        )
    return record


def _check_format(path: Path, version: object) -> None:
    if version != FORMAT:
        raise DataError(f"{path}: its format is {version!r:.80}; this attar reads '{FORMAT}'")


def _check_aliases(path: Path, record: Record) -> None:
    for alias, name in record.aliases.items():
        if alias in record.tensors or name not in record.tensors:
            raise DataError(
                f"{path}: alias {alias!r:.80} must be a new name for a stored tensor, "
                f"but points from or to the wrong one ({name!r:.80})"
            )


def model_folder(path: Path) -> Path:
    """*path*, if it is a folder that `save` wrote; else a DataError that says where to look."""
    if path.is_file():
        raise DataError(f"{path}: {_advice_for_file(path)}")
    if not path.is_dir():
        if path.suffix.lower() in WEIGHT_FILES:
            raise DataError(f"{path}: there is no such file; check the path")
        raise DataError(f"{path}: there is no such folder; {_models_below(path.parent, 2)}")
    if (path / CONFIG).is_file() and not (path / RECORD).is_file():
        raise DataError(
            f"{path}: holds no {RECORD}, but a {CONFIG} as transformers saves it; its weights "
            f"start a model of the family pretrained: {{name: pretrained, path: {path}}}"
        )
    if not (path / RECORD).is_file():
        raise DataError(f"{path}: holds no {RECORD}; {_models_below(path, 3)}")
    return path


def to_convert(path: Path) -> str:
    """What to do about a file of pickled weights."""
    return (
        "is not read, because such a file can hold code; convert it, which runs none: "
        f"attar import {shlex.quote(str(path))} --into {shlex.quote(path.stem)}.safetensors"
    )


def _advice_for_file(path: Path) -> str:
    if path.suffix.lower() in PICKLES:
        return to_convert(path)
    if any((path.parent / name).is_file() for name in (RECORD, CONFIG)):
        return f"is a file of a model folder; load the folder, {path.parent}"
    return (
        "is a file of weights, which does not say of what network; name its family beside it, "
        f"teacher: {{model: FAMILY, load: {path}}}, or put the config.json of transformers beside "
        "it and load the folder; in Python attar.models.load_weights(model, path) fills a model"
    )


def _models_below(folder: Path, levels: int) -> str:
    patterns = ("*/" * level + WEIGHTS for level in range(1, levels + 1))
    beside = (match.parent for pattern in patterns for match in sorted(folder.glob(pattern)))
    found = (path for path in beside if (path / RECORD).is_file() or (path / CONFIG).is_file())
    shown = [str(path) for path in islice(found, 9)]
    if not shown:
        return "write one with attar.models.save(model, folder)"
    return f"models are in: {', '.join(shown[:8])}{', ...' if len(shown) > 8 else ''}"


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def printable(text: str) -> str:
    """*text*, escaped where it holds what a terminal might obey."""
    return text if text.isprintable() else ascii(text)


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])[:80]
    return printable(f"{place or 'the file'}: {first['msg']}")
