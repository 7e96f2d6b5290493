"""What settings may be: checks of a dataclass of settings, and reading one from JSON (imports no torch)."""

import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from twolevel.errors import UserError


def check(config: object, name: str, holds: bool, what: str) -> None:
    """Raise UserError, which names the setting and its value, unless `holds`; `what` would be right."""
    if not holds:
        raise UserError(f"{name}={getattr(config, name)} is invalid; use {what}")


def check_finite(config: Any) -> None:
    """Raise UserError for a setting that is infinite or not a number."""
    for field in fields(config):
        value = getattr(config, field.name)
        check(config, field.name, not isinstance(value, float) or math.isfinite(value), "a finite number")


def check_least(config: object, least: int, *names: str) -> None:
    """Raise UserError for a setting below `least`; None is what a setting is unless given."""
    for name in names:
        value = getattr(config, name)
        check(config, name, value is None or value >= least, f"{least} or more")


def is_number(value: object) -> bool:
    """Whether a value read from JSON is a number with which one can compute."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def from_dict(cls: type, values: Any, origin: str) -> Any:
    """An instance of a dataclass, nested ones too, from the values of a JSON file called `origin`.

    Raises UserError for a setting that does not exist or a value of another type.
    """
    if not isinstance(values, dict):
        raise UserError(f"{origin} holds {values!r} where {cls.__name__} has named settings")
    known = {f.name: f.type for f in fields(cls)}
    given = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(
                f"{origin} has the setting {name!r}, which {cls.__name__} does not know; use {[*known]}"
            )
        kind = known[name]
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        if isinstance(kind, type) and is_dataclass(kind):
            given[name] = from_dict(kind, value, origin)
            continue
        if not _fits(value, kind):
            raise UserError(f"{origin}: {name}={value!r} is invalid; use {_words(kind)}")
        given[name] = value
    return cls(**given)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON is one of a field's type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (UnionType, Union):
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is dict:
        of, to = get_args(kind)
        return isinstance(value, dict) and all(_fits(k, of) and _fits(v, to) for k, v in value.items())
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_fits(v, get_args(kind)[0]) for v in value)
    if kind is NoneType:
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str | Path) if kind is Path else isinstance(value, kind)


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is Union:
        return " or ".join(map(_words, get_args(kind)))
    if kind is NoneType:
        return "null"
    return getattr(kind, "__name__", str(kind)).replace(" | None", " or null")
