"""COUNTDOWN: rows of each down map are read where |h| times their norm is large.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/countdown.py:0.5 --out runs/countdown

The argument is the share of hidden units that are dropped.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.plugs import resolve


def get_recipe(arg: str = "") -> list[Pass]:
    return [resolve("pass", f"countdown:{arg}", "recipe")]
