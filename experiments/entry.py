"""What every verb shares: flags, the config with its overrides, one message for a refusal, and the result as JSON.

A verb is a file `experiments/VERB.py` of a few lines below a docstring that is its help:

    @dataclass
    class Flags:
        out: str = entry.flag("", "run folder; by default runs/NAME")
        resume: str = entry.flag("auto", "auto, never, step=N or the path of a checkpoint")

    def main(call: entry.Call[Flags]) -> dict[str, Any]:
        return loop.run(call.config, base=call.base, out=call.flags.out, resume=call.flags.resume)

    if __name__ == "__main__":
        entry.run(main, Flags)

`--config FILE.py:ARGUMENT`, `--config.model.num_layers=4`, `--json PATH` and `--help` come with it. What `main` returns is the
result: it is written to `--json PATH` as it was printed for people. A ConfigError, wherever it is raised, ends the process with
one message and status 2.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from sparsejax.config import ExperimentConfig, finalize
from sparsejax.config_text import check_path, from_json
from sparsejax.plugs import ConfigError, check, check_choice, nearest, parse_int

PACKAGES = ("sparsejax", "jax", "jaxlib", "flax", "numpy", "tokenizers")  # whose versions reports name

# What `--dtype` says, see `computing_in`.
DTYPE = "float32, bfloat16, or layercast (linear maps in bfloat16, computed in float32)"


@dataclasses.dataclass
class Call[Flags]:
    """What a verb was called with.

    config: finalized, with overrides; None where the verb takes none and none was given.
    base: the file's own config, before overrides and not finalized: what `config_text.diff` compares with.
    flags: the verb's own flags.
    command: the command line, for the record.
    names: positional arguments, for verbs that take any.
    """

    config: ExperimentConfig | None
    base: ExperimentConfig | None
    flags: Flags
    command: str = ""
    names: tuple[str, ...] = ()


@dataclasses.dataclass
class NoFlags:
    """For a verb without flags of its own."""


def flag(default: Any, text: str) -> Any:
    """A field of a verb's flags, with its help."""
    return dataclasses.field(default=default, metadata={"help": text})


def run(
    main: Callable[[Call[Any]], Any],
    flags: type = NoFlags,
    *,
    config: bool = True,
    names: str = "",
    argv: Sequence[str] | None = None,
) -> typing.NoReturn:
    """Run a verb and leave the process.

    Args:
      main: does the work, prints for people, returns the result as JSON values (arrays and dataclasses included) or None.
      flags: a dataclass; each field (str, int, float, bool or tuple[str, ...]) is a flag.
      config: whether `--config` must be given.
      names: what positional arguments are, e.g. "claim"; none are accepted when empty.
      argv: by default the process's.
    Raises:
      SystemExit: always; 0 when what was asked for was done, 2 after a refusal. Other errors pass through as they are.
    """
    try:
        call, json_path = parse(sys.argv if argv is None else argv, flags, config=config, names=names, description=main)
        result = main(call)
        if json_path:
            write_json(json_path, result)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    sys.exit(0)


def parse(
    argv: Sequence[str], flags: type = NoFlags, *, config: bool = True, names: str = "", description: Any = None
) -> tuple[Call[Any], str]:
    """(call, path for JSON or "") of a command line, `argv[0]` being the program.

    Raises:
      ConfigError: anything in it that is unknown or unusable.
      SystemExit: after printing the help that `--help` asks for.
    """
    values = absl_flags.FlagValues()
    argv, spec = _config_first(argv)
    absl_flags.DEFINE_string("json", "", "write the result to this file as JSON", flag_values=values)
    absl_flags.DEFINE_boolean("help", False, "print this", short_name="h", flag_values=values)
    for field in dataclasses.fields(flags):
        _define(field, typing.get_type_hints(flags)[field.name], values)
    argv = [argv[0], *(_underscored(argument, values) for argument in argv[1:])]
    base = load_config(spec) if spec else None
    _check_overrides(argv, base, values)
    holder = base or ExperimentConfig()
    config_flags.DEFINE_config_dataclass(
        "config", holder, "FILE.py or FILE.py:ARGUMENT; override a field with --config.model.num_layers=4", flag_values=values,
        sys_argv=argv, parse_fn=lambda _: copy.deepcopy(holder),
    )
    try:
        names_given = values(argv)[1:]
    except absl_flags.Error as error:
        raise ConfigError(_in_our_words(error, values)) from error
    if values.help:
        print(_help(description, values))
        sys.exit(0)
    check(spec or not config, "--config", "", "give a config, e.g. --config configs/tiny_relu2.py")
    check(names or not names_given, "argument", " ".join(names_given), "this verb takes flags only (--name=value)")
    if values.json:
        _check_writable(values.json)
    absl_flags.FLAGS.mark_as_parsed()  # libraries that ask absl for their own flags get the defaults
    own = flags(**{field.name: _own_value(values, field.name) for field in dataclasses.fields(flags)})
    return Call(finalize(values.config) if spec else None, base, own, _command(argv), tuple(names_given)), values.json


def load_config(spec: str) -> ExperimentConfig:
    """What `get_config(ARGUMENT)` of `FILE.py:ARGUMENT` returns; of a `.json` file, the config saved in it.

    Raises:
      ConfigError: no such file, a file that does not run or has no `get_config`, or one that returns something else.
    """
    path_text = spec.partition(":")[0]
    path = _existing("--config", path_text)
    if path.suffix == ".json":
        try:
            return from_json(path.read_text(encoding="utf-8"), ExperimentConfig, path_text)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config = {path_text!r}: cannot be read ({error})") from error
    check(path.suffix == ".py", "--config", path_text, "expected a .py or .json file")
    config = from_file("--config", spec, "get_config")
    check(isinstance(config, ExperimentConfig), "--config", path_text,
          f"get_config returned {type(config).__name__}, expected ExperimentConfig")
    return config


def from_file(flag: str, spec: str, function: str) -> Any:
    """What `function(ARGUMENT)` of `FILE.py:ARGUMENT` returns.

    Args:
      flag: that `spec` was given with, for messages.
    Raises:
      ConfigError: no such file, or one that does not run or lacks the function; what the function raises, with its line.
    """
    path_text, _, argument = spec.partition(":")
    path = _existing(flag, path_text)
    called = getattr(_execute(path, flag), function, None)
    check(callable(called), flag, path_text, f"the file has no function {function}(arg)")
    try:
        return typing.cast(Any, called)(argument)
    except ConfigError:
        raise
    except Exception as error:  # whatever a user's file does wrong is told in its own place
        raise ConfigError(_where(error, path)) from error


def _existing(flag: str, path_text: str) -> Path:
    path = Path(path_text)
    if not path.is_file():
        siblings = [str(p) for pattern in ("*.py", "*.json") for p in path.parent.glob(pattern)] if path.parent.is_dir() else []
        raise ConfigError(f"{flag} = {path_text!r}: there is no such file.{nearest(path_text, siblings)}")
    return path


def write_json(path: str | Path, result: Any) -> None:
    """Write a result whole or not at all; numbers that JSON cannot hold (nan, infinity) become null.

    Raises:
      ConfigError: the file cannot be written.
      TypeError: the result holds something that is no JSON value.
    """
    path = Path(path)
    text = json.dumps(_json_value(result), indent=2, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"--json = {str(path)!r}: cannot be written ({error})") from error


def _json_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _json_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
        return _json_value(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{type(value).__name__} is no JSON value: {value!r}")


class IntParser(absl_flags.ArgumentParser[int]):
    """Whole numbers, also written `1e3`."""

    syntactic_help = "a whole number, e.g. 1000 or 1e3"

    def parse(self, argument: Any) -> int:
        if isinstance(argument, int) and not isinstance(argument, bool):
            return argument
        try:
            return parse_int(str(argument))
        except (ValueError, OverflowError):
            raise ValueError(f"expected {self.syntactic_help}") from None

    def flag_type(self) -> str:
        return "int"


class StringsParser(tuple_parser.TupleParser):
    """Tuples of strings: one string as it stands, or a Python tuple; specs hold commas, so that commas alone never split."""

    def parse(self, argument: Any) -> tuple[str, ...]:
        if isinstance(argument, tuple):
            return argument
        if not argument.startswith(("(", "[")):
            return (argument,) if argument else ()
        try:
            value = ast.literal_eval(argument)
        except (ValueError, SyntaxError):
            value = None
        if not isinstance(value, tuple | list) or not all(isinstance(item, str) for item in value):
            raise ValueError("expected one string, or a tuple such as '(\"a\", \"b\")', or the flag given several times")
        return tuple(value)


config_flags.register_flag_parser_for_type(int, IntParser())
config_flags.register_flag_parser_for_type(tuple[str, ...], StringsParser())


def _define(field: dataclasses.Field[Any], hint: Any, values: absl_flags.FlagValues) -> None:
    define: dict[Any, Callable[..., Any]] = {
        str: absl_flags.DEFINE_string,
        float: absl_flags.DEFINE_float,
        bool: absl_flags.DEFINE_boolean,
        int: lambda *a, **k: absl_flags.DEFINE(IntParser(), *a, **k),
        tuple[str, ...]: absl_flags.DEFINE_multi_string,
    }
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    define[hint](field.name, default, field.metadata.get("help", ""), flag_values=values)


def _underscored(argument: str, values: absl_flags.FlagValues) -> str:
    """`--data-dir` is `--data_dir`."""
    match = re.match(r"(--?)([\w-]+)(.*)", argument, re.DOTALL)
    name = match[2].replace("-", "_") if match else ""
    return f"{match[1]}{name}{match[3]}" if match and name in values else argument


def computing_in(dtype: str) -> None:
    """Refuse a `--dtype` that is none; `layercast` is for results that do not depend on device and batch, so that its products
    are in full float32 where a GPU's or TPU's default is less.

    Raises:
      ConfigError: names what is allowed.
    """
    check_choice("--dtype", dtype, ("float32", "bfloat16", "layercast"))
    if dtype == "layercast":
        import jax

        jax.config.update("jax_default_matmul_precision", "float32")


def about(command: str) -> dict[str, Any]:
    """What reports say of how they came about: the command, the device and the versions of what is installed."""
    import jax

    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    return {
        "command": command,
        "device": f"{device.platform}: {device.device_kind}",
        "versions": versions | {"python": platform.python_version()},
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _command(argv: Sequence[str]) -> str:
    module = getattr(sys.modules["__main__"].__spec__, "name", None)
    return shlex.join(["python", *(["-m", module.removesuffix(".__main__")] if module else [argv[0]]), *argv[1:]])


def _own_value(values: absl_flags.FlagValues, name: str) -> Any:
    value = values[name].value
    return tuple(value) if isinstance(value, list) else value


def _config_first(argv: Sequence[str]) -> tuple[list[str], str]:
    """The command line with `--config` moved to the front, where config_flags wants it, and its value."""
    rest, spec = [argv[0]], ""
    arguments = iter(argv[1:])
    for argument in arguments:
        if argument in ("--config", "-config"):
            value = next(arguments, "")
        elif match := re.match(r"--?config=(.*)", argument, re.DOTALL):
            value = match[1]
        else:
            rest.append(argument)
            continue
        check(value and not value.startswith("-"), "--config", value, "give a config file, e.g. --config configs/tiny_relu2.py")
        check(not spec, "--config", value, f"given twice, {spec!r} before")
        spec = value
    return [rest[0], *([f"--config={spec}"] if spec else []), *rest[1:]], spec


def _check_overrides(argv: Sequence[str], base: ExperimentConfig | None, values: absl_flags.FlagValues) -> None:
    """Refuse fields that a config has not, in our words; config_flags would answer with a KeyError."""
    for argument in argv[1:]:
        match = re.match(r"--?(no)?config\.([^=]*)", argument)
        if not match:
            continue
        check(base is not None, argument, "", "an override needs --config")
        hint = check_path(ExperimentConfig, match[2], f"--config.{match[2]}")
        if dataclasses.is_dataclass(hint):
            fields = ", ".join(f.name for f in dataclasses.fields(hint))
            raise ConfigError(f"{argument}: config.{match[2]} is a group; set one of its fields: {fields}")


def _in_our_words(error: Exception, values: absl_flags.FlagValues) -> str:
    """absl's message, with the nearest flag when the flag is unknown."""
    if isinstance(error, absl_flags.UnrecognizedFlagError):
        known = [name for name in values if name != "h" and not name.startswith("config.")]
        close = difflib.get_close_matches(error.flagname, known, n=1, cutoff=0.5)
        hint = f" Did you mean --{close[0]}?" if close else ""
        return f"--{error.flagname}: there is no such flag.{hint} Flags are {', '.join('--' + name for name in sorted(known))}."
    return str(error)


def _check_writable(path_text: str) -> None:
    """Before the work, not after it."""
    path = Path(path_text)
    check(not path.is_dir(), "--json", path_text, "is a folder, expected a file")
    parent = next(p for p in (path.absolute().parent, *path.absolute().parents) if p.exists())
    check(parent.is_dir() and os.access(parent, os.W_OK), "--json", path_text, f"{parent} is not a folder that can be written")


def _help(description: Any, values: absl_flags.FlagValues) -> str:
    module = sys.modules.get(getattr(description, "__module__", ""))
    return f"{(getattr(module, '__doc__', None) or '').strip()}\n{values.get_help(include_special_flags=False)}"


def _execute(path: Path, flag: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{flag} = {str(path)!r}: expected a .py file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        raise
    except Exception as error:  # a config is code: whatever it raises is a fault of that file
        raise ConfigError(_where(error, path)) from error
    return module


def _where(error: Exception, path: Path) -> str:
    """`configs/x.py, line 12: NameError: ...`"""
    if isinstance(error, SyntaxError):
        return f"{path}, line {error.lineno}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    line = f", line {lines[-1]}" if lines else ""
    return f"{path}{line}: {type(error).__name__}: {error}"
