"""CATS: units of each FFN whose gate is small are not computed.

python -m experiments.compress --model smollm2-135m --recipe configs/recipes/cats.py:0.5 --out runs/cats

The argument is the share of hidden units left out, and other fields of `Cats` by name.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.plugs import resolve


def get_recipe(arg: str = "") -> list[Pass]:
    return [resolve("pass", f"cats:{arg}", "recipe")]
