"""GRIFFIN: one set of hidden units per prompt and layer; evaluated with the second half of each window sparse.

python -m experiments.compress --model smollm2-135m --recipe configs/recipes/griffin.py:0.5 --out runs/griffin

The argument is the share of hidden units left out, and other fields of `Griffin` by name: 0.5,dense_first=6,dense_last=5;
or 0.5,random for its control, a random set in each layer.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.plugs import resolve


def get_recipe(arg: str = "") -> list[Pass]:
    sparsity, comma, rest = arg.partition(",random")
    return [resolve("pass", f"random_set:{sparsity}{rest}" if comma else f"griffin:{arg}", "recipe")]
