"""Kernels of a model replaced by QTensors, site by site: where every method that quantizes weights ends."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array

from sparsejax.arrays import dense
from sparsejax.compress.recipe import Work
from sparsejax.compress.surgery import chain_at, rules_from
from sparsejax.io.model import Model
from sparsejax.layers.op import FIELDS
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import rule_sites
from sparsejax.ops.formats.grids import LOGARITHMS
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError, check
from sparsejax.quantized_arrays import QTensor

log = logging.getLogger(__name__)


def check_format(config: ModelConfig, sites: Iterable[str], spec: FormatSpec) -> None:
    """Refuse a format that weights of these sites cannot have.

    Raises:
      ConfigError: scales that come from calibrated activations, groups that only a solver can choose, or a last group that is
        not full; names the site.
    """
    check(not spec.indexed, "format", str(spec), "is indexed: gptq with order dynamic makes such groups of a format without it")
    check(spec.element not in LOGARITHMS, "format", str(spec), "has no negative numbers, and weights have")
    check(not spec.static, "format", str(spec), "is static, which is for activations: the scales of weights are their own")
    shapes = rule_sites(config)["weights"]
    for site in sites:
        try:
            spec.block(shapes[site])
        except ConfigError as error:
            raise ConfigError(f"{site} [{shapes[site][0]}, {shapes[site][1]}]: {error}") from error


def check_kernels(model: Model, sites: Iterable[str]) -> None:
    """Refuse weights that cannot be quantized, before any of them is; say where channels have no weight but 0.

    Raises:
      ConfigError: names the site whose kernel is packed already, or holds NaN or infinities, and the first channels that do.
    """
    for site in sites:
        kernel = np.asarray(float_kernel(model, site), np.float32)
        bad = np.flatnonzero(~np.isfinite(kernel).all(axis=-1).reshape(-1))
        rule = "hold NaN or infinities, which no format can store; mend the weights, or leave the site out by `sites`"
        check(not len(bad), f"{site}.kernel: input channels", bad[:4].tolist(), rule)
        if count := int((kernel == 0).all(axis=-1).sum()):
            log.warning("%s: %d of %d input channels have no weight but 0 and are stored all the same; to save them, remove "
                        "them first (recipe structured)", site, count, kernel[..., 0].size)  # fmt: skip


def float_kernel(model: Model, site: str) -> Array:
    """A map's kernel as a plain array.

    Raises:
      ConfigError: it is packed: rounding twice would lose more than either format says.
    """
    kernel = model.parameter(f"{site}.kernel")
    check(not isinstance(kernel, QTensor), site, str(getattr(kernel, "spec", "")),
          "is quantized already; start from the float model, or leave the site out by `sites`")  # fmt: skip
    return dense(kernel)


def with_qtensors(model: Model, tensors: Mapping[str, QTensor]) -> Model:
    """The model with kernels replaced, by site.

    Layers that are scanned together share an array and so a format. Where the layers of a map differ, those that are given here
    get the rule `SITE=stored:FORMAT`, which does nothing to a packed kernel but keeps them out of the others' stack.

    Args:
      tensors: by site; of the shape of the kernel that each replaces, leading axes of experts included.
    Raises:
      ConfigError: a site that the model lacks, or a tensor of another shape.
    """
    sites = rule_sites(model.config)["weights"]
    for site, tensor in tensors.items():
        check(site in sites, "site", site, "is no linear map of this model")
        check(tensor.shape == sites[site], site, tensor.shape, f"the model needs {sites[site]}")
    chains = {site: chain_at(model.config, "weights", site) for site in sites}
    for site in _apart(model, tensors):
        chains[site] = (*chains[site], f"stored:{tensors[site].spec}")
    rules = {name: getattr(model.config, name) for name in FIELDS} | {"weights": rules_from(chains)}
    arrays = {f"{site}.kernel": tensor for site, tensor in tensors.items()}
    return model.with_rules(arrays, **rules)


def _apart(model: Model, tensors: Mapping[str, QTensor]) -> list[str]:
    """The given sites of maps whose formats differ between layers."""
    formats: dict[str, dict[str, Any]] = {}
    for site in rule_sites(model.config)["weights"]:
        kernel = tensors[site] if site in tensors else model.parameter(f"{site}.kernel")
        formats.setdefault(_local(site), {})[site] = getattr(kernel, "spec", None)
    return [site for site in tensors if len(set(formats[_local(site)].values())) > 1]


def _local(site: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in site.split("."))


def note_formats(work: Work, name: str, model: Model, tensors: Mapping[str, QTensor], **more: Any) -> None:
    """What the report says of quantized weights: formats, true bytes, bits per weight with scales, zeros and fill, by site."""
    weights = {site: int(np.prod(tensor.codes.shape[:-2])) * int(np.prod(tensor.shape)) for site, tensor in tensors.items()}
    stored = sum(tensor.nbytes for tensor in tensors.values())
    width = {site: np.dtype(tensor.dtype).itemsize for site, tensor in tensors.items()}
    work.note(
        name,
        formats=sorted({str(tensor.spec) for tensor in tensors.values()}),
        bytes=stored,
        bytes_before=sum(weights[site] * width[site] for site in tensors),
        bits_per_weight=8 * stored / sum(weights.values()),
        bits_per_weight_of={site: tensor.bits_per_weight for site, tensor in tensors.items()},
        **more,
    )
