"""GPTQ: rounding one input channel at a time, its error made up for by those that are still to be rounded.

"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (Frantar et al., 2022, arXiv 2210.17323).
Acts on the kernels of linear maps, which become `QTensor`s; each map is fed by the quantized maps and blocks before it:

    min ||X W - X W^||^2,    H = X^T X / N + lambda I,   lambda = damping * mean diag H,    H^-1 = U^T U   X[N, in], W[in, out]
    q_i = round of row i to the format;   w_j <- w_j - U_ij (w_i - w^_i) / U_ii  for j > i             (`compress.obs`)

so that sum_i ||(w_i - w^_i) / U_ii||^2 = tr (W - W^)^T H (W - W^), the loss that is reported. Scales of a group of inputs are
computed from its weights as compensated when the sweep reaches it. `order`, in which inputs are rounded:

    none     as they lie
    static   by falling diag H (published as act-order), with scales of the original weights: no index of groups is stored
    group    groups by the falling mean of their diag H, and so within each; scales as compensated. Nothing is stored either
    dynamic  by falling diag H, and groups are of inputs that follow each other in that order, with scales as compensated: the
             published act-order with groups. The group of each input is stored (`indexed` formats), its scales are gathered

Published: damping .01, blocks of 128 (speed alone), 128 sequences of 2,048 tokens, order none; static for small models.
`scales` as in `ops.formats.clipping`: of the extremes (published default), or clipped by search (the released `mse`; by
diag H). Inputs that are always zero lose their weights (`dead_inputs` of the report). Where H cannot be factored the damping
grows tenfold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax.compress.bit_allocation import BitAllocator, Formats, check_formats, specs_for, specs_in
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.obs import BLOCK, Factor, Settle, factor, obs_sweep
from sparsejax.compress.packed import check_kernels, note_formats, with_qtensors
from sparsejax.compress.recipe import FORMATS, Pass, Tier, Work
from sparsejax.io.model import Model
from sparsejax.methods.pruning.sequential import ALL_MAPS, Moment, Scored, maps_of, second_moments, visit_in_order
from sparsejax.models.config import ModelConfig
from sparsejax.models.sizes import linear_shapes
from sparsejax.ops.formats.clipping import check_search, searched_extent
from sparsejax.ops.formats.quantize import decode, encode, qparams, spread
from sparsejax.ops.formats.scales import QParams, effective
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check, check_choice
from sparsejax.quantized_arrays import QTensor, packed

ORDERS = ("none", "static", "group", "dynamic")


class Sweep(NamedTuple):
    """How the inputs of a map are walked.

    Fields:
      order: int[in], the inputs in the order in which they are rounded.
      groups: int, the groups of scales along the inputs in the order in which they are reached.
      inverse: of the Hessian in that order.
      group_of: uint16[in], the group of each input where groups are not of neighbours.
    """

    order: np.ndarray
    groups: np.ndarray
    inverse: Factor
    group_of: np.ndarray | None = None


class Solved(NamedTuple):
    """The quantized kernel, and tr (W - W^)^T H (W - W^) with the damped H."""

    tensor: QTensor
    loss: float


def sweep_of(hessian: Float[np.ndarray, "in in"], group: int, order: str = "none", damping: float = 0.01) -> Sweep:
    """How maps that read one tensor are walked.

    Args:
      hessian: the mean of x x^T.
      group: inputs that share scales.
      order: of `ORDERS`.
      damping: see `compress.obs.factor`.
    """
    check_choice("order", order, ORDERS)
    inputs = len(hessian)
    size = min(group, inputs)
    falling = -np.diag(hessian)
    numbers = np.arange(-(-inputs // size))
    rows = np.arange(inputs)
    group_of = None
    if order in ("static", "dynamic"):
        rows = np.argsort(falling, kind="stable")
    elif order == "group":
        full = inputs // size  # a shorter last group stays last, so that every other one is whole
        means = falling[: full * size].reshape(full, size).mean(-1)
        numbers = np.concatenate([np.argsort(means, kind="stable"), numbers[full:]])
        members = [rows[number * size : (number + 1) * size] for number in numbers]
        rows = np.concatenate([part[np.argsort(falling[part], kind="stable")] for part in members])
    if order == "dynamic":
        group_of = np.empty(inputs, np.uint16)
        group_of[rows] = np.arange(inputs) // size
    return Sweep(rows, numbers, factor(hessian[np.ix_(rows, rows)], damping), group_of)


def gptq(
    kernel: Float[np.ndarray, "in out"],
    sweep: Sweep,
    spec: FormatSpec,
    *,
    parameters: QParams | None = None,
    scales: str = "absmax",
    weights: Float[np.ndarray, " in"] | None = None,
    block: int = BLOCK,
    dtype: Any = "float32",
) -> Solved:
    """A kernel in a number format.

    Args:
      kernel: float.
      sweep: of the tensor that enters the map, by `spec`'s groups along the inputs.
      spec: not stochastic, not static.
      parameters: scales that are given, as for order static; None: those of the compensated weights of each group.
      scales: how these are found, of `ops.formats.clipping.SEARCHES`; weights: diag H, for `hessian`.
      block: inputs per product; changes speed alone.
      dtype: of the weight that the result stands for.
    """
    search = _Search(scales, None if weights is None else np.asarray(weights, np.float32)[sweep.order])
    rounding = _Rounding(np.asarray(kernel, np.float32), sweep, spec, parameters, search)
    obs_sweep(kernel[sweep.order], sweep.inverse, rounding, block)
    codes, found = rounding.result()
    if sweep.group_of is not None:
        spec, found = replace(spec, indexed=True), found._replace(group_of=jnp.asarray(sweep.group_of[:, None]))
    return Solved(packed(codes, found, spec, kernel.shape, dtype), rounding.loss)  # type: ignore[arg-type]


class _Search(NamedTuple):
    """How the scales of a group are found; weights: of the inputs in the order of the sweep."""

    scales: str
    weights: np.ndarray | None


class _Rounding:
    """What `obs_sweep` decides: the row's nearest codes; and what these are."""

    def __init__(self, kernel: np.ndarray, sweep: Sweep, spec: FormatSpec, parameters: QParams | None, search: _Search):
        self.sweep, self.spec, self.shape, self.search = sweep, spec, kernel.shape, search
        self.fixed, self.of_rows = parameters, _of_rows(spec)
        self.group = min(spec.block(self.shape)[0], self.shape[0])
        # The scale of scales of the whole matrix is taken once, from the weights as they were.
        self.second = qparams(jnp.asarray(kernel), spec).second if spec.second == "two_level" and parameters is None else None
        self.codes: list[Any] = [None] * self.shape[0]
        self.by_group: dict[int, QParams] = {}
        self.loss = 0.0
        if parameters is not None:
            scale, zero = _per_entry(parameters, spec, self.shape)
            # On the host: slicing a row off an array of the device takes as long as rounding it.
            self.scales = np.broadcast_to(np.asarray(scale), self.shape)
            self.zeros = None if zero is None else np.broadcast_to(np.asarray(zero), self.shape)

    def __call__(self, rows: np.ndarray, pivots: np.ndarray, first: int) -> Settle:
        if self.fixed is None:
            mine = None if self.search.weights is None else self.search.weights[first : first + len(rows)]
            found = searched_parameters(rows.astype(np.float32), self.second, mine, self.spec, self.search.scales)
            self.by_group[int(self.sweep.groups[first // self.group])] = found
            scale, zero = _per_entry(found, self.spec, rows.shape)

        def settle(i: int, row: np.ndarray) -> np.ndarray:
            number = int(self.sweep.order[first + i])
            if self.fixed is None:
                here = scale, zero
            else:
                here = self.scales[number][None], self.zeros[number][None] if self.zeros is not None else None
            codes, values = _nearest(row.astype(np.float32)[None], *here, self.of_rows)
            self.codes[number] = np.asarray(codes)[0]
            settled = np.asarray(values, np.float64)[0]
            self.loss += float(np.sum(np.square((row - settled) / pivots[i])))
            return settled

        return settle

    def result(self) -> tuple[Array, QParams]:
        """Codes, filled up to whole groups where the format is, and parameters, in the order of the kernel."""
        found = self.fixed
        if found is None:
            parts = [self.by_group[number] for number in sorted(self.by_group)]
            zeros = [part.zero for part in parts if part.zero is not None]
            scale = jnp.concatenate([part.scale for part in parts], axis=-2)
            found = QParams(scale, jnp.concatenate(zeros, axis=-2) if zeros else None, self.second)
        codes = jnp.asarray(np.stack(self.codes))
        if self.spec.padded(self.shape) != self.shape:
            filled = encode(jnp.zeros(self.shape, jnp.float32), found, self.spec)
            codes = filled.at[: self.shape[0], : self.shape[1]].set(codes)
        return codes, found


def _check_groups(spec: FormatSpec, order: str) -> None:
    """Raise a ConfigError where inputs would be sorted into groups that a format has not, or has already."""
    check(not spec.indexed, "format", str(spec), "is what order dynamic makes of it; leave indexed out")
    groups = spec.granularity == "group" and spec.axis == -2 and spec.ragged != "pad"
    check(groups or order != "dynamic", "order", order, f"sorts inputs into groups, and {spec} has none")


def _of_rows(spec: FormatSpec) -> FormatSpec:
    """The same codes of single rows, whose scales are given as float32 numbers."""
    whole: dict[str, Any] = dict(granularity="channel", size=(), axis=-2, ragged="error")
    return replace(spec, **whole, scale="f32", rule="floor", second="none", codes="stored")


@partial(jax.jit, static_argnums=(3, 4))
def searched_parameters(
    rows: Array, second: Array | None, weights: Array | None, spec: FormatSpec, scales: str
) -> QParams:
    """Scales and zeros of rows [rows, out], found as `scales` says."""
    if scales == "absmax":
        return qparams(rows, spec, second=second)
    second = qparams(rows, spec).second if second is None else second
    return qparams(rows, spec, within=searched_extent(rows, spec, scales, weights=weights, second=second), second=second)


@partial(jax.jit, static_argnums=(1, 2))
def _per_entry(found: QParams, spec: FormatSpec, shape: tuple[int, int]) -> tuple[Array, Array | None]:
    """Scales and zeros that broadcast to a matrix of this shape, as `_of_rows` has them."""
    zero = found.zero
    if zero is not None:
        zero = spread(zero if spec.zero == "int" else zero.astype(jnp.float32), spec, shape)
    return spread(effective(found, spec), spec, shape), zero


@partial(jax.jit, static_argnums=3)
def _nearest(row: Array, scale: Array, zero: Array | None, spec: FormatSpec) -> tuple[Array, Array]:
    parameters = QParams(scale, zero)
    codes = encode(row, parameters, spec)
    return codes, decode(codes, parameters, spec)


@dataclass
class Gptq(Pass):
    """format: a name, or one for each map (`compress.bit_allocation`); order: of `ORDERS`; scales: of `SEARCHES`; damping: of
    the Hessian; block: inputs per product; sites: maps."""

    format: Formats = "int4:asym,group=64"
    order: str = "none"
    scales: str = "absmax"
    damping: float = 0.01
    block: int = BLOCK
    sites: str = ALL_MAPS
    stage: ClassVar[str] = FORMATS

    def check(self, config: ModelConfig) -> None:
        check_choice("order", self.order, ORDERS)
        check(self.damping > 0, "damping", self.damping, "must be positive")
        check(self.block >= 1, "block", self.block, "must be at least 1")
        for spec in specs_in(self.format):
            check(spec.rounding != "stochastic", "format", str(spec), "rounds at random, which leaves needless errors")
            check(spec.second != "double" or self.order == "static", "order", self.order,
                  f"{spec} quantizes the scales of all groups together, before the sweep; expected static")  # fmt: skip
            check_search(self.scales, spec)
            _check_groups(spec, self.order)
        check_formats(self.format, config, maps_of(config, self.sites))

    def check_inputs(self, model: Model, calibration: Calibration) -> None:
        sites, shapes, spec = maps_of(model.config, self.sites), linear_shapes(model.config), calibration.spec
        tokens = len(calibration.tokens) * (calibration.tokens.shape[1] - spec.skip_first)
        for site in sites:
            check(tokens >= shapes[site][0], f"{site}: calibration tokens", tokens,
                  f"are fewer than its {shapes[site][0]} inputs, so that their Hessian lacks rank; raise "
                  "--calibration-sequences or --calibration-length, or round to nearest (rtn)")  # fmt: skip
        check_kernels(model, sites)
        if isinstance(self.format, BitAllocator):
            self.format.check_inputs(model, calibration)

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        passes = f"{config.num_layers} blocks x 5 passes of {tier.sequences * tier.length:,} tokens"
        chosen = self.format.cost(maps_of(config, self.sites), tier) if isinstance(self.format, BitAllocator) else ""
        return "; ".join(part for part in (chosen, f"{passes}, and a sweep over the inputs of every map") if part)

    def apply(self, model: Model, work: Work) -> Model:
        sites = maps_of(model.config, self.sites)
        specs = specs_for(self.format, model, work, sites)
        latest: list[tuple[Moment, int, Sweep]] = []  # maps of one input, in formats of equal groups, share its factor

        def quantize(site: str, kernel: np.ndarray, moment: Moment) -> Scored:
            spec = specs[site]
            group = spec.block(kernel.shape)[0]  # type: ignore[arg-type]
            if not latest or latest[0][0] is not moment or latest[0][1] != group:
                latest[:] = [(moment, group, sweep_of(moment.mean, group, self.order, self.damping))]
            sweep = latest[0][2]
            weights = np.diag(moment.mean).astype(np.float32) if self.scales == "hessian" else None
            fixed = None
            if self.order == "static":
                fixed = searched_parameters(np.asarray(kernel, np.float32), None, weights, spec, self.scales)
            dtype = model.parameter(f"{site}.kernel").dtype
            how: dict[str, Any] = dict(scales=self.scales, weights=weights, block=self.block, dtype=dtype)
            tensor, loss = gptq(kernel, sweep, spec, parameters=fixed, **how)
            whole = float(np.sum(kernel * (moment.mean @ kernel)))
            inverse = sweep.inverse
            numbers = {"loss": loss / whole if whole else 0.0, "dead": inverse.dead.sum(), "damping": inverse.damping}
            return Scored(tensor, numbers)

        statistic = second_moments(work, full=True)
        found = visit_in_order(model, work, sites, self.name, statistic, quantize, by_tap=True)
        tensors = {site: found[site] for site in sites}
        dead = {site: int(found[f"{site}:dead"]) for site in sites if found[f"{site}:dead"]}
        more = {site: float(found[f"{site}:damping"]) for site in sites if found[f"{site}:damping"] != self.damping}
        losses = {site: float(found[f"{site}:loss"]) for site in sites}
        note_formats(work, self.name, model, tensors, relative_loss_of=losses, dead_inputs=dead, raised_damping_of=more)
        return with_qtensors(model, tensors)
