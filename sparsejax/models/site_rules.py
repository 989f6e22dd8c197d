"""Whether the rules of a model (`inputs`, `weights`) fit its linear maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsejax import plugs
from sparsejax.context import site_matches
from sparsejax.layers.linear import SiteRules
from sparsejax.models.config import ModelConfig
from sparsejax.models.sizes import linear_shapes
from sparsejax.plugs import check


def check_sites(model: ModelConfig) -> None:
    """Every rule of `inputs` and `weights` names a linear map that no earlier rule took, and what acts at a width fits it.

    Raises:
      ConfigError: names the rule and what is wrong with it.
    """
    activation = plugs.resolve("nonlinearity", model.ffn.activation, "model.ffn.activation")
    shapes = linear_shapes(model)
    for width in sorted({features for site, (features, _) in shapes.items() if site.endswith(".down")}):
        activation.validate(width, "model.ffn.activation")
    rules = SiteRules.parse(model.inputs, model.weights)
    for field, texts, parsed in (("inputs", model.inputs, rules.inputs), ("weights", model.weights, rules.weights)):
        taken: set[str] = set()
        for index, (glob, ops) in enumerate(parsed):
            path = f"model.{field}[{index}]"
            matched = {site for site in shapes if site_matches(glob, site)}
            check(matched, path, texts[index], f"no linear map has this site.{_nearest_site(glob, shapes)}")
            check(matched - taken, path, texts[index], "earlier rules have taken all of its sites (the first match wins)")
            _check_widths(path, ops, {shapes[site][0] for site in matched - taken})
            taken |= matched


def _check_widths(path: str, ops: Sequence[Any], widths: set[int]) -> None:
    for op in ops:
        if hasattr(op, "validate"):
            for features in sorted(widths):
                op.validate(features, path)


def _nearest_site(glob: str, sites: dict[str, Any]) -> str:
    layerless = dict.fromkeys(".".join("*" if part.isdigit() else part for part in site.split(".")) for site in sites)
    return plugs.nearest(glob, layerless) or plugs.nearest(glob, sites) or f" Sites are {', '.join(layerless)}."
