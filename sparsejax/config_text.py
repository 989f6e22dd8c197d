"""A config as text: what a run prints, saves in its folder, reads back and compares."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import json
import math
import os
import typing
from collections.abc import Sequence
from typing import Any

from sparsejax.plugs import ConfigError, check, nearest

# What may change when a run is resumed: where and how often things are written, and how the same sums are placed on devices.
RESUME_MAY_CHANGE = (
    "name", "log.*", "evaluate.*", "checkpoint.*", "mesh.*", "data.data_dir", "data.prefetch", "model.remat", "model.unroll",
    "model.attention.backend",
)


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"model.num_layers": 4, ...}` in the order of the fields."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found.update(leaves(value, f"{prefix}{field.name}."))
        else:
            found[prefix + field.name] = value
    return found


def field_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """`{"model.num_layers": int, "model": ModelConfig, ...}`: every path that a config class has, groups included."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        found[prefix + name] = hint
        if dataclasses.is_dataclass(hint):
            found.update(field_types(typing.cast(type, hint), f"{prefix}{name}."))
    return found


def check_path(cls: type, path: str, shown: str = "") -> Any:
    """The type at a dotted path of a config class.

    Raises:
      ConfigError: there is no such field; offers the nearest one, wherever it stands.
    """
    types = field_types(cls)
    if path not in types:
        group = path.rpartition(".")[0]
        same_name = [known for known in types if known.rpartition(".")[2] == path.rpartition(".")[2]]
        siblings = [known for known in types if known.rpartition(".")[0] == group] if group in types or not group else []
        hint = nearest(path, same_name) or nearest(path, siblings) or nearest(path, types)
        allowed = f" {group or 'the config'} has {', '.join(s.rpartition('.')[2] for s in siblings)}." if siblings else ""
        raise ConfigError(f"{shown or path}: there is no such config field.{hint}{allowed}")
    return types[path]


def checked[Config](config: Config, prefix: str = "") -> Config:
    """A deep copy whose every field holds what its annotation says; an int is taken for a float.

    Raises:
      ConfigError: a value of another type, or an attribute that is no field (a misspelt assignment in a config file).
    """
    hints = typing.get_type_hints(type(config))
    for name in vars(config):
        if name not in hints:
            check_path(type(config), name, prefix + name)
    result = copy.copy(config)
    for name, hint in hints.items():
        value, path = getattr(config, name), prefix + name
        if dataclasses.is_dataclass(hint):
            check(isinstance(value, typing.cast(type, hint)), path, value, f"expected {getattr(hint, '__name__', hint)}")
            setattr(result, name, checked(value, path + "."))
        else:
            setattr(result, name, _checked_value(path, value, hint))
    return result


def _checked_value(path: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is tuple:
        check(isinstance(value, tuple | list), path, value, "expected a tuple")
        return tuple(_checked_value(f"{path}[{i}]", item, typing.get_args(hint)[0]) for i, item in enumerate(value))
    if hint is float and type(value) is int:
        value = float(value)
    check(type(value) is hint, path, value, f"expected {hint.__name__}, this is {type(value).__name__}")
    check(not isinstance(value, float) or math.isfinite(value), path, value, "expected a finite number")
    return value


def to_text(config: Any) -> str:
    """One line `path = value` per field."""
    return "".join(f"{path} = {value!r}\n" for path, value in leaves(config).items())


def to_json(config: Any) -> str:
    """The config as nested JSON objects; `from_json` gives it back equal."""
    return json.dumps(dataclasses.asdict(config), indent=2, allow_nan=False) + "\n"


def from_json[Config](text: str, cls: type[Config], where: str = "config.json") -> Config:
    """The config that `to_json` wrote; a field that the text lacks keeps its default.

    Args:
      text: JSON.
      cls: the config class, e.g. `ExperimentConfig`.
      where: name of the file, for the error message.
    Raises:
      ConfigError: no JSON object, an unknown key, or a value of the wrong type.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    return from_values(values, cls, where)


def from_values[Config](values: Any, cls: type[Config], where: str) -> Config:
    """The same from nested JSON values."""
    try:
        return checked(_build(cls, values, ""))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _build[Config](cls: type[Config], values: Any, prefix: str) -> Config:
    check(isinstance(values, dict), prefix.rstrip(".") or "the top level", values, "expected a JSON object")
    hints = typing.get_type_hints(cls)
    given = {}
    for name, value in values.items():
        if name not in hints:
            check_path(cls, name, prefix + name)
        given[name] = _build(hints[name], value, f"{prefix}{name}.") if dataclasses.is_dataclass(hints[name]) else value
    return cls(**given)


def diff(config: Any, base: Any) -> list[str]:
    """`path: value in base -> value in config` for every field that differs, in order."""
    other = leaves(base)
    return [f"{path}: {other[path]!r} -> {value!r}" for path, value in leaves(config).items() if value != other[path]]


def require_same(
    run_config: Any, folder_config: Any, folder: str | os.PathLike[str] = "", ignore: Sequence[str] = RESUME_MAY_CHANGE
) -> None:
    """Raise unless a run folder was made by this config.

    Args:
      run_config: the resolved config of this run.
      folder_config: the one saved in the folder.
      folder: named in the message.
      ignore: globs of paths that may differ.
    Raises:
      ConfigError: names each field that differs, with both values.
    """
    saved = leaves(folder_config)
    differing = [
        f"  {path}: {saved[path]!r} in the folder, {value!r} now"
        for path, value in leaves(run_config).items()
        if value != saved[path] and not any(fnmatch.fnmatchcase(path, glob) for glob in ignore)
    ]
    if differing:
        name = str(folder or folder_config.name)
        raise ConfigError(f"run folder {name!r} belongs to another config:\n" + "\n".join(differing))
