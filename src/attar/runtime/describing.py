"""Objects as JSON, for a record of what something was made with."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any


def described(value: Any) -> Any:
    """A value as JSON: functions by their names, options by theirs."""
    if isinstance(value, partial):
        options = {name: described(option) for name, option in value.keywords.items()}
        return {"name": described(value.func), **options}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: described(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if isinstance(value, dict):
        return {str(name): described(item) for name, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
