"""Formats by site: what `format` of a pass that rounds weights may be beside the name of one format.

    "int4:asym,group=64"                                    one format for all maps
    {"blocks.*.mlp.down": "int8", "**": "int4:group=64"}    the first glob that names a map counts
    Hawq("4.25bits")                                        a `BitAllocator`, which chooses from a menu under a budget

An `Additive` allocator measures what each map costs the loss in each format (the papers' files say how) and leaves the choice
to `compress.bits`. Budgets are of the quantized maps alone, true bytes with scales, zeros and fill: `4.25bits` a weight, `60MB`
(1e6 bytes), `3.5ms` where there is a table of times; `4.25bits,3.5ms` are two.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax.compress import bits
from sparsejax.compress.bits import Budget
from sparsejax.compress.blocks import INPUTS
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.packed import check_format, float_kernel
from sparsejax.compress.recipe import Tier, Work
from sparsejax.context import site_matches
from sparsejax.io.model import Model
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import rule_sites
from sparsejax.ops.formats.quantize import fake
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError, check, check_choice
from sparsejax.quantized_arrays import qtensor

MENU = ("int2:asym,group=64", "int3:asym,group=64", "int4:asym,group=64", "int8:asym,group=64")
FRONTIER_POINTS = 33  # of a report
_AMOUNT = re.compile(r"\s*((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class BitProblem:
    """What is to be allocated: the maps of a float model, the formats of the menu, groups of maps that share a format."""

    model: Model
    work: Work
    sites: tuple[str, ...]
    specs: tuple[FormatSpec, ...]
    groups: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def sizes(self) -> Float[np.ndarray, " N"]:
        """Weights of each map."""
        return sizes_of(self.model.config, self.sites)

    def rounded(self, site: str, spec: FormatSpec) -> Array:
        """A map's kernel rounded to nearest, as float numbers."""
        return _fake(float_kernel(self.model, site), spec)

    @functools.cached_property
    def squared_errors(self) -> Float[np.ndarray, "N K"]:
        """||W - Q(W)||^2 of each map in each format."""
        found = np.empty((len(self.sites), len(self.specs)))
        for number, site in enumerate(self.sites):
            kernel = np.asarray(float_kernel(self.model, site), np.float64)
            found[number] = [np.sum(np.square(kernel - np.asarray(self.rounded(site, spec)))) for spec in self.specs]
        return found


class BitAllocator(abc.ABC):
    """Chooses a format for each map; subclasses are frozen dataclasses of their options."""

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    @abc.abstractmethod
    def specs(self) -> tuple[FormatSpec, ...]:
        """The formats that a map may get."""

    @abc.abstractmethod
    def plan(self, model: Model, work: Work, sites: Sequence[str]) -> dict[str, FormatSpec]:
        """The format of each map, noted in `work`; finished parts are pieces of `work`."""

    def check(self, config: ModelConfig, sites: Sequence[str]) -> None:
        """Refuse what cannot be allocated to maps of a model of this config, before any work.

        Raises:
          ConfigError: names the allocator, the option and the site.
        """
        where = f"{self.name}: menu"
        check(config.kind == "decoder" and config.head and not config.num_classes, "--model: kind", config.kind,
              f"{self.name} measures the loss of next tokens, which needs a decoder that predicts them")  # fmt: skip
        taps = {site: any(site.split(".", 2)[-1] in maps for maps in INPUTS.values()) for site in sites}
        outside = [site for site, inside in taps.items() if not inside]
        check(not outside, "sites", outside[:4], f"are no maps of dense blocks, which {self.name} is for")
        check(len(set(self.specs)) == len(self.specs) >= 2, where, [str(spec) for spec in self.specs],
              "expected two different formats or more")  # fmt: skip
        for spec in self.specs:
            check(spec.rounding != "stochastic", where, str(spec), "rounds at random, so that no two errors compare")
            check_format(config, sites, spec)

    def check_inputs(self, model: Model, calibration: Calibration) -> None:  # noqa: B027  (most can work with any)
        """Refuse a model or a calibration with which it must fail; see `recipe.Pass.check_inputs`."""

    def cost(self, sites: Sequence[str], tier: Tier) -> str:
        """What it will take, for people."""
        return ""

    def key(self, problem: BitProblem, *parts: Any) -> str:
        """Of the pieces of this allocation: equal where they are."""
        told = (self.name, parts, problem.sites, problem.specs, problem.groups, problem.work.calibration.sha256)
        return hashlib.sha256(repr(told).encode()).hexdigest()[:8]


Formats = str | Mapping[str, str] | BitAllocator


def specs_in(formats: Formats) -> tuple[FormatSpec, ...]:
    """Every format that a map might get.

    Raises:
      ConfigError: a name that is no format.
    """
    if isinstance(formats, BitAllocator):
        return formats.specs
    if isinstance(formats, str):
        return (FormatSpec.parse(formats),)
    return tuple(FormatSpec.parse(text, f"format of {glob}") for glob, text in formats.items())


def check_formats(formats: Formats, config: ModelConfig, sites: Sequence[str]) -> None:
    """Refuse formats that these maps cannot have, before any work.

    Raises:
      ConfigError: names the glob, the site or the allocator's option.
    """
    if isinstance(formats, BitAllocator):
        formats.check(config, sites)
        return
    specs = _by_site(formats, sites)
    for spec in dict.fromkeys(specs.values()):
        check_format(config, [site for site in sites if specs[site] == spec], spec)


def specs_for(formats: Formats, model: Model, work: Work, sites: Sequence[str]) -> dict[str, FormatSpec]:
    """The format of each map."""
    if isinstance(formats, BitAllocator):
        return formats.plan(model, work, sites)
    return _by_site(formats, sites)


def _by_site(formats: str | Mapping[str, str], sites: Sequence[str]) -> dict[str, FormatSpec]:
    if isinstance(formats, str):
        return dict.fromkeys(sites, FormatSpec.parse(formats))
    specs = {glob: FormatSpec.parse(text, f"format of {glob}") for glob, text in formats.items()}
    first = {site: next((glob for glob in specs if site_matches(glob, site)), "") for site in sites}
    bare = [site for site, glob in first.items() if not glob]
    check(not bare, "format: globs", list(specs), f"give {', '.join(bare[:4])} no format; end with '**'")
    idle = [glob for glob in specs if glob not in first.values()]
    check(not idle, "format: globs", idle, "name no map that an earlier one has not taken")
    return {site: specs[glob] for site, glob in first.items()}


def menu_of(formats: Iterable[str]) -> tuple[str, ...]:
    """Formats as recipes are given them, without empty ones; `MENU` where there are none."""
    return tuple(text for text in formats if text) or MENU


@dataclass(frozen=True)
class Additive(BitAllocator):
    """Losses of single maps that are taken to add up, minimised under budgets.

    budget: see the module. menu: formats. tied: whether maps that read one tensor (q, k and v; gate and up) share a format, as
    kernels that fuse them need.
    """

    budget: str = "4.25bits"
    menu: tuple[str, ...] = MENU
    tied: bool = True
    units: ClassVar[tuple[str, ...]] = ("bits", "MB")

    def __post_init__(self) -> None:
        parse_budget(self.budget, self.units, f"{self.name}: budget")

    @property
    def specs(self) -> tuple[FormatSpec, ...]:
        return tuple(FormatSpec.parse(text, f"{self.name}: menu") for text in self.menu)

    @abc.abstractmethod
    def losses(self, problem: BitProblem) -> Float[np.ndarray, "N K"]:
        """What each map in each format adds to the mean loss of a token, nats; read from pieces of the problem's work."""

    def budgets(self, config: ModelConfig, sites: Sequence[str]) -> list[Budget]:
        """The budgets with what each map costs in each format."""
        costs, weights = 8 * stored_bytes(config, sites, self.specs), sizes_of(config, sites).sum()
        found = []
        for amount, unit in parse_budget(self.budget, self.units, f"{self.name}: budget"):
            per = {"bits": weights, "MB": 8e6}.get(unit)
            if per is not None:
                found.append(Budget(f"{self.name}: {unit}", costs, amount * per, per))
        return found

    def check(self, config: ModelConfig, sites: Sequence[str]) -> None:
        super().check(config, sites)
        free = np.zeros((len(sites), len(self.specs)))
        bits.allocate(free, self.budgets(config, sites), self._groups(sites))

    def plan(self, model: Model, work: Work, sites: Sequence[str]) -> dict[str, FormatSpec]:
        specs, groups = self.specs, self._groups(sites)
        problem = BitProblem(model, work, tuple(sites), specs, groups)
        losses = self.losses(problem)
        budgets = self.budgets(model.config, sites)
        found = bits.allocate(losses, budgets, groups)
        plan = {site: specs[choice] for site, choice in zip(sites, found.choices, strict=True)}
        spent = {one.name.split(": ")[-1]: float(total / one.unit) for one, total in zip(budgets, found.spent, strict=True)}
        by_size = bits.frontier(losses, 8 * stored_bytes(model.config, sites, specs), groups, FRONTIER_POINTS)
        rows = zip(by_size.cost / problem.sizes.sum(), by_size.loss, strict=True)
        work.note(self.name, budget=self.budget, spent=spent, predicted_loss=found.loss, **described(plan),
                  menu=[str(spec) for spec in specs], loss_of=dict(zip(sites, losses.tolist(), strict=True)),
                  frontier_of_bits_and_loss=[list(map(float, row)) for row in rows])  # fmt: skip
        return plan

    def _groups(self, sites: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        ties = tied_maps(sites) if self.tied else []
        return tuple(tuple(group) for group in bits.groups_of(len(sites), ties))


def described(plan: Mapping[str, FormatSpec]) -> dict[str, Any]:
    """For reports: the format of each map, and of each kind of map how many layers have which."""
    kinds: dict[str, dict[str, int]] = {}
    for site, spec in plan.items():
        counts = kinds.setdefault(site.split(".", 2)[2], {})
        counts[str(spec)] = counts.get(str(spec), 0) + 1
    return {"plan": {site: str(spec) for site, spec in plan.items()}, "layers_of": kinds}


def tied_maps(sites: Sequence[str]) -> list[list[int]]:
    """Numbers of the maps of each block that read one tensor."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number, site in enumerate(sites):
        _, layer, local = site.split(".", 2)
        tap = next((tap for tap, maps in INPUTS.items() if local in maps), local)
        groups.setdefault((layer, tap), []).append(number)
    return list(groups.values())


def sizes_of(config: ModelConfig, sites: Iterable[str]) -> Float[np.ndarray, " N"]:
    """Weights of each map."""
    shapes = rule_sites(config)["weights"]
    return np.array([shapes[site][0] * shapes[site][1] for site in sites], np.float64)


def stored_bytes(config: ModelConfig, sites: Iterable[str], specs: Sequence[FormatSpec]) -> Float[np.ndarray, "N K"]:
    """Bytes of each map in each format, with scales, zeros, and what fills up rows and groups."""
    shapes = rule_sites(config)["weights"]
    return np.array([[_bytes_of(shapes[site], spec) for spec in specs] for site in sites], np.float64)


@functools.cache
def _bytes_of(shape: tuple[int, int], spec: FormatSpec) -> int:
    weight = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(functools.partial(qtensor, spec=spec), weight).nbytes


def parse_budget(text: str, units: Sequence[str], field: str) -> list[tuple[float, str]]:
    """(amount, unit) of each budget in `4.25bits,60MB`.

    Raises:
      ConfigError: no positive number, or a unit that is not of `units`, or one that is there twice.
    """
    found: list[tuple[float, str]] = []
    for part in text.split(","):
        matched = _AMOUNT.fullmatch(part)
        if matched is None:
            raise ConfigError(f"{field} = {text!r}: expected an amount with its unit ({', '.join(units)}), such as 4.25bits; "
                              "several have commas between")
        amount, unit = float(matched[1]), matched[2]
        check_choice(f"{field} = {text!r}: unit", unit, units)
        check(amount > 0, field, text, "must be positive")
        check(unit not in [other for _, other in found], field, text, f"gives {unit} twice")
        found.append((amount, unit))
    return found


def in_pieces(
    problem: BitProblem, title: str, names: Sequence[str], compute: Callable[[int], np.ndarray]
) -> list[np.ndarray]:
    """What `compute` gives for each name's number, under a progress bar, each a piece of the problem's work."""
    found = []
    with problem.work.progress(title, len(names)) as advance:
        for number, name in enumerate(names):
            piece = problem.work.piece(name, functools.partial(_piece, compute, number))
            found.append(piece["found"])
            advance(1)
    return found


def _piece(compute: Callable[[int], np.ndarray], number: int) -> dict[str, np.ndarray]:
    return {"found": np.asarray(compute(number), np.float64)}


@functools.partial(jax.jit, static_argnums=1)
def _fake(kernel: Array, spec: FormatSpec) -> Array:
    return fake(kernel, spec)
