"""Recipes are refused as a whole before they start, and finished pieces survive a kill."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest

from sparsejax.compress.recipe import ACTIVATIONS, STRUCTURE, TIERS, Pass, Work, check_recipe, check_sparsity, run_recipe
from sparsejax.plugs import ConfigError
from tests.compress.tiny import tiny_model


@dataclasses.dataclass
class Halve(Pass):
    """Counts its blocks; stops as a killed process would after `stop` of them."""

    sparsity: float = 0.5
    stop: int = 99
    stage: ClassVar[str] = ACTIVATIONS
    computed: ClassVar[list[int]] = []

    def check(self, config):
        check_sparsity(self.sparsity)

    def apply(self, model, work):
        total = 0.0
        for layer in work.layers("halving", 4):
            if layer == self.stop:
                raise KeyboardInterrupt
            total += float(work.piece(f"block{layer}", lambda layer=layer: self._block(layer))["value"])
        work.note(self.name, total=total)
        return dataclasses.replace(model, name=f"{model.name}, {total}")

    def _block(self, layer):
        self.computed.append(layer)
        return {"value": np.float64(layer)}


@dataclasses.dataclass
class Turn(Halve):
    stage: ClassVar[str] = STRUCTURE


def work(folder=None):
    return Work(calibration=None, tier=TIERS["quick"], folder=folder)


def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path):
    model = tiny_model(layers=1)
    Halve.computed.clear()
    with pytest.raises(KeyboardInterrupt):
        run_recipe([Halve(stop=2)], model, work(tmp_path / "pieces"))
    assert Halve.computed == [0, 1]
    (tmp_path / "pieces" / "0-block2.unfinished").write_bytes(b"half")  # as a kill during a write leaves it
    resumed = work(tmp_path / "pieces")
    assert run_recipe([Halve()], model, resumed).name == "tiny, 6.0"
    assert Halve.computed == [0, 1, 2, 3] and resumed.notes == {"0-halve": {"total": 6.0}}


def test_an_order_that_loses_what_was_fitted_is_refused_naming_the_pass():
    config = tiny_model(layers=1).config
    check_recipe([Turn(), Halve()], config)
    with pytest.raises(ConfigError, match=r"recipe\[1\] \(turn\): changes structure after halve .*put turn first"):
        check_recipe([Halve(), Turn()], config)
    with pytest.raises(ConfigError, match="holds no pass"):
        check_recipe([], config)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_outside_zero_to_one_is_refused_before_any_work(sparsity):
    Halve.computed.clear()
    with pytest.raises(ConfigError, match=r"recipe\[1\] \(halve\): sparsity = .*must be in \[0, 1\)"):
        run_recipe([Halve(), Halve(sparsity)], tiny_model(layers=1), work())
    assert not Halve.computed
