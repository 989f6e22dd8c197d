"""Surgery: put fitted ops at sites of a model, whatever rules it has already."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sparsejax.context import site_matches
from sparsejax.io.model import Model
from sparsejax.layers.op import FIELDS
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import check_sites, rule_sites
from sparsejax.plugs import check, nearest


class Placed(NamedTuple):
    """An op as a config names it, and the values of its arrays by name."""

    op: str
    arrays: Mapping[str, Any] = {}


def sites_of(config: ModelConfig, field: str, glob: str, flag: str = "sites") -> list[str]:
    """The sites of a rule field that a glob names, in the order of the model.

    Raises:
      ConfigError: it names none; the nearest are offered.
    """
    sites = rule_sites(config)[field]
    found = [site for site in sites if site_matches(glob, site)]
    check(found, flag, glob, f"names no site of this model.{nearest(glob, _layerless(sites))}")
    return found


def place(model: Model, field: str, plan: Mapping[str, Placed]) -> Model:
    """The model with one more op at each site of `plan`, behind those that act there.

    Args:
      field: of `ModelConfig`: inputs, weights, neurons or residuals.
      plan: by site, e.g. `{"blocks.3.mlp.down": Placed("threshold", {"threshold": 0.1})}`.
    Raises:
      ConfigError: a site that the model lacks, an op that does not fit it.
    """
    config = with_op(model.config, field, {site: placed.op for site, placed in plan.items()})
    arrays: dict[str, Any] = {}
    for site, placed in plan.items():
        number = len(chain_at(model.config, field, site))
        arrays.update({f"{_module_of(site, field, number)}.{name}": value for name, value in placed.arrays.items()})
    return model.with_rules(arrays, **{name: getattr(config, name) for name in FIELDS})


def with_op(config: ModelConfig, field: str, plan: Mapping[str, str]) -> ModelConfig:
    """The config with one more op (as text) at each site of `plan`, behind those that act there.

    Args: as `place`.
    Raises:
      ConfigError: a site that the model lacks; an op that does not fit it, or does not go with what acts there.
    """
    sites = rule_sites(config)[field]
    unknown = sorted(set(plan) - set(sites))
    check(not unknown, f"{field}: sites", unknown[:4], "are no sites of this model")
    chains = {site: chain_at(config, field, site) for site in sites}
    chains |= {site: (*chains[site], op) for site, op in plan.items()}
    changed = dataclasses.replace(config, **{field: rules_from(chains)})  # type: ignore[arg-type]
    check_sites(changed)
    return changed


def _module_of(site: str, field: str, number: int) -> str:
    """Where the op lies in the model."""
    if field == "neurons":
        return f"{site}.neurons"
    if field == "residuals":
        block, _, part = site.rpartition(".residual.")
        return f"{block}.skip_{part}.{number}"
    return f"{site}.{field}.{number}"


def chain_at(config: ModelConfig, field: str, site: str) -> tuple[str, ...]:
    """The ops that the config's rules put at a site, as text."""
    for rule in getattr(config, field):
        glob, _, chain = rule.partition("=")
        if site_matches(glob.strip(), site):
            return tuple(part.strip() for part in chain.split("|"))
    return ()


def rules_from(chains: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The fewest rules that give each site its chain: one for all layers where they agree, else one per site."""
    by_name: dict[str, list[str]] = {}
    for site in chains:
        by_name.setdefault(_layerless([site])[0], []).append(site)
    rules = []
    for name, sites in by_name.items():
        if len({chains[site] for site in sites}) == 1:
            rules += [f"{name}={'|'.join(chains[sites[0]])}"] if chains[sites[0]] else []
        else:
            rules += [f"{site}={'|'.join(chains[site])}" for site in sites if chains[site]]
    return tuple(rules)


def _layerless(sites: Iterable[str]) -> list[str]:
    """Sites with `*` for the layer, each once."""
    return list(dict.fromkeys(".".join("*" if part.isdigit() else part for part in site.split(".")) for site in sites))
