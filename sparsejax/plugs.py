"""The registry behind every name in a config: `"topk:0.05"`, `"moe:experts=8,k=2"`, `"adamw"` become frozen specs here.

A method registers a frozen dataclass under a kind and one or more names. A spec string is `name`, then after a colon its
fields by position or as `field=value`, separated by commas; a tuple-valued field is written `a/b/c`. A spec whose only field
is a string takes everything after the colon as it stands, so that a path may hold commas and equal signs.
Several specs in a chain are separated by `|`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any


class ConfigError(ValueError):
    """What a user gave is not usable; the message names the field, the value, what is allowed and the nearest name."""


_REGISTRY: dict[str, dict[str, Any]] = {}

# Where the built-in names of a kind are registered: modules, or packages whose every module is imported, when a name of that
# kind is first asked for. Papers register below sparsejax.methods, whatever their kind.
_HOMES: dict[str, str] = {
    "nonlinearity": "sparsejax.ops.activations",
    "feed": "sparsejax.layers.ffn",
    "objective": "sparsejax.train.objectives",
    "source": "sparsejax.data",
    "tokenizer": "sparsejax.data.tokenizers",
    "task": "sparsejax.data",
    "corruption": "sparsejax.data.corruptions",
    "family": "sparsejax.models.families",
    "cache": "sparsejax.layers.cache",
}


def register(kind: str, *names: str) -> Callable[[Any], Any]:
    """Decorator: make a dataclass (or a zero-argument factory) available under `names` of `kind`."""

    def decorate(target: Any) -> Any:
        table = _REGISTRY.setdefault(kind, {})
        for name in names:
            if table.get(name, target) is not target:
                raise ValueError(f"{kind} {name!r} is registered twice: {table[name]} and {target}")
            table[name] = target
        return target

    return decorate


def load_methods() -> None:
    """Import every module below `sparsejax.methods`, so that adding a paper is adding a file."""
    _import_all("sparsejax.methods")


def _import_all(name: str) -> None:
    """Import a module and, if it is a package, everything below it."""
    module = importlib.import_module(name)
    for below in pkgutil.walk_packages(getattr(module, "__path__", ()), f"{name}."):
        importlib.import_module(below.name)


def _load_home(kind: str) -> None:
    if kind in _HOMES:
        _import_all(_HOMES[kind])


def names(kind: str) -> list[str]:
    """All names of a kind, sorted; imports whatever may register one."""
    _load_home(kind)
    load_methods()
    return sorted(_REGISTRY.get(kind, {}))


def nearest(name: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing when no allowed name is close."""
    close = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_choice(field: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise a ConfigError unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        listed = ", ".join(repr(a) for a in allowed)
        raise ConfigError(f"{field} = {value!r}: allowed are {listed}.{nearest(value, allowed)}")


def check(condition: Any, field: str, value: Any, rule: str) -> None:
    """Raise a ConfigError `field = value: rule` unless the condition holds."""
    if not condition:
        raise ConfigError(f"{field} = {value!r}: {rule}")


def resolve(kind: str, spec: str, field: str = "") -> Any:
    """The frozen spec that a string such as `"topk:0.05"` names.

    Args:
      kind: registry section, e.g. `"activation_op"`.
      spec: the string from the config.
      field: where the string was found, for the error message.
    Raises:
      ConfigError: unknown name, unknown or repeated field, a value of the wrong type, or one that the spec refuses.
    """
    field = field or kind
    check(isinstance(spec, str), field, spec, f"expected the name of a {kind} as a string")
    name, _, tail = spec.strip().partition(":")
    target = _lookup(kind, name, field)
    if not dataclasses.is_dataclass(target):
        check(not tail, field, spec, f"{name!r} takes no arguments")
        return target() if isinstance(target, type | types.FunctionType) else target
    if tail and getattr(target, "takes_path", False):  # the one field is a path or name, which may hold `,` and `=`
        return typing.cast(type, target)(tail)
    return _build(typing.cast(type, target), name, tail, field)


def resolve_chain(kind: str, spec: str, field: str = "") -> tuple[Any, ...]:
    """The specs of a chain `"a:1|b"`, in order."""
    return tuple(resolve(kind, part, field) for part in spec.split("|")) if spec.strip() else ()


def _lookup(kind: str, name: str, field: str) -> Any:
    """The registered target; the methods are imported only where the built-in names do not hold it."""
    if name not in _REGISTRY.get(kind, {}):
        _load_home(kind)
    if name not in _REGISTRY.get(kind, {}):
        load_methods()
    if name not in _REGISTRY.get(kind, {}):
        check_choice(f"{field}: {kind}", name, names(kind))
    return _REGISTRY[kind][name]


def _build(cls: type, name: str, tail: str, field: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}
    given = {
        key: _convert(text, fields[key], f"{field}: {name}.{key}") for key, text in _split(tail, name, fields, field).items()
    }
    missing = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in given
               and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    check(not missing, field, f"{name}:{tail}" if tail else name, f"{name!r} needs {', '.join(missing)}")
    try:
        return cls(**given)
    except ValueError as error:  # a spec checks its own values in __post_init__ and does not know the config's field
        raise ConfigError(f"{field} = {name + ':' + tail!r}: {error}") from error


def _split(tail: str, name: str, fields: dict[str, Any], field: str) -> dict[str, str]:
    """The text of each field that a spec's tail gives."""
    if list(fields.values()) == [str]:
        (key,) = fields
        return {key: tail.strip().removeprefix(f"{key}=")} if tail.strip() else {}
    given: dict[str, str] = {}
    by_name = False
    for position, part in enumerate(tail.split(",") if tail.strip() else []):
        key, equals, text = (word.strip() for word in part.partition("="))
        by_name = by_name or bool(equals)
        if not equals:
            check(part.strip(), field, f"{name}:{tail}", "there is an empty value between commas")
            check(not by_name, field, f"{name}:{tail}", f"{key!r} has no name but stands after a named value")
            check(position < len(fields), field, f"{name}:{tail}", f"{name!r} takes at most {len(fields)} values")
            key, text = list(fields)[position], key
        check_choice(f"{field}: field of {name!r}", key, fields)
        check(key not in given, field, f"{name}:{tail}", f"{key!r} is given twice")
        given[key] = text
    return given


def _convert(text: str, hint: Any, field: str) -> Any:
    """Text to the annotated type; `1e3` is a valid int, `1.5` is not."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return tuple(_convert(part, arguments[0], field) for part in text.split("/"))
    if origin is typing.Literal:
        check_choice(field, text, arguments)
        return text
    if origin in (types.UnionType, typing.Union):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if text.lower() == "none" else _convert(text, inner, field)
    try:
        if hint is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if hint is int:
            return parse_int(text)
        value = hint(text)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{field} = {text!r}: expected {getattr(hint, '__name__', hint)}") from error
    check(not (isinstance(value, float) and math.isnan(value)), field, text, "expected a number")
    return value


def parse_int(text: str) -> int:
    """An int from `"1000"` or `"1e3"`.

    Raises:
      ValueError: no whole number.
    """
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise ValueError(f"{text!r} is not a whole number") from None
        return int(number)
