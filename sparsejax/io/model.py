"""A model in memory with all that the verbs need of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import nnx_compat
from sparsejax.data.tokenizers import Tokenizer
from sparsejax.io.name_map import Slot, parameter_slots
from sparsejax.layers.op import FIELDS
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import check_sites
from sparsejax.models.transformer import Transformer, abstract_transformer
from sparsejax.nnx_compat import LAYERCAST, Structure
from sparsejax.plugs import check


def computed_in(config: ModelConfig, dtype: str) -> ModelConfig:
    """The config of a model that is loaded to compute in `dtype`, its residual stream in float32.

    In bfloat16 that stream halves the error: SmolLM2's most likely token is float32's for 99.1 % of tokens, and for 98.5 % with
    a bfloat16 stream. `LAYERCAST` computes in float32.
    """
    return dataclasses.replace(config, dtype="float32" if dtype == LAYERCAST else dtype, residual_dtype="float32")


@dataclass(frozen=True)
class Model:
    """What `--model` resolves to.

    Fields:
      name: as the user named it.
      config: finalized: nothing is left to derive.
      structure: of the Transformer.
      values: its parameters; matrices and embeddings in the compute dtype, norms in float32.
      tokenizer: None for a model of images.
      chat_template: Jinja2, None where the model has none.
      source: where it came from: `family`, `path`, `config` (as published), `generation` (ids that end a text), and more.
    """

    name: str
    config: ModelConfig
    structure: Structure
    values: dict[str, Any]
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    source: dict[str, Any] = field(default_factory=dict)

    def with_rules(self, arrays: Mapping[str, Any] | None = None, **rules: tuple[str, ...]) -> Model:
        """The same parameters under other rules; those of a field that is not given are dropped.

        Args:
          arrays: by name, `SITE.FIELD.NUMBER.NAME` as in `blocks.3.mlp.down.inputs.0.threshold`: what ops are fitted to; ops
            that the model has already keep theirs.
          rules: by field of `ModelConfig` (`inputs`, `weights`, `neurons`, `residuals`): `("SITE_GLOB=OP|OP", ...)`.
        Raises:
          ConfigError: a rule that does not parse, names an unknown op, or fits no site; an array that is missing or misshapen.
        """
        changed: dict[str, Any] = {field: rules.get(field, ()) for field in FIELDS}
        return self.rebuilt(dataclasses.replace(self.config, **changed), arrays or {})

    def rebuilt(self, config: ModelConfig, arrays: Mapping[str, Any]) -> Model:
        """This model under another config: parameters by name from `arrays`, else as they are.

        Layers that a rule singles out leave their scanned stack; arrays are stacked anew only where something changes them.

        Args:
          config: finalized.
          arrays: by parameter name, layers written out (`io.name_map.parameter_slots`).
        Raises:
          ConfigError: rules that do not fit, a parameter that neither has, a name that the new model lacks, another shape.
        """
        check_sites(config)
        structure, shapes = abstract_transformer(config)
        old = parameter_slots(self.module(), self.structure.paths)
        new = parameter_slots(nnx_compat.merge(structure, shapes), structure.paths)
        missing = sorted(set(new) - set(old) - set(arrays))
        check(not missing, "arrays", missing[:8], "are parameters of the new model that have no value")
        unknown = sorted(set(arrays) - set(new))
        check(not unknown, "arrays", unknown[:8], "are no parameters of the new model")
        values = _restacked(self.values, arrays, old, new)
        for path in structure.paths:
            found, wanted = nnx_compat.at(values, path).shape, nnx_compat.at(shapes, path).shape
            check(tuple(found[-2:]) == tuple(wanted[-2:]), ".".join(path), found, f"the model needs {wanted}")
        return dataclasses.replace(self, config=config, structure=structure, values=values)

    def parameter(self, name: str) -> Any:
        """A parameter by its name with layers written out, e.g. `blocks.3.attn.q.kernel`."""
        slot = parameter_slots(self.module(), self.structure.paths)[name]
        return _row(nnx_compat.at(self.values, slot.path), slot.row)

    def module(self) -> Transformer:
        """The model as a module; inside jit build it from the traced values instead: `nnx_compat.merge(structure, values)`."""
        return nnx_compat.merge(self.structure, self.values)


def _row(stacked: Any, row: int | None) -> Any:
    return stacked if row is None else jax.tree.map(lambda a: a[row], stacked)


def _restacked(values: dict[str, Any], arrays: Mapping[str, Any], old: dict[str, Slot], new: dict[str, Slot]) -> dict[str, Any]:
    """Parameters of the old slots, or of `arrays`, in the new ones; what neither changes nor moves is not copied."""
    names_at = _names_by_path(new)
    before = _names_by_path(old)

    def layer(name: str) -> Any:
        return arrays[name] if name in arrays else _row(nnx_compat.at(values, old[name].path), old[name].row)

    stacked: dict[str, Any] = {}
    for path, names in names_at.items():
        source = old[names[0]].path if names[0] in old else ()
        if before.get(source) == names and arrays.keys().isdisjoint(names):
            whole = nnx_compat.at(values, source)
        elif new[names[0]].row is None:
            whole = layer(names[0])
        else:
            whole = jax.tree.map(lambda *a: jnp.stack(a), *map(layer, names))
        nnx_compat.put(stacked, path, whole)
    return stacked


def _names_by_path(slots: dict[str, Slot]) -> dict[tuple[str, ...], list[str]]:
    """The parameters of each array in the order of its rows."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, slot in sorted(slots.items(), key=lambda item: item[1].row or 0):
        found.setdefault(slot.path, []).append(name)
    return found
