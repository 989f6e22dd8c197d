"""A model folder: `model.json`, the tokenizer, and the parameters as safetensors in whatever array types they have.

`load` rebuilds the model on any mesh, without calibrating or running the recipe that made it: packed weights come back packed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparsejax import config_text, nnx_compat
from sparsejax.arrays import WEIGHT_ARRAYS, QTensor
from sparsejax.io import model_json
from sparsejax.io.files import refuse_unless
from sparsejax.io.model import Model, computed_in
from sparsejax.io.safetensors_file import open_safetensors, write_safetensors
from sparsejax.io.tensors import TensorSource
from sparsejax.models.config import ModelConfig
from sparsejax.models.transformer import Transformer
from sparsejax.nnx_compat import COMPUTE_ROLES, Structure, Weight, held_in
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.parallel import rules
from sparsejax.plugs import ConfigError, check, check_choice

STORED = "safetensors"


def save(model: Model, folder: Path | str) -> None:
    """Write a model into a new or empty folder; `model.json` comes last, so that a folder that has one is whole.

    Raises:
      ConfigError: the folder is in use or not writable.
    """
    folder = claim(folder, "--out")
    arrays = {}
    for path in model.structure.paths:
        arrays[".".join(path)] = _description(nnx_compat.at(model.values, path))
    weights = {"stored": STORED, "arrays": arrays}
    texts = model_json.files(model.config, weights, model.tokenizer, model.chat_template, model.source)
    write_safetensors(folder, list(_parts(model.structure, model.values)))
    write_texts(folder, dict(reversed(texts.items())))


def write_texts(folder: Path, texts: dict[str, str]) -> None:
    """Write text files beside the weights in order, the one that makes the folder a model last; all or none stay."""
    try:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        for path in folder.iterdir():  # it was empty when it was claimed
            path.unlink(missing_ok=True)
        raise ConfigError(f"{folder}: could not be written ({error}); nothing was left in it") from error


def claim(folder: Path | str, flag: str) -> Path:
    """A new or empty folder, made if need be; ConfigError names the flag otherwise."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check(not any(folder.iterdir()), flag, str(folder), "is not empty")
    except OSError as error:
        raise ConfigError(f"{flag} = {str(folder)!r}: not usable as a folder ({error})") from error
    return folder


def load(folder: Path | str, *, name: str = "", dtype: str = "float32", mesh: Mesh | None = None) -> Model:
    """The model of a folder that `save` wrote, each array on its devices.

    Args:
      folder: with a `model.json`.
      name: how the user named it.
      dtype: of the computation, and of matrices, embeddings and biases that are stored as plain arrays.
      mesh: where the parameters go; None: the default device.
    Raises:
      ConfigError: names the file and the key or array that is missing, unknown, or of another shape or type.
    """
    folder = Path(folder)
    found = model_json.read(folder)
    where = str(folder / model_json.MODEL_JSON)
    check_choice(f"{where}: weights.stored", found.weights.get("stored"), (STORED,))
    config = computed_in(config_text.from_values(found.config, ModelConfig, where), dtype)
    structure, shapes = _abstract(config, where)
    source, described = open_safetensors(folder), found.weights.get("arrays", {})
    check(isinstance(described, dict), f"{where}: weights.arrays", described, "expected an object")
    names = {".".join(path) for path in structure.paths}
    wrong = sorted(names.symmetric_difference(described))
    check(not wrong, f"{where}: weights.arrays", wrong[:8], "missing or unknown parameters of this config")
    reader = _Reader(source, described, where, dtype, config.dtype, mesh)
    values: dict[str, Any] = {}
    for path, weight in zip(structure.paths, structure.variables, strict=True):
        nnx_compat.put(values, path, reader.read(".".join(path), weight, nnx_compat.at(shapes, path).shape))
    return Model(name or str(folder), config, structure, values, found.tokenizer, found.chat_template, found.source)


def _abstract(config: ModelConfig, where: str) -> tuple[Structure, dict[str, Any]]:
    """Structure and shapes; sizes that make no model are the file's fault."""
    sizes = {"num_layers": config.num_layers, "d_model": config.d_model, "num_heads": config.attention.num_heads}
    for name, size in sizes.items():
        check(0 < size < 2**24, f"{where}: config: {name}", size, "must be positive, and no model is that large")
    try:
        return nnx_compat.abstract(lambda: Transformer(config, jax.random.key(0)))
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"{where}: config: describes no model ({error})") from error


def _description(value: Any) -> dict[str, Any]:
    """Array type and static fields of one parameter, as JSON values."""
    if not dataclasses.is_dataclass(value):
        return {"type": "Array"}
    static = {}
    for one in dataclasses.fields(value):
        field = getattr(value, one.name)
        if one.name not in _data_fields(value):
            plain = str(field) if isinstance(field, FormatSpec) else field
            static[one.name] = str(jnp.dtype(field)) if one.name == "dtype" else plain
    return {"type": type(value).__name__, **static}


def _data_fields(value: Any) -> list[str]:
    """Names of the array fields of a weight array; a surrogate that is None has none."""
    leaves = jax.tree_util.tree_flatten_with_path(value)[0]
    return [jax.tree_util.keystr(path, simple=True) for path, _ in leaves]


def _parts(structure: Structure, values: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], np.dtype, Any]]:
    """(stored name, shape, dtype, how to get it) of every array that makes up the parameters."""
    for path in structure.paths:
        value, name = nnx_compat.at(values, path), ".".join(path)
        if dataclasses.is_dataclass(value):
            parts = {f"{name}.{field}": getattr(value, field) for field in _data_fields(value)}
        else:
            parts = {name: value}
        for stored, array in parts.items():
            yield stored, array.shape, np.dtype(array.dtype), lambda array=array: np.asarray(jax.device_get(array))


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Rebuilds parameters from their descriptions and stored arrays."""

    source: TensorSource
    described: dict[str, Any]
    where: str
    dtype: str
    computed: str
    mesh: Mesh | None

    def read(self, name: str, weight: Weight, shape: tuple[int, ...]) -> Any:
        """One parameter on its devices."""
        described = self.described[name]
        refuse_unless(isinstance(described, dict), f"{self.where}: weights.arrays.{name}", described, "expected an object")
        fields = dict(described)
        kind = fields.pop("type", None)
        check_choice(f"{self.where}: weights.arrays.{name}.type", kind, ("Array", *WEIGHT_ARRAYS))
        if kind == "Array":
            array = self._place(name, weight)
            check(array.shape == shape, f"{self.source.path}: {name}", array.shape, f"the config needs {shape}")
            return array.astype(held_in(weight.role, self.dtype)) if weight.role in COMPUTE_ROLES else array
        value = self._rebuild(name, weight, WEIGHT_ARRAYS[kind], fields)
        stored = (*value.codes.shape[:-2], *value.shape) if isinstance(value, QTensor) else value.shape
        needed = tuple(shape[-len(stored):])
        check(tuple(stored) == needed, f"{self.source.path}: {name}", stored, f"the config needs {needed}")
        return value

    def _place(self, stored: str, weight: Weight) -> jax.Array:
        check(stored in self.source.tensors, f"{self.source.path}: tensor", stored, f"is missing; {self.where} names it")
        array = self.source.read(stored)
        if self.mesh is None:
            return jnp.asarray(array)
        return jax.device_put(array, jax.NamedSharding(self.mesh, rules.spec_for(weight.axes, array.shape, self.mesh)))

    def _rebuild(self, name: str, weight: Weight, kind: type, fields: dict[str, Any]) -> Any:
        """A weight array of a registered type; its fields are stored arrays, static values, or absent (None)."""
        allowed = [one.name for one in dataclasses.fields(kind)]
        for field in fields:
            check_choice(f"{self.where}: weights.arrays.{name}: field of {kind.__name__}", field, allowed)
        static = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        if "dtype" in static:
            static["dtype"] = jnp.dtype(self.computed)
        if "spec" in static:
            static["spec"] = FormatSpec.parse(fields["spec"], f"{self.where}: weights.arrays.{name}.spec")
        arrays = {one: self._place(f"{name}.{one}", weight) for one in allowed if f"{name}.{one}" in self.source.tensors}
        optional = {one.name for one in dataclasses.fields(kind) if one.default is None}
        absent = sorted(set(allowed) - optional - set(arrays) - set(static))
        check(not absent, f"{self.source.path}: {name}", absent, f"parts of a {kind.__name__} that are missing")
        value = kind(**{**dict.fromkeys(allowed), **static, **arrays})
        if isinstance(value, QTensor):
            value.check(f"{self.source.path}: {name}")
        return value
