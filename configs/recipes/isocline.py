"""Isocline, a method of this project: thresholds at which one more dropped parameter costs the loss the same everywhere.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/isocline.py:0.5 --out runs/isocline

The argument is the model sparsity, and other fields of `Isocline` by name. Nothing is read beside the weights that count.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.plugs import resolve


def get_recipe(arg: str = "") -> list[Pass]:
    return [resolve("pass", f"isocline:{arg}", "recipe")]
