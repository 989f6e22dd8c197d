"""Recipes: post-training work as a list of passes, checked as a whole before any of them starts.

A pass is a dataclass with its options and two methods; the papers' files define them:

    @dataclass
    class Teal(Pass):
        sparsity: float = 0.5
        stage: ClassVar[str] = ACTIVATIONS

        def check(self, model: ModelConfig) -> None: ...       # before any work: sites, sparsity, what the model must have
        def apply(self, model: Model, work: Work) -> Model: ...

Stages are ordered: what is fitted to activations or weights is lost when a later pass changes the basis or the weights.
"""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from sparsejax.compress.calibration import Calibration
from sparsejax.compress.pieces import flattened, restored
from sparsejax.context import site_matches
from sparsejax.evaluate.progress import Advance, no_progress
from sparsejax.io.model import Model
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import rule_sites
from sparsejax.models.sizes import expert_sites
from sparsejax.plugs import ConfigError, check, check_choice

# Changes of basis and structure; then of the weights' values; then the formats in which they are stored; then what selects
# activations; then what makes up for all of it.
STRUCTURE, WEIGHTS, FORMATS, ACTIVATIONS, COMPENSATION = "structure", "weights", "formats", "activations", "compensation"
STAGES = (STRUCTURE, WEIGHTS, FORMATS, ACTIVATIONS, COMPENSATION)


class Tier(NamedTuple):
    """How much work a compression puts in, see `TIERS`.

    Fields:
      sequences, length: of the calibration.
      allocation_tokens, allocation_step: of greedy allocators.
      population, generations: of evolutionary searches.
      windows, window: of the evaluation of each text; 0 windows: all.
    """

    sequences: int
    length: int
    allocation_tokens: int
    allocation_step: float
    population: int
    generations: int
    windows: int
    window: int


TIERS = {
    "quick": Tier(16, 512, 512, 0.1, 8, 3, 8, 512),
    "full": Tier(64, 1024, 2048, 0.05, 32, 10, 0, 2048),
}


@dataclass
class Work:
    """What a pass works with beside the model.

    Fields:
      calibration: the tokens that statistics are taken from.
      tier: how much work to put in.
      folder: where finished pieces are kept, so that an interrupted compression goes on; None: nowhere.
      progress: (what is done, pieces) -> context manager of a function that takes the pieces just finished.
      notes: what passes report, by pass: tables and numbers as JSON values.
      shared: by the number of a pass, folders that outlive the compression, for passes whose `levels_share`.
    """

    calibration: Calibration
    tier: Tier
    folder: Path | None = None
    progress: Callable[[str, int], contextlib.AbstractContextManager[Advance]] = no_progress
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    shared: Mapping[int, Path] = field(default_factory=dict)
    number: int = 0  # of the pass that runs

    def piece(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A finished piece of the running pass (say, a block's statistics): read where it was kept, else computed and kept.

        Values are arrays, or QTensors.
        """
        folder = self.shared.get(self.number, self.folder)
        if folder is None:
            return compute()
        path = folder / f"{self.number}-{name}.npz"
        if path.exists():
            with np.load(path) as kept:
                return restored(kept)
        found = flattened(compute())
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            np.savez(file, **found)  # type: ignore[arg-type]
        os.replace(unfinished, path)
        return restored(found)

    def layers(self, title: str, count: int) -> Iterator[int]:
        """0 to count - 1 under a progress bar."""
        with self.progress(title, count) as advance:
            for layer in range(count):
                yield layer
                advance(1)

    def note(self, name: str, **values: Any) -> None:
        """Add to what the report says of a pass."""
        self.notes.setdefault(f"{self.number}-{name}", {}).update(values)


class Pass(abc.ABC):
    """One step of a recipe; subclasses are dataclasses of their options.

    stage: what it changes, see `STAGES`.
    scope: what its sparsity needs of the evaluation: "all", or "from:0.5" for one that reads a prompt.
    experts: whether it works on a mixture of experts.
    levels_share: whether its finished pieces serve every value of its `sparsity`.
    changes_floats: whether it changes weights as floats, so that none may be in another format yet; all of the stages before
      formats do.
    """

    stage: ClassVar[str]
    scope: ClassVar[str] = "all"
    experts: ClassVar[bool] = False
    levels_share: ClassVar[bool] = False
    changes_floats: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @abc.abstractmethod
    def check(self, config: ModelConfig) -> None:
        """Refuse what cannot be done to a model of this config.

        Raises:
          ConfigError: names the pass, the option and the site.
        """

    def after(self, config: ModelConfig) -> ModelConfig:
        """The config that this pass leaves, which later passes are checked against; what excludes none of them may be left out.

        Raises:
          ConfigError: what it puts into a model of this config does not go with what is there.
        """
        return config

    def check_inputs(self, model: Model, calibration: Calibration) -> None:  # noqa: B027  (most can work with any)
        """Refuse weights or a calibration with which it must fail; asked of every pass before the first one works.

        Args:
          model: before any pass.
        Raises:
          ConfigError: names the site, and what would help.
        """

    @abc.abstractmethod
    def apply(self, model: Model, work: Work) -> Model:
        """The model after this pass."""

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        """What it will take, for people, e.g. "30 blocks x 43 steps x 7 trials of 512 tokens"; empty: next to nothing."""
        return ""


def check_recipe(passes: Sequence[Pass], config: ModelConfig) -> None:
    """Refuse a recipe before it starts.

    Raises:
      ConfigError: no passes, an order that loses what an earlier pass fitted, or what a pass itself refuses.
    """
    check(passes, "recipe", [], "holds no pass")
    latest, rounded = passes[0], dict[str, str]()
    for number, one in enumerate(passes):
        check_choice(f"recipe[{number}] ({one.name}): stage", one.stage, STAGES)
        # Before the order of stages: what excludes an earlier pass altogether should not be told to go first.
        try:
            one.check(config)
            config = one.after(config)
        except ConfigError as error:
            raise ConfigError(f"recipe[{number}] ({one.name}): {error}") from error
        if STAGES.index(one.stage) < STAGES.index(latest.stage):
            raise ConfigError(f"recipe[{number}] ({one.name}): changes {one.stage} after {latest.name} has fitted "
                              f"{latest.stage}, which would be wrong from then on; put {one.name} first")
        stored = next((before.name for before in passes[:number] if before.stage == FORMATS), "")
        check(not (stored and one.changes_floats), f"recipe[{number}] ({one.name}): after", stored,
              "changes weights as floats, and they are stored in another format by then; leave one of the two out")  # fmt: skip
        if one.stage == FORMATS:
            rounds = getattr(one, "sites", "") or getattr(getattr(one, "base", None), "sites", "")
            here = [site for site in rule_sites(config)["weights"] if rounds and site_matches(rounds, site)]
            twice = next((site for site in here if site in rounded), "")
            check(not twice, f"recipe[{number}] ({one.name}): {twice}", rounded.get(twice), "has rounded this map before; "
                  "leave one of the two out, or give them other sites")
            rounded |= dict.fromkeys(here, one.name)
        latest = one


def check_experts(passes: Sequence[Pass], config: ModelConfig) -> None:
    """Refuse passes that know dense feed-forward networks alone, where a block has none.

    Raises:
      ConfigError: names the pass and the first site of experts.
    """
    site = next((site.rpartition(".")[0] for site in expert_sites(config)), "")
    for number, one in enumerate(passes):
        check(not site or one.experts, f"recipe[{number}] ({one.name}): site", site,
              "is a mixture of experts, whose units this pass cannot choose; what selects entries at the inputs of linear maps "
              "can (teal, topk, wina, n_of_m)")  # fmt: skip


def check_sparsity(sparsity: float, name: str = "sparsity") -> None:
    """Raise a ConfigError unless 0 <= sparsity < 1."""
    check(0 <= sparsity < 1, name, sparsity, "must be in [0, 1)")


def run_recipe(passes: Sequence[Pass], model: Model, work: Work) -> Model:
    """The model after all passes; each finished piece of work is kept in `work.folder`.

    Raises:
      ConfigError: see `check_recipe` and `Pass.check_inputs`.
    """
    check_recipe(passes, model.config)
    for number, one in enumerate(passes):
        try:
            one.check_inputs(model, work.calibration)
        except ConfigError as error:
            raise ConfigError(f"recipe[{number}] ({one.name}): {error}") from error
    for number, one in enumerate(passes):
        work.number = number
        model = one.apply(model, work)
    return model
