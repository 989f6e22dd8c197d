"""Deja Vu: a low-rank predictor beside each FFN says which hidden units a token needs.

python -m experiments.compress --model smollm2-135m --recipe configs/recipes/deja_vu.py:0.5 --out runs/deja_vu

The argument is the share of hidden units left out, and other fields of `DejaVu` by name: 0.5,relu=true,rank=32.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.plugs import resolve


def get_recipe(arg: str = "") -> list[Pass]:
    return [resolve("pass", f"deja_vu:{arg}", "recipe")]
