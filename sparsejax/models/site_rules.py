"""Whether the rules of a model (`inputs`, `weights`, `neurons`, `residuals`) fit its sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsejax import plugs
from sparsejax.context import site_matches
from sparsejax.layers.op import FIELDS, SiteRules
from sparsejax.models.config import ModelConfig
from sparsejax.models.sizes import linear_shapes
from sparsejax.plugs import check

Shapes = dict[str, tuple[int, int]]


def rule_sites(model: ModelConfig) -> dict[str, Shapes]:
    """Field of `ModelConfig` -> `{site: (in, out)}` of the sites that its rules may name."""
    linears = linear_shapes(model)
    blocks = list(dict.fromkeys(site.rsplit(".", 2)[0] for site in linears if site.endswith(".attn.q")))
    width = model.d_model
    return {
        "inputs": linears,
        "weights": linears,
        "neurons": {site.removesuffix(".down"): shape[::-1] for site, shape in linears.items() if site.endswith(".down")},
        "residuals": {f"{block}.residual.{part}": (width, width) for block in blocks for part in ("attn", "mlp")},
    }


def check_sites(model: ModelConfig) -> None:
    """Every rule names a site that no earlier rule of its field took, and what acts there fits it.

    Raises:
      ConfigError: names the rule and what is wrong with it.
    """
    activation = plugs.resolve("nonlinearity", model.ffn.activation, "model.ffn.activation")
    sites = rule_sites(model)
    for width in sorted({features for site, (features, _) in sites["inputs"].items() if site.endswith(".down")}):
        activation.validate(width, "model.ffn.activation")
    rules = SiteRules.of(model)
    for field in FIELDS:
        _check_field(field, getattr(model, field), getattr(rules, field), sites[field])
    for index, (_, selectors) in enumerate(rules.neurons):
        path = f"model.neurons[{index}]"
        check(len(selectors) == 1, path, model.neurons[index], "expected one selector")
        usable = activation.has_gate_out or not selectors[0].reads_gate
        check(usable, path, model.neurons[index], f"selects by the gate, and {model.ffn.activation!r} has none whose product "
              "with up is the hidden vector")
    for site in sites["inputs"]:
        _check_rotated(rules, site)


def _check_rotated(rules: SiteRules, site: str) -> None:
    """Refuse an op that mixes the channels of a map's input (`rotates`) where something counts on their zeros."""
    ops = rules.at("inputs", site)
    turned = [number for number, op in enumerate(ops) if getattr(op, "rotates", False)]
    if not turned:
        return
    name = f"{site}: model.inputs"
    check(turned == [0], name, [type(op).__name__ for op in ops],
          "an online rotation mixes all channels, so it must be the only one and stand before what selects or rounds them")
    saving = [type(op).__name__ for op in ops if getattr(op, "skips", ())]
    check(not saving, name, saving, "saves hidden units by the zeros of this input, which is rotated here")
    selectors = rules.at("neurons", site.removesuffix(".down")) if site.endswith(".down") else ()
    check(not selectors, f"{site.removesuffix('.down')}: model.neurons", [type(op).__name__ for op in selectors],
          f"selects hidden units, and the online rotation at {site} mixes them: its input has no zeros to skip; "
          "use one of the two")


def _check_field(field: str, texts: Sequence[str], rules: Sequence[tuple[str, Sequence[Any]]], shapes: Shapes) -> None:
    taken: set[str] = set()
    for index, (glob, ops) in enumerate(rules):
        path = f"model.{field}[{index}]"
        matched = {site for site in shapes if site_matches(glob, site)}
        kind = {"neurons": "FFN", "residuals": "skip path"}.get(field, "linear map")
        check(matched, path, texts[index], f"no {kind} has this site.{_nearest_site(glob, shapes)}")
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
