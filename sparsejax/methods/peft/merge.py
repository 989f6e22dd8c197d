"""Adapters folded into the weights they act on, for serving and for export to formats that know no adapters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from sparsejax import plugs
from sparsejax.arrays import dense
from sparsejax.compress.recipe import WEIGHTS, Pass, Work
from sparsejax.compress.surgery import chain_at, rules_from
from sparsejax.context import Context
from sparsejax.io.model import Model
from sparsejax.layers.linear import Linear
from sparsejax.layers.op import apply
from sparsejax.methods.peft.lora import Lora
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import rule_sites
from sparsejax.nnx_compat import Structure, at, merge, split
from sparsejax.plugs import check


@dataclasses.dataclass
class MergeAdapters(Pass):
    """Every LoRA or DoRA of a model into its kernel, which becomes a plain array; equal up to the rounding of the kernel."""

    stage = WEIGHTS

    def check(self, config: ModelConfig) -> None:
        sites = [site for site in rule_sites(config)["weights"] if _adapters(config, site)]
        check(sites, "model.weights", config.weights, "no rule is an adapter, there is nothing to merge")
        for site in sites:
            others = [op for op in chain_at(config, "weights", site) if not isinstance(plugs.resolve("weight_op", op), Lora)]
            check(not others, f"site {site}", others, "acts on the weight beside the adapter, which would then act before it")

    def apply(self, model: Model, work: Work) -> Model:
        return merged(model)


def merged(model: Model) -> Model:
    """The model with its adapters folded into plain kernels, and without the rules that made them."""
    sites = rule_sites(model.config)["weights"]
    chains = {site: () if _adapters(model.config, site) else chain_at(model.config, "weights", site) for site in sites}
    values = jax.jit(lambda v: _merged_values(model.structure, v))(model.values)
    folded = dataclasses.replace(model, values=values)
    return folded.rebuilt(dataclasses.replace(model.config, weights=rules_from(chains)), {})


def _adapters(config: ModelConfig, site: str) -> list[str]:
    return [op for op in chain_at(config, "weights", site) if isinstance(plugs.resolve("weight_op", op), Lora)]


def _merged_values(structure: Structure, values: dict[str, Any]) -> dict[str, Any]:
    module = merge(structure, values)
    result = jax.tree.map(lambda v: v, values)
    nodes, _ = jax.tree_util.tree_flatten_with_path(module, is_leaf=lambda v: isinstance(v, Linear))
    for path, node in nodes:
        if isinstance(node, Linear) and any(isinstance(op.spec, Lora) for op in node.weights.values()):
            names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
            at(result, names)["kernel"] = _folded(node)
    return result


def _folded(linear: Linear) -> jax.Array:
    """The kernel after its adapters; stacked layers are folded one by one, as the ops are written for one."""
    kernel = linear.kernel.get_value()
    structure, values = split(linear)

    def one(values: Any) -> Any:
        layer = merge(structure, values)
        return dense(apply(layer.weights, layer.kernel.get_value(), Context(mode="prefill")))

    stacked = dense(kernel).ndim - len(linear.kernel.axes)
    fold = one
    for _ in range(stacked):
        fold = jax.vmap(fold)
    return fold(values)
