"""What sparsejax knows of a published model family, as data: its config, its names of weights, and nothing that computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sparsejax import plugs
from sparsejax.io.name_map import Entry
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import ConfigError


@dataclass(frozen=True)
class Family:
    """A published architecture; each is a module of `sparsejax.models.families`, registered under its model types.

    Fields:
      name: what it is called here, e.g. `llama`.
      architecture: the class that an exported `config.json` names.
      to_config: published `config.json` -> finalized ModelConfig; raises ConfigError, by key, for what it cannot express.
      to_published: the inverse, with `model_type`; raises ConfigError for what it cannot say.
      entries: config -> templates of the name map (see `name_map.expand`), with the names of `architecture`.
      experts: number of experts, for names with `{expert}`.
      prefix: of the base model inside `architecture`; checkpoints of the base model alone leave it out.
      renamed: (prefix in some files, prefix here) of checkpoints that name the same tensors otherwise; suffixes where they
        begin with a dot. The first that fits counts.
      ignored: globs (`*` any characters) of published tensors that hold no weights: buffers, heads that are not used.
      tied: (our name, their name) of tensors that a checkpoint may hold once more under their name; they must then be equal.
    """

    name: str
    architecture: str
    to_config: Callable[[Mapping[str, Any]], ModelConfig]
    to_published: Callable[[ModelConfig], dict[str, Any]]
    entries: Callable[[ModelConfig], tuple[Entry, ...]]
    experts: Callable[[ModelConfig], int] = lambda config: 0
    prefix: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()


def register_family(family: Family, *model_types: str) -> Family:
    """Make a family available under the `model_type`s of `config.json`."""
    plugs.register("family", *model_types)(lambda: family)
    return family


def family_of(config: Mapping[str, Any], path: str) -> Family:
    """The family of a published config.

    Raises:
      ConfigError: no `model_type`, or one that is not known; names the nearest.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(f"{path}: model_type = {model_type!r}; expected one of {', '.join(plugs.names('family'))}")
    return plugs.resolve("family", model_type, f"{path}: model_type")
