"""A model in memory with all that the verbs need of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparsejax import nnx_compat
from sparsejax.data.tokenizers import Tokenizer
from sparsejax.models.config import ModelConfig
from sparsejax.models.transformer import Transformer
from sparsejax.nnx_compat import Structure


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

    def module(self) -> Transformer:
        """The model as a module; inside jit build it from the traced values instead: `nnx_compat.merge(structure, values)`."""
        return nnx_compat.merge(self.structure, self.values)
