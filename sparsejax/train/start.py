"""A run that starts from a model: its config and tokenizer are the run's, its weights go straight into the train state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from sparsejax import nnx_compat
from sparsejax.io.model import Model
from sparsejax.io.name_map import parameter_slots
from sparsejax.models.config import ModelConfig
from sparsejax.parallel.config import MeshConfig
from sparsejax.parallel.mesh import make_mesh
from sparsejax.plugs import ConfigError, check
from sparsejax.train.state import abstract_model

Loader = Callable[..., Model]


class Start:
    """The model that `init` names. Its weights are held from the first reading until they are taken.

    Args:
      name: what the loader takes.
      loader: `loader(name, mesh=mesh)` -> Model, `sparsejax.io.load.load` in the verbs.
      mesh: where the weights go.
    Raises:
      ConfigError: what the loader refuses.
    """

    def __init__(self, name: str, loader: Loader, mesh: Mesh):
        self._read: Callable[[], Model] = lambda: loader(name, mesh=mesh)
        self._model: Model | None = self._read()
        self.model = _described(self._model)

    def take(self) -> dict[str, Any]:
        """The weights, for who may donate them; a later call reads them again."""
        model, self._model = self._model or self._read(), None
        return model.values

    def forget(self) -> None:
        """Give the memory of the weights back."""
        self._model = None

    def values(self, given: dict[str, Any], drawn: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
        """All parameters under a run's config: the model's, and the drawn ones of what the run adds; traceable.

        Args:
          given: the model's weights.
          drawn: parameters of the run's config.
          config: made of the model's by `config_rules.started_from`.
        Raises:
          ConfigError: a parameter of the model for which the run's config has no place.
        """
        model = dataclasses.replace(self.model, values=given)
        structure, _ = abstract_model(config)
        new = parameter_slots(nnx_compat.merge(structure, drawn), structure.paths)
        old = parameter_slots(model.module(), model.structure.paths)
        lost = sorted(set(old) - set(new))
        check(not lost, f"init = {model.name!r}: parameters", lost[:4],
              "have no place in this run's model; keep the rules and the activation that they belong to")
        added: dict[str, Any] = {}
        for name in sorted(set(new) - set(old)):
            slot = new[name]
            value = nnx_compat.at(drawn, slot.path)
            added[name] = value if slot.row is None else value[slot.row]
        return model.rebuilt(config, added).values


def started(name: str, loader: Loader | None, mesh: MeshConfig) -> Start:
    """The model to start from, for a mesh of all devices.

    Raises:
      ConfigError: the caller can load none.
    """
    if loader is None:
        raise ConfigError(f"init = {name!r}: this entry point cannot load a model; `experiments.train` can")
    return Start(name, loader, make_mesh(mesh))


def _described(model: Model) -> Model:
    """The model with shapes in place of its weights."""
    return dataclasses.replace(
        model, values=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), model.values)
    )
