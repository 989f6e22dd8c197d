"""Activation N:M: of every M consecutive entries of an input the N largest are kept.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/n_of_m.py:8,16 --out runs/8of16

The argument is N,M and other fields of `ActivationNofM` by name.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.plugs import resolve


def get_recipe(arg: str = "") -> list[Pass]:
    return [resolve("pass", f"n_of_m:{arg}", "recipe")]
