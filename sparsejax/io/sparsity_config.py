"""`sparsity_config.json`: what a published `config.json` has no words for, beside it and versioned.

It holds the rules that put ops at sites, as the strings that a config has (`model.inputs`, `weights`, `neurons`, `residuals`).
The arrays of these ops (fitted thresholds, low-rank factors, maps of skip paths) lie in `sparsity.safetensors`, under their
names in the model with layers written out: `blocks.3.mlp.down.inputs.0.threshold`. A reader that does not know the files
computes the dense model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import nnx_compat
from sparsejax.io.files import open_files, read_object
from sparsejax.io.model import Model
from sparsejax.io.name_map import parameter_slots
from sparsejax.io.safetensors_file import Safetensors, read_header
from sparsejax.layers.op import FIELDS
from sparsejax.models.config import ModelConfig
from sparsejax.models.transformer import abstract_transformer
from sparsejax.plugs import ConfigError, check, check_choice
from sparsejax.quantized_arrays import QTensor

NAME, ARRAYS = "sparsity_config.json", "sparsity.safetensors"
FORMAT = 1


def written(config: ModelConfig) -> dict[str, Any] | None:
    """The document of a config; None where `config.json` says it all."""
    rules = {field: list(getattr(config, field)) for field in FIELDS}
    return {"format": FORMAT, **rules} if any(rules.values()) else None


def arrays_of_ops(model: Model) -> list[tuple[str, tuple[int, ...], np.dtype, Any]]:
    """What the rules of a model have added to its parameters, by name with layers written out, for `write_safetensors`.

    Raises:
      ConfigError: an array in a format of ours (the factors of LoRC), which these files do not hold.
    """
    slots = parameter_slots(model.module(), model.structure.paths)
    dense = dataclasses.replace(model.config, inputs=(), weights=(), neurons=(), residuals=())
    structure, shapes = abstract_transformer(dense)
    added = sorted(set(slots) - set(parameter_slots(nnx_compat.merge(structure, shapes), structure.paths)))
    arrays = {name: model.parameter(name) for name in added}
    stored = [name for name, array in arrays.items() if isinstance(array, QTensor)]
    check(not stored, "--format: arrays of rules", stored[:4], "are in a number format; keep the model as a folder of ours")
    return [
        (name, array.shape, np.dtype(array.dtype), lambda array=array: np.asarray(jax.device_get(array)))
        for name, array in arrays.items()
    ]


def applied(model: Model, path: Path) -> Model:
    """The model with the rules of the files in a Hugging Face folder or archive, if it has them.

    Raises:
      ConfigError: another format, unknown keys, rules that do not parse, an array that is missing or misshapen; names the file.
    """
    files = open_files(path)
    if NAME not in files.names:
        return model
    document, where = read_object(files, NAME), files.where(NAME)
    check(document.get("format") == FORMAT, f"{where}: format", document.get("format"), f"this version reads {FORMAT}")
    for key in document:
        check_choice(f"{where}: key", key, ("format", *FIELDS))
    rules = {field: _rules(document.get(field, []), f"{where}: {field}") for field in FIELDS}
    arrays: dict[str, Any] = {}
    if ARRAYS in files.names:
        source = Safetensors(path, files, {ARRAYS: read_header(files, ARRAYS)})
        arrays = {name: jnp.asarray(source.read(name)) for name in source.tensors}
    try:
        ruled = model.with_rules(arrays, **rules)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return dataclasses.replace(ruled, values=_in_types(ruled, arrays))


def _in_types(model: Model, arrays: dict[str, Any]) -> dict[str, Any]:
    """The values with each array of an op in the dtype that its role has in this model; whole numbers stay what they are."""
    slots = parameter_slots(model.module(), model.structure.paths)
    new = {slots[name].path for name in arrays}
    values: dict[str, Any] = {}
    for path, weight in zip(model.structure.paths, model.structure.variables, strict=True):
        value = nnx_compat.at(model.values, path)
        if path in new and jnp.issubdtype(value.dtype, jnp.floating):
            value = value.astype(model.config.dtype if weight.role in nnx_compat.COMPUTE_ROLES else jnp.float32)
        nnx_compat.put(values, path, value)
    return values


def _rules(value: Any, where: str) -> tuple[str, ...]:
    strings = isinstance(value, list) and all(isinstance(rule, str) for rule in value)
    check(strings, where, value, "expected a list of strings 'SITE_GLOB=OP|OP'")
    return tuple(value)
