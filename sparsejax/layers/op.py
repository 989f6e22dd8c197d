"""The ops of a model's rules: which act at which site, and the arrays that they were fitted to or learn."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array

from sparsejax import plugs
from sparsejax.context import site_matches
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Module, data

Ops = tuple[Any, ...]
Rules = tuple[tuple[str, Ops], ...]

# Rule field of ModelConfig -> registry kind of its ops.
FIELDS = {
    "inputs": "activation_op",
    "weights": "weight_op",
    "neurons": "neuron_selector",
    "residuals": "activation_op",
}


@dataclasses.dataclass(frozen=True)
class SiteRules:
    """What acts at which site: (glob, ops) per field of `FIELDS`, the first match wins."""

    inputs: Rules = ()
    weights: Rules = ()
    neurons: Rules = ()
    residuals: Rules = ()

    @classmethod
    def parse(
        cls,
        inputs: tuple[str, ...] = (),
        weights: tuple[str, ...] = (),
        neurons: tuple[str, ...] = (),
        residuals: tuple[str, ...] = (),
    ) -> SiteRules:
        """Rules from config strings `"SITE_GLOB=OP|OP"`."""
        given = dict(inputs=inputs, weights=weights, neurons=neurons, residuals=residuals)
        return cls(**{field: _parse_rules(FIELDS[field], rules, f"model.{field}") for field, rules in given.items()})

    @classmethod
    def of(cls, config: ModelConfig) -> SiteRules:
        """The rules of a model."""
        return cls.parse(**{field: getattr(config, field) for field in FIELDS})

    def __bool__(self) -> bool:
        return any(getattr(self, field) for field in FIELDS)

    def at(self, field: str, site: str) -> Ops:
        """The ops of the first rule of `field` that names the site; none where none does."""
        return next((ops for glob, ops in getattr(self, field) if site_matches(glob, site)), ())

    def boundaries(self) -> tuple[int, ...]:
        """Steps at which an op changes what it does (`op.start`), sorted; a step is compiled for each interval."""
        ops = [op for field in FIELDS for _, chain in getattr(self, field) for op in chain]
        return tuple(sorted({op.start for op in ops if getattr(op, "start", 0) > 0}))


def _parse_rules(kind: str, rules: tuple[str, ...], field: str) -> Rules:
    parsed = []
    for index, rule in enumerate(rules):
        glob, equals, chain = rule.partition("=")
        plugs.check(equals and glob.strip() and chain.strip(), f"{field}[{index}]", rule, "expected 'SITE_GLOB=OP|OP'")
        parsed.append((glob.strip(), plugs.resolve_chain(kind, chain, f"{field}[{index}]")))
    return tuple(parsed)


class Op(Module):
    """A spec at a site, with its arrays.

    A spec is a frozen dataclass that is called with the site's arguments, `spec(x, ctx)` for an activation op. One that has
    arrays declares them, `spec.parameters(shape, axes, key) -> {name: Weight}` for a map of that shape and axes, and is called
    `spec(arrays, x, ctx)`. Arrays found by calibration have role "fitted" and receive no gradient.
    """

    def __init__(self, spec: Any, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array):
        self.spec = spec
        declared = spec.parameters(shape, axes, key) if hasattr(spec, "parameters") else {}
        self.names = tuple(declared)
        for name, value in declared.items():
            setattr(self, name, value)

    def __call__(self, *arguments: Any) -> Any:
        if not self.names:
            return self.spec(*arguments)
        return self.spec({name: getattr(self, name).get_value() for name in self.names}, *arguments)


def chain(specs: Ops, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Op]:
    """The ops of a site in order, by number; to be held as an attribute of a module."""
    return data({str(i): Op(spec, shape, axes, jax.random.fold_in(key, i)) for i, spec in enumerate(specs)})


def apply(ops: dict[str, Op], x: Any, *arguments: Any) -> Any:
    """x after all ops of a chain."""
    for op in ops.values():
        x = op(x, *arguments)
    return x
