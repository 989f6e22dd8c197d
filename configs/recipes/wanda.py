"""Wanda on every map; the argument is the share of zeros, or n:m.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/wanda.py:0.5 --out DIR
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/wanda.py:2:4 --out DIR
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.pruning.wanda import Wanda


def get_recipe(arg: str = "") -> list[Pass]:
    return [Wanda(arg or "0.5")]
