"""`sparsity_config.json`: what a published `config.json` has no words for, beside it and versioned.

It holds the rules that put activation ops and weight ops at sites, as the strings that a config has (`model.inputs`,
`model.weights`). A reader that does not know the file computes the dense model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sparsejax.io.files import open_files, read_object
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import check_sites
from sparsejax.plugs import check, check_choice

NAME = "sparsity_config.json"
FORMAT = 1
_KEYS = ("format", "inputs", "weights")


def written(config: ModelConfig) -> dict[str, Any] | None:
    """The document of a config; None where `config.json` says it all."""
    if not config.inputs and not config.weights:
        return None
    return {"format": FORMAT, "inputs": list(config.inputs), "weights": list(config.weights)}


def applied(config: ModelConfig, path: Path) -> ModelConfig:
    """The config with the rules of the file in a Hugging Face folder or archive, if it has one.

    Raises:
      ConfigError: another format, unknown keys, or rules that do not parse; names the file.
    """
    files = open_files(path)
    if NAME not in files.names:
        return config
    document, where = read_object(files, NAME), files.where(NAME)
    check(document.get("format") == FORMAT, f"{where}: format", document.get("format"), f"this version reads {FORMAT}")
    for key in document:
        check_choice(f"{where}: key", key, _KEYS)
    inputs, weights = (_rules(document.get(key, []), f"{where}: {key}") for key in ("inputs", "weights"))
    config = dataclasses.replace(config, inputs=inputs, weights=weights)
    check_sites(config)
    return config


def _rules(value: Any, where: str) -> tuple[str, ...]:
    strings = isinstance(value, list) and all(isinstance(rule, str) for rule in value)
    check(strings, where, value, "expected a list of strings 'SITE_GLOB=OP|OP'")
    return tuple(value)
